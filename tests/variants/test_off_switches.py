"""Variants of the parameter-golf study of size zero are the baseline, bit for bit, and say in a line what is bad."""

import pytest
import torch

import train_gpt
import variants
from tests.models import config_of
from train_gpt import RunError
from variants import check

OFF = ("low_rank:rank=0", "depth_recurrence:times=1", "latent_attention:latent=0", "pause_tokens:num=0",
       "basis_sharing:rank=0", "tensor_train:rank=0", "universal_transformer:t_max=1", "hypernetwork:hidden=0",
       "hopfield:steps=0", "communicating_agents:message=0", "cellular_automaton:steps=0", "siren_weights:hidden=0",
       "seed_model:dim=0")
CONFIG = config_of(zero_init_projections=True, steps=4)

BAD = {
    "low_rank:rank=33": "rank 33 is above the sides of the q matrix, 32 x 32; give at most 32",
    "low_rank:rank=-2": "rank=-2 is out of range",
    "depth_recurrence:looped=4": "looped=4 goes beyond the model, which has the layers 0-3",
    "depth_recurrence:looped=0,2": "looped=0,2 has a gap",
    "depth_recurrence:looped=1,1": "looped=1,1 names a layer twice",
    "depth_recurrence:start=1": "start=1.0 is out of range",
    "latent_attention:latent=33": "latent=33 is wider than its input, 32",
    "pause_tokens:fraction=0": "fraction=0.0 is out of range",
    "basis_sharing:rank=40": "rank=40 is above what the q matrices 32 x 32 of 2 layers can have; give at most 32",
    "tensor_train:factors_in=5,7": "factors_in=5,7 do not multiply to the width 32",
    "tensor_train:factors_out=8,8,8": "factors_out=8,8,8 are not two factors",
    "tensor_train:rank=100": "is above what cores of the fc matrix 64 x 32 can have",
    "universal_transformer:t_max=0": "t_max=0 is out of range",
    "hypernetwork:rank=0": "rank=0 is not positive",
    "hopfield:gate=2": "gate=2.0 is out of range",
    "communicating_agents:message=64": "message=64 is wider than the stream, 32",
    "communicating_agents:at_layer=4": "at_layer=4 has no layers on one side",
    "cellular_automaton:p=0": "p=0.0 is no probability above 0",
    "siren_weights:depth=1": "depth=1",
    "seed_model:dim=-1": "dim=-1 is out of range",
}


def train(*specs: str) -> tuple[float, dict]:
    """(the loss, the parameters) after two steps."""
    with variants.applied(specs, CONFIG):
        model = check.build(CONFIG)
        optimizers = train_gpt.build_optimizers(model, CONFIG, check.ALONE)
        rows = check.random_rows(CONFIG, 3)
        for step in range(2):
            check.take_step(model, optimizers, rows, step / 4)
        return model.eval()(rows[:, :-1], rows[:, 1:]).item(), model.state_dict()


@pytest.fixture(scope="module")
def baseline():
    return train()


@pytest.mark.parametrize("spec", OFF)
def test_off_is_the_baseline(spec, baseline):
    (loss, state), (expected, expected_state) = train(spec), baseline
    assert loss == expected
    assert list(state) == list(expected_state)
    assert all(map(torch.equal, state.values(), expected_state.values()))


@pytest.mark.parametrize("spec", BAD)
def test_bad_sizes_are_one_line(spec):
    with pytest.raises(RunError, match=BAD[spec]) as error:
        with variants.applied((spec,), CONFIG), torch.device("meta"):
            train_gpt.GPT(CONFIG)
    assert "\n" not in str(error.value) and spec.partition(":")[0] in str(error.value)


def test_low_rank_composes_with_recurrence():
    specs = "low_rank:rank=4", "depth_recurrence:looped=1,2,start=0"
    with variants.applied(specs, CONFIG) as changed:
        model = check.build(CONFIG)
        rows = check.random_rows(CONFIG, 2)
        model(rows[:, :-1], rows[:, 1:]).backward()
    assert set(changed) == set(specs) and model.blocks[1].mlp.fc.down.shape == (4, 32)
    assert [layer for layer, _ in model.passes] == [0, 1, 2, 1, 2, 3]


def test_a_source_says_that_nothing_is_left_to_make():
    config = config_of(variant=("low_rank", "seed_model"))
    with pytest.raises(RunError, match="variants low_rank, seed_model: no matrix of the trainer's Linear is left"):
        with variants.applied(config.variant, config):
            train_gpt.GPT(config)
