"""
A comparison's results as one dictionary, and the folder that shows them: results.json, README.md, curves.png,
report.html.

Losses are nats a token, times the trainer's own clock; a difference is arm minus baseline, so that less than zero is
better. The first arm is the baseline. Only finished runs count; all others are listed with what befell them. What was
not measured is None in the results and "-" on the page. README.md and report.html say the same: facts() and tables()
make the words and the numbers of both.
"""

import html
import json
import math
import re
import warnings
from pathlib import Path

from records.runs import Run
from records.statistics import ALPHA, POWER, detectable, holm, paired, reach, summary, verdict, welch
from train_gpt import RESUME_FIELDS, SEAMS, RunError, require, write_atomically

FORMAT = "knotgpt-comparison-1"
TEMPLATE = Path(__file__).with_name("report_template.html")
ENVIRONMENT = ("device", "world_size", "dtype", "compile", "torch", "cuda", "triton", "python", "platform",
               "git_commit", "git_dirty", "peak_flops", "val_sha256")
MACHINE = ("device", "world_size")  # where these differ, times cannot be compared
RUN_FIELDS = RESUME_FIELDS | {"seed", "run_id"}  # of a configuration: what may differ between the runs of one arm
# Told apart by the colour-blind, on light and on dark.
COLORS = ("#7d838c", "#d55e00", "#0a84d0", "#0a9e73", "#c264a0", "#b8860b", "#7a5fd0", "#2aa7b8")
LATE = 0.2  # pictures are scaled to the losses after this share of the longest run: those before would squeeze the rest
TIME_WORDS = {"better": "faster", "worse": "slower"}
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


# ---- Results

def summarize(settings: dict, arms: list[dict]) -> dict:
    """
    Results of a comparison, ready for JSON. RunError where the runs cannot be compared.

    settings: track, seeds, budget ("tokens" or "time"), budget_seconds, target, command, order [[arm, seed], ...] as
      run, tried (number of arms), sweep {arm: dict(tries=[dict(factor, seeds, losses)], chosen=factor)} or None,
      overhead dict(wall_seconds, runs_seconds) or None, reused [dict(arm, seed, log, seen)], of runs that another
      comparison trained: its log, and the comparisons with that run whose result was there before this one began
    arms: dicts of name, variant [str], options [str] and runs, each a Run or, where there is no log, dict(seed, error);
      the baseline first; perhaps faults [str], what makes the arm worthless whatever its loss
    The target is settings["target"] if it was set for these validation data, or else the baseline's mean final loss.
    p values are Holm's over the arms, for loss and for time apart. Times of reused runs are not compared: they did not
    take turns with the others.
    """
    logs = [[run for run in arm["runs"] if isinstance(run, Run)] for arm in arms]
    check_comparable(arms, logs)
    reused = {(entry["arm"], entry["seed"]) for entry in settings.get("reused") or []}
    timed = [[run for run in runs if (arm["name"], run.seed) not in reused] for arm, runs in zip(arms, logs)]

    # each arm, and each against the baseline
    rows = [arm_results(*columns) for columns in zip(arms, logs, timed)]
    baseline = rows[0]
    target = known_target(settings, logs) or (baseline["loss"] or {}).get("mean")
    for row, runs, in_turn in zip(rows, logs, timed):
        row["to_target"] = to_target([curve_of(run) for run in runs if run.finished], row["curve"], target)
        row["changed"], row["changed_code"] = find_changes(runs, logs[0])
        row["not_fixed"] = find_not_fixed(row, runs, logs[0])
        row["vs_baseline"] = None
        row["pairs"] = []
        if row is not baseline:
            row["vs_baseline"] = compare_runs(runs, logs[0], in_turn, timed[0])
            row["pairs"] = [[run.seed, run.val_loss - other.val_loss] for run, other in pairs_of(runs, logs[0])]
    add_verdicts([row for row in rows if row["vs_baseline"]], baseline)

    # where they ran
    every = [run.facts for runs in logs for run in runs]
    environment = {name: every[0].get(name) if every else None for name in ENVIRONMENT}
    values = {name: distinct(facts.get(name) for facts in every) for name in ENVIRONMENT if name != "peak_flops"}
    differs = {name: several for name, several in values.items() if len(several) > 1}
    return dict(format=FORMAT, settings=settings, environment=environment, environment_differs=differs, arms=rows)


