"""What a server keeps in memory after its models have changed: nothing of the old models."""

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t5tune.commands.serve import serve
from t5tune.serving.generation import DecodingOptions, Generation
from t5tune.settings import ServeSettings
from tests.serving.adapter_folders import replace
from tests.serving.raw_http import PATIENCE, make_chat, send

pytestmark = pytest.mark.slow

RELOAD = "/v1/models/reload"
KEY = {"authorization": "Bearer s3cret"}


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
@pytest.mark.variants("transformers")
def test_reloads_keep_nothing_of_the_old_models(
    engine: str,
    adapters: list[Path],
    settings: Callable[..., ServeSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after constrained replies, and texts that ask the tokenizer whether a space is a token."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    pytest.importorskip("llguidance")
    tuned = tmp_path / "tuned"
    replace(tuned, adapters[0])
    old: list[weakref.ref[Any]] = []
    served_at_return: list[int] = []

    def return_freed_heap() -> None:
        served_at_return.append(id(server._service.models["tuned"]))

    monkeypatch.setattr("t5tune.commands.serve.return_freed_heap", return_freed_heap)

    def ask_and_note() -> None:
        for changes in ({}, {"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"regex": "[ab]"}}):
            assert send(server.url, body=make_chat("Two \u0301teas", "tuned", **changes), **KEY)[0] == 200
        model: Any = server._service.models["tuned"]
        encoder = model.prompts.encoder
        encoder.adds_token(" \u0301")
        old.extend(map(weakref.ref, (model, model.engine, model.compiler, model.prompts.tokenizer, encoder)))
        old.extend(map(weakref.ref, (encoder.markers, model.compiler._encoder, model.compiler._encoder.markers)))

    gc.disable()  # the command line keeps Python from looking for cycles
    try:
        with serve(settings({"tuned": tuned}, engine=engine, api_key="s3cret")) as server:
            for adapter in adapters[1:]:
                ask_and_note()
                replace(tuned, adapter)
                assert send(server.url, RELOAD, **KEY)[1]["loaded"] == ["tuned"]
                assert served_at_return[-1:] == [id(server._service.models["tuned"])]  # after the old model was dropped
            until = time.monotonic() + PATIENCE
            while kept := [type(each()).__name__ for each in old if each() is not None]:
                assert time.monotonic() < until, kept
    finally:
        gc.enable()


def test_ctranslate2_keeps_no_reference_to_an_engine_that_has_generated(
    untied_base: Path, settings: Callable[..., ServeSettings]
) -> None:
    """Its thread, which may drop the callback last, would destroy the translator and so abort the process."""
    pytest.importorskip("ctranslate2")
    kept: list[Any] = []
    with serve(settings({"base": untied_base}, engine="ctranslate2")) as server:
        engine: Any = server._service.models["base"].engine
        engine._translator = SimpleNamespace(translate_batch=lambda *given, callback, **others: kept.append(callback))

        def generate() -> weakref.ref[Generation]:
            generation = Generation(engine, [5, 1], DecodingOptions(max_new_tokens=1), notify=lambda: None)
            engine.generate([generation], lambda row, token: generation.add(token))
            return weakref.ref(generation)

        freed = generate()
    assert freed() is None
    assert len(kept) == 1
