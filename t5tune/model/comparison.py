"""Does a merged checkpoint answer as base + adapters do? Logits on a few real examples, in fp32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t5tune.data.cache import is_cache, open_cache
from t5tune.data.tokenizer import load_tokenizer
from t5tune.model.device import choose_device
from t5tune.model.load import load_base
from t5tune.model.lora import load_adapter, load_sum
from t5tune.weights.base import read_config

NUM_EXAMPLES = 4
SENTENCES = ["Summarize: the meeting was moved\nto Friday.", "Hello, how are you?", '{"a": 1}', "1 + 1 = 2"]


@dataclass(frozen=True)
class Difference:
    """Of two models' logits: the largest, and the largest logit itself."""

    examples: int
    error: float
    largest: float


def compare(base: Path, adapters: list[Path], weights: list[float], merged: Path) -> Difference:
    """Run both models, one after the other, on examples of the adapter's cache where it still stands."""
    inputs = _examples(merged, adapters[0])
    expected = _logits(_with_adapters(base, adapters, weights), inputs)
    logits = _logits(_plain(merged), inputs)
    pairs = zip(expected, logits, strict=True)
    return Difference(
        len(inputs), max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a in expected)
    )


def _plain(folder: Path) -> Any:
    return load_base(folder, torch.float32, choose_device(use_cpu=True))


def _with_adapters(base: Path, adapters: list[Path], weights: list[float]) -> Any:
    model = _plain(base)
    if len(adapters) == 1 and weights == [1.0]:
        return load_adapter(model, adapters[0])
    return load_sum(model, adapters, weights)


def _logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(**example, use_cache=False).logits for example in inputs]


def _examples(merged: Path, adapter: Path) -> list[dict[str, torch.Tensor]]:
    """Real examples of the run's cache where it still stands, else a few sentences."""
    start = read_config(merged).get("decoder_start_token_id", 0)
    if is_cache(adapter / "data"):
        cache = open_cache(adapter / "data")
        examples = (cache[number] for number in range(min(NUM_EXAMPLES, len(cache))))
        pairs = [(example.source_S.tolist(), example.target_T.tolist()) for example in examples]
    else:
        tokenizer = load_tokenizer(merged)
        ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in SENTENCES]
        pairs = list(zip(ids, ids, strict=True))
    return [
        {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
        for source, target in pairs
    ]
