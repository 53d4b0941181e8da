"""
An arm against its baseline: the verdict on losses over pairs of equal seeds, and on times over turns.

Losses. Student's t over the differences of equal seeds; Welch's test between runs where no seed is common. A comparison
that runs until it is decided is read look by look, by its design (sequential.py).

Times. The runs of a turn share the state of the machine: t over the logarithms of the ratios of ms a step within a
turn. A turn is left out, with a line that says why, where a run did not take its turn, was paused or resumed, or had
another number of runs beside it than its partner, and where the measured speed of the machine moved in between.

Both are corrected over the arms by Holm's method, difference and equivalence apart. A design has divided its error by
the number of arms beforehand instead, and so does a comparison whose error is a ledger's: its bound is on how many arms
are kept by mistake, which Holm's method does not keep.
"""

import math
import statistics

from scipy import stats

from records.runs import Run
from records.sequential import look_at
from records.statistics import (
    ALPHA,
    TIME_MARGIN,
    detectable_by_pairs,
    detectable_by_welch,
    holm,
    test_pairs,
    test_welch,
    verdict,
)

RULE = "2026-12-01"     # the day on which this rule was fixed; settings hold the one that their results follow
MACHINE = ("device", "world_size")  # where these differ, times cannot be compared
MOVED = 0.2             # the largest change of the machine's speed within a turn, as a share
# A run was paused where one step took so many times the usual one and this share of the run.
PAUSE = 10
PAUSE_SHARE = 0.05


# ---- Losses

def pairs_of(runs: list[Run], baseline: list[Run]) -> list[tuple[Run, Run]]:
    """(run, the baseline's run of the same seed) for the finished runs that have such a partner."""
    partners = {run.seed: run for run in baseline if run.finished and run.seed is not None}
    return [(run, partners[run.seed]) for run in runs if run.finished and run.seed in partners]


def compare_losses(entries: list, baseline: list, settings: dict) -> dict | None:
    """
    The test of an arm's final losses, as test_pairs gives it, and

    test        "pairs" or "runs" (Welch's, where no seed is common)
    margin      nats, or None
    welch       dict(difference, low, high, p) of Welch's test over all finished runs, for information
    look        with a design: dict(pairs, level, word) of the last look, whose runs alone are tested: the planned
                pairs, the level of its p value, and what it says, None where the arm goes on; otherwise None. The
                interval is then the look's repeated one, and none before the first look
    None where a side has no finished run. entries and baseline: their runs in the order of the turns, each a Run or a
    dict of one without a log.
    """
    runs = finished_runs(entries)
    others = finished_runs(baseline)
    if not runs or not others:
        return None
    margin = settings.get("margin")
    design = settings.get("design")
    look = last_look(entries, others, design, margin) if design else None
    if look:  # an arm that is decided may have further runs, and one that goes on begins the next look's
        entries = entries[:look["pairs"]]
        runs = finished_runs(entries)
    welch = test_welch([run.val_loss for run in runs], [run.val_loss for run in others], margin)
    differences = [run.val_loss - other.val_loss for run, other in pairs_of(runs, others)]
    result = test_pairs(differences, margin) | dict(test="pairs") if differences else welch | dict(test="runs")
    result["welch"] = {name: welch[name] for name in ("difference", "low", "high", "p")}
    result["margin"] = margin
    result["look"] = look
    if design:
        result |= repeated_interval(result, design)
    return result


def finished_runs(entries: list) -> list[Run]:
    return [run for run in entries if isinstance(run, Run) and run.finished]


def last_look(entries: list, baseline: list[Run], design: dict, margin: float | None) -> dict | None:
    """The last look that an arm's runs have come to: the first that decides it, or else the latest; None before all."""
    look = None
    for n, level in zip(design["looks"], design["levels"]):
        if len(entries) < n:
            break
        differences = [run.val_loss - other.val_loss for run, other in pairs_of(finished_runs(entries[:n]), baseline)]
        word = look_at(differences, n, design, margin)
        look = dict(pairs=n, level=level, word=word)
        if word:
            break
    return look


