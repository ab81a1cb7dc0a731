"""`t5tune export`: convert a training checkpoint of any number of ranks to an adapter folder.

    result = export(ExportSettings(checkpoint="run", output_dir="adapter"))
    result.adapter

Reads DeepSpeed's shards in one process, without importing DeepSpeed or torch and without unpickling.
"""

import filecmp
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.adapter import (
    PEFT_PREFIX,
    AdapterMetadata,
    add_decoder_rows,
    build_token_indices,
    check_adapter,
    check_finite,
    read_base_metadata,
    write_adapter,
)
from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.adapter_shapes import check_adapter_shapes
from t5tune.checkpoints.base import find_base, find_local_base, open_base, read_config
from t5tune.checkpoints.export_source import (
    MODEL_FILES,
    CheckpointContents,
    find_checkpoint_of_shards,
    read_training_checkpoint,
)
from t5tune.checkpoints.fastchat import LoraFlags, compute_mean_rows, read_added_ids
from t5tune.checkpoints.hub_upload import open_repository, upload_result
from t5tune.checkpoints.model_card import describe_run_data
from t5tune.checkpoints.tensor_files.safetensors import write_safetensors
from t5tune.checkpoints.tensor_files.tensors import (
    DTYPES_BY_TORCH_NAME,
    TORCH_NAMES,
    PartitionedTensor,
    Tensor,
    from_float32,
)
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.checkpoints.training_data import read_label_task
from t5tune.checkpoints.zero.shards import find_deepspeed_folder
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.families import MODEL_TYPES, find_architecture
from t5tune.families.architecture import Architecture
from t5tune.families.encoder import make_encoder
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CHECKPOINT_MANIFEST_FILE,
    NON_LORA_FILE,
    RESULT_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
)
from t5tune.formatting import format_count
from t5tune.io.atomic import check_overwrite, check_replaceable, write_folder_atomically
from t5tune.io.untrusted import check_inside, has_file
from t5tune.progress import Note, Report, count_done, silent
from t5tune.runs.checkpoints import (
    check_has_begun_to_save,
    find_complete_checkpoint,
    has_complete_checkpoints,
    list_checkpoints,
    verify,
)
from t5tune.settings import ExportSettings, write_settings
from t5tune.settings.groups.base import BaseModelSettings


@dataclass(frozen=True)
class ExportResult:
    """The exported adapter.

    Args:
        zero_stage: None for a checkpoint that DeepSpeed didn't write.
        lora_tensors: number of LoRA parameters: matrices, and DoRA's magnitudes.
        non_lora_tensors: number of tensors in non_lora_state.safetensors.
        bytes: size of all files.
        pushed: URL of the repository that it was uploaded to.
    """

    adapter: Path
    step: int | None
    zero_stage: int | None
    world_size: int
    lora_tensors: int
    non_lora_tensors: int
    bytes: int
    seconds: float
    pushed: str | None = None


