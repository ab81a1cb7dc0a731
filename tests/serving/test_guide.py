"""docs/serving.md and operations.md: their commands work as typed, and the server has everything that they list."""

import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from t5tune.commands.serve import Server
from t5tune.commands.serve.load_models import OF_REPLIES
from t5tune.serving.metrics import Metrics
from t5tune.serving.protocol import IGNORED_FIELDS
from t5tune.settings import ServeSettings, load_settings
from tests.serving.conftest import StartServer
from tests.support.label_runs import train_labels
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import parse_words

pytestmark = pytest.mark.slow

TEXT = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
TEMPORARY_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@pytest.fixture(scope="module")
def server(start: StartServer) -> Server:
    return start({"base": "pocket", "tuned": "pocket"}, engine="transformers")


def find_blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_curl(server: Server, path: str) -> Any:
    """Run the page's command that asks a path, and return the answer."""
    if shutil.which("curl") is None:
        pytest.skip("curl isn't installed")
    (block,) = (block for block in find_blocks("sh") if block.startswith(f"curl {ADDRESS}{path} "))
    words = shlex.split(block.replace("\\\n", " ").replace(ADDRESS, server.url))
    done = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_curl_gets_a_reply(server: Server) -> None:
    assert run_curl(server, "/v1/chat/completions")["choices"][0]["message"]["content"]


def test_curl_gets_labels_with_the_listed_keys(untied_base: Path, start: StartServer, tmp_path: Path) -> None:
    server = start({"films": str(train_labels(untied_base, tmp_path, "classify")), "base": "pocket"})
    items = run_curl(server, "/v1/classify")["data"]
    assert len(items) == 2
    listed = re.findall(r"^\| `(\w+)` \|", TEXT.partition("### Labels")[2].partition("### Errors")[0], re.MULTILINE)
    assert set(listed) - {"labels", "value", "tokens"} == items[0].keys()


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
    section = TEXT[: TEXT.index("## Other tools")] + OPERATIONS
    flags = set(re.findall(r"`(--[a-z0-9-]+)", section))
    known = {ServeSettings.format_option(name) for name in ServeSettings.model_fields} | {"--no-q-lora"}
    # the last ones are of merge, docker run and systemctl
    assert flags <= known | {"--json", "--quiet", "--config", "--dtype", "--rm", "--now"}


def test_systemd_units_and_compose_files_start_a_server() -> None:
    unit, template = find_blocks("ini", OPERATIONS)
    (compose,) = (yaml.safe_load(block) for block in find_blocks("yaml", OPERATIONS))
    (service,) = compose["services"].values()
    starts = [re.findall(r"^ExecStart=\S+/t5tune serve (.*)$", text, re.MULTILINE)[0] for text in (unit, template)]
    for start in (*starts, service["command"].removeprefix("serve ")):
        assert parse_words(shlex.split(start), ServeSettings).problems == []
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert int(service["stop_grace_period"].rstrip("s")) > ServeSettings(models="pocket").shutdown_timeout
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


def test_the_pages_list_the_settings_that_need_a_restart() -> None:
    (listed,) = re.findall(r"^- (`host`, .*?) change only at a restart", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", listed)) == ServeSettings.needs_restart
    (cheap,) = re.findall(r"(`max_new_tokens`, [^.]*?)\s+and the models' names\s+change without", OPERATIONS)
    assert {*re.findall(r"`(\w+)`", cheap), "models"} == OF_REPLIES


def test_nginx_passes_whole_and_streamed_replies_on(start: StartServer, tmp_path: Path) -> None:
    nginx, openssl = shutil.which("nginx"), shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("nginx or openssl isn't installed")
    server = start({"tuned": "pocket"}, engine="transformers", api_key="s3cret")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    key, certificate = tmp_path / "models.key", tmp_path / "models.pem"
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=models.example.com"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    (block,) = find_blocks("nginx", OPERATIONS)
    block = block.replace("/etc/ssl", str(tmp_path)).replace("443", str(port)).replace(ADDRESS[7:], server.url[7:])
    own = f"pid {tmp_path}/pid; error_log {tmp_path}/log; daemon off; events {{}}"
    paths = "".join(f"{name}_temp_path {tmp_path}/{name};" for name in TEMPORARY_FOLDERS)
    (tmp_path / "nginx.conf").write_text(f"{own} http {{ access_log off; {paths} {block} }}")
    body = {"model": "tuned", "messages": [{"role": "user", "content": "Hello"}]}
    ask = ["curl", "--silent", "--insecure", "--retry", "9", "--retry-connrefused", "--retry-delay", "1"]
    ask += ["--resolve", f"models.example.com:{port}:127.0.0.1", "-H", "Authorization: Bearer s3cret"]
    ask += ["-H", "Content-Type: application/json", f"https://models.example.com:{port}/v1/chat/completions", "-d"]
    with subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf"]) as process:
        try:
            whole, streamed = (
                subprocess.run(
                    [*ask, json.dumps(body | {"stream": stream})], capture_output=True, text=True, check=True
                )
                for stream in (False, True)
            )
        finally:
            process.terminate()
    text = json.loads(whole.stdout)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in streamed.stdout.splitlines() if line.startswith("data: {")]
    assert text == "".join(event["choices"][0]["delta"].get("content", "") for event in events) != ""
