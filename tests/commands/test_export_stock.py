"""Bit-exact export of checkpoints of stock PEFT with DeepSpeed's engine, stock Trainer and FastChat's script."""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration, Trainer, TrainingArguments

from t5tune.checkpoints.adapter_shapes import check_adapter_shapes
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.commands.export import ExportResult, export
from t5tune.errors import CheckpointError, SettingsError
from t5tune.progress import Note
from t5tune.settings import ExportSettings
from tests.support.models.exports import assert_same, list_files, read_adapter_tensors
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


def run_export(checkpoint: Path, output: Path, notes: list[str] | None = None, **changes: Any) -> ExportResult:
    settings = ExportSettings(checkpoint=checkpoint, output_dir=output, **changes)
    kept = [] if notes is None else notes
    return export(settings, lambda event: kept.append(event.text) if isinstance(event, Note) else None)


# DeepSpeed's checkpoints


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
    notes: list[str] = []
    run_export(folder, tmp_path / "adapter", notes)
    extra = load_file(folder / "extra.safetensors")
    assert list(extra) == [EXTRA_PARAMETER]
    state = load_file(tmp_path / "adapter" / "non_lora_state.safetensors")
    assert_same(state, {name.removeprefix("base_model.model."): value for name, value in extra.items()})
    fate = "saved to non_lora_state.safetensors, which PEFT doesn't load"
    assert f"tensors trained in addition to the adapter: 1 (first: {EXTRA_PARAMETER}); {fate}" in notes
    run_export(folder, tmp_path / "alone", notes, non_lora_state="none")
    assert list_files(tmp_path / "alone") == [n for n in list_files(tmp_path / "adapter") if "non_lora" not in n]
    assert any(note.endswith("; left out by non_lora_state: none") for note in notes)


# stock Trainer and stock PEFT


def adapted(base: Path, alpha: float = 16, rank: int = 4) -> Any:
    torch.manual_seed(11)
    model = T5ForConditionalGeneration.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits


