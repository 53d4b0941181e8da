"""
A comparison's results as one dictionary, and the folder that shows them: results.json, README.md, curves.png, report.html.

Losses are nats a token, times the trainer's own clock; a difference is arm minus baseline, so that less than zero is better. The first arm is the
baseline. Only finished runs count; all others are listed with what befell them. What was not measured is None in the results and "-" on the page.
README.md and report.html say the same: facts() and tables() make the words and the numbers of both.
"""

import html
import json
import re
import warnings
from pathlib import Path

from records.runs import Run
from records.statistics import ALPHA, POWER, detectable, holm, paired, reach, summary, verdict, welch
from train_gpt import RESUME_FIELDS, RunError, write_atomically

FORMAT = "knotgpt-comparison-1"
TEMPLATE = Path(__file__).with_name("report_template.html")
ENVIRONMENT = ("device", "world_size", "dtype", "compile", "torch", "cuda", "triton", "python", "platform", "git_commit", "git_dirty", "peak_flops", "val_sha256")
MACHINE = ("device", "world_size")  # where these differ, times cannot be compared
OWN_FIELDS = RESUME_FIELDS | {"seed", "run_id"}  # of a configuration: what may differ between the runs of one arm
COLORS = ("#7d838c", "#d55e00", "#0a84d0", "#0a9e73", "#c264a0", "#b8860b", "#7a5fd0", "#2aa7b8")  # told apart by the colour-blind, on light and on dark
LATE = 0.2  # pictures are scaled to the losses after this part of the longest run: those before would squeeze the rest
TIME_WORDS = {"better": "faster", "worse": "slower"}


# ---- Results

def summarize(settings: dict, arms: list[dict]) -> dict:
    """
    Results of a comparison, ready for JSON. RunError where the runs cannot be compared.

    settings: track, seeds, budget ("tokens" or "time"), budget_seconds, target, command, order [[arm, seed], ...] as run, tried (number of arms),
      sweep {arm: dict(tries=[dict(factor, seeds, losses)], chosen=factor)} or None, overhead dict(wall_seconds, runs_seconds) or None
    arms: dicts of name, variant [str], options [str] and runs, each a Run or, where there is no log, dict(seed, error); the baseline first
    The target is settings["target"] or else the baseline's mean final loss. p values are Holm's over the arms, for loss and for time apart.
    """
    logs = [[run for run in arm["runs"] if isinstance(run, Run)] for arm in arms]
    check_comparable(arms, logs)
    rows = [arm_results(arm, runs) for arm, runs in zip(arms, logs)]
    baseline = rows[0]
    target = settings.get("target") or (baseline["loss"] or {}).get("mean")
    for row, runs in zip(rows, logs):
        row["to_target"] = to_target([curve_of(run) for run in runs if run.finished], row["curve"], target)
        row["changed"], row["changed_code"] = changed(runs, logs[0])
        row["vs_baseline"] = None if row is baseline else versus(runs, logs[0])
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


def check_comparable(arms: list[dict], logs: list[list[Run]]):
    """RunError, one line with both logs' names, unless code and configuration are one within an arm and the validation set is one in all."""
    every = [run for runs in logs for run in runs]
    for run in every[1:]:
        if run.val_sha256 != every[0].val_sha256:
            raise RunError(f"{every[0].path} and {run.path} were validated on different data; run one of them again with the other's --data")
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
    return [[point.step, point.tokens, point.train_ms / 1000, point.val_loss] for point in run.points]


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


def arm_results(arm: dict, runs: list[Run]) -> dict:
    finished = [run for run in runs if run.finished]
    facts = (finished or runs)[0].facts if runs else {}
    listed, errors = [], []
    for run in arm["runs"]:
        if isinstance(run, Run):
            listed.append(dict(seed=run.seed, status=run.status, log=run.path.name, val_loss=run.val_loss if run.finished else None,
                               train_seconds=run.train_ms / 1000, curve=curve_of(run)))
            errors += [] if run.finished else [f"seed {run.seed}: {run.status}"]
        else:
            listed.append(dict(seed=run["seed"], error=run["error"]))
            errors.append(f"seed {run['seed']}: {run['error']}")
    tokens = one_or_summary([run.points[-1].tokens for run in finished])
    spent = tokens["mean"] if isinstance(tokens, dict) else tokens
    per_token = facts.get("flops_per_token")
    measured = {name: known_summary(getattr(run, name) for run in finished)
                for name in ("bits_per_byte", "ms_per_step", "tokens_per_second", "mfu", "peak_memory_mib", "warmup_seconds")}
    return dict(
        name=arm["name"], variant=arm["variant"], options=arm["options"], errors=errors,
        status="complete" if len(finished) == len(listed) else f"{len(finished)} of {len(listed)} finished",
        **{name: facts.get(name) for name in ("replaced", "parameters", "parameters_without_embeddings", "flops_per_token")},
        training_flops=per_token * spent if per_token and spent else None, tokens=tokens, steps=one_or_summary([run.last_step for run in finished]),
        loss=known_summary(run.val_loss for run in finished), train_seconds=known_summary(run.train_ms / 1000 for run in finished), **measured,
        curve=mean_curve([curve_of(run) for run in finished]), runs=listed)


def to_target(curves: list[list], mean: list, target: float | None) -> dict:
    """When the mean curve and each run's curve first reach the target, interpolated; None for one that does not."""
    def first(curve, column):
        return reach([(point[column], point[3]) for point in curve], target) if curve and target is not None else None
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


