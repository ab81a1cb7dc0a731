"""Runs in a script or a notebook: what `train` returns, records in memory, and progress."""

import html
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file

import t5tune
from t5tune import (
    ChatSettings,
    Chatter,
    EvaluateSettings,
    PrepareSettings,
    SettingsError,
    TrainSettings,
    Turn,
    evaluate,
    load_settings,
    prepare,
    progress_bar,
    read_metrics,
    read_result,
    train,
)
from t5tune.checkpoints.pocket import pocket_folder
from t5tune.errors import DataError, T5TuneError
from t5tune.progress import Event, Note
from tests.support.caches import find_cache
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.python_api import PAIRS, make_settings, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def run(folder: Path) -> t5tune.runs.result.TrainResult:  # type: ignore[name-defined]
    """A run on a DataFrame, with an evaluation."""
    return train(
        make_settings(folder, data_path=pd.DataFrame(PAIRS), eval_fraction=0.2, eval_steps=1, report_samples=2)
    )


def test_the_metrics_of_a_run_are_a_list_of_dicts(run: Any) -> None:
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["loss"] > 0 and line["eval_loss"] > 0 for line in metrics)
    assert metrics[-1]["eval_loss"] == run.eval["loss"]
    assert read_metrics(str(run.run)) == metrics
    assert read_result(str(run.run)) == run


def test_load_gives_the_weights_on_disk(run: Any) -> None:
    model, tokenizer, template = run.load(use_cpu=True)
    state = model.state_dict()
    adapter, base = load_file(run.run / "adapter_model.safetensors"), load_file(pocket_folder() / "model.safetensors")
    lora = {name: tensor for name, tensor in adapter.items() if "lora_" in name}
    attentions = model.config.num_layers + 2 * model.config.num_decoder_layers
    assert len(lora) == 4 * attentions  # A and B of q and v
    for name, tensor in lora.items():
        assert state[re.sub(r"(lora_[AB])", r"\1.default", name)].equal(tensor), name
    query = "encoder.block.0.layer.0.SelfAttention.q"
    assert state[f"base_model.model.{query}.base_layer.weight"].equal(base[f"{query}.weight"])
    message = [{"role": "user", "content": "How much is 2 + 2?"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
    reply = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(run.run), max_new_tokens=8, use_cpu=True))
    assert chatter.reply([Turn("human", "How much is 2 + 2?")]).reply == reply
    assert chatter.prompts.template == template
    with pytest.raises(SettingsError, match="bf_16: unknown setting; did you mean bf16?"):
        run.load(bf_16=True)


def test_a_notebook_shows_the_report_in_a_frame(run: Any) -> None:
    shown = run._repr_html_()
    page = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', shown)
    assert page is not None
    assert html.unescape(page[1]) == (run.run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_was_moved_is_read_where_it_is(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.run, tmp_path / "moved")
    moved = read_result(tmp_path / "moved")
    assert (moved.run, moved.adapter) == (tmp_path / "moved", tmp_path / "moved")
    assert moved.metrics() == run.metrics()
    (moved.run / "report.html").unlink()
    assert moved._repr_html_() is None  # then a notebook shows the text
    (moved.run / "result.json").write_text("[]")
    with pytest.raises(T5TuneError, match=r"result\.json: broken"):
        read_result(moved.run)
    (moved.run / "result.json").unlink()
    with pytest.raises(T5TuneError, match=r"moved: not a finished run: .*; train with the same settings to continue"):
        read_result(moved.run)
    with pytest.raises(SettingsError, match="elsewhere: no such folder"):
        read_metrics(tmp_path / "elsewhere")


def test_the_command_line_repeats_a_run_on_kept_records(run: Any, folder: Path) -> None:
    (kept,) = (run.run / "records").iterdir()
    assert [json.loads(line) for line in kept.read_text().splitlines()] == PAIRS
    settings, _ = load_settings(TrainSettings, str(run.run / "settings.yaml"))
    assert settings.data_path == [str(kept)]
    again = t5tune_in_fork("train", "--config", run.run / "settings.yaml", "--output-dir", folder / "again", "--json")
    assert again.code == 0, again.stderr
    assert again.json["train_loss"] == run.train_loss


def test_the_same_records_resume_a_run_and_others_are_refused(run: Any, folder: Path) -> None:
    same = {"eval_fraction": 0.2, "eval_steps": 1, "report_samples": 2}
    notes: list[Event] = []
    assert train(make_settings(folder, data_path=PAIRS, **same), notes.append) == run
    assert train(make_settings(folder, data_path=PAIRS, **same), None) == run  # None: no output
    assert notes == [Note(f"{run.run}: this run has already finished; use --fresh to start over")]
    with pytest.raises(SettingsError, match=r"data_path: \S+\.jsonl before, \S+\.jsonl now"):
        train(make_settings(folder, data_path=PAIRS[:-1], **same))
    assert len([*(run.run / "records").iterdir()]) == 1


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_same_records_resume_a_run_that_was_moved(is_finished: bool, tmp_path: Path) -> None:
    first = train(make_settings(tmp_path))
    (tmp_path / "run").rename(tmp_path / "run-2")
    if not is_finished:
        (tmp_path / "run-2" / "result.json").unlink()
    moved = train(make_settings(tmp_path, output_dir=tmp_path / "run-2"))
    assert (moved.run, moved.train_loss) == (tmp_path / "run-2", first.train_loss)
    assert moved.resumed_from == (None if is_finished else tmp_path / "run-2" / "checkpoint-2")
    with pytest.raises(SettingsError, match=r"data.*: \S+\.jsonl before, \S+\.jsonl now"):
        train(make_settings(tmp_path, output_dir=tmp_path / "run-2", data_path=PAIRS[:-1]))
    run = (tmp_path / "run-2").rename(tmp_path / "run-3")
    if not is_finished:
        (run / "result.json").unlink()
    again = t5tune_in_fork("train", "--config", run / "settings.yaml", "--output-dir", run, "--json")
    assert again.code == 0, again.stderr
    assert again.json["train_loss"] == first.train_loss


def test_fresh_keeps_the_records_that_its_settings_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = train(make_settings(tmp_path))
    (kept,) = (tmp_path / "run" / "records").iterdir()
    settings, _ = load_settings(TrainSettings, "run/settings.yaml", flags={"output_dir": "run", "fresh": True})
    Path("bad.jsonl").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="nothing to evaluate on"):
        train(settings.replace(eval_data_path=["bad.jsonl"]))
    Path("run.rejected.jsonl").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert train(settings).train_loss == first.train_loss
    for folder in ("run", "run.1"):
        assert (tmp_path / folder / "records" / kept.name).is_file()
        assert (tmp_path / folder / "result.json").is_file()


