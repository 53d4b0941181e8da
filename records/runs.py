"""
Reading the logs of runs, this trainer's and modded-nanogpt's: the one place that knows what a log looks like.

    source of train_gpt, of variants and kernels, each under a line "# ---- NAME"
    100 times "=", a line that begins with "Running", and in the lines after it "facts: {JSON}" and what nvidia-smi
        says, 100 times "="
    step:N/M train_time:Tms step_avg:Ams                 after each step
    step:N/M val_loss:L train_time:Tms step_avg:Ams      at a validation
    others, among them the peak memory, which ends a complete log

NAME is the module's: kernels.topological_attention is the file kernels/topological_attention.py or, where an operation
is a folder, its __init__.py, and kernels.topological_attention.tiled is tiled.py there.

A resumed run adds all of this to its log again, with "resumed from PATH at step N" before its steps: they replace the
earlier ones after step N, a validation at N included, which comes after the checkpoint. modded-nanogpt's logs have the
same shape without facts; those of its track 3 have validations only and times in seconds. Where M is not known
beforehand (a budget of time), it is an estimate that may change until the last line. Losses are nats a token, as
precise as the log's digits.

read_run takes one sound run and refuses all else: what is compared or stored passes through it. read_trials and
read_usable are for statistics of logs that others wrote. They take as much as is sound, and Run.notes says what a
reader must know about a run:

    the clock starts at step 11      train_time falls once, at step 11: the ten steps before it are not in the time
    no time is known                 train_time falls elsewhere, or more than once
    trial I of N                     each new step:0 with a validation begins another run
    ends at step N of M              the last line of steps is a validation, before the last step
    the last line has no end         the file was cut; a last line that is not complete is not used
    no header, no source             no line "Running Python" or "Running PyTorch"; nothing before a line of "=" either

A log that is stored in records/ names its source in place of each copy of it, in one line:

    source: source-0123456789ab.txt sha256 0123456789ab... (all 64 digits)

A record's log is compressed, as RUN_ID.txt.gz; a log of any folder may be. The file of the source lies in the
record's folder, which is the folder above the log's. Its name has the first 12 digits of the
SHA-256 of the source, exactly as Run.source has it. The file names the source's modules, whose texts all records share;
manifest.py puts the source together and compares it with the digits.
"""

import argparse
import dataclasses
import datetime
import gzip
import io
import json
import math
import re
import signal
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from records.fields import FACTS, SAVED, parse_fields, read_fields
from records.manifest import read_stored_source, split_source
from train_gpt import RunError, require, sha256_of_text

RULE = "=" * 100
NUMBER = r"\d{1,15}(?:\.\d{1,15})?"  # longer ones are damage
STEP = re.compile(
    rf"step:(\d{{1,15}})/(\d{{1,15}}) (?:val_loss:(\S+) )?(?:\w+:\S+ )*?"
    rf"train_time:({NUMBER})(ms|s) step_avg:\S+ms(?: \w+:\S+)*")
LOG_NAME = re.compile(r".*\.(txt|log)(\.gz)?", re.DOTALL)
STORED_SOURCE = re.compile(r"source: (source-[0-9a-f]{12}\.txt) sha256 ([0-9a-f]{64})")
RESUMED = re.compile(r"resumed from .* at step (\d{1,15})")
STOPPED = re.compile(r"(stopped by \S+) after step \d+.*")
MEASURED = {  # attribute of Run: the line that holds it
    "peak_memory_mib": re.compile(r"peak memory (?:allocated|consumption): (\d{1,15}) MiB.*"),
    "warmup_seconds": re.compile(rf"warm-up.*: ({NUMBER}) s"),
    "bits_per_byte": re.compile(rf"val_bits_per_byte: ?({NUMBER})"),
    "ms_per_step": re.compile(rf"ms_per_step:({NUMBER}).*"),
    "tokens_per_second": re.compile(rf"ms_per_step:.* tokens_per_second:({NUMBER}).*"),
    "mfu": re.compile(rf"ms_per_step:.* mfu:({NUMBER}).*"),
}
COPY = "copy the log again or leave it out"
LATE_CLOCK = 11  # the step from which modded-nanogpt's trainers of 2024 count their time


