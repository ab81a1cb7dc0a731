"""The base that an adapter was trained on, as the metadata of the adapter's file identifies and describes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t5tune.checkpoints.adapter import read_base_metadata
from t5tune.checkpoints.checkpoint import Checkpoint
from t5tune.checkpoints.fingerprint import compute_fingerprint, compute_full_hash
from t5tune.errors import CheckpointError
from t5tune.merging.deltas import Adapter
from t5tune.progress import Note, Report
from t5tune.settings import MergeSettings
from t5tune.settings.shared import QuantizationSettings

UNQUANTIZED = "base"  # value of --onto, and of the metadata's `onto`


@dataclass(frozen=True)
class TrainedBase:
    """How the base was loaded in training.

    Args:
        quantization: the settings that quantize it again; None if it wasn't quantized.
        compute: the compute dtype of quantized layers, by torch's name.
        family: a key of the table of families, if config.json doesn't say the model type.
    """

    quantization: QuantizationSettings | None
    compute: str
    family: str | None


def list_quantized_weights(base: Checkpoint, quantization: QuantizationSettings) -> list[str]:
    """List the weights that q_lora quantizes."""
    linear = (name for name in base.list_names() if len(base.get_dtype_and_shape(name)[1]) == 2)
    return [name for name in linear if base.architecture.is_quantizable(name, quantization.quantize_wo)]


def match_trained_base(
    settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], report: Report
) -> TrainedBase:
    """Compare the base, and its quantization, with those that the adapters were trained on. Return the first one's.

    Raises:
        CheckpointError: an adapter was trained on another base.
    """
    key = "sha256" if settings.check == "full" else "fingerprint"
    found: str | None = None
    for adapter in adapters:
        metadata = read_base_metadata(adapter.folder)
        if not metadata.get(key):
            unknown = f"records no {key}, so merge can't verify that this is the base it was trained on"
            report(Note(f"{adapter.folder}: {unknown}", warning=bool(metadata)))
            continue
        if found is None:
            found = compute_full_hash(base) if settings.check == "full" else compute_fingerprint(base)
        if metadata[key] != found and not settings.allow_other_base:
            raise CheckpointError(
                f"{base.folder}: not the base that {adapter.folder} was trained on, which was {metadata.get('base')} "
                f"({key} {str(metadata[key])[:12]}…, here {found[:12]}…)",
                hint="give that base, or use --allow-other-base to merge anyway",
            )
        if metadata[key] != found:
            report(Note(f"{base.folder}: not the base that {adapter.folder} was trained on", warning=True))
    for adapter in adapters:
        _compare_quantization(adapter, read_base_metadata(adapter.folder), settings.onto, report)
    return _read_trained_base(read_base_metadata(adapters[0].folder), settings)


def _read_trained_base(metadata: Mapping[str, Any], settings: MergeSettings) -> TrainedBase:
    kind = metadata.get("onto", UNQUANTIZED) if settings.onto == UNQUANTIZED else settings.onto
    quantization = None
    if kind != UNQUANTIZED:
        # without them, the adapter was trained without quantization or by another tool
        flags = {name: metadata.get(name, True) is not False for name in ("double_quant", "quantize_wo")}
        quantization = QuantizationSettings.model_validate({"q_lora": True, "quant_type": kind, **flags})
    compute = "float32" if metadata.get("compute") == "float32" else "bfloat16"
    return TrainedBase(quantization, compute, settings.family or metadata.get("family"))


def _compare_quantization(adapter: Adapter, metadata: Mapping[str, Any], onto: str, report: Report) -> None:
    trained_on = metadata.get("onto", UNQUANTIZED)
    if trained_on == onto:
        return
    text = f"{adapter.folder}: trained on {_describe(trained_on)}, but merging into {_describe(onto)}"
    if trained_on != UNQUANTIZED:
        report(Note(f"{text}; --onto {trained_on} comes closer to the training model's predictions", warning=True))
    elif metadata:
        report(Note(text, warning=True))


def _describe(kind: str) -> str:
    return "the unquantized base" if kind == UNQUANTIZED else f"an {kind} base"
