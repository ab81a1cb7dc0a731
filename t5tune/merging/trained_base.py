"""Find out from an adapter's metadata which base it was trained on, and how that base was loaded."""

import functools
from dataclasses import dataclass
from pathlib import Path

from t5tune.checkpoints.adapter import read_base_metadata, read_training_precision
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import compute_fingerprint, compute_full_hash
from t5tune.errors import CheckpointError, DependencyError, SettingsError
from t5tune.families.architecture import Architecture, get_layer_name
from t5tune.file_names import TRIM_FILE
from t5tune.inference.precision import Precision, describe_quantization, find_quantization_problem, resolve_precision
from t5tune.io.untrusted import has_file, read_json_object
from t5tune.merging.deltas import Adapter
from t5tune.merging.fold import WeightDelta
from t5tune.progress import Note, Report
from t5tune.settings.groups.base import QuantizationSettings

UNQUANTIZED = "base"  # value of --onto, and of the metadata's `onto`


@dataclass(frozen=True)
class TrainedBase:
    """How the base was loaded in training.

    Args:
        compute: the compute dtype of quantized layers, by torch's name.
        family: a key of the table of families, if config.json doesn't name the model type.
    """

    quantization: QuantizationSettings | None
    compute: str
    family: str | None


def choose_onto(given: str | None, adapters: list[Adapter], report: Report) -> str:
    """Choose the weights to merge into, as a value of --onto: as given, else as in training."""
    first = _find_first_known(adapters)
    known = [adapter.folder for adapter in adapters if read_base_metadata(adapter.folder)]
    trained = {folder: _resolve_precision(folder, None) for folder in known}
    target = _resolve_precision(first, given).quantization
    others = [folder for folder, precision in trained.items() if precision.quantization != target]
    if given is None and others:
        bases = [f"{folder} on {_describe(trained[folder].quantization)}" for folder in (first, others[0])]
        kinds = dict.fromkeys(_get_onto(trained[folder].quantization) for folder in (first, others[0]))
        flags = " or ".join(f"--onto {kind}" for kind in kinds)
        problem = f"adapter: trained differently: {' and '.join(bases)}"
        raise SettingsError(problem, hint=f"merge all adapters with {flags}")
    for folder in others:
        text = f"{folder}: trained on {_describe(trained[folder].quantization)}, but merging into {_describe(target)}"
        if (kind := _get_onto(trained[folder].quantization)) not in (UNQUANTIZED, given):
            text += f"; --onto {kind} comes closer to the training model's predictions"
        report(Note(text, warning=True))
    dtypes = {precision.dtype_name: folder for folder, precision in reversed(trained.items())}
    if len(dtypes) > 1:
        where = " and ".join(f"{folder} in {name}" for name, folder in dtypes.items())
        report(Note(f"adapter: trained in different dtypes: {where}", warning=True))
    if given is None and target is not None:
        report(Note(f"merging into {_describe(target)}, as in training; --onto base merges into the unquantized base"))
    return _get_onto(target)


def list_quantized_weights(base: Checkpoint, quantization: QuantizationSettings) -> list[str]:
    linear = (name for name in base.list_names() if len(base.get_dtype_and_shape(name)[1]) == 2)
    return [name for name in linear if base.architecture.is_quantizable(name, quantization.quantize_wo)]


def match_trained_base(
    base: Checkpoint,
    adapters: list[Adapter],
    onto: str,
    family: str | None,
    report: Report,
    reads_all: bool = False,
    allows_other: bool = False,
) -> TrainedBase:
    """Check that the adapters were trained on this base, and return how it was loaded in training.

    Args:
        onto: see `choose_onto`.
        family: the model type that the user gave.
        reads_all: compare hashes of all weights instead of fingerprints.
        allows_other: report a different base instead of refusing it.
    """
    key = "sha256" if reads_all else "fingerprint"
    found: str | None = None
    for adapter in adapters:
        metadata = read_base_metadata(adapter.folder)
        if not metadata.get(key):
            unknown = f"no {key} recorded, so merge can't verify that it was trained on this base"
            report(Note(f"{adapter.folder}: {unknown}", warning=bool(metadata)))
            continue
        if found is None:
            found = compute_full_hash(base) if reads_all else compute_fingerprint(base)
        if metadata[key] != found:
            problem = f"{base.folder}: not the base that {adapter.folder} was trained on"
            if not allows_other:
                hashes = f"{key} {str(metadata[key])[:12]}…, here {found[:12]}…"
                hint = "give that base, or use --allow-other-base to merge anyway"
                if _is_trimmed_from(base.folder, metadata.get("fingerprint")):
                    hint = "this base was trimmed: merge the adapter into its own base, then trim the merged checkpoint"
                raise CheckpointError(f"{problem}, which was {metadata.get('base')} ({hashes})", hint)
            report(Note(problem, warning=True))
    first = _find_first_known(adapters)
    metadata = read_base_metadata(first)
    # even a merge into the unquantized base is compared with the quantized base of training
    quantization = _resolve_precision(first, None if onto == UNQUANTIZED else onto).quantization
    compute = "float32" if metadata.get("compute") == "float32" else "bfloat16"
    return TrainedBase(quantization, compute, family or metadata.get("family"))


