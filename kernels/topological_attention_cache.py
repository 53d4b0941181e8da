"""
Topological attention, one token after another: what a layer keeps of the tokens before.

    out_i = sum_j softmax_j(-|a_i - b_j| + F_i - F_j + c_j) v_j        as in topological_attention.py

Exact: of every token its coordinate b, its values v and, with a decay or a bias, its log-weight c - F in float32; D + 1 or D + 2 numbers a head, where
softmax attention keeps 2 D. F_i is common to all keys of a query and left out; log-weights are stored relative to a recent F, so that they do not lose digits
in a long text. A token reads all of them: D + 1 multiply-adds each, no product of queries and keys.
Long rows on a CPU, float32, D a multiple of 8: compiled loops (topological_attention_cache_loops.py) read the newest tokens, fewer than RUN where tokens come
one by one, and runs of RUN, 2 RUN, 4 RUN, .. tokens. A run has the places of its tokens sorted by b; two of one size become one by a merge, as in a binary
counter. It has the sums of [v, 1] over all its blocks of BLOCK tokens up to each block's end, weighted as seen from there, and over all blocks from each block's
start. A query reads in each run the block that its coordinate falls into and one sum on either side, BLOCK + 2 rows instead of all, exactly, for
1 + 2 (D + 1) / BLOCK numbers more a token; a token is merged log2(T / RUN) times. A query that does not see all of a run (a window, a document that begins in it)
reads its tokens one by one. Everything else (a GPU, other dtypes and widths, no Numba) reads all tokens by tensor operations.
With bins: coordinates on so many points, M (D + 1) numbers a head and a cost a token that do not depend on how much came before. Without
coordinates two points, exactly.

Status: in use. 4 layers of 4 heads of 64 after 64,900 tokens, seven runs each, two threads of an AMD EPYC, medians: 0.53 ms a token without and 0.74 with a decay,
half of it PyTorch's small operations; 0.64 on average over a text's first 40,000 tokens. All layers' pause where 65,536 tokens become one run: 41 ms. The form before,
runs of 8,192 and more made and read by tensor operations: 3.7 and 3.9 ms after 65,536 tokens, a pause of 740 ms.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for a cache without keys; the quantised state: topological_attention_binned.py
"""

import numpy as np
import torch
from torch import Tensor

from kernels.backend import cpu_loops
from kernels.topological_attention import topological_attention
from kernels.topological_attention_binned import BinnedState, topological_attention_binned, topological_attention_binned_state, topological_attention_binned_step
from kernels.topological_attention_reference import LOWEST

RUN, BLOCK = 512, 64    # fewest tokens of a run, tokens of its blocks: from 256 to 1,024 and from 32 to 64 a token's time differs by less than 0.15 ms of 4
WINDOW_RUNS = 8         # a window holds at least so many of the longest runs, of which it hides one in part; RUN is the least
REBASE = 64.0           # how far F may move from what log-weights are relative to: float32 keeps 4e-6 of a weight there


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


