"""The sample of the data: parsed once, encoded as all other records are, and what chooses the default template."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.reading import raw_records
from t5tune.data.tokens.templates import Template, load_template
from t5tune.errors import DataError, SettingsError
from t5tune.preparing import sample
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache, prepare_for_run

pytestmark = pytest.mark.slow

LONG = "two hats, " * 100
RECORDS = [
    {"source": LONG, "target": "猫 {x}"},
    {"text": "not a conversation"},
    {"source": LONG, "target": "猫 {x}", "id": 2},
    {"source": LONG + "😀", "target": "Yes"},  # takes four times as much memory as the record, which is kept instead
]


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("dedupe", ["none", "exact"])
def test_a_sampled_record_gives_the_same_files_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedupe: str
) -> None:
    parsed: list[bytes] = []
    parse_json = raw_records.parse_json

    def parse_and_count(data: bytes) -> Any:
        parsed.append(data)
        return parse_json(data)

    monkeypatch.setattr(raw_records, "parse_json", parse_and_count)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS))
    values = {"model_name_or_path": "pocket", "data_path": str(tmp_path / "data.jsonl"), "num_workers": 1}
    values |= {"max_rejected_fraction": None}
    files, counts = [], []
    for name, size in (("sampled", 8 << 20), ("first", 1)):
        monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", size)
        parsed.clear()
        prepare(PrepareSettings(**values, output_dir=tmp_path / name, dedupe=dedupe))
        files.append(read_files(find_cache(tmp_path / name)))
        counts.append(len(parsed))
    assert files[0] == files[1]
    # records of the sample whose conversation takes more memory, or that may still be rejected, are parsed again, and
    # the first records are parsed to find similar labels
    assert counts == ({"none": [9, 5], "exact": [11, 6]}[dedupe])


def test_similar_labels_are_found_far_below_the_first_records(tmp_path: Path) -> None:
    labels = [*["Spam", "ham"] * 2_000, "spam"]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"source": "a", "target": each}) for each in labels))
    warnings: list[str] = []
    values = {"model_name_or_path": "pocket", "data_path": str(tmp_path / "data.jsonl")}
    settings = PrepareSettings(**values, output_dir=tmp_path / "cache")
    prepare(settings, lambda event: warnings.append(event.text) if isinstance(event, Note) and event.warning else None)
    assert any("only in case or spaces are different labels: 'Spam', 'spam'" in text for text in warnings), warnings


# ---------------------------------------------------------------- the default conversation template

CHAT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
PAIRS: dict[str, Any] = {
    "source/target": {"source": "Hi", "target": "Yes"},
    "columns": {"q": "Hi", "a": "Yes"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes", "history": []},
    "prompt/completion": {"prompt": "Hi", "completion": "Yes"},
    "a pair of answers": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
}
CONVERSATIONS: dict[str, Any] = {
    "sharegpt": CHAT,
    "openai": {"messages": [HI, YES]},
    "alpaca with history": {"instruction": "Hi", "output": "Yes", "history": [["A", "B"]]},
    "prompt/completion of messages": {"prompt": [HI], "completion": [YES]},
    "a pair of conversations": {"chosen": [HI, YES], "rejected": [HI, YES]},
    "source/target with turns": {"source": [HI, YES, HI], "target": "Yes"},
    "columns with turns": {"q": [HI, YES, HI], "a": "Yes"},
    "columns with a single turn": {"q": [HI], "a": "Yes"},
}


def prepare_template(base: Path, folder: Path, *files: list[Any], **changes: Any) -> tuple[Template, list[str]]:
    """Prepare files of records; return the cache's conversation template and the notes about it."""
    paths = [folder / f"{number}.jsonl" for number in range(len(files))]
    for path, records in zip(paths, files, strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    events: list[Event] = []
    output = folder / "cache"
    values = {"model_name_or_path": str(base), "data_path": list(map(str, paths)), "output_dir": output}
    values |= {"max_rejected_fraction": None, **changes}
    prepare(PrepareSettings(**values), events.append)
    notes = [event.text for event in events if isinstance(event, Note) and "conversation template" in event.text]
    return load_template(str(output / "template.yaml")), notes


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_get_the_plain_template_with_a_note(untied_base: Path, tmp_path: Path, name: str) -> None:
    columns = {"source_column": "q", "target_column": "a"} if name == "columns" else {}
    template, notes = prepare_template(untied_base, tmp_path, [PAIRS[name]] * 2, **columns)
    assert template == load_template("plain")
    assert notes == [
        "conversation template plain: the data is source/target pairs; "
        "--conversation-template chooses a different template"
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_get_fastchats_template_without_a_note(untied_base: Path, tmp_path: Path, name: str) -> None:
    columns = {"source_column": "q", "target_column": "a"} if name.startswith("columns") else {}
    made = prepare_template(untied_base, tmp_path, [CONVERSATIONS[name]], **columns)
    assert made == (load_template("fastchat-t5"), [])


def test_pairs_use_a_given_or_the_bases_template(untied_base: Path, tmp_path: Path) -> None:
    pair = PAIRS["source/target"]
    for base, changes, expected in (
        (untied_base, {"conversation_template": "fastchat-t5"}, "fastchat-t5"),
        (Path("pocket"), {}, "turns"),
    ):
        (tmp_path / expected).mkdir()
        note = "conversation template: the model's own; --conversation-template plain passes only the source"
        notes = [note] if base == Path("pocket") else []
        assert prepare_template(base, tmp_path / expected, [pair], **changes) == (load_template(expected), notes)
    (tmp_path / "conversations").mkdir()
    assert prepare_template(Path("pocket"), tmp_path / "conversations", [CHAT]) == (load_template("turns"), [])


def test_a_used_cache_keeps_the_earlier_default_template(untied_base: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": str(untied_base), "output_dir": tmp_path / "cache"}
    values["data_path"] = str(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text(json.dumps(PAIRS["source/target"]))
    prepare(PrepareSettings(**values, conversation_template="fastchat-t5"))
    used = {"checkpoint": tmp_path / "run/checkpoint-1"}
    assert prepare_for_run(PrepareSettings(**values), **used)["up_to_date"]
    with pytest.raises(SettingsError, match='template: ".*" before, ".*" now'):
        prepare_for_run(PrepareSettings(**values, conversation_template="plain"), **used)
    assert not prepare(PrepareSettings(**values)).up_to_date
    assert load_template(str(tmp_path / "cache" / "template.yaml")) == load_template("plain")


def test_mixed_data_gets_fastchats_template_in_any_order(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1)  # so that later files aren't part of the sample
    pair = PAIRS["source/target"]
    for number, files in enumerate(([[pair] * 2, [{"text": 1}, CHAT]], [[CHAT], [pair] * 2])):
        (tmp_path / str(number)).mkdir()
        template, notes = prepare_template(untied_base, tmp_path / str(number), *files, num_workers=1 + number)
        assert template == load_template("fastchat-t5")
        assert notes == [
            "conversation template fastchat-t5: 2 of 3 records are source/target pairs; --conversation-template "
            "chooses a different template"
        ]


def test_a_conversation_after_many_pairs_is_refused_with_location(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 1)
    with pytest.raises(DataError, match=r"0\.jsonl:3: a conversation, after 2 source/target pairs") as caught:
        prepare_template(untied_base, tmp_path, [PAIRS["source/target"], PAIRS["alpaca"], CHAT])
    assert caught.value.hint == "choose one template for both: --conversation-template fastchat-t5 or plain"
    assert not (tmp_path / "cache").exists()


def test_rejected_records_do_not_choose_the_template(untied_base: Path, tmp_path: Path) -> None:
    bad = {"conversations": "none"}
    assert prepare_template(untied_base, tmp_path, [bad, PAIRS["alpaca"]])[0] == load_template("plain")
