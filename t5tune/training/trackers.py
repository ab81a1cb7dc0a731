"""The trackers that `--report-to` takes. transformers talks to each of them; here only whether it can."""

import importlib.util

from t5tune.errors import DependencyError, SettingsError

# name -> the module that it needs, and what pip calls that
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "clearml": ("clearml", "clearml"),
    "swanlab": ("swanlab", "swanlab"),
}


def chosen_trackers(names: list[str]) -> list[str]:
    """What of `--report-to` is a tracker: none of [none], all that are installed of [all].

    Raises:
        SettingsError: no such tracker.
        DependencyError: one that isn't installed.
    """
    if names == ["all"]:
        return [name for name in PACKAGES if _is_installed(name)]
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if name not in PACKAGES:
            raise SettingsError(f"report_to: {name}: no such tracker; take {', '.join(PACKAGES)}, all or none")
        if not _is_installed(name):
            raise DependencyError(
                f"report_to: {name} isn't installed",
                hint=f"pip install {PACKAGES[name][1]}, or leave it out: metrics.jsonl and report.html need nothing",
            )
    return wanted


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name][0]) is not None
