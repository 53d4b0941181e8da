"""What the tests of several kernels leave to `-m slow`."""

import pytest
import torch


def slow(*values) -> list:
    """Returns these values as parameters of slow tests, each as one argument."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_rows(*rows) -> list:
    """Returns these rows as parameters of slow tests, each of as many arguments as it has values."""
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


# Compiled loops in float64 are the text of those in float32, and take as long to compile.
LOOP_FLOATS = [torch.float32, *slow(torch.float64)]
