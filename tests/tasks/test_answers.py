"""
All skills by their rows: every answer is what an oracle says who reads nothing but what stands before, oracles are
always right and guesses are as often as they should be, rows differ between seeds, and settings without a meaning.
"""

import numpy as np
import pytest
import torch

from tasks.answers import NO_ANSWER, accuracy, answer_loss, draw, score
from tasks.copying import Copying
from tasks.hops import Hops
from tasks.prompts import CopiedWord, KeyedLines
from tasks.recall import Recall
from tasks.state_tracking import StateTracking
from tests.errors import float_bound
from train_gpt import RunError

# ---- Oracles: the tokens up to a question -> the tokens that may answer it, the right one first


def answer_recall(task, tokens):
    pairs = tokens[1:1 + 2 * task.pairs]
    values = dict(zip(pairs[::2], pairs[1::2]))
    others = set(range(task.keys, task.keys + task.values)) - {values[tokens[-1]]}
    return [values[tokens[-1]], *others]


def answer_copying(task, tokens):
    mark = tokens.index(task.letters + 1)
    span = [token for token in tokens[:mark] if token < task.letters]
    right = span[len(tokens) - 1 - mark]
    return [right, *set(range(task.letters)) - {right}]


def answer_parity(task, tokens):
    ones = sum(tokens)
    return [ones % 2, 1 - ones % 2]


