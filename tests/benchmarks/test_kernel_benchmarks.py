"""The kernels' benchmarks: one tiny measurement of each, and how arms take turns."""
import argparse

import pytest
import torch

from benchmarks import decode, gated_linear_attention, splanifold, topological_attention
from benchmarks.timing import in_turn, markdown

CPU, LIMITS = torch.device("cpu"), dict(flops=1e12, bytes=1e10)


def test_topological_attention_measures_every_backend():
    rows = topological_attention.measure(64, argparse.Namespace(heads=2, width=16, seconds=0.01), CPU, torch.float32, LIMITS)
    backends = {f"topological, {name}" for name in (*topological_attention.BACKENDS, "auto") if name != "tiled"}
    assert {row["arm"] for row in rows} == backends | {"softmax, PyTorch", "key only"}
    assert all(row["median"] > 0 and row["n"] >= 5 for row in rows), [row for row in rows if "fault" in row]
    assert topological_attention.shown(rows).count("\n") == len(rows) + 1


def test_gated_linear_attention_measures_every_backend():
    rows = gated_linear_attention.measure(64, 8, 8, 2, 0.01, CPU, torch.float32, LIMITS)
    assert all(row["median"] > 0 for row in rows), [row for row in rows if "fault" in row]
    assert gated_linear_attention.shown(rows).count("\n") == len(rows) + 1


@pytest.mark.parametrize("shape", [splanifold.Shape(64, 1, 16, 8), splanifold.Shape(64, 4, 3, 2, mix="concat"), splanifold.Shape(64, 4, 3, 8),
                                   splanifold.Shape(64, 1, 16, 8, S=3)], ids=str)
def test_splanifold_measures_every_arm(shape):
    rows = splanifold.measure("tiny", shape, 0.01, False, CPU, torch.float32, LIMITS)
    assert all(row["median"] > 0 for row in rows), [row for row in rows if "fault" in row]
    assert {row["arm"] for row in rows} == {"chunked", "reference", splanifold.MLP} | ({"feature"} if shape.S == 2 else set())
    assert splanifold.shown(rows).count("\n") == len(rows) + 1


def test_splanifold_times_nothing_that_is_wrong():
    wrong = lambda r, controls, mix: 1.001 * splanifold.reference(r, controls, mix)
    assert splanifold.fault(wrong, splanifold.Shape(64, 1, 16, 8), CPU, torch.float32).startswith("wrong: relative RMS errors 1.0e-03")


def test_decode_measures_every_arm():
    rows, fixed = decode.measure(20, argparse.Namespace(layers=1, heads=2, width=16, seconds=0.01), CPU, torch.float32)
    assert [row["arm"] for row in rows] == list(decode.ARMS) and all(row["token"]["median"] > 0 and row["prefill_ms"] > 0 for row in rows)
    assert sorted(fixed) == sorted(arm for arm, (_, bins) in decode.ARMS.items() if bins)
    kept = {row["arm"]: row["bytes_kept"] for row in rows}
    assert kept["softmax"] == 20 * 2 * 2 * 16 * 4 and kept["topological, faithful"] == 20 * 2 * (16 + 1) * 4
    assert decode.shown(rows).count("\n") == len(rows) + 1


def test_arms_take_turns_and_a_fault_is_a_line():
    calls = []
    def broken():
        raise ValueError("no such luck\nat all")
    found = in_turn(dict(a=lambda: calls.append("a"), b=lambda: calls.append("b"), c=broken), CPU, seconds=0.001, least=7)
    assert found["c"] == "ValueError: no such luck"
    assert found["a"]["n"] >= 7 and found["b"]["n"] >= 7 and 0 < found["a"]["p20"] <= found["a"]["median"] <= found["a"]["p80"]
    assert "".join(calls).startswith("aabb") and calls[4] == "a" and "b" in calls[5:]


def test_markdown_is_a_table():
    assert markdown([dict(a=1, b="x"), dict(a=2, b="y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


@pytest.mark.parametrize("backward, products", [(False, 2), (True, 7)])
def test_softmax_attentions_bound_is_its_causal_products(backward, products):
    assert topological_attention.bound_ms("softmax, PyTorch", 1000, 3, 64, 4, backward, LIMITS) == pytest.approx(1000 * products * 1000 ** 2 * 64 * 3 / 1e12)
