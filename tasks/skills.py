"""
The skills card: what a part of the trainer can learn, as the share of small models that learn it.

    ./run.sh skills ARM_OR_CHECKPOINT ... [--full] [--jobs 2] [-o logs/skills] [--json]
    python -m tasks.skills "topological_attention:preset=fast"      an arm, as compare.py takes it
    python -m tasks.skills "baseline --layers 4 --no-smear"         with options of the model or the optimizer
    python -m tasks.skills logs/RUN.pt                              what a checkpoint was trained with

An arm is trained from scratch on each skill, at three learning rates (its own times 0.3, 1 and 3) and several seeds, as
tasks/trials.py says: the trainer's model of 2 layers x 64 channels unless the arm says otherwise, its loss taken at the
answers alone.

    recall      pairs of a key and a value, then queries (tasks/recall.py)
    copy        a span of random letters again, after a random distance (tasks/copying.py)
    parity, S5  the product of a row's bits or permutations so far (tasks/state_tracking.py)
    hops        a query follows one link between nodes, or two (tasks/hops.py)

A run has learnt a skill if its accuracy on fresh rows reaches 0.95. P(learnt) is the share of runs that have, with the
95 % Wilson interval of that share; rates count as seeds do, so it says how easily a skill is learnt, too. A run ends as
soon as it has learnt its skill at all lengths: "steps" is the median of the runs' steps, its largest value the budget.
Rows that name two lengths were trained on the first and asked at the positions that only the second has.

- The quick card, the default, has 2 seeds and few steps. --full has 5 seeds, more steps, and recall of 32 pairs.
- Every finished run is a line of JSON in the folder of -o. A card that was stopped goes on there, and one that is
  complete is printed at once, as long as code, settings and PyTorch are the same.
- A checkpoint stands for an arm: its variants and the settings of its model and optimizer, its layers (at most 4) and
  the width of its heads, in a stream of about 64 channels, without windows. Its weights are not used. If it was trained
  on bytes, it is also asked two things without any training (tasks/prompts.py): to copy a word, and to recall digits.
- Progress goes to stderr. Exit code 1 and one line for a fault.

Source: recall as a test of architectures is Zoology's, Arora et al., 2023, arxiv.org/abs/2312.04927; the other tasks
name theirs; interval: Wilson, 1927.
"""

import dataclasses
import json
import multiprocessing
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import numpy as np

from data.command_line import Parser, check_option, run_script
from train_gpt import (
    Config,
    Ranks,
    RunError,
    config_comments,
    config_from,
    find_checkpoint,
    read_checkpoint,
    require,
    say,
    sha256_of_text,
    trained_model,
)

# isort: split
import torch

import variants
from compare import Arm, parse_arm, parse_options
from records.identity import digest_of, module_file, names_a_file, source_of
from records.processes import die_with_parent
from records.statistics import wilson
from tasks import answers, prompts, trials
from tasks.copying import Copying
from tasks.hops import Hops
from tasks.recall import Recall
from tasks.state_tracking import StateTracking
from tasks.trials import SIZE, THRESHOLD, Trial, run_trial

FOLDER = Path("logs/skills")
FACTORS = (0.3, 1.0, 3.0)       # on all learning rates
QUICK = dict(seeds=2, steps=400)
FULL = dict(seeds=5, steps=1200)
QUICK_PAIRS = (4, 16)           # of recall
FULL_PAIRS = (4, 16, 32)
WIDTH = 64                      # channels of the stream, about, of a checkpoint's arm
LAYERS = 4                      # of a checkpoint's arm, at most
PROBED_ROWS = 256               # of a probe of a checkpoint
# Of a checkpoint's model: what the card sets itself.
SIZES = {
    "layers", "model_dim", "heads", "head_dim", "kv_heads", "mlp_hidden", "document_mask", "window_pattern",
    "window_short", "window_long",
}


# ---- What a card holds ------------------------------------------------------


