"""Numbers, p values and tables in words: what reports, the board's pages and messages have in common."""

import re


def plain(text) -> str:
    """One line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def number(value, digits: int | None = None, signed: bool = False) -> str:
    """A number, the mean ± sd of a summary(), or "-"."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        mean = number(value["mean"], digits)
        return mean if value["sd"] is None else f"{mean} ± {number(value['sd'], digits)}"
    if digits is None and abs(value) >= 1e12:
        return f"{value:.3g}".replace("e+", "e")
    sign = "+" if signed else ""
    return f"{value:{sign},.{digits or 0}f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f} %"


def p_value(p: float | None) -> str:
    if p is None:
        return "-"
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def equals(p: float | None) -> str:
    """ "p = 0.02" or "p < 0.0001". """
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def interval(test: dict, digits: int) -> str:
    if test["low"] is None:
        return "-"
    return f"{number(test['low'], digits, signed=True)} to {number(test['high'], digits, signed=True)}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]|&~$]|<(?=\S)|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def markdown_table(heads: list[str], rows: list) -> str:
    """Cells as they are: escaped() where they should be."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
