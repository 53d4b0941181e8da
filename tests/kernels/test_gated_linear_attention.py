"""
gated_linear_attention against its recurrence and its materialised form; its Triton kernels in the interpreter, compiled
ahead of time and, where there is one, on a GPU; the CPU's loops on the cases of the chunked form and on random shapes.
Gradients are always those of query, key, value and log_decay for a random gradient of the output.
"""
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.backend import has_cpu_loops
from kernels.gated_linear_attention import (
    _best_backend,
    chunked,
    chunked_triton,
    gated_linear_attention,
    gated_linear_attention_reference,
    gated_linear_attention_step,
)
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory

needs_loops = pytest.mark.skipif(not has_cpu_loops(), reason="needs Numba")
on_a_cpu = pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=needs_loops)])

# the same in the widest dtype that each is tested in by default
LOOPS = [
    pytest.param("loops", torch.float32, marks=needs_loops),
    pytest.param("loops", torch.float64, marks=(needs_loops, pytest.mark.slow)),
]
with_dtypes = pytest.mark.parametrize("backend, dtype", [("chunked", torch.float64), *LOOPS])


# ---- Inputs and runs --------------------------------------------------------

def documents(B, T, rate, generator):
    """doc_start (B, T) of random documents, `rate` of the tokens beginning one."""
    starts = torch.rand(B, T, generator=generator) < rate
    starts[:, 0] = True
    return torch.where(starts, torch.arange(T), 0).cummax(1).values.int()


def make_inputs(B, T, H, M, D, decay=1.0, docs=0.05, keys="dense", seed=0):
    """
    [query, key, value, log_decay, doc_start, gradient] in float64; decay: mean of -log_decay, None without; docs: rate
    of document starts, None without.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    query = randn(B, T, H, M)
    key = randn(B, T, H, M)
    value = randn(B, T, H, D)
    grad = randn(B, T, H, D)
    if keys != "dense":
        lower = torch.randint(M, (B, T, H, 1), generator=generator)
        weight = torch.rand(B, T, H, 1, dtype=torch.float64, generator=generator)
        key = torch.zeros_like(key).scatter_(-1, lower, 1.0 if keys == "one-hot" else weight)
        if keys == "two-hot":
            key = key.scatter_add(-1, (lower + 1) % M, 1 - weight)
    log_decay = None if decay is None else -2 * decay * torch.rand(B, T, H, dtype=torch.float64, generator=generator)
    return [query, key, value, log_decay, None if docs is None else documents(B, T, docs, generator), grad]


def rounded(inputs, dtype):
    """Inputs whose tensors but log_decay and doc_start are exact in dtype."""
    return [x if x is None or i in (3, 4) else x.to(dtype).double() for i, x in enumerate(inputs)]


def run(inputs, backend, dtype=torch.float64, device="cpu", function=gated_linear_attention):
    """[out, gradients of query, key, value and (if there is one) log_decay]; log_decay is at least float32."""
    *tensors, log_decay, doc_start, grad = inputs
    tensors = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
    if log_decay is not None:
        tensors.append(log_decay.detach().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_())
    decay = tensors[3] if log_decay is not None else None
    out = function(
        *tensors[:3], log_decay=decay, doc_start=None if doc_start is None else doc_start.to(device), backend=backend
    )
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, tensors, grad.to(device, dtype)))]


def run_interpreted(inputs, dtype, launch, programs, segment_chunks):
    """run(backend="triton"), called in the interpreter's process."""
    chunked_triton.LAUNCH = {key: launch for key in chunked_triton.LAUNCH}
    chunked_triton.PROGRAMS = programs
    chunked_triton.SEGMENT_CHUNKS = segment_chunks
    with poisoned_memory():
        return run(inputs, "triton", dtype)


def bound(inputs, dtype, chunk=64):
    """
    Of sums over tokens and channels in dtype, and of factors of a decay: an exponent is as wrong as the rounding of a
    chunk's whole decay.
    """
    query, _, value, log_decay, *_ = inputs
    decay = 0.0
    if log_decay is not None:
        # e^-104 is 0 in float32
        padded = torch.nn.functional.pad(log_decay.clamp_min(-104.0), (0, 0, 0, -log_decay.shape[1] % chunk))
        decay = -padded.unflatten(1, (-1, chunk)).sum(2).min().item()
    return float_bound(query.shape[1] + query.shape[-1] + value.shape[-1], dtype) + rounding_bound(2, dtype) * decay


