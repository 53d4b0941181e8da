"""
lane_scan against direct sums in float64: every backend, documents, heads, decays, means and windows, forward and every
gradient; its Triton kernels in the interpreter, compiled ahead of time and, where there is one, on a GPU; the features;
decoding.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.backend import has_cpu_loops
from kernels.lane_scan import (
    chebyshev_table,
    chunked,
    chunked_triton,
    harmonic_frequencies,
    lane_scan,
    lane_scan_reference,
    lane_scan_step,
    logarithmic_frequencies,
    time_kernel,
)
from tests.errors import float_bound, rounding_bound
from tests.kernels.poison import poisoned_memory
from tests.kernels.processes import run_process

needs_loops = pytest.mark.skipif(not has_cpu_loops(), reason="needs Numba")
# loops take ten seconds to compile for a dtype: float32 serves by default
on_a_cpu = pytest.mark.parametrize("backend, dtype", [
    ("chunked", torch.float64), pytest.param("loops", torch.float32, marks=needs_loops),
    pytest.param("loops", torch.float64, marks=[needs_loops, pytest.mark.slow])])
kinds = pytest.mark.parametrize("kind", ["waves", "table"])


# ---- Inputs and runs --------------------------------------------------------


@dataclass
class Inputs:
    """What a scan takes, in float64, and the gradient of its result."""

    u: Tensor                   # (B, T, W)
    features: Tensor            # (F,) or (P, K)
    gain: Tensor                # (H, F)
    decay: Tensor | None        # (H, F)
    doc_start: Tensor | None    # (B, T) int32
    grad: Tensor                # (B, T, W)
    mean: bool

    def rounded(self, dtype: torch.dtype) -> "Inputs":
        """The same with channels that are exact in dtype."""
        return Inputs(self.u.to(dtype).double(), self.features, self.gain, self.decay, self.doc_start,
                      self.grad.to(dtype).double(), self.mean)


def documents(B, T, rate, generator):
    """doc_start (B, T) of random documents, `rate` of the tokens beginning one."""
    starts = torch.rand(B, T, generator=generator) < rate
    starts[:, 0] = True
    return torch.where(starts, torch.arange(T), 0).cummax(1).values.int()


def make_inputs(B, T, W, F, H=1, kind="waves", decay=None, docs=0.03, mean=False, seed=0) -> Inputs:
    """decay: their largest, None without; docs: rate of document starts, None without; kind: waves or table."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    u, grad, gain = randn(B, T, W), randn(B, T, W), randn(H, F)
    features = torch.rand(F, dtype=torch.float64, generator=generator) / 8
    if kind == "table":
        features = randn(max(1, T - 5), F)
    if decay is not None:
        decay = decay * torch.rand(H, F, dtype=torch.float64, generator=generator)
    return Inputs(u, features, gain, decay, None if docs is None else documents(B, T, docs, generator), grad, mean)


def run(x: Inputs, backend, dtype=torch.float64, device="cpu", function=lane_scan, **options) -> dict[str, Tensor]:
    """The result, and the gradients of u, gain and, if there are some, decays, by name."""
    tensors = dict(u=x.u.to(device, dtype), gain=x.gain.to(device, torch.promote_types(dtype, torch.float32)))
    if x.decay is not None:
        tensors["decay"] = x.decay.to(device, tensors["gain"].dtype)
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    doc_start = None if x.doc_start is None else x.doc_start.to(device)
    y = function(tensors["u"], x.features.to(device), tensors["gain"], decay=tensors.get("decay"), doc_start=doc_start,
                 mean=x.mean, backend=backend, **options)
    gradients = torch.autograd.grad(y, list(tensors.values()), x.grad.to(device, dtype))
    return {name: result.detach().cpu() for name, result in zip(("y", *tensors), (y, *gradients))}


def run_interpreted(x: Inputs, dtype, segment):
    """run(backend="triton") with small chunks, called in the interpreter's process."""
    launch = dict(scan=(32, 16, 4, 1), gain=(16, 16, 4, 1), most=16)
    chunked_triton.LAUNCH = dict.fromkeys(chunked_triton.LAUNCH, launch)
    with poisoned_memory():
        return run(x, "triton", dtype, segment=segment)


