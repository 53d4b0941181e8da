"""
Shards and what lies beside them: the format byte by byte, splits over several shards, nothing half-finished, damage
noticed.
"""
import hashlib
import json
import os
import re
import struct

import numpy as np
import pytest

from data.shards import ShardWriter, check_folder, claim_folder, sha256_of, write_folder, write_meta, write_shard
from data.tokenizer import encode_bytes, write_merges
from train_gpt import RunError, open_shard, read_merges, read_meta

ONE_EACH = [("train", [1, 2, 3], 3, True), ("val", [4, 5], 2, True)]


def tokens_of(folder, pattern):
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(pattern))]).tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_shard_byte_by_byte(tmp_path):
    tokens = [0, 1, 65535, 50256]
    write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<256i", 20240520, 1, 4, 2,
                                                            *[0] * 252) + struct.pack("<4H", *tokens)
    assert open_shard(tmp_path / "a.bin").tolist() == tokens


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match="65535"):
        write_shard(tmp_path / "a.bin", [1, token])
    with pytest.raises(ValueError, match="65535"):
        ShardWriter(tmp_path, "a", "train", 256).add([token], 1)
    assert names(tmp_path) == []


def test_documents_over_several_shards(tmp_path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, n) for n in (0, 3, 25, 1, 9, 40, 5)]
    writer = ShardWriter(tmp_path, "a", "train", 256, shard_tokens=10)
    for document in documents:
        writer.add(document, len(document))
    facts = writer.close()
    expected = [token for document in documents for token in (256, *document.tolist())]
    assert tokens_of(tmp_path, "a_train_*.bin") == expected
    sizes = [len(open_shard(path)) for path in sorted(tmp_path.glob("*.bin"))]
    assert sizes == [10] * (len(expected) // 10)
    assert (facts["documents"], facts["tokens"], facts["utf8_bytes"]) == (7, len(expected), 83)
    assert facts["sha256"] == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
                               for name in names(tmp_path)}


def test_pieces_of_one_document(tmp_path):
    writer = ShardWriter(tmp_path, "a", "val", 256)
    writer.add([1, 2], 10, True)
    writer.add([3], 0, False)
    writer.add([4], 1, True)
    facts = writer.close()
    assert tokens_of(tmp_path, "*.bin") == [256, 1, 2, 3, 256, 4] and facts["documents"] == 2
    assert facts["utf8_bytes"] == 11


def test_bytes_as_tokens():
    assert encode_bytes("é\n".encode()).tolist() == [0xC3, 0xA9, 10]


def test_a_folder_and_its_meta_data(tmp_path, tiny_merges):
    meta = write_folder(tmp_path, "a", ONE_EACH, end_of_text=261, merges=tiny_merges, tokenizer="tiny", source="here")
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert (meta["vocab_size"], meta["end_of_text"], meta["tokenizer"], meta["source"]) == (262, 261, "tiny", "here")
    assert (meta["train"]["tokens"], meta["val"]["utf8_bytes"]) == (4, 2)
    assert names(tmp_path) == ["a.tiktoken", "a_train_000000.bin", "a_val_000000.bin", "meta.json"]
    assert tokens_of(tmp_path, "a_val_*") == [261, 4, 5] and read_merges(tmp_path / "a.tiktoken") == tiny_merges


def test_old_shards_and_merges_of_the_name_go(tmp_path, tiny_merges):
    documents = [("train", range(50), 50, True), ("val", range(50), 50, True)]
    write_folder(tmp_path, "a", documents, end_of_text=261, merges=tiny_merges, shard_tokens=10, tokenizer="tiny")
    assert len(names(tmp_path)) == 14
    write_folder(tmp_path, "a", ONE_EACH, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == ["a_train_000000.bin", "a_val_000000.bin", "meta.json"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RunError("x"), ZeroDivisionError])
