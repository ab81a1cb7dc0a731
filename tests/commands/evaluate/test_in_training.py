"""Evaluations during training: when they run, what they choose, and what a resumed run does with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.export import export
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.errors import CheckpointError, DataError, OutOfMemory, Stopped
from t5tune.progress import Advanced, Event, Note
from t5tune.runs import publisher
from t5tune.runs.checkpoints import verify
from t5tune.runs.metrics_log import read_metrics
from t5tune.settings import (
    ExportSettings,
    PrepareSettings,
)
from tests.commands.evaluate.outputs import EVALUATED, make_short_settings, run_evaluate, write_answers
from tests.support.caches import open_only
from tests.support.processes.runs import stop_at

pytestmark = pytest.mark.slow


def test_the_last_metrics_of_training_equal_those_of_evaluate(
    untied_base: Path, conversations: Path, cache: Path, tmp_path: Path
) -> None:
    lines = conversations.read_text().splitlines()[:5]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines))
    changes = {"eval_data_path": str(tmp_path / "held_out.jsonl"), "eval_generate": 100}
    trained = train(make_short_settings(untied_base, cache, tmp_path / "run", **changes))
    result = run_evaluate(tmp_path / "run", tmp_path / "held_out.jsonl", tmp_path / "out", max_new_tokens=None)
    for name in EVALUATED:
        assert trained.eval[name] == pytest.approx(getattr(result, name), rel=1e-4), name


def test_evaluate_scores_only_the_held_out_part_of_a_run(
    untied_base: Path, conversations: Path, cache: Path, tmp_path: Path
) -> None:
    """Also of a token cache that was given to train, and for a checkpoint. Runs that held out none see all examples."""
    for given, data in ((conversations, tmp_path / "0" / "data"), (cache, cache)):
        run = data.parent if given == conversations else tmp_path / "1"
        trained = train(make_short_settings(untied_base, given, run, eval_fraction=0.25, split_seed=7))
        for model in (run, run / "checkpoint-4"):
            notes: list[Event] = []
            result = run_evaluate(model, data, tmp_path / "scores", notes.append, overwrite=True, max_new_tokens=1)
            assert result.loss == pytest.approx(trained.eval["loss"], rel=1e-4)
            texts = [note.text for note in notes if isinstance(note, Note)]
            assert f"{data}: evaluating on its {result.examples} held-out examples" in texts
    train(make_short_settings(untied_base, cache, tmp_path / "2"))
    for model in (untied_base, tmp_path / "2"):
        whole = run_evaluate(model, cache, tmp_path / "scores", overwrite=True, max_new_tokens=1)
        assert whole.examples == trained.examples + result.examples


@pytest.mark.parametrize("kind", ["conversations", "cache"])
def test_held_out_conversations_use_the_training_datas_added_tokens(
    kind: str, untied_base: Path, tmp_path: Path
) -> None:
    data = write_answers(tmp_path / "data.jsonl", "日本 日", "火 日")
    held_out = write_answers(tmp_path / "held out.jsonl", "月 日", "日 水 月")
    if kind == "cache":
        values = {"model_name_or_path": str(untied_base), "conversation_template": "plain"}
        data = prepare(PrepareSettings(**values, data_path=str(data), output_dir=tmp_path / "cache")).cache
    chosen = make_short_settings(untied_base, data, tmp_path / "run", eval_data_path=str(held_out), eval_steps=4)
    loss = train(chosen).eval["loss"]
    added = open_only(tmp_path / "run" / "eval-data").added_tokens
    assert "日" in added
    assert "月" not in added
    assert loss == pytest.approx(run_evaluate(tmp_path / "run", held_out, tmp_path / "scores").loss, abs=1e-6)


def test_held_out_examples_with_another_tokenizer_are_refused(untied_base: Path, tmp_path: Path) -> None:
    caches = []
    for name, answer in (("data", "日本"), ("held-out", "月")):
        data = write_answers(tmp_path / f"{name}.jsonl", answer)
        values = {"model_name_or_path": str(untied_base), "data_path": str(data), "output_dir": tmp_path / name}
        caches.append(prepare(PrepareSettings(**values)).cache)
    chosen = make_short_settings(untied_base, caches[0], tmp_path / "run", eval_data_path=str(caches[1]))
    with pytest.raises(
        DataError,
        match="eval_data_path: .*/held-out: its tokenizer differs from the training data's: '日' is only in .*/data",
    ):
        train(chosen)


@pytest.mark.parametrize("more", [{}, {"q_lora": True}, {"q_lora": True, "bf16": False}])
@pytest.mark.variants(1)
def test_evaluation_during_training_does_not_change_the_adapter(
    untied_base: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    data = write_answers(tmp_path / "data.jsonl", "yes", "no, not yet", "it arrived this morning")
    common = {"eval_fraction": 0.25, "group_by_length": True, "dataloader_num_workers": 0, **more}
    train(make_short_settings(untied_base, data, tmp_path / "often", eval_steps=1, eval_generate=2, **common))
    train(make_short_settings(untied_base, data, tmp_path / "never", eval_strategy="no", **common))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("often", "never"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(value.any() for name, value in a.items() if "lora_B" in name)


def test_the_best_checkpoint_is_kept_and_becomes_the_result(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 no evaluation is better than the first."""
    changes = {"learning_rate": 0, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "eval_fraction": 0.2}
    notes: list[Event] = []
    best = {"metric_for_best_model": "eval_loss", "max_steps": 5}
    result = train(make_short_settings(untied_base, conversations, tmp_path / "run", **changes, **best), notes.append)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-5"]
    assert result.steps == 5
    assert any("from the best step, 1: held-out loss" in event.text for event in notes if isinstance(event, Note))
    a, b = (tmp_path / "run" / name / "adapter_model.safetensors" for name in ("checkpoint-1", ""))
    assert a.read_bytes() == b.read_bytes()


