"""
Topological attention, one token after another: what a layer keeps of the tokens before.

    out_i = sum_j softmax_j(-|a_i - b_j| + F_i - F_j + c_j) v_j        as in topological_attention.py

Exact: of every token its coordinate b, its values v and, with a decay or a bias, its log-weight c - F in float32; D + 1 or D + 2 numbers a head, where
softmax attention keeps 2 D. A token reads all of them: D + 1 multiply-adds each, no product of queries and keys. F_i is common to all keys of a query and
left out; log-weights are stored relative to a recent F, so that they do not lose digits in a long text.
Long rows: all but the last RUN to 2 RUN tokens lie in runs of RUN, 2 RUN, 4 RUN, .. tokens sorted by b, two of equal size becoming one, as in a binary counter.
Each run has the sums of [v, 1] over all its blocks of BLOCK tokens below each block's end, weighted as seen from there, and over all blocks above each block's
start. A query reads in each run the block that its coordinate falls into and one sum on either side, BLOCK + 2 rows instead of all, exactly, for
(D + 1) / BLOCK numbers more a token on either side; a token is moved log2(T / RUN) times. Where something in a run is hidden (a window, documents of several rows)
the runs are undone.
With bins: coordinates on so many points, M (D + 1) numbers a head and a cost a token that do not depend on how much came before. Without
coordinates two points, exactly.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for a cache without keys; the quantised state: topological_attention_binned.py
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.topological_attention import topological_attention
from kernels.topological_attention_binned import BinnedState, topological_attention_binned, topological_attention_binned_state, topological_attention_binned_step
from kernels.segmented_scan import segmented_scan
from kernels.topological_attention_reference import LOG2_E, LOWEST

RUN, BLOCK = 8192, 64  # fewest tokens of a run and of its blocks: measured on two CPU cores, where 8,192 tokens are read as fast as a run
REBASE = 64.0  # how far F may move from what log-weights are relative to: float32 keeps 4e-6 of a weight there


class TokenBuffer:
    """Rows of tokens (B, H, n, ...) that grow at the end and are dropped at the front."""
    def __init__(self):
        self.data, self.begin, self.end = None, 0, 0

    def append(self, x: Tensor):
        """x (B, H, t, ...) of the tokens that follow."""
        needed = self.end + x.shape[2]
        if self.data is None or needed > self.data.shape[2]:
            kept = self.end - self.begin
            grown = x.new_empty(*x.shape[:2], max(64, (kept + x.shape[2]) * 3 // 2), *x.shape[3:])
            if kept:
                grown[:, :, :kept] = self.tokens
            self.data, self.begin, self.end = grown, 0, kept
        self.data[:, :, self.end:self.end + x.shape[2]] = x
        self.end += x.shape[2]

    def keep(self, count: int | None):
        """Forget all but the last `count` tokens (None: all stay); their memory goes at the next growth."""
        if count is not None:
            self.begin = max(self.begin, self.end - count)

    @property
    def tokens(self) -> Tensor:
        return self.data[:, :, self.begin:self.end]

    @property
    def bytes_kept(self) -> int:
        return 0 if self.data is None else self.tokens.numel() * self.data.element_size()


def hidden_keys(first_key: Tensor | None, begin: int, queries: int, end: int) -> Tensor | None:
    """
    Which of the keys begin .. end - 1 of a row the last `queries` tokens do not see, (B or 1, queries, end - begin); None where they see all.
    first_key (B, queries) int: the first key each of them sees, None: 0.
    """
    device = None if first_key is None else first_key.device
    if queries == 1 and (first_key is None or not (first_key > begin).any()):
        return None
    key, query = torch.arange(begin, end, device=device), torch.arange(end - queries, end, device=device)
    hidden = (key > query[:, None])[None]
    return hidden if first_key is None else hidden | (key < first_key[..., None])


class SortedRun(NamedTuple):
    """Tokens of B rows, sorted by coordinate, and sums over blocks of them; W is Hkv, or H where there are weights."""
    key: Tensor                     # (B, Hkv, s) float32, rising
    value: Tensor                   # (B, Hkv, s, D)
    place: Tensor                   # (B, Hkv, s) int32: places in the row
    weight: Tensor | None           # (B, W, s) float32: log-weights relative to TopologicalCache.total
    potentials: Tensor              # (2, B, W, blocks + 1) float64: the largest weight + key up to a block's end, with LOWEST first; weight - key from its start, with LOWEST last
    sums: Tensor                    # (2, B, W, blocks + 1, D + 1) float32: of e^{weight +- key - potential} [v, 1], zeros first and last

    @classmethod
    def of(cls, key: Tensor, value: Tensor, place: Tensor, weight: Tensor | None) -> "SortedRun":
        """From tokens in any order, whole blocks of them."""
        key, order = key.sort(dim=-1, stable=True)
        value, place = value.gather(2, order[..., None].expand(-1, -1, -1, value.shape[-1])), place.gather(2, order)
        group = 1 if weight is None else weight.shape[1] // key.shape[1]
        by_weight = lambda x: x.repeat_interleave(group, 1)
        own = by_weight(key).double()
        if weight is not None:
            weight = weight.gather(2, by_weight(order))
        potentials, sums = [], []
        for side in (own, -own.flip(-1)):  # from below, from above
            backward = bool(potentials)
            logs = side if weight is None else side + (weight.flip(-1) if backward else weight)
            highest = logs.cummax(-1).values.unflatten(-1, (-1, BLOCK))[..., -1].clamp_min(LOWEST)  # (B, W, blocks)
            factors = (logs.unflatten(-1, (-1, BLOCK)) - highest[..., None]).exp().float()
            rows = F.pad(by_weight(value.flip(2) if backward else value).float(), (0, 1), value=1.0).unflatten(2, (-1, BLOCK))
            blocks = (factors[..., None, :] @ rows).squeeze(-2)
            flat = highest.flatten(0, 1)
            total = segmented_scan(flat * LOG2_E, blocks.flatten(0, 1), torch.zeros_like(flat, dtype=torch.int64)).view_as(blocks)
            highest, total = F.pad(highest, (1, 0), value=LOWEST), F.pad(total, (0, 0, 1, 0))
            potentials.append(highest.flip(-1) if backward else highest)
            sums.append(total.flip(2) if backward else total)
        return cls(key, value, place, weight, torch.stack(potentials), torch.stack(sums))

    def read(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, Hkv, Q), Q queries for every key head -> scores (B, Hkv, Q, BLOCK + 2) and the rows [v, 1] that they weigh, (B, Hkv, Q, BLOCK + 2, D + 1)."""
        B, kv_heads, Q = query.shape
        D, W = self.value.shape[-1], self.potentials.shape[2]
        block = (torch.searchsorted(self.key, query.contiguous(), right=True) // BLOCK).clamp_max(self.key.shape[-1] // BLOCK - 1)
        inside = (block[..., None] * BLOCK + torch.arange(BLOCK, device=query.device)).flatten(2)  # (B, Hkv, Q BLOCK)
        scores = -(query[..., None] - self.key.gather(2, inside).view(B, kv_heads, Q, BLOCK)).abs()
        rows = F.pad(self.value.gather(2, inside[..., None].expand(-1, -1, -1, D)).float(), (0, 1), value=1.0).view(B, kv_heads, Q, BLOCK, D + 1)
        if self.weight is not None:
            scores = scores + self.weight.gather(2, inside.view(B, W, -1)).view_as(scores)
        block = block.view(B, W, -1)
        index = torch.stack((block, block + 1))
        potentials = self.potentials.gather(-1, index).view(2, B, kv_heads, Q)
        sums = self.sums.gather(3, index[..., None].expand(-1, -1, -1, -1, D + 1)).view(2, B, kv_heads, Q, D + 1)
        sides = (potentials - torch.stack((query, -query)).double()).float()
        return torch.cat((scores, sides.movedim(0, -1)), -1), torch.cat((rows, sums.movedim(0, -2)), -2)

    @property
    def bytes_kept(self) -> int:
        return sum(x.numel() * x.element_size() for x in self if x is not None)


class TopologicalCache:
    """
    append(), then read(), or attend() for both. runs: sort long rows. bins 0: exact; else the fixed-size state, with coordinates on so many points from low to high (None: -8 and 8).
    Tensors as topological_attention's, of the t new tokens of B rows: query_coord (B, t, H), key_coord (B, t, Hkv), value (B, t, Hkv, D), log_decay (B, t, H),
    key_bias (B, t, Hkv); coordinates, decay and bias given or None as in the first call.
    """
    def __init__(self, bins: int = 0, low: float | None = None, high: float | None = None, runs: bool = True):
        self.sorts, self.bins, self.range, self.state, self.length = runs, bins, dict(low=low, high=high), None, 0
        self.key, self.value, self.weight, self.total, self.runs = TokenBuffer(), TokenBuffer(), TokenBuffer(), None, []

    @property
    def bytes_kept(self) -> int:
        if self.state is not None:
            return sum(x.numel() * x.element_size() for x in self.state)
        return sum(x.bytes_kept for x in (self.key, self.value, self.weight, *self.runs))

    def append(self, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None, window: int | None = None):
        """Exact only. window: what lies further back than the new tokens see is forgotten."""
        if self.sorts and key_coord is not None:
            self._sort()
        self.length += value.shape[1]
        for buffer in (self.key, self.value, self.weight):
            buffer.keep(window and window - 1)
        self.value.append(value.transpose(1, 2))
        if key_coord is not None:
            self.key.append(key_coord.transpose(1, 2).float())
        if log_decay is None and key_bias is None:
            return
        weight = 0.0 if key_bias is None else key_bias.transpose(1, 2).double()
        if log_decay is not None:
            if key_bias is not None:
                weight = weight.repeat_interleave(log_decay.shape[2] // weight.shape[1], 1)
            total = log_decay.transpose(1, 2).double().cumsum(-1)
            total = total if self.total is None else total + self.total[..., None]
            weight, self.total = weight - total, total[..., -1]
            if self.total.min() < -REBASE:
                shift, self.total = self.total[..., None], torch.zeros_like(self.total)
                weight = weight + shift
                if self.weight.data is not None:
                    self.weight.tokens.add_(shift)
                self.runs = [run._replace(weight=run.weight + shift.float(), potentials=run.potentials + shift) for run in self.runs]
        self.weight.append(weight.float())

    def _sort(self):
        """Move tokens from the buffers into runs, as long as RUN of them stay; new tokens, whose queries see only some of each other, come later."""
        buffers = (self.key, self.value, self.weight)
        while self.key.data is not None and (n := self.key.tokens.shape[2]) >= 2 * RUN:
            size = RUN << ((n - RUN) // RUN).bit_length() - 1
            key, value, weight = (None if buffer.data is None else buffer.tokens[:, :, :size] for buffer in buffers)
            place = torch.arange(self.length - n, self.length - n + size, dtype=torch.int32, device=key.device).expand_as(key)
            for buffer in buffers:
                buffer.keep(n - size)
            while self.runs and self.runs[-1].key.shape[-1] == size:
                last, size = self.runs.pop(), 2 * size
                key, value, place = (torch.cat(pair, 2) for pair in ((last.key, key), (last.value, value), (last.place, place)))
                weight = None if weight is None else torch.cat((last.weight, weight), 2)
            self.runs.append(SortedRun.of(key, value, place, weight))

    def _forget(self, first_key: Tensor):
        """What no row sees from now on, where a run would hide it from some; first_key (B, t) of the new tokens."""
        least, tail = int(first_key.min()), self.length - self.key.tokens.shape[2] if self.key.data is not None else 0
        if self.runs and (first_key > tail - sum(run.key.shape[-1] for run in self.runs)).any():
            if least < tail:
                return self._undo()
            self.runs = []
        if not self.runs and self.sorts and least > tail:
            for buffer in (self.key, self.value, self.weight):
                buffer.keep(self.length - least)

    def _undo(self):
        """All tokens in the buffers again, in their order, for good."""
        self.sorts, runs, self.runs = False, self.runs, []
        tail = [None if buffer.data is None else buffer.tokens for buffer in (self.key, self.value, self.weight)]
        first = self.length - tail[0].shape[2]
        place = torch.cat([run.place for run in runs] + [torch.arange(first, self.length, dtype=torch.int32, device=tail[0].device).expand_as(tail[0])], 2)
        order = place.argsort(-1)
        for name, last in zip(("key", "value", "weight"), tail):
            if last is not None:
                x = torch.cat([getattr(run, name) for run in runs] + [last], 2)
                order_of_x = order.repeat_interleave(x.shape[1] // order.shape[1], 1)
                buffer = TokenBuffer()
                buffer.append(x.gather(2, order_of_x if x.dim() == 3 else order_of_x[..., None].expand_as(x)))
                setattr(self, name, buffer)

    def read(self, query_coord: Tensor | None, first_key: Tensor | None = None, heads: int | None = None) -> Tensor:
        """
        (B, t, H, D) for the last t tokens. first_key (B, t) int32: the first key that each sees, counted from the row's first token; None: all.
        Without coordinates heads (None: as many as there are weights) and first_key's t, else 1, tell the queries.
        """
        if first_key is not None and (self.runs or self.value.end - self.value.begin >= 2 * RUN):
            self._forget(first_key)
        value = self.value.tokens
        kv_heads, n = value.shape[1], value.shape[2]
        if query_coord is not None:
            queries = query_coord.shape[1]
            query = query_coord.transpose(1, 2).float().unflatten(1, (kv_heads, -1))
            scores = (query[..., None] - self.key.tokens[:, :, None, None]).abs_().neg_()  # (B, Hkv, G, t, n)
        else:
            queries = 1 if first_key is None else first_key.shape[1]
            heads = heads or (kv_heads if self.weight.data is None else self.weight.data.shape[1])
            scores = torch.zeros(value.shape[0], kv_heads, heads // kv_heads, queries, n, device=value.device)
        if self.weight.data is not None:
            scores += self.weight.tokens.unflatten(1, (kv_heads, -1))[:, :, :, None]
        hidden = hidden_keys(first_key, self.length - n, queries, self.length)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
        scores = scores.flatten(2, 3)
        if self.runs:
            parts = [run.read(query.flatten(2, 3)) for run in self.runs]
            highest = torch.stack([x.amax(-1) for x in (scores, *(part for part, _ in parts))]).amax(0)[..., None]
            p = scores.sub_(highest).exp_()
            out = torch.cat((p @ value.float(), p.sum(-1, keepdim=True)), -1)
            for part, rows in parts:
                out += ((part - highest).exp_()[..., None, :] @ rows).squeeze(-2)
            out = (out[..., :-1] / out[..., -1:]).to(value.dtype)
        else:
            out = scores.softmax(-1).to(value.dtype) @ value
        return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def attend(self, query_coord: Tensor | None, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None,
               positions: Tensor | None = None, first_key: Tensor | None = None, window: int | None = None) -> Tensor:
        """
        The new tokens' (B, t, H, D). positions (B, t) int: their places in their documents; None: all in one. first_key as in read, documents and window
        in it. The first tokens of a row go through topological_attention, however many; later ones see what is kept. ValueError for a window with bins.
        """
        if query_coord is None and window is None:  # a running sum, which two bins and keys in one place hold exactly
            key_coord = torch.zeros(value.shape[:3], device=value.device)
            query_coord, self.bins = key_coord if log_decay is None else torch.zeros_like(log_decay), 2
        if self.bins and window is not None:
            raise ValueError(f"a state of {self.bins} bins forgets nothing, and this layer sees {window} tokens back; train it with unlimited windows or keep bins = 0")
        if not self.length:
            return self._prefill(query_coord, key_coord, value, log_decay, key_bias, positions, window)
        t = value.shape[1]
        if t > 1 and log_decay is not None and log_decay.sum(1).min() < -REBASE:  # log-weights relative to the last token's would lose the first ones' digits
            whole = (query_coord, key_coord, value, log_decay, key_bias, positions, first_key)
            return torch.cat([self.attend(*(None if x is None else x[:, part] for x in whole), window) for part in (slice(t // 2), slice(t // 2, None))], 1)
        if not self.bins:
            self.append(key_coord, value, log_decay, key_bias, window)
            kept = first_key if first_key is not None or t == 1 else torch.zeros(value.shape[:2], dtype=torch.int32, device=value.device)
            return self.read(query_coord, kept, None if log_decay is None else log_decay.shape[2])
        self.length += t
        outs = []
        for new in range(t):
            if positions is not None and (fresh := positions[:, new] == 0).any():
                self.state = BinnedState(self.state.sums.masked_fill(fresh[:, None, None, None], 0), self.state.log_scale.masked_fill(fresh[:, None], LOWEST))
            now = [None if x is None else x[:, new] for x in (query_coord, key_coord, value, log_decay, key_bias)]
            out, self.state = topological_attention_binned_step(self.state, *now, **self.range)
            outs.append(out)
        return torch.stack(outs, 1)

    def _prefill(self, query_coord, key_coord, value, log_decay, key_bias, positions, window) -> Tensor:
        T = value.shape[1]
        doc_start = None if positions is None else (torch.arange(T, device=value.device) - positions).int()
        if self.bins:
            self.length = T
            self.state = topological_attention_binned_state(key_coord, value, log_decay, key_bias, doc_start, heads=query_coord.shape[2], bins=self.bins, **self.range)
            return topological_attention_binned(query_coord, key_coord, value, log_decay, key_bias, doc_start, bins=self.bins, **self.range)
        self.append(key_coord, value, log_decay, key_bias, window)
        return topological_attention(query_coord, key_coord, value, log_decay=log_decay, key_bias=key_bias, doc_start=doc_start, window=window)
