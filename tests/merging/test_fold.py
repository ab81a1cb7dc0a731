"""Merged weights, compared bit by bit with those of stock PEFT's merge_and_unload."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
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
from tests.merging.cases import change_config, change_tensors
from tests.support.models.bases import make_base

pytestmark = pytest.mark.slow

SIZES = {"d_model": 48, "d_kv": 8, "d_ff": 100, "num_layers": 1, "num_heads": 4, "vocab_size": 1536}
LINEAR = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_stock_base(folder: Path, dtype: torch.dtype, tied: bool) -> Any:
    """Load the base with stock transformers, and correct what its config says about a tied head."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    model.config.tie_word_embeddings = tied
    return model


def make_adapter(base: Path, folder: Path, tied: bool, stored_as: torch.dtype = torch.float32, **options: Any) -> Path:
    """Make an adapter with stock PEFT, with random values in every trained tensor."""
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "lora_dropout": 0.0}
    model = load_stock_base(base, torch.float32, tied)
    peft_model = get_peft_model(model, LoraConfig(**defaults | options, task_type=TaskType.SEQ_2_SEQ_LM))
    torch.manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            size = 1 + torch.rand_like(parameter) if "magnitude" in name else 0.2 * torch.randn_like(parameter)
            parameter.data = (parameter + size if "lora_" in name else size).to(stored_as)
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


