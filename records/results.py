"""
A comparison's results as one dictionary: what the report shows, the board stores and scripts read.

Losses are nats a token, times the trainer's own clock; a difference is arm minus baseline, so that less than zero is
better. The first arm is the baseline. Only finished runs count; all others are listed with what befell them. What was
not measured is None.

The rule that verdicts follow has a date, which stands in the settings: statistics.py has the one of today. Results of
before it say "not distinguishable" and rest on Welch's test between runs; they are checked by what they were made with.
"""

import json
import re

from records.autopsy import dissect_runs
from records.runs import Run
from records.statistics import reach, summary
from records.verdicts import (
    RULE,
    add_detectable,
    add_verdicts,
    add_verdicts_by_welch,
    compare_by_welch,
    compare_losses,
    compare_times,
    finished_runs,
    pairs_of,
)
from records.words import number, plain
from train_gpt import RESUME_FIELDS, SEAMS, RunError, require

FORMAT = "knotgpt-comparison-2"
FORMATS = ("knotgpt-comparison-1", FORMAT)  # that can still be read: the first has verdicts of the rule before RULE
ENVIRONMENT = ("device", "world_size", "dtype", "compile", "torch", "cuda", "triton", "python", "platform",
               "git_commit", "git_dirty", "peak_flops", "val_sha256")
RUN_FIELDS = RESUME_FIELDS | {"seed", "run_id"}  # of a configuration: what may differ between the runs of one arm
# What a comparison holds fixed unless an arm changes it, by a setting of these names or a part whose name says so. What
# is not in SEAMS is the referee's: an arm that replaced it has changed all three.
VALIDATION = "the validation data"
ORDER = "the order of the training data"
START = "the initial tensors of equal name and shape"
SETTINGS_OF = {
    ORDER: {"sequence_length", "batch_tokens", "align_documents", "document_token", "vocab_size"},
    START: {"init_from", "zero_init_projections", "tied_embedding"}}
PARTS_OF = {
    ORDER: re.compile(r"(?i)data|token|order|mixture|batch|row|shard|document"),
    START: re.compile(r"(?i)initial")}


def summarize(settings: dict, arms: list[dict]) -> dict:
    """
    Results of a comparison, ready for JSON. RunError where the runs cannot be compared.

    settings, all but the first five may be missing:
      track, seeds, budget ("tokens" or "time"), target, command
      rule: the day of the rule that verdicts follow; without it they follow the one before RULE
      alpha, margin (nats, None: equivalence is not tested), design (as sequential.make_design gives it) or None
      ledger: the file that gave alpha, or None
      budget_seconds; order [[arm, seed], ...] as run; company [[arm, seed, count], ...] of runs that were started
      together with others, with the number of them all; tried (number of arms)
      sweep {arm: dict(tries=[dict(factor, seeds, losses)], chosen=factor)} or None
      overhead dict(wall_seconds, runs_seconds) or None
      added [arm], of those that joined the others when these had their results
      reused [dict(arm, seed, log, seen)], of runs that another comparison trained: its log, and the comparisons with
      that run whose result was there before this one began
    arms: dicts of name, variant [str], options [str] and runs in the order of the turns, each a Run or, where there is
      no log, dict(seed, error); the baseline first; perhaps faults [str], what makes the arm worthless whatever its
      loss
    The target is settings["target"] if it was set for these validation data, or else the baseline's mean final loss.
    """
    logs = [[run for run in arm["runs"] if isinstance(run, Run)] for arm in arms]
    check_comparable(arms, logs)
    reused = {(entry["arm"], entry["seed"]) for entry in settings.get("reused") or []}
    timed = [[run for run in runs if (arm["name"], run.seed) not in reused] for arm, runs in zip(arms, logs)]

    # each arm
    rows = [arm_results(*columns) for columns in zip(arms, logs, timed)]
    target = known_target(settings, logs) or (rows[0]["loss"] or {}).get("mean")
    for row, runs in zip(rows, logs):
        row["to_target"] = to_target([curve_of(run) for run in runs if run.finished], row["curve"], target)
        row["changed"], row["changed_code"] = find_changes(runs, logs[0])
        row["not_fixed"] = find_not_fixed(row, runs, logs[0])
        row["vs_baseline"] = None
        row["pairs"] = []
        if row is not rows[0]:
            row["pairs"] = [[run.seed, run.val_loss - other.val_loss] for run, other in pairs_of(runs, logs[0])]

    # each against the baseline
    if settings.get("rule") is None:
        for row, runs, in_turn in list(zip(rows, logs, timed))[1:]:
            row["vs_baseline"] = compare_by_welch(runs, logs[0], in_turn, timed[0])
        add_verdicts_by_welch([row for row in rows if row["vs_baseline"]], rows[0])
    else:
        compare_arms(rows, arms, settings)

    # where they ran
    every = [run.facts for runs in logs for run in runs]
    environment = {name: every[0].get(name) if every else None for name in ENVIRONMENT}
    values = {name: distinct(facts.get(name) for facts in every) for name in ENVIRONMENT if name != "peak_flops"}
    differs = {name: several for name, several in values.items() if len(several) > 1}
    return dict(format=FORMAT, settings=settings, environment=environment, environment_differs=differs, arms=rows)


