"""
Group-sequential designs: levels against a published table and the distribution that they follow from, and simulations
of what a design promises: false verdicts, coverage, the pairs that it saves. Where many paths are read, a vectorised
reading stands in for look_at; one test proves that both say the same.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from records import sequential
from records.sequential import (
    EFFECTS,
    LOOKS,
    UNLIKELY,
    log_likelihood_ratio,
    look_at,
    looks_until,
    make_design,
    predictive_probability,
)
from records.statistics import detectable_by_pairs

MOST = 24
ALPHA = 0.01
MARGIN = 3 / math.sqrt(MOST)    # three standard errors of the mean of all pairs, in standard deviations
SLICE = 20_000                  # paths that are drawn at a time, which bounds the memory

# Lan-DeMets spending of the O'Brien-Fleming type, two-sided 0.05, five equally spaced looks: Reboussin, DeMets, Kim and
# Lan, Controlled Clinical Trials 21, 2000, and R's ldbounds.
PUBLISHED = (4.877, 3.357, 2.680, 2.290, 2.031)
PUBLISHED_LOOKS = (60, 120, 180, 240, 300)


@pytest.fixture(scope="module")
def design():
    """Of a comparison of one arm with the default settings."""
    return make_design(MOST, ALPHA, equivalence=True)


@pytest.fixture
def without_caches(monkeypatch):
    """Within a test, nothing that was simulated before is remembered, and nothing of it afterwards."""
    for cached in (sequential.spend, sequential.simulate):
        monkeypatch.setattr(sequential, cached.__name__, cache(cached.__wrapped__))


# ---- Paths, read all at once

def draw_moments(count: int, looks: list[int], effect: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    (means, standard deviations), each (count, looks): of so many paths of normal differences of this mean and standard
    deviation 1, up to each look.
    """
    rng = np.random.default_rng(seed)
    n = np.array(looks)
    means, deviations = [], []
    for start in range(0, count, SLICE):
        x = rng.standard_normal((min(SLICE, count - start), looks[-1])) + effect
        totals = np.cumsum(x, axis=1)[:, n - 1]
        squares = np.cumsum(x * x, axis=1)[:, n - 1]
        means.append(totals / n)
        deviations.append(np.sqrt((squares - totals * totals / n) / (n - 1)))
    return np.concatenate(means), np.concatenate(deviations)


def t_values(count: int, looks: list[int], effect: float, seed: int) -> np.ndarray:
    """(count, looks): the t values of paths at each look."""
    means, deviations = draw_moments(count, looks, effect, seed)
    return means * np.sqrt(looks) / deviations


def thresholds(looks, levels, sides: int) -> np.ndarray:
    """The t value of each look whose p value is its level."""
    return stats.t.isf(np.array(levels) / sides, np.array(looks) - 1)


def read_paths(means: np.ndarray, deviations: np.ndarray, design: dict, margin: float | None):
    """What look_at says of paths, look by look: (words, pairs at the look that said it), each (paths,)."""
    looks = design["looks"]
    most = looks[-1]
    words = np.full(len(means), "", dtype="U10")
    pairs = np.zeros(len(means), dtype=int)
    for k, n in enumerate(looks):
        mean, sd = means[:, k], deviations[:, k]
        error = sd / math.sqrt(n)
        said = np.full(len(means), "undecided" if n == most else "", dtype="U10")

        # whether a verdict is still likely, by the predictive distribution of the last look's mean
        if n < most:
            spread = sd * math.sqrt(1 / n - 1 / most)
            last_error = sd / math.sqrt(most)
            outer = stats.t.isf(design["levels"][-1] / 2, most - 1) * last_error
            likely = 1 - sum(side * stats.t.cdf((side * outer - mean) / spread, n - 1) for side in (1, -1))
            if margin is not None:
                inner = margin - stats.t.isf(design["levels_equivalence"][-1], most - 1) * last_error
                within = sum(side * stats.t.cdf((side * inner - mean) / spread, n - 1) for side in (1, -1))
                likely += np.where(inner > 0, within, 0)
            said[likely < UNLIKELY] = "undecided"

        # a verdict comes before that
        if margin is not None:
            bound = stats.t.isf(design["levels_equivalence"][k], n - 1)
            said[margin - np.abs(mean) >= bound * error] = "equivalent"
        bound = stats.t.isf(design["levels"][k] / 2, n - 1)
        said[mean <= -bound * error] = "better"
        said[mean >= bound * error] = "worse"

        new = (words == "") & (said != "")
        words[new] = said[new]
        pairs[new] = n
    return words, pairs