def export(settings: ExportSettings, report: Report = silent) -> ExportResult:
    """Write the checkpoint's adapter to `output_dir`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its adapter is empty, not finite, untrained, or
            doesn't fit its config or its base.
        SettingsError: a LoRA flag that contradicts the checkpoint.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite, [settings.checkpoint])
    folder = _find_checkpoint(find_adapter(settings.checkpoint, settings.cache_dir, "checkpoint", report), report)
    task = read_label_task(find_checkpoint_of_shards(folder))
    trained = _read_trained_tensors(settings, folder, task, report)
    if settings.overwrite:
        base = _find_local_base(settings, trained)
        check_overwrite(settings.output_dir, [folder] if base is None else [folder, base])
    others = _collect_non_lora_state(settings, trained, task)
    open_repository(settings, settings.output_dir, report)
    with write_folder_atomically(settings.output_dir, settings.overwrite) as staged:
        write_adapter(staged, trained.adapter, _make_adapter_metadata(folder, trained.config))
        if others is not None:
            size = sum(array.nbytes for value in others.values() for array in value.arrays)
            is_large = settings.non_lora_state == "full"  # only this takes long enough for a progress bar
            with count_done("export", report if is_large else silent, size, "bytes") as advance:
                write_safetensors(staged / NON_LORA_FILE, others, {"format": "pt"}, advance)
        if settings.format == "bin":
            _write_bin(staged / ADAPTER_BIN_FILE, trained.adapter)
        write_settings(staged, settings)
        size = sum(path.stat().st_size for path in staged.iterdir())
    lora = sum(map(_is_lora_name, trained.adapter))
    tensors, ranks = format_count(lora, "LoRA tensor"), format_count(trained.world_size, "rank")
    step = "" if trained.step is None else f" of step {trained.step}"
    report(Note(f"gathered {tensors}{step} from {ranks}"))
    return ExportResult(
        adapter=settings.output_dir,
        step=trained.step,
        zero_stage=trained.stage,
        world_size=trained.world_size,
        lora_tensors=lora,
        non_lora_tensors=len(others or {}),
        bytes=size,
        pushed=upload_result(settings, settings.output_dir, report),
        seconds=round(time.monotonic() - started, 3),
    )


def _find_checkpoint(path: Path, report: Report) -> Path:
    """Return the checkpoint-N, adapter or DeepSpeed folder that `path` names, verified if it has a manifest."""
    if not path.exists():
        raise CheckpointError(f"checkpoint: {path}: no such folder", hint="check the path's spelling")
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: {path}: is a file; expected a run folder or a checkpoint-N in it")
    if has_complete_checkpoints(path):
        has_finished = (path / RESULT_FILE).is_file()
        if has_finished and has_file(path, ADAPTER_WEIGHTS_FILE):
            found = _find_checkpoint_of_result(path)
            if found is None:
                report(Note(f"{path}: exporting the run's adapter; its checkpoint no longer exists"))
            elif found != list_checkpoints(path)[0]:
                report(Note(f"{path}: exporting {found}, the best checkpoint, which is the run's result"))
            return found or path
        newest = find_complete_checkpoint(path, "checkpoint", report)
        if not has_finished:
            report(Note(f"{path}: this run hasn't finished; exporting its newest complete checkpoint, {newest}"))
        return newest
    of_run = list_checkpoints(path)
    has_weights = _has_trained_weights(path)
    if of_run and not has_weights:
        check_inside(path, of_run[0])
        lack = f"it has no {CHECKPOINT_MANIFEST_FILE}, so it isn't verified"
        report(Note(f"{of_run[0]}: the newest checkpoint of the run; {lack}"))
        return of_run[0]
    if find_deepspeed_folder(path) == path and find_deepspeed_folder(path.parent) == path:
        path = path.parent  # `path` is the folder of the shards (global_stepN); manifest and config are in its parent
    checkpoint = find_checkpoint_of_shards(path)
    if (checkpoint / CHECKPOINT_MANIFEST_FILE).is_file():
        if damage := verify(checkpoint):
            raise CheckpointError(f"checkpoint: {damage}", hint="use an earlier checkpoint of the run")
        return path
    if not has_weights and not (path / ADAPTER_CONFIG_FILE).is_file():
        check_has_begun_to_save(path, "checkpoint")
        raise CheckpointError(
            f"checkpoint: {path}: contains no checkpoint",
            hint="give a run folder, a checkpoint-N in it, or a folder that DeepSpeed wrote",
        )
    return path


def _find_checkpoint_of_result(run: Path) -> Path | None:
    """Find the complete checkpoint with the finished run's adapter: the best one, if the run chose one."""
    adapter = run / ADAPTER_WEIGHTS_FILE
    for checkpoint in list_checkpoints(run):
        saved = checkpoint / ADAPTER_WEIGHTS_FILE
        is_same = (
            has_file(run, adapter.name) and has_file(checkpoint, saved.name) and filecmp.cmp(adapter, saved, False)
        )
        if is_same and verify(checkpoint) is None:
            return checkpoint
    return None


def _has_trained_weights(folder: Path) -> bool:
    names = (ADAPTER_WEIGHTS_FILE, ADAPTER_BIN_FILE, *MODEL_FILES)
    return find_deepspeed_folder(folder) is not None or any((folder / name).is_file() for name in names)


