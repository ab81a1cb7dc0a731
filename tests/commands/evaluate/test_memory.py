"""The memory that losses and predictions take."""

import gc
import json
import math
import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t5tune.commands.prepare import prepare
from t5tune.evaluation import scoring as evaluation
from t5tune.evaluation.scoring import measure_losses
from t5tune.inference.loading import load_for_inference
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import PackedCollator
from t5tune.runs.checkpoints import verify
from t5tune.settings import EvaluateSettings, PrepareSettings
from t5tune.training.attention_choice import set_up_evaluation
from tests.commands.evaluate.outputs import EVALUATED, get_metrics, read_predictions, run_evaluate
from tests.support.caches import open_only
from tests.support.processes.command_line import CommandResult


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that are created in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        values = result if isinstance(result, tuple | list) else [result]
        self.seen |= {tuple(value.shape) for value in values if isinstance(value, torch.Tensor)}
        return result


@pytest.mark.slow
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_losses_never_need_all_logits_or_an_embedding_copy(
    with_adapter: bool, run: Path, untied_base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = run if with_adapter else None
    loaded = load_for_inference(
        EvaluateSettings(model_name_or_path=str(untied_base), adapter=adapter, data_path="none", use_cpu=True)
    )
    use_packing(loaded.model)
    examples = open_only(cache)
    vocabulary, width = loaded.model.get_input_embeddings().weight.shape
    monkeypatch.setattr("t5tune.model.loss.LOGITS_PER_CHUNK", 64 * vocabulary)
    collator = PackedCollator(loaded.model.config.decoder_start_token_id, 0)
    with Shapes() as shapes:
        measure_losses(loaded.model, examples, collator, 16)
    rows = {math.prod(shape[:-1]) for shape in shapes.seen if shape[-1:] == (vocabulary,)}
    assert max(rows) == 64 < sum(len(example.target_T) for example in examples)
    assert (vocabulary, width) not in shapes.seen


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"choices": ["yes", "no"]}], ids=["replies", "choices"])
@pytest.mark.variants("choices")
def test_long_sources_are_never_in_memory_all_together(
    changes: dict[str, Any], untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_up(*arguments: Any) -> Any:
        tracemalloc.reset_peak()  # loading has a higher peak than what follows
        return set_up_evaluation(*arguments)

    monkeypatch.setattr("t5tune.commands.evaluate.texts.set_up_evaluation", set_up)
    data, lines = tmp_path / "long.jsonl", [{"source": f"{n} is" + " one" * 900, "target": "yes"} for n in range(96)]
    data.write_text("\n".join(map(json.dumps, lines)))
    values = {"model_name_or_path": str(untied_base), "data_path": str(data), "add_tokens": ["none"]}
    prepare(PrepareSettings(**values, output_dir=tmp_path / "cache"))
    peaks = []
    run = partial(run_evaluate, untied_base, tmp_path / "cache", tmp_path / "out", max_new_tokens=4, overwrite=True)
    run(num_data=1, **changes)  # imports modules, which takes three times as long while memory is traced
    for count in (16, 96):
        gc.collect()
        tracemalloc.start()
        run(num_data=count, **changes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    source_S = open_only(tmp_path / "cache")[0].source_S
    assert peaks[1] - peaks[0] < 80 * source_S.nbytes


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.variants("3")
def test_generation_keeps_its_key_value_cache_within_the_budget(
    num_beams: int, untied_base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = run_evaluate(untied_base, cache, tmp_path / "wide", num_beams=num_beams)
    generate, budget = evaluation.generate, 4000
    batches: list[tuple[int, int]] = []

    def generate_and_record(model: Any, sources: list[list[int]], *arguments: Any, **options: Any) -> list[list[int]]:
        batches.append((len(sources), max(map(len, sources))))
        return generate(model, sources, *arguments, **options)

    monkeypatch.setattr(evaluation, "generate", generate_and_record)
    monkeypatch.setattr(evaluation, "MAX_TOKENS_PER_BATCH", budget)
    monkeypatch.setattr(evaluation, "MIN_GENERATION_BYTES", 0)
    narrow = run_evaluate(untied_base, cache, tmp_path / "narrow", num_beams=num_beams)
    assert 1 < max(count for count, _ in batches) < 32
    # two decoder layers with four heads of width 8, in fp32; the encoder's bias with and without its mask; logits
    key_value = 2 * 2 * 32 * 4

    def needed(source: int) -> int:
        return num_beams * (source + 12) * key_value + 2 * 4 * source**2 * 4 + num_beams * 1536 * 4 * 4

    assert all(count == 1 or count * needed(source) <= budget * key_value for count, source in batches)
    assert any((count + 1) * needed(source) > budget * key_value for count, source in batches)
    assert [line["prediction"] for line in read_predictions(narrow)] == [
        line["prediction"] for line in read_predictions(wide)
    ]
    assert get_metrics(narrow) == pytest.approx(get_metrics(wide), rel=1e-5)


@pytest.mark.long
@pytest.mark.distributed
def test_two_ranks_halve_the_batch_if_memory_runs_out(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    common = (
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--eval-data-path", conversations,
        "--learning-rate", "0", "--max-steps", "1", "--eval-generate", "12", "--per-device-eval-batch-size", "4",
        "--report-samples", "0", "--use-cpu", "--json",
    )  # fmt: skip
    roomy = on_ranks(2, *common, "--output-dir", tmp_path / "roomy")
    narrow = on_ranks(
        2, *common, "--output-dir", tmp_path / "narrow", calls=["tests.support.ranks.faults:limit_memory(2)"]
    )
    assert roomy.code == narrow.code == 0, narrow.stderr
    for what in ("losses", "predictions"):
        halved = rf"evaluate: {what}: out of memory on rank \d with 4 examples of up to .*; continuing with 2 at a time"
        assert re.search(halved, narrow.stderr), narrow.stderr
    for name in EVALUATED:
        assert narrow.json["eval"][name] == pytest.approx(roomy.json["eval"][name], rel=1e-5), name
    none = on_ranks(2, *common, "--output-dir", tmp_path / "none", calls=["tests.support.ranks.faults:limit_memory(0)"])
    assert none.code == 1
    assert "out of memory: evaluate: losses: one example of" in none.errors[0]
    assert verify(tmp_path / "none" / "checkpoint-1") is None