@dataclass
class Point:
    """A validation."""

    step: int                       # after so many steps
    tokens: int | None              # of them altogether; None where the log does not say
    train_ms: float | None          # training time so far; None where no time is known
    val_loss: float                 # nats a token


@dataclass
class Run:
    """What one log says."""

    path: Path                      # of the log
    source: str                     # the code, all modules in one text
    facts: dict = field(default_factory=dict)           # of the header; {} of logs that are not this trainer's
    points: list[Point] = field(default_factory=list)   # the validations
    step_ms: list[float] = field(default_factory=list)  # training time after each step; [] for validations only
    last_step: int = 0              # N of the last line of steps
    steps: int = 0                  # M of the last line of steps
    status: str = "unfinished"      # or finished, "stopped by SIGNAL", "failed: ERROR"
    resumed: bool = False           # whether it went on from a checkpoint
    peak_memory_mib: int | None = None          # None, here and below: the log does not say
    warmup_seconds: float | None = None
    mfu: float | None = None                    # a share of the measured peak
    tokens_per_second: float | None = None
    ms_per_step: float | None = None
    bits_per_byte: float | None = None          # of the last validation
    notes: list[str] = field(default_factory=list)      # what a reader of another's log must know about it
    clock_start: int | None = 1     # the step from which the time counts; None: not known

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def val_loss(self) -> float | None:
        """The last validation's."""
        return self.points[-1].val_loss if self.points else None

    @property
    def train_ms(self) -> float | None:
        """None where no time is known."""
        if self.clock_start is None:
            return None
        return max([point.train_ms for point in self.points[-1:]] + self.step_ms[-1:], default=0.0)

    @property
    def config(self) -> dict:
        return self.facts.get("config", {})

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed")

    @property
    def variant(self) -> tuple[str, ...]:
        return tuple(self.config.get("variant", ()))

    @property
    def track(self) -> str | None:
        return self.config.get("track")

    @property
    def target(self) -> float:
        """The loss that the track asks for on these validation data, 0 where none is known."""
        return self.facts.get("target", self.config.get("target", 0.0))

    @property
    def val_sha256(self) -> dict[str, str]:
        """{validation shard: sha256}."""
        return self.facts.get("val_sha256", {})

    @property
    def source_sha256(self) -> str:
        return sha256_of_text(self.source)

    @property
    def source_file(self) -> str:
        """The name of the file that holds the source in a stored record."""
        return f"source-{self.source_sha256[:12]}.txt"

    @property
    def code(self) -> dict[str, str]:
        """{module: sha256 of its text in the source}; {} where the source does not name its modules."""
        return {name: sha256_of_text(text.strip("\n")) for name, text in split_source(self.source)}


@dataclass
class Event:
    """One line of steps: after a training step, or at a validation."""

    step: int                       # N
    steps: int                      # M
    val_loss: float | None          # None after a training step
    train_ms: float
    line: int                       # its number in the log


def read_run(path: Path | str, strict: bool = False) -> Run:
    """
    The run of one log. RunError for a log that is none, is damaged, holds several runs or contradicts itself or its
    JSON; with strict for an unfinished one, too.
    """
    path = Path(path)
    text = read_text(path)
    require(text.endswith("\n"), f"{path}: truncated: the last line has no end; {COPY}")
    run, body = read_headers(path, text.split("\n")[:-1])

    events = []
    for number, line in body:
        read_line(run, events, number, line)
    check_steps(run, events)
    check_times(run, events)
    take_events(run, events)

    ended = bool(events) and events[-1].val_loss is not None and run.last_step == run.steps
    if run.status == "unfinished" and ended and (run.peak_memory_mib is not None or not run.facts):
        run.status = "finished"
    if file_beside(path, ".json").exists():
        check_json(run)
    require(run.finished or not strict,
            f"{path}: {run.status} after step {run.last_step} of {run.steps}; only finished runs count here: finish it "
            "or leave it out")
    return run


