"""
Trials: a small model learns what it can, and stops there; equal trials have equal results; variants have their say;
arms that fail are one line. The slow test holds what is known of attention.
"""

import importlib
import sys
from dataclasses import replace

import pytest
import torch

import train_gpt
import variants
from compare import parse_arm
from tasks.recall import Recall
from tasks.state_tracking import StateTracking
from tasks.trials import SIZE, THRESHOLD, Learner, Trial, run_trial
from train_gpt import RunError

TINY = "--model_dim 16 --heads 2 --head_dim 8 --mlp_hidden 16"
SAME_VALUE = Recall(1, 2, 2, 1)     # the answer is the token before the last
PARITY = StateTracking("parity", 4, 9)


def arm_of(text):
    return parse_arm(text, 0, 0, 1, SIZE)


def trial_of(skill=PARITY, text=f"baseline {TINY}", **settings):
    return Trial(arm_of(text), skill, **(dict(factor=1.0, seed=1, steps=2, rows=8, every=1, marked=8) | settings))


def test_an_easy_skill_is_learnt_and_ends_the_trial():
    result = run_trial(trial_of(SAME_VALUE, steps=300, rows=16, every=10, marked=64))
    assert result["accuracy"][0] >= THRESHOLD
    assert 10 <= result["steps"] < 300 and result["steps"] % 10 == 0 and result["seconds"] > 0


def test_equal_trials_have_equal_results():
    first, again, other = (run_trial(trial_of(marked=64, seed=seed))["accuracy"] for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 2  # at both lengths


def test_the_configuration_is_the_skills():
    config = trial_of(text=f"swiglu_mlp {TINY} --lr_head 0.5", factor=0.5, seed=7, steps=9).config()
    assert (config.vocab_size, config.end_of_text, config.sequence_length, config.steps, config.seed) == (3, 2, 9, 9, 7)
    assert (config.lr_head, config.lr_matrix) == (0.25, 0.5 * train_gpt.Config.lr_matrix)
    assert config.variant == ("swiglu_mlp",) and config.model_dim == 16 and config.layers == 2
    assert config.batch_tokens == 8 * 9


def test_gradients_are_treated_and_rates_scheduled(monkeypatch):
    """Without gradients, or at the rate zero, no parameter moves; otherwise all matrices do that have a gradient."""
    trial = trial_of()
    config = trial.config()

    def moved():
        learner = Learner(trial, config)
        before = [p.detach().clone() for p in learner.model.parameters()]
        learner.train_step(0)
        return sum(not torch.equal(p, old) for p, old in zip(learner.model.parameters(), before))

    def clear(optimizers, *_):
        for optimizer in optimizers:
            for bucket in optimizer.buckets:
                bucket.grad.zero_()

    assert moved() > 0
    monkeypatch.setattr(train_gpt, "schedule_learning_rate", lambda config, progress: 0.0)
    assert moved() == 0
    monkeypatch.undo()
    monkeypatch.setattr(train_gpt, "treat_gradients", clear)
    assert moved() == 0


def test_marks_see_the_average_of_weights():
    """With an average of the weights before the first step alone, a model is marked as it began."""
    class First:
        def __init__(self, model):
            self.model = model
            self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def update(self, progress):
            pass

        def applied(self):
            return swapped(self.model, self.tensors)

    from contextlib import contextmanager

    @contextmanager
    def swapped(model, tensors):
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(tensors)
        yield
        model.load_state_dict(own)

    trial = trial_of(SAME_VALUE, steps=60, rows=16, marked=64)
    learner, still = Learner(trial, trial.config()), Learner(trial, trial.config())
    learner.average = First(learner.model)
    for step in range(60):
        learner.train_step(step)
    assert learner.mark() == still.mark()
    learner.average = None
    assert learner.mark()[0] > still.mark()[0]


@pytest.mark.parametrize("text", ["hypernetwork", "gradient_clipping+weight_average", "forgetting_attention"])
def test_variants_of_every_kind_take_part(text):
    """One that makes weights, some around the optimizer, one in place of attention: none is without effect."""
    trial = trial_of(text=f"{text} --model_dim 32 --heads 2 --head_dim 16 --mlp_hidden 32", steps=3)
    config = trial.config()
    names = {}
    for specs in ((), config.variant):
        with variants.applied(specs, config):
            learner = Learner(replace(trial, factor=1.0), config)
            learner.train_step(0)
            names[specs] = (set(learner.model.state_dict()), train_gpt.treat_gradients, type(learner.average))
            assert all(0 <= share <= 1 for share in learner.mark())
    assert names[()] != names[config.variant]


BROKEN = '''
"""Broken. Source: none. Status: none"""
from dataclasses import dataclass
import train_gpt

@dataclass
class Options:
    pass

class Broken(train_gpt.MLP):
    def forward(self, x):
        return x.no_such_method()

def patch(options):
    train_gpt.MLP = Broken
'''


def test_a_variant_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_mlp.py").write_text(BROKEN)
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        with pytest.raises(RunError, match=r"arm 'broken_mlp': variant broken_mlp: AttributeError: .*line 12\)$"):
            run_trial(trial_of(text="broken_mlp"))
    finally:
        sys.modules.pop("variants.broken_mlp", None)
        vars(variants).pop("broken_mlp", None)


@pytest.mark.slow
def test_what_is_known_of_attention():
    """
    Softmax attention learns recall of 4 pairs, and of parity nothing that goes on behind its training rows; a gated
    average, which has no way to ask for a key, does not learn recall of 16.
    """
    def accuracy(text, skill, steps):
        return run_trial(Trial(arm_of(text), skill, 1.0, 1, steps))["accuracy"]

    assert accuracy("baseline", Recall(4, 64, 64, 4), 400)[0] >= THRESHOLD
    assert accuracy("baseline", StateTracking("parity"), 400)[1] < 0.6
    # who knows a document's values and which are still to come, but not their keys: H_16 / 16 = 0.21
    assert accuracy("topological_attention:preset=key_only", Recall(16, 64, 64, 16), 400)[0] < 0.3