def change_base_as_in_training(
    base: Checkpoint, adapter: Adapter, trained: TrainedBase, onto: str | None, deltas: dict[str, WeightDelta]
) -> None:
    """Let each weight of the base have the values that the adapter was trained on, before its change is added.

    Args:
        onto: see `choose_onto`.
        deltas: name of a weight -> its change. Gets the changes of the base.
    """
    if adapter.initialization is not None:
        _subtract_initialization(adapter.initialization, deltas, base.architecture)
    if onto != UNQUANTIZED and trained.quantization is not None:
        _requantize_base(base, trained.quantization, trained.compute, deltas)


def _subtract_initialization(kind: str, deltas: dict[str, WeightDelta], architecture: Architecture) -> None:
    """Subtract the PiSSA or OLoRA initialization from the base, since the adapter was saved without its conversion."""
    from t5tune.merging.pissa import subtract_initialization

    for name, delta in deltas.items():
        for update, _ in delta.updates:
            delta.base_transform = functools.partial(
                subtract_initialization,
                kind=kind,
                rank=update.a_RI.shape[0],
                scale=update.scale,
                stays_fp32=get_layer_name(name) == architecture.fp16_overflow_layer,
            )


def _requantize_base(
    base: Checkpoint, quantization: QuantizationSettings, compute: str, deltas: dict[str, WeightDelta]
) -> None:
    """Replace each weight that q_lora quantizes, adapted or not, with its quantized and dequantized values.

    These are the values that the adapter was trained on.
    """
    if (problem := find_quantization_problem()) is not None:
        hint = (
            "merge on a machine with bitsandbytes, or into the unquantized base with --onto base (replies may differ)"
        )
        raise DependencyError(f"onto: {quantization.quant_type}: {problem}", hint=hint)
    from t5tune.merging.requantize import quantize_dequantize

    for name in list_quantized_weights(base, quantization):
        delta = deltas.setdefault(name, WeightDelta())
        if delta.base_transform is not None:
            initialized = "an adapter with a PiSSA or OLoRA initialization"
            raise SettingsError(f"onto: {quantization.quant_type}: {initialized} was trained on unquantized weights")
        delta.base_transform = functools.partial(quantize_dequantize, quantization=quantization, compute=compute)


def _is_trimmed_from(folder: Path, fingerprint: str | None) -> bool:
    return has_file(folder, TRIM_FILE) and read_json_object(folder, TRIM_FILE).get("fingerprint") == fingerprint


def _find_first_known(adapters: list[Adapter]) -> Path:
    """Find the first adapter whose file describes its base (other tools' files don't), else the first adapter."""
    folders = [adapter.folder for adapter in adapters]
    return next(filter(read_base_metadata, folders), folders[0])


def _resolve_precision(adapter: Path, onto: str | None) -> Precision:
    """Return the precision of the base in training, or the precision that `onto` asks for."""
    given = {} if onto is None else {"q_lora": onto != UNQUANTIZED, "quant_type": onto}
    return resolve_precision(given, read_training_precision(adapter), device=None)


def _get_onto(quantization: QuantizationSettings | None) -> str:
    return UNQUANTIZED if quantization is None else quantization.quant_type


def _describe(quantization: QuantizationSettings | None) -> str:
    return "the unquantized base" if quantization is None else f"an {describe_quantization(quantization, 'base')}"
