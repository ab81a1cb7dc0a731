"""`t5tune prepare`: encode conversations to a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from t5tune.errors import T5TuneError
from t5tune.preparing.dataset import Origin
from t5tune.preparing.datasets import prepare_datasets
from t5tune.progress import Report, silent
from t5tune.settings import PrepareSettings

ALONE = Origin()


@dataclass(frozen=True)
class PrepareResult:
    """The token cache and its counts. `conversations` and `rejected` count records, `truncated_*` counts examples.

    Args:
        up_to_date: the cache existed already and was made from the same inputs, so it wasn't written again.
        shard: the part that was prepared, such as 0/3; None without `--shard`.
        joined: whether the parts are joined, so that the cache is there; if not, the counts are those of the part. None
            without `--shard` and `--join`.
        datasets: the examples of each dataset, if there are several.
    """

    cache: Path
    conversations: int
    rejected: int
    examples: int
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


def prepare(settings: PrepareSettings, report: Report = silent, origin: Origin = ALONE) -> PrepareResult:
    """Write the token cache of the conversations, or keep an existing one that was made from the same inputs.

    With `settings.shard`, write a part of it, and join the parts if all are complete; with `settings.join`, only join.

    Args:
        origin: what the cache takes from elsewhere, if it is for a run.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: the data contains nothing to train on, or a file in the way isn't a token cache.
        ModelError: the base has no usable tokenizer, or too few unused embedding rows for the added tokens.
        SettingsError: there is no such conversation template, or other parts were made from other inputs.
    """
    started = time.monotonic()
    try:
        manifest, facts = prepare_datasets(settings, report, origin)
    except OSError as error:
        place = error.filename or settings.output_dir
        raise T5TuneError(f"{os.fsdecode(place)}: {error.strerror or error}") from error
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
