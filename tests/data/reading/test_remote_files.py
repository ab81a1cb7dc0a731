"""Data at a URL, over HTTP and in other file systems."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from t5tune.data.reading.remote_files import hide_query
from t5tune.data.reading.sources import bring_data
from t5tune.hub.datasets import DatasetChoice
from t5tune.io.reasons import hide_queries
from tests.data.reading.remote_data import expect, prepare, read_sources, to_jsonl
from tests.support.caches import open_only
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.servers.web import serve_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of a folder, which refuses some names: its address, and the folder."""
    folder = tmp_path / "web"
    folder.mkdir()
    with serve_folder(folder, {"refused.jsonl": 403, "busy.jsonl": 503}, {"cut.jsonl"}) as url:
        yield url, folder


def test_a_url_is_read_and_its_secret_isn_t_recorded(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress(to_jsonl(1, 2)))
    name = f"{url}/chats.jsonl.gz?signature=SeCrEt"
    environment = {"HF_HOME": str(tmp_path / "home")}
    done = prepare(None, name, tmp_path / "cache", **environment)
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "cache") == expect(1, 2)
    assert open_only(tmp_path / "cache").manifest["sources"] == [f"{url}/chats.jsonl.gz"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"SeCrEt" in path.read_bytes()]
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress(to_jsonl(3, 4, 5)))
    assert prepare(None, name, tmp_path / "cache", **environment).code == 0
    assert read_sources(tmp_path / "cache") == expect(3, 4, 5)
    (folder / "chats.jsonl.gz").unlink()
    gone = prepare(None, name, tmp_path / "again", **environment)
    assert gone.code == 2, gone.stderr


@pytest.mark.parametrize("weight", ["", ":2"])  # with a weight, each dataset has its own settings
def test_only_the_run_s_settings_contain_a_url_s_secret(
    weight: str, web: tuple[str, Path], untied_base: Path, tmp_path: Path
) -> None:
    url, folder = web
    (folder / "chats.jsonl").write_bytes(to_jsonl(*range(8)))
    data = f"{url.replace('://', '://me:SeCrEt@')}/chats.jsonl?signature=SeCrEt{weight}"
    run, out = tmp_path / "run", tmp_path / "out"
    environment = {"HF_HOME": str(tmp_path / "home")}
    flags = ("--max-steps", 1, "--use-cpu", "--report-samples", 0, "--model-name-or-path", untied_base)
    done = t5tune_in_fork(
        *("train", *flags, "--data-path", data, "--eval-data-path", data, "--output-dir", run), env=environment
    )
    assert done.code == 0, done.stderr
    evaluated = t5tune_in_fork(
        *("evaluate", run, "--data-path", data, "--output-dir", out, "--use-cpu"), env=environment
    )
    assert evaluated.code == 0, evaluated.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and b"SeCrEt" in path.read_bytes()]
    assert files == [run / "settings.yaml"]
    lines = (done.stderr + evaluated.stderr).splitlines()
    assert not [line for line in lines if line.startswith("dataset") and "SeCrEt" in line]
    assert f"--data-path {url}/chats.jsonl{weight} " in (run / "report.html").read_text()
    assert f"- {url}/chats.jsonl\n" in (out / "settings.yaml").read_text()


