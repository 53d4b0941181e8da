"""
A comparison's results as one dictionary, and the folder that shows them: results.json, README.md, curves.png, report.html.

Losses are nats a token, times the trainer's own clock; a difference is arm minus baseline, so that less than zero is better. The first arm is the
baseline. Only finished runs count; all others are listed with what befell them. What was not measured is None in the results and "-" on the page.
README.md and report.html say the same: facts() and tables() make the words and the numbers of both.
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
ENVIRONMENT = ("device", "world_size", "dtype", "compile", "torch", "cuda", "triton", "python", "platform", "git_commit", "git_dirty", "peak_flops", "val_sha256")
MACHINE = ("device", "world_size")  # where these differ, times cannot be compared
OWN_FIELDS = RESUME_FIELDS | {"seed", "run_id"}  # of a configuration: what may differ between the runs of one arm
COLORS = ("#7d838c", "#d55e00", "#0a84d0", "#0a9e73", "#c264a0", "#b8860b", "#7a5fd0", "#2aa7b8")  # told apart by the colour-blind, on light and on dark
LATE = 0.2  # pictures are scaled to the losses after this part of the longest run: those before would squeeze the rest
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
    rows = [arm_results(*parts) for parts in zip(arms, logs, timed)]
    baseline = rows[0]
    target = own_target(settings, logs) or (baseline["loss"] or {}).get("mean")
    for row, runs, in_turn in zip(rows, logs, timed):
        row["to_target"] = to_target([curve_of(run) for run in runs if run.finished], row["curve"], target)
        row["changed"], row["changed_code"] = changed(runs, logs[0])
        row["not_fixed"] = not_fixed(row, runs, logs[0])
        row["vs_baseline"] = None if row is baseline else versus(runs, logs[0], in_turn, timed[0])
        pairs = [] if row is baseline else pairs_of(runs, logs[0])
        row["pairs"] = [[run.seed, run.val_loss - other.val_loss] for run, other in pairs]
    compared = [row["vs_baseline"] for row in rows if row["vs_baseline"]]
    for kind in ("loss", "time"):
        for result, p in zip(compared, holm([result[kind]["p"] for result in compared])):
            result[kind].update(p_holm=p, verdict=verdict(p, result[kind]["difference"]))
    tested = sum(result["loss"]["p"] is not None for result in compared)
    for row in rows:
        if row["vs_baseline"]:  # two-sided as the verdict, at Holm's strictest level: what is found at that is found in any case
            a, b = row["loss"], baseline["loss"]
            row["vs_baseline"]["loss"]["detectable"] = detectable(a["sd"], a["n"], b["sd"], b["n"], alpha=ALPHA / 2 / max(tested, 1))
    every = [run.facts for runs in logs for run in runs]
    environment = {name: every[0].get(name) if every else None for name in ENVIRONMENT}
    differs = {name: different(facts.get(name) for facts in every) for name in ENVIRONMENT if name != "peak_flops"}
    return dict(format=FORMAT, settings=settings, environment=environment, environment_differs={k: v for k, v in differs.items() if len(v) > 1}, arms=rows)


def different(values) -> list:
    """The values, each once, in their order."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]


def settled(run: Run) -> dict:
    """The run's configuration without what is its own; a time budget's steps and tokens are an outcome."""
    config = run.facts.get("config", {})
    own = OWN_FIELDS | ({"steps", "tokens"} if config.get("time_budget") else set())
    return {name: value for name, value in config.items() if name not in own}


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a | b if a.get(name) != b.get(name)]


def own_target(settings: dict, logs: list[list[Run]]) -> float | None:
    """The target that was given, if it was set for these runs' validation data: a run notes 0 where it was not."""
    foreign = any(run.facts.get("target") == 0 for runs in logs for run in runs)
    return None if foreign else settings.get("target") or None


def check_scored(runs: list[Run]):
    """RunError, one line with both logs' names, unless all runs were scored on the same tokens."""
    for run in runs[1:]:
        first, tokens, others = runs[0], runs[0].facts.get("val_tokens"), run.facts.get("val_tokens")
        require(run.val_sha256 == first.val_sha256, f"{first.path} and {run.path} were validated on different data; "
                "run one of them again with the other's --data")
        require(tokens == others, f"{first.path} was scored on {number(tokens)} tokens, {run.path} on {number(others)}"
                ", so their losses cannot be compared; run one of them again with the other's --val_tokens and "
                "--sequence_length")


