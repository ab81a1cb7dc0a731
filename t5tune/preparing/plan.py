"""The plan of a token cache: its datasets, and its tokenizer and template if they come from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t5tune.data.caches.mixing import Mixing
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings


@dataclass(frozen=True)
class Origin:
    """The origin of a token cache's tokenizer and template, and its purpose.

    Args:
        checkpoint: of a run that was trained on the existing cache. So a cache of different inputs must not replace it,
            and its conversation template is used again, unless the settings name a template.
        tokenizer_source: a cache or an adapter whose tokenizer and conversation template replace the base's.
        setting: the setting that the paths come from, for messages.
        is_evaluation: the examples are for evaluation, so other splits of a dataset on the Hub are the default.
        rejected_file: lists the rejected records if there are too many; default: `cache.rejected.jsonl`, next to it.
        run: the run folder that train prepares for; train mixes datasets and holds out examples itself.
        run_split: what train holds out; None: only what prepare held out.
    """

    checkpoint: Path | None = None
    tokenizer_source: Path | None = None
    setting: str = "data_path"
    is_evaluation: bool = False
    rejected_file: Path | None = None
    run: Path | None = None
    run_split: SplitSettings | None = None


@dataclass(frozen=True)
class PreparePlan:
    """What prepare writes.

    Args:
        add_tokens: as in the settings; unused if the origin or a token cache has the vocabulary.
        shard: the part to prepare, such as 0/3 or auto; None: all.
        join: whether to join existing parts only.
        num_spare_rows: unused embedding rows that the base will have at least, when it is trimmed.
    """

    datasets: Sequence[DatasetSpec]
    base: BaseModelSettings
    output_dir: Path
    split: SplitSettings
    add_tokens: list[str]
    mixing: Mixing = Mixing()
    shard: str | None = None
    join: bool = False
    num_spare_rows: int = 0
    origin: Origin = Origin()
