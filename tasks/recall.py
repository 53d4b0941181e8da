"""
Multi-query associative recall: documents that list pairs of a key and a value, then ask for the values of some keys.

    python -m tasks.recall make -o DIR [--pairs 16] [--keys 64] [--values 64] [--queries 16] [--sequence_length 0]
                                [--count 100000] [--val_count 1024] [--seed 1]
    python -m tasks.recall evaluate --checkpoint FILE... [--data DIR] [--count 512] [--seed 1] [--device auto]

make writes shards whose documents have sequence_length tokens each (0: as few as possible):

    end of text, k1 v1 .. kP vP, then in random order and at random positions Q queries "k v", and a filler token
    everywhere else

The P keys differ and are drawn from `keys` ids, each value from `values` other ids with replacement; the Q keys that
are asked for are drawn from the P, each once. Vocabulary: keys, values, the filler, the end of text. Train with rows of
whole documents, as the last line of make says: --sequence_length and --align_documents.

Only the values after the queries, the answers, can be known; the rest is drawn at random, and no model gets below its
entropy. meta.json holds, in nats a token as the trainer reports its loss, floor (every answer right) and chance (every
answer one of all values, equally likely). Of a loss between them (loss - floor) sequence_length / queries is the loss
of one answer.

evaluate prints the accuracy at the answers alone, on sequences drawn apart from both splits. The task is read from
meta.json of the checkpoint's data folder, or of DIR. An answer is right if it has the largest logit of the whole
vocabulary. A model that knows a document's values but not their keys scores about 1 / pairs, and somewhat more by
leaving out those already asked for. The standard error is that of the mean over sequences.
Exit code 1 and one line for a fault. Source: Arora et al., Zoology, 2023, arxiv.org/abs/2312.04927.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train_gpt
import variants
from data.command_line import check_option, run_script
from data.shards import check_space, write_folder
from tasks.answers import NO_ANSWER, STREAMS, score
from train_gpt import (
    RANGES,
    Config,
    Ranks,
    RunError,
    check_value,
    find_checkpoint,
    find_shards,
    read_checkpoint,
    read_meta,
    require,
)


@dataclass(frozen=True)
class Recall:
    """The task. RunError for numbers that contradict each other."""
    pairs: int = 16
    keys: int = 64
    values: int = 64
    queries: int = 16
    sequence_length: int = 0  # tokens of a document; 0: as few as possible

    def __post_init__(self):
        # whole numbers, and the length where it is left open
        for name, value in asdict(self).items():
            check_value(int, value, f"--{name}", None)
        shortest = 1 + 2 * self.pairs + 2 * self.queries
        object.__setattr__(self, "sequence_length", self.sequence_length or shortest)

        # that go together
        require(1 <= self.pairs <= self.keys,
                f"--pairs must lie between 1 and --keys {self.keys}, got {self.pairs}: the keys of a document differ")
        require(1 <= self.queries <= self.pairs,
                f"--queries must lie between 1 and --pairs {self.pairs}, got {self.queries}: every pair is "
                "asked for once")
        require(self.values >= 1, f"--values must be at least 1, got {self.values}")
        require(self.sequence_length >= shortest,
                f"--sequence_length {self.sequence_length} is less than the {shortest} tokens of the end of text, "
                "the pairs and the queries")
        require(self.vocab_size <= 2 ** 16,
                f"--keys {self.keys} and --values {self.values} make {self.vocab_size} token ids, and shards "
                "hold at most 65536")
        check_option(self, "sequence_length", *RANGES["sequence_length"])
        require(self.vocab_size != 257,
                "--keys and --values together must not be 255: the trainer takes a vocabulary of 257 for bytes")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + 2

    @property
    def chance_accuracy(self) -> float:
        """The accuracy of a model that knows which ids are values."""
        return 1 / self.values

    @property
    def lengths(self) -> tuple[int]:
        """Tokens that a model reads of a document: all but the last, which is an answer."""
        return (self.sequence_length - 1,)

    @property
    def slots(self) -> int:
        """Queries and fillers after the pairs, a query counted once."""
        return self.sequence_length - 1 - 2 * self.pairs - self.queries

    @property
    def floor(self) -> float:
        """The entropy of a document over its tokens, in nats: the loss of a model that answers everything."""
        keys = log_factorial(self.keys) - log_factorial(self.keys - self.pairs)         # which, in order
        asked = log_factorial(self.pairs) - log_factorial(self.pairs - self.queries)
        slots = log_factorial(self.slots) - log_factorial(self.queries) - log_factorial(self.slots - self.queries)
        return (keys + asked + self.pairs * math.log(self.values) + slots) / self.sequence_length

    @property
    def chance(self) -> float:
        """The loss of a model that knows everything but answers by chance, in nats a token."""
        return self.floor + self.queries * math.log(self.values) / self.sequence_length

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens (count, length), answers of the same shape) as tasks/answers.py has them; length is lengths[0]."""
        return hide_answers(*sequences(self, count, rng))


