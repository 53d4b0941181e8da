"""Numbers, p values, intervals and tables in words, as reports and pages show them."""

import pytest

from records.words import (
    equals,
    escaped,
    interval,
    markdown_table,
    number,
    p_value,
    percent,
    plain,
    plural,
)


def test_numbers():
    assert number(None) == "-"
    assert number(1234567) == "1,234,567" and number(1234.5678, 2) == "1,234.57"
    assert number(0.1967, 4, signed=True) == "+0.1967" and number(-0.1967, 4, signed=True) == "-0.1967"
    assert number(2.5e12) == "2.5e12" and number(1e15) == "1e15" and number(2.5e12, 1) == "2,500,000,000,000.0"
    assert number(dict(mean=0.81, sd=0.00707), 4) == "0.8100 ± 0.0071"
    assert number(dict(mean=0.81, sd=None), 4) == "0.8100"


@pytest.mark.parametrize("p, text, equation", [
    (None, "-", "p = -"),
    (0.0, "< 0.0001", "p < 0.0001"),
    (0.0000999, "< 0.0001", "p < 0.0001"),
    (0.0001, "0.0001", "p = 0.0001"),
    (0.00435, "0.0043", "p = 0.0043"),
    (0.0999, "0.0999", "p = 0.0999"),
    (0.1, "0.10", "p = 0.10"),
    (1.0, "1.00", "p = 1.00"),
])
def test_p_values(p, text, equation):
    """Four digits where a verdict may hang on them, two elsewhere."""
    assert p_value(p) == text and equals(p) == equation


def test_intervals_shares_and_counts():
    assert interval(dict(low=-0.01, high=0.0234), 3) == "-0.010 to +0.023"
    assert interval(dict(low=None, high=None), 3) == "-"
    assert percent(0.1007) == "+10.1 %" and percent(-0.04, 2) == "-4.00 %"
    assert plural(1, "pair") == "1 pair" and plural(6, "pair") == "6 pairs" and plural(0, "run") == "0 runs"


def test_names_are_one_plain_line():
    assert plain("two\nlines\t \x1b[31mred\u202e ") == "two lines [31mred" and plain(3) == "3"


@pytest.mark.parametrize("text, shown", [
    ("a|b `c` *d* [e](f) $g$ ~h~ &amp;", r"a\|b \`c\` \*d\* \[e\](f) \$g\$ \~h\~ \&amp;"),
    ("</script> p < 0.01", r"\</script> p < 0.01"),
    ("_x_ y_z __init__", r"\_x\_ y_z \_\_init\_\_"),
    ("back\\slash", r"back\\slash"),
])
def test_markdown_shows_text_as_it_is(text, shown):
    assert escaped(text) == shown


def test_tables():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
