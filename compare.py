"""
Head to head: arms x seeds, in turn on one machine, and a verdict with statistics.

    python compare.py baseline swiglu_mlp "parallel_residual:layers=0-1" --track cpu
    python compare.py baseline my_mlp --until-decided --max-seeds 24 --margin 0.005
    python compare.py baseline "swiglu_mlp --lr_matrix 0.02" --budget time --sweep 0.5,1,2 -- --steps 500
    python compare.py --add-arm my_other_mlp comparisons/FOLDER
    python compare.py FOLDER [FOLDER ...]

- An arm is "baseline" or variants joined by +, with options of train_gpt.py after them; the first arm is what the
  others are compared with. Options after -- go to every arm. An arm named again is run on seeds of its own: the
  baseline against itself calibrates the whole pipeline.
- Before the first run every arm is tried for causality and for the isolation of documents; an arm that looks ahead
  stops the comparison.
- Runs take turns, A B C A B C. Runs of one seed share the order of the data and the initial tensors of equal names;
  every run is a process of its own. --jobs starts the runs of a turn together.
- The verdict is better, worse, equivalent within a margin or undecided, by a t test over pairs of equal seeds
  (records/statistics.py has the rule).
- --until-decided looks at the pairs again and again, by a design that allows for it (records/sequential.py); an arm
  that is decided gets no more runs. Otherwise more seeds afterwards are refused: adding runs until a difference is
  significant finds one where there is none.
- --budget tokens: equal tokens. --budget time: equal seconds of training; each arm's schedule follows the clock.
- --sweep: every arm tries its learning rates times these factors on other seeds than the reported ones, and keeps the
  best.
- Stop it in any way and call it again: finished runs are kept, a run under way goes on from its checkpoint. A run that
  fails or hangs is reported, and the others go on.
- A finished run of another comparison is taken over where code, settings, seed, data and machine are the same, so that
  an edited variant alone is trained again. The report names such runs, does not compare their times, and counts the
  results that had been seen.
- Compiled code is shared by the seeds of an arm through PyTorch's cache on disk; compilation is outside every clock and
  reported apart.
- Folders instead of arms (comparisons, records, or one folder of logs for each arm): the verdict on finished runs.
- --json: one object on stdout, all else on stderr. The exit code is 0 whatever the verdict, 1 for a fault.

The report: README.md, report.html, curves.png, results.json and all logs, in the folder of -o.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() has its own handler: a stopped import says nothing

# The trainer first: it bounds, for this process and for the runs, how long OpenMP's waiting threads spin, which torch
# reads when it is loaded.
from train_gpt import (
    RANGES,
    STOPPING,
    Config,
    RunError,
    adopt_vocabulary,
    compile_mode,
    parse_config,
    read_json,
    require,
    say,
    sha256_of_text,
    write_atomically,
)

# isort: split
import torch

import variants
from records.arms import merge_arms, rule_settings
from records.fields import COUNT, DESIGN, POSITIVE, SHARE, Maybe, check_text, read_fields
from records.identity import (
    ROOT,
    data_identity,
    digest_of,
    machine_facts,
    module_file,
    names_a_file,
    ranks_of,
    source_of,
)
from records.ledger import close_entry, describe, open_entry
from records.processes import Interrupt, Interrupted, Process, wait_for
from records.report import console_table, sentences, write_report
from records.results import add_autopsies, check_scored, outcome_of, summarize
from records.runs import Run, read_run
from records.sequential import LOOKS, look_at, looks_until, make_design
from records.spreads import describe_power
from records.statistics import ALPHA, PAIRS

COMPARISONS = Path("comparisons")  # where comparisons lie unless -o says otherwise, and finished runs are looked for
# Options that this script sets for every run.
RESERVED = {"seed", "run_id", "log_dir", "resume", "save", "time_budget", "dry_run"}
# Of a configuration: what says nothing about the result of a run. Data and machine are compared by what they are, not
# by their names.
NO_RESULT = {
    "run_id", "log_dir", "resume", "save", "checkpoint_seconds", "keep_every", "keep_losses", "dry_run", "data",
    "device",
}
RATES = ("lr_matrix", "lr_embed", "lr_head", "lr_scalar")
# The first seeds of runs that are not reported.
SWEEP_SEED = 1_000_001
BUDGET_SEED = 2_000_001


@dataclass
class Arm:
    """One side of the comparison."""

    index: int              # its place on the command line
    name: str               # as given, numbered where it is given again
    variant: list[str]      # [] for the baseline
    options: list[str]      # of train_gpt.py, the arm's own
    seeds: list[int]        # of the reported runs

    @property
    def readable(self) -> str:
        return re.sub(r"[^A-Za-z0-9_.=]+", "-", self.name)[:40].strip("-.")

    @property
    def slug(self) -> str:
        """The beginning of its runs' file names. The index tells arms apart whose names look alike."""
        return f"A{self.index}-{self.readable}"


@dataclass
class Job:
    """One run."""

    name: str               # of its files, without their endings
    arm: Arm
    seed: int
    options: list[str]      # of train_gpt.py, that only this run has


# The exit codes of a run that a signal stopped.
STOPPED = [code for number in STOPPING for code in (-number, 128 + number)]


# ---- What was asked for

def parse_arms(texts: list[str], seeds: int, shared: list[str]) -> list[Arm]:
    """
    The arms of a command line, each tried on the trainer's own parser and the variants' loader. RunError names the arm.
    """
    arms = []
    times = {}  # an arm's text: how often it came before
    for index, text in enumerate(texts):
        again = times.get(text, 0)
        times[text] = again + 1
        arms.append(parse_arm(text, index, again, seeds, shared))

    require(len(arms) > 1,
            f"one arm, {texts[0]!r:.200}, has nothing to be compared with; name two or more. The first is what the "
            "others are compared with; an arm that is named twice shows the noise")
    return arms


def parse_arm(text: str, index: int, again: int, seeds: int, shared: list[str]) -> Arm:
    """
    The arm of one text, which stands at a place of the command line and came `again` times before. RunError names it.
    """
    # its words
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RunError(f"arm {text!r:.200}: {error}; close its quotation marks") from None
    require(words and not words[0].startswith("-"),
            f"arm {text!r:.200} does not begin with a name; write baseline or a variant, then its options")

    # an arm that is given again has a name and seeds of its own
    name = f"{text} ({again + 1})" if again else text
    variant = [] if words[0] == "baseline" else [words[0]]
    arm = Arm(index, name, variant, words[1:], [again * seeds + n for n in range(1, seeds + 1)])
    require(arm.seeds[-1] < SWEEP_SEED,
            f"arm {text!r:.200} is given too often: its seeds would pass {SWEEP_SEED}; lower --seeds")

    # whether the trainer and the loader take it
    try:
        config = parse_options(trainer_options(arm, shared))
        variants.plan(config.variant, config)
    except RunError as error:
        raise RunError(f"arm {text!r:.200}: {error}") from None
    except SystemExit:
        raise RunError(f"arm {text!r:.200}: train_gpt.py does not take these options: "
                       f"{shlex.join(shared + words[1:])} (its message is above)") from None
    return arm


