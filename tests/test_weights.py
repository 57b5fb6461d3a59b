"""AGRE weights and the distillation loss, against autograd and slow formulas."""

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from torch import Tensor

import grokd
from grokd import Classifier, Input

TAU = 4.0
CLASSES = [2, 3, 10]
Example = tuple[Classifier, Tensor, Tensor, Tensor]  # model, images, teachers, biased


def literal_loss(student: Tensor, target: Tensor) -> Tensor:
    """tau^2 KL(p_t || p_s) of one sample, written out."""
    p_t = torch.exp(target / TAU) / torch.exp(target / TAU).sum()
    p_s = torch.exp(student / TAU) / torch.exp(student / TAU).sum()
    return TAU**2 * (p_t * (p_t.log() - p_s.log())).sum()


def literal_cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    x, y = torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b])
    return float(x @ y / (x.norm() * y.norm()))


def example(arch: str, classes: int, teachers: int = 3, batch: int = 6) -> Example:
    """A float64 network with used batch-norm statistics, images, and logits of an ensemble."""
    torch.manual_seed(classes)
    model = grokd.Classifier(arch, classes, Input(mean=(0.4, 0.5, 0.6))).double()
    with torch.no_grad():
        model.train()(torch.rand(32, 3, 16, 16).double())
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(batch, 3, 16, 16).double()
    logits = 2 * torch.randn(teachers, batch, classes).double()
    biased = 2 * torch.randn(batch, classes).double()
    return model, images, logits, biased


def literal_weights(
    model: Classifier,
    images: Tensor,
    teachers: Tensor,
    biased: Tensor,
    parameters: Sequence[Tensor],
    normalise: bool = True,
) -> Tensor:
    """Per-sample weights from one autograd call per sample and teacher, batch norm in eval mode."""
    model.eval()
    weights = torch.zeros(len(teachers), len(images), dtype=torch.float64)
    for i, image in enumerate(images):
        logits = model(image[None])[0]

        def gradient(target: Tensor, logits: Tensor = logits) -> tuple[Tensor, ...]:
            loss = literal_loss(logits, target)
            return torch.autograd.grad(loss, parameters, retain_graph=True)

        g_b = gradient(biased[i])
        for t, teacher in enumerate(teachers):
            g_t = gradient(teacher[i])
            if normalise:
                weights[t, i] = 1 - literal_cosine(g_t, g_b)
            else:
                inner = sum((a * b).sum() for a, b in zip(g_t, g_b, strict=True))
                weights[t, i] = max(0.0, 1 - float(inner))
    return weights


@pytest.mark.parametrize("classes", CLASSES)
def test_closed_form_equals_last_layer_gradients(classes: int) -> None:
    model, images, teachers, biased = example("resnet8", classes)
    ours = grokd.agre_weights(model.eval()(images), teachers, biased, TAU)
    head = list(model.head.parameters())
    literal = literal_weights(model, images, teachers, biased, head)
    assert (ours - literal).abs().max() < 1e-5
    assert ours.max() > 0.1