def loaded(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained(base), adapter).eval()


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory: pytest.TempPathFactory, untied_base: Path) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("trainer") / "run"
    ids = list(range(3, 12))
    rows: Any = [{"input_ids": ids, "labels": ids[:4]} for _ in range(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, log_level="error"
    )
    model = adapted(untied_base)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return folder, model.eval()


def test_a_run_of_stock_trainer_exports_its_newest_checkpoint(
    trainer_run: tuple[Path, Any], untied_base: Path, tmp_path: Path
) -> None:
    folder, model = trainer_run
    notes: list[str] = []
    result = run_export(folder, tmp_path / "adapter", notes)
    assert_same(
        read_adapter_tensors(tmp_path / "adapter"), get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    assert (result.step, result.zero_stage) == (2, None)
    assert any("checkpoint-2" in note and "it isn't verified" in note for note in notes)
    assert torch.equal(logits(loaded(untied_base, tmp_path / "adapter")), logits(model))
    assert run_export(folder / "checkpoint-1", tmp_path / "first").step == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["bin", "names of the model", "wrapped", "without prefix", "whole model", "sharded"])
def test_an_old_output_without_config_gives_the_models_logits(
    tied: bool, form: str, tied_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    base = tied_base if tied else untied_base
    model = adapted(base)
    folder = tmp_path / "old"
    folder.mkdir()
    named = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
    plain = {name.replace(".default", ""): value for name, value in named.items()}
    if form == "bin":
        torch.save(plain, folder / "adapter_model.bin")
    elif form == "names of the model":  # FastChat's get_peft_state_maybe_zero_3
        save_file({name: value.clone() for name, value in named.items()}, folder / "adapter_model.safetensors")
    elif form == "wrapped":
        torch.save({f"module.{name}": value for name, value in named.items()}, folder / "pytorch_model.bin")
    elif form == "without prefix":
        torch.save(
            {name.removeprefix("base_model.model."): v for name, v in plain.items()}, folder / "adapter_model.bin"
        )
    elif form == "whole model":  # ZeRO-3: _zero3_consolidated_16bit_state_dict
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        halves = [dict(list(named.items())[i::2]) for i in range(2)]
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            torch.save(half, folder / name)
        index = {name: file for file, half in zip(names, halves, strict=True) for name in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    notes: list[str] = []
    run_export(folder, tmp_path / "adapter", notes, model_name_or_path=str(base))
    assert_same(
        read_adapter_tensors(tmp_path / "adapter"), get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    assert any("rank 4 and the modules q v" in note for note in notes)
    assert any("lora_alpha 16 is FastChat's default" in note for note in notes)
    assert torch.equal(logits(loaded(base, tmp_path / "adapter")), logits(model))
    if form == "whole model":
        run_export(folder, tmp_path / "full", non_lora_state="full")
        state = load_file(tmp_path / "full" / "non_lora_state.safetensors")
        assert_same(state, load_file(base / "model.safetensors"))


def test_an_old_outputs_lora_alpha_comes_from_the_flag(untied_base: Path, tmp_path: Path) -> None:
    model = adapted(untied_base, alpha=5, rank=3)
    (tmp_path / "old").mkdir()
    torch.save(get_peft_model_state_dict(model), tmp_path / "old" / "adapter_model.bin")
    notes: list[str] = []
    flags = {"lora_r": 3, "lora_alpha": 5, "lora_target_modules": ["v", "q"], "model_name_or_path": str(untied_base)}
    run_export(tmp_path / "old", tmp_path / "adapter", notes, **flags)
    assert not any("lora_alpha" in note for note in notes)
    assert torch.equal(logits(loaded(untied_base, tmp_path / "adapter")), logits(model))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_of_fastchats_tokens_are_recomputed_from_the_base(
    tied: bool, tied_base: Path, untied_base: Path, tmp_path: Path
) -> None:
    """FastChat runs smart_tokenizer_and_embedding_resize, then LoRA, and saves only the LoRA matrices."""
    base, first, count = tied_base if tied else untied_base, 1500, 10
    model = T5ForConditionalGeneration.from_pretrained(base)
    model.config.tie_word_embeddings = tied
    model.resize_token_embeddings(first + count, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[first:] = embedding.weight[:first].mean(0, keepdim=True)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({n: v for n, v in model.named_parameters() if "lora_" in n}, folder / "pytorch_model.bin")
    tokens = ["[PAD]", "<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
    (folder / "added_tokens.json").write_text(json.dumps({text: first + i for i, text in enumerate(tokens)}))
    (folder / "tokenizer_config.json").write_text("{}")
    notes: list[str] = []
    run_export(folder, tmp_path / "adapter", notes, model_name_or_path=str(base))
    assert any("recomputed the embedding rows of FastChat's tokens 1500 to 1509" in note for note in notes)
    rows = {n: v for n, v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "token_adap" in n}
    assert len(rows) == (1 if tied else 3)
    for name, value in rows.items():  # torch's mean, bit by bit
        embedding = model.get_output_embeddings() if "lm_head" in name else model.get_input_embeddings()
        assert torch.equal(value, embedding.weight[first:]), name
    ids = torch.tensor([[5, first + 3, 9, first, 12, first + 9]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
        found = loaded(base, tmp_path / "adapter")(input_ids=ids, decoder_input_ids=ids).logits[..., : first + count]
        run_export(folder, tmp_path / "bare", notes)
        bare = loaded(base, tmp_path / "bare")(input_ids=ids, decoder_input_ids=ids).logits[..., : first + count]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (bare - expected).abs().max() > 1e-2 * expected.abs().max()
    assert any("give --model-name-or-path to recompute them" in note for note in notes)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("lora_r", 8, "lora_r: 8, but .*old has 4"),
        ("lora_target_modules", ["q"], "lora_target_modules: q, but .*old has q v"),
    ],
)
def test_a_flag_that_contradicts_the_old_output_is_refused(
    untied_base: Path, tmp_path: Path, flag: str, value: Any, expected: str
) -> None:
    (tmp_path / "old").mkdir()
    torch.save(get_peft_model_state_dict(adapted(untied_base)), tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(SettingsError, match=expected):
        run_export(tmp_path / "old", tmp_path / "adapter", **{flag: value})
    assert list_files(tmp_path) == ["old"]


def test_a_flag_that_contradicts_adapter_config_is_refused(trainer_run: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"lora_alpha: 32\.0, but .*adapter_config\.json has 16"):
        run_export(trainer_run[0], tmp_path / "adapter", lora_alpha=32)


def test_an_adapter_saved_ungathered_under_zero3_is_refused(untied_base: Path, tmp_path: Path) -> None:
    state = get_peft_model_state_dict(adapted(untied_base))
    (tmp_path / "old").mkdir()
    torch.save({name: value[:0, :0].clone() for name, value in state.items()}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="expected a matrix") as caught:
        run_export(tmp_path / "old", tmp_path / "adapter")
    assert "ZeRO-3" in (caught.value.hint or "")


# shapes


def copy_with_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["q", "k"]}, r"\.v\.lora_A\.weight: module is adapted, but .* says target_modules q k"),
        ({"target_modules": ["q", "v", "k"]}, r"\.k: has no LoRA matrices"),
        ({"r": 8}, "rank 4, but .* says r 8"),
        ({"trainable_token_indices": [1, 2]}, "has no trained token rows, but adapter_config.json lists some"),
    ],
)
def test_an_adapter_that_contradicts_its_config_is_refused(
    trainer_run: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    folder = copy_with_config(trainer_run[0] / "checkpoint-2", tmp_path / "x", **changes)
    with pytest.raises(CheckpointError, match=expected):
        run_export(folder, tmp_path / "adapter")
    assert list_files(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"d_model": 64}, r"the base's weight is \[32, 64\], B·A is \[32, 32\]"),
        ({"num_layers": 1, "num_decoder_layers": 1}, "adapts decoder.block.1.* which doesn't exist in the base"),
        ({"num_layers": 3, "num_decoder_layers": 3}, "encoder.block.2.*has no LoRA matrices"),
        ({"d_kv": "x"}, "d_kv: x: expected a positive integer"),
    ],
)
def test_a_different_bases_adapter_is_refused_by_config_json(
    trainer_run: tuple[Path, Any], untied_base: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((untied_base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=expected):
        run_export(trainer_run[0], tmp_path / "adapter", model_name_or_path=str(other))
    assert list_files(tmp_path) == ["other"]


Q = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
NORM = "base_model.model.decoder.final_layer_norm.weight"
TOKENS = "base_model.model.shared.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def all_kinds(untied_base: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter with every kind of tensor that stock PEFT can save, and its config."""
    base = T5ForConditionalGeneration.from_pretrained(untied_base)
    config = LoraConfig(
        r=4,
        target_modules=["q", "v"],
        use_dora=True,
        modules_to_save=["final_layer_norm"],
        trainable_token_indices={"shared": [3, 5]},
        rank_pattern={"encoder.block.1.layer.0.SelfAttention.v": 2},
    )
    state = get_peft_model_state_dict(get_peft_model(base, config), save_embedding_layers=False)
    return {name: Tensor("F32", value.detach().numpy()) for name, value in state.items()}, config.to_dict()


def test_an_adapter_with_all_kinds_of_tensors_fits_its_base(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]], untied_base: Path, tmp_path: Path
) -> None:
    state, config = all_kinds
    assert {NORM, TOKENS, f"{Q}.lora_magnitude_vector"} < state.keys()
    check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        (Q.replace("q", "v").replace("block.0", "block.1") + ".lora_A.weight", slice(1), "rank 1, but .* says r 2"),
        (f"{Q}.lora_A.weight", (slice(None), slice(31)), r"the base's weight is \[32, 32\], B·A is \[32, 31\]"),
        (f"{Q}.lora_magnitude_vector", slice(31), r"shape \[31\]; expected \[32\] for this base"),
        (NORM, slice(31), r"shape \[31\]; expected \[32\] for this base"),
        (TOKENS, (slice(None), slice(31)), r"shape \[2, 31\]; expected \[2, 32\] for this base"),
        (TOKENS, slice(1), r"\[1, 32\], but .* lists \[2\] trained rows"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_its_name(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]],
    untied_base: Path,
    tmp_path: Path,
    name: str,
    cut: Any,
    expected: str,
) -> None:
    state, config = all_kinds
    state = {**state, name: Tensor("F32", state[name].array[cut])}
    with pytest.raises(CheckpointError, match=expected):
        check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)


