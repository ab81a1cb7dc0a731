"""Libraries load torch's compiler, and each other, only when they are used."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t5tune.compat.lazy_imports import compile_at_first_call
from t5tune.io.processes import make_module_environment

pytestmark = pytest.mark.slow


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


def list_imported(code: str, tmp_path: Path) -> set[str]:
    """Run code in a new process, and return the modules that it has imported."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **make_module_environment()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {*done.stdout.splitlines()[-1].split()}


UNUSED = {"bitsandbytes", "deepspeed", "scipy", "sklearn", "datasets", "pandas", "wandb", "mlflow", "trackio"}


def test_chat_and_training_import_only_what_they_use(tmp_path: Path) -> None:
    run = 'from t5tune.cli import run; assert run("{}".split()) == 0'
    chat = run.format("chat pocket --prompt hello")
    unused = f"assert not {{*sys.modules}} & { {*UNUSED, 'peft', 'transformers.trainer'} }, sys.modules"
    words = "train --model-name-or-path pocket --data-path pocket --num-data 20 --max-steps 1 --output-dir run"
    imported = list_imported(f"{chat}; {unused}\n{run.format(words)}", tmp_path)
    assert not imported & UNUSED
    assert "peft" in imported


def test_a_process_that_only_starts_ranks_does_not_import_torch(tmp_path: Path) -> None:
    code = """
from contextlib import ExitStack
from t5tune.commands.train import set_up_run_folder
from t5tune.settings import TrainSettings

values = {"model_name_or_path": "pocket", "data_path": "pocket", "num_data": 20, "num_processes": 2}
with ExitStack() as stack:
    set_up_run_folder(TrainSettings(**values, output_dir="run", lr_scheduler_type="cosine"), stack)
"""
    assert not list_imported(code, tmp_path) & {"torch", "transformers"}


def test_libraries_are_used_as_soon_as_they_are_imported(tmp_path: Path) -> None:
    code = """
from t5tune import TrainSettings
import torch, t5tune.training.run
import accelerate.utils.other, peft.helpers, peft.import_utils
import transformers.loss.loss_for_object_detection as loss

assert not peft.import_utils.is_bnb_available() and "bitsandbytes" not in sys.modules
import bitsandbytes
assert peft.import_utils.is_bnb_available() and peft.import_utils.is_bnb_4bit_available()
assert not accelerate.utils.other.is_deepspeed_available()
import deepspeed.runtime.zero.muon.original_muon
assert accelerate.utils.other.is_deepspeed_available()
assert torch.compile.__module__ == "torch"
assert loss.linear_sum_assignment  # outside of the command line, other models need it
"""
    assert "torch._inductor.compile_fx" not in list_imported(code, tmp_path)