def assert_close(results, expected, relative_rms, tolerance):
    names = ("out", "query", "key", "value", "log_decay")
    errors = {name: relative_rms(x, y, floor=0.0) for name, x, y in zip(names, results, expected, strict=False)}
    assert len(results) == len(expected) and max(errors.values()) < tolerance, errors


# ---- Reference --------------------------------------------------------------

def recurrence(query, key, value, log_decay, doc_start):
    """S_i = e^{g_i} S_{i-1} + k_i v_i', out_i = S_i' q_i, token by token."""
    B, T, H, M = query.shape
    state, outs = torch.zeros(B, H, M, value.shape[-1], dtype=query.dtype), []
    for t in range(T):
        if doc_start is not None:
            state = torch.where((doc_start[:, t] == t)[:, None, None, None], 0.0, state)
        state = state if log_decay is None else state * log_decay[:, t].exp()[..., None, None]
        state = state + torch.einsum("bhm,bhd->bhmd", key[:, t], value[:, t])
        outs.append(torch.einsum("bhm,bhmd->bhd", query[:, t], state))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("decay", [None, 0.3])
@pytest.mark.parametrize("docs", [None, 0.1])
def test_reference_is_the_recurrence(decay, docs, relative_rms):
    *tensors, _ = inputs = make_inputs(2, 37, 3, 5, 4, decay, docs)
    error = relative_rms(gated_linear_attention_reference(*tensors), recurrence(*tensors))
    assert error < bound(inputs, torch.float64)


# ---- On a CPU: PyTorch chunks and loops -------------------------------------

SHAPES = [  # B, T, H, M, D, decay, docs, keys
    (1, 1, 1, 1, 1, 1.0, None, "dense"),
    (2, 2, 3, 1, 2, 0.1, 0.5, "dense"),
    (2, 63, 2, 4, 3, 0.1, None, "dense"),
    (1, 64, 2, 8, 8, 2.0, 0.1, "dense"),
    (3, 65, 1, 16, 17, None, 0.1, "dense"),
    (1, 128, 2, 7, 65, None, None, "dense"),
    (2, 500, 2, 64, 5, 0.05, 0.02, "two-hot"),
    (1, 1023, 2, 256, 2, 0.01, None, "one-hot"),
    (1, 300, 1, 3, 129, 0.02, 0.01, "dense"),
    (40, 70, 3, 2, 2, 0.5, 0.1, "dense"),
]


@with_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_equals_the_reference(shape, backend, dtype, relative_rms):
    inputs = rounded(make_inputs(*shape), dtype)
    with poisoned_memory():
        results = run(inputs, backend, dtype)
    assert_close(results, run(inputs, "reference"), relative_rms, bound(inputs, dtype))


def test_groups_of_chunks(monkeypatch, relative_rms):
    inputs, expected = (inputs := make_inputs(2, 300, 2, 6, 5)), run(inputs, "reference")
    for chunk, group in ((16, 1), (16, 200), (48, 10_000), (1, 64)):
        monkeypatch.setattr(chunked, "chunk_length", lambda T, M, D, chunk=chunk: chunk)
        monkeypatch.setattr(chunked, "GROUP", group)
        assert_close(run(inputs, "chunked"), expected, relative_rms, bound(inputs, torch.float64))


@pytest.mark.parametrize("backend", ["chunked", pytest.param("loops", marks=(needs_loops, pytest.mark.slow))])
@pytest.mark.parametrize("decay, docs", [(0.2, 0.1), (None, None)])
def test_gradcheck(decay, docs, backend, monkeypatch):
    monkeypatch.setattr(chunked, "chunk_length", lambda T, M, D: 4)
    *tensors, log_decay, doc_start, _ = make_inputs(1, 9, 2, 2, 2, decay, docs)
    if log_decay is not None:
        tensors.append(log_decay - 0.01)  # finite differences stay below 0
    tensors = [x.requires_grad_() for x in tensors]

    def call(q, k, v, g=None):
        return gated_linear_attention(q, k, v, log_decay=g, doc_start=doc_start, backend=backend)

    assert torch.autograd.gradcheck(call, tensors, eps=1e-6, atol=1e-8, rtol=1e-6)


@on_a_cpu
@pytest.mark.parametrize("decay", [None, 1e-3, 1.0, 20.0])
def test_float32(decay, backend, relative_rms):
    """A strong decay costs accuracy: f reaches 64 decays, and an exponent's error is half a unit in its last place."""
    inputs = make_inputs(1, 3000, 2, 32, 17, decay, None)
    assert_close(run(inputs, backend, torch.float32), run(inputs, "chunked"), relative_rms,
                 bound(inputs, torch.float32))


