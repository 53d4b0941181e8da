"""
Low-rank matrices: each matrix of a block is a product of two thin ones.

    two_factor    y = A (B x)                   A (n_out, k), B (k, n_in)
    stiefel       y = U (sigma * (V x))         U'U = V V' = 1 after every step, sigma (k,): the singular values
    published     the same without that: a linear layer of three factors ("Eigenweight"), k at most n_in and n_out

All begin as the best approximation of rank k to the baseline's first matrix (published: to one of standard deviation
0.02), two_factor with sqrt(sigma) in each factor. Where the baseline begins at zero, A or sigma does. Muon has the thin
matrices, Adam sigma. Weight decay of two_factor is the product's: A <- A - lr d A B B', B <- B - lr d A' A B. stiefel
goes back to orthonormal factors by six Newton-Schulz steps X <- (3 X - X X'X) / 2 after every update.

    rank                    k; -1: a quarter of the matrix's smaller side; 0: dense
    attn_rank, mlp_rank     the same for attention and feed-forward alone; -1: rank
    targets                 all, attention, mlp, or q: the queries' matrix alone

Cost: k (n_in + n_out) parameters a matrix, with sigma k more, and as many multiply-adds a token.

Source: Khodak et al., Initialization and Regularization of Factorized Neural Layers, 2021, arxiv.org/abs/2105.01029;
published: parameter-golf pull request 1589; stiefel: ours
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.low_rank_pair import low_rank_pair
from train_gpt import Config, Ranks, draw_normal, require, schedule_weight_decay

ROLES = dict(all=("q", "k", "v", "o", "fc", "proj"), attention=("q", "k", "v", "o"), mlp=("fc", "proj"), q=("q",))
PUBLISHED_STD = 0.02
NEWTON_STEPS = 6


@dataclass
class Options:
    rank: int = -1
    attn_rank: int = -1
    mlp_rank: int = -1
    targets: Literal["all", "attention", "mlp", "q"] = "all"
    style: Literal["two_factor", "stiefel", "published"] = "two_factor"

    def __post_init__(self):
        for name in ("rank", "attn_rank", "mlp_rank"):
            value = getattr(self, name)
            require(value >= -1, f"{name}={value} is out of range; give a rank of at least 1, 0 for dense, or -1")

    def rank_of(self, role: str, n_in: int, n_out: int) -> int:
        """The rank of a matrix of this role, 0 where it stays dense. RunError for one above its sides."""
        if role not in ROLES[self.targets]:
            return 0
        special = self.mlp_rank if role in ROLES["mlp"] else self.attn_rank
        rank = special if special >= 0 else self.rank
        most = min(n_in, n_out)
        if rank < 0:
            return max(1, most // 4)
        if self.style == "published":
            return min(rank, most)
        require(rank <= most, f"variant low_rank: rank {rank} is above the sides of the {role} matrix, {n_out} x "
                              f"{n_in}; give at most {most}")
        return rank


def leading_vectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Of a matrix (m, n) the k largest singular values and their vectors: (m, k), (k,), (k, n), float32. By the smaller
    Gram matrix in float64, which costs less than a decomposition of the matrix.
    """
    x = matrix.double()
    wide = x.shape[0] <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    sigma = values.clamp_min(0).sqrt()
    others = (x.T if wide else x) @ vectors / sigma.clamp_min(1e-30)
    left, right = (vectors, others) if wide else (others, vectors)
    return left.float(), sigma.float(), right.T.float()


