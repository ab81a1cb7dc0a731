"""`t5tune prepare`: encode conversations to a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from t5tune.data.caches.mixing import Mixing, choose_mixing
from t5tune.preparing.dataset import refuse_caches
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.plan import PreparePlan
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Report, silent
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import list_shared
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings


@dataclass(frozen=True)
class PrepareResult:
    """The token cache and its counts. `conversations` and `rejected` count records, `truncated_*` counts examples.

    Args:
        held_out: how many of the examples are held out; None without `eval_fraction`.
        up_to_date: the cache existed already and was made from the same inputs, so it wasn't written again.
        shard: the part that was prepared, such as 0/3; None without `--shard`.
        joined: whether the parts are joined into the cache; if not, the counts are for the part alone. None
            without `--shard` and `--join`.
        datasets: the examples of each dataset, if there are several.
    """

    cache: Path
    conversations: int
    rejected: int
    examples: int
    held_out: int | None
    source_tokens: int
    target_tokens: int
    truncated_sources: int
    truncated_targets: int
    unknown_tokens: int
    added_tokens: int
    up_to_date: bool
    seconds: float
    shard: str | None = None
    joined: bool | None = None
    datasets: dict[str, int] | None = None


def prepare(settings: PrepareSettings, report: Report = silent) -> PrepareResult:
    """Write the token cache of the conversations, or keep an existing one that was made from the same inputs.

    With `settings.shard`, write a part of it, and join the parts if all are complete; with `settings.join`, only join.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: the data contains nothing to train on, or a file in the way isn't a token cache.
        ModelError: the base has no usable tokenizer, or too few unused embedding rows for the added tokens.
        SettingsError: there is no such conversation template, or other parts were made from different inputs.
    """
    started = time.monotonic()
    manifest, facts = prepare_datasets(make_plan(settings), report)
    counts: dict[str, Any] = {
        field.name: manifest[field.name] for field in fields(PrepareResult) if isinstance(manifest.get(field.name), int)
    }
    return PrepareResult(
        cache=settings.output_dir,
        **counts,
        added_tokens=len(manifest["added_tokens"]),
        seconds=round(time.monotonic() - started, 3),
        **facts,
    )


def make_plan(settings: PrepareSettings) -> PreparePlan:
    """Decide how each dataset is read and written."""
    if settings.data is None:
        refuse_caches(settings.data_path, "data_path")
    names = settings.model_fields_set & {*select_settings(PrepareSettings, Affects.CACHE), "conversation_template"}
    return PreparePlan(
        datasets=resolve_datasets(
            settings.list_datasets(),
            list_shared(settings),
            must_match={name: getattr(settings, name) for name in names},
        ),
        base=settings.select_part(BaseModelSettings),
        output_dir=settings.output_dir,
        split=settings.select_part(SplitSettings),
        add_tokens=settings.add_tokens,
        mixing=choose_mixing(settings) or Mixing(),
        shard=settings.shard,
        join=settings.join,
    )
