"""
Ready-made shards from the hub: what is fetched, kept, fetched again and refused. The hub is a function that writes
small shards.
"""
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

import train_gpt
from data import cached_fineweb10B as cached
from data.shards import check_folder, sha256_of, write_shard
from tests.loading import run_module
from train_gpt import Config, RunError, adopt_vocabulary, find_shards, open_shard, read_merges

END = 50256


def tokens_of(name: str) -> np.ndarray:
    number = int(re.search(r"\d{6}", name).group())
    return np.array([END] + [number] * (100 + number))


class Hub:
    """hf_hub_download; `fault(path)` may damage what it has written or raise."""
    def __init__(self):
        self.asked, self.repositories, self.fault = [], set(), lambda path: None
        self.offline, self.checked = False, []  # whether it can be asked for sha256; the names it was asked for

    def __call__(self, repo_id, filename, *, repo_type, local_dir):
        assert repo_type == "dataset"
        self.asked.append(filename)
        self.repositories.add(repo_id)
        path = Path(local_dir) / filename
        assert not path.exists()  # else the hub's client might keep a damaged file
        write_shard(path, tokens_of(filename))
        self.fault(path)
        return str(path)

    def get_paths_info(self, repo_id, paths, *, repo_type):
        assert repo_type == "dataset" and repo_id.startswith("kjj0/")
        if self.offline:
            raise ConnectionError("a long story\nof many lines")
        self.checked += paths
        return [SimpleNamespace(path=name, lfs=SimpleNamespace(sha256=digest_of(name))) for name in paths]


def digest_of(name: str) -> str:
    """sha256 of the shard that the hub has under a name."""
    tokens = tokens_of(name).astype("<u2")
    header = np.array([20240520, 1, len(tokens), 2, *[0] * 252], dtype="<i4")
    return hashlib.sha256(header.tobytes() + tokens.tobytes()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tiny_merges):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info",
                        lambda _api, *arguments, **named: hub.get_paths_info(*arguments, **named))
    monkeypatch.setattr(cached, "gpt2_merges", lambda: tiny_merges)
    monkeypatch.setattr("data.shards.shutil.disk_usage", lambda folder: SimpleNamespace(free=10 ** 12))
    return hub


def run(folder, *argv) -> int:
    return cached.main(["-o", str(folder), *map(str, argv)])


def fault(capsys, folder, *argv) -> str:
    """The one line of a command line that must fail."""
    assert run(folder, *argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("cached_fineweb10B.py: error: ")
    return error


def test_validation_and_training_shards(tmp_path, hub, capsys, tiny_merges):
    assert run(tmp_path / "new" / "folder", 3) == 0
    folder = tmp_path / "new" / "folder"
    assert hub.asked == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin",
                         "fineweb_train_000003.bin"]
    assert hub.repositories == {"kjj0/fineweb10B-gpt2"}
    for name in hub.asked:
        assert (open_shard(folder / name) == tokens_of(name)).all()
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["vocab_size"], meta["tokenizer"], meta["source"]) == (50257, "gpt2", "kjj0/fineweb10B-gpt2")
    digests = {name: digest_of(name) for name in hub.asked[1:]}
    assert meta["train"] == dict(shards=3, tokens=102 + 103 + 104, sha256=digests) and meta["end_of_text"] == 50256
    assert meta["val"] == dict(shards=1, tokens=101, sha256=sha256_of([folder / "fineweb_val_000000.bin"]))
    check_folder(folder)
    assert read_merges(folder / "gpt2.tiktoken") == tiny_merges
    assert "fetching fineweb_train_000003.bin (4 of 4)" in capsys.readouterr().out
    config = Config(data=str(folder))
    adopt_vocabulary(config)
    assert config.vocab_size == 50257 and len(find_shards(config, "train")) == 3
    assert len(find_shards(config, "val")) == 1


def test_nine_shards_unless_told(tmp_path, hub):
    assert run(tmp_path) == 0
    assert len(hub.asked) == 10 and hub.asked[-1] == "fineweb_train_000009.bin"


