"""
Topological (scalar-key) attention: a score is minus the distance of two scalars, one of the query, one of the key.

    s_ij = -|a_i - b_j| / t + F_i - F_j + c_j
    p_ij = softmax of s_ij over the keys j that query i may see        y_i = sum_j p_ij v_j

a, b, F, c (B, T, H) are float32: coordinates of queries and keys, running sum of the log-decay, bias of the keys; t is
a temperature for each head; v and y are (B, T, H, D). Values, value embedding, sparse output gate and output projection
are the baseline's. The options, each a choice of its own:

    coordinate     rayleigh: E / (E + tau) with E = x'Lx / (x'x + 1e-6), of the rotated q and k of a head, in [0, 1)
                   linear: a learned vector for each head, times x
                   none: no distance term, which makes the attention a weighted mean of the past
    laplacian      L (D, D). chain: -1 between neighbouring channels, degrees on the diagonal
                   learned: a positive weight, by softplus, between any two channels, starting near the chain
                   domain:FILE: of an .npz file with the arrays laplacian (D, D) and provenance, a JSON object that says
                   what it was made from. The checkpoint keeps a copy of L, but to build the model the file must be
                   there
    tau            fixed: 1; file: the file's array tau, a typical E of the vectors that L was made from (manifold.py)
    temperature    fixed: t = 1; per_head: learned, starting there
    decay          none: F = 0; per_head: a learned slope for each head; data: a forget gate,
                   F_i = sum over t <= i of log sigmoid(w.x_t + d) with w starting at zero. Both start from the slopes
                   2^(-8 h / H), h = 1 .. H
    heads          number of heads; head_dim: their width. One of them alone keeps the product of the two; 0: the
                   preset's, else the trainer's. Every head has keys and values of its own, whatever --kv_heads says
    short_conv     taps of a causal convolution of each channel on the attention's input, starting as the identity; it
                   stays in the document
    gate           output: every channel of y is multiplied by 2 sigmoid(w.x)
    key_bias       on: c_j = w.x_j, starting at zero
    quantize_bins  b is rounded to the nearest of so many equally spaced values, in [0, 1] with rayleigh and [-8, 8]
                   with linear, gradients passing straight through (0: off)

Presets supply what is left at "preset" or 0. faithful: the seed idea, everything off. fast: linear coordinates, forget
gate, heads of 8 channels, convolution of 4 taps. key_only, the control of fast: the same without the distance term,
with a key bias in its place. The control of both for what a decay alone gives is the variant forgetting_attention.

Cost: no product of queries with keys; the attention takes O(T log T) or less (kernels/topological_attention).
Parameters: with linear coordinates q and k (2 H D model_dim) give way to 2 H model_dim; the forget gate and the key
bias take H model_dim each. A new window compiles the layer anew.

Source: Moriondo, Topological Transformer, TechRxiv 176800983.30631144, github.com/tuned-org-uk/tauformer; slopes: Press
et al., ALiBi, 2021, arxiv.org/abs/2108.12409; forget gate: Lin et al., Forgetting Transformer, 2025,
arxiv.org/abs/2503.02130; convolution: Fu et al., H3, 2022, arxiv.org/abs/2212.14052; straight-through gradient: Bengio
et al., 2013, arxiv.org/abs/1308.3432; linear coordinates and the combination: ours
Status: too few pairs in 2026-11-22_TopologicalAttentionOptions; better in 2026-11-30_EnglishRowsOf1024AtEqualTime
"""

import json
import math
import zipfile
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.backend import wide
from kernels.short_convolution import short_convolution
from kernels.topological_attention import topological_attention
from kernels.topological_attention.cache import TopologicalCache
from train_gpt import AttentionContext, Config, RunError, require

OFF = dict(
    coordinate="rayleigh",
    temperature="fixed",
    decay="none",
    head_dim=0,
    short_conv=0,
    gate="none",
    key_bias="off",
)
FAST = OFF | dict(coordinate="linear", decay="data", head_dim=8, short_conv=4)
PRESETS = dict(faithful=OFF, fast=FAST, key_only=FAST | dict(coordinate="none", key_bias="on"))

BIN_RANGES = dict(rayleigh=(0.0, 1.0), linear=(-8.0, 8.0))
MAX_BYTES = 2 ** 31  # of a file's arrays: a few kilobytes of compressed zeros must not fill the memory


