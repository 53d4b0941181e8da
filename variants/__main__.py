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


def row_of(name: str, config: train_gpt.Config, baseline: int) -> tuple[str, ...]:
    try:
        replaced, parameters, _ = count_parameters(replace(config, variant=(name,)))
        text = inspect.getdoc(variants.load(name)) or ""
    except Exception as error:  # whatever one file does, the table shows the others
        return name, f"broken: {error_line(error)}"
    source, status = (next(iter(re.findall(rf"^{word}: *(.*)", text, re.M)), f"no {word}: line") for word in ("Source", "Status"))
    idea = next(iter(text.splitlines()), "no docstring")
    return name, ", ".join(replaced), f"{parameters:,}", percent(parameters, baseline), status, idea, source

def main():
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows the others
    config = train_gpt.make_config(dict(vocab_size=257))
    _, baseline, _ = count_parameters(config)
    rows = [("variant", "replaces", "parameters", "change", "status", "idea", "source"), ("baseline", "", f"{baseline:,}", "", "", "", "")]
    rows += [row_of(name, config, baseline) for name in variants.available()]
    widths = [max(len(row[column]) for row in rows if len(row) == len(rows[0])) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) if column in (2, 3) else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        train_gpt.say("  ".join(cells).rstrip())

if __name__ == "__main__":
    main()
