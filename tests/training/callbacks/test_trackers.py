"""What reaches an experiment tracker, read back with the tracker's own library in its own offline mode."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.train import train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import Stopped
from t5tune.progress import Advanced, Note
from t5tune.training.callbacks.trackers import TRACKERS_FILE, TrackRun
from tests.support.processes.runs import stop_at
from tests.support.servers.web import serve_folder
from tests.support.train_runs import make_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the trackers' own


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} isn't installed")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"source": f"q {i}", "target": f"a {i % 3}"}) + "\n" for i in range(8)))
    return path


def run_with(name: str, base: Path, data: Path, folder: Path, **changes: Any) -> Any:
    values = {"report_to": [name], "max_steps": 2, "logging_steps": 1, "bf16": False, "report_samples": 1, **changes}
    return make_settings(base, data, folder, eval_data_path=str(data), **values)


def use_folder(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a tracker write to a folder, and not to a server."""
    folder.mkdir()
    monkeypatch.chdir(folder)  # where mlflow's artifacts go
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TENSORBOARD_LOGGING_DIR": str(folder),
    }
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(variable, raising=False)
    if name == "wandb":
        import wandb

        wandb.teardown()  # it keeps the variables of the test before
    if name == "trackio":
        import trackio

        for module in (trackio.utils, trackio.sqlite_storage, trackio):
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", folder)


@needs("tensorboard")
@pytest.mark.parametrize(("variable", "place"), [("", "run/runs/run"), ("~/logs", "home/logs/run")])
def test_tensorboard_has_curves_and_settings(
    variable: str, place: str, untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    if variable:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", variable)
    train(run_with("tensorboard", untied_base, data, tmp_path / "run", lora_r=3))
    scalars: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for folder in {file.parent for file in (tmp_path / place).rglob("events*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars |= {name: [each.step for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
        for name in events.Tags()["tensors"]:
            texts[name] = events.Tensors(name)[0].tensor_proto.string_val[0].decode()
    assert scalars["train/loss"] == [1, 2]
    assert scalars["eval/loss"][-1] == 2
    assert "    lora_r: 3\n" in texts["t5tune/text_summary"]
    assert not (tmp_path / "~").exists()


@needs("tensorboard")
def test_tensorboard_keeps_runs_apart(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(run_with("tensorboard", untied_base, data, tmp_path / "first"))
    train(run_with("tensorboard", untied_base, data, tmp_path / "second", run_name="warm/up"))
    assert sorted(folder.name for folder in (tmp_path / "logs").iterdir()) == ["first", "warm-up"]
    for name in ("first", "warm-up"):
        assert len([*(tmp_path / "logs" / name).glob("events*")]) == 1


@needs("wandb")
def test_wandb_has_name_settings_curves_report_and_adapter(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder("wandb", tmp_path / "tracked", monkeypatch)
    settings = run_with("wandb", untied_base, data, tmp_path / "orders", lora_r=3, max_steps=3)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 1)))
    known = json.loads((tmp_path / "orders" / TRACKERS_FILE).read_text())["wandb"]
    assert "WANDB_RUN_ID" not in os.environ
    train(settings)
    assert json.loads((tmp_path / "orders" / TRACKERS_FILE).read_text())["wandb"] == known
    runs = sorted((tmp_path / "tracked" / "wandb").glob(f"offline-run-*-{known}"))
    assert len(runs) == 2  # both halves of one entry
    content = b"".join(file.read_bytes() for file in runs[-1].rglob("*") if file.is_file())
    for text in (b"orders", b"t5tune", b"lora_r", b"train/loss", b"adapter_model.safetensors", b"report"):
        assert text in content, text
    assert list(runs[-1].rglob("report_*.html"))


def test_a_broken_trackers_file_gives_a_new_entry(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    settings = run_with("wandb", untied_base, data, tmp_path / "orders")
    settings.output_dir.mkdir()
    (settings.output_dir / TRACKERS_FILE).write_text('{"wandb": "5c3')
    notes: list[Any] = []
    tracker = TrackRun(make_run_plan(settings), ["wandb"], notes.append)
    tracker.begin()
    known = json.loads((settings.output_dir / TRACKERS_FILE).read_text())["wandb"]
    assert os.environ["WANDB_RUN_ID"] == known
    tracker.abandon()
    (note,) = notes
    assert note.warning
    assert TRACKERS_FILE in note.text
    assert "new entry" in note.text
    tracker.begin()  # the next run continues it
    tracker.abandon()
    assert len(notes) == 1
    assert json.loads((settings.output_dir / TRACKERS_FILE).read_text())["wandb"] == known


@needs("mlflow")
def test_mlflow_has_name_settings_curves_report_and_adapter(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    use_folder("mlflow", tmp_path / "tracked", monkeypatch)
    train(run_with("mlflow", untied_base, data, tmp_path / "run", lora_r=3, run_name="orders"))
    client = MlflowClient(f"sqlite:///{tmp_path}/tracked/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "orders"
    assert run.info.status == "FINISHED"
    assert run.data.params["t5tune.lora_r"] == "3"
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    names = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert sorted(names) == ["adapter", "report.html"]
    files = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= files


@needs("trackio")
def test_trackio_has_name_settings_curves_report_and_adapter(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tracked"
    use_folder("trackio", folder, monkeypatch)
    train(run_with("trackio", untied_base, data, tmp_path / "run", lora_r=3, run_name="orders"))
    content = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for text in (b"orders", b"lora_r", b"train/loss", b"orders-model", b"orders-report"):
        assert text in content, text


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in TRACKERS])
def test_no_tracker_gets_the_secret_of_a_url(
    name: str, untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web").mkdir()
    data.rename(tmp_path / "web" / data.name)
    use_folder(name, tmp_path / "tracked", monkeypatch)
    with serve_folder(tmp_path / "web") as url:
        secret = f"{url}/{data.name}?sig=SeCrEt"
        monkeypatch.setattr("sys.argv", ["t5tune", "train", f"--data-path={secret}"])
        settings = run_with(name, untied_base, Path(), tmp_path / "run", cache_dir=tmp_path / "downloads")
        train(settings.model_copy(update={"data_path": [secret], "eval_data_path": [secret]}))
        assert sys.argv[2] == f"--data-path={secret}"
    sent = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(url.encode() in file.read_bytes() for file in sent if tmp_path / "tracked" in file.parents)
    assert [file for file in sent if b"SeCrEt" in file.read_bytes()] == [tmp_path / "run" / "settings.yaml"]


@pytest.mark.parametrize(
    ("name", "variables", "reason"),
    [
        pytest.param(
            "tensorboard", {"TENSORBOARD_LOGGING_DIR": "{data}"}, "Not a directory", marks=needs("tensorboard")
        ),
        pytest.param("wandb", {"WANDB_MODE": "online"}, "No API key configured", marks=needs("wandb")),
        pytest.param(
            "mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "Max retries exceeded", marks=needs("mlflow")
        ),
    ],
)
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    name: str,
    variables: dict[str, str],
    reason: str,
    untied_base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_folder(name, tmp_path / "tracked", monkeypatch)
    for variable, value in {**variables, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(variable, value.format(data=data))
    notes: list[Any] = []
    result = train(run_with(name, untied_base, data, tmp_path / "run"), notes.append)
    assert result.steps == 2
    (warning,) = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert warning.startswith(f"report_to: {name}: ")
    assert reason in warning
    assert warning.endswith("; the run continues without it")
    assert "\n" not in warning
