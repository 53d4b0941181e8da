"""
Hopfield head: before the head a token's state goes some steps towards the patterns that it is like.

    retrieval     h <- (1 - g) h + g P' softmax(beta P W h)         `steps` times, h (model_dim,): the normalised stream
    published     h <- h - alpha W2 gelu(W1 [h; c]), 3 times from h = c, c without gradient; score s (e_v.W h - |e_v|^2)

P (n, model_dim) are the rows of the head, or `patterns` learned ones; W (model_dim, model_dim) begins as the identity,
beta and g are learned. With W = 1 a step lowers E(h) = -log(sum_i exp(beta P_i.h)) / beta + |h|^2 / 2, for every g in
(0, 1]. published is a bilinear head and no such energy: W1 (2 model_dim, 2 model_dim), W2 (model_dim, 2 model_dim),
zero at the start, W begins as an orthogonal matrix, s and alpha are learned, e_v are the head's rows, and the
feed-forwards have GELU.

    steps         0: the baseline
    gate, beta    where g and beta begin; beta 0: 1 / sqrt(model_dim)
    alpha         where alpha begins

Cost: model_dim^2 + 2 parameters, with patterns n model_dim more; `steps` times 2 n model_dim multiply-adds a token, in
one attention over the patterns, whose scores are never stored.

Source: Ramsauer et al., Hopfield Networks is All You Need, 2020, arxiv.org/abs/2008.02217; published: parameter-golf
pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, draw_normal, require

LanguageModelHead = train_gpt.LanguageModelHead
PUBLISHED_STEPS = 3


@dataclass
class Options:
    steps: int = 1
    gate: float = 0.1
    beta: float = 0.0
    patterns: int = 0       # how many learned ones; 0: the head's rows
    alpha: float = 0.1
    style: Literal["retrieval", "published"] = "retrieval"

    def __post_init__(self):
        require(0 <= self.steps <= 64, f"steps={self.steps} is out of range; give 1 to 64, or 0 for the baseline")
        require(0 <= self.gate <= 1, f"gate={self.gate} is out of range; give a number from 0 to 1")
        require(self.beta >= 0 and 0 <= self.patterns <= 2 ** 20,
                f"beta={self.beta},patterns={self.patterns} are out of range; give numbers of at least 0")


def retrieve(h: Tensor, patterns: Tensor, mix: Tensor | None, beta: Tensor, gate: Tensor) -> Tensor:
    """One step of h (N, D) towards patterns (n, D); mix: W (D, D), None: the identity; beta, gate: () or (1,)."""
    query = h if mix is None else h @ mix.type_as(h).T
    keys = patterns.type_as(h)[None, None]
    y = F.scaled_dot_product_attention((beta.type_as(h) * query)[None, None], keys, keys, scale=1.0)[0, 0]
    return torch.lerp(h, y, gate.type_as(h))


class RetrievalHead(LanguageModelHead):
    """The trainer's head after some steps of retrieval."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        width = config.model_dim
        self.steps = options.steps
        self.mix = nn.Parameter(torch.eye(width))   # W
        self.mix.optimizer = "muon"
        self.beta = nn.Parameter(torch.full((1,), options.beta or width ** -0.5))
        self.gate = nn.Parameter(torch.full((1,), options.gate))

        # (n, model_dim); None: the head's rows
        self.patterns = None
        if options.patterns:
            self.patterns = nn.Parameter(torch.empty(options.patterns, width))
            self.patterns.init_std = width ** -0.5
            self.patterns.optimizer = "adam_embed"

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.projection.weight
        patterns = weight[:self.vocab_size] if self.patterns is None else self.patterns
        h = x.flatten(0, -2)
        for _ in range(self.steps):
            h = retrieve(h, patterns, self.mix, self.beta, self.gate)
        return h.view(x.shape), weight


class AttractorHead(LanguageModelHead):
    """The published head."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        width = config.model_dim
        self.first = nn.Parameter(torch.empty(2 * width, 2 * width))    # W1
        self.first.init_std = 0.5 * (2 * width) ** -0.5
        self.second = nn.Parameter(torch.empty(width, 2 * width))       # W2
        self.second.init_std = 0.0
        self.mix = nn.Parameter(torch.empty(width, width))              # W
        for matrix in (self.first, self.second, self.mix):
            matrix.optimizer = "muon"
        self.scale = nn.Parameter(torch.ones(1))                        # s
        self.alpha = nn.Parameter(torch.full((1,), options.alpha))

    def initialize(self, name: str, seed: int):
        """Begin with an orthogonal W."""
        self.mix.copy_(torch.linalg.qr(draw_normal(f"{name}.mix", self.mix.shape, 1.0, seed))[0])

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, c = x, x.detach()
        for _ in range(PUBLISHED_STEPS):
            inner = F.gelu(torch.cat((h, c), dim=-1) @ self.first.type_as(x).T)
            h = h - self.alpha.type_as(x) * (inner @ self.second.type_as(x).T)
        # s (e.W h - |e|^2) as one product
        weight = self.projection.weight
        weight = torch.cat((weight, weight.square().sum(-1, keepdim=True)), dim=1)
        return self.scale.type_as(x) * F.pad(h @ self.mix.type_as(x).T, (0, 1), value=-1.0), weight


class GELUFeedForward(train_gpt.MLP):
    """The trainer's feed-forward with GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


def build(config: Config, options: Options) -> LanguageModelHead:
    """A head with retrieval, or the trainer's own without a step."""
    if options.style == "published":
        return AttractorHead(config, options)
    return RetrievalHead(config, options) if options.steps else LanguageModelHead(config)


def patch(options: Options):
    train_gpt.LanguageModelHead = partial(build, options=options)
    if options.style == "published":
        train_gpt.MLP = GELUFeedForward
