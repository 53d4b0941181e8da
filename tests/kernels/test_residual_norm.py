"""
residual_norm against its equations; its Triton kernels in the interpreter, compiled ahead of time and, where there is
one, on a GPU. Gradients are those of x, y and the gains that are there, for random gradients of z and h.
"""
import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from kernels.residual_norm import residual_norm, residual_norm_reference, scaled_sum_norm
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory

rn = importlib.import_module("kernels.residual_norm")  # the package hands on the function under the module's name
GAINS = ("alpha", "beta", "weight", "stream_scale")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(N, D, gates="channel", weight=True, scale=True, seed=0):
    """
    dict(x, y (N, D), the gains, gz, gh) in float64. gates: "channel", "scalar", "mixed" (alpha a number, beta a
    channel's), "beta" (channel, no alpha) or None.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def near_one(*shape):
        return 1 + 0.5 * randn(*shape)

    x = randn(N, D)
    inputs = dict(x=x, y=0.5 * randn(N, D) + 0.5 * x)
    shapes = {"channel": ((D,), (D,)), "scalar": ((), (1,)), "mixed": ((), (D,)), "beta": (None, (D,)),
              None: (None, None)}[gates]
    inputs |= {name: near_one(*shape) for name, shape in zip(GAINS, shapes) if shape is not None}
    if weight:
        inputs["weight"] = near_one(D)
    if scale:
        inputs["stream_scale"] = near_one()
    return inputs | dict(gz=randn(N, D), gh=randn(N, D))


def rounded(inputs, dtype):
    """Inputs whose rows are exact in dtype and whose gains are in float32."""
    return {name: x.to(torch.float32 if name in GAINS else dtype).double() for name, x in inputs.items()}


def run(inputs, backend, dtype=torch.float64, device="cpu", function=residual_norm, **options):
    """{z, h, and dx, dy, dalpha ... for what is there}; the gains are at least float32."""
    tensors = {name: x.detach().to(device, torch.promote_types(dtype, torch.float32) if name in GAINS else dtype)
               for name, x in inputs.items()}
    gz, gh = tensors.pop("gz"), tensors.pop("gh")
    for x in tensors.values():
        x.requires_grad_()
    z, h = function(**tensors, backend=backend, **options)
    gradients = torch.autograd.grad([z, h], list(tensors.values()), [gz, gh])
    return {name: x.detach().cpu()
            for name, x in dict(z=z, h=h, **{"d" + name: d for name, d in zip(tensors, gradients)}).items()}


def run_interpreted(inputs, dtype=torch.float32, **options):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, **options)


def rounding_reference(dtype):
    """residual_norm in float64 but for z, which is rounded to dtype as a kernel rounds it; its gradient is not."""
    def function(x, y, alpha=None, beta=None, weight=None, stream_scale=None, backend=None):
        z = residual_norm_reference(x, y, alpha, beta, stream_scale=stream_scale)[0]
        z = z + (z.to(dtype).double() - z).detach()
        return z, residual_norm_reference(z, torch.zeros_like(z), weight=weight)[1]
    return function


def assert_close(results, expected, relative_rms, rows=0.0, gains=0.0):
    """
    Relative RMS errors below the bound of float32 (float64 where z has it), of sums over D channels, and for the gains'
    gradients over N rows of them too; rows and gains are what else the rows and those gradients are allowed. A single
    number, a sum of N D numbers near 1 of both signs, may be near 0: its error counts against sqrt(N D) where it is
    smaller.
    """
    N, D = expected["z"].shape
    wide = torch.promote_types(results["z"].dtype, torch.float32)
    def bound(name):
        if name[1:] not in GAINS:
            return rows + float_bound(D, wide)
        return gains + float_bound(N * D if expected[name].numel() == 1 else N + D, wide)
    def error(name):
        if results[name].numel() > 1:
            return relative_rms(results[name], expected[name], floor=0.0)
        return (results[name].double() - expected[name]).abs().item() / max(expected[name].abs().item(),
                                                                            expected["z"].numel() ** 0.5)
    found = {name: error(name) for name in expected}
    assert results.keys() == expected.keys()
    assert all(found[name] < bound(name) for name in found), found


# ---- Reference --------------------------------------------------------------

def parts(x, y):
    """(y along x, y across x)"""
    along = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x
    return along, y - along


def test_reference_is_the_definition(relative_rms):
    inputs = make_inputs(9, 20)
    x, y, alpha, beta, weight, scale, _, _ = inputs.values()
    along, across = parts(x, y)
    z, h = residual_norm_reference(x, y, alpha, beta, weight, scale, eps_norm=1e-3)
    assert relative_rms(z, scale * x + alpha * across + beta * along) < float_bound(20, torch.float64)
    assert relative_rms(h, F.rms_norm(z, (20,), weight, 1e-3)) < float_bound(20, torch.float64)


@pytest.mark.parametrize("gates", ["channel", "scalar"])
def test_special_rows(gates, relative_rms):
    inputs = make_inputs(8, 33, gates)
    x, y, alpha, beta = (inputs[name] for name in ("x", "y", "alpha", "beta"))
    z, bound = lambda x, y: residual_norm_reference(x, y, alpha, beta)[0], float_bound(33, torch.float64)
    assert torch.equal(z(x, 0 * y), x)
    assert torch.equal(z(0 * x, y), alpha * y)
    assert relative_rms(z(x, -0.7 * x), (1 - 0.7 * beta) * x) < bound
    across = parts(x, y)[1]
    assert relative_rms(z(x, across), x + alpha * across) < bound
    assert relative_rms(z(3 * x, 3 * y), 3 * z(x, y)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [torch.ones(()), torch.ones(96)], ids=["scalar", "channel"])
def test_gains_of_one_are_the_plain_residual(dtype, one):
    inputs = rounded(make_inputs(50, 96, None), dtype)
    x, y = inputs["x"].to(dtype), inputs["y"].to(dtype)
    for z, h in (residual_norm(x, y, one, one), residual_norm(x, y, one), residual_norm(x, y, beta=one),
                 residual_norm(x, y)):
        assert torch.equal(z, x + y) and torch.equal(h, residual_norm(x, y)[1])


def test_scalar_gates_keep_parts_apart_and_channel_gates_do_not():
    inputs = make_inputs(40, 64, "scalar")
    x, y, alpha, beta = (inputs[name].float() for name in ("x", "y", "alpha", "beta"))
    along, across = parts(x, y)
    bound = float_bound(64, torch.float32)
    assert ((x * (residual_norm(x, y, beta=torch.zeros(()))[0] - x)).sum(-1).abs() <= bound * x.norm(dim=-1)
            * y.norm(dim=-1)).all()
    z = residual_norm(x, y, alpha, beta)[0]
    factor = 1 + beta * (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    law = factor.square() * x.square().sum(-1, keepdim=True) + alpha.square() * across.square().sum(-1, keepdim=True)
    # the error of a square is twice that of z
    torch.testing.assert_close(z.square().sum(-1, keepdim=True), law, rtol=2 * bound, atol=0)
    direction = (x + alpha / factor * across) * factor.sign()
    error = (F.normalize(z, dim=-1) - F.normalize(direction, dim=-1)).abs()
    assert (error <= bound * (1 + 1 / factor.abs())).all()  # a small factor is a difference that keeps its rounding
    channel = residual_norm(x, y, make_inputs(1, 64)["alpha"].float(), torch.zeros(()))[0] - x
    assert (x * channel).sum(-1).abs().max() > 1e-2 * (x.norm(dim=-1) * y.norm(dim=-1)).max()


@pytest.mark.parametrize("gates, equivariant", [("scalar", True), ("channel", False)])
def test_rotations(gates, equivariant, relative_rms):
    inputs = make_inputs(5, 16, gates)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]

    def z(x, y):
        return residual_norm_reference(x, y, inputs["alpha"], inputs["beta"])[0]

    error = relative_rms(z(inputs["x"] @ rotation, inputs["y"] @ rotation), z(inputs["x"], inputs["y"]) @ rotation,
                         floor=0.0)
    assert error < float_bound(16 + 16, torch.float64) if equivariant else error > 1e-2


@pytest.mark.parametrize("mode", ["clamp", "add"])
@pytest.mark.parametrize("gates", ["channel", "scalar", None])
def test_gradcheck(gates, mode):
    inputs = make_inputs(4, 5, gates)
    inputs["x"][1] *= 0.05  # below eps
    names = [name for name in inputs if name not in ("gz", "gh")]
    tensors = [inputs[name].requires_grad_() for name in names]

    def call(*tensors):
        return residual_norm_reference(**dict(zip(names, tensors)), eps=0.1, eps_norm=0.1, eps_mode=mode)

    assert inputs["x"][1].square().sum() < 0.1 < inputs["x"][0].square().sum()
    assert torch.autograd.gradcheck(call, tensors, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_rows_of_zeros(mode):
    inputs = make_inputs(3, 6)
    inputs["x"][0], inputs["y"][1] = 0, 0
    inputs["x"][2], inputs["y"][2] = 0, 0
    for dtype in (torch.float32, torch.float64):
        results = run(inputs, "reference", dtype, eps_mode=mode)
        assert all(x.isfinite().all() for x in results.values()) and not results["h"][2].any()
    names = [name for name in inputs if name not in ("gz", "gh")]

    def call(*tensors):
        return residual_norm_reference(**dict(zip(names, tensors)), eps=0.1, eps_norm=0.1, eps_mode=mode)

    assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names], eps=1e-6, atol=1e-8,
                                    rtol=1e-6)


def test_float16_does_not_overflow():
    """Squares of 600 leave float16's range."""
    x = torch.full((2, 8), 600.0, dtype=torch.float16)
    z, h = residual_norm(x, x, torch.ones(()), torch.zeros(()))
    assert torch.equal(z, x) and torch.equal(h, torch.ones_like(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    """In half precision z is rounded, and with it what the other results are made of; then these are."""
    inputs = rounded(make_inputs(65, 128), dtype)
    results = run(inputs, "auto", dtype)
    assert all(x.dtype == (torch.float32 if name[1:] in GAINS else dtype) for name, x in results.items())
    half = 0.0 if dtype == torch.float32 else rounding_bound(2, dtype)
    assert_close(results, run(inputs, "reference"), relative_rms, half, half)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gates", ["channel", None])
def test_compiled_reference_equals_eager(gates, compiler, relative_rms):
    inputs = make_inputs(12, 40, gates)
    compiled = torch.compile(residual_norm, fullgraph=True, backend=compiler)
    assert_close(run(inputs, "auto", torch.float32, function=compiled), run(inputs, "reference"), relative_rms)


def test_leading_dimensions():
    inputs = make_inputs(6, 8)
    tensors = {name: x for name, x in inputs.items() if name not in ("gz", "gh")}
    flat = residual_norm(**tensors)
    folded = residual_norm(**tensors | dict(x=tensors["x"].view(2, 3, 8), y=tensors["y"].view(2, 3, 8)))
    assert all(torch.equal(a.view(2, 3, 8), b) for a, b in zip(flat, folded))


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(0, 4)), r"x must be a tensor \(..., D\), not empty; got \(0, 4\)"),
    (dict(x=1.0), "x must be a tensor"),
    (dict(y=torch.zeros(3, 5)), r"y must be a tensor \(\.\.\., D\) of sizes \(3, 4\), not empty; got \(3, 5\)"),
    (dict(y=torch.zeros(3, 4).half()), "y must be float32, as x is; got torch.float16"),
    (dict(alpha=torch.ones(3)), "alpha must be None or a tensor of shape"),
    (dict(beta=1.0), "beta must be None or a tensor of shape.*float"),
    (dict(alpha=torch.ones(1, 1, 4)), "alpha must be None"),
    (dict(weight=torch.ones(())), "weight must be None"),
    (dict(stream_scale=torch.ones(4)), "stream_scale must be None"),
    (dict(alpha=torch.ones(4, dtype=torch.int32)), "alpha must be bfloat16"),
    (dict(weight=torch.ones(4, device="meta")), "weight must be on the device of x, cpu; got meta"),
    (dict(eps=0.0), "eps must be above 0"),
    (dict(eps_norm=float("nan")), "eps_norm must be above 0"),
    (dict(eps_mode="max"), "eps_mode must be one of clamp, add; got 'max'"),
    (dict(backend="cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        residual_norm(**dict(x=torch.zeros(3, 4), y=torch.zeros(3, 4)) | change)


# ---- The CPU's loops: scaled_sum_norm ---------------------------------------

def scaled_inputs(N, D, scaled, dtype):
    """dict(x, y, gz, gh, and scales if they are asked for), rows exact in dtype, scales in float32."""
    inputs = rounded(make_inputs(N, D, None, False, False), dtype)
    return inputs | (dict(scales=torch.tensor([0.75, -1.5], dtype=torch.float64)) if scaled else {})


def run_scaled(inputs, backend, dtype=torch.float64, grads=("gz", "gh"), form=lambda x: x):
    """{z, h, dx, dy, and dscales}"""
    tensors = {name: form(inputs[name].to(dtype)).detach().requires_grad_() for name in ("x", "y")}
    if "scales" in inputs:
        tensors["scales"] = inputs["scales"].to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
    results = dict(zip(("z", "h"), scaled_sum_norm(**tensors, backend=backend)))
    gradients = torch.autograd.grad([results[name[1]] for name in grads], list(tensors.values()),
                                    [form(inputs[name].to(dtype)) for name in grads])
    return {name: x.detach() for name, x in (results | {"d" + name: d for name, d in zip(tensors, gradients)}).items()}


def assert_scaled_close(results, expected, relative_rms, dtype):
    """dscales are sums of N D numbers of both signs: their error counts against sqrt(N D) at least."""
    N, D = expected["z"].shape
    wide = torch.promote_types(dtype, torch.float32)
    roundings = rounding_bound(3, dtype) if dtype.itemsize == 2 else 0.0
    for name in expected:
        if name == "dscales":
            error = (results[name].double() - expected[name]).norm() / expected[name].norm().clamp_min((N * D) ** 0.5)
            assert error < float_bound(N * D, wide) + roundings
        else:
            assert results[name].dtype == dtype and relative_rms(results[name], expected[name]) < float_bound(D,
                    wide) + roundings, name


def test_scaled_sum_is_residual_norm(relative_rms):
    """z is that of two equal gains of y, with a stream_scale."""
    inputs = scaled_inputs(9, 20, True, torch.float64)
    scale, gain = inputs["scales"]
    z, h = residual_norm(inputs["x"], inputs["y"], gain, gain, None, scale, backend="reference")
    found = scaled_sum_norm(inputs["x"], inputs["y"], inputs["scales"], backend="reference")
    assert all(relative_rms(*pair) < float_bound(20, torch.float64) for pair in zip(found, (z, h)))
    assert relative_rms(found[0], 0.75 * inputs["x"] - 1.5 * inputs["y"]) < float_bound(20, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("N, D", [(1, 1), (7, 33), (129, 128)])
@pytest.mark.parametrize("scaled", [True, False])
def test_loops(scaled, N, D, dtype, relative_rms):
    inputs = scaled_inputs(N, D, scaled, dtype)
    with poisoned_memory():
        results = run_scaled(inputs, "loops", dtype)
    assert_scaled_close(results, run_scaled(inputs, "reference"), relative_rms, dtype)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("grads", [("gz",), ("gh",)])
def test_loops_with_one_gradient(grads, scaled, relative_rms):
    inputs = scaled_inputs(7, 33, scaled, torch.float32)
    assert_scaled_close(run_scaled(inputs, "loops", torch.float32, grads), run_scaled(inputs, "reference", grads=grads),
                        relative_rms, torch.float32)


def test_loops_strides():
    inputs = scaled_inputs(6, 16, True, torch.float32)
    contiguous, *others = (run_scaled(inputs, "loops", torch.float32, form=form)
                           for form in (lambda x: x, lambda x: x.T.contiguous().T,
                                        lambda x: torch.cat((x, x), 1)[:, :16]))
    assert all(torch.equal(results[name], contiguous[name]) for results in others for name in contiguous)


def test_loops_keep_what_is_not_finite():
    inputs = scaled_inputs(6, 8, True, torch.float32)
    inputs["x"][2, 1], inputs["y"][4, 0], inputs["x"][0] = float("nan"), float("inf"), 0.0
    results, expected = (run_scaled(inputs, backend, torch.float32) for backend in ("loops", "reference"))
    assert all(torch.equal(results[name].isfinite(), expected[name].isfinite())
               for name in expected) and not expected["z"].isfinite().all()


@pytest.mark.parametrize("change, message",
                         [(dict(y=torch.zeros(3, 5)), r"y must be a tensor \(\.\.\., D\) of sizes \(3, 4\)"),
                          (dict(scales=torch.zeros(3)), r"scales must be None or a float tensor of shape \(2,\)"),
                          (dict(backend="cuda"), "backend must be one of"),
                          (dict(eps_norm=0.0), "eps_norm must be above 0"),
                          (dict(x=torch.zeros(3, 4, device="meta"), y=torch.zeros(3, 4, device="meta"),
                                backend="loops"), "backend 'loops' needs tensors on a CPU")])
def test_scaled_sums_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        scaled_sum_norm(**dict(x=torch.zeros(3, 4), y=torch.zeros(3, 4), scales=torch.ones(2)) | change)


# ---- Triton, interpreted ----------------------------------------------------

FEW_ROWS = [(7, 96), (33, 255), (1, 1000)]
MORE_ROWS = [rows for rows in product((1, 7, 33), (64, 96, 255, 768, 1000)) if rows not in FEW_ROWS]


@pytest.mark.parametrize("N, D", [*FEW_ROWS, *slow_rows(*MORE_ROWS)])
@pytest.mark.parametrize("gates", ["channel", "scalar", None])
def test_interpreted_kernels_equal_the_reference(gates, N, D, interpreter, relative_rms):
    for weight, scale in ((True, True), (False, False))[:1 if N == 33 else 2]:
        inputs = rounded(make_inputs(N, D, gates, weight, scale), torch.float32)
        assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs, "reference"), relative_rms)


SOME_GAINS = [("mixed", False, True), ("beta", True, False), (None, True, False)]
MORE_GAINS = [gains for gains in (*product(("mixed", "beta"), (False, True), (False, True)), (None, False, True))
              if gains not in SOME_GAINS]


@pytest.mark.parametrize("gates, weight, scale", [*SOME_GAINS, *slow_rows(*MORE_GAINS)])
def test_interpreted_kernels_with_some_gains(gates, weight, scale, interpreter, relative_rms):
    inputs = rounded(make_inputs(5, 300, gates, weight, scale), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs, "reference"), relative_rms)


