"""Plans of small models."""

import json
from pathlib import Path
from typing import Any

from t5tune.commands.plan import Plan, plan
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings import PlanSettings

NO_SUGGESTION: dict[str, Any] = {"use_cpu": True, "gpu_memory": "1MiB"}  # nothing fits, which saves time


def make_plan(model: str | Path, **changes: Any) -> Plan:
    return plan(PlanSettings(model_name_or_path=str(model), **changes))


def write_short_model(folder: Path, **changes: Any) -> Path:
    """Write a config.json like Flan-T5 small's, with two blocks."""
    shape = {**KNOWN_CONFIGS["google/flan-t5-small"], "num_layers": 2, "num_decoder_layers": 2, **changes}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder
