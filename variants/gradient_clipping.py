"""
Gradient clipping: the gradient of all parameters together gets at most a given norm; noise may be added besides.

    G <- G min(1, norm / |G|),  then  G <- G + s / (1 + t)^0.55 N(0, 1)        t counts steps

|G| is over all parameters and ranks. Under Muon, which orthogonalises, a factor on the gradient acts only through the
momentum; under Adam only through its moments.

Cost: one more read of all gradients, and with several ranks no update under the backward pass any more.

Source: Pascanu et al., 2013, arxiv.org/abs/1211.5063; noise: Neelakantan et al., 2015, arxiv.org/abs/1511.06807
Status: unmeasured
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

import train_gpt
from train_gpt import Config, Ranks, require


@dataclass
class Options:
    norm: float = 1.0   # largest norm (0: any)
    noise: float = 0.0  # standard deviation s at the first step

    def __post_init__(self):
        require(0 <= self.norm < math.inf and 0 <= self.noise < math.inf and self.norm + self.noise > 0,
                f"norm={self.norm},noise={self.noise} do nothing or are out of range; give finite numbers above 0")


def treat(optimizers: list, config: Config, progress: float, ranks: Ranks, options: Options):
    gradients = [bucket.grad[bucket.slice] for optimizer in optimizers for bucket in optimizer.buckets]
    if options.norm:
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        if ranks.world > 1:
            dist.all_reduce(square)
        factor = (options.norm / (square.sqrt() + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    if options.noise:
        deviation = options.noise / (1 + optimizers[0].steps) ** 0.55
        for gradient in gradients:
            gradient.add_(torch.randn_like(gradient), alpha=deviation)


def patch(options: Options):
    def treat_gradients(optimizers: list, config: Config, progress: float, ranks: Ranks):
        treat(optimizers, config, progress, ranks, options)

    train_gpt.treat_gradients = treat_gradients