def absolute(x: Inputs) -> dict[str, Tensor]:
    """
    The results with the absolute value of every term of every sum: what errors of sums relate to. A wave's terms have
    the size of its gain.
    """
    largest = x.features.abs() if x.features.ndim == 2 else torch.zeros_like(x.features)
    return run(Inputs(x.u.abs(), largest, x.gain.abs(), x.decay, x.doc_start, x.grad.abs(), x.mean), "reference")


def assert_close(results, x: Inputs, dtype=torch.float32, backend_roundings=0, expected=None):
    """
    Results in dtype against the reference in float64. Every one is a chain of sums over tokens, features and channels
    in float32 at least; in half precision it is rounded once, and `backend_roundings` operands of its products are.
    """
    B, T, W = x.u.shape
    sums = torch.promote_types(dtype, torch.float32)
    tolerance = float_bound(T * B + 2 * x.features.shape[-1] + W, sums)
    tolerance += rounding_bound(1 + backend_roundings, dtype) if dtype != sums else 0.0
    expected = expected or run(x, "reference")
    scales = absolute(x)
    assert results.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = scales[name].square().mean().sqrt().item()
        error = (results[name].double() - wanted).square().mean().sqrt().item()
        assert error <= tolerance * max(scale, 1e-300), (name, error / scale, tolerance)


SHAPES = [
    dict(B=1, T=1, W=1, F=1),
    dict(B=2, T=2, W=3, F=2, docs=0.5, mean=True),
    dict(B=2, T=150, W=20, F=5, docs=None),
    dict(B=2, T=150, W=20, F=5, H=2, decay=0.1, mean=True),
    dict(B=1, T=300, W=33, F=64, H=3, docs=0.3, mean=True),
    dict(B=1, T=257, W=48, F=7, H=3, docs=0.01, decay=2.0),
    dict(B=3, T=65, W=16, F=130, docs=None, decay=0.02, mean=True),
    dict(B=1, T=1, W=17, F=3, docs=None, decay=0.5, mean=True),
]
TABLES = [dict(shape, kind="table") for shape in SHAPES]
for _shape in TABLES:
    _shape["decay"] = None


# ---- Features ---------------------------------------------------------------

# kappa of 64 harmonic frequencies of a period of 512 tokens with gains of 1, at the distances 0 to 12
KAPPA = [64, 57.8, 41.2, 20.1, 1.0, -10.7, -13.1, -8.1, 0, 6.5, 8.6, 6.1, 1.0]


def test_harmonic_kernel():
    frequencies = harmonic_frequencies(64, 512)
    kernel = time_kernel(frequencies, torch.ones(1, 64), None, torch.arange(513))[0]
    assert (kernel[:13] - torch.tensor(KAPPA, dtype=torch.float64)).abs().max() < 0.06  # they have one digit
    w = 2 * math.pi / 512 * torch.arange(1, 512, dtype=torch.float64)
    closed = 0.5 + torch.sin(63.5 * w) / (2 * torch.sin(w / 2))
    torch.testing.assert_close(kernel[1:512], closed, rtol=0, atol=1e-10)
    assert abs(kernel[512] - kernel[0]) < 1e-10  # the period
    assert len(harmonic_frequencies(64, 20)) == 11


def test_logarithmic_frequencies():
    wavelengths = 1 / logarithmic_frequencies(5, 1024)
    torch.testing.assert_close(wavelengths, torch.tensor([1024.0, 256, 64, 16, 4], dtype=torch.float64))
    assert logarithmic_frequencies(1, 512).tolist() == [1 / 512]


@pytest.mark.parametrize("grid", ["linear", "log"])
def test_chebyshev_table(grid):
    table = chebyshev_table(4, 65, grid)
    z = table[:, 1]
    torch.testing.assert_close(table[:, 2], 2 * z * z - 1, rtol=0, atol=1e-12)
    torch.testing.assert_close(table[:, 3], 4 * z ** 3 - 3 * z, rtol=0, atol=1e-12)
    assert (table[:, 0] == 1).all() and abs(z[0] + 1) < 1e-12 and abs(z[-1] - 1) < 1e-7
    middle = dict(linear=32, log=math.sqrt(65) - 1)[grid]   # where z is 0
    assert z[math.floor(middle)] < 1e-12 and z[math.ceil(middle) + 1] > 0
    assert chebyshev_table(3, 1, grid)[0].tolist() == pytest.approx([1, -1, 1])


