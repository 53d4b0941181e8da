"""
Does a symbolic language suit very small models better than words? The same problems in five renderings, models of one size, at equal problems and at equal tokens.

    python benchmarks/symbolic_language.py                 the cpu track's model, 0.95M parameters, three seeds: 24 runs of six to nine minutes of one core
    python benchmarks/symbolic_language.py --quick         a reduced run of every part: proves that it runs, measures nothing
    python benchmarks/symbolic_language.py --jobs 2 -- --lr_matrix 0.02       two runs at a time; settings of the trainer for all of them

data/symbolic_language.py makes the problems (--digits, --depth) and marks the answers. --problems problems make a corpus of each rendering. "problems": one pass over
these, so a wordy rendering gets more tokens, and more steps. "tokens": as many tokens as the symbolic corpus has, pads included, so a wordy rendering sees fewer problems
and answer_only more. For symbolic and shuffled_trace, which are equally long, both are one run. Renderings share the vocabulary, the batches' size and all other settings.

Marked are --tests problems of each of eight families, --length_tests of each for the longer problems (x1.5, x2). joint: a valid trace and the right answer.
The author's claim, that such a language suits very small models, counts as supported if symbolic leads english and lean_like in joint, and answer_only in exact, at both
budgets, and the 95 % interval of each lead (t, over seeds, paired) is above 0; as refuted if the interval of its lead over english or, in exact, over answer_only reaches 0
at either; else as undecided. This rule stood before the first run. Wilson intervals are of all seeds' answers together, and so do not hold the spread between seeds.

The table is printed and written beside benchmarks/results/symbolic_language-<device>.json, which holds every run's marks by family, set and difficulty, and is
rewritten after every run. Losses of these runs compare with no other corpus's.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import describe, markdown, save
from data import symbolic_language as language
from records.statistics import paired, wilson
from train_gpt import RunError

import numpy as np
import torch

TASK = language.Task(digits=5, depth=5, sequence_length=512)
ARMS = (("symbolic", "problems"), ("english", "problems"), ("lean_like", "problems"), ("answer_only", "problems"), ("shuffled_trace", "problems"),
        ("english", "tokens"), ("lean_like", "tokens"), ("answer_only", "tokens"))
MARKS = ("exact", "valid", "joint", "identical")
PARTS = ("test", "x1.5", "x2")
DATA_SEED = 1
COUNTS = dict(problems=(20_000, 100, "of the corpus"), seeds=(3, 2, "how many, from 1 on"), tests=(1000, 1, "problems of every family to mark"),
              length_tests=(200, 1, "problems of every family to mark, of each set of longer ones"), jobs=(1, 2, "runs at a time"))  # in full, in a quick run


def corpora(folder: Path, task: language.Task, problems: int, tests: int, quick: bool) -> dict[tuple[str, str], dict]:
    """Make the data of every arm under folder/<rendering>-<budget>; returns {arm: dict(tokens, problems)}, pads included."""
    made, val = {}, 200 if quick else 1000
    for rendering, budget in ARMS:
        count = problems
        if budget == "tokens":  # a hundredth more, so that no problem comes twice
            count = 1 + int(1.01 * problems * made["symbolic", "problems"]["tokens"] / made[rendering, "problems"]["tokens"])
        meta = language.make(folder / f"{rendering}-{budget}", replace(task, rendering=rendering), count, val, tests, DATA_SEED)
        made[rendering, budget] = dict(tokens=meta["train"]["tokens"], problems=count)
    tokens = made["symbolic", "problems"]["tokens"]
    for (_, budget), facts in made.items():
        if budget == "tokens":
            facts.update(tokens=tokens, problems=round(facts["problems"] * tokens / facts["tokens"]))
    return made


def train_and_mark(folder: Path, arm: tuple[str, str], tokens: int, seed: int, counts: tuple[int, int], settings: list[str], threads: int) -> dict:
    """One run: its settings, loss and marks, {family: {set: {mark: right answers, None where the rendering has no trace; count, majority, random, tokens}}}."""
    name = f"{'-'.join(arm)}-{seed}"
    command = ["--data", str(folder / "-".join(arm)), "--sequence_length", str(TASK.sequence_length), "--align_documents", "--tokens", str(tokens), "--val_tokens", "32768",
               "--val_every", "0", "--target", "0", "--device", "cpu", "--log_dir", str(folder), "--run_id", name, "--seed", str(seed), *settings]
    result = subprocess.run([sys.executable, "train_gpt.py", *command], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
    if result.returncode:
        raise RunError(f"{name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    torch.set_num_threads(threads)
    facts = json.loads((folder / f"{name}.json").read_text())
    found = language.evaluate(str(folder / f"{name}.pt"), count=counts[0], length_count=counts[1], device="cpu")
    (folder / f"{name}.pt").unlink()
    marks = {}
    for (family, part), row in found.items():
        right = {mark: None if row[mark] is None else round(row[mark][0] * row["count"]) for mark in MARKS}
        marks.setdefault(family, {})[part] = right | {key: row[key] for key in ("count", "majority", "random", "tokens")}
    return dict(rendering=arm[0], budget=arm[1], seed=seed, tokens=facts["config"]["batch_tokens"] * facts["step"], steps=facts["step"], parameters=facts["parameters"],
                val_loss=facts["val_loss"], marks=marks)


def shares(runs: list[dict], arm: tuple[str, str], mark: str, family: str = "all", part: str = "test") -> list[float] | None:
    """The share of right answers of an arm by seed, symbolic's and shuffled_trace's one budget standing for both. None without such runs or marks."""
    rendering, budget = arm
    budget = "problems" if rendering in ("symbolic", "shuffled_trace") else budget
    found = sorted((run["seed"], run["marks"][family][part]) for run in runs if (run["rendering"], run["budget"]) == (rendering, budget))
    return [marks[mark] / marks["count"] for _, marks in found] if found and found[0][1][mark] is not None else None


def leads_of(runs: list[dict]) -> list[dict]:
    """Symbolic's lead over the others, paired over seeds: joint over english and lean_like, exact over answer_only, at both budgets."""
    rows = []
    for budget in ("problems", "tokens"):
        for rendering, mark in (("english", "joint"), ("lean_like", "joint"), ("answer_only", "exact")):
            rows.append(dict(over=rendering, mark=mark, equal=budget) | paired(shares(runs, ("symbolic", budget), mark), shares(runs, (rendering, budget), mark)))
    return rows