def add_verdicts(rows: list[dict], baseline: dict):
    """Add to each arm's comparison what depends on all of them: Holm's p values, verdicts, detectable differences."""
    for kind in ("loss", "time"):
        results = [row["vs_baseline"][kind] for row in rows]
        for result, p in zip(results, holm([result["p"] for result in results])):
            result.update(p_holm=p, verdict=verdict(p, result["difference"]))

    # two-sided as the verdict, at Holm's strictest level: what is found at that is found in any case
    tested = sum(row["vs_baseline"]["loss"]["p"] is not None for row in rows)
    alpha = ALPHA / 2 / max(tested, 1)
    for row in rows:
        a = row["loss"]
        b = baseline["loss"]
        row["vs_baseline"]["loss"]["detectable"] = detectable(a["sd"], a["n"], b["sd"], b["n"], alpha=alpha)


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


def pairs_of(runs: list[Run], baseline: list[Run]) -> list[tuple[Run, Run]]:
    """(run, the baseline's run of the same seed) for the finished runs that have such a partner."""
    partners = {run.seed: run for run in baseline if run.finished and run.seed is not None}
    return [(run, partners[run.seed]) for run in runs if run.finished and run.seed in partners]


def compare_runs(runs: list[Run], baseline: list[Run], timed: list[Run], timed_baseline: list[Run]) -> dict | None:
    """
    Welch's test of an arm's final losses against the baseline's and, of those runs of both whose times count, of the
    times of a step, if all ran on one machine; None where a side has no finished run.
    """
    runs = [run for run in runs if run.finished]
    baseline = [run for run in baseline if run.finished]
    if not runs or not baseline:
        return None
    pairs = [(run.val_loss, other.val_loss) for run, other in pairs_of(runs, baseline)]
    loss = welch([run.val_loss for run in runs], [run.val_loss for run in baseline])
    loss["paired"] = paired(*map(list, zip(*pairs))) | {"n": len(pairs)} if pairs else None

    time = dict.fromkeys(("difference", "low", "high", "p_less", "p_greater", "p"))
    if all(len(distinct(run.facts.get(name) for run in runs + baseline)) == 1 for name in MACHINE):
        times = [[run.ms_per_step for run in side if run.finished and run.ms_per_step is not None]
                 for side in (timed, timed_baseline)]
        if all(times):
            time = welch(*times)
    return dict(loss=loss, time=time)


# ---- Words and numbers

def plain(text) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def number(value, digits: int | None = None, signed: bool = False) -> str:
    """A number, the mean ± sd of a summary(), or "-"."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        mean = number(value["mean"], digits)
        return mean if value["sd"] is None else f"{mean} ± {number(value['sd'], digits)}"
    if digits is None and abs(value) >= 1e12:
        return f"{value:.3g}".replace("e+", "e")
    sign = "+" if signed else ""
    return f"{value:{sign},.{digits or 0}f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f} %"


def p_value(p: float | None) -> str:
    if p is None:
        return "-"
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def equals(p: float | None) -> str:
    """ "p = 0.02" or "p < 0.0001". """
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def interval(test: dict, digits: int) -> str:
    if test["low"] is None:
        return "-"
    return f"{number(test['low'], digits, signed=True)} to {number(test['high'], digits, signed=True)}"


def sentence(arm: dict, baseline: dict) -> str:
    """An arm's verdict in words: loss, then time, then whether parameters and FLOPs are equal."""
    name = plain(arm["name"])
    base = plain(baseline["name"])
    unsound = "".join(f"{plain(side['name'])} IS NOT SOUND, so this says nothing: {plain('; '.join(side['faults']))}. "
                      for side in (arm, baseline) if side["faults"])
    if arm["vs_baseline"] is None:
        return f"{unsound}{name}: no verdict, because {base if arm['loss'] else name} has no finished run."
    text = loss_words(arm, baseline)
    loss = arm["vs_baseline"]["loss"]
    if loss["paired"] and loss["paired"]["p"] is not None:
        text += f". Over {loss['paired']['n']} pairs of equal seeds, uncorrected: {equals(loss['paired']['p'])}"
    time = arm["vs_baseline"]["time"]
    if time["difference"] is not None:
        tested = f", {equals(time['p_holm'])}" if time["p"] is not None else ""
        share = percent(time["difference"] / baseline["ms_per_step"]["mean"])
        text += (f". Time: {TIME_WORDS.get(time['verdict'], time['verdict'])}, "
                 f"{number(time['difference'], 2, signed=True)} ms a step ({share}{tested})")
    return f"{unsound}{text}. {parity(arm, baseline)}."


