"""
Splanifold feed-forward: groups of spline manifolds, each a map of K squashed coordinates, replace the feed-forward.

    z = gain (W_in x) - centre        r = squash(z) (.., G, K)        Phi: kernels/splanifold
    y = W_out concat_g Phi_g(r_g)     or     y = sum_g Phi_g(r_g)

x and y are (B, T, model_dim). Phi_g maps K coordinates to n numbers: model_dim where groups are summed, else K with an
output projection and model_dim / G without. The options:

    in_proj     on: W_in (G K, model_dim); off: the groups share out the channels of x themselves, G K = model_dim
    out_proj    on: W_out (model_dim, G K), of a sum (model_dim, model_dim)
    dims        K
    groups      G; 0: as many as bring the layer to `budget` times the parameters of the feed-forward it replaces, or
                model_dim / K without in_proj
    nodes       S: S - 1 cubic segments. Parameters grow with S, FLOPs need not
    mix         concat or sum over the groups
    squash      sigmoid: r = sigmoid(z); mean: only t is squashed, r = t + (z - mean z) / 5 with
                t = sigmoid(sqrt(K) mean z); none: r = (1 + 2 z / 5) / 2
    expansion, delta_max (0: no warp), eps     Phi's
    rate        the controls' learning rate, as a factor of Muon's
    tangents    absolute: as in the paper; relative: sigma (P' - P) and sigma (E' - E) with a learned sigma, as in the
                author's code

Presets supply what is left at "preset" or 0:

    paper       one splanifold of all channels, no projections, 3/4 of the parameters of a feed-forward four times as
                wide
    lowdim2     K = 2 between two projections, 3 nodes, only t squashed; lowdim3: the same with K = 3
    dense16     K = 16 between two projections, 5 nodes, rate 1/4
    small       lowdim2 with 1/5 of the parameters, rate 1/4; fast, the best at equal time of what was tried, is small
    exodus18m   K = 32, no projections, concatenated: for the track of that name, where 128 layers of
                4 x 32 x (2 + 6 x 32) numbers make 3.18M

At equal parameters the FLOPs are 0.97 of those of the feed-forward for lowdim2 and lowdim3 and 0.70 for dense16, on
track cpu: from K = 16 on tokens visit only the nodes of their segment, but for loops on a CPU.

The stored controls are those of features of about unit size: E, E' and P' are multiplied by 8, 32 and 8 K. Muon takes
them as matrices (n, K), G S of each kind, with the rate divided by sqrt(G) where groups are summed; Adam takes P, gain,
centre and sigma. Without W_out the controls begin at zero, with it only W_out does: either way the block begins as the
identity.

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034, github.com/curvedinf/k-splanifolds, and the same
author's 18M-parameter model of 128 layers, whose block is not published: exodus18m is our reading; forms with
projections, groups and initial sizes: ours
Status: too few pairs in 2026-11-22_SplanifoldFeedForward, 2026-11-22_SplanifoldAtEqualTime
"""

import math
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.splanifold import SplanifoldControls, splanifold
from train_gpt import Config, require

PLAIN = dict(nodes=2, squash="sigmoid", budget=1.0, rate=1.0)
BARE = PLAIN | dict(in_proj="off", out_proj="off")
PROJECTED = PLAIN | dict(in_proj="on", out_proj="on", mix="concat")
LOWDIM = PROJECTED | dict(nodes=3, squash="mean")
SMALL = LOWDIM | dict(dims=2, budget=0.2, rate=0.25)
PRESETS = dict(
    paper=BARE | dict(mix="sum", groups=1),
    lowdim2=LOWDIM | dict(dims=2),
    lowdim3=LOWDIM | dict(dims=3),
    small=SMALL,
    fast=SMALL,
    dense16=PROJECTED | dict(dims=16, nodes=5, rate=0.25),
    exodus18m=BARE | dict(mix="concat", dims=32),
)


def squash_mean(z: Tensor) -> Tensor:
    mean = z.mean(-1, keepdim=True)
    return (z - mean) / 5 + torch.sigmoid(mean * z.shape[-1] ** 0.5)


def centre_on_half(z: Tensor) -> Tensor:
    return 0.5 + z / 5


SQUASH = dict(sigmoid=torch.sigmoid, mean=squash_mean, none=centre_on_half)  # z (.., K) -> r (.., K)


@dataclass
class Options:
    preset: Literal["dense16", "lowdim2", "lowdim3", "small", "fast", "paper", "exodus18m"] = "dense16"
    in_proj: Literal["preset", "on", "off"] = "preset"
    out_proj: Literal["preset", "on", "off"] = "preset"
    mix: Literal["preset", "concat", "sum"] = "preset"
    groups: int = 0
    dims: int = 0
    nodes: int = 0
    budget: float = 0.0
    squash: Literal["preset", "sigmoid", "mean", "none"] = "preset"
    expansion: float = 0.0
    delta_max: float = 0.0
    eps: float = 1e-3
    tangents: Literal["absolute", "relative"] = "absolute"
    rate: float = 0.0

    def __post_init__(self):
        o = self.resolve()
        require(o.groups >= 0 and o.dims >= 0,
                f"groups={o.groups},dims={o.dims}: give positive numbers, or 0 for the preset's")
        require(o.nodes >= 2, f"nodes={o.nodes}: a curve has at least 2")
        require(0 <= o.budget < math.inf, f"budget={o.budget}: give a share above 0 of the parameters of the "
                                          "feed-forward, or 0 for the preset's")
        require(o.expansion >= 0 and o.delta_max >= 0,
                f"expansion={o.expansion},delta_max={o.delta_max}: neither may be negative")
        require(o.rate > 0, f"rate={o.rate}: give a factor above 0 of Muon's learning rate, or 0 for the preset's")
        require(o.eps > 0, f"eps={o.eps}: give a number above 0, which keeps the tangents' weights finite")

    def resolve(self) -> "Options":
        """Return a copy with the preset's values for what is left to it."""
        result = copy(self)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) in ("preset", 0):
                setattr(result, name, value)
        return result