def verdict_of(leads: list[dict]) -> str:
    """supported, refuted or undecided, by the rule above. Undecided without intervals."""
    if any(lead["low"] is None for lead in leads):
        return "undecided"
    if all(lead["low"] > 0 for lead in leads):
        return "supported"
    return "refuted" if any(lead["low"] <= 0 for lead in leads if lead["over"] != "lean_like") else "undecided"


def tables(results: dict) -> str:
    runs, arms, seeds = results["runs"], [arm for arm in ARMS if any((run["rendering"], run["budget"]) == arm for run in results["runs"])], results["seeds"]
    percent = lambda values: "-" if values is None else f"{100 * np.mean(values):.1f}" + (f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else "")

    def pooled(arm, mark):
        own = [run["marks"]["all"]["test"] for run in runs if (run["rendering"], run["budget"]) == arm]
        if own[0][mark] is None:
            return "-"
        return "{:.1f} to {:.1f}".format(*(100 * share for share in wilson(sum(marks[mark] for marks in own), sum(marks["count"] for marks in own))))

    one = lambda arm: next(run for run in runs if (run["rendering"], run["budget"]) == arm)
    lines = [f"Right answers in %, all families together, mean of seeds {', '.join(map(str, seeds))} (least to most)", "", markdown([{
        "rendering": arm[0], "equal": arm[1] if arm[0] not in ("symbolic", "shuffled_trace") else "both", "problems": f"{results['corpora']['-'.join(arm)]['problems']:,}",
        "tokens": f"{one(arm)['tokens']:,}"} | {mark: percent(shares(runs, arm, mark)) for mark in MARKS}
        | {"Wilson, joint": pooled(arm, "joint"), "Wilson, exact": pooled(arm, "exact")} | {f"joint {part}": percent(shares(runs, arm, "joint", part=part)) for part in PARTS[1:]}
        | {"tokens a problem": f"{np.mean([run['marks']['all']['test']['tokens'] for run in runs if (run['rendering'], run['budget']) == arm]):.0f}"} for arm in arms]), ""]
    chance = one(arms[0])["marks"]["all"]["test"]
    lines += [f"Chance, exact: always the family's most frequent answer {100 * chance['majority']:.1f} %, at random among the possible {100 * chance['random']:.1f} %.", ""]
    families = [family for family in one(arms[0])["marks"] if family != "all"]
    for mark in ("joint", "exact"):
        lines += [f"{mark} by family, %", "", markdown([{"rendering": arm[0], "equal": arm[1]} | {family: percent(values) if (values := shares(runs, arm, mark, family)) is None
                  else f"{100 * np.mean(values):.1f}" for family in families} for arm in arms if mark == "exact" or arm[0] != "answer_only"]), ""]
    if "leads" in results:
        points = lambda value: "-" if value is None else f"{100 * value:+.1f}"
        lines += ["Symbolic's lead, points, paired over seeds", "", markdown([{"over": lead["over"], "mark": lead["mark"], "equal": lead["equal"], "lead": points(lead["difference"]),
                  "95 % interval": f"{points(lead['low'])} to {points(lead['high'])}"} for lead in results["leads"]]), "", f"Verdict: {results['verdict']}.", ""]
    return "\n".join(lines)


