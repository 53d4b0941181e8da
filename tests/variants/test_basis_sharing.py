"""basis_sharing: groups, first tensors, gradients of what layers share, rates."""

import gc
import weakref

import pytest
import torch

import train_gpt
import variants
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, stream_of
from variants.basis_sharing import BasisLinear
from variants.check import ALONE


def dense(layer: BasisLinear) -> torch.Tensor:
    return layer.columns @ layer.coefficients


def test_layers_of_a_group_share_their_columns():
    model = build("basis_sharing:rank=4,group=3")
    columns = [block.attention.k.columns for block in model.blocks]
    assert columns[0] is columns[1] is columns[2] and columns[3] is not columns[0]
    assert model.blocks[0].mlp.fc.columns is not columns[0]
    assert type(model.blocks[0].mlp.proj) is train_gpt.Linear
    names = [name for name, _ in model.named_parameters() if name.endswith("q.columns")]
    assert names == ["blocks.0.attention.q.columns", "blocks.3.attention.q.columns"]


def test_two_models_of_one_configuration_share_nothing():
    config = config_of()
    with variants.applied(("basis_sharing:rank=4", "swiglu_mlp"), config):
        first, second = train_gpt.GPT(config), train_gpt.GPT(config)
        few = train_gpt.GPT(config_of(layers=1))
    for model in (first, second):
        assert model.blocks[0].attention.q.columns is model.blocks[1].attention.q.columns
        # a layer's two matrices of one kind have two bases
        assert model.blocks[0].mlp.gate.columns is not model.blocks[0].mlp.fc.columns
        assert model.blocks[0].mlp.gate.columns is model.blocks[1].mlp.gate.columns
    groups = [{id(p) for p in model.parameters()} for model in (first, second, few)]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_a_model_is_freed():
    config = config_of()
    with variants.applied(("basis_sharing",), config):
        model = train_gpt.GPT(config)
        alive = weakref.ref(model.blocks[0].attention.q)
        del model
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize("options, std", [("group=2", None), ("style=published", 0.02)])
def test_begins_as_the_nearest_of_its_rank(options, std):
    model = build(f"basis_sharing:rank=5,{options}")
    layers = range(2) if std is None else range(4)
    starts = [train_gpt.draw_normal(f"blocks.{layer}.mlp.fc.weight", (64, 32), std or 0.5 * 32 ** -0.5, 1).double()
              for layer in layers]
    u = torch.linalg.svd(torch.cat(starts, 1))[0][:, :5]
    for layer, start in zip(layers, starts):
        assert relative_rms(dense(model.blocks[layer].mlp.fc), u @ u.T @ start) < 10 * float_bound(64, torch.float32)


def test_published_outputs_begin_at_zero_and_all_layers_share():
    model = build("basis_sharing:rank=4,style=published", config=config_of(zero_init_projections=True))
    assert len({id(block.mlp.proj.columns) for block in model.blocks}) == 1
    assert not model.blocks[2].attention.o.coefficients.any() and model.blocks[2].attention.o.columns.any()
    coefficients = model.blocks[0].attention.q.coefficients
    assert coefficients.optimizer == "adam"
    assert coefficients.lr_mul * model.config.lr_scalar == pytest.approx(0.04)


def test_full_rank_in_groups_of_one_is_dense():
    model, baseline = build("basis_sharing:rank=32,group=1,types=all"), build()
    for name, layer in model.named_modules():
        if isinstance(layer, BasisLinear) and min(layer.columns.shape[0], layer.coefficients.shape[1]) == 32:
            assert relative_rms(dense(layer), baseline.get_submodule(name).weight) < 10 * float_bound(32, torch.float32)


def test_gradient_of_the_columns_is_the_sum_over_layers():
    """The composite: dense matrices whose gradients go back through U C_i."""
    model, tokens = build("basis_sharing:rank=4,group=4"), random_tokens()
    stream_of(model, tokens).square().sum().backward()
    baseline = build()
    shared = {name: p for name, p in model.state_dict().items() if name in baseline.state_dict()}
    baseline.load_state_dict(shared, strict=False)
    layers = [(block.attention.v, composite.attention.v) for block, composite in zip(model.blocks, baseline.blocks)]
    for name, layer in model.named_modules():
        if isinstance(layer, BasisLinear):
            baseline.get_submodule(name).weight.data.copy_(dense(layer))
    stream_of(baseline, tokens).square().sum().backward()
    expected = sum(dense_layer.weight.grad @ layer.coefficients.T for layer, dense_layer in layers)
    assert relative_rms(layers[0][0].columns.grad, expected) < 100 * float_bound(64 * 4, torch.float64)


def test_rate_of_the_columns_is_divided_by_the_layers():
    config = config_of(layers=5)
    with variants.applied(("basis_sharing:group=2",), config):
        model = train_gpt.build_model(config, ALONE)
        muon, _ = train_gpt.build_optimizers(model, config, ALONE)
    rates = {name: bucket.lr / config.lr_matrix for bucket in muon.buckets for name in bucket.slices}
    assert rates["blocks.0.attention.q.columns"] == 0.5 and rates["blocks.4.attention.q.columns"] == 1
    assert rates["blocks.0.attention.q.coefficients"] == 1
