"""Merged checkpoints, compared with plain torch, stock transformers and stock PEFT."""

import json
import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.training_data import TrainingData, read_training_data, write_training_data
from t5tune.commands.chat import Chatter
from t5tune.commands.merge import MergeResult
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.templates import load_template
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.errors import CheckpointError, TrainingError
from t5tune.model.load import load_base
from t5tune.settings import ChatSettings
from tests.merging.cases import PREFIX, change_tensors, list_folder, read_weights, run_merge
from tests.support.models.adapters import (
    TEMPLATES,
    TOKEN_IDS,
    compute_logits,
    load_stock_base,
    make_rows_adapter,
    make_stock_adapter,
)
from tests.support.models.bases import make_base
from tests.support.notes import Notes

pytestmark = pytest.mark.slow

SCALE = 16 / 4


def load_stock_with_adapter(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load_stock_base(base), adapter).eval()


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


@pytest.mark.variants("tied-fp32-lora", "untied-bf16-lora", "tied-bf16-rows", "untied-fp32-rows")
def test_adapted_tensors_are_w_plus_scaled_ba(case: Case) -> None:
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


def test_stock_transformers_has_the_logits_of_stock_peft(case: Case) -> None:
    expected = compute_logits(load_stock_with_adapter(case.base, case.adapter))
    merged = compute_logits(load_stock_base(case.output))
    plain = compute_logits(load_stock_base(case.base))
    assert (expected - plain).abs().max() > 0.1
    ours = compute_logits(load_base(case.output, torch.float32, torch.device("cpu")))
    torch.testing.assert_close(ours, merged, rtol=0, atol=1e-5)
    # a bf16 checkpoint has only 8 bits of precision
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.03 * float(expected.abs().max())
    assert (merged - expected).abs().max() < tolerance


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("rows")], indirect=True)
def test_stock_peft_has_the_logits_of_the_training_model(case: Case) -> None:
    # Training multiplies the head's trained rows separately, stock PEFT as part of the whole matrix. A BLAS may sum
    # the products in a different order, so the last bits may differ, but by far less than with a wrong row.
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