def choose_groups(config: Config, options: Options) -> tuple[int, int, int]:
    """Return (groups, coordinates of each, outputs of each). RunError for what does not fit the model."""
    width, S, G = config.model_dim, options.nodes, options.groups
    projects_in, projects_out = options.in_proj == "on", options.out_proj == "on"
    summed = options.mix == "sum"
    K = options.dims or width // (G or 1)

    require(projects_in or (G or width // K) * K == width,
            f"variant splanifold_mlp: without in_proj groups x dims must be model_dim = {width}, got groups={G},"
            f"dims={K}")
    require(not G or summed or projects_out or width % G == 0,
            f"variant splanifold_mlp: groups={G} do not divide model_dim = {width} outputs; choose another number, "
            "mix=sum or out_proj=on")

    def outputs(G: int) -> int:
        if summed:
            return width
        return K if projects_out else width // G

    def parameters(G: int) -> int:
        controls = G * outputs(G) * S * (1 + 3 * K)
        projection = width * (width if summed else G * K)
        return (width + 2) * G * K + controls + projects_out * projection

    if not G and not projects_in:
        G = width // K
    if not G:  # the number that comes nearest to the budget
        budget = options.budget * 2 * width * config.mlp_hidden
        choices = range(1, 2 + int(budget / (width * K)))
        fitting = [G for G in choices if summed or projects_out or width % G == 0]
        G = min(fitting, key=lambda G: abs(parameters(G) - budget))
    return G, K, outputs(G)


class SplanifoldMLP(nn.Module):
    """forward(x (B, T, model_dim), normalised) returns a tensor of the same shape. options: resolved."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__()
        G, K, n = choose_groups(config, options)
        S, width, channels, summed = options.nodes, config.model_dim, G * K, options.mix == "sum"
        self.options = options
        self.groups = G

        # projections, None where there is none, and what becomes of the coordinates between them, (G K,) each
        self.fc = train_gpt.Linear(config, layer, "fc", width, channels) if options.in_proj == "on" else None
        self.proj = None
        if options.out_proj == "on":
            self.proj = train_gpt.Linear(config, layer, "proj", n if summed else G * n, width)
        self.gain = nn.Parameter(torch.full((channels,), 1.0 if self.fc is None else 2.0))  # z begins at unit variance
        self.centre = nn.Parameter(torch.zeros(channels))

        # controls: P (G, S, n); E, P' and E' (G, S, n, K), by `scales` smaller than what Phi gets
        self.points = nn.Parameter(torch.zeros(G, S, n))
        self.bases = nn.Parameter(torch.empty(G, S, n, K))
        self.point_tangents = nn.Parameter(torch.empty(G, S, n, K))
        self.base_tangents = nn.Parameter(torch.empty(G, S, n, K))
        self.scales = dict(bases=8.0, point_tangents=8.0 * K, base_tangents=32.0)
        self.sigma = nn.Parameter(torch.ones(())) if options.tangents == "relative" else None  # None: absolute

        # initial sizes and learning rates
        terms = G if summed else 1  # of a sum of groups
        for name in self.scales:
            matrices = getattr(self, name)
            matrices.optimizer = "muon"
            matrices.lr_mul = options.rate * terms ** -0.5
            matrices.init_std = 0.5 * (K * terms) ** -0.5
            if self.proj is None and config.zero_init_projections:
                matrices.init_std = 0.0
        self.points.optimizer = "adam"
        self.points.lr_mul = 1 / terms

        delta_max = options.delta_max or math.inf
        self.settings = dict(expansion=options.expansion, delta_max=delta_max, eps=options.eps)  # Phi's

    def controls(self, dtype: torch.dtype) -> SplanifoldControls:
        bases, point_tangents, base_tangents = (scale * getattr(self, name) for name, scale in self.scales.items())
        if self.sigma is not None:
            point_tangents = self.sigma * (point_tangents - self.points[..., None])
            base_tangents = self.sigma * (base_tangents - bases)
        return SplanifoldControls(*(x.to(dtype) for x in (self.points, bases, point_tangents, base_tangents)))

    def coordinates(self, x: Tensor) -> Tensor:
        """Return r (B T, G, K)."""
        z = x if self.fc is None else self.fc(x)
        z = z * self.gain.type_as(x) - self.centre.type_as(x)
        return SQUASH[self.options.squash](z.view(-1, self.groups, z.shape[-1] // self.groups))

    def forward(self, x: Tensor) -> Tensor:
        y = splanifold(self.coordinates(x), self.controls(x.dtype), **self.settings, mix=self.options.mix)
        y = y.view(*x.shape[:-1], -1)
        return y if self.proj is None else self.proj(y)


def patch(options: Options):
    train_gpt.MLP = partial(SplanifoldMLP, options=options.resolve())
