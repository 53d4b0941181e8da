"""Loads a file as a module beside the one of the same source that all import."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_file(path: Path | str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of a Python file, run anew, under a name that no import has, for the length of a test."""
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
