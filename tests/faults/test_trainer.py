"""
The trainer under faults: runs killed at random moments, damaged and mutated checkpoints, settings without meaning,
consoles and terminals that go away.

The default form takes seconds; the full one, with the counts that an issue asks for, is marked slow. Counts are
printed: pytest -s shows them.
"""

import copy
import io
import locale
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import reduce
from operator import getitem
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import train_gpt
import variants
from data.shards import write_meta, write_shard
from records.runs import read_run
from tests.children import exit_code_of, in_a_child
from tests.loading import load_file
from train_gpt import (
    Config,
    RunError,
    find_checkpoint,
    main,
    make_config,
    parse_config,
    read_checkpoint,
    write_checkpoint,
)

ROOT = Path(train_gpt.__file__).resolve().parent
TINY = dict(
    vocab_size=257, document_token=256, layers=2, model_dim=16, heads=2, head_dim=8, mlp_hidden=32, sequence_length=32,
    batch_tokens=128, micro_batch_tokens=64, steps=15, val_tokens=320, val_every=5, keep_every=5, checkpoint_seconds=0,
    compile="off", device="cpu", threads=1,
)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    for name, count in dict(words_train_000000=3000, words_train_000001=2000, words_val_000000=1000).items():
        tokens = rng.integers(97, 123, count)
        tokens[::37] = 256
        write_shard(folder / f"{name}.bin", tokens)
    write_meta(folder, vocab_size=257, tokenizer="bytes", end_of_text=256)
    return folder


