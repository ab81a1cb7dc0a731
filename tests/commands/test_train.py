"""Training in one process and in two: what is loaded, trained, logged and saved, and how runs resume."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.run_plan import make_run_plan
from t5tune.commands.train import set_up_run_folder, train
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError, ModelError, SettingsError, TrainingError
from t5tune.io.yaml_file import read_yaml
from t5tune.progress import Advanced, Evaluated, Event, Finished, Measured, Note, Started
from t5tune.runs.checks import check_plan
from t5tune.runs.data import locate_data, open_data
from t5tune.runs.folder import RunFolder
from t5tune.runs.result import read_result
from t5tune.settings import (
    ExportSettings,
    MergeSettings,
    PrepareSettings,
    QuantizationSettings,
    TrainSettings,
    load_settings,
    packaged_templates,
)
from t5tune.training.callbacks import sample_predictions
from t5tune.training.trainer import T5Trainer
from tests.support.bases import make_base
from tests.support.caches import find_cache, open_only
from tests.support.command_line import CommandResult, t5tune_in_fork
from tests.support.train_runs import make_settings, read_losses, read_metrics_lines

TWO = ("--num-processes", "2")


@pytest.fixture(scope="module")
def finished_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    train(make_settings(untied_base, conversations, run, eval_fraction=0.2))
    return run


def test_loss_falls_and_the_result_counts_steps_and_tokens(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert read_losses(finished_run)[-1] < read_losses(finished_run)[0]
    assert result["steps"] == 6
    assert result["world_size"] == 1
    assert result["tokens"] > 0
    assert result["eval"]["loss"] > 0
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    lines = [line for line in read_metrics_lines(finished_run) if "loss" in line]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} <= set(lines[0])


def test_run_folder_loads_with_plain_peft_and_contains_only_the_adapter(finished_run: Path, untied_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    weights = load_file(finished_run / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    base = AutoModelForSeq2SeqLM.from_pretrained(untied_base)
    shared = base.shared.weight.detach().clone()
    model = PeftModel.from_pretrained(base, str(finished_run))
    assert torch.equal(base.shared.weight, shared)
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if ".default" in name}
    for name, value in weights.items():
        assert torch.equal(loaded[name], value), name


def test_model_cards_report_data_settings_and_held_out_metrics(
    finished_run: Path, untied_base: Path, tmp_path: Path
) -> None:
    manifest = json.loads((find_cache(finished_run / "data") / "manifest.json").read_text())
    result = json.loads((finished_run / "result.json").read_text())
    data = f"Data: {manifest['examples']} examples from 24 conversations, "
    card = (finished_run / "README.md").read_text()
    assert data in card
    assert "learning_rate 0.01, per_device_train_batch_size 4" in card
    metrics = f"Trained for 6 steps.\nEvaluation on held-out data: loss {result['eval']['loss']:.4g}"
    assert metrics in card
    card_of_a_step = (finished_run / "checkpoint-3" / "README.md").read_text()
    assert "held-out data" not in card_of_a_step  # the metrics belong to the end of the run
    export(ExportSettings(checkpoint=finished_run / "checkpoint-3", output_dir=tmp_path / "exported"))
    assert data in (tmp_path / "exported" / "README.md").read_text()
    values = {"model_name_or_path": str(untied_base), "adapter": finished_run, "output_dir": tmp_path / "merged"}
    merge(MergeSettings.model_validate(values | {"verify": False}))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert data in card
    assert metrics in card
    assert f"from the adapter `{finished_run}`." in card
    for number, (adapters, weights, named) in enumerate(
        (
            ([finished_run], [0.5], f"from the adapter `{finished_run}` (weight 0.5)."),
            (
                [finished_run, tmp_path / "exported"],
                [1, 0.25],
                f"from the adapters `{finished_run}` (weight 1), `{tmp_path}/exported` (weight 0.25).",
            ),
        )
    ):
        other = {"adapter": adapters, "weights": weights, "output_dir": tmp_path / f"sum{number}"}
        merge(MergeSettings.model_validate(values | other | {"verify": False}))
        card = (tmp_path / f"sum{number}" / "README.md").read_text()
        assert named in card
        assert "held-out data" not in card  # of another model


def test_a_loaded_base_equals_its_file_bit_by_bit(base: Path) -> None:
    from t5tune.model.load import load_base

    file = load_file(base / "model.safetensors")
    model = load_base(base, torch.float32, torch.device("cpu"))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in file.items())
    tied = "lm_head.weight" not in file
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.shared.weight) is tied
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_quantized_base_keeps_all_other_weights_and_nearly_the_same_logits(untied_base: Path) -> None:
    from t5tune.model.load import load_base

    file = load_file(untied_base / "model.safetensors")
    plain = load_base(untied_base, torch.float32, torch.device("cpu"))
    quantized = load_base(untied_base, torch.float32, torch.device("cpu"), QuantizationSettings(q_lora=True))
    kept = [name for name, value in quantized.named_parameters() if type(value).__name__ != "Params4bit"]
    assert {"shared.weight", "lm_head.weight"} <= set(kept)
    assert all(torch.equal(quantized.get_parameter(name), file[name]) for name in kept)
    assert sum(type(value).__name__ == "Params4bit" for value in quantized.parameters()) == 36
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    with torch.inference_mode():
        a, b = plain(**inputs).logits, quantized(**inputs).logits
    assert 0 < (a - b).abs().max() < 0.5 * a.abs().max()


def test_wo_is_quantized_only_with_quantize_wo() -> None:
    """In bf16, where 4-bit storage of the wrong dtype would silently turn the input of wo into garbage."""
    from t5tune.checkpoints.pocket import pocket_folder
    from t5tune.model.load import load_base

    def load(**changes: Any) -> Any:
        quantization = QuantizationSettings(q_lora=True, **changes) if changes else None
        return load_base(pocket_folder(), torch.bfloat16, torch.device("cpu"), quantization)

    models = {"whole": load(), "wo": load(quantize_wo=True), "no wo": load(quantize_wo=False)}
    kinds = {
        name: {type(value).__name__ for key, value in model.named_parameters() if ".wo." in key}
        for name, model in models.items()
    }
    assert kinds == {"whole": {"Parameter"}, "wo": {"Params4bit"}, "no wo": {"Parameter"}}
    for model in models.values():
        for name in ("shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight"):
            assert model.get_parameter(name).dtype == torch.bfloat16
    torch.manual_seed(0)
    ids = torch.randint(50, 1500, (4, 24))
    with torch.inference_mode():
        logits = {name: model(input_ids=ids, decoder_input_ids=ids).logits.float() for name, model in models.items()}
    off = {name: float((value - logits["whole"]).norm() / logits["whole"].norm()) for name, value in logits.items()}
    assert off["wo"] != off["no wo"]
    assert 0 < off["wo"] < 2 * off["no wo"] < 0.5


def test_a_base_whose_file_does_not_fit_its_config_is_refused(untied_base: Path, tmp_path: Path) -> None:
    from t5tune.model.load import load_base

    shutil.copytree(untied_base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "d_ff": 48}))
    with pytest.raises(ModelError, match=r"DenseReluDense.* in the file"):
        load_base(tmp_path / "base", torch.float32, torch.device("cpu"))
    path.write_text(json.dumps({**config, "model_type": "bart"}))
    with pytest.raises(ModelError, match="model_type 'bart'") as refused:
        load_base(tmp_path / "base", torch.float32, torch.device("cpu"))
    for name in ("Flan-UL2", "ByT5", "fastchat-t5", "mT5", "umT5"):
        assert name in str(refused.value.hint)
    path.write_text(json.dumps({**config, "model_type": "switch_transformers"}))
    with pytest.raises(ModelError, match="Switch Transformers: its experts"):
        load_base(tmp_path / "base", torch.float32, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_rows_of_added_tokens_in_embedding_and_head_are_trained(
    kind: str, conversations: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"{kind}_base")
    train(make_settings(base, conversations, tmp_path / "run", max_steps=2, save_steps=2))
    file = load_file(base / "model.safetensors")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    manifest = json.loads((find_cache(tmp_path / "run" / "data") / "manifest.json").read_text())
    newline, brace = (manifest["added_token_ids"][manifest["added_tokens"].index(token)] for token in ("\n", "{"))
    rows = {name: value for name, value in weights.items() if "trainable_tokens_delta" in name}
    if kind == "tied":
        indices = {"shared": config["trainable_token_indices"]}
        assert len(rows) == 1
    else:
        indices = config["trainable_token_indices"]
        assert set(indices) == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    for module, ids in indices.items():
        name = "lm_head.weight" if module == "lm_head" else "shared.weight"
        trained = rows[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
        for token in (newline, brace):
            assert not torch.equal(trained[ids.index(token)], file[name][token]), (module, token)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"packing": "off"}, {"q_lora": True, "bf16": False}], ids=["packed", "padded", "nf4"]
)
def test_one_process_trains_on_one_gpu_however_many_are_visible(
    more: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    alone = train(make_settings(untied_base, conversations, tmp_path / "one", max_steps=2, **more))
    choose_device = TrainingArguments._setup_devices.func

    def choose_among_four(self: TrainingArguments) -> torch.device:
        device = choose_device(self)
        self._n_gpu = 4  # as on a machine where torch.cuda.device_count() is 4
        return device

    patched = functools.cached_property(choose_among_four)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    among_four = train(make_settings(untied_base, conversations, tmp_path / "four", max_steps=2, **more))
    assert among_four.tokens == alone.tokens
    for name in ("loss", "grad_norm"):
        one, four = ([line.get(name) for line in read_metrics_lines(tmp_path / run)] for run in ("one", "four"))
        assert one == four
    adapters = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("one", "four")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"q_lora": True}], ids=["lora", "q_lora"])
@pytest.mark.variants("lora")
def test_the_same_seed_gives_the_same_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(make_settings(untied_base, conversations, tmp_path / name, seed=seed, **more))
        files[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert files["a"] == files["b"] != files["c"]


@pytest.mark.slow
def test_q_lora_reduces_the_loss(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    result = train(make_settings(untied_base, conversations, tmp_path / "run", q_lora=True, bf16=False))
    assert read_losses(tmp_path / "run")[-1] < read_losses(tmp_path / "run")[0]
    assert result.total_parameters > 40_000  # 4-bit weights are counted unpacked


def make_evaluations_take_a_year(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the trainer's clock advance by a year in each evaluation; the list gets each year's seconds."""
    years: list[float] = []
    evaluate = T5Trainer.evaluation_loop

    def evaluate_for_a_year(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        years.append(3e7)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(T5Trainer, "evaluation_loop", evaluate_for_a_year)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(years))
    monkeypatch.setattr("t5tune.training.totals.time", clock)
    return years