def test_a_wrong_config_of_the_base_is_corrected(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    config = read_config(base) | {"tie_word_embeddings": True, "scale_decoder_outputs": False}  # transformers 5's keys
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
    for name in ("tokenizer.json", "generation_config.json"):
        assert (case.output / name).read_bytes() == (case.base / name).read_bytes()
    config = json.loads((case.base / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")  # the name that transformers 4 reads
    assert json.loads((case.output / "tokenizer_config.json").read_text()) == config
    if case.training_logits is not None:
        assert (case.output / "template.yaml").read_text() == (TEMPLATES / "plain.yaml").read_text()


def test_the_model_files_of_the_base_are_copied(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    (base / "additional_chat_templates").mkdir()
    copied = ["chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt"]
    copied.append("additional_chat_templates/tools.jinja")
    for name in (*copied, "onnx.json", ".hidden"):
        (base / name).write_text(name)
    shutil.copy(TEMPLATES / "turns.yaml", base / "template.yaml")  # the fallback, since the adapter has no template
    run_merge(base, untied_adapter, tmp_path / "merged", verify=False)
    for name in (*copied, "template.yaml"):
        assert (tmp_path / "merged" / name).read_text() == (base / name).read_text()
    assert not [name for name in ("onnx.json", ".hidden") if (tmp_path / "merged" / name).exists()]
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stock.chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("decoder.embed_tokens", "several modules share shared.weight, but their trained rows differ"),
        ("shared", "several modules share shared.weight, but their trained rows differ"),
        ("encoder.other", "t5tune can merge trained rows only of shared.weight and lm_head.weight"),
    ],
)
def test_trained_rows_that_would_be_lost_are_refused(module: str, said: str, untied_base: Path, tmp_path: Path) -> None:
    adapter, _ = make_rows_adapter(untied_base, tmp_path / "adapter")
    name = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    rows = name.format("encoder.embed_tokens")
    change_tensors(lambda state: state.update({name.format(module): state[rows] + 1}))(adapter)
    with pytest.raises(CheckpointError, match=f"{module}: {said}"):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)


def test_a_sum_keeps_the_common_training_settings_of_its_adapters(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    """If the source prefixes differ, the sum has no prefix and no chat template."""
    tokenizer = load_tokenizer(untied_base)
    made = {
        "a": TrainingData(False, "auto", "text", "short", "sum: ", "sft", ["t5"], json_schema={"type": "object"}),
        "b": TrainingData(True, "auto", "text", "title", "sum: ", "dpo", ["t5"], json_schema={"type": "object"}),
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
        notes = Notes()
        folders = [tmp_path / name for name in names]
        run_merge(untied_base, folders, tmp_path / names, notes, weights=[0.5, 0.5], verify=False)
        has_template = "chat_template" in json.loads((tmp_path / names / "tokenizer_config.json").read_text())
        about = [note for note in notes if "training_data" in note or "chat template" in note]
        return read_training_data(tmp_path / names), has_template, about

    no_template = "the tokenizer gets no chat template: the adapters were trained with different source prefixes"
    common = "training_data.json contains only the common settings; the adapters differ in"
    joined = TrainingData(True, "auto", None, None, "sum: ", "sft", ["t5"], json_schema={"type": "object"})
    assert add_up("ab") == (joined, True, [f"{common} has_earlier_turns, target_column, objective"])
    joined = TrainingData(False, "auto", "text", "short", "", "sft", ["t5"])
    assert add_up("ac") == (joined, False, [f"{common} source_prefix, json_schema", no_template])
    left_out = "no training_data.json written: 1 of 2 adapters lack it"
    assert add_up("ad") == (None, False, [left_out, no_template])
    settings = ChatSettings(model_name_or_path=tmp_path / "ab", use_cpu=True, json_schema="none")
    prompts = Chatter.load(settings).prompts
    assert (prompts.source_prefix, prompts.keeps_history) == ("sum: ", True)


def test_adapters_that_number_tokens_differently_are_not_added_up(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    number = len(load_tokenizer(untied_base).get_vocab())
    for name, tokens in {"one": ["中"], "other": ["ж"], "both": ["中", "ж"]}.items():
        adapter = shutil.copytree(untied_adapter, tmp_path / name)
        tokenizer = load_tokenizer(untied_base)
        tokenizer.backend.add_tokens(tokens)
        save_tokenizer(tokenizer, adapter)

    def add_up(*names: str) -> Path:
        folders, weights = [tmp_path / name for name in names], [0.5] * len(names)
        return run_merge(untied_base, folders, tmp_path / "-".join(names), weights=weights, verify=False).checkpoint

    for names, token, index in (
        (("one", "other"), "ж", number),
        (("one", "both"), "ж", number + 1),
        (("both", "one", "other"), "ж", number),
    ):
        expected = f"adapter: {tmp_path / names[-1]}: token {index} of its tokenizer is {token!r}, which .*lacks or n"
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


def test_a_bin_adapter_merges_like_a_safetensors_adapter(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(untied_adapter, tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    run_merge(untied_base, untied_adapter, tmp_path / "a", verify=False)
    run_merge(untied_base, old, tmp_path / "b")
    assert read_weights(tmp_path / "a") == read_weights(tmp_path / "b")


def test_an_untrained_adapter_is_accepted_with_a_warning(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_tensors(lambda s: [value.zero_() for name, value in s.items() if "lora_B" in name])(adapter)
    notes = Notes()
    run_merge(untied_base, adapter, tmp_path / "merged", notes)
    assert any("lora_B is zero" in text for text in notes.warnings)
    assert read_weights(tmp_path / "merged") == read_weights(untied_base)


@pytest.mark.parametrize(
    ("dtype", "broken", "result"),
    [
        (torch.float32, "compute_low_rank_product", lambda b, a: np.zeros((b.shape[0], a.shape[1]), np.float32)),
        (torch.bfloat16, "compute_low_rank_product", lambda b, a: np.zeros((b.shape[0], a.shape[1]), np.float32)),
        (torch.float32, "_set_rows", lambda values, changes, begin: None),
    ],
)
def test_verify_detects_missing_changes_and_leaves_no_folder(
    dtype: torch.dtype, broken: str, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=dtype)
    if broken == "_set_rows":
        make_rows_adapter(base, tmp_path / "adapter")
    else:
        make_stock_adapter(base, tmp_path / "adapter")
    before = list_folder(tmp_path)
    monkeypatch.setattr(f"t5tune.merging.fold.{broken}", result)
    with pytest.raises(TrainingError, match="the logits of the merged model and of base"):
        run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert list_folder(tmp_path) == before


def test_the_same_bytes_are_written_with_and_without_verify(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    result = run_merge(untied_base, untied_adapter, tmp_path / "a", verify=False)
    assert not result.verified
    assert result.max_error is None
    notes = Notes()
    assert run_merge(untied_base, untied_adapter, tmp_path / "b", notes).verified
    assert any(re.search(r"verified on \d+ examples: .* is allowed\)", text) for text in notes)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