def list_skills(full: bool) -> dict:
    """{name: skill as tasks/answers.py has it} of a card."""
    pairs = FULL_PAIRS if full else QUICK_PAIRS
    return {f"recall, {n} pairs": Recall(n, 64, 64, n) for n in pairs} | {
        "copy, 16 letters": Copying(),
        "parity": StateTracking("parity"),
        "S5": StateTracking("S5"),
        "hops, 1 and 2": Hops(),
    }


def list_trials(arm: Arm, full: bool) -> dict[str, list[Trial]]:
    """{a skill's name: its trials}, of a card."""
    preset = FULL if full else QUICK
    return {name: [Trial(arm, skill, factor, seed, preset["steps"])
                   for seed in range(1, preset["seeds"] + 1) for factor in FACTORS]
            for name, skill in list_skills(full).items()}


def settings_of(groups: tuple[str, ...]) -> set[str]:
    """The names of the trainer's settings in these groups of Config."""
    names = set()
    group = ""
    for title, name, _ in config_comments():
        group = title or group
        if name and group in groups:
            names.add(name)
    return names


def make_arm(text: str) -> Arm:
    """
    The arm of a text, tried on the trainer's parser and the variants' loader. RunError names the arm; also for options
    that a card sets or that mean nothing there.
    """
    arm = parse_arm(text, 0, 0, 1, SIZE)
    allowed = settings_of(("model", "optimizer")) | {"device", "dtype"}
    for word in arm.options:
        name = word[2:].partition("=")[0].removeprefix("no-").removeprefix("no_").replace("-", "_")
        require(not word.startswith("--") or name in allowed,
                f"arm {text!r:.200}: {word} has no place on a skills card; give options of the model or the optimizer, "
                "--device or --dtype")
    return arm


