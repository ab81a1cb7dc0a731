"""What reaches an experiment tracker, read back with the tracker's own library in its own offline mode."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.train import train
from t5tune.errors import Stopped
from t5tune.progress import Advanced, Note
from t5tune.training.trackers import TRACKERS_FILE
from tests.support.runs import stop_at
from tests.support.train_runs import make_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the trackers' own


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


@needs("tensorboard")
def test_tensorboard_has_curves_and_settings(untied_base: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_with("tensorboard", untied_base, data, tmp_path / "run", lora_r=3))
    scalars: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for folder in {file.parent for file in (tmp_path / "run" / "runs").rglob("events*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars |= {name: [each.step for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
        for name in events.Tags()["tensors"]:
            texts[name] = events.Tensors(name)[0].tensor_proto.string_val[0].decode()
    assert scalars["train/loss"] == [1, 2]
    assert scalars["eval/loss"][-1] == 2
    assert "    lora_r: 3\n" in texts["t5tune/text_summary"]


@needs("wandb")
def test_wandb_has_name_settings_curves_report_and_adapter(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    settings = run_with("wandb", untied_base, data, tmp_path / "orders", lora_r=3, max_steps=3)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 1)))
    known = json.loads((tmp_path / "orders" / TRACKERS_FILE).read_text())["wandb"]
    assert "WANDB_RUN_ID" not in os.environ
    train(settings)
    assert json.loads((tmp_path / "orders" / TRACKERS_FILE).read_text())["wandb"] == known
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{known}"))
    assert len(runs) == 2  # both halves of one entry
    content = b"".join(file.read_bytes() for file in runs[-1].rglob("*") if file.is_file())
    for text in (b"orders", b"t5tune", b"lora_r", b"train/loss", b"adapter_model.safetensors", b"report"):
        assert text in content, text
    assert list(runs[-1].rglob("report_*.html"))


@needs("mlflow")
def test_mlflow_has_name_settings_curves_report_and_adapter(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where the artifacts go
    train(run_with("mlflow", untied_base, data, tmp_path / "run", lora_r=3, run_name="orders"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
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
    import trackio

    folder = tmp_path / "trackio"
    for module in (trackio.utils, trackio.sqlite_storage, trackio):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    train(run_with("trackio", untied_base, data, tmp_path / "run", lora_r=3, run_name="orders"))
    content = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for text in (b"orders", b"lora_r", b"train/loss", b"orders-model", b"orders-report"):
        assert text in content, text


@needs("tensorboard")
def test_a_tracker_that_fails_is_a_warning(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("t5tune.training.trackers._send_tensorboard_settings", fail)
    notes: list[Any] = []
    result = train(run_with("tensorboard", untied_base, data, tmp_path / "run"), notes.append)
    assert result.steps == 2
    assert Note("report_to: tensorboard: no route", warning=True) in notes