def versus(runs: list[Run], baseline: list[Run]) -> dict | None:
    """Welch's test of an arm's final losses and, if all ran on one machine, of its times of a step, against the baseline's; None where a side has no finished run."""
    runs, baseline = [run for run in runs if run.finished], [run for run in baseline if run.finished]
    if not runs or not baseline:
        return None
    partners = {run.seed: run.val_loss for run in baseline}
    pairs = [(run.val_loss, partners[run.seed]) for run in runs if run.seed is not None and run.seed in partners]
    alike = all(len(different(run.facts.get(name) for run in runs + baseline)) == 1 for name in MACHINE)
    times = [[run.ms_per_step for run in side if alike and run.ms_per_step is not None] for side in (runs, baseline)]
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
    if arm["vs_baseline"] is None:
        return f"{name}: no verdict, because {name if not arm['loss'] else base} has no finished run."
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
    return f"{text}. {parity(arm, baseline)}."


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

    fixed = ["Held fixed: every setting of the trainer that is not named here, the validation data, and for equal seeds the order of the training data "
             "and the initial tensors of equal name and shape."]
    for arm in arms:
        parts = [f"variant {' + '.join(arm['variant'])}"] if arm["variant"] else []
        parts += [f"replaces {', '.join(name for names in arm['replaced'].values() for name in names)}"] if arm["replaced"] else []
        parts += [f"options {' '.join(arm['options'])}"] if arm["options"] else []
        parts += [f"{name} {new} instead of {old}" for name, (old, new) in arm["changed"].items()]
        parts += [f"other code of {', '.join(arm['changed_code'])}"] if arm["changed_code"] else []
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
                  f"The target is {'given' if settings.get('target') else f'the mean final loss of {base}'}; steps and time to it are interpolated linearly, "
                  "on the mean curve and on each run's."]
    errors = [f"{plain(arm['name'])}, {plain(error)}" for arm in arms for error in arm["errors"]]
    return [("Set-up", setup), ("What was held fixed, and what not", fixed), ("How it was measured", measured), ("Statistics", statistics),
            *([("Runs without a result", errors)] if errors else [])]


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
    parts = [f"# {escaped(title(results))}", "\n".join(f"- {escaped(sentence(arm, results['arms'][0]))}" for arm in results["arms"][1:])]
    for heading, heads, rows in tables(results):
        parts += [f"## {heading}", markdown_table(heads, [map(escaped, row) for row in rows])]
    parts += ["![Validation loss against tokens and against time](curves.png)", "report.html shows the curves with their values, results.json has all numbers."]
    for heading, lines in facts(results):
        parts += [f"## {heading}", "\n".join(f"- {escaped(line)}" for line in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def axes(results: dict) -> list[tuple[str, int]]:
    """(label, column of a curve) of the two horizontal axes; steps where the logs do not say tokens."""
    points = [point for arm in results["arms"] for run in arm["runs"] for point in run.get("curve", [])]
    return [("training tokens", 1) if all(point[1] is not None for point in points) else ("steps", 0), ("training time, s", 2)]


def draw(file, results: dict, log_x: bool):
    """curves.png: loss against tokens and against time, every run thin, an arm's mean thick. The losses of the first fifth may lie above the picture."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, NullFormatter
    figure = Figure(figsize=(12, 5.2), dpi=130, layout="constrained")
    panels, arms, target = figure.subplots(1, 2, sharey=True), results["arms"], results["arms"][0]["to_target"]["target"]
    styles = [dict(color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3]) for i in range(len(arms))]
    late = [target] if target is not None else []
    for panel, (label, column) in zip(panels, axes(results)):
        end = max((run["curve"][-1][column] for arm in arms for run in arm["runs"] if run.get("curve")), default=0)
        for arm, style in zip(arms, styles):
            for curve, width, alpha in [(run.get("curve", []), 0.8, 0.5) for run in arm["runs"]] + [(arm["curve"], 2.0, 1.0)]:
                shown = [point for point in curve if point[column] > 0 or not log_x]
                panel.plot([point[column] for point in shown], [point[3] for point in shown], linewidth=width, alpha=alpha, **style)
                late += [point[3] for point in shown if log_x or point[column] >= LATE * end]
        if target is not None:
            panel.axhline(target, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set(xlabel=label, xscale="log" if log_x else "linear")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        panels[0].set_ylim(min(late) - margin, max(late) + margin)
    panels[0].set_ylabel("validation loss, nats a token")
    names = [name if len(name) <= 32 else name[:31] + "…" for name in (plain(arm["name"]) for arm in arms)]
    labels = [name.replace("$", r"\$") for name in names]  # $ begins a formula
    figure.legend([Line2D([], [], linewidth=2.0, **style) for style in styles], labels, loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks
        figure.savefig(file, format="png")


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
    cards = [f'<p class="card {kind(arm["vs_baseline"]["loss"]["verdict"]) if arm["vs_baseline"] else ""}">{html.escape(sentence(arm, results["arms"][0]))}</p>'
             for arm in results["arms"][1:]]
    notes = [f"<section><h2>{heading}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul></section>" for heading, lines in facts(results)]
    data = dict(results=results, names=[plain(arm["name"]) for arm in results["arms"]], colors=COLORS, axes=axes(results), late=LATE)
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, part in dict(TITLE=html.escape(title(results)), CARDS="".join(cards), TABLES="".join(table(*parts) for parts in tables(results)), FACTS="".join(notes),
                           DATA=json.dumps(data, allow_nan=False).replace("<", r"\u003c")).items():
        text = text.replace(f"<!--{mark}-->", part)
    return text
