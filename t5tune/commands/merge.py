"""`t5tune merge`: merge adapters into their base and write a checkpoint that loads without PEFT.

    result = merge(MergeSettings(model_name_or_path="base", adapter="run", output_dir="merged"))
    result.checkpoint

Streams the weights: tensors that no adapter changes are copied unchanged, and of the others only a few rows are in
memory at a time. W + scale · B·A is summed in fp32 and rounded once, which gives the same bits as PEFT's own merge.
"""

import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5tune.checkpoints.adapter import TEMPLATE_FILE, read_base_metadata
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.fingerprint import compute_fingerprint, compute_full_hash
from t5tune.checkpoints.model_card import build_merged_card, describe_run_training
from t5tune.checkpoints.model_folder import copy_supporting_files, write_config
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILE_PREFIXES
from t5tune.checkpoints.training_data import TRAINING_DATA_FILE, read_training_data
from t5tune.errors import CheckpointError, SettingsError, TrainingError
from t5tune.families import FP16_OVERFLOW_LAYER, Family, find_family
from t5tune.io.atomic import make_scratch_folder, write_folder_atomically
from t5tune.io.output_dir import check_replaceable
from t5tune.io.untrusted import has_file
from t5tune.merging.deltas import Adapter, collect_deltas, read_adapters
from t5tune.merging.fold import WeightDelta, convert_dtype, fold_tensor
from t5tune.merging.free_memory import get_free_memory
from t5tune.merging.shards import Shard, plan_shards, write_shards
from t5tune.model.device import keep_freed_memory
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.settings import MergeSettings, dump_settings

if TYPE_CHECKING:
    from t5tune.merging.ctranslate2 import Agreement
    from t5tune.merging.verify import LogitsDifference

TASK = "merge"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LIBRARY_BYTES = 800 << 20  # memory of torch and transformers before any weight is loaded
WEIGHT_SUFFIXES = {".safetensors", ".bin"}
LOG_PROBABILITY_TOLERANCE = 1e-3  # both models compute in fp32, but sum in a different order
ROUNDING_TOLERANCE = 0.05  # rounding weights to 8 (bf16) or 11 (fp16) bits changes logits by about this share of them


@dataclass(frozen=True)
class MergeResult:
    """The merged checkpoint and what --verify measured.

    Args:
        max_error: the largest difference of logits that --verify found, in fp32.
        from_training: for adapters trained with q_lora, the largest difference from the training model's logits, by
            the weights merged into (`base`, `nf4`, …).
        replies: how many replies of the converted model were compared with those of the merged checkpoint.
        same_replies: how many of them are equal.
    """

    checkpoint: Path
    tensors: int
    adapted_tensors: int
    token_rows: int
    bytes: int
    verified: bool
    max_error: float | None
    from_training: dict[str, float]
    replies: int | None
    same_replies: int | None
    seconds: float


