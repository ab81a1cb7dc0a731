"""Bases that ZeRO-3 partitions while they are loaded: two ranks, compared with loading the whole base."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t5tune.checkpoints.safetensors import build_header
from tests.support.bases import make_base
from tests.support.two_ranks import read_lines, start_two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 4, "num_heads": 16, "vocab_size": 8000}

# A rank that isn't rank 0 gets a base of the same shapes whose values are all zeros: nothing may come from it.
CODE = """
import json, os
from pathlib import Path
import torch
from safetensors import safe_open
from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.families import EMBEDDING_COPIES, EMBEDDING_WEIGHT
from t5tune.model.device import return_freed_memory
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.settings import TrainSettings

cpu, dtype, rank = torch.device("cpu"), torch.float32, int(os.environ["RANK"])
tied, untied, zeros, large = map(Path, {paths})
torch.distributed.init_process_group("gloo")
import_deepspeed(on_cpu=True).init_distributed(verbose=False)
partitioner = Zero3Partitioner({{"zero_optimization": {{"stage": 3}}}}, dtype)
variants = {{
    "lora": {{}},
    "dora": {{"use_dora": True}},
    "pissa": {{"init_lora_weights": "pissa"}},
    "olora": {{"init_lora_weights": "olora"}},
    "modules_to_save": {{"modules_to_save": ["final_layer_norm", "relative_attention_bias"]}},
    "nf4": {{"q_lora": True}},
    "nf4, dora": {{"q_lora": True, "use_dora": True}},
    "loftq": {{"q_lora": True, "init_lora_weights": "loftq"}},
}}
problems = []

def same(first, second):
    first, second = first.detach().contiguous(), second.detach().contiguous()
    return first.shape == second.shape and torch.equal(first.view(torch.uint8), second.view(torch.uint8))

def build(base, settings, partitioner):
    torch.manual_seed(5)
    model = load_base(base, dtype, cpu, settings, partitioner=partitioner)
    model, subtracted = add_lora(model, base, settings, [1500, 1501, 1507], dtype, partitioner)
    if partitioner is not None:
        partitioner.partition_model(model)
    return model, subtracted, torch.rand(1)

for name, options in variants.items():
    settings = TrainSettings(
        model_name_or_path="base", data_path=["-"], output_dir=Path("run"), **{{"bf16": False, **options}}
    )
    whole, subtracted, number = build(untied, settings, None)
    found, found_subtracted, found_number = build(zeros if rank else untied, settings, partitioner)
    if number != found_number:
        problems.append(f"{{name}}: other random numbers follow")
    if rank == 0 and subtracted.keys() != found_subtracted.keys():
        problems.append(f"{{name}}: other matrices are subtracted")
    expected = dict(whole.named_parameters())
    for key, parameter in found.named_parameters():
        other = expected.pop(key)
        if not hasattr(parameter, "ds_id") or parameter.numel() or parameter.requires_grad != other.requires_grad:
            problems.append(f"{{name}}: {{key}}: isn't partitioned as it should be")
        with partitioner.gather([parameter]):
            if not same(parameter, other):
                problems.append(f"{{name}}: {{key}}: differs")
        if (state := getattr(other, "quant_state", None)) is not None and not (
            same(state.absmax, parameter.quant_state.absmax)
            and same(state.state2.absmax, parameter.quant_state.state2.absmax)
        ):
            problems.append(f"{{name}}: {{key}}: its scales differ")
    problems += [f"{{name}}: {{key}}: is missing" for key in expected]

for base in (tied, untied):
    model = load_base(base if rank == 0 or base == tied else zeros, dtype, cpu, partitioner=partitioner)
    with safe_open(base / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for key, parameter in model.named_parameters(remove_duplicate=False):
            name = key if key in names else EMBEDDING_WEIGHT
            with partitioner.gather([parameter]):
                if not same(parameter, file.get_tensor(name)):
                    problems.append(f"{{base.name}}: {{key}} isn't {{name}} of the file")

def read_memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{{name}}:")[1].split()[0])

return_freed_memory()
before = read_memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
model = load_base(large, torch.bfloat16, cpu, partitioner=partitioner)
increase = read_memory("VmHWM") - before
whole = sum(2 * parameter.ds_numel for parameter in model.parameters())
largest = max(2 * parameter.ds_numel for parameter in model.parameters())
print(json.dumps({{"problems": problems, "increase": increase, "whole": whole, "largest": largest}}))
"""


def write_sparse_base(folder: Path, config: dict[str, Any], names: dict[str, tuple[int, ...]]) -> Path:
    """Write a base of zeros in bf16, whose bytes take no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(build_header({name: ("BF16", shape) for name, shape in names.items()}))
        file.truncate(file.tell() + sum(2 * int(np.prod(shape)) for shape in names.values()))
    return folder


def make_large_base(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**LARGE, decoder_start_token_id=0, tie_word_embeddings=True)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    return write_sparse_base(
        folder, config.to_dict(), {name: tuple(value.shape) for name, value in model.named_parameters()}
    )


def make_zero_base(folder: Path, base: Path) -> Path:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    zeros = {name: torch.zeros_like(value) for name, value in load_file(base / "model.safetensors").items()}
    # the head differs from the embedding, so that by its own files this rank takes it for untied, too
    save_file(zeros | {"lm_head.weight": torch.ones_like(zeros["lm_head.weight"])}, folder / "model.safetensors")
    return folder


def test_each_rank_gets_its_partition_of_what_rank_0_reads_and_needs_memory_for_one_tensor_more(tmp_path: Path) -> None:
    tied, untied = make_base(tmp_path / "tied", tied=True), make_base(tmp_path / "untied", tied=False)
    zeros, large = make_zero_base(tmp_path / "zeros", untied), make_large_base(tmp_path / "large")
    paths = [str(path) for path in (tied, untied, zeros, large)]
    ranks = start_two_ranks(CODE.format(paths=paths), tmp_path)
    for rank in ranks:
        assert rank.wait() == 0, rank.log.read_text()[-2000:]
        found = json.loads(read_lines(rank)[-1])
        assert found["problems"] == []
        # modules and other small things take 10 to 20 MB
        assert found["increase"] <= found["whole"] / 2 + found["largest"] + (24 << 20) < found["whole"]