def take_events(run: Run, events: list[Event]):
    """Set what the lines of steps say of the run."""
    batch_tokens = run.config.get("batch_tokens")
    run.points = [
        Point(event.step, batch_tokens and event.step * batch_tokens, event.train_ms, event.val_loss)
        for event in events if event.val_loss is not None]
    run.step_ms = [event.train_ms for event in events if event.val_loss is None]
    if events:
        run.last_step = events[-1].step
        run.steps = events[-1].steps


def read_trials(path: Path | str) -> list[Run]:
    """
    The runs of one log, this trainer's or another's, each with its notes. A log of this trainer holds one and must be
    finished. RunError where no loss can be had of any.
    """
    path = Path(path)
    text = read_text(path)
    lines = text.split("\n")
    if lines[0].startswith(("# ---- ", "source: ")) or any(line.startswith("facts: ") for line in lines):
        return [read_run(path, strict=True)]

    # the header and the lines after it
    cut = lines.pop()
    notes = []
    if cut:
        notes.append("the last line has no end")
        if any(pattern.fullmatch(cut) for pattern in (STEP, *MEASURED.values())):
            lines.append(cut)
    if header_starts(lines):
        file, body = read_headers(path, lines)
    else:
        file, body = read_headless(path, lines)
        notes.append("no header" if file.source else "no header, no source")

    # one run after the other
    events = []
    for number, line in body:
        read_line(file, events, number, line)
    require(any(event.val_loss is not None for event in events),
            f"{path}: no log of this trainer or modded-nanogpt: no line of steps with a val_loss after its header")
    starts = [i for i, event in enumerate(events) if i == 0 or event.step == 0 and events[i - 1].step > 0]
    trials = []
    for trial, (start, end) in enumerate(zip(starts, starts[1:] + [len(events)]), 1):
        count = [f"trial {trial} of {len(starts)}"] if len(starts) > 1 else []
        run = dataclasses.replace(file, notes=count + notes)
        read_trial(run, events[start:end])
        trials.append(run)
    return trials


def read_trial(run: Run, events: list[Event]):
    """Take what the lines of one run say, of a log that is not this trainer's."""
    check_steps(run, events)
    falls = [event for before, event in zip(events, events[1:]) if event.train_ms < before.train_ms]
    if len(falls) == 1 and falls[0].step == LATE_CLOCK and falls[0].val_loss is None:
        run.clock_start = LATE_CLOCK
        run.notes.append(f"the clock starts at step {LATE_CLOCK}")
        for event in events[:events.index(falls[0])]:
            event.train_ms = 0.0
    elif falls:
        run.clock_start = None
        run.notes.append("no time is known")
        for event in events:
            event.train_ms = None
    take_events(run, events)
    if events[-1].val_loss is not None:
        run.status = "finished"
        if run.last_step < run.steps:
            run.notes.append(f"ends at step {run.last_step} of {run.steps}")


def read_headless(path: Path, lines: list[str]) -> tuple[Run, list[tuple[int, str]]]:
    """What read_headers gives, of a log without a header: what stands before a line of '=' is its source."""
    first = next((i for i, line in enumerate(lines) if STEP.fullmatch(line)), None)
    require(first is not None, f"{path}: no log of this trainer or modded-nanogpt: it has no line of steps")
    rule = next((i for i in range(first - 1, -1, -1) if lines[i] == RULE), 0)
    return Run(path, "\n".join(lines[:rule]).strip("\n")), list(enumerate(lines[first:], first + 1))