def arguments(corpus, folder, **changes):
    """The command line of a run in this folder."""
    words = []
    for name, value in {**TINY, "data": corpus, "log_dir": folder, "run_id": "run", **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def fails(capsys, *words) -> str:
    """The one line that a command line ends with."""
    capsys.readouterr()
    assert main([str(word) for word in words], loader=variants) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_gpt.py: error: ") and error.count("\n") == 1 and len(error) < 1000, error
    return error


# ---- Killed at any moment ---------------------------------------------------


def go_on(corpus, folder) -> list[str]:
    """
    The command line that a person gives after a kill: --resume where there is a checkpoint, else again, what the killed
    run left deleted.
    """
    if (folder / "run.pt").exists():
        return ["--resume", str(folder / "run.pt"), "--log_dir", str(folder)]
    for file in folder.glob("run*"):
        file.unlink()
    return arguments(corpus, folder)


def contents(path: Path) -> str:
    """
    The digest of all that a run's last checkpoint says of model, optimizers, loader, random state and losses, without
    times.
    """
    saved = read_checkpoint(path)
    losses = [(point["step"], point["val_loss"]) for point in saved["curve"]]
    names = "step", "tokens", "loader", "rng", "model", "trained", "average", "optimizers"
    return train_gpt.digest_of([saved[name] for name in names] + [losses])


def kill_at_a_moment(corpus, folder, number: int, chance: random.Random, seconds: float) -> int:
    """
    One kill after a random part of `seconds`, or at a random write to the disk; then the run is taken up until it ends.
    Returns the kills.
    """
    kills = 0
    for attempt in range(20):
        left = [chance.randrange(1, 60)]

        def dying(descriptor, left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

        def arm(dying=dying):
            os.fsync = dying

        by_write = attempt == 0 and chance.random() < 0.4
        child = in_a_child(go_on(corpus, folder), arm if by_write else lambda: None)
        if attempt == 0 and not by_write:
            time.sleep(chance.random() * seconds)
            try:
                os.kill(child, number)
            except ProcessLookupError:
                pass
        code = exit_code_of(child)
        if code == 0:
            return kills
        kills += 1
        assert code in (-number, 128 + number), f"exit code {code} after signal {number}"
        for file in folder.glob("run*.pt"):
            read_checkpoint(file)
        if (folder / "run.txt").exists():
            assert (folder / "run.txt").stat().st_size > 0
    raise AssertionError("the run never ended")


def assert_complete(folder, expected: str) -> list[str]:
    """A run's end is the expected one, its record complete, and nothing else left; returns its kept checkpoints."""
    assert contents(folder / "run.pt") == expected
    run = read_run(folder / "run.txt")
    assert run.finished and run.last_step == TINY["steps"] and [point.step for point in run.points] == [0, 5, 10, 15]
    kept = [f"run-step{step:06d}.pt" for step in (0, 5, 10)]
    files = ["run.txt", "run.json", "run.losses.npz", "run.pt", *kept]
    assert sorted(file.name for file in folder.iterdir()) == sorted(files)
    return kept


@pytest.mark.parametrize(
    "counts", [(1, 1, 0), pytest.param((100, 50, 50), marks=pytest.mark.slow)], ids=["short", "full"])
def test_runs_killed_at_random_moments_end_bit_equal(corpus, tmp_path, counts):
    """
    SIGKILL, SIGTERM and SIGINT: in the warm-up, a step, a validation, while a file is written; afterwards nothing is
    lost, and nothing is left. The short form kills without SIGINT, and goes on from one kept checkpoint only.
    """
    start = time.perf_counter()
    assert exit_code_of(in_a_child(arguments(corpus, tmp_path / "unbroken"))) == 0
    seconds, expected = time.perf_counter() - start, contents(tmp_path / "unbroken/run.pt")
    chance, kills = random.Random(11), 0
    for number, count in zip((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), counts):
        killed = 0
        while killed < count:
            folder = tmp_path / f"{number}-{kills + killed}-{chance.randrange(10 ** 9)}"
            killed += kill_at_a_moment(corpus, folder, number, chance, seconds)
            kept = assert_complete(folder, expected)
        if sum(counts) < 10:
            kept = kept[1:2]
        for file in kept if number == signal.SIGKILL else ():  # every kept checkpoint leads to the same end
            (folder / "run.pt").unlink()
            assert exit_code_of(in_a_child(["--resume", str(folder / file)])) == 0
            assert contents(folder / "run.pt") == expected
        kills += killed
    print(f"{kills} kills ({', '.join(map(str, counts))} or more by SIGKILL, SIGTERM, SIGINT): all ends bit-equal, no "
          "file left over")


def test_a_log_cut_anywhere_is_mended_when_the_run_goes_on(corpus, tmp_path):
    """A killed process may leave half a line, or half of a resumed run's header."""
    again = ["--resume", str(tmp_path / "run-step000010.pt")]
    assert exit_code_of(in_a_child(arguments(corpus, tmp_path))) == 0
    assert exit_code_of(in_a_child(again)) == 0
    text = (tmp_path / "run.txt").read_bytes()
    header = text.rfind(b"# ---- train_gpt\n")
    for cut in (len(text) - 7, header + 5000, header + 3, text.rfind(b"facts: ") + 40):
        (tmp_path / "run.txt").write_bytes(text[:cut])
        assert exit_code_of(in_a_child(again)) == 0
        run = read_run(tmp_path / "run.txt")
        assert run.finished and run.last_step == TINY["steps"]


# ---- Names of runs ----------------------------------------------------------


def test_an_id_is_used_once(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path)) == 0
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    error = fails(capsys, *arguments(corpus, tmp_path))
    assert (f"run.txt exists: a run's id is its own; go on with --resume {tmp_path}/run.pt, or choose another "
            "--run_id") in error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_run_under_way_is_locked(corpus, tmp_path, capsys):
    child = in_a_child(arguments(corpus, tmp_path, steps=10 ** 6, keep_every=0))
    try:
        while not (tmp_path / "run.pt").exists():
            time.sleep(0.05)
        assert "the run run is still under way" in fails(capsys, "--resume", tmp_path / "run.pt")
        assert "run.txt exists" in fails(capsys, *arguments(corpus, tmp_path))
    finally:
        os.kill(child, signal.SIGTERM)
        assert exit_code_of(child) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob(".run*"))


def test_two_starts_at_once_under_one_id(corpus, tmp_path):
    """Whatever their order, exactly one of them has the id, and its record is complete."""
    children = [in_a_child(arguments(corpus, tmp_path, keep_every=0)) for _ in range(3)]
    assert sorted(exit_code_of(child) for child in children) == [0, 1, 1]
    assert read_run(tmp_path / "run.txt").finished and not list(tmp_path.glob(".*"))


