"""Adapters exported from the shards of real training processes, compared with DeepSpeed's own gathering."""

import builtins
import functools
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from tests.commands.export.runs import STEPS, check_full_state, check_refusal, flip_last_byte, train_run
from tests.support.models.adapters import make_stock_adapter
from tests.support.models.exports import assert_same, list_files, read_adapter_tensors, run_export
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

pytestmark = pytest.mark.slow

ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Kind:
    """How a run was trained."""

    stage: int
    ranks: int
    tied: bool
    flags: tuple[str, ...] = ()


KINDS = {
    "zero1x2": Kind(1, 2, tied=False),
    "zero2x2-bf16": Kind(2, 2, tied=True, flags=("--bf16",)),
    "zero3x2": Kind(3, 2, tied=False),
    "zero3x4": Kind(3, 4, tied=True),
}


@pytest.fixture(scope="module")
def run_of(
    tmp_path_factory: pytest.TempPathFactory,
    conversations: Path,
    tied_base: Path,
    untied_base: Path,
    on_ranks: Callable[..., CommandResult],
) -> Callable[[str], Path]:
    """Return a function that trains each kind of run once, when a test first needs it."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(name: str) -> Path:
        kind = KINDS[name]
        base = tied_base if kind.tied else untied_base
        flags = ("--deepspeed", f"zero{kind.stage}", *kind.flags)
        return train_run(on_ranks, kind.ranks, base, conversations, root / name, *flags)

    return train


@pytest.fixture(
    params=["zero3x2", *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "zero3x2")]
)
def sharded(request: pytest.FixtureRequest, run_of: Callable[[str], Path]) -> tuple[Kind, Path]:
    return KINDS[request.param], run_of(request.param) / f"checkpoint-{STEPS}"


@pytest.fixture
def zero3(run_of: Callable[[str], Path]) -> Path:
    return run_of("zero3x2") / f"checkpoint-{STEPS}"


def copy_without_manifest(checkpoint: Path, folder: Path) -> Path:
    """Copy what DeepSpeed alone might have written, and the adapter's config: no manifest and no adapter weights."""
    shutil.copytree(checkpoint, folder)
    (folder / "t5tune_manifest.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def optimizer_shard(folder: Path, rank: int) -> Path:
    return next(folder.glob(f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


# correct weights


@pytest.mark.distributed
@pytest.mark.variants("zero3x2", "zero1x2")
def test_shards_give_the_fp32_weights_that_training_gathered(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, checkpoint = sharded
    live = read_adapter_tensors(checkpoint)
    run_export(copy_without_manifest(checkpoint, tmp_path / "bare"), tmp_path / "bare-adapter")
    result = run_export(checkpoint, tmp_path / "adapter")
    assert all(value.dtype == torch.float32 for value in live.values())
    assert_same(read_adapter_tensors(tmp_path / "bare-adapter"), live)
    assert_same(read_adapter_tensors(tmp_path / "adapter"), live)
    assert (result.zero_stage, result.world_size, result.step) == (kind.stage, kind.ranks, STEPS)
    assert result.lora_tensors == sum(".lora_" in name for name in live)
    assert result.non_lora_tensors == len(live) - result.lora_tensors > 0


@pytest.mark.distributed
def test_shards_give_the_weights_that_deepspeed_gathers_from_them(
    sharded: tuple[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    kind, checkpoint = sharded
    run_export(checkpoint, tmp_path / "adapter")
    exported = read_adapter_tensors(tmp_path / "adapter")
    gathered = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    theirs = {name.replace(".default", ""): value.clone() for name, value in gathered.items()}
    rows = {name: value for name, value in theirs.items() if name.endswith(f"embed_tokens.{ROWS}")}
    if kind.tied:  # DeepSpeed repeats the embedding's rows under each of their shared names
        rows[f"lm_head.{ROWS}"] = theirs.pop(f"base_model.model.lm_head.{ROWS}")
        assert all(torch.equal(value, exported[f"base_model.model.shared.{ROWS}"]) for value in rows.values())
        theirs = {name: value for name, value in theirs.items() if name not in rows}
    else:
        theirs.setdefault(f"base_model.model.decoder.embed_tokens.{ROWS}", next(iter(rows.values())))
    assert_same(exported, theirs)


@pytest.mark.distributed
def test_the_trained_weights_differ_from_their_initialization(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    """Otherwise, the two tests above would also pass on zeros."""
    _, checkpoint = sharded
    state = read_adapter_tensors(checkpoint)
    assert all(value.abs().max() > 1e-3 for name, value in state.items() if "lora_B" in name)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.distributed
def test_stock_peft_loads_the_export(
    sharded: tuple[Kind, Path], tied_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    kind, checkpoint = sharded
    run_export(checkpoint, tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(tied_base if kind.tied else untied_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    exported = read_adapter_tensors(tmp_path / "adapter")
    for name, value in exported.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.distributed
def test_export_writes_all_adapter_files_with_reproducible_bytes(zero3: Path, tmp_path: Path) -> None:
    result = run_export(zero3, tmp_path / "a")
    run_export(zero3, tmp_path / "b")
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "non_lora_state.safetensors",
        "template.yaml",
        "training_data.json",
    }
    names |= {"tokenizer.json", "tokenizer_config.json", "README.md", "settings.yaml"}
    assert set(list_files(tmp_path / "a")) == names
    for name in names - {"settings.yaml"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json", "template.yaml", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (zero3 / name).read_bytes(), name
    assert result.adapter == tmp_path / "a"
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert list_files(tmp_path) == ["a", "b"]


@pytest.mark.distributed
def test_naming_the_folder_with_the_shards_gives_the_same_export(zero3: Path, tmp_path: Path) -> None:
    run_export(zero3, tmp_path / "a")
    run_export(zero3 / f"global_step{STEPS}", tmp_path / "b")
    assert_same(read_adapter_tensors(tmp_path / "b"), read_adapter_tensors(tmp_path / "a"))
    assert list_files(tmp_path / "b") == list_files(tmp_path / "a")


@pytest.mark.distributed
def test_the_shard_folder_is_checked_against_its_parents_manifest(zero3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zero3, tmp_path / "verified")
    shard = optimizer_shard(folder, 0)
    change_shard(shard, lambda state: state["fp32_flat_groups"][0].data.view(-1)[3:4].fill_(7))
    check_refusal(shard.parent, tmp_path, rf"{shard.name}: ")


# options


@pytest.mark.distributed
def test_format_bin_adds_the_same_tensors_in_torch_format(zero3: Path, tmp_path: Path) -> None:
    run_export(zero3, tmp_path / "adapter", format="bin")
    state = torch.load(tmp_path / "adapter" / "adapter_model.bin", weights_only=True)
    assert_same(state, read_adapter_tensors(tmp_path / "adapter"))


@pytest.mark.distributed
def test_the_trained_state_is_the_token_rows(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, checkpoint = sharded
    run_export(checkpoint, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "non_lora_state.safetensors")
    rows = {f"{name}.{ROWS}" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}
    assert set(state) == ({f"shared.{ROWS}"} if kind.tied else rows)
    adapter = read_adapter_tensors(tmp_path / "adapter")
    assert_same(state, {name: adapter[f"base_model.model.{name}"] for name in state})


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero2x2-bf16", "zero3x2"])
def test_the_full_state_is_the_base_and_the_token_rows(
    run_of: Callable[[str], Path], name: str, tied_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    check_full_state(run_of(name), tied_base if KINDS[name].tied else untied_base, tmp_path)


@pytest.mark.parametrize("non_lora_state", ["trained", "full", "none"])
def test_dora_magnitudes_and_replaced_base_tensors_are_counted(
    untied_base: Path, tmp_path: Path, non_lora_state: str
) -> None:
    norms = ["encoder.final_layer_norm", "decoder.final_layer_norm"]
    adapter = make_stock_adapter(untied_base, tmp_path / "dora", use_dora=True, modules_to_save=norms)
    result = run_export(adapter, tmp_path / "adapter", non_lora_state=non_lora_state)
    exported = read_adapter_tensors(tmp_path / "adapter")
    assert_same(exported, read_adapter_tensors(adapter))
    magnitudes = [name for name in exported if name.endswith(".lora_magnitude_vector")]
    matrices = [name for name in exported if ".lora_A." in name or ".lora_B." in name]
    assert len(magnitudes) == len(matrices) / 2 > 0
    assert result.lora_tensors == len(matrices) + len(magnitudes)
    file = tmp_path / "adapter" / "non_lora_state.safetensors"
    state = load_file(file) if file.is_file() else {}
    trained = {f"{norm}.weight": exported[f"base_model.model.{norm}.weight"] for norm in norms}
    base = load_file(untied_base / "model.safetensors")
    assert_same(state, {"trained": trained, "full": base | trained, "none": {}}[non_lora_state])
    assert result.non_lora_tensors == len(state)


@pytest.mark.parametrize("module", ["layer_norm", "DenseReluDense"])  # layer_norm also matches each final_layer_norm
def test_every_module_that_peft_trains_for_a_name_is_exported(untied_base: Path, tmp_path: Path, module: str) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "stock", modules_to_save=[module])
    run_export(adapter, tmp_path / "adapter", notes := [])
    exported = read_adapter_tensors(tmp_path / "adapter")
    assert_same(exported, read_adapter_tensors(adapter))
    inside = {name for name in exported if "lora_" not in name}
    base = load_file(untied_base / "model.safetensors")
    assert inside == {f"base_model.model.{name}" for name in base if f"{module}." in name}
    assert not [note for note in notes if "the adapter file also contains" in note.text]


@pytest.mark.distributed
def test_non_lora_state_none_writes_no_such_file(zero3: Path, tmp_path: Path) -> None:
    result = run_export(zero3, tmp_path / "adapter", non_lora_state="none")
    assert "non_lora_state.safetensors" not in list_files(tmp_path / "adapter")
    assert result.non_lora_tensors == 0
    assert_same(read_adapter_tensors(tmp_path / "adapter"), read_adapter_tensors(zero3))


@pytest.mark.distributed
def test_export_needs_neither_torch_nor_deepspeed(zero3: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from t5tune.commands.export import export; from t5tune.settings import ExportSettings\n"
        "export(ExportSettings(checkpoint=sys.argv[1], output_dir=sys.argv[2], non_lora_state='full'))\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'peft', 'safetensors'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(zero3), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert_same(read_adapter_tensors(tmp_path / "adapter"), read_adapter_tensors(zero3))


@pytest.mark.distributed
def test_the_command_line_exports_and_prints_the_result(zero3: Path, tmp_path: Path) -> None:
    done = t5tune_in_fork("export", zero3, "--output-dir", tmp_path / "adapter", "--json")
    assert done.code == 0, done.stderr
    assert (done.json["zero_stage"], done.json["world_size"]) == (3, 2)
    again = t5tune_in_fork("export", zero3, "--output-dir", tmp_path / "adapter")
    assert again.code == 2
    assert "already contains files" in again.errors[0]


# refusals, which write nothing


@pytest.mark.distributed
def test_a_missing_shard_is_refused_by_its_rank(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, checkpoint = sharded
    folder = copy_without_manifest(checkpoint, tmp_path / "bare")
    optimizer_shard(folder, kind.ranks - 1).unlink()
    check_refusal(folder, tmp_path, rf"rank {kind.ranks - 1} is missing")


@pytest.mark.distributed
def test_a_missing_shard_in_the_manifest_is_refused(zero3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zero3, tmp_path / "verified")
    optimizer_shard(folder, 1).unlink()
    check_refusal(folder, tmp_path, r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: missing")


@pytest.mark.distributed
def test_a_checkpoint_without_any_optimizer_shard_is_refused(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    """The bf16 weights in the model states don't replace the fp32 weights in the shards."""
    kind, checkpoint = sharded
    folder = copy_without_manifest(checkpoint, tmp_path / "bare")
    for rank in range(kind.ranks):
        optimizer_shard(folder, rank).unlink()
    check_refusal(folder, tmp_path, "shard|optim_states")


@pytest.mark.distributed
def test_a_shard_of_another_world_size_is_refused(zero3: Path, tmp_path: Path) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    shard = optimizer_shard(folder, 1)
    shutil.copy(shard, shard.with_name(shard.name.replace("rank_1", "rank_2")))
    check_refusal(folder, tmp_path, r"shards of ranks \[0, 1, 2\], but training used 2 ranks")


@pytest.mark.distributed
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_shard_is_refused_by_its_name(zero3: Path, tmp_path: Path, kept: float) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    shard = optimizer_shard(folder, 1)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    check_refusal(folder, tmp_path, r"zero_pp_rank_1_mp_rank_00_optim_states\.pt")


@pytest.mark.distributed
def test_a_damaged_shard_in_the_manifest_is_refused(zero3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zero3, tmp_path / "verified")
    flip_last_byte(optimizer_shard(folder, 0))
    error = check_refusal(
        folder, tmp_path, r"zero_pp_rank_0_mp_rank_00_optim_states\.pt: differs from what was written"
    )
    assert "earlier checkpoint" in (error.hint or "")


def change_shard(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path, weights_only=False)
    change(state["optimizer_state_dict"])
    torch.save(state, path)


@pytest.mark.distributed
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "key"), [("zero3x2", "fp32_flat_groups"), ("zero1x2", "single_partition_of_fp32_groups")]
)
def test_nan_or_infinity_is_refused_with_the_tensors_name(
    run_of: Callable[[str], Path], tmp_path: Path, name: str, key: str, value: float
) -> None:
    folder = copy_without_manifest(run_of(name) / f"checkpoint-{STEPS}", tmp_path / "bare")
    change_shard(optimizer_shard(folder, 0), lambda state: state[key][0].data.view(-1)[3:4].fill_(value))
    check_refusal(folder, tmp_path, r"base_model\.model\.\S+: contains NaN or infinity")


@pytest.mark.distributed
def test_a_shard_shorter_than_its_parameters_is_refused(zero3: Path, tmp_path: Path) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")

    def shorten(state: dict[str, Any]) -> None:
        state["fp32_flat_groups"] = [group.view(-1)[:-8].clone() for group in state["fp32_flat_groups"]]

    change_shard(optimizer_shard(folder, 1), shorten)
    check_refusal(folder, tmp_path, "the shards are too short for this parameter")


@pytest.mark.distributed
@pytest.mark.parametrize("tag", ["../x", "..", ".", "", "/tmp", "a/b", "gone"])
def test_a_latest_file_that_names_no_folder_is_refused(zero3: Path, tmp_path: Path, tag: str) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    shutil.copytree(folder / f"global_step{STEPS}", tmp_path / "x")
    (folder / "latest").write_text(tag)
    check_refusal(folder, tmp_path, "latest")


class _Calls:
    """An object whose pickle is a function call, which an unsafe reader executes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.distributed
@pytest.mark.parametrize("file", ["optim_states", "model_states"])
def test_a_shard_that_calls_code_is_refused_unrun(zero3: Path, tmp_path: Path, file: str) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    marker = tmp_path / "marker"
    calls = [_Calls(os.system, f"touch '{marker}'"), _Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()")]
    for call in calls:
        shard = next(folder.glob(f"global_step*/*rank_0_mp_rank_00_{file}.pt"))
        with zipfile.ZipFile(shard, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"optimizer_state_dict": call}, protocol=2))
        check_refusal(folder, tmp_path, rf"{file}\.pt: its pickle refers to")
        assert not marker.exists()


@pytest.mark.distributed
def test_shards_without_the_adapters_config_are_refused(zero3: Path, tmp_path: Path) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    (folder / "adapter_config.json").unlink()
    check_refusal(folder, tmp_path, r"no adapter_config\.json")


@pytest.mark.distributed
@pytest.mark.parametrize("content", ["{", "[]", "3", "null", '"text"', '[["peft_type", "LORA"]]'])
def test_an_adapters_config_that_is_not_an_object_is_refused(zero3: Path, tmp_path: Path, content: str) -> None:
    folder = copy_without_manifest(zero3, tmp_path / "bare")
    (folder / "adapter_config.json").write_text(content)
    check_refusal(folder, tmp_path, r"adapter_config\.json")
