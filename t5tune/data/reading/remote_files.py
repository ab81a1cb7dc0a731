"""Copy files from s3://, gs://, https:// and other file systems of fsspec to a folder on this machine.

    fetch_remote("s3://bucket/chats/*.jsonl", "data_path", cache_dir=None)   # [Path("~/.cache/…/chats-1.jsonl"), …]

A file is copied again only if it has changed: its size, its ETag or its date.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from t5tune.data.reading.files import find_data_suffix
from t5tune.errors import CheckpointError, DataError, DependencyError, T5TuneError
from t5tune.formatting import shorten
from t5tune.hub.download import get_cache_root
from t5tune.io.atomic import explain_write_errors, write_json
from t5tune.io.reasons import hide_queries, join_first, join_lines
from t5tune.io.untrusted import read_json_object
from t5tune.progress import Note, Report, count_done, silent
from t5tune.settings.dataset_list import PATHS_OF_DATASETS
from t5tune.settings.field_types import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)

_URL = re.compile(r"(?!hf:|file:|local:)[a-z][a-z0-9+.-]+://.+", re.DOTALL)
# keys of fsspec's file systems that describe a file's content
VERSION_KEYS = (
    "size", "ETag", "etag", "Content-MD5", "md5Hash", "generation", "Last-Modified", "LastModified", "updated", "mtime",
)  # fmt: skip
DESCRIPTION_FILE = "file.json"
FILES_FOLDER = "files"  # in t5tune's folder for downloads
HASH_CHARACTERS = 16
PROTOCOLS_OF_EXTRA = ("http", "https", "s3", "gs", "gcs")  # their packages are installed with t5tune[remote]


def is_url(name: str) -> bool:
    """Whether a name is a URL that isn't on this machine or the Hugging Face Hub."""
    return bool(_URL.fullmatch(name))


def hide_query(name: str) -> str:
    """Return a URL without its query and password, which may be secrets, such as a signature; unchanged: not a URL."""
    if not is_url(name):
        return name
    try:
        parts = urlsplit(name)
        return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:  # such as https://[
        return hide_queries(name.partition("?")[0])


def hide_data_queries(settings: AnySettings) -> AnySettings:
    """Return the settings without the queries of the data's URLs, for other people to see."""
    hidden: dict[str, list[Any]] = {}
    for data, paths in PATHS_OF_DATASETS.items():
        if names := getattr(settings, paths, None):
            hidden[paths] = [*map(hide_query, names)]
        if datasets := getattr(settings, data, None):
            hidden[data] = [each.model_copy(update={"path": [*map(hide_query, each.path)]}) for each in datasets]
    return settings.model_copy(update=hidden)


def fetch_remote(
    url: str, setting: str, cache_dir: Path | None, report: Report = silent, is_text: bool = False
) -> list[Path]:
    """Copy the file at a URL, the data files of a folder, or the files that match a pattern. Return their paths.

    Args:
        setting: the setting that names it, for messages.
        cache_dir: folder for downloads; None: `t5tune` in Hugging Face's folder.
    """
    import fsspec

    asked = f"{setting}: {hide_query(url)}"
    try:
        system, path = fsspec.core.url_to_fs(url, **_choose_options(url))
    except ImportError as error:
        protocol = url.partition("://")[0]
        if protocol in PROTOCOLS_OF_EXTRA:
            problem, hint = f"the package for {protocol}:// isn't installed", "pip install 't5tune[remote]'"
        else:
            problem, hint = _describe(error), "install the package that it names"
        raise DependencyError(f"{asked}: {problem}", hint=hint) from error
    except Exception as error:  # of whichever library the protocol needs
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "https"))
        raise DataError(f"{asked}: {_describe(error)}", hint=f"for example {known}") from error
    root = get_cache_root(cache_dir) / FILES_FOLDER
    try:
        files = _list_files(system, path)
    except Exception as error:
        if _is_unreachable(error) and (copied := _find_copy(root, url)) is not None:
            report(Note(f"{asked}: can't be reached; using the earlier copy", warning=True))
            return [copied]
        raise _explain(asked, error) from error
    if not files:
        raise DataError(f"{asked}: contains no data files", hint="name a JSON, JSONL, CSV or Parquet file")
    names = [name for name in files if find_data_suffix(_get_name(name), is_text) not in (None, ".xlsx")]
    if not names:
        raise DataError(f"{asked}: {join_first(sorted(files))}: no JSON, JSONL, CSV or Parquet file")
    try:
        urls = [url if name == path else system.unstrip_protocol(name) for name in names]
        return [_copy(system, name, files[name], each, root, report) for name, each in zip(names, urls, strict=True)]
    except T5TuneError:
        raise
    except Exception as error:
        raise _explain(asked, error) from error


