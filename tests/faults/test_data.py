"""
Files that were changed at random, and what data/ says to them: each is accepted, or refused in one line. The counts are
printed (pytest -s).

A change is a flipped bit, a cut, a piece doubled or overwritten; in JSON and in arrays also a field deleted, renamed or
given a value that has no meaning. The slow form tries 300 of each kind instead of 60. A hang is 20 s of processor time,
so that a busy machine makes none.
"""
import gzip
import io
import json
import pickle
import random
import signal
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from data import manifold, tokenize_text
from data.shards import check_folder, write_folder
from data.tokenizer import build_encoder, write_merges
from tasks import recall, symbolic_language
from tasks.recall import Recall
from tasks.symbolic_language import Task
from train_gpt import Config, RunError, open_shard, read_merges, read_meta
from variants import topological_attention

HANG = 20  # seconds of processor time
STRANGE = [None, True, False, [], {}, "", "x", "x" * 5000, "é\ud800", -1, 0, 1, 257, 65_537, 10 ** 20, -10 ** 20, 0.5,
           -0.0, 1e308, [[]], [1, "a"], {"a": {"b": []}}, "256", "0" * 64, "../../etc/passwd", "a/b"]
INSERTED = [b"[", b"{", b'"', b"\0", b"\xff\xfe", b"9" * 5000, b"[" * 5000, b"\n", b"NaN"]
counts = pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])


class Hang(BaseException):
    """Derived so that no `except Exception` of the code under test takes it for a damaged file."""


@pytest.fixture(autouse=True)
def clock():
    """Raises Hang in a trial that takes HANG seconds of processor time; `Trials` winds it."""
    def ring(*_):
        raise Hang
    before = signal.signal(signal.SIGPROF, ring)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


class Trials:
    """Counts what becomes of trials of one kind. read: reads the file, which must be whole when the trials begin."""

    def __init__(self, kind: str, read: Callable[[], object]):
        self.kind, self.read, self.counts, self.tracebacks = kind, read, Counter(), []
        read()

    def attempt(self) -> bool:
        """Whether read() accepts; a RunError of one line is a refusal, everything else a traceback."""
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            self.read()
            outcome = "accepted"
        except RunError as error:
            outcome = "refused in one line" if len(str(error).splitlines()) == 1 else "refused in several lines"
        except Hang:
            outcome = "hangs"
        except Exception as error:
            outcome = "tracebacks"
            self.tracebacks.append(repr(error)[:300])
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.counts[outcome] += 1
        return outcome == "accepted"

    def close(self):
        """Print the counts; there must be accepted and refused ones only."""
        outcomes = ("accepted", "refused in one line", "tracebacks", "hangs")
        print(f"\n{self.kind}: {', '.join(f'{self.counts[outcome]} {outcome}' for outcome in outcomes)}")
        assert not self.tracebacks, self.tracebacks[:3]
        assert set(self.counts) <= {"accepted", "refused in one line"} and self.counts["refused in one line"] > 0


