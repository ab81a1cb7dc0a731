"""Measure the shared memory that attention's kernels take, by GPU, width of heads and number of stages.

    python -m tests.support.gpu.shared_memory --update      # tests/golden/shared_memory.json, for docs/support.md

It takes about 20 minutes.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from t5tune.model.kernels.flex_check import FEWER_STAGES
from tests.support.gpu.fake_cuda_stubs import StubsUnavailable
from tests.support.gpu.pretend_gpu import GPUS
from tests.support.gpu.triton_folder import TRITON_FOLDER, make_environment
from tests.support.paths import REPOSITORY

GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "shared_memory.json"
WIDTHS = 64, 128, 256
# with bias, a causal mask and dropout: the other kinds take as much or less
LARGEST = "decoder, dropout 0.1"
DEFAULT = "default"
STAGES = {DEFAULT: None, **{str(number): number for number in FEWER_STAGES}}


def compile_kernels(capability: int, width: int, *options: str) -> dict[str, dict[str, int]]:
    """Compile for a GPU in a separate process.

    Raises:
        StubsUnavailable: this machine can't.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.gpu.flex_compilation", f"{capability}", f"{width}"]
    done = subprocess.run(
        [*command, *options], cwd=REPOSITORY, env=make_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if reason := found.get("unavailable"):
        raise StubsUnavailable(reason)
    for name, kernels in found.items():
        assert "error" not in kernels, (name, kernels)
    return found


def measure(capability: int, width: int, stages: str) -> dict[str, int]:
    """Measure the largest kernels of the forward and the backward pass, in bytes."""
    options = [] if stages == DEFAULT else ["--stages", stages]
    kernels = compile_kernels(capability, width, "--sizes", "--only", LARGEST, *options)[LARGEST]
    sizes = {"forward": 0, "backward": 0}
    for name, size in kernels.items():
        if name.startswith("triton_tem_"):
            part = "backward" if "backward" in name else "forward"
            sizes[part] = max(sizes[part], size)
    return sizes


def read_versions() -> dict[str, str]:
    """Read the releases that determine the sizes."""
    folders = [*sys.path, str(TRITON_FOLDER)]
    (triton,) = importlib.metadata.distributions(name="triton", path=folders)
    return {"torch": importlib.metadata.version("torch").partition("+")[0], "triton": triton.version}


def measure_until_it_fits(capability: int, width: int) -> dict[str, dict[str, int]]:
    """Measure with fewer and fewer stages, as a run tries them."""
    found: dict[str, dict[str, int]] = {}
    for stages in STAGES:
        found[stages] = measure(capability, width, stages)
        if max(found[stages].values()) <= GPUS[capability][1]:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--update", action="store_true", required=True, help="write the golden file")
    parser.parse_args()
    gpus = {}
    for capability, (names, available) in GPUS.items():
        sizes = {str(width): measure_until_it_fits(capability, width) for width in WIDTHS}
        gpus[str(capability)] = {"names": names, "available": available, "sizes": sizes}
        print(capability, sizes, file=sys.stderr)
    GOLDEN_FILE.write_text(json.dumps({**read_versions(), "gpus": gpus}, indent=1) + "\n")


if __name__ == "__main__":
    main()
