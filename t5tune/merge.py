"""`t5tune merge`: base + adapter -> a checkpoint that needs no PEFT.

    result = merge(MergeSettings(model_name_or_path="base", adapter="run", output_dir="merged"))
    result.checkpoint

Streams: the output's header is the input's, so what no adapter touches is copied as it lies, and only one
adapted tensor is in memory at a time. W + scale · B·A is summed in fp32 and rounded once to the base's dtype.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from t5tune.errors import CheckpointError, TrainingError
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.publish import published_folder
from t5tune.settings import MergeSettings, dump_settings
from t5tune.weights.adapter import (
    LORA_NAME,
    MAGNITUDE,
    PREFIX,
    ROWS,
    TEMPLATE,
    LowRank,
    check_adapter,
    low_rank_updates,
    read_adapter,
    rows_tensor,
    token_rows,
    whole_modules,
)
from t5tune.weights.base import find_base, read_config
from t5tune.weights.card import merged_card
from t5tune.weights.model_folder import copy_companions, write_config
from t5tune.weights.output import check_replaceable
from t5tune.weights.streaming import Checkpoint, SafetensorsFile, copy_range, total_bytes, write_safetensors
from t5tune.weights.tensors import FLOATS, Tensor, from_float32

if TYPE_CHECKING:
    from t5tune.data.tokenizer import Tokenizer

NUM_VERIFIED = 4
TASK = "merge"


@dataclass(frozen=True)
class Merged:
    """What merge made. `max_error` is the largest difference of logits that --verify saw, in fp32."""

    checkpoint: Path
    tensors: int
    adapted_tensors: int
    token_rows: int
    bytes: int
    verified: bool
    max_error: float | None
    seconds: float


@dataclass
class _Changes:
    """What the adapter does to the base, by the base weight's name: low-rank updates, new rows, whole weights."""

    updates: dict[str, LowRank]
    rows: dict[str, tuple[dict[int, int], Tensor]]
    whole: dict[str, Tensor]
    done: set[str] = field(default_factory=set)

    def names(self) -> set[str]:
        return self.updates.keys() | self.rows.keys() | self.whole.keys()

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The merged tensor, in the base's dtype."""
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{name}: dtype {tensor.dtype} can't take an update")
        self.done.add(name)
        if name in self.whole:
            tensor = _replaced(name, tensor, self.whole[name])
        if name in self.updates:
            tensor = _add_low_rank(name, tensor, self.updates[name])
        if name in self.rows:
            tensor = _set_rows(name, tensor, *self.rows[name])
        return tensor


def merge(settings: MergeSettings, report: Report = silent) -> Merged:
    """Write the merged checkpoint to `output_dir`.

    Raises:
        ModelError, CheckpointError: the base or the adapter can't be used, or they don't fit each other.
        TrainingError: --verify finds that the merged model answers differently.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite)
    base_folder = find_base(settings)
    base = Checkpoint(base_folder)
    config, state = read_adapter(settings.adapter)
    check_adapter(state, config, settings.adapter, must_have_moved=False)
    _check_all_used(config, state, settings.adapter)
    tied = base.is_tied()
    changes = _changes(config, state, tied)
    if unknown := sorted(name for name in changes.names() if name not in base):
        raise CheckpointError(
            f"{settings.adapter}: adapts {unknown[0]}, which {base_folder} doesn't have",
            hint="name the base that the adapter was trained on",
        )
    if all(not update.b_OR.to_float32().any() for update in changes.updates.values()):
        report(Note("every lora_B is zero: the adapter changes nothing but token rows", warning=True))
    with published_folder(settings.output_dir) as staged:
        _write_weights(base, changes, staged, tied, report)
        write_config(base_folder, staged, tied)
        has_tokenizer = (settings.adapter / "tokenizer_config.json").is_file()
        tokenizer_folder = settings.adapter if has_tokenizer else base_folder
        copy_companions(base_folder, tokenizer_folder, settings.adapter / TEMPLATE, staged)
        (staged / "README.md").write_text(
            merged_card(settings.model_name_or_path, str(settings.adapter)), encoding="utf-8"
        )
        (staged / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")
        error = _verify(settings, base_folder, staged, report) if settings.verify else None
        size = total_bytes(path for path in staged.iterdir() if path.suffix == ".safetensors")
    return Merged(
        checkpoint=settings.output_dir,
        tensors=len(base.names()),
        adapted_tensors=len(changes.updates) + len(changes.whole),
        token_rows=len(next(iter(changes.rows.values()))[0]) if changes.rows else 0,
        bytes=size,
        verified=settings.verify,
        max_error=error,
        seconds=round(time.monotonic() - started, 3),
    )


def _changes(config: Mapping[str, Any], state: Mapping[str, Tensor], tied: bool) -> _Changes:
    updates = low_rank_updates(config, state)
    rows = {weight: (places, rows_tensor(state, weight)) for weight, places in token_rows(config, state, tied).items()}
    return _Changes(updates, rows, whole_modules(config, state))


def _check_all_used(config: Mapping[str, Any], state: Mapping[str, Tensor], adapter: Path) -> None:
    """Refuse tensors that would be left out: LoRA of an embedding, biases, rows that the config doesn't list."""
    listed = bool(config.get("trainable_token_indices"))
    whole = whole_modules(config, state)
    for name in state:
        is_magnitude = bool(config.get("use_dora")) and name.endswith(MAGNITUDE)
        is_row = listed and name.endswith(ROWS)
        if not (LORA_NAME.fullmatch(name) or is_magnitude or is_row or name.removeprefix(PREFIX) in whole):
            raise CheckpointError(f"{adapter}: {name}: merge can't fold this tensor")