def trainer_options(arm: Arm, shared: list[str]) -> list[str]:
    """The arm's whole command line but for a run's own. RunError for what this script sets itself."""
    options = [*shared, *arm.options]
    names = [word[2:].partition("=")[0].removeprefix("no-") for word in options if word.startswith("--")]
    for name in sorted(RESERVED & {name.replace("-", "_") for name in names}):
        raise RunError(f"--{name} is set for every run; leave it out")
    return [*options, "--variant", *arm.variant] if arm.variant else options


@cache
def parse_once(options: tuple[str, ...]) -> Config:
    return parse_config(list(options))


def parse_options(options: list[str]) -> Config:
    """The trainer's configuration of a command line, parsed once; every call returns one of its own."""
    return replace(parse_once(tuple(options)))


def rate_options(arm: Arm, shared: list[str], factor: float) -> list[str]:
    """The arm's learning rates times a factor, as options of the trainer. RunError for rates that it refuses."""
    if factor == 1:
        return []
    options = trainer_options(arm, shared)
    config = parse_options(options)
    rates = [word for name in RATES for word in (f"--{name}", f"{getattr(config, name) * factor:.6g}")]
    try:
        parse_options(options + rates)
    except RunError as error:
        raise RunError(f"arm {arm.name!r:.200}, --sweep factor {factor:g}: {error}") from None
    return rates


# ---- plan.json and state.json

PLAN = {
    "arms": [check_text], "options": [check_text], "seeds": COUNT, "budget": str, "seconds": POSITIVE,
    "sweep": [POSITIVE], "sweep_seeds": COUNT, "ranks": COUNT, "jobs": COUNT,
    "alpha": SHARE,                                         # of all arms together
    "margin": Maybe(POSITIVE),                              # nats, within which losses are equivalent
    "until_decided": bool,
    "design": Maybe(DESIGN),                                # of an arm, where it runs until it is decided
    "ledger": Maybe(str),                                   # the file that gave alpha
    "command": check_text, "anyway": bool,
    "source": {str: str},                                   # file: sha256
    "data": {str: {"train": str, "val": {str: str}}}}       # folder of shards: as data_identity() gives it
STATE = {
    "failed": {str: check_text},                            # run: its error
    "order": [{"run": str, "arm": check_text, "seed": COUNT}],  # all that were begun
    "company": {str: COUNT},                                # run: how many were started together, itself included
    "wall_seconds": POSITIVE, "runs_seconds": POSITIVE,
    "durations": {str: [POSITIVE]},                         # arm: seconds of each of its runs, start included
    "reused": {str: {"log": str, "seen": [str]}},           # run: as find_finished() gives them
    "added": [check_text],                                  # arms that were added to the finished comparison
    "faults": {str: [check_text]}}                          # arm: what makes it unsound; [] where it was tried
UNCOMPARED = ("command", "anyway", "jobs")  # of a plan: what another call of it may have otherwise
GIVEN_LATER = ("alpha", "design")           # what a ledger gives when the comparison is opened
REMEDY = "delete its folder, or choose another with -o"


def key_of(plan: dict) -> str:
    """The digest of what two plans must have in common to be one."""
    compared = {name: plan[name] for name in PLAN if name not in UNCOMPARED + GIVEN_LATER}
    return sha256_of_text(json.dumps(compared))


