"""
Verdicts on losses and times against SciPy's tests and numbers by hand: pairs, Welch, equivalence, Holm, turns that do
not count, designs look by look, what could have been found, and the pairs of a record.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from records.arms import read_arms, rule_settings
from records.leaderboard import RECORDS
from records.results import summarize
from records.runs import Point, Run
from records.sequential import make_design
from records.verdicts import (
    MOVED,
    PAUSE,
    PAUSE_SHARE,
    RULE,
    add_detectable,
    add_verdicts,
    add_verdicts_by_welch,
    compare_by_welch,
    compare_losses,
    compare_times,
    longest_pause,
    pairs_of,
    turns_of,
)

SETTINGS = dict(rule=RULE, alpha=0.01, margin=None, design=None)
BASE = [0.812, 0.801, 0.795, 0.806, 0.821, 0.799]
BETTER = [0.792, 0.780, 0.777, 0.785, 0.800, 0.781]     # by 0.018 to 0.021
ALIKE = [0.8121, 0.8009, 0.7952, 0.8059, 0.8210, 0.7992]
UNCLEAR = [0.842, 0.791, 0.775, 0.831, 0.846, 0.770]


def make_run(seed: int, loss: float, ms: float | None = 100.0, status="finished", resumed=False, step_ms=(), **facts):
    """A run as a log would give it; ms: milliseconds a step."""
    known = dict(seed=seed, device="x86_64", world_size=1, peak_flops=2.5e11)
    return Run(Path(f"{seed}.txt"), "", known | facts, [Point(8, None, 800.0, loss)], list(step_ms), 8, 8, status,
               resumed, ms_per_step=ms)


def make_runs(losses: list[float], first: int = 1) -> list[Run]:
    """Finished runs of seeds first, first + 1, ..."""
    return [make_run(seed, loss) for seed, loss in enumerate(losses, first)]


def differences_of(losses: list[float], baseline: list[float]) -> np.ndarray:
    return np.array(losses) - np.array(baseline)


def judge(arms: list[list[Run]], baseline: list[Run], **settings) -> list[dict]:
    """The tests of all arms with their verdicts."""
    tests = [compare_losses(runs, baseline, SETTINGS | settings) for runs in arms]
    add_verdicts(tests, SETTINGS | settings)
    return tests


# ---- Losses

def test_pairs_against_scipy():
    """Whatever the order of the runs is; a seed that one side lacks counts in Welch's test only."""
    runs = [*make_runs(BETTER)[::-1], make_run(9, 0.5), make_run(7, 0.4, status="stopped by SIGTERM")]
    baseline = [make_run(7, 0.81), *make_runs(BASE)]
    test = compare_losses(runs, baseline, SETTINGS)
    paired = stats.ttest_rel(BETTER, BASE)
    ends = paired.confidence_interval(0.95)
    assert (test["test"], test["n"], test["margin"], test["look"]) == ("pairs", 6, None, None)
    assert test["difference"] == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    assert test["sd"] == pytest.approx(differences_of(BETTER, BASE).std(ddof=1))
    assert test["p"] == pytest.approx(paired.pvalue, rel=1e-6)
    assert (test["low"], test["high"]) == pytest.approx((ends.low, ends.high))
    between = stats.ttest_ind([*BETTER, 0.5], [0.81, *BASE], equal_var=False)
    assert test["welch"].keys() == {"difference", "low", "high", "p"}
    assert test["welch"]["difference"] == pytest.approx(np.mean([*BETTER, 0.5]) - np.mean([0.81, *BASE]))
    assert test["welch"]["p"] == pytest.approx(between.pvalue)
    assert {(run.seed, other.seed) for run, other in pairs_of(runs, baseline)} == {(n, n) for n in range(1, 7)}


def test_without_common_seeds_welch_decides():
    runs, baseline = make_runs(BETTER, first=11), make_runs(BASE)
    (test,) = judge([runs], baseline)
    expected = stats.ttest_ind(BETTER, BASE, equal_var=False)
    assert (test["test"], test["n"], test["sd"]) == ("runs", 6, None)
    assert test["p"] == test["welch"]["p"] == pytest.approx(expected.pvalue)
    assert expected.pvalue < 0.01 and test["verdict"] == "better"
    (few,) = judge([runs[:4]], baseline)
    assert few["n"] == 4 and few["p"] < 0.01 and few["verdict"] == "too few pairs"


