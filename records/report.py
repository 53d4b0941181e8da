"""
The folder that shows a comparison's results: results.json, README.md, curves.png, report.html.

README.md and report.html say the same: facts() and tables() make the words and the numbers of both. What was not
measured is "-" on the page.
"""

import html
import json
from pathlib import Path

from records.autopsy_words import autopsy_lines, autopsy_sentence, autopsy_svg, autopsy_table
from records.pictures import COLORS, LATE, axes, differences_svg, draw
from records.results import ORDER, START, VALIDATION, known_summary
from records.statistics import ALPHA, LEVEL, PAIRS, POWER, TIME_MARGIN
from records.words import equals, escaped, interval, markdown_table, number, p_value, percent, plain, plural
from train_gpt import RunError, require, write_atomically

TEMPLATE = Path(__file__).with_name("report_template.html")
TIME_WORDS = {
    "better": "faster",
    "worse": "slower",
    "equivalent": f"equally fast within {100 * TIME_MARGIN:g} %",
    "too few pairs": "too few turns"}


# ---- The verdict in words

def sentence(arm: dict, baseline: dict) -> str:
    """An arm's verdict in words: loss, then time, then whether parameters and FLOPs are equal."""
    name = plain(arm["name"])
    base = plain(baseline["name"])
    unsound = "".join(f"{plain(side['name'])} IS NOT SOUND, so this says nothing: {plain('; '.join(side['faults']))}. "
                      for side in (arm, baseline) if side["faults"])
    if arm["vs_baseline"] is None:
        return f"{unsound}{name}: no verdict, because {base if arm['loss'] else name} has no finished run."
    words = [loss_words(name, base, arm["vs_baseline"]["loss"]), time_words(arm["vs_baseline"]["time"])]
    return f"{unsound}{', '.join(filter(None, words))}. {parity(arm, baseline)}."


def loss_words(name: str, base: str, loss: dict) -> str:
    """What the losses of an arm say beside those of its baseline, without the full stop."""
    tested = evidence(loss)
    difference = f"difference {number(loss['difference'], 4, signed=True)} nats ({tested})"
    if loss["verdict"] in ("better", "worse"):
        text = f"{name} is {loss['verdict']} than {base} by {number(abs(loss['difference']), 4)} nats ({tested})"
        small = loss["margin"] is not None and abs(loss["difference"]) < loss["margin"]
        return f"{text}, which is less than the margin of {loss['margin']:g}" if small else text
    if loss["verdict"] == "equivalent":
        return f"{name} is equivalent to {base} within {loss['margin']:g} nats, {difference}"
    if loss["verdict"] == "too few pairs":
        return f"{name} against {base}: too few pairs for a verdict, {PAIRS} are needed; {difference}"
    text = f"{name} against {base}: undecided, {difference}"
    found = detectable_words(loss)
    return f"{text}; {found}" if found else text


def evidence(loss: dict) -> str:
    """The interval, the number of pairs and the p value behind a verdict; of a size where the verdict is one."""
    words = []
    if loss["low"] is not None:
        ends = [loss["low"], loss["high"]]
        if loss["verdict"] in ("better", "worse"):
            # of how much better, or worse
            ends = sorted(end if loss["verdict"] == "worse" else -end for end in ends)
            words.append(f"{100 * LEVEL:.0f} % {number(ends[0], 4)} to {number(ends[1], 4)}")
        else:
            words.append(f"{100 * LEVEL:.0f} % {interval(loss, 4)}")
    words.append(f"{counted(loss)}{'' if loss['test'] == 'pairs' else ', Welch'}")
    p = loss["p_equivalent_holm"] if loss["verdict"] == "equivalent" else loss["p_holm"]
    if p is not None:
        words.append(equals(p).replace(" = ", " "))
    return ", ".join(words)


def counted(loss: dict) -> str:
    """How many pairs a test rests on, or runs where there are no pairs."""
    return plural(loss["n"], "pair") if loss["test"] == "pairs" else f"{plural(loss['n'], 'run')} a side"


def detectable_words(loss: dict) -> str:
    """What the test would have found, in words; "" where that is not known."""
    if loss["detectable"] is None:
        return ""
    verb = "finds" if loss["n"] == 1 else "find"
    return f"{counted(loss)} {verb} {number(loss['detectable'], 4)} nats in four of five cases"


def time_words(time: dict) -> str:
    """What the times of an arm say, as the end of a sentence."""
    if time["ratio"] is None:
        return "times not compared"
    share = f"{100 * abs(time['ratio'] - 1):.1f} %"
    if time["verdict"] in ("better", "worse"):
        return f"{share} {TIME_WORDS[time['verdict']]}"
    if time["verdict"] == "equivalent":
        return f"{TIME_WORDS['equivalent']} ({percent(time['ratio'] - 1)})"
    return f"time {TIME_WORDS.get(time['verdict'], time['verdict'])} ({percent(time['ratio'] - 1)})"


