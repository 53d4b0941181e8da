"""
Topological attention, one token after another: what a layer keeps of the tokens before.

    out_i = sum_j softmax_j(-|a_i - b_j| + F_i - F_j + c_j) v_j        as in topological_attention.py

Exact: of every token its coordinate b, its values v and, with a decay or a bias, its log-weight c - F in float32; D + 1 or D + 2 numbers a head, where
softmax attention keeps 2 D. A token reads all of them: D + 1 multiply-adds each, no product of queries and keys. F_i is common to all keys of a query and
left out; log-weights are stored relative to a recent F, so that they do not lose digits in a long text.
With bins: coordinates on so many points, M (D + 1) numbers a head and a cost a token that do not depend on how much came before. Without
coordinates two points, exactly.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for a cache without keys; the quantised state: topological_attention_binned.py
"""

import torch
from torch import Tensor

from kernels.topological_attention import topological_attention
from kernels.topological_attention_binned import BinnedState, topological_attention_binned, topological_attention_binned_state, topological_attention_binned_step
from kernels.topological_attention_loglinear import LOWEST

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


class TopologicalCache:
    """
    append(), then read(), or attend() for both. bins 0: exact; else the fixed-size state, with coordinates on so many points from low to high (None: -8 and 8).
    Tensors as topological_attention's, of the t new tokens of B rows: query_coord (B, t, H), key_coord (B, t, Hkv), value (B, t, Hkv, D), log_decay (B, t, H),
    key_bias (B, t, Hkv); coordinates, decay and bias given or None as in the first call.
    """
    def __init__(self, bins: int = 0, low: float | None = None, high: float | None = None):
        self.bins, self.range, self.state, self.length = bins, dict(low=low, high=high), None, 0
        self.key, self.value, self.weight, self.total = TokenBuffer(), TokenBuffer(), TokenBuffer(), None

    @property
    def bytes_kept(self) -> int:
        if self.state is not None:
            return sum(x.numel() * x.element_size() for x in self.state)
        return sum(x.bytes_kept for x in (self.key, self.value, self.weight))

    def append(self, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None, window: int | None = None):
        """Exact only. window: what lies further back than the new tokens see is forgotten."""
        self.length += value.shape[1]
        for buffer in (self.key, self.value, self.weight):
            buffer.keep(window and window - 1)
        self.value.append(value.transpose(1, 2))
        if key_coord is not None:
            self.key.append(key_coord.transpose(1, 2).float())
        if log_decay is not None or key_bias is not None:
            weight = 0.0 if key_bias is None else key_bias.transpose(1, 2).double()
            if log_decay is not None:
                if key_bias is not None:
                    weight = weight.repeat_interleave(log_decay.shape[2] // weight.shape[1], 1)
                total = log_decay.transpose(1, 2).double().cumsum(-1)
                total = total if self.total is None else total + self.total[..., None]
                weight, self.total = weight - total, total[..., -1]
            self.weight.append(weight.float())
            if self.total is not None and self.total.min() < -REBASE:
                self.weight.tokens.add_(self.total[..., None])
                self.total = torch.zeros_like(self.total)

    def read(self, query_coord: Tensor | None, first_key: Tensor | None = None, heads: int | None = None) -> Tensor:
        """
        (B, t, H, D) for the last t tokens. first_key (B, t) int32: the first key that each sees, counted from the row's first token; None: all.
        Without coordinates heads (None: as many as there are weights) and first_key's t, else 1, tell the queries.
        """
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
            weight = self.weight.tokens
            scores += weight.unflatten(1, (kv_heads, -1))[:, :, :, None]
        hidden = hidden_keys(first_key, self.length - n, queries, self.length)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
        out = scores.softmax(-1).to(value.dtype).flatten(2, 3) @ value
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
        if not self.bins:
            self.append(key_coord, value, log_decay, key_bias, window)
            kept = first_key if first_key is not None or value.shape[1] == 1 else torch.zeros(value.shape[:2], dtype=torch.int32, device=value.device)
            return self.read(query_coord, kept, None if log_decay is None else log_decay.shape[2])
        self.length += value.shape[1]
        outs = []
        for t in range(value.shape[1]):
            if positions is not None and (fresh := positions[:, t] == 0).any():
                self.state = BinnedState(self.state.sums.masked_fill(fresh[:, None, None, None], 0), self.state.log_scale.masked_fill(fresh[:, None], LOWEST))
            now = [None if x is None else x[:, t] for x in (query_coord, key_coord, value, log_decay, key_bias)]
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
