"""Merged checkpoints, held against plain torch, stock transformers and stock PEFT."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from t5tune.checkpoints.adapter import TrainedWith, saved_name, write_adapter
from t5tune.checkpoints.fingerprint import SAMPLE, base_facts, encoded, fingerprint, full_hash
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.commands.merge import Merged, merge
from t5tune.errors import CheckpointError, ModelError, SettingsError, TrainingError
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.progress import Note
from t5tune.settings import MergeSettings
from t5tune.settings.lora import LoraSettings
from tests.conftest import REPOSITORY, make_base

LAYOUTS = REPOSITORY / "templates" / "conversations"

PREFIX = "base_model.model."
TOKEN_IDS = [203, 210, 201]  # not in order, so that a row in a wrong place shows
SOURCE = torch.tensor([[5, 210, 17, 203, 99, 1], [201, 8, 8, 44, 1, 0]])
TARGET = torch.tensor([[0, 203, 31, 7], [0, 210, 201, 12]])
SCALE = 16 / 4


def stock_base(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def stock_with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(stock_base(base), adapter).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(
            input_ids=SOURCE, attention_mask=SOURCE.ne(0).long(), decoder_input_ids=TARGET, use_cache=False
        ).logits


def randomise(model: Any, seed: int = 11) -> None:
    """Give every trained tensor values, as training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1


def stock_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q", "v"], "lora_dropout": 0.0}
    model = get_peft_model(stock_base(base), LoraConfig(**options | changes, task_type=TaskType.SEQ_2_SEQ_LM))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def rows_adapter(base: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter with trained token rows as training writes it, and the training model's logits."""
    model = load_base(base, torch.float32, torch.device("cpu"))
    settings = LoraSettings(lora_r=4, lora_alpha=16, lora_dropout=0.0)
    peft_model, _ = add_lora(model, base, settings, TOKEN_IDS, torch.float32)
    randomise(peft_model)
    state = {
        saved_name(name): Tensor("F32", parameter.detach().numpy())
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    config = peft_model.peft_config["default"].to_dict() | {"base_model_name_or_path": str(base)}
    plain = json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else value))
    template = folder.with_name("of-the-adapter") / "template.yaml"
    template.parent.mkdir()
    shutil.copy(LAYOUTS / "plain.yaml", template)
    folder.mkdir()
    write_adapter(folder, state, TrainedWith(plain, base, template), non_lora={})
    return folder, logits_of(peft_model.eval())


def run_merge(base: Path, adapter: Path, output: Path, report: Any = None, **changes: Any) -> Merged:
    settings = MergeSettings(model_name_or_path=str(base), adapter=adapter, output_dir=output, **changes)
    return merge(settings, report) if report else merge(settings)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@dataclass(frozen=True)
class Case:
    base: Path
    adapter: Path
    output: Path
    merged: Merged
    tied: bool
    dtype: torch.dtype
    training_logits: torch.Tensor | None


