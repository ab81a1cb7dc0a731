"""The page of `t5tune compare`: the table of the runs, and the curves of the best ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from t5tune.reports.page import render_table, write_page
from t5tune.reports.svg import NUM_COLORS, Series, draw_line_chart


def write_comparison_page(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], charts: Mapping[str, Sequence[Series]]
) -> None:
    """Write the page.

    Args:
        charts: title -> lines, the best run's first; only the first NUM_COLORS are drawn.
    """
    drawn = [draw_line_chart(title, lines[:NUM_COLORS], allow_log=True) for title, lines in charts.items()]
    best = f", of the first {NUM_COLORS} runs" if max(map(len, charts.values()), default=0) > NUM_COLORS else ""
    table = f'<div class="scroll">{render_table(rows, header)}</div>'
    write_page(path, "Comparison of runs", [table, f"<h2>Curves{best}</h2>", '<div class="charts">', *drawn, "</div>"])
