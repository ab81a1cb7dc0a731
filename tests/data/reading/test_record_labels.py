"""Labels and weights: records that are labeled bad and turns of weight 0 are left out and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.rejections import REJECTION_REASONS, Rejection
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import DataError
from t5tune.progress import Event, Note
from tests.data.reading.records import FORMATS, HI, YES, prepare_records, read, read_one, write_lines
from tests.support.caches import find_cache, open_only
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import t5tune_in_fork

GOOD = {"prompt": "Hi", "completion": "Yes", "label": True}
BAD = {"prompt": "Hi", "completion": "Go away", "label": False}


def outcomes(path: Path, **reading: Any) -> list[str | dict[str, int]]:
    """Return the outcome of each record: the reason why it is rejected, or its repairs."""
    records = read(path, **reading)
    return [record.reason if isinstance(record, Rejection) else dict(record.repairs) for record in records]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def prepared(tmp_path: Path, events: list[Event]) -> Callable[..., dict[str, Any]]:
    """Prepare records and return the manifest of the cache; notes are appended to `events`."""

    def run(*records: Any, **more: Any) -> dict[str, Any]:
        values = {"max_rejected_fraction": None, **more}
        return prepare_records(tmp_path, *records, report=events.append, **values).manifest

    return run


# ---------------------------------------------------------------- labels of whole records


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [value for value in FORMATS.values() if "rejected" not in value])
def test_a_record_labeled_bad_is_left_out_in_every_format(tmp_path: Path, value: dict[str, Any], key: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", {**value, key: True}, {**value, key: False}, {**value, key: None})
    assert outcomes(path) == [{}, "labeled_bad", {}]


def test_numbers_and_words_are_classes_not_labels(tmp_path: Path) -> None:
    values = [0, 1, 0.0, "false", "False", "negative", "", [False]]
    path = write_lines(tmp_path / "data.jsonl", *({"source": "Hi", "target": "Yes", "label": each} for each in values))
    ignored: dict[str, int] = {"ignored_field_label": 1}
    assert outcomes(path) == [{} if value == "" else ignored for value in values]


def test_true_and_false_in_a_csv_file_are_labels(tmp_path: Path) -> None:
    words = ["true", "True", "TRUE", "false", "False", "FALSE", "0", "no", "falsehood", ""]
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,label\n" + "".join(f"Hi,Yes,{word}\n" for word in words))
    ignored: dict[str, int] = {"ignored_field_label": 1}
    expected = [{}, {}, {}, "labeled_bad", "labeled_bad", "labeled_bad", ignored, ignored, ignored, {}]
    assert outcomes(path) == expected
    (tmp_path / "data.tsv").write_text("prompt\tcompletion\tkto_tag\nHi\tYes\tfalse\n")
    assert outcomes(tmp_path / "data.tsv") == ["labeled_bad"]


def test_a_column_that_the_user_names_is_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label,kto_tag\nThe sky is green.,false,true\nThe sky is blue.,true,false\n")
    assert outcomes(path, source_column="text", target_column="label") == [{}, "labeled_bad"]
    assert outcomes(path, source_column="kto_tag", target_column="label") == [{"ignored_field_text": 1}] * 2
    (first, _) = read(path, source_column="text", target_column="label")
    assert isinstance(first, Conversation)
    assert first.turns[1].text == "false"


def test_a_labeled_record_is_rejected_for_its_unknown_format(tmp_path: Path) -> None:
    assert outcomes(write_lines(tmp_path / "data.jsonl", {"text": "Hi", "label": False})) == ["unknown_format"]


def test_records_labeled_bad_are_counted_reported_and_written_in_full(
    prepared: Callable[..., dict[str, Any]], events: list[Event], tmp_path: Path
) -> None:
    manifest = prepared(GOOD, BAD, {"x": 1}, {"messages": [HI, YES], "kto_tag": False})
    assert (manifest["conversations"], manifest["rejected"]) == (1, 3)
    assert manifest["rejected_by_reason"] == {"labeled_bad": 2, "unknown_format": 1}
    assert manifest["repaired"] == {}
    lines = [json.loads(line) for line in (find_cache(tmp_path / "cache") / "rejected.jsonl").read_text().splitlines()]
    reasons = [(line["line"], line["reason"]) for line in lines]
    assert reasons == [(2, "labeled_bad"), (3, "unknown_format"), (4, "labeled_bad")]
    assert lines[0]["record"] == BAD
    assert "kto_tag: false" in lines[2]["message"]
    place = find_cache(tmp_path / "cache") / "rejected.jsonl"
    notes = [event.text for event in events if isinstance(event, Note)]
    assert f"2 records labeled bad (label: false, kto_tag: false) left out of supervised training: {place}" in notes
    assert f"1 record rejected (unknown format: 1): {place}" in notes


def test_records_labeled_bad_do_not_count_toward_the_rejected_fraction(
    prepared: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [BAD, GOOD, GOOD, GOOD, {"x": 1}, BAD]
    for _ in range(2):  # the second time the cache is up to date
        assert prepared(*records, max_rejected_fraction=0.25)["rejected"] == 3
        with pytest.raises(DataError, match=r"1 of 4 records rejected \(unknown format: 1\)") as caught:
            prepared(*records, max_rejected_fraction=0.2)
        assert "2 more are left out on purpose" in caught.value.message
    # checked while records are still being read
    monkeypatch.setattr("t5tune.preparing.record_checks.MIN_RECORDS_TO_STOP", 2)
    assert prepared(BAD, {"x": 1}, BAD, GOOD, max_rejected_fraction=0.5)["rejected"] == 3
    assert prepared(BAD, GOOD, BAD, max_rejected_fraction=0)["rejected"] == 2
    with pytest.raises(DataError) as caught:
        prepared(BAD, {"x": 1}, GOOD, max_rejected_fraction=0.2)
    assert "data.jsonl:2" in str(caught.value.hint)


@pytest.mark.slow
def test_train_reports_and_evaluate_skips_records_labeled_bad(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", GOOD, BAD, BAD)
    arguments = ["--model-name-or-path", "pocket", "--data-path", data, "--output-dir"]
    done = t5tune_in_fork("train", *arguments, tmp_path / "run", "--max-steps", "1", "--report-samples", "0")
    assert done.code == 0, done.stderr
    left_out = "2 records labeled bad (label: false, kto_tag: false) left out of supervised training"
    assert f"warning: {left_out}: {tmp_path / 'run' / 'data' / 'data' / 'rejected.jsonl'}" in done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Records left out: labeled bad (label: false, kto_tag: false): 2" in page
    done = t5tune_in_fork("evaluate", *arguments, tmp_path / "scores", "--max-new-tokens", "1", "--json")
    assert done.code == 0, done.stderr
    assert done.json["examples"] == 1
    assert "2 records labeled bad (label: false, kto_tag: false) were left out" in done.stderr


def test_inspect_counts_records_labeled_bad_separately(prepared: Callable[..., Any], tmp_path: Path) -> None:
    prepared(GOOD, BAD, BAD, {"x": 1})
    done = t5tune_in_fork("inspect", tmp_path / "cache", "--html", tmp_path / "page.html")
    assert done.code == 0, done.stderr
    assert "1 record rejected; 2 records labeled bad and left out; " in (tmp_path / "page.html").read_text()


# ---------------------------------------------------------------- weights of single turns


def make_message(role: str, *texts: str, **more: Any) -> dict[str, Any]:
    """Return a message in LLaMA-Factory's own format."""
    return {"role": role, "content": [{"type": "text", "value": text} for text in texts], **more}