@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_interpreted_rows_below_eps(mode, interpreter, relative_rms):
    inputs = rounded(make_inputs(9, 70), torch.float32)
    inputs["x"][1] *= 1e-3
    inputs["x"][3] = inputs["x"][4] = inputs["y"][4] = inputs["y"][5] = 0
    options = dict(eps=0.01, eps_norm=0.01, eps_mode=mode)
    assert_close(interpreter(__name__, "run_interpreted", inputs, **options), run(inputs, "reference", **options),
                 relative_rms)


def test_interpreted_widest_rows(interpreter, relative_rms):
    inputs = rounded(make_inputs(2, 4096), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs, "reference"), relative_rms)
    with pytest.raises(ValueError, match="backend 'triton' takes at most 4096 channels"):
        interpreter(__name__, "run_interpreted", make_inputs(1, 4097))


def test_interpreted_gains_of_one_are_the_plain_residual(interpreter):
    inputs = rounded(make_inputs(20, 96, None, scale=False), torch.float32)
    ones = inputs | dict(alpha=torch.ones(()), beta=torch.ones(96))
    plain, explicit = (interpreter(__name__, "run_interpreted", x) for x in (inputs, ones))
    assert torch.equal(plain["z"], (inputs["x"].float() + inputs["y"].float())) and torch.equal(explicit["z"],
            plain["z"])


