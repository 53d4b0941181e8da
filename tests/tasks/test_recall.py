"""
The recall task: what a document holds, its entropy counted out, rows of the trainer, the accuracy of models whose
answers are known, and training.
"""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
import variants
from tasks import recall
from tasks.answers import score
from tasks.recall import Recall, batches, evaluate, hide_answers, make, sequences
from tests.errors import float_bound
from tests.loading import run_module
from train_gpt import Config, RunError, TokenLoader, open_shard, validation_batches

TASKS = [Recall(), Recall(4, 9, 5, 2), Recall(3, 3, 1, 3), Recall(1, 1, 2, 1), Recall(5, 20, 7, 3, 40),
         Recall(2, 3, 2, 1, 60)]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_documents(task):
    tokens, answers = sequences(task, 200, np.random.default_rng(0))
    filler, end, first = task.keys + task.values, task.keys + task.values + 1, 1 + 2 * task.pairs
    assert tokens.shape == answers.shape == (200, task.sequence_length) and tokens.max() == end == task.vocab_size - 1
    places = set()
    for document, asked in zip(tokens.tolist(), answers.tolist()):
        assert document[0] == end and end not in document[1:]
        keys, values = document[1:first:2], document[2:first:2]
        assert len(set(keys)) == task.pairs and max(keys) < task.keys and min(values) >= task.keys
        assert max(values) < filler
        pair, place, queries = dict(zip(keys, values)), first, []
        while place < len(document):
            if document[place] == filler:
                assert not asked[place]
                place += 1
            else:
                assert document[place + 1] == pair[document[place]] and asked[place:place + 2] == [False, True]
                queries.append(document[place])
                places.add(place)
                place += 2
        assert len(queries) == len(set(queries)) == task.queries and not any(asked[:first])
        assert sum(asked) == task.queries
    least = first + 2 * task.queries
    if task.sequence_length > least:  # queries everywhere from the first to the last place
        assert min(places) == first and max(places) == task.sequence_length - 2
    else:
        assert places == set(range(first, least, 2))


@pytest.mark.parametrize("task", [Recall(2, 3, 2, 1, 9), Recall(2, 3, 3, 2), Recall(1, 2, 3, 1, 8),
                                  Recall(3, 3, 1, 2, 14)], ids=str)
def test_floor_is_the_entropy(task):
    """All documents are equally likely and e^(floor x tokens) of them exist."""
    tokens, _ = sequences(task, 40_000, np.random.default_rng(0))
    _, counts = np.unique(tokens, axis=0, return_counts=True)
    assert len(counts) == round(math.exp(task.floor * task.sequence_length)) > 10
    assert np.abs(counts / counts.mean() - 1).max() < 6 / math.sqrt(counts.mean())
    assert (task.chance - task.floor) * task.sequence_length == pytest.approx(task.queries * math.log(task.values))


def test_the_entropy_of_the_first_tokens_is_what_a_loss_shows():
    """
    The floor by the chain rule, for a task without fillers: keys without replacement, values, queries without
    replacement.
    """
    task = Recall(4, 10, 6, 3)
    nats = sum(math.log(10 - i) + math.log(6) for i in range(4)) + sum(math.log(4 - i) for i in range(3))
    assert task.floor == pytest.approx(nats / 15)


def test_streams_differ_and_repeat():
    task = Recall(4, 9, 5, 2)

    def draw(seed, stream, count=100):
        return next(batches(task, count, seed, stream))[0].tolist()

    assert draw(1, "train") == draw(1, "train")
    drawn = [draw(seed, stream) for seed in (1, 2) for stream in recall.STREAMS]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    # some at a time, whatever the length
    assert [len(tokens) for tokens, _ in batches(Recall(1, 1, 2, 1, 2 ** 19), 5, 1, "val")] == [3, 2]