class Comparison:
    """
    A plan and its folder: plan.json is what was asked for and does not change; state.json holds failures, seconds, the
    order of runs and where runs were taken over from. Whether a run is finished is read from its log alone.
    """

    def __init__(self, folder: Path, plan: dict, arms: list[Arm], reuse: Path | None, interrupt: Interrupt):
        self.folder = folder
        self.logs = folder / "logs"
        self.plan = plan            # as PLAN says
        self.arms = arms            # the first is the baseline
        self.reuse = reuse          # folder of other comparisons whose finished runs are taken over, or None
        self.interrupt = interrupt
        self.configs = {}           # (a job's name, its options): the configuration that its log must have
        self.others = {}            # log of another comparison: its JSON, {} where that is not a finished run's
        self.scored = []            # a finished run of this plan; all others must be scored on the same tokens
        self.patience = 0.0         # seconds without a step after which a run counts as hanging; 0: never
        self.entry = None           # of the ledger, where there is one
        self.state = dict(failed={}, order=[], company={}, wall_seconds=0.0, runs_seconds=0.0, durations={}, reused={},
                          added=[], faults={})

    def open(self, retry: bool):
        """
        Make the folder and lock it, or take up what an earlier call left there; alpha is written down in the ledger, if
        there is one. RunError if the folder had another plan, other code or other data.
        """
        self.lock_folder()
        saved = self.folder / "plan.json"
        if saved.exists():
            self.check_plan(read_fields(saved, REMEDY, PLAN))
        if self.plan["ledger"]:
            names = [arm.name for arm in self.arms[1:]]
            self.entry = open_entry(Path(self.plan["ledger"]), key_of(self.plan), self.folder, self.plan["command"],
                                    names)
            self.plan["alpha"] = 2 * self.entry.alpha  # the ledger's is of "better" alone, one side of the test
        if self.plan["until_decided"]:
            share = self.plan["alpha"] / max(1, len(self.arms) - 1)
            self.plan["design"] = make_design(self.plan["seeds"], share, self.plan["margin"] is not None)
        if saved.exists() and (self.folder / "state.json").exists():
            self.state = read_fields(self.folder / "state.json", REMEDY, STATE)
        if retry:
            self.state["failed"] = {}
        self.save(saved, self.plan)

    def open_for_arm(self, name: str, retry: bool):
        """
        Lock the folder of a finished comparison to which this plan adds the arm of this name, and take up its state.
        RunError where it is not finished, or where the plan differs in more than the arm.
        """
        saved = read_fields(self.folder / "plan.json", "give the folder of a comparison", PLAN)
        results = self.folder / "results.json"
        require(results.exists(), f"{self.folder} has no results yet; finish it before an arm is added")
        self.lock_folder()
        self.check_plan(saved | dict(arms=self.plan["arms"], source=self.plan["source"] | saved["source"],
                                     data=self.plan["data"] | saved["data"]))
        self.state = read_fields(self.folder / "state.json", REMEDY, STATE)
        if name not in self.state["added"]:
            self.state["added"].append(name)
        if retry:
            self.state["failed"] = {}
        self.save_state()
        self.save(self.folder / "plan.json", self.plan)

    def lock_folder(self):
        """
        Make the folder and lock it. One process a folder: a run inherits the lock, so that one which outlives its
        killed comparison is waited for, not doubled.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}; choose another folder with -o") from None
        for attempt in range(120):
            self.interrupt.check()
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if attempt == 0:
                    say(f"compare.py: waiting for a run or comparison that still uses {self.folder}")
                time.sleep(0.5)
        raise RunError(f"another comparison uses {self.folder}; wait for it, or stop it, or choose another folder with "
                       "-o")

    def check_plan(self, plan: dict):
        """RunError if the plan that began this folder is another one."""
        remedy = "or choose another folder with -o"
        for name in PLAN:
            require(name in (*UNCOMPARED, *GIVEN_LATER, "source", "data") or self.plan[name] == plan[name],
                    f"{self.folder} holds another plan ({name}: {plan[name]!r:.200}, now {self.plan[name]!r:.200}); "
                    f"repeat its command, {remedy}")
        old = plan["source"]
        new = self.plan["source"]
        changed = [file for file in new | old if new.get(file) != old.get(file)]
        require(not changed, f"{', '.join(changed)} changed since {self.folder} was begun; runs of different code are "
                f"not compared: restore it, {remedy}")
        require(self.plan["data"] == plan["data"], f"the shards of {', '.join(self.plan['data'])} changed since "
                f"{self.folder} was begun; runs on different data are not compared: restore them, {remedy}")

    def save(self, path: Path, content: dict):
        write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))

    def save_state(self):
        self.save(self.folder / "state.json", self.state)

    # ---- runs

    def job(self, arm: Arm, seed: int, kind: str = "", options: list[str] = ()) -> Job:
        return Job(f"{arm.slug}{kind}-seed{seed}", arm, seed, list(options))

    def options(self, job: Job) -> list[str]:
        """The command line of a job without its seed and the names of its files."""
        return [*trainer_options(job.arm, self.plan["options"]), *job.options]

    def config(self, job: Job) -> Config:
        """The configuration that a job's log must have, with the vocabulary that its data give it."""
        key = (job.name, *job.options)
        if key not in self.configs:
            self.configs[key] = replace(parse_options(self.options(job)), seed=job.seed)
            adopt_vocabulary(self.configs[key])
        return self.configs[key]

    def differing_settings(self, config: dict, job: Job) -> list[str]:
        """The settings in which a logged configuration is not the job's, but for what says nothing about the result."""
        expected = json.loads(json.dumps(asdict(self.config(job))))  # a log has lists for tuples
        if expected["compile"] == "auto":
            config = config | dict(compile="auto")  # which a run settles by itself, as its facts say
        names = [name for name in expected | config if name not in NO_RESULT]
        return [name for name in names if name not in config or config[name] != expected.get(name)]

    def read(self, job: Job) -> Run | None:
        """
        The job's run if it is finished. RunError for a finished log that is altered, or of other settings or code than
        the job's.
        """
        log = self.logs / f"{job.name}.txt"
        if not log.exists():
            return None
        try:
            run = read_run(log)
        except RunError as error:
            # not cut off by a stop: somebody changed it, and it must not be run again in silence
            if json_facts(log).get("status") == "finished":
                raise RunError(f"{error}; a finished run's log was altered: restore it, or delete {log.name} and "
                               f"{log.stem}.json to run it again") from None
            return None
        if not run.finished:
            return None

        # whether it is the job's
        remedy = f"delete {log.name} and {log.stem}.json to run it again, or choose another folder with -o"
        for name in self.differing_settings(run.config, job):
            raise RunError(f"{log} is no run of arm {job.arm.name!r:.200}: its {name} is "
                           f"{run.config.get(name)!r:.200}; {remedy}")
        for module, digest in run.code.items():
            file = str((module_file(module) or ROOT / module).relative_to(ROOT))
            require(self.plan["source"].get(file, digest) == digest,
                    f"{log} ran another {file} than this comparison; {remedy}")
        return run

    def execute(self, turns: list[list[Job]], done: int, total: int):
        """
        Do what is not yet done of the turns, one after the other. done and total: runs of the whole plan, for the
        progress line.
        """
        for batch in self.batches(turns):
            self.interrupt.check()
            missing = []
            for number, job in enumerate(batch, done + 1):
                if self.read(job) is None and job.name not in self.state["failed"]:
                    log = self.take_over(job)
                    if log:
                        say(f"run {number}/{total}: {job.arm.name}, seed {job.seed}: taken over from {log}")
                    else:
                        missing.append((number, job))
            if missing:
                self.run(missing, total)
            done += len(batch)
            for run in filter(None, map(self.read, batch)):
                self.scored = self.scored or [run]
                check_scored([*self.scored, run])

    def batches(self, turns: list[list[Job]]) -> Iterator[list[Job]]:
        """The jobs that are started together: as many turns as there is room for, or the pieces of one turn."""
        most = self.plan["jobs"]
        together = max(1, most // max(map(len, turns), default=1))
        for start in range(0, len(turns), together):
            jobs = [job for turn in turns[start:start + together] for job in turn]
            for first in range(0, len(jobs), most):
                yield jobs[first:first + most]

    def command(self, job: Job) -> list[str]:
        """The command line of a job's process. What a run without a checkpoint left behind is deleted."""
        words = [sys.executable]
        if self.plan["ranks"] > 1:
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.plan['ranks']}"]
        words += [str(ROOT / "train_gpt.py"), *self.options(job)]
        words += ["--seed", str(job.seed), "--run_id", job.name, "--log_dir", str(self.logs)]

        # go on, or begin
        log = self.logs / f"{job.name}.txt"
        checkpoint = self.logs / f"{job.name}.pt"
        if checkpoint.exists() and log.exists():
            return [*words, "--resume", str(checkpoint)]
        for path in (log, log.with_suffix(".json"), checkpoint):
            path.unlink(missing_ok=True)
        return words

    def run(self, missing: list[tuple[int, Job]], total: int):
        """
        Train runs of the plan, given with their numbers, at the same time, each from its start or its checkpoint. A
        fault of one is noted, and the others go on. RunError if code changed since the comparison began.
        """
        changed = [file for file, digest in self.plan["source"].items() if digest_of(ROOT / file) != digest]
        require(not changed, f"{', '.join(changed)} changed while its comparison was under way; restore it and call "
                "again")
        for number, job in missing:
            say(f"run {number}/{total}: {job.arm.name}, seed {job.seed}")
            self.state["reused"].pop(job.name, None)  # a log that was to be taken over and is not there
            self.state["company"][job.name] = len(missing)
            if job.name not in [entry["run"] for entry in self.state["order"]]:
                self.state["order"].append(dict(run=job.name, arm=job.arm.name, seed=job.seed))
        self.save_state()

        # train, and show what the runs say
        started = []
        try:
            try:
                for slot, (number, job) in enumerate(missing):
                    progress = Progress(job, number - 1, total, self.state, len(missing) > 1)
                    process = Process(
                        self.command(job), self.logs / f"{job.name}.out", self.logs / f"{job.name}.txt", progress.show,
                        environment=self.environment(slot), lock=self.lock.fileno(), patience=self.patience)
                    started.append((job, process, progress))
                    self.interrupt.started(process.child)
            finally:
                wait_for([process for _, process, _ in started], self.interrupt)
        except OSError as error:
            raise RunError(f"run {missing[0][1].name} cannot go on: {error.strerror or error}; finished runs are kept, "
                           "call this again") from None
        finally:
            self.state["runs_seconds"] += sum(process.seconds or 0.0 for _, process, _ in started) / len(missing)

        # note what came of them
        stopped = None
        for job, process, progress in started:
            stopped = self.note(job, process, progress) or stopped
        self.save_state()
        self.interrupt.check()
        require(not stopped, f"run {stopped} was stopped from outside; call this again to go on")

    def note(self, job: Job, process: Process, progress: "Progress") -> str | None:
        """Note what came of a run that has ended; returns its name if a signal from outside stopped it."""
        run = self.read(job)
        if run is not None:
            (self.logs / f"{job.name}.out").unlink()
            (self.logs / f"{job.name}.pt").unlink(missing_ok=True)
            self.state["durations"].setdefault(job.arm.name, []).append(process.seconds)
        elif not process.fault and self.interrupt.number is not None:
            return None
        elif not process.fault and process.child.returncode in STOPPED:
            return job.name
        else:
            error = process.fault or re.sub(r"^train_gpt\.py: error: ", "", process.last) or "no message"
            self.state["failed"][job.name] = (f"{error} (exit code {process.child.returncode}; all of its output: "
                                              f"logs/{job.name}.out)")
        progress.end(run, self.state["failed"].get(job.name), process.seconds)
        return None

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of a run: where several run at once on GPUs, each sees its own."""
        here = dict(os.environ)
        if self.plan["jobs"] > 1 and torch.cuda.is_available():
            names = here.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if names == [""]:
                names = list(map(str, range(torch.cuda.device_count())))
            ranks = self.plan["ranks"]
            here["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * ranks:(slot + 1) * ranks])
        return here

    # ---- runs of other comparisons

    def take_over(self, job: Job) -> str:
        """
        Copy the log of a finished run of another comparison that is the job's in all that its loss depends on. Returns
        where from, or "".
        """
        source, seen = self.find_finished(job)
        if source is None:
            return ""
        try:
            earlier = read_fields(source.parent.parent / "state.json", REMEDY, STATE)["reused"]
        except RunError:
            earlier = {}
        # The note is first: a log that is here without it would count as a run of this comparison.
        origin = earlier[source.stem]["log"] if source.stem in earlier else str(source)
        self.state["reused"][job.name] = dict(log=origin, seen=seen)
        self.save_state()
        for kind in (".losses.npz", ".json", ".txt"):
            file = source.with_suffix(kind)
            if file.exists():
                content = file.read_bytes()
                write_atomically(self.logs / (job.name + kind), lambda file, content=content: file.write(content))
        return origin

    def find_finished(self, job: Job) -> tuple[Path | None, list[str]]:
        """(log of another comparison's run that is the job's, or None; the comparisons with it that had results)."""
        config = self.config(job)
        if self.reuse is None or self.plan["budget"] == "time" or names_a_file(config):
            return None, []
        source = None
        seen = []
        for log in sorted(self.reuse.glob(f"*/logs/*-seed{job.seed}.txt")):
            if log.parent.resolve() != self.logs.resolve() and self.is_same_run(log, job, config):
                source = source or log
                if (log.parent.parent / "results.json").exists():
                    seen.append(log.parent.parent.name)
        return source, sorted(set(seen))

    def is_same_run(self, log: Path, job: Job, config: Config) -> bool:
        """
        Whether a log is of a finished run with the job's settings, seed, data, code and machine. A damaged folder holds
        none.
        """
        facts = self.other_facts(log)
        if not facts or self.differing_settings(facts["config"], job):
            return False
        try:
            run = read_run(log)
            plan = read_fields(log.parent.parent / "plan.json", REMEDY, PLAN)
        except RunError:
            return False
        if not run.finished or self.differing_settings(run.config, job) or not run.code:
            return False
        data = self.plan["data"][config.data]
        if run.val_sha256 != data["val"] or plan["data"].get(run.config.get("data"), {}).get("train") != data["train"]:
            return False
        files = {module: module_file(module) for module in run.code}
        if any(file is None or digest_of(file) != run.code[module] for module, file in files.items()):
            return False
        machine = self.machine(config)
        return all(run.facts.get(name) == value for name, value in machine.items())

    def other_facts(self, log: Path) -> dict:
        """The JSON beside a log of another comparison, read once; {} where it is no finished run's."""
        if log not in self.others:
            facts = json_facts(log)
            usable = facts.get("status") == "finished" and isinstance(facts.get("config"), dict)
            self.others[log] = facts if usable else {}
        return self.others[log]

    def machine(self, config: Config) -> dict:
        """What a run of this configuration would log of the machine that it runs on."""
        ranks = ranks_of(config.device, self.plan["ranks"])
        return machine_facts(config.device, config.threads, ranks.world) | dict(compile=compile_mode(config, ranks))

    def expected_seconds(self, jobs: list[Job]) -> tuple[float | None, int]:
        """
        (seconds of training that these runs will take, by earlier runs of the track on this machine; how many those
        are); (None, 0) where there is none.
        """
        if not jobs:
            return 0.0, 0
        track = self.config(jobs[0]).track
        device = self.machine(self.config(jobs[0]))["device"]

        # earlier runs
        rates = {}  # variant, and variant with sizes: (seconds a token, seconds of warm-up) of each
        every = []  # these pairs of all runs
        for log in sorted((self.reuse or COMPARISONS).glob("*/logs/*.txt")):
            facts = self.other_facts(log)
            if facts and facts["config"].get("track") == track and facts.get("device") == device:
                tokens = facts.get("tokens_per_second")
                seconds = facts.get("warmup_seconds")
                if all(isinstance(value, int | float) and value > 0 for value in (tokens, seconds)):
                    for key in cost_keys(facts["config"]):
                        rates.setdefault(key, []).append((1 / tokens, seconds))
                    every.append((1 / tokens, seconds))
        if not every:
            return None, 0

        # these runs
        total = 0.0
        for config in map(self.config, jobs):
            pairs = next((rates[key] for key in cost_keys(asdict(config)) if key in rates), every)
            token, warm_up = (sum(column) / len(pairs) for column in zip(*pairs))
            total += (config.time_budget or token * config.steps * config.batch_tokens) + warm_up
        return total, len(every)

    # ---- the plan

    def check_arms(self):
        """
        Try every arm once for causality and the isolation of documents, in seconds and before the first run. RunError
        names an arm that fails, unless the plan goes on anyway.
        """
        for arm in self.arms:
            self.interrupt.check()
            if arm.name not in self.state["faults"]:
                self.state["faults"][arm.name] = self.find_faults(arm)
                self.save_state()
            faults = [" ".join(fault.split()) for fault in self.state["faults"][arm.name]]
            require(not faults or self.plan["anyway"], f"arm {arm.name!r:.200} is not sound: {'; '.join(faults)}. Mend "
                    "it, or add --anyway: the report will say so")

    def find_faults(self, arm: Arm) -> list[str]:
        """What makes an arm unsound, which is known where an arm of the same settings was tried. RunError names it."""
        from variants.check import faults_of  # not needed by a call that only shows its help
        for other in self.arms:
            if other.name in self.state["faults"] and (other.variant, other.options) == (arm.variant, arm.options):
                return self.state["faults"][other.name]
        try:
            return faults_of(self.config(self.job(arm, arm.seeds[0])))
        except RunError as error:
            raise RunError(f"arm {arm.name!r:.200}: {error}") from None

    def budget(self) -> float:
        """
        Seconds of training an arm: as given, else what the first arm takes for its tokens, on a seed that is not
        reported.
        """
        if self.plan["seconds"]:
            return self.plan["seconds"]
        job = self.job(self.arms[0], BUDGET_SEED, "-budget")
        self.execute([[job]], 0, 1 + self.total())
        run = self.read(job)
        require(run is not None,
                f"the run that measures the time budget failed: {self.state['failed'].get(job.name)}; give --seconds, "
                "or mend it and add --retry")
        return run.train_ms / 1000

    def total(self) -> int:
        return len(self.arms) * (self.plan["seeds"] + len(self.plan["sweep"]) * self.plan["sweep_seeds"])

    def sweep(self, common: list[str]) -> dict | None:
        """
        Every arm's learning rates by their factors: {arm: dict(tries=[dict(factor, seeds, losses)], chosen)}; None
        without --sweep.
        """
        if not self.plan["sweep"]:
            return None
        seeds = [SWEEP_SEED + n for n in range(self.plan["sweep_seeds"])]
        jobs = {(arm.name, factor, seed): self.job(arm, seed, f"-lr{factor!r}", common + self.rates(arm, factor))
                for seed in seeds for factor in self.plan["sweep"] for arm in self.arms}
        count = len(self.arms)
        every = list(jobs.values())
        self.execute([every[start:start + count] for start in range(0, len(every), count)], 0, self.total())

        # the best of each arm, of the rates that no seed failed with
        result = {}
        for arm in self.arms:
            tries = []
            for factor in self.plan["sweep"]:
                runs = [self.read(jobs[arm.name, factor, seed]) for seed in seeds]
                losses = [run.val_loss if run else None for run in runs]
                tries.append(dict(factor=factor, seeds=seeds, losses=losses))
            complete = [attempt for attempt in tries if None not in attempt["losses"]]
            if not complete:
                names = [jobs[arm.name, factor, seed].name for factor in self.plan["sweep"] for seed in seeds]
                failed = [self.state["failed"][name] for name in names if name in self.state["failed"]]
                raise RunError(f"every learning rate of arm {arm.name!r} failed: {failed[0]}")
            best = min(complete, key=lambda attempt: sum(attempt["losses"]))
            result[arm.name] = dict(tries=tries, chosen=best["factor"])
        return result

    def rates(self, arm: Arm, factor: float) -> list[str]:
        return rate_options(arm, self.plan["options"], factor)

    def reported(self, common: list[str], sweep: dict | None) -> list[list[Job]]:
        """The reported runs of each arm, in its seeds' order."""
        rates = [self.rates(arm, sweep[arm.name]["chosen"]) if sweep else [] for arm in self.arms]
        return [[self.job(arm, seed, options=common + options) for seed in arm.seeds]
                for arm, options in zip(self.arms, rates)]

    def show(self):
        """
        Print the plan, what is done of it, how long the rest will take and what it can find. Runs nothing and writes
        nothing.
        """
        seconds = self.plan["seconds"]
        measured = self.plan["budget"] == "time" and not seconds  # the first arm says how many seconds
        jobs = [job for turn in zip(*self.reported(self.time_options(seconds), None)) for job in turn]
        before = self.total() - len(jobs) + measured
        if before:
            purpose = "the learning rates" if self.plan["sweep"] else "the time budget"
            say(f"first, on other seeds for {purpose}: {before} runs, on which what follows depends")

        # the reported runs
        missing = []
        for number, job in enumerate(jobs, 1):
            source = None if before else self.find_finished(job)[0]
            what = "to be trained"
            if not before and self.read(job):
                what = "finished"
            elif source:
                what = f"taken over from {source}"
            else:
                missing.append(job)
            say(f"{number:>5}  {job.arm.name}, seed {job.seed}: {what}")

        # how long it will take
        if self.plan["until_decided"]:
            looks = looks_until(self.plan["seeds"])
            say(f"looks after {', '.join(map(str, looks))} pairs; an arm that is decided gets no more runs")
        expected, runs = self.expected_seconds(missing[:1] if measured else missing)
        if expected is None:
            say("expected time: not known; there is no earlier run of this track on this machine")
        else:
            each = expected / (1 if measured else max(1, len(missing)))
            total = duration(each * (len(missing) + before) / self.plan["jobs"])
            say(f"expected time: {'at most ' if self.plan['until_decided'] else ''}{total}, by {runs} earlier runs of "
                "this track on this machine")

        # what it can find
        track = self.config(self.job(self.arms[0], self.arms[0].seeds[0])).track
        for line in describe_power(track, self.plan, len(self.arms) - 1, self.reuse or COMPARISONS):
            say(line)

    def time_options(self, seconds: float | None) -> list[str]:
        """The options of runs that have so many seconds; none for runs with equal tokens."""
        return ["--time_budget", f"{seconds:.3f}"] if seconds else []

    def compare(self, log_x: bool = False) -> dict:
        """Everything: budget, sweep, the reported runs, the report (log_x: of its picture). Returns the results."""
        begun = time.perf_counter()
        try:
            self.check_arms()
            seconds = self.budget() if self.plan["budget"] == "time" else None
            common = self.time_options(seconds)
            sweep = self.sweep(common)
            jobs = self.reported(common, sweep)
            before = self.total() - sum(map(len, jobs))
            if self.plan["until_decided"]:
                jobs = self.run_until_decided(jobs, before)
            else:
                self.execute(list(map(list, zip(*jobs))), before, self.total())
        finally:
            self.state["wall_seconds"] += time.perf_counter() - begun
            self.save_state()
        results = self.results(jobs, seconds, sweep)
        write_report(self.folder, results, log_x)
        if self.entry:
            self.close_ledger(results)
        return results

    def run_until_decided(self, jobs: list[list[Job]], before: int) -> list[list[Job]]:
        """
        Run and look, look after look, until every arm is decided or has all its runs. Returns each arm's jobs up to its
        last look. before: runs of the plan that precede these.
        """
        design = self.plan["design"]
        margin = self.plan["margin"]
        reported = [[] for _ in jobs]   # what each arm ran
        active = list(range(1, len(jobs)))
        for n in design["looks"]:
            # the baseline and the arms that are not decided
            sides = [0, *active]
            turns = [[jobs[side][k] for side in sides] for k in range(len(reported[0]), n)]
            done = before + sum(map(len, reported))
            self.execute(turns, done, done + sum(len(jobs[side]) - len(reported[side]) for side in sides))
            for side in sides:
                reported[side] = jobs[side][:n]

            # a look at each of them
            baseline = {job.seed: self.read(job) for job in reported[0]}
            for side in list(active):
                runs = [self.read(job) for job in reported[side]]
                differences = [run.val_loss - baseline[run.seed].val_loss for run in runs
                               if run and baseline[run.seed]]
                word = look_at(differences, n, design, margin)
                if word or not any(runs):
                    active.remove(side)
                    say(f"{self.arms[side].name}: {word or 'no run of it finished'} after {n} pairs")
            if not active:
                break
        return reported

    def close_ledger(self, results: dict):
        """
        Write down in the ledger what came of each arm of this comparison. It stays open where an arm has no result:
        --retry may still give it one.
        """
        if all(arm["vs_baseline"] for arm in results["arms"][1:]):
            words = {arm["name"]: arm["vs_baseline"]["loss"]["verdict"] for arm in results["arms"][1:]}
            close_entry(Path(self.plan["ledger"]), self.entry.id, words)
        for line in describe(Path(self.plan["ledger"])):
            say(line)

    def results(self, jobs: list[list[Job]], seconds: float | None, sweep: dict | None) -> dict:
        """What the report says, as summarize gives it, of the reported jobs of each arm."""
        plan = self.plan
        state = self.state
        arms = []
        for arm, arm_jobs in zip(self.arms, jobs):
            runs = [self.read(job) or dict(seed=job.seed, error=state["failed"].get(job.name, "not finished"))
                    for job in arm_jobs]
            arms.append(dict(name=arm.name, variant=arm.variant, options=arm.options, runs=runs,
                             faults=state["faults"].get(arm.name, [])))

        # what the reader must know beside it
        reported = {job.name: job for arm_jobs in jobs for job in arm_jobs}
        reused = [dict(arm=job.arm.name, seed=job.seed, **state["reused"][name])
                  for name, job in reported.items() if name in state["reused"]]
        order = [[entry["arm"], entry["seed"]] for entry in state["order"] if entry["run"] in reported]
        company = [[job.arm.name, job.seed, state["company"][name]] for name, job in reported.items()
                   if state["company"].get(name, 1) > 1]
        config = self.config(jobs[0][0])
        wall = state["wall_seconds"]
        trained = state["runs_seconds"]
        rule = rule_settings(config.track, plan["margin"])
        rule |= {name: plan[name] for name in ("alpha", "design", "ledger")}
        settings = rule | dict(
            track=config.track, target=config.target, seeds=sorted({job.seed for job in reported.values()}),
            budget=plan["budget"], budget_seconds=seconds, command=plan["command"], order=order, company=company,
            sweep=sweep, tried=len(self.arms), reused=reused, added=state["added"],
            overhead=dict(wall_seconds=wall, runs_seconds=trained, share=wall / trained - 1 if trained else None))
        results = summarize(settings, arms)
        add_autopsies(results, arms)
        return results