def test_closed_form_equals_full_parameter_gradients_for_two_classes() -> None:
    model, images, teachers, biased = example("resnet8", 2)
    ours = grokd.agre_weights(model.eval()(images), teachers, biased, TAU)
    literal = literal_weights(model, images, teachers, biased, list(model.parameters()))
    assert (ours - literal).abs().max() < 1e-5
    assert set(ours.flatten().round().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("arch", ["resnet8", "cnn2"])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("normalise", [True, False])
def test_parameters_space_equals_full_parameter_gradients(
    arch: str, classes: int, normalise: bool
) -> None:
    model, images, teachers, biased = example(arch, classes)
    reference, gram = grokd.logit_gram(model.train(), images)
    assert model.training
    ours = grokd.agre_weights(reference, teachers, biased, TAU, normalise, gram)
    everything = list(model.parameters())
    literal = literal_weights(model, images, teachers, biased, everything, normalise)
    assert (ours - literal).abs().max() < 1e-5
    if classes > 2 and normalise:  # otherwise the two spaces could not be told apart
        closed = grokd.agre_weights(reference, teachers, biased, TAU)
        assert (closed - literal).abs().max() > 1e-4


@pytest.mark.parametrize("classes", CLASSES)
def test_without_normalisation_weights_are_inner_products_of_logit_gradients(classes: int) -> None:
    _, _, teachers, biased = example("cnn2", classes)
    student = torch.randn(6, classes).double().requires_grad_()
    ours = grokd.agre_weights(student, teachers, biased, TAU, normalise=False)
    for i in range(6):
        g_b = torch.autograd.grad(literal_loss(student[i], biased[i]), student)[0]
        for t in range(3):
            g_t = torch.autograd.grad(literal_loss(student[i], teachers[t, i]), student)[0]
            expected = max(0, 1 - float((g_t * g_b).sum()))
            assert float(ours[t, i]) == pytest.approx(expected, abs=1e-9)
    assert (ours == 0).any() or classes > 2
    assert (ours > 1).any()


@pytest.mark.parametrize("normalise", [True, False])
def test_batch_space_equals_literal_batch_gradients(normalise: bool) -> None:
    model, images, teachers, biased = example("resnet8", 3)
    parameters = list(model.parameters())
    logits = model.train()(images)
    ours = grokd.batch_weights(
        logits, torch.cat([teachers, biased[None]]), parameters, TAU, normalise,
        lambda g: g / len(images),
    )

    def gradient(targets: Tensor) -> tuple[Tensor, ...]:
        losses = [literal_loss(s, t) for s, t in zip(logits, targets, strict=True)]
        return torch.autograd.grad(torch.stack(losses).mean(), parameters, retain_graph=True)

    g_b = gradient(biased)
    for t, teacher in enumerate(teachers):
        g_t = gradient(teacher)
        inner = sum(float((a * b).sum()) for a, b in zip(g_t, g_b, strict=True))
        cosine = literal_cosine(g_t, g_b)
        assert float(ours[t]) == pytest.approx(max(0.01, 1 - (cosine if normalise else inner)))


def test_batch_space_weights_have_a_floor() -> None:
    model, images, _, biased = example("cnn2", 3)
    logits = model(images)
    twin = grokd.batch_weights(
        logits, torch.stack([biased, biased]), list(model.parameters()), TAU, True,
        lambda g: g / len(images),
    )
    assert twin.tolist() == [0.01]


@pytest.mark.parametrize("zero", ["uniform", "drop"])
@pytest.mark.parametrize("combine", ["losses", "logits"])
@pytest.mark.parametrize("shrink", [0.0, 0.25])
def test_weighted_loss_equals_slow_formula(zero: str, combine: str, shrink: float) -> None:
    torch.manual_seed(0)
    student, teachers = torch.randn(5, 3).double(), torch.randn(4, 5, 3).double()
    weights = 2 * torch.rand(4, 5).double()
    weights[:, 1] = 0  # no teacher departs on sample 1
    shares = grokd.teacher_shares(grokd.shrunk(weights, shrink), zero)
    ours = grokd.weighted_kd(student, teachers, shares, TAU, combine)
    for i in range(5):
        w = [(1 - shrink) * float(weights[t, i]) + shrink for t in range(4)]
        if sum(w) == 0:
            w = [1.0] * 4 if zero == "uniform" else [0.0] * 4
        if sum(w) == 0:
            expected = 0.0
        elif combine == "losses":
            losses = [float(literal_loss(student[i], teachers[t, i])) for t in range(4)]
            expected = sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w)
        else:
            mean = torch.stack([w[t] * teachers[t, i] for t in range(4)]).sum(0) / sum(w)
            expected = float(literal_loss(student[i], mean))
        assert float(ours[i]) == pytest.approx(expected, rel=1e-9)


def test_combined_losses_equal_loss_to_mean_probabilities_up_to_a_constant() -> None:
    """The paper's footnote: their gradients are the same."""
    torch.manual_seed(0)
    student = torch.randn(5, 3).double().requires_grad_()
    teachers = torch.randn(4, 5, 3).double()
    shares = grokd.teacher_shares(torch.rand(4, 5).double())
    ours = grokd.weighted_kd(student, teachers, shares, TAU).sum()
    mean = (shares[..., None] * (teachers / TAU).softmax(-1)).sum(0)
    cross = -(TAU**2) * (mean * (student / TAU).log_softmax(-1)).sum()
    difference = torch.autograd.grad(ours - cross, student)[0]
    assert difference.abs().max() < 1e-12


def test_student_equal_to_a_teacher_or_the_biased_model_gets_weight_one() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    other = torch.tensor([[0.0, 3.0, 0.5]])
    assert grokd.agre_weights(logits, logits[None], other, TAU).tolist() == [[1.0]]
    assert grokd.agre_weights(logits, other[None], logits, TAU).tolist() == [[1.0]]


