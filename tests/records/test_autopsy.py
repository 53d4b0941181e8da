"""
The autopsy on made-up arms whose loss is lower at known tokens only, its distances against a loop, its intervals
against Student's and by simulation, and its files and folders where they are damaged, other ones or missing.
"""

import io
import json
import pickle
import re
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from data.shards import write_folder
from records import autopsy as module
from records import verdicts
from records.autopsy import (
    Sums,
    dissect,
    dissect_runs,
    interval_of,
    read_losses,
    read_spellings,
    resample,
    validation_tokens,
)
from records.autopsy_words import (
    autopsy_lines,
    autopsy_sentence,
    autopsy_svg,
    autopsy_table,
    draw_autopsy,
    ends_of,
)
from records.runs import read_run
from records.splits import (
    KINDS,
    LINES,
    classify_lines,
    last_occurrences,
    make_splits,
    read_text,
    split_kinds,
    split_positions,
    string_spans,
)
from train_gpt import Config, RunError
from train_gpt import main as train

END = 256
T = 64          # tokens of a row
ROWS = 100
BYTES = [bytes([i]) for i in range(256)] + [b""]
DOCUMENT = b'''#!/usr/bin/env python
"""A module.

It has two paragraphs."""
import os  # "not a string
from sys import (
    path)


class A(dict):  # a class:
    \'\'\'Of one line.\'\'\'
    x = """no
docstring"""
    async def f(self):
        # says nothing
        r"""Raw \\""" and
        goes on"""
        return {"a":
                "b"}, 'it''s'
'''
KINDS_OF_LINES = [
    "comments", "docstrings", "docstrings", "docstrings", "imports", "imports", "other code", "blank lines",
    "blank lines", "def and class", "docstrings", "other code", "other code", "def and class", "comments", "docstrings",
    "docstrings", "other code", "other code"]


def write_document(rng) -> bytes:
    """A made-up Python file of some 500 bytes, whose names return."""
    names = [bytes(rng.integers(97, 123, rng.integers(4, 9)).tolist()) for _ in range(6)]

    def pick():
        return names[rng.integers(len(names))]

    lines = [b'"""' + b" ".join(pick() for _ in range(12)) + b'."""']
    for _ in range(4):
        lines += [b"", b"def %b(%b):" % (pick(), pick()), b"    # %b %b" % (pick(), pick())]
        lines += [b"    %b = %b + %d" % (pick(), pick(), rng.integers(10 ** 6)) for _ in range(3)]
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """(ROWS T + 1,) bytes of some fifteen documents of about equal length."""
    rng = np.random.default_rng(3)
    text = []
    while len(text) <= ROWS * T:
        text += [END, *write_document(rng)]
    return np.array(text[:ROWS * T + 1], dtype=np.uint16)