class LowRankLinear(nn.Module):
    """forward(x (..., n_in)) returns (..., n_out)."""

    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int, rank: int, style: str):
        super().__init__()
        self.style = style
        self.is_zero = role in ("o", "proj") and config.zero_init_projections
        self.std = PUBLISHED_STD if style == "published" else 0.5 * n_in ** -0.5  # of the matrix it approximates
        self.up = nn.Parameter(torch.empty(n_out, rank))
        self.down = nn.Parameter(torch.empty(rank, n_in))
        for factor in (self.up, self.down):
            factor.optimizer = "muon"
            factor.wd_mul = float(style == "published")

        # (k,) sigma; None: within the factors
        self.sigma = None
        if style != "two_factor":
            self.sigma = nn.Parameter(torch.empty(rank))
            self.sigma.optimizer = "adam"

    def initialize(self, name: str, seed: int):
        """Begin as the best approximation to the dense layer's first matrix, or at zero where that does."""
        shape = self.up.shape[0], self.down.shape[1]
        dense = draw_normal(f"{name}.weight", shape, self.std, seed)
        left, sigma, right = leading_vectors(dense, len(self.down))
        if self.sigma is None:
            self.up.copy_(0 * left if self.is_zero else left * sigma.sqrt())
            self.down.copy_(right * sigma.sqrt()[:, None])
        else:
            self.up.copy_(left)
            self.down.copy_(right)
            self.sigma.copy_(0 * sigma if self.is_zero else sigma)

    def forward(self, x: Tensor) -> Tensor:
        sigma = None if self.sigma is None else self.sigma.type_as(x)
        return low_rank_pair(x, self.down.type_as(x), self.up.type_as(x), sigma)


def build_linear(config: Config, layer: int | None, role: str, n_in: int, n_out: int, options: Options) -> nn.Module:
    """A low-rank layer, or the trainer's own where the matrix stays dense."""
    rank = options.rank_of(role, n_in, n_out)
    if rank == 0:
        return Linear(config, layer, role, n_in, n_out)
    return LowRankLinear(config, layer, role, n_in, n_out, rank, options.style)


# ---- After a step -----------------------------------------------------------


def orthonormalize(matrices: Tensor) -> Tensor:
    """The nearest matrices (n, rows, columns) with orthonormal columns, of ones whose singular values are near 1."""
    for _ in range(NEWTON_STEPS):
        matrices = 1.5 * matrices - 0.5 * matrices @ (matrices.mT @ matrices)
    return matrices


class FactorStep:
    """
    What follows the optimizers' updates of factors, on every rank alike: two_factor's weight decay, stiefel's way back
    to orthonormal factors. It has the methods of an optimizer and no state.
    """

    buckets = ()    # it has no gradients

    def __init__(self, model: nn.Module, config: Config):
        self.config = config
        layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
        self.decayed = [layer for layer in layers if layer.style == "two_factor"]

        # factors with columns to be orthonormal, by their shape
        self.frames = {}
        for layer in (layer for layer in layers if layer.style == "stiefel"):
            for factor, is_wide in ((layer.up, False), (layer.down, True)):
                self.frames.setdefault((factor.shape, is_wide), []).append(factor)

    @torch.no_grad()
    def step(self, lr_factor: float, progress: float):
        """What follows a step at `progress` in [0, 1) of the run."""
        rate = self.config.lr_matrix * lr_factor * self.config.weight_decay
        rate *= schedule_weight_decay(self.config, progress)
        for layer in self.decayed if rate else ():
            up = layer.up @ (layer.down @ layer.down.T)
            down = (layer.up.T @ layer.up) @ layer.down
            layer.up.sub_(rate * up)
            layer.down.sub_(rate * down)

        for (_, is_wide), factors in self.frames.items():
            stack = torch.stack([factor.T if is_wide else factor for factor in factors])
            for factor, frame in zip(factors, orthonormalize(stack)):
                factor.copy_(frame.T if is_wide else frame)

    def state_dict(self) -> dict:
        """Nothing: all of it is in the parameters."""
        return {}

    def load_state_dict(self, saved: dict):
        """Nothing to take up."""


def build_optimizers(model: nn.Module, config: Config, ranks: Ranks, default) -> list:
    """The trainer's optimizers, and what follows their updates."""
    return [*default(model, config, ranks), FactorStep(model, config)]


Linear = train_gpt.Linear


def patch(options: Options):
    train_gpt.Linear = partial(build_linear, options=options)
    if options.style != "published":
        train_gpt.build_optimizers = partial(build_optimizers, default=train_gpt.build_optimizers)