def test_teacher_counts_for_two_classes_iff_student_is_between_it_and_the_biased_model() -> None:
    student, biased = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    teachers = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[5.0, 0.0]]])
    assert grokd.agre_weights(student, teachers, biased, TAU).flatten().tolist() == [0.0, 2.0, 0.0]


def test_weights_follow_float32_logits_down_to_the_floor() -> None:
    """Confident samples: the gap between two near-parallel directions is computed in float64."""
    student = torch.tensor([[18.0, 0.0, -1.0]])
    teachers, biased = torch.tensor([[[14.0, 0.0, 0.02]]]), torch.tensor([[14.0, 0.0, 0.0]])
    exact = grokd.agre_weights(student.double(), teachers.double(), biased.double(), 1.0)
    assert float(grokd.agre_weights(student, teachers, biased, 1.0)) == float(exact)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=200, deadline=None)
@given(
    classes=st.sampled_from(CLASSES),
    data=st.data(),
    tau=st.sampled_from([1e-3, 1.0, 4.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    normalise=st.booleans(),
    zero=st.sampled_from(["uniform", "drop"]),
    combine=st.sampled_from(["losses", "logits"]),
)
def test_no_finite_logits_give_nan(
    classes: int,
    data: st.DataObject,
    tau: float,
    dtype: torch.dtype,
    normalise: bool,
    zero: str,
    combine: str,
) -> None:
    row = st.lists(finite, min_size=classes, max_size=classes)
    student, biased, *teachers = torch.tensor(data.draw(st.lists(row, min_size=4, max_size=4)))
    check_finite(student[None], torch.stack(teachers)[:, None], biased[None], tau, dtype,
                 normalise, zero, combine)


def check_finite(
    student: Tensor,
    teachers: Tensor,
    biased: Tensor,
    tau: float,
    dtype: torch.dtype,
    normalise: bool,
    zero: str,
    combine: str,
) -> None:
    student = student.to(dtype).requires_grad_()
    teachers, biased = teachers.to(dtype), biased.to(dtype)
    weights = grokd.agre_weights(student, teachers, biased, tau, normalise)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights <= 2).all() or not normalise
    loss = grokd.weighted_kd(student, teachers, grokd.teacher_shares(weights, zero), tau, combine)
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 88.0, 1e4, 3e38])
@pytest.mark.parametrize("normalise", [True, False])
def test_ties_and_extremes_are_finite(value: float, normalise: bool) -> None:
    """All models equal (every weight 1), and all on one side (every weight 0)."""
    same, student = torch.tensor([[value, -value, 0.0]]), torch.zeros(1, 3)
    teachers = same.expand(3, 1, 3)
    check_finite(same, teachers, same, 4.0, torch.float32, normalise, "drop", "losses")
    check_finite(student, teachers, same, 4.0, torch.float32, normalise, "drop", "logits")
    if value and normalise:
        weights = grokd.agre_weights(student, teachers, same, 4.0)
        assert weights.sum() == 0


@pytest.mark.parametrize("space", ["logits", "parameters", "batch"])
def test_bfloat16_autocast_keeps_heads_and_losses_in_float32(space: str) -> None:
    torch.manual_seed(0)
    model = Classifier("resnet8", 3, Input())
    images = torch.rand(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.nn.functional.linear(model.features(images), torch.zeros(3, 64))
        assert half.dtype == torch.bfloat16
        logits = model(images)
        assert logits.dtype == torch.float32
        teachers, biased = torch.randn(2, 4, 3), torch.randn(4, 3)
        gram = None
        if space == "parameters":
            _, gram = grokd.logit_gram(model, images)
        if space == "batch":
            weights = grokd.batch_weights(
                logits, torch.cat([teachers, biased[None]]), list(model.parameters()), TAU, True,
                lambda g: g / 4,
            )[:, None].expand(2, 4)
        else:
            weights = grokd.agre_weights(logits, teachers, biased, TAU, True, gram)
        loss = grokd.weighted_kd(logits, teachers, grokd.teacher_shares(weights), TAU)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(weights).all()


def test_gce_equals_its_formula_and_amplifies_confident_samples() -> None:
    logits = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0])
    p = logits.softmax(-1)[:, 0]
    assert torch.allclose(grokd.gce(logits, labels, 0.7), (1 - p**0.7) / 0.7)
    ours = torch.autograd.grad(grokd.gce(logits, labels, 0.7).sum(), logits)[0][:, 0]
    plain = torch.autograd.grad(grokd.cross_entropy(logits, labels).sum(), logits)[0][:, 0]
    assert torch.allclose(ours, plain * p.detach() ** 0.7)


