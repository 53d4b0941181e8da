"""
The lane scan in plain PyTorch: the chunks of __init__.py, where there is no Triton or no Numba, and a sum over a
window.

Arrays are (B, N, H, C, D): N chunks of C tokens, H heads of D channels. The reversed scan, which makes the gradient of
u, is the same scan of rows that are turned around.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import sum_dtype
from kernels.lane_scan.reference import time_kernel

CHUNK = 128     # tokens of a chunk


def _split(x: Tensor, chunk: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Returns x (B, T, W) as (B, N, H, C, D), with zeros after the last token."""
    missing = -x.shape[1] % chunk
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.to(dtype).unflatten(2, (heads, -1)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _join(x: Tensor, T: int) -> Tensor:
    """Returns chunks (B, N, H, C, D) as (B, T, W)."""
    return x.transpose(2, 3).flatten(3).flatten(1, 2)[:, :T]


def mean_factors(positions: Tensor, mean: bool, dtype: torch.dtype) -> Tensor | float:
    """Returns 1 / (p + 1) for positions (B, T), as (B, T, 1); 1 without the mean."""
    return 1.0 / (positions[..., None] + 1).to(dtype) if mean else 1.0


class _Chunks:
    """
    The linear maps of a scan over rows of tokens. X numbers a channel are the state: the cosine sums of all frequencies
    and then their sine sums, or a sum for each column of a table.
    """

    def __init__(self, features: Tensor, gain: Tensor, decay: Tensor | None, start: Tensor, positions: Tensor,
                 chunk: int, dtype: torch.dtype):
        """start, positions (B, T): the first token of each token's document in these rows, and its row of a table."""
        B, T = start.shape
        N = -(-T // chunk)
        self.dtype = dtype
        self.chunk = chunk
        self.is_table = features.ndim == 2
        index = torch.arange(chunk, device=start.device)

        # the documents, of tokens numbered from their chunk's first one
        missing = N * chunk - T
        padded = torch.cat((start, start[:, -1:].expand(B, missing)), 1).view(B, N, 1, chunk)
        first = padded - chunk * torch.arange(N, device=start.device)[:, None, None]
        self.allowed = (index <= index[:, None]) & (index >= first[..., None])      # (B, N, 1, C, C)
        self.enter = (first < 0)[..., None].to(dtype)                               # (B, N, 1, C, 1)
        self.leave = (index >= first[..., -1:])[..., None].to(dtype)                # (B, N, 1, C, 1)
        self.keep = (first[..., -1:] < 0)[..., None].double()                       # (B, N, 1, 1, 1)

        # what leads from a chunk's tokens to the state and from the state to its tokens, and the pairs inside
        if self.is_table:
            places = F.pad(positions.clamp(0, len(features) - 1), (0, missing)).view(B, N, 1, chunk)
            self.rows = features[places].to(dtype)                                  # (B, N, 1, C, K)
            self.write = self.rows.mT
            self.read = self.rows * gain[:, None].to(dtype)
            self.pairs = self.read @ self.write
        else:
            self._make_waves(features, gain, decay, index)

    def _make_waves(self, frequencies: Tensor, gain: Tensor, decay: Tensor | None, index: Tensor):
        # cosine and sine of the distances 0 .. C, with their decay: (H or 1, F, C + 1) each, float64
        C = self.chunk
        distances = torch.arange(C + 1, device=index.device, dtype=torch.float64)
        angles = 2 * math.pi * (frequencies[:, None] * distances).remainder(1.0)
        fade = torch.ones_like(angles)[None]
        if decay is not None:
            fade = torch.exp(-decay.double()[..., None] * distances)
        self.waves = (fade * angles.cos(), fade * angles.sin())

        # a state is that of the token behind the chunk: distances C .. 1
        cosine, sine = (wave[..., :-1] for wave in self.waves)
        self.rows = torch.cat((cosine, -sine), 1).mT.to(self.dtype)                 # (H or 1, C, 2 F)
        self.write = torch.cat([wave[..., 1:].flip(-1) for wave in self.waves], 1).to(self.dtype)
        self.read = self.rows * torch.cat((gain, gain), 1)[:, None].to(self.dtype)
        kernel = time_kernel(frequencies, gain, decay, index)
        self.pairs = kernel[:, (index[:, None] - index).clamp_min(0)].to(self.dtype)

    def advance(self, state: Tensor) -> Tensor:
        """Returns the state (B, H, X, D) of the token behind the next chunk, without what is in that chunk."""
        if self.is_table:
            return state
        cosine, sine = (wave[..., -1:] for wave in self.waves)
        real, imaginary = state.chunk(2, dim=-2)
        return torch.cat((cosine * real - sine * imaginary, sine * real + cosine * imaginary), -2)

    def states(self, added: Tensor, entering: Tensor | None = None) -> Tensor:
        """
        Returns the states that enter the chunks, (B, N, H, X, D), from what each chunk adds; in float64, which many
        rotations need. entering: states of the same form, C of which each chunk adds to what entered it, before it is
        brought to the chunk's end.
        """
        added = added.double()
        states = [torch.zeros_like(added[:, 0])]
        for n in range(added.shape[1] - 1):
            state = states[-1]
            if entering is not None:
                state = state + self.chunk * entering[:, n]
            states.append(self.keep[:, n] * self.advance(state) + added[:, n])
        return torch.stack(states, 1)

    def scan(self, x: Tensor) -> Tensor:
        """Returns the sums for x (B, N, H, C, D)."""
        states = self.states(self.write @ (x * self.leave))
        inside = self.pairs.masked_fill(~self.allowed, 0.0) @ x
        return torch.addcmul(inside, self.enter, self.read @ states.to(self.dtype))

    def gradients(self, x: Tensor, g: Tensor, decay_grad: bool) -> tuple[Tensor, Tensor | None]:
        """
        Returns the gradients of the gains and of the decays, (H, F) float64, for inputs x and gradients g of the sums;
        that of the decays is without the factor -gain.
        """
        # pairs inside a chunk
        pairs = (g @ x.mT).masked_fill(~self.allowed, 0.0)
        states = self.states(self.write @ (x * self.leave))
        seen = g * self.enter
        if self.is_table:
            of_pairs = ((pairs @ self.rows) * self.rows).double().sum((0, 1, 3))
            return of_pairs + ((self.rows.mT @ seen).double() * states).sum((0, 1, 4)), None

        # by their distance, and pairs that cross the chunk's beginning
        index = torch.arange(self.chunk, device=x.device)
        distances = (index[:, None] - index).clamp_min(0)
        by_distance = pairs.double().sum((0, 1)).flatten(1)
        by_distance = torch.zeros_like(by_distance[:, :self.chunk]).index_add_(1, distances.flatten(), by_distance)
        cosine = self.waves[0][..., :-1]
        of_state = self.rows.mT @ seen
        crossing = (of_state.double() * states).sum((0, 1, 4)).unflatten(1, (2, -1)).sum(1)
        dgain = (cosine * by_distance[:, None]).sum(-1) + crossing
        if not decay_grad:
            return dgain, None

        # the same pairs, each times its distance: inside; from the beginning on; up to the beginning
        places = torch.arange(self.chunk, device=x.device, dtype=self.dtype)
        ahead = (self.rows.mT * places) @ seen
        weights = self.chunk - places
        behind = self.states((self.write * weights) @ (x * self.leave), states)
        crossing = (ahead.double() * states + of_state.double() * behind).sum((0, 1, 4)).unflatten(1, (2, -1)).sum(1)
        return dgain, (cosine * (by_distance * index)[:, None]).sum(-1) + crossing


def _starts(u: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (start, positions) of a row's tokens, (B, T) int64."""
    index = torch.arange(u.shape[1], device=u.device).expand(u.shape[:2])
    start = torch.zeros_like(index) if doc_start is None else doc_start.long()
    return start, index - start


def _turned(start: Tensor) -> Tensor:
    """Returns the starts of the documents in a row that is turned around, from those of the row itself."""
    T = start.shape[1]
    index = torch.arange(T, device=start.device)
    begins = F.pad((start[:, 1:] == index[1:]), (0, 1), value=True)     # the next token begins a document
    last = torch.where(begins, index, T).flip(1).cummin(1).values.flip(1)
    return (T - 1 - last).flip(1)


def forward(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool, chunk: int,
    segment: int
) -> Tensor:
    """Returns y (B, T, W)."""
    dtype = sum_dtype(u)
    start, positions = _starts(u, doc_start)
    chunk = min(chunk or CHUNK, u.shape[1])
    chunks = _Chunks(features, gain, decay, start, positions, chunk, dtype)
    y = _join(chunks.scan(_split(u, chunk, len(gain), dtype)), u.shape[1])
    return (y * mean_factors(positions, mean, dtype)).to(u.dtype)


def backward(
    grad: Tensor, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    chunk: int, segment: int, gain_grad: bool, decay_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of u, gain and decay; the last two (H, F) float64, empty where they are not wanted."""
    # du: the scan of the turned rows
    dtype = sum_dtype(u)
    H, T = len(gain), u.shape[1]
    start, positions = _starts(u, doc_start)
    chunk = min(chunk or CHUNK, T)
    g = grad.to(dtype) * mean_factors(positions, mean, dtype)
    turned = _Chunks(features, gain, decay, _turned(start), positions.flip(1), chunk, dtype)
    du = _join(turned.scan(_split(g.flip(1), chunk, H, dtype)), T).flip(1).to(u.dtype)

    # the others
    dgain, ddecay = gain.new_empty(0, dtype=torch.float64), gain.new_empty(0, dtype=torch.float64)
    if gain_grad or decay_grad:
        chunks = _Chunks(features, gain, decay, start, positions, chunk, dtype)
        sums = chunks.gradients(_split(u, chunk, H, dtype), _split(g, chunk, H, dtype), decay_grad)
        dgain = sums[0]
        if decay_grad:
            ddecay = -gain.double() * sums[1]
    return du, dgain, ddecay


def banded(
    u: Tensor, frequencies: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    window: int, chunk: int
) -> Tensor:
    """
    Returns y (B, T, W) with a time kernel that ends before the distance `window`: window / C + 1 Toeplitz tiles, equal
    for all chunks, each masked by the documents. Autograd differentiates it.
    """
    # the chunks and the documents
    dtype = sum_dtype(u)
    T = u.shape[1]
    start, positions = _starts(u, doc_start)
    chunk = min(chunk or CHUNK, T)
    x = _split(u, chunk, len(gain), dtype)
    N = x.shape[1]
    first = F.pad(start, (0, N * chunk - T)).view(len(u), N, 1, chunk, 1)
    index = torch.arange(chunk, device=u.device)
    kernel = time_kernel(frequencies, gain, decay, torch.arange(window, device=u.device)).to(dtype)

    # tile by tile
    y = torch.zeros_like(x)
    for back in range(min(N, (window + chunk - 2) // chunk + 1)):
        distances = back * chunk + index[:, None] - index
        in_window = (distances >= 0) & (distances < window)
        tile = kernel[:, distances.clamp(0, window - 1)].masked_fill(~in_window, 0.0)
        keys = chunk * torch.arange(N - back, device=u.device)[:, None, None, None] + index
        tile = tile.masked_fill(keys < first[:, back:], 0.0)
        y = y + F.pad(tile @ x[:, :N - back], (0, 0, 0, 0, 0, 0, back, 0))
    return (_join(y, T) * mean_factors(positions, mean, dtype)).to(u.dtype)
