"""`t5tune export`: a training checkpoint of any number of ranks -> an adapter folder.

    result = export(ExportSettings(checkpoint="run", output_dir="adapter"))
    result.adapter

Reads DeepSpeed's shards in one process, without DeepSpeed, torch or pickles.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.adapter import (
    NON_LORA,
    OLD_WEIGHTS,
    PREFIX,
    TEMPLATE,
    WEIGHTS,
    TrainedWith,
    base_facts,
    check_adapter,
    write_adapter,
)
from t5tune.checkpoints.adapter_config import CONFIG
from t5tune.checkpoints.adapter_shapes import check_fit
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.fastchat import OldLora, added_ids, mean_rows, row_indices
from t5tune.checkpoints.model_card import data_of_run
from t5tune.checkpoints.partitioned_tensor import Pieces
from t5tune.checkpoints.pocket import pocket_folder
from t5tune.checkpoints.safetensors import Checkpoint, header_of, total_bytes
from t5tune.checkpoints.tensors import Tensor, from_float32
from t5tune.checkpoints.training_checkpoint import MODEL_FILES, Trained, read_trained
from t5tune.checkpoints.zero_shards import find_deepspeed_folder
from t5tune.errors import CheckpointError
from t5tune.families import MODEL_TYPES
from t5tune.io.atomic import published_folder
from t5tune.io.output_dir import check_replaceable
from t5tune.io.untrusted import check_inside
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.settings import ExportSettings, dump_settings
from t5tune.settings.base_model import BaseModelSettings
from t5tune.training.checkpoint import MANIFEST, checkpoints, newest, verify

TASK = "export"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Exported:
    """What export made. `zero_stage` is None for a checkpoint that DeepSpeed didn't write."""

    adapter: Path
    step: int
    zero_stage: int | None
    world_size: int
    lora_tensors: int
    non_lora_tensors: int
    bytes: int
    seconds: float