def make_pairs(mask, count=5, effect=-0.5, noise=0.0, seed=0):
    """Pairs whose arm has another loss where the mask is, by an amount that binary fractions have exactly."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        baseline = rng.integers(64, 512, (ROWS, T)) / 64
        arm = baseline + effect * mask.reshape(ROWS, T) + noise * rng.standard_normal((ROWS, T))
        pairs.append((arm.astype(np.float32), baseline.astype(np.float32)))
    return pairs


def run_dissect(pairs, tokens, **options):
    """dissect() of bytes of Python."""
    return dissect(pairs, tokens, END, **dict(spellings=BYTES, python=True, resamples=300) | options)


def bins_of(result, name):
    """{label: bin} of a split."""
    split, = [split for split in result["splits"] if split["name"] == name]
    return {entry["label"]: entry for entry in split["bins"]}


# ---- Distances and positions

def seen_by_loop(tokens, row_tokens, document_mask):
    """For each input the first one that the model sees."""
    starts = []
    for i in range(len(tokens) - 1):
        start = i - i % row_tokens
        while document_mask and END in tokens[start + 1:i + 1]:
            start += 1
        starts.append(start)
    return starts


def distance_by_loop(tokens, start, i, n):
    """The distance back from input i to the last end of the same n tokens; -1 for none, -2 for fewer than n tokens."""
    if i - start + 1 < n:
        return -2
    context = tokens[i - n + 1:i + 1]
    for j in range(i - 1, start + n - 2, -1):
        if tokens[j - n + 1:j + 1] == context:
            return i - j
    return -1


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("alphabet, row_tokens, rows, ends", [
    (2, 37, 9, 0.05), (3, 16, 20, 0.2), (2, 300, 1, 0.0), (1, 13, 5, 0.3), (5, 2, 8, 0.1)])
def test_distances_against_a_loop(alphabet, row_tokens, rows, ends, document_mask):
    rng = np.random.default_rng(alphabet * row_tokens)
    tokens = rng.integers(0, alphabet, rows * row_tokens + 1).astype(np.uint16)
    tokens[rng.random(len(tokens)) < ends] = END
    text = read_text(tokens, row_tokens, END, document_mask, None, False)
    listed = tokens.tolist()
    starts = seen_by_loop(listed, row_tokens, document_mask)
    assert text.starts.tolist() == starts

    lengths = []
    for n, distances in last_occurrences(text):
        lengths.append(n)
        assert distances.tolist() == [distance_by_loop(listed, start, i, n) for i, start in enumerate(starts)]
    assert lengths == [2, 4, 8]


def test_positions():
    """0, 1, 2 to 3, 4 to 7 tokens before the input, from the row's start and the document's."""
    tokens = np.array([1] * 11 + [END] + [1] * 13, dtype=np.uint16)
    split = split_positions(read_text(tokens, 12, END, True, None, False))
    assert split.labels == ["0", "1", "2 to 3", "4 to 7", "8 to 15"]
    assert split.bins.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 0] + [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    unmasked = split_positions(read_text(tokens, 12, END, False, None, False))
    assert unmasked.bins.tolist() == 2 * [0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]


# ---- Made-up arms

def mask_of_recall(tokens, n, most):
    distances = dict(last_occurrences(read_text(tokens, T, END, True, None, False)))[n]
    return (distances > 0) & (distances <= most)


def mask_of_lines(tokens, kind):
    """By reading the text as lines: good for documents whose docstring is one line."""
    text = bytes(np.where(tokens == END, 10, tokens).astype(np.uint8).tolist())
    kinds = {b'"': "docstrings", b"d": "def and class"}
    mask = [kinds.get(line.lstrip()[:1]) == kind for line in text.splitlines(keepends=True) for _ in line]
    return np.array(mask)[1:] & (tokens[1:] != END)


def mask_of_rare(tokens, fewer):
    return np.bincount(tokens[1:])[tokens[1:]] < fewer


PLANTED = {
    "recall": (lambda x: mask_of_recall(x, 4, T), "recall 4", "tokens whose context of 4 stood earlier in the row"),
    "short recall": (lambda x: mask_of_recall(x, 2, 15), "recall 2",
                     "tokens whose context of 2 stood at most 15 tokens earlier in the row"),
    "long recall": (lambda x: mask_of_recall(x, 8, T), "recall 8",
                    "tokens whose context of 8 stood earlier in the row"),
    "position": (lambda x: (np.arange(ROWS * T) - read_text(x, T, END, True, None, False).starts) < 4, "position",
                 "tokens that are predicted from at most 4 tokens"),
    "late": (lambda x: (np.arange(ROWS * T) - read_text(x, T, END, True, None, False).starts) >= 16, "position",
             "tokens that are predicted from more than 16 tokens"),
    "digits": (lambda x: (x[1:] >= 48) & (x[1:] < 58), "kind", "numbers"),
    "docstrings": (lambda x: mask_of_lines(x, "docstrings"), "line", "the bytes of docstrings"),
    "rare": (lambda x: mask_of_rare(x, 64), "frequency",
             "targets that stand fewer than 64 times in the validation text"),
}


@pytest.mark.parametrize("effect", [-0.5, 0.25])
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_lower_loss_at_known_tokens_only(tokens, name, effect):
    """The sentence names these tokens, they have all of the difference, and the other bins of their split nothing."""
    make_mask, split, words = PLANTED[name]
    mask = make_mask(tokens)
    assert 0.005 < mask.mean() < 0.8
    result = run_dissect(make_pairs(mask, effect=effect), tokens)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["drawn"] == ["seeds", "documents"]
    assert result["difference"]["mean"] == pytest.approx(effect * mask.mean(), abs=1e-12)

    # what stands out
    standing = result["stands_out"]
    assert (standing["split"], standing["tokens_that"]) == (split, words)
    assert standing["share"] == pytest.approx(mask.mean(), abs=1e-12)
    assert standing["contribution"] == pytest.approx(effect * mask.mean(), abs=1e-12)
    assert standing["low"] <= standing["contribution"] <= standing["high"]

    # the bins: an equal difference within, or none at all
    bins = bins_of(result, split)
    for entry in bins.values():
        expected = effect if entry["contribution"] else 0.0
        assert entry["difference"] == pytest.approx(expected, abs=1e-12)
        if not entry["contribution"]:
            assert entry["low"] == pytest.approx(0, abs=1e-12) == entry["high"]
    assert sum(entry["tokens"] for entry in bins.values() if entry["contribution"]) == mask.sum()

    # in words
    direction = "better" if effect < 0 else "worse"
    size = f"{abs(effect) * mask.mean():.4f}"
    assert autopsy_sentence(result).startswith(
        f"{size} of the {size} nats by which the arm is {direction} come from {words} (95 % ")


@pytest.mark.parametrize("name", ["recall", "position", "digits"])
def test_the_same_under_noise(tokens, name):
    """Noise of the effect's size at every token changes neither the set nor, beyond its error, its contribution."""
    make_mask, _, words = PLANTED[name]
    mask = make_mask(tokens)
    result = run_dissect(make_pairs(mask, count=6, noise=0.5), tokens)
    standing = result["stands_out"]
    error = 5 * 0.5 * np.sqrt(mask.sum() / 6) / mask.size  # of the mean over six pairs, five standard deviations
    assert standing["tokens_that"] == words
    assert standing["contribution"] == pytest.approx(-0.5 * mask.mean(), abs=error)


