"""Each model type from a file of data to replies of a merged checkpoint, in all combinations; `make families` runs it.

prepare, two ranks under ZeRO-3 that are stopped and resume, export, merge and chat, compared with one process, with
stock PEFT and with stock transformers. A row added to the table of families is picked up by itself.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from t5tune.data.tokens.tokenizer import decode_prediction, load_tokenizer
from t5tune.families import FAMILIES
from t5tune.inference.loading import load_adapter
from t5tune.model.load import load_base
from t5tune.runs.checkpoints import list_checkpoints
from t5tune.settings import QuantizationSettings
from tests.support.caches import open_only
from tests.support.models.model_types import (
    TEXTS,
    compute_logits,
    load_stock,
    make_checkpoint,
    read_tensors,
    write_pairs,
)
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.processes.runs import LONG, read_adapter
from tests.support.train_runs import read_steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    # PEFT's merge says this of every untied model
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.skipif(not LONG, reason="ten minutes; LONG_TESTS=1 (make families) runs all combinations"),
]

KINDS = {**{key: (key, {}) for key in FAMILIES}, "longt5-local": ("longt5", {"encoder_attention_type": "local"})}
METHODS = {"lora": (), "q_lora": ("--q-lora",)}
CPU = torch.device("cpu")
STEPS, STOPPED, NEW_TOKENS = 4, 3, 10


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    key, changes = KINDS[request.param]
    return make_checkpoint(key, tmp_path_factory.mktemp("base") / request.param, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "data.jsonl")


def run(*arguments: Any) -> None:
    done = t5tune_in_fork(*arguments)
    assert done.code == 0, done.stderr


def make_flags(base: Path, cache: Path, output: Path, batch_size: int, *more: str) -> tuple[Any, ...]:
    return (
        *("train", "--model-name-or-path", base, "--data-path", cache, "--output-dir", output, "--use-cpu"),
        *("--no-bf16", "--max-steps", STEPS, "--learning-rate", 3e-2, "--lora-dropout", 0, "--logging-steps", 1),
        *("--lora-target-modules", "all-linear", "--per-device-train-batch-size", batch_size, "--max-grad-norm", 100),
        *("--report-samples", 0, *more),
    )


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_chain(
    method: str, packing: str, base: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    cache, adapter, merged = (tmp_path / name for name in ("cache", "adapter", "merged"))
    run("prepare", "--model-name-or-path", base, "--data-path", data, "--output-dir", cache)
    flags = (*METHODS[method], "--packing", packing)
    run(*make_flags(base, cache, tmp_path / "alone", 6, *flags))
    stop = f"tests.support.ranks.faults:stop_in_step({STOPPED})"
    for name, calls in (("ranks", ()), ("resumed", (stop,)), ("resumed", ())):
        arguments = make_flags(base, cache, tmp_path / name, 3, "--deepspeed", "zero3", *flags)
        done = on_ranks(2, *arguments, calls=calls)
        assert done.code == (143 if calls else 0), done.stderr
    alone, ranks, resumed = (tmp_path / name for name in ("alone", "ranks", "resumed"))
    for found, expected in zip(read_steps(ranks), read_steps(alone), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert read_adapter(resumed) == read_adapter(ranks)

    run("export", list_checkpoints(ranks)[-1], "--output-dir", adapter)
    gathered, saved = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, ranks))
    assert gathered.keys() == saved.keys()
    assert all(saved[name].equal(tensor) for name, tensor in gathered.items())
    run("merge", adapter, "--output-dir", merged, "--onto", "nf4" if method == "q_lora" else "base", "--verify")
    check_weights(base, adapter, merged, cache, is_quantized=method == "q_lora")
    check_replies(merged, data)


def check_weights(base: Path, adapter: Path, merged: Path, cache: Path, is_quantized: bool) -> None:
    """Compare the adapted and the merged model with stock PEFT and stock transformers."""
    ours = load_adapter(load_base(base, torch.float32, CPU), adapter)
    stock = PeftModel.from_pretrained(load_stock(base), adapter)
    logits = compute_logits(ours, cache)
    torch.testing.assert_close(compute_logits(stock, cache), logits, rtol=1e-4, atol=1e-4)
    assert (logits - compute_logits(load_base(base, torch.float32, CPU), cache)).abs().max() > 1e-2  # it learned

    layers = {name.rpartition(".lora_A")[0] for name in ours.state_dict() if ".lora_A." in name}
    adapted = {f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}
    before, after = read_tensors(base), read_tensors(merged)
    changed = {ours.architecture.to_model_name(name) for name in after if not after[name].equal(before[name])}
    assert after.keys() == before.keys()
    assert adapted <= changed
    with_rows = changed - adapted
    assert with_rows <= {ours.architecture.tied_to, ours.architecture.head_weight}
    assert bool(with_rows) == bool(open_only(cache).manifest["added_tokens"])
    found = load_stock(merged)
    if is_quantized:
        quantized = load_base(base, torch.float32, CPU, QuantizationSettings(q_lora=True))
        expected = compute_logits(load_adapter(quantized, adapter), cache)
        torch.testing.assert_close(compute_logits(found, cache), expected, rtol=1e-3, atol=1e-3)
        return
    expected_state = stock.merge_and_unload().state_dict()
    state = found.state_dict()
    assert state.keys() == expected_state.keys()
    assert [name for name in state if not state[name].equal(expected_state[name])] == []


def check_replies(merged: Path, data: Path) -> None:
    """Compare chat and evaluate with transformers' generate."""
    scores = merged.with_name("scores")
    run("evaluate", merged, "--data-path", data, "--output-dir", scores, "--use-cpu", "--max-new-tokens", NEW_TOKENS)
    predictions = [json.loads(line)["prediction"] for line in (scores / "predictions.jsonl").read_text().splitlines()]
    tokenizer, stock = load_tokenizer(merged), load_stock(merged)
    cache = merged.with_name("cache-of-merged")
    run("prepare", "--model-name-or-path", merged, "--data-path", data, "--output-dir", cache)
    for number, (example, prediction) in enumerate(zip(open_only(cache), predictions, strict=True)):
        source = torch.from_numpy(example.source_S.astype("int64"))[None]
        ids = stock.generate(source, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()[1:]
        assert decode_prediction(tokenizer, ids, "").strip() == prediction.strip()
        if number == 0:
            asked = ("chat", "--model-name-or-path", merged, "--prompt", TEXTS[0][0], "--max-new-tokens", NEW_TOKENS)
            done = t5tune_in_fork(*asked, "--use-cpu")
            assert (done.code, done.stdout.strip()) == (0, prediction.strip())
