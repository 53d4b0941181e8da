"""
The causal convolution of every channel over a few tokens: the kernel beside its reference, eager and compiled, and
beside PyTorch's own depthwise convolution, which knows no documents.

    python benchmarks/short_convolution.py             all sizes, on a GPU if there is one
    python benchmarks/short_convolution.py --quick     one size: under a minute on two cores
    python benchmarks/short_convolution.py --sizes B=1,T=65536,C=768,taps=4

One table, and benchmarks/results/short_convolution-<device>.json, written after every size. Arms take turns; the
operator's tests run first, and an arm is timed only if its result and gradients are those of the reference in float64.
"triton" or "loops" is the kernel, called eagerly; "conv1d" computes another thing where a document begins. B rows of T
tokens in documents of 1 to 1,000. "% of copy": the bytes that kernels/short_convolution counts, 2A forward and with
the backward pass 5A, at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes with one call.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, both_passes, kernel_benchmark, measure_arms
from kernels.short_convolution import short_convolution, short_convolution_reference

import torch
import torch.nn.functional as F

TESTS = {device: ["tests/kernels/test_short_convolution.py"] for device in ("cpu", "cuda")}
SHAPES = (8, 256, 128), (1, 4096, 128), (1, 16_384, 128), (4, 1024, 768)  # of a CPU; first that of small training
SIZES = {"cpu": [dict(B=B, T=T, C=C, taps=4) for B, T, C in SHAPES],
         "cuda": [dict(B=1, T=T, C=768, taps=4) for T in (16_384, 65_536, 262_144)]}
QUICK = {device: sizes[:1] for device, sizes in SIZES.items()}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative RMS error of the result and of each gradient
PEER = "conv1d"


def make_inputs(B: int, T: int, C: int, taps: int, place: Place) -> tuple[torch.Tensor, list, list]:
    """(positions (B, T), [x (B, T, C) and taps (n, C) with gradients], [the gradient of y])"""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(place.device, place.dtype)
    lengths = torch.randint(1, 1001, (B * T,), generator=generator)
    count = 1 + int((lengths.cumsum(0) < B * T).sum())
    positions = torch.cat([torch.arange(length) for length in lengths[:count].tolist()])[:B * T].view(B, T)
    tensors = [randn(B, T, C).requires_grad_(), randn(taps, C).requires_grad_()]
    return positions.int().to(place.device), tensors, [randn(B, T, C)]


def depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    n, C = taps.shape
    return F.conv1d(F.pad(x.mT, (n - 1, 0)), taps.T[:, None], groups=C).mT


def contenders(positions: torch.Tensor, place: Place) -> dict:
    """{arm: function(x, taps) -> y}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    kernel = "triton" if place.device.type == "cuda" else "loops"
    reference = lambda x, taps: short_convolution_reference(x, taps, positions)
    return {kernel: lambda x, taps: short_convolution(x, taps, positions, backend=kernel),
            "reference, compiled": torch.compile(reference, dynamic=False), "reference": reference}


def measure(place: Place, B: int, T: int, C: int, taps: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    positions, tensors, gradients = make_inputs(B, T, C, taps, place)
    A, arms = B * T * C * place.dtype.itemsize, contenders(positions, place)
    peer = torch.no_grad()(lambda: depthwise(*tensors)), lambda: both_passes(depthwise, tensors, gradients)
    return measure_arms(place, dict(B=B, T=T, C=C, taps=taps), arms, (tensors, gradients), arms["reference"],
                        TOLERANCE[place.dtype], (dict(moved=2 * A), dict(moved=5 * A)), unchecked={PEER: peer},
                        against="reference")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("short_convolution", __doc__, measure, TESTS, SIZES, QUICK, others=(PEER,)))
