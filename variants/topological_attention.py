"""
Topological (scalar-key) attention: a score is minus the distance of two scalars, one of the query and one of the key.

    s_ij = -|a_i - b_j| / t + F_i - F_j + c_j        p_ij = softmax of s_ij over the keys j that query i may see        y_i = sum_j p_ij v_j

a, b, F, c (B, T, H) float32: coordinates of queries and keys, running sum of the log-decay, bias of the keys; t a temperature for each head; v and y
(B, T, H, D). Values, value embedding, sparse output gate and output projection are the baseline's. The options, each a choice of its own:

    coordinate     rayleigh: E / (E + tau) with E = x'Lx / (x'x + 1e-6), of the rotated q and k of a head, in [0, 1); linear: a learned vector for
                   each head, times x; none: no distance term, which makes the attention a weighted mean of the past
    laplacian      L (D, D): chain (-1 between neighbouring channels, degrees on the diagonal); learned (a positive weight, by softplus, between any two
                   channels, starting near the chain); domain:FILE, an .npz file with the arrays laplacian (D, D) and provenance, a JSON object that says what
                   it was made from. The checkpoint keeps a copy of L, but to build the model the file must be there
    tau            fixed: 1; file: the file's array tau, a typical E of the vectors that L was made from (data/manifold.py)
    temperature    fixed: t = 1; per_head: learned, starting there
    decay          none: F = 0; per_head: a learned slope a head; data: a forget gate, F_i = sum over t <= i of log sigmoid(w.x_t + d) with w starting at zero.
                   Both start from the slopes 2^(-8 h / H), h = 1 .. H
    heads          number of heads; head_dim: their width. One of them alone keeps the product of the two; 0: the preset's, else the trainer's
    short_conv     taps of a causal convolution of each channel on the attention's input, starting as the identity; it stays in the document
    gate           output: every channel of y is multiplied by 2 sigmoid(w.x)
    key_bias       on: c_j = w.x_j, starting at zero
    quantize_bins  b is rounded to the nearest of so many equally spaced values, in [0, 1] with rayleigh and [-8, 8] with linear, gradients passing
                   straight through (0: off)

Presets supply what is left at "preset" or 0. faithful: the seed idea, everything off. fast: linear coordinates, forget gate, heads of 8 channels,
convolution of 4 taps. key_only, the control of fast: the same without the distance term, with a key bias in its place. The control of both for what a
decay alone gives is the variant forgetting_attention.

Cost: no product of queries with keys; the attention takes O(T log T) or less (kernels/topological_attention). Parameters: with linear coordinates
q and k (2 H D model_dim) give way to 2 H model_dim; the forget gate and the key bias take H model_dim each. A new window compiles the layer anew.

Source: Moriondo, Topological Transformer, TechRxiv 176800983.30631144, github.com/tuned-org-uk/tauformer; slopes: Press et al., ALiBi, 2021,
arxiv.org/abs/2108.12409; forget gate: Lin et al., Forgetting Transformer, 2025, arxiv.org/abs/2503.02130; convolution: Fu et al., H3, 2022,
arxiv.org/abs/2212.14052; straight-through gradient: Bengio et al., 2013, arxiv.org/abs/1308.3432; linear coordinates and the combination: ours
Status: mixed. At equal tokens worse than the baseline on track cpu (faithful +0.50, fast +0.10 nats), better in English rows of 1,024 without windows (fast -0.14); there at
equal time on a CPU fast -0.52, its control key_only -0.62; variants/README.md
"""

import json, math, zipfile
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.short_convolution import short_convolution
from kernels.topological_attention import topological_attention
from kernels.topological_attention.cache import TopologicalCache
from train_gpt import AttentionContext, Config, RunError

