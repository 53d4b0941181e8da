"""
Seed model: all matrices of the blocks move in a random subspace of few dimensions, the model's intrinsic dimension.

    theta = theta_0 + P phi      theta (D,): all matrices of the blocks, phi (dim,): what is learnt, P (D, dim): random

P is never stored. P = S / sqrt(dim), whose signs S come from a counter: the 32 signs of row i, columns 32 w to
32 w + 31, are the bits of the word mix(mix(i + seed) - 1640531527 w), where mix is

    x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15        modulo 2^32

so that all devices have the same bits. A product with S looks up sums of eight phi by their signs, 256 for each group:
one read a row and group in place of eight products; the product with S' adds up the rows of equal signs first.

    dim           numbers that are learnt; 0: the baseline. per=matrix: so many for each matrix
    distribution  sign: as above; gauss: normal numbers, drawn on the CPU for 10,000 rows at a time
    normalize     what P is divided by. dim: sqrt(dim), rows: sqrt(D), so that columns have length 1, of signs exactly
    style         published: gauss, columns of length 1 in every 10,000 rows; theta_0 has standard deviation 0.02 and
                  phi 0.01. subspace: theta_0 is the baseline's first tensor, phi begins at zero

phi is Adam's, at the learning rate lr. Everything else (embedding, gates, scalars) is learnt as in the baseline.

Cost: dim numbers in place of D. A step makes P twice, once a direction: D dim / 8 reads each for signs.

Source: Li, Farkhoor, Liu & Yosinski, Measuring the Intrinsic Dimension of Objective Landscapes, 2018,
arxiv.org/abs/1804.08838; published: parameter-golf pull request 1589; the mixing function: hash-prospector's
Status: unmeasured
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, WeightSource, draw_normal, require

STRIDE = -1_640_531_527     # between the words of a row: 2^32 over the golden ratio, as a signed number
SIGNS_AT_ONCE = 2 ** 24     # entries of P, about, that a product looks at in one go
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


def mix(x: Tensor) -> Tensor:
    """x int32 -> the same, well mixed: its bits are those of a number without sign, products lose what passes 32."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * 0x735A2D97
    return x ^ (x >> 15 & 0x1FFFF)


def words(first: int, stop: int, count: int, seed: int, device: torch.device) -> Tensor:
    """The words of rows first .. stop - 1 -> (rows, count) int32."""
    rows = torch.arange(first, stop, dtype=torch.int32, device=device) + seed % 2 ** 31
    columns = torch.arange(count, dtype=torch.int32, device=device) * STRIDE
    return mix(mix(rows)[:, None] + columns)


def sign_bytes(first: int, stop: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """
    The signs of rows first .. stop - 1 as 256 g + byte, (rows, groups) int32, groups = ceil(dim / 8): bit b of group
    g's byte is column 8 g + b, 1 stands for +1.
    """
    groups = -(-dim // 8)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=device)
    byte = (words(first, stop, -(-groups // 4), seed, device)[..., None] >> shifts & 255).flatten(1)[:, :groups]
    return byte + 256 * torch.arange(groups, dtype=torch.int32, device=device)


def signs_of_bytes(like: Tensor) -> Tensor:
    """(256, 8) of like's dtype: the signs that each byte stands for."""
    byte = torch.arange(256, device=like.device)
    bit = torch.arange(8, device=like.device)
    return (2 * (byte[:, None] >> bit & 1) - 1).to(like.dtype)


def pieces(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    """Some rows at a time: (first, the one after the last)."""
    size = max(1, SIGNS_AT_ONCE // max(dim, 1))
    for first in range(0, rows, size):
        yield first, min(rows, first + size)


class SignProduct(torch.autograd.Function):
    """S phi of phi (dim,) -> (D,): rows first to first + D - 1 of the signs. Its gradient is S' dtheta."""

    @staticmethod
    def forward(ctx, phi: Tensor, first: int, rows: int, seed: int) -> Tensor:
        ctx.shape = phi.shape[0], first, rows, seed
        return multiply_signs(phi, first, rows, seed)

    @staticmethod
    def backward(ctx, grad):
        dim, first, rows, seed = ctx.shape
        return multiply_signs_transposed(grad, dim, first, rows, seed), None, None, None


def multiply_signs(phi: Tensor, first: int, rows: int, seed: int) -> Tensor:
    """S phi, see SignProduct."""
    # sums of eight numbers by their signs: (groups, 256)
    dim, groups = phi.shape[0], -(-phi.shape[0] // 8)
    eights = torch.cat((phi, phi.new_zeros(8 * groups - dim))).view(groups, 8)
    sums = (eights @ signs_of_bytes(phi).T).flatten()

    # one of each group for every row
    results = []
    for start, stop in pieces(rows, dim):
        index = sign_bytes(first + start, first + stop, dim, seed, phi.device)
        results.append(sums.index_select(0, index.flatten()).view(index.shape).sum(1))
    return torch.cat(results)


def multiply_signs_transposed(grad: Tensor, dim: int, first: int, rows: int, seed: int) -> Tensor:
    """S' grad of grad (D,) -> (dim,), see SignProduct."""
    # rows of equal signs, summed for every group of eight columns
    groups = -(-dim // 8)
    sums = grad.new_zeros(256 * groups)
    for start, stop in pieces(rows, dim):
        index = sign_bytes(first + start, first + stop, dim, seed, grad.device)
        sums.index_add_(0, index.flatten(), grad[start:stop, None].expand(-1, groups).flatten())
    return (sums.view(groups, 256) @ signs_of_bytes(grad)).flatten()[:dim]


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
            product = SignProduct.apply(phi, first, rows, self.seed)
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
