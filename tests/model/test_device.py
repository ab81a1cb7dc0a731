"""Devices, memory and threads."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.model.device import SPIN_VARIABLES, check_bf16
from t5tune.model.inference import load_adapter, load_weighted_sum
from t5tune.model.load import load_base
from t5tune.training.validate import check_settings
from tests.support import train_runs
from tests.support.paths import REPOSITORY

STEPS = """
import resource, torch
from t5tune.model.device import keep_freed_memory
if {kept}:
    keep_freed_memory()
def step():
    return sum((torch.ones(4 << 20) * factor).sum() for factor in range(4))
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_reused_without_new_page_faults() -> None:
    """Count minor page faults in four steps, each with eight tensors of 16 MiB (4,096 pages)."""
    faults = {}
    for kept in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", STEPS.format(kept=kept)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
        )
        assert done.returncode == 0, done.stderr
        faults[kept] = int(done.stdout)
    if faults[False] < 10_000:
        pytest.skip("this malloc reuses large memory by itself")
    assert faults[True] < faults[False] / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "spins"),
    [("", "", "3000"), ("OMP_WAIT_POLICY", "PASSIVE", "0"), ("GOMP_SPINCOUNT", "7", "7")],
)
def test_openmp_threads_spin_briefly_unless_the_user_sets_it(variable: str, value: str, spins: str) -> None:
    """As GNU's OpenMP prints it when torch is imported."""
    environment = {name: text for name, text in os.environ.items() if name not in SPIN_VARIABLES}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({variable: value} if variable else {})
    command = [sys.executable, "-m", "t5tune", "chat", "--model-name-or-path", "pocket", "--prompt", "Say hello."]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch uses another OpenMP")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {spins}


make_settings = functools.partial(
    train_runs.make_settings, max_steps=2, save_steps=500, lora_r=64, lora_target_modules=["all-linear"]
)


def test_paged_optimizers_are_refused_without_a_gpu(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="optim: paged_adamw_8bit: paged optimizers need a GPU"):
        check_settings(make_settings(untied_base, conversations, tmp_path / "run", optim="paged_adamw_8bit"))


def test_an_8_bit_optimizer_trains_and_is_saved_in_8_bits(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", optim="adamw_bnb_8bit"))
    state = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    kept = [value for part in state.values() for value in list_tensors(part) if value.numel() >= 4096]
    assert {value.dtype for value in kept} == {torch.uint8}


def list_tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in list_tensors(part)]
    return [value] if hasattr(value, "numel") else []


@pytest.mark.slow
def test_an_adapter_is_loaded_onto_the_device_of_its_model(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default PEFT chooses the first GPU, which `chat --use-cpu` must not use."""
    train(make_settings(untied_base, conversations, tmp_path / "run", optim="adamw_torch"))
    for module in ("peft.peft_model", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.infer_device", lambda: "cuda")
    model = load_base(untied_base, torch.float32, torch.device("cpu"))
    loaded = load_adapter(model, tmp_path / "run")
    assert {value.device.type for value in loaded.parameters()} == {"cpu"}
    model = load_base(untied_base, torch.float32, torch.device("cpu"))
    summed = load_weighted_sum(model, [tmp_path / "run", tmp_path / "run"], [0.5, 0.5])
    assert {value.device.type for value in summed.parameters()} == {"cpu"}


def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    generation = SimpleNamespace(major=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: generation)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    with pytest.raises(SettingsError, match="bf16: Tesla T4 has no bf16 arithmetic") as raised:
        check_bf16(torch.device("cuda"))
    assert "--no-bf16" in str(raised.value.hint)
    check_bf16(torch.device("cpu"))
    generation.major = 8
    check_bf16(torch.device("cuda"))
