"""The feed-forward's benchmark: a tiny measurement, and what is wrong is not timed."""
import torch

from benchmarks import relu_squared_feed_forward as benchmark

CPU = torch.device("cpu")


def test_every_arm_is_measured():
    rows = benchmark.measure(8, 16, 24, 0.01, False, CPU, torch.float32, dict(flops=1e12, bytes=1e10))
    assert [(row["arm"], row["what"]) for row in rows] == [("reference", "forward"), ("reference", "forward + backward")]
    assert all(row["median"] > 0 and row["product_share"] > 0 for row in rows), rows
    assert benchmark.shown(rows).count("\n") == len(rows) + 1


def test_trainers_arm_is_right_and_a_wrong_one_is_found():
    inputs = benchmark.make_inputs(8, 16, 24, CPU, torch.float32)
    assert benchmark.fault(benchmark.trainer, *inputs) is None
    assert benchmark.fault(lambda *tensors: 1.001 * benchmark.trainer(*tensors), *inputs).startswith("wrong: relative RMS errors 1.0e-03")
