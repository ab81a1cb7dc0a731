"""The cache of a dataset in the folder that prepare writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from t5tune.commands.prepare import make_plan
from t5tune.data.caches.cache import Cache, is_cache, open_cache
from t5tune.data.caches.prepared import list_caches
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.plan import Origin
from t5tune.progress import silent
from t5tune.settings import PrepareSettings


def find_cache(folder: Path) -> Path:
    """Return the cache of the only dataset in a folder, or the folder if it is a cache itself."""
    if is_cache(folder):
        return folder
    (cache,) = list_caches(folder).values()
    return cache


def open_only(folder: Path) -> Cache:
    """Open the cache of the only dataset in a folder."""
    return open_cache(find_cache(folder))


def prepare_for_run(settings: PrepareSettings, **origin: Any) -> dict[str, Any]:
    """Prepare data as train does, and return what the result says about the call.

    Args:
        origin: what the data takes from elsewhere, as fields of `Origin`.
    """
    return prepare_datasets(replace(make_plan(settings), origin=Origin(**origin)), silent)[1]
