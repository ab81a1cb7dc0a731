"""Bases that ZeRO-3 partitions while they are loaded: two ranks, compared with loading the whole base."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.checkpoints.tensor_files.safetensors import build_header
from t5tune.model import zero3
from t5tune.settings import TrainSettings
from tests.support.models.bases import make_base
from tests.support.processes.runs import read_lines, start_two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 4, "num_heads": 16, "vocab_size": 8000}

IMPORTS = """
from pathlib import PosixPath
from tests.support.ranks.partitioned_bases import describe, describe_errors
from tests.support.ranks.partitioned_steps import describe_peak, describe_steps
"""


def make_large_base(folder: Path) -> Path:
    """Write a base of zeros in bf16, whose bytes take no room on the disk."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**LARGE, decoder_start_token_id=0, tie_word_embeddings=True)
    with torch.device("meta"):
        parameters = dict(T5ForConditionalGeneration(config).named_parameters())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(build_header({name: ("BF16", tuple(value.shape)) for name, value in parameters.items()}))
        file.truncate(file.tell() + sum(2 * value.numel() for value in parameters.values()))
    return folder


def run_on_two_ranks(call: str, folder: Path) -> Iterator[Any]:
    """Run a call in two processes, and yield the JSON that each prints."""
    for rank in start_two_ranks(f"{IMPORTS}\n{call}", folder):
        assert rank.wait() == 0, rank.log.read_text()[-2000:]
        yield json.loads(read_lines(rank)[-1])


def save_adapter(folder: Path, base: Path, **ways: Any) -> Path:
    """Save an adapter with random values, also for embedding rows."""
    from t5tune.model.load import load_base
    from t5tune.model.lora import add_lora

    settings = TrainSettings(model_name_or_path=str(base), data_path=["-"], output_dir=Path("run"), **ways)
    model = load_base(base, torch.float32, torch.device("cpu"))
    model, _ = add_lora(model, base, settings, [1500, 1501], torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_ranks_load_their_partition_and_one_tensor_more(tmp_path: Path) -> None:
    tied, untied = make_base(tmp_path / "tied", tied=True), make_base(tmp_path / "untied", tied=False)
    large = make_large_base(tmp_path / "large")
    ways: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True, "modules_to_save": ["final_layer_norm"]}}
    adapters = [save_adapter(tmp_path / name, untied, **options) for name, options in ways.items()]
    for found in run_on_two_ranks(f"describe({tied!r}, {untied!r}, {large!r}, {adapters!r})", tmp_path):
        assert found["problems"] == []
        # modules and other small things take 10 to 20 MB
        assert found["increase"] <= found["whole"] / 2 + found["largest"] + (24 << 20) < found["whole"]


def test_every_rank_raises_an_error_that_only_rank_0_finds(tmp_path: Path) -> None:
    differing, truncated = make_base(tmp_path / "differing", tied=False), make_base(tmp_path / "truncated", tied=False)
    tensors = load_file(differing / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, differing / "model.safetensors")
    for differs, ends in run_on_two_ranks(f"describe_errors({differing!r}, {truncated!r})", tmp_path):
        assert "encoder.embed_tokens.weight: differs from shared.weight" in differs
        assert "model.safetensors: file ends before byte" in ends


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    "ways", [["lora", "nf4", "checkpointing", "labels, full"], ["lora, padded", "dora", "full", "labels"]]
)
def test_releasing_gathered_weights_keeps_the_bits_of_steps(ways: list[str], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    assert list(run_on_two_ranks(f"describe_steps({base!r}, {ways!r})", tmp_path)) == [[], []]


@pytest.mark.variants(1)
@pytest.mark.parametrize("way", ["lora", "nf4", "checkpointing"])
def test_a_step_needs_memory_for_two_blocks_and_the_embedding(way: str, tmp_path: Path) -> None:
    large = make_large_base(tmp_path / "large")
    embedding = 2 * LARGE["vocab_size"] * LARGE["d_model"]
    for found in run_on_two_ranks(f"describe_peak({way!r}, {large!r})", tmp_path):
        # gloo copies what it gathers once more; activations take few MB
        assert found["increase"] <= 2 * found["largest_block"] + 2 * embedding + (16 << 20)
        assert found["increase"] < found["blocks"] / 2 or way == "nf4"


def test_weights_are_found_after_a_second_gather() -> None:
    """With stage3_use_all_reduce_for_fetch_params, weights that are gathered together are parts of one buffer."""
    layer, values = torch.nn.Linear(3, 2, bias=False), torch.randn(2, 3)
    layer.weight.ds_id, layer.weight.ds_status = 0, SimpleNamespace(name="AVAILABLE")

    def gather(start: int) -> None:
        buffer = torch.full((20,), torch.nan)
        layer.weight.data = buffer[start : start + 6].view(2, 3).copy_(values)

    gather(start=5)
    zero3._release_gathered_weights(layer)
    hidden = torch.randn(4, 3, requires_grad=True)
    output = layer(hidden)
    gather(start=11)
    output.sum().backward()
    assert torch.equal(hidden.grad, torch.ones(4, 2) @ values)


def test_large_weights_are_gathered_alone_in_order() -> None:
    waited: list[list[int]] = []

    def gather(group: list[Any], quantize: bool) -> SimpleNamespace:
        assert not quantize
        numbers = [each.ds_id for each in group]
        return SimpleNamespace(wait=lambda **_: waited.append(numbers))

    sizes = {4: 1000, 2: 4 << 20, 3: 10, 1: (4 << 20) - 1, 0: 8 << 20}
    parameters = [SimpleNamespace(ds_id=key, ds_numel=size, element_size=lambda: 2) for key, size in sizes.items()]
    zero3._gather_large_weights_alone(gather, parameters, quantize=False).wait()
    assert waited == [[0], [1, 3, 4], [2]]
