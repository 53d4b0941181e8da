"""
Head-to-heads of a study: compare.py in this process, by its command line; their plans, rows, tables and one picture.

A study that compares the same arms under several conditions (corpora, depths) has a dictionary {condition: rows}, and
rows_of() makes the rows of one comparison, {arm's short name: row}.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import markdown  # isort: skip  before PyTorch, see there
import torch

import compare
from compare import Comparison
from records.processes import Interrupt, Interrupted
from train_gpt import RANGES, require, say

TESTED = ("difference", "low", "high", "n", "p", "p_holm", "verdict")   # of a test of losses, in a row


# ---- The command line -------------------------------------------------------


def add_run_options(parser: argparse.ArgumentParser):
    """The options of every study whose runs are compare.py's: how they are run, and settings of the trainer."""
    cores = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=cores, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and the expected time")
    parser.add_argument("settings", nargs="*", help="of the trainer, after --")


def check_steps(steps: int):
    """RunError for a number of steps that the trainer refuses."""
    least, most = 1, RANGES["steps"][1]
    require(least <= steps <= most, f"--steps must be from {least} to {most:,}, got {steps}")


def trainer_options(settings: list[str]) -> list[str]:
    """The options of the trainer that all runs of a study have but for their length; settings: the user's."""
    threads = [] if torch.cuda.is_available() else ["--threads", "1"]
    return [*threads, "--keep_losses", "0", *settings]


def length_options(steps: int, val_every: int | None = None) -> list[str]:
    """
    The options of a run of so many steps, which is validated before the first and after the last; and every val_every
    steps.
    """
    return ["--steps", str(steps), "--val_every", str(val_every or steps)]


# ---- One comparison ---------------------------------------------------------


def run_comparison(argv: list[str]) -> tuple[Comparison, dict | None]:
    """
    Do what is missing of the comparison of compare.py's command line argv. Returns it and its results; of --dry-run,
    which prints its plan, None. RunError for what cannot be run; KeyboardInterrupt for a signal. Finished runs are kept
    in ./comparisons, where the same command finds them again.
    """
    with Interrupt() as interrupt:
        arguments, settings = compare.parse_arguments(argv)
        comparison = compare.prepare(arguments, settings, argv, interrupt)
        try:
            return comparison, compare.run_or_show(comparison, arguments)
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            lock = getattr(comparison, "lock", None)
            if lock is not None:  # a later call in this process may open the folder again
                lock.close()


def plan_comparison(argv: list[str]) -> Comparison:
    """The comparison of compare.py's command line argv, of which nothing is run and nothing written."""
    with Interrupt() as interrupt:
        return compare.prepare(*compare.parse_arguments(argv), argv, interrupt)


def show_plan(comparison: Comparison, title: str, jobs: int) -> float | None:
    """
    Print how many runs of a comparison are missing and how long they take, `jobs` of them at a time; returns the
    seconds of all of them one after the other, None where no earlier run says it.
    """
    # what is missing; which rates the reported runs have is not known before a sweep is done
    reported = [job for arm_jobs in comparison.reported([], None) for job in arm_jobs]
    total = comparison.total()
    if comparison.plan["sweep"]:
        done = sum(compare.json_facts(log).get("status") == "finished" for log in comparison.logs.glob("*.txt"))
        seconds, runs = comparison.expected_seconds(reported)
        if seconds is not None:
            seconds *= (total - done) / len(reported)
    else:
        missing = [job for job in reported if comparison.read(job) is None and comparison.find_finished(job)[0] is None]
        done = total - len(missing)
        seconds, runs = comparison.expected_seconds(missing)

    # how long it takes
    expected = "expected time not known: no earlier run of this track on this machine"
    if seconds is not None:
        expected = f"expected time {compare.duration(seconds / jobs)}, by {runs} earlier runs"
    say(f"{title}: {total} runs, {done} of them done; {expected}")
    return seconds


def compare_conditions(commands: dict[str, list[str]], options: argparse.Namespace,
                       keep: Callable[[str, Comparison, dict], None]):
    """
    Do what is missing of the comparisons {condition: command line of compare.py}, one after the other, and call
    keep(condition, comparison, results) after each; under --dry-run print their plans and the time of all.
    """
    if not options.dry_run:
        for condition, argv in commands.items():
            say(f"\n{condition}")
            keep(condition, *run_comparison(argv))
        return
    seconds = [show_plan(plan_comparison(argv), condition, options.jobs) for condition, argv in commands.items()]
    if None not in seconds:
        say(f"all: expected time {compare.duration(sum(seconds) / options.jobs)}")


def arms_of(comparison: Comparison, results: dict) -> list[dict]:
    """The arms of a comparison as summarize takes them, with their runs from the logs."""
    arms = []
    for arm, row, jobs in zip(comparison.arms, results["arms"], comparison.reported([], None)):
        runs = [comparison.read(job) or entry for job, entry in zip(jobs, row["runs"])]
        arms.append(dict(name=arm.name, variant=arm.variant, options=arm.options, faults=row["faults"], runs=runs))
    return arms


# ---- Rows and tables --------------------------------------------------------


def mean_of(values: dict | None) -> float | None:
    """The mean of a summary, None where there is none."""
    return None if values is None else values["mean"]