def forgetting(T=260, drop=-torch.inf, B=2, H=2):
    """Inputs with a few tokens before which everything is forgotten, and the same with these as starts of documents."""
    query, key, value, log_decay, _, grad = make_inputs(B, T, H, 4, 3, 0.1, None)
    doc_start = torch.zeros(B, T, dtype=torch.int32)
    for place in (1, 63, 64, 65, T - 9):
        log_decay[:, place], doc_start[:, place:] = drop, place
    return [query, key, value, log_decay, None, grad], [query, key, value, log_decay.clamp_min(-1), doc_start, grad]


@on_a_cpu
@pytest.mark.parametrize("drop", [-200.0, -1e4, -torch.inf])
def test_total_forgetting_is_a_document_start(drop, backend, relative_rms):
    forgotten, cut = forgetting(drop=drop)
    assert_close(run(forgotten, backend, torch.float32), run(cut, "chunked"), relative_rms,
                 bound(forgotten, torch.float32))


def test_forgotten_states_are_zero():
    """Left to decay, they become denormal numbers, which a CPU multiplies many times as slowly."""
    query, key, value, log_decay, _, grad = make_inputs(1, 1000, 1, 64, 4, 0.5, None, "one-hot")
    out, states = torch.ops.knotgpt.gated_linear_attention(
        *(x.float() for x in (query, key, value, log_decay)), None, "chunked"
    )
    assert states[1:].any() and not ((states != 0) & (states.abs() <= 1e-35)).any() and (states[5:] == 0).any()


def far_tokens(T, boundary):
    """Inputs whose tokens from `boundary` on are 100 times as large, with next to nothing let through there."""
    query, key, value, log_decay, _, grad = make_inputs(1, T, 2, 8, 8, 0.5, None)
    log_decay[:, boundary] = -60.0
    for x in (query, key, value, grad):
        x[:, boundary:] *= 100.0
    return [query, key, value, log_decay, None, grad]


def assert_decay_gradient_is_local(got, inputs, boundary, relative_rms, chunk=64):
    """
    A running sum over the whole sequence would leave the rounding of the large tokens, about 1e-7 x 1e8, in the
    gradients of the small ones.
    """
    expected = run(inputs, "reference")[4]
    assert expected[:, :boundary].abs().mean() > 0.1 and expected[:, boundary + 8:].abs().mean() > 1e7
    assert relative_rms(got[:, :boundary], expected[:, :boundary]) < bound(inputs, torch.float32, chunk)


@on_a_cpu
def test_decay_gradient_does_not_feel_far_tokens(backend, relative_rms):
    inputs = far_tokens(1000, 512)
    assert_decay_gradient_is_local(run(inputs, backend, torch.float32)[4], inputs, 512, relative_rms)


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), ("chunked", torch.float64), *LOOPS])
def test_nothing_before_a_token_feels_it(backend, dtype):
    *tensors, doc_start, _ = make_inputs(1, 150, 2, 4, 3, docs=None)
    tensors = [x.to(dtype) for x in tensors]
    before = gated_linear_attention(*tensors[:3], log_decay=tensors[3], backend=backend)
    for x in tensors:
        x[:, 100:] = -x[:, 100:].abs() * 3
    after = gated_linear_attention(*tensors[:3], log_decay=tensors[3], backend=backend)
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.isclose(before[:, 100:], after[:, 100:]).any()


@with_dtypes
def test_documents_are_separate(backend, dtype, relative_rms):
    *tensors, _, grad = inputs = make_inputs(1, 150, 2, 4, 3)
    doc_start = torch.where(torch.arange(150) < 70, 0, 70).int()[None]
    together = run([*tensors, doc_start, grad], backend, dtype)
    apart = [
        run([x[:, part] for x in tensors] + [None, grad[:, part]], backend, dtype)
        for part in (slice(0, 70), slice(70, 150))
    ]
    assert_close(together, [torch.cat(pair, 1) for pair in zip(*apart)], relative_rms, bound(inputs, dtype))
    for x in tensors[:3]:
        x[:, :70] *= 0.5
    assert torch.equal(together[0][:, 70:], run([*tensors, doc_start, grad], backend, dtype)[0][:, 70:])


