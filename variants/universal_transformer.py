"""
Universal transformer: the stack of blocks runs over and over, and every token halts when it has had enough.

    s_0 = x,   s_n = blocks(s_{n-1} + e_n)          h_n = sigmoid(w.s_n + b)          n = 1 .. t_max
    N = the first n with h_1 + .. + h_n >= threshold, or t_max;   R = 1 - h_1 - .. - h_{N-1}
    y = h_1 s_1 + .. + h_{N-1} s_{N-1} + R s_N      loss + ponder * mean of N + R, in training only

x, s and y are (B, T, model_dim), w (model_dim,), e_n (model_dim,) is zero at the start. A token that has halted keeps
its stream, and others go on seeing it; all t_max runs are computed, of fixed shape, without waiting for the device.
With --layers 1 it is one shared block.

    style     act: as above. published: no e_n; a token that never halts takes h in place of R, and only there R is
              added to the penalty, so that its gradient reaches few tokens. off: s_{t_max}, no halting
    t_max     1: the baseline

Cost: t_max passes of the model's blocks; model_dim + 1 parameters, and t_max model_dim for e.

Source: Dehghani et al., Universal Transformers, 2019, arxiv.org/abs/1807.03819; Graves, Adaptive Computation Time,
2016, arxiv.org/abs/1603.08983; published: parameter-golf pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.backend import wide
from train_gpt import AttentionContext, Config, require
from variants.depth_recurrence import context_of_pass


@dataclass
class Options:
    t_max: int = 3
    threshold: float = 0.99
    ponder: float = 0.01            # weight of the penalty
    halt_bias: float = -1.0         # where b begins
    step_embedding: bool = True     # whether there are e_n
    style: Literal["act", "published", "off"] = "act"

    def __post_init__(self):
        require(1 <= self.t_max <= 64, f"t_max={self.t_max} is out of range; give 1 to 64 runs")
        require(0 < self.threshold <= 1,
                f"threshold={self.threshold} is out of range; give a number above 0, at most 1")
        require(self.ponder >= 0, f"ponder={self.ponder} is negative; give a weight of at least 0")


class UniversalGPT(train_gpt.GPT):
    """The trainer's model whose blocks run up to t_max times."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.options = options
        self.penalty = None     # mean of N + R of this pass, () float32; None outside of training
        several = options.t_max > 1

        # (t_max, model_dim) e; None: there are none
        has_embedding = several and options.step_embedding and options.style != "published"
        self.step_embedding = nn.Parameter(torch.zeros(options.t_max, config.model_dim)) if has_embedding else None
        # (model_dim,) w and (1,) b; None: no token halts
        self.halt_weight = None
        self.halt_bias = None
        if several and options.style != "off":
            self.halt_weight = nn.Parameter(torch.empty(config.model_dim))
            self.halt_weight.init_std = 0.01
            self.halt_bias = nn.Parameter(torch.full((1,), options.halt_bias))

    def step(self, x: Tensor, contexts: list[AttentionContext], number: int) -> Tensor:
        """One run of all blocks, the number-th from 0 on."""
        if self.step_embedding is not None:
            x = x + self.step_embedding[number].type_as(x)
        return super().run_blocks(x, [context_of_pass(ctx, number) for ctx in contexts])

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        if self.halt_weight is None:
            for number in range(self.options.t_max):
                x = self.step(x, contexts, number)
            return x

        weights, streams, penalty = self.halt(x, contexts)
        self.penalty = penalty.mean() if self.training else None
        return sum(weight[..., None].type_as(x) * stream for weight, stream in zip(weights, streams))

    def halt(self, x: Tensor, contexts: list[AttentionContext]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """
        (weights, streams, penalty) of the runs' streams s_1 .. s_t_max: each (B, T), each like x, (B, T); weights and
        penalty are float32 at least.
        """
        options = self.options
        total = torch.zeros_like(wide(x[..., 0]))   # h so far
        running = torch.ones_like(total)            # 1: has not halted
        penalty = torch.zeros_like(total)
        weights, streams = [], []
        for number in range(options.t_max):
            # a token that has halted keeps its stream
            x = torch.where(running[..., None] > 0, self.step(x, contexts, number), x)
            h = torch.sigmoid(wide(x) @ self.halt_weight + self.halt_bias)

            # which tokens halt here
            is_full = (total + h >= options.threshold).type_as(h)
            is_last = number == options.t_max - 1
            halting = running if is_last and options.style == "act" else running * is_full
            going_on = running - halting
            weights.append(halting * (1 - total) + going_on * h)
            streams.append(x)

            # the penalty: a step, and what is left where a token halts
            penalty = penalty + running
            if options.style == "act":
                penalty = penalty + halting * (1 - total)
            total = total + going_on * h
            running = going_on
        if options.style == "published":
            penalty = penalty + running * (1 - total)
        return weights, streams, penalty

    def auxiliary_loss(self, x: Tensor, tokens: Tensor, targets: Tensor) -> Tensor | None:
        penalty, self.penalty = self.penalty, None
        return None if penalty is None else self.options.ponder * penalty


def patch(options: Options):
    train_gpt.GPT = partial(UniversalGPT, options=options)