def read_usable(folder: Path | str) -> tuple[list[Run], list[str]]:
    """
    The runs of all logs in a folder that give a final loss, by name, and a line for each log or run that is left out,
    with the reason. A run whose log lies there twice (a copy, or what the console showed) counts once.
    """
    runs, left_out = [], []
    for file in log_files(Path(folder)):
        try:
            trials = read_trials(file)
        except RunError as error:
            left_out.append(str(error))
            continue
        for run in trials:
            if run.finished:
                runs.append(run)
            else:
                last = f"its last validation is of step {run.points[-1].step}" if run.points else "it has no validation"
                ends = f"the last line of steps of step {run.last_step} of {run.steps}"
                left_out.append(", ".join([f"{file}: {last}", ends, *run.notes]))

    unique = {}
    for run in sorted(runs, key=lambda run: -len(run.points)):
        last = run.points[-1]
        twins = unique.setdefault((last.step, last.train_ms, last.val_loss), [])
        twin = next((twin for twin in twins if same_curve(run, twin)), None)
        if twin:
            left_out.append(f"{run.path}: the same run as in {twin.path}")
        else:
            twins.append(run)
    kept = {id(run) for twins in unique.values() for run in twins}
    return [run for run in runs if id(run) in kept], left_out


def same_curve(a: Run, b: Run) -> bool:
    """Whether two logs of equal ends show one run: equal losses and times at every validation that both have."""
    points = [{point.step: point for point in run.points} for run in (a, b)]
    shared = points[0].keys() & points[1].keys()
    return bool(a.train_ms) and all(points[0][step] == points[1][step] for step in shared)


def read_folder(folder: Path | str, strict: bool = False) -> list[Run]:
    """The runs of all logs in a folder, by name. RunError if there is none, or for one that read_run refuses."""
    folder = Path(folder)
    files = log_files(folder)
    fault = "no log (.txt or .log, or either with .gz) in this folder" if folder.is_dir() else "no such folder"
    require(files, f"{folder}: {fault}; give the folder that holds a run's log")
    return [read_run(file, strict) for file in files]


def log_files(folder: Path) -> list[Path]:
    """
    The .txt and .log files in a folder, and those that end in .gz after it, by name, without the sources of stored
    records.
    """
    texts = [path for path in folder.glob("*") if LOG_NAME.fullmatch(path.name)]
    return sorted(path for path in texts if not re.fullmatch(r"source-[0-9a-f]{12}\.txt", path.name))


def file_beside(log: Path, ending: str) -> Path:
    """The run's file of this ending beside its log: RUN_ID.json for RUN_ID.txt and for RUN_ID.txt.gz."""
    return log.with_name(log.name.removesuffix(".gz")).with_suffix(ending)


def compressed(text: str) -> bytes:
    """The text as gzip has it in a .gz file, without a time, so that equal texts have equal bytes."""
    return gzip.compress(text.encode(), mtime=0)


