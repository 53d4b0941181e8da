"""The study of wave lanes: its rows, a run of each kind, what is added to a trained model, resumption, its verdicts."""

import argparse
import json

import numpy as np
import pytest
import torch

import train_gpt
import variants
from data.shards import write_meta, write_shard
from kernels import backend
from studies import wavestack as study
from studies import wavestack_claims as claims

END = 256
QUICK = {name: quick for name, (_, quick, _) in study.COUNTS.items()}


@pytest.fixture(autouse=True)
def no_loops(request, monkeypatch):
    """Kernels run in plain PyTorch, because their loops take a minute to compile. Slow tests run them."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(backend, "has_cpu_loops", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of random bytes in documents of 5 to 60 bytes."""
    path, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split in ("train", "val"):
        documents = [np.append(END, random.integers(97, 123, random.integers(5, 60))) for _ in range(300)]
        write_shard(path / f"a_{split}_000000.bin", np.concatenate(documents).astype(np.uint16))
    write_meta(path, vocab_size=257, tokenizer="bytes")
    return path


@pytest.fixture
def options(folder):
    return argparse.Namespace(**QUICK, data=str(folder), second="", sweep="", quick=True, seconds=0.001, settings=[],
                              output=None, dry_run=False)


def test_rows_are_documents_and_pads(folder):
    """Long documents make several rows; rows come from the first document to the last."""
    rows = study.read_documents(str(folder), "train", 10_000, 16)
    assert rows.shape[1] == 17 and (rows[:, 0] == END).all() and 300 < len(rows) < 1500
    lengths = []
    for row in rows.tolist():
        length = row.index(END, 1) if END in row[1:] else len(row)
        assert length >= 2 and set(row[length:]) <= {END}
        lengths.append(length - 1)
    shard = np.fromfile(folder / "a_train_000000.bin", dtype=np.uint16)[512:]
    text = [token for row, length in zip(rows.tolist(), lengths) for token in row[1:1 + length]]
    assert text == shard[shard != END].tolist()
    few = study.read_documents(str(folder), "train", 7, 16)
    assert len(few) == 7 and torch.equal(few[0], rows[0]) and torch.equal(few[-1], rows[-1])
    with pytest.raises(train_gpt.RunError):
        study.read_documents(str(folder / "nothing"), "train", 5, 8)


def test_as_written(options):
    runs = study.list_written(options)
    assert list(runs) == [*study.WRITTEN, "transformer as published",
                          *(f"transformer, tuned, rate {rate:g}" for rate in study.RATES)]
    results = {name: runs[name]() for name in ("all lanes", "no context", "transformer as published")}
    assert all(0 < row["loss"] < 20 for row in results.values())
    assert results["all lanes"]["parameters"] > results["no context"]["parameters"]
    assert study.table_of_tier_1(results).count("\n") == 4


def test_training_learns(options):
    """A model of one document's bytes, which it sees again and again."""
    rows = study.read_documents(options.data, "train", 1, 16)
    config = study.config_of(options.data, 16, 32)
    with study.built("", config) as model:
        before = study.evaluate(model, rows, 4)
        study.train(model, rows, 40, 4, 1e-2, 4)
    assert study.evaluate(model, rows, 4) < 0.5 * before


def test_length(options):
    options.longest = 128
    runs = study.list_lengths(options)
    assert list(runs) == ["32 tokens", "64 tokens", "128 tokens"]
    results = {name: run() for name, run in runs.items()}
    rows = [row for result in results.values() for row in result["rows"]]
    assert {(row["T"], row["rows"]) for row in rows} == {(32, 4), (64, 2), (128, 1)} and len(rows) == 3 * 8
    kept = {(row["layer"], row["what"], row["T"]): row["kept"] for row in rows}
    assert kept["lanes", "forward + backward", 32] > 0
    # keys and values of 32 channels in float32, and the state, whose size is constant
    assert kept["softmax attention", "decode", 128] - kept["softmax attention", "decode", 64] >= 64 * 2 * 32 * 4
    assert kept["lanes", "decode", 128] == kept["lanes", "decode", 64] > 0
    assert "| 128 | 1 | softmax, dense mask | forward |" in study.table_of_tier_3(results)


def lane_model(options, variant: str, seed: int = 1) -> train_gpt.GPT:
    config = study.config_of(options.data, 32, 32, seed=seed, zero_init_projections=False)
    with study.built(variant, config) as model:
        torch.nn.init.normal_(model.head.projection.weight, std=0.05)   # it begins at 0
        return model.eval()