def test_evaluate_and_prepare_take_records(run: Any, folder: Path, tmp_path: Path) -> None:
    scores = evaluate(
        EvaluateSettings(model_name_or_path=str(run.run), data_path=PAIRS[:3], output_dir=tmp_path / "scores")
    )
    assert scores.examples == 3
    settings = {"model_name_or_path": "pocket", "output_dir": tmp_path / "cache"}
    missing = [*PAIRS, {"source": "?", "target": None}]
    first = prepare(PrepareSettings(data_path=pd.DataFrame(missing), **settings))
    assert (first.examples, first.rejected, first.up_to_date) == (len(PAIRS), 1, False)
    rejected = json.loads((find_cache(tmp_path / "cache") / "rejected.jsonl").read_text())
    assert (rejected["line"], rejected["reason"]) == (len(missing), "not_text")
    assert prepare(PrepareSettings(data_path=missing, **settings)).up_to_date


def test_records_that_cannot_be_used_leave_nothing(tmp_path: Path) -> None:
    for answer, found in ((None, "null"), (4, "a number; write it as text: '4', or astype(str) in pandas")):
        with pytest.raises(DataError) as caught:
            train(make_settings(tmp_path, data_path=[{"source": "2 + 2", "target": answer}]))
        assert "nothing to train on among 1 record" in caught.value.message
        assert caught.value.hint is not None
        kept = tmp_path / "run.rejected.jsonl"
        assert f"found {found}; all are in {kept}; line N of records-" in caught.value.hint
        assert list(tmp_path.iterdir()) == [kept]


def test_records_that_cannot_be_kept_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"output_dir: \S+: can't be created: .*; choose another output_dir"):
        train(make_settings(tmp_path / "file"))


def test_settings_whose_records_are_gone_must_be_created_again(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    shutil.rmtree(Path(settings.data_path[0]).parent)
    with pytest.raises(DataError, match=r"no such file or folder; create the settings again: "):
        train(settings)
    assert train(make_settings(tmp_path)).steps == 2


def test_an_error_of_the_caller_s_generator_passes_unchanged(tmp_path: Path) -> None:
    def read_pairs() -> Iterator[dict[str, str]]:
        yield PAIRS[0]
        raise error

    error = ValueError("broken pair")
    with pytest.raises(ValueError, match="^broken pair$") as caught:
        make_settings(tmp_path, data_path=read_pairs())
    assert caught.value is error


def test_nothing_is_printed_and_no_file_is_left(tmp_path: Path) -> None:
    code = (
        "from t5tune import TrainSettings, MergeSettings, ChatSettings, train, merge, chat\n"
        "values = dict(model_name_or_path='pocket', output_dir='run', max_steps=1, q_lora=True, bf16=False)\n"
        "train(TrainSettings(data_path=[{'source': 'a', 'target': 'b'}] * 9, gradient_checkpointing=True, **values))\n"
        "merge(MergeSettings(adapter='run', output_dir='merged'))\n"
        "assert chat(ChatSettings(model_name_or_path='run', prompt='a', max_new_tokens=2)).reply_tokens\n"
        "import transformers\n"
        "assert transformers.logging.get_verbosity() == transformers.logging.WARNING\n"
    )
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "temporary"))
        done = run_python(code, tmp_path / "work")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "temporary").glob("t5tune-*"))


def test_a_run_ignores_variables_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_settings(tmp_path / "without"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    events: list[Event] = []
    train(make_settings(tmp_path / "with"), events.append)
    note = "ACCELERATE_MIXED_PRECISION=bf16 in the environment is ignored: t5tune uses its own settings"
    assert note in [event.text for event in events if isinstance(event, Note)]
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    without, bf16 = (tmp_path / name / "run" / "adapter_model.safetensors" for name in ("without", "with"))
    assert bf16.read_bytes() == without.read_bytes()


def test_a_progress_bar_shows_steps_losses_evaluations_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a script that imports Jupyter's kernel isn't a notebook
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    train(make_settings(tmp_path, eval_fraction=0.2, eval_steps=2), progress_bar())
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = re.split(r"[\r\n]+", shown.err)
    assert any(re.search(r"train: +100%.* 2/2 .*loss \d+\.\d+, grad norm ", line) for line in lines)
    assert any(re.fullmatch(r"step 2: held-out loss \d+\.\d+, perplexity [\d.,]+ \(best\)", line) for line in lines)
    assert any(line.startswith("trainable parameters: ") for line in lines)