@dataclass
class Options:
    preset: Literal["faithful", "key_only", "fast"] = "faithful"
    coordinate: Literal["preset", "rayleigh", "linear", "none"] = "preset"
    laplacian: str = "chain"
    tau: str = "fixed"
    temperature: Literal["preset", "fixed", "per_head"] = "preset"
    decay: Literal["preset", "none", "per_head", "data"] = "preset"
    heads: int = 0
    head_dim: int = 0
    short_conv: Literal["preset", 0, 3, 4] = "preset"
    gate: Literal["preset", "none", "output"] = "preset"
    key_bias: Literal["preset", "off", "on"] = "preset"
    quantize_bins: int = 0

    def __post_init__(self):
        o = self.resolve()
        where = f"with coordinate={o.coordinate}"
        require(o.heads >= 0 and o.head_dim >= 0,
                f"heads={o.heads},head_dim={o.head_dim}: give positive numbers, or 0 for the preset's")

        # the Laplacian
        from_file = o.laplacian.startswith("domain:")
        require(from_file or o.laplacian in ("chain", "learned"),
                f"laplacian={o.laplacian} is none of chain, learned and domain:FILE")
        require(o.laplacian == "chain" or o.coordinate == "rayleigh",
                f"there is no laplacian {where}; leave it out or give coordinate=rayleigh")
        require(o.tau in ("fixed", "file"), f"tau={o.tau} is none of fixed and file")
        require(o.tau == "fixed" or from_file,
                "tau=file is read with the Laplacian; give laplacian=domain:FILE too")

        # the distance
        require(o.quantize_bins == 0 or o.quantize_bins >= 2,
                f"quantize_bins={o.quantize_bins}: give at least 2 bins, or 0 for none")
        require(o.coordinate != "none" or o.temperature == "fixed",
                f"there is no temperature {where}, which has no distance term; leave it out")
        require(o.coordinate != "none" or not o.quantize_bins,
                f"there is nothing to quantize {where}; leave quantize_bins out")

    def resolve(self) -> "Options":
        """Return a copy with the preset's values for what is left to it."""
        result = copy(self)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == "preset":
                setattr(result, name, value)
        if not self.head_dim and not self.heads:
            result.head_dim = PRESETS[self.preset]["head_dim"]
        return result


# ---- Laplacians -------------------------------------------------------------


def chain_laplacian(n: int) -> Tensor:
    """Return the Laplacian (n, n) of the graph in which every channel is joined to the next."""
    links = torch.diag(torch.ones(n - 1), 1)
    links = links + links.T
    return torch.diag(links.sum(0)) - links


def unpacked_size(path: str) -> int:
    """Return the bytes of a zip archive's files when unpacked; 0 for what is no archive, which its reader will say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except Exception:  # of the disk or the archive
        return 0


def read_laplacian(path: str) -> np.ndarray:
    """
    Return the array (D, D), float64, of a file as the docstring above describes it. RunError for a file that cannot be
    read or holds no Laplacian.
    """
    size, name = unpacked_size(path), f"laplacian=domain:{path}"
    require(size <= MAX_BYTES, f"{name} unpacks to {size:,} bytes, more than the {MAX_BYTES:,} that such a file may "
                               "have; give another file")
    try:
        with np.load(path) as file:
            laplacian = file["laplacian"].astype(np.float64)
            provenance = json.loads(str(file["provenance"]))
    except Exception as error:  # of the disk, the archive, the arrays or the JSON
        raise RunError(f"{name} cannot be read ({type(error).__name__}); give an .npz file with the arrays laplacian "
                       "and provenance (JSON)") from None
    require(isinstance(provenance, dict) and provenance,
            f"{name} has no provenance; store a JSON object that says what the graph was made from")

    # symmetric, and no eigenvalue below 0
    is_square = laplacian.ndim == 2 and laplacian.shape[0] == laplacian.shape[1]
    require(is_square and np.isfinite(laplacian).all() and np.allclose(laplacian, laplacian.T, rtol=1e-5),
            f"{name} holds an array of shape {laplacian.shape} that is not square, finite and symmetric; make it again")
    eigenvalues = np.linalg.eigvalsh(laplacian)
    least, most = eigenvalues[0], eigenvalues[-1]
    require(least >= -1e-5 * most and most > 0, f"{name} has eigenvalues from {least:.3g} on, a Laplacian's are 0 and "
                                                "above, not all 0; make it again")
    return laplacian


def read_tau(path: str) -> float:
    """Return the array tau of a readable file. RunError if it has none above 0."""
    with np.load(path) as file:
        tau = float(file["tau"]) if "tau" in file and file["tau"].shape == () else 0.0
    require(0 < tau < math.inf,
            f"laplacian=domain:{path} holds no tau above 0; make it by data/manifold.py or leave tau=file out")
    return tau


# ---- The layer --------------------------------------------------------------


def choose_heads(config: Config, layer: int, options: Options) -> tuple[int, int]:
    """Return (heads, head_dim) of a layer. RunError for what does not fit the model."""
    width = config.heads * config.head_dim
    head_dim = options.head_dim or (width // options.heads if options.heads else config.head_dim)
    heads = options.heads or width // head_dim
    is_rayleigh = options.coordinate == "rayleigh"

    prefix = "variant topological_attention:"
    require((options.heads and options.head_dim) or heads * head_dim == width,
            f"{prefix} heads={options.heads},head_dim={options.head_dim} do not divide the width {width}; give both")
    value_width = config.key_heads * config.head_dim
    require(heads * head_dim == value_width or train_gpt.value_table(config, layer) is None,
            f"{prefix} value embeddings need heads x head_dim = {value_width}, got {heads} x {head_dim}; or use "
            "--value_embeddings 0")
    require(not is_rayleigh or config.rope == "none" or head_dim % 4 == 0,
            f"{prefix} head_dim={head_dim} is not a multiple of 4, as rotary positions need; choose another, "
            "coordinate=linear or --rope none")
    require(not is_rayleigh or head_dim >= 2, f"{prefix} coordinate=rayleigh needs at least 2 channels a head")
    return heads, head_dim


def quantize(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return x rounded to the nearest of `bins` equally spaced values from low to high; the gradient is that of x."""
    step = (high - low) / (bins - 1)
    return (low + step * ((x - low) / step).round().clamp(0, bins - 1)).detach() + (x - x.detach())


