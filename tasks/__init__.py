"""
Synthetic tasks with an answer key. recall and symbolic_language, `python -m tasks.NAME`, make shards and mark a
checkpoint's answers; skills trains small models on the tasks that are answered in one token, and prints their card.
"""

import train_gpt  # noqa: F401  before PyTorch: it bounds how long waiting threads spin, which PyTorch reads once
