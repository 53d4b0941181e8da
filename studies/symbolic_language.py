"""
Does a symbolic language suit very small models better than words? The same problems in five renderings, models of one
size, at equal problems and at equal tokens.

    python -m studies.symbolic_language             the cpu track's model, 0.95M parameters, three seeds: 24 runs of six
                                                    to nine minutes of one core
    python -m studies.symbolic_language --quick     a reduced run: proves that it runs, measures nothing
    python -m studies.symbolic_language --jobs 2 -- --lr_matrix 0.02
                                                    two runs at a time; settings of the trainer for all of them

tasks/symbolic_language.py makes the problems (--digits, --depth) and marks the answers. --problems problems make a
corpus of each rendering. "problems": one pass over these, so a wordy rendering gets more tokens, and more steps.
"tokens": as many tokens as the symbolic corpus has, pads included, so a wordy rendering sees fewer problems and
answer_only more. For symbolic and shuffled_trace, which are equally long, both are one run. Renderings share the
vocabulary, the batches' size and all other settings.

Marked are --tests problems of each of eight families, --length_tests of each for the longer problems (x1.5, x2). joint:
a valid trace and the right answer. The author's claim, that such a language suits very small models, counts as
supported if symbolic leads english and lean_like in joint, and answer_only in exact, at both budgets, and the 95 %
interval of each lead (t, over seeds, paired) is above 0; as refuted if the interval of its lead over english or, in
exact, over answer_only reaches 0 at either; else as undecided. This rule stood before the first run. Wilson intervals
are of all seeds' answers together, and so do not hold the spread between seeds.

The table is printed and written beside studies/results/symbolic_language-<device>.json, which holds every run's marks
by family, set and difficulty, and is rewritten after every run. Losses of these runs compare with no other corpus's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import ROOT, describe, markdown
from data.command_line import run_script
from records.statistics import test_pairs, wilson
from studies import build_parser, save
from tasks import symbolic_language as language
from train_gpt import RunError, require

TASK = language.Task(digits=5, depth=5, sequence_length=512)
ARMS = (  # (rendering, what is equal)
    ("symbolic", "problems"), ("english", "problems"), ("lean_like", "problems"), ("answer_only", "problems"),
    ("shuffled_trace", "problems"), ("english", "tokens"), ("lean_like", "tokens"), ("answer_only", "tokens"))
BOTH = ("symbolic", "shuffled_trace")  # renderings whose one budget stands for both
MARKS = ("exact", "valid", "joint", "identical")
LONGER = ("x1.5", "x2")  # test sets
DATA_SEED = 1
COUNTS = dict(           # in full, in a quick run, what it counts
    problems=(20_000, 100, "of the corpus"), seeds=(3, 2, "how many, from 1 on"),
    tests=(1000, 1, "problems of every family to mark"),
    length_tests=(200, 1, "problems of every family to mark, of each set of longer ones"),
    jobs=(1, 2, "runs at a time"))


# ---- Runs -------------------------------------------------------------------


def corpora(folder: Path, task: language.Task, problems: int, tests: int, quick: bool) -> dict[tuple[str, str], dict]:
    """
    Make the data of every arm under folder/<rendering>-<budget>; returns {arm: dict(tokens, problems)}, pads included.
    """
    made = {}
    val = 200 if quick else 1000
    for rendering, budget in ARMS:
        count = problems
        if budget == "tokens":  # a hundredth more, so that no problem comes twice
            ratio = made["symbolic", "problems"]["tokens"] / made[rendering, "problems"]["tokens"]
            count = 1 + int(1.01 * problems * ratio)
        meta = language.make(folder / f"{rendering}-{budget}", replace(task, rendering=rendering), count, val, tests,
                             DATA_SEED)
        made[rendering, budget] = dict(tokens=meta["train"]["tokens"], problems=count)

    # what is trained on of the corpora that are to have as many tokens
    tokens = made["symbolic", "problems"]["tokens"]
    for (_, budget), facts in made.items():
        if budget == "tokens":
            facts.update(tokens=tokens, problems=round(facts["problems"] * tokens / facts["tokens"]))
    return made


def train_and_mark(folder: Path, arm: tuple[str, str], tokens: int, seed: int, counts: tuple[int, int],
                   settings: list[str], threads: int) -> dict:
    """
    One run: its settings, loss and marks, {family: {set: {mark: right answers, None where the rendering has no trace;
    count, majority, random, tokens}}}. counts: of tests of a family, and of longer ones.
    """
    # train
    name = f"{'-'.join(arm)}-{seed}"
    command = ["--data", str(folder / "-".join(arm)), "--sequence_length", str(TASK.sequence_length),
               "--align_documents", "--tokens", str(tokens), "--val_tokens", "32768", "--val_every", "0",
               "--target", "0", "--device", "cpu", "--log_dir", str(folder), "--run_id", name, "--seed", str(seed),
               *settings]
    result = subprocess.run([sys.executable, "train_gpt.py", *command], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
    if result.returncode:
        raise RunError(f"{name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    facts = json.loads((folder / f"{name}.json").read_text())

    # mark
    torch.set_num_threads(threads)
    checkpoint = folder / f"{name}.pt"
    table = language.evaluate(str(checkpoint), count=counts[0], length_count=counts[1], device="cpu")
    checkpoint.unlink()
    marks = {}
    for (family, test_set), row in table.items():
        right = {mark: None if row[mark] is None else round(row[mark][0] * row["count"]) for mark in MARKS}
        others = {key: row[key] for key in ("count", "majority", "random", "tokens")}
        marks.setdefault(family, {})[test_set] = right | others
    return dict(rendering=arm[0], budget=arm[1], seed=seed, tokens=facts["config"]["batch_tokens"] * facts["step"],
                steps=facts["step"], parameters=facts["parameters"], val_loss=facts["val_loss"], marks=marks)


# ---- Results ----------------------------------------------------------------


def runs_of(runs: list[dict], arm: tuple[str, str]) -> list[dict]:
    """An arm's runs by seed, symbolic's and shuffled_trace's one budget standing for both."""
    rendering, budget = arm
    arm = (rendering, "problems" if rendering in BOTH else budget)
    return sorted((run for run in runs if (run["rendering"], run["budget"]) == arm), key=lambda run: run["seed"])