@pytest.mark.parametrize("document_mask", [True, False])
def test_contributions_add_up(tokens, document_mask):
    """Of every split, for losses of float16 as runs keep them, to rounding."""
    rng = np.random.default_rng(1)
    pairs = [tuple(rng.gamma(1, 1, (ROWS, T)).astype(np.float16) for _ in range(2)) for _ in range(3)]
    result = run_dissect(pairs, tokens, document_mask=document_mask)
    exact = np.mean([arm.astype(np.float64) - baseline for arm, baseline in pairs])
    scale = np.mean([np.abs(arm.astype(np.float64) - baseline) for arm, baseline in pairs])
    assert result["difference"]["mean"] == pytest.approx(exact, abs=1e-7 * scale)  # single differences are float32
    names = [split["name"] for split in result["splits"]]
    assert names == ["position", "recall 2", "recall 4", "recall 8", "frequency", "kind", "line", "document"]
    for split in result["splits"]:
        total = sum(entry["contribution"] for entry in split["bins"])
        assert total == pytest.approx(result["difference"]["mean"], abs=1e-12), split["name"]
        assert sum(entry["tokens"] for entry in split["bins"]) == ROWS * T
        assert sum(entry["share"] for entry in split["bins"]) == pytest.approx(1)


def test_documents(tokens):
    """Those with the largest contributions by name, the others as one, and how the difference is spread."""
    documents = np.cumsum(tokens[:-1] == END) - 1
    result = run_dissect(make_pairs(np.isin(documents, (2, 7))), tokens)
    bins = list(bins_of(result, "document").values())
    sizes = np.bincount(documents)
    first, second = sorted((2, 7), key=lambda number: -sizes[number])
    for entry, number in zip(bins, (first, second)):
        assert entry["label"].startswith(f'document {number + 1}: """')
        assert entry["tokens"] == sizes[number]
        assert entry["difference"] == entry["low"] / entry["share"] == pytest.approx(-0.5)  # all seeds agree
    assert [entry["contribution"] for entry in bins[2:]] == [0] * 7
    assert bins[-1]["label"] == f"{len(sizes) - 8} others"
    assert result["spread"] == dict(documents=len(sizes), lower=2, higher=0, quartiles=[0, 0, 0])
    assert result["documents"] == len(sizes)


# ---- Where nothing stands out

def test_equal_runs(tokens):
    baseline = make_pairs(np.zeros(ROWS * T))[0][1]
    result = run_dissect([(baseline, baseline)] * 3, tokens)
    assert result["difference"] == dict(mean=0, low=0, high=0) and result["stands_out"] is None
    assert "not distinguishable from zero" in autopsy_sentence(result)


def test_a_difference_that_is_spread_evenly(tokens):
    result = run_dissect(make_pairs(np.ones(ROWS * T), noise=0.3), tokens)
    assert result["stands_out"] is None
    number = r"-0\.\d{4}"
    assert re.match(rf"The difference of {number} nats \(95 % {number} to {number}\) is spread evenly, as far as 5 ",
                    autopsy_sentence(result))


