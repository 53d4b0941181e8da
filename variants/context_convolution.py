"""
Context convolution: a causal depthwise convolution over a few tokens before attention, before the feed-forward, or on
queries, keys and values.

    linear      c(u)_t = sum over j < n of a_j . u_{t-j}                        a_0 starts at 1, the others at 0
    residual    c(u)_t = u_t + GELU(sum over j < n of a_j . u_{t-j} + b)        a and b start at 0

u (B, T, C) is what the module reads, or a layer's queries, keys or values before their norm; a_j and b (C,) are
learned; the sum stays in the document. Both forms start as the identity. The options:

    site    attention: its input; mlp: the feed-forward's input; both: these two; qkv: the outputs of the attention's
            matrices q, k and v, as many as it has; all: the two inputs and q, k, v
    taps    n
    form    linear or residual

It replaces the block and leaves its parts alone: every attention and every feed-forward of other variants gets the
convolution. An attention that keeps earlier tokens' inputs in its own convolution has both.

Cost: n C parameters a site, n C + C with the residual form; 6 n C FLOPs a token for both passes. For A bytes of u the
linear form moves 2A forward and 3A backward (kernels/short_convolution).

Source: jefflinwood/wavestack-hybrid, whose convolution has dense taps (the residual form); a depthwise one: Fu et al.,
H3, 2022, arxiv.org/abs/2212.14052
Status: better in 2026-12-01_ContextConvolution; undecided in 2026-12-01_ShorterWithConvolution
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.short_convolution import short_convolution
from train_gpt import AttentionContext, AttentionMask, Config, require

SITES = dict(  # option -> the sites of a block
    attention=("attention",),
    mlp=("mlp",),
    both=("attention", "mlp"),
    qkv=("q", "k", "v"),
    all=("attention", "mlp", "q", "k", "v"),
)


@dataclass
class Options:
    site: Literal["both", "attention", "mlp", "qkv", "all"] = "both"
    taps: Literal[3, 4] = 3
    form: Literal["linear", "residual"] = "linear"


class ContextConvolution(nn.Module):
    """forward(u (B, T, channels), mask) returns c(u), of the same shape. name: of its memory in a layer's cache."""

    def __init__(self, channels: int, taps: int, form: str, name: str):
        super().__init__()
        self.name = f"convolution of {name}"
        # (taps, channels), the last for the token itself; None: the linear form, which has no bias
        self.taps = nn.Parameter(torch.zeros(taps, channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if form == "residual" else None
        self.taps.optimizer = "adam"
        if form == "linear":
            nn.init.ones_(self.taps[-1])

    def forward(self, u: Tensor, mask: AttentionMask) -> Tensor:
        earlier = None
        if mask.cache is not None:
            earlier = mask.cache.with_earlier(u, len(self.taps) - 1, self.name)
        total = short_convolution(u, self.taps.type_as(u), mask.positions, earlier)
        if self.bias is None:
            return total
        return u + F.gelu(total + self.bias.type_as(u))


class ConvolvedBlock(train_gpt.Block):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        self.mask = None            # of the row that the attention is working on; None between two calls
        self.convolutions = nn.ModuleDict()
        for site in SITES[options.site]:
            channels = config.model_dim
            if site in "qkv":
                linear = getattr(self.attention, site, None)
                if not isinstance(linear, nn.Module):
                    continue
                channels = linear.weight.shape[0]
                linear.register_forward_hook(partial(self.convolve_output, site))
            self.convolutions[site] = ContextConvolution(channels, options.taps, options.form, site)
        require(self.convolutions, "variant context_convolution: site=qkv, but the attention has none of the matrices "
                                   "q, k and v; give site=attention")

    def convolve(self, site: str, u: Tensor, mask: AttentionMask) -> Tensor:
        return self.convolutions[site](u, mask) if site in self.convolutions else u

    def convolve_output(self, site: str, linear: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """The hook of the attention's matrices."""
        return self.convolve(site, output, self.mask)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        # attention
        x = self.mix_stream(x, ctx)
        u = self.convolve("attention", self.attention_norm(x), ctx.mask)
        self.mask = ctx.mask
        y = self.attention(u, ctx)
        self.mask = None
        x = self.attention_residual(x, y)

        # feed-forward
        u = self.convolve("mlp", self.mlp_norm(x), ctx.mask)
        return self.mlp_residual(x, self.mlp(u))


def patch(options: Options):
    train_gpt.Block = partial(ConvolvedBlock, options=options)
