"""Models with different adapters on the weights of one base."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.train import train
from t5tune.inference.loading import load_for_inference
from t5tune.inference.shared_bases import SharedBases
from t5tune.settings.groups.base import InferenceSettings
from tests.support.models.adapters import compute_logits, load_stock_base, make_rows_adapter, make_stock_adapter
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

PRECISIONS: list[dict[str, Any]] = [{}, {"q_lora": True}, {"q_lora": True, "quant_type": "int8"}, {"bf16": True}]


@pytest.fixture(scope="module")
def adapters(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter of PEFT, an adapter with token rows, and a run with DoRA, whole modules and token rows."""
    folder = tmp_path_factory.mktemp("adapters")
    changes = {"use_dora": True, "modules_to_save": ["layer_norm"], "max_steps": 4}
    return [
        make_stock_adapter(untied_base, folder / "stock"),
        make_rows_adapter(untied_base, folder / "rows")[0],
        train(make_settings(untied_base, conversations, folder / "run", **changes)).run,
    ]


def list_settings(base: Path, adapters: list[Path], **precision: Any) -> list[InferenceSettings]:
    """List the settings of the base alone, and with each adapter."""
    values = {"model_name_or_path": str(base), "use_cpu": True, **precision}
    return [InferenceSettings(**values, adapter=adapter) for adapter in (None, *adapters)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "nf4", "int8", "bf16"])
@pytest.mark.variants("fp32", "nf4")
def test_a_shared_base_changes_no_bit_of_a_model(
    precision: dict[str, Any], adapters: list[Path], untied_base: Path
) -> None:
    settings = list_settings(untied_base, adapters, **precision)
    alone = [compute_logits(load_for_inference(each).model) for each in settings]
    assert not any(alone[0].equal(other) for other in alone[1:])
    bases = SharedBases()
    models = [load_for_inference(each, load_base=bases.load).model for each in settings]
    for _ in range(2):  # also after the other models have computed
        for model, expected in zip(models, alone, strict=True):
            assert compute_logits(model).equal(expected)
    for model, expected in reversed(list(zip(models, alone, strict=True))):
        assert compute_logits(model).equal(expected)


def test_the_base_is_in_memory_once_and_unchanged(adapters: list[Path], untied_base: Path) -> None:
    bases = SharedBases()
    models = [load_for_inference(each, load_base=bases.load).model for each in list_settings(untied_base, adapters)]
    first, *others = [{parameter.data_ptr(): parameter for parameter in model.parameters()} for model in models]
    for other in others:
        assert first.keys() <= other.keys()
        size = sum(parameter.numel() for address, parameter in other.items() if address not in first)
        assert size < 60_000  # parameters of the adapter; the base has 140,000
    stock = load_stock_base(untied_base)
    for name, parameter in stock.named_parameters():
        assert models[0].get_parameter(name).equal(parameter), name
    other_dtype = InferenceSettings(model_name_or_path=str(untied_base), bf16=True, use_cpu=True)
    assert load_for_inference(other_dtype, load_base=bases.load).model.dtype == torch.bfloat16


def test_a_base_is_loaded_again_only_after_its_files_changed(untied_base: Path) -> None:
    bases = SharedBases()
    arguments = (untied_base, torch.float32, torch.device("cpu"))
    first, second, changed = (bases.load(*arguments, files=files) for files in ("a", "a", "b"))
    assert first.shared.weight is second.shared.weight
    assert changed.shared.weight is not first.shared.weight
    weight = weakref.ref(first.shared.weight)
    del first
    assert weight() is second.shared.weight
    gc.disable()  # the command line keeps Python from looking for cycles
    try:
        del second
        assert weight() is None
    finally:
        gc.enable()
