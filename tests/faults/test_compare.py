"""
compare.py under faults: real comparisons that are killed, and a folder whose plan.json and state.json are damaged.

The slow forms print their counts: python -m pytest -m slow -s tests/faults/test_compare.py
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare
from compare import PLAN, STATE, Comparison, Interrupt, main
from data.shards import write_meta, write_shard
from records.report import markdown, sentences
from records.runs import read_run
from tests.records.conftest import log_lines
from tests.test_compare import module_of

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ("--layers 2 --model_dim 32 --heads 2 --head_dim 16 --mlp_hidden 64 --sequence_length 32 --batch_tokens 256 "
        "--micro_batch_tokens 256 --val_tokens 512 --val_every 0 --checkpoint_seconds 0.2").split()
# compare.py with a check of the arms that takes no time
DRIVER = ("import sys, types\nsys.path.insert(0, sys.argv.pop(1))\n"
          "sys.modules['variants.check'] = types.SimpleNamespace(faults_of=lambda config: [])\n"
          "import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
          "import compare\nsys.exit(compare.main(sys.argv[1:]))")


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for split, tokens in (("train", 40_000), ("val", 3_000)):
        write_shard(tmp_path / "corpus" / f"x_{split}_000000.bin", np.append(256, rng.integers(97, 105, tokens)))
    write_meta(tmp_path / "corpus", vocab_size=257, tokenizer="bytes")
    return tmp_path / "corpus"


# ---- Killed

class Killed:
    """
    One comparison of two real runs that is killed and called again until it ends. What is finished once must stay as it
    is.
    """

    def __init__(self, folder: Path, corpus: Path, steps: int):
        self.folder = folder
        self.logs = [folder / "logs/A0-baseline-seed1.txt", folder / "logs/A1-swiglu_mlp-seed1.txt"]
        trainer = ["--data", str(corpus), *TINY, "--steps", str(steps)]
        self.argv = ["baseline", "swiglu_mlp", "--seeds", "1", "--no-reuse", "-o", str(folder), "--", *trainer]
        self.command = [sys.executable, "-c", DRIVER, str(ROOT), *self.argv]
        self.finished = {}      # log: its time of change and content, from the call on that first found it finished
        self.resumed = 0        # how often a run went on from its checkpoint

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, cwd=self.folder.parent, env=os.environ | dict(OMP_NUM_THREADS="1"),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def look(self):
        for log in self.logs:
            state = (log.stat().st_mtime_ns, log.read_text()) if log.exists() else None
            assert self.finished.get(log, state) == state, f"{log.name} was finished and is another now"
            if state and json_status(log) == "finished" and read_run(log).finished:
                self.finished[log] = state

    def kill(self, process: subprocess.Popen, number: int) -> int:
        """Send the signal and wait; returns the exit code, after a look at what was left."""
        process.send_signal(number)
        _, errors = process.communicate(timeout=200)
        assert "Traceback" not in errors, errors
        if process.returncode == 128 + number:
            assert "compare.py: stopped; finished runs are kept, call it again to go on" in errors
        deadline = time.time() + 100  # a run outlives its killed comparison until it has saved
        while time.time() < deadline and [job for job in self.running()]:
            time.sleep(0.05)
        self.look()
        return process.returncode

    def running(self) -> list[str]:
        """The command lines of runs in this folder that are still there."""
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(file.read_text())
            except OSError:
                continue
        return [line for line in lines if "--run_id" in line and str(self.folder) in line]

    def end(self):
        """Call once more, to the end, with a console that closes after its first line."""
        process = self.start()
        assert "2 arms x 1 seeds, 2 runs" in process.stdout.readline() + process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=300) == 0 and not errors, errors
        self.look()
        assert len(self.finished) == 2
        assert {path.suffix for path in (self.folder / "logs").iterdir()} == {".txt", ".json", ".npz"}
        state = json.loads((self.folder / "state.json").read_text())
        assert not state["failed"]
        assert sorted(entry["run"] for entry in state["order"]) == [log.stem for log in self.logs]
        for log in self.logs:
            run = read_run(log)
            assert len(run.step_ms) == run.last_step == run.steps
            self.resumed += log.read_text().count("\nresumed from ")
        results = json.loads((self.folder / "results.json").read_text())
        assert [arm["status"] for arm in results["arms"]] == ["complete"] * 2 and (self.folder / "README.md").exists()


def json_status(log: Path) -> str | None:
    try:
        return json.loads(log.with_suffix(".json").read_text()).get("status")
    except (OSError, ValueError):
        return None


def wait_until(condition, process, seconds=200):
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None and not condition():
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a run ends with its comparison on Linux only")
@pytest.mark.parametrize("numbers", [
    (signal.SIGKILL,), pytest.param((signal.SIGKILL, signal.SIGHUP), marks=pytest.mark.slow)], ids=len)
def test_a_comparison_is_killed_and_loses_and_repeats_nothing(tmp_path, corpus, monkeypatch, capsys, numbers):
    """
    Killed in its first run, and in the longer form asked to stop in its second, each time where there is a checkpoint:
    the run goes on from it.
    """
    killed = Killed(tmp_path / "out", corpus, steps=80)
    for number, log in zip(numbers, killed.logs):
        process = killed.start()
        wait_until(lambda log=log: log.with_suffix(".pt").exists() and "step:20/" in log.read_text(), process)
        assert killed.kill(process, number) == (-number if number == signal.SIGKILL else 128 + number)
    assert list(killed.finished) == killed.logs[:len(numbers) - 1]
    killed.end()
    assert killed.resumed == len(numbers)

    # what they have trained, another comparison of this machine takes over
    instead = {"--no-reuse": f"--reuse={tmp_path}", str(tmp_path / "out"): str(tmp_path / "second")}
    monkeypatch.setitem(sys.modules, "variants.check", SimpleNamespace(faults_of=lambda config: []))
    assert main([instead.get(word, word) for word in killed.argv]) == 0
    out = capsys.readouterr().out
    assert out.count(": taken over from ") == 2 and "val_loss" not in out


@pytest.mark.slow
def test_comparisons_are_killed_at_random_moments(tmp_path, corpus):
    """50 kills by any signal, at any moment from the start of the script to the end of its report."""
    rng, kills, comparisons, resumed, ended = random.Random(1), 0, 0, 0, 0
    codes = {}
    while kills < 50:
        comparisons += 1
        killed = Killed(tmp_path / f"out{comparisons}", corpus, steps=rng.choice([50, 300, 600]))
        for _ in range(rng.randint(1, 6)):
            process, number = killed.start(), rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            time.sleep(rng.uniform(0, 25))
            if process.poll() is not None:
                process.communicate()
                ended += 1
                break
            code = killed.kill(process, number)
            codes[code] = codes.get(code, 0) + 1
            kills += 1
        killed.end()
        resumed += killed.resumed
    print(f"\n{kills} kills in {comparisons} comparisons, {ended} of which ended before: exit codes {codes}, {resumed} "
          "times gone on from a checkpoint; nothing lost, nothing repeated, no traceback")


# ---- Damaged files

@pytest.fixture
def folder(tmp_path, corpus, monkeypatch):
    """
    A finished comparison of one seed, made of prepared logs, and check(): its outcome now, "" or the one line that
    refuses it.
    """
    argv = ["baseline", "swiglu_mlp", "--seeds", "1", "--no-reuse", "-o", str(tmp_path / "out")]
    argv += ["--", "--data", str(corpus), "--steps", "2"]
    given, options = compare.parse_arguments(argv)
    plan, arms = compare.plan_of(given, options, argv)

    def command(self, job):
        config = json.loads(json.dumps(compare.asdict(self.config(job))))
        files = compare.source_of(job.arm.variant)
        texts = {module_of(file): (ROOT / file).read_text(encoding="utf-8") for file in files}
        lines, saved = log_lines({0: 5.0, 1: 2.0, 2: 1.0}, run_id=job.name, source=texts.pop("train_gpt"),
                                 modules=texts.items())
        facts = dict(config=config, seed=1, val_sha256=plan["data"][str(corpus)]["val"])
        at = next(i for i, line in enumerate(lines) if line.startswith("facts: "))
        lines[at] = f"facts: {json.dumps(json.loads(lines[at][7:]) | facts)}"
        (self.logs / f"{job.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.logs / f"{job.name}.json").write_text(json.dumps(saved | facts))
        return ["true"]

    def write_report(folder, results, log_x):
        json.dumps(results, allow_nan=False)
        assert markdown(results) and sentences(results)
    monkeypatch.setattr(Comparison, "command", command)
    monkeypatch.setattr(Comparison, "check_arms", lambda self: None)
    monkeypatch.setattr(compare, "write_report", write_report)
    assert main(argv) == 0
    kept = {}  # logs are read once: they are not what is damaged here
    original = Comparison.read
    monkeypatch.setattr(Comparison, "read", lambda self, job: kept.setdefault(job.name, original(self, job)))

    def check() -> str:
        try:
            with Interrupt() as interrupt:
                comparison = Comparison(tmp_path / "out", plan, arms, None, interrupt)
                comparison.open(retry=False)
                comparison.compare()
            return ""
        except compare.RunError as error:
            assert "\n" not in str(error) and len(str(error)) < 800
            return str(error)
        finally:
            comparison.lock.close()
    assert check() == ""
    return tmp_path / "out", check


def mutated_bytes(rng: random.Random, text: bytes) -> bytes:
    """A flipped bit, a cut, a piece that is missing or there twice, or bytes of another kind."""
    at, kind = rng.randrange(len(text)), rng.randrange(5)
    end = min(len(text), at + rng.randint(1, 40))
    if kind == 0:
        return text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1:]
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text[:at] + text[end:]
    if kind == 3:
        return text[:end] + text[at:]
    pieces = [b"\xff\xfe", b"\0", b"[" * 5000, b"9" * 6000, b"NaN", b"1e999", b'"\\ud800"']
    return text[:at] + rng.choice(pieces) + text[end:]


VALUES = [None, True, -1, 0, 1, 1e300, -0.5, 2 ** 80, "", "x", "\ud800", [], {}, [[]], [None], {"x": None},
          [["x", "y"]], [["x", "y", "z"]], {"x": "y"}]


def mutated_values(rng: random.Random, content) -> object:
    """The content with one value somewhere replaced by one of another kind, or removed, or one more."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        name = rng.choice(sorted(content))
        rest = {key: value for key, value in content.items() if key != name}
        change = rng.random()
        if change < 0.1:
            return rest
        return content | ({"more": rng.choice(VALUES)} if change < 0.2 else {name: mutated_values(rng, content[name])})
    if isinstance(content, list) and content and rng.random() < 0.7:
        at = rng.randrange(len(content))
        return [mutated_values(rng, value) if i == at else value for i, value in enumerate(content)]
    return rng.choice(VALUES)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_one_line_or_do_no_harm(folder, count):
    """
    Of plan.json and state.json, bytes and values in turn: what is accepted is a value that may be there, or one that a
    call writes anew.
    """
    path, check = folder
    rng = random.Random(0)
    refused = 0
    files = {name: (path / name).read_bytes() for name in ("plan.json", "state.json")}
    for n in range(count):
        name = ("plan.json", "state.json")[n % 2]
        for file, content in files.items():
            (path / file).write_bytes(content)
        if n % 4 < 2:
            changed = mutated_bytes(rng, files[name])
        else:
            changed = json.dumps(mutated_values(rng, json.loads(files[name]))).encode()
        (path / name).write_bytes(changed)
        fault = check()
        refused += bool(fault)
        assert not fault or str(path) in fault, fault
    print(f"\n{count} damaged files: {refused} refused in one line, {count - refused} accepted, 0 tracebacks")
    assert refused > count / 3


@pytest.mark.parametrize("name, kinds", [("plan.json", PLAN), ("state.json", STATE)])
def test_every_field_of_every_file_is_checked(folder, name, kinds):
    path, check = folder
    content = json.loads((path / name).read_text())
    for field in kinds:
        wrong = [-1, [[1]], {"x": [None]}, ...]
        if field not in ("margin", "design", "ledger"):  # which may be null
            wrong.append(None)
        for value in wrong:
            changed = {key: old for key, old in content.items() if key != field}
            if value is not ...:
                changed[field] = value
            (path / name).write_text(json.dumps(changed))
            assert re.search(rf"{name}: damaged: {field}\b.*; delete its folder, or choose another with -o", check())
