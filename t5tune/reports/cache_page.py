"""Examples of a cache and its lengths as one HTML file that needs no network."""

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


def write_page(path: Path, examples: CacheView, statistics: LengthStatistics | None) -> None:
    """Write the page beside `path` and rename it there."""
    write_file(path, (f"{part}\n".encode() for part in _page(examples, statistics)))


def _page(examples: CacheView, statistics: LengthStatistics | None) -> Iterator[str]:
    cache, manifest = examples.cache, examples.cache.manifest
    added = set(manifest["added_token_ids"])
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    yield f"<title>{html.escape(cache.folder.name)}</title><style>{STYLE}</style>"
    yield f"<h1>{html.escape(str(cache.folder))}</h1>"
    bad = manifest["rejected_by_reason"].get(LABELED_BAD, 0)
    left_out = f"{bad:,} labeled bad and left out; " if bad else ""
    yield (
        f'<p class="facts">{len(cache):,} examples of {manifest["conversations"]:,} conversations; '
        f"{manifest['rejected'] - bad:,} records refused; {left_out}{manifest['unknown_tokens']:,} unknown tokens; "
        f"{manifest['truncated_sources']:,} sources and {manifest['truncated_targets']:,} targets cut</p>"
    )
    yield (
        '<p class="facts"><span class="source">source</span> · <span class="target">target</span> · '
        '<span class="cut">cut off</span> · <span class="added">↵ added token</span> · '
        '<span class="unknown">unknown</span></p>'
    )
    if statistics is not None:
        for side, histogram in (("source", statistics.source), ("target", statistics.target)):
            yield f"<h2>{side.capitalize()} length (tokens)</h2>"
            yield from _bars(histogram, side)
        yield (
            f'<p class="facts">Padding in batches of {statistics.batch_size}: '
            f"{statistics.padding_by_length:.1%} by length, {statistics.padding_random:.1%} at random</p>"
        )
    yield "<h2>Examples</h2>"
    for example in examples:
        yield _article(example, examples.tokenizer, added)


def _bars(histogram: Histogram, side: str) -> Iterable[str]:
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        bar = f'<div class="bar {side}" style="width:{100 * count / most:.1f}%"></div>'
        yield f'<div class="row"><span>{low:,}–{high - 1:,}</span><div>{bar}</div><span>{count:,}</span></div>'


def _article(example: ExampleView, tokenizer: Tokenizer, added: set[int]) -> str:
    text = {
        side: "".join(f'<span class="cut">{_marked(run)}</span>' if is_cut else _marked(run) for run, is_cut in runs)
        for side, runs in example.runs(tokenizer, added).items()
    }
    facts = f"example {example.index} · conversation {example.conversation} · turn {example.turn}"
    lengths = f"{len(example.source_ids)} + {len(example.target_ids)} tokens"
    return (
        f'<article><p class="facts">{facts} · {lengths}</p><pre class="source">{text["source"]}</pre>'
        f'<pre class="target">{text["target"]}</pre></article>'
    )


def _marked(run: TextRun) -> str:
    text = html.escape(run.text)
    if run.kind == "text":
        return text
    if run.kind == "added":
        text = html.escape(run.text.strip(" \n\t")) or text.replace("\n", "↵\n").replace("\t", "→\t")
    return f'<span class="{run.kind}">{text}</span>'