def test_a_weight_that_t5_lacks_is_refused(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]], untied_base: Path, tmp_path: Path
) -> None:
    state, config = all_kinds
    state = {**state, "base_model.model.pooler.weight": state[NORM]}
    with pytest.raises(CheckpointError, match=r"pooler.weight: shape \[32\]; the base has no such weight"):
        check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)


# memory


def peak_of_export(folder: Path, output: Path, *flags: str) -> int:
    """Return the peak memory (MiB) of a process that exports on the command line."""
    code = (
        "import sys; from t5tune.cli import run\n"
        "assert run(['export', sys.argv[1], '--output-dir', *sys.argv[2:], '--quiet']) == 0\n"
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)"
    )
    command = [sys.executable, "-c", code, str(folder), str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def make_sparse_checkpoint(folder: Path, **config: int) -> int:
    """Make a checkpoint of any size whose frozen weights are holes in sparse files. Return the adapter's bytes."""
    path = Path(__file__).parents[2] / "benchmarks" / "export.py"
    spec = importlib.util.spec_from_file_location("export_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(benchmark)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **config}))
    return int(benchmark.make_checkpoint(folder, file))


def test_exporting_an_11b_adapter_needs_memory_only_for_it(tmp_path: Path) -> None:
    """The checkpoint has 22 GB of frozen weights, which aren't read."""
    shape = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
    size = make_sparse_checkpoint(tmp_path / "xxl", **shape)
    assert sum(path.stat().st_size for path in (tmp_path / "xxl").rglob("*.pt")) > 22e9
    peak = peak_of_export(tmp_path / "xxl", tmp_path / "adapter")
    assert size > 37e6
    assert peak <= 150


def test_the_full_state_is_streamed(tmp_path: Path) -> None:
    shape = {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 1024, "num_layers": 1, "vocab_size": 150_000}
    make_sparse_checkpoint(tmp_path / "wide", **shape)
    peak = peak_of_export(tmp_path / "wide", tmp_path / "adapter", "--non-lora-state", "full")
    assert (tmp_path / "adapter" / "non_lora_state.safetensors").stat().st_size > 600e6
    assert peak <= 150
