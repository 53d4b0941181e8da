"""Two corpora in one folder: shares of the validation data, what is in the training shards, what is refused."""

import json

import numpy as np
import pytest

from data.mixed_corpus import END_OF_TEXT, build, main, mix_stretches
from data.shards import check_folder, write_meta, write_shard
from train_gpt import Config, RunError, open_shard, validation_batches


def write_corpus(folder, byte: int, train: int, val: int):
    """Documents of 30 times one byte."""
    folder.mkdir()
    for split, count in (("train", train), ("val", val)):
        document = np.append(END_OF_TEXT, np.full(30, byte))
        write_shard(folder / f"a_{split}_000000.bin", np.tile(document, -(-count // 31))[:count])
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return str(folder)


@pytest.fixture
def corpora(tmp_path):
    return [write_corpus(tmp_path / "a", 97, 5000, 4000), write_corpus(tmp_path / "b", 98, 9000, 2000)]


@pytest.mark.parametrize("shares", [[2, 6], [1, 1], [6, 2]])
def test_validation_data_have_the_shares_from_the_first_turn_on(corpora, tmp_path, shares):
    meta = build(corpora, shares, tmp_path / "out", stretch=64)
    check_folder(tmp_path / "out")
    tokens = open_shard(tmp_path / "out/mixed_val_000000.bin")
    turn = 64 * sum(shares)
    assert len(tokens) % turn == 0 and len(tokens) == meta["val"]["tokens"]
    for rows in tokens.reshape(-1, sum(shares), 64):
        assert (rows[:, 0] == END_OF_TEXT).all()
        letters = [set(row.tolist()) - {END_OF_TEXT} for row in rows]
        assert letters == [{97}] * shares[0] + [{98}] * shares[1]

    # as far as the shorter of both goes
    lengths = [4000, 2000]
    assert len(tokens) // turn == min(length // (63 * share) for length, share in zip(lengths, shares))


def test_a_stretch_goes_on_where_the_last_one_ended():
    a, b = np.arange(1, 13, dtype=np.uint16), np.arange(101, 107, dtype=np.uint16)
    mixed = mix_stretches([a, b], [2, 1], 4).tolist()
    end = END_OF_TEXT
    assert mixed == [end, 1, 2, 3, end, 4, 5, 6, end, 101, 102, 103, end, 7, 8, 9, end, 10, 11, 12, end, 104, 105, 106]
    with pytest.raises(RunError, match=r"a turn needs \[3, 15\] validation tokens .* have \[12, 6\]"):
        mix_stretches([a, b], [1, 5], 4)


def test_a_training_shard_is_the_beginning_of_a_corpus(corpora, tmp_path):
    words = ["--shares", "1", "3", "--tokens", "6000", "--stretch", "32"]
    assert main([*corpora, "-o", str(tmp_path / "out"), *words]) == 0
    first, second = (open_shard(tmp_path / f"out/mixed_train_00000{n}.bin") for n in range(2))
    assert len(first) == 5000 and len(second) == 6000
    assert set(first.tolist()) == {97, END_OF_TEXT} and set(second.tolist()) == {98, END_OF_TEXT}
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["sources"] == corpora and meta["shares"] == [1, 3] and meta["train_tokens"] == 6000
    config = Config(data=str(tmp_path / "out"), vocab_size=257, sequence_length=32, val_tokens=256)
    assert sum(map(len, validation_batches(config))) == 8


def test_what_is_refused_is_said_in_one_line(corpora, tmp_path, capsys):
    def fault(*words):
        assert main([*map(str, words)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("mixed_corpus.py: error: ")
        return error

    out = ("-o", tmp_path / "out")
    assert "--shares takes a number from 1 on" in fault(*corpora, *out, "--shares", "0", "1")
    assert "no train shards" in fault(corpora[0], tmp_path, *out)
    assert "--stretch" in fault(*corpora, *out, "--stretch", "1")
    write_meta(tmp_path / "b", vocab_size=50257, tokenizer="gpt2")
    assert "b has 50257 token ids, and bytes have 257" in fault(*corpora, *out)
    assert not (tmp_path / "out").exists()
