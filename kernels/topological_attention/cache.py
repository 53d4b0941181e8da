"""
Topological attention, one token after another: what a layer keeps of the tokens before.

    out_i = sum_j softmax_j(-|a_i - b_j| + F_i - F_j + c_j) v_j        as in __init__.py

Exact: of every token it keeps its coordinate b, its values v and, with a decay or a bias, its log-weight c - F in
float32. That is D + 1 or D + 2 numbers a head, where softmax attention keeps 2 D. F_i is common to all keys of a query
and left out; log-weights are stored relative to a recent F, so that they do not lose digits in a long text. A token
reads all of them: D + 1 multiply-adds each, no product of queries and keys.

Long rows on a CPU (float32, D a multiple of 8) are read by compiled loops (cache_cpu.py): the newest tokens, fewer than
RUN where tokens come one by one, and runs of RUN, 2 RUN, 4 RUN, .. tokens. A run has the positions of its tokens sorted
by b; two of one size become one by a merge, as in a binary counter. It has the sums of [v, 1] over all its blocks of
BLOCK tokens up to each block's end, weighted as seen from there, and over all blocks from each block's start. A query
reads in each run the block that its coordinate falls into and one sum on either side: BLOCK + 2 rows instead of all,
exactly, for 1 + 2 (D + 1) / BLOCK numbers more a token. A token is merged log2(T / RUN) times. A query that does not
see all of a run (a window, a document that begins in it) reads its tokens one by one. Everything else (a GPU, other
dtypes and widths, no Numba) reads all tokens by tensor operations.

With bins: coordinates on so many points, M (D + 1) numbers a head and a cost a token that do not depend on how much
came before. Without coordinates there are two points, exactly.

Status: in use. 4 layers of 4 heads of 64 after 64,900 tokens, seven runs each, two threads of an AMD EPYC, medians:
0.53 ms a token without and 0.74 with a decay, half of it PyTorch's small operations; 0.64 on average over a text's
first 40,000 tokens. All layers' pause where 65,536 tokens become one run: 41 ms. The form before, runs of 8,192 and
more made and read by tensor operations: 3.7 and 3.9 ms after 65,536 tokens, a pause of 740 ms.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for a cache without keys; the
quantised state: binned.py
"""

import numpy as np
import torch
from torch import Tensor

from kernels.backend import cpu_loops
from kernels.topological_attention import topological_attention
from kernels.topological_attention.binned import (
    BinnedState,
    topological_attention_binned,
    topological_attention_binned_state,
    topological_attention_binned_step,
)
from kernels.topological_attention.reference import LOWEST

# The fewest tokens of a run, and the tokens of its blocks: from 256 to 1,024 and from 32 to 64 a token's time differs
# by less than 0.15 ms of 4.
RUN = 512
BLOCK = 64
# A window holds at least so many of the longest runs, of which it hides one in part; RUN is the least.
WINDOW_RUNS = 8
# How far F may move from what log-weights are relative to: float32 keeps 4e-6 of a weight there.
REBASE = 64.0