def _add_low_rank(name: str, tensor: Tensor, update: LowRank) -> Tensor:
    b_OR, a_RI = update.b_OR.to_float32(), update.a_RI.to_float32()
    if (b_OR.shape[0], a_RI.shape[1]) != tensor.shape or b_OR.shape[1] != a_RI.shape[0]:
        raise CheckpointError(
            f"{name}: {list(tensor.shape)} in the base, the adapter's B·A is {[b_OR.shape[0], a_RI.shape[1]]}",
            hint="name the base that the adapter was trained on",
        )
    values_OI = tensor.to_float32()
    values_OI += low_rank_product(b_OR, a_RI) * np.float32(update.scale)
    if update.magnitude_O is not None:
        # DoRA: the direction is W + scale · B·A, each row's norm is trained (Liu et al. 2024, equation 5)
        norms_O = np.sqrt((values_OI.astype(np.float64) ** 2).sum(1)).astype(np.float32)
        values_OI *= (update.magnitude_O.to_float32() / norms_O)[:, None]
    with np.errstate(over="ignore"):
        merged = from_float32(values_OI, tensor.dtype)
    if not np.isfinite(merged.to_float32()).all():
        raise CheckpointError(f"{name}: W + scale · B·A holds values that {tensor.dtype} can't")
    return merged


