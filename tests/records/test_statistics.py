"""Statistics against tables, published results, SciPy's own tests in the plain form, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from records.statistics import (
    ALPHA,
    detectable,
    fixed_sigma,
    holm,
    one_sample,
    paired,
    reach,
    summary,
    verdict,
    welch,
    wilson,
)

# Final losses of modded-nanogpt's record 89 of track 1 and of its baseline:
# records/track_1_short/2026-07-17_FP8DownProjection, this_pr and baseline.
RECORD_89 = [3.2791, 3.2773, 3.2783, 3.2775, 3.2781, 3.2775, 3.2793, 3.2772, 3.2769, 3.2775, 3.2806, 3.2779, 3.2816]
BASELINE_89 = [3.2817, 3.2796, 3.2778, 3.2802, 3.2775, 3.2767, 3.2758, 3.2821, 3.2780, 3.2768, 3.2769, 3.2775, 3.2766]
UNKNOWN = dict(low=None, high=None, p_less=None, p_greater=None, p=None)


def test_published_record():
    s = summary(RECORD_89)
    assert s["n"] == 13
    assert s["mean"] == pytest.approx(3.2783692308, abs=1e-10)
    assert s["sd"] == pytest.approx(0.0014156180, abs=1e-7)
    assert (s["min"], s["max"]) == (3.2769, 3.2816)
    assert one_sample(RECORD_89, 3.28) == pytest.approx(0.0006690604, abs=1e-10)
    assert one_sample(BASELINE_89, 3.28) == pytest.approx(0.0042976481, abs=1e-10)
    assert welch(RECORD_89, BASELINE_89)["p"] == pytest.approx(0.8587465, abs=1e-7)


def test_summary_of_one_and_of_none():
    assert summary([2.0]) == dict(mean=2.0, sd=None, n=1, min=2.0, max=2.0)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_welch_by_hand():
    a, b = [1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 10.0]
    va, vb = (5 / 3) / 4, 13 / 3
    t, freedom = (2.5 - 6) / math.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = stats.t.isf(0.025, freedom) * math.sqrt(va + vb)
    result = welch(a, b)
    assert result["difference"] == -3.5 and result["p"] == pytest.approx(2 * stats.t.cdf(t, freedom))
    assert (result["low"], result["high"]) == pytest.approx((-3.5 - half, -3.5 + half))
    assert result["p_less"] == pytest.approx(result["p"] / 2)
    assert result["p_greater"] == pytest.approx(1 - result["p"] / 2)


def test_paired_is_the_test_of_differences():
    a, b = [1.0, 2.1, 3.0], [1.2, 2.2, 3.3]
    result = paired(a, b)
    assert result["difference"] == pytest.approx(-0.2) and result["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert result["p"] < welch(a, b)["p"] and result["low"] < -0.2 < result["high"]
    with pytest.raises(ValueError, match="2 and 3"):
        paired([1.0, 2.0], b)


@pytest.mark.parametrize("test", [welch, paired])
def test_no_variance_and_single_values(test):
    assert test([1.0], [3.0]) == dict(difference=-2.0, **UNKNOWN)
    assert test([1.0, 1.0], [2.0, 2.0]) == dict(
        difference=-1.0, low=-1.0, high=-1.0, p_less=0.0, p_greater=1.0, p=0.0
    )
    assert test([2.0, 2.0], [1.0, 1.0]) == dict(difference=1.0, low=1.0, high=1.0, p_less=1.0, p_greater=0.0, p=0.0)
    assert test([1.0, 1.0], [1.0, 1.0]) == dict(difference=0.0, low=0.0, high=0.0, p_less=1.0, p_greater=1.0, p=1.0)


def test_no_variance_but_for_rounding():
    a, b = [0.1 + 0.2, 0.3, 0.3], [0.2, 0.2, 0.2]
    assert welch(a, b)["p"] == paired(a, b)["p"] == 0.0 and not math.isnan(welch(a, b)["low"])
    assert one_sample(a, 0.31) == 0.0 and one_sample(a, 0.3 - 1e-9) == 1.0


@pytest.mark.parametrize(
    "n, at_5_percent, at_1_percent",
    [
        (2, 0.0054, 0.0122),
        (3, 0.0034, 0.0054),
        (5, 0.0023, 0.0033),
        (8, 0.0018, 0.0024),
        (10, 0.0016, 0.0021),
        (20, 0.0011, 0.0014),
    ],
)
def test_detectable_difference(n, at_5_percent, at_1_percent):
    assert round(detectable(0.00136, n, 0.00136, n, alpha=0.05), 4) == at_5_percent
    assert round(detectable(0.00136, n, 0.00136, n, alpha=0.01), 4) == at_1_percent


def test_detectable_difference_is_found_with_that_power():
    rng, n = np.random.default_rng(5), 4
    shift = detectable(1.0, n, 2.0, n, alpha=0.05)
    a, b = rng.normal(-shift, 1, (20_000, n)), rng.normal(0, 2, (20_000, n))
    found = np.mean(stats.ttest_ind(a, b, axis=1, equal_var=False, alternative="less").pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.03)  # degrees of freedom are estimated in the test


def test_detectable_without_variance_or_values():
    assert detectable(0.0, 3, 0.0, 3) == 0.0
    assert detectable(None, 1, 0.1, 5) is None


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # by hand: 4 x .005, 3 x .01, 2 x .03, then not below it
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


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


def test_verdict():
    assert verdict(0.009, -0.1) == "better" and verdict(0.009, 0.1) == "worse"
    assert verdict(0.011, -0.1) == verdict(None, -0.1) == verdict(0.0, 0.0) == "not distinguishable"


def test_verdicts_without_any_difference_are_rare():
    rng = np.random.default_rng(2024)
    verdicts = []
    for _ in range(1000):
        result = welch(rng.normal(0.8, 0.01, 6), rng.normal(0.8, 0.01, 6))
        verdicts.append(verdict(result["p"], result["difference"]))
    false = sum(verdict != "not distinguishable" for verdict in verdicts)
    assert ALPHA == 0.01 and 5 <= false <= 15
