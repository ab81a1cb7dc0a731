"""Bit-exact export of the checkpoints of stock PEFT with DeepSpeed's engine."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.errors import CheckpointError
from t5tune.progress import Note
from tests.support.models.exports import assert_same, list_files, read_adapter_tensors, run_export
from tests.support.processes.forks import ForkServer
from tests.support.ranks.deepspeed_saves import CASES, EXTRA_PARAMETER, STEPS

pytestmark = pytest.mark.slow

# the cases that DeepSpeed gathers, too
GATHERED = [name for name, case in CASES.items() if case[0] and name != "zero1-bf16-optimizer"]
UNIVERSAL = [name for name in CASES if name not in {"zero0", "zero2-fp16", "zero3"}]


@pytest.fixture(scope="module")
def saves(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, tied_base: Path, untied_base: Path
) -> Path:
    """Checkpoints that two ranks of DeepSpeed's engine saved: one folder per case."""
    out = tmp_path_factory.mktemp("deepspeed")
    paths = ", ".join(repr(str(path)) for path in (tied_base, untied_base, out))
    done = fork_server.run(["--version"], 2, [f"tests.support.ranks.deepspeed_saves:save_all({paths})"])
    assert done.codes == [0, 0], done.log[-3000:]
    return out


def saved(saves: Path, name: str) -> Path:
    done = json.loads((saves / "done.json").read_text())
    if name not in done["done"]:
        pytest.skip(f"DeepSpeed can't do this here: {done['skipped'][name]}")
    return saves / name


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_each_stage_gives_the_fp32_weights_of_the_running_engine(saves: Path, name: str, tmp_path: Path) -> None:
    folder = saved(saves, name)
    result = run_export(folder, tmp_path / "adapter")
    assert_same(read_adapter_tensors(tmp_path / "adapter"), load_file(folder / "masters.safetensors"))
    assert (result.zero_stage, result.world_size, result.step) == (CASES[name][0], 2, STEPS)
    assert all(
        value.abs().max() > 1e-3 for key, value in read_adapter_tensors(tmp_path / "adapter").items() if "lora_B" in key
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", GATHERED)
def test_each_stage_gives_the_weights_that_deepspeed_gathers(
    saves: Path, name: str, tmp_path: Path, capsys: Any
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = saved(saves, name)
    gathered = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    run_export(folder / f"global_step{STEPS}", tmp_path / "adapter")
    theirs = {key.replace(".default", ""): value.clone() for key, value in gathered.items() if ".lora_" in key}
    assert_same(read_adapter_tensors(tmp_path / "adapter"), theirs)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero1", "zero2-bf16-frozen", "zero3-bf16-frozen", "zero0"])
def test_frozen_weights_are_gathered_from_shards_without_the_base(
    saves: Path, name: str, tied_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(saves, name), tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    run_export(folder, tmp_path / "adapter", non_lora_state="full")
    base = load_file((tied_base if CASES[name][1] else untied_base) / "model.safetensors")
    for key, value in load_file(folder / "extra.safetensors").items():
        base[key.removeprefix("base_model.model.")] = value
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    state = load_file(tmp_path / "adapter" / "non_lora_state.safetensors")
    assert_same(state, {key: value.to(dtype) for key, value in base.items()})


@pytest.mark.distributed
@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_checkpoint_gives_the_same_weights(saves: Path, name: str, tmp_path: Path, capsys: Any) -> None:
    from deepspeed.checkpoint import ds_to_universal

    folder, root = saved(saves, name), tmp_path / "root"
    root.mkdir()
    shutil.copy(folder / "adapter_config.json", root)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(folder / f"global_step{STEPS}"), "output_folder": str(root / "universal")}
    ds_to_universal.main(argparse.Namespace(**options, **paths, inject_missing_state=True))
    result = run_export(root, tmp_path / "adapter")
    assert_same(read_adapter_tensors(tmp_path / "adapter"), load_file(folder / "masters.safetensors"))
    assert (result.zero_stage, result.world_size, result.step) == (CASES[name][0], 2, STEPS)


@pytest.mark.distributed
def test_the_shards_are_preferred_to_trainers_rounded_copy(saves: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved(saves, "zero2-bf16-frozen"), tmp_path / "x")
    masters = load_file(folder / "masters.safetensors")
    rounded = {name: value.bfloat16() for name, value in masters.items()}
    assert any(not torch.equal(rounded[name].float(), value) for name, value in masters.items())
    save_file(rounded, folder / "adapter_model.safetensors")
    run_export(folder, tmp_path / "adapter")
    assert_same(read_adapter_tensors(tmp_path / "adapter"), masters)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype_rounds_to_nearest_as_torch_does(saves: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = saved(saves, "zero3")
    run_export(folder, tmp_path / "adapter", dtype=name, format="bin")
    expected = {key: value.to(dtype) for key, value in load_file(folder / "masters.safetensors").items()}
    assert_same(read_adapter_tensors(tmp_path / "adapter"), expected)
    assert_same(torch.load(tmp_path / "adapter" / "adapter_model.bin", weights_only=True), expected)


@pytest.mark.distributed
def test_a_damaged_shard_without_a_manifest_is_refused(saves: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved(saves, "zero3"), tmp_path / "x")
    shard = next(folder.glob("global_step*/*rank_1_*_optim_states.pt"))
    values = next(iter(load_file(folder / "masters.safetensors").values()))
    data = bytearray(shard.read_bytes())
    half = values.flatten()[(values.numel() + 1) // 2 :][:4].numpy().tobytes()  # rank 1's first values
    assert (place := bytes(data).find(half)) > 0
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: data/\d+: differs from what was written"):
        run_export(folder, tmp_path / "adapter")
    assert list_files(tmp_path) == ["x"]


@pytest.mark.distributed
def test_tensors_trained_besides_the_adapter_are_saved_and_reported(saves: Path, tmp_path: Path) -> None:
    folder = saved(saves, "zero1")
    notes: list[Note] = []
    run_export(folder, tmp_path / "adapter", notes)
    extra = load_file(folder / "extra.safetensors")
    assert list(extra) == [EXTRA_PARAMETER]
    state = load_file(tmp_path / "adapter" / "non_lora_state.safetensors")
    assert_same(state, {name.removeprefix("base_model.model."): value for name, value in extra.items()})
    fate = "saved to non_lora_state.safetensors, which PEFT doesn't load"
    assert f"tensors trained in addition to the adapter: 1 (first: {EXTRA_PARAMETER}); {fate}" in [
        note.text for note in notes
    ]
    run_export(folder, tmp_path / "alone", notes, non_lora_state="none")
    assert list_files(tmp_path / "alone") == [n for n in list_files(tmp_path / "adapter") if "non_lora" not in n]
    assert any(note.text.endswith("; left out by non_lora_state: none") for note in notes)
