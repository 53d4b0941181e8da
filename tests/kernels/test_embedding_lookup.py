"""
embedding_lookup against its definition; its Triton kernels in the interpreter, compiled ahead of time and, where there
is one, on a GPU.
"""
import importlib
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from kernels.embedding_lookup import embedding_lookup, embedding_lookup_reference
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow_rows
from tests.kernels.poison import poisoned_memory

# where a package hands on the function under the module's name, too
el = importlib.import_module("kernels.embedding_lookup")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(counts, D, K=2, integer=torch.int64, dtype=torch.float32, seed=0):
    """
    dict(tokens, tables, gs) in float64, exact in dtype: counts[v] tokens v, in any order; gs: gradients of the K
    results.
    """
    generator, counts = torch.Generator().manual_seed(seed), torch.as_tensor(counts)
    tokens = torch.repeat_interleave(torch.arange(len(counts)), counts)

    def randn(rows):
        return [torch.randn(rows, D, generator=generator).to(dtype).double() for _ in range(K)]

    return dict(tokens=tokens[torch.randperm(len(tokens), generator=generator)].to(integer), tables=randn(len(counts)),
                gs=randn(len(tokens)))


def zipf(V, N):
    """Of row 7 most, of most rows none."""
    return torch.bincount((7 + (V ** torch.rand(N, generator=torch.Generator().manual_seed(1))).long() - 1) % V,
                          minlength=V)


def run(inputs, backend="reference", table=torch.float64, result=torch.float64, device="cpu", function=embedding_lookup,
        needed=None, form=lambda x: x):
    """
    [results, gradients of the tables whose place is in needed]. table, result: dtypes; form: how tables and gradients
    lie in memory.
    """
    needed = range(len(inputs["tables"])) if needed is None else needed
    tables = [form(x.to(device, table)).requires_grad_(k in needed) for k, x in enumerate(inputs["tables"])]
    results = function(inputs["tokens"].to(device), tables, dtype=result, backend=backend)
    gs = [form(g.to(device, result)).view(y.shape) for g, y in zip(inputs["gs"], results)]
    gradients = torch.autograd.grad([results[k] for k in needed], [tables[k] for k in needed], [gs[k] for k in needed])
    return [x.detach().cpu() for x in (*results, *gradients)]


def run_interpreted(inputs, table=torch.float32, result=torch.float32, **options):
    """
    run(backend="triton"), called in the interpreter's process, as the functions below that are named to the
    interpreter.
    """
    with poisoned_memory():
        return run(inputs, "triton", table, result, **options)


def exact(inputs):
    tokens, V, D = inputs["tokens"].long(), *inputs["tables"][0].shape
    return [x[tokens] for x in inputs["tables"]] + [torch.zeros(V, D, dtype=torch.float64).index_add(0,
            tokens.flatten(), g) for g in inputs["gs"]]


def agree(results, inputs, relative_rms, table=torch.float32, result=torch.float32, rounded=None):
    """
    Results are rounded rows, gradients zeros where a row has no token, and else right but for the error of a sum over
    the tokens of one row in float32 (float64 where the tables are) and a rounding to the dtype `rounded`: of the sums
    where the tables have it, of what is added where inputs are not exact in it.
    """
    expected, K = exact(inputs), len(inputs["tables"])
    assert [x.dtype for x in results] == K * [result] + K * [table]
    assert all(torch.equal(x, y.to(table).to(result)) for x, y in zip(results[:K], expected[:K]))
    counts = torch.bincount(inputs["tokens"].flatten(), minlength=len(inputs["tables"][0]))
    tolerance = float_bound(counts.max().item(), torch.promote_types(table, torch.float32))
    if rounded:
        tolerance += rounding_bound(1, rounded)
    errors = [relative_rms(x, y, floor=0.0) for x, y in zip(results[K:], expected[K:], strict=True)]
    assert max(errors) < tolerance and not any(x[counts == 0].any() for x in results[K:])


FORMS = dict(rows_apart=lambda x: torch.cat((x, x), 1)[:, :x.shape[1]],
             columns_apart=lambda x: x.repeat_interleave(2, 1)[:, ::2], columns_first=lambda x: x.t().contiguous().t(),
             contiguous=lambda x: x)


