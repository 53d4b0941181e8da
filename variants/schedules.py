"""
Schedules: how the learning rate, weight decay, Muon's momentum and Adam's second decay move through the run.

With u in [0, 1) the part of the run that is done, d the part of it in which the rate falls, and f its end, the learning
rate is its setting times

    linear      min(1, (1 - u) / d), the baseline's with d = --decay_fraction and f = 0
    cosine      f + (1 - f) (1 + cos(pi u)) / 2
    wsd         1, then 1 - (1 - f) sqrt(1 - (1 - u) / d): warm-up, stable, decay
    constant    1

each times min(1, u / warmup). decay=constant keeps weight decay, decay=rate multiplies it by the same factor once
more. Muon's momentum reaches momentum_end linearly over the last d of the run, Adam's second decay beta2_end over all
of it, in 16 steps.

Cost: none.

Source: cosine: Loshchilov and Hutter, SGDR, 2017, arxiv.org/abs/1608.03983; wsd: Hu et al., MiniCPM, 2024,
arxiv.org/abs/2404.06395, with the root of Haegele et al., 2024, arxiv.org/abs/2405.18392
Status: unmeasured
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import train_gpt
from train_gpt import Config, require


@dataclass
class Options:
    rate: Literal["linear", "cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.0         # part of the run in which the rate rises from 0
    fall: float = 0.0           # part of the run in which linear and wsd fall (0: --decay_fraction)
    end: float = 0.0            # factor at the end of the run
    decay: Literal["constant", "rate"] = "constant"
    momentum_end: float = 0.0   # Muon's momentum at the end (0: as before)
    beta2_end: float = 0.0      # decay of Adam's second moment at the end (0: as before)

    def __post_init__(self):
        for name in ("warmup", "fall", "end", "momentum_end", "beta2_end"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} is out of range; give a number of at least 0 and below 1")


def learning_rate(config: Config, progress: float, options: Options) -> float:
    fall = max(options.fall or config.decay_fraction, 1e-9)
    left = min(1.0, (1 - progress) / fall)  # of the fall
    factors = dict(
        linear=options.end + (1 - options.end) * left,
        cosine=options.end + (1 - options.end) * (1 + math.cos(math.pi * progress)) / 2,
        wsd=1 - (1 - options.end) * math.sqrt(1 - left),
        constant=1.0,
    )
    rise = min(1.0, progress / options.warmup) if options.warmup else 1.0
    return factors[options.rate] * rise


def momentum(config: Config, progress: float, options: Options, before) -> float:
    fall = max(options.fall or config.decay_fraction, 1e-9)
    done = max(0.0, 1 - (1 - progress) / fall)
    value = before(config, progress)
    return value + done * (options.momentum_end - value)


def adam_betas(config: Config, progress: float, options: Options) -> tuple[float, float]:
    # in 16 steps: where the update is compiled, each value is compiled anew
    done = math.floor(16 * progress) / 15
    return config.adam_beta1, config.adam_beta2 + done * (options.beta2_end - config.adam_beta2)


def patch(options: Options):
    train_gpt.schedule_learning_rate = partial(learning_rate, options=options)
    if options.decay == "rate":
        train_gpt.schedule_weight_decay = partial(learning_rate, options=options)
    if options.momentum_end:
        train_gpt.schedule_momentum = partial(momentum, options=options, before=train_gpt.schedule_momentum)
    if options.beta2_end:
        train_gpt.schedule_adam_betas = partial(adam_betas, options=options)
