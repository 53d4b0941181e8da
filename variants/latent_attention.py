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

Text is generated from what a layer keeps of a token. decoupled: c, the turned key that heads share, and with QK-norm
the factor 1 / rms of each head's key, l + D / 2 + G numbers: W_k is multiplied into the query and W_v into the result.
after_up keeps keys and values, 2 G D numbers, because positions stand between W_k and the query; to make them again
from c would cost 2 l G D multiply-adds for each earlier token. So do layers with value embeddings, or with matrices of
another variant.

Cost: l (model_dim + 2 G D) parameters in place of 2 model_dim G D; decoupled D (model_dim + H model_dim) / 2 more.

Source: DeepSeek-AI, DeepSeek-V2, 2024, arxiv.org/abs/2405.04434; published: parameter-golf pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from kernels.backend import wide
from train_gpt import AttentionContext, AttentionMask, Config, draw_normal, require
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

    def latent(self, x: Tensor) -> Tensor:
        """c of x, (B, T, l)."""
        c = self.down(x)
        return c if self.latent_norm is None else self.latent_norm(c)

    def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        c, D = self.latent(x), self.config.head_dim
        q = self.q(x).unflatten(-1, (self.config.heads, -1))
        k, v = (linear(c).unflatten(-1, (-1, D)) for linear in (self.k, self.v))
        v = self.mix_value(v, ctx)
        if self.shared is None:
            return *self.turn(q, k, ctx), v
        return *self.turn_decoupled(q, k, self.shared(x), ctx), v

    def join_keys(self, k: Tensor, shared: Tensor) -> Tensor:
        """k (B, T, G, D) and shared (B, T, r) -> keys (B, T, G, D + r)."""
        return torch.cat((k, shared[:, :, None].expand(-1, -1, k.shape[2], -1)), dim=-1)

    def turn_last(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x (B, T, .., n) with its last r channels turned."""
        positions = ctx.rotary
        if positions is None:
            return x
        # as many pairs as there are: of all frequencies every second one
        step = max(1, positions[0].shape[-1] // (self.turning // 2))
        still, turning = x.split((x.shape[-1] - self.turning, self.turning), dim=-1)
        turned = train_gpt.rotate(turning, tuple(table[:, ::step] for table in positions))
        return torch.cat((still, turned), dim=-1)

    def turn_decoupled(self, q: Tensor, k: Tensor, shared: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        """q (B, T, H, D + r), k (B, T, G, D), shared (B, T, r) -> queries and keys (.., D + r) whose last r turn."""
        k = self.join_keys(k, shared)
        if self.config.qk_norm:
            q, k = train_gpt.RMSNormalize.apply(q), train_gpt.RMSNormalize.apply(k)
        q, k = self.turn_last(q, ctx), self.turn_last(k, ctx)
        if self.query_gain is not None:
            q = q * self.query_gain.type_as(q)[:, None]
        return q, k

    def keeps_latents(self, ctx: AttentionContext) -> bool:
        """Whether this is a text that is continued, and the layer can go on from latents alone."""
        matrices = type(self.k) is type(self.v) is Linear
        return ctx.mask.cache is not None and self.shared is not None and self.value_mix is None and matrices

    def attend_latents(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Attention of the new tokens' inputs x (B, t, model_dim) over the latents of all so far -> (B, t, H, D)."""
        # the new tokens as in training
        cache, D = ctx.mask.cache, self.config.head_dim
        c = self.latent(x)
        q, k, v = self.heads(x, ctx)

        # what is kept of them: c and the shared key, and 1 / rms of each head's key
        shared = self.shared(x)
        new = dict(latents=torch.cat((c, self.turn_last(shared[:, :, None], ctx)[:, :, 0]), dim=-1)[:, None])
        if self.config.qk_norm:
            keys = self.join_keys(self.k(c).unflatten(-1, (-1, D)), shared)
            new["factors"] = (wide(keys).square().mean(-1) + 1e-6).rsqrt().transpose(1, 2)
        latents, *factors = cache.keep(ctx.mask, **new)
        if cache.is_whole(ctx.mask, x.shape[1]):
            return self.attend_heads(q, k, v, replace(ctx.mask, cache=None))

        # scores of queries that W_k was multiplied into, (B, G, H / G, t, n)
        up_k, up_v = (linear.weight.type_as(x).unflatten(0, (-1, D)) for linear in (self.k, self.v))
        q = q.unflatten(2, (len(up_k), -1))
        q = torch.cat((torch.einsum("btghd,gdl->btghl", q[..., :D], up_k), q[..., D:]), dim=-1)
        scores = self.scale * torch.einsum("btghl,bnl->bghtn", wide(q), wide(latents[:, 0]))
        if factors:
            scores = scores * factors[0][:, :, None, None]
        seen = cache.seen(ctx.mask, x.shape[1], latents)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -torch.inf)

        # the mean latents, and W_v of them
        y = torch.einsum("bghtn,bnl->btghl", scores.softmax(-1).type_as(x), latents[:, 0, :, :c.shape[-1]])
        return torch.einsum("btghl,gdl->btghd", y, up_v).flatten(2, 3)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Attention of queries and keys (.., D + r) over values (.., D) -> (B, T, H, D)."""
        # equal widths take the fast path on a CPU
        return train_gpt.attend(q, k, F.pad(v, (0, self.turning)), mask, self.scale)[..., :v.shape[-1]]

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        if self.keeps_latents(ctx):
            y = self.attend_latents(x, ctx)
        else:
            y = self.attend_heads(*self.heads(x, ctx), ctx.mask)
        return self.o(self.gate_heads(y, x))


def build(config: Config, layer: int, options: Options) -> train_gpt.CausalSelfAttention:
    """Latent attention, or the trainer's own without a latent."""
    if options.latent == 0:
        return CausalSelfAttention(config, layer)
    return LatentAttention(config, layer, options)


CausalSelfAttention = train_gpt.CausalSelfAttention


def patch(options: Options):
    train_gpt.CausalSelfAttention = partial(build, options=options)
