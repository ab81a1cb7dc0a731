"""Merged weights, compared bit by bit with those of stock PEFT's merge_and_unload."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from t5tune.commands.merge import merge
from t5tune.errors import CheckpointError
from t5tune.settings import MergeSettings
from tests.support.bases import make_base

SIZES = {"d_model": 48, "d_kv": 8, "d_ff": 100, "num_layers": 1, "num_heads": 4, "vocab_size": 1536}
LINEAR = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_stock_base(folder: Path, dtype: torch.dtype, tied: bool) -> Any:
    """Load the base with stock transformers, and correct what its config says about a tied head."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    model.config.tie_word_embeddings = tied
    return model


def make_adapter(base: Path, folder: Path, tied: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Make an adapter with stock PEFT, with random values in every trained tensor."""
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "lora_dropout": 0.0}
    model = load_stock_base(base, torch.float32, tied)
    peft_model = get_peft_model(model, LoraConfig(**defaults | options, task_type=TaskType.SEQ_2_SEQ_LM))
    torch.manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            size = 1 + torch.rand_like(parameter) if "magnitude" in name else 0.2 * torch.randn_like(parameter)
            parameter.data = (parameter + size if "lora_" in name else size).to(dtype)
    peft_model.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapter: Path, dtype: torch.dtype, tied: bool) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(load_stock_base(base, dtype, tied), adapter).merge_and_unload().state_dict()


def merge_adapters(base: Path, adapter: Any, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    options = {"verify": False, "overwrite": True} | options
    merge(MergeSettings(model_name_or_path=str(base), adapter=adapter, output_dir=output, **options))
    tensors: dict[str, torch.Tensor] = {}
    for file in output.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(ours: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor], base: Path, moved: int) -> None:
    """Check that all tensors of the base's file have the same bits, and that at least `moved` of them changed."""
    before = load_file(base / "model.safetensors")
    assert ours.keys() == before.keys()
    for name, value in ours.items():
        # transformers keeps wo in fp32 when it loads in fp16
        assert torch.equal(value, oracle[name].to(value.dtype)), name
    assert sum(not torch.equal(before[name].to(value.dtype), value) for name, value in ours.items()) >= moved


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "rank 64": {"r": 64, "lora_alpha": 100},
    "patterns": {
        "rank_pattern": {"decoder.*.v": 2, "wo": 7},
        "alpha_pattern": {"q": 5, "block.0.layer.0.SelfAttention.v": 3},
    },
    "dora": {"use_dora": True, "r": 5},
    "dora rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q": 3}},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "whole norms": {"modules_to_save": ["final_layer_norm"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    root = tmp_path_factory.mktemp("bases")

    def find(dtype: str, tied: bool) -> Path:
        folder = root / f"{dtype}-{tied}"
        return folder if folder.exists() else make_base(folder, tied, DTYPES[dtype], **SIZES)

    return find


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_those_of_peft_bit_for_bit(
    bases: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    monkeypatch.setattr(
        "t5tune.checkpoints.tensor_files.tensors.BLOCK_ELEMENTS", 1000
    )  # several blocks of rows per tensor
    tied = len(kind) % 2 == 0
    base = bases(dtype, tied)
    adapter = make_adapter(base, tmp_path / "adapter", tied, **KINDS[kind])
    assert_same_bits(
        merge_adapters(base, adapter, tmp_path / "out"), merge_with_peft(base, adapter, DTYPES[dtype], tied), base, 10
    )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_initializations_are_computed_with_as_many_threads_as_in_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, kind: str
) -> None:
    """The last bits depend on the number of threads, and merge computes in its own threads."""
    base, before = bases("fp32", False), torch.get_num_threads()
    torch.set_num_threads(2 if int(os.environ["OMP_NUM_THREADS"]) == 1 else 1)
    try:
        adapter = make_adapter(base, tmp_path / "adapter", False, **KINDS[kind])
        oracle = merge_with_peft(base, adapter, torch.float32, False)
        assert_same_bits(merge_adapters(base, adapter, tmp_path / "out"), oracle, base, 10)
    finally:
        torch.set_num_threads(before)


def add_biases(model: Any) -> None:
    """Add biases to the q layers, which T5 itself doesn't have."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("SelfAttention.q"):
            module.bias = nn.Parameter(torch.linspace(-1, 1, module.out_features).to(module.weight.dtype))


# PEFT mistakes the bias for a matrix that lost its shape
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lora_b_bias_is_added_to_the_bias_of_the_layer(
    bases: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    base = shutil.copytree(bases(dtype, False), tmp_path / "base")

    def with_biases(folder: Path, dtype: torch.dtype, tied: bool) -> Any:
        model = AutoModelForSeq2SeqLM.from_pretrained(
            bases("bf16" if dtype == torch.bfloat16 else "fp32", False)
        ).eval()
        model.config.tie_word_embeddings = tied
        model.to(dtype)
        add_biases(model)
        return model

    tensors = load_file(base / "model.safetensors")
    model = with_biases(base, DTYPES[dtype], False)
    save_file(
        tensors | {n: p.detach() for n, p in model.named_parameters() if n.endswith("bias")}, base / "model.safetensors"
    )
    monkeypatch.setattr("tests.merging.test_fold.load_stock_base", with_biases)
    adapter = make_adapter(base, tmp_path / "adapter", False, target_modules=r".*SelfAttention\.q", lora_bias=True)
    assert any(name.endswith("lora_B.bias") for name in load_file(adapter / "adapter_model.safetensors"))
    assert_same_bits(
        merge_adapters(base, adapter, tmp_path / "out"), merge_with_peft(base, adapter, DTYPES[dtype], False), base, 4
    )


def test_a_lora_b_bias_of_a_layer_without_bias_is_refused(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", False)
    adapter = make_adapter(base, tmp_path / "adapter", False)
    state = load_file(adapter / "adapter_model.safetensors")
    a_layer = next(name for name in state if name.endswith("lora_B.weight"))
    bias = a_layer.replace("weight", "bias")
    change_config(adapter, lora_bias=True)
    save_file(state | {bias: torch.zeros(state[a_layer].shape[0])}, adapter / "adapter_model.safetensors")
    merge_adapters(base, adapter, tmp_path / "out")
    save_file(state | {bias: torch.ones(state[a_layer].shape[0])}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has no bias to add it to"):
        merge_adapters(base, adapter, tmp_path / "out")


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_to_plain_lora_merges_as_in_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, initialization: str
) -> None:
    base = bases("fp32", True)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=initialization, task_type="SEQ_2_SEQ_LM"
    )
    model = get_peft_model(load_stock_base(base, torch.float32, True), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initialization")
    model.peft_config["default"].init_lora_weights = initialization
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "initialization")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    ours = merge_adapters(base, tmp_path / "adapter", tmp_path / "out")
    assert_same_bits(ours, merge_with_peft(base, tmp_path / "adapter", torch.float32, True), base, 10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_token_rows_equal_those_of_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: str
) -> None:
    monkeypatch.setattr("t5tune.checkpoints.tensor_files.tensors.BLOCK_ELEMENTS", 1000)
    base = bases(dtype, tied)
    ids = [290, 7, 299]
    rows: Any = ids if tied else {"shared": ids, "lm_head": ids}
    adapter = make_adapter(base, tmp_path / "adapter", tied, trainable_token_indices=rows)
    ours, oracle = merge_adapters(base, adapter, tmp_path / "out"), merge_with_peft(base, adapter, DTYPES[dtype], tied)
    assert_same_bits(ours, oracle, base, 11)
    before = load_file(base / "model.safetensors")
    for name in before.keys() & {"shared.weight", "lm_head.weight"}:
        assert (before[name] != ours[name]).any(1).nonzero().flatten().tolist() == sorted(ids)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_half_precision_adapter_merges_as_in_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, dtype: str
) -> None:
    base = bases("bf16", False)
    adapter = make_adapter(base, tmp_path / "adapter", False, dtype=DTYPES[dtype])
    assert {value.dtype for value in load_file(adapter / "adapter_model.safetensors").values()} == {DTYPES[dtype]}
    assert_same_bits(
        merge_adapters(base, adapter, tmp_path / "out"), merge_with_peft(base, adapter, torch.bfloat16, False), base, 10
    )


@pytest.mark.parametrize(("stored", "wanted"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp16", "bf16")])
def test_an_output_dtype_is_the_fp32_sum_rounded_once(
    bases: Callable[[str, bool], Path], tmp_path: Path, stored: str, wanted: str
) -> None:
    base = bases(stored, False)
    adapter = make_adapter(base, tmp_path / "adapter", False)
    ours = merge_adapters(base, adapter, tmp_path / "out", dtype=str(DTYPES[wanted]).removeprefix("torch."))
    oracle = merge_with_peft(base, adapter, torch.float32, False)
    assert {value.dtype for value in ours.values()} == {DTYPES[wanted]}
    assert all(torch.equal(value, oracle[name].to(DTYPES[wanted])) for name, value in ours.items())
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == DTYPES[wanted]


def test_shards_are_limited_to_max_shard_size(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", False)
    adapter = make_adapter(base, tmp_path / "adapter", False)
    whole = merge_adapters(base, adapter, tmp_path / "whole")
    cut = merge_adapters(base, adapter, tmp_path / "cut", max_shard_size="60KB")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 60_000 + 5_000 or len(load_file(file)) == 1 for file in files)
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert cut.keys() == whole.keys()
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    back = merge_adapters(tmp_path / "cut", adapter, tmp_path / "back", max_shard_size="1GB")
    assert [file.name for file in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert back.keys() == whole.keys()


# several adapters


def test_a_weighted_sum_of_adapters_equals_that_of_peft(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", False)
    first = make_adapter(base, tmp_path / "a", False)
    second = make_adapter(base, tmp_path / "b", False, r=6, lora_alpha=5, target_modules=["q", "wo"])
    change = {name: 1.5 * value for name, value in load_file(second / "adapter_model.safetensors").items()}
    save_file(change, second / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(load_stock_base(base, torch.float32, False), first, "a")
    model.load_adapter(second, "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    oracle = model.merge_and_unload().state_dict()
    ours = merge_adapters(base, [first, second], tmp_path / "out", weights=[0.7, -0.3])
    assert_same_bits(ours, oracle, base, 10)


def test_a_sum_of_rslora_adapters_equals_the_sum_of_their_merges(
    bases: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    base = bases("fp32", True)
    adapters = [
        make_adapter(base, tmp_path / name, True, use_rslora=True, r=rank) for name, rank in (("a", 4), ("b", 2))
    ]
    before = load_file(base / "model.safetensors")
    ours = merge_adapters(base, adapters, tmp_path / "out", weights=[0.25, 2.0], verify=True)
    parts = [merge_adapters(base, adapter, tmp_path / "part") for adapter in adapters]
    for name, value in before.items():
        expected = value + 0.25 * (parts[0][name] - value) + 2.0 * (parts[1][name] - value)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5)


def test_token_rows_and_whole_modules_change_by_weighted_differences(
    bases: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    base = bases("fp32", False)
    adapters = []
    for name, ids in (("a", [290, 7]), ("b", [7, 31])):
        rows = {"shared": ids, "lm_head": ids}
        adapters.append(
            make_adapter(
                base, tmp_path / name, False, trainable_token_indices=rows, modules_to_save=["final_layer_norm"]
            )
        )
    before = load_file(base / "model.safetensors")
    ours = merge_adapters(base, adapters, tmp_path / "out", weights=[0.5, 0.25])
    parts = [merge_adapters(base, adapter, tmp_path / "part") for adapter in adapters]
    for name in ("shared.weight", "lm_head.weight", "decoder.final_layer_norm.weight"):
        expected = before[name] + 0.5 * (parts[0][name] - before[name]) + 0.25 * (parts[1][name] - before[name])
        assert not torch.equal(ours[name], before[name])
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-6)
