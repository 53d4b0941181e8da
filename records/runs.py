"""
Reading the logs of runs, this trainer's and modded-nanogpt's: the one place that knows what a log looks like.

    source of train_gpt, of variants and kernels, each under a line "# ---- NAME"
    100 times "=", a line that begins with "Running", and in the lines after it "facts: {JSON}" and what nvidia-smi says, 100 times "="
    step:N/M train_time:Tms step_avg:Ams                 after each step
    step:N/M val_loss:L train_time:Tms step_avg:Ams      at a validation
    others, among them the peak memory, which ends a whole log

A resumed run adds all of this to its log again, with "resumed from PATH at step N" before its steps: they replace the earlier ones after step N,
a validation at N included, which comes after the checkpoint.
modded-nanogpt's logs have the same shape without facts; those of its track 3 have validations only and times in seconds. Where M is not known
beforehand (a budget of time), it is an estimate that may change until the last line. Losses are nats a token, as precise as the log's digits.

A log that is stored in records/ names its source in place of each copy of it, in one line:

    source: source-0123456789ab.txt sha256 0123456789ab... (all 64 digits)

The file lies in the record's folder, which is the folder above the log's. Its name has the first 12 digits of the SHA-256
of its text, and the text is the source exactly as Run.source has it. Reading compares the digits with the text.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from train_gpt import RunError

RULE = "=" * 100
MODULE = re.compile(r"# ---- ([\w.]+)")
STEP = re.compile(r"step:(\d+)/(\d+) (?:val_loss:(\S+) )?(?:\w+:\S+ )*?train_time:(\d+(?:\.\d+)?)(ms|s) step_avg:\S+ms(?: \w+:\S+)*")
STORED_SOURCE = re.compile(r"source: (source-[0-9a-f]{12}\.txt) sha256 ([0-9a-f]{64})")
RESUMED = re.compile(r"resumed from .* at step (\d+)")
STOPPED = re.compile(r"(stopped by \S+) after step \d+.*")
MEASURED = {  # attribute of Run: the line that holds it
    "peak_memory_mib": re.compile(r"peak memory (?:allocated|consumption): (\d+) MiB.*"),
    "warmup_seconds": re.compile(r"warm-up.*: (\d+\.?\d*) s"),
    "bits_per_byte": re.compile(r"val_bits_per_byte: ?(\d+\.\d+)"),
    "ms_per_step": re.compile(r"ms_per_step:(\d+\.?\d*).*"),
    "tokens_per_second": re.compile(r"ms_per_step:.* tokens_per_second:(\d+\.?\d*).*"),
    "mfu": re.compile(r"ms_per_step:.* mfu:(\d+\.?\d*).*"),
}


@dataclass
class Point:
    """A validation: after `step` steps of `tokens` tokens altogether (None where the log does not say), training time so far, loss in nats a token."""
    step: int
    tokens: int | None
    train_ms: float
    val_loss: float


@dataclass
class Run:
    """What one log says. step_ms: training time after each step, of steps 1 to last_step ([] where the log has validations only)."""
    path: Path
    source: str
    facts: dict = field(default_factory=dict)                   # {} of logs that are not this trainer's
    points: list[Point] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    last_step: int = 0
    steps: int = 0                                              # M of the last line
    status: str = "unfinished"                                  # or finished, "stopped by SIGNAL", "failed: ERROR"
    peak_memory_mib: int | None = None
    warmup_seconds: float | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    ms_per_step: float | None = None
    bits_per_byte: float | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def val_loss(self) -> float | None:
        """The last validation's."""
        return self.points[-1].val_loss if self.points else None

    @property
    def train_ms(self) -> float:
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
    def val_sha256(self) -> dict[str, str]:
        """{validation shard: sha256}."""
        return self.facts.get("val_sha256", {})

    @property
    def source_sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def source_file(self) -> str:
        """The name of the file that holds the source in a stored record."""
        return f"source-{self.source_sha256[:12]}.txt"

    @property
    def code(self) -> dict[str, str]:
        """{module: sha256 of its part of the source}; {} where the source does not name its modules."""
        parts, name = {}, None
        for line in self.source.split("\n"):
            if match := MODULE.fullmatch(line):
                name = match[1]
                parts[name] = []
            elif name:
                parts[name].append(line)
        return {name: hashlib.sha256("\n".join(lines).strip("\n").encode()).hexdigest() for name, lines in parts.items()}


@dataclass
class Event:
    """One line of steps: after a training step, or at a validation, which has a loss. line: its number in the log."""
    step: int
    steps: int
    val_loss: float | None
    train_ms: float
    line: int


