"""Models change while a server runs: no request is lost, and the replies are those of a server that starts afresh."""

import gc
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from t5tune.checkpoints import fingerprint
from t5tune.commands.serve import load_models as loading
from t5tune.commands.serve import serve
from t5tune.errors import CheckpointError, ModelError, T5TuneError
from t5tune.progress import Event, Note
from t5tune.serving import engines
from t5tune.serving.stop_signals import read_signals
from t5tune.settings import ServeSettings
from tests.serving.adapter_folders import replace
from tests.serving.raw_http import (
    CHAT,
    PATIENCE,
    ask,
    connect,
    exchange,
    make_chat,
    make_request,
    read_answer,
    send,
)
from tests.support.processes.runs import LONG
from tests.support.servers.serve_command import start as start_command

pytestmark = pytest.mark.slow

RELOAD = "/v1/models/reload"
KEY = {"authorization": "Bearer s3cret"}
TEXTS = ["Two teas for Mira", "Hello there", "Six coffees"]


@pytest.fixture
def finds_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the times of files that were written a moment ago, as those of a real model weren't."""
    monkeypatch.setattr(fingerprint, "SECONDS_TO_SETTLE", -1e6)


def read_replies(url: str, model: str = "tuned") -> list[str]:
    return [ask(url, make_chat(text, model)) for text in TEXTS]


@pytest.mark.usefixtures("finds_unchanged")
@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
@pytest.mark.variants("transformers")
def test_replies_after_a_reload_are_those_of_a_new_server(
    engine: str, adapters: list[Path], chats: dict[str, Path], settings: Callable[..., ServeSettings], tmp_path: Path
) -> None:
    """Adapters are replaced, renamed, broken and removed, and after a failure the server has all of its models."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    tuned = tmp_path / "tuned"
    expected = []
    for adapter in adapters:
        with serve(settings({"tuned": adapter}, engine=engine)) as fresh:
            expected.append(read_replies(fresh.url))
    assert expected[0] != expected[1] != expected[2] != expected[0]
    replace(tuned, adapters[0])
    both = settings({"base": chats["base"], "tuned": tuned}, engine=engine)
    with serve(both) as server:
        base = read_replies(server.url, "base")
        assert read_replies(server.url) == expected[0]
        replace(tuned, adapters[1])
        reloaded = server.reload(both)
        assert (reloaded.loaded, reloaded.unchanged, reloaded.removed) == (["tuned"], ["base"], [])
        assert read_replies(server.url) == expected[1]
        replace(tuned, adapters[2])
        (tuned / "adapter_model.safetensors").write_bytes(b"broken")
        with pytest.raises(CheckpointError, match="adapter_model.safetensors: not a safetensors file"):
            server.reload()
        assert read_replies(server.url) == expected[1]
        shutil.rmtree(tuned)
        with pytest.raises(ModelError, match="tuned: no such folder"):
            server.reload()
        assert read_replies(server.url) == expected[1]
        replace(tuned, adapters[2])
        reloaded = server.reload(settings({"tuned": tuned, "renamed": chats["base"]}, engine=engine))
        assert (reloaded.loaded, reloaded.unchanged, reloaded.removed) == (["tuned"], ["renamed"], ["base"])
        assert read_replies(server.url) == expected[2]
        assert read_replies(server.url, "renamed") == base
        assert send(server.url, body=make_chat(model="base"))[0] == 404


def test_files_that_change_while_they_are_read_are_refused(
    adapters: list[Path], settings: Callable[..., ServeSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the config of one adapter could be served with the weights of the next."""
    tuned = tmp_path / "tuned"
    replace(tuned, adapters[0])
    load = loading.load_for_inference

    def load_and_change(*given: Any, **options: Any) -> Any:
        loaded = load(*given, **options)
        replace(tuned, adapters[2])
        return loaded

    with serve(settings({"tuned": tuned})) as server:
        before = read_replies(server.url)
        replace(tuned, adapters[1])
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_for_inference", load_and_change)
            with pytest.raises(ModelError, match="tuned: its files changed while they were read"):
                server.reload()
        assert read_replies(server.url) == before
        assert server.reload().loaded == ["tuned"]
        assert read_replies(server.url) != before


