"""
The picture of the parameter-golf study: bits a byte against the parameters that are stored and against the time of a
step, a dot for every preset, and the front of those that no other one beats in both.
"""

import math
from pathlib import Path

import numpy as np

from records.pictures import COLORS

STYLES = dict(published=COLORS[2], repaired=COLORS[1], control=COLORS[0])
UNIFORM = 8.0           # bits a byte of a model that knows nothing: dots above are drawn at the edge
EDGE = 1.06             # the edge, as a multiple of that
ROW_HEIGHT = 8.5        # inches of a protocol's two panels
FLOOR = 0.05            # how far below the best the axis of losses has its pole, as a share
BACKGROUND = dict(facecolor="white", edgecolor="none", pad=0.3)  # of a name, so that no line crosses it
LABEL_POINTS = 6.5      # size of the names
GAP = 8                 # pixels between the middle of a dot and its name
RADIUS = 5              # pixels of a dot
AXES = (("stored", "parameters that are stored"), ("ms_per_step", "milliseconds a step"))


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the points (x, y) than which no other is as low in both and lower in one, by x."""
    front = []
    best = math.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < best:
            front.append(name)
            best = y
    return front


def points_of(rows: dict[str, dict], column: str) -> dict[str, tuple[float, float]]:
    """{preset: (x, bits a byte)} of the rows that have both; nats a token where no bytes are known."""
    key = "bits_per_byte" if any(row["bits_per_byte"] for row in rows.values()) else None
    values = {name: (row[column], row[key] if key else (row["loss"] or {}).get("mean")) for name, row in rows.items()}
    return {name: (x, y) for name, (x, y) in values.items() if x and y}


def draw(path: Path, protocols: dict[str, dict[str, dict]]):
    """Write the picture, two panels for each protocol; rows as parameter_golf.rows_of gives them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(17, ROW_HEIGHT * len(protocols)), dpi=110)
    canvas = FigureCanvasAgg(figure)
    bottom = 0.07 / len(protocols)
    figure.subplots_adjust(left=0.05, right=0.99, top=1 - bottom, bottom=bottom, wspace=0.1, hspace=0.14)
    panels = figure.subplots(len(protocols), len(AXES), squeeze=False)
    for (protocol, rows), pair in zip(protocols.items(), panels):
        for panel, (column, label) in zip(pair, AXES):
            draw_panel(panel, rows, column, canvas.get_renderer())
            panel.set_xlabel(label, fontsize=9)
        has_bits = any(row["bits_per_byte"] for row in rows.values())
        unit = "bits a byte" if has_bits else "nats a token"
        equal = dict(A="equal steps", B="equal time")[protocol]
        pair[0].set_ylabel(f"validation loss, {unit}; spread out near the best", fontsize=9)
        pair[0].set_title(f"Protocol {protocol}: {equal}", fontsize=10, loc="left")

    # the legend
    marks = [Line2D([], [], marker="o", linestyle="", color=color, label=style) for style, color in STYLES.items()]
    marks += [Line2D([], [], marker="o", linestyle="", color="black", label="baseline"),
              Line2D([], [], color="#404040", linewidth=1, label="not beaten in both")]
    panels[0][1].legend(handles=marks, fontsize=8, frameon=False, loc="upper right", ncols=len(marks),
                        bbox_to_anchor=(1.0, 1.06))
    figure.savefig(path, format="png")


def draw_panel(panel, rows: dict[str, dict], column: str, renderer):
    """One panel: dots, front, names."""
    # the dots, those above the edge on it
    points = points_of(rows, column)
    shown = {name: (x, min(y, UNIFORM * EDGE)) for name, (x, y) in points.items()}
    for name, (x, y) in shown.items():
        color = "black" if name == "baseline" else STYLES[rows[name]["style"]]
        marker = "^" if points[name][1] > y else "o"
        panel.plot([x], [y], marker, color=color, markersize=5, zorder=3)

    # axes with room for names
    panel.set_xscale("log")
    if shown:
        scale_losses(panel, [y for _, y in shown.values()])
        left, right = (math.log(end([x for x, _ in shown.values()])) for end in (min, max))
        panel.set_xlim(math.exp(left - 0.1), math.exp(right + 0.1 + 0.15 * (right - left)))

        # the front, which goes on upwards and to the right
        front = [shown[name] for name in pareto_front(points)]
        ends = (front[0][0], panel.get_ylim()[1]), (panel.get_xlim()[1], front[-1][1])
        panel.step(*zip(ends[0], *front, ends[1]), where="post", color="#404040", linewidth=1, zorder=2)
    format_axes(panel)
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    write_names(panel, points, shown, renderer)