def check_comparable(arms: list[dict], logs: list[list[Run]]):
    """
    RunError, one line with both logs' names, unless code and configuration are one within an arm and the scored tokens
    are one in all.
    """
    check_scored([run for runs in logs for run in runs])
    for arm, runs in zip(arms, logs):
        for run in runs[1:]:
            if (run.code or run.source_sha256) != (runs[0].code or runs[0].source_sha256):
                raise RunError(f"{runs[0].path} and {run.path} are both of arm {plain(arm['name'])} and ran different code; run the older one again")
            if names := differing(settled(runs[0]), settled(run)):
                raise RunError(f"{runs[0].path} and {run.path} are both of arm {plain(arm['name'])} and differ in {', '.join(names)}; run one of them again")
        if twice := [run for i, run in enumerate(runs) if run.seed is not None and run.seed in [other.seed for other in runs[:i]]]:
            raise RunError(f"{twice[0].path} is the second run of arm {plain(arm['name'])} with seed {twice[0].seed}; leave one of them out")


def curve_of(run: Run) -> list[list]:
    """[[step, tokens, seconds, loss], ...]"""
    return [[point.step, point.tokens, seconds_of(point.train_ms), point.val_loss] for point in run.points]


def seconds_of(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def mean_curve(curves: list[list]) -> list[list]:
    """The mean of curves [[step, tokens, seconds, loss], ...] at the steps before the last that all of them have, and the mean of their last points."""
    if not curves:
        return []
    shared = set.intersection(*({point[0] for point in curve[:-1]} for curve in curves))
    rows = zip(*([point for point in curve[:-1] if point[0] in shared] + [curve[-1]] for curve in curves))
    return [[None if None in values else summary(values)["mean"] for values in zip(*points)] for points in rows]


def one_or_summary(values: list):
    """The values' one value, a summary() where they differ, None where one is missing."""
    return None if not values or None in values else values[0] if len(set(values)) == 1 else summary(values)


def known_summary(values) -> dict | None:
    known = [value for value in values if value is not None]
    return summary(known) if known else None


def arm_results(arm: dict, runs: list[Run], timed: list[Run]) -> dict:
    """What the results say of one arm beside its comparison. timed: those of its runs whose times count."""
    finished = [run for run in runs if run.finished]
    in_turn = [run for run in timed if run.finished]
    facts = (finished or runs)[0].facts if runs else {}
    listed, errors = [], []
    for run in arm["runs"]:
        if isinstance(run, Run):
            listed.append(dict(seed=run.seed, status=run.status, log=run.path.name, val_loss=run.val_loss if run.finished else None,
                               train_seconds=seconds_of(run.train_ms), curve=curve_of(run)))
            errors += [] if run.finished else [f"seed {run.seed}: {run.status}"]
        else:
            listed.append(dict(seed=run["seed"], error=run["error"]))
            errors.append(f"seed {run['seed']}: {run['error']}")
    tokens = one_or_summary([run.points[-1].tokens for run in finished])
    spent = tokens["mean"] if isinstance(tokens, dict) else tokens
    per_token = facts.get("flops_per_token")
    measured = {name: known_summary(getattr(run, name) for run in finished)
                for name in ("bits_per_byte", "peak_memory_mib")}
    measured |= {name: known_summary(getattr(run, name) for run in in_turn)
                 for name in ("ms_per_step", "tokens_per_second", "mfu", "warmup_seconds")}
    measured["train_seconds"] = known_summary(seconds_of(run.train_ms) for run in in_turn)
    return dict(
        name=arm["name"], variant=arm["variant"], options=arm["options"], errors=errors, faults=arm.get("faults", []),
        status="complete" if len(finished) == len(listed) else f"{len(finished)} of {len(listed)} finished",
        **{name: facts.get(name) for name in ("replaced", "parameters", "parameters_without_embeddings", "flops_per_token")},
        training_flops=per_token * spent if per_token and spent else None, tokens=tokens, steps=one_or_summary([run.last_step for run in finished]),
        loss=known_summary(run.val_loss for run in finished), **measured,
        curve=mean_curve([curve_of(run) for run in finished]), runs=listed)


def to_target(curves: list[list], mean: list, target: float | None) -> dict:
    """When the mean curve and each run's curve first reach the target, interpolated; None for one that does not."""
    def first(curve, column):
        known = bool(curve) and target is not None and all(point[column] is not None for point in curve)
        return reach([(point[column], point[3]) for point in curve], target) if known else None
    each = [[first(curve, column) for curve in curves] for column in (0, 2)]
    return dict(target=target, reached=f"{sum(steps is not None for steps in each[0])} of {len(curves)}", steps=first(mean, 0), seconds=first(mean, 2),
                steps_each=each[0], seconds_each=each[1])


def changed(runs: list[Run], baseline: list[Run]) -> tuple[dict, list[str]]:
    """What an arm was run with besides its variant: {setting: [baseline's, arm's]}, and those modules of both whose code differs."""
    if not runs or not baseline:
        return {}, []
    before, after = settled(baseline[0]), settled(runs[0])
    settings = {name: [before.get(name), after.get(name)] for name in differing(before, after) if name != "variant"}
    return settings, [name for name, digest in runs[0].code.items() if baseline[0].code.get(name, digest) != digest]


def not_fixed(row: dict, runs: list[Run], baseline: list[Run]) -> dict[str, str]:
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


def versus(runs: list[Run], baseline: list[Run], timed: list[Run], timed_baseline: list[Run]) -> dict | None:
    """
    Welch's test of an arm's final losses against the baseline's and, of those runs of both whose times count, of the
    times of a step, if all ran on one machine; None where a side has no finished run.
    """
    runs, baseline = [run for run in runs if run.finished], [run for run in baseline if run.finished]
    if not runs or not baseline:
        return None
    pairs = [(run.val_loss, other.val_loss) for run, other in pairs_of(runs, baseline)]
    alike = all(len(different(run.facts.get(name) for run in runs + baseline)) == 1 for name in MACHINE)
    times = [[run.ms_per_step for run in side if alike and run.finished and run.ms_per_step is not None]
             for side in (timed, timed_baseline)]
    loss = welch([run.val_loss for run in runs], [run.val_loss for run in baseline])
    loss["paired"] = paired(*map(list, zip(*pairs))) | {"n": len(pairs)} if pairs else None
    return dict(loss=loss, time=welch(*times) if all(times) else dict.fromkeys(("difference", "low", "high", "p_less", "p_greater", "p")))


# ---- Words and numbers

def plain(text) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def number(value, digits: int | None = None, signed: bool = False) -> str:
    """A number, the mean ± sd of a summary(), or "-"."""
    if isinstance(value, dict):
        return number(value["mean"], digits) + (f" ± {number(value['sd'], digits)}" if value["sd"] is not None else "")
    if value is None:
        return "-"
    return f"{value:{'+' * signed},.{digits or 0}f}" if digits is not None or abs(value) < 1e12 else f"{value:.3g}".replace("e+", "e")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f} %"


