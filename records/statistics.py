"""
The statistics of comparisons: differences, their tests, verdicts and what could have been found. Pure functions of
numbers; lower is better.

The rule. A difference between two arms is tested over pairs of equal seeds, which share the order of the data and the
initial tensors: Student's t over the differences, two-sided, at ALPHA for all arms of a comparison together (Holm). An
arm without common seeds is tested by Welch's t test between runs. Equivalence within a margin: the two one-sided tests
at the same alpha both reject a difference as large as the margin. With fewer than PAIRS pairs there is no verdict.

Tests are SciPy's. Sources: Student 1908; Welch 1947; Holm 1979; Schuirmann 1987 (two one-sided tests); Wilson 1927; the
rule with a fixed standard deviation is modded-nanogpt's track 3.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

ALPHA = 0.01    # of a comparison's verdicts, two-sided
POWER = 0.8
LEVEL = 0.95    # of intervals
PAIRS = 5       # the least number for a verdict in words
TIME_MARGIN = 0.02  # times that differ by less than this share are equal


def summary(values: Sequence[float]) -> dict:
    """mean, sd (sample; None for one value), n, min, max. ValueError for no values."""
    if not len(values):
        raise ValueError("summary of no values")
    values = np.asarray(values, dtype=np.float64)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return dict(mean=float(values.mean()), sd=sd, n=len(values), min=float(values.min()), max=float(values.max()))


def test_pairs(differences: Sequence[float], margin: float | None = None) -> dict:
    """
    The t test of paired differences: difference (their mean), sd, n, low and high of its 95 % interval, and p values:
    p_less of the true mean being lower than 0, p_greater, p two-sided, and p_equivalent, the larger p value of the two
    one-sided tests of its being outside of -margin to margin (None without a margin). One difference: None but for the
    difference and n. No variance: the difference is taken as exact, so that the interval is the difference itself, and
    a p value is 0 or 1 (all of a difference 1 where it is 0). ValueError for none.
    """
    n = len(differences)
    if not n:
        raise ValueError("a test of no differences")
    difference = float(np.mean(differences))
    if n < 2:
        return untested(difference) | dict(sd=None, n=n)
    sd = float(np.std(differences, ddof=1))
    if has_no_variance(differences):
        return exact(difference, margin) | dict(sd=sd, n=n)
    return test_difference(difference, sd / math.sqrt(n), n - 1, margin) | dict(sd=sd, n=n)


def test_welch(a: Sequence[float], b: Sequence[float], margin: float | None = None) -> dict:
    """What test_pairs gives, of mean(a) - mean(b) by Welch's test between runs; sd is None, n the smaller number."""
    difference = float(np.mean(a) - np.mean(b))
    n = min(len(a), len(b))
    if n < 2:
        return untested(difference) | dict(sd=None, n=n)
    if has_no_variance(a) and has_no_variance(b):
        return exact(difference, margin) | dict(sd=None, n=n)
    variances = [np.var(values, ddof=1) / len(values) for values in (a, b)]
    freedom = sum(variances) ** 2 / sum(v ** 2 / (len(values) - 1) for v, values in zip(variances, (a, b)))
    return test_difference(difference, math.sqrt(sum(variances)), freedom, margin) | dict(sd=None, n=n)


def test_difference(difference: float, error: float, freedom: float, margin: float | None) -> dict:
    """What test_pairs gives of a difference, its standard error and the degrees of freedom."""
    t = difference / error
    half = float(stats.t.isf((1 - LEVEL) / 2, freedom)) * error
    outside = None
    if margin is not None:
        outside = max(float(stats.t.sf((margin - side * difference) / error, freedom)) for side in (1, -1))
    return dict(difference=difference, low=difference - half, high=difference + half,
                p_less=float(stats.t.cdf(t, freedom)), p_greater=float(stats.t.sf(t, freedom)),
                p=float(2 * stats.t.sf(abs(t), freedom)), p_equivalent=outside)


def untested(difference: float) -> dict:
    """What test_pairs gives of a difference that cannot be tested."""
    return dict(difference=difference, low=None, high=None, p_less=None, p_greater=None, p=None, p_equivalent=None)


def exact(difference: float, margin: float | None) -> dict:
    """What test_pairs gives of a difference without any noise."""
    less = difference < 0
    greater = difference > 0
    outside = None if margin is None else float(abs(difference) >= margin)
    return dict(difference=difference, low=difference, high=difference, p_less=1.0 - less, p_greater=1.0 - greater,
                p=1.0 - (less or greater), p_equivalent=outside)


def has_no_variance(values: Sequence[float]) -> bool:
    """Equal but for rounding: no test can be made of it."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.max(np.abs(values))))


def detectable_by_pairs(sd: float | None, n: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """
    The smallest true difference that the two-sided test of n pairs at alpha finds with this power, if the standard
    deviation of the differences is as given. None for fewer than two pairs.
    """
    if sd is None or n < 2:
        return None
    return find_detectable(sd / math.sqrt(n), n - 1, alpha / 2, power)


def detectable_by_welch(sd_a: float | None, n_a: int, sd_b: float | None, n_b: int, alpha: float = ALPHA,
                        power: float = POWER) -> float | None:
    """
    The same of Welch's test between runs with these standard deviations. None for fewer than two values on a side.
    """
    if min(n_a, n_b) < 2:
        return None
    variance_a = sd_a ** 2 / n_a
    variance_b = sd_b ** 2 / n_b
    error = math.sqrt(variance_a + variance_b)
    if error == 0:
        return 0.0
    freedom = error ** 4 / (variance_a ** 2 / (n_a - 1) + variance_b ** 2 / (n_b - 1))
    return find_detectable(error, freedom, alpha / 2, power)


def find_detectable(error: float, freedom: float, alpha: float, power: float) -> float:
    """The true difference that a one-sided t test at alpha finds with this power (noncentral t)."""
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
    if has_no_variance(values):
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


def verdict(test: dict, alpha: float = ALPHA, least: int = PAIRS) -> str:
    """
    better, worse, equivalent, undecided or, with fewer than `least` pairs or runs a side, too few pairs. test: as
    test_pairs gives it; p values corrected for several arms stand in p_holm and p_equivalent_holm. Without any true
    difference, one of the first two comes up in alpha of all cases.
    """
    if test["n"] < least or test["p"] is None:
        return "too few pairs"
    if test["p_holm"] < alpha and test["difference"] != 0:
        return "better" if test["difference"] < 0 else "worse"
    if test["p_equivalent_holm"] is not None and test["p_equivalent_holm"] < alpha:
        return "equivalent"
    return "undecided"


def default_margin(target: float | None) -> float | None:
    """The margin within which losses are equivalent: 0.5 % of a track's target, in thousandths; None without one."""
    return round(0.005 * target, 3) or None if target else None