def read_text(path: Path) -> str:
    """The text of a log, compressed or not. RunError, which names the file and a remedy, where there is none."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; give a log, RUN_ID.txt in the trainer's log folder") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: not UTF-8 text, so no log; give RUN_ID.txt of the trainer's log folder") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise RunError(f"{path}: damaged: gzip cannot read it to its end; {COPY}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; give a log, RUN_ID.txt in the trainer's log "
                       "folder") from None
    require(text.strip(), f"{path}: empty; copy it again or leave it out")
    return text


@dataclass
class Header:
    """Where a header stands, as indices of lines: its source, the line of '=' after that, the line after the header."""

    source: int
    rule: int
    end: int


def header_starts(lines: list[str]) -> list[int]:
    """Where the lines of '=' stand that begin a header."""
    return [i for i, line in enumerate(lines[:-1]) if line == RULE and lines[i + 1].lower().startswith("running py")]


def find_headers(path: Path, lines: list[str]) -> list[Header]:
    """The headers of a log: one, and another for each time that the run was resumed. RunError if there is none."""
    starts = header_starts(lines)
    require(starts, f"{path}: no log of this trainer or modded-nanogpt: no line of 100 '=' with \"Running Python\" or "
                    "\"Running PyTorch\" after it")
    headers = []
    end = 0
    for start in starts:
        source = 0
        if headers:
            begins = [i for i in range(end, start) if lines[i] == "# ---- train_gpt" or STORED_SOURCE.match(lines[i])]
            source = begins[0] if begins else start
        end = next((i + 1 for i in range(start + 1, len(lines)) if lines[i] == RULE), len(lines))
        headers.append(Header(source, start, end))
    return headers


def read_headers(path: Path, lines: list[str]) -> tuple[Run, list[tuple[int, str]]]:
    """
    (a Run with source and facts, [(number, line)] after the headers). RunError unless every header of a resumed run
    tells of the same run.
    """
    run = None  # what the headers up to here say
    body = []
    end = 0
    for header in find_headers(path, lines):
        if run:
            body += enumerate(lines[end:header.source], end + 1)
        end = header.end
        source = read_source(path, "\n".join(lines[header.source:header.rule]).removeprefix(RULE).strip("\n"))
        facts = read_facts(path, lines[header.rule:end])
        number = header.rule + 1
        require(source.strip(), f"{path}: the source of the code is missing before line {number}; a run without its "
                "source is no evidence")
        check_source(path, source, facts.get("sources", {}))
        resumed = Run(path, source, facts)
        if run:
            check_resumed(run, resumed, number)
            resumed.resumed = True
        run = resumed
    return run, body + list(enumerate(lines[end:], end + 1))


def check_resumed(run: Run, resumed: Run, number: int):
    """RunError unless a later header, which ends in this line, tells of the same run on the same device."""
    for name in ("source", "seed", "variant", "val_sha256"):
        require(getattr(resumed, name) == getattr(run, name),
                f"{run.path}: resumed with another {name} (line {number}); a run that changes on its way is no "
                "evidence, leave it out")
    require(all(resumed.facts.get(name) == run.facts.get(name) for name in ("device", "world_size")),
            f"{run.path}: resumed on another device (line {number}), so its times mean nothing; leave it out")


def read_source(path: Path, text: str) -> str:
    """The source of a header: the text itself or, in a stored record, the source of the file that it names."""
    match = STORED_SOURCE.fullmatch(text)
    if not match:
        return text
    return read_stored_source(path, path.absolute().parent.parent / match[1], match[2])


def check_source(path: Path, source: str, sources: dict[str, str]):
    """RunError unless the source is that of the modules {name: sha256} which the facts name; older logs name none."""
    lines = source.split("\n")
    starts = []
    for name in sources:
        after = starts[-1] + 1 if starts else 0
        require(f"# ---- {name}" in lines[after:],
                f"{path}: its source lacks the module {name}, which its facts name; {COPY}")
        starts.append(lines.index(f"# ---- {name}", after))
    for (name, digest), start, end in zip(sources.items(), starts, starts[1:] + [len(lines)]):
        text = "\n".join(lines[start + 1:end])
        texts = [text]
        if end == len(lines):  # a log does not keep the ends of its source's last lines
            texts += [text + "\n", text + "\n\n"]
        require(digest in [sha256_of_text(text) for text in texts],
                f"{path}: the source of {name} was altered: it has not the SHA-256 that the facts name; {COPY}")


def stored_text(run: Run) -> str:
    """The run's log as a record stores it: a line that names the source in place of each copy of it."""
    lines = read_text(run.path).split("\n")
    stored = []
    end = 0
    for header in find_headers(run.path, lines):
        stored += lines[end:header.source]
        stored.append(f"source: {run.source_file} sha256 {run.source_sha256}")
        stored += lines[header.rule:header.end]
        end = header.end
    return "\n".join(stored + lines[end:])


def read_facts(path: Path, header: list[str]) -> dict:
    text = next((line.removeprefix("facts: ") for line in header if line.startswith("facts: ")), None)
    return {} if text is None else parse_fields(text, path, "its facts", COPY, FACTS)