class TopologicalAttention(train_gpt.CausalSelfAttention):
    """
    forward(x (B, T, model_dim), ctx) returns a tensor of the same shape. options: resolved; domain: the stored
    Laplacian, if they name one. Coordinates, decay and biases are float32 at least: a coordinate of 100 in bfloat16
    would be off by a quarter, and e^-|a - b| with it.
    """

    def __init__(self, config: Config, layer: int, options: Options, domain: np.ndarray | None):
        heads, head_dim = choose_heads(config, layer, options)
        super().__init__(replace(config, heads=heads, head_dim=head_dim, kv_heads=0, channel_scales=False), layer)
        self.options = options
        width = config.model_dim

        def linear(role: str, n_out: int, is_wanted: bool) -> nn.Module | None:
            return train_gpt.Linear(config, layer, role, width, n_out) if is_wanted else None

        # coordinates
        if options.coordinate == "rayleigh":
            self._init_rayleigh(config, head_dim, domain)
        else:
            self.q = None
            self.k = None
        if options.coordinate == "linear":
            # (2 H, model_dim), of queries and of keys: of unit variance for a normalised x; one Adam step turns a
            # vector as far, whatever the model's width
            self.coordinates = nn.Parameter(torch.empty(2 * heads, width))
            self.coordinates.init_std = width ** -0.5
            self.coordinates.optimizer = "adam"
            self.coordinates.lr_mul = width ** -0.5

        # (H,) log t; None: t = 1
        per_head = options.temperature == "per_head"
        self.log_temperature = nn.Parameter(torch.zeros(heads)) if per_head else None

        # d (H,) and w (H, model_dim) of the forget gate; None: no decay, and slopes alone
        self.forget_bias = None
        if options.decay != "none":
            slopes = [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
            self.forget_bias = nn.Parameter(torch.tensor([-math.log(math.expm1(slope)) for slope in slopes]))
        self.forget = linear("gate", heads, options.decay == "data")

        # None where the option is off
        self.key_bias = linear("gate", heads, options.key_bias == "on")
        self.output_gate = linear("fc", heads * head_dim, options.gate == "output")

        # the convolution's (taps, model_dim); None: no convolution
        self.taps = None
        if options.short_conv:
            self.taps = nn.Parameter(F.pad(torch.ones(1, width), (0, 0, options.short_conv - 1, 0)))
            self.taps.optimizer = "adam"

    def _init_rayleigh(self, config: Config, head_dim: int, domain: np.ndarray | None):
        if domain is not None:
            n = len(domain)
            require(n == head_dim, f"variant topological_attention: laplacian={self.options.laplacian} is of {n} "
                                   f"channels, a head has {head_dim}; give head_dim={n} and heads=")

        # L, or the places and the weights of its links above the diagonal
        if self.options.laplacian == "learned":
            first, second = torch.triu_indices(head_dim, head_dim, 1)
            self.register_buffer("edges", first * head_dim + second, persistent=False)
            # softplus: 1 along the chain, 0.02 elsewhere
            self.edge_logits = nn.Parameter(torch.where(second == first + 1, math.log(math.e - 1), -4.0))
        else:
            laplacian = chain_laplacian(head_dim) if domain is None else torch.tensor(domain, dtype=torch.float32)
            self.register_buffer("laplacian", laplacian)

        # a narrower head turns as large a share of its pairs, from the same longest to the same shortest wavelength
        channels_a_pair = 2 if config.rope == "full" else 4
        n = config.head_dim // channels_a_pair
        pairs = min(head_dim, config.head_dim) // channels_a_pair
        columns = [round(i * (n - 1) / max(pairs - 1, 1)) for i in range(pairs)]
        chosen = None if columns == list(range(n)) else torch.tensor(columns, dtype=torch.int64)  # None: all
        self.register_buffer("rotary_columns", chosen, persistent=False)

    def rayleigh(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """
        Return the coordinates (B, T, n) of queries and keys x (B, T, n, D). Their length, and so QK-norm, makes no
        difference to a quotient.
        """
        if ctx.rotary is not None:
            rotary = ctx.rotary
            if self.rotary_columns is not None:
                rotary = tuple(table[:, self.rotary_columns] for table in rotary)
            x = train_gpt.rotate(x, rotary)
        x, n = wide(x), x.shape[-1]

        # L
        if self.options.laplacian == "learned":
            weights = F.softplus(self.edge_logits).type_as(x)
            links = x.new_zeros(n * n).scatter(0, self.edges, weights).view(n, n)
            links = links + links.T
            laplacian = torch.diag(links.sum(0)) - links
        else:
            laplacian = self.laplacian.type_as(x)

        energy = ((x @ laplacian) * x).sum(-1).clamp_min(0)
        return energy / (energy + x.square().sum(-1) + 1e-6)

    def coordinates_and_values(self, x: Tensor, x_wide: Tensor, ctx: AttentionContext) -> tuple:
        """Return a and b (B, T, H), None without a distance term, and v (B, T, H, D) without its embedding."""
        a, b, o = None, None, self.options
        if o.coordinate == "rayleigh":
            q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
            a, b = self.rayleigh(torch.cat((q, k), 2), ctx).chunk(2, dim=2)
        else:
            v = self.v(x).unflatten(-1, (-1, self.config.head_dim))
        if o.coordinate == "linear":
            a, b = F.linear(x_wide, self.coordinates.type_as(x_wide)).chunk(2, dim=-1)
        if o.quantize_bins:
            b = quantize(b, o.quantize_bins, *BIN_RANGES[o.coordinate])
        if self.log_temperature is not None:
            a, b = (t * torch.exp(-self.log_temperature) for t in (a, b))
        return a, b, v

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        mask = ctx.mask
        if self.taps is not None:
            earlier = None if mask.cache is None else mask.cache.with_earlier(x, len(self.taps) - 1)
            x = short_convolution(x, self.taps.type_as(x), mask.positions, earlier)

        # what scores are made of
        x_wide = wide(x)
        a, b, v = self.coordinates_and_values(x, x_wide, ctx)
        log_decay = None
        if self.forget_bias is not None:
            logits = self.forget_bias if self.forget is None else self.forget(x_wide) + self.forget_bias
            log_decay = F.logsigmoid(logits).expand(*x.shape[:2], self.config.heads)
        key_bias = None if self.key_bias is None else self.key_bias(x_wide)
        v = self.mix_value(v, ctx)

        # the mean of the values
        if mask.cache is None:
            y = topological_attention(a, b, v, log_decay=log_decay, key_bias=key_bias, doc_start=mask.doc_start,
                                      window=mask.window)
        else:
            y = self.cached_scores(mask.cache).attend(a, b, v, log_decay, key_bias, mask.positions, mask.first_key,
                                                      mask.window)

        y = self.gate_heads(y, x)
        if self.output_gate is not None:
            y = y * (2 * torch.sigmoid(self.output_gate(x)))
        return self.o(y)

    def cached_scores(self, cache) -> TopologicalCache:
        """Return what the layer's cache keeps of earlier keys, made by the first call."""
        require(not cache.bins or self.log_temperature is None,
                "variant topological_attention: bins are equally far apart for all heads, which temperature=per_head "
                "is not; decode without bins")
        low, high = BIN_RANGES.get(self.options.coordinate, (None, None))
        return cache.part("scores", lambda: TopologicalCache(cache.bins, low, high))


def patch(options: Options):
    domain, path = None, options.laplacian.removeprefix("domain:")
    if path != options.laplacian:
        domain = read_laplacian(path)
        if options.tau == "file":  # E / (E + tau), as E is linear in L
            domain = domain / read_tau(path)
    train_gpt.CausalSelfAttention = partial(TopologicalAttention, options=options.resolve(), domain=domain)
