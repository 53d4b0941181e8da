"""Unigram and bigram losses against a slow count by dictionaries."""
import math
from collections import Counter

import numpy as np
import pytest

from data.shards import write_meta, write_shard
from studies import ngram_loss
from studies.ngram_loss import bigram, unigram
from tests.loading import run_module


def slow_bigram(train, v, w, p):
    pairs, contexts = Counter(zip(train[:-1], train[1:])), Counter(train[:-1])
    once, twice = sum(c == 1 for c in pairs.values()), sum(c == 2 for c in pairs.values())
    discount = once / (once + 2 * twice) if once else 0.5
    if not contexts[v]:
        return p[w]
    types = sum(1 for a, _ in pairs if a == v)
    return max(pairs[v, w] - discount, 0) / contexts[v] + discount * types / contexts[v] * p[w]


def folder_of(path, train, val, vocabulary, shards=1):
    for i, part in enumerate(np.array_split(train, shards)):
        write_shard(path / f"a_train_{i:06d}.bin", part)
    write_shard(path / "a_val_000000.bin", val)
    write_meta(path, vocab_size=vocabulary, tokenizer="bytes")


def losses(capsys, *argv):
    assert ngram_loss.main([str(part) for part in argv]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    return first, {line.split()[0]: [float(word) for word in line.split()[1::2]] for line in lines}


@pytest.mark.parametrize("train", [[0, 1, 2, 0, 1, 3, 3, 0, 1, 2, 4, 4, 4, 0, 2], [0, 1] * 20, [2, 3]],
                         ids=["mixed", "nothing once", "one pair"])
def test_against_a_slow_count(train):
    V = 7
    p = unigram(np.array(train), V)
    assert np.allclose(p, [(train.count(w) + 0.5) / (len(train) + V / 2) for w in range(V)])
    assert math.isclose(p.sum(), 1)
    for v in range(V):  # 5 and 6 never occur
        got = bigram(np.array(train), np.full(V, v), np.arange(V), p)
        assert np.allclose(got, [slow_bigram(train, v, w, p) for w in range(V)], rtol=1e-12)
        assert math.isclose(got.sum(), 1) and got.min() > 0


def test_a_large_vocabulary():
    generator, V = np.random.default_rng(0), 50257
    train, val = generator.integers(0, V, 4000).astype(np.int32), generator.integers(V - 50, V, 60).astype(np.int32)
    train[::2], train[1:1000] = V - 1, generator.integers(V - 50, V, 999)  # pairs whose number does not fit in 31 bits
    p = unigram(train, V)
    listed = train.tolist()
    slow = [slow_bigram(listed, v, w, p) for v, w in zip(val[:-1].tolist(), val[1:].tolist())]
    assert np.allclose(bigram(train, val[:-1], val[1:], p), slow, rtol=1e-12)


def test_a_folder_of_bytes(tmp_path, capsys):
    generator = np.random.default_rng(1)
    text = generator.integers(97, 105, 3001)
    text[::100] = 256
    train, val = text[:2000], text[2000:]
    folder_of(tmp_path, train, val, 257, shards=3)
    first, got = losses(capsys, tmp_path)
    p = unigram(train, 257)
    nats = -np.log(p[val[1:]]).mean()
    pairs = -np.log([slow_bigram(train.tolist(), v, w, p) for v, w in zip(val[:-1].tolist(), val[1:].tolist())]).mean()
    counted = np.sum(val[1:] < 256)  # the end of text stands for no byte
    assert "2,000 training tokens, 1,000 validation tokens" in first and counted == 990
    assert got["unigram"] == pytest.approx([nats, nats * 1000 / math.log(2) / counted], abs=6e-5)
    assert got["bigram"] == pytest.approx([pairs, pairs * 1000 / math.log(2) / counted], abs=6e-5)
    # 1500 end inside the third shard
    first, got = losses(capsys, tmp_path, "--train_tokens", 1500, "--val_tokens", 300)
    assert "1,500 training tokens, 300 validation tokens" in first
    assert got["unigram"][0] == pytest.approx(-np.log(unigram(train[:1500], 257)[val[1:301]]).mean(), abs=6e-5)


def test_no_bits_per_byte_where_tokens_are_words(tmp_path, capsys):
    folder_of(tmp_path, np.arange(1000), np.arange(500), 5000)
    assert all(len(numbers) == 1 for numbers in losses(capsys, tmp_path)[1].values())


@pytest.mark.parametrize("arguments, message", [(["--val_tokens", "0"], "--val_tokens must be from 1 to"),
                                                (["--train_tokens", "1"], "too few for a bigram")])
def test_faults(tmp_path, capsys, arguments, message):
    folder_of(tmp_path, np.arange(100), np.arange(100), 257)
    assert ngram_loss.main([str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ngram_loss.py: error: ") and message in error


def test_a_token_outside_the_vocabulary(tmp_path, capsys):
    folder_of(tmp_path, np.arange(100), np.array([1, 257]), 257)
    assert ngram_loss.main([str(tmp_path)]) == 1 and "outside the vocabulary of 257" in capsys.readouterr().err


def test_exit_code_and_one_line(tmp_path, capsys):
    assert run_module("studies.ngram_loss", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ngram_loss.py: error: no train shards")
