"""
Head to head: arms x seeds, in turn on one machine, and a verdict with statistics.

    python compare.py baseline swiglu_mlp "parallel_residual:layers=0-1" --track cpu --seeds 3
    python compare.py baseline "swiglu_mlp --lr_matrix 0.02" --budget time --sweep 0.5,1,2 -- --steps 500

- An arm is "baseline" or variants joined by +, with options of train_gpt.py after them; the first arm is what the
  others are compared with. Options after -- go to every arm. An arm named again is run on seeds of its own: the
  baseline against itself calibrates the whole pipeline.
- Before the first run every arm is tried for causality and for the isolation of documents; an arm that looks ahead
  stops the comparison.
- Runs take turns, A B C A B C. Runs of one seed share the order of the data and the initial tensors of equal names;
  every run is a process of its own.
- --budget tokens: equal tokens. --budget time: equal seconds of training; each arm's schedule follows the clock.
- --sweep: every arm tries its learning rates times these factors on other seeds than the reported ones, and keeps the
  best.
- Stop it in any way and call it again: finished runs are kept, a run under way goes on from its checkpoint. More seeds
  afterwards are refused: adding runs until a difference is significant finds one where there is none.
- A finished run of another comparison is taken over where code, settings, seed, data and machine are the same, so that
  an edited variant alone is trained again. The report names such runs, does not compare their times, and counts the
  results that had been seen.
- Compiled code is shared by the seeds of an arm through PyTorch's cache on disk; compilation is outside every clock and
  reported apart.

The report: README.md, report.html, curves.png, results.json and all logs, in the folder of -o.
"""

import argparse
import ast
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
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
    Ranks,
    RunError,
    adopt_vocabulary,
    compile_mode,
    environment,
    find_shards,
    parse_config,
    read_json,
    require,
    say,
    sha256_of_file,
    sha256_of_text,
    write_atomically,
)

# isort: split
import torch

import variants
from records.report import check_scored, console_table, sentences, summarize, write_report
from records.runs import Run, read_run

ROOT = Path(__file__).resolve().parent
COMPARISONS = Path("comparisons")  # where comparisons lie unless -o says otherwise, and finished runs are looked for
# Options that this script sets for every run.
RESERVED = {"seed", "run_id", "log_dir", "resume", "save", "time_budget", "dry_run"}
# Of a configuration: what says nothing about the result of a run. Data and machine are compared by what they are, not
# by their names.
NO_RESULT = {"run_id", "log_dir", "resume", "save", "checkpoint_seconds", "keep_every", "dry_run", "data", "device"}
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


class Interrupted(Exception):
    """A signal; its number is the argument."""


class Interrupt:
    """
    The first signal that asks this script to stop. It is passed on to the run under way, which saves and ends; check()
    then leaves at a place where nothing is half done. With no run under way a second signal ends this process at once.
    """

    def __init__(self):
        self.number = None  # of the first signal
        self.child = None   # the run under way, a Popen
        self.before = {}    # the handlers of whoever called main()

    def __enter__(self):
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.number is None:
            self.number = number
            self.pass_on()
        elif self.child is None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def pass_on(self):
        """Ask the run under way to save and end; end it after two minutes."""
        if self.child is None:
            return
        self.child.send_signal(signal.SIGTERM)
        last = threading.Timer(120, self.child.kill)
        last.daemon = True
        last.start()

    def started(self, child):
        """From now on signals are passed on to this child, and one that came while it was started."""
        self.child = child
        if self.number is not None:
            self.pass_on()

    def check(self):
        if self.number is not None:
            raise Interrupted(self.number)


# ---- What was asked for

def parse_arms(texts: list[str], seeds: int, shared: list[str]) -> list[Arm]:
    """
    The arms of a command line, each tried on the trainer's own parser and the variants' loader. RunError names the arm.
    """
    arms = []
    times = {}  # an arm's text: how often it came before
    for index, text in enumerate(texts):
        # its words
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise RunError(f"arm {text!r:.200}: {error}; close its quotation marks") from None
        require(words and not words[0].startswith("-"),
                f"arm {text!r:.200} does not begin with a name; write baseline or a variant, then its options")

        # an arm that is given again has a name and seeds of its own
        again = times.get(text, 0)
        times[text] = again + 1
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
        arms.append(arm)

    require(len(arms) > 1,
            f"one arm, {texts[0]!r:.200}, has nothing to be compared with; name two or more. The first is what the "
            "others are compared with; an arm that is named twice shows the noise")
    return arms