@with_dtypes
def test_any_strides(backend, dtype, relative_rms):
    *floats, doc_start, grad = inputs = make_inputs(2, 100, 3, 4, 5)
    query, key, value, log_decay = (x.to(dtype) for x in floats)
    grad = grad.to(dtype)
    expected = run([query, key, value, log_decay, doc_start, grad], backend, dtype)
    scattered = [torch.stack([x, x], -1)[..., 0] for x in (query, key, value)] + [
        log_decay.transpose(0, 2).contiguous().transpose(0, 2),
        doc_start.T.contiguous().T,
    ]
    assert not any(x.is_contiguous() for x in scattered)
    out = gated_linear_attention(
        *(x.requires_grad_() for x in scattered[:3]),
        log_decay=scattered[3].requires_grad_(),
        doc_start=scattered[4],
        backend=backend,
    )
    gradients = torch.autograd.grad(out, scattered[:4], grad.transpose(1, 3).contiguous().transpose(1, 3))
    assert_close([out.detach(), *gradients], expected, relative_rms, bound(inputs, dtype))
    summed = [
        run([query, key, value, log_decay, doc_start, g], backend, dtype)
        for g in (torch.ones_like(grad), torch.ones(1, 1, 1, 1).expand_as(grad))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*summed))


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend, relative_rms):
    inputs = rounded(make_inputs(2, 200, 2, 16, 17, 0.05), dtype)
    results = run(inputs, backend, dtype)
    assert [x.dtype for x in results] == [dtype] * 4 + [torch.float32]
    assert_close(results, run(inputs, "reference"), relative_rms,
                 rounding_bound(1, dtype) + bound(inputs, torch.float32))


@pytest.mark.parametrize("backend", ["reference", "chunked", pytest.param("loops", marks=needs_loops)])
def test_mixed_dtypes(backend):
    query, key, value, log_decay, doc_start, grad = make_inputs(1, 70, 2, 4, 3)
    tensors = [query.float(), key.float(), value.bfloat16(), log_decay.half()]
    tensors = [x.requires_grad_() for x in tensors]
    out = gated_linear_attention(*tensors[:3], log_decay=tensors[3], doc_start=doc_start, backend=backend)
    out.backward(grad.bfloat16())
    assert out.dtype == torch.bfloat16 and all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in tensors)


@on_a_cpu
def test_runs_repeat_bit_for_bit(backend):
    inputs = make_inputs(2, 300, 2, 8, 8)
    assert all(
        torch.equal(a, b) for a, b in zip(run(inputs, backend, torch.float32), run(inputs, backend, torch.float32))
    )


@needs_loops
def test_loops_serve_but_for_both_passes_of_long_wide_rows():
    for T, M, D, grad, backend in (
        (64, 64, 64, True, "loops"),
        (4096, 64, 64, False, "loops"),
        (4096, 64, 64, True, "chunked"),
        (4096, 256, 9, True, "loops"),
    ):
        query, key, value = (torch.zeros(1, T, 1, width) for width in (M, M, D))
        assert _best_backend(query, key.requires_grad_(grad), value, None) == backend


@needs_loops
def test_loops_on_random_shapes(relative_rms):
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        B, T, H, M, D = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 200, 4, 40, 40))
        decay, docs = (
            None if torch.rand((), generator=generator) < 0.2 else scale * float(torch.rand((), generator=generator))
            for scale in (2.0, 0.1)
        )
        inputs = rounded(make_inputs(B, T, H, M, D, decay, docs, seed=seed), torch.float32)
        with poisoned_memory():
            results = run(inputs, "loops", torch.float32)
        assert_close(results, run(inputs, "reference"), relative_rms, bound(inputs, torch.float32))


@needs_loops
@pytest.mark.parametrize("M, D", [(300, 5), (5, 300), (257, 16)])
def test_loops_over_many_columns(M, D, relative_rms):
    inputs = rounded(make_inputs(1, 131, 1, M, D, 0.1), torch.float32)
    assert_close(
        run(inputs, "loops", torch.float32), run(inputs, "reference"), relative_rms, bound(inputs, torch.float32)
    )


@needs_loops
def test_loops_keep_their_precision_over_long_rows(relative_rms):
    """A decay of 1e-5 a token is 0.99999 as a number: its rounding, token after token, would be 1e-3 at the end."""
    T = 40_000
    query, key, value, grad = (torch.ones(1, T, 1, 1, dtype=torch.float64) for _ in range(4))
    log_decay = torch.full((1, T, 1), -1e-5)
    expected = torch.cumsum((1e-5 * torch.arange(T, dtype=torch.float64)).neg().exp(), 0)
    out = gated_linear_attention(query.float(), key.float(), value.float(), log_decay=log_decay, backend="loops")
    # the decay that float32 holds; sums of 4 tokens are added T / 4 times
    exact = torch.cumsum((-log_decay[0, 0, 0].double().abs() * torch.arange(T)).exp(), 0)
    assert relative_rms(exact, expected) < 1e-2
    assert relative_rms(out.flatten(), exact) < float_bound(T // 4, torch.float32)


@needs_loops
def test_loops_do_not_depend_on_the_threads():
    inputs = make_inputs(2, 300, 2, 20, 17)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(inputs, "loops", torch.float32))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_loops