def changed(content: bytes, rng: random.Random) -> bytes:
    """Content with one to three random changes, never the same."""
    result = bytearray(content)
    while bytes(result) == content:
        for _ in range(rng.randint(1, 3)):
            size = max(1, len(result))
            start = rng.randrange(size)
            piece = bytes(result[start:start + rng.randint(1, max(1, size // 4))])
            match rng.randrange(7):
                case 0 if result:
                    result[start % len(result)] ^= 1 << rng.randrange(8)
                case 1:
                    del result[start:]
                case 2:
                    del result[start:start + len(piece)]
                case 3:
                    result[start:start] = piece
                case 4:
                    result[start:start + len(piece)] = rng.randbytes(len(piece))
                case 5:
                    result[start:start + len(piece)] = bytes(len(piece))
                case 6:
                    result[start:start] = rng.choice(INSERTED)
    return bytes(result)


def nodes(value) -> list[tuple]:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(value, key) for key, _ in items] + [node for _, inner in items for node in nodes(inner)]


def strange(value: dict, rng: random.Random) -> dict:
    """A copy of a JSON object with a field deleted, renamed or given another value."""
    value = json.loads(json.dumps(value))
    container, key = rng.choice(nodes(value))
    action = rng.randrange(6)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[rng.choice(["", "x", key.upper(), "../" + key])] = container.pop(key)
    else:
        container[key] = rng.choice(STRANGE)
    return value


def folder_of_shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    merges = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    documents = [(split, rng.integers(0, 258, 40), 40, True) for split in ("train", "val") for _ in range(5)]
    write_folder(folder, "a", documents, end_of_text=258, merges=merges, shard_tokens=100, tokenizer="tiny")
    check_folder(folder)
    return folder


@counts
def test_meta_json(tmp_path, count):
    folder, rng = folder_of_shards(tmp_path / "a"), random.Random(1)
    path = folder / "meta.json"
    content = path.read_bytes()

    def read():
        meta = read_meta(folder)
        assert type(meta["vocab_size"]) is int and 0 <= meta.get("end_of_text", 0) < meta["vocab_size"] <= 2 ** 16
        check_folder(folder)
    trials, values = Trials("meta.json, changed bytes", read), Trials("meta.json, changed values", read)
    for _ in range(count):
        path.write_bytes(changed(content, rng))
        trials.attempt()
        path.write_text(json.dumps(strange(json.loads(content), rng)), encoding="utf-8")
        values.attempt()
    trials.close()
    values.close()


@pytest.mark.parametrize("content", ["[]", "{", '{"tokenizer": "bytes"}', '{"vocab_size": 100000}',
                                     '{"vocab_size": true}', '{"vocab_size": "257"}',
                                     '{"vocab_size": 1e2}', '{"vocab_size": 257, "end_of_text": 257}',
                                     '{"vocab_size": 257, "end_of_text": -1}',
                                     '{"vocab_size": 257, "train": []}',
                                     '{"vocab_size": 257, "val": {"sha256": {"a.bin": "00"}}}', "[" * 100_000,
                                     '{"vocab_size": 257, "train": {"sha256": {"../a.bin": "' + "0" * 64 + '"}}}',
                                     '{"vocab_size": NaN}', "\xff",
                                     '{"vocab_size": 257, "beside": 3}', '{"vocab_size": ' + "9" * 5000 + "}"])
def test_meta_json_of_another_tool(tmp_path, content):
    (tmp_path / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match=r"meta\.json.*--vocab_size") as raised:
        check_folder(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@counts
def test_merges(tmp_path, count):
    path, rng = tmp_path / "a.tiktoken", random.Random(2)
    merges = {bytes([b]): b for b in range(256)} | {b"t" + bytes([97 + i]): 256 + i for i in range(20)}
    write_merges(path, merges)
    content, trials = path.read_bytes(), Trials("merges", lambda: build_encoder(read_merges(path))(["the text"]))
    for _ in range(count):
        path.write_bytes(changed(content, rng))
        trials.attempt()
    trials.close()


@counts
def test_changed_shards_are_found(tmp_path, count):
    """All are, by the sha256 of meta.json. open_shard alone cannot see what keeps header and size."""
    folder, rng = folder_of_shards(tmp_path / "a"), random.Random(3)
    shards = sorted(folder.glob("*.bin"))
    trials = Trials("shards, by their sha256", lambda: check_folder(folder))
    headers = Trials("shards, without it", lambda: [open_shard(path) for path in shards])
    for number in range(count):
        path = rng.choice(shards)
        content = path.read_bytes()
        header, body = content[:1024], content[1024:]
        path.write_bytes(changed(header, rng) + body if number % 2 else header + changed(body, rng))
        (folder / ".checked.json").unlink()  # a file may be changed sooner than the disk's clock shows
        trials.attempt()
        headers.attempt()
        path.write_bytes(content)
        check_folder(folder)
    trials.close()
    headers.close()
    assert trials.counts == {"refused in one line": count}


def inputs(rng: random.Random) -> dict[str, bytes]:
    """{name: content} of a file of every kind that tokenize_text.py reads."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["".join(rng.choices("the inn é 中\n", k=30)) for _ in range(20)]
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in texts).encode()
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), table)
    return {"a.txt": "".join(texts).encode(), "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines),
            "a.txt.gz": gzip.compress(lines),
            "a.json.zst": pyarrow.compress(lines, codec="zstd", asbytes=True), "a.parquet": table.getvalue()}


@counts
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.json.zst", "a.parquet"])
def test_text_to_tokenize(tmp_path, count, name):
    rng, path, out = random.Random(4), tmp_path / name, tmp_path / "out"
    content = inputs(rng)[name]
    path.write_bytes(content)

    def read():
        error = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(error):
            code = tokenize_text.main([str(path), "-o", str(out), "--tokenizer", "bytes"])
        if code:
            assert not list(out.glob("*.bin*"))
            raise RunError(error.getvalue().removesuffix("\n"))
        check_folder(out)
    trials = Trials(name, read)
    for _ in range(count):
        path.write_bytes(changed(content, rng))
        trials.attempt()
    trials.close()


@pytest.fixture
def laplacian(tmp_path) -> Path:
    """A file of data/manifold.py with all its arrays."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30, 6)).astype(np.float32) + 1
    matrix = manifold.laplacian_of(manifold.weights(manifold.cosines(vectors), manifold.Graph()))
    provenance = dict(source="corpus", tau=dict(mode="median", percentile=50.0))
    path = tmp_path / "a.npz"
    manifold.Manifold(matrix, provenance, vectors, np.arange(1, 31), np.arange(30), np.array(list("abcdef"))).save(path)
    return path


def use(path: Path):
    """All that reads such a file here."""
    manifold.summary(manifold.read_manifold(path))
    manifold.from_random(str(path))


@counts
def test_changed_laplacians(laplacian, count):
    """The archive has checksums of its own: what is accepted holds the same numbers."""
    content, rng, original = laplacian.read_bytes(), random.Random(5), manifold.read_manifold(laplacian)
    trials = Trials("laplacians, changed bytes", lambda: use(laplacian))
    for _ in range(count):
        laplacian.write_bytes(changed(content, rng))
        if trials.attempt():
            again = manifold.read_manifold(laplacian)
            assert (again.laplacian == original.laplacian).all() and (again.vectors == original.vectors).all()
    trials.close()


@counts
def test_laplacians_of_wrong_values(laplacian, count):
    rng, trials = random.Random(6), Trials("laplacians, changed values", lambda: use(laplacian))
    with np.load(laplacian) as file:
        arrays = dict(file)
    others = [np.zeros(0), np.float64(np.nan), np.array("text"), np.array(["a", "b"]), np.array(b"x"), np.array(True),
              np.array(1 + 2j), np.array(np.datetime64("2024-01-01")), np.arange(30.0), np.zeros(30, np.int64),
              np.eye(6, 5), -np.eye(6), np.zeros((6, 6)), np.full((6, 6), np.inf), np.zeros((2, 2, 2)),
              np.zeros((30, 6), np.float32), np.full((30, 6), np.nan, np.float32)]
    for _ in range(count):
        wrong, name = dict(arrays), rng.choice(sorted(arrays))
        match rng.randrange(5):
            case 0:
                del wrong[name]
            case 1 | 2:
                wrong[name] = rng.choice(others)
            case _:
                wrong["provenance"] = np.array(json.dumps(strange(json.loads(str(arrays["provenance"])), rng)))
        np.savez(laplacian, **wrong)
        trials.attempt()
    trials.close()


class Malicious:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickle_is_refused_and_not_executed(laplacian, tmp_path):
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(mark))).close()
    assert mark.exists()  # it would work
    mark.unlink()
    with np.load(laplacian) as file:
        arrays = dict(file)
    for name in arrays:
        harmful = np.empty((), dtype=object)
        harmful[()] = Malicious(mark)
        np.savez(laplacian, **arrays | {name: harmful})
        if name != "tau":  # which is made anew
            with pytest.raises(RunError):
                use(laplacian)
        assert not mark.exists()


def test_a_zip_bomb_is_not_unpacked(laplacian, monkeypatch):
    monkeypatch.setattr(topological_attention, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(laplacian, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("laplacian.npy", bytes(1 << 24))
    assert laplacian.stat().st_size < 1 << 16
    monkeypatch.setattr(np, "load", lambda path: pytest.fail("the file was read"))
    with pytest.raises(RunError, match="unpacks to 16,777,216 bytes, more than the 1,048,576"):
        manifold.read_manifold(laplacian)


@counts
def test_tasks_in_meta_json(tmp_path, count):
    """The settings of the two synthetic tasks, and the tests of the symbolic language."""
    rng, folders = random.Random(7), dict(recall=tmp_path / "recall", symbolic_language=tmp_path / "symbols")
    recall.make(folders["recall"], Recall(2, 3, 2, 1), 5, 5, seed=1)
    task = Task(("add", "chain"), digits=2, depth=2, sequence_length=128)
    symbolic_language.make(folders["symbolic_language"], task, 20, 20, 3, seed=1)
    test_file = folders["symbolic_language"] / symbolic_language.TESTS
    meta, tests = {field: read_meta(folder) for field, folder in folders.items()}, test_file.read_bytes()

    def write(field, settings):
        task = "recall" if field == "recall" else "symbolic_language"
        (folders[task] / "meta.json").write_text(json.dumps(meta[task] | {field: settings}), encoding="utf-8")

    def read_symbols():
        task, found = symbolic_language.read_tests(folders["symbolic_language"], 3, 1)
        right = [symbolic_language.mark(task, test, test["solution"].split()) for test in found]
        symbolic_language.tables(right, task)
    recalls = Trials("recall's settings", lambda: recall.read_task(Config(data=str(folders["recall"]))))
    symbols, lines = Trials("the language's settings", read_symbols), Trials("the language's tests", read_symbols)
    for _ in range(count):
        for field, trials in dict(recall=recalls, symbolic_language=symbols).items():
            write(field, strange(meta[field][field], rng))
            trials.attempt()
            write(field, meta[field][field])
        test_file.write_bytes(changed(tests, rng))
        with pytest.raises(RunError, match="symbolic_test.jsonl has changed since it was written"):
            read_symbols()
        write("beside", {})  # without its sha256 the lines are judged by themselves
        lines.attempt()
        write("beside", meta["symbolic_language"]["beside"])
        test_file.write_bytes(tests)
    for trials in (recalls, symbols, lines):
        trials.close()