def describe_arm(config: Config) -> str:
    """A checkpoint's configuration as the text of an arm of a card's size."""
    # sizes: the width of its heads decides
    heads = max(1, WIDTH // config.head_dim)
    width = heads * config.head_dim
    values = dict(layers=min(config.layers, LAYERS), model_dim=width, heads=heads, head_dim=config.head_dim,
                  kv_heads=min(config.kv_heads, 1), mlp_hidden=2 * width)
    for name in settings_of(("model", "optimizer")) - SIZES:
        values[name] = getattr(config, name)

    # what is not the card's anyway
    usual = parse_options(SIZE)
    words = []
    for field in dataclasses.fields(Config):
        value = values.get(field.name)
        if value is None or value == getattr(usual, field.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", str(value)]
    return shlex.join(["+".join(config.variant) or "baseline", *words])


# ---- Runs, kept -------------------------------------------------------------


def key_of(trial: Trial) -> str:
    """The sha256 of all that decides a trial's result, but for the machine."""
    skill = trial.skill
    sources = sources_of(tuple(trial.arm.variant), type(skill).__module__)
    decides = dict(config=dataclasses.asdict(trial.config()), skill=[type(skill).__name__, dataclasses.asdict(skill)],
                   rows=trial.rows, every=trial.every, marked=trial.marked, sources=sources, torch=torch.__version__)
    return sha256_of_text(json.dumps(decides, sort_keys=True))


@cache
def sources_of(variant: tuple[str, ...], module: str) -> dict[str, str]:
    """{file or module: sha256} of the code of a trial: the trainer's and the variants', the trial's, the skill's."""
    modules = (answers.__name__, trials.__name__, module)
    return source_of(list(variant)) | {name: digest_of(module_file(name)) for name in modules}


def read_runs(file: Path) -> dict[str, dict]:
    """{key: the result of run_trial} of a file's lines. A line that is no such result, one cut off, is passed over."""
    runs = {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            run = json.loads(line)
            runs[run["key"]] = dict(accuracy=[float(share) for share in run["accuracy"]], steps=int(run["steps"]),
                                    seconds=float(run["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return runs


def keep_run(file: Path, facts: dict):
    """Append a line to a file of runs, on a line of its own whatever the last writer left."""
    with open(file, "a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(facts).encode() + b"\n")


def begin_worker(threads: int):
    """What a process that trains begins with."""
    die_with_parent()
    torch.set_num_threads(threads)


def run_trials(waiting: list[Trial], jobs: int) -> Iterator[tuple[int, dict]]:
    """
    Yield (number of a trial, its result) as the trials end, `jobs` of them at a time, each in a process with its share
    of the cores; with one job in this process. Whoever stops listening ends the trials under way. RunError for the
    first that fails.
    """
    if jobs == 1:
        for number, trial in enumerate(waiting):
            yield number, run_trial(trial)
        return

    threads = max(1, count_cores() // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin_worker, (threads,)) as pool:
        futures = {pool.submit(run_trial, trial): number for number, trial in enumerate(waiting)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise RunError("a process that trained ended without a word, as for want of memory; call this again, or "
                           "with --jobs 1") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def count_cores() -> int:
    return os.cpu_count() or 1


def complete_runs(arm: Arm, plan: dict[str, list[Trial]], folder: Path, jobs: int) -> dict[str, list[dict]]:
    """
    {a skill's name: the results of its trials, in their order}, those that the folder has not yet after training them.
    RunError for an arm that fails, or a folder that cannot be written.
    """
    # what is there
    file = folder / f"{arm.readable}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = read_runs(file)
    except OSError as error:
        raise RunError(f"cannot use {file}: {error.strerror}; give another folder with -o") from None
    every = [(name, trial, key_of(trial)) for name, some in plan.items() for trial in some]
    if names_a_file(every[0][1].config()):
        known = {}  # what the file held at that time is not known
    missing = [(name, trial, key) for name, trial, key in every if key not in known]

    # what is not
    results = run_trials([trial for _, trial, _ in missing], jobs)
    for count, (number, result) in enumerate(results, 1):
        name, trial, key = missing[number]
        known[key] = result
        facts = dict(key=key, arm=arm.name, skill=name, factor=trial.factor, seed=trial.seed)
        keep_run(file, facts | result)
        shares = " and ".join(f"{share:.3f}" for share in result["accuracy"])
        say(f"{count}/{len(missing)} {name}, learning rates x {trial.factor:g}, seed {trial.seed}: accuracy {shares} "
            f"after {result['steps']} steps, {result['seconds']:.0f} s", stream=sys.stderr)
    return {name: [known[key] for other, _, key in every if other == name] for name in plan}


# ---- The card ---------------------------------------------------------------


def summarize(plan: dict[str, list[Trial]], results: dict[str, list[dict]]) -> list[dict]:
    """
    A row of the card for every skill and length, as a dict of JSON values: skill, trained_on and length in tokens,
    runs, learnt (how many), share, low and high of its Wilson interval, best and median accuracy, chance, steps
    (median).
    """
    rows = []
    for name, some in plan.items():
        skill = some[0].skill
        for index, length in enumerate(skill.lengths):
            shares = [result["accuracy"][index] for result in results[name]]
            learnt = sum(share >= THRESHOLD for share in shares)
            low, high = wilson(learnt, len(shares))
            rows.append(dict(
                skill=name, trained_on=skill.lengths[0], length=length, runs=len(shares), learnt=learnt,
                share=learnt / len(shares), low=low, high=high, best=max(shares), median=statistics.median(shares),
                chance=skill.chance_accuracy, steps=statistics.median(result["steps"] for result in results[name])))
    return rows


def format_table(rows: list[dict]) -> str:
    """The rows of summarize() in columns for a terminal."""
    cells = [["skill", "tokens", "learnt", "P(learnt)", "95 %", "best", "median", "chance", "steps"]]
    for row in rows:
        tokens = str(row["length"])
        if row["length"] != row["trained_on"]:
            tokens = f"{row['trained_on']} -> {row['length']}"
        cells.append([row["skill"], tokens, f"{row['learnt']} of {row['runs']}", f"{row['share']:.2f}",
                      f"{row['low']:.2f} to {row['high']:.2f}", f"{row['best']:.3f}", f"{row['median']:.3f}",
                      f"{row['chance']:.3f}", f"{row['steps']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def probe(saved: dict, config: Config) -> list[dict]:
    """
    What a checkpoint of a model of bytes answers without training: dicts of name, accuracy, standard_error and chance.
    [] of another vocabulary. A probe whose rows are longer than those that the model was trained on is left out.
    """
    if not prompts.reads_bytes(config):
        return []
    config = dataclasses.replace(config, compile="off", device="cpu")
    found = []
    with variants.applied(config.variant, config):
        model = trained_model(saved, config, Ranks.start(config))
        for name, skill in {"copy a word": prompts.CopiedWord(), "recall digits": prompts.KeyedLines()}.items():
            length = skill.lengths[0]
            if length <= config.sequence_length:
                rng = np.random.default_rng([1, answers.STREAMS["evaluate"]])
                share, error = answers.accuracy(model, skill, PROBED_ROWS, rng, length)
                found.append(dict(name=name, accuracy=share, standard_error=error, chance=skill.chance_accuracy))
    return found


def make_card(text: str, full: bool, folder: Path, jobs: int) -> dict:
    """
    The card of an arm, or of a checkpoint's part, as JSON values: name, arm, full, threshold, factors, rows as
    summarize() gives them, probes as probe() does. RunError for what cannot be read, built or trained.
    """
    name, probes = text, []
    if text.endswith(".pt") or Path(text).is_file():
        saved = read_checkpoint(find_checkpoint(text))
        config = config_from(saved["config"], text)
        text = describe_arm(config)
        probes = probe(saved, config)
    arm = make_arm(text)
    plan = list_trials(arm, full)
    results = complete_runs(arm, plan, folder, jobs)
    return dict(name=name, arm=text, full=full, threshold=THRESHOLD, factors=list(FACTORS),
                rows=summarize(plan, results), probes=probes)


def print_card(card: dict):
    """The card for people."""
    if card["name"] == card["arm"]:
        print(f"{card['name']}: skills of a small model")
    else:
        print(f"{card['name']}: skills of a small model, trained from scratch as the arm {card['arm']}")
    rates = ", ".join(f"{factor:g}" for factor in card["factors"])
    print(f"learnt: accuracy of at least {card['threshold']:g}; runs: learning rates x {rates}, and seeds; a run ends "
          "when it has learnt")
    print(format_table(card["rows"]))
    for result in card["probes"]:
        print(f"the checkpoint itself, {result['name']}: accuracy {result['accuracy']:.3f} +- "
              f"{result['standard_error']:.3f}, chance {result['chance']:.3f}")
    print(flush=True)


# ---- The command ------------------------------------------------------------


def run(argv: list[str] | None):
    """Print the cards that a command line asks for."""
    parser = Parser(prog="skills.py", description=__doc__)
    parser.add_argument("arms", nargs="+", metavar="ARM_OR_CHECKPOINT", help="what a card is made of")
    parser.add_argument("--full", action="store_true", help="5 seeds, more steps, recall of 32 pairs")
    parser.add_argument("--jobs", type=int, default=min(2, count_cores()), help="runs at a time")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder of finished runs")
    parser.add_argument("--json", action="store_true", help="one object a card, a line each, on stdout")
    options = parser.parse_args(argv)
    check_option(options, "jobs", 1, count_cores())
    for text in options.arms:
        card = make_card(text, options.full, options.output, options.jobs)
        if options.json:
            print(json.dumps(card), flush=True)
        else:
            print_card(card)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    return run_script("skills.py", lambda: run(argv), "interrupted; finished runs are kept, call it again to go on")


if __name__ == "__main__":
    sys.exit(main())
