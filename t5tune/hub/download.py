"""Download a repository's files from the Hugging Face Hub into its cache.

    repository = Repository("model", "google/flan-t5-small", setting="model_name_or_path")
    folder = repository.download(["*.json", "*.safetensors"])

Each time, the Hub is asked which commit a branch or a tag points to. While it can't be reached, or fails, the cached
copy is used, and a warning says so; HF_HUB_OFFLINE uses that copy in any case.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

from t5tune.compat.hub_patches import RedirectedElsewhere, watch_requests_to_the_hub
from t5tune.errors import CheckpointError, DataError, ModelError, SettingsError, T5TuneError, suggest_name
from t5tune.formatting import shorten
from t5tune.io.atomic import hash_file, write_file
from t5tune.io.reasons import hide_queries, join_lines
from t5tune.progress import Note, Report, count_done, silent

Result = TypeVar("Result")
Kind = Literal["model", "adapter", "dataset"]
ERROR_CLASSES: dict[Kind, type[T5TuneError]] = {"model": ModelError, "adapter": CheckpointError, "dataset": DataError}
ALL_FOLDERS = "*/*"
TRANSFER_BAR = "Downloading bytes"  # huggingface_hub's description of a second bar, which counts the same bytes
COMMITS_FOLDER = "commits"  # in t5tune's folder for downloads: the date of each commit
TRANSIENT = {408, 429, 500, 502, 503, 504}  # HTTP statuses for which a retry may succeed
MAX_RETRIES = 3
RETRY_VARIABLE = "HUB_RETRY_SECONDS"  # pause before the first retry; it doubles before each later retry
_COMMIT = re.compile(r"[0-9a-f]{40}")


def get_cache_root(cache_dir: Path | None) -> Path:
    """Return t5tune's folder for downloads: next to the Hub's cache, or in `cache_dir`."""
    from huggingface_hub import constants

    return (cache_dir or Path(constants.HF_HOME)) / "t5tune"


def get_status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of huggingface_hub; None: it isn't an HTTP error."""
    from huggingface_hub import errors

    return int(error.response.status_code) if isinstance(error, errors.HfHubHTTPError) else None


def describe(error: BaseException) -> str:
    """Describe an error of huggingface_hub in one line, without possible secrets."""
    return shorten(hide_queries(join_lines(error)), 300)


def _list_causes(error: BaseException | None) -> list[BaseException]:
    """List an error and its causes: huggingface_hub wraps some errors."""
    return [] if error is None else [error, *_list_causes(error.__cause__)]


def _find_status(error: BaseException) -> int | None:
    return next(filter(None, map(get_status, _list_causes(error))), None)


def _is_worth_retrying(error: Exception) -> bool:
    """Whether the server is broken or busy. huggingface_hub itself retries requests for trees and headers of files."""
    from huggingface_hub import errors

    responses = [cause.response for cause in _list_causes(error) if isinstance(cause, errors.HfHubHTTPError)]
    requests = [response.request for response in responses if response.status_code in TRANSIENT]
    return any(request.method == "GET" and "/tree/" not in request.url.path for request in requests)


def describe_outage(error: BaseException) -> str | None:
    """Describe why the Hub can't be used now; None if the error has a different cause, such as a refusal."""
    status = _find_status(error)
    if status is not None:
        return f"the Hub answers with status {status}" if status in TRANSIENT or status >= 500 else None
    for cause in _list_causes(error):
        # compare names, since the classes are from httpx or its successors
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(cause, RedirectedElsewhere):
            return f"the Hub's address redirects to {cause.host}"
        if kinds & {"ConnectError", "TimeoutException", "ProxyError"}:
            return "the Hub can't be reached"
        if "TransportError" in kinds:
            return "the connection to the Hub was lost"
        if "JSONDecodeError" in kinds:
            return "the server at the Hub's address isn't the Hub"
    return None


def call_with_retries(call: Callable[[], Result]) -> Result:
    """Call a function, up to three more times if the Hub answers that it is broken or busy."""
    given = os.environ.get(RETRY_VARIABLE, "1")
    if re.fullmatch(r"\d*\.?\d+", given) is None:
        raise SettingsError(f"{RETRY_VARIABLE}: {given!r} isn't a number of seconds")
    wait = float(given)
    for retry in range(MAX_RETRIES):
        try:
            return call()
        except Exception as error:
            if not _is_worth_retrying(error):
                raise
        time.sleep(wait * 2**retry)
    return call()


def _count_missing_bytes(find: Any) -> int:
    """Count the bytes that aren't in the cache yet; 0 if the Hub is unreachable, as the download itself will report."""
    try:
        files = find(dry_run=True, tqdm_class=_make_bar_class(lambda _: None))
        return sum(file.file_size for file in files if file.will_download)
    except Exception:
        return 0


