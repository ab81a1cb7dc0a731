"""Merged checkpoints, compared with plain torch, stock transformers and stock PEFT."""

import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import (
    FINGERPRINT_BYTES,
    compute_fingerprint,
    compute_full_hash,
)
from t5tune.checkpoints.training_data import TrainingData, read_training_data, write_training_data
from t5tune.commands.chat import Chatter
from t5tune.commands.evaluate import evaluate
from t5tune.commands.export import export
from t5tune.commands.merge import MergeResult, merge
from t5tune.commands.prepare import prepare
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.templates import load_template
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.errors import CheckpointError, ModelError, SettingsError, TrainingError
from t5tune.model.load import load_base
from t5tune.progress import Note
from t5tune.settings import ChatSettings, EvaluateSettings, ExportSettings, MergeSettings, PrepareSettings
from tests.support.adapters import (
    TEMPLATES,
    TOKEN_IDS,
    add_base_metadata,
    compute_logits,
    load_stock_base,
    make_rows_adapter,
    make_stock_adapter,
)
from tests.support.bases import make_base

PREFIX = "base_model.model."
SCALE = 16 / 4


def load_stock_with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load_stock_base(base), adapter).eval()


def run_merge(base: Path, adapter: Path, output: Path, report: Any = None, **changes: Any) -> MergeResult:
    settings = MergeSettings(model_name_or_path=str(base), adapter=adapter, output_dir=output, **changes)
    return merge(settings, report) if report else merge(settings)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@dataclass(frozen=True)
class Case:
    base: Path
    adapter: Path
    output: Path
    merged: MergeResult
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
        adapter = make_stock_adapter(base, root / "adapter")
    else:
        adapter, logits = make_rows_adapter(base, root / "adapter")
    merged = run_merge(base, adapter, root / "merged")
    return Case(base, adapter, root / "merged", merged, head == "tied", dtype, logits)


@pytest.fixture(scope="module")
def untied_adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock_adapter(untied_base, tmp_path_factory.mktemp("adapters") / "untied")


def compute_expected_tensors(base: Path, adapter: Path, tied: bool, scale: float = SCALE) -> dict[str, torch.Tensor]:
    """Compute W + scale · B·A in fp64, and the trained rows, from the files alone."""
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


@pytest.mark.slow
def test_adapted_tensors_are_w_plus_scaled_ba_and_others_keep_their_bytes(case: Case) -> None:
    weights = load_file(case.base / "model.safetensors")
    merged = load_file(case.output / "model.safetensors")
    expected = compute_expected_tensors(case.base, case.adapter, case.tied)
    assert list(merged) == list(weights)
    for name, before in weights.items():
        assert merged[name].dtype == before.dtype
        if name not in expected:
            assert torch.equal(merged[name].view(torch.uint8), before.view(torch.uint8)), name
            continue
        assert not torch.equal(merged[name], before), name
        # fp32 sums of four products differ from the fp64 sum, and B·A may cancel W: allow one part in 2²³ of the
        # largest value per rounding. A bf16 result may then be rounded to the other neighbor: allow one unit.
        fp32_error = 8 * 2.0**-24 * float(expected[name].abs().max() + 1)
        if case.dtype == torch.float32:
            torch.testing.assert_close(merged[name].double(), expected[name], rtol=0, atol=fp32_error)
        else:
            rounded = expected[name].float().to(torch.bfloat16)
            torch.testing.assert_close(merged[name].double(), rounded.double(), rtol=2.0**-7, atol=fp32_error)
            assert (merged[name] != rounded).float().mean() < 0.01


def test_only_trained_rows_of_embedding_and_head_change(case: Case) -> None:
    weights = load_file(case.base / "model.safetensors")
    merged = load_file(case.output / "model.safetensors")
    for name in ("shared.weight", "lm_head.weight"):
        if name in weights:
            moved = (weights[name] != merged[name]).any(1).nonzero().flatten().tolist()
            assert moved == (sorted(TOKEN_IDS) if case.training_logits is not None else [])


