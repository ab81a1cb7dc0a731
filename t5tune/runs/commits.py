"""The commits of a run's models on the Hugging Face Hub, so that all ranks and a resumed run use the same files.

    recorded = read_commits_to_resume(folder, run_plan)     # {"google/flan-t5-base": "google/flan-t5-base@0123…"}
    commits = recorded | find_commits(pin_commits(run_plan, recorded), report)
    pinned = pin_commits(run_plan, commits)

`run.json` has them. The commits of datasets are in the token cache's manifest.
"""

from dataclasses import replace
from pathlib import Path

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.base import find_base, find_model
from t5tune.errors import naming_settings
from t5tune.hub.names import is_published, name_snapshot, split_revision
from t5tune.progress import Report
from t5tune.runs.checkpoints import list_checkpoints
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import DistillationPlan, PreferencePlan, RunPlan
from t5tune.settings.groups.base import BaseModelSettings


def read_commits_to_resume(folder: RunFolder, plan: RunPlan) -> dict[str, str]:
    """Read the commits that a resumed run must use: name as given -> `owner/name@commit`; none for a new run."""
    if plan.output.fresh or not list_checkpoints(folder.path):
        return {}
    commits = folder.read_commits()
    return {name: commits[name] for name in commits.keys() & _list_names(plan).values()}


def find_commits(plan: RunPlan, report: Report) -> dict[str, str]:
    """Download the models that are on the Hub, and return the commit of each."""
    commits: dict[str, str] = {}
    base = plan.model.base
    for name, given in _list_names(plan).items():
        if not is_published(given):
            continue
        if name == "model_name_or_path":
            folder = find_base(base, report=report)
        elif name == "teacher_model_name_or_path":
            teacher = BaseModelSettings(model_name_or_path=given, cache_dir=base.cache_dir)
            with naming_settings(model_name_or_path=name):
                folder = find_model(teacher, report=report)
        else:
            folder = find_adapter(Path(given), base.cache_dir, name, report)
        commits[given] = name_snapshot(folder)
    return commits


def pin_commits(plan: RunPlan, commits: dict[str, str]) -> RunPlan:
    """Return the plan with these commits in place of the names."""
    pinned = {name: commits[given] for name, given in _list_names(plan).items() if given in commits}
    model, objective = plan.model, plan.objective
    if (base := pinned.pop("model_name_or_path", None)) is not None:
        name, revision = split_revision(base)
        base_settings = model.base.model_copy(update={"model_name_or_path": name, "revision": revision})
        model = replace(model, base=base_settings)
    changes = {name: Path(text) if name.endswith("adapter") else text for name, text in pinned.items()}
    if (adapter := changes.pop("adapter", None)) is not None and model.adapter is not None:
        model = replace(model, adapter=model.adapter.model_copy(update={"adapter": adapter}))
    if changes and isinstance(objective, PreferencePlan):
        objective = replace(objective, options=objective.options.model_copy(update=changes))
    elif changes and isinstance(objective, DistillationPlan):
        objective = replace(objective, teacher=objective.teacher.model_copy(update=changes))
    return replace(plan, model=model, objective=objective)


def _list_names(plan: RunPlan) -> dict[str, str]:
    base, teacher = plan.model.base, plan.teacher
    names = {
        "model_name_or_path": base.model_name_or_path + (f"@{base.revision}" if base.revision is not None else ""),
        "teacher_model_name_or_path": None if teacher is None else teacher.teacher_model_name_or_path,
        **plan.list_adapters(),
    }
    return {name: str(value) for name, value in names.items() if value is not None}