def merge(settings: MergeSettings, report: Report = silent) -> MergeResult:
    """Write the merged checkpoint to `output_dir`.

    Raises:
        ModelError, CheckpointError: the base or an adapter can't be used, or they don't fit each other.
        TrainingError: --verify finds that the logits of the merged model differ, or the replies of the converted one.
        DependencyError: --to ctranslate2, but CTranslate2 isn't installed.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite)
    if settings.to == "ctranslate2":
        from t5tune.merging.ctranslate2 import check_installed

        check_installed()
    base = Checkpoint(find_base(settings))
    adapters = read_adapters(settings.adapter, settings.weights or [1.0])
    tied = base.is_tied()
    metadata = _check_base(settings, base, adapters, report)
    family = find_family(read_config(base.folder), base.folder, metadata["family"])
    deltas = collect_deltas(adapters, base, tied)
    _subtract_initializations(adapters, deltas)
    _requantize_base(settings, base, metadata, deltas)
    _warn_if_zero(deltas, report)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    shards = plan_shards(base, dtype, settings.max_shard_size)
    _check_disk_space(settings.output_dir, sum(shard.size for shard in shards))
    verify = _should_verify(settings, base, adapters, report)
    agreement = None
    with write_folder_atomically(settings.output_dir) as staged, _open_destination(settings, staged) as checkpoint:
        _write_weights(base, shards, deltas, checkpoint, report)
        write_config(base.folder, checkpoint, tied, dtype, metadata["family"])
        _write_supporting_files(settings, base, adapters, family, checkpoint, report)
        found = _verify(settings, base, adapters, metadata, checkpoint, report) if verify else None
        if settings.to == "ctranslate2":
            agreement = _convert_to_ctranslate2(settings, adapters[0].folder, checkpoint, staged, report)
        size = sum(file.stat().st_size for file in staged.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    rows = [rows for delta in deltas.values() for rows, _ in delta.rows]
    return MergeResult(
        checkpoint=settings.output_dir,
        tensors=len(base.list_names()),
        adapted_tensors=sum(bool(delta.updates or delta.replacements or delta.biases) for delta in deltas.values()),
        token_rows=len(rows[0].positions) if rows else 0,
        bytes=size,
        verified=verify,
        max_error=found.error if found else None,
        from_training=found.from_training if found else {},
        replies=agreement.replies if agreement else None,
        same_replies=agreement.same if agreement else None,
        seconds=round(time.monotonic() - started, 3),
    )


def _warn_if_zero(deltas: dict[str, WeightDelta], report: Report) -> None:
    if not any(map(_has_nonzero_update, deltas.values())):
        report(Note("every lora_B is zero: the adapter changes nothing except embedding rows of tokens", warning=True))


def _check_base(settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], report: Report) -> dict[str, Any]:
    """Compare the base with the one used in training.

    Returns:
        The first adapter's metadata about its base; `family` is --family if that is given.

    Raises:
        CheckpointError: an adapter was trained on another base.
    """
    key = "sha256" if settings.check == "full" else "fingerprint"
    found: str | None = None
    for adapter in adapters:
        metadata = read_base_metadata(adapter.folder)
        if not metadata.get(key):
            report(
                Note(
                    f"{adapter.folder}: records no {key}, so merge can't verify that this is the base it was trained on"
                )
            )
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
    metadata = read_base_metadata(adapters[0].folder)
    trained_on = metadata.get("onto", "base")
    if trained_on != settings.onto:
        trained_base, merged_base = _describe_base(trained_on), _describe_base(settings.onto)
        text = f"{adapters[0].folder}: trained on {trained_base}, but merging into {merged_base}"
        if trained_on != "base":
            report(Note(f"{text}; --onto {trained_on} comes closer to the training model's predictions", warning=True))
        elif metadata:
            report(Note(text, warning=True))
    return metadata | {"family": settings.family or metadata.get("family")}


def _describe_base(kind: str) -> str:
    return "the unquantized base" if kind == "base" else f"an {kind} base"


def _requantize_base(
    settings: MergeSettings, base: Checkpoint, metadata: dict[str, Any], deltas: dict[str, WeightDelta]
) -> None:
    """Replace each weight that q_lora quantizes, adapted or not, with its quantized and dequantized values.

    These are the values that the adapter was trained on.
    """
    if settings.onto == "base":
        return
    transform = _make_requantizer(settings.onto, metadata)
    for name in _list_quantized_weights(base, metadata):
        delta = deltas.setdefault(name, WeightDelta())
        if delta.base_transform is not None:
            initialized = "an adapter with a PiSSA or OLoRA initialization"
            raise SettingsError(f"onto: {settings.onto}: {initialized} was trained on unquantized weights")
        delta.base_transform = transform


def _make_requantizer(kind: str, metadata: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    import torch

    from t5tune.merging.requantize import quantize_dequantize

    compute = torch.float32 if metadata.get("compute") == "float32" else torch.bfloat16
    double_quant = metadata.get("double_quant", True) is not False
    return functools.partial(quantize_dequantize, kind=kind, double_quant=double_quant, compute=compute)


def _list_quantized_weights(base: Checkpoint, metadata: dict[str, Any]) -> list[str]:
    """List the linear weights that training quantized."""
    skipped = ["relative_attention"] if _quantizes_wo(metadata) else ["relative_attention", f".{FP16_OVERFLOW_LAYER}."]
    linear = (name for name in base.list_names() if ".block." in name and len(base.get_dtype_and_shape(name)[1]) == 2)
    return [name for name in linear if not any(part in name for part in skipped)]


def _quantizes_wo(metadata: dict[str, Any]) -> bool:
    """Whether training quantized wo, too, as it does by default; adapters made before this was recorded don't say."""
    return metadata.get("quantize_wo", True) is not False