def export(settings: ExportSettings, report: Report = silent) -> Exported:
    """Write the checkpoint's adapter to `output_dir`.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or an adapter that is empty, not finite, untrained, or doesn't
            fit its config or its base.
        SettingsError: a LoRA flag that contradicts the checkpoint.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite)
    folder = _find(settings.checkpoint, report)
    old = OldLora(
        settings.lora_r,
        settings.lora_alpha,
        tuple(settings.lora_target_modules) if settings.lora_target_modules else None,
        settings.model_name_or_path,
    )
    trained = read_trained(folder, old, with_frozen=settings.non_lora_state == "full")
    for note in trained.notes:
        report(Note(note))
    trained = _with_mean_rows(settings, trained, _with_tokenizer(folder), report)
    check_adapter(trained.adapter, trained.config, folder)
    _check_finite(trained.beside, folder)
    check_fit(trained.adapter, trained.config, _base_config(settings, trained, report), folder)
    if trained.beside:
        names = sorted(trained.beside)
        report(
            Note(
                f"{len(names)} tensor(s) trained beside the adapter, {names[0]} the first: {NON_LORA} holds them, "
                "PEFT doesn't load them",
                warning=True,
            )
        )
    if settings.dtype is not None:
        trained = _rounded(trained, DTYPES[settings.dtype], folder)
    non_lora: dict[str, Tensor] | None = None if settings.non_lora_state == "none" else _by_base_names(trained.beside)
    base = _base_state(settings, trained) if settings.non_lora_state == "full" else None
    companions = _with_tokenizer(folder)
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    with published_folder(settings.output_dir) as staged:
        with_base = base is not None
        trained_with = TrainedWith(
            trained.config, companions, companions / TEMPLATE, base_facts(folder), data_of_run(run)
        )
        write_adapter(staged, trained.adapter, trained_with, None if with_base else non_lora)
        if base is not None:
            extra = _by_base_names(
                {n: v for n, v in trained.adapter.items() if ".lora_A." not in n and ".lora_B." not in n}
            )
            state = base | {name: Pieces.of(value) for name, value in ((non_lora or {}) | extra).items()}
            _write_pieces(staged / NON_LORA, state, report)
        if settings.format == "bin":
            _write_bin(staged / OLD_WEIGHTS, trained.adapter)
        (staged / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")
        size = total_bytes(path for path in staged.iterdir())
    lora = sum(".lora_" in name for name in trained.adapter)
    others = len(trained.adapter) - lora + len(trained.beside) + len(base or {})
    report(Note(f"{lora} LoRA tensors of step {trained.step}, gathered from {trained.world_size} rank(s)"))
    return Exported(
        adapter=settings.output_dir,
        step=trained.step,
        zero_stage=trained.stage,
        world_size=trained.world_size,
        lora_tensors=lora,
        non_lora_tensors=0 if settings.non_lora_state == "none" else others,
        bytes=size,
        seconds=round(time.monotonic() - started, 3),
    )


def _find(path: Path, report: Report) -> Path:
    """The checkpoint-N, adapter or DeepSpeed folder that `path` means; its seal is checked where it has one."""
    if not path.exists():
        raise CheckpointError(f"checkpoint: {path}: no such folder", hint="check the path's spelling")
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: {path}: a file; expected a run folder or a checkpoint-N in it")
    of_run = checkpoints(path)
    if any((checkpoint / MANIFEST).is_file() for checkpoint in of_run):
        found, damaged = newest(path)
        for problem in damaged:
            report(Note(f"passed over a damaged checkpoint: {problem}", warning=True))
        if found is None:
            raise CheckpointError(f"checkpoint: {path}: none of its checkpoints is whole: {damaged[0]}")
        check_inside(path, found)
        return found
    is_deepspeed = find_deepspeed_folder(path) is not None
    has_weights = is_deepspeed or any((path / name).is_file() for name in (WEIGHTS, OLD_WEIGHTS, *MODEL_FILES))
    if of_run and not has_weights:
        check_inside(path, of_run[0])
        report(Note(f"{of_run[0]}: the newest of the run; nothing seals it, so nothing shows whether it is whole"))
        return of_run[0]
    if is_deepspeed and find_deepspeed_folder(path) == path and find_deepspeed_folder(path.parent) == path:
        path = path.parent  # the shards alone were named: the seal and the config stand beside them
    if (path / MANIFEST).is_file():
        if damage := verify(path):
            raise CheckpointError(f"checkpoint: {damage}", hint="take an earlier checkpoint of the run")
        return path
    if not has_weights and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"checkpoint: {path}: no checkpoint in it",
            hint="name a run folder, a checkpoint-N in it, or a folder that DeepSpeed wrote",
        )
    return path


def _with_tokenizer(folder: Path) -> Path:
    """The checkpoint, or the run around it, where the tokenizer stands only there."""
    for place in (folder, folder.parent):
        if (place / "tokenizer_config.json").is_file():
            return place
        if not folder.name.startswith(("checkpoint-", "global_step")):
            break
    return folder


def _base_config(settings: ExportSettings, trained: Trained, report: Report) -> dict[str, Any] | None:
    """config.json of the base where it is on this machine; what a stranger's file names is not fetched."""
    name = settings.model_name_or_path or trained.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        report(Note("the base is unknown: give --model-name-or-path to check the shapes against it"))
        return None
    folder = Path(name)
    if name == "pocket" and not folder.is_dir():
        folder = pocket_folder()
    if not folder.is_dir() and not name.startswith((".", "/", "~")) and name.count("/") <= 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", cache_dir=settings.cache_dir, revision=settings.revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if not (folder / "config.json").is_file():
        report(Note(f"{name}: not on this machine, so the shapes aren't checked against it"))
        return None
    config = read_config(folder)
    if config.get("model_type") not in MODEL_TYPES:
        report(Note(f"{name}: model_type {config.get('model_type')!r}: shapes aren't checked against it"))
        return None
    return config