def _choose_options(url: str) -> dict[str, Any]:
    # no limit on the time for a whole file, which is five minutes over HTTP by default
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # HTTPS_PROXY and the like


def _is_unreachable(error: Exception) -> bool:
    # over HTTP, fsspec raises the same class for an error of the connection and of the file
    cause = error.__cause__ or error
    return not hasattr(cause, "status") and not isinstance(cause, FileNotFoundError | PermissionError)


def _get_name(path: str) -> Path:
    # leave out a URL's query
    return Path(unquote(urlsplit(path).path) if "://" in path else path)


def _list_files(system: Any, path: str) -> dict[str, Mapping[str, Any]]:
    # the query of a URL may contain `*` and `?`, and pages aren't searched for links
    if "http" in system.protocol or "https" in system.protocol:
        return {path: system.info(path)}
    if re.search(r"[*?\[]", path):
        return {name: info for name, info in sorted(system.glob(path, detail=True).items()) if info["type"] == "file"}
    info = system.info(path)
    if info["type"] != "directory":
        return {path: info}
    return {each["name"]: each for each in sorted(system.ls(path), key=itemgetter("name")) if each["type"] == "file"}


def _copy(system: Any, path: str, info: Mapping[str, Any], url: str, root: Path, report: Report) -> Path:
    version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
    folder = root / _hash(url)
    local = folder / _hash(json.dumps(version, sort_keys=True)) / _get_name(path).name
    if version.keys() - {"size"} and local.is_file():  # a size alone doesn't show a change
        return local
    with explain_write_errors(local.parent), count_done("download", report, info.get("size"), "bytes") as advance:
        local.parent.mkdir(parents=True, exist_ok=True)
        unfinished = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}")  # of this process alone
        try:
            system.get_file(path, str(unfinished), callback=_make_callback(advance))
            found, expected = unfinished.stat().st_size, info.get("size")
            if expected is not None and found != expected:
                problem = f"{hide_query(url)}: the connection ended after {found} of {expected} bytes"
                raise DataError(problem, hint="try again")
            unfinished.replace(local)
        finally:
            unfinished.unlink(missing_ok=True)
        write_json(folder / DESCRIPTION_FILE, {"url": hide_query(url), "newest": str(local.relative_to(folder))})
    return local


def _make_callback(advance: Callable[[int], None]) -> Any:
    from fsspec.callbacks import Callback

    class Counter(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    return Counter()


def find_url(file: Path) -> str | None:
    """Return the URL of a copied file, without its query; None: not a copied file."""
    if file.parent.parts[-4:-2] != ("t5tune", FILES_FOLDER):
        return None
    url = _read_description(file.parent.parent).get("url")
    return hide_query(url) if isinstance(url, str) else None


def _find_copy(root: Path, url: str) -> Path | None:
    copied = root / _hash(url) / str(_read_description(root / _hash(url)).get("newest"))
    return copied if copied.is_file() else None


def _read_description(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, CheckpointError):
        return read_json_object(folder, DESCRIPTION_FILE)
    return {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


def _explain(asked: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.filename is not None:  # only an error on this machine names a file
        problem = f"{asked}: {os.fsdecode(error.filename)}: can't be written: {error.strerror}"
        return DataError(problem, hint="use --cache-dir to download to another folder")
    # over HTTP, a FileNotFoundError may have any cause
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(cause, "status", None)
    if status == 404 or isinstance(cause, FileNotFoundError):
        return DataError(f"{asked}: no such file", hint="check the spelling, and that you may read it")
    if isinstance(cause, PermissionError):
        return DataError(f"{asked}: access denied", hint="check the credentials in your environment")
    if status in (401, 403):
        problem = f"{asked}: the server denied access (status {status})"
        return DataError(problem, hint="check the URL's signature or password, which may have expired")
    hint = "check the network connection, and try again" if status is None else "try again later"
    return DataError(f"{asked}: can't be read: {_describe(cause)}", hint=hint)


def _describe(error: Exception) -> str:
    return shorten(hide_queries(join_lines(error)), 200) or type(error).__name__
