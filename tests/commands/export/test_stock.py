"""Bit-exact export of the outputs of stock Trainer, stock PEFT and FastChat's script."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration, Trainer, TrainingArguments

from t5tune.errors import CheckpointError, SettingsError
from t5tune.progress import Note
from tests.support.models.exports import assert_same, list_files, read_adapter_tensors, run_export

pytestmark = pytest.mark.slow


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
    notes: list[Note] = []
    result = run_export(folder, tmp_path / "adapter", notes)
    assert_same(
        read_adapter_tensors(tmp_path / "adapter"), get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    assert (result.step, result.zero_stage) == (2, None)
    assert any("checkpoint-2" in note.text and "it isn't verified" in note.text for note in notes)
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
    notes: list[Note] = []
    run_export(folder, tmp_path / "adapter", notes, model_name_or_path=str(base))
    assert_same(
        read_adapter_tensors(tmp_path / "adapter"), get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    assert any("rank 4 and the modules q v" in note.text for note in notes)
    assert any("lora_alpha 16 is FastChat's default" in note.text for note in notes)
    assert torch.equal(logits(loaded(base, tmp_path / "adapter")), logits(model))
    if form == "whole model":
        run_export(folder, tmp_path / "full", non_lora_state="full")
        state = load_file(tmp_path / "full" / "non_lora_state.safetensors")
        assert_same(state, load_file(base / "model.safetensors"))


def test_an_old_outputs_lora_alpha_comes_from_the_flag(untied_base: Path, tmp_path: Path) -> None:
    model = adapted(untied_base, alpha=5, rank=3)
    (tmp_path / "old").mkdir()
    torch.save(get_peft_model_state_dict(model), tmp_path / "old" / "adapter_model.bin")
    notes: list[Note] = []
    flags = {"lora_r": 3, "lora_alpha": 5, "lora_target_modules": ["v", "q"], "model_name_or_path": str(untied_base)}
    run_export(tmp_path / "old", tmp_path / "adapter", notes, **flags)
    assert not any("lora_alpha" in note.text for note in notes)
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
    notes: list[Note] = []
    run_export(folder, tmp_path / "adapter", notes, model_name_or_path=str(base))
    assert any("recomputed the embedding rows of FastChat's tokens 1500 to 1509" in note.text for note in notes)
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
    assert any("give --model-name-or-path to recompute them" in note.text for note in notes)


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
