"""Line charts, histograms and confusion matrices as inline SVG, in the colors of the surrounding page.

    draw_line_chart("Loss", [Series("training", [(1, 2.5), (2, 1.9)])])

The page's style sheet defines the colors of the classes `axis`, `grid`, `line-0`, `line-1`, …, `bar-0`, …, `bar-5`.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median

from t5tune.data.caches.cache_view import Histogram
from t5tune.formatting import shorten

WIDTH, HEIGHT = 520, 210  # of the drawing; the page scales it
FRAME = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34  # margins for the labels
MAX_POINTS = 300
NUM_TICKS = 4
NUM_COLORS = 6  # of lines, in the page's style sheet
LOGARITHMIC_FROM = 100  # ratio of the largest to the smallest value; smaller ratios need no logarithmic axis
DOTS_UP_TO = 40  # points of a series; in longer series, points get no dots
SMOOTH_FROM = 20  # points; shorter series are not smoothed
MIN_SMOOTHING_WINDOW = 5  # points; a longer series has a window of 5% of its points
MATRIX_WIDTH, MAX_CELL, MIN_CELL = 800, 44, 10  # of a confusion matrix and of one of its cells
MIN_COUNTED_CELL = 20  # a smaller cell has no room for its count
MAX_CLASSES, MAX_CHARACTERS, CHARACTER_WIDTH = 100, 24, 6.4  # of a matrix; Chinese is twice as wide

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line through the points (x, y), which are in the order of x."""

    name: str
    points: Points
    is_marked: bool = False  # each point gets a dot, also in a long series
    is_smoothed: bool = False  # the line is a running median, with the points as a faint line


