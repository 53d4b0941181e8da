"""
The command lines of the 30 parameter-golf runs at their published size, as the second table of docs/claims.md.

    python -m studies.golf_commands    writes the table between its marks

The presets are those of studies/parameter_golf.py, and so are the figures that were published.
"""

import argparse
import shlex
import sys
from pathlib import Path

from data.command_line import run_script
from records.pages import write_page
from records.words import markdown_table
from studies.parameter_golf import PUBLISHED, Preset

PAGE = Path(__file__).resolve().parent.parent / "docs" / "claims.md"
BEGIN = "<!-- commands: written by ./run.sh study golf_commands -->"
END = "<!-- end of commands -->"
TRACK = "golf"


def train_command(preset: Preset) -> str:
    """The command line that trains a preset at its published size."""
    variant, *options = shlex.split(preset.arm(TRACK))
    words = ["./run.sh", "--track", TRACK]
    if variant != "baseline":
        words += ["--variant", variant]
    return shlex.join([*words, *options])


def make_table() -> str:
    """The table as Markdown: preset, parameters at the published size, bits a byte that were published, command."""
    rows = []
    for preset in PUBLISHED:
        bits = "none" if preset.bits is None else str(preset.bits)
        rows.append([preset.name, f"{preset.parameters:,}", bits, f"`{train_command(preset)}`"])
    return markdown_table(["preset", "parameters", "published, bits a byte", "command"], rows)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, or 1 for a fault (one line on stderr)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (default: docs/claims.md)")
    options = parser.parse_args(argv)
    return run_script("golf_commands.py", lambda: write_page(options.page, [make_table()], BEGIN, END))


if __name__ == "__main__":
    sys.exit(main())