# ---- Reference --------------------------------------------------------------


def formula(x: Inputs) -> Tensor:
    """y from the docstring's sums, term by term."""
    B, T, W = x.u.shape
    y = torch.zeros_like(x.u)
    D = W // len(x.gain)
    for b in range(B):
        for t in range(T):
            start = 0 if x.doc_start is None else int(x.doc_start[b, t])
            for s in range(start, t + 1):
                for h, gain in enumerate(x.gain):
                    if x.features.ndim == 2:
                        rows = [x.features[min(i - start, len(x.features) - 1)] for i in (t, s)]
                        weight = (gain * rows[0] * rows[1]).sum()
                    else:
                        weight = gain * torch.cos(2 * math.pi * x.features * (t - s))
                        if x.decay is not None:
                            weight = weight * torch.exp(-x.decay[h] * (t - s))
                        weight = weight.sum()
                    y[b, t, h * D:(h + 1) * D] += weight * x.u[b, s, h * D:(h + 1) * D]
            if x.mean:
                y[b, t] /= t - start + 1
    return y


@kinds
@pytest.mark.parametrize("mean", [False, True])
def test_reference_is_the_formula(kind, mean):
    x = make_inputs(2, 17, 4, 3, 2, kind, 0.2 if kind == "waves" else None, 0.2, mean)
    y = lane_scan_reference(x.u, x.features, x.gain, x.decay, x.doc_start, mean)
    torch.testing.assert_close(y, formula(x), rtol=0, atol=1e-12)


# ---- On a CPU: PyTorch chunks and loops -------------------------------------


@on_a_cpu
@pytest.mark.parametrize("shape", SHAPES + TABLES, ids=str)
def test_every_form_equals_the_reference(shape, backend, dtype):
    x = make_inputs(**shape).rounded(dtype)
    with poisoned_memory():
        results = run(x, backend, dtype)
    assert_close(results, x, dtype)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@kinds
def test_any_chunk(chunk, kind):
    x = make_inputs(2, 100, 6, 5, 2, kind, 0.1 if kind == "waves" else None, 0.05, True)
    assert_close(run(x, "chunked", chunk=chunk), x, torch.float64)


@pytest.mark.parametrize("chunk", [5, 128])
@pytest.mark.parametrize("window", [1, 12, 90, 200])
def test_banded(window, chunk):
    """With the window of a full row it is the scan itself."""
    x = make_inputs(2, 90, 6, 5, 2, decay=0.05, mean=True)
    results = run(x, "banded", window=window, chunk=chunk)
    assert_close(results, x, torch.float64, expected=run(x, "reference", window=window))
    if window >= 90:
        assert_close(results, x, torch.float64)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=[needs_loops, pytest.mark.slow])])
@kinds
def test_gradcheck(kind, backend):
    T, W = dict(chunked=(9, 2), loops=(36, 1))[backend]     # several chunks
    x = make_inputs(1, T, W, 3, 1, kind, 0.3 if kind == "waves" else None, 0.1, True)
    tensors = [x.u.requires_grad_(), x.gain.requires_grad_()]
    if kind == "waves":
        tensors.append(x.decay.add_(0.01).requires_grad_())     # finite differences stay above 0

    def call(u, gain, decay=None):
        return lane_scan(u, x.features, gain, decay=decay, doc_start=x.doc_start, mean=True, backend=backend, chunk=4)

    assert torch.autograd.gradcheck(call, tensors, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=needs_loops)])
@kinds
def test_float32(kind, backend):
    x = make_inputs(1, 700, 20, 16, 1, kind, None, 0.005, True).rounded(torch.float32)
    assert_close(run(x, backend, torch.float32), x)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=needs_loops)])
