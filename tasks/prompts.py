"""
Two probes of a model of bytes that was trained on something else: rows of text whose answers only the row itself says.
They are batches as tasks/answers.py has them, asked without any training.

    copy        a quoted word of random letters, lines of code, the same word again; asked for are its letters from the
                fifth on, where four letters have said which word it is
    recall      lines "key=digit" with different keys of three letters, then the same lines in another order; asked for
                are the digits behind the second equals signs

Letters and digits are equally likely: who does not look back is right in one of 26, or of 10.
"""

from dataclasses import dataclass

import numpy as np

from tasks.answers import NO_ANSWER
from train_gpt import Config

END_OF_TEXT = 256   # of the trainer's vocabulary of bytes, which has 257 ids
LETTERS = np.arange(ord("a"), ord("z") + 1)
LINES = (b"for i in range(n):\n", b"    x = x + 1\n", b"return x\n", b"import os\n", b"if x is None:\n", b"    pass\n")


def reads_bytes(config: Config) -> bool:
    """Whether a model's token ids are bytes and the end of text."""
    return config.vocab_size == END_OF_TEXT + 1 and config.end_of_text == END_OF_TEXT


@dataclass(frozen=True)
class CopiedWord:
    """A word that stands again some lines later."""

    letters: int = 16       # of the word
    gap: int = 64           # bytes of lines between the two, the last line cut
    known: int = 4          # letters of the second word before the first that is asked for

    vocab_size = END_OF_TEXT + 1
    chance_accuracy = 1 / len(LETTERS)

    @property
    def lengths(self) -> tuple[int]:
        return (2 + 2 * self.letters + self.gap + 3,)

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers, (count, length) int64."""
        words = rng.choice(LETTERS, size=(count, self.letters))
        second = 2 + self.letters + 2 + self.gap    # where the second quotation begins
        tokens = np.empty((count, length), dtype=np.int64)
        for row, word in zip(tokens, words):
            lines = b"".join(LINES[i] for i in rng.permutation(len(LINES)))[:self.gap - 1]
            quoted = b'"' + bytes(word.tolist()) + b'"'
            text = quoted + b"\n" + lines.ljust(self.gap - 1, b"\n") + b"\n" + quoted
            row[:] = [END_OF_TEXT, *text[:length - 1]]

        answers = np.full((count, length), NO_ANSWER)
        answers[:, second + self.known:second + self.letters] = words[:, self.known:]
        return tokens, answers


@dataclass(frozen=True)
class KeyedLines:
    """Lines that give each key a digit, then the same lines in another order."""

    pairs: int = 8

    vocab_size = END_OF_TEXT + 1
    chance_accuracy = 1 / 10

    @property
    def lengths(self) -> tuple[int]:
        return (1 + 12 * self.pairs,)

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers, (count, length) int64."""
        # keys that differ, as numbers in base 26, and their digits
        keys = np.stack([rng.choice(len(LETTERS) ** 3, self.pairs, replace=False) for _ in range(count)])
        digits = ord("0") + rng.integers(10, size=keys.shape)
        letters = LETTERS[np.stack([keys // 26 ** 2, keys // 26 % 26, keys % 26], axis=-1)]

        # lines (count, pairs, 6), and again in another order
        lines = np.concatenate([letters, np.full((*keys.shape, 1), ord("=")), digits[..., None],
                                np.full((*keys.shape, 1), ord("\n"))], axis=-1)
        order = rng.permuted(np.tile(np.arange(self.pairs), (count, 1)), axis=1)
        again = np.take_along_axis(lines, order[..., None], 1)
        ends = np.full((count, 1), END_OF_TEXT)
        tokens = np.concatenate([ends, lines.reshape(count, -1), again.reshape(count, -1)], axis=1)

        answers = np.full((count, length), NO_ANSWER)
        answers[:, 1 + 6 * self.pairs + 3::6] = np.take_along_axis(digits, order, 1)
        return tokens, answers