CASES = [
    f"{head}-{dtype}-{kind}" for kind in ("lora", "rows") for head in ("tied", "untied") for dtype in ("fp32", "bf16")
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    head, precision, kind = request.param.split("-")
    root = tmp_path_factory.mktemp("case")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = make_base(root / "base", tied=head == "tied", dtype=dtype)
    logits = None
    if kind == "lora":
        adapter = stock_adapter(base, root / "adapter")
    else:
        adapter, logits = rows_adapter(base, root / "adapter")
    merged = run_merge(base, adapter, root / "merged")
    return Case(base, adapter, root / "merged", merged, head == "tied", dtype, logits)


@pytest.fixture(scope="module")
def untied_adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_adapter(untied_base, tmp_path_factory.mktemp("adapters") / "untied")


def expected_tensors(base: Path, adapter: Path, tied: bool, scale: float = SCALE) -> dict[str, torch.Tensor]:
    """W + scale · B·A in fp64, and the trained rows: derived from the files alone."""
    weights = load_file(base / "model.safetensors")
    trained = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {}
    for name, a_RI in trained.items():
        if name.endswith(".lora_A.weight"):
            b_OR = trained[name.replace("lora_A", "lora_B")]
            target = name.removeprefix(PREFIX).replace(".lora_A", "")
            expected[target] = weights[target].double() + scale * (b_OR.double() @ a_RI.double())
    indices = config["trainable_token_indices"]
    if indices:
        ids = indices if isinstance(indices, list) else indices["encoder.embed_tokens"]
        rows = next(value for name, value in trained.items() if "trainable_tokens_delta" in name and "head" not in name)
        expected["shared.weight"] = weights["shared.weight"].double()
        expected["shared.weight"][ids] = rows.double()
        if not tied:
            expected["lm_head.weight"] = weights["lm_head.weight"].double()
            head = trained[f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"]
            expected["lm_head.weight"][indices["lm_head"]] = head.double()
    return expected


def test_touched_tensors_are_w_plus_scaled_ba_and_the_rest_is_the_bases_bytes(case: Case) -> None:
    weights = load_file(case.base / "model.safetensors")
    merged = load_file(case.output / "model.safetensors")
    expected = expected_tensors(case.base, case.adapter, case.tied)
    assert list(merged) == list(weights)
    for name, before in weights.items():
        assert merged[name].dtype == before.dtype
        if name not in expected:
            assert torch.equal(merged[name].view(torch.uint8), before.view(torch.uint8)), name
            continue
        assert not torch.equal(merged[name], before), name
        # fp32 sums of four products can't be the fp64 sum's bits, and B·A may cancel W: one part in 2²³ of the
        # largest value, per rounding. A bf16 result may then fall to the other side of a halfway case: one unit.
        fp32_error = 8 * 2.0**-24 * float(expected[name].abs().max() + 1)
        if case.dtype == torch.float32:
            torch.testing.assert_close(merged[name].double(), expected[name], rtol=0, atol=fp32_error)
        else:
            rounded = expected[name].float().to(torch.bfloat16)
            torch.testing.assert_close(merged[name].double(), rounded.double(), rtol=2.0**-7, atol=fp32_error)
            assert (merged[name] != rounded).float().mean() < 0.01


def test_trained_rows_are_set_and_no_other_row_of_embedding_or_head_moves(case: Case) -> None:
    weights = load_file(case.base / "model.safetensors")
    merged = load_file(case.output / "model.safetensors")
    for name in ("shared.weight", "lm_head.weight"):
        if name in weights:
            moved = (weights[name] != merged[name]).any(1).nonzero().flatten().tolist()
            assert moved == (sorted(TOKEN_IDS) if case.training_logits is not None else [])


def test_stock_transformers_answers_with_the_merged_checkpoint_as_stock_peft_does(case: Case) -> None:
    expected = logits_of(stock_with_adapter(case.base, case.adapter))
    merged = logits_of(stock_base(case.output))
    plain = logits_of(stock_base(case.base))
    assert (expected - plain).abs().max() > 0.1
    # a bf16 checkpoint can hold the sum only to 8 bits
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.03 * float(expected.abs().max())
    assert (merged - expected).abs().max() < tolerance


def test_our_own_loader_answers_with_the_merged_checkpoint_as_stock_transformers_does(case: Case) -> None:
    ours = logits_of(load_base(case.output, torch.float32, torch.device("cpu")))
    torch.testing.assert_close(ours, logits_of(stock_base(case.output)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("rows")], indirect=True)
def test_stock_peft_answers_as_the_training_model_did_with_no_line_more(case: Case) -> None:
    # training multiplies the head's rows on their own, stock PEFT within the whole matrix: a BLAS may order the
    # sums of the two differently, so their last bits may differ, but nothing that a wrong row could hide in
    assert case.training_logits is not None
    stock = logits_of(stock_with_adapter(case.base, case.adapter))
    assert (case.training_logits - logits_of(stock_base(case.base))).abs().max() > 0.1
    torch.testing.assert_close(stock, case.training_logits, rtol=0, atol=1e-5)


def test_config_says_whether_the_head_is_tied(case: Case) -> None:
    config = read_config(case.output)
    assert config["tie_word_embeddings"] is case.tied
    before = read_config(case.base)
    ours = {"tie_word_embeddings", "scale_decoder_outputs"}
    assert {k: v for k, v in config.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_config_tells_the_truth_where_the_bases_does_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    config = read_config(base) | {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # transformers 5's
    (base / "config.json").write_text(json.dumps(config))
    adapter = stock_adapter(base, tmp_path / "adapter")
    run_merge(base, adapter, tmp_path / "merged")
    assert read_config(tmp_path / "merged")["tie_word_embeddings"] is False
    assert read_config(tmp_path / "merged")["scale_decoder_outputs"] is False


def test_the_result_counts_what_changed(case: Case) -> None:
    assert case.merged.adapted_tensors == 2 * (2 + 2 * 2)  # q and v of 2 encoder and 2 × 2 decoder attentions
    assert case.merged.token_rows == (0 if case.training_logits is None else len(TOKEN_IDS))
    assert case.merged.tensors == len(load_file(case.base / "model.safetensors"))
    assert case.merged.bytes == (case.output / "model.safetensors").stat().st_size
    assert case.merged.verified
    assert case.merged.max_error is not None


def test_tokenizer_and_generation_settings_come_along(case: Case) -> None:
    source = case.base  # write_adapter copied the base's own
    for name in ("tokenizer.json", "generation_config.json"):
        assert (case.output / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")  # what transformers 4 reads too
    assert json.loads((case.output / "tokenizer_config.json").read_text()) == config
    if case.training_logits is not None:
        assert (case.output / "template.yaml").read_text() == (LAYOUTS / "plain.yaml").read_text()


def test_where_the_adapter_brings_no_layout_the_bases_comes_along(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    shutil.copy(LAYOUTS / "turns.yaml", base / "template.yaml")
    run_merge(base, untied_adapter, tmp_path / "merged", verify=False)
    assert (tmp_path / "merged" / "template.yaml").read_text() == (LAYOUTS / "turns.yaml").read_text()


def test_more_files_are_written_than_a_process_may_hold_open(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    run_merge(untied_base, untied_adapter, tmp_path / "whole", verify=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        run_merge(untied_base, untied_adapter, tmp_path / "cut", verify=False, max_shard_size="1KB")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 30
    whole, cut = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "cut")
    assert all(cut.tensor(name).tobytes() == whole.tensor(name).tobytes() for name in whole.names())


def test_the_adapters_tokenizer_wins_over_the_bases(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    for file in untied_base.glob("tokenizer*"):
        shutil.copy(file, adapter)
    text = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(text + "\n")
    run_merge(untied_base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == text + "\n"


def test_a_sharded_base_gives_the_same_shards_and_index(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    stock_base(untied_base).save_pretrained(sharded, max_shard_size="50KB")
    for file in untied_base.glob("*.json"):
        shutil.copy(file, sharded)
    run_merge(sharded, untied_adapter, tmp_path / "a")
    run_merge(untied_base, untied_adapter, tmp_path / "b")
    names = sorted(path.name for path in sharded.glob("*.safetensors*"))
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "a").glob("*.safetensors*")) == names
    index = "model.safetensors.index.json"
    assert (tmp_path / "a" / index).read_bytes() == (sharded / index).read_bytes()
    whole = load_file(tmp_path / "b" / "model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "a").glob("*.safetensors"):
        parts |= load_file(path)
        assert path.stat().st_size == (sharded / path.name).stat().st_size
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    torch.testing.assert_close(logits_of(stock_base(tmp_path / "a")), logits_of(stock_base(tmp_path / "b")))


@pytest.mark.parametrize("tied", [True, False])
def test_a_bin_base_becomes_safetensors_with_the_same_values(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter, _ = rows_adapter(base, tmp_path / "adapter")
    run_merge(base, adapter, tmp_path / "expected")
    model = stock_base(base)
    old = shutil.copytree(base, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), old / "pytorch_model.bin")  # holds the embedding's copies, and a tied head's
    run_merge(old, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name
    for name in merged.keys() - expected.keys():
        assert torch.equal(merged[name], expected["shared.weight"]), name
    logits = logits_of(stock_base(tmp_path / "merged"))
    assert torch.equal(logits, logits_of(stock_base(tmp_path / "expected")))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"alpha_pattern": {"EncDecAttention.q": 40, "block.0.layer.0.SelfAttention.v": 2}}, id="alpha"),
        pytest.param({"rank_pattern": {"decoder.*.v": 2}, "alpha_pattern": {"q": 6}}, id="rank and alpha"),
        pytest.param({"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}, id="every linear layer"),
    ],
)
def test_each_scale_is_pefts(untied_base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = stock_adapter(untied_base, tmp_path / "adapter", **changes)
    run_merge(untied_base, adapter, tmp_path / "merged")
    base = load_file(untied_base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    stock = stock_with_adapter(untied_base, adapter).base_model.model
    adapted = {f"{name}.weight": layer for name, layer in stock.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(adapted) >= 12
    for name, value in merged.items():
        delta = adapted[name].get_delta_weight("default").detach() if name in adapted else 0
        torch.testing.assert_close(value, base[name] + delta, rtol=1e-6, atol=1e-6)


def test_an_adapter_in_bin_form_merges_the_same(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    old = shutil.copytree(untied_adapter, tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    run_merge(untied_base, untied_adapter, tmp_path / "a")
    run_merge(untied_base, old, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_merging_twice_gives_the_same_bytes(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_merge(untied_base, untied_adapter, tmp_path / name)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# what is refused, and that nothing is left of it


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_base_of_other_shapes_is_refused_by_the_tensors_name(untied_adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tied=False, d_kv=4)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.[qv]\.weight: \[16, 32\] in the base.*\[32, 32\]"):
        run_merge(other, untied_adapter, tmp_path / "merged")
    assert left_in(tmp_path) == ["other"]


def test_a_base_without_the_adapted_layers_is_refused(untied_adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tied=False, num_layers=1)
    with pytest.raises(CheckpointError, match=r"adapts \S*block\.1\.\S+, which .*other doesn't have"):
        run_merge(other, untied_adapter, tmp_path / "merged")
    assert left_in(tmp_path) == ["other"]


def test_rows_behind_the_end_of_a_smaller_vocabulary_are_refused(tmp_path: Path) -> None:
    adapter, _ = rows_adapter(make_base(tmp_path / "base", tied=True), tmp_path / "adapter")
    other = make_base(tmp_path / "other", tied=True, vocab_size=205)
    before = left_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"shared\.weight"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert left_in(tmp_path) == before


def test_an_output_that_holds_files_is_kept_unless_told_to_overwrite(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds files already") as caught:
        run_merge(untied_base, untied_adapter, output)
    assert "--overwrite" in (caught.value.hint or "")
    assert left_in(output) == ["mine.txt"]
    run_merge(untied_base, untied_adapter, output, overwrite=True)
    assert "model.safetensors" in left_in(output)
    assert "mine.txt" not in left_in(output)
    assert left_in(tmp_path) == ["merged"]


def test_a_base_that_is_the_output_is_merged_in_place_only_when_told_to(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    run_merge(base, untied_adapter, tmp_path / "expected")
    with pytest.raises(SettingsError):
        run_merge(base, untied_adapter, base)
    run_merge(base, untied_adapter, base, overwrite=True)
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert (base / "model.safetensors").read_bytes() == expected


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return apply


Q = f"{PREFIX}encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(lambda f: (f / "adapter_config.json").unlink(), r"no adapter_config\.json", id="no config"),
        pytest.param(lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model", id="no weights"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json", id="no JSON"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("[]"), r"adapter_config\.json", id="a list"),
        pytest.param(change_config(peft_type="IA3"), "IA3", id="IA3"),
        pytest.param(change_config(use_dora=True), "lora_magnitude_vector is missing", id="DoRA without norms"),
        pytest.param(change_config(modules_to_save=["shared"]), "modules_to_save: shared", id="a whole embedding"),
        pytest.param(
            change_config(modules_to_save=["final_layer_norm"]),
            "modules_to_save: final_layer_norm: no tensor",
            id="whole modules without tensors",
        ),
        pytest.param(change_config(lora_alpha=None), "lora_alpha", id="no alpha"),
        pytest.param(change_tensors(lambda s: s.pop(f"{Q}.lora_B.weight")), r"SelfAttention\.q.*lora_B", id="no B"),
        pytest.param(change_tensors(lambda s: s.pop(f"{Q}.lora_A.weight")), r"SelfAttention\.q.*lora_A", id="no A"),
        pytest.param(
            change_tensors(lambda s: s[f"{Q}.lora_B.weight"].fill_(float("nan"))), r"SelfAttention\.q", id="NaN"
        ),
        pytest.param(
            change_tensors(lambda s: s.update({f"{PREFIX}shared.lora_embedding_A": torch.ones(4, 1536)})),
            "lora_embedding_A",
            id="a tensor that merge doesn't fold",
        ),
        pytest.param(change_tensors(lambda s: s.clear()), "holds no LoRA", id="nothing in it"),
    ],
)
def test_what_is_no_whole_lora_adapter_is_refused_by_name(
    untied_base: Path, untied_adapter: Path, tmp_path: Path, damage: Callable[[Path], Any], named: str
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(CheckpointError, match=named):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)
    assert left_in(tmp_path) == ["adapter"]


def indices(*ids: int) -> dict[str, list[int]]:
    embedding = {name: list(ids) for name in ("encoder.embed_tokens", "decoder.embed_tokens")}
    return embedding | {"lm_head": list(reversed(ids))}


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        pytest.param(indices(-5, 210, 201), "-5|shared|lm_head", id="a negative row"),
        pytest.param(indices(203, 210, 1536), "shared|lm_head", id="a row behind the end"),
        pytest.param(indices(203, 210), "shared|lm_head", id="fewer than the tensor has"),
        pytest.param(indices(203, 203, 201), "shared|lm_head", id="a row twice"),
        pytest.param(indices(), "trainable_token_indices|trainable_tokens|shared|lm_head", id="no row"),
        pytest.param(None, "trainable_token", id="rows that the config doesn't list"),
    ],
)
def test_token_rows_that_disagree_with_the_config_are_refused(
    untied_base: Path, tmp_path: Path, listed: Any, named: str
) -> None:
    adapter, _ = rows_adapter(untied_base, tmp_path / "adapter")
    change_config(trainable_token_indices=listed)(adapter)
    before = left_in(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)
    assert left_in(tmp_path) == before


def test_a_sum_too_large_for_an_fp16_base_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=torch.float16)
    adapter = stock_adapter(base, tmp_path / "adapter")
    change_tensors(lambda s: s[f"{Q}.lora_B.weight"].mul_(1e7))(adapter)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.q\.weight"):
        run_merge(base, adapter, tmp_path / "merged", verify=False)
    assert left_in(tmp_path) == ["adapter", "base"]


def test_an_adapter_folder_that_is_not_there_is_refused(untied_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder"):
        run_merge(untied_base, tmp_path / "gone", tmp_path / "merged")
    assert left_in(tmp_path) == []


def test_a_base_folder_that_is_not_there_is_refused(untied_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone"):
        run_merge(tmp_path / "gone", untied_adapter, tmp_path / "merged")
    assert left_in(tmp_path) == []


def test_an_untrained_adapter_is_accepted_with_a_warning(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_tensors(lambda s: [value.zero_() for name, value in s.items() if "lora_B" in name])(adapter)
    notes: list[Note] = []
    run_merge(
        untied_base,
        adapter,
        tmp_path / "merged",
        lambda event: notes.append(event) if isinstance(event, Note) else None,
    )
    assert [note.text for note in notes if note.warning and "lora_B is zero" in note.text]
    merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert merged == (untied_base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_catches_a_merge_that_adds_nothing_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=dtype)
    adapter = stock_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(
        "t5tune.merging.fold.low_rank_product", lambda b, a: np.zeros((b.shape[0], a.shape[1]), np.float32)
    )
    with pytest.raises(TrainingError, match="logits differ"):
        run_merge(base, adapter, tmp_path / "merged")
    assert left_in(tmp_path) == ["adapter", "base"]


def test_verify_catches_rows_in_the_wrong_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter, _ = rows_adapter(base, tmp_path / "adapter")
    before = left_in(tmp_path)
    monkeypatch.setattr("t5tune.merging.fold._set_rows", lambda values, changes, begin: None)
    with pytest.raises(TrainingError, match="logits differ"):
        run_merge(base, adapter, tmp_path / "merged")
    assert left_in(tmp_path) == before


def test_without_verify_the_same_bytes_are_written(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    result = run_merge(untied_base, untied_adapter, tmp_path / "a", verify=False)
    assert not result.verified
    assert result.max_error is None
    notes: list[Any] = []
    checked = run_merge(untied_base, untied_adapter, tmp_path / "b", notes.append)
    assert any(re.search(r"verified on \d+ examples: .* is allowed\)", getattr(note, "text", "")) for note in notes)
    assert checked.verified
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# which base


def identified(base: Path, adapter: Path, **facts: Any) -> Path:
    """The adapter with its base's identity in it, as train writes it."""
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"} | encoded(base_facts(base, "the-base") | facts))
    return adapter


def close_relative(base: Path, folder: Path) -> Path:
    """The base with one value changed, in the middle of a tensor."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["shared.weight"][700, 16] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_another_base_than_that_of_training_is_refused_by_both_names(untied_base: Path, tmp_path: Path) -> None:
    adapter = identified(untied_base, stock_adapter(untied_base, tmp_path / "adapter"))
    run_merge(untied_base, adapter, tmp_path / "right", verify=False)
    other = shutil.copytree(untied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other: not the base .*adapter was trained on, which was the-base"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()
    notes: list[Any] = []
    run_merge(other, adapter, tmp_path / "merged", notes.append, verify=False, allow_other_base=True)
    assert any(isinstance(note, Note) and note.warning and "not the base" in note.text for note in notes)


def test_check_full_sees_what_no_sample_holds(untied_base: Path, tmp_path: Path) -> None:
    adapter = identified(untied_base, stock_adapter(untied_base, tmp_path / "adapter"))
    other = close_relative(untied_base, tmp_path / "other")
    run_merge(other, adapter, tmp_path / "sampled", verify=False)
    run_merge(untied_base, adapter, tmp_path / "right", verify=False, check="full")
    with pytest.raises(CheckpointError, match=r"sha256"):
        run_merge(other, adapter, tmp_path / "merged", verify=False, check="full")


SMALL, LARGE = "encoder.final_layer_norm.weight", "shared.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[LARGE][0, 0].add_(1),
        lambda tensors: tensors[LARGE][-1, -1].add_(1),
        lambda tensors: tensors[SMALL][len(tensors[SMALL]) // 2].add_(1),
        lambda tensors: tensors.update({SMALL: tensors[SMALL].half()}),
        lambda tensors: tensors.update({SMALL: tensors[SMALL][None]}),
        lambda tensors: tensors.update({f"{SMALL}.of_another_name": tensors.pop(SMALL)}),
        lambda tensors: tensors.pop(SMALL),
    ],
    ids=["first value", "last value", "a small tensor", "dtype", "shape", "name", "one less"],
)
def test_both_hashes_tell_bases_apart(
    untied_base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    other = shutil.copytree(untied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert tensors[LARGE].nbytes > 2 * SAMPLE  # so that what is between its ends isn't read
    change(tensors)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for hash_of in (fingerprint, full_hash):
        assert hash_of(Checkpoint(other)) != hash_of(Checkpoint(untied_base))


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_copies_of_a_shared_tensor_dont_make_another_base(tied_base: Path, tmp_path: Path, copy: str) -> None:
    other = shutil.copytree(tied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert copy not in tensors
    save_file({**tensors, copy: tensors[LARGE].clone()}, other / "model.safetensors", {"format": "pt"})
    for hash_of in (fingerprint, full_hash):
        assert hash_of(Checkpoint(other)) == hash_of(Checkpoint(tied_base))


def test_a_base_is_known_again_in_other_files(untied_base: Path, tmp_path: Path) -> None:
    adapter = identified(untied_base, stock_adapter(untied_base, tmp_path / "adapter"))
    model = stock_base(untied_base)
    copy = shutil.ignore_patterns("*.safetensors")
    sharded = shutil.copytree(untied_base, tmp_path / "sharded", ignore=copy)
    save_sharded = load_file(untied_base / "model.safetensors")
    names = sorted(save_sharded)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: save_sharded[name] for name in names if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    old = shutil.copytree(untied_base, tmp_path / "old", ignore=copy)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    for base in (sharded, old):
        run_merge(base, adapter, tmp_path / "merged", verify=False, check="full", overwrite=True)


def test_stock_adapters_tell_nothing_of_their_base_and_are_taken_with_a_note(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    run_merge(untied_base, untied_adapter, tmp_path / "merged", notes.append, verify=False)
    assert any(isinstance(note, Note) and "doesn't tell the fingerprint" in note.text for note in notes)


# onto what training saw


@pytest.mark.parametrize("kind", ["nf4", "fp4"])  # int8 computes with rounded activations too, which none can fold
def test_folded_onto_a_quantised_base_it_is_nearer_to_the_training_model(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", tied=False, d_model=64, d_kv=16, d_ff=128)
    adapter = identified(base, stock_adapter(base, tmp_path / "adapter"), onto=kind, compute="float32")
    notes: list[Any] = []
    onto = run_merge(base, adapter, tmp_path / "onto", notes.append, onto=kind)
    assert onto.from_training[kind] < 0.2 * onto.from_training["base"]
    assert any(isinstance(note, Note) and f"folded onto {kind}" in note.text for note in notes)
    told: list[Any] = []
    plain = run_merge(base, adapter, tmp_path / "plain", told.append)
    assert any(isinstance(note, Note) and note.warning and f"--onto {kind}" in note.text for note in told)
    assert plain.from_training == pytest.approx(onto.from_training, rel=0.2, abs=2e-3)
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "onto" / "model.safetensors")
    untouched = "encoder.block.0.layer.1.DenseReluDense.wo.weight"  # no adapter, but quantised in training
    assert not torch.equal(weights[untouched], merged[untouched])
    assert torch.equal(weights["shared.weight"], merged["shared.weight"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_restored_weights_are_bitsandbytes_own(tmp_path: Path, kind: str) -> None:
    import bitsandbytes.functional as functional

    base = make_base(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    adapter = stock_adapter(base, tmp_path / "adapter")
    run_merge(base, adapter, tmp_path / "merged", onto=kind, verify=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    trained = load_file(adapter / "adapter_model.safetensors")
    name = "decoder.block.1.layer.1.EncDecAttention.v"
    packed, state = functional.quantize_4bit(
        load_file(base / "model.safetensors")[f"{name}.weight"], compress_statistics=True, quant_type=kind
    )
    delta = trained[f"{PREFIX}{name}.lora_B.weight"] @ trained[f"{PREFIX}{name}.lora_A.weight"] * SCALE
    expected = (functional.dequantize_4bit(packed, state).float() + delta).bfloat16()
    assert torch.equal(merged[f"{name}.weight"], expected)