def trainer_options(arm: Arm, shared: list[str]) -> list[str]:
    """The arm's whole command line but for a run's own. RunError for what this script sets itself."""
    options = [*shared, *arm.options]
    names = [word[2:].partition("=")[0].removeprefix("no-") for word in options if word.startswith("--")]
    for name in sorted(RESERVED & {name.replace("-", "_") for name in names}):
        raise RunError(f"--{name} is compare.py's to set; leave it out")
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


# ---- What runs are the same: code, data, machine

def module_file(module: str) -> Path | None:
    """
    The file of a module of this repository, a folder's __init__.py before a file of that name, as Python imports them;
    None where there is none.
    """
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def text_and_digest(file: Path) -> tuple[str, str]:
    """(a source file's text, its sha256 as Run.code counts it: without newlines at its ends)."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text, sha256_of_text(text.strip("\n"))


def source_of(arms: list[Arm]) -> dict[str, str]:
    """
    Return {file: sha256} of all code that the arms' runs load: the trainer and, for arms with variants, the loader,
    their variants and what these import of variants and kernels, in functions and by a name in quotes too. What stands
    beside them (data, tasks, studies, benchmarks) says nothing about a run.
    """
    specs = [spec for arm in arms for text in arm.variant for spec in re.split(r"\+(?=[a-z_])", text)]
    waiting = ["train_gpt", *(f"variants.{spec.partition(':')[0].strip()}" for spec in specs)]
    source = {}
    done = set()

    while waiting:
        module = waiting.pop()
        file = module_file(module)
        if module in done or file is None:
            continue
        done.add(module)
        text, source[str(file.relative_to(ROOT))] = text_and_digest(file)

        # what it loads
        if "." in module:
            waiting.append(module.rpartition(".")[0])  # a package is loaded before its modules
        # The trainer loads what it is told to, and so does the variants' loader, beside what stands at its top.
        statements = [] if module == "train_gpt" else parse_source(file, text).body
        for statement in statements:
            for node in [statement] if module == "variants" else ast.walk(statement):
                waiting += imported(node, module, file)
    return source


def parse_source(file: Path, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise RunError(f"{file.relative_to(ROOT)} is no Python: {error}; mend it") from None


def imported(node: ast.AST, module: str, file: Path) -> list[str]:
    """
    The modules of variants and kernels that a piece of a module's code may import. A text in a kernel is taken for the
    name of a module below kernels, which is how kernels name the loops that they import late.
    """
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = ".".join(filter(None, [package if node.level else "", node.module]))
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and module.startswith("kernels."):
        names = [f"kernels.{name}" for name in re.findall(r"\A\w+(?:\.\w+)*\Z", node.value)]
    return [name for name in names if name.split(".")[0] in ("variants", "kernels")]


# A shard of up to BLOCK x BLOCKS bytes is read in full, of a longer one so many blocks.
BLOCK = 2 ** 16     # bytes
BLOCKS = 256


def data_identity(config: Config) -> dict:
    """
    Return dict(train=..., val=...): one sha256 of all training shards and {name: sha256} of the validation shards. Of
    long training shards, sizes and evenly spaced blocks are looked at: reading 20 GB takes longer than it is worth.
    """
    train = hashlib.sha256()
    for path in find_shards(config, "train"):
        size = path.stat().st_size
        train.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(BLOCKS):
                file.seek(max(index * BLOCK, (size - BLOCK) * index // (BLOCKS - 1)))
                train.update(file.read(BLOCK))
    return dict(train=train.hexdigest(), val={path.name: sha256_of_file(path) for path in find_shards(config, "val")})


def ranks_of(device: str, ranks: int) -> Ranks:
    """The first of the processes of a run with this --device, without starting any."""
    cuda = torch.cuda.is_available() and device != "cpu"
    return Ranks(0, ranks, torch.device("cuda" if cuda else "cpu"), torch.float32)


@cache
def machine_facts(device: str, threads: int, ranks: int) -> dict:
    """What a run of this machine and environment logs of it, for a configuration's device and threads."""
    there = ranks_of(device, ranks)
    facts = environment(there)
    if there.device.type == "cpu":
        usual = torch.get_num_threads()
        if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            usual = 1  # torchrun gives each of several processes one
        facts["threads"] = threads or usual
        facts["device"] = re.sub(r"\d+ threads$", f"{threads or usual} threads", facts["device"])
    return {name: facts[name] for name in ("device", "threads", "world_size", "torch", "cuda", "triton")}