def test_a_side_without_a_finished_run_has_no_test():
    lost = dict(seed=1, error="killed")
    stopped = make_run(1, 0.8, status="unfinished")
    for entries in ([], [lost], [stopped, lost]):
        assert compare_losses(entries, make_runs(BASE), SETTINGS) is None
        assert compare_losses(make_runs(BASE), entries, SETTINGS) is None
        assert compare_by_welch([run for run in entries if isinstance(run, Run)], make_runs(BASE), [], []) is None


def test_equivalence_is_two_one_sided_tests():
    differences = differences_of(ALIKE, BASE)
    sides = (stats.ttest_1samp(differences, 0.001, alternative="less").pvalue,
             stats.ttest_1samp(differences, -0.001, alternative="greater").pvalue)
    (test,) = judge([make_runs(ALIKE)], make_runs(BASE), margin=0.001)
    assert test["p_equivalent"] == test["p_equivalent_holm"] == pytest.approx(max(sides), rel=1e-6)
    assert max(sides) < 0.01 < test["p"] and test["verdict"] == "equivalent" and test["margin"] == 0.001
    (strict,) = judge([make_runs(ALIKE)], make_runs(BASE), margin=0.0001)
    assert strict["p_equivalent"] > 0.01 and strict["verdict"] == "undecided"
    (without,) = judge([make_runs(ALIKE)], make_runs(BASE))
    assert without["p_equivalent_holm"] is None and without["verdict"] == "undecided"


def test_fewer_than_five_pairs_have_no_verdict():
    """However clear the difference is; the interval is there from two pairs on."""
    for n, word in ((5, "better"), (4, "too few pairs"), (2, "too few pairs"), (1, "too few pairs")):
        (test,) = judge([make_runs(BETTER[:n])], make_runs(BASE), margin=0.5)
        assert test["n"] == n and test["verdict"] == word
        assert (test["low"] is None) == (test["p"] is None) == (n == 1)
    (apart,) = judge([[make_run(1, 0.7), *make_runs(BETTER, first=11)]], make_runs(BASE))
    assert (apart["test"], apart["n"], apart["verdict"]) == ("pairs", 1, "too few pairs")


def test_holm_over_the_arms_for_both_p_values():
    """By hand: the smallest of three times 3, the next times 2, the last as it is, and none below the one before."""
    arms = [BETTER, ALIKE, UNCLEAR, [0.5]]
    tests = judge([make_runs(losses) for losses in arms], make_runs(BASE), margin=0.001)
    assert tests[3]["p"] is None and tests[3]["p_holm"] is None and tests[3]["verdict"] == "too few pairs"
    p = [stats.ttest_rel(losses, BASE).pvalue for losses in arms[:3]]
    assert p[0] < p[1] < p[2] and 2 * p[1] > p[2]       # alike is closer to being a difference than what is unclear
    assert [test["p_holm"] for test in tests[:3]] == pytest.approx([3 * p[0], min(1, 2 * p[1]), min(1, 2 * p[1])])
    equivalent = []
    for losses in arms[:3]:
        sides = [stats.ttest_1samp(differences_of(losses, BASE), side * 0.001, alternative=word).pvalue
                 for side, word in ((1, "less"), (-1, "greater"))]
        equivalent.append(max(sides))
    assert equivalent[1] < equivalent[2] < equivalent[0]
    assert [test["p_equivalent_holm"] for test in tests[:3]] == pytest.approx(
        [max(min(1, 2 * equivalent[2]), equivalent[0]), 3 * equivalent[1], min(1, 2 * equivalent[2])])
    assert [test["verdict"] for test in tests[:3]] == ["better", "equivalent", "undecided"]


