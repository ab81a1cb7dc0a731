"""Verify a merged checkpoint: compare its logits on a few examples with the logits of base + adapters, in fp32."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.data.caches.prepared import open_examples
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import DataError, TrainingError
from t5tune.file_names import RUN_CACHE_FOLDER
from t5tune.formatting import format_count
from t5tune.inference.loading import load_adapter, load_weighted_sum
from t5tune.inference.precision import find_quantization_problem
from t5tune.merging.deltas import Adapter
from t5tune.merging.trained_base import UNQUANTIZED, TrainedBase
from t5tune.model.device import choose_device
from t5tune.model.load import load_base
from t5tune.progress import Note, Report
from t5tune.settings.groups.base import QuantizationSettings

NUM_EXAMPLES = 4
ROUNDING_TOLERANCE = 0.05  # share of the logits; about the effect of rounding weights to 8 (bf16) or 11 (fp16) bits
FALLBACK_TEXTS = ["Summarize: the meeting was moved\nto Friday.", "Hello, how are you?", '{"a": 1}', "1 + 1 = 2"]


@dataclass(frozen=True)
class LogitsDifference:
    """Comparison of two models' logits on some examples.

    Args:
        error: largest absolute difference.
        largest: largest absolute logit.
        from_training: value of `onto` -> largest difference from the logits of the quantized training model.
    """

    examples: int
    error: float
    largest: float
    from_training: dict[str, float]


def verify_merge(
    base: Checkpoint,
    adapters: list[Adapter],
    trained: TrainedBase,
    onto: str,
    merged: Path,
    tolerance: float,
    report: Report,
    task: LabelTask | None = None,
) -> LogitsDifference:
    """Compare the logits of base + adapters and the merged checkpoint, or raise TrainingError if they differ.

    Args:
        onto: see `choose_onto`.
        tolerance: allowed difference, relative to the largest logit; rounded weights get at least ROUNDING_TOLERANCE.
        task: the labels whose logits are compared; None: of target tokens.
    """
    problem = find_quantization_problem() if trained.quantization is not None else None
    if problem is not None:  # then `onto` is the unquantized base
        report(Note(f"not compared with the model as trained: {problem}"))
        trained = replace(trained, quantization=None)
    found = _compare_logits(base.folder, adapters, merged, trained, onto, report, task)
    written = open_base(merged, task=task)
    dtypes = {written.get_dtype_and_shape(name)[0] for name in base.list_names()}
    is_exact = dtypes <= {"F32", "F64"} and onto == UNQUANTIZED
    allowed = max(tolerance, 0.0 if is_exact else ROUNDING_TOLERANCE) * max(found.largest, 1.0)
    if not found.error <= allowed:
        rounded = "" if is_exact else "; if it is, rounding did this: try --dtype float32, or raise --verify-tolerance"
        raise TrainingError(
            f"the logits of the merged model and of base + adapter differ by {found.error:.3g} "
            f"(allowed {allowed:.3g}); nothing was written",
            hint=f"check that this is the base that the adapter was trained on{rounded}",
        )
    summary = f"logits differ by at most {found.error:.3g} of {found.largest:.3g} ({allowed:.3g} is allowed)"
    report(Note(f"verified on {format_count(found.examples, 'example')}: {summary}"))
    if trained.quantization is not None:
        parts = (
            f"{error:.3g} if merged into {'the base' if onto == UNQUANTIZED else onto}"
            for onto, error in found.from_training.items()
        )
        found_in = f"largest logit difference from the model as trained ({trained.quantization.quant_type} base)"
        report(Note(f"{found_in}: {', '.join(parts)}"))
    return found


def _compare_logits(
    base: Path,
    adapters: list[Adapter],
    merged: Path,
    trained: TrainedBase,
    onto: str,
    report: Report,
    task: LabelTask | None,
) -> LogitsDifference:
    # one model at a time, to save memory
    examples = read_example_ids(merged, adapters[0].folder)
    inputs = [{"input_ids": torch.tensor([source])} for source, _ in examples]
    if task is None:
        start = open_base(merged).architecture.start_token_id
        for each, (_, target) in zip(inputs, examples, strict=True):
            each["decoder_input_ids"] = torch.tensor([[start, *target[:-1]]])
    on_cpu, load = choose_device(use_cpu=True), partial(load_base, report=report, task=task)

    def compute_with_adapters(dtype: torch.dtype, quantization: QuantizationSettings | None) -> list[torch.Tensor]:
        model = load(base, dtype, on_cpu, quantization, trained.family)
        return _compute_logits(_add_adapters(model, adapters), inputs)

    logits = _compute_logits(load(merged, torch.float32, on_cpu), inputs)
    models = {UNQUANTIZED: compute_with_adapters(torch.float32, None)}
    from_training = {}
    if (quantization := trained.quantization) is not None:
        in_training = compute_with_adapters(getattr(torch, trained.compute), quantization)
        models[quantization.quant_type] = in_training
        from_training[UNQUANTIZED] = find_max_difference(models[UNQUANTIZED], in_training)
        # if onto is the base, a merge into the quantized weights is computed for comparison
        dequantized = logits if onto != UNQUANTIZED else compute_with_adapters(torch.float32, quantization)
        from_training[quantization.quant_type] = find_max_difference(dequantized, in_training)
    expected = models[onto]
    return LogitsDifference(
        examples=len(inputs),
        error=find_max_difference(expected, logits),
        largest=max(float(a.abs().max()) for a in expected),
        from_training=from_training,
    )


def _add_adapters(model: Any, adapters: list[Adapter]) -> Any:
    if len(adapters) == 1 and adapters[0].weight == 1:
        return load_adapter(model, adapters[0].folder)
    return load_weighted_sum(model, [adapter.folder for adapter in adapters], [adapter.weight for adapter in adapters])


def find_max_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Find the largest absolute difference; NaN if any is NaN (Python's max may drop NaN)."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max())


def _compute_logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        outputs = [model(**example, use_cache=False) for example in inputs]
        return [output if isinstance(output, torch.Tensor) else output.logits.float() for output in outputs]


def read_example_ids(merged: Path, adapter: Path, count: int = NUM_EXAMPLES) -> list[tuple[list[int], list[int]]]:
    """Read the (source, target) ids of a few examples of the run's token cache, or of fixed texts without a cache."""
    with suppress(DataError):  # the run has no data, or its token caches have moved
        trained_on = open_examples(adapter / RUN_CACHE_FOLDER)
        examples = (trained_on[number] for number in range(min(count, len(trained_on))))
        return [(example.source_S.tolist(), example.target_T.tolist()) for example in examples]
    tokenizer = load_tokenizer(merged)
    ids = [tokenizer.special_ids.surround_source(tokenizer.encode(text)) for text in FALLBACK_TEXTS]
    return list(zip(ids, ids, strict=True))
