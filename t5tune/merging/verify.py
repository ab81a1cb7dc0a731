"""Does a merged checkpoint answer as base + adapters do? Logits on a few real examples, in fp32."""

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
from t5tune.model.lora import load_adapter, load_sum
from t5tune.progress import Report, silent
from t5tune.settings.quantization import QuantisationSettings

NUM_EXAMPLES = 4
SENTENCES = ["Summarize: the meeting was moved\nto Friday.", "Hello, how are you?", '{"a": 1}', "1 + 1 = 2"]


@dataclass(frozen=True)
class TrainedOn:
    """What q_lora made of the base in training: nf4, fp4 or int8, computing in `compute`."""

    kind: str
    double_quant: bool
    compute: torch.dtype


@dataclass(frozen=True)
class Difference:
    """Of two models' logits: the largest, and the largest logit itself.

    `from_training` tells by what the adapter is folded into how far logits are from those of the quantised model.
    """

    examples: int
    error: float
    largest: float
    from_training: dict[str, float]


def compare(
    base: Path,
    adapters: list[Path],
    weights: list[float],
    merged: Path,
    trained_on: TrainedOn | None = None,
    onto: str = "base",
    family: str | None = None,
    report: Report = silent,
) -> Difference:
    """Run the models, one after the other, on examples of the adapter's cache where it still stands.

    The merged one is held against base + adapters, or, folded onto a quantised base, against that one with adapters.
    `family` is the base's, where its model_type isn't known.
    """
    load = partial(_load, report)
    inputs = _inputs(merged, adapters[0])
    logits = _logits(load(merged, torch.float32, None, None), inputs)
    models = {"base": _logits(_with_adapters(load(base, torch.float32, None, family), adapters, weights), inputs)}
    from_training = {}
    if trained_on is not None:
        training = _logits(
            _with_adapters(load(base, trained_on.compute, trained_on, family), adapters, weights), inputs
        )
        models[trained_on.kind] = training
        from_training["base"] = _largest_difference(models["base"], training)
        if onto == "base":  # nobody wrote the other fold: it computes with the restored weights in fp32
            restored = _with_adapters(load(base, torch.float32, trained_on, family), adapters, weights)
            from_training[trained_on.kind] = _largest_difference(_logits(restored, inputs), training)
        else:
            from_training[onto] = _largest_difference(logits, training)
    expected = models[onto]
    return Difference(
        examples=len(inputs),
        error=_largest_difference(expected, logits),
        largest=max(float(a.abs().max()) for a in expected),
        from_training=from_training,
    )


def _load(report: Report, folder: Path, dtype: torch.dtype, trained_on: TrainedOn | None, family: str | None) -> Any:
    quantisation = None
    if trained_on is not None:
        quantisation = QuantisationSettings(
            q_lora=True, quant_type=cast(Any, trained_on.kind), double_quant=trained_on.double_quant
        )
    return load_base(folder, dtype, choose_device(use_cpu=True), quantisation, family, report)


def _with_adapters(model: Any, adapters: list[Path], weights: list[float]) -> Any:
    if len(adapters) == 1 and weights == [1.0]:
        return load_adapter(model, adapters[0])
    return load_sum(model, adapters, weights)


def _largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def _logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(**example, use_cache=False).logits.float() for example in inputs]


def example_ids(merged: Path, adapter: Path) -> list[tuple[list[int], list[int]]]:
    """(source, target) of real examples of the run's cache where it still stands, else of a few sentences."""
    if is_cache(adapter / "data"):
        cache = open_cache(adapter / "data")
        examples = (cache[number] for number in range(min(NUM_EXAMPLES, len(cache))))
        return [(example.source_S.tolist(), example.target_T.tolist()) for example in examples]
    tokenizer = load_tokenizer(merged)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in SENTENCES]
    return list(zip(ids, ids, strict=True))


def _inputs(merged: Path, adapter: Path) -> list[dict[str, torch.Tensor]]:
    start = read_config(merged).get("decoder_start_token_id", 0)
    return [
        {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
        for source, target in example_ids(merged, adapter)
    ]