def repeated_interval(test: dict, design: dict) -> dict:
    """low and high of the repeated interval of a test's last look; None before the first look and of one pair."""
    if not test["look"] or test["test"] != "pairs" or test["sd"] is None:
        return dict(low=None, high=None)
    level = design["levels_interval"][design["looks"].index(test["look"]["pairs"])]
    half = float(stats.t.isf(level / 2, test["n"] - 1)) * test["sd"] / math.sqrt(test["n"])
    return dict(low=test["difference"] - half, high=test["difference"] + half)


# ---- Times

def compare_times(arm: dict, baseline: dict, settings: dict) -> dict:
    """
    The test of an arm's times of a step: ratio (the arm's over the baseline's), low and high of its interval,
    difference (the ratio's logarithm), sd (of the logarithms), n (turns), p values as test_pairs gives them, and
    left_out, a line for each turn that does not count. What was not measured is None.
    """
    ratios = []
    left_out = []
    for run, other in turns_of(arm["runs"], baseline["runs"]):
        fault = find_time_fault((arm["name"], run), (baseline["name"], other), settings)
        if fault:
            left_out.append(f"seed {run.seed}: {fault}")
        else:
            ratios.append(math.log(run.ms_per_step / other.ms_per_step))
    if not ratios:
        unknown = ("ratio", "difference", "low", "high", "sd", "p", "p_less", "p_greater", "p_equivalent")
        return dict.fromkeys(unknown) | dict(n=0, left_out=left_out)
    test = test_pairs(ratios, math.log(1 + TIME_MARGIN))
    ends = {end: None if test[end] is None else math.exp(test[end]) for end in ("low", "high")}
    return test | ends | dict(ratio=math.exp(test["difference"]), left_out=left_out)


def turns_of(entries: list, baseline: list) -> list[tuple[Run, Run]]:
    """(run, the baseline's run of its turn) where both are finished: of equal seed or, without common seeds, place."""
    pairs = pairs_of(finished_runs(entries), finished_runs(baseline))
    if pairs:
        return pairs
    return [both for both in zip(entries, baseline) if all(isinstance(run, Run) and run.finished for run in both)]


def find_time_fault(one: tuple[str, Run], other: tuple[str, Run], settings: dict) -> str | None:
    """Why the times of a turn, of (the arm's name, its run) and the baseline's, do not count; None if they do."""
    # how they were run
    keys = [(name, run.seed) for name, run in (one, other)]
    runs = [run for _, run in (one, other)]
    reused = {(entry["arm"], entry["seed"]) for entry in settings.get("reused") or []}
    if reused.intersection(keys):
        return "a run was taken over and did not take its turn"
    if one[0] in (settings.get("added") or []):
        return "the arm was added later and did not take turns"
    if any(runs[0].facts.get(fact) != runs[1].facts.get(fact) for fact in MACHINE):
        return "the runs had different machines"
    company = {(arm, seed): count for arm, seed, count in settings.get("company") or []}
    together = [company.get(key, 1) for key in keys]
    if together[0] != together[1]:
        return f"{together[0]} runs were started together with this one, {together[1]} with the baseline's"

    # what happened meanwhile
    for run in runs:
        if run.ms_per_step is None:
            return "no time is known"
        if run.resumed:
            return "a run was stopped and resumed"
        pause = longest_pause(run)
        if pause:
            return f"a run stood still for {pause:.1f} s"
    speeds = [run.facts.get("peak_flops") for run in runs]
    if all(speeds) and max(speeds) > (1 + MOVED) * min(speeds):
        return f"the machine's speed moved by {100 * (max(speeds) / min(speeds) - 1):.0f} % in between"
    return None


def longest_pause(run: Run) -> float | None:
    """Seconds of a step that took far longer than the others and a good share of the run; None if there is none."""
    times = [0.0, *run.step_ms]
    steps = [after - before for before, after in zip(times, times[1:])]
    if len(steps) < PAUSE:
        return None
    longest = max(steps[1:])
    paused = longest > PAUSE * statistics.median(steps) and longest > PAUSE_SHARE * times[-1]
    return longest / 1000 if paused else None


