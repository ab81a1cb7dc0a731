"""A small server of the Hugging Face Hub's API, for huggingface_hub's own client over real HTTP.

    with serve_hub(home) as hub:
        hub.add("model", "some/adapter", {"adapter_config.json": b"{}"})
        t5tune("chat", "some/adapter", env=hub.environment)

It speaks what t5tune uses: a repository's info, tree and files, creating a repository, and commits with LFS uploads.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "Secret" * 5
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".zst", ".gz")
PLURALS = {"models": "model", "datasets": "dataset"}


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all of its files."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: Mapping[str, bytes]) -> str:
        """Replace all files, and return the commit's hash."""
        number = len(self.commits)
        sha = hashlib.sha1(f"{self.kind} {self.name} {number}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        found = self.tags.get(revision, revision)
        return found if found in self.commits else None


class Hub:
    """The repositories that the server serves, and the requests that it got.

    Attributes:
        refusals: names that it refuses, with the status and the error code.
        requests: (method, path, headers) of each request.
        break_after: for files of these names, how many bytes are sent before the connection is closed.
        read_only: names of repositories that no one may write to.
        status: refuses each request with this status.
        failing: for files of these names, the statuses with which the next requests for their content are refused.
        damaged: names of files that are sent with one bit flipped.
        redirects_to: host that each request is redirected to.
        last_modified: the date of each repository's last commit, in ISO 8601.
        drops: whether each connection is closed without an answer.
        hangs: whether no request is answered, until `has_ended` is set.
        missing: actions that it answers with status 404, as a server that isn't the Hub does.
        after_lookup: called after a branch or a tag was looked up.
        before_upload: called before the content of a file is received.
        allows_commit: called before each commit; if it returns False, the connection is closed instead.
    """

    def __init__(self, url: str, home: Path) -> None:
        self.url = url
        self.home = home
        self.repos: dict[tuple[str, str], Repo] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.break_after: dict[str, int] = {}
        self.status: int | None = None
        self.failing: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.redirects_to: str | None = None
        self.last_modified: str | None = None
        self.drops = False
        self.hangs = False
        self.has_ended = threading.Event()
        self.missing: set[str] = set()
        self.read_only: set[str] = set()
        self.after_lookup: Callable[[], object] = lambda: None
        self.before_upload: Callable[[], object] = lambda: None
        self.allows_commit: Callable[[], bool] = lambda: True
        self.blobs: dict[str, bytes] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make huggingface_hub use the server."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "HUB_RETRY_SECONDS": "0.01",
        }

    def add(self, kind: str, name: str, files: Mapping[str, bytes] | Path, private: bool = False) -> Repo:
        """Add a repository with these files, or with those of a folder."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()
            }
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        repo.commit(files)
        return repo

    def count_downloads(self, name: str) -> int:
        """Count how often the content of files of this name was requested."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.hangs:
            self.hub.has_ended.wait()
            self.close_connection = True
            return None
        if self.hub.drops:
            self.close_connection = True
            return None
        if self.hub.status is not None:
            return self._send_json({"error": "refused"}, self.hub.status)
        if self.hub.redirects_to is not None:
            return self._send(b"", 302, {"Location": f"http://{self.hub.redirects_to}/login"})
        if self.command == "GET" and (statuses := self.hub.failing.get(path.rpartition("/")[2])):
            return self._send_json({"error": "failing"}, statuses.pop(0))
        if "Authorization" in self.headers and not self._is_signed_in():
            return self._send_json({"error": "Invalid credentials in Authorization header"}, 401)
        # a slash in a revision is quoted
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.hub.missing & set(parts):
            return self._send_json({"error": "Not Found"}, 404)
        if parts[0] == "lfs":
            return self._receive_blob(parts[1])
        if parts[0] != "api":
            return self._serve_file(parts)
        match parts[1:]:
            case ["whoami-v2"] if not self._is_signed_in():
                return self._send_json({"error": "Invalid username or password."}, 401)
            case ["whoami-v2"]:
                return self._send_json({"type": "user", "name": USER, "orgs": []})
            case ["validate-yaml"]:
                return self._validate_card()
            case ["repos", "create"]:
                return self._create()
            case [("models" | "datasets") as plural, owner, name, *rest]:
                return self._serve_api(PLURALS[plural], f"{owner}/{name}", rest)
        return self._send_json({"error": f"unknown: {path}"}, 404)

    def _find(self, kind: str, name: str) -> Repo | None:
        """Find a repository that the client may see; send the refusal otherwise."""
        if name in self.hub.refusals:
            status, code = self.hub.refusals[name]
            self._send_json({}, status, {"X-Error-Code": code})
            return None
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._is_signed_in()):
            self._send_json({}, 404 if self._is_signed_in() else 401, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _is_signed_in(self) -> bool:
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()  # from the URL of the endpoint
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Basic {basic}")

    def _serve_api(self, kind: str, name: str, rest: list[str]) -> None:
        if (repo := self._find(kind, name)) is None:
            return
        action, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if action in ("preupload", "commit", "auth-check"):
            if not self._is_signed_in():
                return self._send_json({"error": "Invalid username or password."}, 401)
            if name in self.hub.read_only:
                return self._send_json({"error": "You have read access but not write access"}, 403)
            if action == "auth-check":
                return self._send_json({})
        if (sha := repo.resolve(revision)) is None:
            return self._send_json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[sha]
        match action:
            case "revision":
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "sha": sha, "siblings": siblings, "private": repo.private, "tags": []}
                info |= {} if self.hub.last_modified is None else {"lastModified": self.hub.last_modified}
                self._send_json({**info, "downloads": 0, "likes": 0})
                return None if revision == sha else self.hub.after_lookup()
            case "tree":
                return self._send_tree(files, "/".join(rest[2:]))
            case "paths-info":
                asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())
                paths = asked if isinstance(asked, list) else asked.get("paths", [])
                return self._send_json([_describe(path, files[path]) for path in paths if path in files])
            case "preupload":
                asked = json.loads(self.body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": _describe(file["path"], files[file["path"]])["oid"] if file["path"] in files else None,
                    }
                    for file in asked
                ]
                return self._send_json({"files": modes})
            case "commit":
                return self._commit(repo)
        return self._send_json({"error": action}, 404)

    def _send_tree(self, files: dict[str, bytes], below: str) -> None:
        prefix = f"{below}/" if below else ""
        found = {path: body for path, body in files.items() if path.startswith(prefix)}
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return self._send_json([_describe(path, body) for path, body in found.items()])
        entries = {}
        for path, body in found.items():
            first, _, deeper = path.removeprefix(prefix).partition("/")
            entries[first] = (
                {"type": "directory", "path": f"{prefix}{first}", "oid": "0" * 40, "size": 0}
                if deeper
                else _describe(path, body)
            )
        self._send_json(list(entries.values()))

    def _serve_file(self, parts: list[str]) -> None:
        kind = "model"
        if parts[0] == "datasets":
            kind, parts = "dataset", parts[1:]
        name, rest = "/".join(parts[:2]), parts[2:]
        if name.endswith(".git"):
            return self._answer_lfs_batch()
        if (repo := self._find(kind, name)) is None:
            return
        if len(rest) < 3 or rest[0] != "resolve" or (sha := repo.resolve(rest[1])) is None:
            return self._send_json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        path = "/".join(rest[2:])
        if path not in repo.commits[sha]:
            return self._send_json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        body = repo.commits[sha][path]
        headers = {"ETag": f'"{_describe(path, body)["oid"]}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        status = 200
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(body), len(body))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
            body, status = body[int(first) : end], 206
        if path.rpartition("/")[2] in self.hub.damaged:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(body, status, headers, self.hub.break_after.get(path.rpartition("/")[2]))

    def _validate_card(self) -> None:
        """Refuse what the Hub refuses in a model card: a base_model that isn't a name on the Hub."""
        content = json.loads(self.body)["content"]
        lines = content.split("---")[1].splitlines() if content.startswith("---") else []
        base = next((line.partition(":")[2].strip() for line in lines if line.startswith("base_model:")), "a/b")
        if base.count("/") != 1 or base.startswith(("/", ".")):
            error = {"message": f'"base_model" with value "{base}" is not valid. Use a model id from hf.co/models.'}
            return self._send_json({"errors": [error], "warnings": []}, 400)
        return self._send_json({"errors": [], "warnings": []})

    def _create(self) -> None:
        if not self._is_signed_in():
            return self._send_json({"error": "Invalid username or password."}, 401)
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.hub.refusals:
            status, code = self.hub.refusals[name]
            return self._send_json({"error": "refused"}, status, {"X-Error-Code": code})
        kind = asked.get("type") or "model"
        if (kind, name) in self.hub.repos:
            return self._send_json(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
            )
        self.hub.add(
            kind,
            name,
            {".gitattributes": b""},
            private=asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return self._send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def _answer_lfs_batch(self) -> None:
        if not self._is_signed_in():
            return self._send_json({"error": "no"}, 401)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.blobs else upload)})
        self._send_json({"transfer": "basic", "objects": objects})

    def _receive_blob(self, oid: str) -> None:
        self.hub.before_upload()
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(b"", 200, {})

    def _commit(self, repo: Repo) -> None:
        if not self.hub.allows_commit():
            self.close_connection = True
            return
        files = dict(repo.files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"], None)
        sha = repo.commit(files)
        self._send_json({"commitUrl": f"{self.hub.url}/{repo.name}/commit/{sha}", "commitOid": sha})

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int, headers: dict[str, str], break_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:break_after])
        if break_after is not None and break_after < len(body):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def use_in_this_process(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub use the server. Setting variables is too late: it read them when it was imported."""
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(hub.home / "hub"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


def _describe(path: str, body: bytes) -> dict[str, Any]:
    """Describe a file as the tree does: with the hash of its blob, and for LFS with the hash of its content."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body)}
    if path.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(body).hexdigest()
        return {**entry, "oid": sha256, "lfs": {"oid": sha256, "size": len(body), "pointerSize": 130}}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}


@contextmanager
def serve_hub(home: Path) -> Iterator[Hub]:
    """Serve an empty Hub; `home` becomes the clients' HF_HOME, which contains their cache."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", home)  # type: ignore[attr-defined]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.has_ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