def test_nothing_is_left_of_an_interrupted_run(tmp_path, fault):
    write_folder(tmp_path, "a", ONE_EACH, end_of_text=256, tokenizer="bytes")
    seen = []

    def documents():
        for _ in range(30):
            yield from ONE_EACH
        seen.extend(names(tmp_path))
        raise fault
    with pytest.raises(BaseException) as raised:
        write_folder(tmp_path, "a", documents(), end_of_text=256, shard_tokens=10, tokenizer="bytes")
    assert raised.type is (fault if isinstance(fault, type) else RunError)
    # the trainer finds nothing, not even the old folder
    assert len(seen) == 12 + 9 and not any(name.endswith((".bin", ".json")) for name in seen)
    assert names(tmp_path) == []


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(RunError, match="none of 2 documents fell to the val set"):
        write_folder(tmp_path, "a", [ONE_EACH[0]] * 2, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == []


def test_a_full_disk(tmp_path, monkeypatch):
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="No space left on device"):
        write_folder(tmp_path, "a", ONE_EACH * 30, end_of_text=256, shard_tokens=10, tokenizer="bytes")
    assert len(calls) == 4 and names(tmp_path) == []


def test_a_full_disk_at_the_meta_data(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.write_meta", lambda *_, **__: (_ for _ in ()).throw(RunError("full")))
    with pytest.raises(RunError, match="full"):
        write_folder(tmp_path, "a", ONE_EACH, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["my_val", "train", "train.v2", "a-val-b", "a/b", "", "a b", "*", "x" * 300])
def test_names_that_would_confuse_the_splits(tmp_path, name):
    with pytest.raises(RunError, match="cannot be called"):
        claim_folder(tmp_path, name)


@pytest.mark.parametrize("name", ["medieval", "retrieval", "training", "evaluation.v2", "strain-1", "intervals"])
def test_names_that_hold_a_split_inside_a_word(tmp_path, name):
    write_folder(tmp_path, name, ONE_EACH, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == sorted([f"{name}_train_000000.bin", f"{name}_val_000000.bin", "meta.json"])
    check_folder(tmp_path)


@pytest.mark.parametrize("other, refused", [
    ("llm_val.bin", False), ("weights.bin", False), ("medieval.bin", False), ("b_000001.bin", False),
    ("a_train_000000.bin.part", False), ("b_val_000001.bin", True), ("val-7.bin", True), ("train.val.bin", True),
    ("a_train_val_000000.bin", True), ("a_train_1.bin", True)])
def test_which_other_files_the_trainer_would_take(tmp_path, other, refused):
    (tmp_path / other).write_bytes(b"x")
    if refused:
        with pytest.raises(RunError, match=f"holds {re.escape(other)}, which the trainer would mix"):
            claim_folder(tmp_path, "a")
    else:
        claim_folder(tmp_path, "a")


def test_what_a_killed_write_left_goes_and_nothing_else(tmp_path):
    left = ["a_train_000003.bin", "a_val_000001.bin.part", ".a_train_000000.bin.part.4711", ".a_val_000000.bin.part.1"]
    others = ["a_train_notes.txt", "a_train_000000.bin.txt", "b_val.bin", "aa_train_000000.bin.part"]
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    write_folder(tmp_path, "a", ONE_EACH, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == sorted([*others, "a_train_000000.bin", "a_val_000000.bin", "meta.json"])


def test_more_shards_than_six_digits_count(tmp_path):
    writer = ShardWriter(tmp_path, "a", "train", 256, shard_tokens=1)
    writer.unfinished = [tmp_path / "none"] * 10 ** 6
    with pytest.raises(RunError, match="more than 1,000,000 shards of 1; make shards larger"):
        writer.add([], 0)


def test_shards_of_another_name_are_refused_and_kept(tmp_path):
    write_folder(tmp_path, "a", ONE_EACH, end_of_text=256, tokenizer="bytes")
    before = names(tmp_path)
    with pytest.raises(RunError, match="holds a_train_000000.bin"):
        write_folder(tmp_path, "b", ONE_EACH, end_of_text=256, tokenizer="bytes")
    assert names(tmp_path) == before


def test_other_merges_are_refused(tmp_path, tiny_merges):
    write_merges(tmp_path / "b.tiktoken", tiny_merges)
    # the same ones do no harm
    write_folder(tmp_path, "a", ONE_EACH, end_of_text=261, merges=tiny_merges, tokenizer="tiny")
    with pytest.raises(RunError, match="holds other merges"):
        write_folder(tmp_path, "a", ONE_EACH, end_of_text=262, merges=tiny_merges | {b"xx": 261}, tokenizer="tiny")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot write to .*file.*-o"):
        claim_folder(tmp_path / "file", "a")


def test_meta_data_needs_vocabulary_and_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer"):
        write_meta(tmp_path, vocab_size=257)


def test_no_meta_data(tmp_path):
    assert read_meta(tmp_path) == {}
    check_folder(tmp_path)
    write_shard(tmp_path / "a_train_000000.bin", [1])
    write_meta(tmp_path, vocab_size=2, tokenizer="elsewhere")  # and nothing recorded
    check_folder(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "a_val_000000.bin").unlink(), "no val shards"),
    (lambda folder: write_shard(folder / "a_val_000000.bin", [261, 4, 6]),
     "a_val_000000.bin is not the file that meta.json describes"),
    (lambda folder: write_shard(folder / "a_train_000001.bin", [261, 4, 5]),
     r"its train shards are not those that meta.json records \(a_train_000001.bin\)"),
    (lambda folder: (folder / "a.tiktoken").write_bytes((folder / "a.tiktoken").read_bytes().replace(b" 256", b" 261")),
     "a.tiktoken has changed"),
    (lambda folder: (folder / "vocabulary.txt").write_text("another"), "vocabulary.txt has changed")])
