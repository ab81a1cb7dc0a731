"""The cache of a dataset in the folder that prepare writes."""

from pathlib import Path

from t5tune.data.caches.cache import Cache, is_cache, open_cache
from t5tune.data.caches.examples import list_caches


def find_cache(folder: Path) -> Path:
    """Return the cache of the only dataset in a folder, or the folder if it is a cache itself."""
    if is_cache(folder):
        return folder
    (cache,) = list_caches(folder).values()
    return cache


def open_only(folder: Path) -> Cache:
    """Open the cache of the only dataset in a folder."""
    return open_cache(find_cache(folder))
