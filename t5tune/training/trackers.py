"""The experiment trackers for `--report-to`. transformers logs to them; here we only check that they are installed."""

import importlib.util

from t5tune.errors import DependencyError, SettingsError

# name -> the module it needs, and the name of its package on PyPI
TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "clearml": ("clearml", "clearml"),
    "swanlab": ("swanlab", "swanlab"),
}


def choose_trackers(names: list[str]) -> list[str]:
    """Return the trackers that `--report-to` names: none for ["none"], all installed ones for ["all"].

    Raises:
        SettingsError: a name is unknown.
        DependencyError: a tracker isn't installed.
    """
    if names == ["all"]:
        return [name for name in TRACKER_PACKAGES if _is_installed(name)]
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        _check_tracker(name)
    return wanted


def _check_tracker(name: str) -> None:
    if name not in TRACKER_PACKAGES:
        known = ", ".join(TRACKER_PACKAGES)
        raise SettingsError(f"report_to: {name}: no such tracker; choose from {known}, all and none")
    if not _is_installed(name):
        package = TRACKER_PACKAGES[name][1]
        raise DependencyError(
            f"report_to: {name} isn't installed",
            hint=f"pip install {package}, or leave it out: metrics.jsonl and report.html need no package",
        )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(TRACKER_PACKAGES[name][0]) is not None
