"""Libraries don't load torch's compiler before they need it."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from t5tune.compat.lazy_compiling import compile_at_first_call


def test_functions_are_compiled_once_and_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, object]]] = []

    def compile_(function: Callable[[int], int], **options: object) -> Callable[[int], int]:
        compiled.append((function.__name__, options))
        return lambda value: 10 * function(value)

    monkeypatch.setattr(torch, "compile", compile_)
    with compile_at_first_call():

        @torch.compile
        def add_one(value: int) -> int:
            return value + 1

        @torch.compile(dynamic=False)
        def add_two(value: int) -> int:
            return value + 2

    assert torch.compile is compile_
    assert add_one.__name__ == "add_one"
    assert compiled == []
    assert [add_two(1), add_two(2)] == [30, 40]
    assert compiled == [("add_two", {"dynamic": False})]
    assert add_one(1) == 20


def test_training_s_imports_leave_out_torch_s_compiler() -> None:
    code = """
import sys
from t5tune import TrainSettings
import torch, t5tune.training.run, bitsandbytes, deepspeed.runtime.zero.muon.original_muon
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "False torch\n"