def test_the_best_checkpoint_of_a_finished_run_is_exported(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 10.0, "eval_steps": 1, "save_steps": 1, "max_steps": 3, "eval_fraction": 0.2}
    run, notes = tmp_path / "run", list[str]()
    train(make_short_settings(untied_base, conversations, run, metric_for_best_model="loss", **changes))
    best = json.loads((run / "trainer_state.json").read_text())["best_global_step"]
    assert best < 3, "the rate is too high on purpose"
    result = export(
        ExportSettings(checkpoint=run, output_dir=tmp_path / "adapter"),
        lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert result.step == best
    assert f"{run}: exporting {run / f'checkpoint-{best}'}, the best checkpoint, which is the run's result" in notes
    weights = [folder / "adapter_model.safetensors" for folder in (run, tmp_path / "adapter", run / "checkpoint-3")]
    of_run, exported, newest = map(load_file, weights)
    assert all(torch.equal(of_run[name], exported[name]) for name in of_run)
    assert not all(torch.equal(newest[name], exported[name]) for name in of_run)

    # without the best checkpoint, the run's adapter is still its result, and not a different checkpoint's adapter
    (run / f"checkpoint-{best}" / "optimizer.pt").unlink()
    export(ExportSettings(checkpoint=run, output_dir=tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(of_run[name], again[name]) for name in of_run)

    (run / "result.json").unlink()
    shutil.rmtree(run / f"checkpoint-{best}")
    with pytest.raises(
        CheckpointError,
        match=f"checkpoint-{best}: the best checkpoint, .*as an adapter or a model, such as .*checkpoint-3",
    ):
        train(make_short_settings(untied_base, conversations, run, metric_for_best_model="loss", **changes))


def test_early_stopping_ends_a_run_that_no_longer_improves(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 0, "eval_steps": 2, "max_steps": 20, "eval_fraction": 0.2}
    settings = make_short_settings(untied_base, conversations, tmp_path / "run", early_stopping_patience=2, **changes)
    result = train(settings)
    assert result.steps == 6  # evaluated at 2 (the best), 4 and 6
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 6]  # logging_steps is 10
    assert result.train_loss == pytest.approx((lines[0]["loss"] + 5 * lines[1]["loss"]) / 6, rel=1e-6)

    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed before it was done
    events: list[Event] = []
    again = train(settings, events.append)
    assert (again.resumed_from, again.steps) == (tmp_path / "run" / "checkpoint-6", 6)
    assert any("stopped early" in event.text for event in events if isinstance(event, Note)), events


def test_a_resumed_run_ignores_evaluations_of_different_held_out_examples(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    lines = conversations.read_text().splitlines(keepends=True)
    easy, other = tmp_path / "easy.jsonl", tmp_path / "other.jsonl"
    easy.write_text("".join(lines[:4]))
    other.write_text("".join(lines[4:8]))
    run = tmp_path / "run"
    changes = {"learning_rate": 0, "eval_steps": 1, "save_steps": 1, "max_steps": 4, "metric_for_best_model": "loss"}
    settings = make_short_settings(untied_base, conversations, run, eval_data_path=[str(easy)], **changes)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    for file, count in ((easy, 0), (other, 1)):
        notes: list[Event] = []
        shutil.copytree(run, resumed := tmp_path / file.stem)
        train(settings.replace(output_dir=resumed, eval_data_path=[str(file)]), notes.append)
        said = "earlier evaluations no longer count"
        assert sum(said in event.text for event in notes if isinstance(event, Note)) == count
        best = json.loads((resumed / "trainer_state.json").read_text())["best_global_step"]
        # with a learning rate of 0, the first evaluation that counts stays the best
        assert best == (newest if count else 1)


def make_second_evaluation_fail(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the second evaluation in this process run out of memory. Return a list that gets the example counts."""
    from t5tune.training import objectives

    calls: list[int] = []
    measure = objectives.measure_losses

    def measure_or_fail(model: Any, examples: Any, *arguments: Any) -> Any:
        calls.append(len(examples))
        if len(calls) == 2:
            raise OutOfMemory("out of memory: evaluate: losses")
        return measure(model, examples, *arguments)

    monkeypatch.setattr(objectives, "measure_losses", measure_or_fail)
    return calls


def test_a_resumed_run_evaluates_a_checkpoint_whose_evaluation_failed(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "max_steps": 6, "eval_fraction": 0.2}
    train(make_short_settings(untied_base, conversations, tmp_path / "uninterrupted", **changes))
    calls = make_second_evaluation_fail(monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(OutOfMemory):
        train(make_short_settings(untied_base, conversations, run, **changes))
    assert verify(run / "checkpoint-4") is None
    assert (
        run / "checkpoint-2"
    ).is_dir()  # rotation waits for the evaluation, which decides which checkpoint is better
    result = train(make_short_settings(untied_base, conversations, run, **changes))
    assert result.resumed_from == run / "checkpoint-4"
    assert len(calls) == 4  # at 2, at 4 (fails), at 4 again, at 6
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    evaluations = {
        name: [(line["step"], line["eval_loss"]) for line in read_metrics(tmp_path / name) if "eval_loss" in line]
        for name in ("uninterrupted", "run")
    }
    assert [step for step, _ in evaluations["run"]] == [2, 4, 6]
    assert evaluations["run"] == evaluations["uninterrupted"]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("uninterrupted", "run")]
    assert adapters[0] == adapters[1]


def test_a_resumed_run_makes_the_last_evaluation_without_more_steps(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": None, "num_train_epochs": 2, "eval_fraction": 0.2, "per_device_train_batch_size": 8}
    run = tmp_path / "run"
    uninterrupted = train(make_short_settings(untied_base, conversations, tmp_path / "uninterrupted", **changes))
    calls = make_second_evaluation_fail(monkeypatch)
    with pytest.raises(OutOfMemory):
        train(make_short_settings(untied_base, conversations, run, **changes))
    result = train(make_short_settings(untied_base, conversations, run, **changes))
    assert result.resumed_from == run / f"checkpoint-{uninterrupted.steps}"
    assert len(calls) == 3
    assert result.eval["loss"] == uninterrupted.eval["loss"]
    assert result.tokens == uninterrupted.tokens
    assert result.train_loss == pytest.approx(uninterrupted.train_loss, rel=1e-6)


def test_a_resumed_run_evaluates_its_last_step_despite_the_delay(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay = {"eval_delay": 100, "eval_on_start": True}
    changes = {"max_steps": 2, "save_steps": 2, "eval_steps": 1, "eval_fraction": 0.2, "training_args": delay}
    settings = make_short_settings(untied_base, conversations, tmp_path / "run", **changes)
    make_second_evaluation_fail(monkeypatch)
    with pytest.raises(OutOfMemory):
        train(settings)
    result = train(settings)
    assert result.resumed_from == tmp_path / "run" / "checkpoint-2"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "eval_loss" in line] == [0, 2]


def test_a_step_is_saved_once_and_evaluated_once(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "eval_steps": 2, "save_steps": 2, "max_steps": 6, "eval_fraction": 0.2, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    published: list[int] = []
    write = publisher.write_manifest
    monkeypatch.setattr(publisher, "write_manifest", lambda *given: published.append(given[1]) or write(*given))
    run = tmp_path / "run"
    uninterrupted = train(make_short_settings(untied_base, conversations, run, **changes))
    assert published == [2, 4, 6]
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-6")
    calls = make_second_evaluation_fail(monkeypatch)
    again = train(make_short_settings(untied_base, conversations, run, **changes))
    assert again.resumed_from == run / "checkpoint-4"
    assert len(calls) == 1
    assert again.eval["loss"] == uninterrupted.eval["loss"]
    state = json.loads((run / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "eval_loss" in line] == [2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "evaluated"),
    [
        ({"training_args": {"eval_delay": 3}, "eval_steps": 1}, [3, 4]),
        ({"training_args": {"eval_delay": 2}, "eval_strategy": "epoch", "max_steps": None, "num_train_epochs": 2}, [4]),
        ({"training_args": {"eval_on_start": True}, "eval_steps": 3}, [0, 3, 4]),
    ],
    ids=["delay", "delay in epochs", "on start"],
)
@pytest.mark.variants("delay in epochs")
def test_a_resumed_run_evaluates_at_the_same_steps(
    changes: dict[str, Any], evaluated: list[int], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 4, "save_steps": 2, "num_data": 12, "eval_fraction": 0.4, **changes}
    settings = make_short_settings(untied_base, conversations, tmp_path / "run", **changes)
    assert train(settings).steps == 4

    def list_evaluated() -> list[int]:
        state = json.loads((settings.output_dir / "trainer_state.json").read_text())
        return [line["step"] for line in state["log_history"] if "eval_loss" in line]

    assert list_evaluated() == evaluated
    (settings.output_dir / "result.json").unlink()
    shutil.rmtree(settings.output_dir / "checkpoint-4")
    assert train(settings).resumed_from == settings.output_dir / "checkpoint-2"
    assert list_evaluated() == evaluated


def test_the_last_step_is_evaluated_once(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    changes = {"max_steps": None, "num_train_epochs": 1, "eval_fraction": 0.2, "per_device_train_batch_size": 8}
    result = train(make_short_settings(untied_base, conversations, tmp_path / "run", **changes))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [result.steps]
