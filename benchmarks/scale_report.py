"""The table and the picture of scale.py: for each axis a chart of time and of memory, both logarithmic."""

import html
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from t5tune.reports.svg import format_short

COLORS = ("#2563eb", "#ea580c", "#15803d", "#9333ea", "#0891b2", "#db2777")
WIDTH, LEFT, GAP = 780, 52, 58  # of the picture, to the left of a chart, and between two charts
PLOT_WIDTH = (WIDTH - LEFT - GAP - 14) / 2
TITLE_HEIGHT, PLOT_HEIGHT, LABEL_HEIGHT = 34, 120, 30
SMALLEST = {"seconds": 0.01, "mb": 1.0}  # smaller values are drawn here
NAMES = {"seconds": "CPU seconds", "mb": "MB of memory"}
UNITS = {"examples": "examples", "length": "tokens of an example"}

Result = dict[str, Any]


def write_table(results: Sequence[Result]) -> str:
    """Write a Markdown table with a row for each curve."""
    lines = [
        "| grows | curve | from – to | CPU, s | exponent | memory, MB | exponent |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for each in results:
        sizes, goal = each["sizes"], " (flat)" if each["is_flat"] else ""
        time, memory = (
            "–" if each[key] is None else f"{each[key]:.2f}" for key in ("time_exponent", "memory_exponent")
        )
        lines.append(
            f"| {each['axis']} | {each['curve']} | {sizes[0]:,} – {sizes[-1]:,} "
            f"| {each['seconds'][0]:.2f} – {each['seconds'][-1]:.2f} | {time} "
            f"| {each['mb'][0]:.0f} – {each['mb'][-1]:,.0f} | {memory}{goal} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(results: Sequence[Result]) -> str:
    """Draw the curves as an SVG picture: a row for each axis, with time on the left and memory on the right."""
    rows = [(axis, list(group)) for axis, group in groupby(results, key=lambda each: each["axis"])]
    height = (TITLE_HEIGHT + PLOT_HEIGHT + LABEL_HEIGHT) * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#475569">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, (axis, curves) in enumerate(rows):
        top = number * (TITLE_HEIGHT + PLOT_HEIGHT + LABEL_HEIGHT) + TITLE_HEIGHT
        x = LEFT
        for color, curve in zip(COLORS, curves, strict=False):
            parts.append(
                f'<text x="{x}" y="{top - 14}" fill="{color}" font-weight="600">{html.escape(curve["curve"])}</text>'
            )
            x += 7 * len(curve["curve"]) + 12
        for place, kind in enumerate(NAMES):
            parts += _draw_chart(curves, axis, kind, LEFT + place * (PLOT_WIDTH + GAP), top)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_chart(curves: Sequence[Result], axis: str, kind: str, left: float, top: float) -> list[str]:
    """Draw one chart, with a dashed line for linear growth."""
    smallest = SMALLEST[kind]
    lines = [
        [(size, max(value, smallest)) for size, value in zip(each["sizes"], each[kind], strict=True)] for each in curves
    ]
    low_x, high_x = (choose(size for line in lines for size, _ in line) for choose in (min, max))
    low_y = 10.0 ** math.floor(math.log10(min(value for line in lines for _, value in line)))
    high_y = max(10.0 ** math.ceil(math.log10(max(value for line in lines for _, value in line))), 10 * low_y)

    def find_x(size: float) -> float:
        return left + PLOT_WIDTH * math.log(size / low_x) / (math.log(high_x / low_x) or 1)

    def find_y(value: float) -> float:
        return top + PLOT_HEIGHT * (1 - math.log(value / low_y) / math.log(high_y / low_y))

    parts = []
    for power in range(round(math.log10(low_y)), round(math.log10(high_y)) + 1):
        y = find_y(10.0**power)
        parts.append(f'<path d="M{left:.1f} {y:.1f}h{PLOT_WIDTH:.1f}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{format_short(10.0**power)}</text>')
    for size, anchor in ((low_x, "start"), (high_x, "end")):
        parts.append(
            f'<text x="{find_x(size):.1f}" y="{top + PLOT_HEIGHT + 15:.1f}" text-anchor="{anchor}">{size:,}</text>'
        )
    middle, label = left + PLOT_WIDTH / 2, f"{NAMES[kind]}, by {UNITS.get(axis, axis)}"
    parts.append(f'<text x="{middle:.1f}" y="{top + PLOT_HEIGHT + 15:.1f}" text-anchor="middle">{label}</text>')
    growth = min(high_x / low_x, high_y / low_y)
    ends = [(find_x(size), find_y(value)) for size, value in ((high_x / growth, high_y / growth), (high_x, high_y))]
    parts.append(f'<path d="{_join(ends)}" stroke="#94a3b8" stroke-dasharray="3 4"/>')
    for color, line in zip(COLORS, lines, strict=False):
        points = [(find_x(size), find_y(value)) for size, value in line]
        parts.append(f'<path d="{_join(points)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in points]
    return parts


def _join(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
