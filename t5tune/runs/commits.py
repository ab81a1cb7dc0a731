"""The commits of a run's models on the Hugging Face Hub, so that all its ranks, and a resumed run, use the same.

    recorded = read_commits_to_resume(settings)     # {"google/flan-t5-base": "google/flan-t5-base@0123…"}
    commits = recorded | find_commits(pin_commits(settings, recorded), report)
    pinned = pin_commits(settings, commits)

`commits.json` in the run folder has them. The commits of datasets are in the token cache's manifest.
"""

from pathlib import Path

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.base import find_base, find_model
from t5tune.errors import CheckpointError, naming_settings
from t5tune.hub.names import is_published, name_snapshot, split_revision
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import read_json_object
from t5tune.progress import Report
from t5tune.runs.checkpoints import list_checkpoints
from t5tune.settings import TrainSettings
from t5tune.settings.groups.base import BaseModelSettings

COMMITS_FILE = "commits.json"
MODELS = {
    "model_name_or_path": "base",
    "adapter": "adapter",
    "reference_adapter": "reference_adapter",
    "teacher_model_name_or_path": "teacher",
    "teacher_adapter": "teacher",
}
"""Settings that name a model -> the field of the run identity that --allow-change allows to differ."""


def load_commits(folder: Path) -> dict[str, str]:
    """Read which commits a run uses: name as given -> `owner/name@commit`."""
    try:
        return {name: str(commit) for name, commit in read_json_object(folder, COMMITS_FILE).items()}
    except (FileNotFoundError, CheckpointError):
        return {}


def save_commits(folder: Path, commits: dict[str, str]) -> None:
    """Record which commits a run uses."""
    if commits != load_commits(folder):
        write_json(folder / COMMITS_FILE, commits)


def read_commits_to_resume(settings: TrainSettings) -> dict[str, str]:
    """Read the commits that a resumed run must use; none for a new run, or for models that allow_change names."""
    if settings.fresh or not list_checkpoints(settings.output_dir):
        return {}
    commits = load_commits(settings.output_dir)
    given = {text: MODELS[name] for name, text in _list_names(settings).items()}
    return {name: commits[name] for name in commits.keys() & given if given[name] not in settings.allow_change}


def find_commits(settings: TrainSettings, report: Report) -> dict[str, str]:
    """Download the models that are on the Hub, and return the commit of each.

    Raises:
        ModelError, CheckpointError: a model doesn't exist or can't be downloaded.
    """
    commits: dict[str, str] = {}
    for name, given in _list_names(settings).items():
        if not is_published(given):
            continue
        if name == "model_name_or_path":
            folder = find_base(settings, report=report)
        elif name == "teacher_model_name_or_path":
            teacher = BaseModelSettings(model_name_or_path=given, cache_dir=settings.cache_dir)
            with naming_settings(model_name_or_path=name):
                folder = find_model(teacher, report=report)
        else:
            folder = find_adapter(Path(given), settings.cache_dir, name, report)
        commits[given] = name_snapshot(folder)
    return commits


def pin_commits(settings: TrainSettings, commits: dict[str, str]) -> TrainSettings:
    """Return the settings with these commits in place of the names."""
    pinned = {name: commits[given] for name, given in _list_names(settings).items() if given in commits}
    if (base := pinned.pop("model_name_or_path", None)) is not None:
        name, revision = split_revision(base)
        settings = settings.model_copy(update={"model_name_or_path": name, "revision": revision})
    return settings.model_copy(
        update={name: Path(text) if name.endswith("adapter") else text for name, text in pinned.items()}
    )


def _list_names(settings: TrainSettings) -> dict[str, str]:
    """List the settings that name a model, with what they name; the base with its revision."""
    names = {name: str(value) for name in MODELS if (value := getattr(settings, name)) is not None}
    if settings.revision is not None:
        names["model_name_or_path"] += f"@{settings.revision}"
    return names
