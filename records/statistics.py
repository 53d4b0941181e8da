"""
The statistics of comparisons: differences of means, their tests and what they could have found. Pure functions of
numbers; lower is better.

Tests are SciPy's: Welch's t test between runs (their variances may differ), the paired one over equal seeds, the
one-sample one against a target. Sources: Welch 1947; Holm 1979; Wilson 1927; the rule with a fixed standard deviation
is modded-nanogpt's track 3.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

ALPHA = 0.01  # of a verdict, two-sided
POWER = 0.8
LEVEL = 0.95  # of intervals


def summary(values: Sequence[float]) -> dict:
    """mean, sd (sample; None for one value), n, min, max. ValueError for no values."""
    if not len(values):
        raise ValueError("summary of no values")
    values = np.asarray(values, dtype=np.float64)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return dict(mean=float(values.mean()), sd=sd, n=len(values), min=float(values.min()), max=float(values.max()))


def welch(a: Sequence[float], b: Sequence[float]) -> dict:
    """
    difference = mean(a) - mean(b), low and high of its 95 % interval, and the p values: p_less of a's true mean being
    lower, p_greater, p two-sided. One value on a side: None but for the difference. No variance on either side: the
    difference is taken as exact, so that the interval is the difference itself, and p is 0 or 1 (all three 1 where it
    is 0).
    """
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return dict(difference=difference, low=None, high=None, p_less=None, p_greater=None, p=None)
    if no_variance(a) and no_variance(b):
        return exact(difference)
    return of_test(difference, stats.ttest_ind(a, b, equal_var=False))


def paired(a: Sequence[float], b: Sequence[float]) -> dict:
    """What welch gives, over pairs: a[i] and b[i] have the same seed. ValueError for unequal lengths."""
    if len(a) != len(b):
        raise ValueError(f"pairs of {len(a)} and {len(b)} values")
    differences = np.subtract(a, b)
    difference = float(differences.mean())
    if len(a) < 2:
        return dict(difference=difference, low=None, high=None, p_less=None, p_greater=None, p=None)
    if no_variance(differences):
        return exact(difference)
    return of_test(difference, stats.ttest_1samp(differences, 0.0))


def no_variance(values: Sequence[float]) -> bool:
    """Equal but for rounding: no test can be made of it."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.max(np.abs(values))))


def exact(difference: float) -> dict:
    """What welch gives of a difference without any noise."""
    less = difference < 0
    greater = difference > 0
    return dict(difference=difference, low=difference, high=difference, p_less=1.0 - less, p_greater=1.0 - greater,
                p=1.0 - (less or greater))


def of_test(difference: float, test) -> dict:
    """What welch gives of a difference and SciPy's result of its t test."""
    interval = test.confidence_interval(LEVEL)
    return dict(difference=difference, low=float(interval.low), high=float(interval.high),
                p_less=float(stats.t.cdf(test.statistic, test.df)),
                p_greater=float(stats.t.sf(test.statistic, test.df)), p=float(test.pvalue))


def detectable(sd_a: float | None, n_a: int, sd_b: float | None, n_b: int, alpha: float = ALPHA,
               power: float = POWER) -> float | None:
    """
    The smallest true difference that Welch's one-sided test at alpha finds with this power, if the standard deviations
    are as given (noncentral t). None for fewer than two values on a side.
    """
    if min(n_a, n_b) < 2:
        return None
    variance_a = sd_a ** 2 / n_a
    variance_b = sd_b ** 2 / n_b
    error = math.sqrt(variance_a + variance_b)
    if error == 0:
        return 0.0
    freedom = error ** 4 / (variance_a ** 2 / (n_a - 1) + variance_b ** 2 / (n_b - 1))
    critical = stats.t.isf(alpha, freedom)

    def missing_power(shift):
        return stats.nct.sf(critical, freedom, shift) - power
    return error * float(optimize.brentq(missing_power, 0.0, 10 * critical + 10))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number by Holm's method, in the same order; None stays None and is not counted."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    adjusted = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def one_sample(values: Sequence[float], target: float) -> float | None:
    """One-sided p of the mean being below the target; None for fewer than two values. Without variance it is 0 or 1."""
    if len(values) < 2:
        return None
    if no_variance(values):
        return 0.0 if np.mean(values) < target else 1.0
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def fixed_sigma(values: Sequence[float], target: float, sigma: float) -> tuple[float, float]:
    """(z, one-sided p) of the mean being below the target where a single run's standard deviation is known."""
    z = (target - float(np.mean(values))) * math.sqrt(len(values)) / sigma
    return z, float(stats.norm.sf(z))


def wilson(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of the probability behind `successes` out of n."""
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def reach(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (x, loss) first comes to the target, by linear interpolation; None if it does not."""
    previous = None
    for x, loss in curve:
        if loss <= target:
            if previous is None:
                return x
            x_before, loss_before = previous
            return x_before + (x - x_before) * (loss_before - target) / (loss_before - loss)
        previous = x, loss
    return None


def verdict(p: float | None, difference: float) -> str:
    """
    better, worse or not distinguishable, from a two-sided p: without any true difference, one of the first two comes up
    in ALPHA of all cases.
    """
    if p is None or p >= ALPHA or difference == 0:
        return "not distinguishable"
    return "better" if difference < 0 else "worse"
