"""
Latent attention (MLA): keys and values are made from one narrow vector a token.

    c = norm(W_d x)        k = W_k c,  v = W_v c        in place of        k = W_k x,  v = W_v x

x (B, T, model_dim), c (B, T, l), k and v (B, T, G, D); W_d (l, model_dim), W_k and W_v (G D, l). Queries, QK-norm,
value embeddings, gate and output projection are the baseline's.

    latent    l; -1: half as many parameters as W_k and W_v had; 0: the baseline
    norm      rms: c is normalised; none: W_k W_d is one matrix of rank l
    rope      after_up: positions turn k as in the baseline
              decoupled: a head's key is [W_k c; W_r x turned], W_r (D / 2, model_dim) shared by all heads; queries get
              as many channels more; QK-norm is of all of them; scores are divided by sqrt(D + D / 2)
    style     published: no norm, after_up; W_d begins as the first l right singular vectors of a random [W_k; W_v], W_k
              and W_v with standard deviation 0.02

Cost: l (model_dim + 2 G D) parameters in place of 2 model_dim G D; decoupled D (model_dim + H model_dim) / 2 more.

Source: DeepSeek-AI, DeepSeek-V2, 2024, arxiv.org/abs/2405.04434; published: parameter-golf pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from train_gpt import AttentionContext, Config, draw_normal, require
from variants.low_rank import leading_vectors

Linear = train_gpt.Linear
PUBLISHED_STD = 0.02


@dataclass
class Options:
    latent: int = -1
    norm: Literal["rms", "none"] = "rms"
    rope: Literal["after_up", "decoupled"] = "after_up"
    style: Literal["latent", "published"] = "latent"

    def __post_init__(self):
        require(self.latent >= -1, f"latent={self.latent} is out of range; give a width of at least 1, 0 for the "
                                   "baseline, or -1")
        if self.style == "published":
            self.norm = "none"
            self.rope = "after_up"


def latent_width(config: Config, options: Options) -> int:
    """l of a model. RunError for one that is wider than the stream."""
    width, kv_width = config.model_dim, config.key_heads * config.head_dim
    latent = options.latent
    if latent < 0:
        latent = max(1, round(width * kv_width / (width + 2 * kv_width)))
    require(latent <= width,
            f"variant latent_attention: latent={latent} is wider than its input, {width}; give at most that")
    return latent


class LatentAttention(train_gpt.CausalSelfAttention):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        latent = latent_width(config, options)
        super().__init__(config, layer)
        self.style = options.style
        width, kv_width = config.model_dim, config.key_heads * config.head_dim
        self.down = train_gpt.Linear(config, layer, "k", width, latent)
        self.k, self.v = (train_gpt.Linear(config, layer, role, latent, kv_width) for role in "kv")
        self.latent_norm = train_gpt.Norm(config, latent) if options.norm == "rms" else None

        # decoupled: queries with the channels that turn, and the key that all heads share; None: there is none
        self.shared = None
        self.turning = 0
        if options.rope == "decoupled":
            self.turning = config.head_dim // 2
            require(self.turning % 2 == 0, f"variant latent_attention: rope=decoupled turns half of head_dim "
                                           f"{config.head_dim}, which must be a multiple of 4; give another --head_dim")
            self.q = train_gpt.Linear(config, layer, "q", width, config.heads * (config.head_dim + self.turning))
            self.shared = train_gpt.Linear(config, layer, "k", width, self.turning)
            self.scale = config.attention_scale or (config.head_dim + self.turning) ** -0.5

    def initialize(self, name: str, seed: int):
        """Draw the published first tensors, where the matrices are the trainer's own."""
        matrices = [module for module in (self.down, self.k, self.v) if type(module) is Linear]
        if self.style != "published" or len(matrices) < 3:
            return
        shape = self.k.weight.shape[0], self.down.weight.shape[1]
        random = torch.cat([draw_normal(f"{name}.{role}.dense", shape, PUBLISHED_STD, seed) for role in "kv"])
        vectors = leading_vectors(random, min(len(self.down.weight), *random.shape))[2]
        self.down.weight.zero_()  # of a latent wider than there are vectors
        self.down.weight[:len(vectors)] = vectors
        for role, module in (("k", self.k), ("v", self.v)):
            module.weight.copy_(draw_normal(f"{name}.{role}.weight", module.weight.shape, PUBLISHED_STD, seed))

    def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        c = self.down(x)
        if self.latent_norm is not None:
            c = self.latent_norm(c)
        D = self.config.head_dim
        q = self.q(x).unflatten(-1, (self.config.heads, -1))
        k, v = (linear(c).unflatten(-1, (-1, D)) for linear in (self.k, self.v))
        v = self.mix_value(v, ctx)
        if self.shared is None:
            return *self.turn(q, k, ctx), v
        return *self.turn_decoupled(q, k, self.shared(x), ctx), v

    def turn_decoupled(self, q: Tensor, k: Tensor, shared: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D + r), k (B, T, G, D), shared (B, T, r) -> queries and keys (.., D + r) whose last r turn."""
        k = torch.cat((k, shared[:, :, None].expand(-1, -1, k.shape[2], -1)), dim=-1)
        positions = ctx.rotary
        if positions is not None:  # as many pairs as there are: of all frequencies every second one
            step = max(1, positions[0].shape[-1] // (self.turning // 2))
            positions = tuple(table[:, ::step] for table in positions)

        turned = []
        for t in (q, k):
            t = train_gpt.RMSNormalize.apply(t) if self.config.qk_norm else t
            if positions is not None:
                still, turning = t.split((t.shape[-1] - self.turning, self.turning), dim=-1)
                t = torch.cat((still, train_gpt.rotate(turning, positions)), dim=-1)
            turned.append(t)
        q, k = turned
        if self.query_gain is not None:
            q = q * self.query_gain.type_as(q)[:, None]
        return q, k

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        q, k, v = self.heads(x, ctx)
        # equal widths take the fast path on a CPU
        y = train_gpt.attend(q, k, F.pad(v, (0, self.turning)), ctx.mask, self.scale)
        return self.o(self.gate_heads(y[..., :v.shape[-1]], x))


def build(config: Config, layer: int, options: Options) -> train_gpt.CausalSelfAttention:
    """Latent attention, or the trainer's own without a latent."""
    if options.latent == 0:
        return CausalSelfAttention(config, layer)
    return LatentAttention(config, layer, options)


CausalSelfAttention = train_gpt.CausalSelfAttention


def patch(options: Options):
    train_gpt.CausalSelfAttention = partial(build, options=options)
