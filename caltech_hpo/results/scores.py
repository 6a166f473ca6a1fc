"""Scores from predictions: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from caltech_hpo.spec import Frozen

Labels = NDArray[np.int64]


def confusion_matrix(labels: Labels, predictions: Labels, classes: int) -> Labels:
    """Counts (classes, classes): row = true class, column = predicted class."""
    counts = np.bincount(labels * classes + predictions, minlength=classes * classes)
    return counts.reshape(classes, classes)


def top1(matrix: Labels) -> float:
    """Share of images whose class was predicted, 0 to 1."""
    return float(np.trace(matrix) / matrix.sum())


def mean_per_class(matrix: Labels) -> float:
    """Mean over classes of the share predicted right, 0 to 1; classes without an image do not count."""
    sizes = matrix.sum(axis=1)
    present = sizes > 0
    return float((np.diag(matrix)[present] / sizes[present]).mean())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), 0 to 1; it covers the images drawn, not other seeds."""
    z = 1.959964  # 97.5% quantile of the normal distribution
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # The ends meet 0 and 1 exactly at shares of 0 and 1, but for rounding.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


class Interval(Frozen):
    """A mean over trainings. `sd` is the sample's standard deviation, `ci95` the t interval of the mean.

    Both are None for a single training.
    """

    mean: float
    sd: float | None
    ci95: tuple[float, float] | None


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value and Student's 95% interval of it."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean=mean, sd=None, ci95=None)
    sd = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return Interval(mean=mean, sd=sd, ci95=(mean - half, mean + half))


def mean_accuracy(values: Sequence[float]) -> Interval:
    """As `mean_interval`, of accuracies: the interval is cut off at 0 and 1, which none can pass."""
    made = mean_interval(values)
    if made.ci95 is None:
        return made
    return made.model_copy(update={"ci95": (max(0.0, made.ci95[0]), min(1.0, made.ci95[1]))})
