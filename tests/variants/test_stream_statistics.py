"""Stream statistics: what is noted of a stream is what its definition says, and a compiled run stays as it is."""

import json

import numpy as np
import pytest
import torch

import train_gpt
import variants
from data.shards import write_meta, write_shard
from tests.errors import float_bound
from train_gpt import Ranks, make_config
from variants import stream_statistics

TINY = dict(
    vocab_size=257, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=32, batch_tokens=256,
    micro_batch_tokens=64, steps=8, val_tokens=640, val_every=4, device="cpu",
)


def tiny_model():
    model = train_gpt.build_model(make_config(TINY), Ranks(0, 1, torch.device("cpu"), torch.float32))
    model.set_windows(1.0)
    return model


def tiny_tokens():
    return torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def streams_of(model, tokens) -> dict:
    """Each residual's input, branch output and output in float64, by its name, in the order of depth."""
    seen, hooks = {}, []
    for layer, block in enumerate(model.blocks):
        for kind in ("attention", "mlp"):
            def keep(module, inputs, z, name=f"blocks.{layer}.{kind}_residual"):
                seen[name] = [t.double() for t in (*inputs, z)]

            hooks.append(getattr(block, f"{kind}_residual").register_forward_hook(keep))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def expected_statistics(x, y, z) -> dict:
    """By other formulas than the variant's."""
    along = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x
    deviation = x - x.mean(-1, keepdim=True)

    def share(component):
        return ((component * component).sum(-1) / (y * y).sum(-1)).mean().item()

    return dict(
        x_norm=x.norm(dim=-1).mean().item(), z_norm=z.norm(dim=-1).mean().item(), rho_par=share(along),
        rho_ortho=share(y - along), x_norm_p50=x.norm(dim=-1).quantile(0.5).item(), x_max=x.abs().max().item(),
        relative_step=(y.norm(dim=-1) / x.norm(dim=-1)).mean().item(),
        cos_x_out=torch.cosine_similarity(x, z, dim=-1).mean().item(),
        kurtosis=((deviation ** 4).mean(-1) / x.var(-1, correction=0) ** 2).mean().item(),
    )


def test_statistics_by_their_definition():
    model, tokens, generator = tiny_model(), tiny_tokens(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    streams = streams_of(model, tokens)
    rows = stream_statistics.collect_facts(model, tokens)["stream"]
    assert [row["branch"] for row in rows] == list(streams) and len(rows) == 8
    # sums of 64 tokens of 32 channels; a share of a square of a sum has the error of the sum, which may cancel to a
    # hundredth of its terms
    bound = 100 * float_bound(64 + 32, torch.float32)
    for row in rows:
        expected = expected_statistics(*streams[row["branch"]])
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=bound)
    assert not any(module._forward_hooks for module in model.modules())


def test_branches_of_zeros_have_no_direction():
    for row in stream_statistics.collect_facts(tiny_model(), tiny_tokens())["stream"]:
        assert row["rho_par"] == row["rho_ortho"] == row["cos_x_y"] == row["relative_step"] == 0


@pytest.mark.slow
def test_a_compiled_run_stays_as_it_is(tmp_path):
    """Without compilation: test_seams.py."""
    rng = np.random.default_rng(1)
    for name, count in dict(x_train_000000=3000, x_val_000000=1000).items():
        tokens = rng.integers(97, 123, count)
        tokens[::37] = 256
        write_shard(tmp_path / f"{name}.bin", tokens)
    write_meta(tmp_path, vocab_size=257, tokenizer="bytes")
    words = [f"--{name}={value}" for name, value in {**TINY, "data": tmp_path, "compile": "blocks"}.items()]
    curves = []
    for name, specs in (("plain", []), ("noted", ["--variant", "stream_statistics"])):
        folder = tmp_path / name
        assert train_gpt.main([*words, f"--log_dir={folder}", "--run_id=run", *specs], loader=variants) == 0
        curves.append(json.loads((folder / "run.json").read_text())["curve"])
    plain, noted = curves
    assert [point["val_loss"] for point in plain] == [point["val_loss"] for point in noted]
    assert [len(point["stream"]) for point in noted] == [8, 8, 8] and not any("stream" in point for point in plain)