def test_interpreted_float16(interpreter, relative_rms):
    inputs = rounded(make_inputs(21, 100), torch.float16)
    inputs["x"][2] = 600.0  # whose square leaves float16's range
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16)
    assert all(x.dtype == (torch.float32 if name[1:] in GAINS else torch.float16) for name, x in results.items())
    expected = run(inputs, "reference", function=rounding_reference(torch.float16))
    assert torch.equal(results["z"].double(), expected["z"])
    assert_close(results, expected, relative_rms, rounding_bound(1, torch.float16))


def strided_results(inputs, device="cpu", dtype=torch.float32):
    """
    (results for rows apart in memory, for columns apart, for contiguous rows), with z's gradient one number everywhere
    and three dimensions.
    """
    ready = {name: x.to(device, torch.float32 if name in GAINS else dtype) for name, x in inputs.items()}

    def fold(x):
        return x.view(3, -1, x.shape[-1])

    def apart(x):
        return fold(F.pad(x, (0, 16)))[..., :x.shape[-1]]

    def across(x):
        return fold(x).mT.contiguous().mT

    results = []
    for form in (apart, across, fold):
        x, y, gh = (form(ready[name]) for name in ("x", "y", "gh"))
        tensors = [x.requires_grad_(), y.requires_grad_(), *(ready[name].requires_grad_() for name in GAINS)]
        z, h = residual_norm(*tensors, backend="triton")
        gz = torch.ones((), device=device, dtype=dtype).expand_as(z)
        gradients = torch.autograd.grad([z, h], tensors, [gz, gh])
        results.append([x.detach().cpu() for x in (z, h, *gradients)])
    return results


