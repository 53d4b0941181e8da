"""
The table of all variants: python -m variants. Parameters are those of the cpu track, with each variant's default
options.
"""

import inspect
import re
import sys
from dataclasses import replace

import train_gpt
import variants
from variants.check import count_parameters, error_line, percent

TITLES = ("variant", "replaces", "parameters", "change", "status", "idea", "source")
NUMBERS = (2, 3)    # columns that end flush


def row_of(name: str, config: train_gpt.Config, baseline: int) -> tuple[str, ...]:
    """Return a variant's row under TITLES; of one that is broken its name and the error. baseline: its parameters."""
    try:
        replaced, parameters, _ = count_parameters(replace(config, variant=(name,)))
        text = inspect.getdoc(variants.load(name)) or ""
    except Exception as error:  # whatever one file does, the table shows the others
        return name, f"broken: {error_line(error)}"
    idea = next(iter(text.splitlines()), "no docstring")
    costs = f"{parameters:,}", percent(parameters, baseline)
    return name, ", ".join(replaced), *costs, line_of(text, "Status"), idea, line_of(text, "Source")


def line_of(text: str, word: str) -> str:
    """Return what a docstring says after "word:"."""
    match = re.search(rf"^{word}: *(.*)", text, re.M)
    return match[1] if match else f"no {word}: line"


def main():
    """Print the table."""
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows the others
    config = train_gpt.make_config(dict(vocab_size=257))
    _, baseline, _ = count_parameters(config)
    rows = [TITLES, ("baseline", "", f"{baseline:,}", "", "", "", "")]
    rows += [row_of(name, config, baseline) for name in variants.available()]

    widths = [max(len(cell) for cell in column) for column in zip(*(row for row in rows if len(row) == len(TITLES)))]
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths)):
            cells.append(cell.rjust(width) if column in NUMBERS else cell.ljust(width))
        train_gpt.say("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