def test_a_new_lane_begins_without_influence_and_learns_alone(options):
    base = lane_model(options, f"wave_lanes:pack=block,lanes={study.LANES}")
    grown = lane_model(options, f"wave_lanes:pack=block,lanes={study.LANES},{study.NEW_LANE},recall_features=8,"
                                "widths=fixed", seed=2)
    count = study.add_lane(grown, base.state_dict())
    rows = study.read_documents(options.data, "train", 4, 32)
    with torch.no_grad():
        expected, found = base(rows[:, :-1]), grown(rows[:, :-1])
    assert (expected - found).norm() < 0.02 * expected.norm()       # its gate's weight is e^-6 / (3 + e^-6)

    before = {name: p.clone() for name, p in grown.named_parameters()}
    study.train(grown, rows, 3, 4, 1e-2, decay=0.0)
    changed = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lanes.recall." in name or ".gate." in name for name in changed)
    after = dict(grown.named_parameters())
    for gate in ("blocks.0.attention.gate.bias", "blocks.0.attention.gate.last.weight"):
        assert torch.equal(after[gate][:3], before[gate][:3]) and gate in changed
    rows_of_gates = sum(before[name][:3].numel() for name in changed if ".gate." in name)
    assert sum(before[name].numel() for name in changed) - rows_of_gates <= count


def test_low_rank_changes_begin_as_nothing_and_have_as_many_parameters(options):
    model = lane_model(options, f"wave_lanes:pack=block,lanes={study.LANES}")
    rows = study.read_documents(options.data, "train", 4, 32)
    with torch.no_grad():
        expected = model(rows[:, :-1])
        trained = study.add_low_rank(model, 4000)
        assert torch.equal(model(rows[:, :-1]), expected)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) and 2000 < trained < 6000
    study.train(model, rows, 2, 4, 1e-2)
    assert not torch.equal(model(rows[:, :-1]), expected)


def test_lanes_left_out(options):
    model = lane_model(options, f"wave_lanes:pack=block,lanes={study.LANES}")
    losses = study.measure_lanes_left_out(model, study.read_documents(options.data, "val", 8, 32), 4)
    assert list(losses) == ["all", "no poly", "no fourier", "no wavelet"] and len(set(losses.values())) == 4


def test_moved_letters():
    rows = torch.tensor([list(b"Hello, World 9")])
    assert bytes(study.move_letters(rows)[0].tolist()) == b"Uryyb, Jbeyq 9"
    assert torch.equal(study.move_letters(study.move_letters(rows)), rows)


def test_arms_are_variants():
    """Every arm of every tier is one that the loader and the trainer take."""
    config = train_gpt.make_config(dict(vocab_size=257))
    arms = {*study.WRITTEN.values(), *study.RECALL, *study.LAYERS.values()}
    arms |= {arm for _, compared in study.COMPARISONS.values() for arm in compared}
    for variant in arms - {"", "baseline"}:
        with variants.applied((variant,), config), torch.device("meta"):
            train_gpt.GPT(config)


def test_comparisons_are_command_lines(options):
    options.quick, options.sweep, options.seeds = False, "0.5,1,2", 6
    argv = study.comparison_arguments(options, "lanes")
    at = argv.index("--")
    assert argv[:2] == ["wave_lanes", "wave_lanes:lanes=fourier,wavelet"]
    assert argv[argv.index("--seeds") + 1] == "8" and argv[argv.index("--sweep") + 1] == "0.5,1,2"
    assert argv.index("--budget") < at < argv.index("--data")


# ---- Resumption -------------------------------------------------------------


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """command(*words) runs a command line whose tiers 1 and 4 have two runs each, which note that they ran."""
    ran = []

    def make(name, result):
        def run():
            ran.append(name)
            if name in failing:
                raise train_gpt.RunError("no luck")
            return dict(result)
        return run

    failing = set()
    losses = {"all lanes": dict(parameters=5, loss=1.0), "transformer, tuned, rate 0.001": dict(parameters=5, loss=0.9)}
    monkeypatch.setitem(study.LISTS, 1, lambda options: {name: make(name, row) for name, row in losses.items()})
    recalls = {f"4 pairs, baseline, seed {n}": dict(task="4 pairs", arm="baseline", seed=n, chance=0.1, accuracy=0.5)
               for n in (1, 2)}
    monkeypatch.setitem(study.LISTS, 4, lambda options: {name: make(name, row) for name, row in recalls.items()})
    output = tmp_path / "a.json"

    def run(*words):
        return study.main(["--data", str(folder), "--output", str(output), *words])
    run.ran, run.failing, run.output = ran, failing, output
    return run


