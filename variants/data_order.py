"""
Data order: which rows are read when, and how often a shard comes in an epoch.

rows: shuffled, as the baseline's; sequential, as they stand in the shard; easy_first and hard_first, by the number of
different tokens in a row, fewest or most first, equal ones shuffled; unique, shuffled without rows whose first 32
tokens came earlier in that order. mixture=2,1 reads the first of every two shards, by name, twice and the second once
an epoch, in turn: numbers are repeated over the shards, 0 leaves one out.

take=2,6 mixes within a batch: a visit reads two rows of the first shard, the next one six of the second, and an epoch
is one visit to each. A later visit goes on where the one before it ended; when the rows of a shard have all been read,
they come again in a new order. So a quarter of all rows is the first shard's, however long the shards are, and of every
batch where its rows are a multiple of eight. Numbers are repeated over the shards; rows are shuffled or sequential.

Cost: one sort a shard, on the thread that reads ahead; with take a list of the shard's rows at every visit.

Source: curricula: Bengio et al., 2009; duplicates: Lee et al., 2022, arxiv.org/abs/2107.06499
Status: unmeasured
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

import train_gpt
from train_gpt import Config, find_shards, require


@dataclass
class Options:
    rows: Literal["shuffled", "sequential", "easy_first", "hard_first", "unique"] = "easy_first"
    mixture: tuple[int, ...] = (1,)     # how often an epoch reads a shard, repeated over the shards
    take: tuple[int, ...] = (0,)        # rows of a shard that a visit reads, repeated over the shards; 0: all of them

    def __post_init__(self):
        require(any(self.mixture) and max(self.mixture) <= 100,
                f"mixture={self.mixture} reads nothing, or a shard more than 100 times; give a number for each shard, "
                "one of them above 0")
        require(self.take == (0,) or min(self.take) >= 1,
                f"take={self.take} has a visit without rows; give a number from 1 on for each shard, or mixture=0 for "
                "a shard that is left out")
        require(self.take == (0,) or self.rows in ("shuffled", "sequential"),
                f"take={self.take} goes on where the visit before ended, which rows={self.rows} has no order for; give "
                "rows=shuffled or rows=sequential")


def order(config: Config, tokens: np.ndarray, starts: np.ndarray, generator, options: Options) -> np.ndarray:
    if options.take != (0,):
        return take_rows(config, tokens, starts, generator, options)
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


def take_rows(config: Config, tokens: np.ndarray, starts: np.ndarray, generator, options: Options) -> np.ndarray:
    """
    The rows of one visit. Which visit it is says the generator's seed, (seed, epoch, number in the epoch), so that a
    resumed run finds its row again.
    """
    # which shard this is, and how many of its rows earlier visits have read
    seed, epoch, number = generator.bit_generator.seed_seq.entropy
    visits = mix(config, epoch, len(find_shards(config, "train")), options)
    shard = visits[number]
    take = options.take[shard % len(options.take)]
    begin = take * (epoch * visits.count(shard) + visits[:number].count(shard))

    # the number of rows depends by one on where the first row begins: the last is not counted
    T = config.sequence_length
    count = len(starts)
    if not config.align_documents:
        count = min(count, (len(tokens) - T) // T)
    if count < 1:
        return starts
    passes, indices = np.divmod(np.arange(begin, begin + take), count)
    if options.rows == "shuffled":
        indices = [shuffle(seed, shard, int(turn), count)[index] for turn, index in zip(passes, indices)]
    return starts[indices]


@lru_cache(maxsize=16)
def shuffle(seed: int, shard: int, turn: int, count: int) -> np.ndarray:
    """The order (count,) in which the rows of a shard are read for the turn-th time, from 0 on."""
    return np.random.default_rng([seed, shard, turn, count]).permutation(count)


def patch(options: Options):
    if options.rows != "shuffled" or options.take != (0,):
        train_gpt.order_rows = partial(order, options=options)
    if set(options.mixture) != {1}:
        train_gpt.order_shards = partial(mix, options=options)
