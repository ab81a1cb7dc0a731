"""HTML page with examples of a token cache and their lengths: one file that needs no network."""

import html
from collections.abc import Iterable, Iterator
from pathlib import Path

from t5tune.data.cache_view import CacheView, ExampleView, LengthStatistics
from t5tune.data.histogram import Histogram
from t5tune.data.records import LABELED_BAD
from t5tune.data.tokenizer import Tokenizer
from t5tune.data.vocabulary import TextRun
from t5tune.io.atomic import write_file

STYLE = """
:root {
  color-scheme: light dark;
  --line: #8884; --source: #2563eb; --target: #15803d; --cut: #b91c1c; --mark: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root { --source: #93c5fd; --target: #86efac; --cut: #fca5a5; --mark: #fde047; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .2rem 1rem .8rem; margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace; margin: .4rem 0; }
.source { color: var(--source); } .target { color: var(--target); }
.cut { color: var(--cut); text-decoration: line-through; }
.added, .end { color: var(--mark); } .unknown { background: var(--cut); color: #fff; border-radius: .2rem; }
.facts { color: #888; font-size: .9rem; }
.row { display: grid; grid-template-columns: 8rem 1fr 4rem; gap: .6rem; align-items: center; font-size: .85rem; }
.row span { text-align: right; } .bar { background: currentColor; height: .7rem; border-radius: .15rem; }
"""


def write_cache_page(path: Path, examples: CacheView, statistics: LengthStatistics | None) -> None:
    """Write the page to a temporary file next to `path`, and rename it to `path`."""
    write_file(path, (f"{part}\n".encode() for part in _render_page(examples, statistics)))


def _render_page(examples: CacheView, statistics: LengthStatistics | None) -> Iterator[str]:
    cache, manifest = examples.cache, examples.cache.manifest
    added = set(manifest["added_token_ids"])
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    yield f"<title>{html.escape(cache.folder.name)}</title><style>{STYLE}</style>"
    yield f"<h1>{html.escape(str(cache.folder))}</h1>"
    bad = manifest["rejected_by_reason"].get(LABELED_BAD, 0)
    left_out = f"{bad:,} records labeled bad and left out; " if bad else ""
    yield (
        f'<p class="facts">{len(cache):,} examples from {manifest["conversations"]:,} conversations; '
        f"{manifest['rejected'] - bad:,} records rejected; {left_out}{manifest['unknown_tokens']:,} unknown tokens; "
        f"{manifest['truncated_sources']:,} sources and {manifest['truncated_targets']:,} targets truncated</p>"
    )
    yield (
        '<p class="facts"><span class="source">source</span> · <span class="target">target</span> · '
        '<span class="cut">cut off</span> · <span class="added">↵ added token</span> · '
        '<span class="unknown">unknown token</span></p>'
    )
    if statistics is not None:
        yield from _render_statistics(statistics)
    yield "<h2>Examples</h2>"
    for example in examples:
        yield _render_example(example, examples.tokenizer, added)


def _render_statistics(statistics: LengthStatistics) -> Iterator[str]:
    for side, histogram in (("source", statistics.source), ("target", statistics.target)):
        yield f"<h2>{side.capitalize()} length in tokens</h2>"
        yield from _render_bars(histogram, side)
    yield (
        f'<p class="facts">Padding in batches of {statistics.batch_size} examples: '
        f"{statistics.padding_by_length:.1%} if examples of similar length are batched, "
        f"{statistics.padding_random:.1%} if batches are random</p>"
    )


def _render_bars(histogram: Histogram, side: str) -> Iterable[str]:
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        bar = f'<div class="bar {side}" style="width:{100 * count / most:.1f}%"></div>'
        yield f'<div class="row"><span>{low:,}–{high - 1:,}</span><div>{bar}</div><span>{count:,}</span></div>'


def _render_example(example: ExampleView, tokenizer: Tokenizer, added: set[int]) -> str:
    text = {
        side: "".join(
            f'<span class="cut">{_render_run(run)}</span>' if is_cut else _render_run(run) for run, is_cut in runs
        )
        for side, runs in example.group_runs_by_side(tokenizer, added).items()
    }
    facts = f"example {example.index} · conversation {example.conversation} · turn {example.turn}"
    lengths = f"{len(example.source_ids):,} source tokens · {len(example.target_ids):,} target tokens"
    return (
        f'<article><p class="facts">{facts} · {lengths}</p><pre class="source">{text["source"]}</pre>'
        f'<pre class="target">{text["target"]}</pre></article>'
    )


def _render_run(run: TextRun) -> str:
    text = html.escape(run.text)
    if run.kind == "text":
        return text
    if run.kind == "added":
        text = html.escape(run.text.strip(" \n\t")) or text.replace("\n", "↵\n").replace("\t", "→\t")
    return f'<span class="{run.kind}">{text}</span>'
