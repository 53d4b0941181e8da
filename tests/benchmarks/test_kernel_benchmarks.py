"""The kernels' benchmarks: one tiny measurement of each, and how arms take turns."""
import argparse
import json
import sys

import pytest
import torch

from benchmarks import (
    decode,
    embedding_lookup,
    gated_linear_attention,
    lane_scan,
    low_rank_pair,
    norm_rotary,
    optimizer_updates,
    probability_maps,
    relu_squared_feed_forward,
    residual_norm,
    short_convolution,
    sign_projection,
    softcapped_cross_entropy,
    splanifold,
    symmetric_product,
    timing,
    topological_attention,
)
from benchmarks.timing import Place, in_turn, markdown, shown

CPU, LIMITS = torch.device("cpu"), dict(flops=1e12, bytes=1e10)
PLACE = Place(CPU, torch.float32, 0.01, LIMITS, quick=True)


def complete(rows: list[dict]) -> bool:
    assert all(row["median"] > 0 and row["n"] >= 5 for row in rows), [row for row in rows if "fault" in row]
    return shown(rows).count("\n") == len(rows) + 1


@pytest.mark.slow
def test_topological_attention_measures_every_backend():
    rows = topological_attention.measure(PLACE, 64, 2, 16)
    backends = {f"topological, {name}" for name in (*topological_attention.BACKENDS, "auto") if name != "tiled"}
    assert complete(rows) and {row["arm"] for row in rows} == backends | {"softmax, PyTorch", "key only"}
    assert {row["speedup"] for row in rows if row["arm"] == "softmax, PyTorch"} == {1.0}
    assert "| against softmax, PyTorch |" in shown(rows)


@pytest.mark.slow
def test_gated_linear_attention_measures_every_backend():
    rows = gated_linear_attention.measure(PLACE, 64, 8, 8, 2)
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"loops", "chunked", "reference", gated_linear_attention.SOFTMAX,
                                                                    gated_linear_attention.STEP}
    assert all(("bound_share" in row) == (row["arm"] in ("loops", "chunked", "reference")) for row in rows)


@pytest.mark.slow
def test_lane_scan_measures_every_arm(monkeypatch):
    monkeypatch.setattr(lane_scan, "compile_flex", lambda T, place: lane_scan.softmax_attention)
    rows = [row for T in (32, 64) for row in lane_scan.measure(PLACE, T, 64, 8)]
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"loops", "chunked", lane_scan.TOEPLITZ, *lane_scan.OTHERS, "copy"}
    facts = lane_scan.exponents(rows)["exponents"]
    assert list(facts) == ["W=64, F=8, forward", "W=64, F=8, forward + backward"]
    exact = [dict(B=1, T=T, W=4, F=2, arm="loops", what="forward", median=3 * T ** 1.5) for T in (8, 32, 512)]
    assert lane_scan.exponents(exact) == dict(exponents={"W=4, F=2, forward": 1.5})