def test_interpreted_strides(interpreter):
    apart, across, contiguous = interpreter(__name__, "strided_results", make_inputs(12, 40))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(apart, across, contiguous))


def unused_results(inputs, backend, device="cpu"):
    """
    Gradients where only z is used or only h, and of some inputs only; 0 for one that the result does not depend on.
    """
    ready = {name: x.to(device, torch.float32) for name, x in inputs.items()}
    gz, gh = ready.pop("gz"), ready.pop("gh")
    gradients = []
    for needed in (list(ready), ["x", "beta"], ["y"]):
        tensors = {name: x.detach().requires_grad_(name in needed) for name, x in ready.items()}
        for i, g in ((0, gz), (1, gh)):
            out = residual_norm(**tensors, backend=backend)[i]
            wanted = [tensors[name] for name in needed]
            gradients += [torch.zeros_like(x) if d is None else d
                          for d, x in zip(torch.autograd.grad(out, wanted, g, allow_unused=True), wanted)]
    return [d.cpu() for d in gradients]


@pytest.mark.parametrize("gates", ["channel", "beta"])
def test_interpreted_unused_results(gates, interpreter, relative_rms):
    inputs = make_inputs(10, 24, gates)
    for got, expected in zip(interpreter(__name__, "unused_results", inputs, "triton"),
                             unused_results(inputs, "reference"), strict=True):
        error = relative_rms(got, expected, floor=float_bound(1, torch.float32))
        assert error < 2 * float_bound(10 * 24, torch.float32)