def cost_keys(config: dict) -> list[str]:
    """What runs of equal cost have in common, the nearest first: variant and sizes, then the variant alone."""
    variant = list(config.get("variant") or [])
    sizes = [config.get(name) for name in ("layers", "model_dim", "mlp_hidden", "sequence_length")]
    return [json.dumps([variant, *sizes]), json.dumps(variant)]


def json_facts(log: Path) -> dict:
    """The JSON beside a log; {} where there is none."""
    try:
        return read_json(log.with_suffix(".json"), "")
    except RunError:
        return {}


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f}:{seconds % 3600 / 60:02.0f} h"


class Progress:
    """
    The line of one run in the whole plan: on a terminal rewritten in place, elsewhere or beside others every half
    minute.
    """

    def __init__(self, job: Job, done: int, total: int, state: dict, several: bool):
        self.job = job
        self.done = done                        # runs of the plan before this one
        self.total = total                      # runs of the plan
        self.state = state                      # of the comparison, as STATE says
        self.several = several                  # whether others run at the same time
        self.terminal = sys.stdout.isatty() and not several
        self.start = time.perf_counter()
        self.shown = self.start                 # when the line was last shown

    def show(self, line: str):
        """Show a line of the run's output that tells its step, unless the last one is too recent."""
        now = time.perf_counter()
        step = re.match(r"step (\d+)/(\d+) ", line)
        if not step or now - self.shown < (0 if self.terminal else 30):
            return
        self.shown = now
        share = int(step[1]) / max(int(step[2]), 1)  # of this run
        known = [seconds for durations in self.state["durations"].values() for seconds in durations]
        known = known or [(now - self.start) / max(share, 0.01)]
        left = sum(known) / len(known) * (self.total - self.done - share)
        text = f"  {line} | plan {100 * (self.done + share) / self.total:.0f} %, {duration(left)} left"
        if self.terminal:
            say(f"\r\033[K{text}", end="")
        else:
            say(f"  {self.job.name}:{text}" if self.several else text)

    def end(self, run: Run | None, error: str | None, seconds: float):
        result = f"  failed: {error}"
        if run:
            training = run.train_ms / 1000
            result = f"  val_loss {run.val_loss:.4f} in {training:.1f} s of training, {seconds:.1f} s in all"
        if self.several:
            result = f"  {self.job.name}:{result}"
        say(f"\r\033[K{result}" if self.terminal else result)