def test_the_correction_takes_a_verdict_away():
    """An arm that is worse when it is the only one is undecided among eight, and at a stricter alpha."""
    worse = list(np.array(BASE) + [0.0082, 0.0127, 0.0037, 0.0113, 0.0078, 0.0066])
    p = stats.ttest_rel(worse, BASE).pvalue
    assert 0.01 / 8 < p < 0.01
    (alone,) = judge([make_runs(worse)], make_runs(BASE))
    assert alone["p_holm"] == pytest.approx(p) and alone["verdict"] == "worse"
    (strict,) = judge([make_runs(worse)], make_runs(BASE), alpha=p / 2)
    assert strict["p_holm"] == pytest.approx(p) and strict["verdict"] == "undecided"
    among = judge([make_runs(worse), *[make_runs(UNCLEAR)] * 7], make_runs(BASE))[0]
    assert among["p_holm"] == pytest.approx(8 * p) and among["verdict"] == "undecided"


# ---- What could have been found

def test_detectable_difference_by_simulation():
    """
    Four in five comparisons with that true difference find it, at the level that is left of alpha for each of three
    arms; within four standard errors of 20,000 comparisons, and of one whose runs have no common seed (degrees of
    freedom are estimated then: a bound of 0.03).
    """
    tests = judge([make_runs(BETTER), make_runs(ALIKE), make_runs(UNCLEAR, first=11), [make_run(1, 0.5)]],
                  make_runs(BASE))
    sides = [(dict(sd=np.std(losses, ddof=1), n=6), dict(sd=np.std(BASE, ddof=1), n=6))
             for losses in (BETTER, ALIKE, UNCLEAR, BASE)]
    add_detectable(tests, sides, SETTINGS)
    rng = np.random.default_rng(3)
    for test in tests[:2]:
        samples = rng.normal(test["detectable"], test["sd"], (20_000, 6))
        p = stats.ttest_1samp(samples, 0.0, axis=1).pvalue
        assert (p < 0.01 / 3).mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 20_000))
    arm = rng.normal(tests[2]["detectable"], np.std(UNCLEAR, ddof=1), (20_000, 6))
    base = rng.normal(0.0, np.std(BASE, ddof=1), (20_000, 6))
    p = stats.ttest_ind(arm, base, axis=1, equal_var=False).pvalue
    assert (p < 0.01 / 3).mean() == pytest.approx(0.8, abs=0.03)
    assert tests[3]["detectable"] is None


# ---- Times

def time_of(times: list, baseline: list, settings=None) -> dict:
    """The test of times of a step, of arms called arm and baseline."""
    arms = [dict(name=name, runs=[run if isinstance(run, Run) else make_run(seed, 0.8, run)
                                  for seed, run in enumerate(runs, 1)])
            for name, runs in (("arm", times), ("baseline", baseline))]
    test = compare_times(*arms, SETTINGS | (settings or {}))
    add_verdicts([test], SETTINGS | (settings or {}))
    return test


def test_times_are_compared_by_the_logarithms_of_their_ratios():
    times, baseline = [108.0, 113.0, 104.5, 122.0, 111.0, 109.0], [100.0, 103.0, 95.5, 110.0, 102.0, 99.0]
    test = time_of(times, baseline)
    logarithms = np.log(np.array(times) / np.array(baseline))
    expected = stats.ttest_1samp(logarithms, 0.0)
    ends = expected.confidence_interval(0.95)
    assert (test["n"], test["left_out"], test["verdict"]) == (6, [], "worse")
    assert test["ratio"] == pytest.approx(np.prod(np.array(times) / np.array(baseline)) ** (1 / 6))
    assert (test["low"], test["high"]) == pytest.approx((math.exp(ends.low), math.exp(ends.high)))
    assert test["sd"] == pytest.approx(logarithms.std(ddof=1)) and test["p_holm"] == pytest.approx(expected.pvalue)
    back = time_of(baseline, times)
    assert back["verdict"] == "better" and back["ratio"] == pytest.approx(1 / test["ratio"])


def test_a_machine_that_becomes_slower_between_turns_is_no_matter():
    """The turns are 30 % apart, the ratios within them a few in a thousand."""
    speed = np.array([100.0, 104.0, 110.0, 117.0, 124.0, 130.0])
    slower = time_of(list(speed * [1.030, 1.028, 1.031, 1.029, 1.030, 1.032]), list(speed))
    assert slower["verdict"] == "worse" and slower["ratio"] == pytest.approx(1.03, abs=0.001)
    assert stats.ttest_ind(speed * 1.03, speed).pvalue > 0.5