def read_messages(tmp_path: Path, *messages: Any, **reading: Any) -> Any:
    return read_one(tmp_path, {"messages": messages}, **reading)


def list_learned(record: Conversation) -> list[bool]:
    return [turn.learned for turn in record.turns if turn.role == "assistant"]


def decode_examples(cache: Path) -> list[tuple[str, str]]:
    """Return the source and the target of each example."""
    made = open_only(cache)
    tokenizer = load_tokenizer(made.tokenizer_folder)
    return [
        (tokenizer.decode(example.source_S.tolist()[:-1]), tokenizer.decode(example.target_T.tolist()[:-1]))
        for example in made
    ]


CHAT = [
    make_message("system", "Be brief.", loss_weight=0.0),
    make_message("user", "One", loss_weight=0.0),
    make_message("assistant", "first", loss_weight=1.0),
    make_message("user", "Two", loss_weight=0.0),
    make_message("assistant", "second", loss_weight=0.0),
    make_message("user", "Three", loss_weight=0.0),
    make_message("assistant", "third", loss_weight=1.0),
]


def test_content_parts_with_a_value_are_read(tmp_path: Path) -> None:
    record = read_messages(tmp_path, *CHAT)
    assert record.system == "Be brief."
    assert [turn.text for turn in record.turns] == ["One", "first", "Two", "second", "Three", "third"]
    assert record.repairs == {}
    assert read_messages(tmp_path, make_message("user", "a", "b"), YES).turns[0].text == "a\nb"
    openai = {"role": "user", "content": [{"type": "text", "text": "Hi", "value": None}]}
    assert read_messages(tmp_path, openai, YES).turns[0].text == "Hi"
    nothing = {"role": "user", "content": [{"type": "text", "value": None}]}
    assert read_messages(tmp_path, nothing, YES).reason == "not_text"


