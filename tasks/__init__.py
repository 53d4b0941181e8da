"""
Synthetic tasks with an answer key, `python -m tasks.NAME`: each makes its shards and marks a checkpoint's answers.
"""

import train_gpt  # noqa: F401  before PyTorch: it bounds how long waiting threads spin, which PyTorch reads once