def test_how_often_something_stands_out_by_chance(tokens):
    """
    Differences that have noise by token, document and seed, and by seed also in the bins of every split, but are spread
    evenly: at most one in twenty stands out. More than 6 of 40 then have a probability of 0.3 %.
    """
    rng = np.random.default_rng(2)
    text = read_text(tokens, T, END, True, BYTES, True)
    splits = make_splits(text)
    clusters, _ = module.choose_clusters(text)
    standing = 0
    for trial in range(40):
        of_documents = rng.normal(-0.05, 0.02, clusters.max() + 1)[clusters]
        pairs = []
        for _ in range((2, 3, 4, 6)[trial % 4]):
            difference = of_documents + rng.normal(rng.normal(0, 0.02), 0.3, len(clusters))
            for split in splits:
                difference += rng.normal(0, 0.02, len(split.labels))[split.bins]
            pairs.append((difference.reshape(ROWS, T), np.zeros((ROWS, T))))
        sums = module.sum_bins(pairs, splits, clusters)
        standing += module.judge_sets(splits, sums, resample(sums, 200)) is not None
    assert standing <= 6


# ---- Intervals

def sums_of_one_bin(differences, sizes):
    """Sums of differences (P, C), the means of clusters of these sizes (C,)."""
    sums = differences * sizes
    return Sums(sums.sum(axis=1, keepdims=True), sums.mean(axis=0)[:, None], sizes[:, None], sizes)


@pytest.mark.parametrize("n", [6, 12, 50])
@pytest.mark.parametrize("over", ["seeds", "documents"])
def test_intervals_are_as_wide_as_students(over, n):
    """Where only seeds differ, and where only documents do. 4,000 resamples give a quantile's error of some 4 %."""
    values = np.random.default_rng(n).normal(-0.1, 1, n)
    differences = np.tile(values, (20, 1)).T if over == "seeds" else np.tile(values, (3, 1))
    contributions = resample(sums_of_one_bin(differences, np.full(differences.shape[1], 10)), 4000).contributions()
    low, high = interval_of(contributions[:, 0])
    student = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert high - low == pytest.approx(student.high - student.low, rel=0.15)
    assert low < values.mean() < high


@pytest.mark.parametrize("seeds, documents, both", [(0.1, 0, 0), (0, 1, 0), (0.1, 0.5, 0.5)])
def test_intervals_hold_the_true_difference(seeds, documents, both):
    """In 95 % of all cases or more; of 100, fewer than 89 would have a probability of 0.4 %."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(100):
        sizes = rng.integers(50, 150, 25)
        differences = rng.normal(0, seeds, (6, 1)) + rng.normal(0, documents, 25) + rng.normal(0, both, (6, 25)) - 0.3
        low, high = interval_of(resample(sums_of_one_bin(differences, sizes), 200).contributions()[:, 0])
        held += low <= -0.3 <= high
    assert held >= 89


def test_one_pair_and_few_documents(tokens):
    """One pair: documents alone. Few documents, or one that has most of the text: rows. One row: no interval."""
    mask = PLANTED["digits"][0](tokens)
    one = run_dissect(make_pairs(mask, count=1), tokens)
    assert one["drawn"] == ["documents"]
    assert autopsy_sentence(one).startswith("For one pair, and another may say otherwise: 0.0")
    assert {entry["low"] for entry in bins_of(one, "document").values()} == {None}
    assert any("what another seed would change" in line for line in autopsy_lines(one))

    few = tokens.copy()
    few[np.flatnonzero(few == END)[3:]] = 10
    rows = run_dissect(make_pairs(mask), few)
    assert rows["drawn"] == ["seeds", "rows"] and rows["documents"] == 3 and rows["equal_documents"] < 3
    assert any(line.startswith("Rows are drawn in place of documents") for line in autopsy_lines(rows))

    arm, baseline = make_pairs(mask, count=1)[0]
    row = run_dissect([(arm[:1], baseline[:1])], few[:T + 1])
    assert row["drawn"] == [] and row["difference"]["low"] is None and row["stands_out"] is None
    assert "no interval can be had" in autopsy_sentence(row)
    assert {entry["low"] for split in row["splits"] for entry in split["bins"]} == {None}


def test_seeded(tokens):
    pairs = make_pairs(PLANTED["digits"][0](tokens), noise=0.1)
    assert run_dissect(pairs, tokens) == run_dissect(pairs, tokens)


@pytest.mark.parametrize("pairs, size, message", [
    ([], 5, "no pairs"),
    ([(np.zeros((2, 2)), np.zeros((1, 2)))], 5, "one shape"),
    ([(np.zeros(4), np.zeros(4))], 5, "one shape"),
    ([(np.zeros((2, 2)), np.zeros((2, 2)))], 4, "one token more"),
])
def test_arrays_that_do_not_fit(pairs, size, message):
    with pytest.raises(ValueError, match=message):
        dissect(pairs, np.zeros(size, dtype=np.uint16), END)


# ---- Kinds

def kinds_of(tokens, spellings):
    """The label of each target after the first token."""
    split = split_kinds(read_text(np.array([0, *tokens], dtype=np.uint16), len(tokens), END, True, spellings, False))
    return [split.labels[kind] for kind in split.bins]


def test_kinds_of_bytes():
    text = "if x_1é2\t!=\n\x07".encode()
    word, begin, digit, space, newline, sign, foreign, control = (label.format("letters") for label in KINDS)
    assert kinds_of([*text, END], BYTES) == [
        begin, word, space, begin, word, digit, foreign, foreign, digit, space, sign, sign, newline, control, control]


def test_kinds_of_merges():
    spellings = [b"", b"the", b" the", b"re", b" 2024", b"!", b" (", b"  ", b"\n\n", "é".encode(), b" \n", b"_x"]
    tokens = [1, 3, 2, 3, 4, 3, 5, 3, 6, 7, 8, 9, 3, 10, 11, 50]
    word, begin, digit, space, newline, sign, foreign, control = (label.format("tokens") for label in KINDS)
    assert kinds_of(tokens, spellings) == [
        begin, word, begin, word, digit, word, sign, begin, sign, space, newline, foreign, word, newline, begin,
        control]


def test_kinds_of_lines():
    kinds = classify_lines(DOCUMENT)
    lines = DOCUMENT.splitlines(keepends=True)
    assert len(lines) == len(KINDS_OF_LINES) and len(kinds) == len(DOCUMENT)
    starts = np.cumsum([0, *map(len, lines)])
    for start, end, kind, line in zip(starts, starts[1:], KINDS_OF_LINES, lines):
        assert {LINES[i] for i in kinds[start:end]} == {kind}, line
    docstrings = [DOCUMENT[start:end] for start, end, is_docstring in string_spans(DOCUMENT) if is_docstring]
    assert [text.strip(b"r'\"").split()[0] for text in docstrings] == [b"A", b"Of", b"Raw"]
    assert all(text.endswith((b'"""', b"'''")) for text in docstrings)