@pytest.mark.usefixtures("finds_unchanged")
def test_new_defaults_and_templates_keep_the_weights(
    chats: dict[str, Path], settings: Callable[..., ServeSettings]
) -> None:
    models = {"base": chats["base"]}
    with serve(settings(models)) as server:
        engine = server._service.models["base"].engine
        answer = send(server.url, body=make_chat())[1]
        assert answer["usage"]["completion_tokens"] == 8
        reloaded = server.reload(settings(models, max_new_tokens=3, conversation_template="plain", max_queue=7))
        assert (reloaded.loaded, reloaded.unchanged, reloaded.needs_restart) == ([], ["base"], ["max_queue"])
        assert server._service.models["base"].engine is engine
        changed = send(server.url, body=make_chat())[1]
        assert changed["usage"]["completion_tokens"] == 3
        assert changed["usage"]["prompt_tokens"] != answer["usage"]["prompt_tokens"]
        # a different precision needs different weights
        assert server.reload(settings(models, q_lora=True, quant_type="int8")).loaded == ["base"]


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
@pytest.mark.variants("transformers")
def test_the_old_model_finishes_running_replies_and_is_freed(
    engine: str,
    adapters: list[Path],
    settings: Callable[..., ServeSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    kind = engines.TransformersEngine if engine == "transformers" else engines.TranslatorEngine
    tuned = tmp_path / "tuned"
    replace(tuned, adapters[0])
    is_running, may_end = threading.Event(), threading.Event()
    generate = kind.generate

    def generate_slowly(self: Any, generations: Any, on_token: Any) -> None:
        if self is old():
            is_running.set()
            assert may_end.wait(PATIENCE)
        generate(self, generations, on_token)

    with serve(settings({"tuned": tuned}, engine=engine)) as server, ThreadPoolExecutor(1) as pool:
        old = weakref.ref(server._service.models["tuned"].engine)
        weights = weakref.ref(getattr(old(), "_model" if engine == "transformers" else "_translator"))
        expected = ask(server.url, make_chat(TEXTS[0], "tuned"))
        monkeypatch.setattr(kind, "generate", generate_slowly)
        found = pool.submit(ask, server.url, make_chat(TEXTS[0], "tuned"))
        assert is_running.wait(PATIENCE)
        replace(tuned, adapters[1])
        # by counting references: the command line keeps Python from looking for cycles
        gc.disable()
        try:
            server.reload()
            may_end.set()
            assert found.result() == expected
            until = time.monotonic() + PATIENCE
            while old() is not None or weights() is not None:
                assert time.monotonic() < until
        finally:
            gc.enable()
        assert ask(server.url, make_chat(TEXTS[0], "tuned")) != expected


def test_http_reloads_need_a_key_and_exclude_each_other(
    chats: dict[str, Path], settings: Callable[..., ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(settings({"base": chats["base"]})) as server:
        status, answer = send(server.url, RELOAD)
        assert (status, answer["error"]["message"]) == (
            403,
            "reload: a server without an API key reloads only on its own machine; set T5TUNE_API_KEY, or send the "
            "signal SIGUSR1 to the server",
        )
    is_loading, may_end = threading.Event(), threading.Event()
    load_all = loading.ModelLoader.load_all
    notes: list[str] = []

    def load_slowly(self: Any) -> Any:
        is_loading.set()
        assert may_end.wait(PATIENCE)
        return load_all(self)

    def report(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    with serve(settings({"base": chats["base"]}, api_key="s3cret"), report) as server, ThreadPoolExecutor(1) as pool:
        assert send(server.url, RELOAD)[0] == 401
        assert send(server.url, RELOAD, method="GET", **KEY)[0] == 404
        monkeypatch.setattr(loading.ModelLoader, "load_all", load_slowly)
        first = pool.submit(send, server.url, RELOAD, **KEY)
        assert is_loading.wait(PATIENCE)
        status, headers, body = exchange(server.url, RELOAD, **KEY)
        assert (status, headers["retry-after"]) == (409, "5")
        assert json.loads(body)["error"]["message"].startswith("reload: a reload is running")
        assert send(server.url, body=make_chat(), **KEY)[0] == 200
        may_end.set()
        status, answer = first.result()
        assert (status, answer.keys()) == (200, {"loaded", "unchanged", "removed", "needs_restart"})

        def fail(self: Any) -> Any:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(loading.ModelLoader, "load_all", fail)
        status, answer = send(server.url, RELOAD, **KEY)
        assert (status, answer["error"]["code"]) == (500, "OutOfMemory")
        memory = "out of memory: loading models next to the served models; tried to allocate 2.00 GiB"
        problem = f"not reloaded: {memory}; restart the server"
        assert answer["error"]["message"] == problem
        assert f"{problem}; still serving base" in notes


def test_a_server_that_stops_does_not_wait_for_a_reload(
    chats: dict[str, Path], settings: Callable[..., ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loading, may_end = threading.Event(), threading.Event()
    load_all = loading.ModelLoader.load_all

    def load_slowly(self: Any) -> Any:
        is_loading.set()
        assert may_end.wait(PATIENCE)
        return load_all(self)

    with serve(settings({"base": chats["base"]}, api_key="s3cret")) as server, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(loading.ModelLoader, "load_all", load_slowly)
        asked = pool.submit(send, server.url, RELOAD, **KEY)
        assert is_loading.wait(PATIENCE)
        second = pool.submit(server.reload)  # waits for the first
        server.stop()
        assert asked.result()[0] == 503
        assert server.is_reloading()
        may_end.set()
        with pytest.raises(T5TuneError, match="the server has stopped"):
            second.result()


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
@pytest.mark.variants("transformers")
def test_no_request_is_lost_or_mixed_in_reloads_under_load(
    engine: str, adapters: list[Path], settings: Callable[..., ServeSettings], tmp_path: Path
) -> None:
    """Each of 64 clients gets the reply of an adapter that was served between its request and its answer."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    tuned = tmp_path / "tuned"
    replies = []
    for adapter in adapters:
        with serve(settings({"tuned": adapter}, engine=engine)) as fresh:
            replies.append(read_replies(fresh.url))
    replace(tuned, adapters[0])
    is_over = threading.Event()
    wrong: Counter[str] = Counter()
    num_begun = num_ended = 0  # reloads; after reload number n, the adapter n % 3 is served
    lock = threading.Lock()

    def be_client(number: int) -> int:
        done = 0
        with connect(server.url) as connection:
            while not is_over.is_set() or done < 2:
                index = (number + done) % len(TEXTS)
                first = num_ended
                connection.sendall(make_request(CHAT, make_chat(TEXTS[index], "tuned")))
                status, _, body = read_answer(connection)
                found = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else str(status)
                with lock:
                    wrong[found] += found not in {replies[turn % 3][index] for turn in range(first, num_begun + 1)}
                done += 1
        return done

    until = time.monotonic() + (60 if LONG else 0)
    with serve(settings({"tuned": tuned}, engine=engine)) as server, ThreadPoolExecutor(64) as pool:
        clients = [pool.submit(be_client, number) for number in range(64)]
        try:
            while num_ended < 4 or time.monotonic() < until:
                if num_ended % 4 == 2:
                    shutil.rmtree(tuned)
                    with pytest.raises(ModelError):
                        server.reload()
                num_begun += 1
                replace(tuned, adapters[num_begun % 3])
                server.reload()
                num_ended += 1
        finally:
            is_over.set()
        counts = [client.result() for client in clients]
    assert +wrong == Counter()
    assert min(counts) >= 2


def test_a_signal_reloads_the_config(chats: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    values: dict[str, Any] = {"engine": "transformers", "max_new_tokens": 8, "models": {"base": str(chats["base"])}}
    config.write_text(json.dumps(values))
    with start_command(tmp_path, "--config", config) as server:

        def reload(expected: str, **changes: Any) -> None:
            values.update(changes)
            config.write_text(json.dumps(values))
            server.process.send_signal(signal.SIGUSR1)
            server.wait_for(server.log, expected)

        both = {"base": str(chats["base"]), "tuned": str(chats["adapter"])}
        reload("reloaded: tuned loaded; base unchanged; max_queue needs restart\n", models=both, max_queue=7)
        assert read_replies(server.url) != read_replies(server.url, "base")
        nowhere = str(tmp_path / "nowhere")
        reload(f"warning: not reloaded: models: {nowhere}: no such folder", models={"other": nowhere})
        reload("max_new_tokens): must be greater than 0; top_p: ", max_new_tokens=-1, top_p="x")
        config.rename(tmp_path / "gone.yaml")
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for(server.log, f"warning: not reloaded: config: {config}: no")
        assert send(server.url, "/ready", method="GET")[0] == 200
        assert read_replies(server.url) != read_replies(server.url, "base")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


def test_a_reload_signal_before_the_server_runs_is_kept() -> None:
    """Without a handler, SIGUSR1 would end the process while its models are loaded."""
    before = signal.getsignal(signal.SIGUSR1)
    with read_signals() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.wait() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.long
def test_a_running_server_converts_in_a_separate_process(
    untied_base: Path, settings: Callable[..., ServeSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ctranslate2")
    from t5tune.converting import ctranslate2

    notes: list[str] = []
    models = {"base": untied_base}
    with serve(settings(models), lambda event: notes.append(event.text) if isinstance(event, Note) else None) as server:
        expected = read_replies(server.url, "base")
        monkeypatch.setattr(ctranslate2, "convert_and_check", None)  # this process can't
        made = tmp_path / "made"
        assert server.reload(settings(models, engine="ctranslate2", converted_dir=made)).loaded == ["base"]
        assert "base: CTranslate2 gives the same reply for 4 of 4 prompts" in "\n".join(notes)
        assert server._service.models["base"].engine.name == "ctranslate2"
        assert read_replies(server.url, "base") == expected
