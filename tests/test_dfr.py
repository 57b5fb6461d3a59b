"""DFR heads against independent scikit-learn fits of the same steps."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import grokd
from grokd import DFR, Train


def features(classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings with a signal, a shortcut, noise and a constant; labels; unbalanced groups."""
    random = np.random.default_rng(classes)
    groups = np.repeat(np.arange(2 * classes), random.integers(14, 40, 2 * classes))
    labels, attribute = groups // 2, groups % 2
    x = random.normal(size=(len(groups), 8)) * [1, 5, 1, 0.1, 3, 1, 1, 1] + 2
    x[:, 0] += 1.5 * labels
    x[:, 1] += 8 * attribute
    x[:, 5] = 0.25
    return x.astype(np.float32), labels, groups


def same_size(groups: np.ndarray, seed: int, *keys: int) -> np.ndarray:
    """The subset DFR draws: the first of each group in a random order, as many as the smallest."""
    order = grokd.permutation(len(groups), seed, *keys)
    smallest = min(np.bincount(groups)[np.unique(groups)])
    return np.sort(
        np.concatenate([order[groups[order] == g][:smallest] for g in np.unique(groups)])
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_l1_head_equals_independent_scikit_learn_fit(classes: int) -> None:
    x, y, groups = features(classes)
    settings, seed = DFR(num_refits=4, penalties=(1.0, 0.1, 0.01)), 5
    weight, bias = grokd.dfr_l1(x, y, groups, settings, seed)

    def regression(penalty: float) -> LogisticRegression:
        solver = "liblinear" if classes == 2 else "saga"
        return LogisticRegression(
            l1_ratio=1.0, solver=solver, C=penalty, random_state=seed, max_iter=5000
        )

    # 1. the penalty, on halves of every group
    order = grokd.permutation(len(groups), seed, 0)
    of_group = [order[groups[order] == g] for g in range(2 * classes)]
    a = np.sort(np.concatenate([m[: -(-len(m) // 2)] for m in of_group]))
    b = np.sort(np.concatenate([m[-(-len(m) // 2) :] for m in of_group]))
    a = a[same_size(groups[a], seed, 1)]
    assert len(set(np.bincount(groups[a]))) == 1
    scaler, scores = StandardScaler().fit(x[a].astype(float)), {}
    for penalty in settings.penalties:
        model = regression(penalty).fit(scaler.transform(x[a].astype(float)), y[a])
        hits = model.predict(scaler.transform(x[b].astype(float))) == y[b]
        scores[penalty] = min(hits[groups[b] == g].mean() for g in range(2 * classes))
    best = max(scores, key=lambda p: scores[p])
    assert len(set(scores.values())) > 1

    # 2. the mean of refits on balanced subsets, all standardised alike
    scaler = StandardScaler().fit(x.astype(float))
    decisions = []
    for refit in range(4):
        subset = same_size(groups, seed, 2, refit)
        model = regression(best).fit(scaler.transform(x[subset].astype(float)), y[subset])
        decisions.append(model.decision_function(scaler.transform(x.astype(float))))
    expected = np.mean(decisions, 0)

    # 3. folded: applied to raw features
    logits = x.astype(float) @ weight.T + bias
    assert weight.shape == (classes, 8)
    ours = logits[:, 1] - logits[:, 0] if classes == 2 else logits
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    assert np.all(weight[:, 5] == 0)


def test_a_single_penalty_is_used_without_tuning() -> None:
    x, y, groups = features(2)
    strong, _ = grokd.dfr_l1(x, y, groups, DFR(penalties=(0.01,), num_refits=2), 0)
    weak, _ = grokd.dfr_l1(x, y, groups, DFR(penalties=(1.0,), num_refits=2), 0)
    assert (strong == 0).sum() > (weak == 0).sum()


def test_sgd_head_ignores_the_shortcut_that_an_unbalanced_head_takes() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2, 3], [200, 8, 8, 200])
    y, attribute = groups // 2, groups % 2
    x = random.normal(size=(len(groups), 2))
    x += np.stack([2 * (2 * y - 1), 4 * (2 * attribute - 1)], 1)
    x = x.astype(np.float32)
    train = Train(lr=1e-2, batch_size=32, momentum=0.9)

    def worst(balance: np.ndarray) -> float:
        weight, bias = grokd.dfr_sgd(x, y, balance, 2, DFR(epochs=20), train, 3)
        return grokd.worst_group((x @ weight.T + bias).argmax(1) == y, groups)

    assert worst(groups) > worst(y) + 0.2


def test_sgd_head_equals_a_plain_torch_loop() -> None:
    x, y, groups = features(3)
    train = Train(lr=1e-3, batch_size=16, momentum=0.9, weight_decay=1e-2)
    weight, bias = grokd.dfr_sgd(x, y, groups, 3, DFR(epochs=2), train, 7)
    torch.manual_seed(7)
    head = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(head.parameters(), 1e-3, 0.9, weight_decay=1e-2)
    share = 1 / np.bincount(groups)[groups]
    ladder = np.cumsum(share / share.sum())
    for epoch in range(2):
        uniform = grokd.hash_uniform(7, 3, epoch, np.arange(len(y)))
        draws = [int((ladder <= u).sum()) for u in uniform]
        for first in range(0, len(y), 16):
            batch = draws[first : first + 16]
            loss = torch.nn.functional.cross_entropy(
                head(torch.tensor(x[batch])), torch.tensor(y[batch])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    np.testing.assert_allclose(weight, head.weight.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(bias, head.bias.detach().numpy(), atol=1e-6)


def test_balanced_draws_visit_groups_equally_often() -> None:
    groups = np.repeat([0, 1, 2], [200, 20, 5])
    cumulative = np.cumsum(1 / np.bincount(groups)[groups])
    draws = grokd.hash_uniform(0, 3, 0, np.arange(30_000)) * cumulative[-1]
    seen = np.bincount(groups[np.searchsorted(cumulative, draws, "right")]) / 30_000
    np.testing.assert_allclose(seen, 1 / 3, atol=0.01)