@pytest.mark.slow
def test_stock_transformers_has_the_logits_of_stock_peft(case: Case) -> None:
    expected = compute_logits(load_stock_with_adapter(case.base, case.adapter))
    merged = compute_logits(load_stock_base(case.output))
    plain = compute_logits(load_stock_base(case.base))
    assert (expected - plain).abs().max() > 0.1
    # a bf16 checkpoint has only 8 bits of precision
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.03 * float(expected.abs().max())
    assert (merged - expected).abs().max() < tolerance


def test_load_base_has_the_logits_of_stock_transformers(case: Case) -> None:
    ours = compute_logits(load_base(case.output, torch.float32, torch.device("cpu")))
    torch.testing.assert_close(ours, compute_logits(load_stock_base(case.output)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("rows")], indirect=True)
def test_stock_peft_has_the_logits_of_the_training_model_without_extra_code(case: Case) -> None:
    # Training multiplies the head's trained rows separately, stock PEFT as part of the whole matrix. A BLAS may sum
    # these in another order, so the last bits may differ, but by far less than with a wrong row.
    assert case.training_logits is not None
    stock = compute_logits(load_stock_with_adapter(case.base, case.adapter))
    assert (case.training_logits - compute_logits(load_stock_base(case.base))).abs().max() > 0.1
    torch.testing.assert_close(stock, case.training_logits, rtol=0, atol=1e-5)


