"""Settings and data of scripts that use `from t5tune import …`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from t5tune import TrainSettings

PAIRS = [{"source": f"How much is {a} + {b}?", "target": str(a + b)} for a in range(6) for b in range(6)]


def make_settings(folder: Path, **changes: Any) -> TrainSettings:
    values = {"model_name_or_path": "pocket", "data_path": PAIRS, "output_dir": folder / "run", "max_steps": 2}
    return TrainSettings(**{**values, "report_samples": 0, "use_cpu": True, "learning_rate": 3e-3, **changes})


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=500)
