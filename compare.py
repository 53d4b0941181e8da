"""
Head to head: arms x seeds, in turn on one machine, and a verdict with statistics.

    python compare.py baseline swiglu_mlp "parallel_residual:layers=0-1" --track cpu --seeds 3
    python compare.py baseline "swiglu_mlp --lr_matrix 0.02" --budget time --sweep 0.5,1,2 -- --steps 500

- An arm is "baseline" or variants joined by +, with options of train_gpt.py after them; the first arm is what the others are compared with. Options
  after -- go to every arm. An arm named again is run on seeds of its own: the baseline against itself calibrates the whole pipeline.
- Runs take turns, A B C A B C. Runs of one seed share the order of the data and the initial tensors of equal names; every run is a process of its own.
- --budget tokens: equal tokens. --budget time: equal seconds of training; each arm's schedule follows the clock.
- --sweep: every arm tries its learning rates times these factors on other seeds than the reported ones, and keeps the best.
- Stop it in any way and call it again: finished runs are kept, a run under way goes on from its checkpoint. More seeds afterwards are refused: adding
  runs until a difference is significant finds one where there is none.
- Compiled code is shared by the seeds of an arm through PyTorch's cache on disk; compilation is outside every clock and reported apart.

The report: README.md, report.html, curves.png, results.json and all logs, in the folder of -o.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import variants
from records.report import sentence, summarize, write_report
from records.runs import Run, read_run
from train_gpt import Config, RunError, find_shards, parse_config, write_atomically

ROOT = Path(__file__).resolve().parent
OWN = {"seed", "run_id", "log_dir", "resume", "save", "time_budget"}  # what this script sets for every run
RATES = ("lr_matrix", "lr_embed", "lr_head", "lr_scalar")
SWEEP_SEED, BUDGET_SEED = 1_000_001, 2_000_001  # first seeds of runs that are not reported


@dataclass
class Arm:
    """name: as given, numbered where given again; seeds: of the reported runs."""
    name: str
    variant: list[str]
    options: list[str]
    seeds: list[int]

    @property
    def slug(self) -> str:
        return re.sub(r"[^A-Za-z0-9_.=]+", "-", self.name).strip("-")


@dataclass
class Job:
    """One run: its file name, its arm, its seed and the options that only this run has."""
    name: str
    arm: Arm
    seed: int
    options: list[str]


def parse_arms(texts: list[str], seeds: int, shared: list[str]) -> list[Arm]:
    """Arms from the command line, each tried on the trainer's own parser and the variants' loader. RunError names the arm."""
    arms, times = [], {}
    for text in texts:
        words = shlex.split(text)
        if not words or words[0].startswith("-"):
            raise RunError(f"arm {text!r} does not begin with a name; write baseline or a variant, then its options")
        again = times[text] = times.get(text, -1) + 1
        variant = [] if words[0] == "baseline" else [words[0]]
        arm = Arm(text + f" ({again + 1})" * bool(again), variant, words[1:], [again * seeds + n for n in range(1, seeds + 1)])
        try:
            config = parse_config(trainer_options(arm, shared))
            variants.plan(config.variant, config)
        except RunError as error:
            raise RunError(f"arm {text!r}: {error}") from None
        except SystemExit:
            raise RunError(f"arm {text!r}: train_gpt.py does not take these options: {shlex.join(shared + words[1:])} (its message is above)") from None
        arms.append(arm)
    return arms


def trainer_options(arm: Arm, shared: list[str]) -> list[str]:
    """The arm's whole command line but for a run's own. RunError for what this script sets itself."""
    options = [*shared, *arm.options]
    if taken := sorted(OWN & {word[2:].removeprefix("no-").replace("-", "_").partition("=")[0] for word in options if word.startswith("--")}):
        raise RunError(f"--{taken[0]} is compare.py's to set; leave it out")
    return [*options, *(["--variant", *arm.variant] if arm.variant else [])]


def source_hashes() -> dict[str, str]:
    """Of every file whose change would make runs incomparable."""
    files = [ROOT / "train_gpt.py", *sorted((ROOT / "variants").glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Comparison:
    """
    A plan and its folder: plan.json is what was asked for and does not change; state.json holds failures, seconds and the order of runs. Whether a run is
    finished is read from its log alone.
    """

    def __init__(self, folder: Path, plan: dict, arms: list[Arm], shared: list[str], ranks: int):
        self.folder, self.logs, self.plan, self.arms, self.shared, self.ranks, self.child = folder, folder / "logs", plan, arms, shared, ranks, None
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")
        except OSError as error:
            raise RunError(f"cannot write {folder}: {error.strerror}; choose another folder with -o") from None
        self.wait_for_others()
        self.state = dict(failed={}, order=[], wall_seconds=0.0, runs_seconds=0.0, durations={})
        if (folder / "plan.json").exists():
            self.go_on()
        self.save(folder / "plan.json", plan)

    def wait_for_others(self):
        """One process a folder: a run inherits the lock, so that one which outlives its killed comparison is waited for, not doubled."""
        for attempt in range(120):
            try:
                return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                attempt or print(f"compare.py: waiting for a run or comparison that still uses {self.folder}", flush=True)
                time.sleep(0.5)
        raise RunError(f"another comparison uses {self.folder}; wait for it, or stop it, or choose another folder with -o")

    def go_on(self):
        """Take up the state of an earlier call. RunError if it had another plan or other code."""
        try:
            plan = json.loads((self.folder / "plan.json").read_text())
            self.state |= json.loads((self.folder / "state.json").read_text()) if (self.folder / "state.json").exists() else {}
        except ValueError:
            raise RunError(f"{self.folder} has a damaged plan.json or state.json; delete the folder, or choose another with -o") from None
        names = [name for name in self.plan | plan if self.plan.get(name) != plan.get(name) and name != "command"]
        if "source" in names:
            files = [file for file in self.plan["source"] | plan["source"] if self.plan["source"].get(file) != plan["source"].get(file)]
            raise RunError(f"{', '.join(files)} changed since {self.folder} was begun; runs of different code are not compared: restore it, or choose another folder with -o")
        if names:
            raise RunError(f"{self.folder} holds another plan ({names[0]}: {plan.get(names[0])!r}, now {self.plan.get(names[0])!r}); repeat its command, or choose another folder with -o")

    def save(self, path: Path, content: dict):
        write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))

    def save_state(self):
        self.save(self.folder / "state.json", self.state)

    # ---- runs

    def job(self, arm: Arm, seed: int, kind: str = "", options: list[str] = ()) -> Job:
        return Job(f"{arm.slug}{kind}-seed{seed}", arm, seed, list(options))

    def read(self, job: Job) -> Run | None:
        """The job's run if it is finished."""
        log = self.logs / f"{job.name}.txt"
        if not log.exists():
            return None
        try:
            run = read_run(log)
        except RunError as error:
            if json_status(log) == "finished":  # not cut off by a stop: somebody changed it, and it must not be run again in silence
                raise RunError(f"{error}; a finished run's log was altered: restore it, or delete {log.name} and {log.stem}.json to run it again") from None
            return None
        return run if run.finished else None

    def execute(self, jobs: list[Job], done: int, total: int):
        """Run what is not yet done, in this order. done and total: runs of the whole plan, for the progress line."""
        for job in jobs:
            if self.read(job) is None and job.name not in self.state["failed"]:
                if source_hashes() != self.plan["source"]:
                    raise RunError("the trainer's or a variant's source changed while its comparison was under way; restore it and call again")
                self.run(job, done, total)
            done += 1

    def command(self, job: Job) -> list[str]:
        launch = [sys.executable] if self.ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        log, checkpoint = self.logs / f"{job.name}.txt", self.logs / f"{job.name}.pt"
        resume = ["--resume", str(checkpoint)] if checkpoint.exists() and log.exists() else []
        if not resume:
            for path in (log, log.with_suffix(".json")):
                path.unlink(missing_ok=True)
        return [*launch, str(ROOT / "train_gpt.py"), *trainer_options(job.arm, self.shared), *job.options,
                "--seed", str(job.seed), "--run_id", job.name, "--log_dir", str(self.logs), *resume]

    def run(self, job: Job, done: int, total: int):
        """One training process, from its start or its checkpoint. A fault of its own is noted, and the others go on."""
        start, last, output = time.perf_counter(), "", self.logs / f"{job.name}.out"
        progress = Progress(job, done, total, self.state)
        try:
            with open(output, "a") as file:
                self.child = subprocess.Popen(self.command(job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                              pass_fds=[self.lock.fileno()], start_new_session=True, preexec_fn=die_with_parent)
                for line in self.child.stdout:
                    file.write(line)
                    last = line.strip() or last
                    progress.show(last)
                code = self.child.wait()
        finally:
            seconds = time.perf_counter() - start
            self.state["runs_seconds"] += seconds
        self.child = None
        run = self.read(job)
        if run is None and abs(code) in (signal.SIGTERM, signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise RunError(f"run {job.name} was stopped from outside; call this again to go on")
        if run is None:
            error = re.sub(r"^train_gpt\.py: error: ", "", last) or "no message"
            self.state["failed"][job.name] = f"{error} (exit code {code}; all of its output: logs/{output.name})"
        else:
            output.unlink()
            (self.logs / f"{job.name}.pt").unlink(missing_ok=True)
            self.state["durations"].setdefault(job.arm.name, []).append(seconds)
        self.state["order"].append([job.name, job.arm.name, job.seed])
        self.save_state()
        progress.end(run, self.state["failed"].get(job.name), seconds)

    def stop(self):
        """Ask the run under way to save and end, and wait for it."""
        if self.child:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                self.child.kill()

    # ---- the plan

    def budget(self) -> float:
        """Seconds of training an arm: as given, else what the first arm takes for its tokens, on a seed that is not reported."""
        if seconds := self.plan["seconds"]:
            return seconds
        job = self.job(self.arms[0], BUDGET_SEED, "-budget")
        self.execute([job], 0, 1 + self.total())
        if (run := self.read(job)) is None:
            raise RunError(f"the run that measures the time budget failed: {self.state['failed'][job.name]}; give --seconds, or mend it and add --retry")
        return run.train_ms / 1000

    def total(self) -> int:
        return len(self.arms) * (self.plan["seeds"] + len(self.plan["sweep"]) * self.plan["sweep_seeds"])

    def sweep(self, common: list[str]) -> dict | None:
        """Every arm's learning rates by their factors: {arm: dict(tries=[dict(factor, seeds, losses)], chosen)}; None without --sweep."""
        if not self.plan["sweep"]:
            return None
        seeds = [SWEEP_SEED + n for n in range(self.plan["sweep_seeds"])]
        jobs = {(arm.name, factor, seed): self.job(arm, seed, f"-lr{factor:g}", common + self.rates(arm, factor))
                for seed in seeds for factor in self.plan["sweep"] for arm in self.arms}
        self.execute(list(jobs.values()), 0, self.total())
        result = {}
        for arm in self.arms:
            tries = []
            for factor in self.plan["sweep"]:
                runs = [self.read(jobs[arm.name, factor, seed]) for seed in seeds]
                tries.append(dict(factor=factor, seeds=seeds, losses=[run and run.val_loss for run in runs]))
            whole = [attempt for attempt in tries if None not in attempt["losses"]]
            if not whole:
                raise RunError(f"every learning rate of arm {arm.name!r} failed: {next(iter(self.state['failed'].values()))}")
            result[arm.name] = dict(tries=tries, chosen=min(whole, key=lambda attempt: sum(attempt["losses"]))["factor"])
        return result

    def rates(self, arm: Arm, factor: float) -> list[str]:
        config = parse_config(trainer_options(arm, self.shared))
        return [word for name in RATES for word in (f"--{name}", f"{getattr(config, name) * factor:.6g}")] if factor != 1 else []

    def compare(self, log_x: bool = False) -> dict:
        """Everything: budget, sweep, the reported runs, the report (log_x: of its picture). Returns the results."""
        begun = time.perf_counter()
        try:
            seconds = self.budget() if self.plan["budget"] == "time" else None
            common = ["--time_budget", f"{seconds:.3f}"] if seconds else []
            sweep = self.sweep(common)
            rates = {arm.name: self.rates(arm, sweep[arm.name]["chosen"]) if sweep else [] for arm in self.arms}
            jobs = {arm.name: [self.job(arm, seed, options=common + rates[arm.name]) for seed in arm.seeds] for arm in self.arms}
            turns = [jobs[arm.name][turn] for turn in range(self.plan["seeds"]) for arm in self.arms]
            self.execute(turns, self.total() - len(turns), self.total())
        finally:
            self.state["wall_seconds"] += time.perf_counter() - begun
            self.save_state()
        write_report(self.folder, results := self.results(jobs, seconds, sweep), log_x)
        return results

    def results(self, jobs: dict[str, list[Job]], seconds: float | None, sweep: dict | None) -> dict:
        plan, reported = self.plan, {job.name for own in jobs.values() for job in own}
        arms = [dict(name=arm.name, variant=arm.variant, options=arm.options,
                     runs=[self.read(job) or dict(seed=job.seed, error=self.state["failed"].get(job.name, "not finished")) for job in jobs[arm.name]]) for arm in self.arms]
        config = parse_config(trainer_options(self.arms[0], self.shared))
        wall, runs = self.state["wall_seconds"], self.state["runs_seconds"]
        settings = dict(track=config.track, target=config.target, seeds=sorted({seed for arm in self.arms for seed in arm.seeds}), budget=plan["budget"], budget_seconds=seconds, command=plan["command"],
                        order=[[arm, seed] for name, arm, seed in self.state["order"] if name in reported], sweep=sweep, tried=len(self.arms),
                        overhead=dict(wall_seconds=wall, runs_seconds=runs, share=wall / runs - 1 if runs else None))
        return summarize(settings, arms)


def json_status(log: Path) -> str | None:
    try:
        return json.loads(log.with_suffix(".json").read_text()).get("status")
    except (OSError, ValueError):
        return None


def die_with_parent():
    """A run ends, with a checkpoint, when this process is killed (Linux: prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Progress:
    """The line of one run in the whole plan: on a terminal rewritten in place, elsewhere every half minute."""

    def __init__(self, job: Job, done: int, total: int, state: dict):
        self.job, self.done, self.total, self.state, self.terminal = job, done, total, state, sys.stdout.isatty()
        self.start = self.shown = time.perf_counter()
        print(f"run {done + 1}/{total}: {job.arm.name}, seed {job.seed}", flush=True)

    def show(self, line: str):
        now, step = time.perf_counter(), re.match(r"step (\d+)/(\d+) ", line)
        if step and now - self.shown >= (0 if self.terminal else 30):
            self.shown, part = now, int(step[1]) / max(int(step[2]), 1)
            known = [seconds for own in self.state["durations"].values() for seconds in own] or [(now - self.start) / max(part, 0.01)]
            left = sum(known) / len(known) * (self.total - self.done - part)
            text = f"  {line} | plan {100 * (self.done + part) / self.total:.0f} %, {left / 3600:.0f}:{left % 3600 / 60:02.0f} h left"
            print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def end(self, run: Run | None, error: str | None, seconds: float):
        result = f"  val_loss {run.val_loss:.4f} in {run.train_ms / 1000:.1f} s of training, {seconds:.1f} s in all" if run else f"  failed: {error}"
        print(f"\r\033[K{result}" if self.terminal else result, flush=True)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this script's arguments, those after -- for the trainer)."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="ARM", help='"baseline", or variants joined by +, and options of train_gpt.py; the first is what the others are compared with')
    parser.add_argument("--track", default=Config.track, help="of train_gpt.py (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="reported runs an arm (default: %(default)s)")
    parser.add_argument("--budget", choices=("tokens", "time"), default="tokens", help="what is equal (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.0, help="of training a run under --budget time (default: what the first arm takes for its tokens, measured once)")
    parser.add_argument("--sweep", type=lambda text: [float(part) for part in text.split(",")], default=[], help="factors of all learning rates that every arm tries first, such as 0.5,1,2")
    parser.add_argument("--sweep-seeds", type=int, default=1, help="runs for each of them (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="processes a run (default: one a GPU)")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--log-x", action="store_true", help="curves.png with a logarithmic axis of tokens and time (report.html has a switch)")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report (default: one in ./comparisons that the same command finds again)")
    cut = argv.index("--") if "--" in argv else len(argv)
    given = parser.parse_args(argv[:cut])
    for name in ("seeds", "sweep_seeds", "ranks"):
        if getattr(given, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if given.seconds < 0 or given.seconds and given.budget != "time" or any(factor <= 0 for factor in given.sweep):
        raise RunError(f"--seconds belongs to --budget time and, like the factors of --sweep, is greater than 0; got --seconds {given.seconds:g}, --sweep {given.sweep}")
    return given, argv[cut + 1:]


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0 done, 1 a fault (one line on stderr), 128 + n stopped by signal n."""
    argv, comparison = sys.argv[1:] if argv is None else argv, None
    try:
        given, options = parse_arguments(argv)
        shared = ["--track", given.track, *options]
        arms = parse_arms(given.arms, given.seeds, shared)
        for split in ("train", "val"):
            find_shards(parse_config(trainer_options(arms[0], shared)), split)
        plan = dict(arms=given.arms, options=shared, seeds=given.seeds, budget=given.budget, seconds=given.seconds, sweep=given.sweep, sweep_seeds=given.sweep_seeds, ranks=given.ranks)
        key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:6]
        folder = given.output or Path("comparisons") / f"{given.track}-{'-'.join(arm.slug for arm in arms)[:80]}-{key}"
        comparison = Comparison(folder, plan | dict(command=shlex.join(["python", "compare.py", *argv]), source=source_hashes()), arms, shared, given.ranks)
        if given.retry:
            comparison.state["failed"] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)
        print(f"{len(arms)} arms x {given.seeds} seeds, {comparison.total()} runs; folder {folder}", flush=True)
        results = comparison.compare(given.log_x)
    except RunError as error:
        print(f"compare.py: error: {error}", file=sys.stderr, flush=True)
        return 1
    except Interrupted as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
        comparison.stop()
        print(f"compare.py: stopped; finished runs are kept, call it again to go on (folder {comparison.folder})", file=sys.stderr, flush=True)
        return 128 + stop.args[0]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    print(*(sentence(arm, results["arms"][0]) for arm in results["arms"][1:]), f"report: {comparison.folder / 'README.md'} and report.html", sep="\n", flush=True)
    return 0


class Interrupted(Exception):
    """A signal; its number is the argument."""


def interrupt(number, _frame):
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
