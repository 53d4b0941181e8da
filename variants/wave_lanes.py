"""
Wave lanes: fixed filters over time side by side, Chebyshev polynomials, cosine waves and wavelets, mixed by a gate, in
place of attention, of attention and feed-forward, or of the model.

A lane sums a document's tokens with weights that do not look at the data, the same for all its channels. p_t is token
t's place in its document, every sum stays in the document, u (B, T, w) is the lane's input:

    poly       sum over k < K of T_k(z_t) sum over s <= t of T_k(z_s) u_s       z_t in [-1, 1] grows with p_t
    fourier    sum over s <= t of kappa(t - s) u_s        kappa(d) = sum over f of g_f cos(2 pi nu_f d) e^{-a_f d}
    wavelet    low_l = (low_{l-1} of t + low_{l-1} of t - 2^(l-1)) / 2, low_0 = u: means of 2, 4, .. 2^L tokens
    recall     sum over s of d^(t - s) phi(q_t).phi(k_s) v_s over the same without v_s, phi(x) = elu(x) + 1
    attention  softmax attention;  conv: 8 taps for each channel;  token: the token itself

The packings, whose lanes' filters commute with matrices over the channels:

    attention   replaces attention: each lane has a matrix into its channels, its filter, RMSNorm and a matrix out. A
                wavelet lane has L + 1 bands, one for each low_l, which are added. An elementwise gate, 2 sigmoid(W x)
    block       the same with GELU after the norm, a softmax gate over lanes, convolutions of the layer's input and
                output; it replaces the feed-forward, too
    faithful    the published model: one layer between embeddings of tokens and positions and a head; each lane reads
                the stream, has a matrix and an MLP of its own; dense convolutions; a gate that reads all lanes

The options, "preset" and 0 meaning the packing's own:

    lanes         names of lanes, joined by commas
    K, F, L       polynomials; frequencies; levels of the wavelet
    freqs         harmonic: nu_f = f / S, up to half a turn a token; log: wavelengths from S down to 4 tokens
    decay         learned: a_f, from 1 / S on, for each frequency; none: 0
    gains         g_f: shared by all channels, per_head (as many as the attention's), or frozen at 1
    s_ref_poly, s_ref_fourier   S: tokens that z's grid spans (0: a row), and the longest wave (0: two rows)
    poly_grid     z = -1 + 2 p / (S - 1), or log: -1 + 2 ln(1 + p) / ln S. Behind S a token counts as the last one
    basis         chosen, or random features of equal number, which is a control
    mean          poly and fourier are divided by p_t + 1; linf: poly's input by its token's largest channel
    lane_norm     RMSNorm after the filter
    context_conv  of conv_k taps, u + GELU(conv(u) + b): none, depthwise or dense
    gate          softmax_mlp: reads the lanes; softmax_linear: reads the layer's input; elementwise. gate_map: one of
                  kernels/probability_maps in place of softmax, or, as controls, uniform: equal weights, top1: all of
                  the lane with the largest logit. New gates begin equal for all lanes
    lane_dropout  probability that a row does without a lane in training; dropout of the MLPs and convolutions (-1: the
                  packing's)
    diversity     none, cosine or energy: diversity_weight times the mean cosine of the lanes' outputs, or the spread of
                  their energies, is added to the training loss
    recall_features, recall_decay, recall_heads
    attention_every   n: every n-th layer keeps the trainer's attention and feed-forward (0: none does)
    widths        matched: lanes are as wide as bring the layer to its packing's parameters, 4 or 12 model_dim^2; fixed:
                  as wide as they are among poly, fourier and wavelet
    depth, residual   of faithful: shallow, standard or deep MLPs of 1 to 3 hidden layers; on: the stream is added
    kernel        of poly and fourier: auto, triton, loops, torch, dense, or banded: fourier up to the layer's window.
                  chunk and segment: its tokens (0: the kernel's)
    faithful      S is the length of the row that is read, as published: what a prefix means depends on what follows.
                  For reproduction only

Every other lane sees all of its document, whatever the layer's window. set_lanes(model, names) leaves the others out of
a model that is trained. Widths are multiples of 16, the wavelet's of 4, which gets what the others leave; at 384 and
768 channels a layer has 4 or 12 model_dim^2 to the number.

Cost a token and channel: fourier 4 F + C / 2 multiply-adds in chunks of C, poly 4 K + C / 2, both linear in the row.
Decoding keeps (2 F + K + 2^L) numbers a channel at the most, whatever came before.

Source: jefflinwood/wavestack-hybrid; recall: Katharopoulos et al., 2020, arxiv.org/abs/2006.16236. Constant S, norms,
both packings of layers and the kernels are ours
Status: unmeasured
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from kernels.gated_linear_attention import gated_linear_attention
from kernels.lane_scan import (
    chebyshev_table,
    harmonic_frequencies,
    lane_scan,
    lane_scan_step,
    logarithmic_frequencies,
)
from kernels.probability_maps import MAPS, probability_map
from kernels.short_convolution import short_convolution
from train_gpt import AttentionContext, AttentionMask, Config, require

LANES = ("poly", "fourier", "wavelet", "recall", "attention", "conv", "token")
KERNELS = dict(auto="auto", triton="triton", loops="loops", torch="chunked", dense="reference", banded="banded")
DEPTHS = dict(shallow=1, standard=2, deep=3)
CONTROLS = ("uniform", "top1")      # of gates, in place of a probability map
WORDS = dict(       # option -> what it may be
    basis=("chosen", "random"),
    lane_norm=("preset", "on", "off"),
    gate_map=(*MAPS, *CONTROLS),
    diversity=("none", "cosine", "energy"),
    widths=("matched", "fixed"),
    depth=DEPTHS,
    residual=("on", "off"),
    kernel=KERNELS,
)
TAPS = 8            # of the conv lane
SHORTEST = 4        # tokens of the shortest wave on the logarithmic scale
PRESETS = dict(     # packing -> what is left to it
    attention=dict(lane_norm="on", context_conv="none", gate="elementwise", dropout=0.0),
    block=dict(lane_norm="on", context_conv="depthwise", gate="softmax_linear", dropout=0.0),
    faithful=dict(lane_norm="off", context_conv="dense", gate="softmax_mlp", dropout=0.1),
)
NAME = "variant wave_lanes:"


@dataclass
class Options:
    pack: Literal["attention", "block", "faithful"] = "attention"
    lanes: str = "poly,fourier,wavelet"
    K: int = 4
    F: int = 64
    L: int = 3
    freqs: Literal["harmonic", "log"] = "harmonic"
    decay: Literal["none", "learned"] = "none"
    gains: Literal["shared", "per_head", "frozen"] = "shared"
    s_ref_poly: int = 0
    s_ref_fourier: int = 0
    poly_grid: Literal["linear", "log"] = "linear"
    basis: str = "chosen"
    mean: bool = True
    linf: bool = True
    lane_norm: str = "preset"
    context_conv: Literal["preset", "none", "depthwise", "dense"] = "preset"
    conv_k: int = 3
    gate: Literal["preset", "softmax_mlp", "softmax_linear", "elementwise"] = "preset"
    gate_map: str = "softmax"
    lane_dropout: float = 0.0
    dropout: float = -1.0
    diversity: str = "none"
    diversity_weight: float = 0.1
    recall_features: int = 64
    recall_decay: float = 0.98
    recall_heads: int = 1
    attention_every: int = 0
    widths: str = "matched"
    depth: str = "shallow"
    residual: str = "off"
    kernel: str = "auto"
    chunk: int = 0
    segment: int = 0
    faithful: bool = False

    def __post_init__(self):
        # lanes
        names = self.lanes.split(",")
        unknown = [name for name in names if name not in LANES]
        require(not unknown, f"lanes={self.lanes}: there is no lane {unknown and unknown[0]!r}; there are "
                             f"{', '.join(LANES)}")
        require(len(set(names)) == len(names), f"lanes={self.lanes} names a lane twice; name it once")

        # words
        for key, choices in WORDS.items():
            require(getattr(self, key) in choices, f"{key}={getattr(self, key)} is none of {', '.join(choices)}")

        # numbers
        for key in ("K", "F", "L", "recall_heads"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: give at least 1")
        require(self.L <= 8, f"L={self.L}: the widest mean has 2^L tokens; give at most 8")
        require(self.conv_k in (3, 4), f"conv_k={self.conv_k}: give 3 or 4 taps")
        for key in ("s_ref_poly", "s_ref_fourier", "attention_every", "chunk", "segment", "recall_features"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}: give a positive number, or 0")
        require(0 < self.recall_decay <= 1, f"recall_decay={self.recall_decay} is not in (0, 1]; 1 forgets nothing")
        require(0 <= self.lane_dropout < 1 and self.dropout < 1,
                f"lane_dropout={self.lane_dropout},dropout={self.dropout}: probabilities are below 1")
        require(self.pack != "faithful" or not self.attention_every,
                "attention_every is of packings with several layers; leave it out or give pack=attention")
        require(self.pack == "faithful" or self.residual == "off" and self.depth == "shallow",
                "residual and depth are of pack=faithful; leave them out")

    def resolve(self) -> "Options":
        """Return a copy with the packing's values for what is left to it."""
        preset = PRESETS[self.pack]
        chosen = {name: value for name, value in preset.items() if getattr(self, name) in ("preset", -1.0)}
        return replace(self, **chosen)

    @property
    def names(self) -> list[str]:
        return self.lanes.split(",")