class SortedRuns:
    """
    Reads a row's tokens by the loops of topological_attention_cache_loops.py, and the runs that they make: the tokens' order by coordinate and sums over blocks
    of it. The tokens stay in their buffers, key, value and, where there are log-weights, weight.
    """
    def __init__(self, loops, key: TokenBuffer, value: TokenBuffer, weight: TokenBuffer):
        self.loops, self.key, self.value, self.weight = loops, key, value, weight
        self.runs, self.end = [], 0     # (first place, last + 1) of each, one after another up to this place
        self.order = TokenBuffer()      # (B, Hkv, tokens) int32: places
        self.edge, self.potential, self.unit, self.sums = TokenBuffer(), TokenBuffer(), TokenBuffer(), TokenBuffer()  # (B, .., blocks, ..): see State
        self.state = None

    @property
    def blocks(self) -> tuple[TokenBuffer, ...]:
        return self.edge, self.potential, self.unit, self.sums

    @property
    def bytes_kept(self) -> int:
        return sum(x.bytes_kept for x in (self.order, *self.blocks))

    def forget(self, first: int):
        """Forgets the runs that end before this place."""
        while self.runs and self.runs[0][1] <= first:
            self.runs.pop(0)
        if not self.runs:
            self.end = max(self.end, first)
        kept = self.end - self.runs[0][0] if self.runs else 0
        self.order.keep(kept)
        for buffer in self.blocks:
            buffer.keep(kept // BLOCK)

    def extend(self, length: int, window: int | None):
        """Takes what follows the last run of rows of this length, RUN tokens each time."""
        count = (length - self.end) // RUN * RUN
        if count <= 0:
            return
        B, kv_heads, kept, D = self.value.tokens.shape
        weight_heads = self._weight_heads()
        sides = (B, weight_heads, count // BLOCK, 2)
        self.order.append(torch.arange(self.end, self.end + count, dtype=torch.int32).expand(B, kv_heads, count))
        self.edge.append(torch.zeros(B, kv_heads, count // BLOCK))
        self.potential.append(torch.zeros(sides, dtype=torch.float64))
        self.unit.append(torch.zeros(sides))
        self.sums.append(torch.zeros(*sides, D))

        # as a binary counter
        steps, changed = [], self.end
        for begin in range(self.end, self.end + count, RUN):
            end = begin + RUN
            steps.append((begin, begin, end))
            while self.runs and self._merges(self.runs[-1], end - begin, length - kept, window):
                first, middle = self.runs.pop()
                steps.append((first, middle, end))
                begin = first
            self.runs.append((begin, end))
            changed = min(changed, begin)
        self.end += count
        state = self._state(length, 1, kv_heads)
        scratch = max(RUN, *(middle - first for first, middle, _ in steps))
        state = state._replace(runs=state.runs[state.runs[:, 0] >= changed], steps=np.array(steps), scratch=np.empty((len(state.rows), scratch), np.int32))
        self.loops.arrange(state, B * kv_heads, B * weight_heads)

    @staticmethod
    def _merges(run: tuple[int, int], size: int, first: int, window: int | None) -> bool:
        """Whether the last run takes the next one in: two of a size, with no forgotten token, and short enough for a window, which hides a run as a whole."""
        return run[1] - run[0] == size and run[0] >= first and (window is None or 2 * size <= window // WINDOW_RUNS)

    def _weight_heads(self) -> int:
        return (self.value if self.weight.data is None else self.weight).data.shape[1]

    def _state(self, length: int, queries: int, heads: int):
        _, kv_heads, capacity, D = self.value.data.shape
        self.state = self.loops.state_of_threads(self.state)
        named = dict(key=self.key, value=self.value, weight=self.weight, order=self.order, edge=self.edge, potential=self.potential, unit=self.unit, sums=self.sums)
        arrays = {name: buffer.data.view(-1).numpy() for name, buffer in named.items() if buffer.data is not None}
        run_capacity, block_capacity = (self.order.data.shape[2], self.edge.data.shape[2]) if self.runs else (0, 0)
        sizes = (kv_heads, heads, self._weight_heads(), queries, D, length, capacity, self.value.end - length, run_capacity, self.order.end - self.end, block_capacity, BLOCK)
        runs = [(begin, end, self.edge.end - (self.end - begin) // BLOCK) for begin, end in self.runs]
        return self.state._replace(sizes=np.array(sizes), runs=np.array(runs, np.int64).reshape(-1, 3), **arrays)

    def read(self, query_coord: Tensor | None, first_key: Tensor | None, length: int, queries: int, heads: int) -> Tensor:
        """As TopologicalCache.read, for rows of this length."""
        B, _, kept, D = self.value.tokens.shape
        first = np.full(B * queries, length - kept)
        if first_key is not None:
            first = np.maximum(first, first_key.reshape(-1).numpy())
        query = np.empty(0, np.float32) if query_coord is None else query_coord.detach().transpose(1, 2).float().reshape(-1).numpy()
        out = torch.empty(B, queries, heads, D)
        state = self._state(length, queries, heads)._replace(first=first, query=query, out=out.view(-1).numpy())
        self.loops.read(state, B * queries * heads, length - self.end + BLOCK * len(self.runs))
        return out


class TopologicalCache:
    """
    append(), then read(), or attend() for both. bins 0: exact; else the fixed-size state, with coordinates on so many points from low to high (None: -8 and 8).
    Tensors as topological_attention's, of the t new tokens of B rows: query_coord (B, t, H), key_coord (B, t, Hkv), value (B, t, Hkv, D), log_decay (B, t, H),
    key_bias (B, t, Hkv); coordinates, decay and bias given or None as in the first call.
    """
    def __init__(self, bins: int = 0, low: float | None = None, high: float | None = None):
        self.bins, self.range, self.state, self.length = bins, dict(low=low, high=high), None, 0
        self.key, self.value, self.weight, self.total = TokenBuffer(), TokenBuffer(), TokenBuffer(), None
        self.runs = None  # SortedRuns, where loops serve

    @property
    def bytes_kept(self) -> int:
        if self.state is not None:
            return sum(x.numel() * x.element_size() for x in self.state)
        return sum(x.bytes_kept for x in (self.key, self.value, self.weight, self.runs) if x is not None)

    def append(self, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None, window: int | None = None):
        """Exact only. window: what lies further back than the new tokens see is forgotten."""
        if not self.length and value.device.type == "cpu" and value.dtype == torch.float32 and value.shape[-1] % 8 == 0:
            loops = cpu_loops("topological_attention_cache_loops")
            if loops is not None:
                self.runs = SortedRuns(loops, self.key, self.value, self.weight)
        self._settle(window)  # before the new tokens, whose queries see only some of each other
        self.length += value.shape[1]
        self.value.append(value.detach().transpose(1, 2))
        if key_coord is not None:
            self.key.append(key_coord.detach().transpose(1, 2).float())
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
                if self.runs is not None and self.runs.potential.data is not None:
                    self.runs.potential.tokens.add_(shift[..., None])
        self.weight.append(weight.float())

    def _settle(self, window: int | None):
        """Forgets what the next token's window hides, and takes what there is into runs."""
        if window is not None:
            self._forget(self.length - (window - 1))
        if self.runs is not None and self.key.data is not None:
            self.runs.extend(self.length, window)

    def _forget(self, first: int):
        """What lies before this place of a row."""
        for buffer in (self.key, self.value, self.weight):
            buffer.keep(max(0, self.length - first))
        if self.runs is not None:
            self.runs.forget(first)

    def read(self, query_coord: Tensor | None, first_key: Tensor | None = None, heads: int | None = None) -> Tensor:
        """
        (B, t, H, D) for the last t tokens. first_key (B, t) int32: the first key that each sees, counted from the row's first token, none less than a token
        before it saw; None: all. Without coordinates heads (None: as many as there are weights) and first_key's t, else 1, tell the queries.
        """
        kv_heads = self.value.data.shape[1]
        if query_coord is not None:
            queries, heads = query_coord.shape[1:]
        else:
            queries = 1 if first_key is None else first_key.shape[1]
            heads = heads or (kv_heads if self.weight.data is None else self.weight.data.shape[1])
        if self.runs is not None:
            if first_key is not None:
                self._forget(int(first_key.min()))
            return self.runs.read(query_coord, first_key, self.length, queries, heads)
        return self._read_whole(query_coord, first_key, queries, heads)

    def _read_whole(self, query_coord: Tensor | None, first_key: Tensor | None, queries: int, heads: int) -> Tensor:
        """read() without loops."""
        value = self.value.tokens
        kv_heads, n = value.shape[1], value.shape[2]
        if query_coord is not None:
            query = query_coord.transpose(1, 2).float().unflatten(1, (kv_heads, -1))
            scores = (query[..., None] - self.key.tokens[:, :, None, None]).abs_().neg_()  # (B, Hkv, G, t, n)
        else:
            scores = torch.zeros(value.shape[0], kv_heads, heads // kv_heads, queries, n, device=value.device)
        if self.weight.data is not None:
            scores += self.weight.tokens.unflatten(1, (kv_heads, -1))[:, :, :, None]
        hidden = hidden_keys(first_key, self.length - n, queries, self.length)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
            if first_key is not None:  # what no row sees from now on
                self._forget(int(first_key.min()))
        out = scores.flatten(2, 3).softmax(-1).to(value.dtype) @ value
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
        self._settle(window)
        return topological_attention(query_coord, key_coord, value, log_decay=log_decay, key_bias=key_bias, doc_start=doc_start, window=window)