@pytest.mark.parametrize("end", range(0, len(DOCUMENT), 7))
def test_lines_of_a_file_that_is_cut_off(end):
    """Every byte has its kind; those of complete lines before a string that is cut off keep theirs."""
    kinds = classify_lines(DOCUMENT[:end])
    assert len(kinds) == end
    complete = DOCUMENT[:end].count(b"\n")
    starts = np.cumsum([0, *map(len, DOCUMENT[:end].splitlines(keepends=True))])
    assert [LINES[kinds[start]] for start in starts[:complete]] == KINDS_OF_LINES[:complete]


# ---- Files of losses

LOSSES = np.full((4, 16), 0.75, dtype=np.float16)


def losses_file(array, **options) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **options or dict(losses=array))
    return file.getvalue()


def raw_file(content: bytes) -> bytes:
    """An archive whose losses.npy has this content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("losses.npy", content)
    return file.getvalue()


def array_bytes(array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def flip(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 0x55]) + content[where + 1:]


@pytest.fixture
def write_run(write_log):
    """write_run(content of the file of losses or None, val_loss=0.75, **as write_log takes it) -> Run."""
    def write(content, val_loss=0.75, **options):
        settings = dict(sequence_length=16, scored=64, vocab_size=257, document_token=END) | options
        path = write_log({0: 5.0, 4: val_loss}, **settings)
        if content is not None:
            path.with_suffix(".losses.npz").write_bytes(content)
        return read_run(path)
    return write


def test_losses_of_a_run(write_run):
    assert read_losses(write_run(None)) is None
    losses = read_losses(write_run(losses_file(LOSSES), run_id="b"))
    assert losses.dtype == np.float16 and (losses == LOSSES).all()
    first = np.full((3, 16), 9, dtype=np.float16)  # not all were kept: the log's mean is of others, too
    assert (read_losses(write_run(losses_file(first), run_id="c", keep_losses=40)) == first).all()


@pytest.mark.parametrize("content, message", [
    (b"", "damaged"),
    (b"PK no archive", "damaged"),
    (losses_file(LOSSES)[:-30], "damaged"),
    (flip(losses_file(np.random.default_rng(0).random((4, 16)).astype(np.float16)), 200), "damaged"),
    (losses_file(None, other=LOSSES), "damaged"),
    (losses_file(np.array([None, "x"], dtype=object)), "shape"),
    (raw_file(pickle.dumps(LOSSES)), "damaged"),
    (raw_file(array_bytes(LOSSES)[:-2]), "other than 128 bytes"),
    (raw_file(array_bytes(LOSSES) + b"xx"), "other than 128 bytes"),
    (raw_file(array_bytes(LOSSES)[:20]), "damaged"),
    (raw_file(array_bytes(LOSSES).replace(b"(4, 16)", b"(4, 99)")), r"shape \(4, 99\)"),
    (losses_file(LOSSES.astype(np.float32)), "type float32"),
    (losses_file(np.asfortranarray(LOSSES)), "shape"),
    (losses_file(LOSSES[:3]), r"shape \(3, 16\)"),
    (losses_file(LOSSES.ravel()), r"shape \(64,\)"),
    (losses_file(np.where(np.arange(64).reshape(4, 16) < 3, np.nan, LOSSES).astype(np.float16)), "3 of 64 losses"),
    (losses_file(np.where(np.arange(64).reshape(4, 16) < 1, np.inf, LOSSES).astype(np.float16)), "1 of 64 losses"),
    (losses_file(-LOSSES), "below zero"),
    (losses_file(LOSSES + np.float16(0.02)), "the mean of its losses is 0.77"),
    (losses_file(LOSSES - np.float16(0.04)), "the mean of its losses is 0.71"),
])
def test_damaged_losses(write_run, content, message):
    run = write_run(content)
    with pytest.raises(RunError, match=message) as error:
        read_losses(run)
    text = str(error.value)
    assert "\n" not in text and text.startswith(str(run.path.with_suffix(".losses.npz")))
    assert text.endswith("copy it again, or delete it: the comparison then has no autopsy of this run")


def test_the_padding_and_the_rounding(write_run):
    """The log's loss may be larger by the head's padding, log(264 / 257), and neither beyond nor below rounding."""
    for logged, is_sound in ((0.7501, True), (0.7765, True), (0.7778, False), (0.7490, False)):
        run = write_run(losses_file(LOSSES), val_loss=logged, run_id=f"r{logged}")
        if is_sound:
            assert read_losses(run) is not None
        else:
            with pytest.raises(RunError, match="by r0.7.*.txt it lies from"):
                read_losses(run)


# ---- Data folders

@pytest.fixture
def folder(tmp_path):
    """Shards of bytes, two of them for validation."""
    rng = np.random.default_rng(5)
    documents = [("train", [65] * 500, 500, True)]
    documents += [("val", list(write_document(rng)), 1, True) for _ in range(14)]
    write_folder(tmp_path / "shards", "a", documents, end_of_text=END, tokenizer="bytes", shard_tokens=5000,
                 source="standard library of Python 3.11.7")
    return tmp_path / "shards"


def digests_of(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta["val"]["sha256"]


def shard_tokens_of(folder):
    files = sorted(folder.glob("a_val_*.bin"))
    return np.concatenate([np.fromfile(file, dtype="<u2")[512:] for file in files])


def test_validation_tokens(write_run, folder):
    """Over two shards, as the trainer reads them; and why there are none."""
    assert len(digests_of(folder)) == 2
    run = write_run(None, data=str(folder), val_sha256=digests_of(folder))
    rows = (len(shard_tokens_of(folder)) - 1) // 16
    read, reason = validation_tokens(run, rows)
    assert reason == "" and (read == shard_tokens_of(folder)[:rows * 16 + 1]).all()
    read, reason = validation_tokens(run, rows + 1)
    assert read is None and re.search(r"has \d+ validation tokens fewer than", reason)

    other = write_run(None, data=str(folder), run_id="other")
    assert validation_tokens(other, 2) == (None, f"{folder} holds other validation data than those of other.txt.")
    gone = write_run(None, data=str(folder / "gone"), run_id="gone", val_sha256=digests_of(folder))
    read, reason = validation_tokens(gone, 2)
    assert read is None and "no val shards" in reason and reason.endswith(".")
    shard = sorted(folder.glob("a_val_*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    assert validation_tokens(run, 2)[1] == f"{folder} holds other validation data than those of run.txt."


def test_spellings(folder, tmp_path):
    spellings, python = read_spellings(Config(data=str(folder), vocab_size=257))
    assert spellings == BYTES and python
    assert read_spellings(Config(data=str(folder), vocab_size=300)) == (None, False)

    merges = {bytes([i]): i for i in range(256)} | {b"th": 256, b" the": 257}
    texts = [(split, [256, 257, 101], 8, True) for split in ("train", "val")]
    write_folder(tmp_path / "merged", "b", texts, end_of_text=258, merges=merges, tokenizer="tiny")
    spellings, python = read_spellings(Config(data=str(tmp_path / "merged"), vocab_size=259))
    assert spellings[255:] == [b"\xff", b"th", b" the", b""] and not python


# ---- Runs

@pytest.fixture
def arms(write_run, folder):
    """The folders of an arm and its baseline, three seeds each: better at digits alone."""
    tokens = shard_tokens_of(folder)
    rows = (len(tokens) - 1) // 16
    targets = tokens[1:rows * 16 + 1].reshape(rows, 16)
    digits = (targets >= 48) & (targets < 58)
    rng = np.random.default_rng(6)
    for seed in (1, 2, 3):
        baseline = rng.uniform(1, 2, (rows, 16))
        for name, losses in (("arm", baseline - 0.5 * digits), ("baseline", baseline)):
            write_run(losses_file(losses.astype(np.float16)), val_loss=float(losses.mean()), folder=name, seed=seed,
                      run_id=f"{name}-{seed}", scored=rows * 16, data=str(folder), val_sha256=digests_of(folder))
    return folder.parent / "arm", folder.parent / "baseline"


def pairs_of(arms):
    return verdicts.pairs_of(*([read_run(path) for path in sorted(arm.glob("*.txt"))] for arm in arms))


def test_the_autopsy_of_runs(arms):
    result = dissect_runs(pairs_of(arms))
    assert result["seeds"] == [1, 2, 3] and result["drawn"] == ["seeds", "documents"]
    assert result["stands_out"]["tokens_that"] == "numbers"
    assert "come from numbers" in autopsy_sentence(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_no_autopsy(arms, folder, write_run):
    """A sentence says why; a pair without losses is left out, a damaged file is a fault."""
    (arms[0] / "arm-1.losses.npz").unlink()
    assert dissect_runs(pairs_of(arms))["seeds"] == [2, 3]
    other = write_run(losses_file(np.full((2, 32), 0.75, np.float16)), sequence_length=32, run_id="other")
    reason = dissect_runs([*pairs_of(arms), (other, other)])["reason"]
    assert reason == "the runs were validated on rows of 16 and 32 tokens."
    other = write_run(losses_file(LOSSES), run_id="third")
    assert dissect_runs([*pairs_of(arms), (other, other)])["reason"] == "the runs were validated on different data."

    (arms[0] / "arm-2.losses.npz").write_bytes(b"x")
    with pytest.raises(RunError, match="arm-2.losses.npz: damaged"):
        dissect_runs(pairs_of(arms))
    for name in ("arm-2", "arm-3"):
        (arms[0] / f"{name}.losses.npz").unlink()
    result = dissect_runs(pairs_of(arms))
    assert result == dict(reason="no pair of runs of equal seeds kept its losses.")
    assert autopsy_sentence(result) == "No autopsy: no pair of runs of equal seeds kept its losses."
    assert autopsy_lines(result) == [] == autopsy_table(result)[2] and autopsy_svg(result) == ""
    (folder / "a_val_000000.bin").unlink()
    assert "holds other validation data" in dissect_runs(pairs_of([arms[1], arms[1]]))["reason"]


def test_what_the_trainer_keeps(tmp_path, folder):
    """A run of two steps, so near its start that the padding's share of the loss is nearly the largest."""
    settings = dict(data=folder, layers=1, model_dim=16, heads=1, head_dim=16, mlp_hidden=16, value_embeddings=0,
                    sequence_length=32, batch_tokens=64, steps=2, val_tokens=2048, val_every=0, device="cpu",
                    compile="off", threads=1, log_dir=tmp_path, run_id="a")
    assert train([word for name, value in settings.items() for word in (f"--{name}", str(value))] + ["--no-save"]) == 0
    run = read_run(tmp_path / "a.txt")
    losses = read_losses(run)
    assert losses.shape == (64, 32)
    assert run.val_loss - losses.mean(dtype=np.float64) > 0.5 * np.log(264 / 257)
    result = dissect_runs([(run, run)])
    assert result["tokens"] == 2048 and result["difference"]["mean"] == 0