@pytest.mark.slow
@pytest.mark.parametrize("form", [*residual_norm.FORMS, residual_norm.MIX])
def test_residual_norm_measures_every_arm(form):
    rows = residual_norm.measure(PLACE, form, 16, 32)
    arms = {"loops", "trainer", "trainer, compiled",
            "reference"} if form in residual_norm.CPU_FORMS else {"reference, compiled", "reference"}
    assert complete(rows) and {row["arm"] for row in rows} == arms | {"copy"}
    assert all(row["copy_share"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [splanifold.Shape(64, 1, 16, 8), splanifold.Shape(64, 4, 3, 2, mix="concat"),
                                   splanifold.Shape(64, 4, 3, 8), splanifold.Shape(64, 1, 16, 8, S=3)], ids=str)
def test_splanifold_measures_every_arm(shape):
    rows = splanifold.measure_shape(PLACE, "tiny", shape)
    assert complete(rows)
    expected = {"chunked", "reference", splanifold.MLP, "copy"}
    expected |= {"feature"} if shape.S == 2 else set()
    expected |= {"loops"} if shape.mix == "concat" else set()
    assert {row["arm"] for row in rows} == expected
    assert all(("product_share" in row) == (row["arm"] not in (splanifold.MLP, "copy")) for row in rows)


def test_norm_rotary_measures_every_arm(monkeypatch):
    """Without the compiler, which takes ten seconds for its two arms."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    rows = norm_rotary.measure(PLACE, 8, 2, 16)
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"loops", "trainer", "trainer, compiled", "reference, compiled", "reference",
                                            "copy"}


def test_embedding_lookup_measures_every_arm():
    rows = embedding_lookup.measure(PLACE, 64, 40, 8, 2)
    assert complete(rows) and {row["arm"] for row in rows} == {"trainer, compiled", "trainer", "copy"}


@pytest.mark.slow
def test_short_convolution_measures_every_arm():
    rows = short_convolution.measure(PLACE, 2, 64, 8, 4)
    arms = {"loops", "reference, compiled", "reference", short_convolution.PEER, "copy"}
    assert complete(rows) and {row["arm"] for row in rows} == arms
    positions, (x, taps), _ = short_convolution.make_inputs(1, 4096, 8, 4, PLACE)
    assert 4 <= (positions == 0).sum() <= 40
    assert ((positions[:, 1:] == positions[:, :-1] + 1) | (positions[:, 1:] == 0)).all()
    whole = short_convolution.short_convolution_reference(x, taps, torch.arange(4096)[None])
    torch.testing.assert_close(short_convolution.depthwise(x, taps), whole)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_relu_squared_feed_forward_measures_every_arm(quick):
    rows = relu_squared_feed_forward.measure(PLACE._replace(quick=quick), 16, 8, 24)
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"loops", "trainer",
                                            "reference"} | (set() if quick
                                                            else {"trainer, compiled", "reference, compiled"})


@pytest.mark.slow
def test_softcapped_cross_entropy_measures_every_arm():
    rows = softcapped_cross_entropy.measure(PLACE, 16, 8, 40)
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"loops", "trainer", "trainer, compiled", "reference, compiled"}


@pytest.mark.slow
def test_optimizer_updates_measures_every_form():
    rows = optimizer_updates.measure(PLACE, 2, 16, 8)
    assert complete(rows) and {row["form"] for row in rows} == {"nesterov", "step", "adam"}
    assert {row["arm"] for row in rows} == {"loops", "trainer", "copy"}


def test_symmetric_product_measures_every_form():
    rows = symmetric_product.measure(PLACE, 2, 16, 24)
    assert complete(rows)
    assert [row["form"] for row in rows] == ["gram", "polynomial", "orthogonalize", "orthogonalize, compiled"]
    assert {row["arm"] for row in rows} == {symmetric_product.PEER}


@pytest.mark.slow
def test_low_rank_pair_measures_every_arm():
    rows = low_rank_pair.measure(PLACE, 16, 8, 4, 12, 1)
    assert complete(rows)
    assert {row["arm"] for row in rows} == {"reference, compiled", "reference", low_rank_pair.DENSE, "copy"}
    copies = [row["copy_share"] for row in rows if row["arm"] == "reference"]
    assert len(copies) == 2 and all(share > 0 for share in copies)


@pytest.mark.slow
def test_sign_projection_measures_every_arm(monkeypatch):
    rows = sign_projection.measure(PLACE, 40, 13)
    assert complete(rows) and {row["arm"] for row in rows} == {"loops", "reference", sign_projection.STORED}
    monkeypatch.setattr(sign_projection, "MOST_BYTES", 1)
    assert {row["arm"] for row in sign_projection.measure(PLACE, 40, 13)} == {"loops", "reference"}
    matrix = sign_projection.stored_matrix(40, 13, PLACE)
    identity = [sign_projection.sign_projection(phi, 40, seed=sign_projection.SEED) for phi in torch.eye(13)]
    assert torch.equal(matrix, torch.stack(identity, 1))


def test_probability_maps_measures_every_map(tmp_path, monkeypatch, capsys):
    required = []
    monkeypatch.setattr(probability_maps, "require_tests", lambda *paths: required.append(paths))
    assert probability_maps.main(["--quick", "--output", str(tmp_path / "a.json")]) == 0
    results = json.loads((tmp_path / "a.json").read_text())
    assert required == [tuple(probability_maps.TESTS)] and results["quick"]
    assert len(results["speed"]) == 2 * len(probability_maps.MAPS)
    assert {row["part"] for row in results["speed"]} == {"forward", "both"}
    assert "| 16 | eager | softmax | " in capsys.readouterr().out


def test_nothing_is_timed_that_is_wrong():
    x = torch.randn(4, 5).requires_grad_()
    arms = dict(right=lambda x: 2 * x, wrong=lambda x: 2.002 * x, broken=lambda x: x @ x)
    rows = timing.measure_arms(PLACE, dict(N=4), arms, ([x], [torch.ones(4, 5)]), arms["right"], 1e-4)
    faults = {row["arm"]: row["fault"] for row in rows if row["what"] == "check"}
    assert faults["wrong"] == "wrong: relative RMS errors 1.0e-03, 1.0e-03"
    assert faults["broken"].startswith("RuntimeError: ")
    assert [row["arm"] for row in rows if row["what"] != "check"] == ["right", "right"]


def test_command_line(monkeypatch, tmp_path, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["some_op.py", *arguments, "--output", str(tmp_path / "out.json")])
        return timing.kernel_benchmark("some_op", "Some operation.", measure, dict(cpu=[]), dict(cpu=[dict(N=8, D=4)]),
                                       dict(cpu=[dict(N=2, D=2)]))
    def measure(place, N, D):
        return timing.rows_in_turn(place, dict(N=N, D=D), "forward",
                                   dict(product=lambda: torch.ones(N, D) @ torch.ones(D, N)), flops=2 * N * N * D)
    monkeypatch.setattr(timing, "require_tests", lambda *paths: None)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: LIMITS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("--seconds", "0.01", "--sizes", "N=16", "D=8") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["N"], row["D"]) for row in found["rows"]] == [(16, 4), (8, 8)] and found["capability"] is None
    assert not found["loops_are_fastest"]
    assert run("--quick", "--seconds", "0.01") == 0 and "| 2 | 2 | product | forward |" in capsys.readouterr().out
    assert run("--sizes", "M=3") == 1
    assert "some_op.py: error: --sizes has no 'M'; there are N, D" in capsys.readouterr().err
    assert run("--minutes", "0") == 1 and "left no time for a size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--sizes", "16")


@pytest.mark.slow
def test_decode_measures_every_arm():
    rows, fixed = decode.measure(20, argparse.Namespace(layers=1, heads=2, width=16, seconds=0.01), CPU, torch.float32)
    assert [row["arm"] for row in rows] == list(decode.ARMS)
    assert all(row["token"]["median"] > 0 and row["prefill_ms"] > 0 for row in rows)
    assert sorted(fixed) == sorted(arm for arm, (_, bins) in decode.ARMS.items() if bins)
    kept = {row["arm"]: row["bytes_kept"] for row in rows}
    assert kept["softmax"] == 20 * 2 * 2 * 16 * 4 and kept["topological, faithful"] == 20 * 2 * (16 + 1) * 4
    assert decode.shown(rows).count("\n") == len(rows) + 1


def test_arms_take_turns_and_a_fault_is_a_line():
    calls = []
    def broken():
        raise ValueError("no such luck\nat all")
    found = in_turn(dict(a=lambda: calls.append("a"), b=lambda: calls.append("b"), c=broken), CPU, seconds=0.001,
                    least=7)
    assert found["c"] == "ValueError: no such luck"
    assert found["a"]["n"] >= 7 and found["b"]["n"] >= 7
    assert 0 < found["a"]["p20"] <= found["a"]["median"] <= found["a"]["p80"]
    assert "".join(calls).startswith("aabb") and calls[4] == "a" and "b" in calls[5:]


def test_markdown_is_a_table():
    assert markdown([dict(a=1, b="x"), dict(a=2, b="y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


@pytest.mark.parametrize("backward, products", [(False, 2), (True, 7)])
def test_softmax_attentions_bound_is_its_causal_products(backward, products):
    assert topological_attention.bound_ms(topological_attention.SOFTMAX, 1000, 3, 64, 4, backward,
                                          LIMITS) == pytest.approx(1000 * products * 1000 ** 2 * 64 * 3 / 1e12)