def test_ids_that_a_person_can_read_and_type():
    config = make_config(dict(TINY, variant=("swiglu_mlp:layers=0", "parallel_residual"), seed=3))
    moment, digits = r"\d{4}-\d{4}", "[0-9a-f]{4}"
    run_id = train_gpt.new_run_id(config, ALONE)
    assert re.fullmatch(rf"{moment}-cpu-swiglu_mlp\+parallel_residual-s3-{digits}", run_id)
    assert re.fullmatch(rf"{moment}-cpu-baseline-s1-{digits}", train_gpt.new_run_id(make_config(TINY), ALONE))


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path):
    names = ("1130-0412-cpu-baseline-s1-7f3a", "1130-0412-cpu-baseline-s2-aaaa", "1201-1000-cpu-x-s1-0000",
             "1201-1000-cpu-x-s1-0000-step000010")
    for number, name in enumerate(names):
        (tmp_path / f"{name}.pt").write_text("")
        os.utime(tmp_path / f"{name}.pt", (number, number))
    for text, name in {"last": names[2], "1201": names[2], "1130-0412-cpu-baseline-s2": names[1],
                       names[3]: names[3]}.items():
        assert find_checkpoint(text, tmp_path).stem == name
    for name, message in {
        "1130": "is the beginning of 2 runs: 1130-0412-cpu-baseline-s1-7f3a",
        "nothing": r"there is no checkpoint of a run 'nothing' in .* \(3 runs\)",
    }.items():
        with pytest.raises(RunError, match=message):
            find_checkpoint(name, tmp_path)


def test_a_run_is_resumed_by_a_part_of_its_name(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path, run_id="1130-0412-cpu-baseline-s1-7f3a")) == 0
    for name in ("last", "1130"):
        assert main(["--resume", name, "--log_dir", str(tmp_path)]) == 0
        assert f"resumed from {tmp_path}/1130-0412-cpu-baseline-s1-7f3a.pt at step 15" in capsys.readouterr().out


# ---- Where a run begins and goes on -----------------------------------------


def test_resume_wants_the_same_shards(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path / "logs")) == 0
    for split, kind in (("train", "training"), ("val", "validation")):
        other = tmp_path / split
        other.mkdir()
        for file in corpus.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        write_shard(other / f"words_{split}_000000.bin", np.full(2500, 99))
        error = fails(capsys, "--resume", tmp_path / "logs/run.pt", "--data", other)
        assert (f"does not hold the {kind} shards of {tmp_path}/logs/run.pt; give --data the folder that the run began "
                "with") in error
    assert read_run(tmp_path / "logs/run.txt").finished


def test_a_commit_is_recorded_only_of_the_projects_repository(tmp_path, monkeypatch):
    """A download unpacked inside another repository has no commit."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q", tmp_path], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert len(head) == 40
    (tmp_path / "inside").mkdir()
    for folder, commit in ((tmp_path / "inside", ""), (tmp_path, head)):
        shutil.copy(ROOT / "train_gpt.py", folder)
        assert load_file(folder / "train_gpt.py", monkeypatch).environment(ALONE)["git_commit"] == commit


# ---- Consoles, locales, environments ----------------------------------------


def start_python(*words, **environment) -> subprocess.CompletedProcess:
    """A process of its own; environment: what differs from this one's."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, env={**os.environ, **environment})


def has_locale(name: str) -> bool:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
        return True
    except locale.Error:
        return False
    finally:
        locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("name", ["C", "en_US.ISO-8859-1"])
