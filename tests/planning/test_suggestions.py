"""The settings that a plan suggests."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from t5tune.commands.plan import COSTS, _find_largest_batch_size
from t5tune.planning.layer_memory import BatchLengths
from t5tune.planning.run_memory import Machine
from t5tune.settings import TrainSettings, load_settings
from t5tune.settings.field_types import parse_gpu_memory
from tests.planning.plans import make_plan, write_short_model
from tests.support.processes.command_line import parse_words


def load_train_settings(flags: str, **given: Any) -> TrainSettings:
    """Load train's settings from suggested flags, which take precedence over those that the user has given."""
    parsed = parse_words(flags.split(), TrainSettings)
    assert not parsed.problems
    needed = {"model_name_or_path": "a", "data_path": "b", "output_dir": "c"}
    return load_settings(TrainSettings, None, {}, {**needed, **given, **parsed.values})[0]


@pytest.mark.long
def test_the_suggestion_fits_and_is_accepted_by_train(tmp_path: Path) -> None:
    from t5tune.model.kernels import fused

    write_short_model(tmp_path)
    for memory, expected in (
        ("80GiB", "--bf16 --per"),
        ("1030MiB", "--bf16 --gradient-checkpointing --per"),
        ("980MiB", "--bf16 --gradient-checkpointing --q-lora --per"),
        ("960MiB", "--bf16 --gradient-checkpointing --deepspeed zero3-offload --per"),
    ):
        result = make_plan(tmp_path, gpu_memory=memory, per_device_train_batch_size=1)
        assert expected in result.suggestion.flags
        assert result.suggestion.total < parse_gpu_memory(memory)
        load_train_settings(result.suggestion.flags)
    assert make_plan(tmp_path, gpu_memory="940MiB", per_device_train_batch_size=1).suggestion is None
    assert fused.ELEMENTS_PER_CHUNK < 1 << 20  # the chunk size for GPUs is reset
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@dataclass(frozen=True)
class KnownMemory:
    """An estimator of a device for which a batch of n examples takes `max(constant, 200 + each * n)` bytes."""

    constant: int
    each: int
    machine: Machine
    estimated: list[int]

    def can_fit(self, _: str) -> bool:
        return True

    def estimate(self, _: str, lengths: BatchLengths) -> Any:
        size = len(lengths.sources)
        self.estimated.append(size)
        total = max(self.constant, 200 + self.each * size)
        return SimpleNamespace(total=total, fits=total <= (self.machine.memory or 0))


@pytest.mark.parametrize(
    ("constant", "each", "expected", "estimated"),
    [
        (0, 100, (32, 3400), [1, 2, 4]),
        (900, 100, (32, 3400), [1, 2, 4, 8, 16, 32]),  # gathered weights take more memory than 7 examples
        (0, 3000, (1, 3200), [1, 2]),
        (0, 5000, None, [1]),
        (1000, 1, (64, 1000), [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_the_largest_batch_that_fits_is_found_with_few_estimates(
    constant: int, each: int, expected: tuple[int, int] | None, estimated: list[int]
) -> None:
    machine = Machine(on_gpu=False, count=1, memory=4000, name="", has_bf16=True)
    estimator: Any = KnownMemory(constant, each, machine, [])
    data: Any = SimpleNamespace(sources=np.array([5, 7]), targets=np.array([3, 2]))
    assert _find_largest_batch_size(estimator, "none", data) == expected
    assert estimator.estimated == estimated


@pytest.mark.long
def test_full_training_is_suggested_with_the_lowest_stage_that_fits(tmp_path: Path) -> None:
    shape = {"num_layers": 1, "num_decoder_layers": 1, "vocab_size": 250112}
    asked = {"num_gpus": 8, "train_mode": "full", "source_length": 96, "target_length": 32, "packing": "off"}
    write_short_model(tmp_path, **shape)
    for memory, stage in (("2800MiB", "zero2"), ("2400MiB", "zero3-offload")):
        suggestion = make_plan(tmp_path, gpu_memory=memory, **asked).suggestion
        assert load_train_settings(suggestion.flags).deepspeed == stage


@pytest.mark.long
@pytest.mark.parametrize(
    ("memory", "expected"), [(80 << 30, "--no-bf16 --per"), (1100 << 20, "--no-bf16 --gradient-checkpointing --q-lora")]
)
def test_no_bf16_is_suggested_for_a_gpu_without_it(
    memory: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=memory, name="Tesla T4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    write_short_model(tmp_path)
    suggestion = make_plan(tmp_path, bf16=True, per_device_train_batch_size=1).suggestion
    assert suggestion.flags.startswith(expected)
    assert not load_train_settings(suggestion.flags, bf16=True).bf16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "given", "expected"),
    [
        ("80GiB", {"q_lora": True, "init_lora_weights": "loftq"}, "--bf16 --gradient-checkpointing --q-lora"),
        # PiSSA and OLoRA exclude q_lora
        ("980MiB", {"init_lora_weights": "pissa"}, "--bf16 --gradient-checkpointing --deepspeed zero3-offload"),
        ("980MiB", {"init_lora_weights": "olora"}, "--bf16 --gradient-checkpointing --deepspeed zero3-offload"),
        ("940MiB", {"init_lora_weights": "pissa"}, None),
        ("980MiB", {}, "--bf16 --gradient-checkpointing --q-lora"),
        (
            "80GiB",
            {"q_lora": True, "quant_type": "int8", "gradient_checkpointing": True, "tokens_per_batch": 4096},
            "--bf16 --no-gradient-checkpointing --no-q-lora --tokens-per-batch none",
        ),
        ("80GiB", {"deepspeed": "zero2"}, "--bf16 --deepspeed none"),
    ],
)
@pytest.mark.variants(1)
def test_suggested_flags_and_the_given_settings_are_accepted_by_train(
    memory: str, given: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    base = write_short_model(tmp_path)
    suggestion = make_plan(base, gpu_memory=memory, **{"per_device_train_batch_size": 1, **given}).suggestion
    if expected is None:
        assert suggestion is None
        return
    assert suggestion.flags == f"{expected} --per-device-train-batch-size {suggestion.per_device_train_batch_size}"
    turned_off = {"q_lora": "--no-q-lora", "gradient_checkpointing": "--no-grad", "deepspeed": "--deepspeed none"}
    assert [*suggestion.not_needed] == [name for name in COSTS if turned_off[name] in suggestion.flags]
    loaded = load_train_settings(suggestion.flags, **given)
    assert loaded.q_lora is ("--q-lora" in expected)
    assert loaded.gradient_checkpointing is ("--gradient-checkpointing" in expected)
    assert loaded.tokens_per_batch is None
    assert loaded.deepspeed == ("zero3-offload" if "zero3-offload" in expected else None)
