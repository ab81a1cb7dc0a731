"""Models with different adapters on the weights of one base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.train import train
from t5tune.inference.loading import load_for_inference
from t5tune.inference.shared_bases import SharedBases
from t5tune.settings import TrainSettings
from t5tune.settings.groups.base import InferenceSettings
from tests.support.adapters import load_stock_base, make_rows_adapter, make_stock_adapter

pytestmark = pytest.mark.slow

IDS = torch.tensor([[40, 50, 60, 1], [70, 80, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
WAYS: list[dict[str, Any]] = [{}, {"q_lora": True}, {"q_lora": True, "quant_type": "int8"}, {"bf16": True}]


@pytest.fixture(scope="module")
def adapters(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PEFT's own, one with token rows, and one with DoRA, whole modules and rows that t5tune trained."""
    folder = tmp_path_factory.mktemp("adapters")
    run = train(
        TrainSettings(
            model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=folder / "run", max_steps=4,
            learning_rate=2e-2, use_cpu=True, report_samples=0, use_dora=True, modules_to_save=["layer_norm"],
        )
    ).run  # fmt: skip
    return [
        make_stock_adapter(untied_base, folder / "stock"),
        make_rows_adapter(untied_base, folder / "rows")[0],
        run,
    ]


def compute_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=torch.tensor([[0, 9], [0, 30]]))
    return found.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS, ids=["fp32", "nf4", "int8", "bf16"])
def test_each_model_computes_the_bits_that_it_does_alone(
    way: dict[str, Any], adapters: list[Path], untied_base: Path
) -> None:
    settings = [
        InferenceSettings(model_name_or_path=str(untied_base), adapter=adapter, use_cpu=True, **way)
        for adapter in (None, *adapters)
    ]
    alone = [compute_logits(load_for_inference(each).model) for each in settings]
    assert not any(alone[0].equal(other) for other in alone[1:])
    bases = SharedBases()
    models = [load_for_inference(each, load_base=bases.load).model for each in settings]
    for _ in range(2):  # also after the others have computed
        for model, expected in zip(models, alone, strict=True):
            assert compute_logits(model).equal(expected)
    for model, expected in reversed(list(zip(models, alone, strict=True))):
        assert compute_logits(model).equal(expected)


def test_the_weights_of_the_base_are_in_memory_once_and_stay_those_of_its_file(
    adapters: list[Path], untied_base: Path
) -> None:
    bases = SharedBases()
    models = []
    for adapter in (None, *adapters):
        settings = InferenceSettings(model_name_or_path=str(untied_base), adapter=adapter, use_cpu=True)
        models.append(load_for_inference(settings, load_base=bases.load).model)
    storages = [{parameter.data_ptr(): parameter for parameter in model.parameters()} for model in models]
    own = storages[0]
    for other in storages[1:]:
        assert own.keys() <= other.keys()
        size = sum(parameter.numel() for place, parameter in other.items() if place not in own)
        assert size < 60_000  # of the adapter; the base has 140,000
    stock = load_stock_base(untied_base)
    for name, parameter in stock.named_parameters():
        assert models[0].get_parameter(name).equal(parameter), name
    other_dtype = InferenceSettings(model_name_or_path=str(untied_base), bf16=True, use_cpu=True)
    assert load_for_inference(other_dtype, load_base=bases.load).model.dtype == torch.bfloat16
