"""Ask the Python of an environment with transformers 4 and CTranslate2, which `make compatibility` creates."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY

PYTHON = os.environ.get("TRANSFORMERS_4_PYTHON", "")
needs_transformers_4 = pytest.mark.skipif(
    not PYTHON, reason="TRANSFORMERS_4_PYTHON isn't set to a Python with transformers 4; use make compatibility"
)


def ask_transformers_4(checkpoint: Path, folder: Path, **asked: Any) -> dict[str, Any]:
    """Run tests/support/models/transformers_4.py and return its result."""
    (folder / "asked.json").write_text(json.dumps({"texts": [], "messages": None, "converted": None} | asked))
    script = REPOSITORY / "tests/support/models/transformers_4.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, str(script), str(checkpoint), str(folder / "asked.json"), str(folder / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["version"].startswith("4.")
    return found