def read_run(path: Path | str, strict: bool = False) -> Run:
    """The run of one log. RunError for a log that is none, is damaged or contradicts itself or its JSON; with strict for an unfinished one, too."""
    path = Path(path)
    lines = read_lines(path)
    run, body = read_headers(path, lines)
    events = []
    for number, line in body:
        read_line(run, events, number, line)
    check_events(run, events)
    run.points = [Point(e.step, e.step * run.config["batch_tokens"] if "batch_tokens" in run.config else None, e.train_ms, e.val_loss)
                  for e in events if e.val_loss is not None]
    run.step_ms = [event.train_ms for event in events if event.val_loss is None]
    if events:
        run.last_step, run.steps = events[-1].step, events[-1].steps
    if run.status == "unfinished" and events and events[-1].val_loss is not None and run.last_step == run.steps:
        run.status = "finished" if run.peak_memory_mib is not None or not run.facts else run.status
    if path.with_suffix(".json").exists():
        check_json(run)
    if strict and not run.finished:
        raise RunError(f"{path}: {run.status} after step {run.last_step} of {run.steps}; only finished runs count here: finish it or leave it out")
    return run


def read_folder(folder: Path | str, strict: bool = False) -> list[Run]:
    """The runs of all logs in a folder, by name. RunError if there is none, or for one that read_run refuses."""
    folder = Path(folder)
    files = log_files(folder)
    if not files:
        raise RunError(f"{folder}: {'no log (.txt or .log) in this folder' if folder.is_dir() else 'no such folder'}; give the folder that holds a run's log")
    return [read_run(file, strict) for file in files]


def log_files(folder: Path) -> list[Path]:
    """The .txt and .log files in a folder, by name, without the sources of stored records."""
    return sorted(
        path for path in folder.glob("*")
        if path.suffix in (".txt", ".log") and not re.fullmatch(r"source-[0-9a-f]{12}\.txt", path.name)
    )


def read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; give a log, RUN_ID.txt in the trainer's log folder") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: not UTF-8 text, so no log; give RUN_ID.txt of the trainer's log folder") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; give a log, RUN_ID.txt in the trainer's log folder") from None
    if not text.strip():
        raise RunError(f"{path}: empty; copy it again or leave it out")
    lines = text.split("\n")
    if lines.pop():
        raise RunError(f"{path}: truncated: the last line has no end; copy the log again or leave it out")
    return lines


@dataclass
class Header:
    """Where one header stands in a log, as indices of lines: its source, the line of '=' after it, and the first line after the header."""

    source: int
    rule: int
    end: int


def find_headers(path: Path, lines: list[str]) -> list[Header]:
    """The headers of a log: one, and another for each time that the run was resumed. RunError if there is none."""
    starts = [i for i, line in enumerate(lines[:-1]) if line == RULE and lines[i + 1].lower().startswith("running py")]
    if not starts:
        raise RunError(f"{path}: no log of this trainer or modded-nanogpt: no line of 100 '=' with \"Running Python\" or \"Running PyTorch\" after it")

    headers = []
    end = 0
    for start in starts:
        source = 0
        if headers:
            source = next((i for i in range(end, start) if lines[i] == "# ---- train_gpt" or STORED_SOURCE.match(lines[i])), start)
        end = next((i + 1 for i in range(start + 1, len(lines)) if lines[i] == RULE), len(lines))
        headers.append(Header(source, start, end))
    return headers


def read_headers(path: Path, lines: list[str]) -> tuple[Run, list[tuple[int, str]]]:
    """(a Run with source and facts, [(number, line)] after the headers); every header of a resumed run must tell of the same run."""
    run, body, end = None, [], 0
    for header in find_headers(path, lines):
        if run:
            body += enumerate(lines[end:header.source], end + 1)
        end = header.end
        source = read_source(path, "\n".join(lines[header.source:header.rule]).removeprefix(RULE).strip("\n"))
        facts = read_facts(path, lines[header.rule:end])
        if not source.strip():
            raise RunError(f"{path}: the source of the code is missing before line {header.rule + 1}; a run without its source is no evidence")
        part = Run(path, source, facts)
        if run:
            for name in ("source", "seed", "variant", "val_sha256"):
                if getattr(part, name) != getattr(run, name):
                    raise RunError(f"{path}: resumed with another {name} (line {header.rule + 1}); a run that changes on its way is no evidence, leave it out")
            if any(facts.get(name) != run.facts.get(name) for name in ("device", "world_size")):
                raise RunError(f"{path}: resumed on another device (line {header.rule + 1}), so its times mean nothing; leave it out")
        run = part
    return run, body + list(enumerate(lines[end:], end + 1))


def read_source(path: Path, text: str) -> str:
    """The source of a header: the text itself or, in a stored record, what the file that it names holds."""
    match = STORED_SOURCE.fullmatch(text)
    if not match:
        return text
    file = path.absolute().parent.parent / match[1]
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunError(f"{path}: its source is missing: there is no text {file}; put the file back from where the record came") from None
    if hashlib.sha256(source.encode()).hexdigest() != match[2]:
        raise RunError(f"{path}: its source was altered: {file} has not the SHA-256 that the log names; put the file back from where the record came")
    return source