def draw_line_chart(title: str, series: Sequence[Series], allow_log: bool = False, x_name: str = "step") -> str:
    """Draw the finite values of the series over the steps, in one chart; "" without finite values.

    Args:
        allow_log: use a logarithmic y axis if the values span a factor of LOGARITHMIC_FROM or more.
    """
    lines = [replace(line, points=[point for point in line.points if math.isfinite(point[1])]) for line in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    points = [point for line in lines for point in _thin_out(line.points)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    is_logarithmic = allow_log and low > 0 and high / low >= LOGARITHMIC_FROM
    ticks = _list_powers_of_ten(low, high) if is_logarithmic else _choose_ticks(low, high)
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    frame = _Frame(low_x, high_x if high_x > low_x else low_x + 1, ticks[0], ticks[-1], is_logarithmic)
    parts = [frame.grid(ticks), frame.x_labels(format_short(low_x), x_name, format_short(high_x))]
    notes = []
    for number, line in zip(cycle(range(NUM_COLORS)), lines, strict=False):
        shown = _thin_out(line.points)
        if line.is_smoothed and len(line.points) >= SMOOTH_FROM:
            window = max(MIN_SMOOTHING_WINDOW, len(line.points) // 20) | 1
            notes.append(f"{line.name}: running median of {window} values; faint: each logged value")
            parts.append(frame.line(shown, f"raw line-{number}"))
            parts.append(frame.line(_thin_out(_compute_running_median(line.points, window)), f"line-{number}"))
            continue
        parts.append(frame.line(shown, f"line-{number}"))
        if line.is_marked or len(shown) <= DOTS_UP_TO:
            parts += [frame.dot(point, line.name, number, x_name) for point in shown]
    names = (f'<span class="key-{i % NUM_COLORS}">{html.escape(line.name)}</span>' for i, line in enumerate(lines))
    legend = f'<span class="legend">{" ".join(names)}</span>' if len(lines) > 1 else ""
    return _draw_figure(f"{title} (log scale)" if is_logarithmic else title, legend, parts, "; ".join(notes))


def draw_histogram(title: str, bars: Histogram, color: int) -> str:
    """Draw a bar for each count; all bars have the same width, even the bar of a long tail."""
    edges, labels = bars.edges, bars.label_bars()
    end = edges[-2] + edges[1] - edges[0]
    ticks = _choose_ticks(0, max(bars.counts))
    frame = _Frame(edges[0], end, 0, ticks[-1])
    parts = [frame.grid(ticks), frame.x_labels(f"{edges[0]:,}", "tokens", labels[-1] if bars.has_tail else f"{end:,}")]
    for low, high, label, count in zip(edges, [*edges[1:-1], end], labels, bars.counts, strict=False):
        x, top = frame.x(low), frame.y(count)
        parts.append(
            f'<rect class="bar-{color}" x="{x + 0.5:.1f}" y="{top:.1f}" width="{max(frame.x(high) - x - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{label}: {count:,}</title></rect>'
        )
    return _draw_figure(title, "", parts)


def draw_confusion_matrix(title: str, counts: Mapping[str, Mapping[str, int]], rest: Sequence[str] = ()) -> str:
    """Draw the counts (class -> prediction -> how often) of the first MAX_CLASSES; `rest`: predictions of no class.

    A cell is as dark as its share of its row, blue if the prediction is right and red if it is wrong.
    """
    columns = [*(rows := list(counts)[:MAX_CLASSES]), *rest]
    size = max(MIN_CELL, min(MAX_CELL, MATRIX_WIDTH / len(columns)))
    names = {name: shorten(name, MAX_CHARACTERS) for name in columns}
    margin = 10 + max(sum(CHARACTER_WIDTH * (1 + (c > "\u2e80")) for c in name) for name in names.values())
    style, parts = f'class="axis" style="font-size: {min(11, size):.0f}px"', list[str]()

    def write(name: str, x: float, y: float, rotation: int, anchor: str) -> str:
        place = f'transform="translate({x:.1f} {y:.1f}) rotate({rotation})" text-anchor="{anchor}"'
        return f"<text {style} {place}>{html.escape(names[name])}</text>"

    parts += [write(name, margin + size * (x + 0.5) + 4, margin - 5, -90, "start") for x, name in enumerate(columns)]
    for number, row in enumerate(rows):
        y, total = margin + size * number, sum(counts[row].values())
        parts.append(write(row, margin - 5, y + size / 2 + 4, 0, "end"))
        for x, column in ((margin + size * place, column) for place, column in enumerate(columns)):
            if count := counts[row].get(column, 0):
                place = f'x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
                color = f'class="bar-{0 if row == column else 5}" fill-opacity="{0.1 + 0.6 * count / total:.2f}"'
                words = html.escape(f"{row} → {column}: {count:,} of {total:,}")
                parts.append(f"<rect {color} {place}><title>{words}</title></rect>")
                if size >= MIN_COUNTED_CELL:
                    place = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
                    parts.append(f'<text class="count" {place}>{format_short(count)}</text>')
    drawn = f"; only the first {MAX_CLASSES} of {len(counts):,} classes" if len(counts) > MAX_CLASSES else ""
    width, height = margin + size * len(columns), margin + size * len(rows)
    frame = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width: {width:.0f}px"'
    return _draw_figure(title, "", parts, f"Each row is a true class, each column a prediction{drawn}", frame)


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
        return "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_short(tick)}</text>'
            for tick, y in ((tick, self.y(tick)) for tick in ticks)
        )

    def line(self, points: Points, css_class: str) -> str:
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{css_class}" points="{places}"/>'

    def dot(self, point: tuple[float, float], name: str, number: int, x_name: str) -> str:
        words = html.escape(f"{name}: {format_short(point[1])} at {x_name} {format_short(point[0])}")
        place = f'cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}"'
        return f'<circle class="dot-{number}" {place} r="3"><title>{words}</title></circle>'

    def x_labels(self, low: str, name: str, high: str) -> str:
        labels = (
            (LEFT, "start", low),
            ((LEFT + WIDTH - RIGHT) / 2, "middle", name),
            (WIDTH - RIGHT, "end", high),
        )
        return "".join(
            f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{text}</text>'
            for x, anchor, text in labels
        )


def _draw_figure(title: str, legend: str, parts: Sequence[str], note: str = "", frame: str = FRAME) -> str:
    name = html.escape(title)
    explanation = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption>{name}{legend}</figcaption>{explanation}"
        f'<svg {frame} role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
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
    # without the rounding error of the product, however small the numbers are
    digits = 3 - math.floor(math.log10(step))
    return [round(number * step, digits) for number in range(first, last + 1)]


def _list_powers_of_ten(low: float, high: float) -> list[float]:
    """Return about NUM_TICKS powers of ten that cover low to high: (0.002, 7) -> [0.001, 0.01, 0.1, 1, 10]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // (NUM_TICKS + 1))
    return [10.0**power for power in range(first, last + step, step)]


def _compute_running_median(points: Points, window: int) -> Points:
    """Replace each y by the median of a window around it, which is narrower toward the ends of the line.

    Unlike an exponential average, a centered window isn't late when the loss falls, and single outliers vanish.
    """
    values = [y for _, y in points]
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        smoothed.append((x, float(median(values[index - reach : index + reach + 1]))))
    return smoothed


def _thin_out(points: Points) -> Points:
    """Reduce points to about MAX_POINTS by averaging neighboring points; the last point stays as it is."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]
