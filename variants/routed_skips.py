"""
Routed skips: the second half of the layers adds a mean of earlier streams, whose weights each token chooses by a map.

    x <- x + w sum_j p_j s_j        p = map(V norm(x)_{1..12} / t + u)

before layer l, from the layers layers / 2 and 2 on, in place of x + w s_mirror. s_j are the embedded tokens and the
streams after the layers 0 .. l - 2, n = l of them; x and s_j are (B, T, model_dim), V is (n, 12), u is (n,), w is a
number for each layer. V and u begin at zero, so that the weights begin equal, and w begins at 0.2 as in the trainer.
The map is the point: it is a softmax in neither attention nor loss, where other normalisers can be compared with it.

    map           softmax, max_shift_rational, stablemax, squareplus, min_shift_linear, taylor, sparsemax or entmax15:
                  kernels/probability_maps.py
    power, eps    k of max_shift_rational, eps of min_shift_linear
    ties          first or split: which of equal extremes gets the derivative
    logit_scale   auto: scores are divided by the map's slope, so that all maps start as softmax does; or a factor above
                  0, as text
    temperature   fixed: t = 1; learned: a number for each layer, from 1 on. Softmax with a learned temperature is the
                  control for a claim about confidence

Cost: 12 n + n + 1 parameters for each of these layers, and n reads of a stream.

Source: dynamic weights over depth: Xiao et al., MUDDFormer, 2025, arxiv.org/abs/2502.12170; Pagliardini et al.,
DenseFormer, 2024, arxiv.org/abs/2402.02622; the maps: see there; the form with one mean and the trainer's skip weight:
ours
Status: undecided in 2026-11-23_RoutedSkips; too few pairs in 2026-11-23_RoutedSkipsMaps
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.backend import wide
from kernels.probability_maps import probability_map
from train_gpt import AttentionContext, Config, require

Map = Literal["softmax", "max_shift_rational", "stablemax", "squareplus", "min_shift_linear", "taylor", "sparsemax",
              "entmax15"]


@dataclass
class Options:
    map: Map = "softmax"
    power: float = 2.0
    eps: float = 1e-3
    ties: Literal["first", "split"] = "first"
    logit_scale: str = "auto"
    temperature: Literal["fixed", "learned"] = "fixed"

    def __post_init__(self):
        require(self.logit_scale == "auto" or is_positive_number(self.logit_scale),
                f"logit_scale={self.logit_scale}: give auto or a factor above 0")
        require(self.power > 0 and self.eps > 0, f"power={self.power},eps={self.eps}: give numbers above 0")


def is_positive_number(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class Router(nn.Module):
    """forward(x (B, T, model_dim), streams) returns the routed mean of streams of x's shape, times w."""

    def __init__(self, config: Config, sources: int, options: Options):
        super().__init__()
        self.options = options
        self.channels = min(train_gpt.GATE_CHANNELS, config.model_dim)  # so many of the stream's first ones are read
        self.norm = train_gpt.Norm(config, config.model_dim)
        self.scores = train_gpt.Linear(config, None, "gate", self.channels, sources)  # V
        self.bias = nn.Parameter(torch.zeros(sources))                                # (n,) u
        self.weight = nn.Parameter(torch.full((1,), 0.2))                             # (1,) w
        learned = options.temperature == "learned"
        self.log_temperature = nn.Parameter(torch.zeros(1)) if learned else None      # (1,) log t; None: t = 1

    def probabilities(self, x: Tensor) -> Tensor:
        """Return p (B, T, n), at least float32."""
        o = self.options
        scores = self.scores(wide(self.norm(x)[..., :self.channels])) + self.bias
        if self.log_temperature is not None:
            scores = scores * torch.exp(-self.log_temperature)
        scaled = o.logit_scale == "auto"
        if not scaled:
            scores = scores * float(o.logit_scale)
        return probability_map(scores, o.map, power=o.power, eps=o.eps, ties=o.ties, scaled=scaled)

    def forward(self, x: Tensor, streams: list[Tensor]) -> Tensor:
        weights = (self.weight * self.probabilities(x)).type_as(x).unbind(-1)
        mean = weights[0][..., None] * streams[0]
        for weight, stream in zip(weights[1:], streams[1:]):
            mean = torch.addcmul(mean, weight[..., None], stream)
        return mean


class RoutedGPT(train_gpt.GPT):
    """The trainer's model with a router before each layer of the second half."""

    def __init__(self, config: Config, options: Options):
        require(config.layers >= 3, f"variant routed_skips: with {config.layers} layers there is nothing to choose "
                                    "from; give --layers 3 or more")
        super().__init__(config)
        self.skip_weights = None
        layers = range(max(2, config.layers // 2), config.layers)
        self.routers = nn.ModuleDict({str(layer): Router(config, layer, options) for layer in layers})

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        streams = [contexts[0].x0]
        for layer, (block, ctx) in enumerate(zip(self.blocks, contexts)):
            if str(layer) in self.routers:
                x = x + self.routers[str(layer)](x, streams[:layer])
            x = block(x, ctx)
            streams.append(x)
        return x


def patch(options: Options):
    train_gpt.GPT = partial(RoutedGPT, options=options)
