"""The files of the teacher of a run.

files = find_teacher(run_plan.teacher, run_plan.model, report)
identity = hash_teacher(files, folder)
"""

from pathlib import Path
from typing import NamedTuple

from t5tune.checkpoints.adapter import read_base_metadata
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import compute_full_hash, describe_hash, match_hash, read_file_stats
from t5tune.errors import naming_settings
from t5tune.progress import Report, silent
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import ModelPlan
from t5tune.runs.resume_guard import hash_adapter
from t5tune.settings.groups.base import InferenceSettings
from t5tune.settings.groups.distillation import TEACHER, DistillationSettings


class TeacherFiles(NamedTuple):
    """Folders of the teacher's weights."""

    base: Path
    adapter: Path | None


def find_teacher(teacher: DistillationSettings, model: ModelPlan, report: Report = silent) -> TeacherFiles:
    """Find the teacher's base, which is downloaded if needed, and its adapter if there is one."""
    from t5tune.inference.loading import find_base_and_adapter  # imports torch

    with naming_settings(model_name_or_path=TEACHER, adapter="teacher_adapter"):
        return TeacherFiles(*find_base_and_adapter(make_inference_settings(teacher, model), report))


def hash_teacher(files: TeacherFiles, folder: RunFolder) -> str:
    """Hash the weights of the teacher. The base's hash is kept in run.json, like the hash of the run's base."""
    stats = read_file_stats(files.base)
    base_hash = match_hash(folder.read_record().get("teacher"), stats)
    if base_hash is None:
        family = None if files.adapter is None else read_base_metadata(files.adapter).get("family")
        base_hash = compute_full_hash(open_base(files.base, family))
    folder.record(teacher=describe_hash(stats, base_hash))
    adapter_hash = "" if files.adapter is None else f", {hash_adapter(files.adapter)}"
    return f"sha256:{base_hash}{adapter_hash}"


def make_inference_settings(
    teacher: DistillationSettings, model: ModelPlan, files: TeacherFiles | None = None
) -> InferenceSettings:
    """Make the settings that load the teacher.

    Args:
        model: the model that learns from it.
    """
    name, adapter = teacher.teacher_model_name_or_path, teacher.teacher_adapter
    if files is not None:
        name, adapter = str(files.base), files.adapter
    return InferenceSettings(
        model_name_or_path=name or "",
        adapter=adapter,
        cache_dir=model.base.cache_dir,
        q_lora=teacher.teacher_q_lora,
        bf16=model.precision.bf16,
    )
