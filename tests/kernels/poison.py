"""Memory that shows what a kernel leaves unwritten."""
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory():
    """New tensors begin as NaN: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