def test_equally_fast_within_two_hundredths():
    baseline = [100.0] * 6
    times = [100.4, 99.8, 100.2, 100.6, 99.9, 100.3]
    logarithms = np.log(np.array(times) / 100)
    sides = (stats.ttest_1samp(logarithms, math.log(1.02), alternative="less").pvalue,
             stats.ttest_1samp(logarithms, -math.log(1.02), alternative="greater").pvalue)
    test = time_of(times, baseline)
    assert test["p_equivalent"] == pytest.approx(max(sides), rel=1e-6) and test["verdict"] == "equivalent"
    assert time_of([102.4, 101.8, 102.2, 102.6, 101.9, 102.3], baseline)["verdict"] == "worse"
    assert time_of([110.0, 95.0, 104.0, 97.0, 92.0, 105.0], baseline)["verdict"] == "undecided"
    assert time_of(times[:4], baseline)["verdict"] == "too few pairs"


def stepped(seconds: list[float]) -> list[float]:
    """Training time in ms after each step, of steps that took so many seconds."""
    return list(np.cumsum(seconds) * 1000)


PAUSED = stepped([0.1] * 30 + [4.0] + [0.1] * 30)


@pytest.mark.parametrize("odd, settings, reason", [
    (dict(), dict(reused=[dict(arm="arm", seed=3)]), "a run was taken over and did not take its turn"),
    (dict(), dict(reused=[dict(arm="baseline", seed=3)]), "a run was taken over and did not take its turn"),
    (dict(device="H200"), dict(), "the runs had different machines"),
    (dict(world_size=2), dict(), "the runs had different machines"),
    (dict(), dict(company=[["arm", 3, 4]]), "4 runs were started together with this one, 1 with the baseline's"),
    (dict(), dict(company=[["arm", 3, 4], ["baseline", 3, 3]]), "4 runs were started together with this one, 3 with"),
    (dict(ms=None), dict(), "no time is known"),
    (dict(resumed=True), dict(), "a run was stopped and resumed"),
    (dict(step_ms=PAUSED), dict(), "a run stood still for 4.0 s"),
    (dict(peak_flops=2.5e11 * 1.25), dict(), "the machine's speed moved by 25 % in between"),
    (dict(peak_flops=2.5e11 / 1.25), dict(), "the machine's speed moved by 25 % in between"),
])
def test_turns_that_do_not_count(odd, settings, reason):
    times = [110.0, 111.0, 99.0, 109.0, 112.0, 110.5]
    runs = [make_run(3, 0.8, **dict(ms=99.0) | odd) if seed == 3 else ms for seed, ms in enumerate(times, 1)]
    test = time_of(runs, [100.0] * 6, settings)
    logarithms = np.log(np.array([ms for seed, ms in enumerate(times, 1) if seed != 3]) / 100)
    assert len(test["left_out"]) == 1 and test["left_out"][0].startswith(f"seed 3: {reason}")
    assert test["n"] == 5 and test["ratio"] == pytest.approx(math.exp(logarithms.mean()))
    assert test["p"] == pytest.approx(stats.ttest_1samp(logarithms, 0.0).pvalue) and test["verdict"] == "worse"

    # the same, on the baseline's side
    if odd:
        turned = time_of([100.0] * 6, runs, settings)
        assert turned["left_out"] == test["left_out"] and turned["ratio"] == pytest.approx(1 / test["ratio"])


def test_what_does_not_leave_a_turn_out():
    """Equal company, a speed that moved by 20 % at most or is not known, runs of other arms that were taken over."""
    times = [110.0, 111.0, 99.0, 109.0, 112.0, 110.5]
    for facts in (dict(peak_flops=2.5e11 * (1 + 0.999 * MOVED)), dict(peak_flops=None)):
        runs = [make_run(3, 0.8, ms, **facts) if ms == 99.0 else ms for ms in times]
        assert time_of(runs, [100.0] * 6)["left_out"] == []
    company = [["arm", 3, 2], ["baseline", 3, 2], ["other", 4, 3]]
    settings = dict(company=company, reused=[dict(arm="other", seed=1)])
    assert time_of(times, [100.0] * 6, settings)["n"] == 6


