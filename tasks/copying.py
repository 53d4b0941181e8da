"""
Copy at a distance: a span of random letters somewhere in noise, then a mark, then the span again.

    row:        end of text, x_1 .. x_g with the span s_1 .. s_n in its midst, mark, s_1, s_2, .. s_{n-1}
    answers:    s_1 at the mark, s_{i+1} at the second s_i

The n letters of a span differ, each is drawn from `letters` ids. The g = gap other tokens are all the filler, and the
span begins after 0 .. g of them, each equally likely, so that it is between n and n + g tokens back and no fixed
distance answers. The answer to s_i is what followed s_i before. Who knows no more than the alphabet is right in one of
`letters`.

A model with a state of fixed size must hold the span in it, n log2(letters) bits; attention looks it up. Source:
Jelassi et al., Repeat After Me, 2024, arxiv.org/abs/2402.01032; the gap: Hochreiter & Schmidhuber, Long Short-Term
Memory, 1997.
"""

from dataclasses import dataclass

import numpy as np

from tasks.answers import NO_ANSWER
from train_gpt import require


@dataclass(frozen=True)
class Copying:
    """The task. RunError for a span that has too few letters."""

    span: int = 16          # letters that are copied
    gap: int = 32           # fillers around the span
    letters: int = 32       # ids of letters

    def __post_init__(self):
        require(1 <= self.span <= self.letters,
                f"a span has from 1 to {self.letters} letters, as they differ; got {self.span}")
        require(self.gap >= 0, f"a gap has at least 0 fillers, got {self.gap}")

    @property
    def vocab_size(self) -> int:
        """Letters, the filler, the mark, the end of text."""
        return self.letters + 3

    @property
    def chance_accuracy(self) -> float:
        return 1 / self.letters

    @property
    def lengths(self) -> tuple[int]:
        return (1 + self.gap + 2 * self.span,)

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers, (count, length) int64."""
        # where the second span is asked for, and the spans
        mark = 1 + self.gap + self.span
        spans = rng.permuted(np.tile(np.arange(self.letters), (count, 1)), axis=1)[:, :self.span]
        starts = 1 + rng.integers(self.gap + 1, size=(count, 1))

        tokens = np.full((count, length), self.letters)
        tokens[:, 0] = self.vocab_size - 1
        np.put_along_axis(tokens, starts + np.arange(self.span), spans, 1)
        tokens[:, mark] = self.letters + 1
        tokens[:, mark + 1:] = spans[:, :-1]

        answers = np.full((count, length), NO_ANSWER)
        answers[:, mark:] = spans
        return tokens, answers
