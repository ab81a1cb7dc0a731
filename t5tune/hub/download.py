"""Download a repository's files from the Hugging Face Hub into its cache.

    repository = Repository("model", "google/flan-t5-small", setting="model_name_or_path")
    folder = repository.download(["*.json", "*.safetensors"])

What is in the cache already is used: as long as the Hub can't be reached, or if HF_HUB_OFFLINE is set.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from t5tune.compat.hub_patches import limit_waiting_for_the_hub
from t5tune.errors import CheckpointError, DataError, ModelError, T5TuneError, suggest_name
from t5tune.io.reasons import hide_queries, join_lines
from t5tune.progress import Note, Report, count_done, silent

Kind = Literal["model", "adapter", "dataset"]
ERROR_CLASSES: dict[Kind, type[T5TuneError]] = {"model": ModelError, "adapter": CheckpointError, "dataset": DataError}
ALL_FOLDERS = "*/*"
TRANSFER_BAR = "Downloading bytes"  # what huggingface_hub writes at a second bar, which counts the same bytes


def get_cache_root(cache_dir: Path | None) -> Path:
    """Return t5tune's own folder for what is downloaded: next to the Hub's cache, or in `cache_dir`."""
    from huggingface_hub import constants

    return (cache_dir or Path(constants.HF_HOME)) / "t5tune"


def get_status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of huggingface_hub; None if it has none."""
    from huggingface_hub import errors

    return int(error.response.status_code) if isinstance(error, errors.HfHubHTTPError) else None


def describe(error: BaseException) -> str:
    """Describe an error of huggingface_hub in one line, without what may be a secret."""
    return hide_queries(join_lines(error))[:300]


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error is that of a connection, of httpx or its successors: not each of them uses the cache."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _count_missing_bytes(find: Any) -> int:
    """Count the bytes that aren't in the cache yet; 0 if the Hub can't be reached, of which the download tells."""
    try:
        files = find(dry_run=True, tqdm_class=_make_bar_class(lambda _: None))
        return sum(file.file_size for file in files if file.will_download)
    except Exception:
        return 0