def compare_arms(rows: list[dict], arms: list[dict], settings: dict):
    """Set each row's comparison with the baseline, dict(loss, time); it stays None where a side has no finished run."""
    require(settings["rule"] == RULE,
            f"these results follow the rule of {settings['rule']!r:.40}, which this version does not know; use the "
            "version that made them")
    baseline = arms[0]
    for row, arm in list(zip(rows, arms))[1:]:
        loss = compare_losses(arm["runs"], baseline["runs"], settings)
        if loss:
            row["vs_baseline"] = dict(loss=loss, time=compare_times(arm, baseline, settings))
    compared = [row for row in rows if row["vs_baseline"]]
    losses = [row["vs_baseline"]["loss"] for row in compared]
    add_verdicts(losses, settings)
    add_detectable(losses, [(row["loss"], rows[0]["loss"]) for row in compared], settings)
    add_verdicts([row["vs_baseline"]["time"] for row in compared], settings)


def outcome_of(results: dict) -> dict:
    """
    The verdict for scripts: of the first arm beside the baseline, and of each arm in arms. verdict, difference (nats),
    interval [low, high], p (corrected), pairs, alpha (of all arms), margin, runs (finished ones), time (verdict, ratio,
    interval, turns) and sound; what was not measured is None.
    """
    alpha = results["settings"].get("alpha")
    rows = []
    for arm in results["arms"][1:]:
        tests = arm["vs_baseline"]
        row = dict(arm=arm["name"], verdict=None, difference=None, interval=None, p=None, pairs=0, alpha=alpha,
                   margin=results["settings"].get("margin"), time=None, sound=not arm["faults"])
        if tests:
            loss = tests["loss"]
            time = tests["time"]
            row |= dict(verdict=loss["verdict"], difference=loss["difference"], interval=[loss["low"], loss["high"]],
                        p=loss["p_holm"], pairs=loss["n"] if loss["test"] == "pairs" else 0,
                        time=dict(verdict=time["verdict"], ratio=time["ratio"], interval=[time["low"], time["high"]],
                                  turns=time["n"]))
        rows.append(row)
    finished = sum(arm["loss"]["n"] for arm in results["arms"] if arm["loss"])
    return rows[0] | dict(runs=finished, baseline=results["arms"][0]["name"], arms=rows)


def add_autopsies(results: dict, arms: list[dict]):
    """
    Add to each arm's results where it wins or loses (autopsy.py), from the losses that its runs and the baseline's
    kept. arms: as summarize takes them.
    """
    baseline = finished_runs(arms[0]["runs"])
    for row, arm in list(zip(results["arms"], arms))[1:]:
        try:
            row["autopsy"] = dissect_runs(pairs_of(finished_runs(arm["runs"]), baseline))
        except RunError as error:  # a verdict is worth more than what says where it comes from
            row["autopsy"] = dict(reason=f"{error}.")