def low_rank_product(b_OR: npt.NDArray[np.float32], a_RI: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """B·A, summed rank by rank as a fused multiply-add does: the same bits on every machine.

    A BLAS orders and rounds its sums as its kernels like. A product of two fp32 is exact in fp64, so adding it
    there and rounding to fp32 is what an fma does (but for a rare double rounding).
    """
    product_OI = np.zeros((b_OR.shape[0], a_RI.shape[1]), np.float32)
    for rank in range(a_RI.shape[0]):
        exact = b_OR[:, rank, None].astype(np.float64) * a_RI[None, rank].astype(np.float64)
        product_OI = (product_OI + exact).astype(np.float32)
    return product_OI


def _replaced(name: str, tensor: Tensor, trained: Tensor) -> Tensor:
    if trained.shape != tensor.shape:
        raise CheckpointError(
            f"{name}: {list(tensor.shape)} in the base, {list(trained.shape)} in the adapter",
            hint="name the base that the adapter was trained on",
        )
    return from_float32(trained.to_float32(), tensor.dtype)


def _set_rows(name: str, tensor: Tensor, places: dict[int, int], rows_KD: Tensor) -> Tensor:
    fits = bool(places) and min(places) >= 0 and max(places) < tensor.shape[0]
    if not fits or rows_KD.shape != (len(places), tensor.shape[1]):
        raise CheckpointError(
            f"{name}: {list(tensor.shape)} in the base, the adapter's {len(places)} rows are {list(rows_KD.shape)}"
        )
    array = np.array(tensor.array)
    trained = from_float32(rows_KD.to_float32(), tensor.dtype).array
    for row, place in places.items():
        array[row] = trained[place]
    return Tensor(tensor.dtype, array)


def _write_weights(base: Checkpoint, changes: _Changes, folder: Path, tied: bool, report: Report) -> None:
    """The base's files with the changed tensors in their places; a .bin base becomes one safetensors file."""
    # transformers 4 reads an untied T5's encoder.embed_tokens from shared; a copy in the file must follow
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if copy in base and "shared.weight" in changes.rows:
            changes.rows[copy] = changes.rows["shared.weight"]
    if tied and "lm_head.weight" in base and "shared.weight" in changes.rows:
        changes.rows["lm_head.weight"] = changes.rows["shared.weight"]
    if not base.files:
        tensors = {name: base.tensor(name) for name in base.names()}
        changed = {name: changes.apply(name, tensors[name]) for name in changes.names()}
        write_safetensors(folder / "model.safetensors", tensors | changed, {"format": "pt"})
        return
    report(Started(TASK, total_bytes(file.path for file in base.files), "bytes"))
    done = 0
    for file in base.files:
        with open(file.path, "rb") as source, open(folder / file.path.name, "wb", buffering=0) as target:
            for written in _merge_file(file, changes, source, target):
                done += written
                report(Advanced(TASK, done))
    report(Finished(TASK))
    if base.index is not None:
        shutil.copyfile(base.index, folder / base.index.name)


def _merge_file(file: SafetensorsFile, changes: _Changes, source: IO[bytes], target: IO[bytes]) -> Iterator[int]:
    position = 0
    names = sorted(changes.names() & file.entries.keys(), key=lambda name: file.entries[name].begin)
    for name in names:
        entry = file.entries[name]
        yield from copy_range(source, target, position, entry.begin)
        data = memoryview(changes.apply(name, file.tensor(name)).tobytes())
        while data:
            data = data[target.write(data) :]
        position = entry.end
        yield entry.end - entry.begin
    yield from copy_range(source, target, position, file.path.stat().st_size)


def _verify(settings: MergeSettings, base_folder: Path, merged: Path, report: Report) -> float:
    """The largest difference of logits between base + adapter and the merged checkpoint, on a few examples.

    Raises:
        TrainingError: it is above the tolerance, for the base's dtype.
    """
    import torch

    from t5tune.data.tokenizer import load_tokenizer
    from t5tune.model.device import choose_device
    from t5tune.model.load import load_base
    from t5tune.model.lora import load_adapter

    device = choose_device(use_cpu=True)
    batch = _examples(load_tokenizer(merged), read_config(merged).get("decoder_start_token_id", 0), settings.adapter)
    logits = []
    with torch.inference_mode():
        for folder, adapter in ((base_folder, settings.adapter), (merged, None)):
            model = load_base(folder, torch.float32, device)
            if adapter is not None:
                model = load_adapter(model, adapter)
            logits.append([model(**inputs, use_cache=False).logits for inputs in batch])
            del model
    error = max(float((a - b).abs().max()) for a, b in zip(*logits, strict=True))
    largest = max(float(a.abs().max()) for a in logits[0])
    # a bf16 base rounds the merged weights, which moves logits by about 2⁻⁸ of their size
    rounding = 0.0 if _is_fp32(base_folder) else 0.05
    allowed = max(settings.verify_tolerance, rounding) * max(largest, 1.0)
    if not error <= allowed:
        raise TrainingError(
            f"the merged model's logits differ by {error:.3g} from base + adapter's (allowed {allowed:.3g}); "
            "nothing was written",
            hint="is this the base that the adapter was trained on?",
        )
    report(Note(f"verified on {len(batch)} examples: logits differ by at most {error:.3g} of {largest:.3g}"))
    return error


def _is_fp32(folder: Path) -> bool:
    base = Checkpoint(folder)
    return base.tensor("shared.weight").dtype == "F32"


def _examples(tokenizer: "Tokenizer", start: int, adapter: Path) -> list[dict[str, Any]]:
    """Real examples of the run's cache where it still stands, else a few sentences."""
    import torch

    from t5tune.data.cache import is_cache, open_cache

    pairs: list[tuple[list[int], list[int]]] = []
    if is_cache(adapter / "data"):
        cache = open_cache(adapter / "data")
        pairs = [
            (e.source_S.tolist(), e.target_T.tolist()) for e in (cache[i] for i in range(min(NUM_VERIFIED, len(cache))))
        ]
    else:
        texts = [
            "Summarize: the meeting was moved\nto Friday.",
            "Hello, how are you?",
            '{"a": 1}',
            "1 + 1 = 2",
        ]
        ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        pairs = list(zip(ids, ids, strict=True))
    return [
        {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
        for source, target in pairs
    ]