def log_factorial(n: int) -> float:
    """log n!"""
    return math.lgamma(n + 1)


def sequences(task: Recall, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(documents (count, sequence_length) int64, where the answers stand: bool of the same shape)."""
    def draw(n: int, k: int) -> np.ndarray:
        """(count, k): k of 0..n-1, each at most once"""
        return rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)[:, :k]

    # what is drawn, in this order
    first = 1 + 2 * task.pairs
    keys, values = draw(task.keys, task.pairs), task.keys + rng.integers(task.values, size=(count, task.pairs))
    asked = draw(task.pairs, task.queries)
    slots = np.sort(draw(task.slots, task.queries), axis=1)
    position = first + slots + np.arange(task.queries)  # a query before makes a shift of one: it is two tokens

    # the pairs, among fillers
    tokens = np.full((count, task.sequence_length), task.vocab_size - 2)
    tokens[:, 0] = task.vocab_size - 1
    tokens[:, 1:first:2] = keys
    tokens[:, 2:first:2] = values

    # the queries and their answers
    answers = np.zeros(tokens.shape, dtype=bool)
    np.put_along_axis(tokens, position, np.take_along_axis(keys, asked, 1), 1)
    np.put_along_axis(tokens, position + 1, np.take_along_axis(values, asked, 1), 1)
    np.put_along_axis(answers, position + 1, True, 1)
    return tokens, answers


def hide_answers(documents: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    (tokens, answers), both (n, T - 1) int64 as tasks/answers.py has them, of documents (n, T) and the places of their
    answers, bool (n, T): the answer is asked for where the token before it stands.
    """
    return documents[:, :-1], np.where(answers[:, 1:], documents[:, 1:], NO_ANSWER)


def batches(task: Recall, count: int, seed: int, stream: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` sequences of a stream, some at a time. RunError for a count below 1."""
    require(count >= 1, f"the number of sequences must be at least 1, got {count}")
    check_value(int, seed, "--seed", RANGES["seed"])
    rng = np.random.default_rng([seed, STREAMS[stream]])
    size = max(1, 2 ** 21 // (task.sequence_length + task.keys))
    for start in range(0, count, size):
        yield sequences(task, min(size, count - start), rng)


def make(folder: Path, task: Recall, count: int, val_count: int, seed: int) -> dict:
    """
    Write the shards; returns the meta data. RunError for a count below 1, a disk without room or a folder that cannot
    be written.
    """
    check_space(folder, (max(count, 0) + max(val_count, 0)) * task.sequence_length, "these sequences",
                "ask for a lower --count or --val_count")
    documents = ((split, document[1:], 0, True) for split, number in (("train", count), ("val", val_count))
                 for tokens, _ in batches(task, number, seed, split) for document in tokens)
    return write_folder(folder, "recall", documents, end_of_text=task.vocab_size - 1, tokenizer="recall",
                        source="tasks/recall.py", recall=asdict(task), seed=seed, floor=task.floor, chance=task.chance)


def read_task(config: Config) -> Recall:
    """The task of a data folder. RunError if it holds none."""
    folder = find_shards(config, "train")[0].parent
    try:
        task = read_meta(folder).get("recall")
        require(isinstance(task, dict) and set(task) == set(Recall.__dataclass_fields__), "it has no settings of one")
        return Recall(**task)
    except RunError as error:
        raise RunError(f"{folder / 'meta.json'} does not describe a recall task; give --data a folder that "
                       f"tasks/recall.py made ({error})") from None


def evaluate(checkpoint: str, data: str = "", count: int = 512, seed: int = 1, device: str = "auto") -> dict:
    """
    Accuracy of a checkpoint's model on `count` fresh sequences: dict(accuracy, standard_error, nats_per_answer,
    answers, chance). data: folder whose meta.json has the task (default: the checkpoint's); device: auto, cpu or cuda.
    RunError if the checkpoint or the task cannot be read or do not fit.
    """
    # the checkpoint and the task
    saved = read_checkpoint(find_checkpoint(checkpoint))
    config = Config(**saved["config"])
    config = replace(config, compile="off", device=device, data=data or config.data)
    task = read_task(config)
    require(task.vocab_size == config.vocab_size,
            f"{checkpoint} was trained on {config.vocab_size} token ids, and the task in {config.data} has "
            f"{task.vocab_size}; give the --data of its run")

    # the answers, some rows at a time
    ranks = Ranks.start(config)
    rows = max(1, config.micro_batch_tokens // task.sequence_length)
    scores = []
    with variants.applied(config.variant, config):
        model = train_gpt.trained_model(saved, config, ranks)
        for batch in batches(task, count, seed, "evaluate"):
            tokens, answers = (torch.from_numpy(array).to(ranks.device).split(rows) for array in hide_answers(*batch))
            scores += [score(model, *arrays) for arrays in zip(tokens, answers)]

    right, losses = (torch.cat(tensors).double() for tensors in zip(*scores))
    by_sequence = right.mean(1)
    error = (by_sequence.var(correction=0) / len(by_sequence)).sqrt().item()
    return dict(accuracy=right.mean().item(), standard_error=error, nats_per_answer=losses.mean().item(),
                answers=right.numel(), chance=task.chance_accuracy)


# ---- The command ------------------------------------------------------------


def run_make(options: argparse.Namespace):
    """Write a task's shards and say how to train on them."""
    task = Recall(options.pairs, options.keys, options.values, options.queries, options.sequence_length)
    make(options.output, task, options.count, options.val_count, options.seed)
    T = task.sequence_length
    print(f"{options.output}: {options.count:,} training and {options.val_count:,} validation sequences of {T} tokens; "
          f"loss {task.floor:.4f} nats a token with every answer right, {task.chance:.4f} by chance\n"
          f"train with --data {options.output} --sequence_length {T} --align_documents --batch_tokens {64 * T}")


def run_evaluate(options: argparse.Namespace):
    """Print a line about every checkpoint."""
    for checkpoint in options.checkpoint:
        result = evaluate(checkpoint, options.data, options.count, options.seed, options.device)
        print(f"{checkpoint}: accuracy {result['accuracy']:.4f} +- {result['standard_error']:.4f} on "
              f"{result['answers']:,} answers, {result['nats_per_answer']:.4f} nats an answer; "
              f"chance {result['chance']:.4f}", flush=True)


HELP = dict(pairs="pairs of a document", keys="ids of keys", values="ids of values", queries="queries of a document",
            sequence_length="tokens of a document (0: as few as possible)")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="recall.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    # make
    making = commands.add_parser("make", help="write shards")
    making.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for name, text in HELP.items():
        making.add_argument(f"--{name}", type=int, default=Recall.__dataclass_fields__[name].default, help=text)
    making.add_argument("--count", type=int, default=100_000, help="training sequences")
    making.add_argument("--val_count", type=int, default=1024, help="validation sequences")

    # evaluate
    evaluating = commands.add_parser("evaluate", help="accuracy of a checkpoint")
    evaluating.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE", help="checkpoints of the trainer")
    evaluating.add_argument("--data", default="",
                            help="folder whose meta.json has the task (default: the checkpoint's)")
    evaluating.add_argument("--count", type=int, default=512, help="fresh sequences")
    evaluating.add_argument("--device", choices=train_gpt.CHOICES["device"], default="auto")

    for command, run in ((making, run_make), (evaluating, run_evaluate)):
        command.add_argument("--seed", type=int, default=1, help="of the random numbers")
        command.set_defaults(run=run)
    options = parser.parse_args(argv)
    return run_script("recall.py", lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