def _make_bar_class(advance: Callable[[int], None]) -> Any:
    """Make a class of progress bars that huggingface_hub updates, and that draws nothing but reports the bytes."""
    from tqdm.auto import tqdm

    lock = Lock()  # several files are downloaded at once

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B" and kwargs.get("desc") != TRANSFER_BAR
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes and n:
                with lock:
                    advance(int(n))

    return Bar


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Args:
        name: `owner/name`.
        setting: the setting that names it, for messages.
        revision: branch, tag or commit; None: the main branch.
        cache_dir: folder for downloads; None: the Hub's own cache.
    """

    kind: Kind
    name: str
    setting: str
    revision: str | None = None
    cache_dir: Path | None = None

    @property
    def repo_type(self) -> str:
        """What the Hub calls the kind; an adapter is a model there."""
        return "dataset" if self.kind == "dataset" else "model"

    def download(self, patterns: Sequence[str], with_folders: bool = False, report: Report = silent) -> Path:
        """Download the files whose names match, and return the snapshot's folder, whose name is the commit.

        Args:
            with_folders: whether to look into the repository's folders, too, which contain what a model doesn't need.

        Raises:
            ModelError, CheckpointError, DataError: there is no such repository, or it can't be downloaded.
        """
        from huggingface_hub import snapshot_download

        limit_waiting_for_the_hub()
        find: Any = partial(
            snapshot_download,
            self.name,
            repo_type=self.repo_type,
            revision=self.revision,
            cache_dir=self.cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=None if with_folders else [ALL_FOLDERS],
        )
        try:
            missing = 0 if report is silent else _count_missing_bytes(find)
            with count_done("download", report if missing else silent, missing, "bytes") as advance:
                return Path(find(tqdm_class=_make_bar_class(advance)))
        except Exception as error:  # OSError, ValueError, and exceptions of the HTTP library of huggingface_hub
            if _is_lost_connection(error):
                with suppress(Exception):  # the cache lacks a file
                    folder = Path(find(local_files_only=True))
                    report(Note(f"{self.name}: the Hub can't be reached, so the copy in the cache is used"))
                    return folder
            raise self.explain(error) from error

    def list_files(self, commit: str | None = None) -> list[str]:
        """List the names of the repository's files, of which a download has kept the list.

        Args:
            commit: at which; None: at the revision.

        Raises:
            ModelError, CheckpointError, DataError: it can't be reached.
        """
        from huggingface_hub import HfApi, errors, get_cached_repo_tree

        limit_waiting_for_the_hub()
        asked: Any = {"repo_type": self.repo_type, "revision": commit or self.revision}
        with suppress(errors.CachedRepoTreeNotFoundError):
            return [file.path for file in get_cached_repo_tree(self.name, cache_dir=self.cache_dir, **asked)]
        try:
            return HfApi().list_repo_files(self.name, **asked)
        except Exception as error:
            raise self.explain(error) from error

    def find_cached(self, name: str) -> Path | None:
        """Find a file in the cache; nothing is downloaded."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.name, name, cache_dir=self.cache_dir, revision=self.revision, repo_type=self.repo_type
        )
        return Path(found) if isinstance(found, str) else None

    def _list_local_names(self) -> list[str]:
        """List what a mistyped name may mean: what is in the folder where a path of this name would be, and pocket."""
        names = ["pocket"] if self.kind == "model" else []
        with suppress(OSError):
            names += [str(path) for path in Path(self.name).parent.iterdir()]
        return names

    def explain(self, error: Exception) -> T5TuneError:
        """Turn an error of huggingface_hub into one that says what to do about it."""
        from huggingface_hub import errors, get_token

        noun = "dataset" if self.kind == "dataset" else "model"
        missing = "no such file or folder" if self.kind == "dataset" else "no such folder"
        instead = "give a file or a folder" if self.kind == "dataset" else "give a folder"
        asked = f"{self.setting}: {self.name}"
        status = get_status(error) or get_status(error.__cause__)
        is_offline = isinstance(error, errors.OfflineModeIsEnabled)
        is_offline |= isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        match error:
            case errors.GatedRepoError():
                reason = f"access to this {noun} is restricted (gated)"
                hint = f"request access on the Hub page of {self.name}, then run `hf auth login`"
            case errors.RepositoryNotFoundError():
                reason = f"{missing} on this machine, and no such {noun} on the Hub, or a private one"
                reason += suggest_name(self.name, self._list_local_names())
                hint = f"check the spelling; for a private {noun} run `hf auth login`"
            case errors.RevisionNotFoundError():
                asked = f"revision: {self.revision}"
                reason, hint = f"{self.name} has no such branch, tag or commit", "check the spelling"
            case errors.HFValidationError():
                reason, hint = f"{missing}, and not a valid name of a {noun} on the Hub", "check the spelling"
            case _ if status == 401:
                reason = (
                    "the Hub doesn't accept the token" if get_token() else "the Hub asks for a token, and none is set"
                )
                hint = "run `hf auth login`, or set HF_TOKEN"
            case _ if status in (403, 429):
                reason = f"the Hub refuses the download: {describe(error.__cause__ or error)}"
                hint = "try again later" if status == 429 else f"see the Hub page of {self.name}"
            case _ if is_offline:
                reason = f"{missing}, HF_HUB_OFFLINE disables downloads, and the {noun} isn't all in the local cache"
                hint = f"unset HF_HUB_OFFLINE, or {instead}"
            case errors.LocalEntryNotFoundError():
                reason = f"{missing}, the Hub can't be reached, and the {noun} isn't in the local cache"
                reason += suggest_name(self.name, self._list_local_names())
                hint = f"check the network connection, or {instead}"
                hint += "" if self.kind == "adapter" else f"; `pocket` is the built-in {noun}"
            case OSError() if error.errno is not None:
                reason = f"{error.strerror} ({error.filename})" if error.filename else f"{error.strerror}"
                hint = "use --cache-dir to download to another folder"
            case _:
                reason = f"the download from the Hub failed: {describe(error)}"
                hint = f"try again later, or {instead}"
        return ERROR_CLASSES[self.kind](f"{asked}: {reason}", hint=hint)
