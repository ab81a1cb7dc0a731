"""The result of `t5tune evaluate`, and the files with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t5tune.data.reading.remote_files import hide_data_queries
from t5tune.file_names import SCORES_FILE
from t5tune.io.atomic import find_unused_folder, write_json
from t5tune.label_metrics import HEAD_METRICS, LabelTable
from t5tune.metrics import METRICS
from t5tune.settings import EvaluateSettings, write_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import SHARED, DatasetSpec

PREDICTIONS_FILE = "predictions.jsonl"
ALWAYS_SAVED = ("model_name_or_path", "adapter", "data_path", "max_new_tokens", "num_beams", "bf16", "q_lora")
"""Settings that scores.json always contains, even if they have their default values."""
SCORES = tuple(dict.fromkeys(("perplexity", "bits_per_character", *METRICS, *HEAD_METRICS)))
"""The scores, besides the loss. None: it doesn't fit the examples."""
EXAMPLE_SETTINGS = {*select_settings(EvaluateSettings, Affects.CACHE), "conversation_template"} - {"num_data"}
"""Settings that determine the examples in a token cache, except those that evaluate can apply to a cache."""


@dataclass(frozen=True)
class EvaluateResult:
    """The metrics: loss in nats per target token, or the mean of the labels' losses; scores from 0 to 100; seconds.

    Args:
        bits_per_character: the loss of the whole targets per character of their texts, in bits, to compare models
            with different tokenizers; None if spans of raw text were masked.
        exact_match, …, mcc: None: not among the chosen metrics, or no target is JSON or a label.
        ece: expected calibration error of scored choices, or of classes that an encoder predicts.
        recall: recall_at_K -> the percentage of targets among the best K answers of choices_file.
        custom_metrics: the results of custom functions.
        base: the same metrics of the base without the adapter, by name; None without compare_base.
        datasets: the number of examples and the same metrics of each dataset, if there are several; the
            base's metrics have `base_` before their names.
        cut_off: the number of predictions that reached max_new_tokens; under a constraint, they are incomplete.
        signatures: sacreBLEU's signature of BLEU, chrF and chrF++, by name.
        micro_f1, …, rmse: of labels or numbers that an encoder predicts; correlations from -100 to 100, the error in
            the unit of the numbers.
        labels: "all" and each dataset, if there are several, whose targets are labels -> how each label was predicted.
    """

    predictions: Path
    examples: int
    loss: float
    perplexity: float | None = None
    bits_per_character: float | None = None
    exact_match: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rougeL: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    chrf_pp: float | None = None
    valid_json: float | None = None
    field_f1: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    mcc: float | None = None
    micro_f1: float | None = None
    entity_f1: float | None = None
    entity_precision: float | None = None
    entity_recall: float | None = None
    spearman: float | None = None
    pearson: float | None = None
    rmse: float | None = None
    ece: float | None = None
    recall: dict[str, float] | None = None
    custom_metrics: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] | None = None
    seconds: float = 0.0
    cut_off: int = 0
    signatures: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, dict[str, float]] | None = None
    labels: dict[str, LabelTable] | None = None


def choose_folder(settings: EvaluateSettings) -> Path:
    """Choose the output folder: as in the settings, else one that no evaluation has taken."""
    default = Path("evaluation")
    return settings.output_dir or (default if settings.overwrite else find_unused_folder(default))


def inherit_settings(settings: EvaluateSettings, datasets: Sequence[DatasetSpec]) -> tuple[EvaluateSettings, bool]:
    """Return the settings with the values that were taken from training, and whether all data is in token caches."""
    is_prepared = all(each.cache is not None for each in datasets)
    if settings.data is None and not is_prepared:
        settings = settings.model_copy(update=datasets[0].list_given(SHARED - settings.model_fields_set))
    return settings, is_prepared


def write_scores(result: EvaluateResult, settings: EvaluateSettings, is_prepared: bool) -> None:
    """Write scores.json: the result, and the settings."""
    values = {**asdict(result), "predictions": str(result.predictions)}
    folder, described = result.predictions.parent, _describe_settings(settings, is_prepared)
    write_json(folder / SCORES_FILE, {**values, "settings": described})


def write_given_settings(folder: Path, settings: EvaluateSettings, is_prepared: bool) -> None:
    """Write the settings as YAML, so that the evaluation can be repeated."""
    # token caches have their own values; the defaults would be refused when the file is used again
    write_settings(folder, hide_data_queries(settings), leave_out=EXAMPLE_SETTINGS if is_prepared else ())


def _describe_settings(settings: EvaluateSettings, is_prepared: bool) -> dict[str, Any]:
    values = hide_data_queries(settings).model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in EvaluateSettings.model_fields.items()}
    unused = EXAMPLE_SETTINGS if is_prepared else set[str]()
    return {
        name: value
        for name, value in values.items()
        if (name in ALWAYS_SAVED or value != defaults[name]) and name not in unused
    }