def test_float32_over_thousands_of_rotations(backend):
    """An angle that is off by half a unit in the last place, 2,048 times over, would be off by 1e-4."""
    T = 65_536
    x = make_inputs(1, T, 1, 3, docs=None).rounded(torch.float32)
    kernel = time_kernel(x.features, x.gain, None, torch.arange(T))[0]
    n = 2 * T
    expected = torch.fft.irfft(torch.fft.rfft(x.u[0, :, 0], n) * torch.fft.rfft(kernel, n), n)[:T]
    y = lane_scan(x.u.float(), x.features, x.gain, backend=backend)[0, :, 0].double()
    assert (y - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=needs_loops)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    x = make_inputs(2, 100, 20, 5, 2, docs=0.05, decay=0.1, mean=True).rounded(dtype)
    results = run(x, backend, dtype)
    assert [result.dtype for result in results.values()] == [dtype, dtype, torch.float32, torch.float32]
    assert_close(results, x, dtype)


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), *on_a_cpu.args[1]])
@kinds
def test_nothing_before_a_token_feels_it(backend, dtype, kind):
    x = make_inputs(1, 150, 20, 4, 2, kind, docs=None, mean=True)
    before = run(x, backend, dtype)["y"]
    x.u[:, 100:] = -x.u[:, 100:].abs() * 3
    after = run(x, backend, dtype)["y"]
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.isclose(before[:, 100:], after[:, 100:]).any()


def assert_same(y, expected):
    """Sums of the same terms, about a hundred of the size of 10: to 1e-12 in float64."""
    torch.testing.assert_close(y, expected, rtol=0, atol=4500 * torch.finfo(expected.dtype).eps)


@on_a_cpu
@kinds
def test_a_prefix_is_the_same(backend, dtype, kind):
    x = make_inputs(2, 150, 20, 4, 2, kind, docs=0.02, mean=True)
    whole = run(x, backend, dtype)["y"]
    u = x.u.to(dtype)
    for T in (1, 31, 32, 33, 100):
        y = lane_scan(u[:, :T], x.features, x.gain, doc_start=x.doc_start[:, :T], mean=True, backend=backend)
        assert_same(y, whole[:, :T])


@on_a_cpu
@kinds
def test_documents_are_separate(backend, dtype, kind):
    x = make_inputs(1, 150, 20, 4, 2, kind, docs=None, mean=True)
    x.doc_start = torch.where(torch.arange(150) < 70, 0, 70).int()[None]
    together = run(x, backend, dtype)["y"]
    x.u[:, :70] *= 0.5
    assert torch.equal(together[:, 70:], run(x, backend, dtype)["y"][:, 70:])
    assert_same(lane_scan(x.u[:, 70:].to(dtype), x.features, x.gain, mean=True, backend=backend), together[:, 70:])


@needs_loops
def test_loops_on_random_shapes():
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        B, T, D, F, H = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 200, 40, 40, 4))
        draws = torch.rand(5, generator=generator).tolist()
        kind = "table" if draws[0] < 0.3 else "waves"
        decay = draws[1] if kind == "waves" and draws[2] < 0.5 else None
        docs = None if draws[3] < 0.2 else draws[3] ** 4
        x = make_inputs(B, T, D * H, F, H, kind, decay, docs, draws[4] < 0.5, seed).rounded(torch.float32)
        with poisoned_memory():
            results = run(x, "loops", torch.float32)
        assert_close(results, x)


@needs_loops
def test_loops_do_not_depend_on_the_threads(torch_threads):
    x = make_inputs(2, 300, 70, 20, 2, decay=0.1)
    results = []
    for count in (1, 2, 2):
        torch_threads(count)
        results.append(run(x, "loops", torch.float32))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@needs_loops
@kinds
def test_loops_hand_on_what_is_not_finite(kind):
    """A NaN stays in its document and is seen from its own token on."""
    x = make_inputs(2, 150, 20, 4, 2, kind, docs=None)
    x.doc_start = torch.where(torch.arange(150) < 90, 0, 90).int().expand(2, -1).contiguous()
    x.u[0, 70, 1] = float("nan")
    x.grad[0, 40, 1] = float("inf")
    results = run(x, "loops", torch.float32)
    y, du = results["y"], results["u"]
    assert y[0, 70:90, 1].isnan().all() and y[0, :70].isfinite().all() and y[0, 90:].isfinite().all()
    assert not du[0, :41, 1].isfinite().any() and du[0, 41:].isfinite().all()
    assert y[1].isfinite().all() and du[1].isfinite().all() and not results["gain"].isfinite().all()


