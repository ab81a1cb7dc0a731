"""`t5tune merge`: base + adapters -> a checkpoint that needs no PEFT.

    result = merge(MergeSettings(model_name_or_path="base", adapter="run", output_dir="merged"))
    result.checkpoint

Streams: what no adapter touches is copied as it lies, and of a tensor that one does a few rows are in memory at a
time. W + scale · B·A is summed in fp32 and rounded once, to the bits of PEFT's own merge.
"""

import functools
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5tune.checkpoints.adapter import TEMPLATE, base_facts
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.fingerprint import fingerprint, full_hash
from t5tune.checkpoints.model_card import merged_card, training_of_run
from t5tune.checkpoints.model_folder import copy_companions, write_config
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILES
from t5tune.checkpoints.training_data import TRAINING_DATA, read_training_data
from t5tune.errors import CheckpointError, SettingsError, TrainingError
from t5tune.families import Family, family_of
from t5tune.io.atomic import published_folder, scratch_folder
from t5tune.io.output_dir import check_replaceable
from t5tune.io.untrusted import holds
from t5tune.merging.deltas import Adapter, changes_of, read_adapters
from t5tune.merging.fold import Change, converted, folded
from t5tune.merging.free_memory import free_memory
from t5tune.merging.shards import Shard, plan_shards, write_shards
from t5tune.model.device import keep_freed_memory
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.settings import MergeSettings, dump_settings

if TYPE_CHECKING:
    from t5tune.merging.ctranslate2 import Agreement
    from t5tune.merging.verify import Difference

TASK = "merge"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LIBRARIES = 800 << 20  # what torch and transformers take before any weight
WEIGHT_FILES = {".safetensors", ".bin"}
SAME_LOG_PROBABILITIES = 1e-3  # both compute in fp32, in sums of another order
ROUNDING = 0.05  # weights of 8 or 11 bits move logits by about so much of their size


@dataclass(frozen=True)
class Merged:
    """What merge made. `max_error` is the largest difference of logits that --verify saw, in fp32.

    `from_training`: for adapters from q_lora, the largest difference to the training model's logits, by what the
    adapter is folded into. `same_replies`: how many of the `replies` of a converted model are those of the checkpoint.
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


def merge(settings: MergeSettings, report: Report = silent) -> Merged:
    """Write the merged checkpoint to `output_dir`.

    Raises:
        ModelError, CheckpointError: the base or an adapter can't be used, or they don't fit each other.
        TrainingError: --verify finds that the merged model answers differently, or the converted one does.
        DependencyError: --to ctranslate2 without CTranslate2.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite)
    if settings.to == "ctranslate2":
        from t5tune.merging.ctranslate2 import check_installed

        check_installed()
    base = Checkpoint(find_base(settings))
    adapters = read_adapters(settings.adapter, settings.weights or [1.0])
    tied = base.is_tied()
    facts = _check_base(settings, base, adapters, report)
    member = family_of(read_config(base.folder), base.folder, facts["family"])
    changes = changes_of(adapters, base, tied)
    _take_out_starts(adapters, changes)
    _fold_onto(settings, base, facts, changes)
    if not any(map(_moves, changes.values())):
        report(Note("every lora_B is zero: the adapter changes nothing but token rows", warning=True))
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    shards = plan_shards(base, dtype, settings.max_shard_size)
    _check_room(settings.output_dir, sum(shard.size for shard in shards))
    verify = _may_verify(settings, base, adapters, report)
    agreement = None
    with published_folder(settings.output_dir) as staged, _checkpoint_folder(settings, staged) as checkpoint:
        _write_weights(base, shards, changes, checkpoint, report)
        write_config(base.folder, checkpoint, tied, dtype, facts["family"])
        _write_companions(settings, base, adapters, member, checkpoint, report)
        found = _verify(settings, base, adapters, facts, checkpoint, report) if verify else None
        if settings.to == "ctranslate2":
            agreement = _convert(settings, adapters[0].folder, checkpoint, staged, report)
        size = sum(file.stat().st_size for file in staged.iterdir() if file.suffix in WEIGHT_FILES)
    rows = [rows for change in changes.values() for rows, _ in change.rows]
    return Merged(
        checkpoint=settings.output_dir,
        tensors=len(base.names()),
        adapted_tensors=sum(bool(change.updates or change.whole or change.biases) for change in changes.values()),
        token_rows=len(rows[0].places) if rows else 0,
        bytes=size,
        verified=verify,
        max_error=found.error if found else None,
        from_training=found.from_training if found else {},
        replies=agreement.replies if agreement else None,
        same_replies=agreement.same if agreement else None,
        seconds=round(time.monotonic() - started, 3),
    )


