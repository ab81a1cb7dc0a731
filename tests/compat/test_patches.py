"""Patches of other libraries: each is undone at the end of its block."""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d
from torch.nn import functional

from t5tune.compat.python_patches import restore_environment
from t5tune.compat.torch_patches import collect_save_errors, replace_attention_kernel, use_default_timeout
from t5tune.compat.transformers_patches import replace_forwards


def test_process_groups_without_a_timeout_get_the_default() -> None:
    names = ("gloo", "cpu:gloo,cuda:nccl")  # the second has one timeout for both of its backends

    def read_timeouts() -> list[timedelta]:
        return [distributed_c10d._get_default_timeout(distributed_c10d.Backend(name)) for name in names]

    before = read_timeouts()
    with use_default_timeout(timedelta(seconds=7)):
        assert read_timeouts() == [timedelta(seconds=7)] * 2
    assert read_timeouts() == before


def test_torch_save_errors_give_the_system_s_reason(tmp_path: Path) -> None:
    save = torch.save
    with collect_save_errors() as failures:
        torch.save({"a": torch.ones(3)}, tmp_path / "new folder" / "a.pt")
        torch.save(torch.ones(1 << 16), "/dev/full")
    assert torch.save is save
    assert torch.load(tmp_path / "new folder" / "a.pt")["a"].tolist() == [1, 1, 1]
    (failure,) = failures
    assert failure.message == "/dev/full: No space left on device (errno 28)"


def test_an_error_restores_the_attention_kernel_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "old")
    kernel = functional.scaled_dot_product_attention

    def fail() -> None:
        with restore_environment(), replace_attention_kernel(lambda *_: torch.zeros(1)):
            os.environ.update(KEPT="new", ADDED="1")
            assert functional.scaled_dot_product_attention() == 0  # type: ignore[call-arg]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert functional.scaled_dot_product_attention is kernel
    assert os.environ["KEPT"] == "old"
    assert "ADDED" not in os.environ


def test_only_the_named_layers_get_a_new_forward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    x = torch.ones(1, 2)
    expected = model[0](x)
    replace_forwards(model, {"Linear": lambda module, forward, *args: forward(*args) * module.in_features})
    assert model[0](x).equal(2 * expected)
    assert model(x).equal((2 * expected).relu())


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_cublas_is_found_in_the_folder_of_its_package(tmp_path: Path) -> None:
    """Afterwards its name alone is enough, as CTranslate2 loads it."""
    code = """
import ctypes
from t5tune.compat.ctranslate2_patches import load_cublas
print(load_cublas())
ctypes.CDLL("libcublas.so.12")
"""

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    without = run()
    if without.stdout == "True\n":
        pytest.skip("this machine has cuBLAS 12")
    assert without.stdout == "False\n"
    libraries = tmp_path / "nvidia" / "cublas" / "lib"
    libraries.mkdir(parents=True)
    (tmp_path / "empty.c").touch()
    for name, *needed in (("libcublasLt.so.12",), ("libcublas.so.12", libraries / "libcublasLt.so.12")):
        command = f"cc -shared -Wl,-soname,{name} -Wl,--no-as-needed -o {name}".split()
        subprocess.run([*command, tmp_path / "empty.c", *needed], cwd=libraries, check=True)
    found = run()
    assert (found.stdout, found.returncode) == ("True\n", 0), found.stderr