def test_a_copied_file_is_read_without_its_server(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "chats.jsonl").write_bytes(to_jsonl(1, 2))
    environment = {"HF_HOME": str(tmp_path / "home")}
    with serve_folder(tmp_path / "web") as url:
        assert prepare(None, f"{url}/chats.jsonl", tmp_path / "cache", **environment).code == 0
    again = prepare(None, f"{url}/chats.jsonl", tmp_path / "again", **environment)
    assert again.code == 0, again.stderr
    assert "can't be reached; using the earlier copy" in again.stderr
    assert read_sources(tmp_path / "again") == expect(1, 2)
    other = prepare(None, f"{url}/more.jsonl", tmp_path / "other", **environment)
    assert other.code == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("http://127.0.0.1:9/chats.jsonl", ["data_path: http://127.0.0.1:9/chats.jsonl", "can't be read", "try again"]),
        ("{url}/none.jsonl?key=SeCrEt", ["{url}/none.jsonl: no such file", "check the spelling"]),
        ("{url}/refused.jsonl?SeCrEt", ["refused.jsonl: the server denied access (status 403)", "URL's signature"]),
        ("{url}/busy.jsonl?SeCrEt", ["{url}/busy.jsonl: can't be read: 503", "try again later"]),
        ("{url}/cut.jsonl", ["{url}/cut.jsonl: can't be read: ", "try again"]),
        ("{url}/notes.txt", ["{url}/notes.txt", "no JSON, JSONL, CSV or Parquet file"]),
        ("foo://x/y.jsonl", ["data_path: foo://x/y.jsonl", "https://"]),
        ("https://[bad/x.jsonl?key=SeCrEt", ["data_path: https://[bad/x.jsonl"]),
        ("foo://me:SeCrEt@x/y.jsonl?SeCrEt", ["data_path: foo://x/y.jsonl", "https://"]),
        ("s3://bucket/x.jsonl", ["data_path: s3://bucket/x.jsonl: the package for ", "pip install 't5tune[remote]'"]),
        ("sftp://host/x.jsonl", ["data_path: sftp://host/x.jsonl", "paramiko", "install the package that it names"]),
    ],
)
def test_an_unreadable_url_is_refused_in_one_line(
    name: str, expected: list[str], web: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = web
    for file in ("notes.txt", "cut.jsonl"):
        (folder / file).write_text("x" * 100)
    done = prepare(None, name.format(url=url), tmp_path / "cache", HF_HOME=str(tmp_path / "home"))
    assert done.code in (1, 2), done.stderr
    (error,) = done.errors
    assert [text for text in expected if text.format(url=url) not in error] == []
    assert "SeCrEt" not in done.stderr
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_named(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    (folder / "chats.jsonl").write_bytes(to_jsonl(1))
    (tmp_path / "home").write_text("a file")
    done = prepare(None, f"{url}/chats.jsonl", tmp_path / "cache", HF_HOME=str(tmp_path / "home"))
    assert done.code == 2, done.stderr
    assert f"chats.jsonl: {tmp_path / 'home'}" in done.errors[0]
    assert "can't be written: Not a directory; use --cache-dir" in done.errors[0]


def test_a_proxy_of_the_environment_is_used(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    # a request to a proxy contains the whole URL
    (folder / "http:" / "far.example").mkdir(parents=True)
    (folder / "http:" / "far.example" / "chats.jsonl").write_bytes(to_jsonl(1))
    name = "http://far.example/chats.jsonl"
    done = prepare(None, name, tmp_path / "cache", HF_HOME=str(tmp_path / "home"), HTTP_PROXY=url, NO_PROXY="")
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "cache") == expect(1)


def test_folders_and_patterns_of_other_file_systems_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.txt", "deeper/d.jsonl")):
        memory.pipe(f"/t5tune-test/{name}", to_jsonl(number))
    try:
        found = {
            name: bring_data([f"memory://t5tune-test{name}"], DatasetChoice(), "data_path", tmp_path)
            for name in ("", "/*.jsonl", "/b.jsonl")
        }
    finally:
        memory.rm("/t5tune-test", recursive=True)
    contents = [[Path(path).read_bytes() for path in paths] for paths in found.values()]
    assert contents == [[to_jsonl(0), to_jsonl(1)], [to_jsonl(0), to_jsonl(1)], [to_jsonl(1)]]


def test_secrets_of_a_url_are_hidden() -> None:
    assert hide_query("https://me:pw@host:80/a/b.jsonl?token=x#y") == "https://host:80/a/b.jsonl"
    assert hide_query("https://me:pw@[host/a.jsonl?x") == "https://[host/a.jsonl"
    for name in ("s3://bucket/key.jsonl", "a/b?.jsonl", "hf://datasets/a/b/c?.jsonl"):  # patterns
        assert hide_query(name) == name
        assert hide_queries(name) == name
    text = "can't open URL('https://me:pw@host/a.jsonl?SeCrEt'), after /b?key=x"
    assert hide_queries(text) == "can't open URL('https://host/a.jsonl?…'), after /b?…"
