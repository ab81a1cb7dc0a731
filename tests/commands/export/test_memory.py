"""The peak memory of an export."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


def peak_of_export(folder: Path, output: Path, *flags: str) -> int:
    """Return the peak memory (MiB) of a process that exports on the command line."""
    code = (
        "import sys; from t5tune.cli import run\n"
        "assert run(['export', sys.argv[1], '--output-dir', *sys.argv[2:], '--quiet']) == 0\n"
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)"
    )
    command = [sys.executable, "-c", code, str(folder), str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def make_sparse_checkpoint(folder: Path, **config: int) -> int:
    """Make a checkpoint of any size whose frozen weights are holes in sparse files. Return the adapter's bytes."""
    path = REPOSITORY / "benchmarks" / "export.py"
    spec = importlib.util.spec_from_file_location("export_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(benchmark)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **config}))
    return int(benchmark.make_checkpoint(folder, file))


def test_exporting_an_11b_adapter_needs_memory_only_for_it(tmp_path: Path) -> None:
    """The checkpoint has 22 GB of frozen weights, which aren't read."""
    shape = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
    size = make_sparse_checkpoint(tmp_path / "xxl", **shape)
    assert sum(path.stat().st_size for path in (tmp_path / "xxl").rglob("*.pt")) > 22e9
    peak = peak_of_export(tmp_path / "xxl", tmp_path / "adapter")
    assert size > 37e6
    assert peak <= 150


def test_the_full_state_is_streamed(tmp_path: Path) -> None:
    shape = {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 1024, "num_layers": 1, "vocab_size": 150_000}
    make_sparse_checkpoint(tmp_path / "wide", **shape)
    peak = peak_of_export(tmp_path / "wide", tmp_path / "adapter", "--non-lora-state", "full")
    assert (tmp_path / "adapter" / "non_lora_state.safetensors").stat().st_size > 600e6
    assert peak <= 150