OFF = dict(coordinate="rayleigh", temperature="fixed", decay="none", head_dim=0, short_conv=0, gate="none", key_bias="off")
FAST = dict(coordinate="linear", decay="data", head_dim=8, short_conv=4)
PRESETS = dict(faithful=OFF, fast=OFF | FAST, key_only=OFF | FAST | dict(coordinate="none", key_bias="on"))
BIN_RANGES = dict(rayleigh=(0.0, 1.0), linear=(-8.0, 8.0))

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
        o = self.resolved()
        where = f"with coordinate={o.coordinate}"
        faults = [
            (o.heads < 0 or o.head_dim < 0, f"heads={o.heads},head_dim={o.head_dim}: give positive numbers, or 0 for the preset's"),
            (o.laplacian not in ("chain", "learned") and not o.laplacian.startswith("domain:"), f"laplacian={o.laplacian} is none of chain, learned and domain:FILE"),
            (o.laplacian != "chain" and o.coordinate != "rayleigh", f"there is no laplacian {where}; leave it out or give coordinate=rayleigh"),
            (o.tau not in ("fixed", "file"), f"tau={o.tau} is none of fixed and file"),
            (o.tau == "file" and not o.laplacian.startswith("domain:"), "tau=file is read with the Laplacian; give laplacian=domain:FILE too"),
            (o.quantize_bins < 0 or o.quantize_bins == 1, f"quantize_bins={o.quantize_bins}: give at least 2 bins, or 0 for none"),
            (o.coordinate == "none" and o.temperature != "fixed", f"there is no temperature {where}, which has no distance term; leave it out"),
            (o.coordinate == "none" and o.quantize_bins, f"there is nothing to quantize {where}; leave quantize_bins out")]
        if message := next((message for fault, message in faults if fault), None):
            raise ValueError(message)

    def resolved(self) -> "Options":
        """A copy with the preset's values for what is left to it."""
        result = copy(self)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == "preset" or name == "head_dim" and not self.head_dim and not self.heads:
                setattr(result, name, value)
        return result

def chain_laplacian(n: int) -> Tensor:
    """(n, n): the graph in which every channel is joined to the next."""
    links = torch.diag(torch.ones(n - 1), 1)
    links = links + links.T
    return torch.diag(links.sum(0)) - links

MOST_BYTES = 2 ** 31  # of a file's arrays: a few kilobytes of compressed zeros must not fill the memory