def _read_trained_tensors(
    settings: ExportSettings, folder: Path, task: LabelTask | None, report: Report
) -> CheckpointContents:
    """Read the checkpoint's trained tensors, add the rows that FastChat left out, and check and convert all of them."""
    flags = LoraFlags(
        settings.lora_r,
        settings.lora_alpha,
        tuple(settings.lora_target_modules) if settings.lora_target_modules else None,
        settings.model_name_or_path,
    )
    trained = read_training_checkpoint(folder, flags, with_frozen=settings.non_lora_state == "full")
    for note in trained.notes:
        report(Note(note))
    trained = _add_fastchat_rows(settings, trained, _find_tokenizer_folder(folder), report)
    check_adapter(trained.adapter, trained.config, folder)
    for name, tensor in trained.extra.items():
        check_finite(name, tensor.to_float32(), folder)
    architecture = _find_base_architecture(settings, trained, report)
    if architecture is not None:
        architecture = make_encoder(architecture, task)
    check_adapter_shapes(trained.adapter, trained.config, architecture, folder)
    if trained.extra:
        is_saved = settings.non_lora_state != "none"
        fate = f"saved to {NON_LORA_FILE}, which PEFT doesn't load" if is_saved else "left out by non_lora_state: none"
        extra = f"tensors trained in addition to the adapter: {len(trained.extra)} (first: {min(trained.extra)})"
        report(Note(f"{extra}; {fate}", warning=True))
    return trained if settings.dtype is None else _convert_dtype(trained, DTYPES_BY_TORCH_NAME[settings.dtype], folder)


def _make_adapter_metadata(folder: Path, config: dict[str, Any]) -> AdapterMetadata:
    tokenizer, checkpoint = _find_tokenizer_folder(folder), find_checkpoint_of_shards(folder)
    run = checkpoint.parent if checkpoint.name.startswith("checkpoint-") else checkpoint
    files = read_supporting_files(tokenizer, tokenizer / TEMPLATE_FILE)
    base = read_base_metadata(checkpoint)
    return AdapterMetadata(config, files, base, describe_run_data(run), read_label_task(checkpoint))


def _find_tokenizer_folder(folder: Path) -> Path:
    """Return the checkpoint, or its run folder if only that contains the tokenizer."""
    for place in (folder, folder.parent):
        if (place / TOKENIZER_CONFIG_FILE).is_file():
            return place
        if not folder.name.startswith(("checkpoint-", "global_step")):
            break
    return folder


def _find_base_architecture(
    settings: ExportSettings, trained: CheckpointContents, report: Report
) -> Architecture | None:
    name = _get_base_name(settings, trained)
    if name is None:
        report(Note("the base is unknown; give --model-name-or-path to check the adapter's shapes against it"))
        return None
    folder = _find_local_base(settings, trained)
    if folder is None:
        report(Note(f"{name}: not on this machine, so the adapter's shapes aren't checked against it"))
        return None
    config = read_config(folder)
    if config.get("model_type") not in MODEL_TYPES:
        model_type = config.get("model_type")
        report(Note(f"{name}: model_type {model_type!r}: the adapter's shapes aren't checked against it"))
        return None
    return find_architecture(config, folder)


def _find_local_base(settings: ExportSettings, trained: CheckpointContents) -> Path | None:
    """Find the folder of the base if it is on this machine.

    Its name may come from an untrusted checkpoint, so nothing is downloaded.
    """
    name = _get_base_name(settings, trained)
    return None if name is None else find_local_base(_make_base_settings(settings, name))


