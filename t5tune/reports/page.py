"""The common parts of the HTML pages: style sheet, frame, tables, and histograms of the examples' lengths."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from t5tune.data.caches.cache_view import Histogram
from t5tune.formatting import format_number
from t5tune.io.atomic import write_file
from t5tune.label_metrics import ALL, LabelTable, describe_labels, show_label
from t5tune.reports.svg import Series, draw_confusion_matrix, draw_histogram, draw_line_chart

NO_LABEL = "(no label)"
STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --text: #1f2937; --soft: #6b7280; --line: #d1d5db; --card: #f9fafb;
  --c0: #2563eb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #0e7490; --c5: #be185d;
  --cut: #b91c1c; --mark: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #0f172a; --text: #e2e8f0; --soft: #94a3b8; --line: #334155; --card: #1e293b;
    --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80; --c3: #c084fc; --c4: #22d3ee; --c5: #f472b6;
    --cut: #fca5a5; --mark: #fde047;
  }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--back); color: var(--text);
       max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); margin: .2rem 0 1rem; } .charts + .soft { margin-top: .7rem; }
.cards { margin-top: 1rem; display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; }
.cards div, figure, article { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
                              padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.25rem; font-weight: 600; }
.cards span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .9rem; }
.narrow { max-width: 36rem; margin-top: .9rem; }
figcaption { font-weight: 600; font-size: .9rem; display: flex; flex-wrap: wrap; justify-content: space-between; }
.note { color: var(--soft); font-size: .8rem; margin: 0; }
svg { display: block; width: 100%; height: auto; }
.axis { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--line); stroke-width: .6; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line-0 { stroke: var(--c0); } .line-1 { stroke: var(--c1); } .line-2 { stroke: var(--c2); }
.line-3 { stroke: var(--c3); } .line-4 { stroke: var(--c4); } .line-5 { stroke: var(--c5); }
.raw { stroke-width: 1; opacity: .5; }
circle { stroke: var(--card); stroke-width: 1; }
.dot-0, .bar-0 { fill: var(--c0); } .dot-1 { fill: var(--c1); } .dot-2, .bar-2 { fill: var(--c2); }
.dot-3 { fill: var(--c3); } .dot-4 { fill: var(--c4); } .dot-5, .bar-5 { fill: var(--c5); }
.count { fill: var(--text); font-size: 11px; text-anchor: middle; pointer-events: none; }
.legend { font-weight: 400; } .legend span { margin-left: .9rem; }
.key-0, .source { color: var(--c0); } .key-1 { color: var(--c1); } .key-2, .target, .label { color: var(--c2); }
.key-3, .rejected { color: var(--c3); } .key-4 { color: var(--c4); } .key-5 { color: var(--c5); }
.cut { color: var(--cut); text-decoration: line-through; }
.added { color: var(--mark); } .special { color: var(--soft); }
.unknown { background: var(--cut); color: var(--back); border-radius: .2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .8rem .4rem 0; vertical-align: top;
         overflow-wrap: anywhere; }
pre, .samples td { white-space: pre-wrap; overflow-wrap: anywhere; }
pre, .settings td { font: 13px/1.5 ui-monospace, monospace; }
.samples { table-layout: fixed; } .samples .loss { width: 6.5rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 1.2rem 0 .3rem; }
.scroll { overflow: auto; max-height: 32rem; margin-bottom: 1rem; } .scroll :is(th, td) { white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); margin-top: .6rem; }
details pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
article { margin: 1rem 0; } article p { margin: 0; } article pre { margin: 0 0 .5rem; }
.colors { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; font-size: .9rem; }
@media (max-width: 40rem) {
  .samples tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .samples th { display: none; } .samples td { display: block; border: 0; padding: .2rem 0; }
  .samples td::before { content: attr(data-name); display: block; color: var(--soft); font-size: .8rem; }
}
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write an HTML page that needs no network, through a temporary file."""
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    )
    write_file(path, (f"{part}\n".encode(errors="backslashreplace") for part in chain([head], parts)))


def render_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), kind: str = "") -> str:
    """Render a table; `kind` is its class in the style sheet."""
    lines = [
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
        for tag, cells in [("th", header), *(("td", row) for row in rows)]
        if cells
    ]
    return f'<table class="{kind}">{"".join(lines)}</table>'


def render_labels(tables: Mapping[str, LabelTable]) -> Iterator[str]:
    """Render how labels were predicted, by dataset: the confusion matrix, and a table of the classes."""
    for dataset, table in tables.items():
        classes, counts = table["classes"], table["confusion"]
        rest = [NO_LABEL] if any(scores.get("no_label") for scores in classes.values()) else []
        names = {label: show_label(label) for label in classes}
        counts = {
            names[label]: {names[found]: count for found, count in row.items()}
            | {NO_LABEL: classes[label].get("no_label", 0)}
            for label, row in counts.items()
        }
        rows = (
            [names[label], *(format_number(round(value, 1)) for value in each.values())]
            for label, each in classes.items()
        )
        header = ["class", "precision", "recall", "F1", "support", "no label"][: 1 + len(next(iter(classes.values())))]
        yield f"<h2>Labels{html.escape(f' of {dataset}' if dataset != ALL else '')}</h2>"
        yield f'<p class="soft">{html.escape(describe_labels(table))}</p>'
        if counts:
            yield draw_confusion_matrix("Confusion matrix", counts, rest)
        if bins := table.get("calibration"):
            found = Series("accuracy (%)", [(each["confidence"], each["accuracy"]) for each in bins], is_marked=True)
            lines = [Series("ideal", [(0, 0), (100, 100)]), found]
            yield f'<div class="narrow">{draw_line_chart("Calibration", lines, x_name="probability (%)")}</div>'
        yield f'<h3>By class</h3><div class="scroll">{render_table(rows, header)}</div>'


def draw_length_charts(sources: Histogram, targets: Histogram | None) -> str:
    """Draw the histograms of the examples' lengths next to each other."""
    charts = (
        draw_histogram(f"{name} length", bars, color)
        for color, name, bars in ((0, "Source", sources), (2, "Target", targets))
        if bars is not None
    )
    return f'<div class="charts">{"".join(charts)}</div>'
