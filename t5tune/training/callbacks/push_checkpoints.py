"""Upload the weights of each checkpoint to the Hugging Face Hub during training."""

import os
import shutil
import uuid
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import TrainerCallback

from t5tune.checkpoints.hub_upload import choose_repository, explain_uploading_later, list_uploaded_files, upload_result
from t5tune.errors import CheckpointError
from t5tune.io.reasons import describe_error
from t5tune.progress import Event, Note, Report
from t5tune.runs.checkpoints import STAGING_PREFIX
from t5tune.runs.result import TrainResult
from t5tune.settings.groups.hub import HubSettings


class PushCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Uploads in a thread. A checkpoint that is saved during an upload is left out.

    The last checkpoint isn't uploaded here, because the result of the run is uploaded instead.
    """

    def __init__(self, hub: HubSettings, folder: Path, report: Report) -> None:
        self._hub, self._folder, self._report = hub, folder, report
        self._thread: Thread | None = None
        self._is_left = False
        self._checkpoint = self._staged = folder

    def begin(self) -> None:
        """Do nothing before training begins."""

    def add_to(self, trainer: Any) -> None:
        """Add this callback to the Trainer."""
        trainer.add_callback(self)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not 0 < state.global_step < state.max_steps:
            return
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        if self._is_busy:
            self._report(Note(f"{checkpoint.name} isn't uploaded: an earlier upload is still running"))
            return
        self._checkpoint = checkpoint
        self._staged = self._folder / f"{STAGING_PREFIX}push-{uuid.uuid4().hex[:8]}"
        try:
            # links, because the checkpoint may be deleted while it is uploaded
            for name, file in list_uploaded_files(checkpoint).items():
                (self._staged / name).parent.mkdir(parents=True, exist_ok=True)
                _link(file, self._staged / name)
        except (OSError, CheckpointError) as error:
            self._report(Note(f"{checkpoint} isn't uploaded: {describe_error(error)}", warning=True))
            self._clear()
            return
        # a daemon thread, so that a stopped run can end
        self._thread = Thread(target=self._upload, args=(f"Upload step {state.global_step}",), daemon=True)
        self._thread.start()

    def finish(self, result: TrainResult) -> None:
        """Wait until the current upload is done: its older weights must not arrive after the result."""
        # None, so that `abandon` says nothing if a signal ends the waiting: the result can be uploaded later
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            try:
                self._report(Note(f"waiting until {self._checkpoint.name} is uploaded"))
                thread.join()
            finally:
                self._leave()

    def abandon(self) -> None:
        """Report an incomplete upload, because the run ends before its result."""
        if self._is_busy:
            name = choose_repository(self._hub, self._folder)
            later = explain_uploading_later(self._checkpoint, name, self._hub.hub_private_repo)
            self._report(Note(f"{self._checkpoint.name} wasn't uploaded completely; {later}", warning=True))
            self._leave()

    @property
    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _upload(self, message: str) -> None:
        def report(event: Event) -> None:
            if not self._is_left:
                self._report(event)

        try:
            upload_result(self._hub, self._checkpoint, report, message, copy=self._staged)
        finally:
            self._clear()

    def _leave(self) -> None:
        self._is_left = True  # the upload can't be interrupted, but it ends without its files
        self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        shutil.copyfile(file, target)
