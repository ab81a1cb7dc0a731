"""`t5tune inspect` on the terminal: colored source and target, truncated text struck out, lengths, vocabularies."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Group
from rich.text import Text

from t5tune.cli.output import Output
from t5tune.cli.results import align_columns
from t5tune.commands.inspect import inspect
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.cache_view import CacheView, ExampleView, Histogram, LengthStatistics, TextRun
from t5tune.data.tokens.splitting import VocabularySplit, tabulate_splits
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.formatting import format_count
from t5tune.settings import InspectSettings

STYLES = {
    "source": "cyan", "target": "green", "rejected": "magenta", "added": "yellow", "unknown": "white on red",
    "special": "dim", "label": "green",
}  # fmt: skip
CUT_MARKS = ("[cut: ", "]")  # for output that has no strikethrough
BAR_WIDTH = 40
JSON_FIELDS: tuple[str, ...] = (
    "index", "conversation", "turn", "source_ids", "target_ids", "source_text", "target_text", "truncated",
)  # fmt: skip
PAIR_FIELDS = ("rejected_ids", "rejected_text")
LABEL_FIELDS = ("index", "conversation", "source_ids", "source_text", "labels", "truncated")


def run(settings: InspectSettings, output: Output) -> None:
    """Print the chosen examples and statistics: as text, or as one JSON object per line, the statistics last."""
    found = inspect(settings, output.report)
    if output.json:
        for example in found.examples:
            names = JSON_FIELDS if example.labels is None else LABEL_FIELDS
            names += () if example.rejected_ids is None else PAIR_FIELDS
            output.print_json({name: getattr(example, name) for name in names})
        if found.splits:
            statistics = {} if found.statistics is None else asdict(found.statistics)
            output.print_json({**statistics, "splits": found.splits})
        return
    marks = ("", "") if output.console.color_system else CUT_MARKS
    if isinstance(found.examples, CacheView) and not settings.html:
        for example in found.examples:
            output.print(_render_example(example, found.examples.cache, found.examples.tokenizer, marks))
    if found.statistics is not None and settings.stats:
        output.print(_render_statistics(found.statistics))
    if settings.stats or (settings.cache is None and not settings.html):
        output.print(_render_splits(found.splits))
    if found.page is not None:
        output.print(str(found.page))


def _render_example(example: ExampleView, cache: Cache, tokenizer: Tokenizer, cut_marks: tuple[str, str]) -> Text:
    facts = f"example {example.index} of {len(cache):,}"
    if example.labels is None:
        facts += f", conversation {example.conversation}, turn {example.turn}"
    text = Text.assemble((facts + "\n", "bold"))
    for side, runs in example.group_runs_by_side(tokenizer, set(cache.manifest["added_token_ids"])).items():
        length, cut = example.lengths.get(side, (0, 0))
        lost = f", {cut:,} cut off" if cut else ""
        size = f" ({format_count(length, 'token')}{lost})" if side in example.lengths else ""
        text.append(f"{side}{size}\n", "dim")
        for is_cut, part in groupby(runs, lambda run: run[1]):
            before, after = cut_marks if is_cut else ("", "")
            text.append(before)
            for run, _ in part:
                style = STYLES[side] if run.kind == "text" else STYLES[run.kind]
                text.append(_show_whitespace(run), f"{style} strike dim" if is_cut else style)
            text.append(after)
        text.append("\n")
    return text


def _show_whitespace(run: TextRun) -> str:
    """Make added whitespace tokens visible: ↵ before a newline, → before a tab."""
    if run.kind != "added":
        return run.text
    return run.text.replace("\n", "↵\n").replace("\t", "→\t")


def _render_statistics(statistics: LengthStatistics) -> Text:
    text = Text()
    for name, histogram in (("source", statistics.source), ("target", statistics.target)):
        if histogram is None:
            continue
        text.append(f"{name} length (tokens)\n", "bold")
        text.append_text(_render_bars(histogram, STYLES[name]))
    size = statistics.batch_size
    text.append(
        f"padding in batches of {size}: {statistics.padding_by_length:.1%} grouped by length, "
        f"{statistics.padding_random:.1%} in random order\n"
    )
    return text.append(f"longest examples: {', '.join(map(str, statistics.longest))}")


def _render_splits(splits: Sequence[VocabularySplit]) -> Group:
    rows = tabulate_splits(splits)
    lines: list[Text] = []
    for model, texts, *_, vocabulary, unknown, pieces in rows[1:]:
        lines.append(Text(f"{model}, {vocabulary}, {texts}: {pieces}"))
        lines += [Text(f"  unknown: {unknown}")] * bool(unknown)
    return Group(align_columns([row[:5] for row in rows]), *lines)


def _render_bars(histogram: Histogram, style: str) -> Text:
    text = Text()
    most = max(histogram.counts)
    for label, count in zip(histogram.label_bars(), histogram.counts, strict=True):
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        text.append(f"{label:>15} ")
        text.append(f"{bar:<{BAR_WIDTH}}", style).append(f" {count:,}\n")
    return text