def run_all(folder: Path, results: dict, given: argparse.Namespace, keep: Callable[[], object]):
    """All runs, `jobs` at a time, seed after seed; `keep` is called after each."""
    counts, threads = (given.tests, given.length_tests), max(1, (os.cpu_count() or 1) // given.jobs)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        todo = [pool.submit(train_and_mark, folder, arm, results["corpora"]["-".join(arm)]["tokens"], seed, counts, given.settings, threads) for seed in results["seeds"] for arm in ARMS]
        try:
            for done in as_completed(todo):
                run = done.result()
                results["runs"].append(run)
                marks = run["marks"]["all"]["test"]
                print(f"{run['rendering']}, equal {run['budget']}, seed {run['seed']}: " + ", ".join(
                    f"{mark} {100 * marks[mark] / marks['count']:.1f} %" for mark in MARKS if marks[mark] is not None), flush=True)
                keep()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="symbolic_language.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run of every part")
    for name, (default, quick, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({default}; quick: {quick})")
    parser.add_argument("--digits", type=int, default=TASK.digits, help="most digits of a number in training")
    parser.add_argument("--depth", type=int, default=TASK.depth, help="most deductions, steps or elements in training")
    parser.add_argument("--output", type=Path, help="JSON file, beside which the tables go as .md (default: benchmarks/results/)")
    parser.add_argument("settings", nargs="*", help="of the trainer, after --")
    given = parser.parse_args(argv)
    try:
        for name, counts in COUNTS.items():
            if getattr(given, name) is None:
                setattr(given, name, counts[given.quick])
            if getattr(given, name) < 1:
                raise RunError(f"--{name} must be at least 1, got {getattr(given, name)}")
        task = replace(TASK, digits=given.digits, depth=given.depth)
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            made = corpora(folder, task, given.problems, max(given.tests, given.length_tests), given.quick)
            results = describe(torch.device("cpu")) | dict(task=asdict(task), data_seed=DATA_SEED, tests=given.tests, length_tests=given.length_tests, settings=given.settings,
                                                           quick=given.quick, seeds=list(range(1, given.seeds + 1)), corpora={"-".join(arm): facts for arm, facts in made.items()}, runs=[])
            run_all(folder, results, given, lambda: save("symbolic_language", results, given.output))
        results["leads"] = leads_of(results["runs"])
        results["verdict"] = "none of a quick run" if given.quick else verdict_of(results["leads"])
        path = save("symbolic_language", results, given.output)
        text = tables(results)
        path.with_suffix(".md").write_text(text)
    except RunError as error:
        print(f"symbolic_language.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{text}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