def test_loops_hand_on_what_is_not_finite():
    inputs = make_inputs(1, 150, 2, 4, 3, docs=None)
    inputs[0][0, 70, 0, 1] = float("nan")
    inputs[2][0, 90, 0, 1] = float("inf")
    inputs[1][0, 80, 1, 0] = float("nan")
    out, *gradients = run(inputs, "loops", torch.float32)
    assert out[0, 70, 0].isnan().all() and out[0, :70].isfinite().all() and not out[0, 90:, 0, 1].isfinite().any()
    assert out[0, 80:, 1].isnan().all() and not any(gradient.isfinite().all() for gradient in gradients)


BOUNDS = """
import sys
sys.path.insert(0, ".")
from tests.kernels.test_gated_linear_attention import SHAPES, make_inputs, run
for shape in (*SHAPES, (1, 130, 1, 300, 5, 0.1, 0.1, "dense"), (1, 66, 1, 5, 300, 0.1, None, "dense")):
    run(make_inputs(*shape), "loops")
"""


@needs_loops
@pytest.mark.slow
def test_loops_stay_in_their_arrays():
    environment = os.environ | dict(NUMBA_BOUNDSCHECK="1")
    result = subprocess.run([sys.executable, "-c", BOUNDS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- As an operator ---------------------------------------------------------

@on_a_cpu
@pytest.mark.parametrize("given", [True, *slow(False)], ids=["everything", "no decay or documents"])
def test_operator_is_registered_rightly(given, backend):
    *tensors, doc_start, _ = make_inputs(1, 70, 1, 4, 3)
    query, key, value, log_decay = (x.float().requires_grad_() for x in tensors)
    arguments = (query, key, value, log_decay if given else None, doc_start if given else None, backend)
    torch.library.opcheck(torch.ops.knotgpt.gated_linear_attention.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(compiler, relative_rms):
    inputs = make_inputs(2, 70, 2, 4, 3)
    compiled = torch.compile(
        lambda *args, **kwargs: 2 * gated_linear_attention(*args, **kwargs), fullgraph=True, backend=compiler
    )
    expected = [2 * x for x in run(inputs, "chunked")]
    assert_close(run(inputs, "auto", torch.float32, function=compiled), expected, relative_rms,
                 bound(inputs, torch.float32))


def test_one_graph_serves_every_length(relative_rms):
    compiled = torch.compile(gated_linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (70, 130, 200):
        inputs = make_inputs(2, T, 2, 4, 3)
        with torch._dynamo.config.patch(error_on_recompile=T > 70):
            results = run(inputs, "auto", torch.float32, function=compiled)
        assert_close(results, run(inputs, "chunked"), relative_rms, bound(inputs, torch.float32))


def test_keeps_inputs_and_chunk_states_only():
    kept = []
    tensors = [x.float().requires_grad_() for x in make_inputs(2, 200, 3, 8, 5)[:4]]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_linear_attention(*tensors[:3], log_decay=tensors[3])
    storages = {x.untyped_storage().data_ptr(): x for x in kept}
    states = [x for pointer, x in storages.items() if pointer not in {y.untyped_storage().data_ptr() for y in tensors}]
    assert [tuple(x.shape) for x in states] == [(18, 5, 8) if has_cpu_loops() else (7, 6, 8, 5)]


def test_flops_are_counted_on_any_device():
    for device in ("cpu", "meta"):
        with torch.device(device):
            query = torch.zeros(2, 200, 3, 8)
            key = torch.zeros(2, 200, 3, 8)
            value = torch.zeros(2, 200, 3, 5)
            log_decay = torch.zeros(2, 200, 3)
        with FlopCounterMode(display=False) as counter:
            gated_linear_attention(query.requires_grad_(), key, value, log_decay=log_decay).sum().backward()
        assert counter.get_total_flops() == 2 * 200 * 3 * (2 * 32 * 13 + 4 * 40 + 2 * 32 * (24 + 10) + 8 * 40)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(query=torch.zeros(2, 9, 3, 5)),
            r"query and key must be \(B, T, H, M\) .* got query \(2, 9, 3, 5\), key \(2, 9",
        ),
        (dict(value=torch.zeros(2, 9, 1, 2)), r"query and key must be"),
        (dict(value=torch.zeros(2, 9, 3, 0)), r"none of them empty"),
        (dict(log_decay=torch.zeros(2, 9)), r"log_decay must be \(2, 9, 3\) for .* got \(2, 9\)"),
        (dict(log_decay=torch.full((2, 9, 3), 0.25)), r"log_decay must be <= 0; its largest is 0.25"),
        (dict(log_decay=torch.zeros(2, 9, 3, dtype=torch.int32)), r"log_decay must be bfloat16, .* got torch.int32"),
        (dict(doc_start=torch.zeros(2, 9)), r"doc_start must be int32; got torch.float32"),
        (dict(doc_start=torch.zeros(9, dtype=torch.int32)), r"doc_start must be \(2, 9\)"),
        (dict(doc_start=torch.arange(9).int().flip(0).expand(2, 9)), r"0 <= doc_start\[b, t\] <= t, never falling"),
        (dict(key=torch.zeros(2, 9, 3, 4, device="meta")), r"key must be on the device of value, cpu; got meta"),
        (dict(backend="fast"), r"backend must be one of auto, reference, chunked, loops, triton; got 'fast'"),
        (dict(backend="triton"), r"backend 'triton' needs CUDA tensors .* got tensors on cpu: use 'chunked' or 'auto'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = (
        dict(query=torch.zeros(2, 9, 3, 4), key=torch.zeros(2, 9, 3, 4), value=torch.zeros(2, 9, 3, 2)) | changes
    )
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments)


# ---- Decoding ---------------------------------------------------------------

@pytest.mark.parametrize("decay", [None, 0.2])
def test_steps_equal_the_forward_pass(decay, relative_rms):
    query, key, value, log_decay, _, grad = inputs = make_inputs(2, 90, 3, 5, 4, decay, None)
    tensors = [x.requires_grad_() for x in (query, key, value, log_decay) if x is not None]
    state, outs = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(90):
        out, state = gated_linear_attention_step(
            state, query[:, t], key[:, t], value[:, t], None if log_decay is None else log_decay[:, t]
        )
        outs.append(out)
    results = [torch.stack(outs, 1), *torch.autograd.grad(torch.stack(outs, 1), tensors, grad)]
    expected = run([*(x if x is None else x.detach() for x in (query, key, value, log_decay)), None, grad], "chunked")
    assert_close([x.detach() for x in results], expected, relative_rms, bound(inputs, torch.float64))


def test_step_keeps_the_state_in_float32(relative_rms):
    query, key, value, log_decay, _, _ = make_inputs(1, 400, 2, 4, 3, 0.01, None)
    query, key, value = (x.bfloat16() for x in (query, key, value))
    expected = gated_linear_attention_reference(query.double(), key.double(), value.double(), log_decay)
    state = torch.zeros(1, 2, 4, 3)
    for t in range(400):
        out, state = gated_linear_attention_step(state, query[:, t], key[:, t], value[:, t], log_decay[:, t])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    tolerance = rounding_bound(1, torch.bfloat16) + float_bound(400, torch.float32)
    assert relative_rms(out, expected[:, -1]) < tolerance


def test_step_names_wrong_shapes():
    with pytest.raises(
        ValueError,
        match=r"for a state \(B, H, M, D\) = \(2, 3, 5, 4\) .* got query \(2, 3, 5\), key \(2, 3, 4\), value",
    ):
        gated_linear_attention_step(
            torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
        )


# ---- Triton, interpreted ----------------------------------------------------

SMALL = dict(chunk=16, block=32, state=(4, 1), out=(4, 1), bwd=(4, 1))
INTERPRETED = [  # B, T, H, M, D, decay, docs, keys, PROGRAMS: segments follow from it
    (2, 40, 1, 3, 5, 0.5, 0.1, "dense", 1),
    (1, 33, 2, 1, 2, 0.5, None, "dense", 100),
    (1, 64, 1, 16, 16, None, 0.1, "dense", 1),
    (1, 20, 1, 33, 40, None, None, "dense", 100),
    (1, 130, 1, 8, 4, 0.1, 0.03, "two-hot", 8),
]
SLOW_INTERPRETED = [
    (2, 40, 2, 3, 5, 0.5, 0.1, "dense", 1),
    (1, 1, 1, 1, 1, 0.5, None, "dense", 1),
    (1, 50, 1, 33, 17, None, None, "dense", 100),
    (1, 64, 2, 16, 16, None, 0.1, "dense", 1),
    (2, 130, 1, 8, 4, 0.1, 0.03, "two-hot", 8),
    (1, 50, 1, 40, 65, 0.05, 0.02, "dense", 100),
    (1, 20, 1, 256, 129, 0.1, None, "one-hot", 1),
]


@pytest.mark.parametrize("case", [*INTERPRETED, *slow(*SLOW_INTERPRETED)], ids=str)
def test_interpreted_kernels_equal_the_reference(case, interpreter, relative_rms):
    *shape, programs = case
    inputs = make_inputs(*shape)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float32, SMALL, programs, 1)
    assert_close(results, run(inputs, "reference"), relative_rms, bound(inputs, torch.float32, SMALL["chunk"]))


def test_interpreted_kernels_with_chunks_of_64(interpreter, relative_rms):
    inputs = make_inputs(1, 150, 1, 4, 3)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float32, SMALL | dict(chunk=64, block=64), 1, 1)
    assert_close(results, run(inputs, "reference"), relative_rms, bound(inputs, torch.float32))


