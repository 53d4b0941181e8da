"""
The pictures of a comparison's results: curves.png by matplotlib, and the differences as SVG within report.html.
"""

import html
import math
import warnings

from records.words import plain

# Told apart by the colour-blind, on light and on dark.
COLORS = ("#7d838c", "#d55e00", "#0a84d0", "#0a9e73", "#c264a0", "#b8860b", "#7a5fd0", "#2aa7b8")
LATE = 0.2  # pictures are scaled to the losses after this share of the longest run: those before would squeeze the rest


def axes(results: dict) -> list[tuple[str, int]]:
    """
    (label, column of a curve) of the horizontal axes; steps where the logs do not say tokens, no time where it is not
    known.
    """
    points = [point for arm in results["arms"] for run in arm["runs"] for point in run.get("curve", [])]
    shown = [("training tokens", 1) if all(point[1] is not None for point in points) else ("steps", 0)]
    if all(point[2] is not None for point in points):
        shown.append(("training time, s", 2))
    return shown


def compared(results: dict) -> list[tuple[int, dict]]:
    """(index, arm) of the arms that the first picture shows: those with a difference from the baseline."""
    return [(i, arm) for i, arm in enumerate(results["arms"]) if arm["vs_baseline"]]


def intervals(arm: dict) -> list[tuple[float, float, float]]:
    """[(difference, low, high)] of the verdict's test and of Welch's, where there are intervals."""
    loss = arm["vs_baseline"]["loss"]
    tests = [loss, loss["welch"]] if loss["test"] == "pairs" else [loss]
    return [(test["difference"], test["low"], test["high"]) for test in tests if test["low"] is not None]


def span(values: list[float]) -> tuple[float, float]:
    """The ends of an axis that shows the values and zero, with a margin."""
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def spans(results: dict) -> tuple[tuple[float, float], tuple[float, float]]:
    """The axes of the paired differences and of the intervals."""
    arms = [arm for _, arm in compared(results)]
    means = [arm["vs_baseline"]["loss"]["difference"] for arm in arms]
    return (span([difference for arm in arms for _, difference in arm["pairs"]]),
            span(means + [value for arm in arms for interval in intervals(arm) for value in interval]))


def shift(k: int, n: int) -> float:
    """The height in a row, from -0.3 to 0.3, of the k-th of n seeds: a seed has the same height in every row."""
    return 0.0 if n < 2 else 0.6 * k / (n - 1) - 0.3


def seeds_of_pairs(results: dict) -> list[int]:
    return sorted({seed for _, arm in compared(results) for seed, _ in arm["pairs"]})


def short_name(arm: dict, most: int = 32) -> str:
    name = plain(arm["name"])
    return name if len(name) <= most else name[:most - 1] + "…"


def draw(file, results: dict, log_x: bool):
    """
    curves.png. First the differences from the baseline: seed by seed, and their means with 95 % intervals. Then loss
    against tokens and against time, every run thin, an arm's mean thick; the losses of the first fifth may lie above
    the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    arms = results["arms"]
    rows = compared(results)
    styles = [dict(color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3])
              for i in range(len(arms))]

    # the panels
    top = 0.9 + 0.34 * len(rows) if rows else 0.0
    figure = Figure(figsize=(12, 5.2 + top), dpi=130, layout="constrained")
    if rows:
        upper, lower = figure.subfigures(2, 1, height_ratios=(top, 5.2))
        draw_differences(upper.subplots(1, 2, sharey=True), results)
    else:
        lower = figure
    draw_curves(lower.subplots(1, len(axes(results)), sharey=True, squeeze=False)[0], results, styles, log_x)

    # the legend
    labels = [short_name(arm).replace("$", r"\$") for arm in arms]  # $ begins a formula
    lines = [Line2D([], [], linewidth=2.0, **style) for style in styles]
    lower.legend(lines, labels, loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks
        figure.savefig(file, format="png")


def headings(results: dict) -> tuple[str, str]:
    """Of the two panels of differences."""
    return (f"minus {short_name(results['arms'][0])} at equal seed, nats",
            "mean difference, 95 % (thick: the verdict's; thin: Welch's), nats")


def draw_differences(panels, results: dict):
    """
    Two panels of matplotlib, a row an arm: the paired differences as dots by seed, and the mean differences with their
    intervals.
    """
    rows = compared(results)
    seeds = seeds_of_pairs(results)
    for row, (i, arm) in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        for seed, difference in arm["pairs"]:
            panels[0].plot([difference], [row + shift(seeds.index(seed), len(seeds))], "o", markersize=4, color=color)
        for k, (mean, low, high) in enumerate(intervals(arm)):
            height = row + 0.3 * k
            panels[1].plot([low, high], [height, height], linewidth=(2.4, 1.0)[k], color=color)
            panels[1].plot([mean], [height], "D" if k == 0 else "o", markersize=(6, 4)[k], color=color)
        if not intervals(arm):
            mean = arm["vs_baseline"]["loss"]["difference"]
            panels[1].plot([mean], [row], "D", markersize=6, markerfacecolor="none", color=color)

    # the axes
    labels = [f"{short_name(arm)}: {arm['vs_baseline']['loss']['verdict']}".replace("$", r"\$") for _, arm in rows]
    for panel, ends, heading in zip(panels, spans(results), headings(results)):
        panel.axvline(0, color="#808080", linewidth=0.8)
        panel.set(xlim=ends, ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        panel.set_yticklabels(labels, fontsize=8)
        panel.set_title(heading.replace("$", r"\$"), fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right", "left"]].set_visible(False)


def draw_curves(panels, results: dict, styles: list[dict], log_x: bool):
    """
    The losses, in a panel for each axis, scaled to those after the first fifth; a target outside is an arrow at the
    edge.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter
    arms = results["arms"]
    late = []  # the losses that the picture is scaled to
    for panel, (label, column) in zip(panels, axes(results)):
        end = max((run["curve"][-1][column] for arm in arms for run in arm["runs"] if run.get("curve")), default=0)
        for arm, style in zip(arms, styles):
            curves = [(run.get("curve", []), 0.8, 0.5) for run in arm["runs"]] + [(arm["curve"], 2.0, 1.0)]
            for curve, width, alpha in curves:
                shown = [point for point in curve if point[column] > 0 or not log_x]
                losses = [point[3] for point in shown]
                panel.plot([point[column] for point in shown], losses, linewidth=width, alpha=alpha, **style)
                late += [point[3] for point in shown if log_x or point[column] >= LATE * end]
        panel.set(xlabel=label, xscale="log" if log_x else "linear")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)

    # the axis of losses
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        panels[0].set_ylim(min(late) - margin, max(late) + margin)
    panels[0].set_ylabel("validation loss, nats a token")
    target = arms[0]["to_target"]["target"]
    if target is not None:
        draw_target(panels, target)