@pytest.mark.parametrize("dataset, repository, first, available", [
    ("fineweb10B", "kjj0/fineweb10B-gpt2", "fineweb", 103), ("fineweb100B", "kjj0/fineweb100B-gpt2", "fineweb", 1030),
    ("finewebedu10B", "kjj0/finewebedu10B-gpt2", "finewebedu", 99)])
def test_data_sets_and_their_ranges(tmp_path, hub, capsys, dataset, repository, first, available):
    assert run(tmp_path / "out", 1, "--dataset", dataset) == 0
    assert hub.repositories == {repository} and hub.asked == [f"{first}_val_000000.bin", f"{first}_train_000001.bin"]
    for count in (0, -1, available + 1):
        assert f"{dataset} has 1 to {available} training shards" in fault(capsys, tmp_path / "none", count, "--dataset",
                                                                          dataset)
    assert not (tmp_path / "none").exists()
    if available < 1000:
        assert run(tmp_path / "all", available, "--dataset", dataset) == 0
        assert hub.asked[-1] == f"{first}_train_{available:06d}.bin"


def test_what_is_there_stays_and_more_is_added(tmp_path, hub, capsys):
    assert run(tmp_path, 1) == 0
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin")}
    hub.asked.clear()
    assert run(tmp_path, 3) == 0
    assert hub.asked == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    assert "2 of 4 shards are there" in capsys.readouterr().out
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    hub.asked.clear()
    assert run(tmp_path, 2) == 0 and hub.asked == []
    # the trainer reads all that lie there
    assert json.loads((tmp_path / "meta.json").read_text())["train"]["shards"] == 3


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1100), lambda path: os.truncate(path, 10),
                                    lambda path: path.write_bytes(b"<html>not found</html>" * 99)])
def test_a_damaged_shard_is_fetched_again(tmp_path, hub, damage):
    assert run(tmp_path, 2) == 0
    damage(tmp_path / "fineweb_train_000001.bin")
    hub.asked.clear()
    assert run(tmp_path, 2) == 0
    assert hub.asked == ["fineweb_train_000001.bin"]
    assert (open_shard(tmp_path / hub.asked[0]) == tokens_of(hub.asked[0])).all()