def _check_base(settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], report: Report) -> dict[str, Any]:
    """Hold the base against the one of training; returns what the first adapter tells of it, --family above all.

    Raises:
        CheckpointError: it is another one.
    """
    key = "sha256" if settings.check == "full" else "fingerprint"
    found: str | None = None
    for adapter in adapters:
        facts = base_facts(adapter.folder)
        if not facts.get(key):
            report(Note(f"{adapter.folder}: doesn't tell the {key} of its base; nobody checked that this is the one"))
            continue
        if found is None:
            found = full_hash(base) if settings.check == "full" else fingerprint(base)
        if facts[key] != found and not settings.allow_other_base:
            raise CheckpointError(
                f"{base.folder}: not the base that {adapter.folder} was trained on, which was {facts.get('base')} "
                f"({key} {str(facts[key])[:12]}…, here {found[:12]}…)",
                hint="name that base, or --allow-other-base to merge all the same",
            )
        if facts[key] != found:
            report(Note(f"{base.folder}: not the base that {adapter.folder} was trained on", warning=True))
    facts = base_facts(adapters[0].folder)
    trained_on = facts.get("onto", "base")
    if trained_on != settings.onto:
        text = f"{adapters[0].folder}: trained on the base in {trained_on}; folded into {settings.onto}"
        if trained_on != "base":
            report(Note(f"{text}: --onto {trained_on} keeps its answers", warning=True))
        elif facts:
            report(Note(text, warning=True))
    return facts | {"family": settings.family or facts.get("family")}


def _fold_onto(settings: MergeSettings, base: Checkpoint, facts: dict[str, Any], changes: dict[str, Change]) -> None:
    """Let every weight that q_lora keeps in few bits become what those bits say, adapted or not."""
    if settings.onto == "base":
        return
    import torch

    from t5tune.merging.requantize import restored

    compute = torch.float32 if facts.get("compute") == "float32" else torch.bfloat16
    double_quant = facts.get("double_quant", True) is not False
    for name in base.names():
        is_linear = ".block." in name and len(base.dtype_and_shape(name)[1]) == 2 and "relative_attention" not in name
        if is_linear:
            change = changes.setdefault(name, Change())
            if change.prepare is not None:
                raise SettingsError(f"onto: {settings.onto}: an adapter without its start was trained on full weights")
            change.prepare = functools.partial(restored, kind=settings.onto, double_quant=double_quant, compute=compute)


