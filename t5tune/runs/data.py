"""The data of a run: where its token caches are, and the examples in them.

data = locate_data(run_plan)
examples, held_out = open_data(run_plan, data, prepared)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from t5tune.data.caches.examples import Examples
from t5tune.data.caches.mixing import choose_mixing
from t5tune.data.caches.prepared import find_caches, has_examples, open_examples, read_examples_manifest
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import EVAL_CACHE_FOLDER, RUN_CACHE_FOLDER
from t5tune.io.atomic import hash_json
from t5tune.preparing.resolve_datasets import list_given_caches
from t5tune.runs.plan import RunPlan
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.groups.data import DataSettings, SplitSettings, TrainingDataSettings
from t5tune.settings.groups.record_format import PREFERENCE_OBJECTIVES, Objective

AnyData = TypeVar("AnyData", bound=DataSettings)
CACHE_SETTINGS = {*select_settings(TrainingDataSettings, Affects.CACHE)} - {
    *select_settings(TrainingDataSettings, Affects.STEPS)
}
"""What determines the examples in a token cache, without what train can also apply to them later, such as num_data."""


class RunData(NamedTuple):
    """Folders of prepared data."""

    cache: Path
    eval_cache: Path | None


def locate_data(plan: RunPlan) -> RunData:
    """Determine where the token caches of a run are, which need not exist yet."""
    data = plan.data
    cache = find_given_examples(data.data_path, data.data) or data.preprocessed_path or plan.folder / RUN_CACHE_FOLDER
    eval_cache = None
    if data.eval_data_path:
        eval_cache = find_given_examples(data.eval_data_path, data.eval_data) or plan.folder / EVAL_CACHE_FOLDER
    return RunData(cache, eval_cache)


def find_given_examples(paths: list[str], datasets: Sequence[DatasetSettings] | None) -> Path | None:
    """Return the folder of the token cache or the mixture that the paths name; None if they name data.

    Raises:
        DataError: they name more than that.
    """
    given = Path(paths[0])
    if datasets is not None or not has_examples(given):
        return None
    if len(paths) > 1:
        problem = f"{given}: a token cache can't be combined with other data ({paths[1]})"
        raise DataError(problem, hint="give it alone, or give each dataset a weight: cache:1 more.jsonl:1")
    return given


def list_all_caches(data: DataSettings) -> list[Path]:
    """List the token caches that all of the training data is in, also those of a mixture; none if some of it isn't.

    Raises:
        DataError: the paths name more than token caches and data, or mixture.json is broken.
    """
    if data.data is not None:
        return list_given_caches(data.data)
    given = find_given_examples(data.data_path, None)
    return [] if given is None else find_caches(given)


def divide_cache_settings(data: DataSettings) -> tuple[dict[str, Any], set[str]]:
    """Return the settings that are the same for all token caches, with their values, and the names of the others.

    Caches of preference pairs are for all objectives that read them, so an objective that is given stays.
    """
    inputs = [read_examples_manifest(cache)["inputs"] for cache in list_all_caches(data)]
    if not inputs:
        return {}, set()
    names = {*CACHE_SETTINGS, "objective"} & inputs[0].keys()
    same = {name: inputs[0][name] for name in names if all(each.get(name) == inputs[0][name] for each in inputs)}
    if "objective" in data.model_fields_set:
        same.pop("objective", None)
    elif data.data is not None:
        same["objective"] = same.get("objective", _find_objective_of_caches(data))
    different = names - same.keys()
    return same, different - ({"objective"} if data.reads_preferences else set())


def apply_cache_settings(settings: AnyData) -> AnyData:
    """Replace the settings that determine the examples with those of the token caches, if all data is in some.

    Of several caches, only with those that are the same for all.
    """
    same, _ = divide_cache_settings(settings)
    return settings.model_copy(update=same)


def _find_objective_of_caches(data: DataSettings) -> Objective:
    """Return the objective of datasets that are token caches of preference pairs; that of the settings if none is."""
    for dataset in data.data or []:
        if has_examples(path := Path(dataset.path[0])):
            objective = read_examples_manifest(path)["inputs"].get("objective")
            if objective in PREFERENCE_OBJECTIVES:
                return cast(Objective, objective)
    return data.objective


def hash_prepared(folder: Path) -> str:
    """Hash the description of prepared data, which has a hash of each of its files."""
    return hash_json(read_examples_manifest(folder))


def is_replaced(folder: Path, prepared: str | None) -> bool:
    """Whether another process has replaced prepared data whose hash was `prepared`. None: that isn't known."""
    try:
        return prepared is not None and prepared != hash_prepared(folder)
    except DataError:  # it is gone or damaged
        return False


def open_data(plan: RunPlan, folders: RunData, prepared: str | None) -> tuple[Examples, Examples | None]:
    """Open the examples to train on, and the held-out ones if there are any.

    Args:
        prepared: hash of what was prepared for this run in a folder outside of the run folder; None: nothing was.

    Raises:
        SettingsError: the objective learns from preference pairs, and the examples are none, or the other way round;
            or eval_fraction or split_seed differs from prepare's.
        DataError: another process has replaced the data since.
    """
    data, cache = plan.data, folders.cache
    if prepared is not None and prepared != hash_prepared(cache):
        problem = f"preprocessed_path: {cache}: another process has replaced it since it was prepared for this run"
        raise DataError(problem, hint="give each run its own preprocessed_path, and run the same command again")
    examples = open_examples(cache)
    if examples.has_preferences != data.reads_preferences:
        what = "preference pairs" if examples.has_preferences else "no preference pairs"
        problem = f"objective: {data.objective}: the examples in {cache} are {what}"
        raise SettingsError(problem, hint="dpo and orpo are for pairs, the other objectives for examples")
    if examples.are_several and (mixing := choose_mixing(data)) is not None:
        examples = examples.mix(mixing)
    # of data that prepare has read for this run, it has taken num_data already
    if data.num_data is not None and find_given_examples(data.data_path, data.data) is not None:
        examples = examples.limit_training(data.num_data)
    if folders.eval_cache is not None:
        held_out = open_examples(folders.eval_cache)
        if held_out.has_preferences != examples.has_preferences:
            has, lacks = (folders.eval_cache, cache) if held_out.has_preferences else (cache, folders.eval_cache)
            problem = f"eval_data_path: {has} has preference pairs, and {lacks} has none"
            raise DataError(problem, hint="give the records in place of the cache")
        return examples.split_as_prepared()[0], held_out
    if data.eval_fraction > 0:
        _check_split(data, cache, examples)
        return examples.split(data.eval_fraction, data.split_seed)
    return examples.split_as_prepared()


def _check_split(data: SplitSettings, cache: Path, examples: Examples) -> None:
    """Check that no example is trained on that prepare has held out: evaluate would score it as held out.

    Raises:
        SettingsError: eval_fraction or split_seed would hold out different examples.
    """
    for manifest in (dataset.cache.manifest for dataset in examples.datasets):
        fraction, seed = manifest["eval_fraction"], manifest["split_seed"]
        if fraction and (fraction, seed) != (data.eval_fraction, data.split_seed):
            now = f"{data.eval_fraction:g} with split_seed {data.split_seed}"
            raise SettingsError(
                f"eval_fraction: {now}, but prepare held out {fraction:g} of {cache} with split_seed {seed}",
                hint="leave out eval_fraction to hold out the same, or prepare the data again without it",
            )
