"""
How fast, `python -m benchmarks.NAME`: a script for each kernel, the training step, decoding, the suite for a GPU.
"""

import train_gpt  # noqa: F401  before PyTorch: it bounds how long waiting threads spin, which PyTorch reads once
