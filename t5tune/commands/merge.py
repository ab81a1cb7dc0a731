"""`t5tune merge`: merge adapters into their base and write a checkpoint that loads without PEFT.

    result = merge(MergeSettings(adapter="run", output_dir="merged"))
    result.checkpoint

Without an adapter, it converts a whole model to a different format.

Streams the weights: tensors that no adapter changes are copied unchanged, and of changed tensors only a few rows are in
memory at a time. W + scale · B·A is summed in fp32 and rounded once, which gives the same bits as PEFT's own merge.
"""

import functools
import math
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5tune.checkpoints.adapter import read_base_metadata
from t5tune.checkpoints.adapter_folder import find_adapter, has_only_model
from t5tune.checkpoints.base import (
    find_base,
    find_local_base,
    is_pocket,
    open_base,
    read_base_of_adapter,
    read_config,
)
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.hub_upload import open_repository, upload_result
from t5tune.checkpoints.model_card import build_merged_card, describe_run_training
from t5tune.checkpoints.model_folder import copy_supporting_files, write_config
from t5tune.checkpoints.tensor_files.tensors import DTYPES_BY_TORCH_NAME
from t5tune.checkpoints.tokenizer_files import read_supporting_files, remove_chat_template
from t5tune.checkpoints.training_data import (
    TrainingData,
    describe_labels,
    join_training_data,
    list_differences,
    read_label_task,
    read_training_data,
    write_training_data,
)
from t5tune.converting.formats import GENERATORS, check_converter, check_format
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.tokenizer import find_other_token, load_tokenizer
from t5tune.errors import CheckpointError, SettingsError
from t5tune.families import Family, find_family
from t5tune.families.encoder import Encoder
from t5tune.file_names import (
    MODEL_CARD_FILE,
    MODEL_SUFFIXES,
    ONNX_SUFFIXES,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.hub.names import name_snapshot
from t5tune.io.atomic import (
    check_free_space,
    check_overwrite,
    check_replaceable,
    make_scratch_folder,
    write_folder_atomically,
)
from t5tune.io.untrusted import has_file
from t5tune.merging.deltas import Adapter, collect_deltas, read_adapters
from t5tune.merging.fold import WeightDelta
from t5tune.merging.shards import Shard, estimate_converted_size, plan_shards, write_shards
from t5tune.merging.trained_base import (
    UNQUANTIZED,
    TrainedBase,
    change_base_as_in_training,
    choose_onto,
    match_trained_base,
)
from t5tune.model.device import get_free_memory, keep_freed_memory
from t5tune.progress import Note, Report, count_done, silent
from t5tune.runs.checkpoints import find_trained_folder
from t5tune.settings import MergeSettings, write_settings

if TYPE_CHECKING:  # these import torch, or an optional package
    from t5tune.converting.replies import Agreement
    from t5tune.merging.verify import LogitsDifference

OF_ADAPTERS = ("weights", "onto", "allow_other_base", "verify")  # settings without an effect on a whole model
LIBRARY_BYTES = 800 << 20  # memory of torch and transformers before any weight is loaded


@dataclass(frozen=True)
class MergeResult:
    """The merged checkpoint and what --verify measured.

    Args:
        max_error: the largest difference of logits that --verify found, in fp32.
        onto: the weights that were merged into: `base`, `nf4`, …
        from_training: for adapters trained with q_lora, the largest difference from the training model's logits, by
            the weights merged into (`base`, `nf4`, …).
        replies: how many replies of the converted model were compared with the merged checkpoint's.
        same_replies: how many of them are equal.
        pushed: URL of the repository that it was uploaded to.
    """

    checkpoint: Path
    tensors: int
    adapted_tensors: int
    token_rows: int
    bytes: int
    verified: bool
    max_error: float | None
    onto: str
    from_training: dict[str, float]
    replies: int | None
    same_replies: int | None
    seconds: float
    pushed: str | None = None


@dataclass(frozen=True)
class _Inputs:
    """The base and the adapters of a merge, opened and checked.

    Args:
        settings: with the folders of the inputs, and the chosen `onto`.
        family_key: in the table of families, if config.json doesn't name the model type.
        trained: the base as the adapters were trained on it; None: no adapters.
        task: the labels that the model predicts; None: it writes texts.
    """

    settings: MergeSettings
    base: Checkpoint
    family: Family
    family_key: str | None
    adapters: list[Adapter]
    trained: TrainedBase | None
    task: LabelTask | None

    @property
    def described(self) -> Path:
        """The folder with the facts about the training: the first adapter's, or the whole model's."""
        return self.adapters[0].folder if self.adapters else self.base.folder


def merge(settings: MergeSettings, report: Report = silent) -> MergeResult:
    """Write the merged checkpoint to `output_dir`.

    Raises:
        ModelError, CheckpointError: the base or an adapter can't be used, or they don't fit each other.
        TrainingError: --verify finds different logits of the merged model, or different replies of the converted model.
        DependencyError: --to ctranslate2 or onnx, but its packages aren't installed.
    """
    started = time.monotonic()
    output, converts = settings.output_dir, settings.to != "checkpoint"
    inputs = _read_inputs(settings, report)
    settings, base = inputs.settings, inputs.base
    deltas = _collect_deltas(inputs, report)
    tokenizer_folder = _choose_tokenizer(inputs)
    if settings.to in GENERATORS:
        check_converter(settings.to, inputs.family, base.folder, report)
        # these raise for the user's files here, and not for their copies
        load_tokenizer(tokenizer_folder)
        _ = base.architecture.start_token_id
    rounded = settings.dtype or ("float32" if settings.to == "onnx" else None)  # an ONNX model computes in fp32
    dtype = DTYPES_BY_TORCH_NAME[rounded] if rounded else None
    shards = plan_shards(base, dtype, settings.max_shard_size)
    _check_disk_space(settings, base, shards)
    open_repository(settings, output, report)
    verify = _should_verify(inputs, report)
    scratch = make_scratch_folder(Path(os.path.realpath(output))) if converts else None
    with write_folder_atomically(output, settings.overwrite) as staged, scratch or nullcontext(staged) as checkpoint:
        _write_weights(base, shards, deltas, checkpoint, report)
        write_config(base.folder, checkpoint, base.is_tied(), dtype, inputs.family_key, inputs.task)
        _write_supporting_files(inputs, tokenizer_folder, checkpoint, report)
        found = _verify(inputs, checkpoint, report) if verify else None
        agreement = _convert(inputs, checkpoint, staged, report) if converts else None
        size = sum(file.stat().st_size for file in staged.rglob("*") if file.suffix in MODEL_SUFFIXES | ONNX_SUFFIXES)
    rows = [rows for delta in deltas.values() for rows, _ in delta.rows]
    return MergeResult(
        checkpoint=output,
        tensors=len(base.list_names()),
        adapted_tensors=sum(bool(delta.updates or delta.replacements or delta.biases) for delta in deltas.values()),
        token_rows=len(rows[0].positions) if rows else 0,
        bytes=size,
        verified=verify,
        max_error=found.error if found else None,
        onto=settings.onto or UNQUANTIZED,
        from_training=found.from_training if found else {},
        replies=agreement.replies if agreement else None,
        same_replies=agreement.same if agreement else None,
        pushed=upload_result(settings, output, report),
        seconds=round(time.monotonic() - started, 3),
    )


def _read_inputs(settings: MergeSettings, report: Report) -> _Inputs:
    """Open the base and the adapters, and check that they fit each other and that the output may be replaced."""
    output, in_place = settings.output_dir, _is_in_place(settings)
    named = [] if in_place or settings.model_name_or_path is None else [settings.model_name_or_path]
    check_replaceable(output, settings.overwrite, [*settings.adapter, *named])
    settings, base_folder = _find_inputs(settings, report)
    if not settings.adapter and (unused := [name for name in OF_ADAPTERS if getattr(settings, name)]):
        raise SettingsError(*(f"{name}: there is no adapter to merge; leave it out" for name in unused))
    if settings.overwrite:
        check_overwrite(output, settings.adapter if in_place else [*settings.adapter, base_folder])
    adapters = read_adapters(settings.adapter, settings.weights or [1.0] * len(settings.adapter))
    described = adapters[0].folder if adapters else base_folder
    task = _find_label_task(described, adapters[1:])
    check_format(settings.to, task)
    onto = choose_onto(settings.onto, adapters, report) if adapters else UNQUANTIZED
    family_key = settings.family or read_base_metadata(described).get("family")
    base, trained = open_base(base_folder, family_key, task), None
    if settings.to != "checkpoint":  # for a checkpoint, --verify checks them
        base.check_tensors()
    if adapters:
        whole = open_base(base_folder, family_key)
        reads_all, allows_other = settings.check == "full", settings.allow_other_base
        trained = match_trained_base(whole, adapters, onto, settings.family, report, reads_all, allows_other)
    return _Inputs(
        settings=settings.model_copy(update={"onto": onto}),
        base=base,
        family=find_family(read_config(base_folder), base_folder, family_key),
        family_key=family_key,
        adapters=adapters,
        trained=trained,
        task=task,
    )


def _find_label_task(folder: Path, adapters: list[Adapter]) -> LabelTask | None:
    """Return the labels that the model in a folder predicts; None: texts. The adapters must predict the same."""
    task = read_label_task(folder)
    for adapter in adapters:
        if (other := read_label_task(adapter.folder)) != task:
            problem = f"predicts {describe_labels(other)}, but {folder} predicts {describe_labels(task)}"
            raise CheckpointError(f"adapter: {adapter.folder}: {problem}", hint="merge each of them alone")
    return task


def _is_in_place(settings: MergeSettings) -> bool:
    base = settings.model_name_or_path
    is_checkpoint = settings.to == "checkpoint"  # a converted model can't be an adapter's base
    return base is not None and is_checkpoint and os.path.realpath(base) == os.path.realpath(settings.output_dir)


def _find_inputs(settings: MergeSettings, report: Report) -> tuple[MergeSettings, Path]:
    """Find the adapters (for a stopped run, its newest checkpoint), and the base (by default, the adapters' base).

    Anyone may have written the name of the adapter's base, so it isn't downloaded.

    Returns:
        The settings with the inputs' folders, and the folder of the base. A whole model to convert is the base.
    """
    converts = settings.to != "checkpoint" and settings.model_name_or_path is None
    find = functools.partial(find_adapter, cache_dir=settings.cache_dir, report=report, allows_model=converts)
    folders = [find_trained_folder(find(adapter), "adapter", report) for adapter in settings.adapter]
    is_built_in = is_pocket(str(folders[0])) and not folders[0].exists()  # a run may be named pocket, too
    if converts and (is_built_in or has_only_model(folders[0])):
        settings = settings.model_copy(update={"model_name_or_path": str(folders.pop(0))})
    settings = settings.model_copy(update={"adapter": folders})
    if settings.model_name_or_path is not None:
        return settings, find_base(settings, report=report)
    named = read_base_of_adapter(folders[0], settings.cache_dir)
    name, revision = named.model_name_or_path, settings.revision or named.revision
    base = find_local_base(named.model_copy(update={"revision": revision}), with_weights=True)
    if base is None:
        raise CheckpointError(
            f"adapter: {settings.adapter[0]}: its base, {name}, isn't on this machine",
            hint="give --model-name-or-path with the base's folder, or with its name on the Hub to download it",
        )
    report(Note(f"{name_snapshot(folders[0])} is an adapter; its base is {name}"))
    return settings.model_copy(update={"model_name_or_path": name, "revision": revision}), base


def _collect_deltas(inputs: _Inputs, report: Report) -> dict[str, WeightDelta]:
    """Collect the change of each tensor, including the difference between the base's weights and the trained ones."""
    base, adapters, trained = inputs.base, inputs.adapters, inputs.trained
    if trained is None:
        return {}
    deltas = collect_deltas(adapters, base, base.is_tied())
    change_base_as_in_training(base, adapters[0], trained, inputs.settings.onto, deltas)
    _warn_if_zero(deltas, report)
    return deltas


def _warn_if_zero(deltas: dict[str, WeightDelta], report: Report) -> None:
    updates = (update for delta in deltas.values() for update, _ in delta.updates)
    has_others = any(delta.replacements or delta.biases for delta in deltas.values())
    if not has_others and not any(update.b_OR.to_float32().any() for update in updates):
        report(Note("every lora_B is zero: the adapter changes nothing except token embeddings", warning=True))


def _check_disk_space(settings: MergeSettings, base: Checkpoint, shards: list[Shard]) -> None:
    """Check that the weights fit on the disk: a checkpoint stays there until its conversion is complete."""
    needed = sum(shard.size for shard in shards)
    if settings.to == "sentence-transformers":
        needed *= 2
    elif settings.to in GENERATORS:
        weights = {name: entry for shard in shards for name, entry in shard.entries.items()}
        if settings.to == "onnx":  # the embedding is also in the encoder's file
            weights["encoder"] = base.get_dtype_and_shape(base.architecture.tied_to)
        writes_both = settings.to == "onnx" and settings.quantization is None
        kinds = ["float32", "int8"] if writes_both else [settings.quantization]
        needed += sum(estimate_converted_size(weights, kind, base.architecture) for kind in kinds)
    check_free_space(settings.output_dir, needed)


def _write_weights(
    base: Checkpoint, shards: list[Shard], deltas: dict[str, WeightDelta], folder: Path, report: Report
) -> None:
    # otherwise each block of rows would have its memory pages mapped again, which takes longer than the sums
    keep_freed_memory()
    with count_done("merge", report, sum(shard.size for shard in shards), "bytes") as advance:
        for written in write_shards(base, shards, deltas, folder):
            advance(written)


def _choose_tokenizer(inputs: _Inputs) -> Path:
    """Choose the folder of the merged checkpoint's tokenizer: the first adapter's if it has one, else the base's."""
    adapters, base = inputs.adapters, inputs.base
    folders = [each.folder if has_file(each.folder, TOKENIZER_CONFIG_FILE) else base.folder for each in adapters]
    folders = folders or [base.folder]
    for folder in folders[1:]:
        if folder != folders[0] and (found := find_other_token(load_tokenizer(folder), load_tokenizer(folders[0]))):
            token, index = found
            raise CheckpointError(
                f"adapter: {folder}: token {index} of its tokenizer is {token!r}, which the merged checkpoint's "
                f"tokenizer ({folders[0]}) lacks or numbers differently",
                hint="give the adapter with the most tokens first; if each has its own tokens, train them with the "
                "same list of --add-tokens",
            )
    return folders[0]


def _write_supporting_files(inputs: _Inputs, tokenizer_folder: Path, staged: Path, report: Report) -> None:
    settings, base, adapters, described = inputs.settings, inputs.base, inputs.adapters, inputs.described
    # labels have no conversation template
    is_described = has_file(described, TEMPLATE_FILE) or has_file(described, TRAINING_DATA_FILE)
    template_folder = described if is_described else base.folder
    files = read_supporting_files(tokenizer_folder, template_folder / TEMPLATE_FILE)
    copy_supporting_files(base.folder, files, staged, generates=inputs.task is None)
    made = [read_training_data(adapter.folder) for adapter in adapters]
    if any(other != made[0] for other in made[1:]):
        _write_joined_training_data(made, staged, report)
    if len({data.source_prefix if data else "" for data in made}) > 1:
        remove_chat_template(staged)
        report(Note("the tokenizer gets no chat template: the adapters were trained with different source prefixes"))
    weighted = [(name_snapshot(each.folder), each.weight) for each in adapters]
    # a run's metrics are for its adapter alone, in full strength
    training = describe_run_training(described) if [each.weight for each in adapters] in ([], [1]) else ""
    assert settings.model_name_or_path is not None  # see _find_inputs
    converters = inputs.family.converters if inputs.task is None else ()
    card = build_merged_card(settings.model_name_or_path, weighted, settings.to, converters, training, inputs.task)
    (staged / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
    named: dict[str, Any] = {"adapter": [Path(name_snapshot(folder)) for folder in settings.adapter]}
    if not adapters:  # as it can be given again
        named = {"adapter": [Path(settings.model_name_or_path)], "model_name_or_path": None, "onto": None}
    write_settings(staged, settings.model_copy(update=named))


def _write_joined_training_data(made: list[TrainingData | None], staged: Path, report: Report) -> None:
    """Write the training data that all adapters have in common, if every adapter has some."""
    known = [data for data in made if data is not None]
    if len(known) < len(made):
        (staged / TRAINING_DATA_FILE).unlink(missing_ok=True)
        report(Note(f"no {TRAINING_DATA_FILE} written: {len(made) - len(known)} of {len(made)} adapters lack it"))
        return
    write_training_data(staged, join_training_data(known))
    differences = ", ".join(list_differences(known))
    report(Note(f"{TRAINING_DATA_FILE} contains only the common settings; the adapters differ in {differences}"))


def _should_verify(inputs: _Inputs, report: Report) -> bool:
    """Decide whether to verify (if requested, or if it fits in memory), and report how much memory it needs."""
    settings, base, adapters = inputs.settings, inputs.base, inputs.adapters
    if settings.verify is False or not adapters:
        return False
    is_sum = len(adapters) > 1 or adapters[0].weight != 1
    if is_sum and any(adapter.has_more_than_lora() for adapter in adapters):
        problem = "PEFT, the reference, can add up only LoRA matrices, not embedding rows or whole modules"
        if settings.verify:
            raise SettingsError(f"verify: {problem}")
        report(Note(f"not verified: {problem}"))
        return False
    values = sum(math.prod(base.get_dtype_and_shape(name)[1]) for name in base.list_names())
    needed, available = 4 * values + LIBRARY_BYTES, get_free_memory()
    text = f"verifying needs about {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free"
    if settings.verify is None and needed > available:
        report(Note(f"not verified: {text}; --verify verifies anyway", warning=True))
        return False
    report(Note(text))
    return True


def _verify(inputs: _Inputs, merged: Path, report: Report) -> "LogitsDifference":
    from t5tune.merging.verify import verify_merge

    assert inputs.trained is not None  # see _should_verify
    settings, base, adapters = inputs.settings, inputs.base, inputs.adapters
    onto = settings.onto or UNQUANTIZED
    return verify_merge(base, adapters, inputs.trained, onto, merged, settings.verify_tolerance, report, inputs.task)


def _convert(inputs: _Inputs, checkpoint: Path, staged: Path, report: Report) -> "Agreement | None":
    """Convert the merged checkpoint, and compare the replies of both if it writes texts."""
    settings, described = inputs.settings, inputs.described
    if isinstance(inputs.base.architecture, Encoder):
        from t5tune.converting.sentence_transformers import write_sentence_transformers

        data = read_training_data(checkpoint)
        prefix = data.source_prefix if data else ""
        write_sentence_transformers(checkpoint, inputs.base.architecture, staged, prefix)
        return None
    if settings.to == "onnx":
        from t5tune.converting import onnx

        return onnx.convert_and_check(checkpoint, described, staged, settings.quantization, report)
    from t5tune.converting import ctranslate2

    agreement = ctranslate2.convert_and_check(checkpoint, described, staged, settings.quantization, report)
    shutil.copyfile(checkpoint / SETTINGS_FILE, staged / SETTINGS_FILE)
    return agreement