def sentences(results: dict) -> list[str]:
    """The verdict of each arm, and what a reader must know beside it."""
    arms, reused = results["arms"], results["settings"].get("reused") or []
    lines = [sentence(arm, arms[0]) for arm in arms[1:]]
    lines += [f"{plain(arm['name'])}: {autopsy_sentence(arm['autopsy'])}" for arm in dissected(results)]
    if reused:
        total = sum(len(arm["runs"]) for arm in arms)
        seen = ", whose results had been seen" if seen_in(reused) else ""
        verb = "was" if len(reused) == 1 else "were"
        lines.append(f"{len(reused)} of the {total} runs {verb} taken over from earlier comparisons{seen}; their times "
                     "are not compared.")
    return lines


def dissected(results: dict) -> list[dict]:
    """The arms of which it is known where they win or lose."""
    return [arm for arm in results["arms"][1:] if "splits" in arm.get("autopsy", {})]


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
    losses = []
    costs = []
    reached = []
    for arm in arms:
        tests = arm["vs_baseline"] or dict(loss=None, time=None)
        word = "baseline" if arm is arms[0] else "-"
        losses.append(loss_row(arm, tests["loss"], word))
        costs.append(cost_row(arm, tests["time"], word))
        reached.append(target_row(arm, target))
    goal = "To the target"
    if target is not None:
        goal += f", a loss of {number(target, 4)}"
    return [(name, list(rows[0]), [list(row.values()) for row in rows])
            for name, rows in {"Loss": losses, "Cost": costs, goal: reached}.items()]


def loss_row(arm: dict, test: dict | None, word: str) -> dict[str, str]:
    """{head: cell} of an arm's losses and their test; without one the verdict's cell is the word."""
    finished = arm["loss"]["n"] if arm["loss"] else 0
    row = {
        "arm": plain(arm["name"]),
        "verdict": word,
        "final loss": number(arm["loss"], 4),
        "runs": f"{finished} of {len(arm['runs'])}",
        **dict.fromkeys(("difference", "95 %", "pairs", "p", "corrected", "p equivalent", "sd of pairs", "finds",
                         "Welch p"), "-"),
        "bits/byte": number(arm["bits_per_byte"], 4)}
    if test:
        row |= {
            "verdict": test["verdict"],
            "difference": number(test["difference"], 4, signed=True),
            "95 %": interval(test, 4),
            "pairs": str(test["n"]) if test["test"] == "pairs" else "none, Welch",
            "p": p_value(test["p"]),
            "corrected": p_value(test["p_holm"]),
            "p equivalent": p_value(test["p_equivalent_holm"]),
            "sd of pairs": number(test["sd"], 4),
            "finds": number(test["detectable"], 4),
            "Welch p": p_value(test["welch"]["p"])}
    return row