def cell(value, form: str) -> str:
    """A value as a table shows it, "-" where it was not measured."""
    return "-" if value is None else form.format(value)


def interval_of(row: dict) -> str:
    """The 95 % interval of a row's difference as a table shows it."""
    return "-" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"


def losses_of(arm: dict) -> list[list]:
    """[[seed, loss], ...] of an arm's finished runs."""
    return [[run["seed"], run["val_loss"]] for run in arm["runs"] if run.get("val_loss") is not None]


def tests_of(arm: dict) -> dict:
    """What the verdict's test says of an arm's difference from the baseline, in nats; None for each of the baseline."""
    loss = (arm["vs_baseline"] or dict(loss={}))["loss"]
    return {name: loss.get(name) for name in TESTED}


def rows_of(results: dict, names: dict[str, str]) -> dict[str, dict]:
    """
    {arm's short name: what came of it}, of the results of one comparison; names: {arm of compare.py: its short name}.
    Losses and differences are nats a token, times milliseconds a step.
    """
    sweep = results["settings"].get("sweep") or {}
    rows = {}
    for arm in results["arms"]:
        rows[names[arm["name"]]] = dict(
            arm=arm["name"], parameters=arm["parameters"], in_blocks=arm["parameters_without_embeddings"],
            steps=arm["steps"], ms_per_step=mean_of(arm["ms_per_step"]), loss=mean_of(arm["loss"]),
            losses=losses_of(arm), sweep=sweep.get(arm["name"]), **tests_of(arm), faults=arm["faults"],
            errors=arm["errors"])
    return rows


def table_of(conditions: dict[str, dict[str, dict]], title: str) -> str:
    """All rows as Markdown: a line for each arm under each condition, whose column is called `title`."""
    lines = []
    for condition, rows in conditions.items():
        for name, row in rows.items():
            mark = " (not sound)" if row["faults"] else ""
            lines.append({
                title: condition, "arm": name + mark, "parameters": cell(row["parameters"], "{:,}"),
                "ms a step": cell(row["ms_per_step"], "{:.0f}"), "loss, nats": cell(row["loss"], "{:.4f}"),
                "difference": cell(row["difference"], "{:+.4f}"), "95 %": interval_of(row),
                "verdict": row["verdict"] or "-", "p": cell(row["p_holm"], "{:.2g}"), "n": len(row["losses"])})
    return markdown(lines)


def errors_of(conditions: dict[str, dict[str, dict]]) -> str:
    """A list of the runs without a result as Markdown, "" where there is none."""
    failed = [f"- {condition}, {name}: {'; '.join(row['errors'])}" for condition, rows in conditions.items()
              for name, row in rows.items() if row["errors"]]
    return "\n".join(["Runs without a result:", *failed]) if failed else ""


# ---- Arms -------------------------------------------------------------------


def with_variant(line: str, variant: str) -> str:
    """An arm of compare.py that has another variant, too: "baseline" gives way to it, others are joined by +."""
    first, _, options = line.partition(" ")
    joined = variant if first == "baseline" else f"{variant}+{first}"
    return f"{joined} {options}".strip()


def choose_arms(arms: dict[str, str], words: list[str]) -> dict[str, str]:
    """
    The arms of these names, all where there is none, in the table's order, the first one always. RunError for a word
    that names none.
    """
    for word in words:
        require(word in arms, f"there is no arm {word!r:.60}; choose from {', '.join(arms)}")
    first = next(iter(arms))
    return {name: line for name, line in arms.items() if not words or name == first or name in words}


# ---- The picture ------------------------------------------------------------


def draw_differences(path: Path, conditions: dict[str, dict[str, dict]], xlabel: str):
    """
    Write a picture (.png) of the differences with their 95 % intervals: a panel for each condition, a line for each
    arm. A filled dot is a difference that has a verdict of better or worse.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from records.pictures import COLORS

    shown = {condition: {name: row for name, row in rows.items() if row["difference"] is not None}
             for condition, rows in conditions.items()}
    names = list(dict.fromkeys(name for rows in shown.values() for name in rows))
    figure = Figure(figsize=(2.0 + 2.6 * max(1, len(shown)), 1.4 + 0.32 * max(1, len(names))), dpi=130,
                    layout="constrained")
    panels = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    for panel, (condition, rows) in zip(panels, shown.items()):
        # zero, and every arm's difference
        panel.axvline(0.0, color="#404040", linewidth=0.8, zorder=1)
        for name, row in rows.items():
            height = len(names) - 1 - names.index(name)
            decided = row["verdict"] in ("better", "worse")
            color = {"better": COLORS[3], "worse": COLORS[1]}.get(row["verdict"], COLORS[0])
            if row["low"] is not None:
                panel.plot([row["low"], row["high"]], [height, height], color=color, linewidth=1.6, zorder=2)
            face = color if decided else "white"
            panel.plot([row["difference"]], [height], "o", color=color, markerfacecolor=face, markersize=5, zorder=3)

        # its frame
        panel.set_title(condition, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names[::-1])
    figure.supxlabel(xlabel, fontsize=9)
    figure.savefig(path, format="png")
