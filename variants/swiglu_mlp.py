"""
Gated feed-forward (SwiGLU): one product of the input gates another.

    y = W_proj (act(W_gate x) * W_fc x)        in place of        y = W_proj relu(W_fc x)^2

x and y are (B, T, model_dim), W_gate and W_fc are (hidden, model_dim), W_proj is (model_dim, hidden). There are no
biases. act is SiLU, GELU (the layer is then called GEGLU) or the squared ReLU.

Cost: three matrices in place of two. With hidden = 2/3 mlp_hidden, rounded to a multiple of 8, parameters and FLOPs are
those of the feed-forward that it replaces, to that rounding.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arxiv.org/abs/2002.05202
Status: undecided in 2026-11-22_SwigluAndParallelResidual
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, require


@dataclass
class Options:
    hidden: int = 0  # hidden width; 0: as many parameters as the feed-forward it replaces
    activation: Literal["silu", "gelu", "relu2"] = "silu"

    def __post_init__(self):
        require(self.hidden >= 0, f"hidden={self.hidden} is negative; give a width, or 0 for as many parameters as the "
                                  "feed-forward it replaces")


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS = dict(silu=F.silu, gelu=F.gelu, relu2=squared_relu)


class GatedMLP(nn.Module):
    """forward(x (B, T, model_dim)) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__()
        width, hidden = config.model_dim, options.hidden or max(8, 8 * round(config.mlp_hidden / 12))
        self.gate = train_gpt.Linear(config, layer, "fc", width, hidden)
        self.fc = train_gpt.Linear(config, layer, "fc", width, hidden)
        self.proj = train_gpt.Linear(config, layer, "proj", hidden, width)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.gate(x)) * self.fc(x))


def patch(options: Options):
    train_gpt.MLP = partial(GatedMLP, options=options)