# ---- What a lane keeps of a text's earlier tokens ---------------------------


class Memory:
    """The state of a filter; .bytes_kept does not depend on how many tokens came before."""

    def __init__(self):
        self.state = None   # a tensor, (B, ...); None before the first token

    @property
    def bytes_kept(self) -> int:
        return 0 if self.state is None else self.state.nbytes


def convolve(u: Tensor, taps: Tensor, mask: AttentionMask, name: str) -> Tensor:
    """Return the sums of u (B, T, C) over a few tokens, taps (n, C), in the document; name: of the layer's memory."""
    earlier = None if mask.cache is None else mask.cache.with_earlier(u, len(taps) - 1, name)
    return short_convolution(u, taps.type_as(u), mask.positions, earlier)


def shift(u: Tensor, steps: int, mask: AttentionMask, name: str) -> Tensor:
    """Return u (B, T, C) of `steps` tokens before, 0 before a document's first; name: of the layer's memory."""
    if mask.cache is None:
        earlier = F.pad(u, (0, 0, steps, 0))[:, :u.shape[1]]
    else:
        earlier = mask.cache.with_earlier(u, steps, name)[:, :u.shape[1]]
    return torch.where((mask.positions >= steps)[..., None], earlier, 0.0)


# ---- Filters ----------------------------------------------------------------
# forward(u (B, T, channels), ctx, x) -> (B, T, width), x (B, T, model_dim): what the lane's input was made of.


