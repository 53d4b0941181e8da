"""What studies share of their comparisons: arms, cells, rows, plans, the picture."""

import argparse

import pytest

from studies import comparisons as shared
from train_gpt import RunError


def row(difference=None, low=None, high=None, verdict=None, **more):
    return dict(arm="x", parameters=1000, in_blocks=900, steps=4, ms_per_step=50.0, loss=2.0, losses=[[1, 2.0]],
                sweep=None, difference=difference, low=low, high=high, n=1, p=None, p_holm=None, verdict=verdict,
                faults=[], errors=[]) | more


def test_a_variant_joins_an_arm():
    assert shared.with_variant("baseline", "data_order") == "data_order"
    assert shared.with_variant("baseline --lr_matrix 0.02", "data_order") == "data_order --lr_matrix 0.02"
    assert shared.with_variant("low_rank:rank=4 --layers 2", "data_order") == "data_order+low_rank:rank=4 --layers 2"


def test_arms_are_chosen_in_the_tables_order():
    arms = dict(baseline="baseline", a="x", b="y")
    assert shared.choose_arms(arms, []) == arms
    assert list(shared.choose_arms(arms, ["b"])) == ["baseline", "b"]
    with pytest.raises(RunError, match="there is no arm 'c'; choose from baseline, a, b"):
        shared.choose_arms(arms, ["c"])


def test_cells_and_lengths():
    assert shared.cell(None, "{:.2f}") == "-" and shared.cell(0.0, "{:.2f}") == "0.00"
    assert shared.interval_of(row()) == "-" and shared.interval_of(row(0.1, -0.1, 0.3)) == "-0.1000 to +0.3000"
    assert shared.mean_of(None) is None and shared.mean_of(dict(mean=2.0)) == 2
    assert shared.length_options(9) == ["--steps", "9", "--val_every", "9"]
    assert shared.length_options(9, 3)[-1] == "3"
    for steps in (0, 10 ** 10):
        with pytest.raises(RunError, match="--steps must be from 1 to"):
            shared.check_steps(steps)


def test_rows_of_results():
    test = dict(difference=-0.1, low=-0.2, high=-0.01, n=2, p=0.03, p_holm=0.03, verdict="too few pairs", sd=0.1)
    arm = dict(parameters=10, parameters_without_embeddings=8, steps=4, ms_per_step=dict(mean=2.5), loss=dict(mean=1.5),
               faults=[], errors=[], runs=[dict(seed=1, val_loss=1.5), dict(seed=2, error="made up")])
    results = dict(settings=dict(sweep=None), arms=[arm | dict(name="baseline", vs_baseline=None),
                                                    arm | dict(name="low_rank", vs_baseline=dict(loss=test))])
    rows = shared.rows_of(results, dict(baseline="baseline", low_rank="rank"))
    assert list(rows) == ["baseline", "rank"] and rows["baseline"]["difference"] is None
    assert rows["rank"] == row(-0.1, -0.2, -0.01, "too few pairs", arm="low_rank", parameters=10, in_blocks=8,
                               ms_per_step=2.5, loss=1.5, losses=[[1, 1.5]], n=2, p=0.03, p_holm=0.03)


def test_tables_mark_what_is_not_sound_and_list_what_failed():
    conditions = dict(first=dict(baseline=row(), a=row(0.1, 0.05, 0.15, "worse", faults=["looks ahead"])),
                      second=dict(a=row(loss=None, errors=["seed 1: made up"])))
    lines = shared.table_of(conditions, "corpus").splitlines()
    assert len(lines) == 5 and lines[0].startswith("| corpus | arm |")
    assert "| first | a (not sound) | 1,000 | 50 | 2.0000 | +0.1000 | +0.0500 to +0.1500 | worse | - | 1 |" in lines
    assert "| second | a | 1,000 | 50 | - | - | - | - | - | 1 |" in lines
    assert shared.errors_of(conditions) == "Runs without a result:\n- second, a: seed 1: made up"
    assert shared.errors_of(dict(first=dict(baseline=row()))) == ""


def test_picture_of_made_up_differences(tmp_path):
    rows = dict(baseline=row(), a=row(0.1, 0.05, 0.15, "worse"), b=row(-0.1, None, None, "too few pairs"),
                c=row(-0.05, -0.06, -0.04, "better"))
    shared.draw_differences(tmp_path / "three.png", dict(one=rows, two=rows, three=dict(c=rows["c"])), "nats")
    shared.draw_differences(tmp_path / "none.png", dict(one=dict(baseline=row())), "nats")
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("three", "none")]
    assert sizes[0] > 10_000 > sizes[1] > 1000


def test_conditions_are_compared_in_turn_or_shown(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(shared, "run_comparison", lambda argv: (f"comparison {argv}", dict(of=argv)))
    monkeypatch.setattr(shared, "plan_comparison", lambda argv: argv)
    monkeypatch.setattr(shared, "show_plan", lambda comparison, title, jobs: dict(a=7200.0, b=None)[title])
    options = argparse.Namespace(dry_run=False, jobs=2)
    shared.compare_conditions(dict(a="1", b="2"), options, lambda *arguments: called.append(arguments))
    assert called == [("a", "comparison 1", dict(of="1")), ("b", "comparison 2", dict(of="2"))]
    capsys.readouterr()

    # the time of all is said where that of each is known
    options.dry_run = True
    shared.compare_conditions(dict(a="1"), options, None)
    assert capsys.readouterr().out == "all: expected time 1:00 h\n"
    shared.compare_conditions(dict(a="1", b="2"), options, None)
    assert capsys.readouterr().out == "" and len(called) == 2