def stored_text(run: Run) -> str:
    """The run's log as a record stores it: a line that names the source in place of each copy of it."""
    lines = read_lines(run.path)
    stored, end = [], 0
    for header in find_headers(run.path, lines):
        stored += lines[end:header.source]
        stored.append(f"source: {run.source_file} sha256 {run.source_sha256}")
        stored += lines[header.rule:header.end]
        end = header.end
    return "\n".join(stored + lines[end:]) + "\n"


def read_facts(path: Path, header: list[str]) -> dict:
    text = next((line.removeprefix("facts: ") for line in header if line.startswith("facts: ")), "{}")
    try:
        facts = json.loads(text)
        assert isinstance(facts, dict) and isinstance(facts.get("config", {}), dict)
        return facts
    except (ValueError, AssertionError):
        raise RunError(f"{path}: damaged: its facts are not a JSON object; copy the log again or leave it out") from None


def read_line(run: Run, events: list[Event], number: int, line: str):
    """Take what one line after the headers says."""
    if match := STEP.fullmatch(line):
        step, steps, val_loss, milliseconds = int(match[1]), int(match[2]), match[3], float(match[4]) * (1000 if match[5] == "s" else 1)
        if val_loss is not None:
            try:
                val_loss = float(val_loss)
            except ValueError:
                val_loss = math.nan
            if not math.isfinite(val_loss):
                raise RunError(f"{run.path}: val_loss is not a number at step {step} (line {number}: {match[3]}); the run is of no use, leave it out")
        events.append(Event(step, steps, val_loss, milliseconds, number))
    elif re.match(r"step:\d", line):
        raise RunError(f"{run.path}: damaged: line {number} is cut or no line of steps; copy the log again or leave it out")
    elif match := RESUMED.fullmatch(line):
        events[:] = [event for event in events if event.step < int(match[1]) + (event.val_loss is None)]
        run.status = "unfinished"
    elif match := STOPPED.fullmatch(line):
        run.status = match[1]
    elif line.startswith("error: ") and run.facts:
        run.status = f"failed: {line.removeprefix('error: ')}"
    for name, pattern in MEASURED.items():
        if match := pattern.fullmatch(line):
            setattr(run, name, int(match[1]) if name == "peak_memory_mib" else float(match[1]))


def check_events(run: Run, events: list[Event]):
    """RunError if a step is missing, repeated or out of order, if the time falls, or if the number of steps changes without leave to."""
    path, trained, validated, milliseconds = run.path, 0, -1, 0.0
    every_step = bool(run.facts) or any(event.val_loss is None for event in events)
    for event in events:
        place = f"at step {event.step} (line {event.line})"
        expected = trained + (event.val_loss is None)
        if every_step and event.step > expected:
            raise RunError(f"{path}: step {trained + 1} is missing {place}; copy the log again or leave it out")
        if every_step and event.step < expected or event.val_loss is not None and event.step <= validated:
            raise RunError(f"{path}: steps are repeated or out of order {place}; copy the log again or leave it out")
        if event.train_ms < milliseconds:
            raise RunError(f"{path}: train_time falls from {milliseconds:.0f} to {event.train_ms:.0f} ms {place}, so the time of the run is not known; leave it out")
        if event.steps != events[0].steps and not run.config.get("time_budget"):
            raise RunError(f"{path}: {events[0].steps} steps become {event.steps} {place}; a run's length is fixed beforehand, leave it out")
        trained, milliseconds = event.step, event.train_ms
        validated = event.step if event.val_loss is not None else validated


def check_json(run: Run):
    """RunError if the JSON beside the log is damaged or says otherwise than a finished log."""
    path = run.path.with_suffix(".json")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(saved, dict)
    except (OSError, ValueError, AssertionError):
        raise RunError(f"{path}: damaged: not a JSON object; copy it again, or delete it: the log alone will do") from None
    if not run.finished:
        if saved.get("status") == "finished":
            raise RunError(f"{run.path}: truncated: {path.name} says finished, the log ends after step {run.last_step} of {run.steps}; copy the log again or leave it out")
        return
    def agree(number, logged, tolerance):  # the log rounds
        return isinstance(number, int | float) and abs(number - logged) <= tolerance + 1e-9
    last = run.points[-1]
    differing = [name for name, logged, tolerance in (("val_loss", last.val_loss, 5e-5), ("step", last.step, 0), ("train_seconds", last.train_ms / 1000, 5e-4))
                 if not agree(saved.get(name), logged, tolerance)]
    try:
        curve = {point["step"]: point["val_loss"] for point in saved["curve"]}
    except (KeyError, TypeError):
        curve = {}
    differing += [] if curve.keys() == {p.step for p in run.points} and all(agree(curve[p.step], p.val_loss, 5e-5) for p in run.points) else ["curve"]
    differing += [name for name in ("config", "seed", "val_sha256") if saved.get(name) != run.facts.get(name)]
    differing += ["status"] if saved.get("status") != "finished" else []
    if differing:
        raise RunError(f"{run.path}: tampered: {path.name} has another {', '.join(differing)} than the log; copy both again or leave the run out")
