"""
softcapped_cross_entropy against its definition; its Triton kernel in the interpreter, compiled ahead of time and, where
there is one, on a GPU. Gradients are those of three times the loss, so that the factor of the backward pass counts.
"""
import importlib
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.softcapped_cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_reference
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.marks import slow
from tests.kernels.poison import poisoned_memory
from train_gpt import SoftcappedCrossEntropy

# the package may hand on the function under the module's name
sc = importlib.import_module("kernels.softcapped_cross_entropy")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(N, D, V, dtype=torch.float64, std=3.0, seed=0):
    """
    x (N, D) and weight (V, D), exact in dtype, for logits of this standard deviation; targets (N,) with the first and
    the last of the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).double()

    targets = torch.randint(0, V, (N,), generator=generator)
    targets[0], targets[-1] = 0, V - 1
    return dict(x=randn(N, D), weight=randn(V, D) * 2.0 ** round(torch.tensor(std / D ** 0.5).log2().item()),
                targets=targets)


def run(inputs, backend, dtype=torch.float64, device="cpu", function=softcapped_cross_entropy, weight_dtype=None,
        **options):
    """dict(loss, dx, dweight)"""
    x = inputs["x"].to(device, dtype).requires_grad_()
    weight = inputs["weight"].to(device, weight_dtype or dtype).requires_grad_()
    loss = function(x, weight, inputs["targets"].to(device), backend=backend, **options)
    dx, dweight = torch.autograd.grad(3 * loss, [x, weight])
    return {name: tensor.detach().cpu() for name, tensor in dict(loss=loss, dx=dx, dweight=dweight).items()}


def run_interpreted(inputs, dtype=torch.float32, **options):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, **options)


def float32_bounds(inputs, expected, softcap=15.0, **options):
    """
    Tolerances by name for results in float32: sums over D, then V, then N. A capped logit is right to the last place of
    the cap, and a probability's relative error is a logit's error. The loss is a sum of logarithms of sums, whose
    errors are the relative errors of those sums, and of logits, sums over D.
    """
    (N, D), V = inputs["x"].shape, len(inputs["weight"])
    low = run(inputs, "reference", torch.float32, softcap=softcap, **options)
    capped = rounding_bound(2, torch.float32) * softcap
    bounds = {name: reference_bound(low[name], expected[name], N + D + V) + capped for name in ("dx", "dweight")}
    largest = (inputs["x"].abs() @ inputs["weight"].abs().T).max().item()
    token = float_bound(D, torch.float32) * largest + capped + float_bound(V, torch.float32)
    return bounds | dict(loss=float_bound(N, torch.float32) + N * token / abs(expected["loss"].item()))


def assert_close(results, expected, relative_rms, tolerance, loss_tolerance=None):
    """tolerance: a number, with loss_tolerance that of the loss, or numbers by name."""
    if not isinstance(tolerance, dict):
        tolerance = dict(loss=loss_tolerance or tolerance, dx=tolerance, dweight=tolerance)
    found = {name: relative_rms(results[name], expected[name], floor=0.0) for name in expected}
    assert all(error < tolerance[name] for name, error in found.items()), (found, tolerance)


# ---- Reference --------------------------------------------------------------

@pytest.mark.parametrize("softcap", [0.0, 2.0, 15.0])
def test_reference_is_the_definition(softcap):
    inputs = make_inputs(9, 20, 33)
    logits = inputs["x"] @ inputs["weight"].T
    expected = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, inputs["targets"],
                               reduction="sum")
    torch.testing.assert_close(softcapped_cross_entropy(**inputs, softcap=softcap), expected,
                               rtol=float_bound(9 + 20 + 33, torch.float64), atol=0)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    x, weight, targets = make_inputs(4, 3, 5).values()
    assert torch.autograd.gradcheck(lambda x, w: softcapped_cross_entropy_reference(x, w, targets, softcap),
                                    [x.requires_grad_(), weight.requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    """In half precision logits, their gradients, what a product keeps on the way and dx are rounded."""
    inputs = make_inputs(40, 32, 65, dtype, std=1.0)
    results = run(inputs, "auto", dtype, weight_dtype=torch.float32)
    assert [results[name].dtype for name in ("loss", "dx", "dweight")] == [torch.float32, dtype, torch.float32]
    tolerance = rounding_bound(4, dtype) if dtype != torch.float32 else float_bound(40 + 32 + 65, dtype)
    assert_close(results, run(inputs, "reference"), relative_rms, tolerance)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    inputs = make_inputs(12, 16, 40)
    compiled = torch.compile(softcapped_cross_entropy, fullgraph=True, backend=compiler)
    results, expected = run(inputs, "auto", torch.float32, function=compiled), run(inputs, "reference")
    assert_close(results, expected, relative_rms, float32_bounds(inputs, expected))


# ---- The CPU's loops --------------------------------------------------------

@pytest.mark.parametrize("softcap", [0.0, 2.0, 15.0, 100.0])
@pytest.mark.parametrize("N, D, V, std, chunk",
                         [(2, 1, 3, 1.0, 4096), (9, 20, 33, 3.0, 4), (65, 32, 264, 3.0, 4096), (40, 16, 1000, 30.0, 7)])
def test_loops(N, D, V, std, chunk, softcap, relative_rms):
    inputs = make_inputs(N, D, V, torch.float32, std)
    with poisoned_memory():
        results = run(inputs, "loops", torch.float32, softcap=softcap, chunk=chunk)
    expected = run(inputs, "reference", softcap=softcap)
    assert_close(results, expected, relative_rms, float32_bounds(inputs, expected, softcap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loops_in_half_precision(dtype, relative_rms):
    inputs = make_inputs(40, 32, 65, dtype, std=1.0)
    results = run(inputs, "loops", dtype, weight_dtype=torch.float32)
    assert [results[name].dtype for name in ("loss", "dx", "dweight")] == [torch.float32, dtype, torch.float32]
    assert_close(results, run(inputs, "reference"), relative_rms, rounding_bound(4, dtype))


def test_loops_without_gradients_and_with_one(relative_rms):
    inputs = make_inputs(9, 20, 33, torch.float32)
    x, weight, expected = inputs["x"].float(), inputs["weight"].float(), run(inputs, "reference")
    tolerances = float32_bounds(inputs, expected)
    assert relative_rms(softcapped_cross_entropy(x, weight, inputs["targets"], backend="loops"),
                        expected["loss"]) < tolerances["loss"]
    loss = softcapped_cross_entropy(x, weight.requires_grad_(), inputs["targets"], backend="loops")
    assert relative_rms(torch.autograd.grad(3 * loss, weight)[0], expected["dweight"]) < tolerances["dweight"]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_loops_keep_nan(softcap):
    inputs = make_inputs(6, 4, 8)
    inputs["x"][2, 1] = float("nan")
    results, expected = (run(inputs, backend, torch.float32, softcap=softcap) for backend in ("loops", "reference"))
    assert all(torch.equal(results[name].isnan(), expected[name].isnan())
               for name in expected) and expected["loss"].isnan()


@pytest.mark.parametrize("target", [-1, 8, 2**40])
def test_loops_read_no_target_outside(target):
    inputs = make_inputs(6, 4, 8)
    inputs["targets"][3] = target
    results = run(inputs, "loops", torch.float32)
    assert results["loss"].isnan() and results["dx"].isfinite().all()


def test_loops_have_no_float64():
    with pytest.raises(ValueError, match="backend 'loops' has no float64"):
        run(make_inputs(3, 4, 5), "loops")


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(0, 4)), r"x must be a tensor \(N, D\), not empty; got \(0, 4\)"),
    (dict(x=torch.zeros(1, 3, 4)), r"x must be a tensor \(N, D\)"),
    (dict(x=torch.zeros(3, 4, dtype=torch.int32)), "x must be bfloat16, float16, float32 or float64; got torch.int32"),
    (dict(weight=None), r"weight must be a tensor \(V, D\) of sizes \(any, 4\), not empty; got NoneType"),
    (dict(weight=torch.zeros(7, 5)), r"weight must be a tensor \(V, D\) of sizes \(any, 4\), not empty; got \(7, 5\)"),
    (dict(weight=torch.zeros(7, 4, device="meta")), "weight must be on the device of x, cpu; got meta"),
    (dict(targets=torch.zeros(2, dtype=torch.int64)), r"targets must be a tensor \(N,\) of sizes \(3\).*; got \(2,\)"),
    (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets must be int64; got torch.int32"),
    (dict(softcap=-1.0), "softcap must be finite and not below 0"),
    (dict(softcap=float("nan")), "softcap must be finite"),
    (dict(chunk=0), "chunk must be a whole number of tokens, at least 1; got 0"),
    (dict(chunk=1.5), "chunk must be a whole number"),
    (dict(backend="cuda"), "backend must be one of auto, reference, loops, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
    (dict(backend="reference", fp8=True), "fp8 needs backend 'triton'"),
    (dict(fp8=True), "fp8 needs a GPU of compute capability 8.9 or newer; got tensors on cpu"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        softcapped_cross_entropy(**dict(x=torch.zeros(3, 4), weight=torch.zeros(7, 4),
                                        targets=torch.zeros(3, dtype=torch.int64)) | change)


# ---- Triton, interpreted ----------------------------------------------------

@pytest.mark.parametrize("softcap", [0.0, 15.0, *slow(2.0, 50.0)])
@pytest.mark.parametrize("N, D, V, chunk",
                         [(1, 1, 2, 1), (7, 16, 33, 3), (33, 8, 264, 4096), (5, 12, 4096, 2), (4, 24, 9001, 3)])
def test_interpreted_kernel_equals_the_reference(N, D, V, chunk, softcap, interpreter, relative_rms):
    inputs = make_inputs(N, D, V, torch.float32)
    results = interpreter(__name__, "run_interpreted", inputs, softcap=softcap, chunk=chunk)
    expected = run(inputs, "reference", softcap=softcap)
    assert_close(results, expected, relative_rms, float32_bounds(inputs, expected, softcap=softcap))


def test_interpreted_kernel_equals_the_trainer(interpreter, relative_rms):
    inputs = make_inputs(50, 16, 40, torch.float32)

    def trainer(x, weight, targets, backend, softcap, chunk):
        return SoftcappedCrossEntropy.apply(x, weight, targets, softcap, chunk)

    expected = run(inputs, "reference", softcap=2.0)
    bounds = float32_bounds(inputs, expected, softcap=2.0)
    assert_close(interpreter(__name__, "run_interpreted", inputs, softcap=2.0, chunk=16), expected, relative_rms,
                 bounds)
    assert_close(run(inputs, None, torch.float32, function=trainer, softcap=2.0, chunk=16), expected, relative_rms,
                 bounds)


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float16, torch.float32), (torch.float32, torch.float16),
                                                 (torch.float32, torch.bfloat16)])
def test_interpreted_weight_of_another_dtype(dtype, weight_dtype, interpreter, relative_rms):
    """
    float16 logits, their gradients and dx are rounded; a weight's own dtype rounds its gradient only. bfloat16 logits
    are left to a GPU: the interpreter loses the carry of a mantissa that is rounded up to 2.
    """
    inputs = make_inputs(21, 32, 100, torch.bfloat16, std=1.0)
    results = interpreter(__name__, "run_interpreted", inputs, dtype, weight_dtype=weight_dtype, chunk=4)
    assert [results[name].dtype for name in ("loss", "dx", "dweight")] == [torch.float32, dtype, weight_dtype]
    expected = run(inputs, "reference")
    if dtype == torch.float16:
        return assert_close(results, expected, relative_rms, rounding_bound(3, dtype))
    bounds = float32_bounds(inputs, expected)
    assert_close(results, expected, relative_rms, bounds
                 | dict(dweight=rounding_bound(1, weight_dtype) + bounds["dweight"]))


@pytest.mark.parametrize("softcap", [2.0, 15.0])
def test_interpreted_gradient_of_every_logit(softcap, interpreter, relative_rms):
    """
    One token, x = 1: the weights are the logits, and 3 d is their gradient. Also where tanh is 1 in float32, and near
    0.
    """
    logits = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-12, -1, 500), -torch.logspace(-12, -1, 500)])[:,
            None].double()
    inputs = dict(x=torch.ones(1, 1).double(), weight=logits.float().double(), targets=torch.tensor([2000]))
    results = interpreter(__name__, "run_interpreted", inputs, softcap=softcap)
    expected = run(inputs, "reference", softcap=softcap)
    assert_close(results, expected, relative_rms, float32_bounds(inputs, expected, softcap=softcap))
    # beyond, 1 - tanh^2 is 4 e^-2u / (1 + e^-2u)^2 also in float64
    wide = torch.where(logits.abs() > 12, logits, 12.0) / softcap
    e, p = (-2 * wide.abs()).exp(), torch.softmax(softcap * torch.tanh(logits / softcap), 0)
    rounded = rounding_bound(1, torch.float32) * 120 / softcap  # of the exponent 2 |s| / c
    rtol = float_bound(len(logits), torch.float32) + rounded  # of the sum in p, and of e
    torch.testing.assert_close(results["dweight"][logits.abs() > 12].double(),
                               (12 * p * e / (1 + e) ** 2)[logits.abs() > 12], rtol=rtol, atol=0)


@pytest.mark.parametrize("softcap", [0.0, 40.0, 41.0, 1000.0])
def test_interpreted_extreme_logits(softcap, interpreter, relative_rms):
    """
    All at one end of the range, and one at the other: nothing underflows or overflows. A probability's error is that of
    a logit and of the normaliser.
    """
    x, weight = torch.tensor([[1e3], [-1e3], [1.0]]).double(), torch.ones(50, 1).double()
    weight[7] = -1
    inputs = dict(x=x, weight=weight, targets=torch.tensor([3, 3, 7]))
    results = interpreter(__name__, "run_interpreted", inputs, softcap=softcap)
    expected = run(inputs, "reference", softcap=softcap)
    assert_close(results, expected, relative_rms, rounding_bound(2, torch.float32) * min(softcap or 1e3, 1e3)
                 + float_bound(3 + 1 + 50, torch.float32))


def test_interpreted_target_outside_the_vocabulary(interpreter):
    inputs = make_inputs(4, 8, 20)
    for target in (-1, 20, 2 ** 45):
        inputs["targets"][1] = target
        results = interpreter(__name__, "run_interpreted", inputs)
        assert results["loss"].isnan() and results["dx"].isfinite().all() and results["dweight"].isfinite().all()


def strided_results(inputs):
    """Gradients and loss for contiguous tensors, and for others of the same numbers."""
    x, weight, targets = inputs["x"].float(), inputs["weight"].float(), inputs["targets"]
    other = x.T.contiguous().T, F.pad(weight, (0, 3))[:, :-3], torch.stack([targets, targets + 1], 1)[:, 0]
    results = []
    for a, w, t in ((x, weight, targets), other):
        loss = softcapped_cross_entropy(a.detach().requires_grad_(), w.detach(), t, chunk=4, backend="triton")
        a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
        results.append([loss.detach(),
                        *torch.autograd.grad(softcapped_cross_entropy(a, w, t, chunk=4, backend="triton"), [a, w])])
    return results


def test_interpreted_strides(interpreter, relative_rms):
    """The products may add in another order."""
    for a, b in zip(*interpreter(__name__, "strided_results", make_inputs(9, 8, 30))):
        assert relative_rms(a, b) < float_bound(9 + 8 + 30, torch.float32)


def partial_results(inputs, device="cpu", dtype=torch.float32):
    """{(x needs a gradient, weight does): (loss, dx, dweight, FLOPs)}, and without gradients at all at None."""
    results = {}
    for needs in ((True, True), (True, False), (False, True), (False, False), None):
        x, weight = (inputs[name].to(device, dtype).requires_grad_(needs is None or own)
                     for name, own in zip(("x", "weight"), needs or (True, True)))
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(needs is not None):
            loss = softcapped_cross_entropy(x, weight, inputs["targets"].to(device), chunk=4, backend="triton")
        if loss.requires_grad:
            loss.backward()
        results[needs] = [loss.detach().cpu(),
                          *(None if tensor.grad is None else tensor.grad.cpu() for tensor in (x, weight)),
                          counter.get_total_flops()]
    return results


def assert_partial(results, work):
    loss, *gradients, _ = results[True, True]
    for needs, (own_loss, *own, flops) in results.items():
        wanted = needs or (False, False)
        assert torch.equal(own_loss, loss) and flops == work * (1 + sum(wanted))
        assert all(torch.equal(a, b) if needed else a is None for a, b, needed in zip(own, gradients, wanted))


def test_interpreted_gradients_are_formed_where_needed(interpreter):
    assert_partial(interpreter(__name__, "partial_results", make_inputs(9, 8, 30)), 2 * 9 * 8 * 30)


def run_fp8_interpreted(inputs, dtype, **options):
    """
    run_interpreted with PyTorch's conversion to float8_e5m2: the interpreter's own loses the carry of a mantissa that
    is rounded up to 2.
    """
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    own = interpreter._convert_float
    def convert(values, source, target, rounding):
        if target != tl.float8e5:
            return own(values, source, target, rounding)
        return torch.from_numpy(values).to(torch.float8_e5m2).view(torch.uint8).numpy()
    with mock.patch.object(interpreter, "_convert_float", convert):
        return run_interpreted(inputs, dtype, fp8=True, **options)


def simulated_fp8(inputs, dtype, softcap):
    """What float8 makes of inputs, the rest in float64."""
    (x, x_scale), (weight, w_scale) = (sc._quantise(inputs[name].to(dtype)) for name in ("x", "weight"))
    x, weight = x.double() * x_scale.double(), weight.double() * w_scale.double()
    logits = (x @ weight.T).requires_grad_()
    loss = F.cross_entropy(softcap * torch.tanh(logits / softcap), inputs["targets"], reduction="sum")
    d = (torch.autograd.grad(loss, logits)[0] * sc.D_SCALE).float().to(torch.float8_e5m2).double() / sc.D_SCALE
    return dict(loss=loss.detach(), dx=3 * d @ weight, dweight=3 * d.T @ x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float16, 1e-2)])
def test_interpreted_fp8(dtype, tolerance, interpreter, relative_rms):
    """
    Against float64 on the numbers that float8 leaves, where d next to the middle of two numbers may round otherwise,
    and against the true loss.
    """
    inputs = make_inputs(64, 32, 128, std=1.0)
    results = interpreter(__name__, "run_fp8_interpreted", inputs, dtype, softcap=15.0, chunk=48)
    # a logit rounded to dtype in each of 64 tokens
    loss_tolerance = rounding_bound(1, dtype) / 64 ** 0.5 + float_bound(32 + 128, torch.float32)
    assert_close(results, simulated_fp8(inputs, dtype, 15.0), relative_rms, tolerance, loss_tolerance)
    assert_close(results, run(inputs, "reference"), relative_rms, 6e-2, 2e-3)


def test_quantised_numbers_are_near():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 100)[:, None]
    for tensor in (x, x.bfloat16(), 1e-30 * x):
        q, scale = sc._quantise(tensor)
        assert ((q.double() * scale.double() - tensor.double()).abs() <= tensor.double().abs() * 2 ** -3.9
                + scale.double() * 2 ** -9.9).all()
    q, scale = sc._quantise(torch.zeros(4, 4))
    assert not q.float().any() and scale > 0


@pytest.mark.parametrize("change", [dict(D=24), dict(V=20), dict(N=8), dict(chunk=8)], ids=str)
def test_interpreted_fp8_sizes(change, interpreter):
    sizes = dict(N=16, D=16, V=32, chunk=16) | change
    message = "multiples of 16; got {} = {}".format(*next(iter(change.items())))
    chunk = sizes.pop("chunk")
    with pytest.raises(ValueError, match=message):
        interpreter(__name__, "run_interpreted", make_inputs(**sizes), fp8=True, chunk=chunk)


def opcheck_interpreted(inputs, wanted):
    x, weight = (inputs[name].float().requires_grad_(own) for name, own in zip(("x", "weight"), wanted))
    return torch.library.opcheck(torch.ops.knotgpt.softcapped_cross_entropy.default,
                                 (x, weight, inputs["targets"], 15.0, 2, False, wanted))


@pytest.mark.parametrize("wanted", [[False, True], *slow([True, True])])
def test_interpreted_registration(wanted, interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted", make_inputs(3, 8, 20), wanted).values()) == {"SUCCESS"}


# ---- Triton, compiled ahead of time -----------------------------------------

MAIN = (50_304, "bf16", 15.0, "training")
OTHERS = [(264, "bf16", 15.0, "training"), (264, "fp32", 15.0, "training"), (50_304, "fp32", 15.0, "training"),
          (50_304, "bf16", 0.0, "training"), (50_304, "bf16", 50.0, "training"), (50_304, "bf16", 15.0, "loss"),
          (50_304, "bf16", 15.0, "fp8"), (262_144, "bf16", 15.0, "training")]


@pytest.mark.parametrize("V, element, softcap, form, capability",
                         [*((*MAIN, capability) for capability in (80, 90, 100)),
                          *(pytest.param(*case, capability, marks=pytest.mark.slow) for case in OTHERS
                            for capability in (80, 90, 100) if (case[3], capability) != ("fp8", 80))])
def test_kernel_compiles_for_cards(V, element, softcap, form, capability, aot):
    launch = sc._launch(V)
    warps = launch.pop("num_warps")
    constants = sc._constants(V, softcap, form == "fp8") | launch | (dict(d_ptr=None) if form == "loss" else {})
    signature = dict(s_ptr=f"*{element}", targets_ptr="*i64", loss_ptr="*fp32",
                     d_ptr="*fp8e5" if form == "fp8" else f"*{element}", softcap="fp32")
    signature = {argument: kind for argument, kind in signature.items() if argument not in constants}
    result = aot(sc._softcapped_cross_entropy_kernel, signature, constants, capability, warps, 3)
    assert result.spills == 0 and result.shared <= min(result.shared_limit, 99 * 1024)  # a consumer card's limit, too
    assert result.registers <= 64  # two programs of 512 threads on a multiprocessor
    if V >= 4096 and element == "bf16":
        # 16 bytes a thread
        assert len(re.findall(r"\bld\.global\S*\.v4\.b32", result.ptx)) == (1 if form == "loss" else 2)


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance, loss_tolerance",
                         [(torch.bfloat16, 6e-3, 1e-3), (torch.float16, 1e-3, 1e-4), (torch.float32, None, None)])
@pytest.mark.parametrize("N, D, V, chunk, softcap",
                         [(1000, 64, 50_304, 256, 15.0), (1000, 64, 50_304, 4096, 0.0), (33, 96, 264, 4096, 15.0),
                          (33, 96, 264, 16, 50.0), (7, 16, 1001, 3, 15.0), (3, 64, 262_144, 2, 15.0)])
def test_gpu_equals_the_reference(N, D, V, chunk, softcap, dtype, tolerance, loss_tolerance, relative_rms):
    inputs = make_inputs(N, D, V, dtype, std=1.0)
    for weight_dtype in (dtype, torch.float32):
        with poisoned_memory():
            results = run(inputs, "triton", dtype, "cuda", weight_dtype=weight_dtype, softcap=softcap, chunk=chunk)
        assert results["dweight"].dtype == weight_dtype
        expected = run(inputs, "reference", device="cuda", softcap=softcap)
        assert_close(results, expected, relative_rms, tolerance
                     or float32_bounds(inputs, expected, device="cuda", softcap=softcap), loss_tolerance)


@pytest.mark.gpu
def test_gpu_weight_gradient_gathers_in_float32(relative_rms):
    """128 products against one: each rounded to bfloat16 before it is added, they would make an error of about 1e-3."""
    inputs = make_inputs(8192, 64, 1024, torch.bfloat16, std=1.0)
    small, large = (run(inputs, "triton", torch.bfloat16, "cuda", weight_dtype=torch.float32, chunk=chunk)
                    for chunk in (64, 8192))
    assert relative_rms(small["dweight"], large["dweight"], floor=0.0) < 5e-4


@pytest.mark.gpu
def test_gpu_gradients_are_formed_where_needed():
    assert_partial(partial_results(make_inputs(9, 8, 30), "cuda", torch.bfloat16), 2 * 9 * 8 * 30)


@pytest.mark.gpu
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit():
    inputs, options = make_inputs(5000, 128, 5120, torch.bfloat16), dict(weight_dtype=torch.float32, chunk=1024)
    functions = softcapped_cross_entropy, softcapped_cross_entropy, torch.compile(softcapped_cross_entropy,
                                                                                  fullgraph=True)
    eager, again, graph = (run(inputs, "auto", torch.bfloat16, "cuda", function, **options) for function in functions)
    assert all(torch.equal(eager[name], again[name]) and torch.equal(eager[name], graph[name]) for name in eager)


@pytest.mark.gpu
def test_gpu_target_outside_the_vocabulary():
    inputs = make_inputs(4, 16, 32)
    inputs["targets"][1] = 2 ** 45
    results = run(inputs, "triton", torch.float32, "cuda")
    assert results["loss"].isnan() and results["dx"].isfinite().all()


@pytest.mark.gpu
def test_gpu_fp8(relative_rms):
    inputs = make_inputs(1024, 128, 5120, torch.bfloat16, std=1.0)
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError,
                           match="fp8 needs a GPU of compute capability 8.9 or newer; got compute capability"):
            run(inputs, "auto", torch.bfloat16, "cuda", fp8=True)
        return
    results = run(inputs, "auto", torch.bfloat16, "cuda", weight_dtype=torch.float32, fp8=True, chunk=256)
    assert_close(results, simulated_fp8(inputs, torch.bfloat16, 15.0), relative_rms, 2e-2, 1e-3)
    assert_close(results, run(inputs, "reference", device="cuda"), relative_rms, 8e-2, 2e-3)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(relative_rms):
    """
    9,000 tokens of 262,144 logits are 2^31.1 numbers; the last rows are compared with those of a call of their own.
    """
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    inputs, last = make_inputs(9000, 16, 262_144, torch.bfloat16), 64
    end = inputs | dict(x=inputs["x"][-last:], targets=inputs["targets"][-last:])
    whole, own = (run(part, "triton", torch.bfloat16, "cuda", chunk=9000) for part in (inputs, end))
    assert relative_rms(whole["dx"][-last:], own["dx"], floor=0.0) < 4e-3 and whole["loss"].isfinite()