def cost_row(arm: dict, test: dict | None, word: str) -> dict[str, str]:
    """{head: cell} of what an arm's runs cost, and of the test of their times."""
    mfu = arm["mfu"] and {key: value and 100 * value for key, value in arm["mfu"].items()}
    row = {
        "arm": plain(arm["name"]),
        "verdict": word,
        "ms/step": number(arm["ms_per_step"], 2),
        **dict.fromkeys(("ratio", "95 %", "turns", "corrected p"), "-"),
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
    if test:
        known = test["low"] is not None
        row |= {
            "verdict": TIME_WORDS.get(test["verdict"], test["verdict"]),
            "ratio": number(test["ratio"], 3),
            "95 %": f"{number(test['low'], 3)} to {number(test['high'], 3)}" if known else "-",
            "turns": str(test["n"]),
            "corrected p": p_value(test["p_holm"])}
    return row


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
    where = []
    for arm in results["arms"][1:]:
        result = arm.get("autopsy", {})
        if "reason" in result:
            where.append(f"{plain(arm['name'])}: not known, because {plain(result['reason'])}")
        where += [f"{plain(arm['name'])}: {line}" for line in autopsy_lines(result)] if "splits" in result else []
    if where:
        sections.append(("Where the differences lie", where))
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
    if settings.get("added"):
        lines.append(f"{plain(', '.join(settings['added']))}: added after the results of the others were known, so its "
                     "times are not compared, and whether it was tried may depend on them.")
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
        f"Differences are arm minus {base}, over pairs of equal seeds: Student's t test, two-sided. Welch's test "
        "between runs stands beside it for information, and decides where an arm has no seed in common.",
        *(design_lines(results) if settings.get("design") else fixed_rule_lines(settings, compared)),
        f"Arms tried: {known(tried)}{others}.",
        f"Finds: the difference that this test finds with {100 * POWER:.0f} % power, given the measured spread.",
        *gain_lines(arms),
        f"Times: t test over the logarithms of the ratios of ms a step within a turn; equally fast: within "
        f"{100 * TIME_MARGIN:g} % by two one-sided tests.",
        *time_lines(arms),
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


def fixed_rule_lines(settings: dict, compared: int) -> list[str]:
    """The rule of a comparison with a fixed number of seeds."""
    alpha = settings.get("alpha", ALPHA)
    method = "Holm's"
    if settings.get("ledger"):
        method = f"Bonferroni's (the error is of the ledger {plain(settings['ledger'])})"
    text = (f"After {method} correction over {plural(compared, 'arm')}, p < {alpha:.3g} is better or worse; with fewer "
            f"than {PAIRS} pairs there is no verdict.")
    if settings.get("margin") is None:
        return [f"{text} Equivalence was not tested: no margin was given, and the track has no target to take it from."]
    return [f"{text} Equivalent: two one-sided tests at the same level reject a difference of {settings['margin']:g} "
            "nats or more to either side. All else is undecided."]


def design_lines(results: dict) -> list[str]:
    """The rule of a comparison that runs until it is decided, and the looks that were taken."""
    settings = results["settings"]
    design = settings["design"]
    alpha = settings.get("alpha", ALPHA)
    count = len(results["arms"]) - 1
    levels = ", ".join(f"{n}: {p_value(level)}" for n, level in zip(design["looks"], design["levels"]))
    lines = [
        f"Until decided: looks after {', '.join(map(str, design['looks']))} pairs. The error of {alpha:.3g} is divided "
        f"by {plural(count, 'arm')} and spent linearly over the looks; the level of p at each look: {levels}. "
        f"Intervals are repeated ones, which cover with {100 * LEVEL:.0f} % at all looks together; corrected p values "
        "are multiplied by the number of arms."]
    if settings.get("margin") is not None:
        lines.append("Equivalent: at the same looks, with spending of its own, two one-sided tests reject a difference "
                     f"of {settings['margin']:g} nats or more to either side.")
    for arm in results["arms"][1:]:
        look = arm["vs_baseline"] and arm["vs_baseline"]["loss"]["look"]
        if not look:
            lines.append(f"{plain(arm['name'])}: not yet looked at.")
        elif look["word"] is None:
            lines.append(f"{plain(arm['name'])}: not decided after {look['pairs']} pairs; the comparison goes on.")
        elif look["word"] == "undecided" and look["pairs"] < design["looks"][-1]:
            lines.append(f"{plain(arm['name'])}: ended after {look['pairs']} pairs, because a verdict within "
                         f"{design['looks'][-1]} had become unlikely.")
        else:
            lines.append(f"{plain(arm['name'])}: {look['word']} after {look['pairs']} pairs.")
    return lines


def gain_lines(arms: list[dict]) -> list[str]:
    """How much smaller the variance of a difference is by pairs than between runs, for each arm that has both."""
    lines = []
    for arm in arms[1:]:
        test = arm["vs_baseline"] and arm["vs_baseline"]["loss"]
        spreads = [side["loss"]["sd"] for side in (arm, arms[0]) if side["loss"]]
        if test and test["test"] == "pairs" and test["sd"] and None not in spreads:
            gain = sum(sd ** 2 for sd in spreads) / test["sd"] ** 2
            lines.append(f"{plain(arm['name'])}: pairs divide the variance of the difference by {gain:.3g}.")
    return lines


def time_lines(arms: list[dict]) -> list[str]:
    """The turns whose times do not count."""
    return [f"{plain(arm['name'])}, times left out: {plain('; '.join(arm['vs_baseline']['time']['left_out']))}."
            for arm in arms[1:] if arm["vs_baseline"] and arm["vs_baseline"]["time"]["left_out"]]


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
    require(results["settings"].get("rule"), "these results follow the rule before verdicts were dated, whose words "
            "reports no longer have; give compare.py their folder, which reads them again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}; give another folder") from None
    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False) + "\n", "README.md": markdown(results),
             "report.html": page(results)}
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    write_atomically(folder / "curves.png", lambda file: draw(file, results, log_x))


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
        AUTOPSIES="".join(map(autopsy_section, dissected(results))),
        DATA=json.dumps(data, allow_nan=False).replace("<", r"\u003c"))
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, section in sections.items():
        text = text.replace(f"<!--{mark}-->", section)
    return text


def autopsy_section(arm: dict) -> str:
    """Where an arm wins or loses: the sentence, the picture, and the table folded away."""
    _, heads, rows = autopsy_table(arm["autopsy"])
    name = html.escape(plain(arm["name"]))
    return (f"<h2>Where the difference of {name} lies</h2><p>{html.escape(autopsy_sentence(arm['autopsy']))}</p>"
            f"{autopsy_svg(arm['autopsy'])}<details><summary>All bins</summary>"
            f"{html_table('', heads, rows)}</details>")


def verdict_class(verdict: str) -> str:
    """The CSS class of a verdict: its first word."""
    return verdict.partition(" ")[0]


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
    title = f"<h2>{heading}</h2>" if heading else ""
    return (f"{title}<div class=wide><table><thead><tr>{top}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>")