def opcheck_interpreted(inputs):
    tensors = [inputs[name].float().requires_grad_() if name in inputs else None for name in ("x", "y", *GAINS)]
    return torch.library.opcheck(torch.ops.knotgpt.residual_norm.default, (*tensors, 1e-8, 1e-6, False))


@pytest.mark.parametrize("gates, weight, scale",
                         [("channel", True, True), *slow_rows((None, False, False), (None, True, True))])
def test_interpreted_registration(gates, weight, scale, interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted",
                           make_inputs(3, 20, gates, weight, scale)).values()) == {"SUCCESS"}




# ---- Triton, compiled ahead of time -----------------------------------------

def compile_ahead(aot, name, D, dtype, capability, gates="channel", weight=True, scale=False, ones=()):
    """
    A kernel as a training step launches it, all gains with a gradient. gates: "channel", "scalar" or None. ones:
    arguments that are 1, of which a launch makes constants.
    """
    kernel, wide = getattr(rn, f"_residual_norm_{name}_kernel"), D if gates == "channel" else 1
    launch = rn._launch(D, name == "bwd" and weight and (gates is not None or scale))
    warps = launch.pop("num_warps")
    plain, backward = gates is None, name == "bwd"
    absent = dict(alpha=plain, dalpha=plain, beta=plain, dbeta=plain, c=plain, weight=not weight, dweight=not weight,
                  scale=not scale, dscale=not scale, x=plain and backward and not scale, y=plain and backward,
                  z=backward and not plain, dy=plain and not scale)
    constants = dict(D=D, ALPHA_COLUMNS=wide, BETA_COLUMNS=wide, MIX=not plain, ADD=False, **launch)
    constants |= {f"{tensor}_ptr": None for tensor, missing in absent.items() if missing} | dict.fromkeys(ones, 1)
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    rows = {f"{tensor}_ptr" for tensor in ("x", "y", "z", "h", "gz", "gh", "dx", "dy")}

    def kind(argument):
        if argument.endswith("_ptr"):
            return element if argument in rows else "*fp32"
        return "fp32" if argument.startswith("eps") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names if argument not in constants}
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument.endswith("_row")
               and argument != "sums_row" and D % 16 == 0]
    return aot(kernel, signature, constants, capability, warps, 3, aligned)