class PolyFilter(nn.Module):
    """K sums over the document, weighted by Chebyshev polynomials of both tokens' places."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        self.options = options
        s_ref = options.s_ref_poly or config.sequence_length
        require(options.faithful or s_ref >= config.sequence_length,
                f"{NAME} s_ref_poly={s_ref} is below the row length {config.sequence_length}, and polynomials are not "
                "continued; give at least that")
        table = chebyshev_table(options.K, s_ref, options.poly_grid)
        if options.basis == "random":
            table = torch.randn(s_ref, options.K, generator=generator(0), dtype=torch.float64, device="cpu").to(table)
        self.register_buffer("table", table)                        # (S, K) float64
        self.register_buffer("gain", torch.ones(options.K), persistent=False)

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        o, mask = self.options, ctx.mask
        if o.linf:
            u = u / x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        table = self.table
        if o.faithful:
            refuse_cache(mask)
            table = chebyshev_table(o.K, u.shape[1], o.poly_grid).to(u.device)
        if mask.cache is not None:
            memory = mask.cache.part("poly", Memory)
            y, memory.state = lane_scan_step(memory.state, u, table, self.gain, mask.positions, mean=o.mean)
            return y
        backend = "auto" if o.kernel == "banded" else KERNELS[o.kernel]
        return lane_scan(u, table, self.gain, doc_start=mask.doc_start, mean=o.mean, chunk=o.chunk, segment=o.segment,
                         backend=backend)


class FourierFilter(nn.Module):
    """A sum over the document, weighted by a sum of F waves of the distance."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        self.options = options
        rows = 2 if options.freqs == "harmonic" else 1
        self.s_ref = s_ref = options.s_ref_fourier or max(rows * config.sequence_length, SHORTEST)
        require(options.faithful or s_ref >= rows * config.sequence_length,
                f"{NAME} s_ref_fourier={s_ref} is below {rows} x the row length {config.sequence_length}: waves of "
                f"freqs={options.freqs} would count the first tokens as the last; give at least that")
        self.warned = False         # that a text is longer than half of the longest wave

        # frequencies (F,) float64, in turns a token
        frequencies = harmonic_frequencies(options.F, s_ref)
        if options.freqs == "log":
            require(s_ref >= SHORTEST, f"{NAME} s_ref_fourier={s_ref} is below the shortest wave, {SHORTEST} tokens; "
                                       "give at least that")
            frequencies = logarithmic_frequencies(options.F, s_ref, SHORTEST)
        if options.basis == "random":
            count = len(frequencies)
            drawn = torch.rand(count, generator=generator(1), dtype=torch.float64, device="cpu") / 2
            frequencies = drawn.to(frequencies)
        self.register_buffer("frequencies", frequencies)

        # g (F,) or (heads, F); b (the same shape), whose softplus is a; None: no decay
        heads = math.gcd(config.heads, width) if options.gains == "per_head" else 1
        gain = torch.ones(*((heads,) if heads > 1 else ()), len(frequencies))
        if options.gains == "frozen":
            self.register_buffer("gain", gain)
        else:
            self.gain = nn.Parameter(gain)
        self.decay = None
        if options.decay == "learned":
            self.decay = nn.Parameter(torch.full_like(gain, math.log(math.expm1(1 / s_ref))))

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        # the waves
        o, mask = self.options, ctx.mask
        frequencies, gain = self.frequencies, self.gain
        if o.faithful:
            refuse_cache(mask)
            frequencies = harmonic_frequencies(o.F, u.shape[1]).to(u.device)
            gain = gain[..., :len(frequencies)]
        decay = None if self.decay is None else F.softplus(self.decay[..., :len(frequencies)])

        # the sums
        if mask.cache is not None:
            self.check_length(mask.positions)
            memory = mask.cache.part("fourier", Memory)
            y, memory.state = lane_scan_step(memory.state, u, frequencies, gain, mask.positions, decay=decay,
                                             mean=o.mean)
            return y
        window = (mask.window or u.shape[1]) if o.kernel == "banded" else None
        return lane_scan(u, frequencies, gain, decay=decay, doc_start=mask.doc_start, mean=o.mean, window=window,
                         chunk=o.chunk, segment=o.segment, backend=KERNELS[o.kernel])

    def check_length(self, positions: Tensor):
        """Say once that a text has passed half of the longest wave, from where on its beginning counts as near."""
        if self.options.freqs == "harmonic" and not self.warned and 2 * int(positions.max()) > self.s_ref:
            train_gpt.say(f"wave_lanes: the text is longer than {self.s_ref // 2} tokens, half of s_ref_fourier; its "
                          "first tokens count as near ones again", stream=sys.stderr)
            self.warned = True


