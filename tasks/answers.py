"""
Questions and answers in rows, which all synthetic tasks share that a model answers in one token: how answers stand in
rows, a model's loss at them, and how they are marked.

A batch is tokens (n, T) int64, what a model reads, and answers (n, T) int64: the token that is the answer to what
stands up to and at this position, or NO_ANSWER where nothing is asked. All rows of a batch have equally many answers.
An answer is right if it has the largest logit of the whole vocabulary.

A skill is a task that a small model can be trained on. It has

    vocab_size          token ids; the last one is the end of text, which begins every row of most skills
    chance_accuracy     the accuracy of a model that knows which answers there are and nothing else
    lengths             tokens of the rows: of those to train on first, then of longer ones that only test
    rows(count, rng, length)    a batch of so many rows of one of these lengths, drawn with a NumPy generator
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NO_ANSWER = -1
STREAMS = dict(train=0, val=1, evaluate=2)  # of random numbers: no row of one is drawn for another
ROWS_AT_ONCE = 256                          # of a test, in one pass of the model


def draw(skill, count: int, rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
    """A batch of a skill as tensors (count, length) int64 on the CPU: tokens and answers."""
    tokens, answers = skill.rows(count, rng, length)
    return torch.from_numpy(tokens), torch.from_numpy(answers)


def answer_loss(model: Callable, tokens: Tensor, answers: Tensor) -> Tensor:
    """
    The mean cross-entropy of the answers in nats, a float32 scalar. model: tokens (n, T) -> logits (n, T, vocabulary).
    """
    asked = answers != NO_ANSWER
    return F.cross_entropy(model(tokens)[asked].float(), answers[asked])


@torch.no_grad()
def score(model: Callable, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """
    (which answers are right, bool, their losses in nats, float32), both (n, answers of a row) on the CPU, in the order
    of the row. model: tokens (n, T) -> logits (n, T, vocabulary).
    """
    asked = answers != NO_ANSWER
    logits, targets = model(tokens)[asked].float(), answers[asked]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (logits.argmax(-1) == targets).view(len(tokens), -1).cpu(), losses.view(len(tokens), -1).cpu()


def accuracy(model: Callable, skill, count: int, rng: np.random.Generator, length: int,
             device: torch.device | str = "cpu") -> tuple[float, float]:
    """
    (share of right answers, its standard error over rows) of a model on so many fresh rows of a skill of one of its
    lengths.
    """
    shares = []
    for start in range(0, count, ROWS_AT_ONCE):
        tokens, answers = draw(skill, min(ROWS_AT_ONCE, count - start), rng, length)
        right, _ = score(model, tokens.to(device), answers.to(device))
        shares.append(right.double().mean(1))
    by_row = torch.cat(shares)
    return by_row.mean().item(), (by_row.var(correction=0) / len(by_row)).sqrt().item()