def test_no_turn_counts():
    settings = dict(reused=[dict(arm="baseline", seed=seed) for seed in range(1, 7)])
    test = time_of([110.0] * 6, [100.0] * 6, settings)
    assert len(test["left_out"]) == 6 and (test["n"], test["verdict"]) == (0, "too few pairs")
    assert [test[name] for name in ("ratio", "low", "high", "sd", "p", "p_holm", "p_equivalent_holm")] == [None] * 7


def test_turns_without_common_seeds_are_by_their_order():
    """A run that failed takes its turn with it."""
    lost = dict(seed=12, error="killed")
    runs = [make_run(11, 0.8, 110.0), lost, make_run(13, 0.8, 112.0), make_run(14, 0.8, 111.0)]
    baseline = [make_run(1, 0.8), make_run(2, 0.8), make_run(3, 0.8, status="unfinished"), make_run(4, 0.8)]
    assert [(run.seed, other.seed) for run, other in turns_of(runs, baseline)] == [(11, 1), (14, 4)]
    assert [(run.seed, other.seed) for run, other in turns_of(runs[:1] + [make_run(4, 0.8)], baseline)] == [(4, 4)]


def test_pauses():
    """A step that took ten times the usual one and a twentieth of the run; compilation is in the first, if anywhere."""
    assert (PAUSE, PAUSE_SHARE) == (10, 0.05)
    steps = [0.1] * 60
    for position, seconds, expected in ((30, 4.0, 4.0), (30, 0.99, None), (30, 1.01, 1.01), (0, 4.0, None)):
        taken = [*steps[:position], seconds, *steps[position:]]
        assert longest_pause(make_run(1, 0.8, step_ms=stepped(taken))) == (expected and pytest.approx(expected))
    long = [0.1] * 1000
    assert longest_pause(make_run(1, 0.8, step_ms=stepped([*long, 5.2, *long]))) is None
    assert longest_pause(make_run(1, 0.8, step_ms=stepped([0.1, 0.1, 5.0, 0.1]))) is None     # too few to say
    assert longest_pause(make_run(1, 0.8)) is None


def test_holm_over_the_times():
    """Of three arms, one of which has no time."""
    tests = []
    for times in ([110.0, 111.0, 109.0, 112.0, 110.5], [101.0, 98.0, 103.0, 99.0, 102.0], [None] * 5):
        tests.append(time_of(times, [100.0] * 5))
    p = [test["p"] for test in tests]
    add_verdicts(tests, SETTINGS)
    assert p[0] < p[1] and p[2] is None
    assert [test["p_holm"] for test in tests] == [pytest.approx(2 * p[0]), pytest.approx(p[1]), None]
    assert [test["verdict"] for test in tests] == ["worse", "undecided", "too few pairs"]


# ---- Designs

PROMISING = [-0.031, -0.009, -0.020, -0.029, -0.011, -0.030, -0.010]    # a verdict is always near, and never there


@pytest.fixture(scope="module")
def design():
    """Of two arms: half of alpha each."""
    return make_design(8, 0.005, equivalence=True)


def pairs_with(differences: list[float]) -> tuple[list[Run], list[Run]]:
    """Runs of an arm and its baseline with these differences of their losses."""
    baseline = [0.8 + 0.01 * math.sin(seed) for seed in range(len(differences))]
    return make_runs([base + difference for base, difference in zip(baseline, differences)]), make_runs(baseline)