def scale_losses(panel, losses: list[float]):
    """Make the vertical axis logarithmic in the distance to a floor a little below the best, where most dots lie."""
    from matplotlib.ticker import FixedLocator

    best = min(losses)
    floor = best * (1 - FLOOR)

    def forward(y):
        return np.log(np.maximum(np.asarray(y, dtype=float) - floor, 1e-3 * FLOOR * best))

    def inverse(z):
        return floor + np.exp(z)

    low, high = float(forward(best)), float(forward(max(losses)))
    margin = max(0.03 * (high - low), 0.05)
    panel.set_yscale("function", functions=(forward, inverse))
    panel.set_ylim(float(inverse(low - margin)), float(inverse(high + margin)))
    panel.yaxis.set_major_locator(FixedLocator(np.round(inverse(np.linspace(low, high, 12)), 3)))


def format_axes(panel):
    """Write plain numbers on both axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3f}"))
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=8)


def write_names(panel, points: dict, shown: dict, renderer):
    """Write every dot's name beside it, as near as no other name or dot is in the way, with a line to a far one."""
    taken = []  # boxes (left, bottom, right, top), pixels
    pixels = {name: panel.transData.transform(point) for name, point in shown.items()}
    taken += [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in pixels.values()]
    frame = panel.get_window_extent(renderer)
    for name in sorted(shown, key=lambda name: -shown[name][1]):
        # how large it is
        text = name if points[name][1] == shown[name][1] else f"{name} {points[name][1]:.1f}"
        label = panel.annotate(text, shown[name], xytext=(0, 0), textcoords="offset pixels", fontsize=LABEL_POINTS,
                               va="center", zorder=4, bbox=BACKGROUND)
        box = label.get_window_extent(renderer)

        # where it goes
        x, y = pixels[name]
        dx, dy = choose_offset((x, y), (box.width, box.height), taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        label.xyann = (dx, dy)
        taken.append(box_at((x, y), (dx, dy), (box.width, box.height)))
        if abs(dy) > box.height or dx > 2 * GAP:
            end = panel.transData.inverted().transform((x + dx, y + dy))
            panel.plot([shown[name][0], end[0]], [shown[name][1], end[1]], color="#b0b0b0", linewidth=0.5, zorder=1)


def box_at(point: tuple, offset: tuple, size: tuple) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) of a name of this size that begins at an offset from its dot, half way up."""
    left, middle = point[0] + offset[0], point[1] + offset[1]
    return left, middle - size[1] / 2, left + size[0], middle + size[1] / 2


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def choose_offset(point: tuple, size: tuple, taken: list[tuple], frame: tuple) -> tuple[float, float]:
    """
    The offset, in pixels, of a name of this size from its dot: the nearest on its right or its left at which it covers
    nothing that is taken and stays in the frame; just right of it where there is none.
    """
    rights = [GAP, GAP + 40, GAP + 80, GAP + 120]
    sides = [*rights, *(-right - size[0] for right in rights)]
    heights = [step * size[1] / 2 for step in range(-60, 61)]
    offsets = [(dx, dy) for dx in sides for dy in heights]

    def distance(offset: tuple) -> float:
        near = offset[0] if offset[0] > 0 else -offset[0] - size[0] + 1  # right before left
        return math.hypot(near, offset[1])

    for offset in sorted(offsets, key=distance):
        left, bottom, right, top = box = box_at(point, offset, size)
        inside = left >= frame[0] and bottom >= frame[1] and right <= frame[2] and top <= frame[3]
        if inside and not any(overlap(box, other) for other in taken):
            return offset
    return GAP, 0.0