def test_interpreted_kernels_forget(interpreter, relative_rms):
    forgotten, cut = forgetting(100, B=1, H=1)
    results = interpreter(__name__, "run_interpreted", forgotten, torch.float32, SMALL, 4, 1)
    assert_close(results, run(cut, "chunked"), relative_rms, bound(forgotten, torch.float32, SMALL["chunk"]))


def test_interpreted_decay_gradient_does_not_feel_far_tokens(interpreter, relative_rms):
    inputs = far_tokens(90, 48)
    got = interpreter(__name__, "run_interpreted", inputs, torch.float32, SMALL, 1, 1)[4]
    assert_decay_gradient_is_local(got, inputs, 48, relative_rms, SMALL["chunk"])


def test_interpreted_half_precision(interpreter, relative_rms):
    """float16 only: the interpreter multiplies bfloat16 as the integers that it keeps them in."""
    inputs = rounded(make_inputs(1, 40, 2, 5, 3, 0.05), torch.float16)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16, SMALL, 1, 1)
    assert [x.dtype for x in results] == [torch.float16] * 4 + [torch.float32]
    assert_close(results, run(inputs, "reference"), relative_rms,
                 rounding_bound(2, torch.float16) + bound(inputs, torch.float32, SMALL["chunk"]))


# ---- Triton, compiled ahead of time -----------------------------------------

