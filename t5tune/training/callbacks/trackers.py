"""Send a run's settings, report page and result to experiment trackers.

transformers' callbacks send the curves and the Trainer's arguments; see docs/trackers.md. A tracker never ends a run: a
tracker that fails is left out from then on, with a note.
"""

import os
import sys
import uuid
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from t5tune.checkpoints.hub_upload import list_uploaded_files
from t5tune.data.reading.remote_files import hide_data_queries
from t5tune.errors import CheckpointError
from t5tune.file_names import REPORT_FILE
from t5tune.formatting import shorten
from t5tune.io.atomic import write_json
from t5tune.io.reasons import describe_error, hide_queries
from t5tune.io.untrusted import read_json_object
from t5tune.io.yaml_file import to_yaml
from t5tune.progress import Note, Report
from t5tune.runs.plan import RunPlan
from t5tune.runs.result import TrainResult
from t5tune.training.arguments import choose_run_name

TRACKERS_FILE = "trackers.json"  # in the run folder: ids of the trackers' entries, for resuming
MAX_PARAMETER_LENGTH = 250  # of a value, in MLflow's older servers
CONFIG_KEY = "t5tune"


class TrackRun(TrainerCallback):  # type: ignore[misc]
    """Sends the settings when training begins, and the report page and the result's files after it.

    Trackers without code here get only the data of transformers' callbacks.
    """

    def __init__(self, plan: RunPlan, trackers: list[str], report: Report) -> None:
        self._plan, self._trackers, self._report = plan, [*trackers], report
        self._name = choose_run_name(plan.output)
        self._mlflow_run: str | None = None
        self._trackio: dict[str, Any] = {}
        self._has_begun = False
        self._set_variables: list[str] = []
        self._arguments = sys.argv

    def begin(self) -> None:
        """Let a resumed run continue its entry in Weights & Biases, unless the environment names one.

        Trackers also send the command's arguments. A URL among them may have a secret in its query.
        """
        sys.argv = [*map(hide_queries, self._arguments)]
        if "wandb" not in self._trackers or "WANDB_RUN_ID" in os.environ:
            return
        path = self._plan.folder / TRACKERS_FILE
        known: dict[str, Any] = {}
        try:
            known = read_json_object(path.parent, path.name)
        except FileNotFoundError:  # the run begins
            pass
        except CheckpointError as error:
            rest = "the run gets a new entry; to continue the old entry, stop the run and set WANDB_RUN_ID to its id"
            self._report(Note(f"report_to: wandb: {error}; {rest}", warning=True))
        if not isinstance(known.get("wandb"), str):
            known["wandb"] = uuid.uuid4().hex[:8]
            write_json(path, known)
        for name, value in (("WANDB_RUN_ID", known["wandb"]), ("WANDB_RESUME", "allow")):
            if name not in os.environ:
                os.environ[name] = value
                self._set_variables.append(name)

    def add_to(self, trainer: Any) -> None:
        """Add this callback to the Trainer, and keep the trackers' callbacks from ending the run."""
        callbacks = trainer.callback_handler.callbacks
        for name in self._trackers:
            (tracker,) = get_reporting_integration_callbacks([name])
            for number, callback in enumerate(callbacks):
                if type(callback) is tracker:
                    if name == "tensorboard":
                        callback.logging_dir = str(self._choose_tensorboard_folder())
                    callbacks[number] = _Guarded(callback, partial(self._try, name))
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._has_begun = True
        self._trackio = {"project": args.project, "space_id": args.trackio_space_id, "private": args.hub_private_repo}
        values = hide_data_queries(self._plan.given).model_dump(mode="json")
        self._for_each({
            "wandb": lambda: _update_config("wandb", values),
            "mlflow": lambda: self._send_mlflow_settings(values),
            "trackio": lambda: _update_config("trackio", values),
            "tensorboard": lambda: _send_tensorboard_settings(values, self._choose_tensorboard_folder()),
        })  # fmt: skip

    def finish(self, result: TrainResult) -> None:
        """Send the report page and the result's files, once they are written."""
        if not self._has_begun:  # the run had finished before
            return
        page = result.run / REPORT_FILE
        pages = [page] if page.is_file() else []

        def list_files() -> list[Path]:
            return [*list_uploaded_files(result.run).values()]

        self._for_each({
            "wandb": lambda: _send_wandb_files(self._name, pages, list_files()),
            "mlflow": lambda: self._send_mlflow_files(pages, list_files()),
            "trackio": lambda: self._send_trackio_files(pages, list_files()),
        })  # fmt: skip
        self._has_begun = False
        self._restore_variables()

    def abandon(self) -> None:
        """End the entries of a run that ends before its result; it may be resumed."""
        if self._has_begun:
            self._for_each({
                "wandb": lambda: import_module("wandb").finish(),
                "mlflow": _stop_mlflow,
                "trackio": lambda: import_module("trackio").finish(),
            })  # fmt: skip
        self._restore_variables()

    def _restore_variables(self) -> None:
        # otherwise the next run of this process would continue this run's entry
        sys.argv = self._arguments
        while self._set_variables:
            os.environ.pop(self._set_variables.pop(), None)

    def _for_each(self, actions: dict[str, Callable[[], None]]) -> None:
        for name in [*self._trackers]:
            if name in actions:
                self._try(name, actions[name])

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        """Call a tracker, unless it has failed before."""
        if name not in self._trackers:
            return None
        try:
            return action()
        except Exception as error:  # of any kind: each tracker has its own
            self._trackers.remove(name)
            reason = shorten(hide_queries(describe_error(error)), 200) or type(error).__name__
            self._report(Note(f"report_to: {name}: {reason}; the run continues without it", warning=True))
            return None

    def _choose_tensorboard_folder(self) -> Path:
        """Return a folder for this run alone: TensorBoard shows all files of a folder as one run."""
        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(given).expanduser() if given else self._plan.folder / "runs"
        return folder / _to_file_name(self._name)

    def _send_mlflow_settings(self, values: dict[str, Any]) -> None:
        import mlflow

        run = mlflow.active_run()
        self._mlflow_run = None if run is None else run.info.run_id
        mlflow.log_params({f"{CONFIG_KEY}.{name}": str(value)[:MAX_PARAMETER_LENGTH] for name, value in values.items()})

    def _send_mlflow_files(self, pages: list[Path], files: list[Path]) -> None:
        from mlflow import MlflowClient

        if self._mlflow_run is None:
            return
        client = MlflowClient()
        for folder, paths in ((None, pages), ("adapter", files)):
            for path in paths:
                client.log_artifact(self._mlflow_run, str(path), folder)

    def _send_trackio_files(self, pages: list[Path], files: list[Path]) -> None:
        import trackio

        # transformers' callback has finished the entry
        trackio.init(**self._trackio, name=self._name, resume="allow")
        for kind, paths in (("report", pages), ("model", files)):
            artifact = trackio.Artifact(f"{_to_file_name(self._name)}-{kind}", type=kind)
            for path in paths:
                artifact.add_file(str(path))
            if paths:
                trackio.log_artifact(artifact)
        trackio.finish()


