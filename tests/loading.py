"""Loads a file as a module beside the one of the same source that all import, or runs it as a program."""

import importlib.util
import runpy
import sys
import warnings
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


def run_module(name: str, *words: Path | str) -> int:
    """Run a module with these arguments as `python -m` does, but in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a test has imported it
        patch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    return end.value.code or 0
