"""
The skills card: what it counts, what is kept and taken up again, the table, checkpoints as arms, and bad input.
"""

import json

import pytest

import train_gpt
import variants
from records.statistics import wilson
from tasks import skills
from tasks.recall import Recall
from tasks.skills import describe_arm, format_table, make_arm, read_runs, summarize
from tasks.state_tracking import StateTracking
from train_gpt import Config, RunError, make_config

TINY = "baseline --model_dim 16 --heads 2 --head_dim 8 --mlp_hidden 16"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Cards of two skills, two rates and one seed, whose runs have two steps; the folder to keep runs in."""
    monkeypatch.setattr(skills, "list_skills", lambda full: {
        "recall, 2 pairs": Recall(2, 4, 4, 2), "parity": StateTracking("parity", 3, 6)})
    monkeypatch.setattr(skills, "FACTORS", (0.5, 1.0))
    monkeypatch.setattr(skills, "QUICK", dict(seeds=1, steps=2))
    return tmp_path / "runs"


def card_of(capsys, folder, text=TINY, *options):
    """(the card, lines of progress) of a call."""
    code = skills.main([text, "--json", "--jobs", "1", "-o", str(folder), *options])
    out, progress = capsys.readouterr()
    assert code == 0, progress
    return json.loads(out), progress.splitlines()


# ---- Runs


def test_runs_are_kept_and_taken_up(small, capsys, monkeypatch):
    # stopped in the midst
    run, calls = skills.run_trial, []

    def stop_at_third(trial):
        calls.append(trial)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(trial)

    monkeypatch.setattr(skills, "run_trial", stop_at_third)
    assert skills.main([TINY, "--jobs", "1", "-o", str(small)]) == 130
    assert "interrupted; finished runs are kept" in capsys.readouterr().err
    file, = small.glob("*.jsonl")
    assert len(read_runs(file)) == 2

    # a line that was cut off is trained again, and goes on a line of its own
    file.write_bytes(file.read_bytes()[:-9])
    assert len(read_runs(file)) == 1
    calls.clear()
    monkeypatch.setattr(skills, "run_trial", lambda trial: calls.append(trial) or run(trial))
    first, progress = card_of(capsys, small)
    assert len(calls) == 3 and len(read_runs(file)) == 4
    assert [line.split(" ")[0] for line in progress] == ["1/3", "2/3", "3/3"]
    assert progress[-1].startswith("3/3 parity, learning rates x 1, seed 1: accuracy 0.")

    # a complete card is printed at once; other settings are other runs
    again, progress = card_of(capsys, small)
    assert again == first and not progress and len(calls) == 3
    card_of(capsys, small, f"{TINY} --no-smear")
    assert len(calls) == 7


def test_what_decides_a_result_is_in_its_key(small, monkeypatch):
    arm = make_arm(TINY)
    trials = [trial for some in skills.list_trials(arm, False).values() for trial in some]
    keys = [skills.key_of(trial) for trial in trials]
    assert len(set(keys)) == 4 and keys == [skills.key_of(trial) for trial in trials]
    assert skills.key_of(skills.list_trials(make_arm(f"{TINY} --no-smear"), False)["parity"][0]) not in keys
    monkeypatch.setattr(skills, "sources_of", lambda *_: {"train_gpt.py": "another"})
    assert skills.key_of(trials[0]) not in keys


def test_a_file_that_an_option_names_may_change(small, capsys, monkeypatch):
    """Its content is in no key, so its runs are trained every time."""
    monkeypatch.setattr(skills, "names_a_file", lambda config: True)
    assert len(card_of(capsys, small)[1]) == 4 == len(card_of(capsys, small)[1])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(small, capsys, monkeypatch):
    monkeypatch.setattr(skills, "count_cores", lambda: 2)
    one, _ = card_of(capsys, small / "one")
    two, _ = card_of(capsys, small / "two", TINY, "--jobs", "2")
    assert one == two


# ---- The table


def test_rows_of_a_card(small):
    plan = skills.list_trials(make_arm("baseline"), False)
    results = {"recall, 2 pairs": [dict(accuracy=[0.95], steps=50), dict(accuracy=[0.2], steps=400)],
               "parity": [dict(accuracy=[1.0, 0.5], steps=400), dict(accuracy=[0.96, 0.949], steps=400)]}
    rows = summarize(plan, results)
    assert [(row["skill"], row["trained_on"], row["length"], row["learnt"], row["runs"]) for row in rows] == [
        ("recall, 2 pairs", 8, 8, 1, 2), ("parity", 3, 3, 2, 2), ("parity", 3, 6, 0, 2)]
    for row in rows:
        assert (row["low"], row["high"]) == wilson(row["learnt"], 2) and row["share"] == row["learnt"] / 2
    assert (rows[0]["best"], rows[0]["median"], rows[0]["chance"], rows[0]["steps"]) == (0.95, 0.575, 0.25, 225)
    assert (rows[2]["best"], rows[2]["chance"]) == (0.949, 0.5)

    lines = format_table(rows).splitlines()
    assert lines[0].split() == "skill tokens learnt P(learnt) 95 % best median chance steps".split()
    assert lines[1].split("  ")[0] == "recall, 2 pairs" and "1 of 2  0.50" in lines[1]
    assert "3 -> 6" in lines[3] and "0 of 2  0.00       0.00 to 0.66  0.949" in lines[3]


def test_a_card_for_people(small, capsys):
    assert skills.main([TINY, "--jobs", "1", "-o", str(small)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{TINY}: skills of a small model"
    assert lines[1] == ("learnt: accuracy of at least 0.95; runs: learning rates x 0.5, 1, and seeds; a run ends when "
                        "it has learnt")
    assert len(lines) == 7 and lines[-1] == ""


def test_the_two_presets():
    quick, full = (skills.list_trials(make_arm("baseline"), full) for full in (False, True))
    assert [name for name in full if name not in quick] == ["recall, 32 pairs"]
    assert {len(some) for some in quick.values()} == {6} and {len(some) for some in full.values()} == {15}
    tried = {(trial.factor, trial.seed) for trial in full["S5"]}
    assert tried == {(factor, seed) for factor in (0.3, 1.0, 3.0) for seed in range(1, 6)}


# ---- Checkpoints


def test_a_checkpoint_as_an_arm():
    config = make_config(dict(track="cpu", vocab_size=257))
    assert describe_arm(config) == ("baseline --layers 4 --heads 2 --head_dim 32 --attention_scale 0.25")
    config = make_config(dict(track="golf_cpu", layers=9, variant=("swiglu_mlp:layers=0-1", "weight_average"),
                              vocab_size=257))
    text = describe_arm(config)
    assert text.startswith("swiglu_mlp:layers=0-1+weight_average --layers 4 --model_dim 48 --heads 2 --head_dim 24 "
                           "--kv_heads 1 --mlp_hidden 96 --rope full ")
    arm = make_arm(text)
    built = skills.list_trials(arm, False)["parity"][1].config()  # its learning rates times 1
    kept = skills.settings_of(("model", "optimizer")) - skills.SIZES
    assert len(kept) > 20 and all(getattr(built, name) == getattr(config, name) for name in kept)


def test_a_card_of_a_checkpoint(small, capsys, tmp_path):
    """Its weights answer the probes, its settings make the arm; rows that are too long for it are no probe."""
    config = make_config(dict(track="cpu", vocab_size=257, layers=2, model_dim=16, heads=2, head_dim=8, mlp_hidden=16,
                              value_embeddings=0, sequence_length=100, batch_tokens=100, variant=("swiglu_mlp",),
                              device="cpu"))
    with variants.applied(config.variant, config):
        model = train_gpt.build_model(config, train_gpt.Ranks.start(config))
    model.head.projection.weight.data.zero_()
    saved = dict(config=vars(config), model=model.state_dict())
    probes = skills.probe(saved, config)
    assert [result["name"] for result in probes] == ["recall digits"]
    assert probes[0]["accuracy"] == 0.0 and probes[0]["chance"] == 0.1  # it always says byte 0
    longer = Config(**vars(config) | dict(sequence_length=128))
    assert [result["name"] for result in skills.probe(saved, longer)] == ["copy a word", "recall digits"]
    other = Config(**vars(config) | dict(vocab_size=258))
    assert skills.probe(saved, other) == []


def test_a_checkpoint_from_its_file(small, capsys, tmp_path, monkeypatch):
    config = make_config(dict(track="cpu", vocab_size=20, device="cpu"))
    file = tmp_path / "a.pt"
    file.write_bytes(b"")
    monkeypatch.setattr(skills, "read_checkpoint", lambda path: dict(config=vars(config)))
    monkeypatch.setattr(skills, "describe_arm", lambda config: TINY)
    card, _ = card_of(capsys, small, str(file))
    assert (card["name"], card["arm"], card["probes"]) == (str(file), TINY, [])
    assert card["rows"] == card_of(capsys, small)[0]["rows"]


# ---- Bad input


@pytest.mark.parametrize("argv, message", [
    ([], "the following arguments are required: ARM_OR_CHECKPOINT; see --help"),
    (["swiglu"], "arm 'swiglu': unknown variant 'swiglu'; there are "),
    (["--heads 3"], "arm '--heads 3' does not begin with a name"),
    (["baseline --steps 3"], "arm 'baseline --steps 3': --steps has no place on a skills card; give options of the "),
    (["baseline --no-save"], "arm 'baseline --no-save': --save is set for every run; leave it out"),
    (["baseline --data=x"], "arm 'baseline --data=x': --data=x has no place on a skills card"),
    (["baseline --head_dim 3"], "arm 'baseline --head_dim 3': --head_dim 3 is not a multiple of 4"),
    (["baseline", "--jobs", "0"], "--jobs must be from 1 to "),
    (["no/such/file.pt"], "there is no checkpoint "),
])
def test_faults(argv, message, capsys):
    assert skills.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("skills.py: error: ") and message in error and error.count("\n") == 1


def test_an_arm_that_fails_ends_the_card(small, capsys, monkeypatch):
    def fail(trial):
        raise RunError("arm 'x': variant x: no")

    monkeypatch.setattr(skills, "run_trial", fail)
    assert skills.main([TINY, "--jobs", "1", "-o", str(small)]) == 1
    assert capsys.readouterr().err == "skills.py: error: arm 'x': variant x: no\n"