def distinct(values) -> list:
    """The values, each once, in their order."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]


def settled(run: Run) -> dict:
    """The run's configuration without what is its own; a time budget's steps and tokens are an outcome."""
    config = run.facts.get("config", {})
    left_out = RUN_FIELDS | ({"steps", "tokens"} if config.get("time_budget") else set())
    return {name: value for name, value in config.items() if name not in left_out}


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a | b if a.get(name) != b.get(name)]


def known_target(settings: dict, logs: list[list[Run]]) -> float | None:
    """The target that was given, if it was set for these runs' validation data: a run notes 0 where it was not."""
    foreign = any(run.facts.get("target") == 0 for runs in logs for run in runs)
    return None if foreign else settings.get("target") or None


def check_scored(runs: list[Run]):
    """RunError, one line with both logs' names, unless all runs were scored on the same tokens."""
    for run in runs[1:]:
        first = runs[0]
        require(run.val_sha256 == first.val_sha256, f"{first.path} and {run.path} were validated on different data; "
                "run one of them again with the other's --data")
        scored = [each.facts.get("val_tokens") for each in (first, run)]
        words = ["an unknown number of" if tokens is None else number(tokens) for tokens in scored]
        require(scored[0] == scored[1],
                f"{first.path} was scored on {words[0]} tokens, {run.path} on {words[1]} tokens, so their losses "
                "cannot be compared; run one of them again with the other's --val_tokens and --sequence_length")


def check_comparable(arms: list[dict], logs: list[list[Run]]):
    """
    RunError, one line with both logs' names, unless code and configuration are one within an arm and the scored tokens
    are one in all.
    """
    check_scored([run for runs in logs for run in runs])
    for arm, runs in zip(arms, logs):
        name = plain(arm["name"])
        for run in runs[1:]:
            both = f"{runs[0].path} and {run.path} are both of arm {name}"
            require((run.code or run.source_sha256) == (runs[0].code or runs[0].source_sha256),
                    f"{both} and ran different code; run the older one again")
            names = differing(settled(runs[0]), settled(run))
            require(not names, f"{both} and differ in {', '.join(names)}; run one of them again")
        seeds = set()
        for run in runs:
            require(run.seed is None or run.seed not in seeds,
                    f"{run.path} is the second run of arm {name} with seed {run.seed}; leave one of them out")
            seeds.add(run.seed)


def curve_of(run: Run) -> list[list]:
    """[[step, tokens, seconds, loss], ...]"""
    return [[point.step, point.tokens, seconds_of(point.train_ms), point.val_loss] for point in run.points]