def test_accents_in_any_locale_and_a_closed_console(corpus, tmp_path, name):
    """
    A variant, a folder and a log with letters that the console does not know; it closes after the first line, as under
    `train_gpt.py ... | head -1`, and training goes on.
    """
    if not has_locale(name):
        pytest.skip(f"this machine has no locale {name}")
    (tmp_path / "accented.py").write_text(
        '"""Une idée, 想法.\n\nSource: ours.\nStatus: unmeasured.\n"""\n'
        "from dataclasses import dataclass\nimport train_gpt\n\n@dataclass\nclass Options:\n"
        '    pass\n\ndef patch(options):\n    train_gpt.MLP = type("Idée", (train_gpt.MLP,), {})\n',
        encoding="utf-8",
    )
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt, variants\n"
            f"variants.__path__.append({str(tmp_path)!r}); code = train_gpt.main(sys.argv[1:], loader=variants)\n"
            "train_gpt.leave(code, alone=True)")
    os.symlink(corpus, tmp_path / "idée")
    words = arguments(corpus, tmp_path / "logs", steps=2, data=tmp_path / "idée")
    environment = {**os.environ, "LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen([sys.executable, "-c", code, *words, "--variant", "accented"], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"run run: track cpu")
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")
    run = read_run(tmp_path / "logs/run.txt")
    assert run.finished and "想法" in run.source and run.variant == ("accented",)
    assert read_checkpoint(tmp_path / "logs/run.pt")["step"] == 2


def test_without_docstrings_and_assertions(corpus, tmp_path, monkeypatch, capsys):
    """The trainer compiled as by Python's -OO: options are explained, and a run ends well."""
    file = ROOT / "train_gpt.py"
    module = ModuleType("trainer_without_docstrings")
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for it
    exec(compile(file.read_text(encoding="utf-8"), file, "exec", optimize=2), vars(module))
    assert module.__doc__ is None and module.GPT.__doc__ is None
    with pytest.raises(SystemExit) as end:
        module.parse_config(["--help"])
    assert end.value.code == 0 and "width of the residual stream" in capsys.readouterr().out
    module.measured_peak = lambda ranks: 1e11
    assert module.main(arguments(corpus, tmp_path, steps=2)) == 0
    assert read_run(tmp_path / "run.txt").finished


@pytest.mark.slow  # PyTorch is compiled anew, once for a Python
def test_a_process_without_docstrings_and_assertions(corpus, tmp_path):
    """Python's -OO itself, under which PyTorch has no docstrings either."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt\ntry:\n"
            "    train_gpt.parse_config(['--help'])\nexcept SystemExit as end:\n    print(f'help: {end.code}')\n"
            "sys.exit(train_gpt.main(sys.argv[1:]))")
    result = start_python("-OO", "-c", code, *arguments(corpus, tmp_path, steps=2))
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"\nhelp: 0\n" in result.stdout and b"width of the residual stream" in result.stdout


@pytest.mark.parametrize("name, value, message", [
    ("WORLD_SIZE", "4", "but not by torchrun"),
    ("WORLD_SIZE", "many", "is no number"),
    ("RANK", "-1", "is no number"),
])
def test_a_stray_variable_of_torchrun(corpus, tmp_path, capsys, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    error = fails(capsys, *arguments(corpus, tmp_path))
    assert message in error and f"{name}={value}" in error


def test_a_compiler_that_does_not_work(corpus, tmp_path):
    """
    auto goes on without, with a line; a mode by name is one line. A number in the tried function keeps caches out of
    it.
    """
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt\n"
            "print(train_gpt.main([*sys.argv[1:], '--compile', 'blocks']))\n"
            "print(train_gpt.main([*sys.argv[1:], '--compile', 'auto', '--steps', '100000', '--dry-run']))")
    result = start_python("-c", code, *arguments(corpus, tmp_path), CXX="/bin/false",
                          TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "a cache"))
    out, (by_name, auto) = result.stdout.decode().splitlines(), result.stderr.decode().splitlines()
    assert (out[0], out[-1]) == ("1", "0") and out[1].endswith("on 1 x cpu, compile off")
    assert by_name.startswith("train_gpt.py: error: torch.compile does not work here (")
    assert by_name.endswith("; mend it or use --compile off")
    assert auto.startswith("torch.compile does not work here (") and auto.endswith("): the run goes on without")


# ---- Settings ---------------------------------------------------------------


@pytest.mark.parametrize("name", train_gpt.RANGES)
def test_every_number_has_a_range(name):
    """Just outside it, far outside, and no number at all: one line that names the option and what it got."""
    least, most = train_gpt.RANGES[name]
    kind = {field.name: field.type for field in train_gpt.dataclasses.fields(Config)}[name]
    wrong = [least - 1, most + 1, -(10 ** 30), 10 ** 30, int("9" * 300)]
    if kind is float:
        wrong = [float(value) if value < 1e300 else value for value in wrong]
        wrong += [float("nan"), float("inf"), -float("inf")]
    for value in wrong:
        with pytest.raises(RunError) as caught:
            parse_config([f"--{name}={value}"])
        message = str(caught.value)
        assert "\n" not in message and len(message) < 300, message
        assert re.search(rf"--{name} (must be from|\S+ is not a multiple)", message), message


def test_every_number_is_in_the_table():
    kinds = int, float, tuple[int, ...]
    numbers = {field.name for field in train_gpt.dataclasses.fields(Config) if field.type in kinds}
    assert numbers == set(train_gpt.RANGES)


@pytest.mark.parametrize("words,message", [
    (["--run_id", "../escape"], "--run_id is a file's name"),
    (["--run_id", "a/b"], "--run_id is a file's name"),
    (["--run_id", ".hidden"], "--run_id is a file's name"),
    (["--run_id", "x" * 200], "--run_id is a file's name"),
    (["--run_id", "a\nb"], "--run_id must be text"),
    (["--data", "x" * 300], "cannot read the folder x+: File name too long; give --data"),
    (["--data", "x" * 5000], "--data must be text of less than 4096"),
    (["--log_dir", "y" * 300], "cannot write y+/run.txt: File name too long; choose another --log_dir"),
    (["--bigram_rows", "1"], "--bigram_rows is 0 or at least 2"),
    (["--document_token", "300"], "--document_token 300 is outside the vocabulary of 257"),
    (["--window_short", "5,-1"], "--window_short must be from 0"),
    (["--threads", "9999"], "--threads must be from 0 to 1,024"),
    (["--variant", "no_such_variant"], "unknown variant"),
])
def test_nonsense_is_one_line(corpus, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(capsys, *arguments(corpus, tmp_path / "logs"), *words))
    assert not list(tmp_path.rglob("*.txt"))


# ---- Damaged and mutated checkpoints ----------------------------------------


@pytest.fixture(scope="session")
def checkpoint(corpus, tmp_path_factory) -> bytes:
    """The file that a finished run left."""
    folder = tmp_path_factory.mktemp("checkpoint")
    assert exit_code_of(in_a_child(arguments(corpus, folder))) == 0
    return (folder / "run.pt").read_bytes()


def refused(path: Path) -> str | None:
    """
    The one line with which a checkpoint is refused; None where it is taken. Anything else that is raised is a fault.
    """
    try:
        read_checkpoint(path)
        return None
    except RunError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
        return str(error)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A damaged copy: a bit, a cut, a stretch of noise, or records of the archive exchanged, left out or doubled."""
    kind, damaged = chance.randrange(5), bytearray(content)
    start = chance.randrange(len(damaged))
    if kind == 0:
        damaged[start] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del damaged[start:]
    elif kind == 2:
        damaged[start:start + chance.randrange(1, 4000)] = chance.randbytes(chance.randrange(4000))
    else:
        return mutated_archive(content, chance, exchange=kind == 3)
    return bytes(damaged)


def mutated_archive(content: bytes, chance: random.Random, exchange: bool) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    victim = chance.randrange(len(entries))
    name, data = entries[victim]
    if exchange:
        entries[victim] = (name, entries[chance.randrange(len(entries))][1])
    else:
        choices = [], [(name, data), (name + "x", data)], [(name[:-1] + "9", data)]
        entries[victim:victim + 1] = chance.choice(choices)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_mutated_checkpoints_are_refused_or_harmless(tmp_path, checkpoint, count):
    """
    Bits, cuts, records: what is taken all the same holds exactly what was written (a change between the records of a
    file, or of one's date).
    """
    chance, path, refusals = random.Random(3), tmp_path / "mutated.pt", 0
    path.write_bytes(checkpoint)
    original = read_checkpoint(path)["digest"]
    for _ in range(count):
        path.write_bytes(mutated(checkpoint, chance))
        if refused(path):
            refusals += 1
        else:
            assert read_checkpoint(path)["digest"] == original
    print(f"{count} mutated checkpoints: {refusals} refused in one line, {count - refusals} taken with unchanged "
          "contents")
    assert refusals > count / 3


STRANGE = (
    True, None, -1, 2 ** 70, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}, (1, 2), [[]], torch.zeros(2),
    b"x", "9" * 5000,
)


