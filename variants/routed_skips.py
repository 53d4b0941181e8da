"""
Routed skips: what the second half of the layers takes from earlier streams is a mean whose weights each token chooses, by a map of choice.

    x <- x + w sum_j p_j s_j,   p = map(V norm(x)_{1..12} / t + u)       s_j: the embedded tokens and the streams after layers 0 .. l - 2, n = l of them

before layer l, from layers / 2 and 2 on; x and s_j (B, T, model_dim), V (n, 12), u (n,), w a number a layer. Replaces x + w s_mirror. V and u begin at zero, so that
the weights begin equal, w at 0.2 as in the trainer. The map is the point: a softmax that is no attention and no loss, where other normalisers can be compared.

    map           softmax, max_shift_rational, stablemax, squareplus, min_shift_linear, taylor, sparsemax or entmax15: kernels/probability_maps.py
    power, eps    k of max_shift_rational, eps of min_shift_linear;  ties: first or split, whose the derivative of a shared extreme is
    logit_scale   auto: scores divided by the map's slope, so that all start as softmax does; or a factor above 0, given as text
    temperature   fixed: t = 1; learned: a number a layer, from 1. Softmax with a learned one is the control for a claim about confidence

Cost: 12 n + n + 1 parameters for each of these layers, n reads of a stream.

Source: dynamic weights over depth: Xiao et al., MUDDFormer, 2025, arxiv.org/abs/2502.12170; Pagliardini et al., DenseFormer, 2024, arxiv.org/abs/2402.02622; the maps: see there; the
form with one mean and the trainer's skip weight: ours
Status: cpu track, 250k bytes, 3 seeds: three maps without exponentials and a learned temperature not distinguishable from softmax, differences below 0.001; not compared with the baseline yet
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.probability_maps import probability_map
from train_gpt import AttentionContext, Config, RunError

GPT = train_gpt.GPT

@dataclass
class Options:
    map: Literal["softmax", "max_shift_rational", "stablemax", "squareplus", "min_shift_linear", "taylor", "sparsemax", "entmax15"] = "softmax"
    power: float = 2.0
    eps: float = 1e-3
    ties: Literal["first", "split"] = "first"
    logit_scale: str = "auto"
    temperature: Literal["fixed", "learned"] = "fixed"

    def __post_init__(self):
        try:
            scale = 1.0 if self.logit_scale == "auto" else float(self.logit_scale)
        except ValueError:
            scale = -1.0
        faults = [(not 0 < scale < float("inf"), f"logit_scale={self.logit_scale}: give auto or a factor above 0"),
                  (not (self.power > 0 and self.eps > 0), f"power={self.power},eps={self.eps}: give numbers above 0")]
        if message := next((message for fault, message in faults if fault), None):
            raise ValueError(message)

class Router(nn.Module):
    """forward(x (B, T, model_dim), streams, each of that shape) -> their routed mean, times w."""
    def __init__(self, config: Config, sources: int, options: Options):
        super().__init__()
        self.options, width = options, min(train_gpt.GATE_CHANNELS, config.model_dim)
        self.norm, self.scores = train_gpt.Norm(config, config.model_dim), train_gpt.Linear(config, None, "gate", width, sources)
        self.bias, self.weight = nn.Parameter(torch.zeros(sources)), nn.Parameter(torch.full((1,), 0.2))
        self.log_temperature = nn.Parameter(torch.zeros(1)) if options.temperature == "learned" else None

    def probabilities(self, x: Tensor) -> Tensor:
        """(B, T, n), at least float32."""
        o, x = self.options, self.norm(x)[..., :self.scores.weight.shape[1]]
        scores = self.scores(x.to(torch.promote_types(x.dtype, torch.float32))) + self.bias
        if self.log_temperature is not None:
            scores = scores * torch.exp(-self.log_temperature)
        scaled = o.logit_scale == "auto"
        return probability_map(scores if scaled else scores * float(o.logit_scale), o.map, power=o.power, eps=o.eps, ties=o.ties, scaled=scaled)

    def forward(self, x: Tensor, streams: list[Tensor]) -> Tensor:
        weights = (self.weight * self.probabilities(x)).type_as(x).unbind(-1)
        mean = weights[0][..., None] * streams[0]
        for weight, stream in zip(weights[1:], streams[1:]):
            mean = torch.addcmul(mean, weight[..., None], stream)
        return mean

class RoutedGPT(GPT):
    def __init__(self, config: Config, options: Options):
        if config.layers < 3:
            raise RunError(f"variant routed_skips: with {config.layers} layers there is nothing to choose from; give --layers 3 or more")
        super().__init__(config)
        self.skip_weights = None
        self.routers = nn.ModuleDict({str(layer): Router(config, layer, options) for layer in range(max(2, config.layers // 2), config.layers)})

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
