"""docs/serving.md: its commands work as typed, and the server has everything that it lists."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from t5tune.commands.serve import Server
from t5tune.serving.metrics import Metrics
from t5tune.serving.protocol import IGNORED_FIELDS
from t5tune.settings import ServeSettings, load_settings
from tests.serving.conftest import StartServer
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import parse_words

pytestmark = pytest.mark.slow

TEXT = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(start: StartServer) -> Server:
    return start({"base": "pocket", "tuned": "pocket"}, engine="transformers")


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_curl_gets_a_reply(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl isn't installed")
    (block,) = (block for block in find_blocks("sh") if block.startswith("curl"))
    words = shlex.split(block.replace("\\\n", " ").replace(ADDRESS, server.url))
    done = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_openai_client_prints_a_reply_twice(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in find_blocks("python") if "openai" in block)
    exec(compile(code.replace(ADDRESS, server.url), "serving.md", "exec"), {})
    whole, pieces = capsys.readouterr().out.split("\n", 1)
    assert whole == pieces != ""


def test_a_server_starts_in_python(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in find_blocks("python") if "ServeSettings" in block)
    exec(compile(code.replace('"run"', '"pocket"').replace("port=0", "port=0, engine='transformers'"), "-", "exec"), {})
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


def test_the_settings_and_flags_of_the_page_exist(tmp_path: Path) -> None:
    (config,) = find_blocks("yaml")[:1]
    (tmp_path / "serve.yaml").write_text(config)
    settings, notes = load_settings(ServeSettings, str(tmp_path / "serve.yaml"))
    assert notes == []
    assert settings.named_models == {"base": "google/flan-t5-base", "tuned": "run"}
    assert yaml.safe_load(config).keys() == settings.model_fields_set
    (unit,) = find_blocks("ini")
    (start,) = re.findall(r"^ExecStart=\S+/t5tune serve (.*)$", unit, re.MULTILINE)
    assert parse_words(shlex.split(start), ServeSettings).problems == []
    section = TEXT[: TEXT.index("## Other tools")]
    flags = set(re.findall(r"`(--[a-z0-9-]+)", section))
    known = {ServeSettings.format_option(name) for name in ServeSettings.model_fields} | {"--no-q-lora"}
    assert flags <= known | {"--json", "--quiet", "--config", "--dtype"}  # the last one of merge
    timeout = int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0])
    assert timeout > ServeSettings(models="pocket").shutdown_timeout
    # the user of the service may create folders only in the one that systemd makes
    (made,), (cache,) = (
        re.findall(rf"^{name}=(.*)$", unit, re.M) for name in ("CacheDirectory", r"\w+=XDG_CACHE_HOME")
    )
    assert cache == f"/var/cache/{made}"


def test_the_page_lists_fields_and_metrics_of_the_server() -> None:
    (ignored,) = re.findall(r"^(`user`, .*?) are accepted and ignored", TEXT, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", ignored)) == IGNORED_FIELDS
    rendered = Metrics().render().decode()
    exposed = set(re.findall(r"^# TYPE (t5tune_\w+) (?:counter|histogram|gauge)$", rendered, re.MULTILINE))
    exposed = {name for name in exposed if not name.endswith("_created")}
    listed = set(re.findall(r"`(t5tune_\w+)`", TEXT))
    assert {name.removesuffix("_total") for name in listed} == {name.removesuffix("_total") for name in exposed}