def test_tool_calls_in_parts_are_learned_as_text(tmp_path: Path) -> None:
    def call(value: Any, kind: str = "tool_call") -> dict[str, Any]:
        return {"type": kind, "value": value}

    def answer(*content: Any) -> str:
        record = read_messages(tmp_path, HI, {"role": "assistant", "content": content, "loss_weight": 1.0})
        assert record.repairs == {"tool_calls_as_text": 1}
        return record.turns[1].text

    add, as_text = '{"name": "añadir", "arguments": {"x": 1}}', '{"name": "añadir", "arguments": {"x": 1}}'
    assert answer(call(add)) == as_text
    assert answer(call(json.loads(add))) == as_text
    assert answer({"type": "text", "value": "I see."}, call(add)) == f"I see.\n{as_text}"
    assert answer(call(add), call(add)) == answer(call(f"[{add}, {add}]", "tool_calls")) == f"[{as_text}, {as_text}]"
    for wrong, message in (
        ("{not JSON", "a content part of type 'tool_call' whose value is not JSON"),
        ("[1]", "a tool call without a function's name"),
        (None, "a tool call without a function's name"),
    ):
        record = read_messages(tmp_path, HI, {"role": "assistant", "content": [call(wrong)]})
        assert (record.reason, message in record.message) == ("bad_turn", True)


def test_reasoning_is_ignored_and_counted_and_images_are_rejected(tmp_path: Path) -> None:
    reasoning, text = {"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Yes"}
    record = read_messages(tmp_path, HI, {"role": "assistant", "content": [reasoning, text]})
    assert (record.turns[1].text, record.repairs) == ("Yes", {"ignored_part_reasoning": 1})
    assert read_messages(tmp_path, HI, {"role": "assistant", "content": [reasoning]}).reason == "no_answer"
    for kind in ("image_url", "audio_url", "video_url"):
        picture = {"role": "user", "content": [text, {"type": kind, "value": "a.jpg"}]}
        rejected = read_messages(tmp_path, picture, YES)
        assert (rejected.reason, f"unsupported content part of type '{kind}'" in rejected.message) == ("not_text", True)


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_a_turn_of_weight_0_is_only_context(prepared: Callable[..., dict[str, Any]], tmp_path: Path, key: str) -> None:
    messages = [{key if name == "loss_weight" else name: value for name, value in message.items()} for message in CHAT]
    manifest = prepared({"messages": messages}, {"messages": [HI, YES]})
    assert (manifest["conversations"], manifest["examples"]) == (2, 3)
    assert (manifest["repaired"], manifest["dropped"]) == ({}, {"zero_weight_targets": 1})
    (first, third, _) = decode_examples(tmp_path / "cache")
    assert (first[1], third[1]) == ("first", "third")
    assert third[0].endswith("Human: One Assistant: first Human: Two Assistant: second Human: Three Assistant:")