def _take_out_starts(adapters: list[Adapter], changes: dict[str, Change]) -> None:
    """Let the base lose what an adapter began as, where it was saved without that."""
    if (kind := adapters[0].start) is None:
        return
    from t5tune.merging.pissa import without_start

    for name, change in changes.items():
        for update, _ in change.updates:
            rank = update.a_RI.shape[0]
            change.prepare = functools.partial(without_start, name=name, kind=kind, rank=rank, scale=update.scale)


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        SettingsError: with both numbers.
    """
    place = next(parent for parent in Path(os.path.realpath(folder)).parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise SettingsError(
            f"output_dir: {folder}: {free:,} bytes are free there; the weights take {needed:,}",
            hint="make room, or name another output_dir",
        )


def _moves(change: Change) -> bool:
    """Whether it adds anything beside token rows."""
    return bool(change.whole or change.biases) or any(u.b_OR.to_float32().any() for u, _ in change.updates)


@dataclass(frozen=True)
class _Folded:
    """The changed tensors folded, the others in another dtype or as they are."""

    by_name: dict[str, Change]

    def changes(self, name: str, dtype: str, wanted: str) -> bool:
        return name in self.by_name or dtype != wanted

    def __call__(self, name: str, tensor: Tensor, wanted: str) -> Iterator[Tensor]:
        if name in self.by_name:
            return folded(name, tensor, self.by_name[name], wanted)
        return converted(name, tensor, wanted)


def _write_weights(
    base: Checkpoint, shards: list[Shard], changes: dict[str, Change], folder: Path, report: Report
) -> None:
    report(Started(TASK, sum(shard.size for shard in shards), "bytes"))
    keep_freed_memory()  # or each block of rows would get its pages anew, which takes longer than the sums
    done = 0
    for written in write_shards(base, shards, _Folded(changes), folder):
        done += written
        report(Advanced(TASK, done))
    report(Finished(TASK))


def _write_companions(
    settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], member: Family, staged: Path, report: Report
) -> None:
    """The tokenizer, the layout of conversations, the card and the settings."""
    adapter = adapters[0].folder
    tokenizer_folder = adapter if holds(adapter, "tokenizer_config.json") else base.folder
    layout_folder = adapter if holds(adapter, TEMPLATE) else base.folder
    copy_companions(base.folder, tokenizer_folder, layout_folder / TEMPLATE, staged)
    if any(read_training_data(other.folder) != read_training_data(adapter) for other in adapters[1:]):
        (staged / TRAINING_DATA).unlink(missing_ok=True)
        report(Note(f"no {TRAINING_DATA}: the adapters were trained on data of different kinds"))
    names = ", ".join(str(adapter.folder) for adapter in adapters)
    training = training_of_run(adapter) if len(adapters) == 1 else ""
    card = merged_card(settings.model_name_or_path, names, settings.to, member.converters, training)
    (staged / "README.md").write_text(card, encoding="utf-8")
    (staged / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")


@contextmanager
def _checkpoint_folder(settings: MergeSettings, staged: Path) -> Iterator[Path]:
    """Where the checkpoint is written: what is published, or a folder beside it that is gone after the conversion."""
    if settings.to == "checkpoint":
        yield staged
    else:
        with scratch_folder(Path(os.path.realpath(settings.output_dir))) as folder:
            yield folder


def _convert(settings: MergeSettings, adapter: Path, checkpoint: Path, staged: Path, report: Report) -> "Agreement":
    """Convert the checkpoint for CTranslate2, and hold its replies against the checkpoint's.

    Raises:
        TrainingError: weights that were not quantised answer differently.
    """
    from t5tune.merging.ctranslate2 import compare_replies, convert
    from t5tune.merging.verify import example_ids

    convert(checkpoint, staged, settings.quantization)
    for file in sorted(checkpoint.iterdir()):
        if file.name.startswith((*TOKENIZER_FILES, TEMPLATE, TRAINING_DATA, "README", "settings")):
            shutil.copyfile(file, staged / file.name)
    is_exact = settings.quantization in (None, "float32")
    sources = [source for source, _ in example_ids(checkpoint, adapter)]
    found = compare_replies(checkpoint, staged, sources, is_exact)
    seen = f"CTranslate2 gives {found.same} of {found.replies} replies, log-probabilities differ by {found.error:.2g}"
    if is_exact and (found.same < found.replies or not found.error <= SAME_LOG_PROBABILITIES):
        raise TrainingError(
            f"the converted model doesn't answer as the merged one: {seen}; nothing was written",
            hint="try another release of CTranslate2, and tell its version in an issue",
        )
    report(Note(seen))
    return found


def _may_verify(settings: MergeSettings, base: Checkpoint, adapters: list[Adapter], report: Report) -> bool:
    """Say what verifying needs, and whether it is done: where it was asked for, or fits into memory."""
    if settings.verify is False:
        return False
    is_sum = len(adapters) > 1 or adapters[0].weight != 1
    if is_sum and any(adapter.has_more_than_lora() for adapter in adapters):
        if settings.verify:
            raise SettingsError("verify: PEFT, which this compares with, adds up LoRA alone, not rows or whole modules")
        report(Note("not verified: PEFT, which this compares with, adds up LoRA alone, not rows or whole modules"))
        return False
    values = sum(math.prod(base.dtype_and_shape(name)[1]) for name in base.names())
    needed, available = 4 * values + LIBRARIES, free_memory()
    text = f"verifying needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    if settings.verify is None and needed > available:
        report(Note(f"not verified: {text}; --verify does it all the same", warning=True))
        return False
    report(Note(text))
    return True


def _verify(
    settings: MergeSettings,
    base: Checkpoint,
    adapters: list[Adapter],
    facts: dict[str, Any],
    merged: Path,
    report: Report,
) -> "Difference":
    """Compare logits of base + adapters and of the merged checkpoint.

    Raises:
        TrainingError: the difference is above the tolerance, for the dtype of the merged weights.
    """
    import torch

    from t5tune.merging.verify import TrainedOn, compare

    folders, weights = [adapter.folder for adapter in adapters], [adapter.weight for adapter in adapters]
    kind = settings.onto if settings.onto != "base" else facts.get("onto", "base")
    trained_on = None
    if kind != "base":
        compute = torch.float32 if facts.get("compute") == "float32" else torch.bfloat16
        trained_on = TrainedOn(kind, facts.get("double_quant", True) is not False, compute)
    found = compare(base.folder, folders, weights, merged, trained_on, settings.onto, facts["family"], report)
    dtypes = {Checkpoint(merged).dtype_and_shape(name)[0] for name in base.names()}
    is_exact = dtypes <= {"F32", "F64"} and settings.onto == "base"
    allowed = max(settings.verify_tolerance, 0.0 if is_exact else ROUNDING) * max(found.largest, 1.0)
    if not found.error <= allowed:
        raise TrainingError(
            f"the merged model's logits differ by {found.error:.3g} from base + adapter's (allowed {allowed:.3g}); "
            "nothing was written",
            hint="is this the base that the adapter was trained on?",
        )
    seen = f"logits differ by at most {found.error:.3g} of {found.largest:.3g} ({allowed:.3g} is allowed)"
    report(Note(f"verified on {found.examples} examples: {seen}"))
    if found.from_training:
        parts = (f"{error:.3g} folded onto {onto}" for onto, error in found.from_training.items())
        report(Note(f"from the training model's logits, on a base in {kind}: {', '.join(parts)}"))
    return found
