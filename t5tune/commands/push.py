"""`t5tune push`: upload an adapter, a run's result or a merged checkpoint to the Hugging Face Hub.

result = push(PushSettings(folder="run", hub_model_id="owner/name"))
result.url
"""

import time
from dataclasses import asdict, dataclass

from t5tune.checkpoints.hub_upload import upload_folder
from t5tune.errors import CheckpointError
from t5tune.progress import Report, silent
from t5tune.runs.checkpoints import find_trained_folder
from t5tune.settings import PushSettings


@dataclass(frozen=True)
class PushResult:
    """Where the folder was uploaded to. `bytes` counts all its files, including files that the Hub already has."""

    url: str
    files: int
    bytes: int
    seconds: float


def push(settings: PushSettings, report: Report = silent) -> PushResult:
    """Upload a folder; for a stopped run, its newest complete checkpoint.

    Raises:
        CheckpointError: the folder contains no model and no adapter.
        SettingsError: the Hub refuses the name or the files, or doesn't let this user write there.
        UploadError: the Hub can't be reached.
    """
    started = time.monotonic()
    if not settings.folder.is_dir():
        raise CheckpointError(f"folder: {settings.folder}: no such folder", hint="check the path's spelling")
    folder = find_trained_folder(settings.folder, "folder", report)
    message = f"Upload {folder.resolve().name}"
    uploaded = upload_folder(folder, settings.hub_model_id, settings.hub_private_repo, report, message)
    return PushResult(**asdict(uploaded), seconds=round(time.monotonic() - started, 3))