class _Guarded:
    """A tracker's callback whose events are tried with `attempt`, which catches its errors."""

    def __init__(self, callback: Any, attempt: Callable[[Callable[[], Any]], Any]) -> None:
        self._callback, self._attempt = callback, attempt

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._callback, name)
        if not name.startswith("on_"):
            return found
        return lambda *args, **values: self._attempt(partial(found, *args, **values))


def _update_config(tracker: str, values: dict[str, Any]) -> None:
    import_module(tracker).config.update({CONFIG_KEY: values}, allow_val_change=True)


def _send_wandb_files(name: str, pages: list[Path], files: list[Path]) -> None:
    import wandb

    if wandb.run is None:
        return
    for page in pages:
        wandb.log({"report": wandb.Html(page.read_text(encoding="utf-8"))})
    artifact = wandb.Artifact(_to_file_name(name), type="model")
    for file in files:
        artifact.add_file(str(file))
    wandb.log_artifact(artifact)
    wandb.finish()


def _stop_mlflow() -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.end_run("KILLED")


def _to_file_name(name: str) -> str:
    """Replace characters that names of artifacts and folders can't have."""
    return "".join(each if each.isalnum() or each in "-_." else "-" for each in name)[:128]


def _send_tensorboard_settings(values: dict[str, Any], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    text = "".join(f"    {line}\n" for line in to_yaml(values).splitlines())  # Markdown for code
    with SummaryWriter(str(folder / CONFIG_KEY)) as writer:
        writer.add_text(CONFIG_KEY, text)
