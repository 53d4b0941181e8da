"""
The causal convolution of every channel over a few tokens: the kernel beside its reference, eager and compiled, and
beside PyTorch's own depthwise convolution, which knows no documents.

    python -m benchmarks.short_convolution             all sizes, on a GPU if there is one
    python -m benchmarks.short_convolution --quick     one size: under a minute on two cores
    python -m benchmarks.short_convolution --sizes B=1,T=65536,C=768,taps=4

One table, and benchmarks/results/short_convolution-<device>.json, written after every size. Arms take turns; the
operator's tests run first, and an arm is timed only if its result and gradients are those of the reference in float64.
"triton" or "loops" is the kernel, called eagerly; "conv1d" computes another thing where a document begins. B rows of T
tokens in documents of 1 to 1,000. "% of copy": the bytes that kernels/short_convolution counts, 2A forward and with
the backward pass 5A, at the copy bandwidth measured in the same run; the arm "copy" copies as many bytes with one call.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.timing import Place, both_passes, compile_arms, kernel_benchmark, measure_arms, sizes
from kernels.short_convolution import short_convolution, short_convolution_reference

TESTS = dict.fromkeys(("cpu", "cuda"), ["tests/kernels/test_short_convolution.py"])
SIZES = {  # first that of small training
    "cpu": sizes("B T C taps", (8, 256, 128, 4), (1, 4096, 128, 4), (1, 16_384, 128, 4), (4, 1024, 768, 4)),
    "cuda": sizes("B T C taps", (1, 16_384, 768, 4), (1, 65_536, 768, 4), (1, 262_144, 768, 4)),
}
QUICK = {device: sizes[:1] for device, sizes in SIZES.items()}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative RMS error of the result and of each gradient
PEER = "conv1d"


def make_inputs(B: int, T: int, C: int, taps: int, place: Place) -> tuple[torch.Tensor, list, list]:
    """(positions (B, T), [x (B, T, C) and taps (n, C) with gradients], [the gradient of y])"""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(place.device, place.dtype)

    lengths = torch.randint(1, 1001, (B * T,), generator=generator)
    count = 1 + int((lengths.cumsum(0) < B * T).sum())
    positions = torch.cat([torch.arange(length) for length in lengths[:count].tolist()])[:B * T].view(B, T)
    tensors = [draw(B, T, C).requires_grad_(), draw(taps, C).requires_grad_()]
    return positions.int().to(place.device), tensors, [draw(B, T, C)]


def depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """The peer, over the whole row."""
    n, C = taps.shape
    return F.conv1d(F.pad(x.mT, (n - 1, 0)), taps.T[:, None], groups=C).mT


def contenders(positions: torch.Tensor, place: Place) -> dict:
    """{arm: function(x, taps) -> y}"""
    kernel = "triton" if place.device.type == "cuda" else "loops"
    reference = partial(short_convolution_reference, positions=positions)
    arms = {kernel: partial(short_convolution, positions=positions, backend=kernel)}
    return arms | compile_arms(reference=reference) | {"reference": reference}


def measure(place: Place, B: int, T: int, C: int, taps: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    positions, tensors, gradients = make_inputs(B, T, C, taps, place)
    A = B * T * C * place.dtype.itemsize
    arms = contenders(positions, place)
    peer = torch.no_grad()(lambda: depthwise(*tensors)), lambda: both_passes(depthwise, tensors, gradients)
    return measure_arms(place, dict(B=B, T=T, C=C, taps=taps), arms, (tensors, gradients), arms["reference"],
                        TOLERANCE[place.dtype], (dict(moved=2 * A), dict(moved=5 * A)), unchecked={PEER: peer},
                        against="reference")


if __name__ == "__main__":
    sys.exit(kernel_benchmark("short_convolution", __doc__, measure, TESTS, SIZES, QUICK, others=(PEER,)))