class TokenBuffer:
    """Rows of tokens (B, H, n, ...) that grow at the end and are dropped at the front."""

    def __init__(self):
        self.data = None    # (B, H, capacity, ...); None: there was no token yet
        self.begin = 0      # the first token that is kept, an index of data
        self.end = 0        # the index after the last token

    def append(self, x: Tensor):
        """Appends x (B, H, t, ...), the tokens that follow."""
        needed = self.end + x.shape[2]
        if self.data is None or needed > self.data.shape[2]:
            kept = self.end - self.begin
            grown = x.new_empty(*x.shape[:2], max(64, (kept + x.shape[2]) * 3 // 2), *x.shape[3:])
            if kept:
                grown[:, :, :kept] = self.tokens
            self.data = grown
            self.begin = 0
            self.end = kept
        self.data[:, :, self.end:self.end + x.shape[2]] = x
        self.end += x.shape[2]

    def keep(self, count: int | None):
        """Forgets all but the last `count` tokens (None: all stay); their memory goes at the next growth."""
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
    Returns which of the keys begin .. end - 1 of a row the last `queries` tokens do not see, (B or 1, queries,
    end - begin), or None where they see all. first_key (B, queries), integer: the first key each of them sees; None: 0.
    """
    device = None if first_key is None else first_key.device
    if queries == 1 and (first_key is None or not (first_key > begin).any()):
        return None
    key = torch.arange(begin, end, device=device)
    query = torch.arange(end - queries, end, device=device)
    hidden = (key > query[:, None])[None]
    return hidden if first_key is None else hidden | (key < first_key[..., None])


class SortedRuns:
    """
    Reads a row's tokens by the loops of cache_cpu.py, and keeps the runs that they make: the tokens' order by
    coordinate and sums over blocks of it. The tokens stay in their buffers.
    """

    def __init__(self, loops, key: TokenBuffer, value: TokenBuffer, weight: TokenBuffer):
        self.loops = loops              # the module of the loops
        self.key = key                  # the cache's buffers
        self.value = value
        self.weight = weight            # empty where there are no log-weights
        self.runs = []                  # (first position, end) of each run, one after another
        self.end = 0                    # the end of the last run
        self.order = TokenBuffer()      # (B, Hkv, tokens) int32: positions
        self.edge = TokenBuffer()       # (B, Hkv, blocks), and for the others see State in cache_cpu.py
        self.potential = TokenBuffer()  # (B, heads of weights, blocks, 2) float64
        self.unit = TokenBuffer()       # (B, heads of weights, blocks, 2)
        self.sums = TokenBuffer()       # (B, heads of weights, blocks, 2, D)
        self.state = None               # the loops' State, for its threads' arrays; None: nothing was read yet

    @property
    def blocks(self) -> tuple[TokenBuffer, ...]:
        return self.edge, self.potential, self.unit, self.sums

    @property
    def bytes_kept(self) -> int:
        return sum(x.bytes_kept for x in (self.order, *self.blocks))

    def forget(self, first: int):
        """Forgets the runs that end before this position."""
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
        B, kv_heads, kept, _ = self.value.tokens.shape
        self._make_room(count)

        # the runs, as in a binary counter
        steps = []
        changed = self.end
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

        # their orders and sums
        state = self._state(length, 1, kv_heads)
        scratch = max(RUN, *(middle - first for first, middle, _ in steps))
        state = state._replace(
            runs=state.runs[state.runs[:, 0] >= changed],
            steps=np.array(steps),
            scratch=np.empty((len(state.rows), scratch), np.int32),
        )
        self.loops.arrange(state, B * kv_heads, B * self._weight_heads())

    def _make_room(self, count: int):
        """Appends the tokens of new runs to the order, in their order, and their blocks, which are empty yet."""
        B, kv_heads, _, D = self.value.tokens.shape
        blocks = count // BLOCK
        sides = (B, self._weight_heads(), blocks, 2)
        positions = torch.arange(self.end, self.end + count, dtype=torch.int32)
        self.order.append(positions.expand(B, kv_heads, count))
        self.edge.append(torch.zeros(B, kv_heads, blocks))
        self.potential.append(torch.zeros(sides, dtype=torch.float64))
        self.unit.append(torch.zeros(sides))
        self.sums.append(torch.zeros(*sides, D))

    @staticmethod
    def _merges(run: tuple[int, int], size: int, first: int, window: int | None) -> bool:
        """
        Tells whether the last run takes the next one in: two of a size, with no forgotten token, and short enough for a
        window, which hides a run as a whole.
        """
        if run[1] - run[0] != size or run[0] < first:
            return False
        return window is None or 2 * size <= window // WINDOW_RUNS

    def _weight_heads(self) -> int:
        return (self.value if self.weight.data is None else self.weight).data.shape[1]

    def _state(self, length: int, queries: int, heads: int):
        """Returns the loops' State for rows of this length."""
        _, kv_heads, capacity, D = self.value.data.shape
        self.state = self.loops.state_of_threads(self.state)

        # the buffers
        buffers = dict(
            key=self.key,
            value=self.value,
            weight=self.weight,
            order=self.order,
            edge=self.edge,
            potential=self.potential,
            unit=self.unit,
            sums=self.sums,
        )
        arrays = {name: x.data.view(-1).numpy() for name, x in buffers.items() if x.data is not None}

        # their sizes
        sizes = self.loops.Sizes(
            kv_heads=kv_heads,
            heads=heads,
            weight_heads=self._weight_heads(),
            queries=queries,
            D=D,
            length=length,
            capacity=capacity,
            origin=self.value.end - length,
            run_capacity=self.order.data.shape[2] if self.runs else 0,
            run_origin=self.order.end - self.end,
            block_capacity=self.edge.data.shape[2] if self.runs else 0,
            block=BLOCK,
        )
        runs = [(begin, end, self.edge.end - (self.end - begin) // BLOCK) for begin, end in self.runs]
        return self.state._replace(sizes=np.array(sizes), runs=np.array(runs, np.int64).reshape(-1, 3), **arrays)

    def read(
        self, query_coord: Tensor | None, first_key: Tensor | None, length: int, queries: int, heads: int
    ) -> Tensor:
        """Returns what TopologicalCache.read does, for rows of this length."""
        B, _, kept, D = self.value.tokens.shape

        # the first position that each query sees, and its coordinate
        first = np.full(B * queries, length - kept)
        if first_key is not None:
            first = np.maximum(first, first_key.reshape(-1).numpy())
        if query_coord is None:
            query = np.empty(0, np.float32)
        else:
            query = query_coord.detach().transpose(1, 2).float().reshape(-1).numpy()

        # the result
        out = torch.empty(B, queries, heads, D)
        state = self._state(length, queries, heads)._replace(first=first, query=query, out=out.view(-1).numpy())
        self.loops.read(state, B * queries * heads, length - self.end + BLOCK * len(self.runs))
        return out


class TopologicalCache:
    """
    Keeps a layer's tokens. append() takes new ones, read() attends for them, attend() does both.

    bins: 0: exact; else the state of fixed size, with coordinates on so many points from low to high (None: -8 and 8).
    Tensors are topological_attention's, of the t new tokens of B rows: query_coord (B, t, H), key_coord (B, t, Hkv),
    value (B, t, Hkv, D), log_decay (B, t, H), key_bias (B, t, Hkv); coordinates, decay and bias are there or None as in
    the first call.
    """

    def __init__(self, bins: int = 0, low: float | None = None, high: float | None = None):
        self.bins = bins
        self.range = dict(low=low, high=high)
        self.state = None           # BinnedState; None: exact, or no token yet
        self.length = 0             # tokens of a row so far, those that are forgotten included
        self.key = TokenBuffer()    # (B, Hkv, n) float32
        self.value = TokenBuffer()  # (B, Hkv, n, D)
        self.weight = TokenBuffer()     # (B, Hkv or H, n) float32: c - F, relative to a recent F
        self.total = None           # (B, H) float64: F since what the weights are relative to; None: no decay yet
        self.runs = None            # SortedRuns; None: loops do not serve

    @property
    def bytes_kept(self) -> int:
        if self.state is not None:
            return sum(x.numel() * x.element_size() for x in self.state)
        return sum(x.bytes_kept for x in (self.key, self.value, self.weight, self.runs) if x is not None)

    def append(
        self, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None,
        key_bias: Tensor | None = None, window: int | None = None
    ):
        """Appends new tokens, exactly only. With a window, what lies further back than they see is forgotten."""
        # which reads serve is decided with the first tokens
        if not self.length and value.device.type == "cpu" and value.dtype == torch.float32 and value.shape[-1] % 8 == 0:
            loops = cpu_loops("topological_attention.cache_cpu")
            if loops is not None:
                self.runs = SortedRuns(loops, self.key, self.value, self.weight)

        # runs are made before the new tokens, whose queries see only some of each other
        self._settle(window)
        self.length += value.shape[1]
        self.value.append(value.detach().transpose(1, 2))
        if key_coord is not None:
            self.key.append(key_coord.detach().transpose(1, 2).float())
        if log_decay is not None or key_bias is not None:
            self._append_weights(log_decay, key_bias)

    def _append_weights(self, log_decay: Tensor | None, key_bias: Tensor | None):
        """Appends the log-weights c - F of new tokens."""
        weight = 0.0 if key_bias is None else key_bias.transpose(1, 2).double()
        if log_decay is not None:
            # F goes on from the tokens before
            if key_bias is not None:
                weight = weight.repeat_interleave(log_decay.shape[2] // weight.shape[1], 1)
            total = log_decay.transpose(1, 2).double().cumsum(-1)
            total = total if self.total is None else total + self.total[..., None]
            weight = weight - total
            self.total = total[..., -1]

            # all weights become relative to the last token's F
            if self.total.min() < -REBASE:
                shift = self.total[..., None]
                self.total = torch.zeros_like(self.total)
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
        """Forgets what lies before this position of a row."""
        for buffer in (self.key, self.value, self.weight):
            buffer.keep(max(0, self.length - first))
        if self.runs is not None:
            self.runs.forget(first)

    def read(self, query_coord: Tensor | None, first_key: Tensor | None = None, heads: int | None = None) -> Tensor:
        """
        Returns (B, t, H, D) for the last t tokens.

        first_key (B, t) int32: the first key that each sees, counted from the row's first token, none less than a token
        before it saw; None: all. Without coordinates `heads` (None: as many as there are weights) and first_key's t,
        else 1, tell the queries.
        """
        # how many queries of how many heads
        kv_heads = self.value.data.shape[1]
        if query_coord is not None:
            queries, heads = query_coord.shape[1:]
        else:
            queries = 1 if first_key is None else first_key.shape[1]
            heads = heads or (kv_heads if self.weight.data is None else self.weight.data.shape[1])

        # by loops, or by tensor operations
        if self.runs is not None:
            if first_key is not None:
                self._forget(int(first_key.min()))
            return self.runs.read(query_coord, first_key, self.length, queries, heads)
        return self._read_by_tensors(query_coord, first_key, queries, heads)

    def _read_by_tensors(
        self, query_coord: Tensor | None, first_key: Tensor | None, queries: int, heads: int
    ) -> Tensor:
        """Returns what read() does, without loops."""
        value = self.value.tokens
        B, kv_heads, n, _ = value.shape

        # the scores (B, Hkv, H / Hkv, t, n)
        if query_coord is not None:
            query = query_coord.transpose(1, 2).float().unflatten(1, (kv_heads, -1))
            scores = (query[..., None] - self.key.tokens[:, :, None, None]).abs_().neg_()
        else:
            scores = torch.zeros(B, kv_heads, heads // kv_heads, queries, n, device=value.device)
        if self.weight.data is not None:
            scores += self.weight.tokens.unflatten(1, (kv_heads, -1))[:, :, :, None]

        # what the queries see
        hidden = hidden_keys(first_key, self.length - n, queries, self.length)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
            if first_key is not None:  # what no row sees from now on
                self._forget(int(first_key.min()))

        # weights and sums
        out = scores.flatten(2, 3).softmax(-1).to(value.dtype) @ value
        return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def attend(
        self, query_coord: Tensor | None, key_coord: Tensor | None, value: Tensor, log_decay: Tensor | None = None,
        key_bias: Tensor | None = None, positions: Tensor | None = None, first_key: Tensor | None = None,
        window: int | None = None
    ) -> Tensor:
        """
        Returns the new tokens' (B, t, H, D).

        positions (B, t), integer: their positions in their documents; None: all are in one document. first_key is
        read's, with documents and window in it. The first tokens of a row go through topological_attention, however
        many; later ones see what is kept. Raises ValueError for a window with bins.
        """
        if query_coord is None and window is None:
            # a running sum, which two bins and keys at one point hold exactly
            key_coord = torch.zeros(value.shape[:3], device=value.device)
            query_coord = key_coord if log_decay is None else torch.zeros_like(log_decay)
            self.bins = 2
        if self.bins and window is not None:
            raise ValueError(
                f"a state of {self.bins} bins forgets nothing, and this layer sees {window} tokens back; "
                "train it with unlimited windows or keep bins = 0"
            )
        tensors = (query_coord, key_coord, value, log_decay, key_bias)
        if not self.length:
            return self._prefill(*tensors, positions, window)

        # log-weights relative to the last token's would lose the first ones' digits: the tokens go in two halves
        t = value.shape[1]
        if t > 1 and log_decay is not None and log_decay.sum(1).min() < -REBASE:
            outs = []
            for half in (slice(t // 2), slice(t // 2, None)):
                cut = [None if x is None else x[:, half] for x in (*tensors, positions, first_key)]
                outs.append(self.attend(*cut, window))
            return torch.cat(outs, 1)

        if self.bins:
            return self._step_through(*tensors, positions)
        self.append(key_coord, value, log_decay, key_bias, window)
        if first_key is None and t > 1:
            first_key = torch.zeros(value.shape[:2], dtype=torch.int32, device=value.device)
        return self.read(query_coord, first_key, None if log_decay is None else log_decay.shape[2])

    def _step_through(self, query_coord, key_coord, value, log_decay, key_bias, positions) -> Tensor:
        """Returns what attend() does with bins, token by token."""
        t = value.shape[1]
        self.length += t
        outs = []
        for new in range(t):
            # rows whose document begins here begin anew
            if positions is not None:
                fresh = positions[:, new] == 0
                if fresh.any():
                    sums = self.state.sums.masked_fill(fresh[:, None, None, None], 0)
                    self.state = BinnedState(sums, self.state.log_scale.masked_fill(fresh[:, None], LOWEST))

            token = [None if x is None else x[:, new] for x in (query_coord, key_coord, value, log_decay, key_bias)]
            out, self.state = topological_attention_binned_step(self.state, *token, **self.range)
            outs.append(out)
        return torch.stack(outs, 1)

    def _prefill(self, query_coord, key_coord, value, log_decay, key_bias, positions, window) -> Tensor:
        """Returns what attend() does for the first tokens of a row."""
        T = value.shape[1]
        doc_start = None if positions is None else (torch.arange(T, device=value.device) - positions).int()
        if self.bins:
            self.length = T
            grid = dict(bins=self.bins, **self.range)
            heads = query_coord.shape[2]
            self.state = topological_attention_binned_state(
                key_coord, value, log_decay, key_bias, doc_start, heads=heads, **grid
            )
            return topological_attention_binned(query_coord, key_coord, value, log_decay, key_bias, doc_start, **grid)
        self.append(key_coord, value, log_decay, key_bias, window)
        self._settle(window)
        return topological_attention(
            query_coord, key_coord, value,
            log_decay=log_decay, key_bias=key_bias, doc_start=doc_start, window=window
        )