@pytest.mark.parametrize("model_max_length", [30, 1000])
def test_train_on_last_uses_the_last_learned_turn(
    prepared: Callable[..., dict[str, Any]], tmp_path: Path, model_max_length: int
) -> None:
    messages = [*CHAT[:3], make_message("user", "lamp " * 20), make_message("assistant", "b", loss_weight=0)]
    prepared({"messages": messages}, train_on="last", split_long=True, model_max_length=model_max_length)
    assert [target for _, target in decode_examples(tmp_path / "cache")] == ["first"]


def test_characters_of_a_turn_of_weight_0_get_no_token(prepared: Callable[..., dict[str, Any]]) -> None:
    manifest = prepared({"messages": [HI, make_message("assistant", "猫", weight=0), HI, YES]})
    assert "猫" not in manifest["added_tokens"]
    assert "猫" not in {item["text"] for item in manifest["lost_characters"]}


def test_other_weights_are_taken_as_1_and_counted(tmp_path: Path) -> None:
    taken, ignored = {"weights_taken_as_1": 1}, {"ignored_turn_field_loss_weight": 1}
    for weight, repairs in ((1, {}), (True, {}), (None, {}), (0.25, taken), (2, taken), ("heavy", ignored)):
        record = read_messages(tmp_path, HI, {**YES, "loss_weight": weight})
        assert (list_learned(record), record.repairs) == ([True], repairs)
    asked = read_messages(tmp_path, {**HI, "loss_weight": 1.0}, YES)
    assert asked.repairs == ignored
    rejected = read_messages(tmp_path, HI, {**YES, "loss_weight": -1})
    assert (rejected.reason, "turn 1: loss_weight -1" in rejected.message) == ("bad_turn", True)


def test_a_record_without_learned_turns_is_rejected(tmp_path: Path) -> None:
    for last in ({**YES, "weight": 0, "content": "No"}, {"role": "assistant", "content": " "}):
        record = read_messages(tmp_path, HI, {**YES, "weight": 0}, HI, last)
        assert (record.reason, "every assistant turn has weight 0" in record.message) == ("zero_weight", True)
    assert read_messages(tmp_path, HI, {"role": "assistant", "content": " ", "weight": 0}).reason == "no_answer"


def test_a_merged_turn_with_weight_0_isn_t_learned(tmp_path: Path) -> None:
    both = read_messages(tmp_path, HI, YES, HI, {**YES, "weight": 0}, YES, merge_same_role=True)
    assert list_learned(both) == [True, False]
    assert both.repairs == {"merged_same_role_turns": 1, "merged_turns_not_learned": 1}
    same = read_messages(tmp_path, HI, YES, {**HI, "weight": 0}, HI, {**YES, "weight": 0}, merge_same_role=True)
    assert (list_learned(same), same.repairs) == ([True, False], {"merged_same_role_turns": 1})


@pytest.mark.slow
def test_evaluate_does_not_score_a_turn_of_weight_0(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", {"messages": CHAT}, {"messages": [HI, {**YES, "weight": 0}]})
    arguments = ["--model-name-or-path", "pocket", "--data-path", data, "--output-dir", tmp_path / "scores"]
    done = t5tune_in_fork("evaluate", *arguments, "--max-new-tokens", "1", "--json")
    assert done.code == 0, done.stderr
    lines = (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == ["first", "third"]
    assert "1 record rejected, the first" in done.stderr
    assert "every assistant turn has weight 0" in done.stderr


def test_every_reason_is_documented() -> None:
    page = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [reason for reason in REJECTION_REASONS if f"`{reason}`" not in page] == []