# ---- All arms

def add_verdicts(tests: list[dict], settings: dict):
    """
    Add to the tests of all arms, losses or times, what depends on all of them: p_holm and p_equivalent_holm, verdict.
    """
    alpha = settings.get("alpha", ALPHA)
    design = settings.get("design")
    for name in ("p", "p_equivalent"):
        values = [test[name] for test in tests]
        if design or settings.get("ledger"):
            corrected = [scale(p, len(tests)) for p in values]
        else:
            corrected = holm(values)
        for test, p in zip(tests, corrected):
            test[f"{name}_holm"] = p
    for test in tests:
        if design and "look" in test:
            test["verdict"] = (test["look"] or {}).get("word") or "undecided"
        else:
            test["verdict"] = verdict(test, alpha)


def scale(p: float | None, count: int) -> float | None:
    """A p value times the number of arms (Bonferroni)."""
    return None if p is None else min(1.0, p * count)


def add_detectable(tests: list[dict], sides: list[tuple[dict, dict]], settings: dict):
    """
    Add to the tests of losses the difference that they would have found with a power of four in five, at the strictest
    level of the correction over the arms: what is found at that is found in any case. sides: summaries of the losses of
    arm and baseline.
    """
    count = sum(test["p"] is not None for test in tests)
    alpha = settings.get("alpha", ALPHA) / max(count, 1)
    for test, (a, b) in zip(tests, sides):
        if test["test"] == "pairs":
            test["detectable"] = detectable_by_pairs(test["sd"], test["n"], alpha)
        else:
            test["detectable"] = detectable_by_welch(a["sd"], a["n"], b["sd"], b["n"], alpha)


# ---- The rule before RULE

def compare_by_welch(runs: list[Run], baseline: list[Run], timed: list[Run], timed_baseline: list[Run]) -> dict | None:
    """
    What results said of an arm before RULE: dict(loss, time) of Welch's tests, the paired one beside the loss for
    information. timed: those runs of both whose times count.
    """
    runs = finished_runs(runs)
    baseline = finished_runs(baseline)
    if not runs or not baseline:
        return None

    def reduce(test):
        return {name: test[name] for name in ("difference", "low", "high", "p_less", "p_greater", "p")}
    loss = reduce(test_welch([run.val_loss for run in runs], [run.val_loss for run in baseline]))
    differences = [run.val_loss - other.val_loss for run, other in pairs_of(runs, baseline)]
    loss["paired"] = reduce(test_pairs(differences)) | {"n": len(differences)} if differences else None

    time = dict.fromkeys(loss.keys() - {"paired"})
    if len({tuple(run.facts.get(name) for name in MACHINE) for run in runs + baseline}) == 1:
        times = [[run.ms_per_step for run in finished_runs(side) if run.ms_per_step is not None]
                 for side in (timed, timed_baseline)]
        if all(times):
            time = reduce(test_welch(*times))
    return dict(loss=loss, time=time)


def add_verdicts_by_welch(rows: list[dict], baseline: dict):
    """What results said of all arms before RULE. rows: results of the arms."""
    for kind in ("loss", "time"):
        tests = [row["vs_baseline"][kind] for row in rows]
        for test, p in zip(tests, holm([test["p"] for test in tests])):
            decided = p is not None and p < ALPHA and test["difference"] != 0
            word = "better" if decided and test["difference"] < 0 else "worse"
            test.update(p_holm=p, verdict=word if decided else "not distinguishable")

    count = sum(row["vs_baseline"]["loss"]["p"] is not None for row in rows)
    for row in rows:
        a = row["loss"]
        b = baseline["loss"]
        row["vs_baseline"]["loss"]["detectable"] = detectable_by_welch(
            a["sd"], a["n"], b["sd"], b["n"], ALPHA / max(count, 1))
