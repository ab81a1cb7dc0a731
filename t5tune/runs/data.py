"""The data of a run: the examples in the token caches that were prepared for it.

examples, held_out = open_data(run_plan, prepared)
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.examples import Examples
from t5tune.data.caches.prepared import open_examples, read_examples_manifest
from t5tune.errors import CheckpointError, DataError, SettingsError, T5TuneError
from t5tune.file_names import RUN_CACHE_FOLDER, SETTINGS_FILE
from t5tune.io.atomic import hash_json
from t5tune.io.yaml_file import read_yaml
from t5tune.runs.checkpoints import list_checkpoints, read_run_identity
from t5tune.runs.plan import RunPlan
from t5tune.runs.resume_guard import hash_examples
from t5tune.settings.groups.data import SplitSettings


def hash_prepared(folder: Path) -> str:
    """Hash the description of prepared data, which has a hash of each of its files."""
    return hash_json(read_examples_manifest(folder))


def is_replaced(folder: Path, prepared: str | None) -> bool:
    """Whether another process has replaced prepared data whose hash was `prepared`. None: the hash isn't known."""
    try:
        return prepared is not None and prepared != hash_prepared(folder)
    except DataError:  # it is gone or damaged
        return False


def open_data(plan: RunPlan, prepared: str | None) -> tuple[Examples, Examples | None]:
    """Open the training examples, and the held-out examples if there are any.

    Args:
        prepared: hash of the data that was prepared for this run; None: not known.

    Raises:
        SettingsError: eval_fraction or split_seed differs from prepare's.
        DataError: the data was replaced since.
    """
    data, folder = plan.data, plan.data_folder
    if is_replaced(folder, prepared):
        problem = f"{folder}: another process has replaced this data since it was prepared for this run"
        raise DataError(problem, hint="give each run its own preprocessed_path, and run the same command again")
    examples = open_examples(folder)
    if plan.eval_datasets:
        return examples.split_as_prepared()[0], open_examples(plan.eval_data_folder).map_labels(examples.label_task)
    if data.eval_fraction > 0:
        _check_split(data, examples)
        return examples.split(data.eval_fraction, data.split_seed)
    return examples.split_as_prepared()


def find_held_out(model: Path, examples: Examples) -> Examples | None:
    """Find the examples that the run of a model held out; None: the run held out no or different examples."""
    for checkpoint in [*list_checkpoints(model)[:1], model]:
        with suppress(CheckpointError, DataError):
            run_identity = read_run_identity(checkpoint)
            _, held_out = examples.split(run_identity["eval_fraction"], run_identity["split_seed"])
            if hash_examples(held_out) == run_identity["held_out"]:
                return held_out
    return None


def find_trained_keys(model: Path) -> npt.NDArray[np.uint64]:
    """Find the keys of the conversations that the run of a model was trained on; empty: not known."""
    for checkpoint in [*list_checkpoints(model)[:1], model]:
        with suppress(T5TuneError, OSError):  # not a run folder, or its data is gone
            run_identity = read_run_identity(checkpoint)
            run = model if (model / SETTINGS_FILE).is_file() else model.parent
            folder = read_yaml(run / SETTINGS_FILE).get("preprocessed_path") or run / RUN_CACHE_FOLDER
            examples = open_examples(Path(folder))
            if run_identity["eval_fraction"]:
                examples, _ = examples.split(run_identity["eval_fraction"], run_identity["split_seed"])
            else:
                examples, _ = examples.split_as_prepared()
            return np.unique(examples.read_keys())
    return np.zeros(0, np.uint64)


def _check_split(data: SplitSettings, examples: Examples) -> None:
    """Check that training doesn't use examples that prepare held out: evaluate would score them as held out."""
    for cache in (dataset.cache for dataset in examples.datasets):
        fraction, seed = cache.manifest["eval_fraction"], cache.manifest["split_seed"]
        if fraction and (fraction, seed) != (data.eval_fraction, data.split_seed):
            now = f"{data.eval_fraction:g} with split_seed {data.split_seed}"
            raise SettingsError(
                f"eval_fraction: {now}, but prepare held out {fraction:g} of {cache.folder} with split_seed {seed}",
                hint="leave out eval_fraction to hold out the same examples, or prepare the data again without it",
            )
