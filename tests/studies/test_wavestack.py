"""The study of wave lanes: its documents, one run of each kind, what is added to a trained model, its tables."""

import argparse
import json

import numpy as np
import pytest
import torch

import train_gpt
import variants
from data.shards import write_meta, write_shard
from studies import wavestack as study

END = 256
QUICK = {name: quick for name, (_, quick, _) in study.COUNTS.items()}


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
    return argparse.Namespace(**QUICK, data=str(folder), second="", quick=True, seconds=0.001, settings=[], output=None)


def test_a_row_is_one_document_and_pads(folder):
    rows = study.read_documents(str(folder), "train", 50, 32)
    assert rows.shape == (50, 33) and (rows[:, 0] == END).all()
    for row in rows.tolist():
        length = row.index(END, 1) if END in row[1:] else len(row)
        assert length >= 6 and all(token != END for token in row[1:length]) and set(row[length:]) <= {END}
    with pytest.raises(train_gpt.RunError):
        study.read_documents(str(folder / "nothing"), "train", 5, 8)


def test_as_written(options, monkeypatch):
    monkeypatch.setattr(study, "WRITTEN", {name: study.WRITTEN[name] for name in ("all lanes", "no context")})
    monkeypatch.setattr(study, "RATES", (1e-3,))
    kept = []
    results = study.run_as_written(options, kept.append)
    assert list(results) == ["all lanes", "no context", "transformer as published", "transformer, tuned, rate 0.0003",
                             "transformer, tuned, rate 0.001"]
    assert len(kept) == 5 and all(row["published"] == 0.7 * row["loss"] > 0 for row in results.values())
    assert results["all lanes"]["parameters"] > results["no context"]["parameters"]
    assert study.table_of_tier_1(results).count("\n") == 6


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
    results = study.run_length(options, lambda found: None)
    assert {row["T"] for row in results["rows"]} == {32, 64, 128}
    kept = {(row["layer"], row["T"]): row["kept"] for row in results["rows"]}
    assert kept["lanes", 32] > 0 and kept["softmax, dense mask", 128] > 0
    assert len(results["exponents"]) == 8 and "| lanes, forward |" in study.table_of_tier_3(results)


def lane_model(options, variant: str, seed: int = 1) -> train_gpt.GPT:
    config = study.config_of(options.data, 32, 32, seed=seed, zero_init_projections=False)
    with study.built(variant, config) as model:
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
    study.train(grown, rows, 3, 4, 1e-2)
    changed = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lanes.recall." in name or ".gate." in name for name in changed)
    assert sum(before[name].numel() for name in changed) <= count
    gate = "blocks.0.attention.gate.bias"
    assert torch.equal(dict(grown.named_parameters())[gate][:3], before[gate][:3]) and gate in changed


def test_low_rank_changes_begin_as_nothing_and_have_as_many_parameters(options):
    model = lane_model(options, f"wave_lanes:pack=block,lanes={study.LANES}")
    rows = study.read_documents(options.data, "train", 4, 32)
    with torch.no_grad():
        expected = model(rows[:, :-1])
        study.add_low_rank(model, 4000)
        assert torch.equal(model(rows[:, :-1]), expected)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 2000 < trained < 6000
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
    arms = {*study.WRITTEN.values(), *study.CORRECTED, *study.RECALL, *study.LAYERS.values()}
    for variant in arms - {"", "baseline"}:
        with variants.applied((variant,), config), torch.device("meta"):
            train_gpt.GPT(config)


def test_tables_of_comparisons_and_recall():
    difference = dict(difference=-0.01, low=-0.02, high=0.001, verdict="not distinguishable")
    arms = [dict(name="baseline", loss=dict(mean=1.5, n=3), vs_baseline=None),
            dict(name="wave_lanes", loss=dict(mean=1.49, n=3), vs_baseline=dict(loss=difference)),
            dict(name="broken", loss=None, vs_baseline=None)]
    text = study.table_of_tier_2(dict(tokens=dict(arms=arms)))
    assert "| tokens | wave_lanes | 1.4900 | 3 | -0.0100 | -0.0200 to +0.0010 | not distinguishable |" in text
    assert "broken" not in text
    text = study.table_of_tier_4({"4 pairs": dict(chance=0.0156, baseline=[0.99, 1.0])})
    assert "| 4 pairs | 0.016 | 0.990, 1.000 |" in text
    added = {"before": dict(parameters=0, first=1.0, second=3.0),
             "new lane": dict(parameters=9, first=1.004, second=1.4),
             "all parameters": dict(parameters=99, first=2.0, second=1.0)}
    text = study.table_of_tier_5(dict(dropped={"0.0": {"all": 1.0}}, added=added))
    assert text.endswith("The new lane has 80 % of the gain and loses 0.0040 nats of the first corpus.")


@pytest.mark.slow
def test_all_tiers_from_beginning_to_end(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "CORRECTED", study.CORRECTED[:2])
    monkeypatch.setattr(study, "RECALL", study.RECALL[2:3])
    monkeypatch.setattr(study, "TASKS", {"4 pairs": (4, 4, 0)})
    output = tmp_path / "a.json"
    assert study.main(["--quick", "--data", str(folder), "--output", str(output), "--", "--val_tokens", "2048"]) == 0
    results = json.loads(output.read_text())
    assert list(results["tiers"]) == ["1", "2", "3", "4", "5"] and results["quick"]
    assert set(results["tiers"]["5"]["added"]) == {"before", "new lane", "all parameters", "low rank"}
    assert "Tier 5: lanes at run time" in capsys.readouterr().out


def test_unknown_tiers(capsys):
    with pytest.raises(SystemExit):
        study.main(["--tiers", "1,6"])
    assert "tiers are 1, 2, 3, 4, 5; got 1,6" in capsys.readouterr().err
