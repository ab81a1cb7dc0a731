"""What to do after a command: where a run's report is, and the commands to type next."""

import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.file_names import ADAPTER_CONFIG_FILE, CACHE_MANIFEST_FILE
from t5tune.io.atomic import find_unused_folder
from t5tune.reports.run_page import REPORT_FILE
from t5tune.settings import (
    EvaluateSettings,
    ExportSettings,
    MergeSettings,
    PrepareSettings,
    QuantizationSettings,
    Settings,
    TrainSettings,
)
from t5tune.settings.flags import list_flags, list_without_flags
from t5tune.training.checkpoint import list_checkpoints

BASE_FLAGS = ("model_name_or_path", "revision", "cache_dir", "family")
NOT_REPEATED = {"model_name_or_path", "output_dir", "overwrite", "compare_base"}  # when a model is evaluated again
QUANTIZATION_FLAGS = ("q_lora", *(name for name in QuantizationSettings.model_fields if name != "q_lora"), "bf16")
MODEL_FLAGS = (*BASE_FLAGS[1:], "adapter", *QUANTIZATION_FLAGS, "use_cpu", "device")


def list_next_steps(settings: Settings, result: Any) -> list[tuple[str, str]]:
    """List the lines to show after a command, (label, text)."""
    match settings:
        case PrepareSettings():
            commands = _follow_prepare(settings, result.cache)
        case TrainSettings():
            commands = _follow_train(settings, result)
        case ExportSettings():
            commands = _follow_export(result.adapter)
        case MergeSettings() if settings.to == "checkpoint":
            commands = _follow_merge(result.checkpoint)
        case EvaluateSettings():
            commands = _follow_evaluate(settings)
        case _:
            commands = iter(())
    steps = [("next" if number == 0 else "", shlex.join(["t5tune", *words])) for number, words in enumerate(commands)]
    if isinstance(settings, TrainSettings) and (report := result.run / REPORT_FILE).is_file():
        steps.insert(0, ("report", str(report)))
    return steps


def _follow_prepare(settings: PrepareSettings, cache: Path) -> Iterator[list[str]]:
    yield ["inspect", str(cache)]
    uses_pocket = settings.model_name_or_path == "pocket"
    base = ["--config", "pocket"] if uses_pocket else [*_repeat(settings, BASE_FLAGS), "--learning-rate", "3e-4"]
    yield ["train", *base, "--data-path", str(cache), "--output-dir", _name_output("run")]


def _follow_train(settings: TrainSettings, result: Any) -> Iterator[list[str]]:
    as_trained = [*_repeat(settings, QUANTIZATION_FLAGS)] if settings.q_lora else []
    if settings.q_lora and not settings.bf16:
        as_trained.append("--no-bf16")
    yield ["chat", str(result.run), *as_trained]
    held_out = settings.eval_data_path
    if held_out is None and result.eval and _is_cache(settings.data_path):
        held_out = settings.data_path  # evaluate takes the examples that prepare has held out
    yield ["evaluate", str(result.run), "--data-path", *_name_data(held_out)]
    if settings.train_mode == "lora":
        onto = ["--onto", settings.quant_type] if settings.q_lora else []
        base = [*_repeat(settings, ("cache_dir",)), *onto]
        yield ["merge", str(result.run), *base, "--output-dir", _name_output("merged")]


def _follow_export(adapter: Path) -> Iterator[list[str]]:
    yield ["chat", str(adapter)]
    yield ["merge", str(adapter), "--output-dir", _name_output("merged")]


def _follow_merge(checkpoint: Path) -> Iterator[list[str]]:
    yield ["chat", str(checkpoint)]
    yield ["evaluate", str(checkpoint), "--data-path", "HELD_OUT.jsonl"]


def _follow_evaluate(settings: EvaluateSettings) -> Iterator[list[str]]:
    model = settings.model_name_or_path
    yield ["chat", model, *_repeat(settings, MODEL_FLAGS)]
    is_adapter = _contains_adapter(Path(model))
    is_repeatable = not list_without_flags(settings)
    if (is_adapter or settings.adapter is not None) and not settings.compare_base and is_repeatable:
        again = settings.model_copy(update={"data_path": _name_data(settings.data_path)})
        names = tuple(name for name in EvaluateSettings.model_fields if name not in NOT_REPEATED)
        yield ["evaluate", model, *_repeat(again, names), "--compare-base"]
    if is_adapter:
        yield ["merge", model, *_repeat(settings, ("cache_dir",)), "--output-dir", _name_output("merged")]
    elif settings.adapter is not None:
        adapter = ["--adapter", str(settings.adapter)]
        yield ["merge", *_repeat(settings, BASE_FLAGS), *adapter, "--output-dir", _name_output("merged")]


def _repeat(settings: Settings, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the flags of those settings that differ from their defaults."""
    return chain.from_iterable(list_flags(settings, names))


def _name_data(paths: list[str] | None) -> list[str]:
    """Return the data to evaluate on; what came from standard input can't be read a second time."""
    return paths if paths and "-" not in paths else ["HELD_OUT.jsonl"]


def _contains_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, or a run that trained one; a run that was stopped has it in its checkpoints."""
    return any((place / ADAPTER_CONFIG_FILE).is_file() for place in [folder, *list_checkpoints(folder)])


def _is_cache(data: list[str]) -> bool:
    return len(data) == 1 and (Path(data[0]) / CACHE_MANIFEST_FILE).is_file()


def _name_output(name: str) -> str:
    return str(find_unused_folder(Path(name)))
