"""
The step benchmark's own arithmetic, with a peer made up here; the trainer really runs, on a model of a few numbers.
"""
import json
from pathlib import Path

import pytest

from benchmarks import train_step
from data.shards import write_shard
from train_gpt import RunError

TINY = ["--device", "cpu", "--layers", "2", "--model_dim", "16", "--heads", "1", "--head_dim", "16", "--mlp_hidden",
        "16", "--sequence_length", "32", "--batch_tokens", "64", "--val_tokens", "64", "--vocab_size", "257",
        "--val_every", "0"]
PEER = '''
import pathlib, sys, time
names = sorted(file.name for file in pathlib.Path("data/fineweb10B").iterdir())
assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
for step in range(1, LINES + 1):
    print(f"step:{step}/3250 train_time:{step * 0.25 + (5 if step > 3 else 0):.3f}s step_avg:{1000:.2f}ms", flush=True)
if LINES < 20:
    sys.exit("RuntimeError: out of shards")
time.sleep(300)
pathlib.Path(__file__).with_name("woken").touch()
'''


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"made_up_{split}_000000.bin", [256, *range(200)])
    return folder


def test_every_kind_is_found():
    kinds = {"aten::mm": "products", "aten::baddbmm": "products", "sm90_xmma_gemm_bf16": "products",
             "void flash_fwd_kernel": "attention", "triton_tem_fused_flex_attention_0": "attention",
             "aten::copy_": "copies and fills", "ncclDevKernel_AllGather": "between ranks", "aten::mul": "all else",
             "aten::addmm": "products", "aten::addcmul": "all else"}
    assert {name: train_step.kind_of(name) for name in kinds} == kinds


def test_profile(data, tmp_path, capsys):
    code = train_step.main(["--output", str(tmp_path / "out.json"), "profile", "--steps", "2", "--data", str(data),
                            *TINY])
    found = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and found["kinds"]["products"] > 0 and found["kinds"]["attention"] > 0
    assert "products" in capsys.readouterr().out
    assert sum(found["kinds"].values()) == pytest.approx(found["profiled_wall"], rel=1e-6)
    assert not list(Path(tmp_path).glob("**/*.txt"))


@pytest.mark.slow
def test_against_another_checkout(data, tmp_path, capsys):
    code = train_step.main(["--output", str(tmp_path / "out.json"), "against", str(train_step.ROOT), "--steps", "3",
                            "--rounds", "1", "--", "--data", str(data), *TINY])
    found = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert code == 0 and len(found) == 1 and found[0]["other"]["val_loss"] == found[0]["this"]["val_loss"]
    assert found[0]["this"]["ms_per_step"] > 0
    assert "ms_per_step, other's over this's" in capsys.readouterr().out


@pytest.mark.slow
def test_beside_a_variant(data, tmp_path, capsys, monkeypatch):
    ours = train_step.ours
    # no half minute
    monkeypatch.setattr(train_step, "ours", lambda root, arguments,
                        *rest: ours(root, ["off" if word == "blocks" else word for word in arguments], *rest))
    code = train_step.main(["--output", str(tmp_path / "out.json"), "variant", "fused_kernels", "--steps", "3",
                            "--rounds", "1", "--", "--data", str(data), *TINY])
    found = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert code == 0 and list(found[0]) == ["baseline", "variant", "compiled"]
    assert found[0]["variant"]["val_loss"] == pytest.approx(found[0]["baseline"]["val_loss"], rel=1e-5)
    assert "ms_per_step, baseline's over variant's" in capsys.readouterr().out


def test_a_peer_is_ended_when_its_steps_are_there(data, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER.replace("LINES", "20"))
    found = train_step.peer(script, data, 15, 1)
    assert found["host_ms_median"] == pytest.approx(250)  # the first steps, one of which takes 5 s more, are left out
    assert not (tmp_path / "woken").exists()  # it was ended in its sleep


def test_a_peer_that_fails_says_why(data, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER.replace("LINES", "2"))
    with pytest.raises(RunError, match=r"printed 2 of 15 steps: RuntimeError: out of shards"):
        train_step.peer(script, data, 15, 1)


@pytest.mark.parametrize("arguments, message", [
    (["against", "nowhere"], "there is no train_gpt.py in nowhere"), (["peer", "nowhere.py"], "there is no nowhere.py"),
    (["against", ".", "--track", "cpu"], "unknown argument '--track'; the trainer's arguments come after --")])
def test_bad_input(arguments, message, capsys):
    assert train_step.main(arguments) == 1
    assert message in capsys.readouterr().err
