"""
Parallel block: attention and feed-forward read the same normalised stream, and both are added to it.

    y = x + attention(norm(x)) + mlp(norm(x))    in place of    h = x + attention(norm(x)),  y = h + mlp(norm(h))

x, h and y are (B, T, model_dim). Each output joins the stream through its own residual, attention's first. With
norm=separate each branch has a norm of its own, which makes a difference only where norms have parameters.

Cost: one norm fewer, otherwise the same parameters and FLOPs; the two branches no longer wait for each other.

Source: Wang & Komatsuzaki, GPT-J, 2021, github.com/kingoflolz/mesh-transformer-jax; Chowdhery et al., PaLM, 2022,
arxiv.org/abs/2204.02311
Status: worse in 2026-11-22_SwigluAndParallelResidual, 2026-12-01_ParallelResidualPairs
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

import train_gpt
from train_gpt import AttentionContext, Config


@dataclass
class Options:
    norm: Literal["shared", "separate"] = "shared"


class ParallelBlock(train_gpt.Block):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        if options.norm == "shared":
            self.mlp_norm = None

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x = self.mix_stream(x, ctx)
        normed = self.attention_norm(x)
        attention = self.attention(normed, ctx)
        mlp = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        return self.mlp_residual(self.attention_residual(x, attention), mlp)


def patch(options: Options):
    train_gpt.Block = partial(ParallelBlock, options=options)
