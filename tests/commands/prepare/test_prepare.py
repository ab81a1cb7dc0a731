"""prepare: the ids of the token cache, truncation, rejected records, added tokens, templates, and reproducibility."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import ANSWERS, Prepared, decode, fastchat_text, load_tokenizer_of, record, write_lines
from tests.support.caches import find_cache, prepare_for_run
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

SPECIAL_TOKENS = ["</s>", "<pad>", "<unk>", "<extra_id_3>"]


def test_each_assistant_turn_is_an_example_with_earlier_text(prepared: Prepared) -> None:
    texts = ["Hello.", "Hi,\nwho is it?", "Mira.", "{a: 1}"]
    result, cache = prepared(record(*texts))
    assert (result.conversations, result.examples, len(cache)) == (1, 2, 2)
    tokenizer = load_tokenizer_of(cache)
    for number, example in enumerate(cache):
        before = fastchat_text(texts[: 2 * number + 1]) + "### Assistant:"
        assert decode(tokenizer, example.source_S) == before
        assert decode(tokenizer, example.target_T) == texts[2 * number + 1] + "\n"
        assert example.source_S[-1] == example.target_T[-1] == tokenizer.eos_token_id
        assert example.source_S.dtype == example.target_T.dtype == np.int64
    assert result.source_tokens == sum(len(example.source_S) for example in cache)
    assert result.target_tokens == sum(len(example.target_T) for example in cache)


def test_a_records_system_message_replaces_that_of_the_template(prepared: Prepared) -> None:
    said_as_turn = record("Hi", "Yes")
    said_as_turn["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    _, cache = prepared(record("Hi", "Yes", system="Be brief."), said_as_turn)
    for example in cache:
        assert decode(load_tokenizer_of(cache), example.source_S) == "Be brief.\n\n### Human: Hi\n### Assistant:"


def test_sources_and_targets_decode_to_the_original_turns(prepared: Prepared) -> None:
    result, cache = prepared(*[record(text, text) for text in ANSWERS])
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [text + "\n" for text in ANSWERS]
    sources = [fastchat_text([text]) + "### Assistant:" for text in ANSWERS]
    assert [decode(tokenizer, example.source_S) for example in cache] == sources
    assert result.unknown_tokens == 0


def test_the_plain_template_makes_turns_source_and_target(prepared: Prepared) -> None:
    _, cache = prepared(record("How many?", "Two  eggs"), conversation_template="plain")
    tokenizer = load_tokenizer_of(cache)
    assert decode(tokenizer, cache[0].source_S) == "How many?"
    assert decode(tokenizer, cache[0].target_T) == "Two  eggs"


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
def test_text_never_becomes_a_special_token_in_the_cache(prepared: Prepared, add_tokens: str) -> None:
    records = [record(f"what is {token}", f"it is {token}") for token in SPECIAL_TOKENS]
    _, cache = prepared(*records, add_tokens=add_tokens)
    tokenizer = load_tokenizer_of(cache)
    special_ids = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} - {tokenizer.unk_token_id}
    for example in cache:
        assert not special_ids & set(example.source_S[:-1].tolist())
        assert not special_ids & set(example.target_T[:-1].tolist())


def test_all_role_names_are_known(prepared: Prepared) -> None:
    humans, assistants = ["human", "user", "Human ", "tool"], ["gpt", "assistant", "GPT", "chatgpt"]
    records = [
        {"conversations": [{"from": human, "value": "Hi"}, {"from": assistant, "value": "Yes"}]}
        for human, assistant in zip(humans, assistants, strict=True)
    ]
    result, cache = prepared(*records)
    assert (result.conversations, result.rejected) == (4, 0)
    assert len({tuple(example.source_S) for example in cache}) == 1


def test_turns_without_a_question_or_answer_are_left_out(prepared: Prepared) -> None:
    leading = {"conversations": [{"from": "gpt", "value": "I begin"}, *record("Hi", "Yes")["conversations"]]}
    result, cache = prepared(leading, record("Hi", "Yes", "And?"))
    assert (result.conversations, result.examples, result.rejected) == (2, 2, 0)
    for example in cache:
        assert decode(load_tokenizer_of(cache), example.source_S) == fastchat_text(["Hi"]) + "### Assistant:"
    assert cache.manifest["repaired"] == {"leading_assistant_turns": 1, "trailing_human_turns": 1}


@pytest.mark.parametrize("suffix", ["\n", " <end>\n"])
def test_a_blank_assistant_turn_is_context_but_not_a_target(suffix: str, prepared: Prepared, tmp_path: Path) -> None:
    template = yaml.safe_load((REPOSITORY / "templates" / "conversations" / "fastchat-t5.yaml").read_text())
    (tmp_path / "own.yaml").write_text(json.dumps(template | {"assistant": "{text}" + suffix}))
    result, cache = prepared(record("Hi", " \n", "Well?", "Yes"), conversation_template=str(tmp_path / "own.yaml"))
    assert result.examples == 1
    expected = fastchat_text(["Hi", " \n" + suffix.rstrip("\n"), "Well?"]) + "### Assistant:"
    assert decode(load_tokenizer_of(cache), cache[0].source_S) == expected


def test_carriage_returns_become_newlines(prepared: Prepared) -> None:
    _, cache = prepared(record("Hi", "a\r\nb\rc"))
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "a\nb\nc\n"


def make_turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


UNUSABLE = [
    (["no", "object"], "not_an_object"),
    ("text", "not_an_object"),
    ({"text": "Hi"}, "unknown_format"),
    ({"conversations": "Hi"}, "unknown_format"),
    ({"conversations": ["Hi"]}, "bad_turn"),
    ({"conversations": [{"from": "human"}]}, "bad_turn"),
    (make_turns(("narrator", "Hi"), ("gpt", "Yes")), "unknown_role"),
    (make_turns((3, "Hi"), ("gpt", "Yes")), "unknown_role"),
    (make_turns(("human", 3), ("gpt", "Yes")), "not_text"),
    (make_turns(("human", "Hi"), ("gpt", None)), "not_text"),
    ({**record("Hi", "Yes"), "system": 3}, "not_text"),
    (make_turns(("human", "Hi"), ("human", "Hi"), ("gpt", "Yes")), "same_role_twice"),
    (make_turns(("human", "Hi"), ("gpt", "Yes"), ("gpt", "Yes")), "same_role_twice"),
    (make_turns(("human", "Hi"), ("system", "Be brief."), ("gpt", "Yes")), "misplaced_system"),
    (make_turns(("system", "Be brief."), ("system", "Be long."), ("human", "Hi"), ("gpt", "Yes")), "misplaced_system"),
    (make_turns(("human", "Hi")), "no_answer"),
    (make_turns(("human", "Hi"), ("gpt", "  \n")), "no_answer"),
    (make_turns(("gpt", "Yes")), "no_answer"),
    (make_turns(), "no_answer"),
    (make_turns(("human", "Hi \ud800"), ("gpt", "Yes")), "lone_surrogate"),
    ({**record("Hi", "Yes"), "system": "\udfff"}, "lone_surrogate"),
]


@pytest.mark.parametrize(("bad", "reason"), UNUSABLE)
def test_an_unusable_record_is_written_with_location_and_reason(
    prepared: Prepared, tmp_path: Path, bad: Any, reason: str
) -> None:
    result, cache = prepared(record("Hi", "Yes"), bad, record("Hi", "No"))
    assert (result.conversations, result.rejected, result.examples) == (2, 1, 2)
    (line,) = (find_cache(result.cache) / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = json.loads(line)
    assert rejected["record"] == bad
    assert rejected["file"] == str(tmp_path / "in" / "data.jsonl")
    assert rejected["line"] == 2
    assert rejected["reason"] == reason
    assert rejected["message"]
    assert cache.manifest["rejected_by_reason"] == {reason: 1}


def test_an_invalid_line_is_rejected_and_other_lines_used(prepared: Prepared, tmp_path: Path) -> None:
    good = json.dumps(record("Hi", "Yes"))
    data = tmp_path / "data.jsonl"
    data.write_text(f"{good}\n\n{good[:-5]}\n{good}\n", encoding="utf-8")
    result, _ = prepared(data=data)
    assert (result.conversations, result.rejected) == (2, 1)
    rejected = json.loads((find_cache(result.cache) / "rejected.jsonl").read_text())
    assert (rejected["line"], rejected["reason"], rejected["record"]) == (3, "not_json", good[:-5])


def test_arrays_lines_and_single_objects_give_the_same_examples(prepared: Prepared, tmp_path: Path) -> None:
    one = record("Hi", "Yes")
    forms = {
        "array.json": json.dumps([one], indent=1),
        "compact.json": json.dumps([one]),
        "lines.jsonl": json.dumps(one) + "\n",
        "object.json": json.dumps(one, indent=1),
        "one-line.json": json.dumps(one),
        "mark.json": "\ufeff" + json.dumps([one]),
        "windows.jsonl": "\r\n" + json.dumps(one) + "\r\n",
    }
    for name, text in forms.items():
        data = tmp_path / name
        data.write_bytes(text.encode())
        result, cache = prepared(data=data, output_dir=tmp_path / f"cache-{name}")
        assert (result.conversations, result.rejected) == (1, 0), name
        assert decode(load_tokenizer_of(cache), cache[0].target_T) == "Yes\n"


def test_a_folder_means_the_data_files_in_it(prepared: Prepared, tmp_path: Path) -> None:
    write_lines(tmp_path / "many" / "b.jsonl", record("Hi", "second"))
    write_lines(tmp_path / "many" / "a.jsonl", record("Hi", "first"))
    (tmp_path / "many" / "notes.txt").write_text("none of this")
    result, cache = prepared(data=tmp_path / "many")
    assert result.conversations == 2
    assert [decode(load_tokenizer_of(cache), example.target_T) for example in cache] == ["first\n", "second\n"]


def test_messages_name_the_setting_that_the_data_comes_from(tmp_path: Path, untied_base: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", record("Hi"), record("Hi"))
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere.json"): "no such file or folder",
        str(tmp_path / "empty"): "contains no .*file",
        str(bad): "(contains )?nothing to evaluate on",
    }
    origin = {"setting": "eval_data_path", "is_evaluation": True}
    for path, message in cases.items():
        values = {"model_name_or_path": str(untied_base), "data_path": [path], "output_dir": tmp_path / "cache"}
        with pytest.raises(DataError, match=rf"^eval_data_path: .*{message}|^eval_data_path: {message}"):
            prepare_for_run(PrepareSettings(**values), **origin)
    write_lines(bad, record("Hi"), record("Hi", "Yes"))
    with pytest.raises(DataError, match=r"^eval_data_path: .*1 of 2 records rejected"):
        prepare_for_run(PrepareSettings(**values, max_rejected_fraction=0.4), **origin)


def test_a_split_does_not_divide_conversations(prepared: Prepared, tmp_path: Path) -> None:
    _, cache = prepared(*[record("Hi", f"{n}", "And?", f"{n}", "And?", f"{n}") for n in range(20)])
    tokenizer = load_tokenizer_of(cache)
    examples = open_examples(tmp_path / "cache")
    training, held_out = examples.split(0.2, split_seed=7)
    names = [[decode(tokenizer, example.target_T) for example in part] for part in (training, held_out)]
    assert (len(names[0]), len(names[1])) == (48, 12)
    assert not set(names[0]) & set(names[1])
    assert set(names[0]) | set(names[1]) == {f"{n}\n" for n in range(20)}
    again = examples.split(0.2, split_seed=7)[1]
    assert [decode(tokenizer, example.target_T) for example in again] == names[1]
    others = {
        tuple(decode(tokenizer, e.target_T) for e in examples.split(0.2, split_seed=seed)[1]) for seed in range(5)
    }
    assert len(others) > 1


def test_a_split_of_too_few_conversations_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    prepared(record("Hi", "Yes", "And?", "No"))
    with pytest.raises(DataError, match="eval_fraction"):
        open_examples(tmp_path / "cache").split(0.5, split_seed=7)


def test_lengths_equal_those_of_the_examples(prepared: Prepared, conversations: Path) -> None:
    _, cache = prepared(data=conversations, model_max_length=100)
    sources, targets = cache.read_lengths()
    assert sources.tolist() == [len(example.source_S) for example in cache]
    assert targets.tolist() == [len(example.target_T) for example in cache]
    assert len(cache.take(3)) == 3
    assert cache.take(3)[2].source_S.tolist() == cache[2].source_S.tolist()


TEMPLATE = {
    "system_message": "Chat.",
    "system": "{text}\n\n",
    "human": "Q: {text}\n",
    "assistant_prefix": "A: ",
    "assistant": "{text}\n",
}


def test_a_users_own_template_is_used(prepared: Prepared, tmp_path: Path) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(yaml.safe_dump(TEMPLATE))
    _, cache = prepared(record("Hi", "Yes"), conversation_template=str(template))
    assert decode(load_tokenizer_of(cache), cache[0].source_S) == "Chat.\n\nQ: Hi\nA:"
