"""Scores by group, votes, tables."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import grokd


@given(
    samples=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=60),
    train=st.lists(st.integers(0, 50), min_size=4, max_size=4),
)
def test_scores_equal_slow_formulas(samples: list[tuple[bool, int]], train: list[int]) -> None:
    correct, groups = (np.array(column) for column in zip(*samples, strict=True))
    scores = grokd.group_scores(correct, groups, np.array(train))
    accuracy = {}
    for g in range(4):
        hits = [c for c, of in samples if of == g]
        if hits:
            accuracy[g] = 100 * sum(hits) / len(hits)
        assert scores["groups"][g] == (pytest.approx(accuracy[g]) if hits else None)
    assert scores["wga"] == pytest.approx(min(accuracy.values()))
    assert scores["mean"] == pytest.approx(100 * sum(c for c, _ in samples) / len(samples))
    assert scores["group_mean"] == pytest.approx(sum(accuracy.values()) / len(accuracy))
    seen = {g: train[g] for g in accuracy}
    if sum(seen.values()):
        adjusted = sum(seen[g] * accuracy[g] for g in seen) / sum(seen.values())
        assert scores["adjusted_mean"] == pytest.approx(adjusted)


def test_spread_is_the_sample_standard_deviation() -> None:
    assert grokd.spread([84.42, 85.05, 83.02]) == pytest.approx((84.163, 1.0386), abs=1e-3)
    assert grokd.spread([5.0]) == (5.0, None)


def test_vote_counts_models_and_breaks_ties_by_probability() -> None:
    logits = torch.tensor([
        [[2.0, 0.0, 0.0], [0.0, 9.0, 0.0]],
        [[2.0, 0.0, 0.0], [0.1, 0.0, 0.0]],
        [[0.0, 99.0, 0.0], [0.0, 0.0, 0.1]],
    ])
    # Sample 0: two votes beat one of great confidence. Sample 1: one each, class 1 is surest.
    assert grokd.majority_vote(logits).tolist() == [0, 1]


def test_table_is_aligned_markdown() -> None:
    text = grokd.table(["name", "x"], [["a", "1.0"], ["long name", "10.0"]])
    assert text.splitlines() == [
        "| name      |    x |", "|-----------|-----:|",
        "| a         |  1.0 |", "| long name | 10.0 |",
    ]


def test_gap_of_one_test_image_shows() -> None:
    """One waterbird-on-land image of 642 is .156 points of WGA."""
    groups = np.zeros(642, int)
    a = grokd.group_scores(np.arange(642) < 600, groups, np.array([1]))["wga"]
    b = grokd.group_scores(np.arange(642) < 601, groups, np.array([1]))["wga"]
    assert b - a == pytest.approx(0.156, abs=1e-3)