def draw_target(panels, target: float):
    """A dashed line in each panel, or an arrow at the edge beyond which the target lies."""
    low, high = panels[0].get_ylim()
    for panel in panels:
        if low <= target <= high:
            panel.axhline(target, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
            continue
        below = target < low
        corner = dict(xy=(0.99, 0.01), va="bottom") if below else dict(xy=(0.99, 0.99), va="top")
        arrow = "↓" if below else "↑"
        panel.annotate(f"target {target:.4g} {arrow}", **corner, xycoords="axes fraction", ha="right", color="#808080",
                       fontsize=8)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def differences_svg(results: dict) -> str:
    """What draw_differences shows, as a picture within report.html; "" where no arm has a difference."""
    rows = compared(results)
    seeds = seeds_of_pairs(results)
    if not rows:
        return ""
    height = 34     # of a row
    names = 250     # where the arms' names end
    middle = 720    # between the panels
    right = 1250    # where the second panel ends
    bottom = 30 + height * len(rows)
    marks = []      # the picture's elements, SVG

    def line(x0, y0, x1, y1, kind, extra=""):
        marks.append(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{extra}/>')

    def text(x, y, words, anchor):
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')

    # the axes
    ends = ((names + 20, middle - 20), (middle + 20, right))
    scales = []     # of each panel: value -> x
    for (start, end), (low, high), heading in zip(ends, spans(results), headings(results)):
        scale = (end - start) / (high - low)
        scales.append(lambda value, start=start, low=low, scale=scale: start + scale * (value - low))
        values = ticks(low, high, 5)
        digits = max(0, math.ceil(-math.log10(values[1] - values[0]))) if len(values) > 1 else 4
        text((start + end) / 2, 16, heading, "middle")
        for value in values:
            line(scales[-1](value), 26, scales[-1](value), bottom, "grid" if value else "zero")
            text(scales[-1](value), bottom + 16, f"{value:+.{digits}f}" if value else "0", "middle")

    # the arms
    for row, (i, arm) in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        y = 30 + height * (row + 0.5)
        style = f' style="stroke:{color};fill:{color}"'
        text(names, y + 4, short_name(arm), "end")
        for seed, difference in arm["pairs"]:
            title = html.escape(f"{plain(arm['name'])}, seed {seed}: {difference:+.4f}")
            at = y + height * shift(seeds.index(seed), len(seeds))
            marks.append(f'<circle cx="{scales[0](difference):.1f}" cy="{at:.1f}" r="4"{style}>'
                         f"<title>{title}</title></circle>")
        mean = arm["vs_baseline"]["loss"]["difference"]
        for k, (_, low, high) in enumerate(intervals(arm)):
            line(scales[1](low), y + 9 * k, scales[1](high), y + 9 * k, "thin" if k else "thick", style)
        title = html.escape(f"{plain(arm['name'])}: {mean:+.4f}, {arm['vs_baseline']['loss']['verdict']}")
        marks.append(f'<circle cx="{scales[1](mean):.1f}" cy="{y:.1f}" r="5"{style}><title>{title}</title></circle>')
    return ('<div class="panel"><svg class="differences" role="img" aria-label="Differences from the baseline" '
            f'viewBox="0 0 {right + 20} {bottom + 24}">{"".join(marks)}</svg></div>')


