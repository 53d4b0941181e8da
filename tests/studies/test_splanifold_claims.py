"""
The paper's tables measured again: one reduced run of every part, and the pieces that a wrong figure could hide in.
"""
import json
import math
import sys

import pytest
import torch

from kernels.splanifold import SplanifoldControls, splanifold_reference
from studies import splanifold_claims as claims
from train_gpt import RunError


def test_queries_of_every_arm_are_what_they_say():
    random = torch.Generator().manual_seed(3)  # the arms' own draws, in their order

    def draw(*shape):
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    x, centres, weights = torch.rand(5, 3, generator=random), torch.rand(256, 3, generator=random), draw(256, 256)
    controls = SplanifoldControls(draw(1, 2, 256), *(draw(1, 2, 256, 3) for _ in range(3)))
    layers = [(draw(256, width), draw(256)) for width in (3, 256, 256)]
    expected = {"splanifold": splanifold_reference(x[:, None], controls),
                "RBF": torch.exp(-torch.cdist(x, centres).square()) @ weights}
    h = x
    for i, (matrix, bias) in enumerate(layers):
        h = torch.nn.functional.linear(h if i == 0 else h.relu(), matrix, bias)
    expected |= {"MLP": h, "splanifold, frozen": splanifold_reference(x[:, None], controls, eps=0.0)}
    for arm, (function, _) in claims.query_arms(3, 5).items():
        for call in ("first", "second"):
            torch.testing.assert_close(function(), expected[arm], rtol=1e-4, atol=1e-5,
                                       msg=lambda text, name=f"{arm}, {call} call": f"{name}: {text}")


def test_runtime_is_a_query_s(monkeypatch):
    rows, lines = claims.runtime([2, 4], 16, 0.001)
    arms = ["splanifold", "splanifold, frozen", "RBF", "MLP"]
    assert [(row["K"], row["arm"]) for row in rows] == [(K, arm) for K in (2, 4) for arm in arms]
    assert all(0 < row[kind]["p20"] <= row[kind]["median"] <= row[kind]["p80"] and row[kind]["n"] >= 5 for row in rows
               for kind in ("batched", "single"))
    assert rows[0]["claimed"] == 2.73 and rows[-1]["claimed"] == 6.58 and rows[-2]["claimed"] == 25.51
    assert list(lines) == arms

    def made_up(arms, device, seconds):
        return {(K, arm): dict(median=K, p20=1, p80=4, n=5) for K, arm in arms}

    monkeypatch.setattr(claims, "in_turn", made_up)
    for row in claims.runtime([2, 4], 16, 0.001)[0]:  # milliseconds a call become microseconds a query
        assert row["batched"] == dict(median=62.5 * row["K"], p20=62.5, p80=250, n=5)
        assert row["single"] == dict(median=1000 * row["K"], p20=1000, p80=4000, n=5)


def test_line():
    straight, bent = claims.line([(K, 3 + 0.5 * K) for K in (2, 4, 8, 256)]), claims.line([(1, 1), (2, 0), (3, 1)])
    assert straight["start"] == pytest.approx(3) and straight["slope"] == pytest.approx(0.5)
    assert straight["residual"] < 1e-9 and straight["r2"] == pytest.approx(1)
    assert bent["residual"] == pytest.approx(math.sqrt(2) / 3) and bent["r2"] == pytest.approx(0)


def test_lines_are_of_an_arm_s_own_times():
    def row(K, arm, median, p20):
        return dict(K=K, arm=arm, batched=dict(median=median, p20=p20))

    lines = claims.lines_of([row(1, "a", 2, 1), row(1, "b", 9, 9), row(2, "a", 4, 1.5), row(2, "b", 8, 8),
                             row(3, "a", 6, 2), row(3, "b", 7, 7)])
    slopes = {(arm, name): lines[arm][name]["slope"] for arm in "ab" for name in ("median", "p20")}
    assert slopes == pytest.approx({("a", "median"): 2, ("a", "p20"): 0.5, ("b", "median"): -1, ("b", "p20"): -1})


def test_runs_trained_together_are_runs_trained_alone():
    x, y = (torch.randn(3, 20, width, generator=torch.Generator().manual_seed(width)) for width in (2, 4))
    start = claims.network_start([2, 5, 4], [7, 8, 9])
    kept = claims.adam(claims.network, start, x, y, 0.01, 30, 1e-3, keep=(10,))
    alone = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    with torch.no_grad():
        for p, q in zip(alone.parameters(), start):
            p.copy_(q[1].T if p.ndim == 2 else q[1, 0])
    optimizer = torch.optim.Adam(alone.parameters(), lr=0.01, weight_decay=1e-3)
    for step in range(1, 31):
        optimizer.zero_grad()
        (alone(x[1]) - y[1]).square().mean().backward()
        optimizer.step()
        if step in kept:
            torch.testing.assert_close(claims.network(kept[step], x)[1], alone(x[1]).detach(), rtol=1e-3, atol=1e-4)
    assert list(kept) == [10, 30] and (kept[10][0] - kept[30][0]).abs().max() > 0.01
    [once, last] = (claims.adam(claims.network, start, x, y, 0.01, 4, keep=(step,), falling=True)[step]
                    for step in (1, 4))
    moved = [(p - q).abs().max().item() for p, q in zip(once, start)]
    # rates 1, 3/4, 1/2, 1/4 of 0.01
    assert moved == pytest.approx([0.01] * 4, rel=1e-2) and 0.01 < (last[0] - start[0]).abs().max() < 0.026


