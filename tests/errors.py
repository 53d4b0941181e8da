"""
Tolerances of comparisons between floating-point results, taken from error bounds. A sum's last digits depend on the
order of its additions, and that order on the processor's vector width, its libraries and its threads: what one machine
gave is no bound for the next.
"""

import torch


def relative_rms(x: torch.Tensor, reference: torch.Tensor, floor: float = 0.0) -> float:
    """
    RMS of x - reference over the RMS of reference, which must be finite, both as float64; infinite if x has a NaN or an
    infinity, 0 if the RMS of the difference is below floor.
    """
    assert x.shape == reference.shape, f"shapes {tuple(x.shape)} and {tuple(reference.shape)}"
    assert torch.isfinite(reference).all(), "the reference is not finite: with a NaN in it nothing would be compared"
    if not torch.isfinite(x).all():
        return float("inf")
    if not x.numel():
        return 0.0
    exact = reference.detach().cpu().double()
    difference = (x.detach().cpu().double() - exact).square().mean().sqrt().item()
    return 0.0 if difference < floor else difference / max(exact.square().mean().sqrt().item(), 1e-300)


def float_bound(terms: int, dtype: torch.dtype, k: float = 4.0) -> float:
    """
    The error of a sum of this many terms that is added in dtype, in any order: k sqrt(terms) eps, relative to the sum
    of the terms' absolute values.

    No order loses more than (terms - 1) eps / 2. Roundings err to both sides, so that the error passes lambda
    sqrt(terms) eps / 2 with a probability of about exp(-lambda^2 / 2) only (Higham and Mary, SIAM J. Sci. Comput. 41,
    2019); k = 4 is lambda = 8, and leaves room for the few roundings before and after a sum. Terms of random signs make
    a result of 1 / sqrt(terms) of the sum of absolute values, but only partial sums of that size are rounded on the
    way: for them the bound is relative to the result. Where terms cancel beyond that, `cancellation` says by how much
    the bound is to be multiplied. A chain of sums, one of the results of another, has the terms of all of them.
    """
    return k * terms ** 0.5 * torch.finfo(dtype).eps


def rounding_bound(roundings: int, dtype: torch.dtype) -> float:
    """
    The relative RMS error of numbers that are right but for so many independent roundings to dtype, to the nearest:
    each is at most eps / 2.
    """
    return float_bound(roundings, dtype, 0.5)


def cancellation(absolute: torch.Tensor, result: torch.Tensor) -> float:
    """
    By how much sums shrink as their terms cancel: the RMS of the sums of absolute values over the RMS of the results,
    at least 1.
    """
    return max(1.0, (absolute.double().square().mean() / result.double().square().mean()).sqrt().item())


def reference_bound(low: torch.Tensor, exact: torch.Tensor, terms: int, dtype: torch.dtype | None = None,
                    factor: float = 4.0, floor: float = 0.0) -> float:
    """
    A tolerance for relative_rms(result, exact) with a result in dtype (low's if not given): factor times what the
    reference itself loses on this machine (low, its result in a narrower dtype than the float64 of `exact`), in
    proportion to the two dtypes' eps, and at least the bound of a sum of `terms` terms, since a reference may be lucky
    or add in a better order. A loss whose RMS is below floor is none: of results that are zero by the equations.
    """
    dtype = dtype or low.dtype
    loss = relative_rms(low, exact, floor) * torch.finfo(dtype).eps / torch.finfo(low.dtype).eps
    return max(factor * loss, float_bound(terms, dtype))


def perturbed(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """
    x with every number off by a unit in the last place, up or down at random: what becomes of that is a rounding's
    effect on all that follows.
    """
    signs = 2 * torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)) - 1
    return x * (1 + torch.finfo(x.dtype).eps * signs.to(x))
