"""
Basis sharing: the matrices of one kind in neighbouring layers are combinations of the same columns.

    W_i = U C_i        U (n_out, k) shared by a group of layers, C_i (k, n_in) the layer's own

All begin as the best approximation of rank k to the baseline's first matrices of the group side by side,
U = the first k left singular vectors of [W_1 .. W_g], C_i = U'W_i.

    rank          k; -1: a quarter of the matrix's smaller side; 0: the baseline
    group         layers that share U
    types         inner: q, k, v and fc; all: the output projections, too, whose C begins at zero
    coeff_opt     which optimizer has C; coeff_lr: its learning rate, 0: that of the optimizer
    style         published: one group of all layers, all types, C by Adam at 0.04, first matrices of standard deviation
                  0.02. grouped: Muon for C, and U's rate divided by the layers of its group, whose gradients it sums

Cost: for each kind of matrix, k n_out a group and k n_in a layer; multiply-adds as for factors of rank k.

Source: Wang et al., Basis Sharing, 2025, arxiv.org/abs/2410.03765, who share after training; published: parameter-golf
pull request 1589
Status: unmeasured
"""

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, draw_normal, require
from variants.low_rank import leading_vectors

Linear = train_gpt.Linear
TYPES = dict(inner=("q", "k", "v", "fc"), all=("q", "k", "v", "o", "fc", "proj"))
PUBLISHED_STD = 0.02


@dataclass
class Options:
    rank: int = -1
    group: int = 2
    types: Literal["inner", "all"] = "inner"
    coeff_opt: Literal["muon", "adam"] = "muon"
    coeff_lr: float = 0.0
    style: Literal["grouped", "published"] = "grouped"

    def __post_init__(self):
        require(self.rank >= -1, f"rank={self.rank} is out of range; give at least 1, 0 for the baseline, or -1")
        require(self.group >= 1, f"group={self.group} is not positive; give a number of layers")
        require(self.coeff_lr >= 0, f"coeff_lr={self.coeff_lr} is negative; give a learning rate, or 0")
        if self.style == "published":
            self.types = "all"
            self.coeff_opt = "adam"
            self.coeff_lr = 0.04

    def group_size(self, config: Config) -> int:
        return config.layers if self.style == "published" else self.group


class Basis:
    """U of one group, and the layers that share it."""

    def __init__(self, n_out: int, rank: int):
        self.columns = nn.Parameter(torch.empty(n_out, rank))  # U
        self.columns.optimizer = "muon"
        self.members = []   # BasisLinear, in the order of the layers
        self.drawn = []     # their first dense matrices, while a model is being initialized


class BasisLinear(nn.Module):
    """forward(x (..., n_in)) returns (..., n_out)."""

    def __init__(self, config: Config, layer: int, role: str, n_in: int, basis: Basis, options: Options):
        super().__init__()
        self.layer = layer
        self.group = (basis,)  # in a tuple, so that its state is this module's columns alone
        self.is_zero = role in ("o", "proj") and config.zero_init_projections
        self.std = PUBLISHED_STD if options.style == "published" else 0.5 * n_in ** -0.5
        self.columns = basis.columns
        self.coefficients = nn.Parameter(torch.empty(basis.columns.shape[1], n_in))  # C
        self.coefficients.optimizer = options.coeff_opt
        if options.coeff_lr:
            usual = config.lr_matrix if options.coeff_opt == "muon" else config.lr_scalar
            self.coefficients.lr_mul = options.coeff_lr / max(usual, 1e-12)
        basis.members.append(self)
        if options.style == "grouped":
            basis.columns.lr_mul = 1 / len(basis.members)

    def initialize(self, name: str, seed: int):
        """Begin as the dense matrices' best approximation; the group's last layer does it for all of them."""
        basis, = self.group
        shape = self.columns.shape[0], self.coefficients.shape[1]
        basis.drawn.append(draw_normal(f"{name}.weight", shape, self.std, seed))
        if len(basis.drawn) < len(basis.members):
            return
        basis.columns.copy_(leading_vectors(torch.cat(basis.drawn, dim=1), basis.columns.shape[1])[0])
        for member, dense in zip(basis.members, basis.drawn):
            start = basis.columns.T @ dense
            member.coefficients.copy_(0 * start if member.is_zero else start)
        basis.drawn = []

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.coefficients.type_as(x).T @ self.columns.type_as(x).T


class Bases:
    """Makes the linear layers of models, one model after another; layers of one group get one basis."""

    def __init__(self, options: Options):
        self.options = options
        self.config = None      # of the model that is being made; None before the first
        self.made = {}          # (role, sides, group) -> weak references to this configuration's bases

    def build(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int) -> nn.Module:
        """A layer with a shared basis, or the trainer's own. RunError for a rank above the matrix."""
        options = self.options
        if options.rank == 0 or layer is None or role not in TYPES[options.types]:
            return Linear(config, layer, role, n_in, n_out)

        # k
        size = options.group_size(config)
        most = min(n_out, size * n_in)
        rank = max(1, min(n_in, n_out) // 4) if options.rank < 0 else options.rank
        require(rank <= most, f"variant basis_sharing: rank={rank} is above what the {role} matrices {n_out} x {n_in} "
                              f"of {size} layers can have; give at most {most}")

        # a basis of its group that this layer does not have yet: a layer may have two matrices of one kind
        if config is not self.config:
            self.config = config
            self.made = {}
        references = self.made.setdefault((role, n_in, n_out, layer // size), [])
        bases = [basis for basis in (reference() for reference in references) if basis is not None]
        free = [basis for basis in bases if layer not in {member.layer for member in basis.members}]
        if not free:
            free = [Basis(n_out, rank)]
            references.append(weakref.ref(free[0]))
        return BasisLinear(config, layer, role, n_in, free[0], options)


def patch(options: Options):
    train_gpt.Linear = Bases(options).build
