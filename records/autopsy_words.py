"""The autopsy of an arm in words, as a table and as a picture; autopsy.py says what it is."""

import html

from records.words import plural

SHOWN = 1e-4                # nats, the last digit that words and tables show


def nats(value: float, signed: bool = True) -> str:
    """Return nats with four digits, as reports have them."""
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def is_certain(difference: dict) -> bool:
    """Return whether a difference's interval leaves out zero."""
    return difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def interval_words(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{nats(low)} to {nats(high)}"


def autopsy_sentence(result: dict) -> str:
    """Say where the difference comes from, in one sentence."""
    if "reason" in result:
        return f"No autopsy: {result['reason']}"
    difference, standing = result["difference"], result["stands_out"]
    size = f"The difference of {nats(difference['mean'])} nats"
    if difference["low"] is None:
        return f"{size} is of one pair and one row: no interval can be had, and no tokens are said to stand out."

    # of one pair or of several, nothing stands out, or something of a difference that may be none
    if result["pairs"] == 1:
        size = f"For one pair, the difference of {nats(difference['mean'])} nats"
    interval = f"95 % {interval_words(difference['low'], difference['high'])}"
    if is_certain(difference) and standing is None:
        return (f"{size} ({interval}) is spread evenly, as far as {plural(result['pairs'], 'pair')} can tell: no "
                "tokens that were told apart have more of it than their share.")
    if standing is None:
        return f"{size} is not distinguishable from zero ({interval}), and no tokens that were told apart stand out."
    if not is_certain(difference):
        rest = difference["mean"] - standing["contribution"]
        return (f"{size} is not distinguishable from zero ({interval}), but {standing['tokens_that']} contribute "
                f"{nats(standing['contribution'])} (95 % {interval_words(standing['low'], standing['high'])}) and all "
                f"others {nats(rest)}.")
    sentence = sentence_of_set(difference["mean"], standing)
    if result["pairs"] > 1:
        return sentence
    return f"For one pair, and another may say otherwise: {sentence[0].lower()}{sentence[1:]}"


def sentence_of_set(mean: float, standing: dict) -> str:
    """Say what a set that stands out has of a difference that is certain. Numbers count in its direction."""
    sign = -1 if mean < 0 else 1
    better = "better" if mean < 0 else "worse"
    worse = "worse" if mean < 0 else "better"
    size = nats(sign * mean, signed=False)
    contribution = sign * standing["contribution"]
    ends = sorted((sign * standing["low"], sign * standing["high"]))
    interval = f"95 % {nats(ends[0], signed=False)} to {nats(ends[1], signed=False)}"
    words = standing["tokens_that"]
    share = f"{100 * standing['share']:.0f} % of all tokens"

    # more than all of it, more than its share, less than its share, or the other way
    if contribution - sign * mean > SHOWN / 2:
        rest = nats(contribution - sign * mean, signed=False)
        return (f"{words[0].upper()}{words[1:]}, {share}, make the arm {better} by {nats(contribution, signed=False)} "
                f"nats ({interval}), and all others make it {worse} by {rest}: {size} nats {better} in all.")
    if sign * standing["surplus"] > 0:
        return (f"{nats(contribution, signed=False)} of the {size} nats by which the arm is {better} come from {words} "
                f"({interval}), which are {share}.")
    if contribution >= 0:
        return (f"Only {nats(contribution, signed=False)} of the {size} nats by which the arm is {better} come from "
                f"{words} ({interval}), although they are {share}.")
    return (f"The arm is {better} by {size} nats, although {words}, {share}, make it {worse} by "
            f"{nats(-contribution, signed=False)} nats (95 % {nats(-ends[1])} to {nats(-ends[0])}).")


def autopsy_lines(result: dict) -> list[str]:
    """Return what a reader must know about the autopsy, in sentences."""
    if "reason" in result:
        return []
    over = " and ".join(result["drawn"])
    spread = result["spread"]
    quartiles = ", ".join(nats(value) for value in spread["quartiles"])
    seen = "of the row"
    if result["counted_from"] == "document":
        seen = "of the document within the row, since documents are masked"
    lines = [
        f"Autopsy: differences arm minus baseline of {result['tokens']:,} validation tokens, mean over "
        f"{plural(result['pairs'], 'pair')} of equal seeds; the contributions of a split add up to the difference, "
        f"{nats(result['difference']['mean'])} nats.",
        f"Position and recall are counted as the baseline sees the text, from the start {seen}; a context of n is the "
        "input token and the n - 1 before it.",
        f"Documents: {spread['lower']:,} of {spread['documents']:,} have a lower loss, {spread['higher']:,} a higher "
        f"one; quartiles of their mean differences {quartiles} nats. Those that are named were chosen by their "
        "contributions, and their intervals are over seeds alone."]
    if over:
        lines.append(f"Intervals: 95 %, bootstrap over {over}, {result['resamples']:,} resamples.")
    if over and "seeds" not in result["drawn"]:
        lines.append("They are of one pair: they do not hold what another seed would change.")
    if "rows" in result["drawn"]:
        lines.append(f"Rows are drawn in place of documents: the {spread['documents']:,} documents count as "
                     f"{result['equal_documents']:.1f} of equal length, so nothing is said of other texts.")
    return lines


def autopsy_table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Return (title, heads, rows of cells), a row a bin, as a report's tables are. Without a result it has no rows."""
    heads = ["split", "tokens by it", "tokens", "share", "difference within", "contribution", "95 %",
             "of the difference"]
    rows = []
    for split in result.get("splits", []):
        for entry in split["bins"]:
            proportion = "-"
            if is_certain(result["difference"]):
                proportion = f"{100 * entry['contribution'] / result['difference']['mean']:.0f} %"
            rows.append([split["name"], entry["label"], f"{entry['tokens']:,}", f"{100 * entry['share']:.1f} %",
                         nats(entry["difference"]), nats(entry["contribution"]),
                         interval_words(entry["low"], entry["high"]), proportion])
    return "Where the difference lies", heads, rows


# ---- Pictures

def panels_of(result: dict) -> list[list[dict]]:
    """Deal the splits out to two columns that are about equally long."""
    columns = [[], []]
    lengths = [0, 0]
    for split in result.get("splits", []):
        shorter = int(lengths[1] < lengths[0])
        columns[shorter].append(split)
        lengths[shorter] += len(split["bins"]) + 3
    return columns


def ends_of(result: dict) -> tuple[float, float]:
    """Return the ends of the axis of nats that all panels share."""
    values = [0.0]
    for split in result["splits"]:
        for entry in split["bins"]:
            values += [entry["contribution"], entry["share"] * result["difference"]["mean"]]
            values += [entry[end] for end in ("low", "high") if entry[end] is not None]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin


def autopsy_svg(result: dict) -> str:
    """
    Return a picture within report.html, whose colours it uses; "" without a result. Each split has a panel, and each
    bin a bar from zero to its contribution. A line shows its interval, a small mark what it would contribute in
    proportion to its tokens. All panels have one scale.
    """
    columns = panels_of(result)
    if not any(columns):
        return ""
    height = 18     # of a bar's row
    width = 625     # of a column
    start = 275     # where bars begin, from the left of a column
    end = 535       # where they end, and the numbers begin
    low, high = ends_of(result)
    marks = []      # the picture's elements, SVG

    def line(x0, y0, x1, y1, kind, style=""):
        marks.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{style}/>')

    def text(x, y, words, anchor, style=""):
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(words)}</text>')

    # a panel under the other
    bottoms = []
    for number, splits in enumerate(columns):
        left = number * width
        y = 20
        for split in splits:
            text(left + 10, y, split["title"], "start", ' style="fill:var(--ink);font-weight:600"')
            y += 8
            x = scale_of(left + start, left + end, low, high)
            line(x(0), y, x(0), y + height * len(split["bins"]), "zero")
            for entry in split["bins"]:
                middle = y + height / 2
                contribution, share = entry["contribution"], entry["share"] * result["difference"]["mean"]
                color = "var(--good)" if contribution < 0 else "var(--bad)"
                text(left + start - 6, middle + 4, entry["label"], "end")
                marks.append(
                    f'<rect x="{min(x(0), x(contribution)):.1f}" y="{middle - 5:.1f}" '
                    f'width="{abs(x(contribution) - x(0)):.1f}" height="10" style="fill:{color}">'
                    f"<title>{html.escape(describe_entry(entry))}</title></rect>")
                line(x(share), middle - 8, x(share), middle + 8, "thin", ' style="stroke:var(--soft)"')
                if entry["low"] is not None:
                    line(x(entry["low"]), middle, x(entry["high"]), middle, "thin", ' style="stroke:var(--ink)"')
                text(left + end + 70, middle + 4, nats(contribution), "end")
                y += height
            y += 32
        bottoms.append(y)

    # what the marks mean
    bottom = max(bottoms)
    text(10, bottom, "Bars: contribution to the difference, arm minus baseline, nats. Lines: 95 %. Small marks: what a "
         "bin would have if the difference were spread evenly.", "start")
    return ('<div class="panel"><svg class="differences" role="img" aria-label="Where the difference lies" '
            f'viewBox="0 0 {2 * width} {bottom + 12}">{"".join(marks)}</svg></div>')


