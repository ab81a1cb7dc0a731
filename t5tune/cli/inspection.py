"""`t5tune inspect` on the terminal: source and target in colour, what was cut struck out, lengths as bars."""

import dataclasses
import json
from typing import TextIO

from rich.console import Console
from rich.text import Text

from t5tune.data.cache import open_cache
from t5tune.data.lengths import Histogram
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.vocabulary import TextRun, text_runs
from t5tune.inspection import Shown, Statistics, inspect
from t5tune.progress import Report
from t5tune.settings import InspectSettings

STYLES = {"source": "cyan", "target": "green", "added": "yellow", "unknown": "white on red", "end": "dim"}
BAR_WIDTH = 40
JSON_FIELDS = ("index", "conversation", "turn", "source_ids", "target_ids", "source_text", "target_text", "truncated")


def show(settings: InspectSettings, report: Report, stream: TextIO, as_json: bool) -> None:
    """Print what was asked for: as text, or one JSON object a line, the statistics' last."""
    found = inspect(settings, report)
    if as_json:
        for example in found.examples:
            print(json.dumps({name: getattr(example, name) for name in JSON_FIELDS}, ensure_ascii=False), file=stream)
        if found.statistics is not None:
            print(json.dumps(dataclasses.asdict(found.statistics)), file=stream)
        return
    console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
    cache = open_cache(settings.cache)
    tokenizer, added = load_tokenizer(cache.tokenizer_folder), set(cache.manifest["added_token_ids"])
    for example in found.examples if not settings.html else []:
        console.print(_example(example, found.num_examples, tokenizer, added), markup=False)
    if found.statistics is not None and settings.stats:
        console.print(_statistics(found.statistics), markup=False)
    if found.page is not None:
        console.print(str(found.page), markup=False)


def _example(example: Shown, count: int, tokenizer: Tokenizer, added: set[int]) -> Text:
    facts = f"example {example.index} of {count:,}, conversation {example.conversation}, turn {example.turn}"
    text = Text.assemble((facts + "\n", "bold"))

    def add(ids: list[int], side: str, cut: bool = False) -> None:
        for run in text_runs(ids, tokenizer, added):
            style = STYLES[side] if run.kind == "text" else STYLES[run.kind]
            text.append(_visible(run), f"{style} strike dim" if cut else style)

    def label(name: str, ids: list[int], cut: list[int]) -> None:
        lost = f", {len(cut):,} cut off" if cut else ""
        text.append(f"{name} ({len(ids):,} tokens{lost})\n", "dim")

    head, target = example.source_head, example.target_ids
    label("source", example.source_ids, example.source_cut)
    add(example.source_ids[:head], "source")
    add(example.source_cut, "source", cut=True)
    add(example.source_ids[head:], "source")
    text.append("\n")
    label("target", target, example.target_cut)
    add(target, "target")
    add(example.target_cut, "target", cut=True)
    return text.append("\n")


def _visible(run: TextRun) -> str:
    """Added white space shown by a sign: a newline as ↵ and a new line, a tab as →."""
    if run.kind != "added":
        return run.text
    return run.text.replace("\n", "↵\n").replace("\t", "→\t")


def _statistics(statistics: Statistics) -> Text:
    text = Text()
    for name, histogram in (("source", statistics.source), ("target", statistics.target)):
        text.append(f"{name} length (tokens)\n", "bold")
        text.append_text(_bars(histogram, STYLES[name]))
    size = statistics.batch_size
    text.append(
        f"padding in batches of {size}: {statistics.padding_by_length:.1%} by length, "
        f"{statistics.padding_random:.1%} at random\n"
    )
    return text.append(f"longest examples: {', '.join(map(str, statistics.longest))}")


def _bars(histogram: Histogram, style: str) -> Text:
    text = Text()
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        text.append(f"{f'{low:,}–{high - 1:,}':>15} ")
        text.append(f"{bar:<{BAR_WIDTH}}", style).append(f" {count:,}\n")
    return text