def numbers(text: str) -> list[float]:
    """Factors of the command line."""
    return [float(factor) for factor in text.split(",")]


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this script's arguments, those after -- for the trainer). RunError for values outside their ranges."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="ARM", help='"baseline", or variants joined by +, and options of '
                        "train_gpt.py; the first is what the others are compared with. Or folders of finished runs")
    plan = parser.add_argument_group("what is compared")
    plan.add_argument("--track", default=Config.track, help="of train_gpt.py (default: %(default)s)")
    plan.add_argument("--seeds", type=int, help=f"reported runs an arm (default: 6; a verdict needs {PAIRS})")
    plan.add_argument("--until-decided", action="store_true",
                      help="look at the pairs on the way, and give no more runs to an arm that is decided")
    plan.add_argument("--max-seeds", type=int, help="runs an arm under --until-decided, at most (default: 24)")
    plan.add_argument("--margin", type=float, metavar="NATS", help="differences that are smaller are equivalent "
                      "(default: 0.5 %% of the track's target)")
    plan.add_argument("--ledger", type=Path, metavar="FILE", help="take the error of the verdict from the budget of "
                      "this ledger, which is made where there is none (default: 0.01 for each comparison)")
    plan.add_argument("--budget", choices=("tokens", "time"), default="tokens",
                      help="what is equal (default: %(default)s)")
    plan.add_argument("--seconds", type=float, default=0.0, help="of training a run under --budget time (default: what "
                      "the first arm takes for its tokens, measured once)")
    plan.add_argument("--sweep", type=numbers, default=[], metavar="FACTORS",
                      help="of all learning rates that every arm tries first, such as 0.5,1,2 (default: none)")
    plan.add_argument("--sweep-seeds", type=int, default=1, help="runs for each of them (default: %(default)s)")

    how = parser.add_argument_group("how it is run")
    how.add_argument("--ranks", type=int,
                     help="processes a run (default: all GPUs, shared by the jobs)")
    how.add_argument("--jobs", type=int, default=1, help="runs at the same time, each with its share of the GPUs or "
                     "cores (default: %(default)s)")
    how.add_argument("--hang-seconds", type=float, default=120.0, metavar="S", help="stop a run that does no step for "
                     "ten times its usual step, and for this long at least; 0: never (default: %(default)g)")
    how.add_argument("--dry-run", action="store_true",
                     help="show the plan, what of it is done and the time it will take (default: run it)")
    how.add_argument("--add-arm", metavar="ARM", help="train another arm for the finished comparison whose folder is "
                     "given, with the seeds, settings and data of its runs")
    how.add_argument("--retry", action="store_true", help="run failed runs again (default: they stay failed)")
    how.add_argument("--anyway", action="store_true",
                     help="go on with an arm that looks ahead; the report says so (default: stop)")
    how.add_argument("--reuse", type=Path, default=COMPARISONS, metavar="DIR",
                     help="take finished runs over from the comparisons in this folder (default: ./%(default)s)")
    how.add_argument("--no-reuse", dest="reuse", action="store_const", const=None,
                     help="train every run, in turn, so that times are compared, too")

    report = parser.add_argument_group("the report")
    report.add_argument("-o", "--output", type=Path,
                        help="its folder (default: one in ./comparisons that the same command finds again)")
    report.add_argument("--json", action="store_true",
                        help="print the verdict as one JSON object on stdout, all else on stderr")
    report.add_argument("--log-x", action="store_true", help="curves.png with logarithmic axes of tokens and time "
                        "(default: linear; report.html has a switch)")

    # what stands after -- is the trainer's
    cut = argv.index("--") if "--" in argv else len(argv)
    given = parser.parse_args(argv[:cut])
    check_arguments(given)
    return given, argv[cut + 1:]


