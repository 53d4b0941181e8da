"""
The causal convolution of every channel over a few tokens, eager and compiled, beside PyTorch's own depthwise convolution, which knows no documents.

    python benchmarks/short_convolution.py             all sizes, on a GPU if there is one
    python benchmarks/short_convolution.py --quick     one size: under a minute on two cores
    python benchmarks/short_convolution.py --sizes T=65536,C=768,taps=4

One table, and benchmarks/results/short_convolution-<device>.json, written after every size. Arms take turns; the operator's tests run first, and "compiled" is timed
only if its result and gradients are those of the operator in float64. One row of T tokens in documents of 1 to 1,000. "conv1d" computes another thing where a document
begins. "% of copy": x read and y written, forward, and with the backward pass x and the gradient read and one written besides, at the copy bandwidth measured in the
same run; the arm "copy" copies as many bytes with one call.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms
from kernels.short_convolution import short_convolution

import torch
import torch.nn.functional as F

TESTS = {device: ["tests/kernels/test_short_convolution.py"] for device in ("cpu", "cuda")}
SIZES = {"cpu": [dict(T=T, C=128, taps=4) for T in (4096, 16_384)], "cuda": [dict(T=T, C=768, taps=4) for T in (16_384, 65_536, 262_144)]}
QUICK = {device: sizes[:1] for device, sizes in SIZES.items()}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative RMS error of the result and of each gradient
PEER = "conv1d"


def make_inputs(T: int, C: int, taps: int, place: Place) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(positions (1, T), [x (1, T, C) and taps (n, C) with gradients], [the gradient of y])"""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(place.device, place.dtype)
    lengths = torch.randint(1, 1001, (T,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths[:1 + int((lengths.cumsum(0) < T).sum())].tolist()])[None, :T]
    return positions.to(place.device), [randn(1, T, C).requires_grad_(), randn(taps, C).requires_grad_()], [randn(1, T, C)]


def depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    n, C = taps.shape
    return F.conv1d(F.pad(x.mT, (n - 1, 0)), taps.T[:, None], groups=C).mT


def measure(place: Place, T: int, C: int, taps: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    positions, tensors, gradients = make_inputs(T, C, taps, place)
    eager = lambda x, w: short_convolution(x, w, positions)
    inputs, moved = (tensors, gradients), 2 * T * C * place.dtype.itemsize
    peer = (torch.no_grad()(lambda: depthwise(*tensors)), lambda: both_passes(depthwise, *inputs))
    return measure_arms(place, dict(T=T, C=C, taps=taps), {"compiled": torch.compile(eager, dynamic=False), "eager": eager}, inputs, eager, TOLERANCE[place.dtype],
                        (dict(moved=moved), dict(moved=5 * moved // 2)), unchecked={PEER: peer}, against="eager")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("short_convolution", __doc__, measure, TESTS, SIZES, QUICK, others=(PEER,)))