# ---- Reference --------------------------------------------------------------

def test_reference_is_the_definition(relative_rms):
    inputs = make_inputs(zipf(30, 100), 5)
    agree(run(inputs), inputs, relative_rms, torch.float64, torch.float64)
    assert torch.equal(embedding_lookup(inputs["tokens"], inputs["tables"])[1], inputs["tables"][1][inputs["tokens"]])


def test_gradcheck():
    inputs = make_inputs([3, 0, 2], 2)
    assert torch.autograd.gradcheck(lambda *tables: embedding_lookup_reference(inputs["tokens"], tables),
                                    [x.requires_grad_() for x in inputs["tables"]])


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_auto_is_the_trainers_on_a_cpu(integer):
    inputs = make_inputs(zipf(30, 100), 8, integer=integer)
    module = torch.nn.Embedding(30, 8)

    def trainer(tokens, tables, dtype, backend):
        return [torch.func.functional_call(module, dict(weight=table), tokens).to(dtype) for table in tables]

    results = [run(inputs, "auto", torch.float32, torch.bfloat16, function=function)
               for function in (embedding_lookup, trainer)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    """One graph for any number of tokens."""
    compiled = torch.compile(embedding_lookup, fullgraph=True, dynamic=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (100, 130):
            inputs = make_inputs(zipf(30, N), 8)
            agree(run(inputs, "auto", torch.float32, torch.bfloat16, function=compiled), inputs, relative_rms,
                  result=torch.bfloat16, rounded=torch.bfloat16)


TABLE = torch.zeros(3, 2)


@pytest.mark.parametrize("change, message", [
    (dict(tokens=torch.zeros(4)), "tokens must be int32 or int64; got torch.float32"),
    (dict(tokens=torch.zeros(0, dtype=torch.int64)),
     r"tokens must be a tensor \(\.\.\.\), not empty; got \(0,\) torch.int64"),
    (dict(tokens=1), "tokens must be.*got int"),
    (dict(tables=TABLE), r"tables must be a list or tuple of 1 to 8 tensors; got \(3, 2\) torch.float32"),
    (dict(tables=9 * [TABLE]), "tables must be a list or tuple of 1 to 8 tensors; got list of 9"),
    (dict(tables=[TABLE, TABLE[0]]), r"tables must be a tensor \(V, D\), not empty; got \(2,\)"),
    (dict(tables=[TABLE.int()]), "tables must be bfloat16, .* or float64; got torch.int32"),
    (dict(tables=[TABLE, torch.zeros(2, 2)]),
     r"tables must have one shape and dtype; got \(3, 2\) torch.float32 and \(2, 2\) torch.float32"),
    (dict(tables=[TABLE, TABLE.half()]), "tables must have one shape and dtype.*float16"),
    (dict(tables=[TABLE.to("meta")]), "tables must be on the device of tokens, cpu; got meta"),
    (dict(dtype=torch.int32), "dtype must be None, bfloat16.*got torch.int32"),
    (dict(backend="cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        embedding_lookup(**dict(tokens=torch.tensor([0, 2]), tables=[TABLE]) | change)


# ---- Triton, interpreted ----------------------------------------------------

COUNTS = dict(token=[1], few=[3, 0, 1, 0, 0, 2], one_row=[0, 0, 600, 0], all_different=[1] * 20,
              more_rows_than_tokens=[0, 1, 1, 0] * 6, first_and_last_row=[45, *[0] * 8, 60],
              whole_chunks=[32, 16, 0, 64], parts_of_chunks=[15, 17, 31, 1, 33, 30, 2, 48, 7], zipf=zipf(50, 200))


FEW_COUNTS = [*((name, 33) for name in COUNTS if name not in ("parts_of_chunks", "zipf")), ("few", 1),
              ("parts_of_chunks", 300)]


@pytest.mark.parametrize("name, D", [*FEW_COUNTS, *slow_rows(("parts_of_chunks", 33), ("zipf", 33), ("zipf", 1),
                                                             ("zipf", 256))])
def test_interpreted_kernels_equal_the_definition(name, D, interpreter, relative_rms):
    inputs = make_inputs(COUNTS[name], D, 1)
    agree(interpreter(__name__, "run_interpreted", inputs), inputs, relative_rms)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (5, 12), (3, 4, 5)])
def test_interpreted_tokens_of_any_shape(integer, shape, interpreter, relative_rms):
    inputs = make_inputs([20, 0, 40] if shape else [0, 1, 0], 6, 1, integer)
    inputs["tokens"] = inputs["tokens"].reshape(shape[::-1]).mT if len(shape) > 1 else inputs["tokens"].reshape(shape)
    agree(interpreter(__name__, "run_interpreted", inputs), inputs, relative_rms)


@pytest.mark.parametrize("table, result", [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16),
                                           *slow_rows((torch.float16, torch.float16), (torch.float16, torch.float32),
                                                      (torch.float32, torch.bfloat16))])
def test_interpreted_sums_are_float32(table, result, interpreter, relative_rms):
    inputs = make_inputs(zipf(12, 150), 20, 1, dtype=torch.bfloat16 if torch.bfloat16 in (table, result)
                         else torch.float16)
    agree(interpreter(__name__, "run_interpreted", inputs, table, result), inputs, relative_rms, table, result,
          table if table != torch.float32 else None)


def frozen_results(inputs):
    """
    (results and gradient where the middle one of three tables needs one, calls of the backward pass, results where none
    needs one, though there is no sort)
    """
    with patch.object(el, "_backward_op", wraps=el._backward_op) as backward:
        some = run_interpreted(inputs, needed=[1])
    with patch.object(el, "_sort", side_effect=AssertionError):
        none = embedding_lookup(inputs["tokens"], [x.float() for x in inputs["tables"]], backend="triton")
        with torch.no_grad():
            none += embedding_lookup(inputs["tokens"], [x.float().requires_grad_() for x in inputs["tables"]],
                                     backend="triton")
    return some, backward.call_count, none


def test_interpreted_tables_without_gradient_cost_none(interpreter, relative_rms):
    inputs = make_inputs(zipf(10, 30), 6, 3)
    expected, (some, calls, none) = exact(inputs), interpreter(__name__, "frozen_results", inputs)
    assert calls == 1 and len(some) == 4
    assert relative_rms(some[3], expected[4]) < float_bound(30, torch.float32)
    assert all(torch.equal(x, y.float()) for x, y in zip((*some[:3], *none), 3 * expected[:3], strict=True))


def guarded_results(inputs, pad=4096):
    """(results and gradients, whether all that lies around the tensors made for them stayed as it was)"""
    buffers = []
    def guarded(*shape, dtype, device):
        buffers.append(torch.full((torch.Size(shape).numel() + 2 * pad,), float("nan"), dtype=dtype, device=device))
        return buffers[-1][pad:-pad].view(shape)
    with patch.object(torch, "empty", guarded):
        results = run(inputs, "triton", torch.float32, torch.float32)
    return results, len(buffers) == 4 and all(x[:pad].isnan().all() and x[-pad:].isnan().all() for x in buffers)


@pytest.mark.parametrize("integer, D", [(torch.int32, 260), (torch.int64, 5),
                                        *slow_rows((torch.int32, 5), (torch.int64, 260))])
def test_interpreted_tokens_outside_are_zeros(integer, D, interpreter, relative_rms):
    """So many of each kind that they fill chunks; 2^32 + 2, too, which is 2 where 32 bits are left of it."""
    inputs = make_inputs([20, 0, 3, 1], D, 1)
    outside = torch.tensor([4, 5, -1, -2, 2**31 - 1, -(2**31), 2**32 + 2, -(2**63)]).repeat_interleave(35)
    outside = outside[outside == outside.to(integer)].to(integer)
    order = torch.randperm(24 + len(outside), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat((inputs["tokens"].to(integer), outside))
    gs = torch.cat((inputs["gs"][0], torch.full((len(outside), D), float("nan"))))
    (y, gradient), untouched = interpreter(__name__, "guarded_results",
                                           inputs | dict(tokens=tokens[order], gs=[gs[order]]))
    inside, others = order.argsort().split((24, len(outside)))
    agree([y[inside], gradient], inputs, relative_rms)
    assert not y[others].any() and untouched


def strided_results(inputs, device="cpu", result=torch.float32):
    return {name: run(inputs, "triton", torch.float32, result, device=device, form=form)
            for name, form in FORMS.items()}


def test_interpreted_strides(interpreter, relative_rms):
    *others, contiguous = interpreter(__name__, "strided_results", make_inputs(zipf(10, 60), 6, 1)).values()
    assert all(torch.equal(result, expected) for results in others
               for result, expected in zip(results, contiguous, strict=True))


def opcheck_interpreted(inputs):
    table = inputs["tables"][0].float().requires_grad_()
    return torch.library.opcheck(torch.ops.knotgpt.embedding_lookup.default,
                                 (inputs["tokens"], table, torch.float16, *el._sort(inputs["tokens"], len(table))))


def test_interpreted_registration(interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted", make_inputs(zipf(5, 20), 6, 1)).values()) == {"SUCCESS"}


def test_interpreted_wrong_arguments(interpreter):
    with pytest.raises(ValueError, match="backend 'triton' takes fewer than .* tokens and rows and no float64"):
        interpreter(__name__, "run_interpreted", make_inputs([1, 2], 3), result=torch.float64)


def test_compilers_see_the_kernels(monkeypatch):
    """
    In the graphs of both passes stand the kernels, not an opaque operation, and one sort for two tables; what they
    would compute stays unrun, as there is no card.
    """
    monkeypatch.setattr(el, "_check", lambda *arguments: None)
    graphs = []
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    tables = [torch.zeros(5, 6, requires_grad=True) for _ in range(2)]

    def note(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        results = [node if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *inputs: [x if x is None else torch.zeros(x.shape, dtype=x.dtype)
                                                for x in results])

    compiled = torch.compile(embedding_lookup, fullgraph=True, dynamic=False,
                             backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    sum(y.float().sum() for y in compiled(tokens, tables, torch.bfloat16, "triton")).backward()

    def count(name):
        return [sum(name in target for target in graph) for graph in graphs]

    assert count("triton_kernel_wrapper") == [2, 6] and count("sort.stable") == [1, 0] and count("knotgpt") == [0, 0]


# ---- Triton, compiled ahead of time -----------------------------------------

KERNELS = dict(fwd="fwd", chunks="bwd_chunks", join="bwd_join", rows="bwd_rows")
ELEMENT = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_ahead(aot, name, D, table, result, capability):
    """A kernel as the host functions launch it for contiguous tables and gradients."""
    kernel, constants = getattr(el, f"_embedding_lookup_{KERNELS[name]}_kernel"), el._launch(name, D)
    warps = constants.pop("num_warps")
    kinds = dict(tokens_ptr="*i64", table_ptr=ELEMENT[table], dtable_ptr=ELEMENT[table], y_ptr=ELEMENT[result],
                 g_ptr=ELEMENT[result], ids_ptr="*i32", order_ptr="*i64", starts_ptr="*i32", sums_ptr="*fp32",
                 joined_ptr="*fp32")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument.endswith("_row")
               and D % 16 == 0]
    return aot(kernel, signature, constants, capability, warps, 3, aligned)


FEW = [(768, torch.float32, torch.bfloat16, capability) for capability in (80, 90, 100)]
SLOW = [*((D, torch.float32, torch.bfloat16, capability) for D in (1, 33, 128, 384, 1024)
          for capability in (80, 90, 100)),
        *((768, table, result, 90)
          for table, result in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                     (torch.bfloat16, torch.float32)))]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("D, table, result, capability",
                         [*FEW, *slow_rows(*SLOW)])
def test_kernels_compile_for_cards(D, table, result, capability, name, aot):
    compiled = compile_ahead(aot, name, D, table, result, capability)
    assert compiled.spills == 0 and compiled.shared <= 4096 and not compiled.has_tensor_cores
    # 16 bytes at a time
    assert D % 128 or "ld.global.v4.b32" in compiled.ptx and (name == "join" or "st.global.v4.b32" in compiled.ptx)


# ---- On a GPU ---------------------------------------------------------------

TEXT = zipf(5000, 20_000)


@pytest.mark.gpu
@pytest.mark.parametrize("table, result",
                         [(torch.float32, torch.bfloat16), (torch.float32, torch.float16),
                          (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                          (torch.float16, torch.float16)])
@pytest.mark.parametrize("counts, D", [*((counts, 33) for counts in COUNTS.values()), (TEXT, 768), (TEXT, 384),
                                       (TEXT, 1), ([0, 20_000, 0], 768)])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_gpu_equals_the_definition(counts, D, table, result, integer, relative_rms):
    inputs = make_inputs(counts, D, integer=integer, dtype=torch.float16 if torch.float16 in (table, result)
                         else torch.bfloat16)
    with poisoned_memory():
        results = run(inputs, "triton", table, result, "cuda")
    agree(results, inputs, relative_rms, table, result, table if table != torch.float32 else None)


@pytest.mark.gpu
def test_gpu_tokens_outside_are_zeros(relative_rms):
    inputs = make_inputs([20, 0, 3, 1], 768, 1)
    outside = torch.tensor([4, -1, 2**32 + 2, -(2**63)]).repeat_interleave(35)
    wrong = inputs | dict(tokens=torch.cat((inputs["tokens"], outside)),
                          gs=[torch.cat((inputs["gs"][0], torch.full((len(outside), 768), float("nan"))))])
    y, gradient = run(wrong, "triton", torch.float32, torch.float32, "cuda")
    agree([y[:24], gradient], inputs, relative_rms)
    assert not y[24:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit(dynamic):
    compiled = torch.compile(embedding_lookup, fullgraph=True, dynamic=dynamic)
    for N in (20_000, 20_003):
        inputs = make_inputs(zipf(5000, N), 768)
        eager, again, graph = (run(inputs, "auto", torch.float32, torch.bfloat16, "cuda", function)
                               for function in (embedding_lookup, embedding_lookup, compiled))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, again, graph, strict=True))


@pytest.mark.gpu
def test_gpu_strides():
    *others, contiguous = strided_results(make_inputs(TEXT, 64), "cuda", torch.bfloat16).values()
    assert all(torch.equal(result, expected) for results in others
               for result, expected in zip(results, contiguous, strict=True))


@pytest.mark.gpu
def test_gpu_nothing_waits_for_the_host():
    """Both passes in a CUDA graph, replayed for tokens of quite other runs."""
    first, second = (make_inputs(counts, 64) for counts in (TEXT, [20_000, *[0] * 4999]))
    tokens = first["tokens"].cuda()
    tables = [x.cuda().float().requires_grad_() for x in first["tables"]]
    gs = [g.cuda().bfloat16() for g in first["gs"]]
    def both_passes():
        results = embedding_lookup(tokens, tables, torch.bfloat16)
        return [*results, *torch.autograd.grad(results, tables, gs)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_passes()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes()
    for inputs in (second, first):
        tokens.copy_(inputs["tokens"])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both_passes(), strict=True))


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """Tables and results of 2^31.1 numbers; the last ones are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    N, last, generator = 3_000_000, 1000, torch.Generator("cuda").manual_seed(0)
    table = torch.randn(N, 768, device="cuda", generator=generator).requires_grad_()
    g = torch.randn(N, 768, device="cuda", dtype=torch.bfloat16, generator=generator)
    tokens, results = torch.arange(N, device="cuda"), []
    tokens[-last:] = N - last + torch.randint(last, (last,), device="cuda", generator=generator)
    for rows in (slice(None), slice(-last, None)):
        own = table[rows].detach().requires_grad_()
        y, = embedding_lookup(tokens[rows] - (N - len(own)), [own], torch.bfloat16)
        results.append([part[-last:].detach().clone() for part in (y, *torch.autograd.grad(y, own, g[rows]))])
        del y, own
    # chunks begin elsewhere
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-5)