def refuse_cache(mask: AttentionMask):
    """TypeError, by which generate.py knows that a model runs whole texts, in the decoding of faithful=on."""
    if mask.cache is not None:
        raise TypeError("with faithful=on a token's waves depend on the row's length, which decoding does not know")


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


class WaveletFilter(nn.Module):
    """
    Means over 2, 4, .. 2^L tokens. Of L + 1 bands of u, the mean over 2^l tokens of band l, all added: as means are
    linear, band L joins band L - 1 before the means that both have.
    """

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        self.levels = options.L
        for level in range(options.L):
            taps = torch.zeros(2 ** level + 1, 1)
            taps[0], taps[-1] = 0.5, 0.5
            self.register_buffer(f"taps{level}", taps, persistent=False)

    def average(self, u: Tensor, level: int, mask: AttentionMask) -> Tensor:
        """Return (u_t + u_{t - 2^level}) / 2."""
        taps = getattr(self, f"taps{level}").expand(-1, u.shape[-1])
        return convolve(u, taps, mask, f"wavelet {level}")

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        *bands, y = u.chunk(self.levels + 1, -1)
        for level in reversed(range(self.levels)):
            y = bands[level] + self.average(y, level, ctx.mask)
        return y

    def features(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Return [low_1, x - low_1, .. low_L, x - low_L] (B, T, 2 L C) of x (B, T, C)."""
        low, features = x, []
        for level in range(self.levels):
            low = self.average(low, level, mask)
            features += [low, x - low]
        return torch.cat(features, -1)


class RecallFilter(nn.Module):
    """Linear attention with a decay; u has q and k of all heads, then v."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        require(width % options.recall_heads == 0,
                f"{NAME} recall_heads={options.recall_heads} do not divide the recall lane's width {width}; give "
                "another number")
        self.heads = options.recall_heads
        self.features = recall_features(options)        # channels of a head's queries and keys
        self.log_decay = math.log(options.recall_decay)

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        # phi(q), phi(k), and v with a column of ones, (B, T, H, ...)
        mask, M = ctx.mask, self.features
        q, k, v = u.split((self.heads * M, self.heads * M, u.shape[-1] - 2 * self.heads * M), -1)
        q, k = (F.elu(x.unflatten(-1, (self.heads, M))) + 1 for x in (q, k))
        v = F.pad(v.unflatten(-1, (self.heads, -1)), (0, 1), value=1.0)

        # both sums
        log_decay = None
        if self.log_decay:
            dtype = torch.promote_types(u.dtype, torch.float32)
            log_decay = torch.full((), self.log_decay, dtype=dtype, device=u.device).expand(v.shape[:3])
        doc_start = mask.doc_start
        if mask.cache is not None:
            index = torch.arange(u.shape[1], device=u.device, dtype=torch.int32)
            doc_start = (index - mask.positions).clamp_min(0).int()
        sums = gated_linear_attention(q, k, v, log_decay=log_decay, doc_start=doc_start)
        if mask.cache is not None:
            sums = sums + self.go_on(mask, q, k, v, index - doc_start).type_as(sums)
        return (sums[..., :-1] / sums[..., -1:].clamp_min(1e-6)).flatten(2)

    def go_on(self, mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        """
        Return what the new tokens read from the state before them, (B, t, H, D + 1), and keep the state behind them.
        places (B, t): their number among the new tokens of their document.
        """
        # the state before them
        memory = mask.cache.part("recall", Memory)
        q, k, v = (x.float() if x.dtype.itemsize < 4 else x for x in (q, k, v))
        t = q.shape[1]
        if memory.state is None:
            memory.state = q.new_zeros(q.shape[0], self.heads, self.features, v.shape[-1])

        # what they read, where their document began before them
        index = torch.arange(t, device=q.device)
        decays = torch.exp(self.log_decay * (index + 1).to(q))
        read = torch.einsum("bthm,bhmd->bthd", q * decays[:, None, None], memory.state)
        goes_on = mask.positions > index
        read = torch.where(goes_on[..., None, None], read, 0.0)

        # the state behind them, of the last document
        weights = torch.exp(self.log_decay * (t - 1 - index).to(q)) * (index >= t - 1 - places[:, -1:])
        added = torch.einsum("bthm,bthd->bhmd", k * weights[..., None, None], v)
        kept = torch.where(goes_on[:, -1, None, None, None], memory.state, 0.0)
        memory.state = math.exp(self.log_decay * t) * kept + added
        return read


def recall_features(options: Options) -> int:
    return max(8, options.recall_features)


class AttentionFilter(nn.Module):
    """Softmax attention with the trainer's norm, rotary positions and scale; u has q, k and v."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        self.config = config
        self.head_dim = head_dim = attention_head(config, width)
        self.scale = config.attention_scale or head_dim ** -0.5

        # a narrower head turns as large a share of its pairs, from the same longest to the same shortest wavelength
        channels_a_pair = 2 if config.rope == "full" else 4
        n, pairs = config.head_dim // channels_a_pair, max(1, head_dim // channels_a_pair)
        columns = [round(i * (n - 1) / max(pairs - 1, 1)) for i in range(pairs)]
        self.register_buffer("rotary_columns", torch.tensor(columns), persistent=False)

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in u.chunk(3, -1))
        if self.config.qk_norm:
            q, k = train_gpt.RMSNormalize.apply(q), train_gpt.RMSNormalize.apply(k)
        if ctx.rotary is not None:
            rotary = tuple(table[:, self.rotary_columns] for table in ctx.rotary)
            q, k = train_gpt.rotate(q, rotary), train_gpt.rotate(k, rotary)
        return train_gpt.attend(q, k, v, ctx.mask, self.scale).flatten(2)


def attention_head(config: Config, width: int) -> int:
    """Return the channels of a head: the trainer's, or all of a narrower lane."""
    return config.head_dim if width % config.head_dim == 0 else width


class ConvolutionFilter(nn.Module):
    """Eight taps for each channel."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(TAPS, width))
        self.taps.init_std = TAPS ** -0.5
        self.taps.optimizer = "adam"
        nn.init.normal_(self.taps, std=self.taps.init_std)

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        return convolve(u, self.taps, ctx.mask, "conv lane")


class TokenFilter(nn.Module):
    """Nothing but the token itself."""

    def __init__(self, config: Config, options: Options, width: int):
        super().__init__()

    def forward(self, u: Tensor, ctx: AttentionContext, x: Tensor) -> Tensor:
        return u


FILTERS = dict(
    poly=PolyFilter,
    fourier=FourierFilter,
    wavelet=WaveletFilter,
    recall=RecallFilter,
    attention=AttentionFilter,
    conv=ConvolutionFilter,
    token=TokenFilter,
)


# ---- Convolutions and gates -------------------------------------------------


class ContextConvolution(nn.Module):
    """forward(u (B, T, C), mask, name) returns u + GELU(conv(u) + b), name: of the layer's memory."""

    def __init__(self, options: Options, channels: int):
        super().__init__()
        self.count = options.conv_k
        self.dropout = options.dropout
        self.is_dense = options.context_conv == "dense"

        # as published, or the identity: dense (C, n C), for the token itself first; depthwise (n, C), for it last
        starts_as_identity = options.pack != "faithful"
        if self.is_dense:
            self.dense = nn.Linear(self.count * channels, channels)
        else:
            bound = self.count ** -0.5
            self.taps = nn.Parameter(torch.empty(self.count, channels).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
            self.taps.optimizer = "adam"
        if starts_as_identity:
            for p in self.parameters():
                nn.init.zeros_(p)

    def forward(self, u: Tensor, mask: AttentionMask, name: str) -> Tensor:
        if self.is_dense:
            shifted = [u] + [shift(u, step, mask, f"{name} {step}") for step in range(1, self.count)]
            total = F.linear(torch.cat(shifted, -1), self.dense.weight.type_as(u), self.dense.bias.type_as(u))
        else:
            total = convolve(u, self.taps, mask, name) + self.bias.type_as(u)
        return u + F.dropout(F.gelu(total), self.dropout, self.training)


class LaneGate(nn.Module):
    """
    How much of each lane a token takes. forward(x (B, T, model_dim), outputs (B, T, model_dim) of the active lanes)
    returns weights (B, T, active), whose sum is 1; factors(x, widths) those of an elementwise gate.
    """

    def __init__(self, config: Config, layer: int, options: Options, widths: dict[str, int]):
        super().__init__()
        self.names = list(widths)
        self.active = list(widths)      # names of the lanes that take part; the order is that of names
        self.widths = widths            # channels of each lane's filter
        self.options = options
        n, D = len(widths), config.model_dim
        self.hidden = None              # W1 and b1 of softmax_mlp; None: the gate is linear
        if options.gate == "softmax_mlp":
            self.hidden = nn.Linear(n * D, D)
        outputs = sum(widths.values()) if options.gate == "elementwise" else n
        self.bias = None                # (n,); None: elementwise
        if options.gate != "elementwise":
            self.bias = nn.Parameter(torch.zeros(n))
        self.last = train_gpt.Linear(config, layer, "gate", D, outputs)

        # as published, where that is asked for; else equal lanes
        nn.init.zeros_(self.last.weight)
        if options.pack == "faithful" and self.bias is not None:
            for p in (self.last.weight, self.bias):
                nn.init.uniform_(p, -D ** -0.5, D ** -0.5)
            del self.last.weight.init_std

    def set_lanes(self, names: list[str]):
        """Let only these lanes take part. RunError for names that the gate does not have, and for none."""
        unknown = [name for name in names if name not in self.names]
        require(names and not unknown, f"set_lanes({names}): the model has the lanes {', '.join(self.names)}; name "
                                       "some of them")
        self.active = [name for name in self.names if name in names]

    def is_kept(self, x: Tensor) -> Tensor | None:
        """Return (B, 1, active) bool: which lanes a row has in this training step, at least one; None: all."""
        if not (self.training and self.options.lane_dropout):
            return None
        kept = torch.rand(len(x), 1, len(self.active), device=x.device) >= self.options.lane_dropout
        return kept | ~kept.any(-1, keepdim=True)

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        # logits of all lanes, then the active ones'
        read = x
        if self.hidden is not None:
            by_name = dict(zip(self.active, outputs))
            read = torch.cat([by_name.get(name, torch.zeros_like(x)) for name in self.names], -1)
            read = F.gelu(F.linear(read, self.hidden.weight.type_as(x), self.hidden.bias.type_as(x)))
        logits = self.last(read) + self.bias.type_as(x)
        columns = [self.names.index(name) for name in self.active]
        if len(columns) < len(self.names):
            logits = logits[..., columns]
        return weigh_lanes(logits, self.options.gate_map, self.is_kept(x))

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """Return 2 sigmoid(W x) of every active lane, (B, T, width)."""
        gates = 2 * torch.sigmoid(self.last(x))
        factors = dict(zip(self.names, gates.split(list(self.widths.values()), -1)))
        kept = self.is_kept(x)
        chosen = {}
        for number, name in enumerate(self.active):
            chosen[name] = factors[name] if kept is None else factors[name] * kept[..., number:number + 1]
        return chosen


def weigh_lanes(logits: Tensor, gate_map: str, kept: Tensor | None) -> Tensor:
    """
    Return weights of lanes, whose sum is 1, from logits (B, T, n); 0 where kept, if there is one, is not true. The
    weight of top1 is 1 and has the gradient of the largest probability's logarithm.
    """
    if gate_map == "uniform":
        return probability_map(0.0 * logits, "softmax", kept)
    if gate_map == "top1":
        probabilities = probability_map(logits, "softmax", kept)
        first = F.one_hot(probabilities.argmax(-1), logits.shape[-1])
        return first * (probabilities / probabilities.detach().clamp_min(torch.finfo(logits.dtype).tiny))
    return probability_map(logits, gate_map, kept)


def set_lanes(model: nn.Module, names: list[str]):
    """Let only these lanes of a model take part, in every layer that has lanes. RunError for names it does not have."""
    gates = [module for module in model.modules() if isinstance(module, LaneGate)]
    require(gates, "set_lanes: the model has no lanes; apply variant wave_lanes")
    for gate in gates:
        gate.set_lanes(names)


def measure_diversity(outputs: list[Tensor], kind: str) -> Tensor:
    """Return the mean cosine of all pairs of outputs (B, T, C), or their energies' standard deviation over the mean."""
    outputs = [y.float().flatten() if y.dtype.itemsize < 4 else y.flatten() for y in outputs]
    if kind == "cosine":
        pairs = [F.cosine_similarity(a, b, dim=0) for a, b in combinations(outputs, 2)]
        return sum(pairs) / max(1, len(pairs))
    energies = torch.stack([y.square().mean() for y in outputs])
    spread = (energies - energies.mean()).square().mean()
    return (spread + 1e-12).sqrt() / (energies.mean() + 1e-6)


# ---- Packings of a layer ----------------------------------------------------


def columns_in(name: str, options: Options) -> int:
    """Return how many columns of a matrix a channel of a lane reads."""
    return dict(wavelet=options.L + 1, attention=3).get(name, 1)


def choose_widths(config: Config, options: Options) -> dict[str, int]:
    """
    Return the channels of every lane. RunError where a model is too narrow for its lanes.

    A lane of w channels has (columns_in + 1) w model_dim parameters, an elementwise gate w model_dim more. At s
    channels a lane, the wavelet lane of a block 4 / 3 s, or 8 / 5 s beside the gate that reads the lanes, s is what
    brings the layer to 4 or 12 model_dim^2.
    """
    # the budget, in multiples of model_dim
    D, names = config.model_dim, options.names
    budget = (4 if options.pack == "attention" else 12) * D
    if options.gate == "softmax_mlp":
        budget -= len(names) * D
    of_gate = int(options.gate == "elementwise")
    counted = names if options.widths == "matched" else ["poly", "fourier", "wavelet"]
    if "recall" in counted:
        budget -= 2 * options.recall_heads * recall_features(options)

    # s
    wavelet = 1.0
    if options.pack == "block":
        wavelet = 8 / 5 if options.gate == "softmax_mlp" else 4 / 3
    shares = {name: wavelet if name == "wavelet" else 1.0 for name in LANES}
    costs = {name: columns_in(name, options) + 1 + of_gate for name in LANES}
    s = budget / sum(shares[name] * costs[name] for name in counted)
    require(s >= 1, f"{NAME} model_dim={D} is too narrow for lanes={options.lanes}; give fewer lanes or features, or a "
                    "wider model")

    # whole channels
    widths = {name: round_width(s * shares[name], name, config, options) for name in names}
    if "wavelet" in names and options.widths == "matched":
        left = budget - sum(widths[name] * costs[name] for name in names if name != "wavelet")
        width = left / costs["wavelet"]
        widths["wavelet"] = max(1, int(width) // 4 * 4 if width >= 8 else int(width))
    return widths


def round_width(width: float, name: str, config: Config, options: Options) -> int:
    """Return a width rounded down to a multiple of 16, in narrow models of 4 or 1, and to what a lane's heads need."""
    width = int(width + 1e-6)
    unit = 16 if width >= 32 else 4 if width >= 8 else 1
    if name == "attention":
        unit = config.head_dim if width >= config.head_dim else 4
    if name == "recall":
        unit = math.lcm(unit, options.recall_heads)
    return max(unit, width // unit * unit)


class Lane(nn.Module):
    """A lane of a layer. forward(x (B, T, model_dim), ctx) returns (B, T, width), before the matrix out."""

    def __init__(self, config: Config, layer: int, options: Options, name: str, width: int):
        super().__init__()
        channels = width * columns_in(name, options)
        if name == "recall":
            channels += 2 * options.recall_heads * recall_features(options)
        self.inp = train_gpt.Linear(config, layer, "fc", config.model_dim, channels)
        self.filter = FILTERS[name](config, options, width)
        self.norm = train_gpt.Norm(config, width) if options.lane_norm == "on" else None
        self.is_activated = options.pack == "block"
        self.out = train_gpt.Linear(config, layer, "o", width, config.model_dim)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        y = self.filter(self.inp(x), ctx, x)
        if self.norm is not None:
            y = self.norm(y)
        return F.gelu(y) if self.is_activated else y


class WaveLanes(nn.Module):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape. options: resolved."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__()
        self.options = options
        widths = choose_widths(config, options)
        self.lanes = nn.ModuleDict({name: Lane(config, layer, options, name, width) for name, width in widths.items()})
        self.gate = LaneGate(config, layer, options, widths)
        self.value_mix = None           # factors of the input and of the value embedding; None: the layer has none
        if train_gpt.value_table(config, layer) is not None:
            self.value_mix = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.convolutions = None        # of the input and of the output; None: context_conv=none
        if options.context_conv != "none":
            self.convolutions = nn.ModuleList(ContextConvolution(options, config.model_dim) for _ in range(2))
        self.diversity = None           # this layer's share of the training loss; None: no diversity, or no training

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        # the lanes
        if self.convolutions is not None:
            x = self.convolutions[0](x, ctx.mask, "convolution in")
        read = x
        if self.value_mix is not None:
            mix = self.value_mix.type_as(x)
            read = mix[0] * x + mix[1] * ctx.value
        active = self.gate.active
        hidden = {name: self.lanes[name](read, ctx) for name in active}

        # the mix
        if self.options.gate == "elementwise":
            factors = self.gate.factors(x)
            outputs = [self.lanes[name].out(factors[name] * hidden[name]) for name in active]
            y = sum(outputs[1:], outputs[0])
        else:
            outputs = [self.lanes[name].out(hidden[name]) for name in active]
            y = mix_lanes(self.gate(x, outputs), outputs)
        note_diversity(self, outputs)
        return y if self.convolutions is None else self.convolutions[1](y, ctx.mask, "convolution out")


def mix_lanes(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    """Return the sum of outputs (B, T, C), weighted by weights (B, T, n)."""
    y = weights[..., :1] * outputs[0]
    for number, output in enumerate(outputs[1:], 1):
        y = y + weights[..., number:number + 1] * output
    return y


def note_diversity(module: nn.Module, outputs: list[Tensor]):
    """Set module.diversity, which add_diversity() collects."""
    module.diversity = None
    if module.training and module.options.diversity != "none":
        module.diversity = measure_diversity(outputs, module.options.diversity)


def add_diversity(weight: float):
    """Return GPT.auxiliary_loss: weight times the mean over layers."""
    def auxiliary_loss(self, x: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        terms = []
        for module in self.modules():
            if isinstance(module, (WaveLanes, FaithfulBlock)) and module.diversity is not None:
                terms.append(module.diversity)
        return weight * sum(terms) / max(1, len(terms))
    return auxiliary_loss


class NoFeedForward(nn.Module):
    """forward(x) returns zeros like x: the block's lanes are the feed-forward, too."""

    def __init__(self, config: Config, layer: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


# ---- The published model ----------------------------------------------------


class FaithfulLane(nn.Module):
    """forward(x (B, T, H), ctx) returns R(W filter(x) + b) (B, T, H), R the lane's MLP."""

    def __init__(self, config: Config, options: Options, name: str):
        super().__init__()
        H = config.model_dim
        self.dropout = options.dropout
        self.filter = FILTERS[name](config, options, H)
        self.norm = train_gpt.Norm(config, H) if options.lane_norm == "on" else None

        # what the filter reads, where that is not the stream; what the MLP reads
        channels = dict(attention=3 * H, recall=H + 2 * options.recall_heads * recall_features(options)).get(name)
        self.inp = None if channels is None else nn.Linear(H, channels)
        self.projection = nn.Linear(2 * options.L * H if name == "wavelet" else H, H)

        # R: hidden layers of `width`
        width = max(32, int(H * (1.5 if name == "wavelet" else 1.0)))
        sizes = [H] + [width] * DEPTHS[options.depth]
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, [*sizes[1:], H]))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        # the filter
        if isinstance(self.filter, WaveletFilter):
            y = self.filter.features(x, ctx.mask)
        else:
            y = self.filter(x if self.inp is None else apply(self.inp, x), ctx, x)
        if self.norm is not None:
            y = self.norm(y)

        # the MLP
        y = apply(self.projection, y)
        for linear in self.mlp[:-1]:
            y = F.dropout(F.gelu(apply(linear, y)), self.dropout, self.training)
        return apply(self.mlp[-1], y)


def apply(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return a linear layer's result in x's dtype."""
    return F.linear(x, linear.weight.type_as(x), linear.bias.type_as(x))


class FaithfulBlock(nn.Module):
    """forward(x (B, T, H), ctx) returns a tensor of the same shape: the lanes, each convolved, their mix, convolved."""

    def __init__(self, config: Config, options: Options):
        super().__init__()
        self.options = options
        self.lanes = nn.ModuleDict({name: FaithfulLane(config, options, name) for name in options.names})
        self.gate = LaneGate(config, 0, options, dict.fromkeys(options.names, config.model_dim))
        self.convolutions = None        # one for every lane, one for the mix; None: context_conv=none
        if options.context_conv != "none":
            self.convolutions = nn.ModuleList(ContextConvolution(options, config.model_dim) for _ in range(2))
        self.diversity = None           # the share of the training loss; None: no diversity, or no training

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        # the lanes
        outputs = []
        for name in self.gate.active:
            y = self.lanes[name](x, ctx)
            if self.convolutions is not None:
                y = self.convolutions[0](y, ctx.mask, f"convolution of {name}")
            outputs.append(y)

        # the mix
        if self.options.gate == "elementwise":
            factors = self.gate.factors(x)
            outputs = [factors[name] * y for name, y in zip(self.gate.active, outputs)]
            y = sum(outputs[1:], outputs[0]) / len(outputs)
        else:
            y = mix_lanes(self.gate(x, outputs), outputs)
        note_diversity(self, outputs)
        if self.convolutions is not None:
            y = self.convolutions[1](y, ctx.mask, "convolution out")
        return x + y if self.options.residual == "on" else y


class LayerNorm(nn.LayerNorm):
    """forward(x) returns the normalised x in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), self.bias.type_as(x), self.eps)


class FaithfulGPT(train_gpt.GPT):
    """The published model: embeddings of tokens and positions, one layer, LayerNorm, the trainer's head and loss."""

    def __init__(self, config: Config, options: Options):
        nn.Module.__init__(self)
        config = replace(config, layers=1)
        width = config.model_dim
        self.config = config
        self.dtype = torch.float32      # of activations
        self.use_flex = False           # whether masks are FlexAttention's
        self.windows = (0, 0)           # short and long in this part of the run, in tokens; 0: unlimited

        # parameters
        self.embedding = train_gpt.embedding(config.padded_vocabulary, width, 0.02)
        self.positions = train_gpt.embedding(config.sequence_length, width, 0.02)
        self.blocks = nn.ModuleList([FaithfulBlock(config, options)])
        self.final_norm = LayerNorm(width)
        self.head = train_gpt.LanguageModelHead(config)
        if config.tied_embedding:
            self.head.projection.weight = self.embedding.weight

        # rotary positions, of an attention lane
        turning = config.head_dim // (2 if config.rope == "full" else 4)
        self.register_buffer("frequencies", config.rope_base ** -torch.linspace(0, 1, turning), persistent=False)
        self.source = train_gpt.build_source(self, config)

    def embed(self, tokens: Tensor, masks: list, start: int = 0) -> tuple[Tensor, list[AttentionContext]]:
        """As GPT.embed."""
        # places, those of the tokens before the new ones left out; behind the last one a token counts as that
        places = masks[0].positions
        places = F.pad(places, (tokens.shape[1] - places.shape[1], 0)).clamp_max(len(self.positions.weight) - 1)
        x = (self.embedding(tokens) + self.positions(places)).to(self.dtype)

        # the context
        index = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        angles = index[:, None] * self.frequencies
        rotary = (angles.cos(), angles.sin()) if self.config.rope != "none" else None
        return x, [AttentionContext(mask, rotary, x, None) for mask in masks]

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        """As GPT.run_blocks; LayerNorm, which has parameters, is the head's."""
        return self.blocks[0](x, contexts[0])


# ---- Replacing --------------------------------------------------------------

plain_attention = train_gpt.CausalSelfAttention
plain_feed_forward = train_gpt.MLP


def build_part(config: Config, layer: int, plain, part):
    """Return part(config, layer), or the trainer's in the layers that keep it: plain, (every how many, class)."""
    every, original = plain
    keeps = every and layer % every == every - 1
    return original(config, layer) if keeps else part(config, layer)


def patch(options: Options):
    options = options.resolve()
    if options.diversity != "none":
        train_gpt.GPT.auxiliary_loss = add_diversity(options.diversity_weight)
    if options.pack == "faithful":
        train_gpt.GPT = partial(FaithfulGPT, options=options)
        return
    lanes = partial(WaveLanes, options=options)
    every = options.attention_every
    train_gpt.CausalSelfAttention = partial(build_part, plain=(every, plain_attention), part=lanes)
    if options.pack == "block":
        train_gpt.MLP = partial(build_part, plain=(every, plain_feed_forward), part=NoFeedForward)