def _subtract_initializations(adapters: list[Adapter], deltas: dict[str, WeightDelta]) -> None:
    """Subtract the PiSSA or OLoRA initialization from the base, if the adapter was saved without its conversion."""
    if (kind := adapters[0].initialization) is None:
        return
    from t5tune.merging.pissa import subtract_initialization

    for name, delta in deltas.items():
        for update, _ in delta.updates:
            rank = update.a_RI.shape[0]
            delta.base_transform = functools.partial(
                subtract_initialization, name=name, kind=kind, rank=rank, scale=update.scale
            )


def _check_disk_space(folder: Path, needed: int) -> None:
    """Check that the weights (`needed` bytes) fit on the disk.

    Raises:
        SettingsError: they don't; the message has both sizes.
    """
    place = next(parent for parent in Path(os.path.realpath(folder)).parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise SettingsError(
            f"output_dir: {folder}: {free:,} bytes are free; the weights need {needed:,}",
            hint="free some disk space, or choose another output_dir",
        )


def _has_nonzero_update(delta: WeightDelta) -> bool:
    """Whether the delta changes anything except embedding rows of tokens."""
    return bool(delta.replacements or delta.biases) or any(u.b_OR.to_float32().any() for u, _ in delta.updates)


@dataclass(frozen=True)
class _FoldTensors:
    """Transform for `write_shards`: folds the deltas into their tensors and converts the others' dtype if needed."""

    by_name: dict[str, WeightDelta]

    def is_changed(self, name: str, dtype: str, wanted: str) -> bool:
        return name in self.by_name or dtype != wanted

    def __call__(self, name: str, tensor: Tensor, wanted: str) -> Iterator[Tensor]:
        if name in self.by_name:
            return fold_tensor(name, tensor, self.by_name[name], wanted)
        return convert_dtype(name, tensor, wanted)


def _write_weights(
    base: Checkpoint, shards: list[Shard], deltas: dict[str, WeightDelta], folder: Path, report: Report
) -> None:
    report(Started(TASK, sum(shard.size for shard in shards), "bytes"))
    # otherwise each block of rows would have its memory pages mapped again, which takes longer than the sums
    keep_freed_memory()
    done = 0
    for written in write_shards(base, shards, _FoldTensors(deltas), folder):
        done += written
        report(Advanced(TASK, done))
    report(Finished(TASK))


def _write_supporting_files(
    settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], family: Family, staged: Path, report: Report
) -> None:
    """Write the tokenizer, the conversation template, the model card and the settings."""
    adapter = adapters[0].folder
    tokenizer_folder = adapter if has_file(adapter, "tokenizer_config.json") else base.folder
    template_folder = adapter if has_file(adapter, TEMPLATE_FILE) else base.folder
    copy_supporting_files(base.folder, tokenizer_folder, template_folder / TEMPLATE_FILE, staged)
    if any(read_training_data(other.folder) != read_training_data(adapter) for other in adapters[1:]):
        (staged / TRAINING_DATA_FILE).unlink(missing_ok=True)
        report(Note(f"{TRAINING_DATA_FILE} is left out: the adapters were trained on different kinds of data"))
    names = ", ".join(str(adapter.folder) for adapter in adapters)
    training = describe_run_training(adapter) if len(adapters) == 1 else ""
    card = build_merged_card(settings.model_name_or_path, names, settings.to, family.converters, training)
    (staged / "README.md").write_text(card, encoding="utf-8")
    (staged / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")


@contextmanager
def _open_destination(settings: MergeSettings, staged: Path) -> Iterator[Path]:
    """Yield the folder for the checkpoint: the new output folder, or a scratch folder if it is then converted."""
    if settings.to == "checkpoint":
        yield staged
    else:
        with make_scratch_folder(Path(os.path.realpath(settings.output_dir))) as folder:
            yield folder


def _convert_to_ctranslate2(
    settings: MergeSettings, adapter: Path, checkpoint: Path, staged: Path, report: Report
) -> "Agreement":
    """Convert the checkpoint for CTranslate2, and compare its replies with those of the checkpoint.

    Raises:
        TrainingError: the replies differ although the weights aren't quantized.
    """
    from t5tune.merging.ctranslate2 import compare_replies, convert
    from t5tune.merging.verify import read_example_ids

    convert(checkpoint, staged, settings.quantization)
    for file in sorted(checkpoint.iterdir()):
        if file.name.startswith((*TOKENIZER_FILE_PREFIXES, TEMPLATE_FILE, TRAINING_DATA_FILE, "README", "settings")):
            shutil.copyfile(file, staged / file.name)
    is_exact = settings.quantization in (None, "float32")
    sources = [source for source, _ in read_example_ids(checkpoint, adapter)]
    found = compare_replies(checkpoint, staged, sources, is_exact)
    summary = (
        f"CTranslate2 gives the same reply for {found.same} of {found.replies} prompts; "
        f"log-probabilities differ by {found.error:.2g}"
    )
    if is_exact and (found.same < found.replies or not found.error <= LOG_PROBABILITY_TOLERANCE):
        raise TrainingError(
            f"the replies of the converted model differ from those of the merged one: {summary}; nothing was written",
            hint="try another release of CTranslate2, and report its version in an issue",
        )
    report(Note(summary))
    return found


def _should_verify(settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], report: Report) -> bool:
    """Decide whether to verify (if requested, or if it fits in memory), and report how much memory it needs."""
    if settings.verify is False:
        return False
    is_sum = len(adapters) > 1 or adapters[0].weight != 1
    if is_sum and any(adapter.has_more_than_lora() for adapter in adapters):
        if settings.verify:
            raise SettingsError(
                "verify: PEFT, the reference, can add up only LoRA matrices, not embedding rows or whole modules"
            )
        report(Note("not verified: PEFT, the reference, can add up only LoRA matrices, not embedding rows or modules"))
        return False
    values = sum(math.prod(base.get_dtype_and_shape(name)[1]) for name in base.list_names())
    needed, available = 4 * values + LIBRARY_BYTES, get_free_memory()
    text = f"verifying needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free"
    if settings.verify is None and needed > available:
        report(Note(f"not verified: {text}; --verify verifies anyway", warning=True))
        return False
    report(Note(text))
    return True


