"""
Forgetting attention: softmax attention whose scores lose weight with age, by a forget gate that reads the data.

    s_ij = scale q_i.k_j + F_i - F_j        F_i = sum over t <= i of log f_t        f_t = sigmoid(w.x_t + d)

for each head. x (B, T, model_dim) is the layer's input, f and F (B, T, H) are float32; everything else is the
baseline's attention, positions included. w begins at zero and d so that f is e^-slope with the slopes 2^(-8 h / H),
h = 1 .. H. The options:

    decay        data: as above; per_head leaves w out, so that the slopes are learned and the same for all tokens
    short_conv   taps of a causal convolution of each channel on the attention's input, starting as the identity

It is the control for every attention that has a decay: gate and convolution are those of topological_attention, with
the same names and initial tensors.

Cost: H model_dim + H parameters a layer, and with the convolution of n taps n model_dim. FlexAttention adds the two
sums to a score in float32. Elsewhere the same scores come out of one product without a mask of their own: as a softmax
ignores what all keys of a query share, F_i is left out, q gets channels of ones and k the channels of -F_j, three of
them in bfloat16, which together hold a float32 number.

Source: Lin, Nikishin, He & Courville, Forgetting Transformer, 2025, arxiv.org/abs/2503.02130; slopes: Press et al.,
ALiBi, 2021, arxiv.org/abs/2108.12409; convolution: Fu et al., H3, 2022, arxiv.org/abs/2212.14052
Status: too few pairs in 2026-11-22_TopologicalAttentionOptions; better in 2026-11-30_EnglishRowsOf1024AtEqualTime
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.backend import wide
from kernels.short_convolution import short_convolution
from train_gpt import AttentionContext, AttentionMask, Config


@dataclass
class Options:
    decay: Literal["data", "per_head"] = "data"
    short_conv: Literal[0, 3, 4] = 0


def split_number(x: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Return x (...), float32, as terms (..., n) of dtype whose sum is x: one, or three where dtype has fewer bits. The
    gradient is that of the first term.
    """
    terms = []
    for _ in range(1 if dtype.itemsize >= x.dtype.itemsize else 3):
        terms.append(x.to(dtype))
        x = x - terms[-1]
    return torch.stack(terms, dim=-1)


def attend_and_forget(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """
    Return the attention (B, T, H, D) of q (B, T, H, D), k and v (B, T, G, D) with sums_i - sums_j (B, T, H) added to
    the scores.
    """
    if mask.block_mask is not None:
        return attend_with_flex(q, k, v, sums, mask, scale)

    # heads that share a key differ in the sums
    if q.shape[2] != k.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))

    # the sums as channels of the product; v gets as many zeros, as equal widths take the fast path on a CPU
    k_extra = split_number(-sums, k.dtype)
    q_extra = torch.ones_like(k_extra)
    n = k_extra.shape[-1]
    q = torch.cat((q * scale, q_extra), dim=-1)
    k = torch.cat((k, k_extra), dim=-1)
    return train_gpt.attend(q, k, F.pad(v, (0, n)), mask, 1.0)[..., :-n]


def attend_with_flex(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Return what attend_and_forget() does, by FlexAttention with the mask's blocks."""
    from torch.nn.attention.flex_attention import flex_attention
    keys = sums.transpose(1, 2).contiguous()
    queries = keys.detach()  # its gradient is zero: all keys of a query share it

    def add_decay(score, b, h, i, j):
        return score + (queries[b, h, i] - keys[b, h, j])

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = flex_attention(q, k, v, score_mod=add_decay, block_mask=mask.block_mask, scale=scale,
                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class ForgettingAttention(train_gpt.CausalSelfAttention):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        # the gate's bias d, (H,)
        slopes = [2 ** (-8 * (head + 1) / config.heads) for head in range(config.heads)]
        self.forget_bias = nn.Parameter(torch.tensor([-math.log(math.expm1(slope)) for slope in slopes]))

        # the gate's w, (H, model_dim); None: slopes alone
        self.forget = None
        if options.decay == "data":
            self.forget = train_gpt.Linear(config, layer, "gate", config.model_dim, config.heads)

        # the convolution's (taps, model_dim); None: no convolution
        self.taps = None
        if options.short_conv:
            self.taps = nn.Parameter(F.pad(torch.ones(1, config.model_dim), (0, 0, options.short_conv - 1, 0)))
            self.taps.optimizer = "adam"

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        cache = ctx.mask.cache
        if self.taps is not None:
            earlier = None if cache is None else cache.with_earlier(x, len(self.taps) - 1)
            x = short_convolution(x, self.taps.type_as(x), ctx.mask.positions, earlier)

        # F, in float32
        x_wide = wide(x)
        logits = self.forget_bias if self.forget is None else self.forget(x_wide) + self.forget_bias
        log_decay = F.logsigmoid(logits).expand(*x.shape[:2], self.config.heads)
        sums = log_decay.cumsum(1) if cache is None else cache.running_sum(log_decay)

        q, k, v = self.heads(x, ctx)
        y = attend_and_forget(q, k, v, sums, ctx.mask, self.scale)
        return self.o(self.gate_heads(y, x))


def patch(options: Options):
    train_gpt.CausalSelfAttention = partial(ForgettingAttention, options=options)