def _with_mean_rows(settings: ExportSettings, trained: Trained, tokenizer: Path, report: Report) -> Trained:
    """Add the rows of FastChat's ten tokens, without which its adapters answer with noise, where the base is given."""
    ids = [] if trained.config.get("trainable_token_indices") else added_ids(tokenizer)
    if not ids:
        return trained
    if settings.model_name_or_path is None:
        report(
            Note(
                f"FastChat's tokens {ids[0]} to {ids[-1]} had rows that it didn't save: give --model-name-or-path to "
                "make them anew",
                warning=True,
            )
        )
        return trained
    base = Checkpoint(find_base(_named(settings, settings.model_name_or_path)))
    rows = mean_rows(base, ids)
    report(Note(f"the rows of FastChat's tokens {ids[0]} to {ids[-1]} are made anew: the mean of those before them"))
    config = {**trained.config, "trainable_token_indices": row_indices(ids, base.is_tied())}
    return replace(trained, config=config, adapter=trained.adapter | rows)


def _named(settings: ExportSettings, name: str) -> BaseModelSettings:
    return BaseModelSettings(model_name_or_path=name, revision=settings.revision, cache_dir=settings.cache_dir)


def _check_finite(tensors: Mapping[str, Tensor], place: Path) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.to_float32()).all():
            raise CheckpointError(f"{place}: {name}: holds NaN or infinity", hint="go back to an earlier checkpoint")


def _rounded(trained: Trained, dtype: str, place: Path) -> Trained:
    """All trained tensors in another dtype.

    Raises:
        CheckpointError: a value that it can't hold.
    """

    def rounded(name: str, tensor: Tensor) -> Tensor:
        with np.errstate(over="ignore"):
            result = from_float32(tensor.to_float32(), dtype)
        if not np.isfinite(result.to_float32()).all():
            raise CheckpointError(f"{place}: {name}: holds values that {dtype} can't", hint="bfloat16 can")
        return result

    adapter = {name: rounded(name, value) for name, value in trained.adapter.items()}
    return replace(trained, adapter=adapter, beside={name: rounded(name, v) for name, v in trained.beside.items()})


def _by_base_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def _base_state(settings: ExportSettings, trained: Trained) -> dict[str, Pieces]:
    """The base's tensors by their own names: from the checkpoint where it holds them, else from the base.

    Raises:
        CheckpointError: neither has them.
    """
    if trained.frozen and not _is_packed(trained):
        return dict(trained.frozen)
    base_name = settings.model_name_or_path or trained.config.get("base_model_name_or_path")
    if not base_name:
        raise CheckpointError(
            f"{settings.checkpoint}: holds no plain frozen weights and doesn't say which base it was trained on",
            hint="give --model-name-or-path",
        )
    base = Checkpoint(find_base(_named(settings, base_name)))
    return {name: Pieces.of(base.tensor(name)) for name in base.names()}


def _is_packed(trained: Trained) -> bool:
    """Whether the frozen weights are those of a quantised base, which say nothing without their scales."""
    for name, value in trained.adapter.items():
        if ".lora_A." in name:
            module = name.removeprefix(PREFIX).partition(".lora_A.")[0]
            weight = trained.frozen.get(f"{module}.weight")
            if weight is None or len(weight.shape) != 2 or weight.shape[1] != value.shape[1]:
                return True
    return False


def _write_pieces(path: Path, state: Mapping[str, Pieces], report: Report) -> None:
    """A safetensors file of tensors that needn't fit in memory."""
    entries = {name: (state[name].dtype, state[name].shape) for name in sorted(state)}
    header = header_of(entries, {"format": "pt"})
    report(Started(TASK, sum(array.nbytes for value in state.values() for array in value.arrays), "bytes"))
    done = 0
    with open(path, "wb") as file:
        file.write(header)
        for name in entries:
            for chunk in state[name].chunks():
                file.write(chunk)
                done += len(chunk)
                report(Advanced(TASK, done))
        file.flush()
        os.fsync(file.fileno())
    report(Finished(TASK))


def _write_bin(path: Path, state: Mapping[str, Tensor]) -> None:
    """The seed's adapter_model.bin, which torch writes."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {
        name: torch.frombuffer(bytearray(value.tobytes()), dtype=dtypes[value.dtype]).reshape(value.shape)
        for name, value in state.items()
    }
    torch.save(tensors, path)
