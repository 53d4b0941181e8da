"""
Seed model: all matrices of the blocks move in a random subspace of few dimensions, the model's intrinsic dimension.

    theta = theta_0 + P phi      theta (D,): all matrices of the blocks, phi (dim,): what is learnt, P (D, dim): random

P is never stored. P = S / sqrt(dim), whose signs S come from a counter, the same bits on all devices;
kernels/sign_projection has its formula and the products with it.

    dim           numbers that are learnt; 0: the baseline. per=matrix: so many for each matrix
    distribution  sign: as above; gauss: normal numbers, drawn on the CPU for 10,000 rows at a time
    normalize     what P is divided by. dim: sqrt(dim), rows: sqrt(D), so that columns have length 1, of signs exactly
    style         published: gauss, columns of length 1 in every 10,000 rows; theta_0 has standard deviation 0.02 and
                  phi 0.01. subspace: theta_0 is the baseline's first tensor, phi begins at zero

phi is Adam's, at the learning rate lr. Everything else (embedding, gates, scalars) is learnt as in the baseline.

Cost: dim numbers in place of D. A step makes P twice, once a direction: for signs D dim / 8 reads or additions each on
a CPU, 3 to 4 D dim operations on a GPU.

Source: Li, Farkhoor, Liu & Yosinski, Measuring the Intrinsic Dimension of Objective Landscapes, 2018,
arxiv.org/abs/1804.08838; published: parameter-golf pull request 1589
Status: unmeasured
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.sign_projection import sign_projection
from train_gpt import Config, WeightSource, draw_normal, require

NORMAL_ROWS = 10_000        # rows of normal numbers at a time


@dataclass
class Options:
    dim: int = 512
    per: Literal["model", "matrix"] = "model"
    distribution: Literal["sign", "gauss"] = "sign"
    normalize: Literal["dim", "rows"] = "dim"
    style: Literal["subspace", "published"] = "subspace"
    lr: float = 0.01

    def __post_init__(self):
        require(0 <= self.dim <= 2 ** 20,
                f"dim={self.dim} is out of range; give 1 to {2 ** 20:,}, or 0 for the baseline")
        require(self.lr > 0, f"lr={self.lr} is not positive; give a learning rate above 0")


# ---- The random matrix ------------------------------------------------------


class NormalProduct(torch.autograd.Function):
    """
    P phi of phi (dim,) -> (D,): rows first to first + D - 1 of normal numbers; scaled: with columns of length 1 in
    every NORMAL_ROWS rows. Its gradient is P' dtheta.
    """

    @staticmethod
    def forward(ctx, phi: Tensor, first: int, rows: int, seed: int, scaled: bool) -> Tensor:
        ctx.shape = phi.shape[0], first, rows, seed, scaled
        return torch.cat([matrix @ phi for _, _, matrix in normal_pieces(*ctx.shape, phi)])

    @staticmethod
    def backward(ctx, grad):
        total = sum(grad[start:stop] @ matrix for start, stop, matrix in normal_pieces(*ctx.shape, grad))
        return total, None, None, None, None


def normal_pieces(dim: int, first: int, rows: int, seed: int, scaled: bool, like: Tensor) -> Iterator:
    """(first row, the one after the last, P's rows (n, dim)), some rows at a time."""
    for start in range(0, rows, NORMAL_ROWS):
        stop = min(rows, start + NORMAL_ROWS)
        generator = torch.Generator().manual_seed(seed + 2 ** 20 * (first + start))
        matrix = torch.randn(stop - start, dim, generator=generator, device="cpu").to(like)
        if scaled:
            matrix = matrix / matrix.norm(dim=0, keepdim=True)
        yield start, stop, matrix


# ---- The source -------------------------------------------------------------


class SeedSource(WeightSource):
    """All matrices of the blocks, theta_0 + P phi; one phi for all of them, or one for each."""

    def __init__(self, model: nn.Module, config: Config, options: Options):
        super().__init__(model, train_gpt.matrices_of(model))
        self.options = options
        self.seed = config.seed
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        total = sum(self.sizes)

        # (n, dim); and theta_0 (D,), which a checkpoint needs not hold
        count = len(self.sizes) if options.per == "matrix" else 1
        self.phi = nn.Parameter(torch.empty(count, options.dim))
        self.phi.init_std = 0.01 if options.style == "published" else 0.0
        self.phi.optimizer = "adam"
        self.phi.lr_mul = options.lr / max(config.lr_scalar, 1e-12)
        self.register_buffer("start", torch.empty(total), persistent=False)

    def initialize(self, name: str, seed: int):
        """Draw theta_0."""
        tensors = []
        for weight, shape in self.shapes.items():
            std = 0.02 if self.options.style == "published" else self.stds[weight]
            tensors.append(draw_normal(weight, shape, std, seed).flatten())
        self.start.copy_(torch.cat(tensors))

    def project(self, phi: Tensor, first: int, rows: int) -> Tensor:
        """P phi of phi (dim,) for so many rows from the first on -> (rows,)."""
        options = self.options
        if options.style == "published":
            return NormalProduct.apply(phi, first, rows, self.seed, True)
        if options.distribution == "gauss":
            product = NormalProduct.apply(phi, first, rows, self.seed, False)
        else:
            product = sign_projection(phi, rows, first, self.seed)
        return product * (options.dim if options.normalize == "dim" else rows) ** -0.5

    def forward(self) -> dict[str, Tensor]:
        """{name: its matrix}."""
        first = 0
        moves = []
        for phi, rows in zip(self.phi, self.sizes if len(self.phi) > 1 else [sum(self.sizes)]):
            moves.append(self.project(phi, first, rows))
            first += rows
        theta = (self.start + torch.cat(moves)).split(self.sizes)
        return {name: flat.view(shape) for (name, shape), flat in zip(self.shapes.items(), theta)}


def build(model: nn.Module, config: Config, options: Options) -> SeedSource | None:
    return SeedSource(model, config, options) if options.dim else None


def patch(options: Options):
    train_gpt.build_source = partial(build, options=options)