def compile_ahead(aot, name, M, D, dtype, capability, **given):
    """
    A kernel as a training step launches it: with decay, documents and contiguous inputs. given: further constants, None
    for an absent pointer.
    """
    launch = chunked_triton.LAUNCH.get(
        (capability // 10, chunked_triton.operand_dtype(dtype).itemsize),
        chunked_triton.LAUNCH[0, chunked_triton.operand_dtype(dtype).itemsize],
    )
    kernel = getattr(chunked_triton, f"_gla_{name}_kernel")
    constants = chunked_triton._constants(M, D, dtype, launch) | (dict(REVERSE=True) if name == "state" else {})
    constants |= {argument: value for argument, value in given.items() if argument in kernel.arg_names}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    pointers = dict(
        log_decay_ptr="*fp32",
        ddecay_ptr="*fp32",
        total_ptr="*fp32",
        carry_ptr="*fp32",
        doc_start_ptr="*i32",
        state_ptr=element[chunked_triton.operand_dtype(dtype)],
        behind_ptr=element[chunked_triton.operand_dtype(dtype)],
    )
    signature = {
        argument: pointers.get(argument, element[dtype]) if argument.endswith("_ptr") else "i32"
        for argument in kernel.arg_names
        if argument not in constants
    }
    widths = dict(query=M, key=M, value=D, grad=D)
    aligned = [
        argument for argument in signature if argument.endswith("_ptr") or widths.get(argument[:-2], 1) % 16 == 0
    ]
    warps, stages = launch[name]
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


SLOW_SHAPES = [
    (M, D, dtype, capability)
    for capability in (80, 90, 100)
    for M, D, dtype in (
        (1, 8, torch.bfloat16),
        (64, 16, torch.bfloat16),
        (64, 64, torch.bfloat16),
        (256, 65, torch.bfloat16),
        (128, 128, torch.bfloat16),
        (64, 129, torch.bfloat16),
        (64, 64, torch.float32),
        (64, 64, torch.float16),
    )
]


@pytest.mark.parametrize("name", ["state", "out", "bwd"])
@pytest.mark.parametrize("M, D, dtype, capability", [(64, 64, torch.bfloat16, 90), *slow_rows(*SLOW_SHAPES)])
def test_kernels_compile_for_cards(name, M, D, dtype, capability, aot):
    result = compile_ahead(aot, name, M, D, dtype, capability)
    assert result.spills == 0 and result.has_tensor_cores
    assert result.shared <= min(result.shared_limit, 99 * 1024)  # a consumer card's limit, too


# a launch makes constants of arguments that are 1
ONE_TOKEN = dict.fromkeys(("H", "T", "N", "SEGMENTS", "SEGMENT_CHUNKS", "decay_t", "decay_h"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state", "out", "bwd"])
@pytest.mark.parametrize(
    "given",
    [
        ONE_TOKEN,
        ONE_TOKEN | dict(total_ptr=None, carry_ptr=None, REVERSE=False),
        dict(state_ptr=None),
        dict.fromkeys(("log_decay_ptr", "doc_start_ptr", "ddecay_ptr", "total_ptr", "carry_ptr")),
    ],
    ids=str,
)
def test_kernels_compile_for_every_launch(name, given, aot):
    if name != "state" and "state_ptr" in given:
        pytest.skip("only the state kernel can do without")
    assert compile_ahead(aot, name, 5, 7, torch.bfloat16, 90, **given).spills == 0


# ---- On a GPU ---------------------------------------------------------------

GPU_SHAPES = [
    (2, 1000, 3, 64, 64, 0.05, 0.005, "dense"),
    (1, 777, 2, 64, 65, 0.05, None, "dense"),
    (1, 513, 2, 128, 129, None, 0.01, "dense"),
    (2, 200, 5, 1, 8, 0.1, None, "dense"),
    (1, 300, 2, 256, 65, 0.02, 0.01, "two-hot"),
    (1, 130, 4, 16, 1, 0.02, 0.01, "one-hot"),
    (1, 1, 1, 3, 2, 0.5, None, "dense"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, None)])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu_equals_the_reference(shape, dtype, tolerance, relative_rms):
    inputs = rounded(make_inputs(*shape), dtype)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, "cuda")
    assert_close(results, run(inputs, "reference"), relative_rms, tolerance or bound(inputs, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("docs", [None, 1e-4])
def test_gpu_long_sequences_in_segments(docs, relative_rms):
    inputs = rounded(make_inputs(1, 40_001, 3, 64, 65, 2e-3, docs), torch.bfloat16)
    with poisoned_memory():
        results = run(inputs, "triton", torch.bfloat16, "cuda")
    assert_close(results, run(inputs, "chunked", torch.float64, "cuda"), relative_rms, 8e-3)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(relative_rms):
    """
    A row of 2^20 tokens and 3,072 channels has 2^31.6 elements; its last head's last tokens are compared with those of
    a document of their own.
    """
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    T = 1 << 20
    H = 48
    D = 64
    last = 4096
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, T, H, D, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3)
    )
    log_decay = torch.full((1, T, H), -0.01, device="cuda")
    doc_start = torch.where(torch.arange(T, device="cuda") < T - last, 0, T - last).int()[None]
    out = gated_linear_attention(query, key, value, log_decay=log_decay, doc_start=doc_start)
    own = gated_linear_attention(*(x[:, -last:] for x in (query, key, value)), log_decay=log_decay[:, -last:])
    assert relative_rms(out[:, -last:, -1].float(), own[:, :, -1].float(), floor=0.0) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_compiled_equals_eager(dtype):
    inputs = make_inputs(2, 300, 3, 32, 33, 0.05)
    compiled = torch.compile(gated_linear_attention, fullgraph=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(inputs, "auto", dtype, "cuda"), run(inputs, "auto", dtype, "cuda", compiled))
    )


@pytest.mark.gpu
def test_gpu_runs_repeat_bit_for_bit():
    inputs = make_inputs(1, 5000, 2, 64, 65, 0.01)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(inputs, "triton", torch.bfloat16, "cuda"), run(inputs, "triton", torch.bfloat16, "cuda"))
    )


@pytest.mark.gpu
def test_gpu_strided_inputs_are_read_in_place(relative_rms):
    query, key, value, log_decay, doc_start, grad = inputs = make_inputs(2, 200, 3, 16, 16)
    fused = torch.cat([query, key, value], -1).cuda().float()
    out = gated_linear_attention(
        *fused.split(16, -1), log_decay=log_decay.cuda().float(), doc_start=doc_start.cuda(), backend="triton"
    )
    assert relative_rms(out, run(inputs, "reference")[0]) < bound(inputs, torch.float32)