def test_a_changed_folder(tmp_path, tiny_merges, change, message):
    (tmp_path / "vocabulary.txt").write_text("words")
    facts = dict(end_of_text=261, merges=tiny_merges, beside=["vocabulary.txt"], tokenizer="tiny")
    write_folder(tmp_path, "a", ONE_EACH, **facts)
    check_folder(tmp_path)
    change(tmp_path)
    (tmp_path / ".checked.json").unlink()  # a file may be changed sooner than the disk's clock shows
    with pytest.raises(RunError, match=message):
        check_folder(tmp_path)
    write_folder(tmp_path, "a", ONE_EACH, **facts)
    check_folder(tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-2], "truncated"), (lambda data: data + b"\0\0", "truncated"),
    (lambda data: data[:500], "no token shard"), (lambda data: b"", "no token shard"),
    (lambda data: struct.pack("<2i", 20240520, 2) + data[8:], "no token shard"),
    (lambda data: data[:8] + struct.pack("<i", 0) + data[12:1024], "empty")])
def test_damaged_shards(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=message):
        open_shard(path)


def test_sha256_of_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of([tmp_path / "a"]) == {"a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_merges_round_trip_and_a_changed_file_is_noticed(tmp_path, tiny_merges):
    path = tmp_path / "a.tiktoken"
    for merges in (tiny_merges, tiny_merges | {b"ab": 261}, tiny_merges):  # tiktoken's cache goes by the file's name
        write_merges(path, merges)
        assert read_merges(path) == merges


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace(b" 259\n", b" 300\n"), "no whole set"),
    (lambda text: text.split(b"\n", 1)[1], "no whole set"),
    (lambda text: text + text.splitlines()[-1].replace(b" 260", b" 261"), "no whole set"),
    (lambda text: b"", "no whole set"), (lambda text: b"hello\n" + text, "no .tiktoken file"),
    (lambda text: b"a b c\n", "no .tiktoken file"), (lambda text: text + b"YQ= 261\n", "line 262 is not"),
    (lambda text: text + b"YWI= x\n", "line 262 is not"), (lambda text: text + b"YWI= 261.0\n", "line 262 is not"),
    (lambda text: text + b"YWI= -1\n", "line 262 is not"),
    (lambda text: text + b"YWI= " + b"9" * 5000, "line 262 is not"), (lambda text: text + b" 261\n", "no whole set"),
    (lambda text: text + b"YQ== 261\n", "no whole set"), (lambda text: text + b"YWI= 260\n", "no whole set"),
    (lambda text: bytes(1000), "line 1 is")])
def test_damaged_merges(tiny_tiktoken, change, message):
    tiny_tiktoken.write_bytes(change(tiny_tiktoken.read_bytes()))
    with pytest.raises(RunError, match=message):
        read_merges(tiny_tiktoken)


def test_merges_that_are_not_there(tmp_path):
    with pytest.raises(RunError, match="cannot read .*No such file"):
        read_merges(tmp_path / "a.tiktoken")
