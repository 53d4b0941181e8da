"""
Splanifold: a cubic Hermite curve in t with directions off the curve, a map of K control coordinates to N numbers.

    u = (1 + 2E) r - E     Sigma = sum_k u_k     t = Sigma / K     delta = u - t
    s = 1 / sqrt(1 + (|delta| / delta_max)^2)
    w = (Sigma u + eps^2 / K) / (Sigma^2 + eps^2) = alpha delta + 1 / K     alpha = Sigma / (Sigma^2 + eps^2)
    Phi = H(P_j, P_j+1, P'_j w, P'_j+1 w; tau) + H(E_j, E_j+1, E'_j, E'_j+1; tau) s delta
    H(A, B, A', B'; tau) = h00 A + h01 B + h10 A' + h11 B'
    h00 = 2 tau^3 - 3 tau^2 + 1, h01 = 1 - h00, h10 = tau (tau - 1)^2, h11 = tau^2 (tau - 1)

r (M, G, K): G splanifolds side by side. A splanifold of S nodes has S - 1 segments of equal length in t;
j = floor(t (S - 1)), kept in 0 .. S - 2, is the segment and tau = t (S - 1) - j the place in it. Neighbouring segments
share a node and its tangents: the map is C1 in t. Outside [0, 1] the first and the last cubic go on.

Two nodes meet a token, so that a token of a splanifold is six matrices times delta: h E, h E' with s and h P' with
alpha, and no more than four where alpha h is one of the h's combinations (chunked.py). With R matrices, R = 4 or 6, e
bytes a number, G N outputs (or their sum, N), for one token (counted):
    forward    2 R G K N FLOPs       e (G K + outputs) bytes, once for all tokens the controls
    backward   4 R G K N             e (2 G K + outputs), and the controls and their gradients
    kept for the backward pass: r and the controls

reference.py has the formula term by term, chunked.py the form for any device, cpu.py and loops.py the CPU's loops for
few coordinates, *_triton.py and fused.py a GPU's kernels.

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034, github.com/curvedinf/k-splanifolds; segments that share
nodes: ours.
"""

import math

import torch
from torch import Tensor

from kernels.backend import (
    check_backend,
    check_device,
    check_dtype,
    check_no_float64,
    check_option,
    check_shape,
    describe,
    loops_serve,
    triton,
)
from kernels.splanifold.chunked import splanifold_chunked
from kernels.splanifold.fused import splanifold_triton
from kernels.splanifold.loops import MOST, WIDEST, loops_fit, splanifold_loops
from kernels.splanifold.reference import SplanifoldControls, splanifold_reference

BACKENDS = dict(
    reference=splanifold_reference,
    chunked=splanifold_chunked,
    loops=splanifold_loops,
    triton=splanifold_triton,
)
MIXES = ("sum", "concat")
TINY = 64  # M G up to which "auto" takes the reference on a CPU: it calls fewer operations


def splanifold(r: Tensor, controls: SplanifoldControls, *, expansion: float = 0.0, delta_max: float = math.inf,
               eps: float = 1e-3, mix: str = "sum", backend: str = "auto") -> Tensor:
    """
    Returns Phi for every token, of G splanifolds that are added or stand side by side, in r's dtype.

    r (..., G, K)    control coordinates, meant for [0, 1]; outside, the first and the last cubic go on
    controls         SplanifoldControls, points (G, S, n), the others (G, S, n, K), S >= 2; zeros give zeros
    expansion        E >= 0: u = (1 + 2E) r - E, so that [0, 1] reaches E beyond both ends of the curve
    delta_max        > 0: the length that deviations from the diagonal stay below; math.inf: no warp
    eps              >= 1e-15: smooths the tangents' weights w around Sigma = 0
    mix              "sum": (..., n); "concat": (..., G n), the first splanifold's n first
    backend          "reference": eager PyTorch, forms every node's products; "chunked": PyTorch, a chunk of tokens at a
                     time; "loops": the CPU's, mix "concat", K <= 16 and S n K <= 2048; "triton": fused, for CUDA;
                     "auto": triton on CUDA (chunked for float64); on a CPU loops where they can be, else chunked, or
                     the reference for a few tokens

    Tensors may be bfloat16, float16, float32 or float64, the controls all of one. All but "triton" compute in float32,
    or in float64 where an argument has it; all but the reference keep r and the controls for the backward pass and
    nothing else. Gradients for r and all controls, once. All backends work under torch.compile(fullgraph=True).
    ValueError that names the argument for a wrong type, shape, dtype, device or option.
    """
    _check(r, controls, expansion, delta_max, eps, mix, backend)
    tokens = r if r.dim() == 3 else r.flatten(0, -3)
    controls = SplanifoldControls(*controls)
    if backend == "auto":
        backend = _choose(tokens, controls, mix)
    out = BACKENDS[backend](tokens, controls, expansion, delta_max, eps, mix)
    return out if r.dim() == 3 else out.unflatten(0, r.shape[:-2])


def _choose(r: Tensor, controls: SplanifoldControls, mix: str) -> str:
    """Returns the backend of "auto"."""
    if r.is_cuda and triton is not None and torch.float64 not in (r.dtype, controls.points.dtype):
        return "triton"
    if loops_fit(controls, mix) and loops_serve(r):
        return "loops"
    return "reference" if not r.is_cuda and r.shape[0] * r.shape[1] <= TINY else "chunked"


def _check(r, controls, expansion, delta_max, eps, mix, backend):
    """Raises splanifold's ValueErrors."""
    # tensors
    check_shape("r", r, "(..., G, K) of three dimensions or more", (..., None, None, None))
    check_dtype("r", r)
    four = isinstance(controls, (tuple, list)) and len(controls) == 4
    if not four or not all(isinstance(x, Tensor) for x in controls):
        raise ValueError(f"controls must be a SplanifoldControls of four tensors; got {describe(controls)}")
    G, K = r.shape[-2:]
    points = controls[0]
    check_shape("controls.points", points, "(G, S, n)", (G, None, None))
    if points.shape[1] < 2:
        raise ValueError(f"controls.points must have S >= 2 nodes, (G, S, n); got {describe(points)}")
    check_dtype("controls.points", points)
    check_device("controls.points", points, "r", r)
    for name, x in zip(SplanifoldControls._fields[1:], controls[1:]):
        check_shape(f"controls.{name}", x, "(G, S, n, K)", (*points.shape, K))
        check_dtype(f"controls.{name}", x, (points.dtype,), like="controls.points")
        check_device(f"controls.{name}", x, "r", r)

    # options
    if not 0 <= expansion < math.inf:
        raise ValueError(f"expansion must be at least 0 and finite; got {expansion}")
    if not delta_max > 0:
        raise ValueError(f"delta_max must be above 0, math.inf for no warp; got {delta_max}")
    if not 1e-15 <= eps < math.inf:
        raise ValueError(f"eps must be at least 1e-15, whose square float32 can hold, and finite; got {eps}")
    check_option("mix", mix, MIXES)
    check_backend(backend, ("auto", *BACKENDS), r, instead="'chunked' or 'auto'")
    if backend == "triton":
        check_no_float64(backend, [r.dtype, points.dtype], instead="'chunked' or 'reference'")
    if backend == "loops" and not loops_fit(SplanifoldControls(*controls), mix):
        raise ValueError(f"backend 'loops' takes mix 'concat', K <= {WIDEST} and S n K <= {MOST}; got {mix!r} and "
                         f"controls.bases {tuple(controls[1].shape)}: use 'chunked' or 'auto'")
