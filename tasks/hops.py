"""
k-hop lookup, or pointer chasing: links between nodes, then queries that follow one link, two, up to k.

    row:        end of text, (a_i, f(a_i), separator) for n nodes in random order, then for each node in another random
                order: h, a
    answers:    f applied h times to a, at a

The n nodes of a row are drawn from `names` ids. f is a random cycle through them, so that f^h(a) is never a for h < n
and every other node is equally likely: who knows the row's nodes but not its links is right in one of n - 1. A query's
number of hops h is drawn from 1 .. k, and 1 .. k have an id each. The separator tells a node with a link from a node
that is linked to.

One hop is recall; each further hop looks up what the last one gave, which takes attention another layer, or a logarithm
of them. Source: Sanford, Hsu & Telgarsky, Transformers, parallel computation, and logarithmic depth, 2024,
arxiv.org/abs/2402.09268.
"""

from dataclasses import dataclass

import numpy as np

from tasks.answers import NO_ANSWER
from train_gpt import require


@dataclass(frozen=True)
class Hops:
    """The task. RunError for as many hops as nodes, or more nodes than names."""

    nodes: int = 6          # of a row
    hops: int = 2           # the most of a query
    names: int = 32         # ids of nodes

    def __post_init__(self):
        require(1 <= self.hops < self.nodes,
                f"a query of {self.nodes} nodes follows from 1 to {self.nodes - 1} links; got {self.hops}")
        require(self.nodes <= self.names,
                f"the nodes of a row differ, so there are at most {self.names} of them; got {self.nodes}")

    @property
    def vocab_size(self) -> int:
        """Names, the separator, a query's hops, the end of text."""
        return self.names + self.hops + 2

    @property
    def chance_accuracy(self) -> float:
        return 1 / (self.nodes - 1)

    @property
    def lengths(self) -> tuple[int]:
        return (1 + 5 * self.nodes,)

    def rows(self, count: int, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answers, (count, length) int64."""
        def shuffle(n: int) -> np.ndarray:
            """(count, n): 0 .. n - 1 in random order."""
            return rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)

        # the links (count, nodes) between nodes as numbers, the queries, and their answers
        cycle, linked, asked = (shuffle(self.nodes) for _ in range(3))
        links = np.empty_like(cycle)
        np.put_along_axis(links, cycle, np.roll(cycle, -1, axis=1), 1)
        hops = rng.integers(1, self.hops + 1, size=asked.shape)
        reached = asked
        for hop in range(1, self.hops + 1):
            reached = np.where(hop <= hops, np.take_along_axis(links, reached, 1), reached)

        # a name for each node
        names = shuffle(self.names)[:, :self.nodes]
        from_node, to_node, asked, reached = (
            np.take_along_axis(names, nodes, 1)
            for nodes in (linked, np.take_along_axis(links, linked, 1), asked, reached))

        # the row
        first = 1 + 3 * self.nodes
        tokens = np.full((count, length), self.names)
        tokens[:, 0] = self.vocab_size - 1
        tokens[:, 1:first:3] = from_node
        tokens[:, 2:first:3] = to_node
        tokens[:, first::2] = self.names + hops
        tokens[:, first + 1::2] = asked

        answers = np.full((count, length), NO_ANSWER)
        answers[:, first + 1::2] = reached
        return tokens, answers
