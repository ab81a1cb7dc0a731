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
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.inference.loading import load_adapter, load_weighted_sum
from t5tune.model.device import ALLOCATOR_VARIABLES, SPIN_VARIABLES, check_bf16, get_reserved_memory, use_gpu_kernels
from t5tune.model.load import load_base
from t5tune.progress import Note
from t5tune.training.arguments import choose_tf32, make_training_arguments
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

HOLES = """
import psutil, torch
from t5tune.model.device import return_freed_memory
if {returned}:
    return_freed_memory()
torch.ones(4 << 20)  # when 16 MiB are freed, glibc maps only larger tensors by itself
pairs = [(torch.ones(1 << 16), torch.ones(256)) for _ in range(400)]
kept = [small for _, small in pairs]
before = psutil.Process().memory_info().rss
del pairs
print((before - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_between_kept_tensors_is_returned() -> None:
    """Free 400 tensors of 256 KiB with kept tensors of 1 KiB between them, and measure how many MiB Linux gets back."""
    returned = {}
    for option in (False, True):
        command = [sys.executable, "-c", HOLES.format(returned=option)]
        returned[option] = int(subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, check=True).stdout)
    if returned[False] > 50:
        pytest.skip("this malloc returns large memory by itself")
    assert returned[True] > 90


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_reused_without_new_page_faults() -> None:
    """Count minor page faults in four steps, each with eight tensors of 16 MiB (4,096 pages)."""
    faults = {}
    for kept in (False, True):
        command = [sys.executable, "-c", STEPS.format(kept=kept)]
        faults[kept] = int(subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, check=True).stdout)
    if faults[False] < 10_000:
        pytest.skip("this malloc reuses large memory by itself")
    assert faults[True] < faults[False] / 10


@pytest.mark.long
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
        pytest.skip("this torch doesn't use GNU's OpenMP")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {spins}


make_settings = functools.partial(
    train_runs.make_settings, max_steps=2, save_steps=500, lora_r=64, lora_target_modules=["all-linear"]
)


def test_an_8_bit_optimizer_is_saved_in_8_bits(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", optim="adamw_bnb_8bit"))
    state = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    kept = [value for part in state.values() for value in list_tensors(part) if value.numel() >= 4096]
    assert {value.dtype for value in kept} == {torch.uint8}


def list_tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in list_tensors(part)]
    return [value] if hasattr(value, "numel") else []


@pytest.mark.slow
def test_an_adapter_is_loaded_onto_its_model_s_device(
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


def test_a_gpu_that_emulates_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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


CUDA = torch.device("cuda")


def read_kernel_choices() -> tuple[str, bool, bool]:
    """Read torch's choices, also by the older function that other libraries read them by."""
    is_tf32 = torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision(), is_tf32, torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("tf32", "expected"), [(True, ("high", True, False)), (False, ("highest", False, False))])
def test_kernels_of_a_gpu_are_chosen_for_a_block(tf32: bool, expected: tuple[str, bool, bool]) -> None:
    before = read_kernel_choices()
    with use_gpu_kernels(CUDA, tf32):
        assert read_kernel_choices() == expected
    assert read_kernel_choices() == before
    with use_gpu_kernels(torch.device("cpu"), tf32):
        assert read_kernel_choices() == before


@pytest.mark.parametrize(
    ("capability", "tf32", "expected"),
    [((8, 0), None, True), ((8, 0), True, True), ((9, 0), False, False), ((7, 5), None, False), ((7, 5), True, False)],
)
def test_the_trainer_leaves_tf32_to_us(
    capability: tuple[int, int], tf32: bool | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sets it so that reading it by torch's older functions raises an error."""
    plan = make_run_plan(make_settings(tmp_path, tmp_path, tmp_path / "run", tf32=tf32, use_cpu=False))
    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose_tf32(tf32, CUDA, events.append) is expected
    ignored = [Note("tf32: ignored, since Tesla T4 has no TensorFloat-32")]
    assert events == (ignored if tf32 is True and not expected else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = read_kernel_choices()
    arguments = make_training_arguments(plan, None, (), World(), torch.device("cpu"))
    assert arguments.tf32 is None
    assert read_kernel_choices() == before


def test_batches_are_copied_to_a_gpu_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_run_plan(make_settings(tmp_path, tmp_path, tmp_path / "run", use_cpu=False, optim="adamw_torch"))
    chosen: dict[str, Any] = {}

    def make_arguments(**values: Any) -> SimpleNamespace:
        chosen.update(values)
        return SimpleNamespace(**values)

    monkeypatch.setattr("t5tune.training.arguments.OneGpuArguments", make_arguments)
    make_training_arguments(plan, None, (), World(), CUDA)
    assert chosen["dataloader_pin_memory"]
    assert chosen["accelerator_config"] == {"non_blocking": True}
    make_training_arguments(plan, None, (), World(), torch.device("cpu"))
    assert chosen["accelerator_config"] == {"non_blocking": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
@pytest.mark.variants(1)
def test_gpu_memory_grows_unless_the_user_sets_the_allocator(variables: dict[str, str], expected: str | None) -> None:
    """The variable is set before torch is imported, and means nothing to torch without a GPU."""
    environment = {name: text for name, text in os.environ.items() if name not in ALLOCATOR_VARIABLES} | variables
    code = (
        "import os, sys, t5tune; assert 'torch' not in sys.modules; t5tune.train; import torch; torch.ones(1);"
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:torch", "-c", code],
        capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


def test_only_a_gpu_has_reserved_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7 << 20)
    assert get_reserved_memory(CUDA) == {"peak_reserved_bytes": 7 << 20}
    assert get_reserved_memory(torch.device("cpu")) == {}