def check_merge(base: Path, folder: Path, dtype: str, tied: bool, moved: int = 10, **options: Any) -> None:
    """Check that merging an adapter with these options gives the bits of PEFT."""
    adapter = make_adapter(base, folder / "adapter", tied, **options)
    oracle = merge_with_peft(base, adapter, DTYPES[dtype], tied)
    assert_same_bits(merge_adapters(base, adapter, folder / "out"), oracle, base, moved)


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
    # PEFT's rule: each module whose path ends with the name, with its submodules
    "whole modules": {"modules_to_save": ["DenseReluDense", "layer_norm"], "target_modules": ["q", "v"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    root = tmp_path_factory.mktemp("bases")

    def find(dtype: str, tied: bool) -> Path:
        folder = root / f"{dtype}-{tied}"
        return folder if folder.exists() else make_base(folder, tied, DTYPES[dtype], **SIZES)

    return find


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows per tensor."""
    monkeypatch.setattr("t5tune.checkpoints.tensor_files.tensors.BLOCK_ELEMENTS", 1000)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants(
    "lora-fp32",
    "lora-bf16",
    "rslora-fp16",
    "rank 64-bf16",
    "patterns-fp32",
    "dora-bf16",
    "dora-fp16",
    "dora rslora-fp32",
    "olora-bf16",
    "pissa-fp32",
    "pissa-fp16",
    "whole modules-bf16",
)
def test_merged_weights_equal_pefts_bit_for_bit(
    bases: Callable[[str, bool], Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    tied = len(kind) % 2 == 0
    check_merge(bases(dtype, tied), tmp_path, dtype, tied, **KINDS[kind])


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_initializations_use_as_many_threads_as_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, kind: str
) -> None:
    """The last bits depend on the number of threads, and merge computes in its own threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if int(os.environ["OMP_NUM_THREADS"]) == 1 else 1)
    try:
        check_merge(bases("fp32", False), tmp_path, "fp32", False, **KINDS[kind])
    finally:
        torch.set_num_threads(before)


def add_biases(model: Any) -> None:
    """Add biases to the q layers; T5 has no biases."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("SelfAttention.q"):
            module.bias = nn.Parameter(torch.linspace(-1, 1, module.out_features).to(module.weight.dtype))


# PEFT mistakes the bias for a matrix that lost its shape
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lora_b_bias_is_added_to_the_layers_bias(
    bases: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    base = shutil.copytree(bases(dtype, False), tmp_path / "base")

    load_plain_base = load_stock_base

    def load_with_biases(folder: Path, dtype: torch.dtype, tied: bool) -> Any:
        model = load_plain_base(bases("bf16" if dtype == torch.bfloat16 else "fp32", False), dtype, tied)
        add_biases(model)
        return model

    model = load_with_biases(base, DTYPES[dtype], False)
    biases = {name: value.detach() for name, value in model.named_parameters() if name.endswith("bias")}
    save_file(load_file(base / "model.safetensors") | biases, base / "model.safetensors")
    monkeypatch.setattr("tests.merging.test_fold.load_stock_base", load_with_biases)
    check_merge(base, tmp_path, dtype, False, 4, target_modules=r".*SelfAttention\.q", lora_bias=True)
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.bias") for name in trained)


def test_a_lora_b_bias_without_a_layer_bias_is_refused(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", False)
    adapter = make_adapter(base, tmp_path / "adapter", False)
    change_config(lora_bias=True)(adapter)
    layer = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_B"
    change_tensors(lambda s: s.update({f"{layer}.bias": torch.zeros(len(s[f"{layer}.weight"]))}))(adapter)
    merge_adapters(base, adapter, tmp_path / "out")
    change_tensors(lambda s: s[f"{layer}.bias"].add_(1))(adapter)
    with pytest.raises(CheckpointError, match="has no bias to add it to"):
        merge_adapters(base, adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_an_adapter_converted_to_plain_lora_merges_as_in_peft(
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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_token_rows_equal_pefts(
    bases: Callable[[str, bool], Path], tmp_path: Path, tied: bool, dtype: str
) -> None:
    base = bases(dtype, tied)
    ids = [290, 7, 299]
    rows: Any = ids if tied else {"shared": ids, "lm_head": ids}
    check_merge(base, tmp_path, dtype, tied, 11, trainable_token_indices=rows)
    before, ours = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name in before.keys() & {"shared.weight", "lm_head.weight"}:
        assert (before[name] != ours[name]).any(1).nonzero().flatten().tolist() == sorted(ids)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_half_precision_adapter_merges_as_in_peft(
    bases: Callable[[str, bool], Path], tmp_path: Path, dtype: str
) -> None:
    check_merge(bases("bf16", False), tmp_path, "bf16", False, stored_as=DTYPES[dtype])
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in trained.values()} == {DTYPES[dtype]}


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


def test_a_weighted_sum_of_adapters_equals_pefts(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", False)
    first = make_adapter(base, tmp_path / "a", False)
    second = make_adapter(base, tmp_path / "b", False, r=6, lora_alpha=5, target_modules=["q", "wo"])
    change_tensors(lambda s: [value.mul_(1.5) for value in s.values()])(second)
    model = PeftModel.from_pretrained(load_stock_base(base, torch.float32, False), first, "a")
    model.load_adapter(second, "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    oracle = model.merge_and_unload().state_dict()
    ours = merge_adapters(base, [first, second], tmp_path / "out", weights=[0.7, -0.3])
    assert_same_bits(ours, oracle, base, 10)


def test_a_sum_of_rslora_adapters_equals_summed_merges(bases: Callable[[str, bool], Path], tmp_path: Path) -> None:
    base = bases("fp32", True)
    adapters = [make_adapter(base, tmp_path / str(rank), True, use_rslora=True, r=rank) for rank in (4, 2)]
    before = load_file(base / "model.safetensors")
    ours = merge_adapters(base, adapters, tmp_path / "out", weights=[0.25, 2.0], verify=True)
    parts = [merge_adapters(base, adapter, tmp_path / "part") for adapter in adapters]
    for name, value in before.items():
        expected = value + 0.25 * (parts[0][name] - value) + 2.0 * (parts[1][name] - value)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5)


def test_token_rows_and_modules_change_by_weighted_differences(
    bases: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    base = bases("fp32", False)
    make = partial(make_adapter, base, tied=False, modules_to_save=["final_layer_norm"])
    adapters = [
        make(tmp_path / name, trainable_token_indices={"shared": ids, "lm_head": ids})
        for name, ids in (("a", [290, 7]), ("b", [7, 31]))
    ]
    before = load_file(base / "model.safetensors")
    ours = merge_adapters(base, adapters, tmp_path / "out", weights=[0.5, 0.25])
    parts = [merge_adapters(base, adapter, tmp_path / "part") for adapter in adapters]
    for name in ("shared.weight", "lm_head.weight", "decoder.final_layer_norm.weight"):
        expected = before[name] + 0.5 * (parts[0][name] - before[name]) + 0.25 * (parts[1][name] - before[name])
        assert not torch.equal(ours[name], before[name])
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-6)
