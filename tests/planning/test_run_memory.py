"""The inputs of an estimate of an evaluation's memory."""

from pathlib import Path

import pytest

from t5tune.families import find_architecture
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.planning.layer_memory import BatchLengths
from t5tune.planning.run_memory import Machine, MemoryEstimator
from t5tune.settings import PlanSettings
from t5tune.settings.groups.memory import MemorySettings

pytestmark = pytest.mark.slow


def test_a_longer_example_takes_more_memory() -> None:
    config = {**KNOWN_CONFIGS["google/flan-t5-small"], "num_layers": 1, "num_decoder_layers": 1}
    settings = PlanSettings(model_name_or_path="google/flan-t5-small", packing="off")
    machine = Machine(on_gpu=True, count=1, memory=None, name="GPU", has_bf16=False)
    architecture = find_architecture(config, Path("flan-t5-small"))
    estimator = MemoryEstimator(architecture, settings.select_part(MemorySettings), machine, 0, lambda _: None)
    lengths = [BatchLengths((length,), (8,)) for length in (4000, 8000)]
    short, long = (estimator.estimate_evaluation("none", each) for each in lengths)
    assert short + (512 << 20) < long
