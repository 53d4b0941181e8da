"""The embedded corpus: which files, in which order and split, deterministic wherever the library lies."""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data import local_corpus
from data.shards import check_folder
from tests.loading import run_module
from train_gpt import Config, RunError, TokenLoader, open_shard, validation_batches


def make_library(root: Path, modules: int = 120) -> dict[str, bytes]:
    texts = {f"pkg{i % 7}/mod{i}.py": f"# module {i} é\nx = {i}\n".encode() * (1 + i % 5) for i in range(modules)}
    left_out = {"test/a.py": b"x", "site-packages/b.py": b"x", "pkg1/tests/c.py": b"x", "_sysconfigdata_m.py": b"x",
                "pkg0/empty.py": b" \n", "notes.txt": b"x"}
    for name, text in {**texts, **left_out}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return texts


@pytest.fixture
def library(tmp_path, monkeypatch):
    texts = make_library(tmp_path / "lib")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    return texts


def documents(folder: Path, split: str) -> list[bytes]:
    tokens = np.concatenate([open_shard(path) for path in sorted(folder.glob(f"*{split}*.bin"))])
    assert tokens[0] == 256
    return [part[1:].astype(np.uint8).tobytes() for part in np.split(tokens, np.flatnonzero(tokens == 256)[1:])]


def test_every_module_once_in_its_split_and_order(tmp_path, library):
    meta = local_corpus.build(tmp_path / "out")
    by_hash = sorted(library, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    val = [name for name in by_hash if int(hashlib.sha256(b"split" + name.encode()).hexdigest(), 16) % 10 == 0]
    assert 0 < len(val) < len(by_hash) / 4
    assert documents(tmp_path / "out", "val") == [library[name] for name in val]
    assert documents(tmp_path / "out", "train") == [library[name] for name in by_hash if name not in val]
    assert meta["val"]["utf8_bytes"] == sum(len(library[name]) for name in val) and meta["val"]["documents"] == len(val)
    assert meta["train"]["tokens"] == meta["train"]["utf8_bytes"] + meta["train"]["documents"]
    assert (meta["vocab_size"], meta["end_of_text"], meta["tokenizer"]) == (257, 256, "bytes")
    check_folder(tmp_path / "out")
    assert sys.version.split()[0].rstrip("+") in meta["source"]


def test_the_same_wherever_the_library_lies(tmp_path, library, monkeypatch):
    first = local_corpus.build(tmp_path / "out")
    make_library(tmp_path / "elsewhere" / "lib")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "elsewhere" / "lib")})
    assert local_corpus.build(tmp_path / "again") == first


def test_the_real_library_trains(tmp_path):
    assert local_corpus.main(["-o", str(tmp_path)]) == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train"]["utf8_bytes"] > 2_000_000 and meta["val"]["utf8_bytes"] > 100_000
    config = Config(data=str(tmp_path), vocab_size=257)
    assert TokenLoader(config).next_batch()[0].shape == (8, 257)
    assert sum(map(np.size, validation_batches(config))) > 130_000
    text = b"".join(documents(tmp_path, "train") + documents(tmp_path, "val"))
    assert b"def dataclass(" in text and b"class JSONDecoder" in text and b"class ZipFile" in text


def test_a_python_without_library(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RunError, match="only 0 source files"):
        local_corpus.build(tmp_path / "out")
    assert local_corpus.main(["-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("local_corpus.py: error: only 0 source files")
    assert not (tmp_path / "out").exists()


def test_exit_code_and_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert run_module("data.local_corpus", "-o", tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("local_corpus.py: error: cannot write to")
