"""Scores against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from caltech_hpo.results.scores import confusion_matrix, mean_per_class, top1, wilson_interval


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=80))
def test_scores_equal_scikit_learns(pairs):
    labels, predictions = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    matrix = confusion_matrix(labels, predictions, 5)
    assert np.array_equal(matrix, metrics.confusion_matrix(labels, predictions, labels=range(5)))
    assert top1(matrix) == pytest.approx(metrics.accuracy_score(labels, predictions))
    present = np.unique(labels)  # scikit-learn too leaves classes without an image out, with a warning
    recalls = metrics.recall_score(labels, predictions, labels=present, average=None)
    assert mean_per_class(matrix) == pytest.approx(recalls.mean())


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_interval_holds_the_share(total, share):
    correct = round(share * total)
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1


def test_the_interval_is_wilsons():
    # 95% Wilson interval of 15 of 20, from the formula worked by hand: (0.5313, 0.8881)
    assert wilson_interval(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    low, high = wilson_interval(1562, 2893)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0093, rel=0.02)  # standard error 0.9 points at 0.54
