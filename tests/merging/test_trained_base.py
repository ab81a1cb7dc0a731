"""Merging into the weights that an adapter was trained on, or into different weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from t5tune.errors import SettingsError
from tests.merging.cases import PREFIX, read_weights, run_merge
from tests.merging.test_merge import SCALE
from tests.support.models.adapters import add_base_metadata, load_stock_base, make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.notes import Notes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained_differently(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained-differently")
    about: dict[str, dict[str, Any]] = {
        "plain": {"bf16": True},
        "fp32": {"bf16": False},
        "nf4": {"bf16": True, "onto": "nf4"},
        "single": {"bf16": True, "onto": "nf4", "double_quant": False},
        "fp4": {"bf16": True, "onto": "fp4"},
    }
    return {
        name: add_base_metadata(untied_base, make_stock_adapter(untied_base, folder / name), **more)
        for name, more in about.items()
    }


def merge_two(base: Path, adapters: dict[str, Path], names: tuple[str, ...], output: Path, **changes: Any) -> list[str]:
    notes, folders = Notes(), [adapters[name] for name in names]
    run_merge(base, folders, output, notes, weights=[0.5, 0.5], verify=False, **changes)
    return notes


@pytest.mark.parametrize(
    ("names", "bases", "flags"),
    [
        (("plain", "nf4"), ("the unquantized base", "an nf4 base"), "--onto base or --onto nf4"),
        (("nf4", "plain"), ("an nf4 base", "the unquantized base"), "--onto nf4 or --onto base"),
        (("nf4", "single"), ("an nf4 base", "an nf4 base without double quantization"), "--onto nf4"),
        (("fp4", "nf4"), ("an fp4 base", "an nf4 base"), "--onto fp4 or --onto nf4"),
    ],
)
def test_adapters_of_different_quantizations_need_onto(
    names: tuple[str, str], bases: tuple[str, str], flags: str, untied_base: Path,
    trained_differently: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(SettingsError) as caught:
        merge_two(untied_base, trained_differently, names, tmp_path / "merged")
    first, second = (f"{trained_differently[name]} on {base}" for name, base in zip(names, bases, strict=True))
    assert caught.value.message == f"adapter: trained differently: {first} and {second}"
    assert caught.value.hint == f"merge all adapters with {flags}"
    assert not (tmp_path / "merged").exists()


def test_merge_names_adapters_trained_on_different_weights(
    untied_base: Path, trained_differently: dict[str, Path], tmp_path: Path
) -> None:
    def list_misfits(*names: str, **changes: Any) -> list[str]:
        output = tmp_path / "-".join((*names, *changes.values()))
        notes = merge_two(untied_base, trained_differently, names, output, **changes)
        return [text for text in notes if "but merging into" in text]

    nf4, plain, single = (trained_differently[name] for name in ("nf4", "plain", "single"))
    closer = "--onto nf4 comes closer to the training model's predictions"
    for names in (("plain", "nf4"), ("nf4", "plain")):
        assert list_misfits(*names, onto="base") == [
            f"{nf4}: trained on an nf4 base, but merging into the unquantized base; {closer}"
        ]
        assert list_misfits(*names, onto="nf4") == [
            f"{plain}: trained on the unquantized base, but merging into an nf4 base"
        ]
    assert list_misfits("nf4", "single", onto="nf4") == [
        f"{single}: trained on an nf4 base without double quantization, but merging into an nf4 base"
    ]


def test_adapters_of_different_dtypes_are_summed_with_a_note(
    untied_base: Path, trained_differently: dict[str, Path], tmp_path: Path
) -> None:
    notes = merge_two(untied_base, trained_differently, ("plain", "fp32"), tmp_path / "merged")
    bf16, fp32 = trained_differently["plain"], trained_differently["fp32"]
    assert any(text == f"adapter: trained in different dtypes: {fp32} in fp32 and {bf16} in bf16" for text in notes)


# PEFT's warning; they never were tied
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", None])
def test_merge_takes_the_weights_of_training_bit_by_bit(kind: str | None, untied_base: Path, tmp_path: Path) -> None:
    """The result equals a merge with --onto, and PEFT's merge into the weights that bitsandbytes dequantizes."""
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    add_base_metadata(untied_base, adapter, bf16=False, compute="float32", **({} if kind is None else {"onto": kind}))
    notes = Notes()
    found = run_merge(untied_base, adapter, tmp_path / "merged", notes, verify=False)
    given = run_merge(untied_base, adapter, tmp_path / "given", onto=kind or "base", verify=False)
    assert found.onto == given.onto == (kind or "base")
    said = f"merging into an {kind} base, as in training; --onto base merges into the unquantized base"
    assert (said in notes) is (kind is not None)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert read_weights(tmp_path / "merged") == read_weights(tmp_path / "given")
    model = load_stock_base(untied_base)
    if kind is not None:
        dequantize(model, kind)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name


def dequantize(model: Any, kind: str) -> None:
    """Replace the weight of each linear layer of the blocks: bitsandbytes quantizes and dequantizes it."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params

    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        if kind == "int8":
            packed = Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
            values = functional.int8_vectorwise_dequant(packed.data, packed.SCB)
        else:
            packed, state = functional.quantize_4bit(module.weight.data, compress_statistics=True, quant_type=kind)
            values = functional.dequantize_4bit(packed, state)
        module.weight.data = values


@pytest.mark.parametrize("kind", ["nf4", "fp4"])  # int8 rounds activations, too, which no merge can reproduce
def test_merging_onto_quantized_weights_is_closer_to_the_training_model(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", tied=False, d_model=64, d_kv=16, d_ff=128)
    adapter = add_base_metadata(base, make_stock_adapter(base, tmp_path / "adapter"), onto=kind, compute="float32")
    notes = Notes()
    onto = run_merge(base, adapter, tmp_path / "onto", notes, onto=kind)
    assert onto.from_training[kind] < 0.2 * onto.from_training["base"]
    assert any(f"merged into {kind}" in text for text in notes)
    plain = run_merge(base, adapter, tmp_path / "plain", notes, onto="base")
    assert any(f"--onto {kind}" in text for text in notes.warnings)
    assert plain.from_training == pytest.approx(onto.from_training, rel=0.2, abs=2e-3)
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "onto" / "model.safetensors")
    untouched = "encoder.block.0.layer.1.DenseReluDense.wo.weight"  # not adapted, but quantized in training
    assert not torch.equal(weights[untouched], merged[untouched])
    assert torch.equal(weights["shared.weight"], merged["shared.weight"])


def test_merging_keeps_wo_if_training_did_not_quantize_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, d_model=64, d_kv=16, d_ff=128)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    add_base_metadata(base, adapter, onto="nf4", compute="float32", quantize_wo=False)
    onto = run_merge(base, adapter, tmp_path / "onto", onto="nf4")
    assert onto.from_training["nf4"] < 0.2 * onto.from_training["base"]
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "onto" / "model.safetensors")
    layer = "encoder.block.0.layer.1.DenseReluDense"
    assert torch.equal(weights[f"{layer}.wo.weight"], merged[f"{layer}.wo.weight"])
    assert not torch.equal(weights[f"{layer}.wi_0.weight"], merged[f"{layer}.wi_0.weight"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weights_equal_those_of_bitsandbytes(tmp_path: Path, kind: str) -> None:
    import bitsandbytes.functional as functional

    base = make_base(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
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