def check_arguments(given: argparse.Namespace):
    """Settle the defaults that depend on others. RunError for values outside their ranges."""
    # seeds
    require(given.until_decided or given.max_seeds is None,
            f"--max-seeds {given.max_seeds} belongs to --until-decided; add it, or give --seeds")
    require(not given.until_decided or given.seeds is None,
            f"--seeds {given.seeds} and --until-decided exclude each other; give --max-seeds")
    if given.until_decided:
        given.seeds = 24 if given.max_seeds is None else given.max_seeds
        require(LOOKS[0] < given.seeds <= 200,
                f"--max-seeds must be at least {LOOKS[0] + 1} and at most 200, got {given.seeds}")
    given.seeds = 6 if given.seeds is None else given.seeds

    # counts
    devices = torch.cuda.device_count()
    most = max(devices or os.cpu_count() or 1, 1)
    require(1 <= given.jobs <= most, f"--jobs must be at least 1 and at most {most}, got {given.jobs}")
    if given.ranks is None:
        given.ranks = max(1, devices // given.jobs)
    for name, least in dict(seeds=10_000, sweep_seeds=1000, ranks=most).items():
        value = getattr(given, name)
        require(1 <= value <= least,
                f"--{name.replace('_', '-')} must be at least 1 and at most {least:,}, got {value}")
    require(not devices or given.jobs * given.ranks <= devices,
            f"--jobs {given.jobs} with --ranks {given.ranks} need {given.jobs * given.ranks} GPUs, and there are "
            f"{devices}; lower one of them")

    # numbers
    require(given.margin is None or 0 < given.margin <= 100,
            f"--margin must be greater than 0 and at most 100, got {given.margin}")
    longest = RANGES["time_budget"][1]
    require(0 <= given.seconds <= longest,
            f"--seconds must be greater than 0 and at most {longest:,.0f}, got {given.seconds:g}")
    require(not given.seconds or given.budget == "time",
            f"--seconds {given.seconds:g} belongs to --budget time; add it, or leave --seconds out")
    require(0 <= given.hang_seconds <= longest,
            f"--hang-seconds must be at least 0 and at most {longest:,.0f}, got {given.hang_seconds:g}")

    # the folders
    for name, path in dict(output=given.output, reuse=given.reuse).items():
        try:
            usable = path is None or path.is_dir() or not path.exists()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"--{name} {str(path)[:60]!r}: {reason}; choose another folder") from None
        require(usable, f"--{name} {path} is a file; give a folder")

    # the factors
    different = len(given.sweep) == len(set(given.sweep))
    require(all(0 < factor <= 1e6 for factor in given.sweep) and different and len(given.sweep) <= 100,
            f"--sweep takes up to 100 factors, all different, greater than 0 and at most 1,000,000, got "
            f"{given.sweep!r:.100}")


