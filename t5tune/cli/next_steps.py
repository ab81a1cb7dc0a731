"""Next steps after a command: the path of a run's report, and the commands to type next."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.checkpoints.training_data import read_training_data
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import has_examples, list_caches
from t5tune.data.reading.files import find_data_suffix
from t5tune.data.reading.sources import is_dataset_name
from t5tune.file_names import ADAPTER_CONFIG_FILE, MODEL_CARD_FILE, REPORT_FILE, TEXT_SUFFIXES, TRAINING_DATA_FILE
from t5tune.io.atomic import find_unused_folder
from t5tune.runs.checkpoints import list_checkpoints
from t5tune.runs.plan import RunPlan
from t5tune.settings import (
    EvaluateSettings,
    ExportSettings,
    MergeSettings,
    PrepareSettings,
    QuantizationSettings,
    Settings,
    TrainSettings,
    TrimSettings,
)
from t5tune.settings.flags import list_flags, list_without_flags
from t5tune.settings.groups.record_format import KINDS

DATA_PLACEHOLDER = "DATA.jsonl"
BASE_FLAGS = ("model_name_or_path", "revision", "cache_dir", "family")
NOT_REPEATED = {"model_name_or_path", "output_dir", "overwrite", "compare_base"}  # when a model is evaluated again
TRAINING_FLAGS = TrainSettings.model_fields.keys() - {*BASE_FLAGS[:3], "data_path", "output_dir"}  # after trim
READING_FLAGS = (
    "objective", "data_subset", "model_max_length", "merge_same_role", "clean", "max_record_bytes", "encoding",
    "header", "pair_lines",
)  # fmt: skip
MODEL_FLAGS = (*BASE_FLAGS[1:], "adapter", *QuantizationSettings.model_fields, "bf16", "use_cpu", "device")


def list_next_steps(settings: Settings, result: Any) -> list[tuple[str, str]]:
    """List (label, line) pairs to show after a command."""
    match settings:
        case PrepareSettings():
            commands = _follow_prepare(settings, result.cache)
        case TrainSettings():
            commands = _follow_train(settings, result)
        case ExportSettings():
            commands = _follow_export(result.adapter)
        case MergeSettings() if settings.to == "checkpoint":
            commands = _follow_merge(result.checkpoint)
        case MergeSettings() if settings.to == "onnx":
            return [("next", f"{result.checkpoint / MODEL_CARD_FILE} says how to try the model in a browser")]
        case TrimSettings():
            commands = _follow_trim(settings, result.checkpoint)
        case EvaluateSettings():
            commands = _follow_evaluate(settings, writes_text=result.perplexity is not None)
        case _:
            commands = iter(())
    steps = [("next" if number == 0 else "", shlex.join(["t5tune", *words])) for number, words in enumerate(commands)]
    if isinstance(settings, TrainSettings | EvaluateSettings):
        folder = result.run if isinstance(settings, TrainSettings) else result.predictions.parent
        if (report := folder / REPORT_FILE).is_file():
            steps.insert(0, ("report", str(report)))
    return steps


def _follow_prepare(settings: PrepareSettings, cache: Path) -> Iterator[list[str]]:
    first, *others = list_caches(cache).values()
    yield ["inspect", str(first if others else cache)]
    uses_pocket = settings.model_name_or_path == "pocket"
    base = ["--config", "pocket"] if uses_pocket else [*_repeat(settings, BASE_FLAGS), "--learning-rate", "3e-4"]
    yield ["train", *base, "--data-path", str(cache), "--output-dir", _name_output("run")]


def _follow_train(settings: TrainSettings, result: Any) -> Iterator[list[str]]:
    is_adapted = _is_trained_on_text(result.run)
    if not is_adapted:
        yield ["chat", str(result.run)]
    if (data := _repeat_held_out(make_run_plan(settings), has_evaluated=bool(result.eval))) is not None:
        yield ["evaluate", str(result.run), *data]
    if settings.train_mode == "lora":
        base = _repeat(settings, ("cache_dir",))
        yield ["merge", str(result.run), *base, "--output-dir", _name_output("merged")]
    elif is_adapted:
        yield _fine_tune(result.run)


def _is_trained_on_text(model: Path) -> bool:
    """Whether a model learned only to fill in masked spans: it is to be fine-tuned before it can chat."""
    made = read_training_data(model)
    return made is not None and KINDS[made.objective] == "raw text"


def _fine_tune(base: Path, data: Sequence[str] = (DATA_PLACEHOLDER,)) -> list[str]:
    words = ["train", "--model-name-or-path", str(base), "--data-path", *data]
    return [*words, "--learning-rate", "3e-4", "--output-dir", _name_output("run")]


def _follow_export(adapter: Path) -> Iterator[list[str]]:
    if not _is_trained_on_text(adapter):
        yield ["chat", str(adapter)]
    yield ["merge", str(adapter), "--output-dir", _name_output("merged")]


def _follow_merge(checkpoint: Path) -> Iterator[list[str]]:
    if _is_trained_on_text(checkpoint):
        yield _fine_tune(checkpoint)
        return
    yield ["chat", str(checkpoint)]
    yield ["evaluate", str(checkpoint), "--data-path", "HELD_OUT.jsonl"]


def _follow_trim(settings: TrimSettings, checkpoint: Path) -> Iterator[list[str]]:
    if (checkpoint / TRAINING_DATA_FILE).is_file() and not _is_trained_on_text(checkpoint):  # of a merged model
        yield ["chat", str(checkpoint)]
        return
    paths = [] if settings.data is not None or "-" in settings.data_path else settings.data_path
    only_adds_tokens = () if {"objective", "pair_lines"} & settings.model_fields_set else TEXT_SUFFIXES
    # not a token cache, since its ids are the base's
    data = [
        path
        for path in paths
        if not has_examples(Path(path)) and find_data_suffix(Path(path), True) not in only_adds_tokens
    ]
    reading = _repeat(settings, tuple(name for name in TrimSettings.model_fields if name in TRAINING_FLAGS))
    yield _fine_tune(checkpoint, [*(data or [DATA_PLACEHOLDER]), *reading])


def _follow_evaluate(settings: EvaluateSettings, writes_text: bool) -> Iterator[list[str]]:
    model = settings.model_name_or_path
    yield ["chat", model, *_repeat_given(settings, MODEL_FLAGS)]
    is_adapter = settings.adapter is not None or _contains_adapter(Path(model))
    if is_adapter and writes_text and not settings.compare_base and not list_without_flags(settings):
        again = settings.model_copy(update={"data_path": _name_data(settings.data_path)})
        names = tuple(name for name in EvaluateSettings.model_fields if name not in NOT_REPEATED)
        yield ["evaluate", model, *_repeat_given(again, names), "--compare-base"]
    if settings.adapter is not None:
        base = [*_repeat(settings, BASE_FLAGS), "--adapter", str(settings.adapter)]
        yield ["merge", *base, "--output-dir", _name_output("merged")]
    elif is_adapter:
        yield ["merge", model, *_repeat(settings, ("cache_dir",)), "--output-dir", _name_output("merged")]


def _repeat_held_out(plan: RunPlan, has_evaluated: bool) -> list[str] | None:
    """Return the flags with which `evaluate` reads a run's held-out data as training did; None if no flags can.

    evaluate takes the columns, the format and the prefix from the run.
    """
    data, paths = plan.data, plan.data.eval_data_path
    is_cached = all(each.cache for each in plan.eval_datasets or plan.datasets)
    if paths is None and has_evaluated:
        paths, is_cached = [str(plan.data_folder)], True  # evaluate takes the held-out examples
    if paths is None or "-" in paths:
        return ["--data-path", *_name_data(paths)]
    # train reads data_subset from each dataset; a flag can't say that
    if "eval_data" in list_without_flags(plan.given) or (data.eval_data and data.data_subset is not None):
        return None
    names = [name for name in READING_FLAGS if name != "objective" or data.kind == "raw text"]
    if is_cached:  # tokenized data is read without these
        names = []
    elif not any(map(is_dataset_name, paths)):
        names.remove("data_subset")  # then it is only for the training data
    read = EvaluateSettings(
        model_name_or_path=plan.model.base.model_name_or_path,
        data_path=paths,
        data=data.eval_data,
        data_split=data.eval_data_split,
        **{name: getattr(plan.data, name) for name in names},
    )
    return [*_repeat(read, ("data_path", "data_split", *names))]


def _repeat(settings: Settings, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the flags of settings that differ from their defaults."""
    return chain.from_iterable(list_flags(settings, names))


def _repeat_given(settings: Settings, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the flags of given settings, even of defaults, which may differ from the values in training."""
    return chain.from_iterable(list_flags(settings, names, settings.model_fields_set))


def _name_data(paths: list[str] | None) -> list[str]:
    """Return the data to evaluate on, or a placeholder for standard input, which can't be read again."""
    return paths if paths and "-" not in paths else ["HELD_OUT.jsonl"]


def _contains_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter, at its top or, for a stopped run, in a checkpoint."""
    return any((place / ADAPTER_CONFIG_FILE).is_file() for place in (folder, *list_checkpoints(folder)))


def _name_output(name: str) -> str:
    return str(find_unused_folder(Path(name)))