def test_chain_is_piecewise_cubic_with_tangents_per_segment():
    points, tangents = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    nodes = torch.linspace(0, 1, 4, dtype=torch.float64)[None, :, None].repeat(2, 1, 1)
    torch.testing.assert_close(claims.chain([points, tangents], nodes), points)
    step = 1e-6
    torch.testing.assert_close((claims.chain([points, tangents], nodes + step / 3) - points) / step, tangents,
                               rtol=1e-4, atol=1e-4)


def test_design_matrix_times_controls_is_the_splanifold():
    r, n = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).double(), 2
    solution = torch.randn(2 * 10, n, generator=torch.Generator().manual_seed(1)).double()
    design = splanifold_reference(r[:, None], claims.unit_controls(3, 2))
    torch.testing.assert_close(design @ solution, splanifold_reference(r[:, None], claims.controls_of(solution, 3, 2)))
    found = claims.least_squares(design, design @ solution, 1e-12)
    torch.testing.assert_close(design @ found, design @ solution, rtol=1e-4, atol=1e-5)


def test_least_squares_shrinks_by_the_ridge():
    assert claims.least_squares(torch.ones(3, 1), torch.full((3, 1), 2.0), 1.0).item() == pytest.approx(6 / 4)


@pytest.mark.parametrize("curve, at_quarter",
                         [("circle", (0, 1, 0)), ("helix", (0, 1, -0.5)), ("trefoil", (0.5, 1, 0.5))])
def test_curves(curve, at_quarter):
    torch.testing.assert_close(claims.CURVES[curve](torch.tensor(math.pi / 2)),
                               torch.tensor(at_quarter, dtype=torch.float32), rtol=0, atol=1e-6)


def test_curve_rows_hold_every_arm_and_protocol():
    rows = claims.curves(60, (0.03, 0.1), 20)

    def count(protocol):
        return sorted(row["arm"] for row in rows if row["protocol"] == protocol and row["curve"] == "helix")

    assert count("paper's protocol") == ["MLP", "RBF", "splanifold"] and count("least squares") == ["RBF", "splanifold"]
    assert count("equal terms") == ["MLP", "MLP of t alone", "RBF", "splanifold"]
    assert all(len(row["errors"]) == 3 and 0 < min(row["errors"]) <= row["mean"] < 1 for row in rows)
    assert {row["arm"]: row["parameters"] for row in rows if row["protocol"] == "equal terms"} == {
        "splanifold": 102, "RBF": 195, "MLP": 5443, "MLP of t alone": 4483}
    error = {(row["curve"], row["arm"], row["protocol"]): row["mean"] for row in rows}
    for curve, (claimed, spread) in ((curve, arms["splanifold"]) for curve, arms in claims.CURVE_ERRORS.items()):
        assert error[curve, "splanifold", "least squares"] <= claimed + spread
        # a zero chain's error is 0.5 and more
        assert error[curve, "splanifold", "least squares"] < error[curve, "splanifold", "equal terms"] < 0.1


def test_width_of_bumps_is_the_best_on_held_out_samples():
    t, y, _, _ = claims.curve_samples(claims.SEEDS)
    centres = torch.rand(len(t), claims.CENTRES, generator=torch.Generator().manual_seed(0))

    def solve(x, y):
        return lambda other, found=claims.least_squares(x, y, 1e-6): other.double() @ found

    def error(width):
        return claims.rmse(solve(claims.bumps(t, centres, width)[:, :96],
                                 y[:, :96])(claims.bumps(t, centres, width)[:, 96:]), y[:, 96:])

    chosen = claims.bump_width(t, y, centres, solve)
    for width in torch.logspace(-2, 0, 6):
        assert (error(chosen) <= error(width.expand(len(t))) * 1.001).all()


def test_codes_of_known_length():
    coin = torch.tensor([0, 1, 0, 1])
    assert claims.entropy(coin) == 1 and claims.entropy(torch.zeros(5)) == 0
    assert claims.entropy(torch.arange(16)) == pytest.approx(4)
    one_by_one = [0.5, 0.5 / 2, 1.5 / 3, 1.5 / 4]  # (seen + 1/2) / (all seen + levels / 2)
    assert claims.adaptive_bits(coin, 2) == pytest.approx(-sum(map(math.log2, one_by_one)))


def test_quantiser_keeps_ends_and_zero():
    x = torch.tensor([-2.0, 0.0, 0.6, 2.0])
    values, symbols = claims.quantised(x, 3)
    assert symbols.tolist() == [-3, 0, 1, 3] and values.tolist() == pytest.approx([-2, 0, 2 / 3, 2])
    assert claims.quantised(torch.zeros(2), 3)[1].tolist() == [0, 0]