def flip(path):
    """Change one bit of the last token: header and size stay right."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))  # a time of its own, however coarse the clock of the disk


def test_a_changed_token_is_fetched_again(tmp_path, hub, monkeypatch):
    assert run(tmp_path, 2) == 0
    hub.asked.clear()
    hub.checked.clear()
    with monkeypatch.context() as patch:  # all is known to be whole: no network, and no file is read again
        patch.setattr(train_gpt, "sha256_of_file", lambda path: pytest.fail("read again"))
        assert run(tmp_path, 2) == 0 and hub.asked == hub.checked == []
    for content in ("[", "{}", '{"fineweb_train_000001.bin": 3}', '{"fineweb_train_000001.bin": [1, 2]}'):
        (tmp_path / ".checked.json").write_text(content)
        assert run(tmp_path, 2) == 0 and hub.asked == []
    flip(tmp_path / "fineweb_train_000001.bin")
    assert run(tmp_path, 2) == 0 and hub.asked == ["fineweb_train_000001.bin"] and hub.checked == []
    check_folder(tmp_path)


def test_a_changed_token_comes(tmp_path, hub, capsys):
    hub.fault = lambda path: flip(path) if path.name == "fineweb_train_000001.bin" else None
    error = fault(capsys, tmp_path, 1)
    assert "what came for fineweb_train_000001.bin" in error
    assert f"its sha256 is not {digest_of('fineweb_train_000001.bin')}" in error
    assert not (tmp_path / "fineweb_train_000001.bin").exists()


def test_shards_that_the_hub_could_not_vouch_for_are_checked_later(tmp_path, hub, capsys):
    hub.offline, hub.fault = True, lambda path: flip(path) if path.name == "fineweb_train_000001.bin" else None
    assert run(tmp_path, 1) == 0
    error = capsys.readouterr().err
    assert "warning: the Hub cannot be asked for the sha256 of kjj0/fineweb10B-gpt2 (ConnectionError)" in error
    assert error.count("\n") == 1
    hub.offline, hub.fault, hub.asked = False, lambda path: None, []
    assert run(tmp_path, 1) == 0 and hub.asked == ["fineweb_train_000001.bin"] and capsys.readouterr().err == ""
    (name, digest), = sha256_of([tmp_path / "fineweb_train_000001.bin"]).items()
    assert digest == digest_of(name)


def test_a_damaged_meta_file(tmp_path, hub, capsys):
    (tmp_path / "meta.json").write_text("[]")
    assert "meta.json holds a JSON list, not an object; make the shards again" in fault(capsys, tmp_path, 1)


def test_a_truncated_file_comes(tmp_path, hub, capsys):
    hub.fault = lambda path: os.truncate(path, 1100) if path.name == "fineweb_train_000002.bin" else None
    error = fault(capsys, tmp_path, 3)
    assert "what came for fineweb_train_000002.bin" in error and "truncated" in error
    shards = sorted(path.name for path in tmp_path.glob("fineweb*"))
    assert shards == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    hub.fault, hub.asked = lambda path: None, []
    assert run(tmp_path, 3) == 0 and hub.asked == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]


@pytest.mark.parametrize("error, message", [
    (ConnectionError("a long story\nof many lines"),
     "cannot fetch fineweb_train_000001.bin of kjj0/fineweb10B-gpt2 (ConnectionError); check"),
    (ValueError("x"), "(ValueError); check the network"),
    (OSError(errno.ENOSPC, "No space left on device"), "no space left for"),
    (RuntimeError("task failed: No space left on device (os error 28)"), "no space left for"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; give another folder")])
def test_network_and_disk_fail(tmp_path, hub, capsys, error, message):
    def fail(path):
        if "train" in path.name:
            path.unlink()
            raise error
    hub.fault = fail
    assert message in fault(capsys, tmp_path, 2)
    assert [path.name for path in tmp_path.glob("fineweb*")] == ["fineweb_val_000000.bin"]  # finished shards are kept


def test_too_little_space_is_known_beforehand(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setattr("data.shards.shutil.disk_usage", lambda folder: SimpleNamespace(free=3 * 10 ** 8))
    assert "3 shards need 0.6 GB" in (error := fault(capsys, tmp_path, 2)) and "has 0.3 GB free" in error
    assert hub.asked == []
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        write_shard(tmp_path / name, tokens_of(name))
    assert run(tmp_path, 2) == 0  # one is missing, and that one fits


def test_without_merges_a_warning(tmp_path, hub, capsys, monkeypatch):
    def refuse():
        raise RunError("no network")
    monkeypatch.setattr(cached, "gpt2_merges", refuse)
    assert run(tmp_path, 1) == 0
    error = capsys.readouterr().err
    assert error == "cached_fineweb10B.py: warning: bits per byte will be missing: no network\n"
    assert (tmp_path / "meta.json").exists() and not (tmp_path / "gpt2.tiktoken").exists()


def test_folders_of_something_else(tmp_path, hub, capsys):
    assert run(tmp_path, 1, "--dataset", "fineweb100B") == 0
    assert "holds shards from kjj0/fineweb100B-gpt2" in fault(capsys, tmp_path, 1)
    assert "holds fineweb_train_000001.bin" in fault(capsys, tmp_path, 1, "--dataset", "finewebedu10B")


def test_an_interrupt(tmp_path, hub, capsys):
    def interrupt(path):
        raise KeyboardInterrupt
    hub.fault = interrupt
    assert run(tmp_path, 1) == 130 and "interrupted" in capsys.readouterr().err


def test_exit_code_and_one_line(tmp_path, capsys):
    assert run_module("data.cached_fineweb10B", "104", "-o", tmp_path) == 1
    assert capsys.readouterr() == (
        "", "cached_fineweb10B.py: error: fineweb10B has 1 to 103 training shards to fetch, got 104\n")