USUAL = [("channel", True), (None, False), *slow_rows(("channel", False), ("scalar", False))]
SLOW = [*((D, torch.bfloat16, capability) for D in (128, 768, 1024) for capability in (80, 90, 100)
          if (D, capability) != (768, 90)), (768, torch.float32, 90), (1000, torch.bfloat16, 90),
        (4096, torch.bfloat16, 90)]


@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("gates, weight", USUAL)
@pytest.mark.parametrize("D, dtype, capability",
                         [(768, torch.bfloat16, 90), *slow_rows(*SLOW)])
def test_kernels_compile_for_cards(D, dtype, capability, gates, weight, name, aot):
    result = compile_ahead(aot, name, D, dtype, capability, gates, weight)
    assert result.spills == 0 and result.shared <= min(result.shared_limit, 99 * 1024)  # a consumer card's limit, too


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("gates, weight", [("channel", True), ("scalar", True), (None, True), (None, False)])
def test_kernels_with_a_stream_scale_compile_for_cards(gates, weight, name, aot):
    assert compile_ahead(aot, name, 768, torch.bfloat16, 90, gates, weight, scale=True).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("D, gates", [(1, "scalar"), (8, "channel"), (8, None)])
def test_kernels_compile_for_one_row(D, gates, name, aot):
    assert compile_ahead(aot, name, D, torch.float16, 90, gates,
                         ones=("N", "x_row", "y_row", "gz_row", "gh_row",
                               "sums_row")[:6 if D == 1 else 1]).registers <= 128


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gates, weight, scale",
                         [("channel", True, True), ("channel", False, False), ("scalar", True, False),
                          ("beta", True, False), (None, True, True), (None, False, False)])