@on_a_cpu
def test_any_strides(backend, dtype):
    x = make_inputs(2, 100, 12, 4, 2)
    expected = run(x, backend, dtype)
    u = torch.stack([x.u, x.u], -1).to(dtype)[..., 0].requires_grad_()
    doc_start = x.doc_start.T.contiguous().T
    assert not u.is_contiguous() and not doc_start.is_contiguous()
    y = lane_scan(u, x.features, x.gain, doc_start=doc_start, backend=backend)
    du, = torch.autograd.grad(y, u, x.grad.to(dtype).mT.contiguous().mT)
    assert_same(y.detach(), expected["y"])
    assert_same(du, expected["u"])


BOUNDS = """
from tests.kernels.test_lane_scan import SHAPES, TABLES, make_inputs, run
for shape in (*SHAPES, *TABLES):
    run(make_inputs(**shape), "loops")
"""


@needs_loops
@pytest.mark.slow
def test_loops_stay_in_their_arrays(tmp_path):
    run_process("-c", BOUNDS, cache=tmp_path, NUMBA_BOUNDSCHECK="1")


# ---- Decoding ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], TABLES[3], TABLES[2]], ids=str)
def test_steps_equal_the_scan(shape):
    x = make_inputs(**shape)
    T = x.u.shape[1]
    doc_start = torch.zeros(x.u.shape[:2], dtype=torch.int32) if x.doc_start is None else x.doc_start
    positions = torch.arange(T) - doc_start
    state, sums, sizes, end = None, [], set(), 0
    for count in (40, 5, *[1] * (T - 45)):
        end += count
        here = slice(end - count, end)
        y, state = lane_scan_step(state, x.u[:, here], x.features, x.gain, positions[:, here], decay=x.decay,
                                  mean=x.mean)
        sums.append(y)
        sizes.add(state.shape)
    expected = run(x, "reference")["y"]
    torch.testing.assert_close(torch.cat(sums, 1), expected, rtol=0, atol=1e-11)
    whole, last = lane_scan_step(None, x.u, x.features, x.gain, positions, decay=x.decay, mean=x.mean)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-11)
    assert len(sizes) == 1


def test_steps_keep_their_precision():
    """1,000 steps in float32 with decays down to 1e-6, whose factor is 1 but for a few units in the last place."""
    T = 1000
    x = make_inputs(1, T, 2, 4, docs=None)
    x.decay = torch.tensor([[1e-6, 1e-5, 1e-3, 0.0]], dtype=torch.float64)
    kernel = time_kernel(x.features, x.gain, x.decay, torch.arange(T))[0]
    state, sums = None, []
    for t in range(T):
        y, state = lane_scan_step(state, x.u[:, t:t + 1].float(), x.features, x.gain, torch.tensor([[t]]),
                                  decay=x.decay)
        sums.append(y[0, 0].double())
    n = 2 * T
    expected = torch.fft.irfft(torch.fft.rfft(x.u[0], n, 0) * torch.fft.rfft(kernel, n)[:, None], n, 0)[:T]
    error = (torch.stack(sums) - expected).norm() / expected.norm()
    assert state.dtype == torch.float32 and error < float_bound(T, torch.float32)


# ---- As an operator ---------------------------------------------------------


