"""
Puts the repository root on the path, gives every process one thread, and skips what needs a GPU where there is none.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# small models run several times as fast; tests share the cores between processes
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signals_as_before():
    """
    A script that a test runs in its own process may set handlers: with SIGPIPE at its default a later test's closed
    pipe would end all of them.
    """
    numbers = signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM, signal.SIGINT
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)