def test_the_folder_trains(tmp_path):
    task = Recall(4, 9, 5, 2)
    meta = make(tmp_path, task, 300, 50, seed=3)
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert (meta["vocab_size"], meta["tokenizer"], meta["seed"]) == (16, "recall", 3)
    assert Recall(**meta["recall"]) == task
    assert (meta["floor"], meta["chance"], meta["train"]["documents"],
            meta["val"]["documents"]) == (task.floor, task.chance, 300, 50)
    T = task.sequence_length
    config = Config(data=str(tmp_path), sequence_length=T, batch_tokens=4 * T, align_documents=True, vocab_size=16,
                    val_tokens=10 ** 6)
    loader, documents = TokenLoader(config), {bytes(row)
                                              for row in open_shard(tmp_path / "recall_train_000000.bin").reshape(
        300, T).astype(np.uint8)}
    seen = {bytes(row) for _ in range(74) for row in loader.next_batch()[0][:, :T].numpy().astype(np.uint8)}
    assert seen <= documents and len(seen) > 250  # whole documents, one a row
    rows = np.concatenate(validation_batches(config))
    assert len(rows) == 49 and (rows[:, 0] == 15).all() and (rows[:, -1] == 15).all()
    assert rows[:, :T].tolist() == next(batches(task, 50, 3, "val"))[0][:49].tolist()


def oracle(tokens: torch.Tensor, right: int) -> torch.Tensor:
    """
    Logits (n, T, 200) of a model that answers the first `right` queries of a document and then says the end of text.
    """
    logits = torch.zeros(*tokens.shape, 200)
    for document, out in zip(tokens.tolist(), logits):
        pairs, found = dict(zip(document[1:33:2], document[2:33:2])), 0
        for place in range(33, len(document)):
            if document[place] in pairs:
                out[place, pairs[document[place]] if found < right else 129] = 3.0
                found += 1
    return logits


@pytest.mark.parametrize("length", [0, 90])
@pytest.mark.parametrize("right", [0, 5, 16])
def test_score(right, length):
    tokens, answers = (torch.from_numpy(part)
                       for part in hide_answers(*sequences(Recall(sequence_length=length), 10,
                                                           np.random.default_rng(0))))
    found, losses = score(lambda tokens: oracle(tokens, right), tokens, answers)
    assert found.tolist() == [[True] * right + [False] * (16 - right)] * 10
    wrong = math.log(199 + math.e ** 3)
    # a logarithm's error is its sum's relative one
    assert torch.allclose(losses, torch.tensor([[wrong - 3] * right + [wrong] * (16 - right)] * 10), rtol=0,
                          atol=float_bound(200, torch.float32))


def trained(folder: Path, *arguments: str, task: Recall, steps: int) -> str:
    """The checkpoint of a run of the trainer on the task."""
    T = task.sequence_length
    assert train_gpt.main(["--data", str(folder), "--log_dir", str(folder / "logs"), "--run_id", "run", "--device",
                           "cpu", "--compile", "off", "--sequence_length", str(T), "--align_documents",
                           "--batch_tokens", str(32 * T), "--steps", str(steps), "--val_every", "0", "--val_tokens",
                           "2000", "--layers", "2", "--model_dim", "64", "--heads", "4", "--head_dim", "16",
                           "--mlp_hidden", "128", *arguments], loader=variants) == 0
    return str(folder / "logs" / "run.pt")