def unpacked_size(path: str) -> int:
    """Bytes of a zip archive's files when they are unpacked; 0 for what is no archive, which its reader will say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except Exception:  # of the disk or the archive
        return 0

def read_laplacian(path: str) -> np.ndarray:
    """The (F, F) float64 array of a file as the docstring above describes it. ValueError if it is no such file, or holds no Laplacian."""
    size = unpacked_size(path)
    if size > MOST_BYTES:
        raise ValueError(f"laplacian=domain:{path} unpacks to {size:,} bytes, more than the {MOST_BYTES:,} that such a file may have; give another file")
    try:
        with np.load(path) as file:
            laplacian, provenance = file["laplacian"].astype(np.float64), json.loads(str(file["provenance"]))
    except Exception as error:  # of the disk, the archive, the arrays or the JSON
        raise ValueError(f"laplacian=domain:{path} cannot be read ({type(error).__name__}); give an .npz file with the arrays laplacian and provenance (JSON)") from None
    if not isinstance(provenance, dict) or not provenance:
        raise ValueError(f"laplacian=domain:{path} has no provenance; store a JSON object that says what the graph was made from")
    if laplacian.ndim != 2 or laplacian.shape[0] != laplacian.shape[1] or not np.isfinite(laplacian).all() or not np.allclose(laplacian, laplacian.T, rtol=1e-5):
        raise ValueError(f"laplacian=domain:{path} holds an array of shape {laplacian.shape} that is not square, finite and symmetric; make it again")
    eigenvalues = np.linalg.eigvalsh(laplacian)
    if eigenvalues[0] < -1e-5 * eigenvalues[-1] or eigenvalues[-1] <= 0:
        raise ValueError(f"laplacian=domain:{path} has eigenvalues from {eigenvalues[0]:.3g} on, a Laplacian's are 0 and above, not all 0; make it again")
    return laplacian

def read_tau(path: str) -> float:
    """The array tau of a readable file. ValueError if it has none above 0."""
    with np.load(path) as file:
        tau = float(file["tau"]) if "tau" in file and file["tau"].shape == () else 0.0
    if not 0 < tau < math.inf:
        raise ValueError(f"laplacian=domain:{path} holds no tau above 0; make it by data/manifold.py or leave tau=file out")
    return tau

def shape_of_heads(config: Config, layer: int, options: Options) -> tuple[int, int]:
    """(heads, head_dim) of a layer. RunError for what does not fit the model."""
    width = config.heads * config.head_dim
    head_dim = options.head_dim or (width // options.heads if options.heads else config.head_dim)
    heads = options.heads or width // head_dim
    turning = options.coordinate == "rayleigh" and config.rope != "none"
    faults = [
        (not (options.heads and options.head_dim) and heads * head_dim != width, f"heads={options.heads},head_dim={options.head_dim} do not divide the width {width}; give both"),
        (heads * head_dim != config.model_dim and train_gpt.value_table(config, layer) is not None,
         f"value embeddings need heads x head_dim = model_dim, got {heads} x {head_dim} and {config.model_dim}; or use --value_embeddings 0"),
        (turning and head_dim % 4, f"head_dim={head_dim} is not a multiple of 4, as rotary positions need; choose another, coordinate=linear or --rope none"),
        (options.coordinate == "rayleigh" and head_dim < 2, "coordinate=rayleigh needs at least 2 channels a head")]
    if message := next((message for fault, message in faults if fault), None):
        raise RunError(f"variant topological_attention: {message}")
    return heads, head_dim

def wide(x: Tensor) -> Tensor:
    """At least float32: a coordinate of 100 in bfloat16 would be off by a quarter, and e^-|a - b| with it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def quantize(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """x rounded to the nearest of `bins` equally spaced values from low to high; the gradient is that of x."""
    step = (high - low) / (bins - 1)
    return (low + step * ((x - low) / step).round().clamp(0, bins - 1)).detach() + (x - x.detach())

class TopologicalAttention(train_gpt.CausalSelfAttention):
    """forward(x (B, T, model_dim), ctx) -> same shape. options: resolved; domain: the stored Laplacian, if they name one."""
    def __init__(self, config: Config, layer: int, options: Options, domain: np.ndarray | None):
        heads, head_dim = shape_of_heads(config, layer, options)
        super().__init__(replace(config, heads=heads, head_dim=head_dim), layer)
        self.options, n = options, config.model_dim
        if options.coordinate == "rayleigh":
            self._init_rayleigh(config, head_dim, domain)
        else:
            self.q = self.k = None
        if options.coordinate == "linear":
            # of unit variance for a normalised x; one Adam step turns a vector as far, whatever the model's width
            self.coordinates = nn.Parameter(torch.empty(2 * heads, n))
            self.coordinates.init_std, self.coordinates.optimizer, self.coordinates.lr_mul = n ** -0.5, "adam", n ** -0.5
        self.log_temperature = nn.Parameter(torch.zeros(heads)) if options.temperature == "per_head" else None
        slopes = [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
        self.forget_bias = nn.Parameter(torch.tensor([-math.log(math.expm1(slope)) for slope in slopes])) if options.decay != "none" else None
        self.forget = train_gpt.Linear(config, layer, "gate", n, heads) if options.decay == "data" else None
        self.key_bias = train_gpt.Linear(config, layer, "gate", n, heads) if options.key_bias == "on" else None
        self.output_gate = train_gpt.Linear(config, layer, "fc", n, heads * head_dim) if options.gate == "output" else None
        self.taps = None
        if options.short_conv:
            self.taps = nn.Parameter(F.pad(torch.ones(1, n), (0, 0, options.short_conv - 1, 0)))
            self.taps.optimizer = "adam"

    def _init_rayleigh(self, config: Config, head_dim: int, domain: np.ndarray | None):
        if domain is not None and len(domain) != head_dim:
            raise RunError(f"variant topological_attention: laplacian={self.options.laplacian} is of {len(domain)} channels, a head has {head_dim}; give head_dim={len(domain)} and heads=")
        if self.options.laplacian == "learned":
            first, second = torch.triu_indices(head_dim, head_dim, 1)
            self.register_buffer("edges", first * head_dim + second, persistent=False)
            # softplus: 1 along the chain, 0.02 elsewhere
            self.edge_logits = nn.Parameter(torch.where(second == first + 1, math.log(math.e - 1), -4.0))
        else:
            self.register_buffer("laplacian", chain_laplacian(head_dim) if domain is None else torch.tensor(domain, dtype=torch.float32))
        # a narrower head turns as large a part of its pairs, from the same longest to the same shortest wavelength
        n, pairs = (width // (2 if config.rope == "full" else 4) for width in (config.head_dim, min(head_dim, config.head_dim)))
        columns = [round(i * (n - 1) / max(pairs - 1, 1)) for i in range(pairs)]
        self.register_buffer("rotary_columns", None if columns == list(range(n)) else torch.tensor(columns, dtype=torch.int64), persistent=False)

    def rayleigh(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """The coordinates (B, T, n) of queries and keys x (B, T, n, D); their length, and so QK-norm, makes no difference to a quotient."""
        if ctx.rotary is not None:
            x = train_gpt.rotate(x, ctx.rotary if self.rotary_columns is None else tuple(table[:, self.rotary_columns] for table in ctx.rotary))
        x, n = wide(x), x.shape[-1]
        if self.options.laplacian == "learned":
            links = x.new_zeros(n * n).scatter(0, self.edges, F.softplus(self.edge_logits).type_as(x)).view(n, n)
            links = links + links.T
            laplacian = torch.diag(links.sum(0)) - links
        else:
            laplacian = self.laplacian.type_as(x)
        energy = ((x @ laplacian) * x).sum(-1).clamp_min(0)
        return energy / (energy + x.square().sum(-1) + 1e-6)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        if self.taps is not None:
            x = short_convolution(x, self.taps.type_as(x), ctx.positions, None if ctx.cache is None else ctx.cache.with_earlier(x, len(self.taps) - 1))
        x_wide, a, b = wide(x), None, None
        if self.options.coordinate == "rayleigh":
            q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
            a, b = self.rayleigh(torch.cat((q, k), 2), ctx).chunk(2, dim=2)
        else:
            v = self.v(x).unflatten(-1, (-1, self.config.head_dim))
        if self.options.coordinate == "linear":
            a, b = F.linear(x_wide, self.coordinates.type_as(x_wide)).chunk(2, dim=-1)
        if self.options.quantize_bins:
            b = quantize(b, self.options.quantize_bins, *BIN_RANGES[self.options.coordinate])
        if self.log_temperature is not None:
            a, b = (t * torch.exp(-self.log_temperature) for t in (a, b))
        log_decay = None
        if self.forget_bias is not None:
            logits = self.forget_bias if self.forget is None else self.forget(x_wide) + self.forget_bias
            log_decay = F.logsigmoid(logits).expand(*x.shape[:2], self.config.heads)
        key_bias = None if self.key_bias is None else self.key_bias(x_wide)
        v = self.mix_value(v, ctx)
        if ctx.cache is None:
            y = topological_attention(a, b, v, log_decay=log_decay, key_bias=key_bias, doc_start=ctx.doc_start, window=ctx.window)
        else:
            if ctx.cache.bins and self.log_temperature is not None:
                raise RunError("variant topological_attention: bins are equally far apart for all heads, which temperature=per_head is not; decode without bins")
            cache = ctx.cache.part("scores", lambda: TopologicalCache(ctx.cache.bins, *BIN_RANGES.get(self.options.coordinate, (None, None))))
            y = cache.attend(a, b, v, log_decay, key_bias, ctx.positions, ctx.first_key, ctx.window)
        y = self.gate_heads(y, x)
        if self.output_gate is not None:
            y = y * (2 * torch.sigmoid(self.output_gate(x)))
        return self.o(y)

def patch(options: Options):
    domain, path = None, options.laplacian.removeprefix("domain:")
    if path != options.laplacian:
        domain = read_laplacian(path)
        if options.tau == "file":  # E / (E + tau), as E is linear in L
            domain = domain / read_tau(path)
    train_gpt.CausalSelfAttention = partial(TopologicalAttention, options=options.resolved(), domain=domain)