def names_a_file(config: Config) -> bool:
    """
    Whether the result depends on a file whose content no log holds: a checkpoint to start from, or a variant's option
    that is a path.
    """
    words = [word for spec in config.variant for word in re.split(r"[:,=]", spec)[1:]]
    return bool(config.init_from) or any(os.path.exists(word) for word in words)


# ---- plan.json and state.json

# What these files hold. int and float: not negative, finite; [kind]: a list; (kind, kind): a list of so many;
# {str: kind}: an object with any names; {"name": kind}: one with these.
PLAN = {
    "arms": [str], "options": [str], "seeds": int, "budget": str, "seconds": float, "sweep": [float],
    "sweep_seeds": int, "ranks": int, "command": str, "anyway": bool,
    "source": {str: str},                                   # file: sha256
    "data": {str: {"train": str, "val": {str: str}}}}       # folder of shards: as data_identity() gives it
STATE = {
    "failed": {str: str},                                   # run: its error
    "order": [(str, str, int)],                             # run, arm and seed of all that were begun
    "wall_seconds": float, "runs_seconds": float,
    "durations": {str: [float]},                            # arm: seconds of each of its runs, start included
    "reused": {str: {"log": str, "seen": [str]}},           # run: as find_finished() gives them
    "faults": {str: [str]}}                                 # arm: what makes it unsound; [] where it was tried
UNCOMPARED = ("command", "anyway")  # of a plan: what another call of it may have otherwise