def test_evaluate_a_checkpoint_of_a_variant(tmp_path, capsys):
    task = Recall(4, 8, 8, 4)
    make(tmp_path / "data", task, 200, 200, seed=1)
    checkpoint = trained(tmp_path / "data", "--variant", "swiglu_mlp:hidden=40", task=task, steps=1)
    result = evaluate(checkpoint, count=100)
    assert result == evaluate(checkpoint, count=100,
                              data=str(tmp_path / "data")) != evaluate(checkpoint, count=100, seed=2)
    assert result["answers"] == 400 and result["chance"] == 1 / 8
    assert 0 <= result["accuracy"] < 0.4 and result["nats_per_answer"] == pytest.approx(math.log(18), rel=0.2)
    assert 0 < result["standard_error"] < 0.05
    capsys.readouterr()
    assert recall.main(["evaluate", "--checkpoint", checkpoint, checkpoint, "--count", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == (f"{checkpoint}: accuracy {result['accuracy']:.4f} +- {result['standard_error']:.4f} on 400 "
                        "answers, " f"{result['nats_per_answer']:.4f} nats an answer; chance 0.1250")
    # the weights count, and they are the checkpoint's: a model that always says token 9 is right where the answer is 9
    saved = train_gpt.read_checkpoint(checkpoint)
    saved["model"]["head.projection.weight"].zero_()[9] = 1.0
    saved["model"]["embedding.weight"].fill_(1.0)
    saved["model"]["blocks.0.stream_mix"].copy_(torch.tensor([1.0, 0.0]))
    train_gpt.write_checkpoint(tmp_path / "nine.pt", saved)
    nines = np.mean(np.concatenate([tokens[answers] for tokens, answers in batches(task, 300, 1, "evaluate")]) == 9)
    assert evaluate(str(tmp_path / "nine.pt"), count=300)["accuracy"] == pytest.approx(nines, abs=0.02)
    # another task
    make(tmp_path / "other", Recall(4, 9, 8, 4), 20, 20, seed=1)
    with pytest.raises(RunError,
                       match="was trained on 18 token ids, and the task in .*other has 19; give the --data of its run"):
        evaluate(checkpoint, data=str(tmp_path / "other"))
    assert recall.main(["evaluate", "--checkpoint", str(tmp_path / "nothing.pt")]) == 1
    assert capsys.readouterr().err.startswith("recall.py: error: there is no checkpoint ")


def test_a_folder_without_a_task(tmp_path):
    make(tmp_path, Recall(2, 3, 2, 1), 5, 5, seed=1)
    checkpoint = trained(tmp_path, task=Recall(2, 3, 2, 1), steps=1)
    for meta in ('{"vocab_size": 7}', '{"recall": {"pear": 1}}', '{"recall": 3}', "text"):
        (tmp_path / "meta.json").write_text(meta)
        with pytest.raises(RunError,
                           match="meta.json does not describe a recall task; give --data a folder that "
                                 "tasks/recall.py made"):
            evaluate(str(checkpoint))


@pytest.mark.parametrize("arguments, message", [
    ("--pairs 0", "--pairs must lie between 1 and --keys 64, got 0: the keys of a document differ"),
    ("--pairs 65", "--pairs must lie between 1 and --keys 64, got 65: the keys of a document differ"),
    ("--queries 17", "--queries must lie between 1 and --pairs 16, got 17: every pair is asked for once"),
    ("--queries 0", "--queries must lie between 1 and --pairs 16, got 0: every pair is asked for once"),
    ("--values 0", "--values must be at least 1, got 0"),
    ("--sequence_length 64",
     "--sequence_length 64 is less than the 65 tokens of the end of text, the pairs and the queries"),
    ("--values 65471", "--keys 64 and --values 65471 make 65537 token ids, and shards hold at most 65536"),
    ("--values 191", "--keys and --values together must not be 255: the trainer takes a vocabulary of 257 for bytes"),
    ("--count 0", "the number of sequences must be at least 1, got 0"),
    ("--val_count 0", "the number of sequences must be at least 1, got 0")])
def test_faults(tmp_path, capsys, arguments, message):
    assert recall.main(["make", "-o", str(tmp_path / "data"), *arguments.split()]) == 1
    assert capsys.readouterr().err == f"recall.py: error: {message}\n"
    assert not list(tmp_path.glob("data/*.*"))


def test_command_line(tmp_path, capsys):
    words = f"make -o {tmp_path} --count 10 --val_count 3 --pairs 2 --queries 1".split()
    assert run_module("tasks.recall", *words) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert re.fullmatch(
        r"\S+: 10 training and 3 validation sequences of 7 tokens; loss \d\.\d{4} nats a token with every "
        r"answer right, \d\.\d{4} by chance\ntrain with --data \S+ --sequence_length 7 --align_documents "
        r"--batch_tokens 448\n", out)


@pytest.mark.slow
@pytest.mark.parametrize("variant, least, most",
                         [(None, 0.95, 1.0), ("topological_attention:preset=fast,short_conv=0", 0.95, 1.0),
                          ("topological_attention:preset=key_only,short_conv=0", 0.3, 0.75)])
def test_attention_learns_it_and_a_gated_mean_does_not(tmp_path, variant, least, most):
    # who knows the values but not their keys is right in (1/4 + 1/3 + 1/2 + 1) / 4 = 0.52, or a little more where two
    # are equal
    task = Recall(4, 16, 16, 4)
    make(tmp_path, task, 20_000, 200, seed=1)
    checkpoint = trained(tmp_path, "--attention_scale", "0", "--window_pattern", "L",
                         *(["--variant", variant] if variant else []), task=task, steps=500)
    assert least < evaluate(checkpoint)["accuracy"] <= most
