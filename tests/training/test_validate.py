"""Settings that can't work together are refused before anything is loaded."""

import json
from pathlib import Path

import pytest

from t5tune.errors import SettingsError
from t5tune.settings import TrainSettings
from t5tune.training.validate import check_settings


def test_a_deepspeed_config_with_which_weights_would_be_saved_under_other_names_is_refused(tmp_path: Path) -> None:
    """With DeepSpeed 0.19.8, the adapter of two ranks differed from that of the same run without it by 0.19."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    settings = TrainSettings(
        model_name_or_path="pocket",
        data_path="pocket",
        output_dir=tmp_path / "run",
        deepspeed=str(config),
        use_cpu=True,
    )
    with pytest.raises(SettingsError, match=r"config\.json: round_robin_gradients: DeepSpeed saves the weights under"):
        check_settings(settings)