def fits(value, kind) -> bool:
    """Whether a value of a JSON file is of a kind, as PLAN and STATE write it."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, tuple):
        return isinstance(value, list) and len(value) == len(kind) and all(map(fits, value, kind))
    if isinstance(kind, dict) and str in kind:
        return isinstance(value, dict) and all(fits(item, kind[str]) for item in value.values())
    if isinstance(kind, dict):
        same_names = isinstance(value, dict) and value.keys() == kind.keys()
        return same_names and all(fits(value[name], kind[name]) for name in kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 <= value <= 1e12
    return isinstance(value, kind)


def read_fields(path: Path, kinds: dict) -> dict:
    """
    The content of plan.json or state.json. RunError, one line with the file and the field, for anything that does not
    belong there.
    """
    remedy = "delete its folder, or choose another with -o"
    content = read_json(path, remedy)
    for name in sorted(kinds.keys() | content.keys()):
        require(name in kinds and name in content and fits(content[name], kinds[name]),
                f"{path} is damaged or of another version: its field {name!r:.60} is "
                f"{content.get(name, 'missing')!r:.60}; {remedy}")
    return content


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
        self.state = dict(failed={}, order=[], wall_seconds=0.0, runs_seconds=0.0, durations={}, reused={}, faults={})

    def open(self, retry: bool):
        """
        Make the folder and lock it, or take up what an earlier call left there. RunError if it had another plan, other
        code or other data.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}; choose another folder with -o") from None
        self.wait_for_others()
        if (self.folder / "plan.json").exists():
            self.check_plan(read_fields(self.folder / "plan.json", PLAN))
            if (self.folder / "state.json").exists():
                self.state = read_fields(self.folder / "state.json", STATE)
        if retry:
            self.state["failed"] = {}
        self.save(self.folder / "plan.json", self.plan)

    def wait_for_others(self):
        """
        One process a folder: a run inherits the lock, so that one which outlives its killed comparison is waited for,
        not doubled.
        """
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
            require(name in (*UNCOMPARED, "source", "data") or self.plan[name] == plan[name],
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

    def execute(self, jobs: list[Job], done: int, total: int):
        """Do what is not yet done, in this order. done and total: runs of the whole plan, for the progress line."""
        for number, job in enumerate(jobs, done + 1):
            self.interrupt.check()
            run = self.read(job)
            if run is None and job.name not in self.state["failed"]:
                self.train_or_take_over(job, number, total)
                run = self.read(job)
            if run is not None:
                self.scored = self.scored or [run]
                check_scored([*self.scored, run])

    def train_or_take_over(self, job: Job, number: int, total: int):
        """Do one run of the plan, the number-th. RunError if its code changed since the comparison began."""
        title = f"run {number}/{total}: {job.arm.name}, seed {job.seed}"
        log = self.take_over(job)
        if log:
            say(f"{title}: taken over from {log}")
            return
        changed = [file for file, digest in self.plan["source"].items() if digest_of(ROOT / file) != digest]
        require(not changed, f"{', '.join(changed)} changed while its comparison was under way; restore it and call "
                "again")
        say(title)
        self.run(job, number - 1, total)

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

    def run(self, job: Job, done: int, total: int):
        """One training process, from its start or its checkpoint. A fault of its own is noted, and the others go on."""
        start = time.perf_counter()
        last = ""           # the run's last line that is not empty
        output = self.logs / f"{job.name}.out"
        progress = Progress(job, done, total, self.state)
        self.state["reused"].pop(job.name, None)  # a log that was to be taken over and is not there
        if job.name not in [name for name, _, _ in self.state["order"]]:
            self.state["order"].append([job.name, job.arm.name, job.seed])
        self.save_state()

        # train, and show what the run says
        try:
            with open(output, "a", encoding="utf-8") as file:
                child = subprocess.Popen(
                    self.command(job), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    encoding="utf-8", errors="replace", pass_fds=[self.lock.fileno()], start_new_session=True,
                    preexec_fn=die_with_parent)
                self.interrupt.started(child)
                for line in child.stdout:
                    file.write(line)
                    last = line.strip() or last
                    progress.show(last)
                code = child.wait()
        except OSError as error:
            raise RunError(f"run {job.name} cannot go on: {error.strerror or error}; finished runs are kept, call this "
                           "again") from None
        finally:
            self.interrupt.child = None
            seconds = time.perf_counter() - start
            self.state["runs_seconds"] += seconds

        # note what came of it
        run = self.read(job)
        if run is None:
            self.interrupt.check()
            require(code not in [sign for stop in STOPPING for sign in (-stop, 128 + stop)],
                    f"run {job.name} was stopped from outside; call this again to go on")
            error = re.sub(r"^train_gpt\.py: error: ", "", last) or "no message"
            self.state["failed"][job.name] = f"{error} (exit code {code}; all of its output: logs/{output.name})"
        else:
            output.unlink()
            (self.logs / f"{job.name}.pt").unlink(missing_ok=True)
            self.state["durations"].setdefault(job.arm.name, []).append(seconds)
        self.save_state()
        progress.end(run, self.state["failed"].get(job.name), seconds)

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
            earlier = read_fields(source.parent.parent / "state.json", STATE)["reused"]
        except RunError:
            earlier = {}
        # The note is first: a log that is here without it would count as a run of this comparison.
        origin = earlier[source.stem]["log"] if source.stem in earlier else str(source)
        self.state["reused"][job.name] = dict(log=origin, seen=seen)
        self.save_state()
        for kind in (".json", ".txt"):
            content = source.with_suffix(kind).read_bytes()
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
            plan = read_fields(log.parent.parent / "plan.json", PLAN)
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
        rates = {}  # variant: (seconds a token, seconds of warm-up) of each
        for log in sorted((self.reuse or COMPARISONS).glob("*/logs/*.txt")):
            facts = self.other_facts(log)
            if facts and facts["config"].get("track") == track and facts.get("device") == device:
                tokens = facts.get("tokens_per_second")
                seconds = facts.get("warmup_seconds")
                if fits(tokens, float) and tokens > 0 and fits(seconds, float):
                    rates.setdefault(json.dumps(facts["config"].get("variant")), []).append((1 / tokens, seconds))
        every = [pair for pairs in rates.values() for pair in pairs]
        if not every:
            return None, 0

        # these runs
        total = 0.0
        for config in map(self.config, jobs):
            pairs = rates.get(json.dumps(list(config.variant)), every)
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
        self.execute([job], 0, 1 + self.total())
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
        self.execute(list(jobs.values()), 0, self.total())

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
        """Print the plan, what is done of it and how long the rest will take. Runs nothing and writes nothing."""
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
        expected, runs = self.expected_seconds(missing[:1] if measured else missing)
        if expected is None:
            say("expected time: not known; there is no earlier run of this track on this machine")
        else:
            each = expected / (1 if measured else max(1, len(missing)))
            say(f"expected time: {duration(each * (len(missing) + before))}, by {runs} earlier runs of this track on "
                "this machine")

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
            turns = [job for turn in zip(*jobs) for job in turn]
            self.execute(turns, self.total() - len(turns), self.total())
        finally:
            self.state["wall_seconds"] += time.perf_counter() - begun
            self.save_state()
        results = self.results(jobs, seconds, sweep)
        write_report(self.folder, results, log_x)
        return results

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
        order = [[arm, seed] for name, arm, seed in state["order"] if name in reported]
        config = self.config(jobs[0][0])
        wall = state["wall_seconds"]
        trained = state["runs_seconds"]
        settings = dict(
            track=config.track, target=config.target, seeds=sorted({seed for arm in self.arms for seed in arm.seeds}),
            budget=plan["budget"], budget_seconds=seconds, command=plan["command"], order=order, sweep=sweep,
            tried=len(self.arms), reused=reused,
            overhead=dict(wall_seconds=wall, runs_seconds=trained, share=wall / trained - 1 if trained else None))
        return summarize(settings, arms)


def json_facts(log: Path) -> dict:
    """The JSON beside a log; {} where there is none."""
    try:
        return read_json(log.with_suffix(".json"), "")
    except RunError:
        return {}


def digest_of(file: Path) -> str | None:
    """The sha256 of a source file as text_and_digest counts it; None where there is none."""
    return text_and_digest(file)[1] if file.is_file() else None


def die_with_parent():
    """A run ends, with a checkpoint, when this process is killed (Linux: prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f}:{seconds % 3600 / 60:02.0f} h"


class Progress:
    """The line of one run in the whole plan: on a terminal rewritten in place, elsewhere every half minute."""

    def __init__(self, job: Job, done: int, total: int, state: dict):
        self.job = job
        self.done = done                        # runs of the plan before this one
        self.total = total                      # runs of the plan
        self.state = state                      # of the comparison, as STATE says
        self.terminal = sys.stdout.isatty()
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
            say(text)

    def end(self, run: Run | None, error: str | None, seconds: float):
        result = f"  failed: {error}"
        if run:
            training = run.train_ms / 1000
            result = f"  val_loss {run.val_loss:.4f} in {training:.1f} s of training, {seconds:.1f} s in all"
        say(f"\r\033[K{result}" if self.terminal else result)


def numbers(text: str) -> list[float]:
    """Factors of the command line."""
    return [float(factor) for factor in text.split(",")]


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this script's arguments, those after -- for the trainer). RunError for values outside their ranges."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="ARM", help='"baseline", or variants joined by +, and options of '
                        "train_gpt.py; the first is what the others are compared with")
    plan = parser.add_argument_group("what is compared")
    plan.add_argument("--track", default=Config.track, help="of train_gpt.py (default: %(default)s)")
    plan.add_argument("--seeds", type=int, default=3, help="reported runs an arm (default: %(default)s)")
    plan.add_argument("--budget", choices=("tokens", "time"), default="tokens",
                      help="what is equal (default: %(default)s)")
    plan.add_argument("--seconds", type=float, default=0.0, help="of training a run under --budget time (default: what "
                      "the first arm takes for its tokens, measured once)")
    plan.add_argument("--sweep", type=numbers, default=[], metavar="FACTORS",
                      help="of all learning rates that every arm tries first, such as 0.5,1,2 (default: none)")
    plan.add_argument("--sweep-seeds", type=int, default=1, help="runs for each of them (default: %(default)s)")

    how = parser.add_argument_group("how it is run")
    how.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()),
                     help="processes a run (default: one a GPU, here %(default)s)")
    how.add_argument("--dry-run", action="store_true",
                     help="show the plan, what of it is done and the time it will take (default: run it)")
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
    report.add_argument("--log-x", action="store_true", help="curves.png with logarithmic axes of tokens and time "
                        "(default: linear; report.html has a switch)")

    # what stands after -- is the trainer's
    cut = argv.index("--") if "--" in argv else len(argv)
    given = parser.parse_args(argv[:cut])
    check_arguments(given)
    return given, argv[cut + 1:]


def check_arguments(given: argparse.Namespace):
    """RunError for values outside their ranges."""
    most_ranks = max(torch.cuda.device_count() or os.cpu_count() or 1, 1)
    for name, most in dict(seeds=10_000, sweep_seeds=1000, ranks=most_ranks).items():
        value = getattr(given, name)
        require(1 <= value <= most, f"--{name.replace('_', '-')} must be at least 1 and at most {most:,}, got {value}")

    # the time
    longest = RANGES["time_budget"][1]
    require(0 <= given.seconds <= longest,
            f"--seconds must be greater than 0 and at most {longest:,.0f}, got {given.seconds:g}")
    require(not given.seconds or given.budget == "time",
            f"--seconds {given.seconds:g} belongs to --budget time; add it, or leave --seconds out")

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
    arms = parse_arms(given.arms, given.seeds, shared)
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
    plan = dict(arms=given.arms, options=shared, seeds=given.seeds, budget=given.budget, seconds=given.seconds,
                sweep=given.sweep, sweep_seeds=given.sweep_seeds, ranks=given.ranks, source=source_of(arms), data=data)
    return plan | dict(command=shlex.join(["python", "compare.py", *argv]), anyway=given.anyway), arms


def folder_of(plan: dict, arms: list[Arm], track: str) -> Path:
    """The folder of a plan that names none: the same for the same plan, code and data."""
    compared = {name: plan[name] for name in PLAN if name not in UNCOMPARED}
    key = sha256_of_text(json.dumps(compared))[:6]
    return COMPARISONS / f"{track}-{'-'.join(arm.readable for arm in arms)[:60]}-{key}"


def main(argv: list[str] | None = None) -> int:
    """
    Run a command line. Returns the exit code: 0 done, 1 a fault (one line on stderr), 128 + n stopped by signal n.
    """
    argv = sys.argv[1:] if argv is None else argv
    folder = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without the letters of a variant's name

    with Interrupt() as interrupt:
        try:
            given, options = parse_arguments(argv)
            plan, arms = plan_of(given, options, argv)
            folder = given.output or folder_of(plan, arms, given.track)
            comparison = Comparison(folder, plan, arms, given.reuse, interrupt)
            title = f"{len(arms)} arms x {given.seeds} seeds, {comparison.total()} runs; folder {folder}"
            if given.dry_run:
                say(title)
                comparison.show()
                return 0
            comparison.open(given.retry)
            say(title)
            results = comparison.compare(given.log_x)
        except RunError as error:
            say(f"compare.py: error: {error}", stream=sys.stderr)
            return 1
        except Interrupted as stop:
            say(f"compare.py: stopped; finished runs are kept, call it again to go on (folder {folder})",
                stream=sys.stderr)
            return 128 + stop.args[0]

    # what came of it
    report = f"report: {folder / 'README.md'} and report.html"
    say("\n".join([*sentences(results), "", console_table(results), "", report]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