@on_a_cpu
@pytest.mark.parametrize("kind", [pytest.param("waves", marks=pytest.mark.slow), "table"])
def test_operator_is_registered_rightly(backend, dtype, kind):
    x = make_inputs(2, 40, 6, 4, 2, kind, 0.1 if kind == "waves" else None)
    decay = None if x.decay is None else x.decay.requires_grad_()
    arguments = (x.u.to(dtype).requires_grad_(), x.features, x.gain.requires_grad_(), decay, x.doc_start, True, 16, 0,
                 backend)
    assert set(torch.library.opcheck(torch.ops.knotgpt.lane_scan.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(compiler):
    x = make_inputs(2, 70, 6, 4, 2, decay=0.1, mean=True)
    torch.compiler.reset()
    compiled = torch.compile(lane_scan, fullgraph=True, backend=compiler)
    x = x.rounded(torch.float32)
    assert_close(run(x, "auto", torch.float32, function=compiled), x)


def test_keeps_its_inputs_only():
    kept = []
    x = make_inputs(1, 200, 16, 8)
    u, gain = x.u.float().requires_grad_(), x.gain.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lane_scan(u, x.features, gain, doc_start=x.doc_start)
    assert sum(tensor.numel() for tensor in kept) <= u.numel() + 200 + 2 * 8


def test_flops_are_counted_on_any_device():
    counts = []
    for device in ("cpu", "meta"):
        u = torch.zeros(2, 300, 16, device=device, requires_grad=True)
        gain = torch.ones(8, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            lane_scan(u, harmonic_frequencies(8, 600).to(device), gain).sum().backward()
        counts.append(counter.get_total_flops())
    scan = 2 * 300 * 16 * (chunked.CHUNK + 4 * 16)
    assert counts == [3 * scan, 3 * scan]


U = torch.zeros(2, 9, 6)
WAVES = torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize("changes, message", [
    (dict(u=U[0]), r"u must be a tensor \(B, T, W\), not empty; got \(9, 6\) torch.float32"),
    (dict(u=torch.zeros(2, 0, 6)), "u must be a tensor .* not empty"),
    (dict(u=U.int()), "u must be bfloat16, .* got torch.int32"),
    (dict(features=WAVES.float()), "features must be float64; got torch.float32"),
    (dict(features=torch.zeros(1, 2, 4).double()), r"features must be a tensor \(F,\) or \(P, K\)"),
    (dict(gain=torch.ones(3)), r"gain must be a tensor \(F,\) or \(H, F\) of sizes \(4\), not empty; got \(3,\)"),
    (dict(gain=torch.ones(4, 4)), "gain has 4 heads, which must divide u's 6 channels"),
    (dict(gain=torch.ones(4).half()), "gain must be float32 or float64; got torch.float16"),
    (dict(decay=torch.ones(2, 4)), r"decay must be a tensor of gain's shape of sizes \(4\)"),
    (dict(decay=torch.tensor([0.0, 1, -2, 0])), "decay must be >= 0; its smallest is -2"),
    (dict(features=torch.zeros(5, 4).double(), decay=torch.ones(4)), "a table has neither decay nor window"),
    (dict(features=torch.zeros(5, 4).double(), window=3), "a table has neither decay nor window"),
    (dict(doc_start=torch.zeros(2, 9)), "doc_start must be int32; got torch.float32"),
    (dict(doc_start=torch.zeros(9, dtype=torch.int32)), r"doc_start must be a tensor \(B, T\) of sizes \(2, 9\)"),
    (dict(doc_start=torch.arange(9).int().flip(0).expand(2, 9)), r"0 <= doc_start\[b, t\] <= t, never falling"),
    (dict(gain=torch.ones(4, device="meta")), "gain must be on the device of u, cpu; got meta"),
    (dict(window=0), "window must be at least 1; got 0"),
    (dict(chunk=-1), "chunk must be at least 1, or 0 for the backend's choice; got -1"),
    (dict(segment=-8), "segment must be at least 1, or 0 for the backend's choice; got -8"),
    (dict(window=3, backend="chunked"), "a window is for the backends 'banded' and 'reference'"),
    (dict(backend="banded"), "'banded' needs one; got window None and backend 'banded'"),
    (dict(backend="fast"), "backend must be one of auto, reference, chunked, banded, loops, triton; got 'fast'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors .* use 'chunked' or 'auto'"),
])
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        lane_scan(**dict(u=U, features=WAVES, gain=torch.ones(4)) | changes)


# ---- Triton, interpreted ----------------------------------------------------

INTERPRETED = [  # tokens of a segment, and the inputs
    (0, SHAPES[0]),
    (32, dict(B=1, T=70, W=4, F=3, H=2, mean=True)),
    (32, dict(B=1, T=70, W=4, F=3, decay=0.1, mean=True)),
    (32, dict(B=1, T=40, W=10, F=18, kind="table", mean=True)),
]
INTERPRETED += [pytest.param(case, marks=pytest.mark.slow) for case in [
    (0, dict(B=2, T=70, W=20, F=5, docs=None)),
    (0, dict(B=2, T=110, W=20, F=5, H=2, decay=0.1, mean=True)),
    (32, dict(B=1, T=150, W=33, F=17, H=3, docs=0.02, mean=True)),
    (64, dict(B=1, T=200, W=8, F=5, docs=0.008, decay=0.1)),
    (32, dict(B=1, T=70, W=4, F=35, docs=None, mean=True)),
    (0, TABLES[0]),
    (64, dict(B=2, T=150, W=20, F=18, H=2, kind="table", mean=True)),
    (0, dict(B=1, T=60, W=33, F=17, H=3, kind="table", docs=0.1, mean=True)),
]]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_kernels_equal_the_reference(case, interpreter):
    segment, shape = case
    x = make_inputs(**shape).rounded(torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", x, torch.float32, segment), x)


def test_interpreted_float16(interpreter):
    """bfloat16 is none of the interpreter's: it multiplies it as the integers that it keeps it in."""
    x = make_inputs(1, 40, 4, 3, decay=0.1, mean=True).rounded(torch.float16)
    results = interpreter(__name__, "run_interpreted", x, torch.float16, 32)
    assert [result.dtype for result in results.values()] == [torch.float16] * 2 + [torch.float32] * 2
    assert_close(results, x, torch.float16)


def opcheck_interpreted(x: Inputs):
    arguments = (x.u.float().requires_grad_(), x.features, x.gain.requires_grad_(), x.decay, x.doc_start, True, 0, 32,
                 "triton")
    return torch.library.opcheck(torch.ops.knotgpt.lane_scan.default, arguments)


@pytest.mark.slow
def test_interpreted_registration(interpreter):
    result = interpreter(__name__, "opcheck_interpreted", make_inputs(1, 20, 4, 3))
    assert set(result.values()) == {"SUCCESS"}


# ---- Triton, compiled ahead of time -----------------------------------------

ABSENT = dict(  # what a kernel does not get of waves and of a table
    waves=("table_ptr", "gain_ptr"),
    table=("read_ptr", "write_ptr", "turn_ptr", "segment_turn_ptr", "wave_ptr", "far_wave_ptr", "far_write_ptr",
           "far_sum_ptr", "pairs_ptr"),
)
IN_FLOAT32 = ("turn_ptr", "segment_turn_ptr", "gain_ptr", "total_ptr", "carry_ptr", "sum_ptr", "far_sum_ptr")


def compile_ahead(aot, name, dtype, capability, kind="waves", W=256, **given):
    """
    A kernel as a training step launches it for 64 frequencies or a table of 4 columns, with documents and the mean.
    given: further constants, None for an absent pointer.
    """
    # constants
    kernel = dict(scan=chunked_triton._lane_scan_kernel, gain=chunked_triton._lane_scan_gain_kernel)[name]
    operand = chunked_triton.operand_dtype(dtype)
    launches = chunked_triton.LAUNCH
    launch = launches.get((capability // 10, operand.itemsize), launches[0, operand.itemsize])
    chunk, block, warps, stages = launch[name]
    X = launch["most"] if kind == "waves" else 16
    constants = dict(X=X, CHUNK=chunk, BLOCK_D=min(block, W), MEAN=True, REVERSE=False)
    constants |= dict(OPERAND=chunked_triton.tl.bfloat16 if dtype == torch.bfloat16 else chunked_triton.tl.float32,
                      PRECISION="tf32" if dtype == torch.float16 else "tf32x3")
    constants |= dict.fromkeys(ABSENT[kind]) | given
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}

    # the others
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    kinds = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= dict.fromkeys(("pairs_ptr", "read_ptr", "write_ptr", "wave_ptr", "far_wave_ptr", "far_write_ptr",
                            "table_ptr"), element[operand])
    kinds |= dict.fromkeys(("u_ptr", "grad_ptr", "out_ptr"), element[dtype]) | dict.fromkeys(IN_FLOAT32, "*fp32")
    kinds |= dict(doc_start_ptr="*i32") | (dict(pairs_ptr="*fp32") if name == "gain" else {})
    signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constants}
    strides = ("u_b", "u_t", "grad_b", "grad_t", "D")
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument in strides]
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


NO_DECAY = dict.fromkeys(("far_sum_ptr", "far_wave_ptr", "far_write_ptr"))
LAUNCHES = [  # kernel, kind, constants
    ("scan", "waves", {}),
    ("scan", "waves", dict(REVERSE=True)),
    ("scan", "waves", dict(out_ptr=None)),
    ("scan", "waves", dict(total_ptr=None, carry_ptr=None, segment_turn_ptr=None, doc_start_ptr=None)),
    ("scan", "table", {}),
    ("scan", "table", dict(REVERSE=True)),
    ("gain", "waves", NO_DECAY),
    ("gain", "waves", dict(total_ptr=None, carry_ptr=None, segment_turn_ptr=None)),
    ("gain", "table", {}),
]
# a launch makes constants of arguments that are 1
ONES = dict.fromkeys(("T", "H", "WAVE_HEADS", "N", "SEGMENTS", "SEGMENT_CHUNKS", "P"), 1)
SLOW = [pytest.param(*launch, dtype, capability, marks=pytest.mark.slow) for launch in LAUNCHES
        for dtype in (torch.bfloat16, torch.float16, torch.float32) for capability in (80, 90, 100)]
SLOW += [pytest.param(name, kind, given | ONES, torch.bfloat16, 90, marks=pytest.mark.slow)
         for name, kind, given in LAUNCHES]


@pytest.mark.parametrize("name, kind, given, dtype, capability",
                         [(*LAUNCHES[0], torch.bfloat16, 90), (*LAUNCHES[6], torch.bfloat16, 80), *SLOW])
def test_kernels_compile_for_cards(name, kind, given, dtype, capability, aot):
    result = compile_ahead(aot, name, dtype, capability, kind, **given)
    assert result.spills == 0 and result.has_tensor_cores
    assert result.shared <= min(result.shared_limit, 99 * 1024)  # a consumer card's limit, too


# ---- On a GPU ---------------------------------------------------------------

GPU_SHAPES = [
    dict(B=2, T=1000, W=256, F=64, docs=0.005, mean=True),
    dict(B=1, T=777, W=129, F=33, H=3, docs=None, decay=0.1),
    dict(B=1, T=1, W=17, F=3, docs=None),
    dict(B=2, T=1000, W=256, F=4, kind="table", docs=0.005, mean=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, roundings", [(torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 0)])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_equals_the_reference(shape, dtype, roundings):
    x = make_inputs(**shape).rounded(dtype)
    with poisoned_memory():
        results = run(x, "triton", dtype, "cuda")
    assert_close(results, x, dtype, roundings)


@pytest.mark.gpu
@pytest.mark.parametrize("docs", [None, 1e-4])
@kinds
def test_gpu_long_rows_in_segments(docs, kind):
    x = make_inputs(1, 40_001, 128, 16, 1, kind, None, docs, True).rounded(torch.bfloat16)
    with poisoned_memory():
        results = run(x, "triton", torch.bfloat16, "cuda")
    expected = run(x, "chunked", torch.float64, "cuda")
    for name, wanted in expected.items():
        error = (results[name].double() - wanted).norm() / wanted.norm()
        assert error < rounding_bound(8, torch.bfloat16), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit(dtype):
    x = make_inputs(2, 3000, 96, 33, 3, decay=0.05)
    compiled = torch.compile(lane_scan, fullgraph=True)
    eager, again, graph = (run(x, "auto", dtype, "cuda", function) for function in (lane_scan, lane_scan, compiled))
    assert all(torch.equal(eager[name], other[name]) for other in (again, graph) for name in eager)
