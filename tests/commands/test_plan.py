"""plan: memory compared with that of real models and runs, batches, suggestions and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t5tune.checkpoints.base import read_config
from t5tune.commands.plan import plan, to_plan_settings
from t5tune.commands.prepare import prepare
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.batching import epoch_order
from t5tune.errors import ModelError
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
from t5tune.progress import Event, Note
from t5tune.settings import PlanSettings, PrepareSettings, QuantizationSettings, TrainSettings, load_settings
from t5tune.settings.loading import dump_settings
from tests.planning.plans import make_plan, write_short_model
from tests.support.caches import open_only
from tests.support.models.bases import make_base
from tests.support.processes.command_line import t5tune_in_fork

pytestmark = pytest.mark.slow
NO_SUGGESTION: dict[str, Any] = {"use_cpu": True, "gpu_memory": "1MiB"}  # nothing fits, which saves time

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


@pytest.fixture(scope="module")
def cache(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=folder))
    return folder


def test_a_cache_determines_steps_padding_and_the_largest_batch(untied_base: Path, cache: Path, tmp_path: Path) -> None:
    from t5tune.commands.train import train

    run = TrainSettings(
        model_name_or_path=str(untied_base), data_path=str(cache), output_dir=tmp_path / "run", use_cpu=True,
        num_train_epochs=1.2, gradient_accumulation_steps=2, per_device_train_batch_size=4, report_samples=0,
    )  # fmt: skip
    result = make_plan(
        untied_base, data_path=str(cache), **NO_SUGGESTION, num_train_epochs=1.2, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, packing="off",
    )  # fmt: skip
    trained = train(run)
    assert result.steps == trained.steps
    assert (result.trainable_parameters, result.total_parameters) == (
        trained.trainable_parameters, trained.total_parameters
    )  # fmt: skip
    sources, targets = open_only(cache).read_lengths()
    assert result.examples == len(sources)
    assert (result.source_length, result.target_length) <= (sources.max(), targets.max())
    assert result.padding is not None
    assert 0 < result.padding < 0.5


@pytest.fixture(scope="module")
def data_of_runs(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache, a cache with half of its examples held out, and a mixture of a smaller and a larger dataset."""
    folder = tmp_path_factory.mktemp("data")
    common: dict[str, Any] = {"model_name_or_path": str(untied_base)}
    lines = conversations.read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(lines[:8]))
    datasets = [{"path": str(folder / "some.jsonl")}, {"path": str(conversations)}]
    for name, changes in (
        ("cache", {"data_path": str(conversations)}),
        ("halved", {"data_path": str(conversations), "eval_fraction": 0.5}),
        ("mixture", {"data": datasets}),
    ):
        prepare(PrepareSettings(**common, **changes, output_dir=folder / name))
    return {name: folder / name for name in ("cache", "halved", "mixture")}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("halved", {"num_data": 10}),
        ("cache", {"eval_fraction": 0.5}),
        ("cache", {"eval_fraction": 0.5, "eval_data_path": "halved"}),
        ("mixture", {"mixing": "proportional", "mixing_cap": 6, "num_data": 9, "eval_fraction": 0.25}),
    ],
)
def test_a_runs_plan_uses_its_training_examples(
    name: str, changes: dict[str, Any], untied_base: Path, data_of_runs: dict[str, Path], tmp_path: Path
) -> None:
    from t5tune.commands.train import train

    if "eval_data_path" in changes:  # then nothing is held out of the training data
        changes = changes | {"eval_data_path": str(data_of_runs[changes["eval_data_path"]])}
    settings = TrainSettings(
        model_name_or_path=str(untied_base), data_path=str(data_of_runs[name]), output_dir=tmp_path / "run",
        use_cpu=True, num_train_epochs=1, per_device_train_batch_size=1, report_samples=0, eval_strategy="no",
        **changes,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(dump_settings(settings))
    read, _ = load_settings(PlanSettings, str(tmp_path / "run.yaml"))
    trained = train(settings)
    for converted in (to_plan_settings(make_run_plan(settings)), read):
        planned = plan(converted.model_copy(update=NO_SUGGESTION))
        assert (planned.examples, planned.steps) == (trained.examples, trained.steps)


def test_a_mixture_is_planned_as_it_is_mixed(untied_base: Path, data_of_runs: dict[str, Path]) -> None:
    """With a cap of 1, half of an epoch's examples are from the smaller dataset."""
    from t5tune.data.caches.mixing import Mixing
    from t5tune.data.caches.prepared import open_examples

    mixture = open_examples(data_of_runs["mixture"]).mix(Mixing("proportional", cap=1))
    drawn, _ = mixture.draw_epoch(42, 0)
    sources, targets = (lengths[drawn] for lengths in mixture.read_lengths())
    result = make_plan(
        untied_base, data_path=str(data_of_runs["mixture"]), mixing_cap=1, **NO_SUGGESTION,
        packing="off", per_device_train_batch_size=len(drawn),
    )  # fmt: skip
    padded = len(drawn) * (sources.max() + targets.max())
    assert result.padding == round(1 - (sources.sum() + targets.sum()) / padded, 4)


@pytest.mark.parametrize("weights", [[":1"], [":1", ":3"], [""]])
@pytest.mark.variants("weights1", "weights2")
def test_data_without_a_cache_is_planned_as_it_is_trained(
    weights: list[str], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    from t5tune.commands.train import train

    paths = []
    for number, weight in enumerate(weights):
        paths.append(f"{tmp_path / f'{number}.jsonl'}{weight}")
        (tmp_path / f"{number}.jsonl").write_text(conversations.read_text())
    settings = TrainSettings(
        model_name_or_path=str(untied_base), data_path=paths, output_dir=tmp_path / "run", use_cpu=True,
        eval_fraction=0.2, num_train_epochs=1, per_device_train_batch_size=2, report_samples=0, eval_strategy="no",
        packing="off",
    )  # fmt: skip
    planned = plan(to_plan_settings(make_run_plan(settings)).model_copy(update=NO_SUGGESTION))
    trained = train(settings)
    assert (planned.examples, planned.steps) == (trained.examples, trained.steps)


def test_the_size_of_large_data_is_estimated_from_a_sample(tmp_path: Path) -> None:
    for name, separator, header in (("a.tsv", "\t", "source\ttarget\n"), ("b.csv", ",", "source,target\n")):
        rows = (f"count to {number}{separator}one two {number}\n" for number in range(10_000, 13_000))
        (tmp_path / name).write_text(header + "".join(rows))
        notes: list[Any] = []
        settings = PlanSettings(
            model_name_or_path="pocket", data_path=[str(tmp_path / name)], max_steps=None, packing="on"
        )
        planned = plan(settings.model_copy(update=NO_SUGGESTION), notes.append)
        assert Note("the lengths are from the first 1,000 examples, about 33.3% of the data by its size") in notes
        assert planned.examples == pytest.approx(3000, rel=0.01)
        assert planned.steps == pytest.approx(3 * 375, rel=0.01)


def test_lengths_are_assumed_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"source": "a", "target": "b"}\n')
    notes: list[Any] = []
    settings = PlanSettings(model_name_or_path="google/flan-t5-small", data_path=[str(tmp_path / "data.jsonl")])
    planned = plan(settings.model_copy(update=NO_SUGGESTION), notes.append)
    assert (planned.examples, planned.source_length) == (None, 512)
    (note,) = [note.text for note in notes if isinstance(note, Note) and "tokenizer" in note.text]
    assert note.endswith("; without a tokenizer, the plan assumes examples of 512 + 128 tokens")


@pytest.fixture(scope="module")
def uneven_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the order of seed 42: one long example and 17 short ones, then 18 of medium length."""
    folder = tmp_path_factory.mktemp("uneven")
    words = np.zeros(36, np.int64)
    words[epoch_order(words, 18, seed=42, epoch=0)] = [300, *[10] * 17, *[80] * 18]
    records = ({"source": "cat " * count, "target": "dog " * (1 + count // 8)} for count in words.tolist())
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(
        PrepareSettings(
            model_name_or_path="pocket", data_path=str(folder / "data.jsonl"), output_dir=folder / "cache",
            model_max_length=2048, add_tokens="none",
        )
    )  # fmt: skip
    return folder / "cache"


def measure_costs(cache: Path, batches: list[list[int]], packed: bool) -> list[int]:
    """Count the tokens of each micro-batch, padding included."""

    sources, targets = open_only(cache).read_lengths()
    if packed:
        return [int((sources + targets)[batch].sum()) for batch in batches]
    return [len(batch) * int(sources[batch].max() + targets[batch].max()) for batch in batches]


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize(
    "batching",
    [{"group_by_length": True}, {"group_by_length": False}, {"tokens_per_batch": 1024}],
    ids=["grouped", "random", "budget"],
)
@pytest.mark.variants("grouped-auto")
def test_a_plan_has_the_trainers_batches(batching: dict[str, Any], packing: str, uneven_cache: Path) -> None:
    from t5tune.training.steps import EpochDraws, StepSampler, make_budget_sampler, make_count_sampler

    sources, targets = open_only(uneven_cache).read_lengths()
    packed, tokens = packing != "off", batching.get("tokens_per_batch")
    sampler: StepSampler
    if tokens is None:  # 36 examples: two steps of 16, and one with 4 examples for 8 micro-batches
        sampler = make_count_sampler(EpochDraws(sources, targets, 5), 2, 8, batching["group_by_length"])
    else:
        sampler = make_budget_sampler(EpochDraws(sources, targets, 5), tokens, packed, 8)
    with_fillers = [[draw.example for draw in batch if not draw.is_filler] for batch in sampler]
    batches = [batch for batch in with_fillers if batch]
    result = make_plan(
        "pocket", data_path=str(uneven_cache), **NO_SUGGESTION, gradient_accumulation_steps=8, seed=5,
        per_device_train_batch_size=2, num_train_epochs=1, packing=packing, **batching,
    )  # fmt: skip
    assert result.steps == len(with_fillers) // 8
    padded = sum(measure_costs(uneven_cache, batches, packed))
    assert result.padding == round(1 - int((sources + targets).sum()) / padded, 4)
    largest = batches[int(np.argmax(measure_costs(uneven_cache, batches, packed)))]
    assert result.batch_size == len(largest)
    assert (result.source_length, result.target_length) == (sources[largest].max(), targets[largest].max())


@pytest.mark.long
def test_the_largest_packed_batch_has_the_most_tokens(uneven_cache: Path) -> None:
    common: dict[str, Any] = {"data_path": str(uneven_cache), **NO_SUGGESTION}
    common |= {"per_device_train_batch_size": 18, "group_by_length": False}
    packed, padded = (make_plan("pocket", packing=packing, **common) for packing in ("auto", "off"))
    assert packed.source_length < padded.source_length


@pytest.mark.parametrize(
    ("machine", "stages"),
    [
        ({"use_cpu": True}, ["none"]),
        ({"num_processes": 2}, ["none", "zero1", "zero2", "zero3"]),
        ({"num_gpus": 1}, ["none", "zero3-offload"]),
        ({"use_cpu": True, "deepspeed": "zero2"}, ["zero2", "none"]),
    ],
)
def test_a_plan_shows_only_what_the_machine_can_use(machine: dict[str, Any], stages: list[str], tmp_path: Path) -> None:
    result = make_plan(write_short_model(tmp_path), source_length=8, target_length=8, **machine)
    assert [stage.stage for stage in result.stages] == stages


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


def test_a_plan_says_that_it_leaves_out_the_teacher(tmp_path: Path) -> None:
    keys = "model_name_or_path: pocket\ndata_path: pocket\noutput_dir: run\nteacher_model_name_or_path: pocket\n"
    (tmp_path / "run.yaml").write_text(keys)
    for arguments, note in (
        (("train", "--dry-run"), "teacher_model_name_or_path: pocket: the plan doesn't include the teacher's memory"),
        (("plan", "--gpu-memory", "1MiB"), "plan does not use teacher_model_name_or_path"),
    ):
        done = t5tune_in_fork(*arguments, "--config", tmp_path / "run.yaml", "--use-cpu")
        assert done.code == 0, done.stderr
        assert note in done.stderr


@pytest.mark.long
def test_the_command_accepts_a_run_config_and_refuses_other_models(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: google/flan-t5-small\ndata_path: x.jsonl\noutput_dir: y\n")
    done = t5tune_in_fork("plan", "--config", tmp_path / "run.yaml", "--gpu-memory", "16GiB")
    assert done.code == 0, done.stderr
    assert "76,961,152" not in done.stdout  # the adapters are counted, too
    assert "no DeepSpeed *" in done.stdout
    assert "suggested: --bf16" in done.stdout
    assert all(len(line) < 120 for line in done.stdout.splitlines())
    bart = tmp_path / "config.json"
    bart.write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(ModelError, match="bart"):
        make_plan(bart)


def test_quantized_bytes_include_scales_of_scales() -> None:
    whole = QuantizationSettings(q_lora=True)
    assert count_quantized_bytes(64 * 256, 64, whole) == 64 * 256 // 2 + 64 + 256 + 4 + 1024 + 4
    assert len(KNOWN_CONFIGS) > 30


def test_the_first_steps_of_a_run_are_timed(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5tune.commands.plan.timing.MAX_SECONDS", 1000)
    before = sorted(tmp_path.rglob("*"))
    planned = make_plan(
        untied_base, data_path=str(conversations), use_cpu=True, eval_fraction=0.2, per_device_train_batch_size=2,
        num_train_epochs=100, save_steps=10, report_samples=0, gradient_checkpointing=False, preprocessed_path=tmp_path,
    )  # fmt: skip
    assert planned.time_unknown is None
    time, steps = planned.time, planned.steps
    assert 4 <= time.timed_steps <= 30
    assert (time.evaluations, time.checkpoints) == (100, -(-steps // 10))
    others = time.preparing + time.start + time.evaluations * time.evaluation + time.checkpoints * time.checkpoint
    assert time.low <= others + (steps - 1) * time.step <= time.high
    assert sorted(tmp_path.rglob("*")) == before


def test_notes_of_a_plan_name_no_temporary_folder(tmp_path: Path) -> None:
    records = [{"source": "a b c d e f g h i j k l", "target": "b"}] * 20 + [{"source": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    notes = list[Event]()
    settings = PlanSettings(
        model_name_or_path="pocket", data_path=[str(tmp_path / "a.jsonl")], model_max_length=8, time_run=False
    )
    plan(settings, notes.append)
    texts = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert texts == ["1 record rejected (unknown format: 1)", "20 sources truncated to model_max_length 8"]


def test_an_unknown_model_is_reported_once(conversations: Path) -> None:
    notes = list[Event]()
    with pytest.raises(ModelError, match="no such folder"):
        plan(PlanSettings(model_name_or_path="no/model", data_path=[str(conversations)]), notes.append)
    assert not notes


@pytest.mark.distributed
def test_a_timed_run_prints_nothing(conversations: Path) -> None:
    """It runs in forks of the command's process."""
    words = ("--model-name-or-path", "pocket", "--data-path", conversations, "--num-processes", 2, "--json", "--quiet")
    done = t5tune_in_fork("plan", *words)
    assert done.stderr == ""
    assert done.json["time_unknown"] is None
    assert done.json["time"]["timed_steps"] > 3


def test_a_plan_says_why_there_is_no_time(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    data, model = {"data_path": str(conversations)}, write_short_model(tmp_path)
    for base, changes, reason in (
        (untied_base, {"use_cpu": True}, "no data is given"),
        (untied_base, {**data, "time_run": False}, "time_run is off"),
        (untied_base, {**data, **NO_SUGGESTION}, "the run doesn't fit"),
        (untied_base, {**data, "gpu_memory": "24GiB"}, "the plan is for a different machine"),
        (model, {"use_cpu": True}, "no data is given"),
        (model, {**data, "use_cpu": True}, "the model isn't on this machine"),
    ):
        planned = make_plan(base, source_length=8, target_length=8, per_device_train_batch_size=1, **changes)
        assert (planned.time, planned.time_unknown) == (None, reason)


def test_a_run_that_fails_is_not_timed(conversations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model-name-or-path", "pocket", "--data-path", conversations, "--optim", "adamw_apex_fused", "--json")
    planned = t5tune_in_fork("plan", *words).json
    assert planned["time"] is None
    assert planned["time_unknown"].startswith("optim: adamw_apex_fused: ")
    monkeypatch.setattr("t5tune.commands.plan.timing.MAX_SECONDS", 0)
    planned = make_plan("pocket", data_path=str(conversations), use_cpu=True)
    assert (planned.time, planned.time_unknown) == (None, "the first steps took more than 0 seconds, or more memory")
