"""
Gated linear attention in plain PyTorch: the chunks of __init__.py, where there is no Triton or no Numba, and for both
passes of long rows of many channels on a CPU.

Arrays are chunk-major, (N, B H, C, X), so that any run of chunks is one batch of products without a copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import sum_dtype
from kernels.gated_linear_attention.reference import empty_gradients

GROUP = 4096    # tokens times heads that are worked on at once: what they need stays in a CPU's cache


def chunk_length(T: int, M: int, D: int) -> int:
    """Returns the tokens of a chunk. Small states are cheaper than many pairs."""
    return min(32 if M * D < 2048 else 64, T)


def state_shape(key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Returns the shape of the chunks' states, (N, B H, M, D)."""
    B, T, H, M = key.shape
    D = value.shape[-1]
    return -(-T // chunk_length(T, M, D)), B * H, M, D


def _gather(x: Tensor, chunk: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """
    Returns the chunks `first` to last - 1 of x (B, T, H, X) as (last - first, B H, chunk, X), with zeros after the last
    token.
    """
    x = x[:, first * chunk:last * chunk]
    missing = (last - first) * chunk - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    x = x.unflatten(1, (last - first, chunk)).permute(1, 0, 3, 2, 4)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def _scatter(chunks: Tensor, out: Tensor, first: int):
    """Writes the chunks (n, B H, C, X), the first of them number `first`, to out (B, T, H, X)."""
    n, _, chunk, _ = chunks.shape
    rows = out[:, first * chunk:(first + n) * chunk]
    chunks = chunks.unflatten(1, (len(out), -1)).permute(1, 0, 3, 2, 4)
    if rows.shape[1] == n * chunk:
        rows.unflatten(1, (n, chunk)).copy_(chunks)
    else:
        rows.copy_(chunks.flatten(1, 2)[:, :rows.shape[1]])


class _Chunks:
    """How the tokens are cut, and the factors of the recurrence, none above 1, as (N, B H, ...)."""

    def __init__(self, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None):
        # the cut
        B, T, H, M = key.shape
        device = key.device
        self.dtype = sum_dtype(value)
        self.chunk = chunk_length(T, M, value.shape[-1])    # C, tokens of a chunk
        self.N = N = -(-T // self.chunk)                    # chunks
        per_group = max(1, GROUP // (B * H * self.chunk))
        self.groups = [(first, min(first + per_group, N)) for first in range(0, N, per_group)]  # (first, end) chunks
        self.index = torch.arange(self.chunk, device=device)

        # Exponents stay in the dtype's normal range: -inf and denormal results make exp ten to a hundred times as slow
        # on a CPU.
        self.least = -80.0 if self.dtype == torch.float32 else -700.0
        self.f = None       # (N, B H, C): the running sum of log-decays in a chunk; None: no decay
        f = torch.zeros(N, B * H, self.chunk, dtype=self.dtype, device=device)
        if log_decay is not None:
            decays = _gather(log_decay[..., None], self.chunk, 0, N, self.dtype)[..., 0]
            f = decays.clamp_min_(self.least).cumsum(-1)
            self.f = f

        # on the state that enters (N, B H, C), of what leaves (N, B H, C), on the state behind (N, B H)
        self.enter = self._factors(f)
        self.leave = self._factors(f[..., -1:] - f)
        self.keep = self._factors(f[..., -1])
        self.doc = None     # (N, B, C): the starts of documents, from the chunk's first token; None: one document
        if doc_start is not None:
            padded = torch.cat([doc_start, doc_start[:, -1:].expand(B, N * self.chunk - T)], 1)
            first = self.chunk * torch.arange(N, device=device)[:, None, None]
            self.doc = padded.view(B, N, self.chunk).transpose(0, 1) - first
            self._hide(self.enter, self.doc < 0, B, H)
            self._hide(self.leave, self.doc[..., -1:] <= self.index, B, H)
            self._hide(self.keep, self.doc[..., -1] < 0, B, H)

    def _factors(self, exponents: Tensor) -> Tensor:
        return exponents.clamp_min(self.least).exp_().mul_(exponents > self.least)

    @staticmethod
    def _hide(factors: Tensor, seen: Tensor, B: int, H: int):
        """Sets factors (N, B H, ...) to 0 where not `seen` (N, B, ...)."""
        factors.unflatten(1, (B, H)).mul_(seen.unsqueeze(2))

    def pair_factors(self, first: int, last: int) -> Tensor:
        """
        Returns e^{f_i - f_j} where j <= i in one document, else 0: (n, B H, C, C), without decay and documents (C, C).
        """
        if self.f is None:
            factors = torch.ones(self.chunk, self.chunk, dtype=self.dtype, device=self.index.device)
        else:
            f = self.f[first:last]
            factors = (f[..., :, None] - f[..., None, :]).clamp_(self.least, 0.0).exp_()
        factors.tril_()
        if self.doc is None:
            return factors
        same = (self.index >= self.doc[first:last, :, :, None]).to(self.dtype)
        return factors * same.repeat_interleave(self.enter.shape[1] // same.shape[1], 1)


def _flush_(states: Tensor) -> Tensor:
    """
    Sets to zero, in place, what has decayed to the edge of the normal range: products with denormal numbers are many
    times as slow on a CPU.
    """
    least = 1e-35 if states.dtype == torch.float32 else 1e-300
    return torch.ops.aten.hardshrink.out(states, least, out=states)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds a b to x, in place, over two batch dimensions."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return x


def forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, states (N, B H, M, D))."""
    cut = _Chunks(key, value, log_decay, doc_start)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    states = torch.empty(state_shape(key, value), dtype=cut.dtype, device=value.device)
    states[0] = 0
    for first, last in cut.groups:
        q, k, v = (_gather(x, cut.chunk, first, last, cut.dtype) for x in (query, key, value))
        weights = (q @ k.transpose(-1, -2)).mul_(cut.pair_factors(first, last))

        # the states that enter the next chunks
        added = k.mul_(cut.leave[first:last, ..., None]).transpose(-1, -2) @ v
        for c in range(first, min(last, cut.N - 1)):
            torch.addcmul(added[c - first], states[c], cut.keep[c, :, None, None], out=states[c + 1])

        # the outputs
        result = q.mul_(cut.enter[first:last, ..., None]) @ _flush_(states[first:last])
        _scatter(_add_product(result, weights, v), out, first)
    return out, states


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None,
    states: Tensor, decay_grad: bool
) -> tuple[Tensor, ...]:
    """Returns the four gradients; that of the log-decay is empty without decay_grad."""
    cut = _Chunks(key, value, log_decay, doc_start)
    dquery, dkey, dvalue, ddecay = empty_gradients(query, key, value, log_decay if decay_grad else None)
    after = torch.zeros_like(states[0])
    for first, last in reversed(cut.groups):
        q, k, v, u = (_gather(x, cut.chunk, first, last, cut.dtype) for x in (query, key, value, grad))
        enter = cut.enter[first:last, ..., None]
        leave = cut.leave[first:last, ..., None]
        factors = cut.pair_factors(first, last)
        state = states[first:last]

        # the mirrored states, behind the chunks
        added = (q * enter).transpose(-1, -2) @ u
        behind = torch.empty(last - first + 1, *after.shape, dtype=cut.dtype, device=grad.device)
        behind[-1] = after
        for c in reversed(range(first, last)):
            keep = cut.keep[c, :, None, None]
            torch.addcmul(added[c - first], behind[c - first + 1], keep, out=behind[c - first])
        after = _flush_(behind)[0]
        behind = behind[1:]

        # the pairs, and what the states give
        weights = (q @ k.transpose(-1, -2)).mul_(factors)
        dpairs = u @ v.transpose(-1, -2)
        dq = (u @ state.transpose(-1, -2)).mul_(enter)
        dk = (v @ behind.transpose(-1, -2)).mul_(leave)

        # dg: pairs that end at a token, pairs from a token to one behind the chunk, pairs from before to behind it
        if decay_grad:
            both = weights * dpairs
            both.diagonal(dim1=-2, dim2=-1).zero_()
            ends = both.sum(-1) - both.sum(-2) + (dq * q).sum(-1)
            begins = F.pad((dk * k).sum(-1)[..., :-1], (1, 0))
            through = cut.keep[first:last] * (state * behind).sum((-1, -2))
            dg = ends.flip(-1).cumsum(-1).flip(-1) + begins.cumsum(-1) + through[..., None]
            _scatter(dg[..., None], ddecay[..., None], first)

        # the others
        dweights = dpairs.mul_(factors)
        _scatter(_add_product(dq, dweights, k), dquery, first)
        _scatter(_add_product(dk, dweights.transpose(-1, -2), q), dkey, first)
        dv = (k @ behind).mul_(leave)
        _scatter(_add_product(dv, weights.transpose(-1, -2), u), dvalue, first)
    return dquery, dkey, dvalue, ddecay
