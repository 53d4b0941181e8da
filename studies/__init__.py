"""
Experiments, `python -m studies.NAME`: how good, where benchmarks/ says how fast. Their tables are in studies/results/;
here is what several of them need.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks import timing  # before PyTorch, see there
from train_gpt import RunError

RESULTS = Path(__file__).resolve().parent / "results"


def build_parser(description: str) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run: proves that it runs, measures nothing")
    parser.add_argument("--output", type=Path,
                        help="JSON file, beside which tables go as .md (default: studies/results/)")
    return parser


def save(name: str, results: dict, output: Path | None = None, tables: str | None = None) -> Path:
    """
    Write results, with their "device", to studies/results/<name>-<device>.json or to `output`, and tables, where there
    are some, beside it as .md; returns the path of the JSON file.
    """
    path = timing.save(name, results, output, RESULTS)
    if tables is not None:
        path.with_suffix(".md").write_text(tables + "\n")
    return path


def load_digits(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits in random order: images (1797, 64) from 0 to 16, classes (1797,). RunError without it."""
    try:
        import sklearn.datasets
    except ImportError:
        raise RunError("the digits come with scikit-learn, which is not installed; pip install scikit-learn") from None
    images, classes = sklearn.datasets.load_digits(return_X_y=True)
    order = random.permutation(len(images))
    return images[order], classes[order]