def read_line(run: Run, events: list[Event], number: int, line: str):
    """Take what one line after the headers says."""
    step = STEP.fullmatch(line)
    resumed = RESUMED.fullmatch(line)
    stopped = STOPPED.fullmatch(line)
    if step:
        events.append(read_step(run, step, number))
    elif re.match(r"step:\d", line):
        raise RunError(f"{run.path}: damaged: line {number} is cut or no line of steps; copy the log again or leave it "
                       "out")
    elif resumed:
        resumed_at = int(resumed[1])
        events[:] = [event for event in events if event.step < resumed_at + (event.val_loss is None)]
        run.status = "unfinished"
    elif stopped:
        run.status = stopped[1]
    elif line.startswith("error: ") and run.facts:
        run.status = f"failed: {line.removeprefix('error: ')}"

    for name, pattern in MEASURED.items():
        match = pattern.fullmatch(line)
        if match:
            setattr(run, name, int(match[1]) if name == "peak_memory_mib" else float(match[1]))


def read_step(run: Run, match: re.Match, number: int) -> Event:
    """What a line of steps says. RunError for a loss that is no number."""
    step = int(match[1])
    val_loss = None
    if match[3] is not None:
        try:
            val_loss = float(match[3])
        except ValueError:
            val_loss = math.nan
        require(abs(val_loss) < 1e30,  # NaN is not
                f"{run.path}: val_loss is not a number at step {step} (line {number}: {match[3]:.20}); the run is of "
                "no use, leave it out")
    unit = 1000 if match[5] == "s" else 1
    return Event(step, int(match[2]), val_loss, float(match[4]) * unit, number)


def check_steps(run: Run, events: list[Event]):
    """RunError if a step is missing, repeated or out of order, or if the number of steps changes without leave to."""
    path = run.path
    trained = 0         # the last training step
    validated = -1      # the step of the last validation
    every_step = bool(run.facts) or any(event.val_loss is None for event in events)
    for event in events:
        where = f"at step {event.step} (line {event.line})"
        expected = trained + (event.val_loss is None)
        require(not every_step or event.step <= expected, f"{path}: step {trained + 1} is missing {where}; {COPY}")
        again = event.val_loss is not None and event.step <= validated
        require(not (every_step and event.step < expected or again),
                f"{path}: steps are repeated or out of order {where}; {COPY}")
        require(event.steps == events[0].steps or run.config.get("time_budget"),
                f"{path}: {events[0].steps} steps become {event.steps} {where}; a run's length is fixed beforehand, "
                "leave it out")
        trained = event.step
        if event.val_loss is not None:
            validated = event.step


def check_times(run: Run, events: list[Event]):
    """RunError if the time falls."""
    for before, event in zip(events, events[1:]):
        require(event.train_ms >= before.train_ms,
                f"{run.path}: train_time falls from {before.train_ms:.0f} to {event.train_ms:.0f} ms at step "
                f"{event.step} (line {event.line}), so the time of the run is not known; leave it out")


def check_json(run: Run):
    """RunError if the JSON beside the log is damaged or says otherwise than a finished log."""
    path = file_beside(run.path, ".json")
    saved = read_fields(path, "copy it again, or delete it: the log alone will do", SAVED)
    if not run.finished:
        require(saved.get("status") != "finished",
                f"{run.path}: truncated: {path.name} says finished, the log ends after step {run.last_step} of "
                f"{run.steps}; copy the log again or leave it out")
        return

    # what differs by more than the log's rounding
    last = run.points[-1]
    names = []
    for name, logged, tolerance in (("val_loss", last.val_loss, 5e-5), ("step", last.step, 0),
                                    ("train_seconds", last.train_ms / 1000, 5e-4)):
        if not is_close(saved.get(name), logged, tolerance):
            names.append(name)
    curve = {point["step"]: point["val_loss"] for point in saved.get("curve", [])}
    logged = {point.step: point.val_loss for point in run.points}
    if curve.keys() != logged.keys() or not all(is_close(curve[step], logged[step], 5e-5) for step in curve):
        names.append("curve")
    names += [name for name in ("config", "seed", "val_sha256") if saved.get(name) != run.facts.get(name)]
    if saved.get("status") != "finished":
        names.append("status")
    require(not names, f"{run.path}: tampered: {path.name} has another {', '.join(names)} than the log; copy both "
            "again or leave the run out")


