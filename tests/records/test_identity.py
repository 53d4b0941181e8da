"""What makes two runs the same."""

from dataclasses import replace
from pathlib import Path

import records.identity as identity
from records.identity import ROOT, module_file, names_a_file, source_of
from train_gpt import parse_config


def name_module(file):
    """The module that a file of this repository is."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_what_code_belongs_to_an_arm():
    names = ([], ["swiglu_mlp"], ["swiglu_mlp+orthogonal_residual:layers=0-3"])
    baseline, swiglu, both = (set(source_of(name)) for name in names)
    assert baseline == {"train_gpt.py"}
    assert swiglu == {"train_gpt.py", "variants/__init__.py", "variants/swiglu_mlp.py"}
    kernels = {"kernels/residual_norm/__init__.py", "kernels/__init__.py"}
    assert both > swiglu | kernels | {"variants/orthogonal_residual.py"}
    assert not any("routed_skips" in file for file in both)
    assert all(module_file(name_module(file)) == ROOT / file for file in both)


def test_an_operation_may_be_a_folder(tmp_path, monkeypatch):
    """What its modules import counts, relative to the folder and by a name in quotes too; nothing outside does."""
    files = {
        "train_gpt.py": "import tasks.recall",
        "variants/__init__.py": "import importlib",
        "variants/mine.py": "from kernels.op import op\nimport studies.claims\nimport data.shards",
        "kernels/__init__.py": "",
        "kernels/op.py": "shadowed = 'by the folder'",
        "kernels/op/__init__.py": '"""The op."""\nfrom .reference import op\nfrom kernels.backend import cpu_loops',
        "kernels/op/reference.py": "def op():\n    from . import tiled",
        "kernels/op/tiled.py": "from kernels.backend import cpu_loops\nloops = cpu_loops('op.cpu')\nword = 'op.no'",
        "kernels/op/cpu.py": "from ..scan import running",
        "kernels/op/unused.py": "",
        "kernels/scan.py": "",
        "kernels/backend.py": "import importlib",
        "kernels/other/__init__.py": "",
        "tasks/recall.py": "",
        "studies/claims.py": "",
        "data/shards.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    expected = {
        "train_gpt.py",
        "variants/__init__.py",
        "variants/mine.py",
        "kernels/__init__.py",
        "kernels/scan.py",
        "kernels/backend.py",
        "kernels/op/__init__.py",
        "kernels/op/reference.py",
        "kernels/op/tiled.py",
        "kernels/op/cpu.py",
    }
    assert set(source_of(["mine"])) == expected


def test_a_variant_that_reads_a_file_is_trained_again(tmp_path, monkeypatch):
    """The content of the file is in no log."""
    monkeypatch.chdir(tmp_path)
    Path("book.npz").write_text("")
    config = parse_config([])
    for variant, expected in (
        ("swiglu_mlp:layers=0-3", False),
        ("x:laplacian=domain:missing.npz", False),
        ("x:laplacian=domain:book.npz,tau=file", True),
    ):
        assert names_a_file(replace(config, variant=("swiglu_mlp", variant))) == expected
    assert names_a_file(replace(config, init_from="book.npz"))
