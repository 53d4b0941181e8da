"""
Puts the repository root on the path, gives every process one thread, skips what needs a GPU where there is none, and
lets a process measure once what every run measures.
"""

import dataclasses
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


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """
    Runs inside the tests' process find their machine's FLOP/s measured, and the costs of a model that is the baseline's
    and of settings that an earlier run had, but for those that no model depends on. Half of a tiny run's time was spent
    on these two. A run draws no random numbers for them.
    """
    import torch

    import train_gpt
    import variants

    measure_peak, measure_model, peaks, costs = train_gpt.measured_peak, train_gpt.measure_model, {}, {}
    of_the_run = {
        "run_id", "log_dir", "data", "resume", "init_from", "seed", "steps", "tokens", "time_budget", "target",
        "target_data", "val_tokens", "val_every", "keep_losses", "keep_every", "checkpoint_seconds", "save",
    }

    def peak(ranks):
        key = ranks.device.type, ranks.dtype
        if key not in peaks:
            with torch.random.fork_rng():
                peaks[key] = measure_peak(ranks)
        return peaks[key]

    def attributes():
        values = variants.attributes_of([train_gpt, *variants.classes_of_trainer()])
        return {key: id(value) for key, value in values.items()}

    def model(config):
        if attributes() != baseline:  # a part is replaced
            return measure_model(config)
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in of_the_run}
        key = repr(settings)
        if key not in costs:
            costs[key] = measure_model(config)
        return dict(costs[key])

    train_gpt.measured_peak, train_gpt.measure_model = peak, model
    baseline = attributes()
    yield
    train_gpt.measured_peak, train_gpt.measure_model = measure_peak, measure_model


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