def test_looks_come_with_the_runs(design):
    """Before the first look there is neither word nor interval; then each look's word and its repeated interval."""
    assert design["looks"] == [4, 5, 6, 7, 8]
    differences = [*PROMISING, -0.020]
    runs, baseline = pairs_with(differences)
    test = compare_losses(runs[:3], baseline[:3], SETTINGS | dict(design=design))
    assert (test["look"], test["low"], test["high"]) == (None, None, None)
    for n in range(4, 8):
        test = compare_losses(runs[:n], baseline[:n], SETTINGS | dict(design=design))
        first = np.array(differences[:n])
        level = design["levels_interval"][n - 4]
        half = stats.t.isf(level / 2, n - 1) * first.std(ddof=1) / math.sqrt(n)
        assert test["look"] == dict(pairs=n, level=design["levels"][n - 4], word=None)
        assert stats.ttest_1samp(first, 0.0).pvalue > design["levels"][n - 4]
        assert (test["low"], test["high"]) == pytest.approx((first.mean() - half, first.mean() + half))
        assert half > stats.t.isf(0.025, n - 1) * first.std(ddof=1) / math.sqrt(n)    # wider than the fixed test's
        add_verdicts([test], SETTINGS | dict(design=design))
        assert test["verdict"] == "undecided"
    (test,) = judge([runs], baseline, design=design)
    assert stats.ttest_1samp(differences, 0.0).pvalue < design["levels"][4]
    assert test["look"] == dict(pairs=8, level=design["levels"][4], word="better") and test["verdict"] == "better"


def test_an_arm_that_is_decided_stays_so(design):
    """At the first look that says a word; what its runs or the baseline's are worth later changes nothing."""
    clear = [-0.0201, -0.0199, -0.0200, -0.0202]
    runs, baseline = pairs_with([*clear, 0.5, 0.4])
    settings = SETTINGS | dict(design=design, margin=0.001)
    for n in (4, 6):
        (test,) = judge([runs[:n]], baseline, **settings)
        assert test["look"] == dict(pairs=4, level=design["levels"][0], word="better") and test["verdict"] == "better"
        assert test["low"] < np.mean(clear) < test["high"] < -0.019
    runs, baseline = pairs_with([0.0001, -0.0001, 0.00005, -0.00004])
    (test,) = judge([runs], baseline, **settings)
    assert test["verdict"] == test["look"]["word"] == "equivalent"


def test_an_arm_that_ends_early_or_at_the_last_look_is_undecided(design):
    hopeless = [0.01, -0.01, 0.0101, -0.0102, 0.0001, -0.0001, 0.01]
    runs, baseline = pairs_with(hopeless)
    (test,) = judge([runs], baseline, design=design)
    assert test["look"]["word"] == "undecided" and test["look"]["pairs"] < 8 and test["verdict"] == "undecided"
    almost = [*PROMISING, -0.001]
    runs, baseline = pairs_with(almost)
    (test,) = judge([runs], baseline, design=design)
    assert design["levels"][-1] < stats.ttest_1samp(almost, 0.0).pvalue < 0.005
    assert test["look"] == dict(pairs=8, level=design["levels"][-1], word="undecided")


def test_runs_that_failed_within_a_look(design):
    """A look comes when its runs are done, failed or not: its test is of the pairs that there are, its level stays."""
    differences = [PROMISING[0], -0.5, 0.5, *PROMISING[1:4]]
    runs, baseline = pairs_with(differences)
    entries = [*runs[:1], dict(seed=2, error="killed"), *runs[2:]]
    baseline[2] = make_run(3, 0.8, status="unfinished")
    (test,) = judge([entries], baseline, design=design)
    left = np.array(PROMISING[:4])
    half = stats.t.isf(design["levels_interval"][2] / 2, 3) * left.std(ddof=1) / 2
    assert test["n"] == 4 and test["p"] == pytest.approx(stats.ttest_1samp(left, 0.0).pvalue)
    assert test["look"] == dict(pairs=6, level=design["levels"][2], word=None)
    assert (test["low"], test["high"]) == pytest.approx((left.mean() - half, left.mean() + half))

    # too few of them for any test
    (test,) = judge([[runs[0], *[dict(seed=seed, error="killed") for seed in range(2, 9)]]], baseline, design=design)
    assert test["look"] == dict(pairs=8, level=design["levels"][-1], word="undecided") and test["low"] is None


