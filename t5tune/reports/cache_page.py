"""HTML page with examples of a token cache and their lengths: one file that needs no network."""

import html
from collections.abc import Iterator
from pathlib import Path

from t5tune.data.cache_view import CacheView, ExampleView, LengthStatistics, TextRun
from t5tune.data.records import LABELED_BAD
from t5tune.data.tokenizer import Tokenizer
from t5tune.reports.page import draw_length_charts, write_page


def write_cache_page(path: Path, examples: CacheView, statistics: LengthStatistics | None) -> None:
    """Write the page."""
    write_page(path, str(examples.cache.folder), _render_page(examples, statistics))


def _render_page(examples: CacheView, statistics: LengthStatistics | None) -> Iterator[str]:
    cache, manifest = examples.cache, examples.cache.manifest
    bad = manifest["rejected_by_reason"].get(LABELED_BAD, 0)
    left_out = f"{bad:,} records labeled bad and left out; " if bad else ""
    yield (
        f'<p class="soft">{len(cache):,} examples from {manifest["conversations"]:,} conversations; '
        f"{manifest['rejected'] - bad:,} records rejected; {left_out}{manifest['unknown_tokens']:,} unknown tokens; "
        f"{manifest['truncated_sources']:,} sources and {manifest['truncated_targets']:,} targets truncated</p>"
    )
    yield (
        '<p class="soft"><span class="source">source</span> · <span class="target">target</span> · '
        '<span class="cut">cut off</span> · <span class="added">↵ added token</span> · '
        '<span class="unknown">unknown token</span></p>'
    )
    if statistics is not None:
        yield draw_length_charts(statistics.source, statistics.target)
        yield (
            f'<p class="soft">Padding in batches of {statistics.batch_size} examples: '
            f"{statistics.padding_by_length:.1%} if examples of similar length are batched, "
            f"{statistics.padding_random:.1%} if batches are random</p>"
        )
    yield "<h2>Examples</h2>"
    for example in examples:
        yield _render_example(example, examples.tokenizer, set(manifest["added_token_ids"]))


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
        f'<article><p class="soft">{facts} · {lengths}</p><pre class="source">{text["source"]}</pre>'
        f'<pre class="target">{text["target"]}</pre></article>'
    )


def _render_run(run: TextRun) -> str:
    text = html.escape(run.text)
    if run.kind == "text":
        return text
    if run.kind == "added":
        text = html.escape(run.text.strip(" \n\t")) or text.replace("\n", "↵\n").replace("\t", "→\t")
    return f'<span class="{run.kind}">{text}</span>'