def share(words: np.ndarray, *sought: str) -> float:
    return float(np.isin(words, sought).mean())


def crossing_rate(t: np.ndarray, looks, levels, sides: int) -> float:
    """The share of paths whose p value is at or below its level at any look."""
    return float((t >= thresholds(looks, levels, sides)).any(axis=1).mean())


def error_of_design(looks, levels, sides: int) -> np.ndarray:
    """(looks,): the standard error of what a design spends up to each look, from the paths that it was simulated by."""
    t, weights = sequential.simulate(tuple(looks), sides)
    crosses = t >= thresholds(looks, levels, sides)
    first = crosses & (np.cumsum(crosses, axis=1) == 1)
    squares = np.where(first, np.square(weights), 0).sum(axis=0)
    return np.sqrt(np.cumsum(squares)) / len(t)


def bound_of_rate(rate: float, count: int, design_error: float) -> float:
    """Four standard errors of a rate that was counted on so many paths, of a design that is itself simulated."""
    return 4 * math.hypot(math.sqrt(rate * (1 - rate) / count), design_error)


# ---- The looks and the design as such

def test_looks():
    assert looks_until(24) == [4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24] == list(LOOKS)
    assert looks_until(4) == [4] and looks_until(5) == [4, 5] and looks_until(9) == [4, 5, 6, 7, 8, 9]
    assert looks_until(30) == [*LOOKS, 30] and looks_until(33) == [*LOOKS, 30, 33]  # 30 + 30 // 4 = 37 is beyond
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        looks_until(3)
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        make_design(3, ALPHA, equivalence=False)


def test_a_design_is_ready_for_json_and_comes_out_the_same_again(without_caches):
    design = make_design(5, ALPHA, equivalence=False)
    assert json.loads(json.dumps(design, allow_nan=False)) == design
    assert design["looks"] == [4, 5] and design["levels_equivalence"] is None
    sequential.spend.cache_clear()
    sequential.simulate.cache_clear()
    assert make_design(5, ALPHA, equivalence=False) == design


def test_the_first_look_may_spend_its_share(design):
    """Nothing was looked at before, so that its level is what it spends: 4 of 24 pairs of the error."""
    for levels, sides, error in ((design["levels"], 2, ALPHA), (design["levels_equivalence"], 1, ALPHA),
                                 (design["levels_interval"], 2, 0.05)):
        assert len(levels) == len(design["looks"]) and all(0 < level < error for level in levels)
        bound = 4 * error_of_design(design["looks"], levels, sides)[0]
        assert bound < 0.1 * error and levels[0] == pytest.approx(error * 4 / 24, abs=bound)


def test_a_design_of_one_look_is_the_fixed_test():
    design = make_design(4, ALPHA, equivalence=True)
    for levels, sides in ((design["levels"], 2), (design["levels_equivalence"], 1)):
        bound = 4 * error_of_design([4], levels, sides)[0]
        assert bound < 0.1 * ALPHA and levels == [pytest.approx(ALPHA, abs=bound)]


# ---- Levels