def p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def equals(p: float | None) -> str:
    return f"p {'' if p_value(p)[0] == '<' else '= '}{p_value(p)}"


def interval(test: dict, digits: int) -> str:
    return "-" if test["low"] is None else f"{number(test['low'], digits, signed=True)} to {number(test['high'], digits, signed=True)}"


def sentence(arm: dict, baseline: dict) -> str:
    """An arm's verdict in words: loss, then time, then whether parameters and FLOPs are equal."""
    name, base = plain(arm["name"]), plain(baseline["name"])
    unsound = "".join(f"{plain(side['name'])} IS NOT SOUND, so this says nothing: {plain('; '.join(side['faults']))}. "
                      for side in (arm, baseline) if side["faults"])
    if arm["vs_baseline"] is None:
        return f"{unsound}{name}: no verdict, because {name if not arm['loss'] else base} has no finished run."
    loss, time = arm["vs_baseline"]["loss"], arm["vs_baseline"]["time"]
    n = f"n = {arm['loss']['n']} and {baseline['loss']['n']}"
    if loss["verdict"] == "not distinguishable":
        text = f"{name} is not distinguishable from {base} at {n}: difference {number(loss['difference'], 4, signed=True)} nats"
        text += f" (95 % {interval(loss, 4)}, Welch {equals(loss['p_holm'])} after Holm)" if loss["p"] is not None else ", and no test with fewer than two runs a side"
        text += f"; a difference of {number(loss['detectable'], 4)} would have been found with {100 * POWER:.0f} % power" if loss["detectable"] is not None else ""
    else:
        text = (f"{name} is {loss['verdict']} than {base} by {number(abs(loss['difference']), 4)} nats "
                f"(95 % {interval(loss, 4)}, Welch {equals(loss['p_holm'])} after Holm, {n})")
    if loss["paired"] and loss["paired"]["p"] is not None:
        text += f". Over {loss['paired']['n']} pairs of equal seeds, uncorrected: {equals(loss['paired']['p'])}"
    if time["difference"] is not None:
        tested = f", {equals(time['p_holm'])}" if time["p"] is not None else ""
        text += (f". Time: {TIME_WORDS.get(time['verdict'], time['verdict'])}, {number(time['difference'], 2, signed=True)} ms a step "
                 f"({percent(time['difference'] / baseline['ms_per_step']['mean'])}{tested})")
    return f"{unsound}{text}. {parity(arm, baseline)}."


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
    parts = []
    for what, key in {"Parameters": "parameters", "FLOPs a token": "flops_per_token"}.items():
        ours, theirs = arm[key], baseline[key]
        parts.append(f"{what} " + ("not recorded" if not ours or not theirs else "equal" if ours == theirs else f"unmatched ({percent(ours / theirs - 1, 2)})"))
    return ", ".join(parts)


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows of cells) for losses, cost and the way to the target; a row an arm, "arm" and "verdict" among the heads."""
    arms, target = results["arms"], results["arms"][0]["to_target"]["target"]
    untested = dict.fromkeys(("difference", "low", "high", "p", "p_holm", "detectable", "paired")) | {"verdict": "baseline"}
    losses, costs, reached = [], [], []
    for arm in arms:
        none = untested if arm is arms[0] else untested | {"verdict": "-"}
        versus = arm["vs_baseline"] or dict(loss=none, time=none)
        loss, time, goal, mfu = versus["loss"], versus["time"], arm["to_target"], arm["mfu"]
        losses.append({
            "arm": plain(arm["name"]), "verdict": loss["verdict"], "final loss": number(arm["loss"], 4),
            "runs": f"{arm['loss']['n'] if arm['loss'] else 0} of {len(arm['runs'])}", "difference": number(loss["difference"], 4, signed=True),
            "95 %": interval(loss, 4), "Welch p": p_value(loss["p"]), "after Holm": p_value(loss["p_holm"]), "paired p": p_value((loss["paired"] or untested)["p"]),
            "detectable": number(loss["detectable"], 4), "bits/byte": number(arm["bits_per_byte"], 4)})
        costs.append({
            "arm": plain(arm["name"]), "verdict": TIME_WORDS.get(time["verdict"], time["verdict"]), "ms/step": number(arm["ms_per_step"], 2),
            "difference": number(time["difference"], 2, signed=True), "95 %": interval(time, 2), "p after Holm": p_value(time["p_holm"]),
            "time s": number(arm["train_seconds"], 1), "tokens/s": number(arm["tokens_per_second"]),
            "MFU %": number(mfu and {key: value and 100 * value for key, value in mfu.items()}, 1), "memory MiB": number(arm["peak_memory_mib"]),
            "warm-up s": number(arm["warmup_seconds"], 1), "parameters": number(arm["parameters"]), "without embeddings": number(arm["parameters_without_embeddings"]),
            "tokens": number(arm["tokens"]), "steps": number(arm["steps"]), "training FLOPs": number(arm["training_flops"])})
        missing = "not reached" if arm["curve"] and target is not None else "-"
        each = [missing if steps is None else f"{number(steps)} / {number(seconds, 1)} s" for steps, seconds in zip(goal["steps_each"], goal["seconds_each"])]
        reached.append({
            "arm": plain(arm["name"]), "runs that reach it": goal["reached"], "steps": missing if goal["steps"] is None else number(goal["steps"]),
            "seconds": missing if goal["seconds"] is None else number(goal["seconds"], 1), "each run: steps / time": "; ".join(each) or "-"})
    goal = "To the target" + (f", a loss of {number(target, 4)}" if target is not None else "")
    return [(name, list(rows[0]), [list(row.values()) for row in rows]) for name, rows in {"Loss": losses, "Cost": costs, goal: reached}.items()]


def facts(results: dict) -> list[tuple[str, list[str]]]:
    """(heading, lines) of all that the tables do not say."""
    settings, env, arms = results["settings"], results["environment"], results["arms"]
    base, noise = plain(arms[0]["name"]), arms[0]["loss"]

    def known(value):
        return "not recorded" if value in (None, "") else plain(value)
    budget = {"tokens": "the same number of training tokens for every arm", "time": f"{number(settings.get('budget_seconds'), 1)} s of training time for every run"}
    dirty = {True: " with changes that are not in it", False: ", nothing changed since"}.get(env["git_dirty"], "")
    checksums = "; ".join(f"{name} sha256 {digest}" for name, digest in (env["val_sha256"] or {}).items())
    peak = f"{env['peak_flops'] / 1e12:.3g} TFLOP/s a device, the measured rate of a large product" if env["peak_flops"] else None
    setup = [f"Track {known(settings.get('track'))}, {budget.get(settings.get('budget'), 'budget not recorded')}, "
             f"seeds {known(', '.join(map(str, settings.get('seeds') or [])))}.",
             f"{known(env['world_size'])} x {known(env['device'])}, activations in {known(env['dtype'])}, compile {known(env['compile'])}"
             + (f"; CUDA {plain(env['cuda'])}, driver in the logs." if env["cuda"] else "."),
             f"PyTorch {known(env['torch'])}, Triton {known(env['triton'])}, Python {known(env['python'])}, {known(env['platform'])}.",
             f"Commit {known(env['git_commit'])}{dirty}; every log holds the whole source of its run.",
             f"Validation data: {known(checksums)}.", f"MFU is a share of {known(peak)}.", f"Command: {known(settings.get('command'))}"]
    setup += [f"Not the same in all runs: {name} ({plain('; '.join(map(str, values)))}).{'' if name.startswith('git') else ' Their times are not comparable.'}"
              for name, values in results["environment_differs"].items()]

    held = [claim for claim in (VALIDATION, ORDER, START) if not any(claim in arm["not_fixed"] for arm in arms)]
    seeded = [claim for claim in held if claim != VALIDATION]
    fixed = ["Held fixed: every setting of the trainer that is not named here"]
    if VALIDATION in held:
        fixed[0] += f", {VALIDATION}"
    if seeded:
        fixed[0] += f", and for equal seeds {' and '.join(seeded)}"
    fixed[0] += "."
    for arm in arms:
        parts = [f"variant {' + '.join(arm['variant'])}"] if arm["variant"] else []
        parts += [f"replaces {', '.join(name for names in arm['replaced'].values() for name in names)}"] if arm["replaced"] else []
        parts += [f"options {' '.join(arm['options'])}"] if arm["options"] else []
        parts += [f"{name} {new} instead of {old}" for name, (old, new) in arm["changed"].items()]
        parts += [f"other code of {', '.join(arm['changed_code'])}"] if arm["changed_code"] else []
        parts += [f"NOT HELD FIXED: {claim} ({why})" for claim, why in arm["not_fixed"].items()]
        parts += [f"NOT SOUND: {fault}" for fault in arm["faults"]]
        fixed.append(f"{plain(arm['name'])}: {plain('; '.join(parts)) or 'the trainer as it is'}.")
    for name, sweep in (settings.get("sweep") or {}).items():
        tries = [(plain(entry["factor"]), known_summary(entry["losses"])) for entry in sweep["tries"]]
        fixed.append(f"{plain(name)}: learning-rate factor {plain(sweep['chosen'])}, chosen of " + ", ".join(
            f"{factor} (loss {number(loss, 4)}, n = {loss['n'] if loss else 0})" for factor, loss in tries) + ".")
    if not settings.get("sweep"):
        fixed.append("No learning rate was tuned for an arm beyond what is named here: the verdicts hold for these settings.")

    order, overhead, tried = settings.get("order"), settings.get("overhead"), settings.get("tried")
    measured = [f"Order of the runs (arm and seed): {known(', '.join(f'{name} {seed}' for name, seed in order or []))}.",
                "The clock counts optimizer steps with their loading of data. It excludes compilation and warm-up, validation and checkpoints; "
                "the model and the optimizer are restored after the warm-up.",
                "Training FLOPs are PyTorch's count, forward and backward; scores that are computed and masked count, too."]
    reused = settings.get("reused") or []
    measured += reused_lines(reused, base)
    measured += [f"The comparison took {number(overhead['wall_seconds'], 1)} s, {number(overhead['runs_seconds'], 1)} s of it in the runs."] if overhead else []

    compared = sum(arm["vs_baseline"] is not None for arm in arms)
    others = "" if tried in (None, len(arms)) else f", {len(arms)} of them in this report; no p value is corrected for the others"
    statistics = [f"Differences are arm minus {base}, over all finished runs: Welch's test, two-sided. After Holm's correction over {compared} "
                  f"{'arm' if compared == 1 else 'arms'}, p < {ALPHA} is better or worse, all else not distinguishable.",
                  f"Arms tried: {known(tried)}{others}.",
                  f"Detectable: the difference that this test would have found with {100 * POWER:.0f} % power, given the measured spread.",
                  "Paired p is over pairs of equal seeds and not corrected; no verdict rests on it.",
                  f"Measured noise: sd {number(noise['sd'], 4)} of the final loss over {noise['n']} runs of {base}." if noise and noise["sd"] is not None
                  else f"The noise was not measured: {base} has fewer than two finished runs.",
                  f"The target is {target_words(settings, arms[0])}; steps and time to it are interpolated linearly, "
                  "on the mean curve and on each run's."]
    looks = len(seen_in([entry for entry in reused if plain(entry["arm"]) != base]))
    if looks:
        statistics.append(
            f"Looks: {looks} earlier {'comparison' if looks == 1 else 'comparisons'} with runs of these arms had a "
            "result when this one began. Where a result decides whether to go on, each look is a chance: that one of "
            f"{looks + 1} verdicts finds a difference where there is none happens in up to "
            f"{100 * (looks + 1) * ALPHA:.0f} % of all cases.")
    errors = [f"{plain(arm['name'])}, {plain(error)}" for arm in arms for error in arm["errors"]]
    return [("Set-up", setup), ("What was held fixed, and what not", fixed), ("How it was measured", measured), ("Statistics", statistics),
            *([("Runs without a result", errors)] if errors else [])]


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
    names, budget = [plain(arm["name"]) for arm in results["arms"]], results["settings"].get("budget")
    arms = ", ".join(names[1:]) if len(names) < 5 else f"{len(names) - 1} arms"
    return (f"{arms} against {names[0]}" if arms else names[0]) + (f" at equal {budget}" if budget in ("tokens", "time") else "")


# ---- The folder

def write_report(folder: Path, results: dict, log_x: bool = False):
    """results.json, README.md, report.html and curves.png (log_x: its x axes logarithmic) into folder, each replaced whole. RunError where the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; give another folder") from None
    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False) + "\n", "README.md": markdown(results), "report.html": page(results)}
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
    parts = [f"# {escaped(title(results))}", "\n".join(f"- {escaped(line)}" for line in sentences(results))]
    parts += ["![Differences from the baseline, seed by seed and with their 95 % intervals; validation loss against "
              "tokens and against time](curves.png)",
              "report.html shows the curves with their values, results.json has all numbers."]
    for heading, heads, rows in tables(results):
        parts += [f"## {heading}", markdown_table(heads, [map(escaped, row) for row in rows])]
    for heading, lines in facts(results):
        parts += [f"## {heading}", "\n".join(f"- {escaped(line)}" for line in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def axes(results: dict) -> list[tuple[str, int]]:
    """
    (label, column of a curve) of the horizontal axes; steps where the logs do not say tokens, no time where it is not
    known.
    """
    points = [point for arm in results["arms"] for run in arm["runs"] for point in run.get("curve", [])]
    first = ("training tokens", 1) if all(point[1] is not None for point in points) else ("steps", 0)
    return [first] + [("training time, s", 2)] * all(point[2] is not None for point in points)


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
    arms, rows = results["arms"], compared(results)
    styles = [dict(color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3])
              for i in range(len(arms))]
    top = 0.9 + 0.34 * len(rows) if rows else 0.0
    figure = Figure(figsize=(12, 5.2 + top), dpi=130, layout="constrained")
    if rows:
        upper, lower = figure.subfigures(2, 1, height_ratios=(top, 5.2))
        draw_differences(upper.subplots(1, 2, sharey=True), results)
    else:
        lower = figure
    draw_curves(lower.subplots(1, len(axes(results)), sharey=True, squeeze=False)[0], results, styles, log_x)
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
    rows, seeds = compared(results), seeds_of_pairs(results)
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
    arms, target, late = results["arms"], results["arms"][0]["to_target"]["target"], []
    for panel, (label, column) in zip(panels, axes(results)):
        end = max((run["curve"][-1][column] for arm in arms for run in arm["runs"] if run.get("curve")), default=0)
        for arm, style in zip(arms, styles):
            for curve, width, alpha in [(run.get("curve", []), 0.8, 0.5) for run in arm["runs"]] + [(arm["curve"], 2.0, 1.0)]:
                shown = [point for point in curve if point[column] > 0 or not log_x]
                panel.plot([point[column] for point in shown], [point[3] for point in shown], linewidth=width, alpha=alpha, **style)
                late += [point[3] for point in shown if log_x or point[column] >= LATE * end]
        panel.set(xlabel=label, xscale="log" if log_x else "linear")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        panels[0].set_ylim(min(late) - margin, max(late) + margin)
    panels[0].set_ylabel("validation loss, nats a token")

    # the target
    low, high = panels[0].get_ylim()
    for panel in panels if target is not None else ():
        if low <= target <= high:
            panel.axhline(target, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
        else:
            below = target < low
            place = dict(xy=(0.99, 0.01), va="bottom") if below else dict(xy=(0.99, 0.99), va="top")
            panel.annotate(f"target {target:.4g} {'↓' if below else '↑'}", **place, xycoords="axes fraction",
                           ha="right", color="#808080", fontsize=8)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def differences_svg(results: dict) -> str:
    """What draw_differences shows, as a picture within report.html; "" where no arm has a difference."""
    rows, seeds = compared(results), seeds_of_pairs(results)
    if not rows:
        return ""
    height, names, middle, right = 34, 250, 720, 1250  # of a row; where the names end and the panels begin and end
    bottom = 30 + height * len(rows)
    marks = []

    def line(x0, y0, x1, y1, kind, extra=""):
        marks.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{extra}/>')

    def text(x, y, words, anchor):
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')
    ends = ((names + 20, middle - 20), (middle + 20, right))
    scales = []
    for (start, end), (low, high), heading in zip(ends, spans(results), headings(results)):
        scale = (end - start) / (high - low)
        scales.append(lambda value, start=start, low=low, scale=scale: start + scale * (value - low))
        values = ticks(low, high, 5)
        digits = max(0, math.ceil(-math.log10(values[1] - values[0]))) if len(values) > 1 else 4
        text((start + end) / 2, 16, heading, "middle")
        for value in values:
            line(scales[-1](value), 26, scales[-1](value), bottom, "grid" if value else "zero")
            text(scales[-1](value), bottom + 16, f"{value:+.{digits}f}" if value else "0", "middle")
    for row, (i, arm) in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        y, style = 30 + height * (row + 0.5), f' style="stroke:{color};fill:{color}"'
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
    def kind(verdict):
        return verdict.replace(" ", "-")

    def cell(i, head, text):
        swatch = f'<i style="background:{COLORS[i % len(COLORS)]}"></i>' if head == "arm" else ""
        return f'<td class="{dict(arm="arm", verdict=f"verdict {kind(text)}").get(head, "")}">{swatch}<span>{html.escape(text)}</span></td>'

    def table(heading, heads, rows):
        body = "".join(f"<tr>{''.join(cell(i, head, text) for head, text in zip(heads, row))}</tr>" for i, row in enumerate(rows))
        top = "".join(f"<th>{head}</th>" for head in heads)
        return f"<h2>{heading}</h2><div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    kinds = [kind(arm["vs_baseline"]["loss"]["verdict"]) if arm["vs_baseline"] and not arm["faults"] else ""
             for arm in results["arms"][1:]]
    lines = sentences(results)
    cards = [f'<p class="card {sort}">{html.escape(line)}</p>' for line, sort in zip(lines, kinds + [""] * len(lines))]
    notes = [f"<section><h2>{heading}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul></section>" for heading, lines in facts(results)]
    data = dict(results=results, names=[plain(arm["name"]) for arm in results["arms"]], colors=COLORS, axes=axes(results), late=LATE)
    text = TEMPLATE.read_text(encoding="utf-8")
    parts = dict(
        TITLE=html.escape(title(results)), CARDS="".join(cards), DIFFERENCES=differences_svg(results),
        TABLES="".join(table(*columns) for columns in tables(results)), FACTS="".join(notes),
        DATA=json.dumps(data, allow_nan=False).replace("<", r"\u003c"))
    for mark, part in parts.items():
        text = text.replace(f"<!--{mark}-->", part)
    return text