# Ensemble baselines


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_ae_kd_solves_its_quadratic_programme(classes: int, count: int, scale: float) -> None:
    torch.manual_seed(classes + count)
    student = torch.randn(16, classes).double()
    teachers = student + scale * (torch.randn(count, 1, classes) + torch.randn(count, 16, classes))
    alpha = grokd.ae_kd_weights(student, teachers, TAU, lambda g: g / 16).numpy()
    assert alpha.sum() == pytest.approx(1, abs=1e-6)
    assert alpha.min() >= 0
    assert alpha.max() <= 0.6 + 1e-6
    gradients = np.stack([
        TAU * ((student / TAU).softmax(-1) - (each / TAU).softmax(-1)).mean(0) for each in teachers
    ])
    gram = gradients @ gradients.T
    gram = gram / np.trace(gram) + 1e-6 * np.eye(count)
    best = scipy.optimize.minimize(
        lambda a: a @ gram @ a, np.full(count, 1 / count), jac=lambda a: 2 * gram @ a,
        bounds=[(0, 0.6)] * count, constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        method="SLSQP", options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert alpha @ gram @ alpha <= best.fun + 1e-6
    if classes == 10 and count < 10:
        assert np.abs(alpha - best.x).max() < 1e-4
        assert alpha.max() - alpha.min() > 0.05  # it is not simply uniform


@given(st.data())
def test_weights_of_least_norm_meet_the_optimality_conditions(data: st.DataObject) -> None:
    count, rank = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 12))
    number = st.sampled_from([-1.0, -0.5, -0.1, 0.0, 1e-9, 0.1, 0.5, 1.0]) | st.floats(-1, 1)
    rows = data.draw(st.lists(
        st.lists(number, min_size=rank, max_size=rank), min_size=count, max_size=count))
    vectors = np.array(rows)
    gram = vectors @ vectors.T / max(np.square(vectors).sum(), 1e-30) + 1e-6 * np.eye(count)
    weights = grokd.least_norm_weights(gram, 0.6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0
    assert weights.max() <= 0.6 + 1e-12
    pull = gram @ weights
    inner = pull[(weights > 1e-9) & (weights < 0.6 - 1e-9)]
    assert np.ptp(inner) < 1e-9  # alike where a weight could go both ways,
    assert pull[weights < 1e-9].min(initial=inner.min()) > inner.max() - 1e-9  # more at 0,
    assert pull[weights > 0.6 - 1e-9].max(initial=inner.max()) < inner.min() + 1e-9  # less at .6


def test_ae_kd_of_one_teacher_or_without_gradients_is_uniform() -> None:
    student = torch.randn(4, 3)
    assert grokd.ae_kd_weights(student, student[None] + 1, TAU, lambda g: g / 4).tolist() == [1.0]
    same = student.expand(5, 4, 3)
    assert grokd.ae_kd_weights(student, same, TAU, lambda g: g / 4).tolist() == [0.2] * 5


def test_entropy_and_label_weights_equal_slow_formulas() -> None:
    torch.manual_seed(0)
    teachers, labels = 3 * torch.randn(4, 5, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    by_entropy = grokd.teacher_shares(grokd.eb_kd_weights(teachers))
    by_label = grokd.teacher_shares(grokd.ca_mkd_weights(teachers, labels))
    for i in range(5):
        p = [teachers[t, i].softmax(-1) for t in range(4)]
        entropy = [-float((q * q.log()).sum()) for q in p]
        expected = [(1 - h / sum(entropy)) / 3 for h in entropy]
        assert by_entropy[:, i].tolist() == pytest.approx(expected)
        losses = [-math.log(q[labels[i]]) for q in p]
        softmax = [math.exp(x) / sum(map(math.exp, losses)) for x in losses]
        assert by_label[:, i].tolist() == pytest.approx([(1 - s) / 3 for s in softmax])


def test_baselines_of_one_teacher_are_that_teacher() -> None:
    one, labels = torch.randn(1, 5, 3), torch.zeros(5, dtype=torch.long)
    certain = torch.tensor([1e30, 0, 0]).expand(3, 5, 3)
    assert (grokd.eb_kd_weights(one) == 1).all()
    assert (grokd.ca_mkd_weights(one, labels) == 1).all()
    assert (grokd.eb_kd_weights(certain) == 1).all()  # no entropy at all
    assert torch.isfinite(grokd.ca_mkd_weights(certain, labels + 1)).all()