# ---- Words and pictures

def make_result(mean, half, standing=None, pairs=3):
    """As much of a result as the sentence reads."""
    return dict(difference=dict(mean=mean, low=mean - half, high=mean + half), stands_out=standing, pairs=pairs)


def make_standing(contribution, surplus, share=0.25):
    return dict(tokens_that="numbers", share=share, contribution=contribution, low=contribution - 0.006,
                high=contribution + 0.004, surplus=surplus)


@pytest.mark.parametrize("result, sentence", [
    (make_result(-0.033, 0.01, make_standing(-0.021, -0.013)),
     "0.0210 of the 0.0330 nats by which the arm is better come from numbers (95 % 0.0170 to 0.0270), which are 25 % "
     "of all tokens."),
    (make_result(0.033, 0.01, make_standing(0.021, 0.013)),
     "0.0210 of the 0.0330 nats by which the arm is worse come from numbers (95 % 0.0150 to 0.0250), which are 25 % "
     "of all tokens."),
    (make_result(-0.033, 0.01, make_standing(-0.05, -0.04)),
     "Numbers, 25 % of all tokens, make the arm better by 0.0500 nats (95 % 0.0460 to 0.0560), and all others make it "
     "worse by 0.0170: 0.0330 nats better in all."),
    (make_result(-0.033, 0.01, make_standing(-0.001, 0.007)),
     "Only 0.0010 of the 0.0330 nats by which the arm is better come from numbers (95 % -0.0030 to 0.0070), although "
     "they are 25 % of all tokens."),
    (make_result(-0.033, 0.01, make_standing(0.012, 0.02)),
     "The arm is better by 0.0330 nats, although numbers, 25 % of all tokens, make it worse by 0.0120 nats (95 % "
     "+0.0060 to +0.0160)."),
    (make_result(-0.001, 0.01, make_standing(-0.02, -0.02)),
     "The difference of -0.0010 nats is not distinguishable from zero (95 % -0.0110 to +0.0090), but numbers "
     "contribute -0.0200 (95 % -0.0260 to -0.0160) and all others +0.0190."),
    (make_result(-0.001, 0.01),
     "The difference of -0.0010 nats is not distinguishable from zero (95 % -0.0110 to +0.0090), and no tokens that "
     "were told apart stand out."),
    (make_result(-0.033, 0.01),
     "The difference of -0.0330 nats (95 % -0.0430 to -0.0230) is spread evenly, as far as 3 pairs can tell: no tokens "
     "that were told apart have more of it than their share."),
    (make_result(0.033, 0.01, make_standing(0.033 + 1e-15, 0.02)),
     "0.0330 of the 0.0330 nats by which the arm is worse come from numbers (95 % 0.0270 to 0.0370), which are 25 % of "
     "all tokens."),
    (make_result(-0.033, 0.01, make_standing(-0.021, -0.013), pairs=1),
     "For one pair, and another may say otherwise: 0.0210 of the 0.0330 nats by which the arm is better come from "
     "numbers (95 % 0.0170 to 0.0270), which are 25 % of all tokens."),
])
def test_sentences(result, sentence):
    assert autopsy_sentence(result) == sentence