def plan_of(given: argparse.Namespace, options: list[str], argv: list[str]) -> tuple[dict, list[Arm]]:
    """(plan as PLAN describes it, arms) of a command line. RunError for an arm that cannot be run or be compared."""
    shared = ["--track", given.track, *options]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if given.jobs > 1 and not torch.cuda.is_available() and not any(word.startswith("--threads") for word in options):
        shared += ["--threads", str(max(1, cores // (given.jobs * given.ranks)))]
    return make_plan(given, given.arms, shared, argv)


def make_plan(given: argparse.Namespace, texts: list[str], shared: list[str], argv: list[str]
              ) -> tuple[dict, list[Arm]]:
    """plan_of with the arms' texts and the options that all of them have."""
    arms = parse_arms(texts, given.seeds, shared)
    require(not given.until_decided or len(set(texts)) == len(texts),
            "--until-decided looks at pairs of equal seeds, and an arm that is named twice has seeds of its own; give "
            "--seeds instead")
    configs = [parse_options(trainer_options(arm, shared)) for arm in arms]
    for arm, config in zip(arms, configs):
        require(config.val_tokens == configs[0].val_tokens,
                f"arm {arm.name!r:.200} is validated on {config.val_tokens:,} tokens, {arms[0].name!r:.200} on "
                f"{configs[0].val_tokens:,}; give --val_tokens to all of them, after --")
        for factor in given.sweep:
            rate_options(arm, shared, factor)
    data = {config.data: data_identity(config) for config in {config.data: config for config in configs}.values()}
    for folder, identity in data.items():
        require(identity["val"] == data[configs[0].data]["val"],
                f"the arms are validated on different data, {configs[0].data} and {folder}; give --data to all of "
                "them, after --")
    margin = rule_settings(configs[0].track, given.margin)["margin"]
    plan = dict(arms=texts, options=shared, seeds=given.seeds, budget=given.budget, seconds=given.seconds,
                sweep=given.sweep, sweep_seeds=given.sweep_seeds, ranks=given.ranks, jobs=given.jobs, alpha=ALPHA,
                margin=margin, until_decided=given.until_decided, design=None,
                ledger=str(given.ledger) if given.ledger else None,
                source=source_of([text for arm in arms for text in arm.variant]), data=data)
    return plan | dict(command=shlex.join(["python", "compare.py", *argv]), anyway=given.anyway), arms


def plan_with_arm(given: argparse.Namespace, argv: list[str]) -> tuple[Path, dict, list[Arm]]:
    """
    (folder, plan, arms) of a finished comparison with one arm more. RunError where the folder is none, where its
    design cannot take another arm, or where the arm cannot be run or compared.
    """
    require(len(given.arms) == 1, f"--add-arm takes the folder of one comparison, got {len(given.arms)}: "
            f"{', '.join(given.arms)!r:.200}")
    folder = Path(given.arms[0])
    saved = read_fields(folder / "plan.json", "give the folder of a comparison", PLAN)
    for name, reason in dict(until_decided="its error was divided by its arms beforehand",
                             ledger="its error was taken from a ledger for its own arms").items():
        require(not saved[name], f"{folder} takes no other arm: {reason}; begin a comparison of its own, which takes "
                "over the runs that are the same")
    state = read_fields(folder / "state.json", REMEDY, STATE)
    begun = given.add_arm in state["added"]     # an earlier call was stopped, or is repeated
    require(begun or given.add_arm not in saved["arms"],
            f"{folder} has an arm {given.add_arm!r:.200} already; name another")
    names = ("seeds", "budget", "seconds", "sweep", "sweep_seeds", "ranks", "margin", "until_decided", "anyway")
    for name in names:
        setattr(given, name, saved[name])
    given.ledger = None
    texts = saved["arms"] if begun else [*saved["arms"], given.add_arm]
    plan, arms = make_plan(given, texts, saved["options"], argv)
    command = saved["command"] if begun else f"{saved['command']}; {plan['command']}"
    return folder, plan | dict(command=command), arms


def folder_of(plan: dict, arms: list[Arm], track: str) -> Path:
    """The folder of a plan that names none: the same for the same plan, code and data."""
    return COMPARISONS / f"{track}-{'-'.join(arm.readable for arm in arms)[:60]}-{key_of(plan)[:6]}"


# ---- Finished runs

def is_folder(word: str) -> bool:
    """Whether a word of the command line is a folder and not an arm; an arm's name goes before a folder's."""
    known = word == "baseline" or word.partition(":")[0] in variants.available()
    return not known and Path(word).is_dir()


def judge(folders: list[Path], given: argparse.Namespace) -> dict:
    """
    The results of finished runs: of the arms in one folder (a comparison, a record, or a subfolder of logs for each
    arm), or of several, each a comparison or the logs of an arm; the first has the baseline. Written to -o, if that is
    given.
    """
    settings, arms = merge_arms(folders)
    settings = settings | rule_settings(settings.get("track"), given.margin) | dict(tried=len(arms))
    results = summarize(settings, arms)
    add_autopsies(results, arms)
    if given.output:
        write_report(given.output, results, given.log_x)
    return results


def main(argv: list[str] | None = None) -> int:
    """
    Run a command line. Returns the exit code: 0 done, 1 a fault (one line on stderr), 128 + n stopped by signal n.
    """
    argv = sys.argv[1:] if argv is None else argv
    folder = None
    results = None
    begun = time.perf_counter()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without the letters of a variant's name

    with Interrupt() as interrupt, ExitStack() as stack:
        try:
            given, options = parse_arguments(argv)
            if given.json:
                stack.enter_context(redirect_stdout(sys.stderr))
            if all(map(is_folder, given.arms)) and not given.add_arm:
                folder = given.output
                results = judge(list(map(Path, given.arms)), given)
            else:
                comparison = prepare(given, options, argv, interrupt)
                folder = comparison.folder
                results = run_or_show(comparison, given)
            if results:
                show_results(results, folder)
        except RunError as error:
            say(f"compare.py: error: {error}", stream=sys.stderr)
            return 1
        except Interrupted as stop:
            say(f"compare.py: stopped; finished runs are kept, call it again to go on (folder {folder})",
                stream=sys.stderr)
            return 128 + stop.args[0]
    if given.json and results:
        say(json.dumps(outcome_of(results) | dict(
            seconds=round(time.perf_counter() - begun, 3), folder=str(folder) if folder else None)))
    return 0


def prepare(given: argparse.Namespace, options: list[str], argv: list[str], interrupt: Interrupt) -> Comparison:
    """The comparison of a command line, not yet opened. RunError for what cannot be run or compared."""
    if given.add_arm:
        folder, plan, arms = plan_with_arm(given, argv)
    else:
        plan, arms = plan_of(given, options, argv)
        folder = given.output or folder_of(plan, arms, given.track)
    comparison = Comparison(folder, plan, arms, given.reuse, interrupt)
    comparison.patience = given.hang_seconds
    return comparison


def run_or_show(comparison: Comparison, given: argparse.Namespace) -> dict | None:
    """The results of a comparison; None of one that is only shown."""
    most = "at most " if given.until_decided else ""
    title = (f"{len(comparison.arms)} arms x {most}{given.seeds} seeds, {most}{comparison.total()} runs; "
             f"folder {comparison.folder}")
    if given.dry_run:
        say(title)
        comparison.show()
        return None
    if given.add_arm:
        comparison.open_for_arm(given.add_arm, given.retry)
    else:
        comparison.open(given.retry)
    say(title)
    return comparison.compare(given.log_x)


def show_results(results: dict, folder: Path | None):
    """Print what came of it: the sentences first, then the table."""
    lines = [*sentences(results), "", console_table(results)]
    if folder:
        lines += ["", f"report: {folder / 'README.md'} and report.html"]
    say("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
