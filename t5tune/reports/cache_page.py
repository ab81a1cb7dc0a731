"""HTML page with examples of a token cache and their lengths: one file that needs no network."""

import html
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from t5tune.data.caches.cache import Cache
from t5tune.data.caches.cache_view import CacheView, ExampleView, LengthStatistics, TextRun
from t5tune.data.reading.rejections import LABELED_BAD
from t5tune.data.tokens.splitting import VocabularySplit, tabulate_splits
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.formatting import format_count
from t5tune.reports.page import draw_length_charts, render_table, write_page

MAX_EXAMPLE_CHARACTERS = 10_000_000  # of HTML; browsers need seconds for more
LEGEND = {
    "source": ("source", "the model's input"),
    "target": ("target", "the text that the model learns to write"),
    "rejected": ("rejected", "the worse answer of a preference pair; the target is the better answer"),
    "label": ("[label]", "the label of the token before it, or of the text"),
    "cut": ("cut off", "text beyond model_max_length, which the model never sees"),
    "added": ("{ ↵", "tokens added to the vocabulary; ↵ is a line break"),
    "unknown": ("<unk>", "a character that isn't in the vocabulary"),
    "special": ("</s>", "special tokens, such as the token at the end of a text"),
}


def write_cache_page(
    path: Path, examples: CacheView, statistics: LengthStatistics | None, splits: Sequence[VocabularySplit]
) -> int:
    """Write the page, with as many examples as a browser displays quickly. Return their number."""
    shown = _render_examples(examples)
    heading = _render_heading(len(shown), examples.cache)
    summary = chain(_render_summary(examples, statistics), render_splits(splits))
    write_page(path, str(examples.cache.folder), chain(summary, [heading], shown))
    return len(shown)


def render_splits(splits: Sequence[VocabularySplit]) -> Iterator[str]:
    """Render how vocabularies split texts, with a column for each side of each vocabulary."""
    header, *rows = zip(*tabulate_splits(splits), strict=True)
    yield "<h2>Vocabulary</h2>"
    yield render_table(rows, header)


def _render_summary(examples: CacheView, statistics: LengthStatistics | None) -> Iterator[str]:
    cache, manifest = examples.cache, examples.cache.manifest
    bad = manifest["rejected_by_reason"].get(LABELED_BAD, 0)
    left_out = f"{format_count(bad, 'record')} labeled bad and left out; " if bad else ""
    yield (
        f'<p class="soft">{format_count(len(cache), "example")} from '
        f"{format_count(manifest['conversations'], 'conversation' if cache.label_task is None else 'record')}; "
        f"{format_count(manifest['rejected'] - bad, 'record')} rejected; {left_out}"
        f"{format_count(manifest['unknown_tokens'], 'unknown token')}; "
        f"{format_count(manifest['truncated_sources'], 'source')} and "
        f"{format_count(manifest['truncated_targets'], 'target')} truncated</p>"
    )
    if statistics is not None:
        yield draw_length_charts(statistics.source, statistics.target)
        yield (
            f'<p class="soft">Padding in batches of {format_count(statistics.batch_size, "example")}: '
            f"{statistics.padding_by_length:.1%} if examples of similar length are batched, "
            f"{statistics.padding_random:.1%} if batches are random</p>"
        )


def _render_examples(examples: CacheView) -> list[str]:
    added = set(examples.cache.manifest["added_token_ids"])
    articles: list[str] = []
    size = 0
    for example in examples:
        article = _render_example(example, examples.tokenizer, added)
        size += len(article)
        if articles and size > MAX_EXAMPLE_CHARACTERS:
            break
        articles.append(article)
    return articles


def _render_heading(num_shown: int, cache: Cache) -> str:
    left_out = {"target"} if cache.label_task is not None else {"label"}
    left_out |= set() if cache.has_preferences else {"rejected"}
    items = (
        f'<li><span class="{kind}">{html.escape(sample)}</span>: {html.escape(meaning)}</li>'
        for kind, (sample, meaning) in LEGEND.items()
        if kind not in left_out
    )
    title = f"{num_shown:,} of {format_count(len(cache), 'example')}"
    return f'<h2>{title}</h2><ul class="colors">{"".join(items)}</ul>'


def _render_example(example: ExampleView, tokenizer: Tokenizer, added: set[int]) -> str:
    text = {
        side: "".join(
            f'<span class="cut">{_render_run(run)}</span>' if is_cut else _render_run(run) for run, is_cut in runs
        )
        for side, runs in example.group_runs_by_side(tokenizer, added).items()
    }
    facts = f"example {example.index}"
    if example.labels is None:
        facts += f" · conversation {example.conversation} · turn {example.turn}"
    sides = (
        f'<p class="note">{side}{_format_length(example.lengths.get(side))}</p><pre class="{side}">{shown}</pre>'
        for side, shown in text.items()
    )
    return f'<article><p class="soft">{facts}</p>{"".join(sides)}</article>'


def _format_length(length: tuple[int, int] | None) -> str:
    if length is None:  # a label
        return ""
    tokens, num_cut = format_count(length[0], "token"), length[1]
    return f" ({tokens}, {num_cut:,} cut off)" if num_cut else f" ({tokens})"


def _render_run(run: TextRun) -> str:
    text = html.escape(run.text)
    if run.kind == "text":
        return text
    if run.kind == "added":
        text = html.escape(run.text.strip(" \n\t")) or text.replace("\n", "↵\n").replace("\t", "→\t")
    return f'<span class="{run.kind}">{text}</span>'