def _make_bar_class(advance: Callable[[int], None]) -> Any:
    """Make a progress bar class for huggingface_hub that reports the bytes and draws nothing."""
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
    """A repository on the Hub. Errors name the `setting`, and are of the class for the kind (ERROR_CLASSES).

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None: the main branch.
        cache_dir: folder for downloads; None: the Hub's cache.
        is_local: whether only the cache is used.
    """

    kind: Kind
    name: str
    setting: str
    revision: str | None = None
    cache_dir: Path | None = None
    is_local: bool = False

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def _folder(self) -> Path:
        from huggingface_hub import constants

        root = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()
        return root / f"{self.repo_type}s--{self.name.replace('/', '--')}"

    @property
    def _snapshot(self) -> Path:
        return self._folder / "snapshots" / str(self.revision)

    @property
    def _date_file(self) -> Path:
        return get_cache_root(self.cache_dir) / COMMITS_FOLDER / str(self.revision)

    def use_newest(self, use: Callable[["Repository"], Result], report: Report = silent) -> Result:
        """Call `use` with this repository at the commit that its branch or tag has now on the Hub.

        If the Hub can't be reached or keeps failing, it is the commit of the cached copy, and a warning says so. The
        Hub isn't asked offline, nor if the revision is a commit, whose files can't change.
        """
        from huggingface_hub import constants

        cached = self._find_cached()
        if constants.is_offline_mode() or self.is_local or _COMMIT.fullmatch(self.revision or ""):
            return use(cached or self)
        try:
            newest = self._ask_for_commit()
            result = use(newest)
        except Exception as error:
            outage = describe_outage(error)
            if outage is None or cached is None:
                raise self.explain(error) from error
            try:
                result = use(replace(cached, is_local=True))
            except T5TuneError:
                raise self.explain(error) from error
            copy = f"using the copy of commit {cached.revision} {cached._describe_date()}"
            report(Note(f"{self.name}: {outage}; {copy}", warning=True))
            return result
        newest._remember_as(self.revision)
        return result

    def _ask_for_commit(self) -> "Repository":
        from huggingface_hub import HfApi

        watch_requests_to_the_hub()
        api = HfApi()
        info = call_with_retries(lambda: api.repo_info(self.name, repo_type=self.repo_type, revision=self.revision))
        newest = replace(self, revision=info.sha)
        if info.last_modified is not None:
            _write_unless_same(newest._date_file, f"{info.last_modified:%Y-%m-%d}")
        return newest

    def _find_cached(self) -> "Repository | None":
        """Return the repository at the commit that was downloaded last; None if there is no download."""
        commit = self.revision or "main"
        if not _COMMIT.fullmatch(commit):
            commit = _read(self._folder / "refs" / commit)
        cached = replace(self, revision=commit)
        return cached if _COMMIT.fullmatch(commit) and cached._snapshot.is_dir() else None

    def _remember_as(self, revision: str | None) -> None:
        """Store this commit as the branch or tag in the cache, once its files are there."""
        _write_unless_same(self._folder / "refs" / (revision or "main"), str(self.revision))

    def _describe_date(self) -> str:
        if date := _read(self._date_file):
            return f"of {date}"
        return f"downloaded on {datetime.fromtimestamp(self._snapshot.stat().st_mtime, UTC):%Y-%m-%d}"

    def download(self, patterns: Sequence[str], with_folders: bool = False, report: Report = silent) -> Path:
        """Download the files whose names match, and return the snapshot's folder, whose name is the commit.

        Files in folders, which models don't need, are downloaded only `with_folders`.
        """
        return self.use_newest(lambda newest: newest._download(patterns, with_folders, report), report)

    def _download(self, patterns: Sequence[str], with_folders: bool, report: Report) -> Path:
        from huggingface_hub import snapshot_download

        watch_requests_to_the_hub()
        find: Any = partial(
            snapshot_download,
            self.name,
            repo_type=self.repo_type,
            revision=self.revision,
            cache_dir=self.cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=None if with_folders else [ALL_FOLDERS],
            local_files_only=self.is_local,
        )

        def find_all() -> Path:
            missing = 0 if report is silent else _count_missing_bytes(find)
            with count_done("download", report if missing else silent, missing, "bytes") as advance:
                return Path(find(tqdm_class=_make_bar_class(advance)))

        before = set(self._list_files())
        try:
            folder = call_with_retries(find_all)
        except Exception as error:  # OSError, ValueError, and exceptions of the HTTP library of huggingface_hub
            raise self.explain(error) from error
        self._check_hashes(before)
        return folder

    def _list_files(self) -> list[Path]:
        return [path for path in self._snapshot.rglob("*") if path.is_symlink()]

    def _check_hashes(self, before: Collection[Path]) -> None:
        """Compare new files with the Hub's hashes, which are the names of the links' targets. Delete a damaged file."""
        for link in self._list_files():
            file = link.resolve()
            if link in before or not file.is_file() or _has_hash(file, file.name):
                continue
            for path in (link, file):
                path.unlink(missing_ok=True)
            problem = f"{self.name}: {link.name}: damaged during the download"
            raise ERROR_CLASSES[self.kind](problem, "run the same command to download the file again", self.setting)

    def list_files(self, commit: str | None = None) -> list[str]:
        """List the names of the repository's files at a commit, by default the revision. A download stores the list."""
        from huggingface_hub import HfApi, errors, get_cached_repo_tree

        watch_requests_to_the_hub()
        asked: Any = {"repo_type": self.repo_type, "revision": commit or self.revision}
        with suppress(errors.CachedRepoTreeNotFoundError):
            return [file.path for file in get_cached_repo_tree(self.name, cache_dir=self.cache_dir, **asked)]
        try:
            return call_with_retries(lambda: HfApi().list_repo_files(self.name, **asked))
        except Exception as error:
            raise self.explain(error) from error

    def find_cached_folder(self) -> Path | None:
        """Find the folder of the latest download, which may lack files; nothing is downloaded."""
        cached = self._find_cached()
        return None if cached is None else cached._snapshot

    def _list_local_names(self) -> list[str]:
        """List names that the user may have meant: the folder's contents if the name is a path, and pocket."""
        names = ["pocket"] if self.kind == "model" else []
        with suppress(OSError):
            names += [str(path) for path in Path(self.name).parent.iterdir()]
        return names

    def explain(self, error: Exception) -> T5TuneError:
        """Turn an error of huggingface_hub into an error with the next step."""
        from huggingface_hub import errors, get_token

        if isinstance(error, T5TuneError):
            return error
        noun = "dataset" if self.kind == "dataset" else "model"
        missing = "no such file or folder" if self.kind == "dataset" else "no such folder"
        instead = "give a file or a folder" if self.kind == "dataset" else "give a folder"
        setting, asked = self.setting, self.name if self.revision is None else f"{self.name}@{self.revision}"
        status, outage = _find_status(error), describe_outage(error)
        is_offline = isinstance(error, errors.OfflineModeIsEnabled)
        is_offline |= isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        match error:
            case errors.GatedRepoError():
                reason = f"access to this {noun} is restricted (gated)"
                hint = f"request access on the Hub page of {self.name}, then run `hf auth login`"
            case errors.RevisionNotFoundError():
                setting, asked = "revision", str(self.revision)
                reason, hint = f"{self.name} has no such branch, tag or commit", "check the spelling"
            case _ if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
                reason = f"{missing} on this machine, and no such {noun} on the Hub, or a private one"
                hint = f"check the spelling; for a private {noun} run `hf auth login`"
                hint += suggest_name(self.name, self._list_local_names())
            case errors.HFValidationError():
                reason, hint = f"{missing}, and not a valid name of a {noun} on the Hub", "check the spelling"
            case _ if status == 401:
                reason = "the Hub doesn't accept the token" if get_token() else "the Hub asks for a token"
                hint = "run `hf auth login`, or set HF_TOKEN"
            case _ if status == 403:
                reason = f"the Hub refuses the download: {describe(error.__cause__ or error)}"
                hint = f"see the Hub page of {self.name}"
            case _ if is_offline:
                reason = (
                    f"{missing}, HF_HUB_OFFLINE disables downloads, and the {noun} isn't complete in the local cache"
                )
                hint = f"unset HF_HUB_OFFLINE, or {instead}"
            case _ if outage is not None:
                reason = f"{missing}, {outage}, and the {noun} isn't complete in the local cache"
                if any(isinstance(cause, RedirectedElsewhere) for cause in _list_causes(error)):
                    hint = f"sign in to the network if it asks for that in a browser, check HF_ENDPOINT, or {instead}"
                else:
                    hint = f"{'check the network connection' if status is None else 'try again later'}, or {instead}"
                hint += "" if self.kind == "adapter" else f"; `pocket` is the built-in {noun}"
                hint += suggest_name(self.name, self._list_local_names())
            case OSError() if error.errno is not None:
                reason = f"{error.strerror} ({error.filename})" if error.filename else f"{error.strerror}"
                hint = "use --cache-dir to download to another folder"
            case _:
                reason = f"the download from the Hub failed: {describe(error)}"
                hint = f"try again later, or {instead}"
        return ERROR_CLASSES[self.kind](f"{asked}: {reason}", hint, setting)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _write_unless_same(file: Path, text: str) -> None:
    if _read(file) != text:
        with suppress(OSError):  # such as a full disk: then an offline call may use an older copy
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, text.encode())


def _has_hash(file: Path, name: str) -> bool:
    """Whether a file's hash is its name in the Hub's cache: a SHA-256, or a SHA-1 of the file or of its git blob.

    Names of other forms, which a replacement of the Hub may give, aren't checked.
    """
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return hash_file(file) == name
    if re.fullmatch(r"[0-9a-f]{40}", name):
        body = file.read_bytes()
        return name in {hashlib.sha1(begin + body).hexdigest() for begin in (b"", b"blob %d\0" % len(body))}
    return True