@pytest.mark.parametrize("N, D", [(1000, 768), (7, 64), (33, 96), (1, 255), (1000, 1000), (100, 1024), (65, 4096),
                                  (20_000, 128)])
def test_gpu_equals_the_reference(N, D, gates, weight, scale, dtype, relative_rms):
    inputs = rounded(make_inputs(N, D, gates, weight, scale), dtype)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, "cuda")
    if dtype == torch.float32:
        return assert_close(results, run(inputs, "reference"), relative_rms)
    expected = run(inputs, "reference")
    assert relative_rms(results["z"], expected["z"], floor=0.0) < 2e-3
    assert_close(results, expected, relative_rms, 3e-3, 3e-3)
    assert_close(results, run(inputs, "reference", function=rounding_reference(dtype)), relative_rms, 3e-3, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_gpu_rows_below_eps(mode, relative_rms):
    inputs = rounded(make_inputs(9, 70), torch.float32)
    inputs["x"][1] *= 1e-3
    inputs["x"][3] = inputs["x"][4] = inputs["y"][4] = inputs["y"][5] = 0
    options = dict(eps=0.01, eps_norm=0.01, eps_mode=mode)
    assert_close(run(inputs, "triton", torch.float32, "cuda", **options), run(inputs, "reference", **options),
                 relative_rms)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gains_of_one_are_the_plain_residual(dtype):
    x, y = (torch.randn(1000, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)
            for seed in (0, 1))
    ones = torch.ones(768, device="cuda")
    for z, h in (residual_norm(x, y), residual_norm(x, y, ones, ones), residual_norm(x, y, ones[0], ones[0])):
        assert torch.equal(z, x + y) and torch.equal(h, residual_norm(x, y)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["channel", "scalar", None])
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit(gates):
    inputs = make_inputs(5000, 768, gates)
    compiled = torch.compile(residual_norm, fullgraph=True)
    eager, again, graph = (run(inputs, "auto", torch.bfloat16, "cuda", function)
                           for function in (residual_norm, residual_norm, compiled))
    assert all(torch.equal(eager[name], again[name]) and torch.equal(eager[name], graph[name]) for name in eager)


@pytest.mark.gpu
def test_gpu_strides():
    apart, across, contiguous = strided_results(make_inputs(12, 40), "cuda", torch.bfloat16)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(apart, across, contiguous))


@pytest.mark.gpu
def test_gpu_unused_results(relative_rms):
    inputs = make_inputs(10, 24)
    for got, expected in zip(unused_results(inputs, "triton", "cuda"), unused_results(inputs, "reference"),
                             strict=True):
        error = relative_rms(got, expected, floor=float_bound(1, torch.float32))
        assert error < 2 * float_bound(10 * 24, torch.float32)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """2^21.5 rows of 768 channels are 2^31.1 elements; the last rows are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    N, D, last = 3_000_000, 768, 1000
    x, y, gz, gh = (torch.randn(N, D, dtype=torch.bfloat16, device="cuda",
                                generator=torch.Generator("cuda").manual_seed(seed)) for seed in range(4))
    gate, results = torch.tensor(0.5, device="cuda"), []
    for rows in (slice(None), slice(-last, None)):
        own = [x[rows].detach().requires_grad_(), y[rows].detach().requires_grad_()]
        z, h = residual_norm(*own, gate)
        results.append([part[-last:].detach().clone()
                        for part in (z, h, *torch.autograd.grad([z, h], own, [gz[rows], gh[rows]]))])
        del z, h, own
    assert all(torch.equal(a, b) for a, b in zip(*results))
