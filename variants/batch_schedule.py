"""
Batch schedule: small batches and short rows at first, the settings' own from a part of the run on.

At the part u of the run (of its tokens) a step takes --batch_tokens times batch until u = batch_until, and rows have
--sequence_length times rows until u = rows_until. Tokens and their order are the baseline's: whole rows are read, in
the same order, and cut; what changes is how many of them a step averages over, and how far a token sees back. A run of
as many tokens has more steps.

Cost: none a token. Each size and length is one more shape to compile.

Source: batches: Smith et al., 2018, arxiv.org/abs/1711.00489; rows: Li et al., 2022, arxiv.org/abs/2108.06084
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial

import train_gpt
from train_gpt import Config, require


@dataclass
class Options:
    batch: float = 0.5          # of --batch_tokens, at first
    batch_until: float = 0.25   # part of the run
    rows: float = 0.5           # of --sequence_length, at first
    rows_until: float = 0.25    # part of the run

    def __post_init__(self):
        for name in ("batch", "rows", "batch_until", "rows_until"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name}={value} is out of range; give a number above 0, at most 1")


def size(config: Config, progress: float, options: Options) -> tuple[int, int]:
    tokens, T = config.batch_tokens, config.sequence_length
    if progress < options.rows_until:
        T = max(1, round(T * options.rows))
    if progress < options.batch_until:
        count = max(1, round(tokens * options.batch / config.sequence_length))
        tokens = count * config.sequence_length
    return tokens, T


def patch(options: Options):
    train_gpt.schedule_batch = partial(size, options=options)
