"""Plans for encoders with a head of labels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t5tune.errors import SettingsError
from t5tune.model.load import load_base
from t5tune.planning.layer_memory import build_empty_training_model, count_weight_bytes
from t5tune.settings import PlanSettings, QuantizationSettings
from tests.planning.plans import make_plan
from tests.support.models.bases import make_base
from tests.support.models.label_models import TASKS

pytestmark = pytest.mark.slow
GIB = 1 << 30
PROT_T5 = "Rostlab/prot_t5_xl_half_uniref50-enc"


@pytest.mark.long
def test_prot_t5_in_nf4_takes_4_5_gib_for_1024_residues() -> None:
    recipe = {"q_lora": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["attention"]}
    options = {"source_length": 1025, "per_device_train_batch_size": 1, "num_gpus": 1}
    plans = {
        objective: make_plan(PROT_T5, objective=objective, **recipe, **options, gradient_checkpointing=saves)
        for objective, saves in (("tag", False), ("classify", True))
    }
    trained = 2 * 1025  # the head
    assert plans["tag"].total_parameters == 1_208_141_824 + 4 * 24 * 4 * (1024 + 4096) + 2 * trained
    assert plans["tag"].trainable_parameters == 4 * 24 * 4 * (1024 + 4096) + trained
    assert plans["tag"].target_length == 0
    assert plans["tag"].stages[0].total < 4.5 * GIB
    assert plans["classify"].stages[0].total < 2 * GIB


def test_a_loaded_encoder_takes_the_planned_bytes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, d_model=64, d_ff=256, d_kv=16)
    settings = PlanSettings(model_name_or_path=str(base), bf16=True, q_lora=True, objective="tag")
    model = load_base(base, torch.bfloat16, torch.device("cpu"), QuantizationSettings(q_lora=True), task=TASKS["tag"])
    planned = count_weight_bytes(build_empty_training_model(model.architecture, settings, 0, False), settings)
    dense = [each for each in model.parameters() if getattr(each, "quant_state", None) is None]
    assert planned["head"] == 4 * (model.classifier.weight.numel() + 5)
    assert planned["embedding"] == 2 * load_file(base / "model.safetensors")["shared.weight"].numel()
    assert planned["rest"] + planned["embedding"] + planned["head"] == sum(p.nbytes for p in dense)


def test_a_plan_refuses_a_model_without_an_encoder_class() -> None:
    with pytest.raises(SettingsError, match="objective: tag: .*classifier for longt5"):
        make_plan("google/long-t5-local-base", objective="tag")
