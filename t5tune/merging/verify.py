"""Verify a merged checkpoint: compare its logits with those of base + adapters on a few examples, in fp32."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from t5tune.checkpoints.base import read_config
from t5tune.data.cache import is_cache, open_cache
from t5tune.data.tokenizer import load_tokenizer
from t5tune.model.device import choose_device
from t5tune.model.load import load_base
from t5tune.model.lora import load_adapter, load_weighted_sum
from t5tune.progress import Report, silent
from t5tune.settings.quantization import QuantizationSettings

NUM_EXAMPLES = 4
FALLBACK_TEXTS = ["Summarize: the meeting was moved\nto Friday.", "Hello, how are you?", '{"a": 1}', "1 + 1 = 2"]


@dataclass(frozen=True)
class TrainingQuantization:
    """How q_lora quantized the base in training: to nf4, fp4 or int8 (`kind`), computing in `compute`."""

    kind: str
    double_quant: bool
    compute: torch.dtype
    quantize_wo: bool


@dataclass(frozen=True)
class LogitsDifference:
    """Comparison of two models' logits on some examples.

    Args:
        examples: number of examples.
        error: largest absolute difference.
        largest: largest absolute logit.
        from_training: largest difference from the quantized training model's logits, by the kind of base weights that
            the adapter is merged into.
    """

    examples: int
    error: float
    largest: float
    from_training: dict[str, float]


def compare_logits(
    base: Path,
    adapters: list[Path],
    weights: list[float],
    merged: Path,
    training: TrainingQuantization | None = None,
    onto: str = "base",
    family: str | None = None,
    report: Report = silent,
) -> LogitsDifference:
    """Run the models one after the other on the same examples (see `read_example_ids`), and compare their logits.

    Args:
        training: quantization of the base in training; None if it wasn't quantized.
        onto: what the adapters were merged into: base, or a kind of quantized base. The merged model is compared with
            the adapters on this base.
        family: model family of the base, if its model_type isn't known.
    """
    load = partial(_load_model, report)
    inputs = _make_inputs(merged, adapters[0])
    logits = _compute_logits(load(merged, torch.float32, None, None), inputs)
    models = {
        "base": _compute_logits(_add_adapters(load(base, torch.float32, None, family), adapters, weights), inputs)
    }
    from_training = {}
    if training is not None:
        training_logits = _compute_logits(
            _add_adapters(load(base, training.compute, training, family), adapters, weights), inputs
        )
        models[training.kind] = training_logits
        from_training["base"] = _find_max_difference(models["base"], training_logits)
        if onto == "base":  # a merge into the quantized weights wasn't written: compute it in fp32
            dequantized = _add_adapters(load(base, torch.float32, training, family), adapters, weights)
            from_training[training.kind] = _find_max_difference(_compute_logits(dequantized, inputs), training_logits)
        else:
            from_training[onto] = _find_max_difference(logits, training_logits)
    expected = models[onto]
    return LogitsDifference(
        examples=len(inputs),
        error=_find_max_difference(expected, logits),
        largest=max(float(a.abs().max()) for a in expected),
        from_training=from_training,
    )


def _load_model(
    report: Report, folder: Path, dtype: torch.dtype, training: TrainingQuantization | None, family: str | None
) -> Any:
    quantization = None
    if training is not None:
        quantization = QuantizationSettings(
            q_lora=True,
            quant_type=cast(Any, training.kind),
            double_quant=training.double_quant,
            quantize_wo=training.quantize_wo,
        )
    return load_base(folder, dtype, choose_device(use_cpu=True), quantization, family, report)


def _add_adapters(model: Any, adapters: list[Path], weights: list[float]) -> Any:
    if len(adapters) == 1 and weights == [1.0]:
        return load_adapter(model, adapters[0])
    return load_weighted_sum(model, adapters, weights)


def _find_max_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    # torch's max is NaN if any value is; Python's would drop a NaN that isn't the first
    return float(torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max())


def _compute_logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(**example, use_cache=False).logits.float() for example in inputs]


def read_example_ids(merged: Path, adapter: Path) -> list[tuple[list[int], list[int]]]:
    """Read (source, target) ids of examples in the run's token cache if it still exists, else of a few fixed texts."""
    if is_cache(adapter / "data"):
        cache = open_cache(adapter / "data")
        examples = (cache[number] for number in range(min(NUM_EXAMPLES, len(cache))))
        return [(example.source_S.tolist(), example.target_T.tolist()) for example in examples]
    tokenizer = load_tokenizer(merged)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in FALLBACK_TEXTS]
    return list(zip(ids, ids, strict=True))


def _make_inputs(merged: Path, adapter: Path) -> list[dict[str, torch.Tensor]]:
    start = read_config(merged).get("decoder_start_token_id", 0)
    return [
        {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
        for source, target in read_example_ids(merged, adapter)
    ]