def is_close(number: float | None, logged: float, tolerance: float) -> bool:
    return number is not None and abs(number - logged) <= tolerance + 1e-9


# ---- The list of past runs

def list_runs(folder: Path) -> tuple[list[dict], list[str]]:
    """
    What the JSON files of a log folder say of their runs, the newest last, and a line for each file that is no run's.
    Keys: id, when (the last change, seconds since 1970), track, variant, val_loss, bits_per_byte, status.
    """
    require(folder.is_dir(), f"{folder}: no such folder; give the trainer's log folder with --log_dir")
    runs = []
    left_out = []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(describe_run(path))
        except RunError as error:
            left_out.append(str(error))
    return sorted(runs, key=lambda run: (run["when"], run["id"])), left_out


def describe_run(path: Path) -> dict:
    """A row of the list, of the run that this JSON file belongs to. RunError where it is no run's."""
    saved = read_fields(path, "delete it if it is no run's", SAVED)
    require("config" in saved and "status" in saved, f"{path}: no run's: it has no config and status")
    config = saved["config"]
    status = saved["status"]
    last = saved["curve"][-1] if saved.get("curve") else {}
    return dict(
        id=path.stem,
        when=path.stat().st_mtime,
        track=one_line(config.get("track", "-")),
        variant=one_line("+".join(config.get("variant", []))) or "baseline",
        val_loss=saved.get("val_loss", last.get("val_loss")),
        bits_per_byte=saved.get("val_bits_per_byte", last.get("val_bits_per_byte")),
        status=running_or_cut_off(path.with_suffix(".txt")) if status == "running" else one_line(status),
    )


def one_line(text: str) -> str:
    """The text without control characters and ends of lines."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def running_or_cut_off(log: Path) -> str:
    """What became of a run whose JSON says "running". The trainer locks its log as long as it runs."""
    if fcntl is None:
        return "running or cut off"
    try:
        with open(log, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "cut off"
    except BlockingIOError:
        return "running"
    except OSError:
        return "cut off" if not log.exists() else "running or cut off"


def main(argv: list[str] | None = None) -> int:
    """Print the past runs of a log folder. Returns the exit code: 0, or 1 and one line where there is no folder."""
    description = "The past runs of a log folder, a line each, the newest last."
    parser = argparse.ArgumentParser(prog="python -m records.runs", description=description)
    parser.add_argument("--log_dir", type=Path, default=Path("logs"), help="the trainer's log folder (default: logs)")
    parser.add_argument("--json", action="store_true", help="one JSON list, with the time in seconds since 1970")
    options = parser.parse_args(argv)

    # print them
    try:
        runs, left_out = list_runs(options.log_dir)
    except RunError as error:
        print(f"records.runs: error: {error}", file=sys.stderr)
        return 1

    if options.json:
        print(json.dumps(runs, indent=1))
    else:
        print_list(runs)
        if not runs:
            print(f"{options.log_dir}: no runs yet")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return 0


def print_list(runs: list[dict]):
    """The rows in columns; the variants and the status, which can be long, come last."""
    rows = [["id", "when", "track", "loss", "bits/byte", "variants", "status"]]
    for run in runs:
        when = datetime.datetime.fromtimestamp(run["when"]).strftime("%Y-%m-%d %H:%M")
        losses = ["-" if run[name] is None else f"{run[name]:.4f}" for name in ("val_loss", "bits_per_byte")]
        rows.append([run["id"], when, run["track"], *losses, run["variant"], run["status"]])
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows if runs else []:
        print("  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + row[6:]))


def prepare_console():
    """For scripts: what the console's encoding lacks is shown as "?", and a closed pipe ends the script quietly."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
