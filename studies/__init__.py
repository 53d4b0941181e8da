"""
Experiments, `python -m studies.NAME`: how good, where benchmarks/ says how fast. Their tables are in studies/results/.
"""

import train_gpt  # noqa: F401  before PyTorch: it bounds how long waiting threads spin, which PyTorch reads once