def loss_words(arm: dict, baseline: dict) -> str:
    """What an arm's losses say, without the full stop."""
    name = plain(arm["name"])
    base = plain(baseline["name"])
    loss = arm["vs_baseline"]["loss"]
    n = f"n = {arm['loss']['n']} and {baseline['loss']['n']}"
    tested = f"95 % {interval(loss, 4)}, Welch {equals(loss['p_holm'])} after Holm"
    if loss["verdict"] != "not distinguishable":
        return (f"{name} is {loss['verdict']} than {base} by {number(abs(loss['difference']), 4)} nats "
                f"({tested}, {n})")
    text = (f"{name} is not distinguishable from {base} at {n}: difference "
            f"{number(loss['difference'], 4, signed=True)} nats")
    if loss["p"] is None:
        text += ", and no test with fewer than two runs a side"
    else:
        text += f" ({tested})"
    if loss["detectable"] is not None:
        least = number(loss["detectable"], 4)
        text += f"; a difference of {least} would have been found with {100 * POWER:.0f} % power"
    return text


def sentences(results: dict) -> list[str]:
    """The verdict of each arm, and what a reader must know beside it."""
    arms, reused = results["arms"], results["settings"].get("reused") or []
    lines = [sentence(arm, arms[0]) for arm in arms[1:]]
    if reused:
        total = sum(len(arm["runs"]) for arm in arms)
        seen = ", whose results had been seen" if seen_in(reused) else ""
        verb = "was" if len(reused) == 1 else "were"
        lines.append(f"{len(reused)} of the {total} runs {verb} taken over from earlier comparisons{seen}; their times "
                     "are not compared.")
    return lines


def seen_in(reused: list[dict]) -> list[str]:
    """The comparisons that hold reused runs and had a result before this one began."""
    return sorted({folder for entry in reused for folder in entry["seen"]})


