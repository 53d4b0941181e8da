"""
SIREN weights: a network of sines writes every number of the blocks' matrices from its coordinates.

    W[r, c] = gain f(r, c, layer, t)        f = w_n.sin(omega (W sin(.. sin(omega_first (W_1 [r; c; layer; t] + b_1)))))

r, c and the layer are scaled to [-1, 1], t (8,) is a learned vector of the kind of matrix. A gain a matrix begins at
the standard deviation of the baseline's first tensor, zero where that is zero; f begins with about 1. Neighbouring
numbers are alike, so that a matrix has a low effective rank, exp of the entropy of its squared singular values over
their sum: a high omega_first raises it. Numbers are float32: bfloat16 cannot tell 512 coordinates apart.

    hidden, depth     width of the network; its layers, the linear last one included. hidden 0: the baseline
    omega_first       factor of the first layer, omega: of the others
    fourier           sines and cosines of so many random directions in place of the coordinates; 0: the coordinates
    style             published: coordinates in [0, 1], omega_first 30, no gains: 16 kinds, f's last layer as the others

Layers begin uniform in +-1 / inputs, later ones in +-sqrt(6 / hidden) / omega. Matrices are written once an optimizer
step, one at a time; what the backward pass needs is computed again.

Cost: (11 + 1) hidden + (depth - 2) (hidden + 1) hidden + hidden + 1 parameters, and 8 a kind; a step spends about
8 (depth - 2) hidden^2 multiply-adds for every number written.

Source: Sitzmann et al., SIREN, 2020, arxiv.org/abs/2006.09661; published: parameter-golf pull request 1589
Status: unmeasured
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import train_gpt
from train_gpt import Config, WeightSource, draw_normal, require
from variants.hypernetwork import draw, gains, kind_of, set_rate

KIND_CHANNELS = 8
PUBLISHED_KINDS = 16


@dataclass
class Options:
    hidden: int = 64
    depth: int = 4
    omega_first: float = 1000.0
    omega: float = 30.0
    fourier: int = 0
    lr: float = 1e-3
    style: Literal["gains", "published"] = "gains"

    def __post_init__(self):
        if self.style == "published":
            self.omega_first = self.omega
        require(0 <= self.hidden <= 65_536 and 2 <= self.depth <= 64 and 0 <= self.fourier <= 65_536,
                f"hidden={self.hidden},depth={self.depth},fourier={self.fourier} are out of range; give positive "
                "numbers, at least two layers, or hidden=0 for the baseline")
        require(self.omega_first > 0 and self.omega > 0 and self.lr > 0,
                f"omega_first={self.omega_first},omega={self.omega},lr={self.lr}: give numbers above 0")


class SineSource(WeightSource):
    """All matrices of the blocks from their coordinates."""

    def __init__(self, model: nn.Module, config: Config, options: Options):
        super().__init__(model, train_gpt.matrices_of(model))
        self.options = options
        self.layers = max(config.layers - 1, 1)     # the last layer's number, which is coordinate 1
        kinds = dict.fromkeys(kind_of(name)[1] for name in self.shapes)
        self.numbers = {kind: number for number, kind in enumerate(kinds)}
        is_published = options.style == "published"
        rows = max(PUBLISHED_KINDS, len(kinds)) if is_published else len(kinds)
        self.kinds = draw(nn.Parameter(torch.empty(rows, KIND_CHANNELS)), 1.0)

        # random directions of the coordinates (3, fourier), drawn in initialize()
        directions = torch.empty(3, options.fourier) if options.fourier else None
        self.register_buffer("directions", directions, persistent=False)
        inputs = (2 * options.fourier or 3) + KIND_CHANNELS
        sizes = [inputs, *[options.hidden] * (options.depth - 1), 1]
        self.net = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:]))

        # one a matrix; None: f itself
        self.gains = None if is_published else gains(self.stds.values())
        set_rate(self, options.lr, config)

    def initialize(self, name: str, seed: int):
        """Draw the network as sines need it."""
        options = self.options
        for number, layer in enumerate(self.net):
            bound = 1 / layer.in_features
            if number:
                bound = math.sqrt(6 / layer.in_features) / options.omega
            if number == len(self.net) - 1 and self.gains is not None:
                bound = math.sqrt(6 / layer.in_features)  # f begins with 1: sines have a mean square of 1/2
            for p, kind in ((layer.weight, "weight"), (layer.bias, "bias")):
                # a normal number's distribution function is uniform
                normal = draw_normal(f"{name}.net.{number}.{kind}", p.shape, 1.0, seed)
                p.copy_(bound * torch.erf(normal / math.sqrt(2)))
        if self.gains is not None:
            self.net[-1].bias.zero_()
        if self.directions is not None:
            self.directions.copy_(draw_normal(f"{name}.directions", self.directions.shape, 1.0, seed))

    def coordinates(self, name: str) -> Tensor:
        """(n_out n_in, inputs) float32: where the numbers of a matrix stand."""
        layer, kind = kind_of(name)
        n_out, n_in = self.shapes[name]
        device = self.kinds.device
        rows = torch.linspace(0, 1, n_out, device=device)[:, None].expand(-1, n_in)
        columns = torch.linspace(0, 1, n_in, device=device).expand(n_out, -1)
        points = torch.stack((rows, columns, torch.full_like(rows, max(layer, 0) / self.layers)), dim=-1).flatten(0, 1)
        if self.gains is not None:
            points = 2 * points - 1
        if self.directions is not None:
            angles = points @ self.directions
            points = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return torch.cat((points, self.kinds[self.numbers[kind]].expand(len(points), -1)), dim=-1)

    def write(self, name: str) -> Tensor:
        """f at every coordinate of a matrix, (n_out, n_in)."""
        x = self.coordinates(name)
        omega = self.options.omega_first
        for layer in self.net[:-1]:
            x = torch.sin(omega * layer(x))
            omega = self.options.omega
        return self.net[-1](x).view(self.shapes[name])

    def forward(self) -> dict[str, Tensor]:
        """{name: its matrix}."""
        weights = {}
        for number, name in enumerate(self.shapes):
            if torch.is_grad_enabled():
                matrix = checkpoint(self.write, name, use_reentrant=False, preserve_rng_state=False)
            else:
                matrix = self.write(name)
            weights[name] = matrix if self.gains is None else self.gains[number] * matrix
        return weights


def build(model: nn.Module, config: Config, options: Options) -> SineSource | None:
    """The source, or none without a network."""
    return SineSource(model, config, options) if options.hidden else None


def patch(options: Options):
    train_gpt.build_source = partial(build, options=options)
