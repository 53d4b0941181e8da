"""A folder for variants that a test writes."""

import importlib
import sys

import pytest

import variants

# How the file of an idea begins that a test writes; its classes and its patch follow.
HEAD = '''"""An idea.

Source: somebody, 2020
Status: unmeasured
"""
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
import train_gpt
@dataclass
class Options:
    pass
'''


@pytest.fixture
def write_file(tmp_path, monkeypatch):
    """
    write_file(name, text) makes variants/<name>.py in a folder of its own beside the real ones, for the length of the
    test.
    """
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(tmp_path)])
    written = []

    def write_file(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        written.append(name)

    yield write_file
    for name in written:
        sys.modules.pop(f"variants.{name}", None)
        vars(variants).pop(name, None)
