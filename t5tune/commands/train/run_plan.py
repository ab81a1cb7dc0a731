"""Resolve the settings of `train` into the parts that its functions read (runs/plan.py).

run_plan = make_run_plan(settings)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5tune.constraints.reading import read_schema
from t5tune.data.caches.mixing import Mixing, choose_mixing
from t5tune.data.caches.prepared import has_examples, read_datasets
from t5tune.inference.precision import Precision
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import (
    EXAMPLE_SETTINGS,
    DistillationPlan,
    LabelPlan,
    ModelPlan,
    ObjectivePlan,
    PreferencePlan,
    RunPlan,
    TargetPlan,
)
from t5tune.settings import DatasetSettings, TrainSettings
from t5tune.settings.dataset_list import PATHS_OF_DATASETS
from t5tune.settings.dataset_spec import DatasetSpec, list_shared
from t5tune.settings.groups.base import BaseModelSettings, QuantizationSettings
from t5tune.settings.groups.data import TrainingDataSettings
from t5tune.settings.groups.distillation import DistillationSettings
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.hub import HubStrategySettings
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import InitialAdapterSettings
from t5tune.settings.groups.preferences import PreferenceSettings
from t5tune.settings.groups.processes import ProcessSettings
from t5tune.settings.groups.record_format import KINDS
from t5tune.settings.groups.run_output import RunOutputSettings
from t5tune.settings.groups.steps import StepSettings, choose_learning_rate
from t5tune.settings.records_in_memory import find_kept_path


def make_run_plan(settings: TrainSettings) -> RunPlan:
    """Divide the settings into parts, and fill in values that follow from other settings and from given token caches.

    Raises:
        DataError: a token cache is broken, or given together with other data.
        SettingsError: a setting differs from the value that a token cache was made with, or json_schema can't be read.
    """
    settings = _name_kept_records(settings)
    datasets, mixing = resolve_training_data(settings)
    settings = settings.model_copy(update=list_values_of_caches(settings, datasets))
    learning_rate = choose_learning_rate(settings.learning_rate, settings.train_mode, settings.objective)
    settings = settings.model_copy(update={"learning_rate": learning_rate})
    quantization = settings.select_part(QuantizationSettings) if settings.q_lora else None
    # without dropout, the policy has the reference's probabilities in the first step of preference training
    has_dropout = settings.kind != "pairs" if settings.dropout is None else settings.dropout
    model = ModelPlan(
        settings.select_part(BaseModelSettings),
        settings.revision,
        Precision(settings.bf16, quantization),
        settings.select_part(LayerSettings).model_copy(update={"dropout": has_dropout}),
        None if settings.train_mode == "full" else settings.select_part(InitialAdapterSettings),
    )
    return RunPlan(
        settings.select_part(TrainingDataSettings),
        datasets,
        _resolve_eval_datasets(settings, datasets),
        mixing,
        None if settings.json_schema is None else read_schema(settings.json_schema),
        model,
        _resolve_objective(settings),
        settings.select_part(StepSettings),
        settings.select_part(EvaluationSettings),
        settings.select_part(RunOutputSettings),
        settings.select_part(HubStrategySettings),
        settings.select_part(ProcessSettings),
        settings,
    )


def _resolve_objective(settings: TrainSettings) -> ObjectivePlan:
    match settings.objective:
        case "dpo" | "orpo" as objective:
            return PreferencePlan(objective, settings.select_part(PreferenceSettings))
        case "classify" | "regress" | "tag":
            return LabelPlan()
    if settings.teacher_model_name_or_path is not None:
        return DistillationPlan(settings.label_smoothing_factor, settings.select_part(DistillationSettings))
    return TargetPlan(settings.label_smoothing_factor)


def _name_kept_records(settings: TrainSettings) -> TrainSettings:
    """Name records that were given in memory by the files that `train` keeps them in, in the run folder."""
    kept: dict[str, list[str]] = {}
    records = RunFolder(settings.output_dir).records
    for name in PATHS_OF_DATASETS.values():
        paths = getattr(settings, name) or []
        if any(found := [find_kept_path(path, records) for path in paths]):
            kept[name] = [str(new or path) for path, new in zip(paths, found, strict=True)]
    changes: dict[str, Any] = {**kept}
    for data, name in PATHS_OF_DATASETS.items():
        if name in kept and (datasets := getattr(settings, data)) is not None:
            new = dict(zip(getattr(settings, name), kept[name], strict=True))
            changes[data] = [each.model_copy(update={"path": [new[path] for path in each.path]}) for each in datasets]
    return settings.model_copy(update=changes)


def resolve_training_data(settings: TrainingDataSettings) -> tuple[tuple[DatasetSpec, ...], Mixing]:
    """Decide how the datasets to train on are read and mixed; a folder of several token caches has its own mixing."""
    mixing = choose_mixing(settings)
    datasets = settings.list_datasets()
    if (given := _find_given_folder(settings.data, settings.data_path)) is not None:
        datasets, saved = read_datasets(given)
        mixing = mixing or saved
        weights = {} if mixing.kind == "weights" else {"weight": 1.0}
        datasets = [
            each.model_copy(update={**weights, "num_data": _find_smaller(each.num_data, settings.num_data)})
            for each in datasets
        ]
    given_names = settings.model_fields_set & {*EXAMPLE_SETTINGS, "conversation_template"}
    specs = resolve_datasets(
        datasets,
        list_shared(settings),
        setting="data_path" if settings.data is None else "data",
        must_match={name: getattr(settings, name) for name in given_names},
    )
    return specs, mixing or Mixing()


def _find_given_folder(datasets: Sequence[DatasetSettings] | None, paths: list[str]) -> Path | None:
    return Path(paths[0]) if datasets is None and len(paths) == 1 and has_examples(Path(paths[0])) else None


def _find_smaller(first: int | None, second: int | None) -> int | None:
    return min((each for each in (first, second) if each is not None), default=None)


def list_values_of_caches(settings: TrainingDataSettings, datasets: Sequence[DatasetSpec]) -> dict[str, Any]:
    """List the settings that all datasets were made with, if all are token caches.

    Caches of preference pairs fit every objective that reads pairs, so a given objective is kept.
    """
    made_from = [each.made_from for each in datasets]
    if not all(made_from):
        return {}
    first = made_from[0]
    same = {
        name: first[name]
        for name in EXAMPLE_SETTINGS
        if name in first and all(each.get(name) == first[name] for each in made_from)
    }
    objectives = [each.objective for each in datasets]
    if "objective" in settings.model_fields_set:
        same.pop("objective", None)
    elif "objective" not in same and (of_pairs := [each for each in objectives if KINDS[each] == "pairs"]):
        same["objective"] = of_pairs[0]
    return same


def _resolve_eval_datasets(settings: TrainSettings, trained: tuple[DatasetSpec, ...]) -> tuple[DatasetSpec, ...]:
    """Decide how the datasets to evaluate on are read: like training datasets of the same names, if there are any."""
    command = list_shared(settings)
    command.pop("num_data", None)  # num_data limits only the training examples
    if settings.eval_data is not None:
        if settings.data_subset is not None:  # the subset of the training data has the other splits, too
            command["data_subset"] = settings.data_subset
        return resolve_datasets(settings.list_evaluation_datasets(), command, setting="eval_data", trained=trained)
    datasets = settings.list_evaluation_datasets()
    if datasets and (given := _find_given_folder(None, datasets[0].path)) is not None:
        datasets = [each.model_copy(update={"weight": 1.0}) for each in read_datasets(given)[0]]
    return resolve_datasets(datasets, command, setting="eval_data_path")