def seconds_of(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def mean_curve(curves: list[list]) -> list[list]:
    """
    The mean of curves [[step, tokens, seconds, loss], ...] at the steps before the last that all of them have, and the
    mean of their last points.
    """
    if not curves:
        return []
    shared = set.intersection(*({point[0] for point in curve[:-1]} for curve in curves))
    rows = zip(*([point for point in curve[:-1] if point[0] in shared] + [curve[-1]] for curve in curves))
    return [[None if None in values else summary(values)["mean"] for values in zip(*points)] for points in rows]


def one_or_summary(values: list):
    """The values' one value, a summary() where they differ, None where one is missing."""
    if not values or None in values:
        return None
    return values[0] if len(set(values)) == 1 else summary(values)


def known_summary(values) -> dict | None:
    known = [value for value in values if value is not None]
    return summary(known) if known else None


def arm_results(arm: dict, runs: list[Run], timed: list[Run]) -> dict:
    """What the results say of one arm beside its comparison. timed: those of its runs whose times count."""
    finished = [run for run in runs if run.finished]
    in_turn = [run for run in timed if run.finished]
    facts = (finished or runs)[0].facts if runs else {}
    entries, errors = list_entries(arm)

    # the cost of training
    tokens = one_or_summary([run.points[-1].tokens for run in finished])
    spent = tokens["mean"] if isinstance(tokens, dict) else tokens
    per_token = facts.get("flops_per_token")

    # what was measured, over all finished runs or those whose times count
    measured = {}
    for name in ("bits_per_byte", "peak_memory_mib"):
        measured[name] = known_summary(getattr(run, name) for run in finished)
    for name in ("ms_per_step", "tokens_per_second", "mfu", "warmup_seconds"):
        measured[name] = known_summary(getattr(run, name) for run in in_turn)
    measured["train_seconds"] = known_summary(seconds_of(run.train_ms) for run in in_turn)

    known = ("replaced", "parameters", "parameters_without_embeddings", "flops_per_token")
    return dict(
        name=arm["name"], variant=arm["variant"], options=arm["options"], errors=errors, faults=arm.get("faults", []),
        status="complete" if len(finished) == len(entries) else f"{len(finished)} of {len(entries)} finished",
        **{name: facts.get(name) for name in known},
        training_flops=per_token * spent if per_token and spent else None, tokens=tokens,
        steps=one_or_summary([run.last_step for run in finished]),
        loss=known_summary(run.val_loss for run in finished), **measured,
        curve=mean_curve([curve_of(run) for run in finished]), runs=entries)


def list_entries(arm: dict) -> tuple[list[dict], list[str]]:
    """(what the results say of each run, a line for each run without a result)."""
    entries = []
    errors = []
    for run in arm["runs"]:
        if not isinstance(run, Run):
            entries.append(dict(seed=run["seed"], error=run["error"]))
            errors.append(f"seed {run['seed']}: {run['error']}")
            continue
        entries.append(dict(
            seed=run.seed, status=run.status, log=run.path.name, val_loss=run.val_loss if run.finished else None,
            train_seconds=seconds_of(run.train_ms), curve=curve_of(run)))
        if not run.finished:
            errors.append(f"seed {run.seed}: {run.status}")
    return entries, errors


def to_target(curves: list[list], mean: list, target: float | None) -> dict:
    """When the mean curve and each run's curve first reach the target, interpolated; None for one that does not."""
    def first(curve, column):
        known = bool(curve) and target is not None and all(point[column] is not None for point in curve)
        return reach([(point[column], point[3]) for point in curve], target) if known else None
    steps = [first(curve, 0) for curve in curves]
    seconds = [first(curve, 2) for curve in curves]
    return dict(target=target, reached=f"{sum(step is not None for step in steps)} of {len(curves)}",
                steps=first(mean, 0), seconds=first(mean, 2), steps_each=steps, seconds_each=seconds)


def find_changes(runs: list[Run], baseline: list[Run]) -> tuple[dict, list[str]]:
    """
    What an arm was run with besides its variant: {setting: [baseline's, arm's]}, and those modules of both whose code
    differs.
    """
    if not runs or not baseline:
        return {}, []
    before = settled(baseline[0])
    after = settled(runs[0])
    settings = {name: [before.get(name), after.get(name)] for name in differing(before, after) if name != "variant"}
    return settings, [name for name, digest in runs[0].code.items() if baseline[0].code.get(name, digest) != digest]


def find_not_fixed(row: dict, runs: list[Run], baseline: list[Run]) -> dict[str, str]:
    """{what a comparison otherwise holds fixed: what the arm did to it}."""
    if not runs or not baseline:
        return {}
    if "train_gpt" in row["changed_code"]:
        return dict.fromkeys((VALIDATION, ORDER, START), "other code of train_gpt")
    names = [name for names in (row["replaced"] or {}).values() for name in names]
    referee = [name for name in names if name.partition(".")[0] not in SEAMS]
    reasons = {VALIDATION: list(referee)}
    for claim in (ORDER, START):
        reasons[claim] = [name for name in names if name in referee or PARTS_OF[claim].search(name)]
        reasons[claim] += [name for name in row["changed"] if name in SETTINGS_OF[claim]]
    if runs[0].facts.get("train_data") != baseline[0].facts.get("train_data"):
        reasons[ORDER].append("other training data")
    return {claim: ", ".join(because) for claim, because in reasons.items() if because}