def test_bonferroni_in_place_of_holm(design):
    """Shown p values are multiplied by the number of arms, of times too; a look compares p with its own level."""
    arms = [pairs_with([-0.0201, -0.0199, -0.0200, -0.0202])[0],
            pairs_with([-0.02, 0.001, -0.013, -0.03])[0],
            pairs_with([0.0001, -0.0001, 0.00005, -0.00004])[0]]
    baseline = pairs_with([0.0] * 4)[1]
    tests = judge(arms, baseline, design=design, margin=0.001)
    p = [stats.ttest_rel([run.val_loss for run in runs], [run.val_loss for run in baseline]).pvalue for runs in arms]
    assert [test["p_holm"] for test in tests] == pytest.approx([min(1, 3 * value) for value in p], rel=1e-5)
    assert tests[2]["p_equivalent_holm"] == pytest.approx(3 * tests[2]["p_equivalent"])
    assert [test["verdict"] for test in tests] == ["better", "undecided", "equivalent"]

    # times have no design: one test, when the comparison has ended
    times = [time_of([110.0, 111.0, 109.0, 112.0, 110.5], [100.0] * 5) for _ in range(2)]
    add_verdicts(times, SETTINGS | dict(design=design))
    assert [test["p_holm"] for test in times] == [pytest.approx(2 * test["p"]) for test in times]
    assert [test["verdict"] for test in times] == ["worse", "worse"]


# ---- The rule before

def test_the_rule_before():
    """Welch's test decides, Holm over the arms, and what is not better or worse is not distinguishable."""
    arms = ([loss - 0.01 for loss in BETTER], ALIKE, UNCLEAR)
    rows = []
    for losses in arms:
        runs, baseline = make_runs(losses), make_runs(BASE)
        rows.append(dict(loss=dict(sd=np.std(losses, ddof=1), n=6),
                         vs_baseline=compare_by_welch(runs, baseline, runs, baseline)))
    add_verdicts_by_welch(rows, dict(loss=dict(sd=np.std(BASE, ddof=1), n=6)))
    tests = [row["vs_baseline"]["loss"] for row in rows]
    p = [stats.ttest_ind(losses, BASE, equal_var=False).pvalue for losses in arms]
    assert [test["p"] for test in tests] == pytest.approx(p, rel=1e-6)
    assert tests[0]["p_holm"] == pytest.approx(3 * p[0], rel=1e-6) and p[0] < 0.01 / 3
    assert [test["verdict"] for test in tests] == ["better", "not distinguishable", "not distinguishable"]
    assert tests[1]["paired"]["n"] == 6
    assert tests[1]["paired"]["p"] == pytest.approx(stats.ttest_rel(ALIKE, BASE).pvalue)
    assert all("look" not in test and "margin" not in test and "p_equivalent" not in test for test in tests)
    assert [row["vs_baseline"]["time"]["verdict"] for row in rows] == ["not distinguishable"] * 3


# ---- Real runs

def test_a_record_by_pairs():
    """
    Six pairs of records/negative/2026-11-22_SwigluAndParallelResidual, which Welch's test could not tell apart: p is
    SciPy's for the losses below, three times that for three arms. The third arm is the baseline on other seeds.
    """
    settings, arms = read_arms(RECORDS / "negative" / "2026-11-22_SwigluAndParallelResidual")
    results = summarize(settings | rule_settings("cpu"), arms)
    swiglu, parallel, again = (arm["vs_baseline"]["loss"] for arm in results["arms"][1:])
    baseline = [0.7856, 0.8061, 0.7906, 0.8080, 0.8077, 0.8053]
    p = stats.ttest_rel([0.7938, 0.8188, 0.7943, 0.8193, 0.8155, 0.8119], baseline).pvalue
    assert parallel["p_holm"] == pytest.approx(3 * p, rel=1e-6) and round(3 * p, 4) == 0.0044
    assert (parallel["n"], parallel["test"], parallel["verdict"]) == (6, "pairs", "worse")
    assert parallel["difference"] == pytest.approx(0.0083833, abs=1e-7) and parallel["welch"]["p"] > 0.2
    p = stats.ttest_rel([0.7861, 0.7936, 0.7654, 0.8014, 0.8019, 0.8020], baseline).pvalue
    assert swiglu["p_holm"] == pytest.approx(2 * p, rel=1e-6)
    assert (swiglu["n"], swiglu["test"], swiglu["verdict"]) == (6, "pairs", "undecided")
    assert (again["n"], again["test"], again["verdict"]) == (6, "runs", "undecided")
