"""Inputs, runs and tolerances of splanifold's tests in PyTorch and loops."""

import math

import torch

from kernels.splanifold import SplanifoldControls, splanifold
from tests.errors import float_bound, reference_bound

NAMES = ("out", "r", *SplanifoldControls._fields)


def make_inputs(M, G, K, n, S, seed=0, low=-0.1, high=1.1):
    """Returns [r (M, G, K), uniform from low to high, and the four controls], in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    r = low + (high - low) * torch.rand(M, G, K, dtype=torch.float64, generator=generator)
    return [r, randn(G, S, n), *(randn(G, S, n, K) / math.sqrt(K) for _ in range(3))]


def run(inputs, backend, dtype=torch.float64, device="cpu", function=splanifold, **options):
    """Returns [out, gradients of r and of the controls]."""
    tensors = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    out = function(tensors[0], SplanifoldControls(*tensors[1:]), backend=backend, **options)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, tensors, grad))]


def bounds(inputs, dtype=torch.float64, **options):
    """
    Returns tolerances by name: what the reference loses in float32, to which 1 / Sigma adds where Sigma is small, and
    sums over tokens, outputs and six matrices.
    """
    (M, G, K), n = inputs[0].shape, inputs[1].shape[-1]
    terms = M + 6 * G * K + n
    floor = float_bound(terms, torch.float32)
    low, exact = run(inputs, "reference", torch.float32, **options), run(inputs, "reference", **options)
    return {name: reference_bound(x, y, terms, dtype, floor=floor)
            for name, x, y in zip(NAMES, low, exact, strict=True)}


def assert_close(results, expected, relative_rms, tolerance):
    """
    tolerance: by name, or a number. Gradients that are zero by the equations, as those of directions for K = 1, may be
    as large as the tolerance.
    """
    tolerance = tolerance if isinstance(tolerance, dict) else dict.fromkeys(NAMES, tolerance)
    errors = {name: relative_rms(x, y, floor=tolerance[name])
              for name, x, y in zip(NAMES, results, expected, strict=True)}
    assert all(error < tolerance[name] for name, error in errors.items()), (errors, tolerance)
