"""plan: memory compared with real models' and runs', and of each ZeRO stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.checkpoints.base import read_config
from t5tune.families import find_architecture
from t5tune.model.load import LOAD_CHUNK_BYTES, count_parameters, load_base
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.planning.layer_memory import (
    BatchLengths,
    build_empty_training_model,
    count_quantized_bytes,
    count_weight_bytes,
    measure_step,
)
from t5tune.planning.run_memory import USABLE_GPU_SHARE
from t5tune.settings import PlanSettings, QuantizationSettings, TrainSettings
from tests.planning.plans import NO_SUGGESTION, make_plan, write_short_model
from tests.support.models.bases import make_base

pytestmark = pytest.mark.slow

# parameters of checkpoints on the Hugging Face Hub, by their safetensors headers
PARAMETERS = {
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
    "google-t5/t5-base": 222_903_552,
    "google/mt5-small": 300_176_768,
    "google/t5gemma-s-s-ul2": 312_517_632,
    "google/t5gemma-b-b-prefixlm-it": 591_490_560,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_configs_have_as_many_parameters_as_their_checkpoints(name: str) -> None:
    settings = PlanSettings(model_name_or_path=name, train_mode="full")
    model = build_empty_training_model(find_architecture(KNOWN_CONFIGS[name], Path(name)), settings, 0, deepspeed=False)
    assert count_parameters(model)[1] == PARAMETERS[name]


@pytest.mark.long
def test_flan_t5_xxl_in_nf4_takes_under_6_2_gb(tmp_path: Path) -> None:
    """The plan is made from config.json alone; `wo` is in NF4, too."""
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["google/flan-t5-xxl"]))
    result = make_plan(tmp_path / "config.json", q_lora=True, num_gpus=1, source_length=8, target_length=8)
    assert 6.0e9 < sum(result.weights.values()) < 6.2e9
    assert result.precision == "nf4 base, bf16"
    assert result.suggestion is None  # the GPU's memory isn't given


@pytest.mark.parametrize("quantization", [{}, {"double_quant": False}, {"quant_type": "int8"}, {"q_lora": False}])
def test_loaded_weights_take_the_planned_bytes(quantization: dict[str, Any], tmp_path: Path) -> None:
    from bitsandbytes.nn import Params4bit

    base = make_base(tmp_path / "base", tied=False, d_model=64, d_ff=256, d_kv=16)
    settings = PlanSettings(model_name_or_path=str(base), bf16=True, train_mode="full", **{"q_lora": False})
    chosen = QuantizationSettings(**{"q_lora": True, **quantization})
    architecture = find_architecture(read_config(base), base)
    expected = count_weight_bytes(build_empty_training_model(architecture, settings, 0, deepspeed=True), chosen)
    model = load_base(base, torch.bfloat16, torch.device("cpu"), chosen)
    stored = 0
    for parameter in model.parameters():
        stored += parameter.numel() * parameter.element_size()
        if isinstance(parameter, Params4bit):
            state = parameter.quant_state
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        elif hasattr(parameter, "SCB") and parameter.SCB is not None:
            stored += parameter.SCB.numel() * parameter.SCB.element_size()
    assert sum(expected.values()) == pytest.approx(stored, rel=0.01)


def test_fake_and_real_steps_save_the_same_memory(untied_base: Path) -> None:
    """Compare the tensors that autograd saves for a real model with the count on fake tensors."""
    from t5tune.model.attention.segments import Segments
    from t5tune.model.lora import add_lora

    settings = TrainSettings(model_name_or_path=str(untied_base), data_path="-", output_dir=Path("-"), packing="on")
    architecture = find_architecture(read_config(untied_base), untied_base)
    lengths = BatchLengths((50, 40), (30, 20))
    model = build_empty_training_model(architecture, settings, 0, deepspeed=False)
    step = measure_step(model, lengths, settings, on_gpu=False, reentrant=False, autocast=True)

    from t5tune.model.attention.packing import use_packing

    real, _ = add_lora(
        load_base(untied_base, torch.float32, torch.device("cpu")), untied_base, settings, [], torch.float32
    )
    use_packing(real)
    real.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    target = torch.ones(1, 50, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real(
            input_ids=torch.ones(1, 90, dtype=torch.int64),
            decoder_input_ids=target,
            labels=target,
            packing=Segments(lengths.sources, lengths.targets),
            reduction="sum",
        )
    assert sum(kept.values()) <= step.activations + step.gradients
    assert step.activations < 1.6 * sum(kept.values())


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"gradient_checkpointing": True}, {}),
        ({"bf16": True}, {}),
        ({"q_lora": True}, {"bf16": True}),
        ({"packing": "auto"}, {"packing": "off"}),
        ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 8}),
    ],
)
@pytest.mark.variants(1)
def test_memory_saving_settings_reduce_the_planned_memory(
    better: dict[str, Any], worse: dict[str, Any], untied_base: Path
) -> None:
    architecture = find_architecture(read_config(untied_base), untied_base)

    def taken(per_device_train_batch_size: int = 4, **changes: Any) -> tuple[int, int]:
        settings = PlanSettings(model_name_or_path="-", **changes)
        model = build_empty_training_model(architecture, settings, 0, deepspeed=False)
        lengths = BatchLengths((200, *[20] * (per_device_train_batch_size - 1)), (50,) * per_device_train_batch_size)
        weights = sum(count_weight_bytes(model, settings).values())
        return weights, measure_step(model, lengths, settings, False, False, True).activations

    (weights, activations), (more_weights, more_activations) = taken(**better), taken(**worse)
    assert weights <= more_weights
    assert weights + activations < more_weights + more_activations


@pytest.mark.long
def test_modules_to_save_are_counted_as_trainable() -> None:
    def count(**changes: Any) -> int:
        return make_plan("pocket", **NO_SUGGESTION, **changes).trainable_parameters

    width, num_stacks = 128, 2
    assert count(modules_to_save=["final_layer_norm"]) == count() + width * num_stacks


def test_each_zero_stage_partitions_what_it_should(tmp_path: Path) -> None:
    result = make_plan(
        write_short_model(tmp_path), train_mode="full", num_gpus=4, bf16=True, deepspeed="zero2",
        per_device_train_batch_size=1, source_length=16, target_length=16,
    )  # fmt: skip
    assert result.chosen == "zero2"
    stages = {stage.stage: stage for stage in result.stages}
    count = result.trainable_parameters
    assert stages["zero2"].weights == 2 * count
    assert stages["zero1"].optimizer == pytest.approx(12 * count / 4, rel=0.01)
    assert stages["zero2"].gradients == pytest.approx(stages["zero1"].gradients / 4, rel=0.01)
    assert stages["zero3"].weights == pytest.approx(stages["zero2"].weights / 4, rel=0.01)
    attention, gated, table = 512 * 64 * 6, 512 * 1024 * 3, 32128 * 512
    gathered = 2 * (2 * (8 * attention + gated) + table)  # two of the decoder's blocks and the embedding, in bf16
    assert stages["zero3"].activations - stages["zero2"].activations == pytest.approx(gathered, rel=0.01)
    assert stages["zero3-offload"].activations == stages["zero3"].activations
    assert stages["zero3-offload"].weights == stages["zero3-offload"].optimizer == 0
    assert stages["zero3-offload"].host == pytest.approx(14 * count, rel=0.01)


@pytest.mark.long
def test_saving_takes_the_trained_weights_in_the_machines_memory(tmp_path: Path) -> None:
    model = write_short_model(tmp_path)
    common = {"train_mode": "full", "bf16": True, "source_length": 16, "target_length": 16}
    result = make_plan(model, num_gpus=4, **common)
    stages, weights = {stage.stage: stage for stage in result.stages}, 4 * result.trainable_parameters
    for name in ("none", "zero2"):
        libraries = stages[name].loading_host - 4 * LOAD_CHUNK_BYTES
        assert stages[name].saving_host == pytest.approx(libraries + weights, rel=0.02)
    offloaded = stages["zero3-offload"].saving_host - stages["zero3"].saving_host
    assert offloaded == pytest.approx(stages["zero3-offload"].host, rel=0.02)
    on_cpu = {stage.stage: stage for stage in make_plan(model, num_processes=2, **common).stages}
    assert on_cpu["none"].saving_host < 2 * on_cpu["none"].total  # the weights are written without a copy
    held = 2 * (on_cpu["zero2"].weights + on_cpu["zero2"].optimizer + on_cpu["zero2"].runtime)
    assert on_cpu["zero2"].saving_host == held + weights


@pytest.mark.long
def test_loading_takes_the_partitions_and_the_largest_tensor(tmp_path: Path) -> None:
    model = write_short_model(tmp_path)
    common = {"num_gpus": 4, "bf16": True, "source_length": 16, "target_length": 16}
    plain = {stage.stage: stage for stage in make_plan(model, **common).stages}
    largest = 2 * 32128 * 512
    assert plain["none"].loading == plain["none"].weights + plain["none"].runtime
    assert plain["zero3"].loading == plain["zero3"].weights + plain["zero3"].runtime + largest
    assert plain["zero3-offload"].loading == plain["zero3-offload"].runtime + largest
    moved = plain["zero3-offload"].loading_host - plain["zero3"].loading_host
    assert moved == pytest.approx(4 * plain["zero3"].weights, rel=0.01)
    quantized = {stage.stage: stage for stage in make_plan(model, q_lora=True, **common).stages}
    assert quantized["none"].loading == quantized["none"].weights + quantized["none"].runtime + largest


@pytest.mark.long
def test_a_base_that_fits_only_quantized_does_not_fit(tmp_path: Path) -> None:
    model = write_short_model(tmp_path)
    common = {"bf16": True, "q_lora": True, "per_device_train_batch_size": 1, "source_length": 1, "target_length": 1}
    enough = make_plan(model, num_gpus=1, **common).stages[0]
    assert enough.total < enough.loading
    middle = (enough.total + enough.loading) / 2 / USABLE_GPU_SHARE / 2**30
    assert make_plan(model, gpu_memory=f"{middle}GiB", **common).stages[0].fits is False


@pytest.mark.long
def test_an_evaluation_takes_what_its_predictions_or_its_losses_need(tmp_path: Path) -> None:
    """Predictions may take 512 MiB; losses are computed for up to 8,192 tokens at a time, or one longer example."""
    model = write_short_model(tmp_path, vocab_size=2000, d_model=64, d_ff=128)
    short = make_plan(model, num_gpus=2, bf16=True, deepspeed="zero3")
    stages = {stage.stage: stage for stage in short.stages}
    others = {name: stage.weights + stage.optimizer + stage.runtime for name, stage in stages.items()}
    assert short.evaluation["none"] == others["none"] + (512 << 20)
    gathered = stages["zero3"].activations - stages["zero2"].activations
    assert short.evaluation["zero3"] == others["zero3"] + (512 << 20) + gathered
    lengths = {"source_length": 5000, "target_length": 5000, "per_device_train_batch_size": 1}
    long = make_plan(model, use_cpu=True, packing="off", **lengths)
    heads, scores = 6, 5000**2 * 4  # the attention of one layer in fp32
    evaluated = long.evaluation["none"] - sum(
        (long.stages[0].weights, long.stages[0].optimizer, long.stages[0].runtime)
    )
    assert 2 * heads * scores < evaluated < long.stages[0].activations


@pytest.mark.long
def test_many_short_examples_are_measured_as_fewer_longer_ones(
    untied_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = find_architecture(read_config(untied_base), untied_base)
    settings = PlanSettings(model_name_or_path="-")
    lengths = BatchLengths((7, 3, 9) * 60, (2, 5, 1) * 60)
    found = []
    for most in (10**6, 64):
        monkeypatch.setattr("t5tune.planning.layer_memory.MAX_SEGMENTS", most)
        model = build_empty_training_model(architecture, settings, 0, deepspeed=False)
        found.append(measure_step(model, lengths, settings, on_gpu=True, reentrant=False, autocast=False).activations)
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_quantized_bytes_include_scales_of_scales() -> None:
    whole = QuantizationSettings(q_lora=True)
    assert count_quantized_bytes(64 * 256, 64, whole) == 64 * 256 // 2 + 64 + 256 + 4 + 1024 + 4
    assert len(KNOWN_CONFIGS) > 30
