"""The formats of `merge --to`: what can be converted to them, and which packages they need."""

from importlib import import_module
from pathlib import Path

from t5tune.converting.generation_config import describe_lost_settings
from t5tune.data.labels import LabelTask
from t5tune.errors import DependencyError, SettingsError
from t5tune.families import CTRANSLATE2, ONNX, Family
from t5tune.progress import Note, Report

# formats of models that write text: name in Family.converters, modules to convert with, package that has them
GENERATORS = {
    "ctranslate2": (CTRANSLATE2, ["ctranslate2", "ctranslate2.converters"], "ctranslate2"),
    "onnx": (ONNX, ["onnx", "onnxruntime"], "'t5tune[onnx]'"),
}


def check_format(name: str, task: LabelTask | None) -> None:
    """Check that a model with these labels, or None for texts, can be written in the format of --to; SettingsError."""
    if name in GENERATORS and task is not None:
        problem = f"objective {task.objective} needs an encoder with a head of labels, which can't be converted"
        raise SettingsError(f"to: {name}: {problem}", hint="use --to checkpoint, or for texts sentence-transformers")
    if name == "sentence-transformers" and (task is None or task.per_token):
        predicts = "texts" if task is None else "labels of words"
        problem = f"the model predicts {predicts}, but this format is for one label or number per text"
        raise SettingsError(f"to: {name}: {problem}", hint="use --to checkpoint")


def check_converter(name: str, family: Family, base: Path, report: Report) -> None:
    """Check that a family can be converted, and that the packages are there; warn of what will be different.

    Raises:
        SettingsError: the family can't be converted.
        DependencyError: a package is missing or broken.
    """
    tool, modules, package = GENERATORS[name]
    if tool not in family.converters:
        problem = f"to: {name}: {family.name} can't be converted"
        raise SettingsError(problem, hint="write a checkpoint, which transformers loads, with --to checkpoint")
    try:
        for module in modules:
            import_module(module)
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # pybind11 makes an ImportError of a signal
            raise error.__cause__ from None
        raise DependencyError(f"to: {name} can't be imported: {error}", hint=f"pip install {package}") from error
    if name == "onnx" and family.model_type == "umt5":
        report(Note("to: onnx: umT5: transformers.js doesn't know it, so config.json calls it mt5", warning=True))
    lost = describe_lost_settings(base)
    if name == "ctranslate2" and lost is not None:
        hint = "serve the adapter or a merged checkpoint, or remove these settings from the file"
        report(Note(f"to: ctranslate2: {lost}, so `serve` refuses the converted model; {hint}", warning=True))
