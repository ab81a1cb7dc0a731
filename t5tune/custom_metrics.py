"""The user's metrics: functions (predictions, references) -> {name: number}, given as `module:function`.

    # my_metric.py
    def length_ratio(predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"length_ratio": sum(map(len, predictions)) / sum(map(len, references))}

    compute_custom_metrics(["my_metric:length_ratio"], ["ab"], ["abcd"])  # {"length_ratio": 0.5}

A module may be installed or in the current folder; `path/to/my_metric.py:length_ratio` names a file. Any error in the
user's code becomes a SettingsError of one line.
"""

import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from numbers import Real
from pathlib import Path
from types import ModuleType

from t5tune.errors import SettingsError, suggest_name
from t5tune.formatting import shorten
from t5tune.io.reasons import join_first, join_lines
from t5tune.metrics import METRICS

Metric = Callable[[list[str], list[str]], dict[str, float]]
# names of other fields in the results of train and evaluate
RESERVED_NAMES = {
    *METRICS, "loss", "perplexity", "examples", "seconds", "base", "runtime", "samples_per_second", "steps_per_second",
}  # fmt: skip
FORMS = "give it as module:function or path/to/file.py:function"
EXPECTED = "return a dict of names and finite numbers, such as {'my_score': 0.5}"


def compute_custom_metrics(
    functions: Sequence[str], predictions: Sequence[str], references: Sequence[str], allow_non_finite: bool = False
) -> dict[str, float]:
    """Compute the metrics of all functions."""
    scores = _call_all(functions, predictions, references)
    for function, name, value in scores:
        if not (allow_non_finite or math.isfinite(value)):
            raise SettingsError(f"metric: {function}: {name!r} is {value}", hint=EXPECTED)
    return {name: value for _, name, value in scores}


def try_custom_metrics(functions: Sequence[str], references: Sequence[str]) -> list[str]:
    """Call each function with the first two references, also as predictions. Return the names of all metrics.

    Values may be NaN: a correlation of only two examples often is.
    """
    return [name for _, name, _ in _call_all(functions, references[:2], references[:2])]


def names_function(text: str) -> bool:
    """Whether the text has the form `module:function` or `path/to/file.py:function`."""
    place, _, name = text.rpartition(":")
    return name.isidentifier() and (place.endswith(".py") or all(map(str.isidentifier, place.split("."))))


@cache  # a file's module isn't executed again for each evaluation
def load_custom_metric(function: str) -> Metric:
    """Import the function that `module:function` or `path/to/file.py:function` names."""
    if not names_function(function):
        raise SettingsError(f"metric: {function}: doesn't name a function", hint=FORMS)
    place, _, name = function.rpartition(":")
    _add_to_path(Path.cwd())  # before the folder of any file, which may have a module of the same name
    module = _import_file(function, Path(place)) if place.endswith(".py") else _import_module(function, place)
    found = getattr(module, name, None)
    if not callable(found):
        origin = _shorten_path(getattr(module, "__file__", None) or place)  # a built-in module has no file
        problem = "not a function" if hasattr(module, name) else f"no such function in {origin}"
        functions = {key: value for key, value in vars(module).items() if callable(value)}
        known = [key for key, value in functions.items() if getattr(value, "__module__", None) == module.__name__]
        advice = suggest_name(name, known) or f"; it has {join_first(known) or 'no functions'}"
        raise SettingsError(f"metric: {function}: {problem}{advice}")
    return found  # type: ignore[no-any-return]


def _import_module(function: str, module: str) -> ModuleType:
    # the packages first: find_spec would import them, and their exceptions wouldn't be explained
    for name in accumulate(module.split("."), "{}.{}".format):
        spec = None
        with suppress(ModuleNotFoundError, ValueError):  # the parent isn't a package; the name is `__main__`
            spec = importlib.util.find_spec(name)
        if spec is None:
            place = f"in {Path.cwd()} or among the installed packages"
            raise SettingsError(f"metric: {function}: no module {module} {place}", hint=FORMS)
        with _explain_exception(function, spec.origin, "importing it failed"):
            found = importlib.import_module(name)
    return found


def _import_file(function: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise SettingsError(f"metric: {function}: {path}: no such file", hint=FORMS)
    _add_to_path(path.resolve().parent)
    name = f"t5tune_metric_{path.stem}"  # not the stem alone, which may be the name of a library
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None  # the file's name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up there
    with _explain_exception(function, spec.origin, "importing it failed"):
        spec.loader.exec_module(module)
    return module


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end, so that its modules don't replace a library
    importlib.invalidate_caches()


def _call_all(
    functions: Sequence[str], predictions: Sequence[str], references: Sequence[str]
) -> list[tuple[str, str, float]]:
    """Call the functions; return (function, name, value) of each metric."""
    found: list[tuple[str, str, float]] = []
    for function in functions:
        metric = load_custom_metric(function)
        file = getattr(getattr(metric, "__code__", None), "co_filename", None)
        with _explain_exception(function, file, f"failed on {len(references):,} predictions and references"):
            result = metric(list(predictions), list(references))
        _check_result(function, result, {name: other for other, name, _ in found})
        found += [(function, name, float(value)) for name, value in result.items()]
    return found


def _check_result(function: str, result: object, taken: dict[str, str]) -> None:
    """Check that the result is a dict of numbers. `taken`: name of a metric -> the earlier function with it."""
    if not isinstance(result, dict) or not result:
        shown = "an empty dict" if result == {} else shorten(join_lines(repr(result)))
        raise SettingsError(f"metric: {function}: returned {shown}", hint=EXPECTED)
    for name, value in result.items():
        problem = None
        if not isinstance(name, str) or not name.isidentifier():
            problem = f"{shorten(join_lines(repr(name)))} can't be a metric's name: use letters, digits and _"
        elif name in RESERVED_NAMES or name.startswith("eval_"):
            problem = f"{name!r} is a name that t5tune uses; rename the metric"
        elif name in taken:
            problem = f"{name!r} is also a metric of {taken[name]}; rename one of them"
        elif not isinstance(value, Real):
            problem = f"{name!r} is {shorten(join_lines(repr(value)))}; {EXPECTED}"
        elif _overflows(value):
            problem = f"{name!r} is a number that is too large; {EXPECTED}"
        if problem is not None:
            raise SettingsError(f"metric: {function}: {problem}")


def _overflows(value: Real) -> bool:
    try:
        float(value)
    except OverflowError:  # Python's integers have no limit
        return True
    return False


@contextmanager
def _explain_exception(function: str, file: str | None, what: str) -> Iterator[None]:
    """Turn an exception in the user's code into one line that names the last position in `file`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may call sys.exit when it is imported
        reason = f"{type(error).__name__}: {join_lines(error)}" if str(error) else type(error).__name__
        raise SettingsError(
            f"metric: {function}: {what}: {reason} ({_locate(error, file)})",
            hint="fix the function and run the command again",
        ) from error


def _locate(error: BaseException, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shorten_path(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{_shorten_path(frame.filename)}:{frame.lineno}"


def _shorten_path(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
