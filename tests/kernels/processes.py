"""
Python programs in processes of their own, for what is decided when a process imports Numba: whether it is there, its
checks and its cache.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_process(*arguments: str | Path, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """
    Runs python with these arguments in the repository's root, and returns its result, whose stdout and stderr are text.
    Compiled loops are kept in the folder `cache`. The process must succeed.
    """
    variables = os.environ | dict(XDG_CACHE_HOME=str(cache), PYTHONPATH=str(ROOT)) | environment
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=variables, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result
