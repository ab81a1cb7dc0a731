"""Formats of records: how each is detected, parsed and repaired, and what messages say about the place of a problem."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from t5tune.data.reading.formats import Conversation, parse_conversation
from t5tune.data.reading.rejections import RecordLocation, Rejection, RejectionError
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import FORMATS, HI, YES, read, read_one

SYSTEM = {"role": "system", "content": "Be brief."}
BAD = {"role": "narrator", "content": "Hi"}

MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "two in a row": ({"messages": [HI, HI, YES]}, "turn 1: two human turns in a row"),
    "two in a row after a system turn": ({"messages": [SYSTEM, HI, HI]}, "turn 2: two human turns in a row"),
    "two in a row, with a system key": (
        {"system": "Be brief.", "messages": [HI, HI, YES]}, "turn 1: two human turns in a row"),
    "a late system turn": ({"messages": [HI, SYSTEM, YES]}, "turn 1: a system turn that is not the first turn"),
    "two system turns": (
        {"messages": [SYSTEM, SYSTEM, HI, YES]}, "turn 1: a second system message; the first is turn 0"),
    "a system turn and a system key": (
        {"system": "Be brief.", "messages": [SYSTEM, HI, YES]},
        "turn 0: a second system message; the first is the key system"),
    "an unknown role, with a system key": ({"system": "Be brief.", "messages": [HI, BAD]}, "turn 1: unknown role"),
    "two in a row in a completion": (
        {"prompt": [SYSTEM, HI], "completion": [YES, YES]}, "completion: turn 1: two assistant turns in a row"),
    "a prompt that ends with an answer": (
        {"prompt": [HI, YES], "completion": "No"}, "completion: two assistant turns in a row"),
    "an unknown role in a prompt": ({"prompt": [BAD], "completion": [YES]}, "prompt: turn 0: unknown role"),
    "two in a row in a preferred answer": (
        {"instruction": "Hi", "chosen": [YES, YES]}, "chosen: turn 1: two assistant turns in a row"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "message"), MESSAGES.values(), ids=MESSAGES)
def test_a_rejected_turn_is_named_as_in_the_record(value: dict[str, Any], message: str) -> None:
    with pytest.raises(RejectionError) as rejected:
        parse_conversation(value, RecordLocation("data.jsonl", 1, 0, 0), ReadingSettings())
    assert str(rejected.value).startswith(message)


def read_conversation(folder: Path, value: Any, **reading: Any) -> Conversation:
    record = read_one(folder, value, **reading)
    assert isinstance(record, Conversation), record
    return record


def list_turns(record: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


@pytest.mark.parametrize("value", FORMATS.values(), ids=FORMATS)
def test_each_format_is_detected_by_its_keys(tmp_path: Path, value: Any) -> None:
    record = read_conversation(tmp_path, value)
    assert list_turns(record) == [("human", "Hi"), ("assistant", "Yes")]
    ignored = {"ignored_field_rejected": 1} if "rejected" in value else {}
    assert record.repairs == ignored


def test_all_fields_of_alpaca_are_used(tmp_path: Path) -> None:
    value = {"instruction": "Add", "input": "1 1", "output": "2", "system": "Short.", "history": [["a", "b"]]}
    record = read_conversation(tmp_path, value)
    assert record.system == "Short."
    assert list_turns(record) == [("human", "a"), ("assistant", "b"), ("human", "Add\n1 1"), ("assistant", "2")]


def test_tool_calls_are_targets_and_tool_results_are_sources(tmp_path: Path) -> None:
    speakers = "system human function_call observation gpt tool bing user chatgpt human bard"
    value = {"conversations": [{"from": speaker, "value": str(n)} for n, speaker in enumerate(speakers.split())]}
    record = read_conversation(tmp_path, value)
    assert record.system == "0"
    assert [turn.role for turn in record.turns] == ["human", "assistant"] * 5


def test_openai_tool_calls_become_the_json_of_function_call_turns(tmp_path: Path) -> None:
    def answer(**message: Any) -> str:
        record = read_conversation(tmp_path, {"messages": [HI, {"role": "assistant", **message}]})
        assert record.repairs == {"tool_calls_as_text": 1}
        return record.turns[1].text

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "a", "type": "function", "function": {"name": "añadir", "arguments": arguments}}

    as_text = '{"name": "añadir", "arguments": {"x":  [1]}}'
    assert answer(content=None, tool_calls=[call('{"x":  [1]}')]) == as_text
    assert answer(tool_calls=[call('{"x":  [1]}')]) == as_text
    assert answer(content="I see.", tool_calls=[call({"x": "é"})]) == (
        'I see.\n{"name": "añadir", "arguments": {"x": "é"}}'
    )
    assert json.loads(answer(content="", tool_calls=[call("{}"), call("not {JSON")])) == [
        {"name": "añadir", "arguments": {}},
        {"name": "añadir", "arguments": "not {JSON"},
    ]
    assert answer(content=None, function_call={"name": "f"}) == '{"name": "f", "arguments": null}'
    for wrong in ([{"id": 1}], [{"function": "f"}], ["f"], "f"):
        rejected = read_one(tmp_path, {"messages": [HI, {"role": "assistant", "content": "x", "tool_calls": wrong}]})
        assert (rejected.reason, "without a function's name" in rejected.message) == ("bad_turn", True)
    for nothing in (None, [], {"name": None, "arguments": None}):
        rejected = read_one(tmp_path, {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": nothing}]})
        assert rejected.reason == "not_text"


CALL_ARGUMENTS: list[Any] = [
    {"a": 1}, {"to": "x", "near": {"city": "Bonn"}}, {}, {"near": {"zip": 5}, "stops": [{"m": 1}, {"n": 2}]},
]  # fmt: skip


def make_call(arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{**HI, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def store_parquet(records: list[Any], folder: Path) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "calls.parquet")
    return str(folder / "calls.parquet")


TABLES: dict[str, Callable[[list[Any], Path], Any]] = {
    "Parquet": store_parquet,
    "Arrow table": lambda records, folder: pyarrow.Table.from_pylist(records),
    "Dataset": lambda records, folder: datasets.Dataset.from_list(records),
    "streamed Dataset": lambda records, folder: datasets.Dataset.from_list(records).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_s_tool_calls_keep_only_their_arguments(tmp_path: Path, kind: str) -> None:
    data = TABLES[kind]([make_call(arguments) for arguments in CALL_ARGUMENTS], tmp_path)
    (path,) = DatasetSettings(path=data).path
    records = [record for record in read(Path(path)) if isinstance(record, Conversation)]
    assert [json.loads(record.turns[1].text)["arguments"] for record in records] == CALL_ARGUMENTS
    # each of a, to, near, stops that a call lacks, and one of the two keys of near, m, n
    left_out = [record.repairs["null_arguments_left_out"] for record in records]
    assert left_out == [3, 3, 4, 5]
    (tmp_path / "records").mkdir()
    kept = tmp_path / "records" / Path(path).name  # where train keeps records that were in memory
    shutil.copy(path, kept)
    assert read(kept) == [replace(record, location=replace(record.location, file=str(kept))) for record in records]


def test_null_arguments_that_are_not_of_a_table_are_learned(tmp_path: Path) -> None:
    records = [make_call({"a": None}), make_call('{"a": null, "b":  1}')]
    (path,) = DatasetSettings(path=records).path
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, records)))
    for file in (Path(path), tmp_path / "calls.jsonl", Path(store_parquet(records[1:], tmp_path))):
        found = [record for record in read(file) if isinstance(record, Conversation)]
        texts = ['{"name": "f", "arguments": {"a": null}}', '{"name": "f", "arguments": {"a": null, "b":  1}}']
        assert [record.turns[1].text for record in found] == texts[-len(found) :]
        assert [record.repairs for record in found] == [{"tool_calls_as_text": 1}] * len(found)


def test_columns_can_be_named_and_prefixed(tmp_path: Path) -> None:
    named = {"source_column": "dialogue", "target_column": "note", "source_prefix": "summarize: "}
    record = read_conversation(tmp_path, {"dialogue": "Hi", "note": "Yes", "id": 3}, **named)
    assert list_turns(record) == [("human", "summarize: Hi"), ("assistant", "Yes")]
    rejected = read_one(tmp_path, {"dialogue": "Hi"}, **named)
    assert (rejected.reason, "note" in rejected.message) == ("unknown_format", True)
    rejected = read_one(tmp_path, {"dialogue": "", "note": "Yes"}, **named)
    assert rejected == Rejection("no_source", "no text to answer (columns)")


def test_columns_are_joined_without_empty_values(tmp_path: Path) -> None:
    ticket = {"Subject": "Bill", "Body": "Charged twice", "Category": "billing", "Reason": "double charge"}
    columns: dict[str, Any] = {"source_column": ["Subject", "Body"], "target_column": ["Category", "Reason"]}

    def read_texts(**changes: Any) -> list[str]:
        return [turn.text for turn in read_one(tmp_path, ticket | changes, **columns, source_prefix="sort: ").turns]

    assert read_texts() == ["sort: Bill\nCharged twice", "billing\ndouble charge"]
    assert read_texts(Subject=None, Reason="") == ["sort: Charged twice", "billing"]
    assert read_texts(Body=" ", Category=None) == ["sort: Bill", "double charge"]
    assert read_one(tmp_path, ticket | {"Subject": "", "Body": None}, **columns).reason == "no_source"
    assert read_one(tmp_path, ticket | {"Category": None, "Reason": ""}, **columns).reason == "no_answer"
    assert read_one(tmp_path, ticket | {"Body": 7}, **columns).message.startswith("Body: expected text")
    del ticket["Reason"]
    assert read_one(tmp_path, ticket, **columns).message.startswith("no column Reason; the record has")


def test_a_mistyped_column_is_suggested(tmp_path: Path) -> None:
    value = {"disfluent": "a, no, b", "original": "b"}
    rejected = read_one(tmp_path, value, source_column="disfluent", target_column="orignal")
    message = "no column orignal; the record has disfluent, original; did you mean original?"
    assert rejected.message == message
    value = {" disfluent ": "a, no, b", "its original": "b"}
    rejected = read_one(tmp_path, value, source_column="disfluent", target_column="its original")
    message = "no column disfluent; the record has ' disfluent ', its original; did you mean ' disfluent '?"
    assert rejected.message == message
    (tmp_path / "data.csv").write_text(" disfluent ,its original\na uh b,a b\n")
    (rejected,) = read(tmp_path / "data.csv", source_column="disfluent", target_column="its original")
    assert rejected == Rejection("unknown_format", message)


def test_two_columns_of_unknown_names_are_filled_in(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("id,disfluent,its original\n1,a uh b,a b\n")
    (rejected,) = read(tmp_path / "pairs.csv")
    assert isinstance(rejected, Rejection)
    assert rejected.message == (
        "its keys are id, disfluent, its original; "
        "add --source-column disfluent --target-column 'its original', or swap the names; "
        "the first line must name the columns; if it is data, add --no-header"
    )
    expected = (
        "expected conversations, or messages, or instruction + output, or completion + prompt, or source + target"
    )
    rejected = read_one(tmp_path, {"text": "a", "number": 1})
    assert rejected.message == f"its keys are text, number; {expected}"
    rejected = read_one(tmp_path, {"c": "a", "b": "b", "a": "c"})
    named = "or name two columns with --source-column and --target-column"
    assert rejected.message == f"its keys are c, b, a; {expected}; {named}"
    rejected = read_one(tmp_path, dict.fromkeys(("a, b", *"hgfedcb"), 1))
    assert rejected.message == f"its keys are 'a, b', h, g, f, e and 3 more; {expected}"


def test_a_named_format_rejects_other_formats(tmp_path: Path) -> None:
    both = FORMATS["sharegpt"] | {"source": "a", "target": "b"}
    assert list_turns(read_conversation(tmp_path, both, data_format="source-target"))[0] == ("human", "a")
    rejected = read_one(tmp_path, FORMATS["openai"], data_format="alpaca")
    assert (rejected.reason, "instruction" in rejected.message) == ("unknown_format", True)


def test_repairs_are_counted_by_kind(tmp_path: Path) -> None:
    texts = ["I go first", "a\r\nb\rc", "\u200bYes\ufeff", " ", "x", "y"]
    turns = [(("gpt", "human")[number % 2], text) for number, text in enumerate(texts)]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "tags": ["t"]}
    (tmp_path / "data.jsonl").write_text("\ufeff" + json.dumps(value))
    (record,) = read(tmp_path / "data.jsonl")
    assert isinstance(record, Conversation)
    assert list_turns(record) == [("human", "a\nb\nc"), ("assistant", "Yes"), ("human", " "), ("assistant", "x")]
    assert record.repairs == {
        "byte_order_mark": 1,
        "leading_assistant_turns": 1,
        "carriage_returns": 2,
        "zero_width_characters": 2,
        "blank_turns": 1,
        "trailing_human_turns": 1,
        "ignored_field_tags": 1,
    }


def test_merge_same_role_merges_consecutive_turns_of_a_role(tmp_path: Path) -> None:
    turns = [("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("gpt", "e")]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    record = read_conversation(tmp_path, value, merge_same_role=True)
    assert list_turns(record) == [("human", "a\nb"), ("assistant", "c\nd\ne")]
    assert record.repairs == {"merged_same_role_turns": 3}


def test_clean_removes_html_and_backslashes_but_keeps_code(tmp_path: Path) -> None:
    html = (
        '<div class="markdown prose"><p>Use <code>a &lt; b</code>:</p><pre><div>python<button>Copy code</button>'
        "</div><div><code>    def f(x):\n        return x_1 * 2\n</code></div></pre>"
        "<ol><li>one</li><li>two</li></ol></div>"
    )
    value = {"conversations": [{"from": "human", "value": "snake\\_case and `a\\_b`"}, {"from": "gpt", "value": html}]}
    untouched = read_conversation(tmp_path, value)
    assert [turn.text for turn in untouched.turns] == [turn["value"] for turn in value["conversations"]]
    record = read_conversation(tmp_path, value, clean=True)
    question, answer = (turn.text for turn in record.turns)
    assert question == "snake_case and `a\\_b`"
    assert "```python\n    def f(x):\n        return x_1 * 2\n```" in answer
    assert "`a < b`" in answer
    assert "1. one\n2. two" in answer
    assert "<" not in answer.replace("a < b", "")
    assert "Copy code" not in answer
    assert record.repairs == {"html_turns": 1, "markdown_escapes": 1}


@pytest.mark.parametrize("prefix", ["", "<b>&amp;: "])
def test_clean_repairs_a_source_before_the_prefix_is_prepended(tmp_path: Path, prefix: str) -> None:
    html = "<p>Hello <b>big</b> world</p><p>A &amp; B</p>"
    value = {"source": html, "target": html}
    record = read_conversation(tmp_path, value, clean=True, source_prefix=prefix)
    text = "Hello **big** world\n\nA & B"
    assert list_turns(record) == [("human", prefix + text), ("assistant", text)]
    assert record.repairs == {"html_turns": 2}


def test_clean_repairs_texts_but_not_tool_calls(tmp_path: Path) -> None:
    arguments = {"body": "say &quot;hi&quot;  there", "x": "a <b>bold</b> \\_ end"}
    call = json.dumps({"name": "send", "arguments": arguments})
    calling = {"tool_calls": [{"function": {"name": "send", "arguments": arguments}}]}
    part = {"type": "tool_call", "value": call}
    messages: list[tuple[dict[str, Any], str]] = [
        ({"role": "assistant", "content": None, **calling}, call),
        ({"role": "assistant", "content": "<p>Let me &amp; see.</p>", **calling}, f"Let me & see.\n{call}"),
        ({"role": "assistant", "content": [{"type": "text", "text": "A &amp; B"}, part]}, f"A & B\n{call}"),
        ({"role": "assistant", "content": "<p></p>", **calling}, call),
        ({"from": "function_call", "value": call}, call),
    ]
    for message, target in messages:
        record = read_conversation(tmp_path, {"messages": [HI, message]}, clean=True)
        assert record.turns[1].text == target


def test_text_with_angle_brackets_is_not_taken_as_html(tmp_path: Path) -> None:
    text = "if a < b and b > c: print(<x>) # std::vector<int> & more"
    record = read_conversation(tmp_path, {"source": text, "target": text}, clean=True)
    assert [turn.text for turn in record.turns] == [text, text]
