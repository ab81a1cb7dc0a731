"""The files of the teacher of a run.

files = find_teacher(settings)
identity = hash_teacher(files, run_folder)
"""

from pathlib import Path
from typing import NamedTuple

from t5tune.checkpoints.adapter import read_base_metadata
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import compute_full_hash, load_hash, read_file_stats, store_hash
from t5tune.errors import naming_settings
from t5tune.progress import Report, silent
from t5tune.runs.resume_guard import hash_adapter
from t5tune.settings import TrainSettings
from t5tune.settings.groups.base import InferenceSettings
from t5tune.settings.groups.distillation import TEACHER

TEACHER_HASH_FILE = "teacher.json"


class TeacherFiles(NamedTuple):
    """Folders of the teacher's weights."""

    base: Path
    adapter: Path | None


def find_teacher(settings: TrainSettings, report: Report = silent) -> TeacherFiles:
    """Find the teacher's base, which is downloaded if need be, and its adapter if there is one.

    Raises:
        ModelError, CheckpointError: they don't exist, or can't be used.
    """
    from t5tune.inference.loading import find_base_and_adapter  # imports torch

    with naming_settings(model_name_or_path=TEACHER, adapter="teacher_adapter"):
        return TeacherFiles(*find_base_and_adapter(make_inference_settings(settings), report))


def hash_teacher(files: TeacherFiles, run_folder: Path) -> str:
    """Hash the weights of the teacher. The base's hash is kept in the run folder, as that of the run's own base is."""
    stats = read_file_stats(files.base)
    base_hash = load_hash(run_folder / TEACHER_HASH_FILE, stats)
    if base_hash is None:
        family = None if files.adapter is None else read_base_metadata(files.adapter).get("family")
        base_hash = compute_full_hash(open_base(files.base, family))
    store_hash(run_folder / TEACHER_HASH_FILE, stats, base_hash)
    adapter_hash = "" if files.adapter is None else f", {hash_adapter(files.adapter)}"
    return f"sha256:{base_hash}{adapter_hash}"


def make_inference_settings(settings: TrainSettings, files: TeacherFiles | None = None) -> InferenceSettings:
    """Make the settings that load the teacher."""
    name, adapter = settings.teacher_model_name_or_path, settings.teacher_adapter
    if files is not None:
        name, adapter = str(files.base), files.adapter
    return InferenceSettings(
        model_name_or_path=name or "",
        adapter=adapter,
        cache_dir=settings.cache_dir,
        q_lora=settings.teacher_q_lora,
        bf16=settings.bf16,
    )
