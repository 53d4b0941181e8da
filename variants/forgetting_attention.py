"""
Forgetting attention: softmax attention whose scores lose weight with age, by a forget gate that reads the data.

    s_ij = scale q_i.k_j + F_i - F_j        F_i = sum over t <= i of log f_t        f_t = sigmoid(w.x_t + d), for each head

x (B, T, model_dim) is the layer's input, f and F (B, T, H) are float32; everything else is the baseline's attention, positions included. w begins at
zero and d so that f is e^-slope with the slopes 2^(-8 h / H), h = 1 .. H. decay=per_head leaves w out: learned slopes. short_conv: taps of a causal
convolution of each channel on the attention's input, starting as the identity. It is the control for every attention that has a decay: gate and
convolution are those of topological_attention, with the same names and initial tensors.

Cost: H model_dim + H parameters a layer, and with the convolution of n taps n model_dim. FlexAttention adds the two sums to a score in float32. Elsewhere
the same scores come out of one product without a mask of their own: as a softmax ignores what all keys of a query share, F_i is left out, q gets channels of
ones and k the channels of -F_j, three of them in bfloat16, which together hold a float32 number.

Source: Lin, Nikishin, He & Courville, Forgetting Transformer, 2025, arxiv.org/abs/2503.02130; slopes: Press et al., ALiBi, 2021, arxiv.org/abs/2108.12409;
convolution: Fu et al., H3, 2022, arxiv.org/abs/2212.14052
Status: 1M bytes, 3 seeds: not distinguishable on track cpu, +0.038, one seed 0.08 above the others; English rows of 1,024 without windows: better, -0.139; variants/README.md
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.short_convolution import short_convolution
from train_gpt import AttentionContext, Config

@dataclass
class Options:
    decay: Literal["data", "per_head"] = "data"
    short_conv: Literal[0, 3, 4] = 0

def parts_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (...) float32 as (..., n) of dtype whose sum is x: 1, or 3 where dtype has fewer bits. The gradient is that of the first."""
    parts = []
    for _ in range(1 if dtype.itemsize >= x.dtype.itemsize else 3):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return torch.stack(parts, dim=-1)

def attend_and_forget(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, ctx: AttentionContext, scale: float) -> Tensor:
    """Softmax attention of q, k, v (B, T, H, D) with sums_i - sums_j (B, T, H) added to the scores; returns (B, T, H, D)."""
    if ctx.block_mask is None:
        k_extra = parts_of(-sums, k.dtype)
        q_extra, n = torch.ones_like(k_extra), k_extra.shape[-1]
        q, k, v = torch.cat((q * scale, q_extra), dim=-1), torch.cat((k, k_extra), dim=-1), F.pad(v, (0, n))  # equal widths: the fast path on a CPU
        return train_gpt.attend(q, k, v, ctx, 1.0)[..., :-n]
    from torch.nn.attention.flex_attention import flex_attention
    keys = sums.transpose(1, 2).contiguous()
    queries = keys.detach()  # its gradient is zero: all keys of a query share it
    score_mod = lambda score, b, h, i, j: score + (queries[b, h, i] - keys[b, h, j])
    return flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), score_mod=score_mod, block_mask=ctx.block_mask, scale=scale).transpose(1, 2)

class ForgettingAttention(train_gpt.CausalSelfAttention):
    """forward(x (B, T, model_dim), ctx) -> same shape."""
    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        slopes = [2 ** (-8 * (head + 1) / config.heads) for head in range(config.heads)]
        self.forget_bias = nn.Parameter(torch.tensor([-math.log(math.expm1(slope)) for slope in slopes]))
        self.forget = train_gpt.Linear(config, layer, "gate", config.model_dim, config.heads) if options.decay == "data" else None
        self.taps = None
        if options.short_conv:
            self.taps = nn.Parameter(F.pad(torch.ones(1, config.model_dim), (0, 0, options.short_conv - 1, 0)))
            self.taps.optimizer = "adam"

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        if self.taps is not None:
            x = short_convolution(x, self.taps.type_as(x), ctx.positions, None if ctx.cache is None else ctx.cache.with_earlier(x, len(self.taps) - 1))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        logits = self.forget_bias if self.forget is None else self.forget(wide) + self.forget_bias
        log_decay = F.logsigmoid(logits).expand(*x.shape[:2], self.config.heads)
        sums = log_decay.cumsum(1) if ctx.cache is None else ctx.cache.running_sum(log_decay)
        return self.o(self.gate_heads(attend_and_forget(*self.heads(x, ctx), sums, ctx, self.scale), x))

def patch(options: Options):
    train_gpt.CausalSelfAttention = partial(ForgettingAttention, options=options)