def test_config_states_whether_the_head_is_tied(case: Case) -> None:
    config = read_config(case.output)
    assert config["tie_word_embeddings"] is case.tied
    before = read_config(case.base)
    ours = {"tie_word_embeddings", "scale_decoder_outputs"}
    assert {k: v for k, v in config.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_config_is_corrected_if_that_of_the_base_is_wrong(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    config = read_config(base) | {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # transformers 5's
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_stock_adapter(base, tmp_path / "adapter")
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


def test_tokenizer_and_generation_config_are_copied(case: Case) -> None:
    source = case.base  # write_adapter copied the base's own
    for name in ("tokenizer.json", "generation_config.json"):
        assert (case.output / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")  # which transformers 4 reads, too
    assert json.loads((case.output / "tokenizer_config.json").read_text()) == config
    if case.training_logits is not None:
        assert (case.output / "template.yaml").read_text() == (TEMPLATES / "plain.yaml").read_text()


def test_the_files_of_the_base_that_belong_to_the_model_are_copied(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    names = ("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt")
    for name in (*names, "onnx.json", ".hidden"):
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    run_merge(base, untied_adapter, tmp_path / "merged", verify=False)
    for name in names:
        assert (tmp_path / "merged" / name).read_text() == name
    assert (tmp_path / "merged" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not [name for name in ("onnx.json", ".hidden") if (tmp_path / "merged" / name).exists()]
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stock.chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_modules_to_save_may_contain_other_modules(untied_base: Path, tmp_path: Path) -> None:
    """PEFT's rule: each module whose path ends with the name, with all that is in it."""
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter", modules_to_save=["DenseReluDense", "layer_norm"])
    run_merge(untied_base, adapter, tmp_path / "merged")
    expected = load_stock_with_adapter(untied_base, adapter).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(untied_base / "model.safetensors")
    assert [name for name, value in merged.items() if not expected[name].equal(value)] == []
    assert any("DenseReluDense" in name for name in merged if not before[name].equal(merged[name]))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("decoder.embed_tokens", "its trained rows differ from those of another module, but both share shared.weight"),
        ("shared", "its trained rows differ from those of another module, but both share shared.weight"),
        ("encoder.other", "t5tune can't merge its trained rows, only those of shared.weight and lm_head.weight"),
    ],
)
def test_trained_rows_that_would_be_lost_are_refused(module: str, said: str, untied_base: Path, tmp_path: Path) -> None:
    adapter, _ = make_rows_adapter(untied_base, tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    state[name.format(module)] = state[name.format("encoder.embed_tokens")] + 1
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{module}: {said}"):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)


def test_the_conversation_template_of_the_base_is_the_fallback(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    shutil.copy(TEMPLATES / "turns.yaml", base / "template.yaml")
    run_merge(base, untied_adapter, tmp_path / "merged", verify=False)
    assert (tmp_path / "merged" / "template.yaml").read_text() == (TEMPLATES / "turns.yaml").read_text()


def test_a_sum_keeps_what_its_adapters_were_trained_with_in_common(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    """With other source prefixes it has neither a prefix nor a chat template."""
    tokenizer = load_tokenizer(untied_base)
    made = {
        "a": TrainingData(False, "auto", "text", "short", "sum: ", "sft", ["t5"]),
        "b": TrainingData(True, "auto", "text", "title", "sum: ", "dpo", ["t5"]),
        "c": TrainingData(False, "auto", "text", "short", "fix: ", "sft", ["t5"]),
        "d": None,
    }
    for name, data in made.items():
        adapter = shutil.copytree(untied_adapter, tmp_path / name)
        save_tokenizer(tokenizer, adapter)
        if data is not None:
            template = build_chat_template(load_template("plain"), tokenizer, data.source_prefix)
            write_chat_template(adapter, template, tokenizer)
            write_training_data(adapter, data)

    def add_up(names: str) -> tuple[TrainingData | None, bool, list[str]]:
        """Return the sum's training data, whether it has a chat template, and the notes about both."""
        settings = MergeSettings(
            model_name_or_path=str(untied_base),
            adapter=[tmp_path / name for name in names],
            weights=[0.5, 0.5],
            output_dir=tmp_path / names,
            verify=False,
        )
        notes: list[str] = []
        merge(settings, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
        has_template = "chat_template" in json.loads((tmp_path / names / "tokenizer_config.json").read_text())
        about = [note for note in notes if "training_data" in note or "chat template" in note]
        return read_training_data(tmp_path / names), has_template, about

    no_template = "the tokenizer gets no chat template: the adapters were trained with different source prefixes"
    common = "training_data.json has what the adapters have in common; they differ in"
    joined = TrainingData(True, "auto", None, None, "sum: ", "sft", ["t5"])
    assert add_up("ab") == (joined, True, [f"{common} has_earlier_turns, target_column, objective"])
    joined = TrainingData(False, "auto", "text", "short", "", "sft", ["t5"])
    assert add_up("ac") == (joined, False, [f"{common} source_prefix", no_template])
    left_out = "training_data.json is left out: 1 of 2 adapters have none"
    assert add_up("ad") == (None, False, [left_out, no_template])
    prompts = Chatter.load(ChatSettings(model_name_or_path=str(tmp_path / "ab"), use_cpu=True)).prompts
    assert (prompts.source_prefix, prompts.keeps_history) == ("sum: ", True)


def test_adapters_whose_tokens_have_other_ids_are_not_added_up(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(untied_base)
    number = len(tokenizer.get_vocab())
    added = {"one": ["中"], "other": ["ж"], "both": ["中", "ж"]}
    for name, tokens in added.items():
        adapter = shutil.copytree(untied_adapter, tmp_path / name)
        tokenizer = load_tokenizer(untied_base)
        tokenizer.backend.add_tokens(tokens)
        save_tokenizer(tokenizer, adapter)

    def add_up(*names: str) -> Path:
        output = tmp_path / "-".join(names)
        folders = [tmp_path / name for name in names]
        weights = [0.5] * len(names)
        base = str(untied_base)
        merge(MergeSettings(model_name_or_path=base, adapter=folders, weights=weights, output_dir=output, verify=False))
        return output

    for names, token, index in (
        (("one", "other"), "ж", number),
        (("one", "both"), "ж", number + 1),
        (("both", "one", "other"), "ж", number),
    ):
        expected = f"adapter: {tmp_path / names[-1]}: token {index} of its tokenizer is {token!r}, which .*lacks or has"
        with pytest.raises(CheckpointError, match=expected):
            add_up(*names)
    assert load_tokenizer(add_up("both", "one")).get_vocab() == load_tokenizer(tmp_path / "both").get_vocab()


def test_more_shards_can_be_written_than_open_files_are_allowed(
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
    assert all(cut.get_tensor(name).tobytes() == whole.get_tensor(name).tobytes() for name in whole.list_names())


@pytest.mark.parametrize(
    ("changes", "bytes_per_weight"),
    [
        ({}, 4),
        ({"dtype": "bfloat16"}, 2),
        ({"to": "ctranslate2"}, 4 + 4),
        ({"to": "ctranslate2", "dtype": "bfloat16"}, 2 + 2),
        ({"to": "ctranslate2", "quantization": "int8_float16"}, 4 + 1),
        ({"to": "ctranslate2", "quantization": "float16"}, 4 + 2),
    ],
)
def test_a_disk_too_small_for_the_checkpoint_and_its_conversion_is_refused(
    untied_base: Path,
    untied_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    bytes_per_weight: int,
) -> None:
    for name in ("ctranslate2", "ctranslate2.converters"):  # as if it were installed
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SettingsError, match="1,000 bytes are free; the weights need") as caught:
        run_merge(untied_base, untied_adapter, tmp_path / "merged", **changes)
    needed = int(caught.value.problems[0].rpartition(" ")[2].replace(",", ""))
    weights = sum(tensor.numel() for tensor in load_file(untied_base / "model.safetensors").values())
    assert 1 < needed / (weights * bytes_per_weight) < 1.15
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_of_the_adapter_takes_precedence(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    for file in untied_base.glob("tokenizer*"):
        shutil.copy(file, adapter)
    text = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(text + "\n")
    run_merge(untied_base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == text + "\n"


def test_a_sharded_base_results_in_the_same_shards_and_index(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    load_stock_base(untied_base).save_pretrained(sharded, max_shard_size="50KB")
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
    torch.testing.assert_close(
        compute_logits(load_stock_base(tmp_path / "a")), compute_logits(load_stock_base(tmp_path / "b"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_bin_base_becomes_safetensors_with_the_same_values(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter, _ = make_rows_adapter(base, tmp_path / "adapter")
    run_merge(base, adapter, tmp_path / "expected")
    model = load_stock_base(base)
    old = shutil.copytree(base, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), old / "pytorch_model.bin")  # contains copies of the embedding, and of a tied head
    run_merge(old, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name
    for name in merged.keys() - expected.keys():
        assert torch.equal(merged[name], expected["shared.weight"]), name
    logits = compute_logits(load_stock_base(tmp_path / "merged"))
    assert torch.equal(logits, compute_logits(load_stock_base(tmp_path / "expected")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"alpha_pattern": {"EncDecAttention.q": 40, "block.0.layer.0.SelfAttention.v": 2}}, id="alpha"),
        pytest.param({"rank_pattern": {"decoder.*.v": 2}, "alpha_pattern": {"q": 6}}, id="rank and alpha"),
        pytest.param({"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}, id="every linear layer"),
    ],
)
def test_lora_scales_equal_those_of_peft(untied_base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter", **changes)
    run_merge(untied_base, adapter, tmp_path / "merged")
    base = load_file(untied_base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    stock = load_stock_with_adapter(untied_base, adapter).base_model.model
    adapted = {f"{name}.weight": layer for name, layer in stock.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(adapted) >= 12
    for name, value in merged.items():
        delta = adapted[name].get_delta_weight("default").detach() if name in adapted else 0
        torch.testing.assert_close(value, base[name] + delta, rtol=1e-6, atol=1e-6)


def test_a_bin_adapter_merges_like_a_safetensors_adapter(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(untied_adapter, tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    run_merge(untied_base, untied_adapter, tmp_path / "a")
    run_merge(untied_base, old, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_merging_twice_writes_the_same_bytes(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_merge(untied_base, untied_adapter, tmp_path / name)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# merges that are refused leave nothing on disk


def list_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_base_of_other_shapes_is_refused_with_the_name_of_the_tensor(untied_adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tied=False, d_kv=4)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.[qv]\.weight: shape \[16, 32\] in the base.*\[32, 32\]"):
        run_merge(other, untied_adapter, tmp_path / "merged")
    assert list_folder(tmp_path) == ["other"]


def test_a_base_without_the_adapted_layers_is_refused(untied_adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", tied=False, num_layers=1)
    with pytest.raises(CheckpointError, match=r"adapts \S*block\.1\.\S+, which .*other doesn't have"):
        run_merge(other, untied_adapter, tmp_path / "merged")
    assert list_folder(tmp_path) == ["other"]


def test_rows_beyond_the_end_of_a_smaller_vocabulary_are_refused(tmp_path: Path) -> None:
    adapter, _ = make_rows_adapter(make_base(tmp_path / "base", tied=True), tmp_path / "adapter")
    other = make_base(tmp_path / "other", tied=True, vocab_size=205)
    before = list_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"shared\.weight"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == before


def test_an_output_folder_with_files_is_only_replaced_with_overwrite(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="already contains files") as caught:
        run_merge(untied_base, untied_adapter, output)
    assert "--overwrite" in (caught.value.hint or "")
    assert list_folder(output) == ["mine.txt"]
    run_merge(untied_base, untied_adapter, output, overwrite=True)
    assert "model.safetensors" in list_folder(output)
    assert "mine.txt" not in list_folder(output)
    assert list_folder(tmp_path) == ["merged"]


def test_overwrite_never_replaces_an_input_a_run_or_the_current_folder(
    untied_base: Path, untied_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    base, adapter = shutil.copytree(untied_base, out / "base"), shutil.copytree(untied_adapter, out / "adapter")
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    data = out / "data.jsonl"
    data.write_text('{"source": "a", "target": "b"}')
    before = list_folder(out)

    def evaluate_into(folder: Path) -> None:
        settings = {"model_name_or_path": str(untied_base), "data_path": f"{out}/*.jsonl", "use_cpu": True}
        evaluate(EvaluateSettings(**settings, output_dir=folder, overwrite=True))

    for what, command in {
        "adapter, which this command reads": lambda: run_merge(untied_base, adapter, out, overwrite=True),
        "base, which this command reads": lambda: run_merge(base, untied_adapter, out, overwrite=True),
        "run/checkpoint-7": lambda: run_merge(untied_base, untied_adapter, run, overwrite=True),
        "adapter, which this": lambda: export(ExportSettings(checkpoint=adapter, output_dir=adapter, overwrite=True)),
        "data.jsonl, which this command reads": lambda: evaluate_into(out),
    }.items():
        with pytest.raises(SettingsError, match=f"output_dir: .*: contains .*{what}"):
            command()
    monkeypatch.chdir(out)
    with pytest.raises(SettingsError, match="contains the current folder"):
        run_merge(untied_base, untied_adapter, tmp_path / "out" / "..", overwrite=True)
    assert list_folder(out) == before
    assert (run / "checkpoint-7").is_dir()


def test_overwrite_never_replaces_the_base_that_only_an_adapter_names_or_a_cache_of_a_mixture(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    base, adapter = shutil.copytree(untied_base, models / "base"), shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_config(base_model_name_or_path=str(base))(adapter)
    data = tmp_path / "data.jsonl"
    data.write_text('{"source": "a", "target": "b"}')
    settings = {"model_name_or_path": str(base), "add_tokens": ["none"]}
    for folder, paths in ((models / "cache", [data]), (elsewhere, [f"{models / 'cache'}:1", f"{data}:1"])):
        prepare(PrepareSettings(**settings, data_path=[str(path) for path in paths], output_dir=folder))
    before = sorted(models.rglob("*"))
    common: dict[str, Any] = {"output_dir": models, "overwrite": True}

    def evaluate_on(path: Path, model: Path) -> None:
        evaluate(EvaluateSettings(**common, model_name_or_path=str(model), data_path=[str(path)], use_cpu=True))

    given = ExportSettings(**common, checkpoint=untied_adapter, model_name_or_path=str(base))
    onto_base: dict[str, Any] = {**common, "output_dir": base, "adapter": [adapter]}
    converted: dict[str, Any] = {**onto_base, "model_name_or_path": str(base), "to": "ctranslate2"}
    commands: list[tuple[str, Callable[[], Any]]] = [
        ("base", lambda: merge(MergeSettings(**common, adapter=[adapter]))),
        ("base", lambda: merge(MergeSettings(**onto_base))),
        ("base", lambda: merge(MergeSettings(**converted))),
        ("base", lambda: evaluate_on(data, adapter)),
        ("base", lambda: export(ExportSettings(**common, checkpoint=adapter))),
        ("base", lambda: export(given)),
        ("cache/data", lambda: evaluate_on(elsewhere, untied_base)),
    ]
    for what, command in commands:
        with pytest.raises(SettingsError, match=f"output_dir: .*models.*: contains .*models/{what}, which this"):
            command()
    assert sorted(models.rglob("*")) == before


def test_a_result_isnt_lost_if_another_process_has_filled_the_folder_meanwhile(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"

    def fill(event: Any) -> None:
        output.mkdir(exist_ok=True)
        (output / "theirs.txt").write_text("theirs")

    with pytest.raises(SettingsError, match="merged: another process has written to it meanwhile") as caught:
        run_merge(untied_base, untied_adapter, output, fill, verify=False)
    assert str(tmp_path / "merged.1") in str(caught.value.hint)
    assert list_folder(output) == ["theirs.txt"]
    run_merge(untied_base, untied_adapter, tmp_path / "expected", verify=False)
    weights = [tmp_path / name / "model.safetensors" for name in ("merged.1", "expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_base_is_only_merged_in_place_with_overwrite(untied_adapter: Path, tmp_path: Path) -> None:
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
        pytest.param(lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json", id="invalid JSON"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("[]"), r"adapter_config\.json", id="a list"),
        pytest.param(change_config(peft_type="IA3"), "IA3", id="IA3"),
        pytest.param(change_config(use_dora=True), "lora_magnitude_vector is missing", id="DoRA without norms"),
        pytest.param(change_config(modules_to_save=["shared"]), "modules_to_save: shared", id="a whole embedding"),
        pytest.param(
            change_config(modules_to_save=["final_layer_norm"]),
            "modules_to_save: final_layer_norm: no such tensor",
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
            id="an unsupported tensor",
        ),
        pytest.param(change_tensors(lambda s: s.clear()), "contains no LoRA", id="empty"),
    ],
)
def test_an_incomplete_lora_adapter_is_refused_with_the_reason(
    untied_base: Path, untied_adapter: Path, tmp_path: Path, damage: Callable[[Path], Any], named: str
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(CheckpointError, match=named):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == ["adapter"]


def make_token_indices(*ids: int) -> dict[str, list[int]]:
    embedding = {name: list(ids) for name in ("encoder.embed_tokens", "decoder.embed_tokens")}
    return embedding | {"lm_head": list(reversed(ids))}


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        pytest.param(make_token_indices(-5, 210, 201), "-5|shared|lm_head", id="a negative row"),
        pytest.param(make_token_indices(203, 210, 1536), "shared|lm_head", id="a row beyond the end"),
        pytest.param(make_token_indices(203, 210), "shared|lm_head", id="fewer than the tensor has"),
        pytest.param(make_token_indices(203, 203, 201), "shared|lm_head", id="a row twice"),
        pytest.param(make_token_indices(), "trainable_token_indices|trainable_tokens|shared|lm_head", id="no row"),
        pytest.param(None, "trainable_token", id="rows that the config doesn't list"),
    ],
)
def test_token_rows_that_contradict_the_config_are_refused(
    untied_base: Path, tmp_path: Path, listed: Any, named: str
) -> None:
    adapter, _ = make_rows_adapter(untied_base, tmp_path / "adapter")
    change_config(trainable_token_indices=listed)(adapter)
    before = list_folder(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == before


def test_a_sum_beyond_the_range_of_fp16_is_refused_with_the_name_of_the_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=torch.float16)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    change_tensors(lambda s: s[f"{Q}.lora_B.weight"].mul_(1e7))(adapter)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.q\.weight"):
        run_merge(base, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == ["adapter", "base"]


def test_a_missing_adapter_folder_is_refused(untied_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder"):
        run_merge(untied_base, tmp_path / "gone", tmp_path / "merged")
    assert list_folder(tmp_path) == []


def test_a_missing_base_folder_is_refused(untied_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone"):
        run_merge(tmp_path / "gone", untied_adapter, tmp_path / "merged")
    assert list_folder(tmp_path) == []


def test_without_a_base_the_one_that_the_adapter_names_is_used_and_reported(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    merge(MergeSettings(adapter=untied_adapter, output_dir=tmp_path / "named", verify=False), notes.append)
    assert [note.text for note in notes if isinstance(note, Note) and "its base is" in note.text] == [
        f"{untied_adapter} is an adapter; its base is {untied_base}"
    ]
    run_merge(untied_base, untied_adapter, tmp_path / "given", verify=False)
    assert list_folder(tmp_path / "named") == list_folder(tmp_path / "given")
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "doesn't name the adapter's base; give the base with --model-name-or-path"),
        ("some/t5", "its base, some/t5, isn't on this machine; give --model-name-or-path"),
        ("no name on the Hub", "its base, no name on the Hub, isn't on this machine; give --model-name-or-path"),
        ("x" * 300, "isn't on this machine; give --model-name-or-path"),
    ],
)
def test_a_base_that_the_adapter_does_not_name_or_that_is_elsewhere_must_be_given(
    untied_adapter: Path, tmp_path: Path, name: str, problem: str
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_config(base_model_name_or_path=name)(adapter)
    with pytest.raises(CheckpointError) as caught:
        merge(MergeSettings(adapter=adapter, output_dir=tmp_path / "merged"))
    assert problem in f"{caught.value.message}; {caught.value.hint}"
    assert list_folder(tmp_path) == ["adapter"]


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
def test_verify_detects_a_merge_that_adds_nothing_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=dtype)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(
        "t5tune.merging.fold.compute_low_rank_product", lambda b, a: np.zeros((b.shape[0], a.shape[1]), np.float32)
    )
    with pytest.raises(TrainingError, match="logits differ"):
        run_merge(base, adapter, tmp_path / "merged")
    assert list_folder(tmp_path) == ["adapter", "base"]


def test_verify_detects_missing_token_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter, _ = make_rows_adapter(base, tmp_path / "adapter")
    before = list_folder(tmp_path)
    monkeypatch.setattr("t5tune.merging.fold._set_rows", lambda values, changes, begin: None)
    with pytest.raises(TrainingError, match="logits differ"):
        run_merge(base, adapter, tmp_path / "merged")
    assert list_folder(tmp_path) == before


def test_the_same_bytes_are_written_without_verify(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    result = run_merge(untied_base, untied_adapter, tmp_path / "a", verify=False)
    assert not result.verified
    assert result.max_error is None
    notes: list[Any] = []
    checked = run_merge(untied_base, untied_adapter, tmp_path / "b", notes.append)
    assert any(re.search(r"verified on \d+ examples: .* is allowed\)", getattr(note, "text", "")) for note in notes)
    assert checked.verified
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# checks of the base


def make_similar_base(base: Path, folder: Path) -> Path:
    """Copy the base with one value changed in the middle of a tensor."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["shared.weight"][700, 16] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_merge_refuses_an_adapter_of_another_base(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
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


def test_check_full_detects_a_change_outside_of_the_samples(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
    other = make_similar_base(untied_base, tmp_path / "other")
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
    ids=["first value", "last value", "a small tensor", "dtype", "shape", "name", "one fewer"],
)
def test_both_hashes_distinguish_bases(
    untied_base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    other = shutil.copytree(untied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert tensors[LARGE].nbytes > 2 * FINGERPRINT_BYTES  # so that its middle isn't read
    change(tensors)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) != hash_of(Checkpoint(untied_base))


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_copies_of_a_shared_tensor_dont_change_the_hashes(tied_base: Path, tmp_path: Path, copy: str) -> None:
    other = shutil.copytree(tied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert copy not in tensors
    save_file({**tensors, copy: tensors[LARGE].clone()}, other / "model.safetensors", {"format": "pt"})
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) == hash_of(Checkpoint(tied_base))


def test_a_base_is_recognized_in_another_file_format(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
    model = load_stock_base(untied_base)
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


def test_a_stock_adapter_without_base_facts_is_accepted_with_a_note(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    run_merge(untied_base, untied_adapter, tmp_path / "merged", notes.append, verify=False)
    assert any(isinstance(note, Note) and "records no fingerprint" in note.text for note in notes)
