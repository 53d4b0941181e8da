"""
The thirty runs of parameter-golf's pull request 1589: the parameters of each at its published shape, and its loss
before the first step. The slow test builds every model, with a smaller generator where one writes all matrices.
"""

import math

import pytest
import torch

import train_gpt
import variants
from tests.models import random_tokens
from variants import check

# three plain blocks, and one block
PLAIN = dict(layers=3, model_dim=128, heads=4, head_dim=32, mlp_hidden=256, kv_heads=0, x0_skip=False,
             unet_skips=False, channel_scales=False)
ONE = dict(layers=1, unet_skips=False)
D768 = dict(model_dim=768, head_dim=96, mlp_hidden=1536)
D1024 = dict(model_dim=1024, head_dim=128, mlp_hidden=2048)
RECURRENCE = "depth_recurrence:looped=3,4,style=published"
SIREN = dict(x0_skip=False, unet_skips=False, zero_init_projections=False)

# name -> (variants, what else differs from the track golf, parameters that are learned)
PRESETS = {
    "baseline": ((), {}, 17_059_912),
    "mla_l64": (("latent_attention:latent=64,style=published",), {}, 15_290_440),
    "mla_l128": (("latent_attention:latent=128,style=published",), {}, 15_880_264),
    "recur_34x2": ((RECURRENCE,), {}, 17_060_424),
    "recur_345x2": (("depth_recurrence:looped=3,4,5,style=published",), {}, 17_060_936),
    "recur_34x3": (("depth_recurrence:looped=3,4,times=3,style=published",), {}, 17_060_936),
    "pause_4x64": (("pause_tokens:num=4,every=64,style=published",), {}, 17_061_960),
    "pause_8x32": (("pause_tokens:num=8,every=32,style=published",), {}, 17_064_008),
    "eigen_r64": (("low_rank:rank=64,style=published",), {}, 4_382_152),
    "eigen_r128": (("low_rank:rank=128,style=published",), {}, 8_219_464),
    "eigen_r256": (("low_rank:rank=256,style=published",), {}, 15_894_088),
    "eigen2_a32m96": (("low_rank:attn_rank=32,mlp_rank=96,style=published",), {}, 4_234_120),
    "eigen2_a96m32": (("low_rank:attn_rank=96,mlp_rank=32,style=published",), {}, 4_530_184),
    "eigen2_a128m32": (("low_rank:attn_rank=128,mlp_rank=32,style=published",), {}, 5_563_528),
    "eigen2_d1024_r64": (("low_rank:rank=64,style=published",), D1024, 8_760_776),
    "eigen2_d768_r48": (("low_rank:rank=48,style=published",), D768, 5_132_904),
    "eigen2_d1024_r32": (("low_rank:rank=32,style=published",), D1024, 4_925_192),
    "eigen2_r128_rec34": (("low_rank:rank=128,style=published", RECURRENCE), {}, 8_219_976),
    "eigen2_a96m48_rec34": (("low_rank:attn_rank=96,mlp_rank=48,style=published", RECURRENCE), {}, 4_973_352),
    "basis_r64": (("basis_sharing:rank=64,style=published",), {}, 2_805_832),
    "basis_r128": (("basis_sharing:rank=128,style=published",), {}, 5_066_824),
    "ut_act12": (("universal_transformer:t_max=12,halt_bias=-3,style=published",), ONE, 2_361_865),
    "ut_act20": (("universal_transformer:t_max=20,halt_bias=-3,style=published",), ONE, 2_361_865),
    "hyper_r32": (("hypernetwork:z_dim=64,hidden=512,rank=32,style=published",), {}, 110_106_248),
    "attractor_128": (("hopfield:style=published",), PLAIN, 638_978),
    "agents_m64": (("communicating_agents:message=64,style=published",), PLAIN, 1_269_760),
    "nca_s50": (("cellular_automaton:steps=50,hidden=128,style=published",), {}, 24_832),
    "siren_h256": (("siren_weights:hidden=256,style=published",), SIREN, 135_041 + 533_576),
    "seed_2048": (("seed_model:dim=2048,style=published",), {}, 546_888),
    "mps_b64": (("tensor_train:bond=64,pos_dim=32,style=published",), {}, 4_238_720),
}
# smaller generators that write matrices of the same deviations: the automaton's rule begins at zero
SMALLER = {
    "hyper_r32": ("hypernetwork:z_dim=64,hidden=16,rank=32,style=published",),
    "nca_s50": ("cellular_automaton:steps=1,hidden=8,style=published",),
    "siren_h256": ("siren_weights:hidden=16,style=published",),
    "seed_2048": ("seed_model:dim=16,style=published",),
}
# The automaton writes an embedding of deviation 0.02, the train of matrices logits of deviation 8. Where the head is
# the embedding a token's logit of itself begins at 0.005 model_dim: at 1,024 channels it is e^5.1 times as likely.
FAR_FROM_GUESSING = {"nca_s50": 0.05, "mps_b64": 5.0, "eigen2_d1024_r64": 0.05, "eigen2_d1024_r32": 0.05}


def config_of(name: str) -> train_gpt.Config:
    return train_gpt.make_config(train_gpt.TRACKS["golf"] | dict(vocab_size=1024) | PRESETS[name][1])


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name):
    config = config_of(name)
    with variants.applied(PRESETS[name][0], config), torch.device("meta"):
        model = train_gpt.GPT(config)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name][2]


def test_cells_write_the_whole_model():
    with variants.applied(PRESETS["nca_s50"][0], config_of("nca_s50")), torch.device("meta"):
        source = train_gpt.GPT(config_of("nca_s50")).source
    assert sum(shape.numel() for shape in source.shapes.values()) == PRESETS["baseline"][2]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_loss_before_the_first_step(name):
    config = config_of(name)
    with variants.applied(SMALLER.get(name, PRESETS[name][0]), config):
        model = train_gpt.build_model(config, check.ALONE).eval()
        tokens = random_tokens(2, 129)
        with torch.no_grad():
            excess = model(tokens[:, :-1], tokens[:, 1:]).item() - math.log(1024)
    if name in FAR_FROM_GUESSING:
        assert excess > FAR_FROM_GUESSING[name]
    else:
        assert abs(excess) < 0.05
