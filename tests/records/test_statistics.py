"""Statistics against tables, published results, SciPy's own tests in the plain form, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from records.statistics import (
    ALPHA,
    PAIRS,
    POWER,
    default_margin,
    detectable_by_pairs,
    detectable_by_welch,
    fixed_sigma,
    holm,
    one_sample,
    reach,
    summary,
    verdict,
    wilson,
)
from records.statistics import test_pairs as compare_pairs
from records.statistics import test_welch as compare_runs

# Final losses of modded-nanogpt's record 89 of track 1 and of its baseline:
# records/track_1_short/2026-07-17_FP8DownProjection, this_pr and baseline.
RECORD_89 = [3.2791, 3.2773, 3.2783, 3.2775, 3.2781, 3.2775, 3.2793, 3.2772, 3.2769, 3.2775, 3.2806, 3.2779, 3.2816]
BASELINE_89 = [3.2817, 3.2796, 3.2778, 3.2802, 3.2775, 3.2767, 3.2758, 3.2821, 3.2780, 3.2768, 3.2769, 3.2775, 3.2766]
DIFFERENCES = [-0.011, 0.004, -0.009, -0.013, -0.002, -0.008]
UNKNOWN = dict(low=None, high=None, p_less=None, p_greater=None, p=None, p_equivalent=None)


def describe_test(p: float | None, difference: float, equivalent: float | None = None, n: int = PAIRS) -> dict:
    """What verdict takes, of these corrected p values."""
    return dict(n=n, difference=difference, p=p, p_holm=p, p_equivalent=equivalent, p_equivalent_holm=equivalent)


# ---- Of one side

def test_published_record():
    s = summary(RECORD_89)
    assert s["n"] == 13
    assert s["mean"] == pytest.approx(3.2783692308, abs=1e-10)
    assert s["sd"] == pytest.approx(0.0014156180, abs=1e-7)
    assert (s["min"], s["max"]) == (3.2769, 3.2816)
    assert one_sample(RECORD_89, 3.28) == pytest.approx(0.0006690604, abs=1e-10)
    assert one_sample(BASELINE_89, 3.28) == pytest.approx(0.0042976481, abs=1e-10)
    assert compare_runs(RECORD_89, BASELINE_89)["p"] == pytest.approx(0.8587465, abs=1e-7)


def test_summary_of_one_and_of_none():
    assert summary([2.0]) == dict(mean=2.0, sd=None, n=1, min=2.0, max=2.0)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_one_sample_of_few():
    assert one_sample([3.27], 3.28) is None
    assert one_sample([3.27, 3.27], 3.28) == 0.0 and one_sample([3.28, 3.28], 3.28) == 1.0


def test_fixed_sigma_is_the_public_rule():
    z, p = fixed_sigma([3.278] * 4, 3.28, 0.0013)  # (3.28 - mean) sqrt(n) = 0.004
    assert z == pytest.approx(0.004 / 0.0013) and p == pytest.approx(0.00105, abs=1e-5)


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # by the formula
    assert wilson(0, 5)[0] == 0.0 and wilson(0, 5)[1] == pytest.approx(0.4344825, abs=1e-6)


def test_reach():
    curve = [(0, 5.0), (100, 3.0), (200, 1.0), (300, 2.0)]
    assert reach(curve, 4.0) == 50 and reach(curve, 3.0) == 100 and reach(curve, 1.5) == 175
    assert reach(curve, 0.9) is None and reach(curve, 6.0) == 0 and reach([], 1.0) is None


# ---- Differences

def test_pairs_against_scipy():
    result = compare_pairs(DIFFERENCES)
    expected = stats.ttest_1samp(DIFFERENCES, 0.0)
    ends = expected.confidence_interval(0.95)
    assert (result["n"], result["p_equivalent"]) == (6, None)
    assert result["difference"] == pytest.approx(-0.0065) and result["sd"] == pytest.approx(np.std(DIFFERENCES, ddof=1))
    assert (result["low"], result["high"]) == pytest.approx((ends.low, ends.high))
    assert result["p"] == pytest.approx(expected.pvalue)
    for side in ("less", "greater"):
        assert result[f"p_{side}"] == pytest.approx(stats.ttest_1samp(DIFFERENCES, 0.0, alternative=side).pvalue)


def test_pairs_see_what_runs_of_one_seed_share():
    """Losses that move together: SciPy's test of related samples, whose p value is below that of Welch's."""
    a, b = [1.0, 2.1, 3.0], [1.2, 2.2, 3.3]
    result = compare_pairs([x - y for x, y in zip(a, b)])
    assert result["difference"] == pytest.approx(-0.2) and result["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert result["p"] < 0.1 < 0.8 < compare_runs(a, b)["p"]


def test_welch_by_hand():
    a, b = [1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 10.0]
    va, vb = (5 / 3) / 4, 13 / 3
    t, freedom = (2.5 - 6) / math.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = stats.t.isf(0.025, freedom) * math.sqrt(va + vb)
    result = compare_runs(a, b)
    assert result["difference"] == -3.5 and result["p"] == pytest.approx(2 * stats.t.cdf(t, freedom))
    assert (result["n"], result["sd"], result["p_equivalent"]) == (3, None, None)
    assert (result["low"], result["high"]) == pytest.approx((-3.5 - half, -3.5 + half))
    assert result["p_less"] == pytest.approx(result["p"] / 2)
    assert result["p_greater"] == pytest.approx(1 - result["p"] / 2)
    assert result["p"] == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


@pytest.mark.parametrize("margin", [0.007, 0.012, 0.03])
def test_equivalence_is_two_one_sided_tests(margin):
    """The larger p value of two tests, of a mean that is not below the margin and one that is not above minus it."""
    sides = (stats.ttest_1samp(DIFFERENCES, margin, alternative="less").pvalue,
             stats.ttest_1samp(DIFFERENCES, -margin, alternative="greater").pvalue)
    for sign in (1, -1):
        result = compare_pairs([sign * difference for difference in DIFFERENCES], margin)
        assert result["p_equivalent"] == pytest.approx(max(sides))

    # between runs: SciPy's test of one side that is moved by the margin
    a, b = RECORD_89, BASELINE_89[:9]
    sides = [stats.ttest_ind(np.array(a) - margin, b, equal_var=False, alternative="less").pvalue,
             stats.ttest_ind(np.array(a) + margin, b, equal_var=False, alternative="greater").pvalue]
    assert compare_runs(a, b, margin)["p_equivalent"] == pytest.approx(max(sides), rel=1e-6)


def test_single_values():
    assert compare_pairs([-2.0], 5.0) == dict(difference=-2.0, sd=None, n=1, **UNKNOWN)
    assert compare_runs([1.0], [3.0], 5.0) == dict(difference=-2.0, sd=None, n=1, **UNKNOWN)
    assert compare_runs([1.0, 2.0, 3.0], [3.0]) == dict(difference=-1.0, sd=None, n=1, **UNKNOWN)
    with pytest.raises(ValueError, match="no differences"):
        compare_pairs([])


@pytest.mark.parametrize("difference, p_less, p_greater, p", [
    (-1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0)])
def test_without_variance_a_difference_is_exact(difference, p_less, p_greater, p):
    expected = dict(difference=difference, low=difference, high=difference, p_less=p_less, p_greater=p_greater, p=p)
    for margin, equivalent in ((None, None), (1.5, 0.0), (1.0, float(difference != 0))):  # at the margin it is none
        known = expected | dict(p_equivalent=equivalent, n=2)
        assert compare_pairs([difference] * 2, margin) == known | dict(sd=0.0)
        assert compare_runs([2.0 + difference] * 2, [2.0] * 2, margin) == known | dict(sd=None)


def test_no_variance_but_for_rounding():
    a, b = [0.1 + 0.2, 0.3, 0.3], [0.2, 0.2, 0.2]
    pairs = compare_pairs([x - y for x, y in zip(a, b)])
    assert compare_runs(a, b)["p"] == pairs["p"] == 0.0
    assert pairs["low"] == pairs["high"] == pytest.approx(0.1) and not math.isnan(compare_runs(a, b)["low"])
    assert one_sample(a, 0.31) == 0.0 and one_sample(a, 0.3 - 1e-9) == 1.0


# ---- What can be found

@pytest.mark.parametrize("n, at_5_percent, at_1_percent", [
    (2, 0.0054, 0.0122),
    (3, 0.0034, 0.0054),
    (5, 0.0023, 0.0033),
    (8, 0.0018, 0.0024),
    (10, 0.0016, 0.0021),
    (20, 0.0011, 0.0014)])
def test_detectable_difference_between_runs(n, at_5_percent, at_1_percent):
    """A table of one-sided tests; ours are two-sided."""
    assert round(detectable_by_welch(0.00136, n, 0.00136, n, alpha=0.10), 4) == at_5_percent
    assert round(detectable_by_welch(0.00136, n, 0.00136, n, alpha=0.02), 4) == at_1_percent


def test_detectable_difference_between_runs_is_found_with_that_power():
    rng, n = np.random.default_rng(5), 4
    shift = detectable_by_welch(1.0, n, 2.0, n, alpha=0.1)
    a, b = rng.normal(-shift, 1, (20_000, n)), rng.normal(0, 2, (20_000, n))
    found = np.mean(stats.ttest_ind(a, b, axis=1, equal_var=False, alternative="less").pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.03)  # degrees of freedom are estimated in the test


@pytest.mark.parametrize("n, alpha, power", [(6, ALPHA, POWER), (5, ALPHA / 3, POWER), (24, 0.05, 0.5)])
def test_detectable_difference_of_pairs_is_found_with_that_power(n, alpha, power):
    """
    Within four standard errors of 20,000 comparisons. The two-sided test finds the other sign so rarely that it does
    not matter.
    """
    shift = detectable_by_pairs(0.003, n, alpha, power)
    differences = np.random.default_rng(6).normal(-shift, 0.003, (20_000, n))
    found = np.mean(stats.ttest_1samp(differences, 0.0, axis=1).pvalue < alpha)
    assert found == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / 20_000))


def test_detectable_without_variance_or_values():
    assert detectable_by_welch(0.0, 3, 0.0, 3) == 0.0 and detectable_by_pairs(0.0, 3) == 0.0
    assert detectable_by_welch(None, 1, 0.1, 5) is None
    assert detectable_by_pairs(None, 1) is None and detectable_by_pairs(0.1, 1) is None


# ---- Verdicts

def test_holm():
    # by hand: 4 x .005, 3 x .01, 2 x .03, then not below it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_verdict():
    assert ALPHA == 0.01 and PAIRS == 5
    assert verdict(describe_test(0.009, -0.1)) == "better" and verdict(describe_test(0.009, 0.1)) == "worse"
    assert verdict(describe_test(0.01, -0.1)) == verdict(describe_test(0.0, 0.0)) == "undecided"
    assert verdict(describe_test(0.5, 0.1, equivalent=0.009)) == "equivalent"
    assert verdict(describe_test(0.5, 0.1, equivalent=0.01)) == "undecided"
    assert verdict(describe_test(0.009, 0.1, equivalent=0.0)) == "worse"     # there, if small
    assert verdict(describe_test(0.009, 0.1), alpha=0.001) == "undecided"
    for n in (1, 4):
        assert verdict(describe_test(0.0, 0.1, equivalent=0.0, n=n)) == "too few pairs"
    assert verdict(describe_test(0.009, 0.1, n=4), least=4) == "worse"
    assert verdict(describe_test(None, 0.1, n=9)) == "too few pairs"  # runs that cannot be tested


def test_false_verdicts_are_rare():
    """One comparison in a hundred, of each kind: a binomial number, within its interval of 99.99 %."""
    count = 1000
    least, most = stats.binom.interval(0.9999, count, ALPHA)
    noise = np.random.default_rng(2024).normal(0.0, 0.01, (count, 6))
    words = []
    equivalent = 0
    for row in noise:
        test = compare_pairs(row)
        words.append(verdict(test | dict(p_holm=test["p"], p_equivalent_holm=None)))
        equivalent += compare_pairs(row + 0.5, margin=0.5)["p_equivalent"] < ALPHA  # a difference as large as that
    false = words.count("better") + words.count("worse")
    assert 1 <= least <= false <= most and words.count("undecided") == count - false
    assert least <= equivalent <= most


def test_default_margin():
    """Half a hundredth of the target, in thousandths."""
    assert default_margin(3.28) == 0.016 and default_margin(0.82) == 0.004 and default_margin(2.0) == 0.01
    assert default_margin(None) is None and default_margin(0.0) is None
    assert default_margin(0.05) is None  # it would be 0.000
