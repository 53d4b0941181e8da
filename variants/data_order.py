"""
Data order: which rows are read when, and how often a shard comes in an epoch.

rows: shuffled, as the baseline's; sequential, as they stand in the shard; easy_first and hard_first, by the number of
different tokens in a row, fewest or most first, equal ones shuffled; unique, shuffled without rows whose first 32
tokens came earlier in that order. mixture=2,1 reads the first of every two shards, by name, twice and the second once
an epoch, in turn: numbers are repeated over the shards, 0 leaves one out.

Cost: one sort a shard, on the thread that reads ahead.

Source: curricula: Bengio et al., 2009; duplicates: Lee et al., 2022, arxiv.org/abs/2107.06499
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

import train_gpt
from train_gpt import Config, require


@dataclass
class Options:
    rows: Literal["shuffled", "sequential", "easy_first", "hard_first", "unique"] = "easy_first"
    mixture: tuple[int, ...] = (1,)     # how often an epoch reads a shard, repeated over the shards

    def __post_init__(self):
        require(any(self.mixture) and max(self.mixture) <= 100,
                f"mixture={self.mixture} reads nothing, or a shard more than 100 times; give a number for each shard, "
                "one of them above 0")


def order(config: Config, tokens: np.ndarray, starts: np.ndarray, generator, options: Options) -> np.ndarray:
    if options.rows == "sequential":
        return starts
    starts = generator.permutation(starts)
    if options.rows == "unique":
        first = {}  # beginning of a row -> index of the first row that begins so
        for index, start in enumerate(starts):
            first.setdefault(tokens[start:start + 32].tobytes(), index)
        return starts[list(first.values())]
    if options.rows == "shuffled":
        return starts
    counts = np.array([len(np.unique(tokens[start:start + config.sequence_length])) for start in starts])
    return starts[np.argsort(counts if options.rows == "easy_first" else -counts, kind="stable")]


def mix(config: Config, epoch: int, count: int, options: Options) -> list[int]:
    times = [options.mixture[shard % len(options.mixture)] for shard in range(count)]
    return [shard for turn in range(max(times)) for shard in range(count) if times[shard] > turn]


def patch(options: Options):
    if options.rows != "shuffled":
        train_gpt.order_rows = partial(order, options=options)
    if set(options.mixture) != {1}:
        train_gpt.order_shards = partial(mix, options=options)
