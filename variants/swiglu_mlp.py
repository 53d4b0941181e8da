"""
Gated feed-forward (SwiGLU): one product of the input gates another.

y = W_proj (act(W_gate x) * W_fc x), no biases; x and y (B, T, model_dim), W_gate and W_fc (hidden, model_dim), W_proj (model_dim, hidden).
act is SiLU, GELU (GEGLU) or squared ReLU. Replaces y = W_proj relu(W_fc x)^2.

Cost: three matrices in place of two. With hidden = 2/3 mlp_hidden, rounded to a multiple of 8, parameters and FLOPs are the same to that
rounding.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arxiv.org/abs/2002.05202
Status: cpu track, 6 seeds: not distinguishable, -0.009 nats (sd of a run 0.010), time +6 % (p = 0.48); records/negative/2026-11-22_SwigluAndParallelResidual
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt

@dataclass
class Options:
    hidden: int = 0  # hidden width; 0: as many parameters as the feed-forward it replaces
    activation: Literal["silu", "gelu", "relu2"] = "silu"

    def __post_init__(self):
        if self.hidden < 0:
            raise ValueError(f"hidden={self.hidden} is negative; give a width, or 0 for as many parameters as the feed-forward it replaces")

ACTIVATIONS = dict(silu=F.silu, gelu=F.gelu, relu2=lambda x: F.relu(x).square())

class GatedMLP(nn.Module):
    """forward(x (B, T, model_dim)) -> same shape."""
    def __init__(self, config: train_gpt.Config, layer: int, options: Options):
        super().__init__()
        hidden = options.hidden or max(8, 8 * round(config.mlp_hidden / 12))
        self.gate, self.fc = (train_gpt.Linear(config, layer, "fc", config.model_dim, hidden) for _ in range(2))
        self.proj = train_gpt.Linear(config, layer, "proj", hidden, config.model_dim)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.gate(x)) * self.fc(x))

def patch(options: Options):
    train_gpt.MLP = partial(GatedMLP, options=options)