def _verify(
    settings: MergeSettings,
    base: Checkpoint,
    adapters: list[Adapter],
    metadata: dict[str, Any],
    merged: Path,
    report: Report,
) -> "LogitsDifference":
    """Compare the logits of base + adapters with those of the merged checkpoint.

    Raises:
        TrainingError: the difference exceeds the tolerance for the dtype of the merged weights.
    """
    import torch

    from t5tune.merging.verify import TrainingQuantization, compare_logits

    folders, weights = [adapter.folder for adapter in adapters], [adapter.weight for adapter in adapters]
    kind = settings.onto if settings.onto != "base" else metadata.get("onto", "base")
    trained_on = None
    if kind != "base":
        compute = torch.float32 if metadata.get("compute") == "float32" else torch.bfloat16
        double_quant = metadata.get("double_quant", True) is not False
        trained_on = TrainingQuantization(kind, double_quant, compute, _quantizes_wo(metadata))
    found = compare_logits(base.folder, folders, weights, merged, trained_on, settings.onto, metadata["family"], report)
    dtypes = {Checkpoint(merged).get_dtype_and_shape(name)[0] for name in base.list_names()}
    is_exact = dtypes <= {"F32", "F64"} and settings.onto == "base"
    allowed = max(settings.verify_tolerance, 0.0 if is_exact else ROUNDING_TOLERANCE) * max(found.largest, 1.0)
    if not found.error <= allowed:
        raise TrainingError(
            f"the merged model's logits differ by {found.error:.3g} from those of base + adapter "
            f"(allowed {allowed:.3g}); nothing was written",
            hint="check that this is the base that the adapter was trained on",
        )
    summary = f"logits differ by at most {found.error:.3g} of {found.largest:.3g} ({allowed:.3g} is allowed)"
    report(Note(f"verified on {found.examples} examples: {summary}"))
    if found.from_training:
        parts = (
            f"{error:.3g} if merged into {'the base' if onto == 'base' else onto}"
            for onto, error in found.from_training.items()
        )
        found_in = f"largest logit difference from the model as trained ({kind} base)"
        report(Note(f"{found_in}: {', '.join(parts)}"))
    return found