def scale_of(start: float, end: float, low: float, high: float):
    """Return a function from nats, low to high, to pixels, start to end."""
    def scale(value: float) -> float:
        return start + (end - start) * (value - low) / (high - low)
    return scale


def describe_entry(entry: dict) -> str:
    """Say what a bin has, in words."""
    return (f"{entry['label']}: {nats(entry['contribution'])} nats (95 % "
            f"{interval_words(entry['low'], entry['high'])}), {100 * entry['share']:.1f} % of the tokens, "
            f"{nats(entry['difference'])} nats within")


def draw_autopsy(figure, result: dict):
    """Draw what autopsy_svg shows in a figure of matplotlib; nothing without a result."""
    columns = panels_of(result)
    if not any(columns):
        return
    for column, splits in zip(figure.subfigures(1, 2), columns):
        panels = column.subplots(len(splits), 1, squeeze=False, sharex=True,
                                 height_ratios=[len(split["bins"]) + 1.5 for split in splits])[:, 0]
        for panel, split in zip(panels, splits):
            draw_split(panel, split, result)
        panels[-1].set_xlim(ends_of(result))
        panels[-1].locator_params(axis="x", nbins=5)
        panels[-1].set_xlabel("contribution, nats; small marks: spread evenly", fontsize=8)


def draw_split(panel, split: dict, result: dict):
    """Draw one split's bars in a panel of matplotlib."""
    bins = split["bins"]
    rows = range(len(bins))
    values = [entry["contribution"] for entry in bins]
    panel.barh(rows, values, 0.6, color=["#11703a" if value < 0 else "#b3261e" for value in values])
    for row, entry in enumerate(bins):
        if entry["low"] is not None:
            panel.plot([entry["low"], entry["high"]], [row, row], color="#1d2125", linewidth=1.2)
        panel.plot([entry["share"] * result["difference"]["mean"]], [row], "|", color="#808080", markersize=9)

    # the axes
    panel.axvline(0, color="#808080", linewidth=0.8)
    panel.set(yticks=rows, ylim=(len(bins) - 0.4, -0.6))
    panel.set_yticklabels([entry["label"].replace("$", r"\$") for entry in bins], fontsize=7)  # $ begins a formula
    panel.set_title(split["title"], fontsize=8, loc="left")
    panel.tick_params(axis="x", labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