def test_the_table(tokens):
    result = run_dissect(make_pairs(PLANTED["digits"][0](tokens)), tokens)
    title, heads, rows = autopsy_table(result)
    assert title == "Where the difference lies" and all(len(row) == len(heads) for row in rows)
    assert len(rows) == sum(len(split["bins"]) for split in result["splits"])
    row = dict(zip(heads, next(row for row in rows if row[1] == "numbers")))
    assert row["difference within"] == "-0.5000" and row["of the difference"] == "100 %"
    assert row["contribution"] == f"{result['difference']['mean']:+.4f}"
    lines = autopsy_lines(result)
    assert len(lines) == 4 and lines[3] == "Intervals: 95 %, bootstrap over seeds and documents, 300 resamples."


def test_pictures(tokens):
    """Every bar lies within its column, from zero to its contribution; names that could be markup or formulas do not
    become any."""
    hostile = tokens.copy()
    start = np.flatnonzero(hostile == END)[2] + 1
    hostile[start:start + 26] = list(b"</svg><script>$\\frac{1}$&'")
    result = run_dissect(make_pairs(np.cumsum(hostile[:-1] == END) == 3), hostile)
    picture = ElementTree.fromstring(autopsy_svg(result))[0]
    bars = picture.findall("rect")
    assert len(bars) == sum(len(split["bins"]) for split in result["splits"])
    width = float(picture.get("viewBox").split()[2]) / 2
    low, high = ends_of(result)
    for bar in bars:
        left, size = float(bar.get("x")), float(bar.get("width"))
        assert 275 <= left % width and left % width + size <= 535
        contribution = float(re.search(r": ([+-]\d\.\d{4}) nats \(95 %", bar[0].text)[1])
        assert size == pytest.approx(260 * abs(contribution) / (high - low), abs=260 * 5e-5 / (high - low) + 0.06)
    assert "<script" not in autopsy_svg(result) and "&lt;script&gt;" in autopsy_svg(result)

    figure = Figure(figsize=(12, 9))
    draw_autopsy(figure, result)
    panels = [panel for column in figure.subfigs for panel in column.axes]
    assert len(panels) == len(result["splits"])
    shown = {panel.get_title(loc="left"): [bar.get_width() for bar in panel.patches] for panel in panels}
    for split in result["splits"]:
        assert shown[split["title"]] == pytest.approx([entry["contribution"] for entry in split["bins"]])
    figure.draw_without_rendering()