def paths_in(value, path=()):
    """The keys that lead to each field of nested dicts and lists."""
    keys = range(len(value)) if isinstance(value, list) else ()
    if isinstance(value, dict):
        keys = value
    for key in keys:
        yield (*path, key)
        yield from paths_in(value[key], (*path, key))


def with_field(saved: dict, path: tuple, value) -> dict:
    changed = copy.copy(saved)
    holder = changed
    for key in path[:-1]:
        holder[key] = copy.copy(holder[key])
        holder = holder[key]
    holder[path[-1]] = value
    return changed


@pytest.mark.parametrize("count", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_strange_fields_of_a_checkpoint(tmp_path, checkpoint, corpus, count):
    """
    A sound file with another value in one field: without a fitting digest it is refused always; with one, as somebody
    could write it, it is refused in one line or it resumes, and nothing hangs. What is tried there is every setting of
    the configuration and every field of the run.
    """
    file, chance, refusals = tmp_path / "run.pt", random.Random(5), 0
    file.write_bytes(checkpoint)
    saved = read_checkpoint(file)
    content = {name: saved[name] for name in train_gpt.CHECKPOINT_FIELDS}
    fields = list(paths_in(content))
    for number in range(count):
        field = chance.choice(fields)
        sound = reduce(getitem, field, content)
        value = chance.choice([strange for strange in STRANGE if repr(strange) != repr(sound)])
        torch.save(with_field(saved, field, value), file)
        assert refused(file), (field, value)
        if number % 3:
            continue
        try:
            write_checkpoint(file, with_field(content, field, value))
        except (TypeError, pickle.PicklingError):
            continue
        if refused(file):
            refusals += 1
            continue
        words = ["--resume", str(file), "--data", str(corpus), "--log_dir", str(tmp_path / f"logs{number}"),
                 "--steps", "15"]
        code = exit_code_of(in_a_child(words, lambda: signal.alarm(60)))
        assert code in (0, 1), (field, value, code)
    print(f"{count} strange fields without a fitting digest: all refused; of {len(range(0, count, 3))} with one "
          f"{refusals} refused at reading")


@pytest.mark.parametrize("field, value, fault", [
    ("tokens", -1, "its step, tokens or time is impossible"),
    ("tokens", "many", "tokens is no int"),
    ("trained", {"embedding.weight": 3}, "its model is no tensors"),
    ("trained", None, "trained is no dict"),
    ("average", [], "average is no dict"),
    ("loader", {"epoch": 0, "shard": 0}, r"its position in the data is \[0, 0, None\]"),
])
def test_a_field_of_another_kind_is_named(tmp_path, checkpoint, field, value, fault):
    file = tmp_path / "run.pt"
    file.write_bytes(checkpoint)
    write_checkpoint(file, with_field(read_checkpoint(file), (field,), value))
    assert re.search(f"is not a whole checkpoint of this trainer: {fault}; give another one", refused(file))


def test_nothing_in_a_checkpoint_is_executed_or_unpacked_beyond_its_size(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save(dict(format=train_gpt.CHECKPOINT, model=Evil()), tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(200 << 20))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    for name in ("evil.pt", "pickle.pt", "bomb.pt"):
        assert "is not a whole checkpoint of this trainer" in refused(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_tells_whose_code_wrote_it(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path)) == 0
    saved = read_checkpoint(tmp_path / "run.pt")
    assert set(saved["sources"]) >= {"train_gpt"} and train_gpt.changed_sources(saved) == []
    others = {"train_gpt": "0" * 64, "variants.gone": "1" * 64}
    write_checkpoint(tmp_path / "run.pt", saved | dict(sources=others))
    assert main(["--resume", str(tmp_path / "run.pt"), "--log_dir", str(tmp_path / "b")]) == 0
    assert f"warning: train_gpt, variants.gone changed since {tmp_path}/run.pt was written" in capsys.readouterr().out


def test_shared_tensors_are_stored_once(corpus, tmp_path):
    """A tied embedding and head are one tensor in the file."""
    for tied in (False, True):
        assert main(arguments(corpus, tmp_path, run_id=f"tied-{tied}", tied_embedding=tied, steps=1)) == 0
    tied, untied = (read_checkpoint(tmp_path / f"tied-{value}.pt")["model"] for value in (True, False))
    names = ("embedding.weight", "head.projection.weight")
    assert len({tied[name].data_ptr() for name in names}) == 1
    assert len({untied[name].data_ptr() for name in names}) == 2
    assert torch.equal(tied[names[0]], tied[names[1]])
