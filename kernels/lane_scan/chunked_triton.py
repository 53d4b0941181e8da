"""
The lane scan on a GPU: the chunks of __init__.py in Triton, forward, reversed, and for the gradients of gains and
decays.

A program walks through a segment of chunks of one row, for some channels of one head, with the state in registers. A
long row of few channels is cut into segments: a first pass makes what each of them adds to the state, the second one
starts from the others' sums, turned by the segments between. Many frequencies go in groups, whose sums are added.

Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement.
"""

import math

import torch
from torch import Tensor

from kernels.backend import jit, launch_entry, operand_dtype, tl, triton, with_unit_stride
from kernels.lane_scan.reference import time_kernel

# ---- Triton kernels ---------------------------------------------------------
# Pointers are moved to a chunk's first token in int64; offsets inside a tile are int32. Operands of products are
# bfloat16 where the channels are, else float32 (as TF32 for float16, as three TF32 products for float32). Sums and
# states are float32. X is the rounded number of frequencies or of a table's columns: rows of tables are filled with 0.
# ZERO is 0, which the compiler does not know: it is to read tables again for every chunk, from L1, since registers are
# what is short.


@jit
def _tile(ptr, stride, rows, d0, D, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns (CHUNK, BLOCK_D) of a chunk's tokens, from column d0 on; 0 from row `rows` and column D on."""
    offs_t, offs_d = tl.arange(0, CHUNK), d0 + tl.arange(0, BLOCK_D)
    mask = (offs_t < rows)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs_t[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@jit
def _matrix(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns a full contiguous matrix."""
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@jit
def _state_block(ptr, d0, D, X: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the offsets of a block of a stored state (X, D), and which of them exist."""
    offs_d = d0 + tl.arange(0, BLOCK_D)
    return ptr + tl.arange(0, X)[:, None] * D + offs_d[None, :], (offs_d < D)[None, :]


@jit
def _turn(b_real, b_imaginary, turn_ptr, X: tl.constexpr):
    """Returns both halves of the state, turned by the angles of turn (4, X): cosine, sine, and their rests."""
    offs_x = tl.arange(0, X)
    cosine = tl.load(turn_ptr + offs_x)[:, None]
    sine = tl.load(turn_ptr + X + offs_x)[:, None]
    more_cosine = tl.load(turn_ptr + 2 * X + offs_x)[:, None]
    more_sine = tl.load(turn_ptr + 3 * X + offs_x)[:, None]
    b_new = cosine * b_real - sine * b_imaginary + (more_cosine * b_real - more_sine * b_imaginary)
    return b_new, sine * b_real + cosine * b_imaginary + (more_sine * b_real + more_cosine * b_imaginary)


@jit
def _documents(doc_start_ptr, at, rows, first, CHUNK: tl.constexpr):
    """
    Returns the starts of a chunk's tokens' documents, from the chunk's first token, and that of its last token; a long
    time ago without documents. at: where the chunk begins.
    """
    b_start = tl.full((CHUNK,), -(1 << 30), tl.int32)
    last = -(1 << 30)
    if doc_start_ptr is not None:
        offs_t = tl.arange(0, CHUNK)
        b_start = tl.load(doc_start_ptr + at + offs_t, mask=offs_t < rows, other=0) - first
        b_start = tl.where(offs_t < rows, b_start, 1 << 30)     # beyond the row: documents that nobody sees
        last = tl.load(doc_start_ptr + at + rows - 1) - first
    return b_start, last


@jit
def _places(b_start, first, CHUNK: tl.constexpr, DOCS: tl.constexpr):
    """Returns each token's place in its document."""
    offs_t = tl.arange(0, CHUNK)
    return offs_t - b_start if DOCS else first + offs_t


@jit
def _sees(b_start, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Returns (CHUNK, CHUNK): whether row i sees column j, of its document and not later; turned, not earlier."""
    offs_t = tl.arange(0, CHUNK)
    if REVERSE:
        return (offs_t[None, :] >= offs_t[:, None]) & (b_start[None, :] <= offs_t[:, None])
    return (offs_t[None, :] <= offs_t[:, None]) & (b_start[:, None] <= offs_t[None, :])


@jit
def _segment_of(H, SEGMENTS):
    """Returns head, segment and batch row of a program."""
    pid = tl.program_id(0)
    return pid % H, (pid // H) % SEGMENTS, (pid // H // SEGMENTS).to(tl.int64)


@jit
def _entering_state(
    total_ptr, carry_ptr, turn_ptr, b, h, segment, d0, D, H, WAVE_HEADS, SEGMENTS,
    X: tl.constexpr, HALVES: tl.constexpr, BLOCK_D: tl.constexpr, REVERSE: tl.constexpr
):
    """
    Returns both halves of the state that enters a segment, from what the segments before it add (total_ptr, (B, H,
    SEGMENTS, HALVES, X, D)), whether a document goes through all of each (carry_ptr, (B, SEGMENTS)), and the turn of a
    segment.
    """
    b_real = tl.zeros((X, BLOCK_D), tl.float32)
    b_imaginary = tl.zeros((X, BLOCK_D), tl.float32)
    for i in range(0, SEGMENTS - 1 - segment if REVERSE else segment):
        other = SEGMENTS - 1 - i if REVERSE else i
        carry = tl.load(carry_ptr + b * SEGMENTS + other)
        at = total_ptr + ((b * H + h) * SEGMENTS + other) * (HALVES * X) * D
        offs, mask = _state_block(at, d0, D, X, BLOCK_D)
        if HALVES == 2:
            b_real, b_imaginary = _turn(b_real, b_imaginary, turn_ptr + h % WAVE_HEADS * (4 * X), X)
            b_imaginary = b_imaginary * carry + tl.load(offs + X * D, mask=mask, other=0.0)
        b_real = b_real * carry + tl.load(offs, mask=mask, other=0.0)
    return b_real, b_imaginary


@jit
def _table_rows(table_ptr, b_places, P, X: tl.constexpr):
    """Returns (CHUNK, X): the table's rows at these places, its last one behind its end."""
    rows = tl.minimum(tl.maximum(b_places, 0), P - 1)
    return tl.load(table_ptr + rows.to(tl.int64)[:, None] * X + tl.arange(0, X)[None, :])


@jit
def _lane_scan_kernel(
    u_ptr, doc_start_ptr, pairs_ptr, read_ptr, write_ptr, turn_ptr, segment_turn_ptr, table_ptr, gain_ptr, out_ptr,
    total_ptr, carry_ptr, u_b, u_t, doc_b, T, D, H, WAVE_HEADS, N, SEGMENTS, SEGMENT_CHUNKS, P, ZERO,
    X: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, MEAN: tl.constexpr
):
    """
    Makes out (B, T, W) of a segment. Without out_ptr it writes only what the segment adds (total_ptr) and whether a
    document goes through all of it (carry_ptr); with all three it starts from the other segments' totals.
    """
    # which segment, and which channels
    h, segment, b = _segment_of(H, SEGMENTS)
    d0 = tl.program_id(1) * BLOCK_D
    offs_t = tl.arange(0, CHUNK)
    HALVES: tl.constexpr = 2 if table_ptr is None else 1
    DOCS: tl.constexpr = doc_start_ptr is not None
    u_ptr += b * u_b + h * D
    if table_ptr is None:
        pairs_ptr += h * (CHUNK * CHUNK)
        read_ptr += h * (2 * CHUNK * X)
        write_ptr += h % WAVE_HEADS * (2 * X * CHUNK)
        turn_ptr += h % WAVE_HEADS * (4 * X)
    else:
        b_gain = tl.load(gain_ptr + h * X + tl.arange(0, X))

    # the state that enters
    b_real = tl.zeros((X, BLOCK_D), tl.float32)
    b_imaginary = tl.zeros((X, BLOCK_D), tl.float32)
    if (total_ptr is not None) and (out_ptr is not None):
        b_real, b_imaginary = _entering_state(total_ptr, carry_ptr, segment_turn_ptr, b, h, segment, d0, D, H,
                                              WAVE_HEADS, SEGMENTS, X, HALVES, BLOCK_D, REVERSE)

    # chunk by chunk
    carry = 1.0
    first_chunk = segment * SEGMENT_CHUNKS
    count = tl.minimum(SEGMENT_CHUNKS, N - first_chunk)
    for i in range(0, count):
        c = first_chunk + (count - 1 - i if REVERSE else i)
        start = c.to(tl.int64) * CHUNK
        rows = tl.minimum(T - c * CHUNK, CHUNK)
        b_start, last = _documents(doc_start_ptr, b * doc_b + start, rows, c * CHUNK, CHUNK)
        b_places = _places(b_start, c * CHUNK, CHUNK, DOCS)
        b_x = _tile(u_ptr + start * u_t, u_t, rows, d0, D, CHUNK, BLOCK_D)
        if MEAN and REVERSE:
            b_x = b_x.to(tl.float32) / (b_places + 1).to(tl.float32)[:, None]
            b_x = tl.where((offs_t < rows)[:, None], b_x, 0.0)
        b_x = b_x.to(OPERAND)
        if table_ptr is not None:
            b_rows = _table_rows(table_ptr, b_places, P, X)
            b_read = (b_rows.to(tl.float32) * b_gain[None, :]).to(OPERAND)

        again = i * ZERO
        if out_ptr is not None:
            # what the tokens read from the state
            if table_ptr is None:
                b_y = tl.dot(_matrix(read_ptr + again, CHUNK, X), b_real.to(OPERAND), input_precision=PRECISION)
                b_y = tl.dot(_matrix(read_ptr + CHUNK * X + again, CHUNK, X), b_imaginary.to(OPERAND), b_y,
                             input_precision=PRECISION)
            else:
                b_y = tl.dot(b_read, b_real.to(OPERAND), input_precision=PRECISION)
            if DOCS:
                enters = offs_t >= last if REVERSE else b_start < 0
                b_y = tl.where(enters[:, None], b_y, 0.0)

            # and from each other
            if table_ptr is None:
                b_pairs = _matrix(pairs_ptr + again, CHUNK, CHUNK)
            else:
                b_pairs = tl.dot(b_read, tl.trans(b_rows), input_precision=PRECISION).to(OPERAND)
            b_pairs = tl.where(_sees(b_start, CHUNK, REVERSE), b_pairs, 0.0)
            b_y = tl.dot(b_pairs, b_x, b_y, input_precision=PRECISION)
            if MEAN and not REVERSE:
                b_y = b_y / (b_places + 1).to(tl.float32)[:, None]
            offs_d = d0 + tl.arange(0, BLOCK_D)
            at = out_ptr + (b * T + start) * (H * D) + h * D
            mask = (offs_t < rows)[:, None] & (offs_d < D)[None, :]
            tl.store(at + offs_t[:, None] * (H * D) + offs_d[None, :], b_y.to(out_ptr.dtype.element_ty), mask=mask)

        # the next state
        if DOCS:
            leaves = b_start < 0 if REVERSE else offs_t >= last
            b_x = tl.where(leaves[:, None], b_x, 0.0)
            kept = tl.where(last < 0, 1.0, 0.0)
            b_real *= kept
            b_imaginary *= kept
            carry *= kept
        if table_ptr is None:
            weights = write_ptr + again
            b_real, b_imaginary = _turn(b_real, b_imaginary, turn_ptr + again, X)
            b_real = tl.dot(_matrix(weights, X, CHUNK), b_x, b_real, input_precision=PRECISION)
            b_imaginary = tl.dot(_matrix(weights + X * CHUNK, X, CHUNK), b_x, b_imaginary, input_precision=PRECISION)
        else:
            b_real = tl.dot(tl.trans(b_rows), b_x, b_real, input_precision=PRECISION)

    # what the segment adds
    if out_ptr is None:
        at = total_ptr + ((b * H + h) * SEGMENTS + segment) * (HALVES * X) * D
        offs, mask = _state_block(at, d0, D, X, BLOCK_D)
        tl.store(offs, b_real, mask=mask)
        if HALVES == 2:
            tl.store(offs + X * D, b_imaginary, mask=mask)
        tl.store(carry_ptr + b * SEGMENTS + segment, carry)


@jit
def _lane_scan_gain_kernel(
    u_ptr, grad_ptr, doc_start_ptr, wave_ptr, write_ptr, far_wave_ptr, far_write_ptr, turn_ptr, segment_turn_ptr,
    table_ptr, total_ptr, carry_ptr, pairs_ptr, sum_ptr, far_sum_ptr,
    u_b, u_t, grad_b, grad_t, doc_b, T, D, H, WAVE_HEADS, N, SEGMENTS, SEGMENT_CHUNKS, P, ZERO,
    X: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    MEAN: tl.constexpr
):
    """
    Makes what the channels of a program add to the gradients over a segment: pairs (CHUNK, CHUNK), the sums over chunks
    of v_i . u_j (of waves); sum (X,), of each frequency's pairs that cross a chunk's beginning, or all of a table's
    column; far_sum (X,), the first times their distance, which needs far_wave and far_write, the tables times the
    distances in them, and rows in one segment.
    """
    # which segment, and which channels
    h, segment, b = _segment_of(H, SEGMENTS)
    d0 = tl.program_id(1) * BLOCK_D
    offs_t, offs_x = tl.arange(0, CHUNK), tl.arange(0, X)
    HALVES: tl.constexpr = 2 if table_ptr is None else 1
    DOCS: tl.constexpr = doc_start_ptr is not None
    u_ptr += b * u_b + h * D
    grad_ptr += b * grad_b + h * D
    of_head = h % WAVE_HEADS * (2 * X * CHUNK)
    if table_ptr is None:
        turn_ptr += h % WAVE_HEADS * (4 * X)
    b_sum = tl.zeros((X,), tl.float32)
    b_far_sum = tl.zeros((X,), tl.float32)
    b_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)

    # the state that enters, and that with distances in its sums
    b_real = tl.zeros((X, BLOCK_D), tl.float32)
    b_imaginary = tl.zeros((X, BLOCK_D), tl.float32)
    b_far_real = tl.zeros((X, BLOCK_D), tl.float32)
    b_far_imaginary = tl.zeros((X, BLOCK_D), tl.float32)
    if total_ptr is not None:
        b_real, b_imaginary = _entering_state(total_ptr, carry_ptr, segment_turn_ptr, b, h, segment, d0, D, H,
                                              WAVE_HEADS, SEGMENTS, X, HALVES, BLOCK_D, False)

    # chunk by chunk
    first_chunk = segment * SEGMENT_CHUNKS
    for i in range(0, tl.minimum(SEGMENT_CHUNKS, N - first_chunk)):
        c = first_chunk + i
        start = c.to(tl.int64) * CHUNK
        rows = tl.minimum(T - c * CHUNK, CHUNK)
        b_start, last = _documents(doc_start_ptr, b * doc_b + start, rows, c * CHUNK, CHUNK)
        b_places = _places(b_start, c * CHUNK, CHUNK, DOCS)
        b_x = _tile(u_ptr + start * u_t, u_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_v = _tile(grad_ptr + start * grad_t, grad_t, rows, d0, D, CHUNK, BLOCK_D)
        if MEAN:
            b_v = b_v.to(tl.float32) / (b_places + 1).to(tl.float32)[:, None]
            b_v = tl.where((offs_t < rows)[:, None], b_v, 0.0)
        b_v = b_v.to(OPERAND)

        # pairs inside the chunk
        b_inside = tl.dot(b_v, tl.trans(b_x), input_precision=PRECISION)
        b_inside = tl.where(_sees(b_start, CHUNK, False), b_inside, 0.0)
        if table_ptr is None:
            b_pairs += b_inside
        else:
            b_rows = _table_rows(table_ptr, b_places, P, X)
            b_read = tl.dot(b_inside.to(OPERAND), b_rows, input_precision=PRECISION)
            b_sum += tl.sum(b_read * b_rows.to(tl.float32), 0)

        # pairs that cross its beginning
        if DOCS:
            b_v = tl.where((b_start < 0)[:, None], b_v, 0.0)
            b_x = tl.where((offs_t >= last)[:, None], b_x, 0.0)
        if table_ptr is not None:
            b_gathered = tl.dot(tl.trans(b_rows), b_v, input_precision=PRECISION)
            b_sum += tl.sum(b_gathered * b_real, 1)
        else:
            waves = wave_ptr + of_head + i * ZERO
            b_gathered = tl.dot(_matrix(waves, X, CHUNK), b_v, input_precision=PRECISION)
            b_sum += tl.sum(b_gathered * b_real, 1)
            if far_sum_ptr is not None:
                b_far_sum += tl.sum(b_gathered * b_far_real, 1)
            b_gathered = tl.dot(_matrix(waves + X * CHUNK, X, CHUNK), b_v, input_precision=PRECISION)
            b_sum -= tl.sum(b_gathered * b_imaginary, 1)
            if far_sum_ptr is not None:
                b_far_sum -= tl.sum(b_gathered * b_far_imaginary, 1)
                waves = far_wave_ptr + of_head + i * ZERO
                b_gathered = tl.dot(_matrix(waves, X, CHUNK), b_v, input_precision=PRECISION)
                b_far_sum += tl.sum(b_gathered * b_real, 1)
                b_gathered = tl.dot(_matrix(waves + X * CHUNK, X, CHUNK), b_v, input_precision=PRECISION)
                b_far_sum -= tl.sum(b_gathered * b_imaginary, 1)

        # the next states
        if DOCS:
            kept = tl.where(last < 0, 1.0, 0.0)
            b_real *= kept
            b_imaginary *= kept
            b_far_real *= kept
            b_far_imaginary *= kept
        if table_ptr is not None:
            b_real = tl.dot(tl.trans(b_rows), b_x, b_real, input_precision=PRECISION)
        else:
            if far_sum_ptr is not None:
                weights = far_write_ptr + of_head + i * ZERO
                b_far_real += CHUNK * b_real
                b_far_imaginary += CHUNK * b_imaginary
                b_far_real, b_far_imaginary = _turn(b_far_real, b_far_imaginary, turn_ptr + i * ZERO, X)
                b_far_real = tl.dot(_matrix(weights, X, CHUNK), b_x, b_far_real, input_precision=PRECISION)
                b_far_imaginary = tl.dot(_matrix(weights + X * CHUNK, X, CHUNK), b_x, b_far_imaginary,
                                         input_precision=PRECISION)
            weights = write_ptr + of_head + i * ZERO
            b_real, b_imaginary = _turn(b_real, b_imaginary, turn_ptr + i * ZERO, X)
            b_real = tl.dot(_matrix(weights, X, CHUNK), b_x, b_real, input_precision=PRECISION)
            b_imaginary = tl.dot(_matrix(weights + X * CHUNK, X, CHUNK), b_x, b_imaginary, input_precision=PRECISION)

    # what the program adds
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(sum_ptr + program * X + offs_x, b_sum)
    if far_sum_ptr is not None:
        tl.store(far_sum_ptr + program * X + offs_x, b_far_sum)
    if table_ptr is None:
        at = pairs_ptr + program * (CHUNK * CHUNK)
        tl.store(at + offs_t[:, None] * CHUNK + offs_t[None, :], b_pairs)


# ---- Host functions ---------------------------------------------------------

# By the major number of the compute capability (0: any other) and the bytes of an operand: tokens of a chunk, largest
# block of channels, warps and stages, of the scan and of the gradients of gains; and the most frequencies, or columns
# of a table, of a program: more go in groups. Chosen for what compiles without spills, not measured. A chunk of the
# gradients divides one of the scan. Three TF32 products for one hold three times the operands in registers.
LAUNCH = {
    (0, 2): dict(scan=(64, 64, 4, 1), gain=(32, 32, 8, 1), most=64),
    (8, 2): dict(scan=(64, 64, 4, 1), gain=(32, 16, 8, 1), most=64),
    (0, 4): dict(scan=(32, 32, 4, 1), gain=(32, 32, 4, 1), most=16),
}
# The scan has about PROGRAMS programs, two for each multiprocessor of an H200, where a row can be cut into segments of
# SEGMENT_CHUNKS chunks or more.
PROGRAMS = 264
SEGMENT_CHUNKS = 8


def _width(count: int) -> int:
    """Returns the rounded number of frequencies or columns: at least 16, as products need."""
    return max(16, triton.next_power_of_2(count))


def _constants(u: Tensor, X: int, D: int, kernel: str) -> dict:
    chunk, block, warps, stages = launch_entry(LAUNCH, u)[kernel]
    return dict(
        X=X,
        CHUNK=chunk,
        BLOCK_D=min(block, max(16, triton.next_power_of_2(D))),
        OPERAND=tl.bfloat16 if u.dtype == torch.bfloat16 else tl.float32,
        PRECISION="tf32" if u.dtype == torch.float16 else "tf32x3",
        num_warps=warps,
        num_stages=stages,
    )


def _waves(frequencies: Tensor, decay: Tensor | None, distances: Tensor, X: int) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines with their decays at distances (n,): (H or 1, X, n) each, float64, 0 from row F on."""
    angles = 2 * math.pi * (frequencies[:, None] * distances).remainder(1.0)
    fade = 1.0 if decay is None else torch.exp(-decay.double()[..., None] * distances)
    waves = []
    for wave in (angles.cos(), angles.sin()):
        wave = (fade * wave).expand(1 if decay is None else len(decay), -1, -1)
        waves.append(torch.nn.functional.pad(wave, (0, 0, 0, X - len(frequencies))))
    return tuple(waves)


def _turn_table(frequencies: Tensor, decay: Tensor | None, distance: int, X: int) -> Tensor:
    """Returns the turn of a distance, (H or 1, 4, X) float32: cosine, sine, and what rounding has left out of them."""
    distances = torch.tensor([float(distance)], dtype=torch.float64, device=frequencies.device)
    exact = torch.stack([wave[..., 0] for wave in _waves(frequencies, decay, distances, X)], 1)
    rounded = exact.float()
    return torch.cat((rounded, (exact - rounded.double()).float()), 1).contiguous()


class _Tables:
    """What a scan reads besides the channels, None where it reads none; of waves or of a table."""

    def __init__(self, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, kernel: str, reverse: bool):
        # sizes
        operand = operand_dtype(u.dtype)
        self.is_table = features.ndim == 2
        count = features.shape[-1]
        self.X = X = _width(count)
        self.chunk = C = launch_entry(LAUNCH, u)[kernel][0]
        self.pairs = self.read = self.write = self.turn = self.table = self.gain = None
        self.heads = 1
        if self.is_table:
            self.table = torch.nn.functional.pad(features, (0, X - count)).to(operand).contiguous()
            self.gain = torch.nn.functional.pad(gain, (0, X - count)).float().contiguous()
            return

        # of waves: distances from the chunk's beginning to a token, and from a token to the chunk's end; turned around
        # for a reversed scan
        index = torch.arange(C, device=u.device, dtype=torch.float64)
        ahead, behind = (C - 1 - index, index + 1) if reverse else (index, C - index)
        self.ahead, self.behind = ahead, behind
        cosine, sine = _waves(features, decay, ahead, X)
        self.heads = len(cosine)
        self.wave = torch.stack((cosine, sine), 1)                      # (H or 1, 2, X, C) float64
        gains = torch.nn.functional.pad(gain.double(), (0, X - count))[:, None, :, None]
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=u.device)[:, None, None]
        self.read = (gains * signs * self.wave).mT.to(operand).contiguous()
        self.far_write = torch.stack(_waves(features, decay, behind, X), 1)
        self.write = self.far_write.to(operand).contiguous()
        self.far_write = self.far_write * behind
        self.turn = _turn_table(features, decay, C, X)
        kernel_of_time = time_kernel(features, gain, decay, index)
        self.pairs = kernel_of_time[:, (index[:, None] - index).abs().long()].to(operand).contiguous()


def _segments(B: int, H: int, T: int, D: int, constants: dict, segment: int) -> tuple[int, int, int, int]:
    """Returns (chunks, segments, chunks of a segment, blocks of channels). segment: the tokens of one, 0: a choice."""
    N = -(-T // constants["CHUNK"])
    blocks = -(-D // constants["BLOCK_D"])
    segments = max(1, min(PROGRAMS // (B * H * blocks), N // SEGMENT_CHUNKS))
    chunks = -(-N // segments)
    if segment:
        chunks = min(N, max(1, -(-segment // constants["CHUNK"])))
    return N, -(-N // chunks), chunks, blocks


def _totals(u: Tensor, tables: _Tables, segments: int, H: int) -> tuple[Tensor, Tensor]:
    """Returns room for what each segment adds to the state, and for whether a document goes through all of it."""
    B, _, W = u.shape
    halves = 1 if tables.is_table else 2
    totals = torch.empty(B, H, segments, halves * tables.X, W // H, dtype=torch.float32, device=u.device)
    return totals, torch.empty(B, segments, dtype=torch.float32, device=u.device)


def _scan(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    segment: int, reverse: bool, out: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """
    Writes out, unless it is None. Returns the segments' totals and carries, None of one segment, and the tokens of a
    segment.
    """
    # the cut
    B, T, W = u.shape
    H = len(gain)
    tables = _Tables(u, features, gain, decay, "scan", reverse)
    constants = _constants(u, tables.X, W // H, "scan")
    N, segments, chunks, blocks = _segments(B, H, T, W // H, constants, segment)
    totals, carries, segment_turn = None, None, None
    if segments > 1:
        totals, carries = _totals(u, tables, segments, H)
        segment_turn = tables.turn
        if not tables.is_table:
            segment_turn = _turn_table(features, decay, chunks * tables.chunk, tables.X)

    # where there are several segments, their totals first
    for target in (None, out) if segments > 1 else (out,):
        if target is None and segments == 1:
            continue
        _lane_scan_kernel[(B * H * segments, blocks)](
            u, doc_start, tables.pairs, tables.read, tables.write, tables.turn, segment_turn, tables.table, tables.gain,
            target, totals, carries, *u.stride()[:2], 0 if doc_start is None else doc_start.stride(0), T, W // H, H,
            tables.heads, N, segments, chunks, len(features), 0, **constants, REVERSE=reverse, MEAN=mean
        )
        if out is None:
            break
    return totals, carries, chunks * tables.chunk


def _groups(u: Tensor, *tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Returns groups of as many frequencies or columns as a program takes: slices of features, gains and decays."""
    most = launch_entry(LAUNCH, u)["most"]
    count = -(-tensors[0].shape[-1] // most)
    return list(zip(*([None] * count if x is None else x.split(most, -1) for x in tensors)))


def _sum_of_groups(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    segment: int, reverse: bool
) -> Tensor:
    """Returns the sums (B, T, W), of several groups added in float32."""
    groups = _groups(u, features, gain, decay)
    dtype = u.dtype if len(groups) == 1 else torch.float32
    outs = []
    for group in groups:
        outs.append(torch.empty(u.shape, dtype=dtype, device=u.device))
        _scan(u, *group, doc_start, mean, segment, reverse, outs[-1])
    return sum(outs[1:], outs[0]).to(u.dtype)


def forward(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool, chunk: int,
    segment: int
) -> Tensor:
    """Returns y (B, T, W). The chunk is the launch table's."""
    u = with_unit_stride(u)
    doc_start = with_unit_stride(doc_start)
    with torch.cuda.device_of(u):
        return _sum_of_groups(u, features, gain, decay, doc_start, mean, segment, False)


def backward(
    grad: Tensor, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    chunk: int, segment: int, gain_grad: bool, decay_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of u, gain and decay; the last two (H, F) float64, empty where they are not wanted."""
    u, grad = with_unit_stride(u), with_unit_stride(grad)
    doc_start = with_unit_stride(doc_start)
    with torch.cuda.device_of(u):
        du = _sum_of_groups(grad, features, gain, decay, doc_start, mean, segment, True).to(u.dtype)
        sums = []
        if gain_grad or decay_grad:
            for group in _groups(u, features, gain, decay):
                sums.append(_gain_sums(grad, u, *group, doc_start, mean, segment, decay_grad))
    empty = torch.empty(0, dtype=torch.float64, device=u.device)
    dgain = torch.cat([pair[0] for pair in sums], -1) if sums else empty
    ddecay = -gain.double() * torch.cat([pair[1] for pair in sums], -1) if decay_grad else empty
    return du, dgain, ddecay


def _gain_sums(
    grad: Tensor, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    segment: int, decay_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of gains and, without the factor -gain, of decays, (H, F) float64."""
    # the cut, which is the scan's where there are totals
    B, T, W = u.shape
    H = len(gain)
    tables = _Tables(u, features, gain, decay, "gain", False)
    constants = _constants(u, tables.X, W // H, "gain")
    N, segments, chunks, blocks = _segments(B, H, T, W // H, constants, T)
    totals, carries, segment_turn = None, None, None
    if not decay_grad:
        totals, carries, tokens = _scan(u, features, gain, decay, doc_start, mean, segment, False, None)
        if totals is not None:
            chunks = tokens // tables.chunk
            segments = -(-T // tokens)
            segment_turn = tables.turn if tables.is_table else _turn_table(features, decay, tokens, tables.X)

    # the programs' sums
    operand = operand_dtype(u.dtype)
    wave, far_wave, far_write = None, None, None
    pairs, far_sums = None, None
    programs = B, segments, H, blocks
    sums = torch.empty(*programs, tables.X, dtype=torch.float32, device=u.device)
    if not tables.is_table:
        wave = tables.wave.to(operand).contiguous()
        pairs = torch.empty(*programs, tables.chunk, tables.chunk, dtype=torch.float32, device=u.device)
    if decay_grad:
        far_wave = (tables.wave * tables.ahead).to(operand).contiguous()
        far_write = tables.far_write.to(operand).contiguous()
        far_sums = torch.empty_like(sums)
    _lane_scan_gain_kernel[(B * segments * H, blocks)](
        u, grad, doc_start, wave, tables.write, far_wave, far_write, tables.turn, segment_turn, tables.table, totals,
        carries, pairs, sums, far_sums, *u.stride()[:2], *grad.stride()[:2],
        0 if doc_start is None else doc_start.stride(0), T, W // H, H, tables.heads, N, segments, chunks, len(features),
        0, **constants, MEAN=mean
    )

    # all of them, and the pairs inside chunks by their distance
    count = features.shape[-1]
    dgain = sums.double().sum((0, 1, 3))[:, :count]
    if tables.is_table:
        return dgain, None
    index = torch.arange(tables.chunk, device=u.device)
    by_pair = pairs.double().sum((0, 1, 3)).flatten(1)
    distances = (index[:, None] - index).clamp_min(0).flatten()
    by_distance = torch.zeros(H, tables.chunk, dtype=torch.float64, device=u.device).index_add_(1, distances, by_pair)
    cosine = tables.wave[:, 0, :count]
    dgain = dgain + (cosine * by_distance[:, None]).sum(-1)
    if not decay_grad:
        return dgain, None
    far = far_sums.double().sum((0, 1, 3))[:, :count]
    return dgain, far + (cosine * (by_distance * index)[:, None]).sum(-1)