def _get_base_name(settings: ExportSettings, trained: CheckpointContents) -> str | None:
    """Get the given base, or the base that the checkpoint names; None if neither does."""
    name = settings.model_name_or_path or trained.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _add_fastchat_rows(
    settings: ExportSettings, trained: CheckpointContents, tokenizer: Path, report: Report
) -> CheckpointContents:
    """Add the embedding rows of FastChat's ten added tokens, computed from the base, if the base is given.

    FastChat didn't save these rows; without them its adapters generate noise.
    """
    ids = [] if trained.config.get("trainable_token_indices") else read_added_ids(tokenizer)
    if not ids:
        return trained
    if settings.model_name_or_path is None:
        problem = f"FastChat didn't save the embedding rows of its tokens {ids[0]} to {ids[-1]}"
        report(Note(f"{problem}; give --model-name-or-path to recompute them", warning=True))
        return trained
    base = open_base(find_base(_make_base_settings(settings, settings.model_name_or_path), report=report))
    rows = compute_mean_rows(base, ids)
    recomputed = f"the embedding rows of FastChat's tokens {ids[0]} to {ids[-1]}"
    report(Note(f"recomputed {recomputed} as the mean of the rows before them"))
    config = {**trained.config, "trainable_token_indices": build_token_indices(ids, base.architecture, base.is_tied())}
    return replace(trained, config=config, adapter=trained.adapter | rows)


def _make_base_settings(settings: ExportSettings, name: str) -> BaseModelSettings:
    return BaseModelSettings(model_name_or_path=name, revision=settings.revision, cache_dir=settings.cache_dir)


def _convert_dtype(trained: CheckpointContents, dtype: str, place: Path) -> CheckpointContents:
    def convert(name: str, tensor: Tensor) -> Tensor:
        with np.errstate(over="ignore"):
            result = from_float32(tensor.to_float32(), dtype)
        if not np.isfinite(result.to_float32()).all():
            problem = f"{place}: {name}: contains values too large for {dtype}"
            raise CheckpointError(problem, hint="use --dtype bfloat16")
        return result

    adapter = {name: convert(name, value) for name, value in trained.adapter.items()}
    return replace(trained, adapter=adapter, extra={name: convert(name, v) for name, v in trained.extra.items()})


def _is_lora_name(name: str) -> bool:
    """Whether a tensor is a LoRA parameter: A or B of a layer or an embedding, the bias of B, or DoRA's magnitudes."""
    return ".lora_" in name


def _collect_non_lora_state(
    settings: ExportSettings, trained: CheckpointContents, task: LabelTask | None
) -> dict[str, PartitionedTensor] | None:
    if settings.non_lora_state == "none":
        return None
    adapter = add_decoder_rows(trained.adapter, trained.config)
    others = trained.extra | {name: value for name, value in adapter.items() if not _is_lora_name(name)}
    state = {name.removeprefix(PEFT_PREFIX): PartitionedTensor.from_tensor(value) for name, value in others.items()}
    # a trained tensor replaces the base's
    return _collect_base_weights(settings, trained, task) | state if settings.non_lora_state == "full" else state


def _collect_base_weights(
    settings: ExportSettings, trained: CheckpointContents, task: LabelTask | None
) -> dict[str, PartitionedTensor]:
    """Collect the base's tensors by name, from the training checkpoint if it contains them, else from the base."""
    if trained.frozen and not _is_quantized(trained):
        return dict(trained.frozen)
    base_name = _get_base_name(settings, trained)
    if base_name is None:
        raise CheckpointError(
            f"{settings.checkpoint}: contains no unquantized base weights and doesn't name the base it was trained on",
            hint="give --model-name-or-path",
        )
    base = open_base(find_base(_make_base_settings(settings, base_name)), task=task)
    return {name: PartitionedTensor.from_tensor(base.get_tensor(name)) for name in base.list_names()}


def _is_quantized(trained: CheckpointContents) -> bool:
    """Whether the frozen weights are a quantized base's, which can't be used without their scales."""
    for name, value in trained.adapter.items():
        if ".lora_A." in name:
            module = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")[0]
            weight = trained.frozen.get(f"{module}.weight")
            if weight is None or len(weight.shape) != 2 or weight.shape[1] != value.shape[1]:
                return True
    return False


def _write_bin(path: Path, state: Mapping[str, Tensor]) -> None:
    import torch

    tensors = {}
    for name, value in state.items():
        dtype = getattr(torch, TORCH_NAMES[value.dtype])
        tensors[name] = torch.frombuffer(bytearray(value.tobytes()), dtype=dtype).reshape(value.shape)
    torch.save(tensors, path)