def console_table(results: dict) -> str:
    """The losses and the time of a step, a row an arm, in columns for a terminal."""
    (_, heads, losses), (_, cost_heads, costs), _ = tables(results)
    shown = ["arm", "verdict", "final loss", "runs", "difference", "95 %"]
    rows = [[*shown, "ms/step"]]
    for loss, cost in zip(losses, costs):
        rows.append([loss[heads.index(head)] for head in shown] + [cost[cost_heads.index("ms/step")]])
    rows = [[cell if len(cell) <= 40 else cell[:39] + "…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def parity(arm: dict, baseline: dict) -> str:
    """Whether parameters and FLOPs are equal, in words."""
    words = []
    for what, key in {"Parameters": "parameters", "FLOPs a token": "flops_per_token"}.items():
        if not arm[key] or not baseline[key]:
            words.append(f"{what} not recorded")
        elif arm[key] == baseline[key]:
            words.append(f"{what} equal")
        else:
            words.append(f"{what} unmatched ({percent(arm[key] / baseline[key] - 1, 2)})")
    return ", ".join(words)


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """
    (title, heads, rows of cells) for losses, cost and the way to the target; a row an arm, "arm" and "verdict" among
    the heads.
    """
    arms = results["arms"]
    target = arms[0]["to_target"]["target"]
    untested = dict.fromkeys(("difference", "low", "high", "p", "p_holm", "detectable", "paired"))
    losses = []
    costs = []
    reached = []
    for arm in arms:
        none = untested | {"verdict": "baseline" if arm is arms[0] else "-"}
        tests = arm["vs_baseline"] or dict(loss=none, time=none)
        losses.append(loss_row(arm, tests["loss"]))
        costs.append(cost_row(arm, tests["time"]))
        reached.append(target_row(arm, target))
    goal = "To the target"
    if target is not None:
        goal += f", a loss of {number(target, 4)}"
    return [(name, list(rows[0]), [list(row.values()) for row in rows])
            for name, rows in {"Loss": losses, "Cost": costs, goal: reached}.items()]


def loss_row(arm: dict, test: dict) -> dict[str, str]:
    """{head: cell} of an arm's losses and their test."""
    finished = arm["loss"]["n"] if arm["loss"] else 0
    return {
        "arm": plain(arm["name"]),
        "verdict": test["verdict"],
        "final loss": number(arm["loss"], 4),
        "runs": f"{finished} of {len(arm['runs'])}",
        "difference": number(test["difference"], 4, signed=True),
        "95 %": interval(test, 4),
        "Welch p": p_value(test["p"]),
        "after Holm": p_value(test["p_holm"]),
        "paired p": p_value(test["paired"]["p"] if test["paired"] else None),
        "detectable": number(test["detectable"], 4),
        "bits/byte": number(arm["bits_per_byte"], 4)}


def cost_row(arm: dict, test: dict) -> dict[str, str]:
    """{head: cell} of what an arm's runs cost, and of the test of a step's time."""
    mfu = arm["mfu"] and {key: value and 100 * value for key, value in arm["mfu"].items()}
    return {
        "arm": plain(arm["name"]),
        "verdict": TIME_WORDS.get(test["verdict"], test["verdict"]),
        "ms/step": number(arm["ms_per_step"], 2),
        "difference": number(test["difference"], 2, signed=True),
        "95 %": interval(test, 2),
        "p after Holm": p_value(test["p_holm"]),
        "time s": number(arm["train_seconds"], 1),
        "tokens/s": number(arm["tokens_per_second"]),
        "MFU %": number(mfu, 1),
        "memory MiB": number(arm["peak_memory_mib"]),
        "warm-up s": number(arm["warmup_seconds"], 1),
        "parameters": number(arm["parameters"]),
        "without embeddings": number(arm["parameters_without_embeddings"]),
        "tokens": number(arm["tokens"]),
        "steps": number(arm["steps"]),
        "training FLOPs": number(arm["training_flops"])}


def target_row(arm: dict, target: float | None) -> dict[str, str]:
    """{head: cell} of when an arm's runs reach the target."""
    goal = arm["to_target"]
    missing = "not reached" if arm["curve"] and target is not None else "-"
    each = [missing if steps is None else f"{number(steps)} / {number(seconds, 1)} s"
            for steps, seconds in zip(goal["steps_each"], goal["seconds_each"])]
    return {
        "arm": plain(arm["name"]),
        "runs that reach it": goal["reached"],
        "steps": missing if goal["steps"] is None else number(goal["steps"]),
        "seconds": missing if goal["seconds"] is None else number(goal["seconds"], 1),
        "each run: steps / time": "; ".join(each) or "-"}


def facts(results: dict) -> list[tuple[str, list[str]]]:
    """(heading, lines) of all that the tables do not say."""
    errors = [f"{plain(arm['name'])}, {plain(error)}" for arm in results["arms"] for error in arm["errors"]]
    sections = [("Set-up", setup_lines(results)), ("What was held fixed, and what not", fixed_lines(results)),
                ("How it was measured", measurement_lines(results)), ("Statistics", statistics_lines(results))]
    return sections + ([("Runs without a result", errors)] if errors else [])


def known(value) -> str:
    """A value in one line, or that it is not recorded."""
    return "not recorded" if value in (None, "") else plain(value)


def setup_lines(results: dict) -> list[str]:
    """Track, budget, seeds, machine, versions, data and command."""
    settings = results["settings"]
    env = results["environment"]
    budget = {"tokens": "the same number of training tokens for every arm",
              "time": f"{number(settings.get('budget_seconds'), 1)} s of training time for every run"}
    dirty = {True: " with changes that are not in it", False: ", nothing changed since"}.get(env["git_dirty"], "")
    checksums = "; ".join(f"{name} sha256 {digest}" for name, digest in (env["val_sha256"] or {}).items())
    cuda = f"; CUDA {plain(env['cuda'])}, driver in the logs." if env["cuda"] else "."
    peak = None
    if env["peak_flops"]:
        peak = f"{env['peak_flops'] / 1e12:.3g} TFLOP/s a device, the measured rate of a large product"

    lines = [
        f"Track {known(settings.get('track'))}, {budget.get(settings.get('budget'), 'budget not recorded')}, "
        f"seeds {known(', '.join(map(str, settings.get('seeds') or [])))}.",
        f"{known(env['world_size'])} x {known(env['device'])}, activations in {known(env['dtype'])}, "
        f"compile {known(env['compile'])}{cuda}",
        f"PyTorch {known(env['torch'])}, Triton {known(env['triton'])}, Python {known(env['python'])}, "
        f"{known(env['platform'])}.",
        f"Commit {known(env['git_commit'])}{dirty}; every log holds the whole source of its run.",
        f"Validation data: {known(checksums)}.",
        f"MFU is a share of {known(peak)}.",
        f"Command: {known(settings.get('command'))}"]
    for name, values in results["environment_differs"].items():
        line = f"Not the same in all runs: {name} ({plain('; '.join(map(str, values)))})."
        if not name.startswith("git"):
            line += " Their times are not comparable."
        lines.append(line)
    return lines


def fixed_lines(results: dict) -> list[str]:
    """What is one in all arms, and what each arm changed."""
    arms = results["arms"]
    held = [claim for claim in (VALIDATION, ORDER, START) if not any(claim in arm["not_fixed"] for arm in arms)]
    seeded = [claim for claim in held if claim != VALIDATION]
    first = "Held fixed: every setting of the trainer that is not named here"
    if VALIDATION in held:
        first += f", {VALIDATION}"
    if seeded:
        first += f", and for equal seeds {' and '.join(seeded)}"
    lines = [f"{first}."]
    for arm in arms:
        lines.append(f"{plain(arm['name'])}: {plain('; '.join(changes_of(arm))) or 'the trainer as it is'}.")

    # learning rates
    sweeps = results["settings"].get("sweep") or {}
    for name, sweep in sweeps.items():
        tries = []
        for entry in sweep["tries"]:
            loss = known_summary(entry["losses"])
            n = loss["n"] if loss else 0
            tries.append(f"{plain(entry['factor'])} (loss {number(loss, 4)}, n = {n})")
        lines.append(f"{plain(name)}: learning-rate factor {plain(sweep['chosen'])}, chosen of {', '.join(tries)}.")
    if not sweeps:
        lines.append("No learning rate was tuned for an arm beyond what is named here: the verdicts hold for these "
                     "settings.")
    return lines


def changes_of(arm: dict) -> list[str]:
    """What an arm does that the baseline does not, in words."""
    words = []
    if arm["variant"]:
        words.append(f"variant {' + '.join(arm['variant'])}")
    if arm["replaced"]:
        words.append(f"replaces {', '.join(name for names in arm['replaced'].values() for name in names)}")
    if arm["options"]:
        words.append(f"options {' '.join(arm['options'])}")
    words += [f"{name} {new} instead of {old}" for name, (old, new) in arm["changed"].items()]
    if arm["changed_code"]:
        words.append(f"other code of {', '.join(arm['changed_code'])}")
    words += [f"NOT HELD FIXED: {claim} ({why})" for claim, why in arm["not_fixed"].items()]
    return words + [f"NOT SOUND: {fault}" for fault in arm["faults"]]


def measurement_lines(results: dict) -> list[str]:
    """The order of the runs, what the clock counts, and which runs were not trained for this comparison."""
    settings = results["settings"]
    order = ", ".join(f"{name} {seed}" for name, seed in settings.get("order") or [])
    lines = [
        f"Order of the runs (arm and seed): {known(order)}.",
        "The clock counts optimizer steps with their loading of data. It excludes compilation and warm-up, validation "
        "and checkpoints; the model and the optimizer are restored after the warm-up.",
        "Training FLOPs are PyTorch's count, forward and backward; scores that are computed and masked count, too."]
    lines += reused_lines(settings.get("reused") or [], plain(results["arms"][0]["name"]))
    overhead = settings.get("overhead")
    if overhead:
        lines.append(f"The comparison took {number(overhead['wall_seconds'], 1)} s, "
                     f"{number(overhead['runs_seconds'], 1)} s of it in the runs.")
    return lines


def statistics_lines(results: dict) -> list[str]:
    """The tests, their number, the noise, the target and how often a result was looked at."""
    settings = results["settings"]
    arms = results["arms"]
    base = plain(arms[0]["name"])
    compared = sum(arm["vs_baseline"] is not None for arm in arms)
    tried = settings.get("tried")
    others = ""
    if tried not in (None, len(arms)):
        others = f", {len(arms)} of them in this report; no p value is corrected for the others"
    noise = arms[0]["loss"]
    noise_line = f"The noise was not measured: {base} has fewer than two finished runs."
    if noise and noise["sd"] is not None:
        noise_line = f"Measured noise: sd {number(noise['sd'], 4)} of the final loss over {noise['n']} runs of {base}."

    lines = [
        f"Differences are arm minus {base}, over all finished runs: Welch's test, two-sided. After Holm's correction "
        f"over {plural(compared, 'arm')}, p < {ALPHA} is better or worse, all else not distinguishable.",
        f"Arms tried: {known(tried)}{others}.",
        f"Detectable: the difference that this test would have found with {100 * POWER:.0f} % power, given the "
        "measured spread.",
        "Paired p is over pairs of equal seeds and not corrected; no verdict rests on it.",
        noise_line,
        f"The target is {target_words(settings, arms[0])}; steps and time to it are interpolated linearly, on the mean "
        "curve and on each run's."]
    looks = len(seen_in([entry for entry in settings.get("reused") or [] if plain(entry["arm"]) != base]))
    if looks:
        lines.append(
            f"Looks: {plural(looks, 'earlier comparison')} with runs of these arms had a result when this one began. "
            "Where a result decides whether to go on, each look is a chance: that one of "
            f"{looks + 1} verdicts finds a difference where there is none happens in up to "
            f"{100 * (looks + 1) * ALPHA:.0f} % of all cases.")
    return lines


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reused_lines(reused: list[dict], base: str) -> list[str]:
    """Which runs another comparison trained, and what that means."""
    if not reused:
        return []
    runs = ", ".join(f"{plain(entry['arm'])} {entry['seed']} ({plain(entry['log'])})" for entry in reused)
    lines = [f"Taken over from other comparisons, with the same code, settings, seed, data and kind of machine: {runs}."
             " They did not take turns with the other runs, so their times are not compared; compare.py --no-reuse "
             "trains all of them in turn."]
    if all(plain(entry["arm"]) == base for entry in reused):
        lines.append(f"Only runs of {base} were taken over: verdicts that share them are not independent of each "
                     "other.")
    return lines


def target_words(settings: dict, baseline: dict) -> str:
    """What the target is, in words."""
    given, used = settings.get("target"), baseline["to_target"]["target"]
    if given and given == used:
        return "given"
    mean = f"the mean final loss of {plain(baseline['name'])}"
    return f"{mean}: {given:g}, the track's, was set for other validation data" if given else mean


def title(results: dict) -> str:
    """Which arms are compared with which, and what is equal."""
    names = [plain(arm["name"]) for arm in results["arms"]]
    text = names[0]
    if len(names) > 1:
        arms = ", ".join(names[1:]) if len(names) < 5 else f"{len(names) - 1} arms"
        text = f"{arms} against {names[0]}"
    budget = results["settings"].get("budget")
    return f"{text} at equal {budget}" if budget in ("tokens", "time") else text


# ---- The folder

def write_report(folder: Path, results: dict, log_x: bool = False):
    """
    Write results.json, README.md, report.html and curves.png (log_x: its x axes logarithmic) into folder; each appears
    when it is complete. RunError where the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; give another folder") from None
    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False) + "\n", "README.md": markdown(results),
             "report.html": page(results)}
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    write_atomically(folder / "curves.png", lambda file: draw(file, results, log_x))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]|&~$]|<(?=\S)|(?<!\w)_|_(?!\w))", r"\\\1", text)


def markdown_table(heads: list[str], rows: list) -> str:
    """Cells as they are: escaped() where they should be."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def markdown(results: dict) -> str:
    """README.md of a comparison's folder."""
    paragraphs = [
        f"# {escaped(title(results))}",
        "\n".join(f"- {escaped(line)}" for line in sentences(results)),
        "![Differences from the baseline, seed by seed and with their 95 % intervals; validation loss against tokens "
        "and against time](curves.png)",
        "report.html shows the curves with their values, results.json has all numbers."]
    for heading, heads, rows in tables(results):
        paragraphs += [f"## {heading}", markdown_table(heads, [map(escaped, row) for row in rows])]
    for heading, lines in facts(results):
        paragraphs += [f"## {heading}", "\n".join(f"- {escaped(line)}" for line in lines)]
    return "\n\n".join(text for text in paragraphs if text) + "\n"


def axes(results: dict) -> list[tuple[str, int]]:
    """
    (label, column of a curve) of the horizontal axes; steps where the logs do not say tokens, no time where it is not
    known.
    """
    points = [point for arm in results["arms"] for run in arm["runs"] for point in run.get("curve", [])]
    shown = [("training tokens", 1) if all(point[1] is not None for point in points) else ("steps", 0)]
    if all(point[2] is not None for point in points):
        shown.append(("training time, s", 2))
    return shown


# ---- Pictures

def compared(results: dict) -> list[tuple[int, dict]]:
    """(index, arm) of the arms that the first picture shows: those with a difference from the baseline."""
    return [(i, arm) for i, arm in enumerate(results["arms"]) if arm["vs_baseline"]]


def intervals(arm: dict) -> list[tuple[float, float, float]]:
    """[(difference, low, high)] of the verdict's test and of the pairs of equal seeds, where there are intervals."""
    loss = arm["vs_baseline"]["loss"]
    tests = [loss] + ([loss["paired"]] if loss["paired"] else [])
    return [(test["difference"], test["low"], test["high"]) for test in tests if test["low"] is not None]


def span(values: list[float]) -> tuple[float, float]:
    """The ends of an axis that shows the values and zero, with a margin."""
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def spans(results: dict) -> tuple[tuple[float, float], tuple[float, float]]:
    """The axes of the paired differences and of the intervals."""
    arms = [arm for _, arm in compared(results)]
    means = [arm["vs_baseline"]["loss"]["difference"] for arm in arms]
    return (span([difference for arm in arms for _, difference in arm["pairs"]]),
            span(means + [value for arm in arms for interval in intervals(arm) for value in interval]))


def shift(k: int, n: int) -> float:
    """The height in a row, from -0.3 to 0.3, of the k-th of n seeds: a seed has the same height in every row."""
    return 0.0 if n < 2 else 0.6 * k / (n - 1) - 0.3


def seeds_of_pairs(results: dict) -> list[int]:
    return sorted({seed for _, arm in compared(results) for seed, _ in arm["pairs"]})


def short_name(arm: dict, most: int = 32) -> str:
    name = plain(arm["name"])
    return name if len(name) <= most else name[:most - 1] + "…"


def draw(file, results: dict, log_x: bool):
    """
    curves.png. First the differences from the baseline: seed by seed, and their means with 95 % intervals. Then loss
    against tokens and against time, every run thin, an arm's mean thick; the losses of the first fifth may lie above
    the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    arms = results["arms"]
    rows = compared(results)
    styles = [dict(color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3])
              for i in range(len(arms))]

    # the panels
    top = 0.9 + 0.34 * len(rows) if rows else 0.0
    figure = Figure(figsize=(12, 5.2 + top), dpi=130, layout="constrained")
    if rows:
        upper, lower = figure.subfigures(2, 1, height_ratios=(top, 5.2))
        draw_differences(upper.subplots(1, 2, sharey=True), results)
    else:
        lower = figure
    draw_curves(lower.subplots(1, len(axes(results)), sharey=True, squeeze=False)[0], results, styles, log_x)

    # the legend
    labels = [short_name(arm).replace("$", r"\$") for arm in arms]  # $ begins a formula
    lines = [Line2D([], [], linewidth=2.0, **style) for style in styles]
    lower.legend(lines, labels, loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks
        figure.savefig(file, format="png")


def headings(results: dict) -> tuple[str, str]:
    """Of the two panels of differences."""
    return (f"minus {short_name(results['arms'][0])} at equal seed, nats",
            "mean difference, 95 % (thick: Welch, the verdict's; thin: paired), nats")


def draw_differences(panels, results: dict):
    """
    Two panels of matplotlib, a row an arm: the paired differences as dots by seed, and the mean differences with their
    intervals.
    """
    rows = compared(results)
    seeds = seeds_of_pairs(results)
    for row, (i, arm) in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        for seed, difference in arm["pairs"]:
            panels[0].plot([difference], [row + shift(seeds.index(seed), len(seeds))], "o", markersize=4, color=color)
        for k, (mean, low, high) in enumerate(intervals(arm)):
            height = row + 0.3 * k
            panels[1].plot([low, high], [height, height], linewidth=(2.4, 1.0)[k], color=color)
            panels[1].plot([mean], [height], "D" if k == 0 else "o", markersize=(6, 4)[k], color=color)
        if not intervals(arm):
            mean = arm["vs_baseline"]["loss"]["difference"]
            panels[1].plot([mean], [row], "D", markersize=6, markerfacecolor="none", color=color)

    # the axes
    labels = [f"{short_name(arm)}: {arm['vs_baseline']['loss']['verdict']}".replace("$", r"\$") for _, arm in rows]
    for panel, ends, heading in zip(panels, spans(results), headings(results)):
        panel.axvline(0, color="#808080", linewidth=0.8)
        panel.set(xlim=ends, ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        panel.set_yticklabels(labels, fontsize=8)
        panel.set_title(heading.replace("$", r"\$"), fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right", "left"]].set_visible(False)


def draw_curves(panels, results: dict, styles: list[dict], log_x: bool):
    """
    The losses, in a panel for each axis, scaled to those after the first fifth; a target outside is an arrow at the
    edge.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter
    arms = results["arms"]
    late = []  # the losses that the picture is scaled to
    for panel, (label, column) in zip(panels, axes(results)):
        end = max((run["curve"][-1][column] for arm in arms for run in arm["runs"] if run.get("curve")), default=0)
        for arm, style in zip(arms, styles):
            curves = [(run.get("curve", []), 0.8, 0.5) for run in arm["runs"]] + [(arm["curve"], 2.0, 1.0)]
            for curve, width, alpha in curves:
                shown = [point for point in curve if point[column] > 0 or not log_x]
                losses = [point[3] for point in shown]
                panel.plot([point[column] for point in shown], losses, linewidth=width, alpha=alpha, **style)
                late += [point[3] for point in shown if log_x or point[column] >= LATE * end]
        panel.set(xlabel=label, xscale="log" if log_x else "linear")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)

    # the axis of losses
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        panels[0].set_ylim(min(late) - margin, max(late) + margin)
    panels[0].set_ylabel("validation loss, nats a token")
    target = arms[0]["to_target"]["target"]
    if target is not None:
        draw_target(panels, target)


def draw_target(panels, target: float):
    """A dashed line in each panel, or an arrow at the edge beyond which the target lies."""
    low, high = panels[0].get_ylim()
    for panel in panels:
        if low <= target <= high:
            panel.axhline(target, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
            continue
        below = target < low
        corner = dict(xy=(0.99, 0.01), va="bottom") if below else dict(xy=(0.99, 0.99), va="top")
        arrow = "↓" if below else "↑"
        panel.annotate(f"target {target:.4g} {arrow}", **corner, xycoords="axes fraction", ha="right", color="#808080",
                       fontsize=8)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def differences_svg(results: dict) -> str:
    """What draw_differences shows, as a picture within report.html; "" where no arm has a difference."""
    rows = compared(results)
    seeds = seeds_of_pairs(results)
    if not rows:
        return ""
    height = 34     # of a row
    names = 250     # where the arms' names end
    middle = 720    # between the panels
    right = 1250    # where the second panel ends
    bottom = 30 + height * len(rows)
    marks = []      # the picture's elements, SVG

    def line(x0, y0, x1, y1, kind, extra=""):
        marks.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{extra}/>')

    def text(x, y, words, anchor):
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')

    # the axes
    ends = ((names + 20, middle - 20), (middle + 20, right))
    scales = []     # of each panel: value -> x
    for (start, end), (low, high), heading in zip(ends, spans(results), headings(results)):
        scale = (end - start) / (high - low)
        scales.append(lambda value, start=start, low=low, scale=scale: start + scale * (value - low))
        values = ticks(low, high, 5)
        digits = max(0, math.ceil(-math.log10(values[1] - values[0]))) if len(values) > 1 else 4
        text((start + end) / 2, 16, heading, "middle")
        for value in values:
            line(scales[-1](value), 26, scales[-1](value), bottom, "grid" if value else "zero")
            text(scales[-1](value), bottom + 16, f"{value:+.{digits}f}" if value else "0", "middle")

    # the arms
    for row, (i, arm) in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        y = 30 + height * (row + 0.5)
        style = f' style="stroke:{color};fill:{color}"'
        text(names, y + 4, short_name(arm), "end")
        for seed, difference in arm["pairs"]:
            title = html.escape(f"{plain(arm['name'])}, seed {seed}: {difference:+.4f}")
            at = y + height * shift(seeds.index(seed), len(seeds))
            marks.append(f'<circle cx="{scales[0](difference):.1f}" cy="{at:.1f}" r="4"{style}>'
                         f"<title>{title}</title></circle>")
        mean = arm["vs_baseline"]["loss"]["difference"]
        for k, (_, low, high) in enumerate(intervals(arm)):
            line(scales[1](low), y + 9 * k, scales[1](high), y + 9 * k, "thin" if k else "thick", style)
        title = html.escape(f"{plain(arm['name'])}: {mean:+.4f}, {arm['vs_baseline']['loss']['verdict']}")
        marks.append(f'<circle cx="{scales[1](mean):.1f}" cy="{y:.1f}" r="5"{style}><title>{title}</title></circle>')
    return ('<div class="panel"><svg class="differences" role="img" aria-label="Differences from the baseline" '
            f'viewBox="0 0 {right + 20} {bottom + 24}">{"".join(marks)}</svg></div>')


def page(results: dict) -> str:
    """report.html: one file that loads nothing."""
    lines = sentences(results)
    kinds = [""] * len(lines)
    for i, arm in enumerate(results["arms"][1:]):
        if arm["vs_baseline"] and not arm["faults"]:
            kinds[i] = verdict_class(arm["vs_baseline"]["loss"]["verdict"])
    cards = [f'<p class="card {kind}">{html.escape(line)}</p>' for line, kind in zip(lines, kinds)]
    notes = []
    for heading, lines in facts(results):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        notes.append(f"<section><h2>{heading}</h2><ul>{items}</ul></section>")

    data = dict(results=results, names=[plain(arm["name"]) for arm in results["arms"]], colors=COLORS,
                axes=axes(results), late=LATE)
    sections = dict(
        TITLE=html.escape(title(results)), CARDS="".join(cards), DIFFERENCES=differences_svg(results),
        TABLES="".join(html_table(*table) for table in tables(results)), FACTS="".join(notes),
        DATA=json.dumps(data, allow_nan=False).replace("<", r"\u003c"))
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, section in sections.items():
        text = text.replace(f"<!--{mark}-->", section)
    return text


def verdict_class(verdict: str) -> str:
    """The CSS class of a verdict."""
    return verdict.replace(" ", "-")


def html_table(heading: str, heads: list[str], rows: list[list[str]]) -> str:
    """A table of the page with its heading; arms have their colours, verdicts their classes."""
    body = []
    for i, row in enumerate(rows):
        cells = []
        for head, text in zip(heads, row):
            classes = {"arm": "arm", "verdict": f"verdict {verdict_class(text)}"}.get(head, "")
            swatch = f'<i style="background:{COLORS[i % len(COLORS)]}"></i>' if head == "arm" else ""
            cells.append(f'<td class="{classes}">{swatch}<span>{html.escape(text)}</span></td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(f"<th>{head}</th>" for head in heads)
    return (f"<h2>{heading}</h2><div class=wide><table><thead><tr>{top}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>")