def test_fewest_bits_within_the_factor():
    x = torch.linspace(-1, 1, 101)

    def error_of(tensors):  # 1 / (2 (2^(bits-1) - 1)) above 1: within 1.05 from 5 bits on
        return 1 + (tensors[0] - x).abs().max().item()

    found = claims.shortest([x], error_of)
    assert found["bits"] == 5 and found["quantised_error"] <= 1.05 < error_of([claims.quantised(x, 4)[0]])
    assert found["size"] == pytest.approx(found["entropy"] * 101 / 8)
    assert found["most_possible"] == pytest.approx(math.log2(101))
    assert found["decodable"] == pytest.approx(4 + 5 * 101 / 8)  # even symbols: nothing beats the fixed length
    with pytest.raises(RunError, match="16 bits leave"):
        claims.shortest([x], lambda tensors: float(not torch.equal(tensors[0], x)))


def test_density_rows_hold_every_model():
    rows, alone = claims.densities([0, 1], (150,), (1, 16), (0.03,))
    parameters = {(row["task"], row["model"]): row["parameters"] for row in rows}
    for task in ("cubic", "irregular"):
        assert parameters[task, "splanifold"] == 104 and parameters[task, "MLP 1x64"] == 580
        assert [parameters[task, f"polynomial of degree {degree}"] for degree in (1, 2, 3)] == [20, 60, 140]
    row = {(row["task"], row["model"]): row for row in rows}
    # below the noise: the target is of its form
    assert row["cubic", "splanifold"]["error"] < 0.07 / 2 < row["cubic", "polynomial of degree 1"]["error"]
    assert row["cubic", "splanifold"]["entropy"] <= row["cubic", "splanifold"]["most_possible"] == pytest.approx(
        (8 * 2 + 96 * 4) / 104)
    assert all(own["quantised_error"] <= 1.05 * own["error"] and own["size"] < own["decodable"] for own in rows)
    assert alone["cubic"] < 1e-6 < 0.3 < alone["irregular"]
    for task in ("cubic", "irregular"):
        small = [own for own in rows if own["task"] == task and " the " in own["model"]]
        assert len(small) == 2
        assert all(own["parameters"] == {"MLP 1x1": 13, "MLP 1x16": 148}[own["model"].split(",")[0]] for own in small)
        for own in small:
            how, peer = own["model"].split(", ")[1].split(" the ")
            assert (own["error"] <= 1.05 * row[task, peer]["error"]) == (how == "as good as"), own


def test_a_splanifold_says_what_its_polynomials_say():
    r = torch.rand(99, 4, generator=torch.Generator().manual_seed(0)).double()
    design, polynomials = splanifold_reference(r[:, None], claims.unit_controls(4, 2),
                                               eps=1e-9), claims.spine_monomials(r)
    ranks = [torch.linalg.matrix_rank(x, rtol=1e-9).item()
             for x in (design, polynomials, torch.cat([design, polynomials], 1))]
    assert design.shape[1] == 26 and ranks == [16, 16, 16]


def test_monomials():
    x = torch.tensor([[0.75, 1.0, 0.5, 0.5]])  # scaled: 1/2, 1, 0, 0
    assert claims.monomials(x, 1).tolist() == [[1, 0.5, 1, 0, 0]]
    assert sorted(claims.monomials(x, 2)[0].tolist()) == sorted([1, 0.5, 1, 0, 0, 0.25, 0.5, 0, 0, 1, 0, 0, 0, 0, 0])
    assert claims.monomials(x, 3).shape == (1, 35)


def test_script_writes_results_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "require_tests", lambda *paths: None)
    monkeypatch.setattr(sys, "argv", ["splanifold_claims.py", "--quick", "--output", str(tmp_path / "out.json")])
    threads = torch.get_num_threads()
    try:
        assert claims.main() == 0
    finally:
        torch.set_num_threads(threads)
    results, tables = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    assert results["quick"] and results["threads"] == 1 and {"git_commit", "torch", "device", "date"} <= set(results)
    assert tables in capsys.readouterr().out and all(f"Table {number}:" in tables for number in (2, 3, 4))
    rows = [len(results[part]) for part in ("runtime", "curves", "densities")] + [2 * len(results["lines"])]
    assert sum(line.startswith("| ") for line in tables.splitlines()) == sum(2 + n for n in rows)


def test_no_figure_while_tests_fail(tmp_path, monkeypatch, capsys):
    def failing(*paths):
        raise RunError("no figures while tests fail: made up")
    monkeypatch.setattr(claims, "require_tests", failing)
    monkeypatch.setattr(sys, "argv", ["splanifold_claims.py", "--quick", "--output", str(tmp_path / "out.json")])
    threads = torch.get_num_threads()
    try:
        assert claims.main() == 1
    finally:
        torch.set_num_threads(threads)
    assert "made up" in capsys.readouterr().err and not list(tmp_path.iterdir())