def shares(runs: list[dict], arm: tuple[str, str], mark: str, family: str = "all",
           test_set: str = "test") -> list[float] | None:
    """The share of right answers of an arm by seed. None without such runs or marks."""
    counts = [run["marks"][family][test_set] for run in runs_of(runs, arm)]
    if not counts or counts[0][mark] is None:
        return None
    return [count[mark] / count["count"] for count in counts]


def leads_of(runs: list[dict]) -> list[dict]:
    """
    Symbolic's lead over the others, paired over seeds: joint over english and lean_like, exact over answer_only, at
    both budgets.
    """
    rows = []
    for budget in ("problems", "tokens"):
        for rendering, mark in (("english", "joint"), ("lean_like", "joint"), ("answer_only", "exact")):
            symbolic = shares(runs, ("symbolic", budget), mark)
            lead = test_pairs(np.subtract(symbolic, shares(runs, (rendering, budget), mark)))
            rows.append(dict(over=rendering, mark=mark, equal=budget) | lead)
    return rows


def verdict_of(leads: list[dict]) -> str:
    """supported, refuted or undecided, by the rule above. Undecided without intervals."""
    if any(lead["low"] is None for lead in leads):
        return "undecided"
    if all(lead["low"] > 0 for lead in leads):
        return "supported"
    return "refuted" if any(lead["low"] <= 0 for lead in leads if lead["over"] != "lean_like") else "undecided"


def percent(values: list[float] | None, with_range: bool = True) -> str:
    """The mean of shares, and the least and the most of several."""
    if values is None:
        return "-"
    text = f"{100 * np.mean(values):.1f}"
    if with_range and len(values) > 1:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    return text


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def pooled(runs: list[dict], arm: tuple[str, str], mark: str) -> str:
    """The Wilson interval of all seeds' answers together."""
    counts = [run["marks"]["all"]["test"] for run in runs_of(runs, arm)]
    if counts[0][mark] is None:
        return "-"
    low, high = wilson(sum(count[mark] for count in counts), sum(count["count"] for count in counts))
    return f"{100 * low:.1f} to {100 * high:.1f}"


def arm_line(arm: tuple[str, str], results: dict) -> dict:
    """An arm's marks of all families together."""
    runs, (rendering, budget) = results["runs"], arm
    line = {"rendering": rendering, "equal": "both" if rendering in BOTH else budget,
            "problems": f"{results['corpora']['-'.join(arm)]['problems']:,}",
            "tokens": f"{runs_of(runs, arm)[0]['tokens']:,}"}
    line |= {mark: percent(shares(runs, arm, mark)) for mark in MARKS}
    line |= {f"Wilson, {mark}": pooled(runs, arm, mark) for mark in ("joint", "exact")}
    line |= {f"joint {longer}": percent(shares(runs, arm, "joint", test_set=longer)) for longer in LONGER}
    tokens = np.mean([run["marks"]["all"]["test"]["tokens"] for run in runs_of(runs, arm)])
    return line | {"tokens a problem": f"{tokens:.0f}"}