def answer_s5(task, tokens):
    """Five things in a row, moved by each permutation in turn; permutations are numbered by their factorial digits."""
    def permutation_of(number):
        left, images = [0, 1, 2, 3, 4], []
        for base in (24, 6, 2, 1, 1):
            images.append(left.pop(number // base))
            number %= base
        return images

    images = [0, 1, 2, 3, 4]
    for token in tokens:
        moved = permutation_of(token)
        images = [moved[i] for i in images]
    right = next(number for number in range(120) if permutation_of(number) == images)
    return [right, *set(range(120)) - {right}]


def answer_hops(task, tokens):
    links = dict(zip(tokens[1:1 + 3 * task.nodes:3], tokens[2:1 + 3 * task.nodes:3]))
    node, hops = tokens[-1], tokens[-2] - task.names
    for _ in range(hops):
        node = links[node]
    return [node, *set(links) - {node, tokens[-1]}]


def answer_word(task, tokens):
    text = bytes(tokens[1:])
    word, second = text.split(b'"')[1], text.split(b'"')[3]
    assert second and word.startswith(second)
    right = word[len(second)]
    return [right, *set(b"abcdefghijklmnopqrstuvwxyz") - {right}]


def answer_line(task, tokens):
    lines = bytes(tokens[1:]).split(b"\n")
    digits = dict(line.split(b"=") for line in lines[:task.pairs])
    assert len(digits) == task.pairs
    right = digits[lines[-1].removesuffix(b"=")][0]
    return [right, *set(b"0123456789") - {right}]


ORACLES = [
    (Recall(4, 9, 5, 4), answer_recall),
    (Recall(5, 20, 7, 3, 40), answer_recall),
    (Copying(), answer_copying),
    (Copying(3, 0, 5), answer_copying),
    (Copying(1, 7, 1), answer_copying),
    (StateTracking("parity"), answer_parity),
    (StateTracking("parity", 1, 3), answer_parity),
    (StateTracking("S5", 5, 12), answer_s5),
    (Hops(), answer_hops),
    (Hops(5, 4, 9), answer_hops),
    (Hops(2, 1, 2), answer_hops),
    (CopiedWord(), answer_word),
    (KeyedLines(), answer_line),
]
LENGTHS = [(skill, oracle, length) for skill, oracle in ORACLES for length in skill.lengths]


def rows_of(skill, length, count=40, seed=0):
    return skill.rows(count, np.random.default_rng(seed), length)


# ---- Rows and answers


def name_of(value) -> str:
    """An oracle's name without its address, which differs between processes; of anything else its text."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("skill, oracle, length", LENGTHS, ids=name_of)
def test_every_answer_follows_from_what_stands_before(skill, oracle, length):
    tokens, answers = rows_of(skill, length)
    assert tokens.shape == answers.shape == (40, length) and tokens.dtype == answers.dtype == np.int64
    assert 0 <= tokens.min() and tokens.max() < skill.vocab_size
    counts = set()
    for row, asked in zip(tokens.tolist(), answers.tolist()):
        places = [t for t, answer in enumerate(asked) if answer != NO_ANSWER]
        assert [oracle(skill, row[:t + 1])[0] for t in places] == [asked[t] for t in places]
        counts.add(len(places))
    assert len(counts) == 1 and counts.pop() > 0


@pytest.mark.parametrize("skill, oracle, length", LENGTHS, ids=name_of)
def test_an_oracle_is_always_right_and_a_guess_as_often_as_chance_says(skill, oracle, length):
    guesses = np.random.default_rng(1)

    def model(tokens, guess):
        """Logits of the right answer, or of one of all that may be."""
        logits = torch.zeros(*tokens.shape, skill.vocab_size)
        for row, line, asked in zip(tokens.tolist(), logits, answers):
            for t in (asked != NO_ANSWER).nonzero()[0]:
                choices = oracle(skill, row[:t + 1])
                line[t, choices[guesses.integers(len(choices)) if guess else 0]] = 1.0
        return logits

    answers = rows_of(skill, length, 100)[1]
    share, error = accuracy(lambda tokens: model(tokens, False), skill, 100, np.random.default_rng(0), length)
    assert (share, error) == (1.0, 0.0)
    share, error = accuracy(lambda tokens: model(tokens, True), skill, 100, np.random.default_rng(0), length)
    chance, n = skill.chance_accuracy, (answers != NO_ANSWER).sum()
    assert abs(share - chance) <= 5 * (chance * (1 - chance) / n) ** 0.5  # five standard deviations of a binomial
    assert error < 0.5 and (error > 0) == (0 < chance < 1)


@pytest.mark.parametrize("skill", [skill for skill, _ in ORACLES], ids=name_of)
def test_rows_repeat_with_their_seed_alone(skill):
    length = skill.lengths[0]
    first, again, other = (rows_of(skill, length, seed=seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again))
    assert (first[0] != other[0]).any() or skill.lengths[0] == 1
    tokens, answers = draw(skill, 40, np.random.default_rng(1), length)
    assert (tokens.numpy() == first[0]).all() and (answers.numpy() == first[1]).all()


def test_longer_rows_ask_beyond_the_training_rows_alone():
    skill = StateTracking("S5", 5, 12)
    assert (rows_of(skill, 5)[1] != NO_ANSWER).all()
    asked = rows_of(skill, 12)[1] != NO_ANSWER
    assert not asked[:, :5].any() and asked[:, 5:].all()


def test_spans_begin_everywhere_in_the_gap():
    tokens, _ = rows_of(Copying(2, 3, 5), 8, 500)
    starts = (tokens[:, 1:] != 5).argmax(1)
    assert np.bincount(starts).tolist() == pytest.approx([125] * 4, abs=5 * (500 * 0.25 * 0.75) ** 0.5)


def test_states_are_equally_likely_whatever_follows_the_first():
    _, states = rows_of(StateTracking("S5", 3, 4), 3, 24_000)
    for t in range(3):
        counts = np.bincount(states[:, t], minlength=120)
        assert np.abs(counts - 200).max() < 5 * 200 ** 0.5


def test_hops_never_come_back():
    skill = Hops(5, 4, 9)
    tokens, answers = rows_of(skill, skill.lengths[0], 200)
    asked = answers != NO_ANSWER
    assert (tokens[asked] != answers[asked]).all()
    hops = np.bincount(tokens[:, 16::2].ravel() - skill.names, minlength=5)
    assert hops[0] == 0 and hops[1:].tolist() == pytest.approx([250] * 4, abs=5 * (1000 * 0.25 * 0.75) ** 0.5)


# ---- Marks


def test_score_and_loss():
    """Three rows with two answers each, of a model with known logits."""
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    answers = torch.tensor([[-1, 1, -1, 2], [0, -1, 1, -1], [-1, -1, 2, 2]])
    logits = torch.zeros(3, 4, 3)
    logits[..., 2] = 1.0
    right, losses = score(lambda tokens: logits, tokens, answers)
    assert right.tolist() == [[False, True], [False, False], [True, True]]
    normaliser = np.log(2 + np.e)
    expected = torch.tensor(normaliser - right.double().numpy())
    assert torch.allclose(losses.double(), expected, rtol=0, atol=float_bound(3, torch.float32))
    loss = answer_loss(lambda tokens: logits, tokens, answers)
    assert loss.item() == pytest.approx(normaliser - 0.5, abs=float_bound(6, torch.float32))


def test_accuracy_counts_all_rows_of_some_at_a_time(monkeypatch):
    """A model that always says 1 is right as often as bits have an odd sum; rows come in threes."""
    monkeypatch.setattr("tasks.answers.ROWS_AT_ONCE", 3)
    skill, sizes = StateTracking("parity", 2, 3), []

    def model(tokens):
        sizes.append(len(tokens))
        return torch.tensor([0.0, 1.0, 0.0]).expand(*tokens.shape, 3)

    share, error = accuracy(model, skill, 8, np.random.default_rng(3), 2)
    generator = np.random.default_rng(3)
    by_row = np.concatenate([skill.rows(n, generator, 2)[1].mean(1) for n in (3, 3, 2)])
    assert sizes == [3, 3, 2]
    assert share == pytest.approx(by_row.mean()) and error == pytest.approx(by_row.std() / 8 ** 0.5)


# ---- Settings


@pytest.mark.parametrize("make, message", [
    (lambda: Copying(5, 3, 4), "a span has from 1 to 4 letters, as they differ; got 5"),
    (lambda: Copying(0), "a span has from 1 to 32 letters, as they differ; got 0"),
    (lambda: Copying(2, -1), "a gap has at least 0 fillers, got -1"),
    (lambda: StateTracking("A5"), "a group is one of parity, S5; got 'A5'"),
    (lambda: StateTracking("S5", 4, 4), "rows have at least 1 token and longer ones more; got 4 and 4"),
    (lambda: StateTracking("S5", 0), "rows have at least 1 token and longer ones more; got 0 and 64"),
    (lambda: Hops(4, 4), "a query of 4 nodes follows from 1 to 3 links; got 4"),
    (lambda: Hops(4, 0), "a query of 4 nodes follows from 1 to 3 links; got 0"),
    (lambda: Hops(9, 2, 8), "the nodes of a row differ, so there are at most 8 of them; got 9"),
])
def test_faults(make, message):
    with pytest.raises(RunError) as fault:
        make()
    assert str(fault.value) == message