def test_a_study_goes_on_where_it_stopped(command, capsys):
    command.failing.add("4 pairs, baseline, seed 2")
    assert command("--quick", "--tiers", "1,4") == 1 and "no luck" in capsys.readouterr().err
    assert command.ran == ["all lanes", "transformer, tuned, rate 0.001", "4 pairs, baseline, seed 1",
                           "4 pairs, baseline, seed 2"]
    command.ran.clear()
    command.failing.clear()
    assert command("--quick", "--tiers", "4,1", "--dry-run") == 0 and not command.ran
    text = capsys.readouterr().out
    assert "tier 1, as written: 2 runs, 0 to do" in text and "to do  4 pairs, baseline, seed 2" in text
    assert command("--quick", "--tiers", "1,4") == 0 and command.ran == ["4 pairs, baseline, seed 2"]
    results = json.loads(command.output.read_text())
    assert list(results["tiers"]) == ["1", "4"] and results["tiers"]["1"]["all lanes"]["seconds"] >= 0
    table = command.output.with_suffix(".md").read_text()
    assert "A quick run, which measures nothing." in table and "| 4 pairs | 0.100 | 0.500, 0.500 |" in table
    assert "0.7 x loss as written: all lanes 0.7000, tuned transformer 0.6300 | as written refuted |" in table


def test_other_options_are_not_mixed_in(command, capsys):
    assert command("--quick", "--tiers", "1") == 0
    assert command("--quick", "--tiers", "4", "--steps", "7") == 1
    assert "holds runs of other options; give the same, or another --output" in capsys.readouterr().err


# ---- Verdicts ---------------------------------------------------------------


def arm(name, loss, difference=None, interval=None, verdict=None, **more):
    return dict(arm=name, parameters=1000, loss=loss, n=6, ms_per_step=1.0, sweep=None, difference=difference,
                interval=interval, verdict=verdict) | more


def compared(**comparisons) -> dict:
    return {"2": {name: dict(arms=arms) for name, arms in comparisons.items()}}


@pytest.mark.parametrize("interval, verdict", [
    ((-0.02, 0.009), "confirmed"), ((0.011, 0.03), "refuted"), ((0.0, 0.02), "undecided"), (None, "undecided")])
def test_w1_at_equal_parameters(interval, verdict):
    arms = [arm("baseline", 1.5), arm("wave_lanes", 1.51, 0.01, interval, "worse"),
            arm("wave_lanes:lanes=fourier,wavelet,attention", 1.4, -0.1, (-0.2, -0.1), "better")]
    assert claims.judge_w1(compared(tokens=arms))[1] == f"at equal parameters {verdict}"
    assert claims.judge_w2(compared(tokens=arms)) == ("1.0067 times the transformer's loss", "confirmed")


@pytest.mark.parametrize("words, verdict", [
    (("worse", "worse", "worse"), "confirmed"), (("worse", "equivalent", "worse"), "refuted"),
    (("worse", "undecided", "worse"), "undecided"), (("worse", None, "worse"), "undecided")])
def test_w3_lanes_left_out(words, verdict):
    names = [f"wave_lanes:lanes={lanes}" for lanes in ("fourier,wavelet", "poly,wavelet", "poly,fourier")]
    arms = [arm("wave_lanes", 1.0), *(arm(name, 1.1, 0.1, (0.05, 0.15), word) for name, word in zip(names, words))]
    measured, found = claims.judge_w3(compared(lanes=arms))
    assert found == verdict and "+0.0500 to +0.1500" in measured
    assert claims.judge_w3(compared(lanes=arms[:3])) == claims.NOT_RUN


