"""
Depth recurrence: some layers run several times, with the same weights.

    span          0 1 2 (3 4) (3 4) 5 6 ..       the layers as one stretch, over and over
    in_place      0 1 2 3 3 4 4 5 6 ..           each layer by itself

Before its second and later passes a layer adds a learned vector to the stream (pass_embedding, zero at the start).
U-net skips join the first half of the passes with the second, mirrored. Until the part `start` of the run is done all
layers run once: a model that has learnt something gains more from depth, and the first steps are cheap.

    looped        which layers; none named: the two in the middle
    times         passes of each; 1: the baseline
    style         published: in_place, from the first step on, without vectors

Cost: times - 1 more passes of these layers; (times - 1) |looped| model_dim parameters, and one skip for two passes.

Source: Dehghani et al., Universal Transformers, 2019, arxiv.org/abs/1807.03819; delayed: parameter-golf; published:
its pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import AttentionContext, Config, require, stream_weights


@dataclass
class Options:
    looped: tuple[int, ...] = ()
    times: int = 2
    order: Literal["span", "in_place"] = "span"
    pass_embedding: bool = True
    start: float = 0.4
    style: Literal["delayed", "published"] = "delayed"

    def __post_init__(self):
        if self.style == "published":
            self.order = "in_place"
            self.pass_embedding = False
            self.start = 0.0
        require(1 <= self.times <= 64, f"times={self.times} is out of range; give 1 to 64 passes")
        require(0 <= self.start < 1, f"start={self.start} is out of range; give a part of the run, at least 0, below 1")
        require(len(set(self.looped)) == len(self.looped),
                f"looped={','.join(map(str, self.looped))} names a layer twice; name each once")


def choose_layers(config: Config, options: Options) -> list[int]:
    """The layers that run several times. RunError for one that the model lacks, and for a span with a gap."""
    prefix = "variant depth_recurrence:"
    middle = config.layers // 2
    looped = sorted(options.looped) or list(range(max(middle - 1, 0), middle + 1))
    require(looped[-1] < config.layers,
            f"{prefix} looped={','.join(map(str, looped))} goes beyond the model, which has the layers "
            f"0-{config.layers - 1}")
    require(options.order == "in_place" or looped == list(range(looped[0], looped[-1] + 1)),
            f"{prefix} looped={','.join(map(str, looped))} has a gap, which order=span cannot run; give neighbours, or "
            "order=in_place")
    return looped


def list_passes(layers: int, looped: list[int], times: int, order: str) -> list[tuple[int, int]]:
    """(layer, number of its pass from 0 on) in the order in which they run."""
    before, after = range(looped[0]), range(looped[-1] + 1, layers)
    inner = [(layer, number) for number in range(times) for layer in looped]
    if order == "in_place":
        inner = [(layer, number) for layer in range(looped[0], looped[-1] + 1)
                 for number in range(times if layer in looped else 1)]
    return [*((layer, 0) for layer in before), *inner, *((layer, 0) for layer in after)]


def context_of_pass(ctx: AttentionContext, number: int) -> AttentionContext:
    """A layer's context in its pass of this number: it keeps what it saw of earlier tokens for each pass by itself."""
    if number == 0 or ctx.mask.cache is None:
        return ctx
    return replace(ctx, mask=replace(ctx.mask, cache=ctx.mask.cache.of_pass(number)))


class RecurrentGPT(train_gpt.GPT):
    """The trainer's model with layers that run several times."""

    def __init__(self, config: Config, options: Options):
        looped = choose_layers(config, options)
        super().__init__(config)
        self.start = options.start
        self.is_looping = True          # whether layers run several times in this part of the run
        self.looped = looped
        self.once = [(layer, 0) for layer in range(config.layers)]
        self.passes = list_passes(config.layers, looped, options.times, options.order)

        # the skips' weights: one for two passes
        if self.skip_weights is not None:
            start = self.skip_weights.new_full((len(self.passes) // 2,), 1.0 if config.channel_scales else 0.2)
            self.skip_weights = stream_weights(config, start)
        # (times - 1, |looped|, model_dim); None: no vectors
        self.pass_embeddings = None
        if options.pass_embedding and options.times > 1:
            self.pass_embeddings = nn.Parameter(torch.zeros(options.times - 1, len(looped), config.model_dim))

    def stage(self, progress: float):
        return super().stage(progress), progress >= self.start

    def set_windows(self, progress: float):
        super().set_windows(progress)
        self.is_looping = progress >= self.start

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        passes = self.passes if self.is_looping else self.once
        streams, n = [], len(passes)
        for step, (layer, number) in enumerate(passes):
            if self.skip_weights is not None and step >= n - n // 2:
                x = x + self.skip_weights[n - 1 - step].type_as(x) * streams[n - 1 - step]
            if number and self.pass_embeddings is not None:
                x = x + self.pass_embeddings[number - 1, self.looped.index(layer)].type_as(x)
            x = self.blocks[layer](x, context_of_pass(contexts[layer], number))
            streams.append(x)
        return x


def patch(options: Options):
    train_gpt.GPT = partial(RecurrentGPT, options=options)
