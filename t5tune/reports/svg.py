"""Line charts and histograms as inline SVG, drawn in the colors of the surrounding page.

    draw_line_chart("Loss", [Series("training", [(1, 2.5), (2, 1.9)])])

The page's style sheet defines the colors of the classes `axis`, `grid`, `line-0`, `line-1`, `bar-0`, …
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 210  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34  # margins for the labels
MAX_POINTS = 300
NUM_TICKS = 4
LOGARITHMIC_FROM = 100  # ratio of the largest to the smallest value; a linear axis shows smaller ratios well
DOTS_UP_TO = 40  # a series with at most this many points gets a dot for each


@dataclass(frozen=True)
class Series:
    """A line: its name for the legend, and its (x, y) points in the order of x."""

    name: str
    points: list[tuple[float, float]]


def draw_line_chart(title: str, series: Sequence[Series], allow_log: bool = False) -> str:
    """Draw the finite values of the series over the steps, in one chart; return an empty string if there are none.

    Args:
        allow_log: use a logarithmic y axis if the values span a factor of LOGARITHMIC_FROM or more.
    """
    lines = [Series(one.name, _thin_out([p for p in one.points if math.isfinite(p[1])])) for one in series]
    lines = [one for one in lines if one.points]
    if not lines:
        return ""
    points = [point for one in lines for point in one.points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    is_logarithmic = allow_log and low > 0 and high / low >= LOGARITHMIC_FROM
    ticks = _list_powers_of_ten(low, high) if is_logarithmic else _choose_ticks(low, high)
    title = f"{title} (log scale)" if is_logarithmic else title
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    frame = _Frame(low_x, high_x if high_x > low_x else low_x + 1, ticks[0], ticks[-1], is_logarithmic)
    parts = [frame.grid(ticks), frame.x_labels(low_x, "step", high_x)]
    for number, one in enumerate(lines):
        places = [(frame.x(x), frame.y(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line-{number}" points="{path}"/>')
        if len(places) <= DOTS_UP_TO:
            for (x, y), (step, value) in zip(places, one.points, strict=True):
                words = html.escape(f"{one.name}: {format_short(value)} at step {format_short(step)}")
                parts.append(
                    f'<circle class="dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{words}</title></circle>'
                )
    legend = ""
    if len(lines) > 1:
        names = (f'<span class="key-{i}">{html.escape(one.name)}</span>' for i, one in enumerate(lines))
        legend = f'<span class="legend">{"".join(names)}</span>'
    return _draw_figure(title, legend, parts)


def draw_histogram(title: str, edges: Sequence[int], counts: Sequence[int], color: int) -> str:
    """Draw a bar over [edges[i], edges[i + 1]) tokens for each count."""
    ticks = _choose_ticks(0, max(counts))
    frame = _Frame(edges[0], edges[-1], 0, ticks[-1])
    parts = [frame.grid(ticks), frame.x_labels(edges[0], "tokens", edges[-1])]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, top = frame.x(low), frame.y(count)
        words = f"{low:,}–{high - 1:,}: {count:,}"
        parts.append(
            f'<rect class="bar-{color}" x="{x + 0.5:.1f}" y="{top:.1f}" width="{max(frame.x(high) - x - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{words}</title></rect>'
        )
    return _draw_figure(title, "", parts)


def format_short(value: float) -> str:
    """Format a number for an axis: 0.00015, 12.5, 1,200, 81k, 3.2M, 1.4G."""
    size = abs(value)
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size >= factor:
            scaled = value / (1e3 if unit == "k" else factor)
            return f"{scaled:.3g}{unit}" if abs(scaled) < 1000 else f"{scaled:,.0f}{unit}"
    return f"{value:,.0f}" if value == int(value) or size >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class _Frame:
    """Maps values to positions in the drawing."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    is_logarithmic: bool = False

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low_y, self.high_y
        if self.is_logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, ticks: Sequence[float]) -> str:
        lines = []
        for tick in ticks:
            y = self.y(tick)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(
                f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_short(tick)}</text>'
            )
        return "".join(lines)

    def x_labels(self, low: float, name: str, high: float) -> str:
        """Label the x axis: its ends, and its name between them."""
        labels = (
            (LEFT, "start", format_short(low)),
            ((LEFT + WIDTH - RIGHT) / 2, "middle", name),
            (self.x(high), "end", format_short(high)),
        )
        return "".join(
            f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{text}</text>'
            for x, anchor, text in labels
        )


def _draw_figure(title: str, legend: str, parts: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f"<figure><figcaption>{name}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def _choose_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that cover low to high: (0.13, 2.4) -> [0, 1, 2, 3]."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin if low else 0.0, high + margin
    raw = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _list_powers_of_ten(low: float, high: float) -> list[float]:
    """Return about NUM_TICKS powers of ten that cover low to high: (0.002, 7) -> [0.001, 0.01, 0.1, 1, 10]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // (NUM_TICKS + 1))
    return [10.0**power for power in range(first, last + step, step)]


def _thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce points to about MAX_POINTS by averaging neighboring points; the last point stays as it is."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]
