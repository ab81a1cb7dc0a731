"""prepare: selection of examples, counts, and lost characters."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import DataError
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import Prepared, record
from tests.support.caches import find_cache, open_only

pytestmark = pytest.mark.slow


@pytest.fixture
def prepared(prepared: Prepared) -> Prepared:
    return partial(prepared, base=Path("pocket"))


def decode_targets(cache: Cache) -> list[str]:
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    return [tokenizer.decode(example.target_T.tolist()[:-1]) for example in cache]


# ---------------------------------------------------------------- selection


def test_train_on_last_keeps_only_the_last_target(prepared: Prepared) -> None:
    records = [record("Hi", "a", "And?", "b"), record("Hi", "c")]
    assert decode_targets(prepared(*records)[1]) == ["a", "b", "c"]
    _, cache = prepared(*records, train_on="last")
    assert decode_targets(cache) == ["b", "c"]
    assert "a" in load_tokenizer(cache.tokenizer_folder).decode(cache[0].source_S.tolist())


def test_min_target_tokens_leaves_out_short_targets_and_counts_them(prepared: Prepared) -> None:
    records = [record("Hi", "Yes"), record("Hi", "Yes, the lamp is on the table")]
    assert prepared(*records)[0].examples == 2
    result, cache = prepared(*records, min_target_tokens=6)
    assert (result.conversations, result.examples) == (2, 1)
    assert decode_targets(cache) == ["Yes, the lamp is on the table"]
    assert cache.manifest["dropped"] == {"short_targets": 1}


def test_drop_truncated_targets_leaves_out_targets_that_are_too_long(prepared: Prepared) -> None:
    records = [record("Hi", "lamp " * 60), record("Hi", "Yes")]
    assert prepared(*records, model_max_length=32)[0].truncated_targets == 1
    result, cache = prepared(*records, model_max_length=32, drop_truncated_targets=True)
    assert (result.truncated_targets, decode_targets(cache)) == (0, ["Yes"])
    assert cache.manifest["dropped"] == {"truncated_targets": 1}


def test_dedupe_rejects_conversations_with_the_same_texts(prepared: Prepared) -> None:
    records = [record("Hi", "a", id=1), record("Hi", "b"), record("Hi", "a", id=2), record("Hi", "a", "And?", "b")]
    assert prepared(*records)[0].rejected == 0
    result, cache = prepared(*records, dedupe="exact")
    assert (result.conversations, result.rejected) == (3, 1)
    (line,) = [json.loads(line) for line in (find_cache(cache.folder) / "rejected.jsonl").read_text().splitlines()]
    assert (line["reason"], line["line"], line["record"]) == ("duplicate", 3, records[2])
    assert "data.jsonl:1" in line["message"]


@pytest.mark.parametrize("shards", [1, 2])
def test_conversations_with_different_learned_answers_are_no_duplicates(tmp_path: Path, shards: int) -> None:
    def chat(*weights: int) -> dict[str, Any]:
        one, two = ({"role": "assistant", "content": text, "weight": n} for text, n in zip("ab", weights, strict=True))
        question = {"role": "user", "content": "Hi"}
        return {"messages": [question, one, question, two]}

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [chat(1, 0), chat(0, 1), chat(1, 0), chat(0, 1), record("Hi", "c")])))
    values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": tmp_path / "cache"}
    for number in range(shards):
        shard = {"shard": f"{number}/{shards}"} if shards > 1 else {}
        prepare(PrepareSettings(**values, dedupe="exact", num_workers=1, **shard))
    cache = open_only(tmp_path / "cache")
    assert decode_targets(cache) == ["a", "b", "c"]
    assert cache.manifest["rejected_by_reason"] == {"duplicate": 2}
    keys = cache.read_keys()  # the keys decide which conversations are held out
    assert keys[0] == keys[1] != keys[2]


def test_answers_with_and_without_the_prefix_are_no_duplicates(prepared: Prepared) -> None:
    records = [{"source": "a", "target": target} for target in ("Q: b", "b", "Q: b")]
    result, cache = prepared(*records, dedupe="exact", source_prefix="Q: ")
    assert (decode_targets(cache), result.rejected) == (["Q: b", "b"], 1)


def test_split_long_splits_a_conversation_into_parts_that_fit(prepared: Prepared) -> None:
    texts = [f"{'lamp ' * 10}{number}" for number in range(16)]
    long = record(*texts, system="Be brief.")
    result, cache = prepared(long, record("Hi", "Yes"), model_max_length=100, split_long=True)
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    assert (result.conversations, result.examples, result.truncated_sources) == (2, 9, 0)
    assert cache.manifest["repaired"] == {"split_conversations": 1}
    fresh_parts = 0
    for number, example in enumerate(cache.take(8)):
        source = tokenizer.decode(example.source_S.tolist()[:-1])
        assert source.startswith("Be brief. Human: " + "lamp ")
        kept = [index for index in range(0, 2 * number + 1) if source.find(f"{texts[index]} ") >= 0]
        assert kept == list(range(kept[0], 2 * number + 1))
        assert kept[0] % 2 == 0
        fresh_parts += kept[0] == 2 * number
        assert len(example.source_S) + len(example.target_T) <= 101
    assert 2 < fresh_parts < 8  # some parts start without the previous turns, but only as many as necessary
    whole, _ = prepared(long, model_max_length=1000, split_long=True)
    assert whole.examples == 8


def test_positions_are_correct_beyond_65535_tokens(prepared: Prepared) -> None:
    _, cache = prepared(record("Hi", "Yes"), record("Hi", "a", "lamp " * 70_000 + "here", "b", "And?", "c"))
    assert decode_targets(cache) == ["Yes", "a", "b", "c"]
    assert load_tokenizer(cache.tokenizer_folder).decode(cache[2].source_S.tolist()).endswith("here Assistant:</s>")


def test_too_many_rejected_records_stop_prepare(prepared: Prepared, tmp_path: Path) -> None:
    records = [record("Hi", "Yes")] * 3 + [{"text": 1}]
    assert prepared(*records, max_rejected_fraction=0.25)[0].rejected == 1
    with pytest.raises(DataError, match=r"1 of 4 records rejected \(unknown format: 1\)") as caught:
        prepared(*records, max_rejected_fraction=0.2, output_dir=tmp_path / "other")
    assert "data.jsonl:4" in str(caught.value.hint)
    assert not (tmp_path / "other").exists()


def test_num_data_reads_only_as_many_records_as_needed(prepared: Prepared) -> None:
    result, cache = prepared(*[record("Hi", f"{n}", "And?", f"{n}") for n in range(50)], {"text": 1}, num_data=5)
    assert (result.examples, result.conversations, result.rejected) == (5, 3, 0)
    assert decode_targets(cache) == ["0", "0", "1", "1", "2"]


def test_the_cache_is_split_by_prepares_eval_fraction(prepared: Prepared, tmp_path: Path) -> None:
    records = [record("Hi", f"{n % 10}", "And?", f"{n % 10}") for n in range(20)]  # each conversation twice
    result, cache = prepared(*records, eval_fraction=0.3, split_seed=3)
    training, held_out = open_examples(tmp_path / "cache").split_as_prepared()
    assert held_out is not None
    assert len(training) + len(held_out) == 40
    assert len(held_out) == result.held_out == 12  # 3 of 10 conversations, each with two copies of two targets
    assert not set(decode_targets(training)) & set(decode_targets(held_out))
    assert prepared(*records)[0].held_out is None
    assert open_examples(tmp_path / "cache").split_as_prepared()[1] is None
    with pytest.raises(
        DataError,
        match="leaves no conversations to train on; give more conversations, or a separate file as eval_data_path",
    ):
        prepared(record("Hi", "a"), eval_fraction=0.5)


# ---------------------------------------------------------------- vocabulary


def test_the_manifest_counts_characters_that_cannot_be_encoded(prepared: Prepared) -> None:
    records = [record("猫?", "猫 猫 ½"), record("Hi", "a 猫"), record("Hi", "Yes"), record("Hi", "tab\there")]
    _, cache = prepared(*records, add_tokens="none")
    lost = {item["text"]: item for item in cache.manifest["lost_characters"]}
    assert lost["猫"] == {"text": "猫", "becomes": "\ufffd", "count": 3, "answers": 2}
    assert (lost["\t"]["becomes"], lost["\t"]["answers"]) == (" ", 1)
    assert lost["½"]["becomes"] in {"1⁄2", "\ufffd"}
    _, cache = prepared(*records)
    assert "猫" not in {item["text"] for item in cache.manifest["lost_characters"]}


def test_auto_adds_target_characters_and_reports_those_without_rows(prepared: Prepared) -> None:
    _, cache = prepared(record("Hi", "猫 ≥ 3"), record("Hi", "猫"), *[record("Hi", "Yes")] * 100)
    assert {"猫", "≥", "\n", "{"} <= set(cache.added_tokens)
    assert decode_targets(cache)[0] == "猫 ≥ 3"
    rare, cache = prepared(record("Hi", "猫"), *[record("Hi", "Yes")] * 300)
    assert "猫" not in cache.added_tokens
    assert rare.unknown_tokens == 1
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 60)))
    events: list[Event] = []
    _, cache = prepared(record("Hi", many), report=events.append)
    (note,) = [event.text for event in events if isinstance(event, Note) and "unused embedding row" in event.text]
    assert f" and {len(cache.manifest['left_out_tokens']) - 5} more; models with more rows: umT5 (84)" in note
    assert len(cache.added_tokens) == 1536 - 1497
    assert set(cache.added_tokens) | set(cache.manifest["left_out_tokens"]) == {*many, *"\n\t<\\^`{}~"}


def test_characters_of_human_turns_get_no_row(prepared: Prepared) -> None:
    _, cache = prepared(*[record("猫?", "Yes")] * 3)
    assert "猫" not in cache.added_tokens
