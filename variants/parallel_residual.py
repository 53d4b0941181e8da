"""
Parallel block: attention and feed-forward read the same normalised stream, and both are added to it.

y = x + attention(norm(x)) + mlp(norm(x)); x and y (B, T, model_dim). Replaces h = x + attention(norm(x)), y = h + mlp(norm(h)). Each output joins
through its own residual, attention's first. norm=separate gives each branch a norm of its own, which differs only where norms have parameters.

Cost: one norm fewer, otherwise the same parameters and FLOPs; the two branches no longer wait for each other.

Source: Wang & Komatsuzaki, GPT-J, 2021, github.com/kingoflolz/mesh-transformer-jax; Chowdhery et al., PaLM, 2022, arxiv.org/abs/2204.02311
Status: cpu track, 6 seeds: not distinguishable, +0.008 nats (sd of a run 0.010), though worse in all six pairs of equal seeds; records/negative/2026-11-22_SwigluAndParallelResidual
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

import train_gpt

@dataclass
class Options:
    norm: Literal["shared", "separate"] = "shared"

class ParallelBlock(train_gpt.Block):
    """forward(x (B, T, model_dim), ctx) -> same shape."""
    def __init__(self, config: train_gpt.Config, layer: int, options: Options):
        super().__init__(config, layer)
        if options.norm == "shared":
            self.mlp_norm = None

    def forward(self, x: Tensor, ctx: train_gpt.AttentionContext) -> Tensor:
        x = self.mix_stream(x, ctx)
        normed = self.attention_norm(x)
        attention, mlp = self.attention(normed, ctx), self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        return self.mlp_residual(self.attention_residual(x, attention), mlp)

def patch(options: Options):
    train_gpt.Block = partial(ParallelBlock, options=options)
