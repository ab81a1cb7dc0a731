"""Preference pairs: the forms of records, what is rejected and why, and how both answers are stored for one source."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.inspect import inspect
from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.prepared import open_examples
from t5tune.data.reading.formats import parse_conversation
from t5tune.data.reading.rejections import RecordLocation, RejectionError
from t5tune.data.tokens.encoding import PreferencePair
from t5tune.errors import DataError, SettingsError
from t5tune.settings import InspectSettings, PrepareSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import HI, YES, prepare_records, write_lines
from tests.support.caches import open_only

NO = {"role": "assistant", "content": "No"}
AND = {"role": "user", "content": "And?"}
SYSTEM = {"role": "system", "content": "Be brief."}
COLUMNS = {"source_column": "q", "target_column": "good", "rejected_column": "bad"}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, {}),
    "messages": ({"prompt": [HI], "chosen": [YES], "rejected": [NO]}, {}),
    "whole conversations": ({"chosen": [HI, YES], "rejected": [HI, NO]}, {}),
    "whole conversations with a prompt": ({"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]}, {}),
    "one answer in a whole conversation": ({"prompt": [HI], "chosen": [HI, YES], "rejected": "No"}, {}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes"},
         "rejected": {"from": "gpt", "value": "No"}}, {}),
    "openai": ({"messages": [HI], "chosen": YES, "rejected": NO}, {}),
    "openai, for preferences": (
        {"input": {"messages": [HI]}, "preferred_output": [YES], "non_preferred_output": [NO]}, {}),
    "alpaca": ({"instruction": "Hi", "chosen": "Yes", "rejected": "No"}, {}),
    "columns": ({"q": "Hi", "good": "Yes", "bad": "No"}, COLUMNS),
    "columns with their default names": ({"q": "Hi", "chosen": "Yes", "rejected": "No"}, {"source_column": "q"}),
    "the chosen answer as a completion, too": (
        {"prompt": "Hi", "completion": "Yes", "chosen": "Yes", "rejected": "No"}, {}),
    "the chosen answer in the turns, too": ({"messages": [HI, YES], "chosen": "Yes", "rejected": "No"}, {}),
}  # fmt: skip
REJECTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no rejected answer": ({"prompt": "Hi", "chosen": "Yes"}, "no_preference", "no rejected answer; "),
    "no chosen answer": ({"prompt": "Hi", "completion": "Yes"}, "no_preference", "no chosen answer; "),
    "an empty answer": ({"prompt": "Hi", "chosen": "", "rejected": "No"}, "no_preference", "no chosen answer; "),
    "a misspelled key": (
        {"prompt": "Hi", "chosen": "Yes", "rejectd": "No"}, "no_preference",
        "no rejected answer; the record has prompt, chosen, rejectd; did you mean rejectd?"),
    "a blank answer": (
        {"prompt": [HI, YES, AND], "chosen": "Yes", "rejected": " "}, "no_preference", "rejected: no text"),
    "the same answer": (
        {"prompt": "Hi", "chosen": "Yes", "rejected": "Yes"}, "no_preference", "chosen and rejected are the same"),
    "another question": (
        {"chosen": [HI, YES], "rejected": [AND, NO]}, "other_question",
        "chosen and rejected answer different questions: they differ from turn 0 on"),
    "another earlier answer": (
        {"chosen": [HI, YES, AND, YES], "rejected": [HI, NO, AND, NO]}, "other_question",
        "chosen and rejected answer different questions: they differ from turn 1 on"),
    "another system message": (
        {"chosen": [SYSTEM, HI, YES], "rejected": [HI, NO]}, "other_question",
        "chosen and rejected answer different questions"),
    "an answer that isn't text": ({"prompt": "Hi", "chosen": "Yes", "rejected": [3]}, "bad_turn", "rejected: turn 0: "),
    "an unknown role": (
        {"prompt": "Hi", "chosen": [YES], "rejected": [{"role": "elf", "content": "No"}]}, "unknown_role",
        "rejected: turn 0: unknown role"),
    "an answer of weight 0": (
        {"prompt": [HI, YES, AND], "chosen": [{**YES, "weight": 0}], "rejected": "No"}, "zero_weight",
        "chosen: its last turn has weight 0"),
}  # fmt: skip


def parse(value: dict[str, Any], **reading: Any) -> Any:
    settings = ReadingSettings(objective="dpo", **reading)
    return parse_conversation(value, RecordLocation("data.jsonl", 1, 0, 0), settings)


@pytest.mark.parametrize(("value", "reading"), FORMS.values(), ids=FORMS)
def test_a_pair_is_read_from_each_form(value: dict[str, Any], reading: dict[str, Any]) -> None:
    pair = parse(value, **reading)
    assert [(turn.role, turn.text, turn.learned) for turn in pair.turns] == [
        ("human", "Hi", False), ("assistant", "Yes", True),
    ]  # fmt: skip
    assert pair.rejected == "No"
    assert pair.swap_answers().turns[-1].text == "No"
    assert pair.targets == ["Yes", "No"]
    assert not any("reject" in kind for kind in pair.repairs)


def test_only_the_last_answers_are_learned() -> None:
    pair = parse({"prompt": [SYSTEM, HI, YES, AND], "chosen": "Two", "rejected": "Three"})
    assert [turn.text for turn in pair.turns if turn.role == "assistant" and turn.learned] == ["Two"]
    assert pair.system == "Be brief."


@pytest.mark.parametrize(("value", "reason", "message"), REJECTED.values(), ids=REJECTED)
def test_an_invalid_pair_is_rejected_by_name(value: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(RejectionError) as rejected:
        parse(value)
    assert rejected.value.rejection.reason == reason
    assert str(rejected.value).startswith(message)


def test_sft_reads_the_chosen_answer_alone() -> None:
    for value, reading in FORMS.values():
        if "rejected_column" not in reading and "q" not in value:
            conversation = parse_conversation(value, RecordLocation("data.jsonl", 1, 0, 0), ReadingSettings())
            assert conversation.turns[-1].text == "Yes"
            assert conversation.rejected is None


RECORDS = [
    {"prompt": [HI, YES, AND], "chosen": "Two {braces}", "rejected": "a much longer answer, which goes on and on"},
    {"prompt": "x", "chosen": "only"},
    {"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "5."},
    {"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "6."},
    {"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "5."},
]


def make_cache(folder: Path, **changes: Any) -> Cache:
    return prepare_records(
        folder, *RECORDS, **{"objective": "dpo", "num_workers": 1, "max_rejected_fraction": None} | changes
    )


def test_both_answers_are_the_targets_of_the_two_sft_examples(tmp_path: Path) -> None:
    """Each answer is encoded as prepare encodes a conversation that ends with it, and the source is stored once."""
    cache = make_cache(tmp_path)
    alone = []
    for name in ("chosen", "rejected"):
        folder = tmp_path / name
        folder.mkdir()
        pairs = [{"prompt": each["prompt"], "completion": each[name]} for each in RECORDS if len(each) == 3]
        alone.append(prepare_records(folder, *pairs, num_workers=1, train_on="last"))
        assert alone[-1].added_tokens == cache.added_tokens
    assert len(cache) == 4
    for pair, chosen, rejected in zip(cache, *alone, strict=True):
        assert isinstance(pair, PreferencePair)
        assert pair.source_S.tolist() == chosen.source_S.tolist() == rejected.source_S.tolist()
        assert pair.target_T.tolist() == chosen.target_T.tolist()
        assert pair.rejected_R.tolist() == rejected.target_T.tolist()
    sources, targets = cache.read_lengths()
    assert sources.tolist() == [len(pair.source_S) for pair in cache]
    assert targets.tolist() == [sum(map(len, pair.targets)) for pair in cache]
    assert cache.read_longest_targets().tolist() == [max(map(len, pair.targets)) for pair in cache]
    stored = (cache.folder / "tokens.bin").stat().st_size // 2
    special = 3 * len(cache)  # the EOS tokens of a source and its answers aren't stored
    assert stored == int(sources.sum() + targets.sum()) - special
    assert cache.manifest["rejected_by_reason"] == {"no_preference": 1}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_duplicate_pair_has_the_same_two_answers(shards: int, tmp_path: Path) -> None:
    values = {"model_name_or_path": "pocket", "data_path": str(write_lines(tmp_path / "data.jsonl", *RECORDS))}
    values |= {"objective": "dpo", "max_rejected_fraction": None, "dedupe": "exact", "output_dir": tmp_path / "cache"}
    for number in range(shards):
        prepare(PrepareSettings(**values, shard=f"{number}/{shards}" if shards > 1 else None))
    cache = open_only(tmp_path / "cache")
    assert cache.manifest["rejected_by_reason"] == {"duplicate": 1, "no_preference": 1}
    assert len(cache) == 3


def test_long_answers_are_cut_or_left_out(tmp_path: Path) -> None:
    cut = make_cache(tmp_path, model_max_length=12)
    pair = cut[0]
    assert len(pair.rejected_R) == 12
    assert pair.rejected_R[-1] != 1
    assert cut.count_cut_tokens()[0] > 0
    assert cut.manifest["truncated_targets"] == 1
    whole = make_cache(tmp_path, model_max_length=12, drop_truncated_targets=True)
    assert (len(whole), whole.manifest["dropped"]) == (3, {"truncated_targets": 1})
    long = make_cache(tmp_path, min_target_tokens=5)
    assert (len(long), long.manifest["dropped"]) == (1, {"short_targets": 3})


def test_inspect_shows_both_answers(tmp_path: Path) -> None:
    example = inspect(InspectSettings(cache=make_cache(tmp_path).folder, example=0)).examples[0]
    assert example.target_text == "Two {braces}"
    assert example.rejected_text == "a much longer answer, which goes on and on"
    assert example.lengths["rejected"] == (len(example.rejected_ids), 0)


def test_pairs_are_mixed_with_pairs_only(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", *RECORDS)
    values: dict[str, Any] = {"model_name_or_path": "pocket", "output_dir": tmp_path / "m", "objective": "orpo"}
    values |= {"max_rejected_fraction": None}
    two = [{"path": str(data), "name": "a"}, {"path": str(data), "name": "b", "weight": 2}]
    prepare(PrepareSettings(**values, data=two, num_workers=1))
    assert open_examples(tmp_path / "m").has_preferences
    two[1]["objective"] = "sft"
    with pytest.raises(SettingsError, match="data: b: objective is sft here and orpo for the run"):
        PrepareSettings(**values, data=two)
    plain = tmp_path / "plain"
    prepare(PrepareSettings(**{**values, "objective": "sft"}, data_path=str(data)).replace(output_dir=plain))
    both = [{"path": str(plain), "name": "a"}, {"path": str(tmp_path / "m" / "b"), "name": "b"}]
    with pytest.raises(DataError, match="has preference pairs, and .* has no preference pairs"):
        prepare(PrepareSettings(model_name_or_path="pocket", output_dir=tmp_path / "n", data=both))


def test_pairs_with_the_same_question_are_held_out_together(tmp_path: Path) -> None:
    records = [
        {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": f"no {other}"}
        for number in range(10)
        for other in range(4)
    ]
    assert len(prepare_records(tmp_path, *records, objective="dpo", num_workers=1, dedupe="exact")) == 40
    training, held_out = open_examples(tmp_path / "cache").split(0.3, split_seed=1)
    asked = [{bytes(pair.source_S) for pair in part} for part in (training, held_out)]
    assert len(asked[1]) == 3
    assert not asked[0] & asked[1]


def test_answers_with_the_same_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    words = " ".join(["word"] * 30)
    pairs = [("a b", "a\u00a0b"), (f"{words} one", f"{words} two"), ("yes", "no")]
    records = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    values = {"objective": "dpo", "num_workers": 1, "model_max_length": 20, "add_tokens": "none"}
    cache = prepare_records(tmp_path, *records, **values)
    assert len(cache) == 1
    assert cache.manifest["dropped"] == {"same_answers": 2}


def test_the_source_column_may_have_turns(tmp_path: Path) -> None:
    value = {"q": [SYSTEM, HI, YES, AND], "good": "Yes", "bad": "No"}
    pair = parse(value, **COLUMNS)
    assert [turn.text for turn in pair.turns] == ["Hi", "Yes", "And?", "Yes"]
    assert (pair.system, pair.rejected, pair.is_pair) == ("Be brief.", "No", False)
    with pytest.raises(RejectionError, match="q: a list of turns, but source_prefix needs a text"):
        parse(value, **COLUMNS, source_prefix="x: ")
    with pytest.raises(RejectionError, match="no column source; .*; name the source column with --source-column"):
        parse({"prompt": "Hi", "chosen": "Yes", "bad": "No"}, rejected_column="bad")