def normal_crossing(bounds: tuple[float, ...], times: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """
    Of a Brownian motion that is looked at at these times, its value over the root of the time compared with bounds on
    both sides: (the probability of a first crossing at each look, the density of both sides together at the bound among
    what has not crossed before), by numerical integration. Source: Armitage, McPherson and Rowe 1969.
    """
    probabilities, densities = [], []
    nodes = np.array([0.0])
    masses = np.array([1.0])
    before = 0.0
    for bound, time in zip(bounds, times):
        step = math.sqrt(time - before)
        end = bound * math.sqrt(time)
        probabilities.append(2 * masses @ stats.norm.sf((end - nodes) / step))
        densities.append(2 * masses @ stats.norm.pdf((end - nodes) / step) / step * math.sqrt(time))

        # what goes on, by the trapezoidal rule
        grid = np.linspace(-end, end, 1201)
        density = stats.norm.pdf((grid[:, None] - nodes) / step) @ masses / step
        weights = np.full(len(grid), grid[1] - grid[0])
        weights[[0, -1]] /= 2
        nodes, masses, before = grid, density * weights, time
    return np.array(probabilities), np.array(densities)


def obrien_fleming_spending(alpha: float, times) -> np.ndarray:
    """Two-sided: each side spends 2 - 2 Phi(z / sqrt(t)) of its alpha / 2, with z its upper alpha / 4 quantile."""
    return 4 * stats.norm.sf(stats.norm.isf(alpha / 4) / np.sqrt(times))


def test_the_published_bounds_are_those_of_the_spending_function():
    """By integration: what the table's bounds spend is what the function allows, but for the table's last digit."""
    times = tuple(n / PUBLISHED_LOOKS[-1] for n in PUBLISHED_LOOKS)
    probabilities, densities = normal_crossing(PUBLISHED, times)
    due = np.diff(obrien_fleming_spending(0.05, times), prepend=0.0)
    # a bound that is off by half a digit moves what is spent at its look, and what is left for the next ones
    assert np.all(np.abs(probabilities - due) < 0.0006 * np.cumsum(densities))


@pytest.mark.parametrize("paths, largest", [(40_000, 0.08), pytest.param(1_000_000, 0.03, marks=pytest.mark.slow)])
def test_levels_against_a_published_table(monkeypatch, without_caches, paths, largest):
    """
    As normal quantiles, within four standard errors of the simulation, half a unit of the table's last digit, and 0.01
    for t against normal values: their p values have one distribution at each look, and their joint distributions differ
    by O(1 / pairs), which begins to matter at the second look, of 120 pairs. The paths have effects that suit so many
    pairs: with EFFECTS few would be without one.
    """
    monkeypatch.setattr(sequential, "PATHS", paths)
    monkeypatch.setattr(sequential, "EFFECTS", (0.0, 0.0, 0.0, 0.2, 0.4))
    times = tuple(n / PUBLISHED_LOOKS[-1] for n in PUBLISHED_LOOKS)
    levels = sequential.spend(PUBLISHED_LOOKS, tuple(map(float, obrien_fleming_spending(0.05, times))), 2)
    _, densities = normal_crossing(PUBLISHED, times)
    simulated = error_of_design(PUBLISHED_LOOKS, levels, 2) / densities
    tolerance = 4 * simulated + 0.0005 + 0.01 * (np.arange(len(times)) > 0)
    assert np.all(np.abs(stats.norm.isf(np.array(levels) / 2) - PUBLISHED) < tolerance)
    assert np.all(tolerance < largest)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("n", [4, 8, 24])
def test_likelihood_ratios_against_the_noncentral_t_distribution(n, sides):
    """A level that is wrong by a hundredth is of no consequence; the logarithm of a weight is closer than that."""
    t = np.linspace(-12, 40, 105)
    effects = np.array(EFFECTS)
    if sides == 2:
        effects = np.concatenate((effects, -effects))
    mixture = logsumexp(stats.nct.logpdf(t[:, None], n - 1, effects * math.sqrt(n)), axis=1) - math.log(len(effects))
    expected = mixture - stats.t.logpdf(t, n - 1)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(log_likelihood_ratio(t, n, sides), expected, atol=0.01, rtol=0)


# ---- What a design promises

def check_false_verdicts(design: dict, alpha: float, count: int, seed: int):
    """Fail unless all looks together find a difference, or equivalence at the margin's edge, in alpha of all paths."""
    looks = design["looks"]
    t = t_values(count, looks, 0.0, seed)
    for levels, sides, values in ((design["levels"], 2, np.abs(t)), (design["levels_equivalence"], 1, t)):
        error = error_of_design(looks, levels, sides)[-1]
        rate = crossing_rate(values, looks, levels, sides)
        assert error < 0.1 * alpha and rate == pytest.approx(alpha, abs=bound_of_rate(alpha, count, error))


def test_false_verdicts(design):
    check_false_verdicts(design, ALPHA, 20_000, seed=1)
    check_false_verdicts(make_design(MOST, ALPHA / 3, equivalence=True), ALPHA / 3, 20_000, seed=2)


@pytest.mark.slow
def test_false_verdicts_of_many_comparisons(design):
    """The promise: 1.0 % within 0.1 over 100,000 comparisons, for a difference and for equivalence."""
    t = t_values(100_000, design["looks"], 0.0, seed=4)
    assert crossing_rate(np.abs(t), design["looks"], design["levels"], 2) == pytest.approx(ALPHA, abs=0.001)
    assert crossing_rate(t, design["looks"], design["levels_equivalence"], 1) == pytest.approx(ALPHA, abs=0.001)
    for most in (6, 30):
        check_false_verdicts(make_design(most, ALPHA, equivalence=True), ALPHA, 100_000, seed=most)


@pytest.mark.parametrize("alpha, largest", [(ALPHA, 0.04), (1e-4, 0.2)])
def test_false_verdicts_by_weighed_paths(alpha, largest):
    """
    More exactly than by counting, and at a strict alpha, as a ledger gives it: by paths of other seeds than the
    design's, most of them with an effect, each weighed by how probable its t value at the first crossing is without.
    largest: the bound, four standard errors, as a share of the error.
    """
    design = make_design(MOST, alpha, equivalence=True)
    looks = design["looks"]
    t = np.concatenate([t_values(20_000, looks, effect, seed) for seed, effect in enumerate(EFFECTS, 100)])
    for levels, sides, error in ((design["levels"], 2, alpha), (design["levels_equivalence"], 1, alpha),
                                 (design["levels_interval"], 2, 0.05)):
        values = np.abs(t) if sides == 2 else t
        crosses = values >= thresholds(looks, levels, sides)
        first = np.argmax(crosses, axis=1)
        weights = np.zeros(len(t))
        for k, n in enumerate(looks):
            here = crosses.any(axis=1) & (first == k)
            weights[here] = np.exp(-log_likelihood_ratio(values[here, k], n, sides))
        counted = math.sqrt(np.square(weights).sum()) / len(weights)
        bound = 4 * math.hypot(counted, error_of_design(looks, levels, sides)[-1])
        assert bound < largest * error and weights.mean() == pytest.approx(error, abs=bound)


@pytest.mark.slow
def test_false_verdicts_at_a_strict_alpha_by_counting():
    design = make_design(MOST, 1e-4, equivalence=True)
    check_false_verdicts(design, 1e-4, 2_000_000, seed=5)


def test_repeated_intervals_cover(design):
    """All of a path's intervals hold the true difference in 95 % of all cases, whatever that difference is."""
    means, deviations = draw_moments(20_000, design["looks"], 0.7, seed=6)
    half = thresholds(design["looks"], design["levels_interval"], 2) * deviations / np.sqrt(design["looks"])
    covered = ((means - half <= 0.7) & (0.7 <= means + half)).all(axis=1).mean()
    error = error_of_design(design["looks"], design["levels_interval"], 2)[-1]
    assert covered == pytest.approx(0.95, abs=bound_of_rate(0.95, 20_000, error))


def compare_readings(design: dict, count: int, seed: int):
    """Fail unless look_at and read_paths say the same of so many paths of each effect, at the same look."""
    rng = np.random.default_rng(seed)
    for effect, margin in ((0.0, None), (0.0, MARGIN), (0.3, MARGIN), (-0.8, MARGIN), (1.6, None)):
        x = rng.standard_normal((count, MOST)) + effect
        looks = design["looks"]
        means = np.stack([x[:, :n].mean(axis=1) for n in looks], axis=1)
        deviations = np.stack([x[:, :n].std(axis=1, ddof=1) for n in looks], axis=1)
        words, pairs = read_paths(means, deviations, design, margin)
        for path, word, end in zip(x, words, pairs):
            said = [look_at(list(path[:n]), n, design, margin) for n in looks if n <= end]
            assert said == [None] * (len(said) - 1) + [word]


def test_the_vectorised_reading_is_look_at(design):
    compare_readings(design, 30, seed=7)


@pytest.mark.slow
def test_the_vectorised_reading_is_look_at_on_many_paths(design):
    compare_readings(design, 300, seed=8)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_what_is_read_off_a_path(design, count):
    """
    False verdicts, and the pairs that a comparison takes: at most half of 24 at twice the difference that a fixed
    design finds in four of five cases, at most 60 % of them where there is none and the margin is three standard errors
    (most of these end undecided) or six (nearly all are equivalent).
    """
    looks = design["looks"]
    error = max(error_of_design(looks, design["levels"], 2)[-1],
                error_of_design(looks, design["levels_equivalence"], 1)[-1])
    most = ALPHA + bound_of_rate(ALPHA, count, error)

    # no difference
    moments = draw_moments(count, looks, 0.0, seed=9)
    for margin, least in ((MARGIN, 0.05), (2 * MARGIN, 0.95)):
        words, pairs = read_paths(*moments, design, margin)
        assert share(words, "better", "worse") <= most and share(words, "equivalent") > least
        assert pairs.mean() + 4 * pairs.std() / math.sqrt(count) <= 0.6 * MOST
    words, _ = read_paths(*moments, design, None)
    assert share(words, "better", "worse") <= most and share(words, "equivalent") == 0

    # a difference as large as the margin, to either side
    for side in (1, -1):
        words, _ = read_paths(*draw_moments(count, looks, side * MARGIN, seed=11), design, MARGIN)
        assert share(words, "equivalent") <= most
        assert share(words, "better" if side > 0 else "worse") <= most / 2

    # twice what a fixed design finds
    effect = 2 * detectable_by_pairs(1.0, MOST, ALPHA)
    words, pairs = read_paths(*draw_moments(count, looks, -effect, seed=12), design, MARGIN)
    assert share(words, "better") > 0.99
    assert pairs.mean() + 4 * pairs.std() / math.sqrt(count) <= MOST / 2


# ---- What one look says

def differences_with(p: float, n: int, mean: float) -> list[float]:
    """n differences of this mean whose two-sided paired t test has this p value."""
    x = np.arange(n) - (n - 1) / 2
    error = abs(mean) / stats.t.isf(p / 2, n - 1)
    return list(mean + x * error * math.sqrt(n) / x.std(ddof=1))


@pytest.mark.parametrize("k", [0, 4, 10])
def test_a_look_compares_p_with_its_own_level(design, k):
    n = design["looks"][k]
    level = design["levels"][k]
    for mean, word in ((-0.3, "better"), (0.3, "worse")):
        assert look_at(differences_with(0.999 * level, n, mean), n, design, None) == word
        after = look_at(differences_with(1.001 * level, n, mean), n, design, None)
        assert after == ("undecided" if n == MOST else None)  # such a difference may well be decided later


def test_a_look_finds_equivalence_at_its_level(design):
    """Both one-sided tests, of which the one against the nearer edge has the larger p value."""
    for k, n in enumerate(design["looks"]):
        bound = stats.t.isf(design["levels_equivalence"][k], n - 1)
        for side in (1, -1):
            x = np.array(differences_with(0.5, n, side * 0.01))
            edge = 0.01 + bound * x.std(ddof=1) / math.sqrt(n)
            assert look_at(list(x), n, design, 1.001 * edge) == "equivalent"
            assert look_at(list(x), n, design, 0.999 * edge) != "equivalent"
            assert look_at(list(x), n, design, None) != "equivalent"


def test_a_difference_within_the_margin_is_named_as_one_first(design):
    """Both hold: it is smaller than the margin, and it is there."""
    differences = differences_with(1e-6, 10, -0.01)
    assert look_at(differences, 10, design, margin=0.5) == "better"
    assert look_at([0.0] * 10, 10, design, margin=0.5) == "equivalent"
    assert look_at([0.0] * 10, 10, design, margin=None) is None
    assert look_at([0.0] * MOST, MOST, design, margin=None) == "undecided"
    assert look_at([0.25] * 4, 4, design, margin=None) == "worse"


def test_a_verdict_that_has_become_unlikely_is_not_waited_for(design):
    """Of differences whose mean is next to nothing beside their spread, none is to be expected within 24 pairs."""
    assert look_at(differences_with(0.99, 16, 1.0), 16, design, None) == "undecided"
    assert look_at(differences_with(0.99, 4, 1.0), 4, design, None) is None


def test_looks_with_failed_runs(design):
    """The test is of the pairs that there are, at the level of the pairs that were planned."""
    assert look_at([], 4, design, None) is None and look_at([-0.5, -0.6], 4, design, None) is None
    assert look_at([-0.5, -0.6], MOST, design, None) == "undecided"
    for p, word in ((0.999, "better"), (1.001, None)):
        assert look_at(differences_with(p * design["levels"][3], 5, -0.3), 7, design, None) == word
    with pytest.raises(ValueError):
        look_at([0.1] * 9, 9, design, None)  # no look of the design


@pytest.mark.parametrize("n, mean, margin", [(4, 0.2, None), (10, 0.5, None), (10, 0.1, 1.0), (20, -0.55, MARGIN)])
def test_predictive_probability_by_simulation(design, n, mean, margin):
    """
    True mean and variance are drawn from what n pairs say of them without knowledge beforehand, then the mean of all
    pairs; the last look's verdict is by the standard deviation that was seen.
    """
    count = 100_000
    rng = np.random.default_rng(13)
    sigma = np.sqrt((n - 1) / rng.chisquare(n - 1, count))      # of differences whose standard deviation was 1
    center = mean + sigma * rng.standard_normal(count) / math.sqrt(n)
    rest = center + sigma * rng.standard_normal(count) / math.sqrt(MOST - n)
    last = (n * mean + (MOST - n) * rest) / MOST
    t = np.abs(last) * math.sqrt(MOST)
    decided = 2 * stats.t.sf(t, MOST - 1) <= design["levels"][-1]
    if margin is not None:
        nearer = (margin - np.abs(last)) * math.sqrt(MOST)
        decided |= stats.t.sf(nearer, MOST - 1) <= design["levels_equivalence"][-1]
    expected = float(decided.mean())
    probability = predictive_probability(mean, 1.0, n, design, margin)
    assert 0.01 < expected < 0.99
    assert probability == pytest.approx(expected, abs=bound_of_rate(expected, count, 0.0))


def test_predictive_probability_of_what_is_certain(design):
    assert predictive_probability(0.1, 0.0, 4, design, None) == 1.0
    assert predictive_probability(0.1, 1.0, MOST, design, None) == 1.0
    assert predictive_probability(100.0, 1.0, 12, design, MARGIN) == pytest.approx(1.0)


# ---- Real runs, resampled

PAIRS = Path(__file__).resolve().parents[2] / "records/negative/2026-12-01_ParallelResidualPairs/stats.json"


def losses_of_pairs() -> tuple[np.ndarray, np.ndarray]:
    """The final losses of the record's pairs: the baseline's and parallel_residual's, in the order of their seeds."""
    baseline, arm = json.loads(PAIRS.read_text())["arms"]
    assert baseline["seeds"] == arm["seeds"] and len(arm["seeds"]) == 24
    return np.array(baseline["losses"]), np.array(arm["losses"])


def moments_of(differences: np.ndarray, looks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The means and the standard deviations of paths (paths, pairs) at the looks, each (paths, looks)."""
    means = np.stack([differences[:, :n].mean(axis=1) for n in looks], axis=1)
    return means, np.stack([differences[:, :n].std(axis=1, ddof=1) for n in looks], axis=1)


def test_real_pairs_find_half_a_hundredth(design):
    """
    0.005 nats on track cpu, where pairs divide the variance of the difference by twelve: the differences of real pairs
    around their mean, scaled to that factor by a spread of the baseline. At the spread of these 24 seeds (0.0111, with
    one far above the others) it takes 26.8 runs on average, at the 0.0085 of the twelve on the board 21.3.
    """
    rng = np.random.default_rng(12)
    baseline, arm = losses_of_pairs()
    residuals = arm - baseline - (arm - baseline).mean()
    for spread, most in ((baseline.std(ddof=1), 28), (0.0085, 24)):
        scaled = residuals / residuals.std(ddof=1) * spread * math.sqrt(2 / 12)
        paths = rng.choice(scaled, (20_000, MOST)) + 0.005
        with np.errstate(divide="ignore"):  # four times the same pair
            words, pairs = read_paths(*moments_of(paths, design["looks"]), design, None)
        assert 2 * pairs.mean() <= most
        assert share(words, "worse") > 0.9 and share(words, "better") < 0.001


def test_real_runs_without_a_difference_have_no_verdict(design):
    """The baseline against itself, runs drawn from the real ones: one verdict in a hundred, within half of one."""
    rng = np.random.default_rng(13)
    baseline, _ = losses_of_pairs()
    differences = rng.choice(baseline, (20_000, MOST)) - rng.choice(baseline, (20_000, MOST))
    words, _ = read_paths(*moments_of(differences, design["looks"]), design, None)
    assert share(words, "better", "worse") == pytest.approx(ALPHA, abs=0.005)
