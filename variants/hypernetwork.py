"""
Hypernetwork: a small network writes all matrices of the blocks, one chunk at a time, from learned embeddings.

    chunked      chunk = W_2 tanh(W_1 z + b_1) + b_2, (c, c), times a gain of its matrix          z (z_dim,) a chunk
    published    W = A B of rank `rank`; A and B come from z (z_dim,) of the layer by two layers of GELU, W_1 and W_2,
                 and a linear head for each kind of matrix, which has more numbers than all that it writes

c is `chunk`, or the smallest side of a matrix; what a chunk has beyond its matrix is cut off. Gains begin so that a
matrix has the standard deviation of the baseline's first tensor: zero where that is zero. Matrices are written once an
optimizer step, and the gradient goes back once.

    hidden       width of the network; 0: the baseline
    refresh      micro: anew in every micro batch, as was published; step: once a step
    lr           Adam's learning rate of the network; gains and embeddings have it, too

Cost: z_dim numbers a chunk, (z_dim + 1) hidden + (hidden + 1) c^2 of the network, in place of c^2 a chunk.

Source: Ha, Dai & Le, HyperNetworks, 2017, arxiv.org/abs/1609.09106; published: parameter-golf pull request 1589
Status: unmeasured
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, WeightSource, require

TANH_SQUARE = 0.394     # mean of tanh(x)^2 for normal x
PUBLISHED_STD = 1e-3    # of the first A and B


@dataclass
class Options:
    chunk: int = 64
    z_dim: int = 64
    hidden: int = 256
    rank: int = 32
    refresh: Literal["step", "micro"] = "step"
    lr: float = 1e-3
    style: Literal["chunked", "published"] = "chunked"

    def __post_init__(self):
        require(1 <= self.chunk <= 4096 and 1 <= self.z_dim <= 65_536 and 0 <= self.hidden <= 65_536,
                f"chunk={self.chunk},z_dim={self.z_dim},hidden={self.hidden} are out of range; give positive numbers, "
                "or hidden=0 for the baseline")
        require(self.rank >= 1, f"rank={self.rank} is not positive; give at least 1")
        require(self.lr > 0, f"lr={self.lr} is not positive; give a learning rate above 0")


def kind_of(name: str) -> tuple[int, str]:
    """(layer, what is called the same in every layer) of a parameter's name; layer -1 outside of blocks."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def set_rate(module: nn.Module, lr: float, config: Config):
    """Give all parameters of a source to Adam, at a learning rate."""
    for p in module.parameters():
        p.optimizer = "adam"
        p.lr_mul = lr / max(config.lr_scalar, 1e-12)


def draw(p: nn.Parameter, std: float) -> nn.Parameter:
    """The parameter, to be drawn with a standard deviation, 0: to begin at zero."""
    p.init_std = std
    return p


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    """A linear layer with weights of a standard deviation and biases of zero."""
    layer = nn.Linear(n_in, n_out)
    draw(layer.weight, std)
    draw(layer.bias, 0.0)
    return layer


def gains(starts) -> nn.ParameterList:
    """A learned number for each of these, which it begins at."""
    return nn.ParameterList(nn.Parameter(torch.tensor(float(start))) for start in starts)


class OncePerStep(WeightSource):
    """A source that can run in every pass instead of once a step."""

    def __init__(self, model: nn.Module, refresh: str):
        super().__init__(model, train_gpt.matrices_of(model))
        self.refresh = refresh

    def hold(self):
        if self.refresh == "step" or not torch.is_grad_enabled():
            super().hold()

    def release(self):
        if self.held is not None:
            super().release()


class ChunkSource(OncePerStep):
    """All matrices of the blocks from one network and an embedding a chunk."""

    def __init__(self, model: nn.Module, config: Config, options: Options):
        super().__init__(model, options.refresh)
        self.chunk = min(options.chunk, *(min(shape) for shape in self.shapes.values()))
        # rows and columns of chunks of each matrix
        self.grids = {name: [-(-side // self.chunk) for side in shape] for name, shape in self.shapes.items()}
        self.counts = [rows * columns for rows, columns in self.grids.values()]

        # z; the network, whose outputs have variance 1; the gains, which begin at the baseline's deviations
        self.embeddings = draw(nn.Parameter(torch.empty(sum(self.counts), options.z_dim)), 1.0)
        self.inner = linear(options.z_dim, options.hidden, options.z_dim ** -0.5)
        self.outer = linear(options.hidden, self.chunk ** 2, (options.hidden * TANH_SQUARE) ** -0.5)
        self.gains = gains(self.stds.values())
        set_rate(self, options.lr, config)

    def forward(self) -> dict[str, Tensor]:
        """{name: its matrix}."""
        chunks = self.outer(torch.tanh(self.inner(self.embeddings))).unflatten(-1, (self.chunk, self.chunk))
        weights = {}
        for (name, (rows, columns)), gain, some in zip(self.grids.items(), self.gains, chunks.split(self.counts)):
            # (rows, columns, c, c) side by side
            matrix = some.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
            n_out, n_in = self.shapes[name]
            weights[name] = gain * matrix[:n_out, :n_in]
        return weights


class LowRankSource(OncePerStep):
    """All matrices of the blocks as products of two thin ones, from an embedding a layer."""

    def __init__(self, model: nn.Module, config: Config, options: Options):
        super().__init__(model, options.refresh)
        self.rank = options.rank
        kinds = {kind_of(name)[1]: shape for name, shape in self.shapes.items()}
        layers = sorted({kind_of(name)[0] for name in self.shapes})
        self.rows = {layer: row for row, layer in enumerate(layers)}            # layer -> its embedding
        self.numbers = {kind: number for number, kind in enumerate(kinds)}      # kind -> its head

        hidden = options.hidden
        self.embeddings = draw(nn.Parameter(torch.empty(len(layers), options.z_dim)), 1.0)
        self.inner = linear(options.z_dim, hidden, options.z_dim ** -0.5)
        self.outer = linear(hidden, hidden, hidden ** -0.5)
        std = PUBLISHED_STD * hidden ** -0.5
        self.heads = nn.ModuleList(linear(hidden, self.rank * sum(shape), std) for shape in kinds.values())
        for head in self.heads:
            draw(head.bias, PUBLISHED_STD)
        set_rate(self, options.lr, config)

    def forward(self) -> dict[str, Tensor]:
        """{name: its matrix}."""
        states = F.gelu(self.outer(F.gelu(self.inner(self.embeddings))))
        weights = {}
        for name, (n_out, n_in) in self.shapes.items():
            layer, kind = kind_of(name)
            factors = self.heads[self.numbers[kind]](states[self.rows[layer]])
            left, right = factors.split((n_out * self.rank, n_in * self.rank))
            weights[name] = left.view(n_out, self.rank) @ right.view(self.rank, n_in)
        return weights


def build(model: nn.Module, config: Config, options: Options) -> WeightSource | None:
    """The source, or none without a network."""
    if options.hidden == 0:
        return None
    if options.style == "published":
        return LowRankSource(model, config, options)
    return ChunkSource(model, config, options)


def patch(options: Options):
    train_gpt.build_source = partial(build, options=options)