def lengths(lanes: float, attention: float, kept: float = 0.5) -> dict:
    """Tier 3 with these exponents from 512 to 16,384 tokens, equal times at 2,048, and a share of kept bytes."""
    tier = {}
    for T in (512, 1024, 2048, 4096, 8192, 16_384):
        rows = []
        for layer, power, bytes_kept in (("lanes", lanes, kept * T), ("softmax attention", attention, T)):
            for what in ("forward", "forward + backward", "decode"):
                count = 16_384 // T
                ms = (T / 2048) ** power * (count if what != "decode" else 1)
                rows.append(dict(T=T, rows=count, layer=layer, what=what, kept=bytes_kept, median=ms))
        tier[f"{T} tokens"] = dict(rows=rows)
    return {"3": tier}


@pytest.mark.parametrize("lanes, attention, verdict, word", [
    (1.0, 1.9, "confirmed", "faster from 4,096 tokens on"), (1.1, 1.9, "refuted", "exponent 1.100"),
    (1.0, 0.9, "refuted", "never faster")])
def test_w4_and_w5_lengths(lanes, attention, verdict, word):
    measured, found = claims.judge_w4(lengths(lanes, attention))
    assert found == verdict and word in measured
    assert claims.judge_w5(lengths(1.0, 2.0, 0.5))[1] == "confirmed"
    assert claims.judge_w5(lengths(1.0, 2.0, 0.9))[1] == "refuted"


@pytest.mark.parametrize("first, second, verdict", [
    (1.004, 1.4, "confirmed"), (1.006, 1.4, "refuted"), (1.004, 1.5, "refuted")])
def test_w6_a_lane_added(first, second, verdict):
    runs = {"before": dict(first=1.0, second=3.0), "new lane": dict(first=first, second=second),
            "all parameters": dict(first=2.0, second=1.0)}
    assert claims.judge_w6({"5": runs})[1] == verdict
    assert claims.judge_w6({"5": runs | {"all parameters": dict(first=1, second=3.5)}})[1] == "undecided"


def test_w9_needs_both_budgets_and_w10_tells_the_sweeps():
    name = "wave_lanes:lanes=fourier,wavelet,attention"
    sweep = dict(chosen=2, tries=[dict(factor=1, losses=[1.5]), dict(factor=2, losses=[1.4])])
    better, worse = (arm(name, 1.0, -0.1, (-0.2, -0.05), word, sweep=sweep) for word in ("better", "worse"))
    assert claims.judge_w9(compared(tokens=[better], time=[better]))[1] == "confirmed"
    assert claims.judge_w9(compared(tokens=[better], time=[worse]))[1] == "refuted"
    assert claims.judge_w9(compared(tokens=[better])) == claims.NOT_RUN
    assert claims.judge_w10(compared(tokens=[better])) == (f"{name}: 0.1000 nats by 2 rates", "documented")


def test_claims_without_results_were_not_run():
    rows = claims.judge_claims({})
    assert [row["claim"] for row in rows] == [f"W{n}" for n in range(1, 11)]
    assert {row["verdict"] for row in rows} == {"not run"}


def test_table_of_comparisons():
    arms = [arm("baseline", 1.5), arm("wave_lanes", 1.49, -0.01, (-0.02, 0.001), "undecided"),
            arm("broken", None, parameters=None, ms_per_step=None)]
    text = study.table_of_tier_2(dict(tokens=dict(arms=arms)))
    assert "| wave_lanes | 1,000 | 1.4900 | 6 | 1.0 | - | -0.0100 | -0.0200 to +0.0010 | undecided |" in text
    assert "| broken | 0 | - |" in text


@pytest.mark.slow
def test_all_tiers_from_beginning_to_end(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "COMPARISONS", {"tokens": ("tokens", study.CORRECTED[:2])})
    monkeypatch.setattr(study, "RECALL", study.RECALL[2:3])
    monkeypatch.setattr(study, "TASKS", {"4 pairs": (4, 4, 0)})
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "a.json"
    assert study.main(["--quick", "--data", str(folder), "--output", str(output), "--", "--val_tokens", "2048"]) == 0
    results = json.loads(output.read_text())
    assert list(results["tiers"]) == ["1", "2", "3", "4", "5"] and results["quick"]
    assert {"before", "new lane", "all parameters", "low rank"} <= set(results["tiers"]["5"])
    text = capsys.readouterr().out
    assert "Tier 5: lanes at run time" in text and "| W10 |" in text


def test_unknown_tiers(capsys):
    with pytest.raises(SystemExit):
        study.main(["--tiers", "1,6"])
    assert "tiers are 1, 2, 3, 4, 5; got 1,6" in capsys.readouterr().err
