"""
State tracking: the product of all elements of a group that a row has shown so far, at every position.

    row:        g_1, g_2, .. g_T
    answers:    y_t = g_t g_{t-1} .. g_1 at every position t

    parity      the group of two elements, written as bits: y_t = (g_1 + .. + g_t) mod 2
    S5          the 120 permutations of five things; g_1 is any of them, later ones are the transposition of the first
                two or the cycle of all five, which generate the group

The product is of functions, (g h)(i) = g(h(i)). As g_1 is drawn from the whole group, every y_t is equally likely,
whatever follows it: who does not know the state is right in one of 2 or 120. A model trained on rows of `length` tokens
is also asked about longer ones, there only at the positions that training rows do not have.

A step changes a state of one bit, or of log2(120); one matrix for each element does it. A transformer of fixed depth
and precision can hold no such state for all lengths if S5's word problem is harder than TC0, as is believed, and
softmax attention does not generalise parity beyond its training lengths. Source: Barrington, 1989 (S5 and NC1); Hahn,
2020, arxiv.org/abs/1906.06755 (parity); Liu et al., Transformers Learn Shortcuts to Automata, 2023,
arxiv.org/abs/2210.10749; Merrill, Petty & Sabharwal, The Illusion of State, 2024, arxiv.org/abs/2404.08819.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import factorial

import numpy as np

from tasks.answers import NO_ANSWER
from train_gpt import require

GROUPS = dict(parity=2, S5=5)   # name -> how many things it permutes in every way


@dataclass(frozen=True)
class StateTracking:
    """The task. RunError for a group that is none of GROUPS, or lengths that do not rise."""

    group: str = "parity"
    length: int = 16        # tokens of a training row
    longer: int = 64        # tokens of a longer row

    def __post_init__(self):
        require(self.group in GROUPS, f"a group is one of {', '.join(GROUPS)}; got {self.group!r}")
        require(1 <= self.length < self.longer,
                f"rows have at least 1 token and longer ones more; got {self.length} and {self.longer}")

    @property
    def vocab_size(self) -> int:
        """Elements, and the end of text, which no row has."""
        return factorial(GROUPS[self.group]) + 1

    @property
    def chance_accuracy(self) -> float:
        return 1 / factorial(GROUPS[self.group])

    @property
    def lengths(self) -> tuple[int, int]:
        return self.length, self.longer

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers, (count, length) int64."""
        products, generators = table_of(self.group)
        tokens = generators[rng.integers(len(generators), size=(count, length))]
        tokens[:, 0] = rng.integers(len(products), size=count)

        states = tokens.copy()
        for t in range(1, length):
            states[:, t] = products[tokens[:, t], states[:, t - 1]]
        if length > self.length:
            states[:, :self.length] = NO_ANSWER
        return tokens, states


@cache
def table_of(group: str) -> tuple[np.ndarray, np.ndarray]:
    """
    (products (n, n) int64: the number of the element g h at [g, h]; numbers of the elements that follow the first). The
    elements are numbered in the order of itertools.permutations, the identity first.
    """
    elements = list(permutations(range(GROUPS[group])))
    number = {element: i for i, element in enumerate(elements)}
    products = np.array([[number[tuple(g[i] for i in h)] for h in elements] for g in elements])
    generators = range(len(elements))
    if group == "S5":
        generators = [number[1, 0, 2, 3, 4], number[1, 2, 3, 4, 0]]
    return products, np.array(generators)
