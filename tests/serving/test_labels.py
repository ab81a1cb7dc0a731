"""POST /v1/classify: the labels that evaluate predicts, in vLLM's form, for many clients, and what is refused."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.export import export
from t5tune.commands.serve import Server
from t5tune.errors import SettingsError
from t5tune.settings import ExportSettings
from tests.serving.conftest import StartServer
from tests.serving.raw_http import make_chat, read_metrics, send
from tests.serving.test_misuse import Log
from tests.serving.test_replies import connect
from tests.support.label_runs import KINDS, ORDERS, THINGS, predict, train_labels

pytestmark = pytest.mark.slow

CLASSIFY = "/v1/classify"
CLIENTS = 64
DEFAULT = 512  # a server without models that write text refuses other values


@pytest.fixture(scope="module")
def runs(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: train_labels(untied_base, tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def server(runs: dict[str, Path], start: StartServer) -> Server:
    return start({**{kind: str(run) for kind, run in runs.items()}, "pocket": "pocket"}, model_max_length=99)


def classify(server: Server, model: str, given: Any, path: str = CLASSIFY, **fields: Any) -> Any:
    body = json.dumps({"model": model, "input": given, **fields}).encode()
    status, answer = send(server.url, path, body)
    assert status == 200, answer
    return answer


def refuse(server: Server, body: dict[str, Any], path: str = CLASSIFY) -> tuple[int, str]:
    status, answer = send(server.url, path, json.dumps(body).encode())
    return status, answer["error"]["message"]


def read_batches(server: Server) -> tuple[float, ...]:
    """Read how many replies and batches the server has computed."""
    text = read_metrics(server.url)
    return tuple(float(re.findall(rf"^t5tune_batch_replies_{name} (\S+)$", text, re.M)[0]) for name in ("sum", "count"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_labels_are_those_that_evaluate_predicts(
    kind: str, server: Server, runs: dict[str, Path], tmp_path: Path
) -> None:
    predicted = predict(runs[kind], tmp_path / "scores")
    answer = classify(server, kind, [record[KINDS[kind].column] for record in KINDS[kind].records])
    assert answer["object"] == "list"
    assert answer["model"] == kind
    assert answer["id"].startswith("classify-")
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(predicted)
    assert [item["index"] for item in answer["data"]] == [*range(len(predicted))]
    for item, line in zip(answer["data"], predicted, strict=True):
        found, probabilities = line["prediction"], line.get("probabilities")
        if kind == "regress":
            wanted: dict[str, Any] = {"value": pytest.approx(found, rel=1e-4)}
        elif kind == "classify":
            wanted = {"label": found}
        elif kind == "several":
            wanted = {"label": max(probabilities, key=probabilities.get), "labels": found}
        else:
            wanted = {"tokens": item["tokens"]}
            name = "value" if kind == "numbers" else "label"
            values = [word[name] for word in item["tokens"]]
            assert values == (pytest.approx(found, rel=1e-4) if kind == "numbers" else found)
            assert [word.get("score") for word in item["tokens"]] == pytest.approx(probabilities or [None] * len(found))
        rest = {"index": item["index"], "label": None, "probs": [], "num_classes": 0}
        if kind in ("classify", "several"):
            wanted |= {"probs": pytest.approx([*probabilities.values()], abs=1e-4)}
        rest["num_classes"] = {"classify": 3, "several": 6, "tag": 2, "residues": 3}.get(kind, 0)
        assert item == rest | wanted


def test_words_have_their_places_in_the_text(server: Server) -> None:
    text = " Hello ,\n\n tea for  Ada"
    (item,) = classify(server, "tag", text)["data"]
    assert [text[word["start"] : word["end"]] for word in item["tokens"]] == text.split()
    assert [word["word"] for word in item["tokens"]] == text.split()
    (given,) = classify(server, "tag", [text.split()])["data"]
    assert [word["label"] for word in given["tokens"]] == [word["label"] for word in item["tokens"]]


def test_both_paths_answer_and_models_list_labels(server: Server) -> None:
    one, two = (classify(server, "classify", ORDERS[0], path)["data"] for path in (CLASSIFY, "/classify"))
    assert one == two
    # fields of vLLM's clients that ask for nothing
    assert (
        classify(server, "classify", ORDERS[0], use_activation=True, add_special_tokens=True, user="me")["data"] == one
    )
    with connect(server) as client:
        models = {model.id: model.model_dump() for model in client.models.list()}
        found: Any = client.post("/classify", body={"model": "classify", "input": ORDERS[0]}, cast_to=object)
    assert found["data"] == one
    assert models["classify"]["objective"] == "classify"
    assert models["classify"]["labels"] == sorted(THINGS)
    assert models["regress"]["labels"] == []
    assert "objective" not in models["pocket"]


def test_many_clients_get_their_labels_in_batches(server: Server) -> None:
    """A model next to them writes text."""
    alone = {kind: [classify(server, kind, text)["data"][0] for text in ORDERS] for kind in ("classify", "tag")}
    before = read_batches(server)

    def be_client(number: int) -> None:
        kind, index = ("classify", "tag")[number % 2], number % len(ORDERS)
        for _ in range(3):
            (item,) = classify(server, kind, ORDERS[index])["data"]
            wanted = alone[kind][index]
            assert item["label"] == wanted["label"]
            assert item["probs"] == pytest.approx(wanted["probs"], abs=1e-5)
            if kind == "tag":
                assert [word["label"] for word in item["tokens"]] == [word["label"] for word in wanted["tokens"]]

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        text = pool.submit(send, server.url, body=make_chat(model="pocket", max_tokens=99))
        list(pool.map(be_client, range(CLIENTS)))
        assert text.result()[0] == 200
    num_replies, num_batches = (after - earlier for after, earlier in zip(read_batches(server), before, strict=True))
    assert num_replies == 3 * CLIENTS + 1
    assert num_batches < num_replies / 2


def test_adapters_with_the_same_labels_share_their_base(
    runs: dict[str, Path], start: StartServer, tmp_path: Path
) -> None:
    export(ExportSettings(checkpoint=runs["tag"], output_dir=tmp_path / "adapter"))
    names = {"run": str(runs["tag"]), "adapter": str(tmp_path / "adapter"), "other": str(runs["classify"])}
    server = start(names, max_new_tokens=DEFAULT)
    assert server.address.models == dict.fromkeys(names, "transformers")
    models = [server._service.models[name].engine._model.get_base_model() for name in names]  # type: ignore[attr-defined]
    first, second, third = (model.transformer.shared.weight.data_ptr() for model in models)
    assert first == second != third
    found = [classify(server, name, ORDERS)["data"] for name in ("run", "adapter")]
    assert found[0] == found[1]
    server.reload()
    assert classify(server, "run", ORDERS)["data"] == found[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "input: missing"),
        ({"input": []}, "input: expected a text, a list of texts, or a list of lists of words"),
        ({"input": [[]]}, "input: expected a text"),
        ({"input": [1, 2]}, "input: expected a text"),
        ({"input": [["a", 1]]}, "input: expected a text"),
        ({"input": "  "}, "input: text: nothing to read"),
        ({"input": ["a", "b\0"]}, "input[1]: text: contains a NUL character (U+0000); remove the character"),
        ({"input": ["a", "\u200b"]}, "input[1]: text: nothing to read"),
        ({"input": "word " * 100}, "input: too long: it has "),
        ({"input": ["a", "word " * 10_000]}, "input[1]: too long: 50,000 bytes; model_max_length is 99 tokens"),
        ({"input": ["a"] * 129}, "input: 129 texts: this server labels at most 128 in one request"),
        ({"input": "a", "messages": []}, "messages: unknown field"),
        ({"input": "a", "use_activation": False}, "use_activation: false: not supported"),
        ({"input": "a", "model": "pocket"}, "model: pocket writes text: use /v1/chat/completions, or /v1/score"),
    ],
)
def test_a_wrong_request_is_refused(given: dict[str, Any], message: str, server: Server) -> None:
    status, found = refuse(server, {"model": "classify", **given})
    assert status == 400
    assert found.startswith(message), found


def test_routes_of_replies_refuse_models_with_labels(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = {"classify": "classifies", "regress": "predicts numbers", "tag": "labels words"}
    for name, verb in expected.items():
        found = {
            refuse(server, {"model": name, "messages": messages}, "/v1/chat/completions"),
            refuse(server, {"model": name, "prompt": "Hi"}, "/v1/completions"),
            refuse(server, {"model": name, "prompt": "Hi", "targets": ["a"]}, "/v1/score"),
        }
        assert found == {(400, f"model: {name} {verb}: use /v1/classify")}


def test_the_log_has_the_tokens_but_not_the_text(runs: dict[str, Path], start: StartServer) -> None:
    log = Log()
    server = start({"tag": str(runs["tag"])}, log, max_new_tokens=DEFAULT)
    usage = classify(server, "tag", ORDERS)["usage"]
    refuse(server, {"model": "tag", "input": "Ada " * 3000})
    answered, refused = log.wait_for(2)
    assert (answered.model, answered.path, answered.prompt_tokens) == ("tag", CLASSIFY, usage["prompt_tokens"])
    assert answered.queue_seconds is not None
    assert (refused.status, refused.model) == (400, "tag")
    assert not re.search("Ada|Otto", f"{answered} {refused}")


def test_a_full_queue_and_a_wrong_key_are_refused(runs: dict[str, Path], start: StartServer) -> None:
    server = start({"tag": str(runs["tag"])}, api_key="s3cret", max_queue=4, max_new_tokens=DEFAULT)
    body = json.dumps({"model": "tag", "input": ORDERS[:5]}).encode()
    key = {"authorization": "Bearer s3cret"}
    for path in (CLASSIFY, "/classify"):
        assert send(server.url, path, body)[0] == 401
    status, answer = send(server.url, CLASSIFY, body, **key)
    assert (status, answer["error"]["message"]) == (400, "input: 5 texts: this server labels at most 4 in one request")
    server._service.batcher.schedule._max_waiting = 2
    status, answer = send(server.url, CLASSIFY, json.dumps({"model": "tag", "input": ORDERS[:3]}).encode(), **key)
    assert (status, answer["error"]["code"]) == (429, "queue_full")


def test_settings_without_effect_are_refused(runs: dict[str, Path], start: StartServer) -> None:
    models = {"one": str(runs["tag"]), "two": str(runs["classify"])}
    with pytest.raises(SettingsError, match="^engine: ctranslate2: one: it predicts labels; leave out --engine"):
        start(models, engine="ctranslate2")
    with pytest.raises(SettingsError, match="^temperature: 0.5: no served model writes text; leave it out"):
        start(models, max_new_tokens=DEFAULT, temperature=0.5)
    mixed = start({**models, "text": "pocket"}, temperature=0.5, regex="[a-z]+", max_new_tokens=60)
    assert classify(mixed, "one", ORDERS[0])["data"]