@pytest.mark.slow
def test_tokens_per_second_exclude_the_time_of_evaluations(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = make_evaluations_take_a_year(monkeypatch)
    result = train(make_settings(untied_base, conversations, tmp_path / "run", eval_fraction=0.2, eval_steps=1))
    assert len(years) == 6
    lines = [line for line in read_metrics_lines(tmp_path / "run") if "loss" in line]
    assert all(1 < line["tokens_per_second"] < 1e7 for line in lines)
    assert 1 < result.tokens_per_second < 1e7


@pytest.mark.slow
def test_tokens_per_second_exclude_an_evaluation_before_the_first_step_of_a_resumed_run(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = make_evaluations_take_a_year(monkeypatch)
    settings = make_settings(
        untied_base, conversations, tmp_path / "run", eval_fraction=0.2, eval_steps=3, save_steps=3, max_steps=6
    )
    with monkeypatch.context() as interrupted:
        interrupted.setattr("t5tune.training.objectives.measure_losses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(settings)
    result = train(settings)
    assert result.resumed_from == tmp_path / "run" / "checkpoint-3"
    assert len(years) == 3  # at step 3, again at step 3 before the first step, at step 6
    lines = [line for line in read_metrics_lines(tmp_path / "run") if "loss" in line]
    assert all(1 < line["tokens_per_second"] < 1e7 for line in lines)
    assert 1 < result.tokens_per_second < 1e7


@pytest.mark.slow
def test_evaluation_between_steps_does_not_change_training(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    shared = {"q_lora": True, "bf16": False, "eval_fraction": 0.2, "max_steps": 4}
    train(make_settings(untied_base, conversations, tmp_path / "a", **shared, eval_strategy="no"))
    train(make_settings(untied_base, conversations, tmp_path / "b", **shared, eval_strategy="steps", eval_steps=1))
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert sum("eval_loss" in line for line in read_metrics_lines(tmp_path / "b")) == 4


def test_bf16_keeps_fp32_adapters(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=2, bf16=True))
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    values = torch.cat([value.flatten() for value in weights.values()])
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_tf32_is_ignored_with_a_note_on_a_cpu(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=1, tf32=True), events.append)
    assert Note("tf32: ignored, since the CPU has no TensorFloat-32") in events


def test_a_run_that_keeps_all_checkpoints_says_how_many_and_how_large(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    def list_notes(name: str, **changes: Any) -> list[str]:
        events: list[Event] = []
        train(make_settings(untied_base, conversations, tmp_path / name, save_steps=2, **changes), events.append)
        return [event.text for event in events if isinstance(event, Note) and "checkpoints will be kept" in event.text]

    [note] = list_notes("all")
    checkpoints = list((tmp_path / "all").glob("checkpoint-*"))
    mebibytes = sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir()) / 2**20
    kept = re.match(
        "all 3 checkpoints will be kept, about ([0-9.]+) MiB; --save-total-limit 2 keeps only the newest", note
    )
    assert kept is not None, note
    assert len(checkpoints) == 3
    assert mebibytes - 1 < float(kept[1]) < mebibytes + 4  # 1 MiB for the small files of each
    assert list_notes("three", save_total_limit=3) == []


@pytest.mark.parametrize(
    ("changes", "is_suggested"),
    [({}, True), ({"learning_rate": 5e-5}, False), ({"train_mode": "full"}, False), ({"q_lora": True}, True)],
)
def test_lora_without_a_learning_rate_names_one(tmp_path: Path, changes: dict[str, Any], is_suggested: bool) -> None:
    settings = TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir=tmp_path / "run", **changes)
    events: list[Event] = []
    with ExitStack() as locks:
        set_up_run_folder(settings, locks, events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(note.startswith("learning_rate: not set") and "3e-4" in note for note in notes) == is_suggested
    again: list[Event] = []
    with ExitStack() as locks:  # a run that has begun keeps its rate
        set_up_run_folder(settings, locks, again.append)
    assert not any(isinstance(event, Note) and event.text.startswith("learning_rate") for event in again)


def test_the_last_step_always_has_a_line_of_metrics(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=5, logging_steps=3))
    assert [line["step"] for line in read_metrics_lines(tmp_path / "run") if "loss" in line] == [1, 3, 5]
    saved = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [line["step"] for line in saved["log_history"] if "loss" in line] == [1, 3, 5]


@pytest.mark.slow
def test_a_resumed_run_counts_tokens_and_loss_of_all_its_steps(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    chosen = make_settings(untied_base, conversations, run, max_steps=6, save_steps=4, logging_steps=3)
    uninterrupted = train(chosen)
    shutil.rmtree(run / "checkpoint-6")
    (run / "result.json").unlink()
    resumed = train(chosen)
    assert resumed.resumed_from == run / "checkpoint-4"
    assert resumed.tokens == uninterrupted.tokens
    assert resumed.train_loss == pytest.approx(uninterrupted.train_loss, rel=1e-6)
    per_step = train(chosen.model_copy(update={"output_dir": tmp_path / "other", "logging_steps": 1}))
    assert uninterrupted.train_loss == pytest.approx(sum(read_losses(tmp_path / "other")) / 6, rel=1e-6)
    assert per_step.train_loss == pytest.approx(uninterrupted.train_loss, rel=1e-6)


@pytest.mark.slow
def test_a_run_resumes_with_a_cache_of_its_conversations_instead_of_the_file(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """prepare's seed only decides which examples are held out, and here none are."""
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values, seed=7))
    prepare(PrepareSettings(**{**values, "output_dir": tmp_path / "parted"}, eval_fraction=0.25, split_seed=3))
    run = tmp_path / "run"
    train(make_settings(untied_base, conversations, run))
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-6")
    (run / "result.json").unlink()
    with pytest.raises(SettingsError, match="data: "):
        train(make_settings(untied_base, tmp_path / "parted", run))
    result = train(make_settings(untied_base, tmp_path / "cache", run))
    assert result.resumed_from == run / "checkpoint-3"
    assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted


@pytest.mark.slow
def test_a_cache_that_another_run_replaces_before_it_is_opened_is_refused(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(conversations.read_text().splitlines(keepends=True)[:8]))
    shared = {"preprocessed_path": tmp_path / "cache", "max_steps": 1}
    first, second = (
        make_settings(untied_base, data, tmp_path / data.stem, **shared) for data in (conversations, other)
    )
    with ExitStack() as stack:
        for settings in (first, second):
            prepared = set_up_run_folder(settings, stack).read_record()["prepared"]
            plan = make_run_plan(settings)
            assert open_data(plan, locate_data(plan), prepared)
    plan = make_run_plan(first)
    prepared = RunFolder(first.output_dir).read_record()["prepared"]
    with pytest.raises(DataError, match="preprocessed_path: .*cache: another process has replaced it since"):
        open_data(plan, locate_data(plan), prepared)
    assert train(first).steps == 1  # it is prepared again


@pytest.mark.slow
@pytest.mark.parametrize("is_deleted", [False, True], ids=["replaced", "deleted"])
@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_checkpoints_have_the_tokenizer_of_the_cache_that_the_run_was_started_with(
    train_mode: str, is_deleted: bool, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    given = PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=cache)
    prepare(given)
    names = ("tokenizer/tokenizer.json", "template.yaml", "training_data.json")
    before = {Path(name).name: (find_cache(cache) / name).read_bytes() for name in names}

    def replace_cache(event: Event) -> None:
        if not isinstance(event, Measured) or event.step != 2:
            return
        if is_deleted:
            shutil.rmtree(cache)
            return
        prepare(given.model_copy(update={"add_tokens": ["<A>"], "conversation_template": "plain"}))

    settings = make_settings(untied_base, cache, run, max_steps=4, save_steps=1, logging_steps=1, train_mode=train_mode)
    train(settings, replace_cache)
    assert is_deleted or (cache / "template.yaml").read_bytes() != before["template.yaml"]
    for folder in (run / "checkpoint-1", run / "checkpoint-4", run):
        assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_what_prepare_has_held_out_is_never_trained_on(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": cache}
    prepare(PrepareSettings(**values, eval_fraction=0.25, split_seed=3))
    training, held_out = open_examples(cache).split_as_prepared()
    assert held_out is not None
    changes: dict[str, Any] = {"max_steps": 1}
    for name, more in {
        "as prepared": {},
        "the same": {"eval_fraction": 0.25, "split_seed": 3},
        "other data": {"eval_data_path": [str(conversations)]},
        "the first ones": {"num_data": 10},
        "two caches": {"data_path": [f"{cache}:1", f"{shutil.copytree(cache, tmp_path / 'other')}:1"], "num_data": 10},
    }.items():
        result = train(make_settings(untied_base, cache, tmp_path / name, **{**changes, **more}))
        expected = 10 * len(more.get("data_path", [cache])) if "num_data" in more else len(training)
        assert result.examples == expected < len(open_only(cache))
    chosen, still_held_out = open_examples(cache).limit_training(10).split_as_prepared()
    assert still_held_out is not None
    for part, whole in ((chosen, training.take(10)), (still_held_out, held_out)):
        assert part.identify() == whole.identify()
    with pytest.raises(SettingsError, match="eval_fraction: 0.1 with split_seed 3, but prepare held out 0.25 of"):
        train(make_settings(untied_base, cache, tmp_path / "run", **changes, eval_fraction=0.1, split_seed=3))


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_0_logs_the_gradient_norm_without_clipping(
    base_without_dropout: Path,
    conversations: Path,
    one_step: dict[str, float],
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    more = ("--num-data", "8", "--max-steps", "1", "--per-device-train-batch-size", "8", "--use-cpu")
    more += ("--deepspeed", "zero0", "--max-grad-norm", "0")
    done = on_ranks(1, *make_command(base_without_dropout, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    assert read_metrics_lines(tmp_path / "run")[0]["grad_norm"] == pytest.approx(one_step["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        run = tmp_path / name
        train(make_settings(untied_base, conversations, run, max_steps=2, lora_dropout=0.0, gradient_checkpointing=on))
    assert read_losses(tmp_path / "a") == pytest.approx(read_losses(tmp_path / "b"), rel=1e-5)


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal_bit_by_bit(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", eval_fraction=0.2))
    again = tmp_path / "run" / "adapter_model.safetensors"
    assert again.read_bytes() == (finished_run / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_resumes_from_the_newest_complete_checkpoint_to_the_same_bits(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    train(make_settings(untied_base, conversations, run, eval_fraction=0.2))
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()
    shard = run / "checkpoint-6" / "optimizer.pt"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = train(make_settings(untied_base, conversations, run, eval_fraction=0.2), report)
    assert result.resumed_from == run / "checkpoint-3"
    assert any("checkpoint-6/optimizer.pt: differs" in note for note in notes)
    expected = (finished_run / "adapter_model.safetensors").read_bytes()
    assert (run / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_fresh_renames_it(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = train(make_settings(untied_base, conversations, run, max_steps=1))
    before = (run / "metrics.jsonl").read_bytes()
    assert train(make_settings(untied_base, conversations, run, max_steps=1)) == first
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(make_settings(untied_base, conversations, run, max_steps=1, logging_steps=5)) == first
    with pytest.raises(SettingsError, match=f"{run}: this run has already finished.*\nlora_r: 8 before, 4 now"):
        train(make_settings(untied_base, conversations, run, max_steps=1, lora_r=4))
    with pytest.raises(SettingsError, match=r"data_path: .*conversations\.jsonl before, .*other\.jsonl now"):
        train(make_settings(untied_base, tmp_path / "other.jsonl", run, max_steps=1))
    train(make_settings(untied_base, conversations, run, max_steps=1, fresh=True))
    assert (tmp_path / "run.1" / "result.json").is_file()
    assert (run / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "job"),
    [
        ("TORCHELASTIC_RESTART_COUNT", None),
        ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"),
        ("SLURM_RESTART_COUNT", "SLURM_JOB_ID"),
    ],
)
def test_a_restart_by_a_launcher_resumes_the_run_that_fresh_began(
    variable: str,
    job: str | None,
    untied_base: Path,
    conversations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, notes = tmp_path / "run", list[Event]()
    settings = make_settings(untied_base, conversations, run, max_steps=2, save_steps=1, fresh=True)
    monkeypatch.setenv(variable, "0")
    if job is not None:
        monkeypatch.setenv(job, "7")
    train(settings)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    monkeypatch.setenv(variable, "1")
    assert train(settings, notes.append).resumed_from == run / "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    texts = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert any(text.startswith("fresh: ignored, since torchrun or SLURM has restarted") for text in texts)
    monkeypatch.setenv(variable, "0")
    assert train(settings).resumed_from is None
    assert (tmp_path / "run.1" / "result.json").is_file()
    if job is not None:  # another job, which was restarted before it came to begin the run
        monkeypatch.setenv(variable, "1")
        monkeypatch.setenv(job, "8")
        assert train(settings).resumed_from is None
        assert (tmp_path / "run.2" / "result.json").is_file()
        assert train(settings).resumed_from is None
        assert not (tmp_path / "run.3").exists()
        # another call in the same job, whose first start fails, so that the old run is moved back
        monkeypatch.setenv(variable, "0")
        with pytest.raises(DataError):
            train(settings.replace(eval_data_path=str(tmp_path / "none.jsonl")))
        monkeypatch.setenv(variable, "1")
        assert train(settings).resumed_from is None
        assert (tmp_path / "run.3" / "result.json").is_file()


def test_fresh_renames_the_folder_that_a_link_points_to_and_keeps_the_link(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "run").mkdir(parents=True)
    link.symlink_to(disk / "run")
    settings = make_settings(untied_base, conversations, link)
    with ExitStack() as locks:
        set_up_run_folder(settings, locks)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n')
    with ExitStack() as locks, pytest.raises(DataError, match="no conversation to train on"):
        set_up_run_folder(settings.replace(data_path=str(bad), fresh=True), locks)
    (disk / "run" / "old").touch()  # the old run has been moved back
    with ExitStack() as locks:
        set_up_run_folder(settings.replace(fresh=True), locks)
        with ExitStack() as more, pytest.raises(SettingsError, match="another run is using this folder"):
            set_up_run_folder(settings, more)
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["run", "run.1"]
    assert sorted(path.name for path in link.iterdir()) == ["data", "settings.yaml"]
    assert (disk / "run.1" / "old").is_file()


def test_fresh_refuses_inputs_in_the_folder_that_it_would_rename(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(conversations, run / "more.jsonl")
    (run / "metric.py").write_text("def count(predictions, references):\n    return {'count': len(predictions)}\n")
    (tmp_path / "link.jsonl").symlink_to(run / "more.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the metric's file
    before = sorted(run.rglob("*"))
    inputs: list[tuple[str, Any]] = [
        ("adapter", "run"),
        ("adapter", run / "checkpoint-3"),
        ("data_path", "run/data"),
        ("data_path", "run/*.jsonl"),
        ("data_path", "link.jsonl"),
        ("data_path", [f"{conversations}:1", "run/more.jsonl:2"]),
        ("eval_data_path", "run/more.jsonl"),
        ("teacher_model_name_or_path", "run"),
        ("conversation_template", "run/template.yaml"),
        ("metric", "run/metric.py:count"),
    ]
    for name, value in inputs:
        changes = {"fresh": True, "eval_fraction": 0.2, "eval_generate": 1, name: value}
        changes |= {"eval_fraction": 0} if name == "eval_data_path" else {}
        settings = make_settings(untied_base, conversations, Path("run"), **changes)
        with ExitStack() as locks, pytest.raises(SettingsError) as refused:
            set_up_run_folder(settings, locks)
        (problem,) = refused.value.problems
        assert problem.startswith(f"{name}: ")
        assert problem.endswith(": is in output_dir run, which --fresh renames")
    assert sorted(run.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "run"]
    # the run's own token cache is made again
    own = make_settings(untied_base, conversations, Path("run"), fresh=True, preprocessed_path=Path("run/data"))
    with ExitStack() as locks:
        set_up_run_folder(own, locks)
    assert sorted(path.name for path in run.iterdir()) == ["data", "settings.yaml"]


@pytest.mark.slow
def test_the_settings_of_a_copied_run_name_the_folder_that_they_use(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "copy")
    (copied / "result.json").unlink()
    warning = (
        f"warning: {copied / 'settings.yaml'}: is in the run folder {copied}, but its output_dir is {finished_run}, "
        f"which this command uses; add --output-dir {copied} to use that run instead"
    )

    def run_config(config: Path, *more: Any) -> str:
        done = t5tune_in_fork("train", "--config", config, *more)
        assert done.code == 0, done.stderr
        return done.stderr

    lines = run_config(copied / "settings.yaml").splitlines()
    assert warning in lines
    assert any(f"{finished_run}: this run has already finished" in line for line in lines)
    assert "is in the run folder" not in run_config(copied / "settings.yaml", "--output-dir", copied)
    assert (copied / "result.json").is_file()
    assert "is in the run folder" not in run_config(finished_run / "settings.yaml")
    (tmp_path / "mine").mkdir()  # a file of the user's that has the same name
    shutil.copy(copied / "settings.yaml", tmp_path / "mine")
    assert "is in the run folder" not in run_config(tmp_path / "mine" / "settings.yaml")


def test_fresh_renames_nothing_but_a_run_that_contains_no_run_in_progress(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "experiments"
    (folder / "run" / "data").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    settings = make_settings(untied_base, conversations, folder, fresh=True)
    before = sorted(tmp_path.rglob("*"))
    with ExitStack() as locks, pytest.raises(SettingsError, match=r"experiments: isn't empty and isn't a t5tune run; "):
        set_up_run_folder(settings, locks)
    assert sorted(tmp_path.rglob("*")) == before
    (folder / "settings.yaml").write_text("learning_rate: [")  # of a run, although it is broken
    with RunFolder(folder / "run").lock(print):
        problem = rf"{folder}: --fresh can't rename it while another run is using {folder}/run; wait until it ends"
        with ExitStack() as locks, pytest.raises(SettingsError, match=problem):
            set_up_run_folder(settings, locks)
    with ExitStack() as locks:
        set_up_run_folder(settings, locks)
    assert (tmp_path / "experiments.1" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["data", "settings.yaml"]


def test_fresh_names_a_folder_that_cant_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)

    def begin(path: Path) -> None:
        with RunFolder(path).begin(make_run_plan(make_settings(tmp_path, tmp_path, path, fresh=True)), print):
            pass

    with pytest.raises(SettingsError, match=r"^output_dir: /proc: is a mount point, which --fresh can't rename"):
        begin(Path("/proc"))
    for folder in (tmp_path / "run", tmp_path / "run" / "data"):
        monkeypatch.chdir(folder)
        for path in (Path(os.path.relpath(tmp_path / "run")), tmp_path / "run"):
            with pytest.raises(SettingsError, match=r"^output_dir: .*: --fresh can't rename the current folder or"):
                begin(path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_run_whose_settings_are_broken_says_how_to_write_them_again(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    path, settings = run / "settings.yaml", make_settings(untied_base, conversations, run, eval_fraction=0.2)
    command = make_command(untied_base, conversations, run, "--eval-fraction", "0.2", "--use-cpu", "--dry-run")
    for content, problem in (
        ("", "missing or broken: not the settings of a run"),
        ("learning_rate: [", "the file ends inside brackets"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match=re.escape(problem)) as refused:
            train(settings)
        assert str(path) in refused.value.message
        assert f"--dry-run >{path}" in str(refused.value.hint)
    done = t5tune_in_fork(*[word for word in command if word != "--json"])
    assert done.code == 0, done.stderr
    path.write_text(done.stdout)
    assert train(settings).resumed_from == run / "checkpoint-6"


def test_the_output_of_another_command_is_not_taken_as_a_run(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """Although it has a settings.yaml too."""
    values = {"model_name_or_path": str(untied_base), "adapter": finished_run, "output_dir": tmp_path / "merged"}
    merge(MergeSettings.model_validate(values | {"verify": False}))
    before = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert "settings.yaml" in before
    with pytest.raises(SettingsError, match="isn't empty and isn't a t5tune run"):
        train(make_settings(untied_base, conversations, tmp_path / "merged"))
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == before


def test_non_finite_loss_stops_before_the_update(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = make_base(tmp_path / "base", tied=False)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="step 1: the loss is nan; no update was made; .*no checkpoint yet"):
        train(make_settings(broken, conversations, tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_held_out_loss_that_is_not_finite_is_null_in_the_result(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    base, run = make_base(tmp_path / "base", tied=False), tmp_path / "run"
    texts = {"train": "Two teas, please.", "held-out": "Two cakes, please."}
    encode = AutoTokenizer.from_pretrained(base).encode
    trained, held_out = ({*encode(text)} for text in texts.values())
    weights = load_file(base / "model.safetensors")
    weights["shared.weight"][sorted(held_out - trained)] = float("nan")  # as if they had overflowed
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'source': text, 'target': 'Yes.'})}\n" * 4)
    command = (
        "train", "--model-name-or-path", base, "--data-path", tmp_path / "train.jsonl", "--eval-data-path",
        tmp_path / "held-out.jsonl", "--output-dir", run, "--max-steps", 1, "--report-samples", 0, "--use-cpu",
    )  # fmt: skip
    done = t5tune_in_fork(*command, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (result["eval"]["loss"], result["eval"]["perplexity"]) == (None, None)
    assert result["train_loss"] > 0
    assert json.loads((run / "result.json").read_text(), parse_constant=pytest.fail) == result
    assert "<div><b>–</b><span>held-out loss</span></div>" in (run / "report.html").read_text()
    assert "nan" not in (run / "README.md").read_text()
    table = t5tune_in_fork(*command).stderr  # of the finished run
    assert re.search(r"^held-out loss +–$", table, re.MULTILINE), table
    (run / "result.json").write_text((run / "result.json").read_text().replace('"loss": null', '"loss": NaN'))
    assert read_result(run).eval["loss"] is None


def test_wrong_names_are_refused_before_anything_is_written(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError, match="training_args.adam_beta: no such field.*did you mean adam_beta"):
        train(make_settings(untied_base, conversations, run, training_args={"adam_beta": 0.9}))
    with pytest.raises(SettingsError, match="training_args.torch_compile_mode: .*; set torch_compile"):
        train(make_settings(untied_base, conversations, run, training_args={"torch_compile_mode": "max-autotune"}))
    with pytest.raises(
        SettingsError, match="training_args.learning_rate: set learning_rate directly, not under training_args"
    ):
        train(make_settings(untied_base, conversations, run, training_args={"learning_rate": 0.9}))
    with pytest.raises(SettingsError, match="deepspeed: zero5"):
        train(make_settings(untied_base, conversations, run, deepspeed="zero5"))
    assert not run.exists()
    with pytest.raises(SettingsError, match="lora_target_modules: query: no such linear layer"):
        train(make_settings(untied_base, conversations, run, lora_target_modules=["query"]))


def test_measured_events_have_loss_learning_rate_and_speed(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=1), events.append)
    measured = [event for event in events if isinstance(event, Measured)]
    assert {"loss", "lr", "grad norm", "tokens/s"} <= set(measured[0].values)


def test_each_evaluation_is_reported_with_its_progress_and_whether_it_is_the_best(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    changes = {"eval_fraction": 0.2, "eval_steps": 1, "eval_generate": 2, "max_steps": 3, "learning_rate": 1.0}
    train(make_settings(untied_base, conversations, tmp_path / "run", **changes), events.append)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    lines = [line for line in read_metrics_lines(tmp_path / "run") if "eval_loss" in line]
    assert [event.step for event in evaluated] == [1, 2, 3]
    assert [event.values["loss"] for event in evaluated] == [line["eval_loss"] for line in lines]
    losses = [line["eval_loss"] for line in lines]
    assert [event.is_best for event in evaluated] == [losses[n] == min(losses[: n + 1]) for n in range(3)]
    assert not evaluated[-1].is_best  # with such a learning rate
    assert {"perplexity", "exact_match", "rougeL"} <= set(evaluated[0].values)
    assert not any("second" in name or "runtime" in name for name in evaluated[0].values)
    first, second = (events.index(event) for event in evaluated[:2])
    for task, total in (("evaluate: losses", 9), ("evaluate: predictions", 2)):
        progress = [event for event in events[first:second] if getattr(event, "task", None) == task]
        assert progress[0] == Started(task, total, "examples")
        assert progress[-2:] == [Advanced(task, total), Finished(task)]


# --- two processes ---------------------------------------------------------------------------------------------


def make_command(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", "--model-name-or-path", str(base), "--data-path", str(data), "--output-dir", str(run),
        "--learning-rate", "1e-2", "--logging-steps", "1", "--lora-dropout", "0", "--report-samples", "0",
        "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_step(
    base_without_dropout: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Loss and gradient norm of one step on eight examples, in one process."""
    run = tmp_path_factory.mktemp("runs") / "batch"
    train(
        make_settings(
            base_without_dropout,
            conversations,
            run,
            num_data=8,
            max_steps=1,
            per_device_train_batch_size=8,
            lora_dropout=0.0,
        )
    )
    return read_metrics_lines(run)[0]


BATCHES = {
    "accumulated": ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--use-cpu"),
    "ddp": ("--per-device-train-batch-size", "4"),
    "zero2": ("--per-device-train-batch-size", "4", "--deepspeed", "zero2"),
    "zero3": ("--per-device-train-batch-size", "4", "--deepspeed", "zero3"),
    "zero2-accumulated": (
        "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--deepspeed", "zero2",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", BATCHES)
@pytest.mark.variants("ddp", "zero2-accumulated", "zero3")
def test_a_batch_gives_the_same_loss_and_gradient_however_it_is_divided(
    way: str,
    base_without_dropout: Path,
    conversations: Path,
    one_step: dict[str, float],
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    more = ("--num-data", "8", "--max-steps", "1", *BATCHES[way])
    done = on_ranks(2, *make_command(base_without_dropout, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    line = read_metrics_lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(one_step["loss"], rel=1e-4)
    assert line["grad_norm"] == pytest.approx(one_step["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", [("zero3", "--q-lora", "--no-bf16"), ("zero1", "--bf16"), ("zero0", "--bf16")])
@pytest.mark.variants(2)
def test_deepspeed_stages_reduce_the_loss_and_save_the_fp32_masters(
    way: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    more = ["--deepspeed", *way, "--max-steps", "3", "--per-device-train-batch-size", "4"]
    done = on_ranks(2, *make_command(untied_base, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2
    assert read_losses(tmp_path / "run")[-1] < read_losses(tmp_path / "run")[0]
    values = torch.cat([v.flatten() for v in load_file(tmp_path / "run" / "adapter_model.safetensors").values()])
    assert not torch.equal(values, values.bfloat16().float())


# as in transformers' documentation
DOCUMENTED = {
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
@pytest.mark.variants("zero1")
def test_a_deepspeed_config_for_other_tools_trains_the_weights_of_the_settings(
    stage: str, base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    config, notes = tmp_path / "own.json", {}
    config.write_text(json.dumps(packaged_templates.read_deepspeed_config(stage) | DOCUMENTED))
    for name, used, schedule in (
        ("without", stage, "constant_with_warmup"),
        ("with", config, "constant_with_warmup"),
        ("other", config, "linear"),
        ("linear", stage, "linear"),
    ):
        command = make_command(base_without_dropout, conversations, tmp_path / name, "--max-steps", "4", "--use-cpu")
        command += ["--weight-decay", "0.5", "--warmup-steps", "2", "--lr-scheduler-type", schedule]
        done = on_ranks(1, *command, "--deepspeed", used)
        assert done.code == 0, done.stderr
        notes[name] = [line for line in done.stderr.splitlines() if "is replaced by" in line]
    adapters = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in notes}
    assert adapters["with"] == adapters["without"]
    assert adapters["other"] == adapters["linear"] != adapters["with"]
    replaced = f"deepspeed: {config}: the scheduler WarmupLR is replaced by lr_scheduler_type linear"
    assert notes.pop("other") == [
        f"{replaced}; --lr-scheduler-type constant_with_warmup is the one that the file names"
    ]
    assert not any(notes.values())


@pytest.mark.slow
@pytest.mark.distributed
def test_the_numbers_of_steps_in_a_deepspeed_config_are_compared_once_they_are_known(
    base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    config, run = tmp_path / "own.json", tmp_path / "run"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2, "weight_decay": 0, "eps": 1e-8}}
    own = packaged_templates.read_deepspeed_config("zero2") | {"optimizer": optimizer, "train_batch_size": 4}
    command = make_command(base_without_dropout, conversations, run, "--num-data", "16", "--num-train-epochs", "2")
    command += ["--per-device-train-batch-size", "4", "--warmup-steps", "0.25", "--use-cpu", "--deepspeed", str(config)]

    def write_config(warmup: int, total: int) -> None:
        params = {"warmup_max_lr": 1e-2, "warmup_num_steps": warmup, "total_num_steps": total}
        config.write_text(json.dumps(own | {"scheduler": {"type": "WarmupDecayLR", "params": params}}))

    write_config(3, 99)
    done = on_ranks(1, *command)
    assert done.code == 2, done.stderr
    problem = f"num_train_epochs: 2: {config} has scheduler.params.total_num_steps 99, but the settings make it 8"
    assert f'{problem}; set "auto" there' in done.stderr
    problem = f"warmup_steps: 0.25: {config} has scheduler.params.warmup_num_steps 3, but the settings make it 2"
    assert f'{problem}; set "auto" there' in done.stderr
    write_config(2, 8)
    done = on_ranks(1, *command)
    assert done.code == 0, done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_deepspeed_config_gets_what_it_leaves_out_from_the_settings(
    base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    whole = packaged_templates.read_deepspeed_config("zero2")
    missing: dict[str, set[str]] = {
        "nothing": set(),
        "clipping": {"gradient_clipping"},
        "accumulation": {"gradient_accumulation_steps"},
        "batch": {"gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"},
    }
    found = {}
    for name, keys in missing.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({key: whole[key] for key in whole.keys() - keys}))
        command = make_command(base_without_dropout, conversations, tmp_path / name, "--max-steps", "2", "--use-cpu")
        command += ["--optim", "sgd", "--max-grad-norm", "0.1", "--gradient-accumulation-steps", "2"]
        done = on_ranks(1, *command, "--deepspeed", str(tmp_path / f"{name}.json"))
        assert done.code == 0, done.stderr
        found[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert len({*found.values()}) == 1, [*found]


def test_settings_of_examples_that_differ_from_those_of_the_cache_are_refused(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    made = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": cache}
    prepare(PrepareSettings(**made, model_max_length=64, conversation_template="plain", train_on="last"))
    asked = {"model_max_length": 32, "add_tokens": "none", "conversation_template": "turns"}
    with pytest.raises(SettingsError) as caught:
        train(make_settings(untied_base, cache, run, **asked))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "add_tokens",
        "model_max_length",
        "conversation_template",
    ]
    assert f"model_max_length: 32 here, 64 in the cache {cache}" in caught.value.message
    assert not run.exists()
    agreed = {"model_max_length": 64, "conversation_template": "plain"}
    train(make_settings(untied_base, cache, run, max_steps=1, **agreed))
    saved, _ = load_settings(TrainSettings, str(run / "settings.yaml"))
    assert (saved.model_max_length, saved.train_on, saved.add_tokens) == (64, "last", ["auto"])
    assert train(saved).steps == 1  # the run is finished, and the settings are the same


def test_errors_name_unknown_optimizers_and_schedules_and_the_eval_data(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError) as caught:
        train(make_settings(untied_base, conversations, run, optim="adamw_torhc", lr_scheduler_type="cosin"))
    assert [line.rpartition("; ")[2] for line in caught.value.problems] == [
        "did you mean adamw_torch?", "did you mean cosine?"
    ]  # fmt: skip
    assert not run.exists()
    (tmp_path / "dev.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"^eval_data_path: .*dev\.jsonl: no conversation"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(tmp_path / "dev.jsonl")))


@pytest.mark.parametrize(
    ("schedule", "options", "problem"),
    [
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("cosine_warmup_with_min_lr", {}, "min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("linear", {"min_lr": 1e-5}, "unexpected keyword argument 'min_lr'"),
        ("cosine_with_min_lr", {"min_lr": 1e-5}, None),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 1}, None),
    ],
)
def test_a_schedule_that_lacks_an_argument_is_refused_before_anything_is_written(
    schedule: str, options: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lr_scheduler_type": schedule, "training_args": {"lr_scheduler_kwargs": options}}
    settings = make_settings(Path("pocket"), Path("pocket"), tmp_path / "run", **changes)
    if problem is None:
        check_plan(make_run_plan(settings))
        return
    with pytest.raises(SettingsError, match=f"lr_scheduler_type: {schedule}: .*{problem}.*; set lr_scheduler_kwargs"):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_package_or_argument_is_missing_is_named(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    for optim, problem in (("lomo", "lomo"), ("galore_adamw", "galore|optim_target_modules")):
        with pytest.raises(SettingsError, match=f"^optim: {optim}: .*({problem})"):
            train(make_settings(untied_base, conversations, tmp_path / optim, optim=optim))


def test_an_optimizer_without_weight_decay_trains(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LOMO's and those of layer-wise GaLore, whose packages the tests don't have, the groups of Rprop have none."""

    def choose(_args: Any, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.Rprop, {"params": [value for value in model.parameters() if value.requires_grad]}

    monkeypatch.setattr(T5Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose))
    assert train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=2)).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), TWO])
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_trains(
    more: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, refused = tmp_path / "run", []
    flags = ("--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run, "--use-cpu")

    def meanwhile(event: Event) -> None:
        if event == Advanced("train", 2):
            refused.append(t5tune_in_fork("train", *flags, *more))
            refused.append(t5tune_in_fork("train", *flags, *more, "--fresh"))

    train(make_settings(untied_base, conversations, run), meanwhile)
    message = (
        f"error: output_dir: {run}: another run is using this folder; wait until it ends, or choose another folder"
    )
    assert [(done.code, done.errors) for done in refused] == [(2, [message])] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert train(make_settings(untied_base, conversations, run)).steps == 6


@pytest.mark.slow
def test_a_finished_run_of_two_processes_is_not_repeated(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    command = make_command(untied_base, conversations, tmp_path / "run", "--max-steps", "1")
    first = on_ranks(2, *command)
    again = t5tune_in_fork(*command, *TWO)
    assert first.code == again.code == 0, first.stderr + again.stderr
    assert first.json == again.json


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.long
def test_several_processes_have_the_settings_of_the_command_and_of_the_cache(untied_base: Path, tmp_path: Path) -> None:
    """A flag overrides a variable in each of them, and what isn't given is that of the token cache."""
    pairs, cache, run = tmp_path / "pairs.jsonl", tmp_path / "cache", tmp_path / "run"
    records = [{"prompt": f"Say {word}.", "chosen": word, "rejected": "No."} for word in ("one", "two", "six", "ten")]
    pairs.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    prepare(
        PrepareSettings(model_name_or_path=str(untied_base), data_path=str(pairs), output_dir=cache, objective="dpo")
    )
    command = make_command(untied_base, cache, run, "--max-steps", "1", "--use-cpu", "--q-lora")
    environment = {"T5TUNE_LEARNING_RATE": "0.5", "T5TUNE_OUTPUT_DIR": str(tmp_path / "other")}
    done = t5tune_in_fork(*command, *TWO, env=environment)
    assert done.code == 0, done.stderr
    assert done.json["world_size"] == 2
    assert done.stderr.count("q_lora turns bf16 on") == 1
    saved = read_yaml(run / "settings.yaml")
    assert (saved["learning_rate"], saved["objective"]) == (0.01, "dpo")
    assert not (tmp_path / "other").exists()
    assert t5tune_in_fork(*command).json == done.json  # the same run with one process: it has finished


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_training_runs_under_other_launchers(
    launcher: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    arguments = make_command(untied_base, conversations, tmp_path / "run", "--max-steps", "1", "--use-cpu")
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "t5tune"]
    else:
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "t5tune"]
        arguments += ["--deepspeed", "zero2"]
    # the deepspeed launcher counts GPUs with torch; on a CPU, --num_gpus and DS_ACCELERATOR set the number of processes
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2


@pytest.mark.long
@pytest.mark.slow
def test_an_error_in_all_workers_is_shown_once_with_its_exit_code(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    command = make_command(untied_base, conversations, tmp_path / "run", *TWO, "--lora-target-modules", "query")
    done = t5tune_in_fork(*command, "--max-steps", "1")
    assert done.code == 2
    assert len(done.errors) == 1, done.stderr
    assert "lora_target_modules: query" in done.errors[0]
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "SettingsError"
    assert "in add_lora" in t5tune_in_fork(*command, "--max-steps", "1", "--debug").stderr  # where in the worker


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage", "more"),
    [
        ("untied", "zero3", ()),
        ("tied", "zero3", ()),
        ("untied", "zero2", ()),
        ("tied", "zero0", ()),
        ("untied", "zero3", ("--q-lora", "--no-bf16")),
        ("untied", None, ("--q-lora",)),
    ],
)
@pytest.mark.variants("untied-zero3-more0")
def test_the_live_base_equals_its_file_before_and_after_training(
    kind: str,
    stage: str | None,
    more: tuple[str, ...],
    conversations: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    on_ranks: Callable[..., CommandResult],
) -> None:
    base, found = request.getfixturevalue(f"{kind}_base"), tmp_path / "found.json"
    more = [*(("--deepspeed", stage) if stage else ()), *more, "--max-steps", "2"]
    call = f"tests.support.base_stays:record_base_weights({str(base)!r}, {str(found)!r})"
    done = on_ranks(2 if stage else 1, *make_command(base, conversations, tmp_path / "run", *more), calls=[call])
    assert done.code == 0, done.stderr[-3000:]
    before, after = json.loads(found.read_text())
    assert before["different"] == after["different"] == []
    names = {name.split()[1] for name in after["equal"]}
    assert "shared.weight" in names
    assert any(name.endswith("layer_norm.weight") for name in names)
    if kind == "untied":
        assert "lm_head.weight" in names


def shorten_samples() -> None:
    """From here on, samples have at most six predicted tokens: under ZeRO-3 every token gathers the whole model."""
    sample_predictions.MAX_PREDICTED_TOKENS = 6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_zero3_resume_to_the_same_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    run = tmp_path / "run"
    more = ["--deepspeed", "zero3", "--max-steps", "4", "--save-steps", "2", "--lora-dropout", "0.05"]
    more += ["--per-device-train-batch-size", "2", "--report-samples", "3"]
    arguments = make_command(untied_base, conversations, run, *more)
    shorten = "tests.commands.test_train:shorten_samples()"
    first = on_ranks(2, *arguments, calls=[shorten])
    assert first.code == 0, first.stderr
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()
    again = on_ranks(2, *arguments, calls=[shorten])
    assert again.code == 0, again.stderr
    assert again.json["resumed_from"] == str(run / "checkpoint-2")
    for name in ("tokens", "train_loss"):
        assert again.json[name] == pytest.approx(first.json[name], rel=1e-6)
    assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 3
    assert all({"source", "target", "before", "after", "loss"} <= set(sample) for sample in samples)
    assert "Sample predictions before and after training" in (run / "report.html").read_text()


def test_a_start_that_fails_on_its_data_leaves_only_the_rejected_records(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "bad.jsonl", tmp_path / "new" / "parent" / "run"
    data.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="no conversation to train on"):
        train(make_settings(untied_base, data, run))
    assert [path.name for path in run.parent.iterdir()] == ["run.rejected.jsonl"]
    # an empty folder of the user's stays
    run.mkdir(parents=True)
    with pytest.raises(DataError, match="no conversation to train on"):
        train(make_settings(untied_base, data, run))
    assert list(run.iterdir()) == []
    # a cache that took its time to prepare is kept for the next start, with the settings that make the folder a run
    with pytest.raises(DataError, match="no conversation to evaluate on"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(data)))
    assert sorted(path.name for path in run.iterdir()) == ["data", "settings.yaml"]
    # a start with --fresh that fails moves the old run back
    (run / "data" / "old").touch()
    with pytest.raises(DataError, match="no conversation to evaluate on"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(data), fresh=True))
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run.rejected.jsonl"]
    (run / "data" / "old").unlink()
    # so is what existed before
    with pytest.raises(DataError, match="no conversation to train on"):
        train(make_settings(untied_base, data, run))
    assert sorted(path.name for path in run.iterdir()) == ["data", "settings.yaml"]
