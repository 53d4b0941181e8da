"""
Weight average: validation and generated texts see a mean of the weights of many steps; training goes on with its own.

    ema     A <- b A + (1 - b) W after every step, b = min(decay, (1 + n) / (10 + n)) at the n-th
    last    the mean of the weights after each of the last `count` stretches of `every` steps

W are all parameters, A begins as the first W. Averaging takes the place of part of the learning rate's decay, so a
schedule that falls less far (schedules:end=0.1) belongs to a fair trial.

Cost: ema holds a copy of the parameters and reads it once a step; last holds `count` copies.

Source: ema: Polyak and Juditsky, 1992, with the warm-up that is usual; last: Kaddour, LAWA, 2022,
arxiv.org/abs/2209.14981
Status: unmeasured
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, Ranks, require


@dataclass
class Options:
    kind: Literal["ema", "last"] = "ema"
    decay: float = 0.99     # b of ema
    count: int = 5          # copies of last
    every: int = 10         # steps between two of them

    def __post_init__(self):
        require(0 < self.decay < 1, f"decay={self.decay} is out of range; give a number above 0 and below 1")
        require(0 < self.count <= 64 and self.every > 0,
                f"count={self.count},every={self.every} are out of range; give 1 to 64 copies and at least one step")


class Average:
    """What train_gpt.build_average returns: see there."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, options: Options):
        self.options = options
        self.parameters = dict(model.named_parameters())
        self.steps = 0      # averaged so far
        self.copies = []    # each {name: tensor}: of ema the average alone, of last the newest at the end

    @torch.no_grad()
    def update(self, progress: float):
        """Take the weights after a step into the average."""
        options, self.steps = self.options, self.steps + 1
        if options.kind == "last":
            if self.steps % options.every == 0:
                self.copies = self.copies[-options.count + 1:] if options.count > 1 else []
                self.copies.append(self._weights())
        elif not self.copies:
            self.copies = [self._weights()]
        else:
            decay = min(options.decay, (1 + self.steps) / (10 + self.steps))
            for name, average in self.copies[0].items():
                average.lerp_(self.parameters[name], 1 - decay)

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def applied(self):
        """The model has the averages inside, and its own weights again afterwards, bit for bit."""
        if not self.copies:
            yield
            return
        before = self._weights()
        try:
            self._assign({name: sum(copy[name] for copy in self.copies) / len(self.copies) for name in before})
            yield
        finally:
            self._assign(before)

    @torch.no_grad()
    def _assign(self, tensors: dict[str, Tensor]):
        for name, p in self.parameters.items():
            p.copy_(tensors[name])

    def state_dict(self) -> dict:
        """Copies of the averages."""
        return dict(steps=self.steps, copies=[{name: t.clone() for name, t in copy.items()} for copy in self.copies])

    def load_state_dict(self, saved: dict):
        self.steps = saved["steps"]
        device = next(iter(self.parameters.values())).device
        self.copies = [{name: copy[name].to(device) for name in self.parameters} for copy in saved["copies"]]


def patch(options: Options):
    train_gpt.build_average = partial(Average, options=options)