def family_table(mark: str, arms: list[tuple[str, str]], runs: list[dict]) -> str:
    """A mark by family; answer_only has no joint one."""
    families = [family for family in runs_of(runs, arms[0])[0]["marks"] if family != "all"]
    return markdown([{"rendering": arm[0], "equal": arm[1]}
                     | {family: percent(shares(runs, arm, mark, family), with_range=False) for family in families}
                     for arm in arms if mark == "exact" or arm[0] != "answer_only"])


def tables(results: dict) -> str:
    """All tables as Markdown."""
    # all families, and chance
    runs, seeds = results["runs"], ", ".join(map(str, results["seeds"]))
    arms = [arm for arm in ARMS if runs_of(runs, arm)]
    chance = runs_of(runs, arms[0])[0]["marks"]["all"]["test"]
    paragraphs = [
        f"Right answers in %, all families together, mean of seeds {seeds} (least to most)",
        markdown([arm_line(arm, results) for arm in arms]),
        f"Chance, exact: always the family's most frequent answer {100 * chance['majority']:.1f} %, at random among "
        f"the possible {100 * chance['random']:.1f} %."]

    # by family, and the leads
    for mark in ("joint", "exact"):
        paragraphs += [f"{mark} by family, %", family_table(mark, arms, runs)]
    if "leads" in results:
        leads = [{"over": lead["over"], "mark": lead["mark"], "equal": lead["equal"],
                  "lead": points(lead["difference"]),
                  "95 % interval": f"{points(lead['low'])} to {points(lead['high'])}"} for lead in results["leads"]]
        paragraphs += ["Symbolic's lead, points, paired over seeds", markdown(leads), f"Verdict: {results['verdict']}."]
    return "\n\n".join(paragraphs)


# ---- The command ------------------------------------------------------------


def run_all(folder: Path, results: dict, options: argparse.Namespace, keep: Callable[[], object]):
    """All runs, `jobs` at a time, seed after seed; `keep` is called after each."""
    counts = (options.tests, options.length_tests)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        todo = [pool.submit(train_and_mark, folder, arm, results["corpora"]["-".join(arm)]["tokens"], seed, counts,
                            options.settings, threads) for seed in results["seeds"] for arm in ARMS]
        # each is kept as soon as it is done
        try:
            for done in as_completed(todo):
                run = done.result()
                results["runs"].append(run)
                marks = run["marks"]["all"]["test"]
                shown = [f"{mark} {100 * marks[mark] / marks['count']:.1f} %" for mark in MARKS
                         if marks[mark] is not None]
                print(f"{run['rendering']}, equal {run['budget']}, seed {run['seed']}: {', '.join(shown)}", flush=True)
                keep()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def study(options: argparse.Namespace):
    """Make the corpora, train and mark all arms, write and print the results."""
    # how much of everything
    for name, counts in COUNTS.items():
        if getattr(options, name) is None:
            setattr(options, name, counts[options.quick])
        require(getattr(options, name) >= 1, f"--{name} must be at least 1, got {getattr(options, name)}")
    task = replace(TASK, digits=options.digits, depth=options.depth)

    # the runs
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        made = corpora(folder, task, options.problems, max(options.tests, options.length_tests), options.quick)
        results = describe(torch.device("cpu")) | dict(
            task=asdict(task), data_seed=DATA_SEED, tests=options.tests, length_tests=options.length_tests,
            settings=options.settings, quick=options.quick, seeds=list(range(1, options.seeds + 1)),
            corpora={"-".join(arm): facts for arm, facts in made.items()}, runs=[])
        run_all(folder, results, options, lambda: save("symbolic_language", results, options.output))

    # what they say
    results["leads"] = leads_of(results["runs"])
    results["verdict"] = "none of a quick run" if options.quick else verdict_of(results["leads"])
    text = tables(results)
    path = save("symbolic_language", results, options.output, text)
    print(f"\n{text}\n\n{path}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    for name, (default, quick, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({default}; quick: {quick})")
    parser.add_argument("--digits", type=int, default=TASK.digits, help="most digits of a number in training")
    parser.add_argument("--depth", type=int, default=TASK.depth, help="most deductions, steps or elements in training")
    parser.add_argument("settings", nargs="*", help="of the trainer, after --")
    options = parser.parse_args(argv)
    return run_script("symbolic_language.py", lambda: study(options))


if __name__ == "__main__":
    sys.exit(main())
