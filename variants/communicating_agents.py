"""
Communicating agents: one half of the model tells the other what it has read in a message of few numbers.

    bottleneck    m = W_m norm(x),   x <- W_u pool(m)          between the layers at_layer - 1 and at_layer
    published     m = W_m pool(norm(x)) after all blocks; logits = head(gelu(W_2 gelu(W_1 [m; e_{t-7} .. e_t])))

x (B, T, model_dim), m (B, T, message). The upper half of bottleneck has the message, and of the token itself the
embedding (x0); U-net skips that would go around the message are left out. In published the second agent has embeddings
e of its own for the last `ctx` tokens, zeros where the document has fewer, and learns at one of `stride` positions
only; its hidden width is mlp_hidden, the head is its own, feed-forwards have GELU. The one that was published counted
only later positions but divided by all bytes; here all targets are scored.

    message       -1: a quarter of model_dim; 0: the baseline
    at_layer      -1: the middle
    pool          none: a token's own message; mean: of all tokens of the document so far
    ctx, stride   of published

Cost: 2 message model_dim parameters, and multiply-adds a token.

Source: parameter-golf pull request 1589; bottleneck: ours
Status: unmeasured
Declared: style=published fails test_trains
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from train_gpt import AttentionContext, AttentionMask, Config, require, stream_weights
from variants.hopfield import GELUFeedForward

GPT = train_gpt.GPT


@dataclass
class Options:
    message: int = -1
    at_layer: int = -1
    pool: Literal["none", "mean"] = "none"
    ctx: int = 8
    stride: int = 64
    style: Literal["bottleneck", "published"] = "bottleneck"

    def __post_init__(self):
        require(self.message >= -1 and self.at_layer >= -1,
                f"message={self.message},at_layer={self.at_layer} are out of range; give numbers of at least 0, or -1")
        require(1 <= self.ctx <= 1024 and 1 <= self.stride <= 2 ** 20,
                f"ctx={self.ctx},stride={self.stride} are out of range; give at least one token")

    def width(self, config: Config) -> int:
        """Numbers of a message. RunError for one that is wider than the stream."""
        width = max(1, config.model_dim // 4) if self.message < 0 else self.message
        require(width <= config.model_dim, f"variant communicating_agents: message={width} is wider than the stream, "
                                           f"{config.model_dim}; give at most that")
        return width


def mean_so_far(x: Tensor, mask: AttentionMask) -> Tensor:
    """The mean of x (B, T, C) over the tokens of a document up to each one."""
    if mask.cache is not None:
        raise TypeError("a mean over a document is not kept")  # which a decoder takes for a model without a cache
    total = F.pad(x.double().cumsum(1), (0, 0, 1, 0))  # in float64: what other documents had cancels
    start = mask.doc_start.long()[..., None].expand(-1, -1, x.shape[-1])
    return ((total[:, 1:] - total.gather(1, start)) / (mask.positions[..., None] + 1)).type_as(x)


# ---- A bottleneck in the model ----------------------------------------------


class BottleneckGPT(GPT):
    """The trainer's model with a message between its lower and its upper layers."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.pool = options.pool
        self.at_layer = config.layers // 2 if options.at_layer < 0 else options.at_layer
        require(0 < self.at_layer < config.layers,
                f"variant communicating_agents: at_layer={self.at_layer} has no layers on one side; give 1 to "
                f"{config.layers - 1}, with --layers 2 or more")
        width = options.width(config)
        self.message_norm = train_gpt.Norm(config, config.model_dim)
        self.speak = train_gpt.Linear(config, None, "fc", config.model_dim, width)
        self.listen = train_gpt.Linear(config, None, "fc", width, config.model_dim)

        # skips between layers of one side
        first = min(self.at_layer, config.layers - self.at_layer)
        self.skips = range(first, config.layers // 2)
        if self.skip_weights is not None:
            start = torch.full((len(self.skips),), 1.0 if config.channel_scales else 0.2)
            self.skip_weights = stream_weights(config, start) if self.skips else None

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        streams, n = [], len(self.blocks)
        for layer, (block, ctx) in enumerate(zip(self.blocks, contexts)):
            if layer == self.at_layer:
                message = self.speak(self.message_norm(x))
                x = self.listen(mean_so_far(message, ctx.mask) if self.pool == "mean" else message)
            mirrored = n - 1 - layer
            if self.skip_weights is not None and layer >= n - n // 2 and mirrored in self.skips:
                x = x + self.skip_weights[mirrored - self.skips[0]].type_as(x) * streams[mirrored]
            x = block(x, ctx)
            streams.append(x)
        return x


# ---- Two agents -------------------------------------------------------------


class TwoAgents(GPT):
    """The published pair: one reads everything, the other has its message and the last tokens."""

    def __init__(self, config: Config, options: Options):
        super().__init__(replace(config, tied_embedding=False))
        self.config = config
        self.options = options
        width, hidden = config.model_dim, config.mlp_hidden
        message = options.width(config)
        self.speak = train_gpt.Linear(config, None, "fc", width, message)
        self.letters = train_gpt.embedding(config.padded_vocabulary, width, 1.0)
        self.first = train_gpt.Linear(config, None, "fc", message + options.ctx * width, hidden)
        self.second = train_gpt.Linear(config, None, "fc", hidden, hidden)
        self.head = train_gpt.LanguageModelHead(replace(config, model_dim=hidden))

    def last_tokens(self, tokens: Tensor, mask: AttentionMask) -> Tensor:
        """(B, T, ctx model_dim): the second agent's embeddings of the last tokens of the document, the oldest first."""
        letters, T = self.letters(tokens), tokens.shape[1]
        shifted = []
        for distance in reversed(range(self.options.ctx)):
            earlier = F.pad(letters, (0, 0, distance, 0))[:, :T]
            shifted.append(torch.where(mask.positions[..., None] >= distance, earlier, 0.0))
        return torch.cat(shifted, dim=-1).to(self.dtype)

    def predict(self, tokens: Tensor, masks: list[AttentionMask], targets: Tensor | None) -> Tensor:
        # the message, and the second agent's answer
        x = self.final_norm(self.run_blocks(*self.embed(tokens, masks)))
        message = self.speak(mean_so_far(x, masks[0]))
        y = F.gelu(self.first(torch.cat((message, self.last_tokens(tokens, masks[0])), dim=-1)))
        y = F.gelu(self.second(y))

        # in training at some positions only
        if self.training and targets is not None:
            stride = min(self.options.stride, tokens.shape[1])
            y, targets = y[:, stride - 1::stride], targets[:, stride - 1::stride]
        return self.head(y, targets)


def build(config: Config, options: Options) -> GPT:
    """The model with messages, or the trainer's own without."""
    if options.style == "published":
        return TwoAgents(config, options)
    return BottleneckGPT(config, options) if options.message else GPT(config)


def patch(options: Options):
    train_gpt.GPT = partial(build, options=options)
    if options.style == "published":
        train_gpt.MLP = GELUFeedForward
