"""prepare with hostile and broken data: each file has an expected outcome, and none needs much memory."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from t5tune.data.reading.cleaning import clean
from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import DataError
from t5tune.preparing.sample import SAMPLE_BYTES
from t5tune.progress import Event, Note
from t5tune.settings import EvaluateSettings, write_settings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.support.caches import find_cache
from tests.support.paths import REPOSITORY, SHARED
from tests.support.processes import runs
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

HI = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}
GOOD = json.dumps({"source": "Hi", "target": "Yes"})
PRETTY = json.dumps({"source": "Hi", "target": "Yes"}, indent=2)
DEEP = '{"source": "Hi", "target": "Yes", "x": ' + "[" * 198 + "]" * 198 + "}"

# file name, content, and the outcome of each record: "" if it is accepted, otherwise the reason
EXPECTED_OUTCOMES: dict[str, tuple[str, bytes | str, list[str]]] = {
    "control character in an unused field": (
        "a.jsonl", '{"source": "Hi", "target": "Yes", "x": ["\\u0001"]}', ["control_character"]),
    "control character in a key": ("a.jsonl", '{"source": "Hi", "target": "Yes", "\\u0001": 1}', ["control_character"]),
    "surrogate in a key": ("a.jsonl", '{"source": "Hi", "target": "Yes", "\\ud800": 1}', ["lone_surrogate"]),
    "200 deep": ("a.jsonl", f"{DEEP}\n{GOOD}", ["", ""]),
    "202 deep": ("a.jsonl", DEEP.replace("[" * 198, "[" * 201).replace("]" * 198, "]" * 201), ["too_deep"]),
    "brackets in a text are not deep": (
        "a.jsonl", json.dumps({"source": "[" * 500, "target": "{" * 500}), [""]),
    "history that is not a list": ("a.jsonl", '{"instruction": "a", "output": "b", "history": 5}', ["bad_turn"]),
    "history of texts": ("a.jsonl", '{"instruction": "a", "output": "b", "history": ["x"]}', ["bad_turn"]),
    "system is an empty list": ("a.jsonl", '{"source": "a", "target": "b", "system": []}', [""]),
    "a duplicate among 100,000 keys": (
        "a.jsonl", "{" + ",".join(f'"{n}":1' for n in range(100_000)) + ',"99999":1}', ["duplicate_key"]),
    "null keys of merged schemas": (
        "a.jsonl", json.dumps({"conversations": None, "messages": [HI, YES], "source": None, "target": None}), [""]),
    "UltraFeedback": (
        "a.jsonl", json.dumps({"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]}), [""]),
    "a preference pair of Alpaca": (
        "a.jsonl", json.dumps({"instruction": "Hi", "chosen": "Yes", "rejected": "No"}), [""]),
    "Alpaca without an answer": ("a.jsonl", json.dumps({"instruction": "Hi", "chosen": None}), ["not_text"]),
    "a preference pair without a prompt": ("a.jsonl", json.dumps({"chosen": [HI, YES], "rejected": [HI, NO]}), [""]),
    "a list per line": ("a.jsonl", f'["a"]\n["b"]\n{GOOD}\n', ["not_an_object", "not_an_object", ""]),
    "a log line first": ("a.jsonl", f"[INFO] starting\n{GOOD}\n", ["not_json", ""]),
    "a dated log line first": ("a.jsonl", f"[2024-01-01 12:00] starting\n{GOOD}\n", ["not_json", ""]),
    "objects over several lines": ("a.json", f"{PRETTY}\n{PRETTY}\n", ["", ""]),
    "an object over several lines that is too long": (
        "a.json", json.dumps({"source": "x" * 20_000, "target": "Yes"}, indent=2), ["too_long"]),
    "a first line that was cut off": ("a.jsonl", f'{{"source": {{\n{GOOD}\n{GOOD}', ["not_json", "", ""]),
    "concatenated files with byte order marks": ("a.jsonl", f"\ufeff{GOOD}\n\ufeff{GOOD}\n", ["", ""]),
    "lines of old Macs": ("a.jsonl", f"{GOOD}\r{GOOD}\r", ["", ""]),
    "a table of old Macs": ("a.csv", "source,target\ra,b\rc,d\r", ["", ""]),
    "a table with an empty first line": ("a.csv", "\n\nsource,target\na,b\n", [""]),
    "a cell that is too long": (
        "a.csv", 'source,target\na,"' + "x y" * 5000 + '"\nc,d\n', ["too_long", ""]),
    "a skippable zstd frame": ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab", []),
}  # fmt: skip


def read_raw(path: Path) -> list[RawRecord]:
    limit = 4 << 20 if path.suffix == ".jsonl" else 10_000
    return list(read_records(find_files([str(path)]), ReadingSettings(max_record_bytes=limit)))


def read(path: Path, **reading: Any) -> list[Conversation | Rejection]:
    return [parse_record(record, ReadingSettings(**reading)) for record in read_raw(path)]


@pytest.mark.parametrize("name", EXPECTED_OUTCOMES)
def test_each_file_gives_the_expected_outcomes(tmp_path: Path, name: str) -> None:
    file, data, expected = EXPECTED_OUTCOMES[name]
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    records, found = read_raw(tmp_path / file), read(tmp_path / file)
    assert [record.reason if isinstance(record, Rejection) else "" for record in found] == expected
    for record, reason in zip(records, expected, strict=True):
        if reason == "too_long":
            assert isinstance(record.data, str)
            assert (len(record.data), record.data in str(data)) == (1000, True)


def test_ignored_fields_of_turns_and_preference_pairs_are_counted(tmp_path: Path) -> None:
    records = [
        {"messages": [HI, {**YES, "name": "x", "weight": None}]},
        {"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": "Other", "chosen": [HI, YES], "rejected": [HI, NO]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    repairs = [record.repairs for record in read(tmp_path / "a.jsonl") if isinstance(record, Conversation)]
    assert repairs == [
        {"ignored_turn_field_name": 1},
        {"ignored_field_rejected": 1},
        {"ignored_field_prompt": 1, "ignored_field_rejected": 1},
    ]


def test_a_preferred_text_needs_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": "Human: Hi Assistant: Yes", "rejected": "x"}))
    (record,) = read(tmp_path / "a.jsonl")
    assert isinstance(record, Rejection)
    assert (record.reason, "a string without a prompt; set source_column" in record.message) == ("no_answer", True)


def test_a_named_format_takes_precedence_over_other_keys(tmp_path: Path) -> None:
    both = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "messages": [HI, YES]}
    (tmp_path / "a.jsonl").write_text(json.dumps(both))
    (record,) = read(tmp_path / "a.jsonl", data_format="openai")
    assert isinstance(record, Conversation)
    assert record.turns[0].text == "Hi"


def test_odd_parquet_cells_are_rejected_only_if_they_are_used(tmp_path: Path) -> None:
    import datetime
    import decimal

    rows = [
        {"source": "a", "target": "b", "n": float("nan"), "d": decimal.Decimal("1.5"), "b": b"\xff", "l": [[1]],
         "t": datetime.datetime(2024, 1, 1)},
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows)
    far = pyarrow.array([2**60], pyarrow.timestamp("ms"))  # a time out of Python's range
    parquet.write_table(table.append_column("far", far), tmp_path / "a.parquet")
    assert isinstance(read(tmp_path / "a.parquet")[0], Conversation)
    for column in ("n", "d", "b", "l", "t", "far"):
        (record,) = read(tmp_path / "a.parquet", source_column=column, target_column="target")
        assert isinstance(record, Rejection)
        assert record.reason == "not_text"


def test_invalid_utf8_in_parquet_rejects_only_its_row(tmp_path: Path) -> None:
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"\xff\xfea")]
    )
    turns = pyarrow.StructArray.from_arrays([texts], ["value"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), turns)
    for table in (
        pyarrow.table({"source": texts, "target": ["a", "b"]}),
        pyarrow.table({"source": ["a", "b"], "target": ["a", "b"], "turns": lists}),
    ):
        parquet.write_table(table, tmp_path / "a.parquet")
        bad, good = read(tmp_path / "a.parquet")
        assert isinstance(good, Conversation)
        assert isinstance(bad, Rejection)
        assert (bad.reason, "the byte 0xFF at character 0" in bad.message) == ("invalid_utf8", True)
        assert "\\udcff\\udcfe" in json.dumps(read_raw(tmp_path / "a.parquet")[0].data)


def test_parquet_rows_have_a_size_limit(tmp_path: Path) -> None:
    rows = [{"source": None, "n": [1], "target": size * 'é"'} for size in (10, 1_000_000, 30)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", source_column="target", target_column="target")
    assert [isinstance(record, Rejection) for record in found] == [False, True, False]
    long = read_raw(tmp_path / "a.parquet")[1]
    assert long.data == json.dumps(rows[1])[:1000]
    # a byte each in Parquet, but eight in a record
    numbers = pyarrow.array([[1] * 2000, [1]], pyarrow.list_(pyarrow.int8()))
    texts = pyarrow.array([f"{number} {'x' * 6000}" for number in range(2)]).dictionary_encode()
    parquet.write_table(pyarrow.table({"source": texts, "target": texts, "n": numbers}), tmp_path / "a.parquet")
    assert [isinstance(record, Rejection) for record in read(tmp_path / "a.parquet")] == [True, True]
    short = pyarrow.array([f"{number} {'x' * 1000}" for number in range(30)]).dictionary_encode()
    parquet.write_table(pyarrow.table({"source": short, "target": short}), tmp_path / "a.parquet")
    assert [isinstance(record, Rejection) for record in read(tmp_path / "a.parquet")] == [False] * 30
    table = pyarrow.table({"source": ["a", "b"], "target": ["a", "b"], "n": numbers})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [isinstance(record, Rejection) for record in read(tmp_path / "a.parquet")] == [True, False]


@pytest.mark.slow
def test_skipped_files_of_a_folder_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "._a.jsonl").write_bytes(b"\0")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to("..")
    (tmp_path / "deep" / "again").symlink_to(".")
    (tmp_path / "deep" / "b.jsonl").write_text(GOOD)
    os.mkfifo(tmp_path / "pipe.jsonl")
    events: list[Event] = []
    assert find_files([str(tmp_path)], events.append) == [tmp_path / "a.jsonl"]
    (note,) = events
    assert isinstance(note, Note)
    for name in ("._a.jsonl (hidden)", "deep (a folder)", "pipe.jsonl (not a regular file)"):
        assert name in note.text
    assert find_files([f"{tmp_path}/**/*.jsonl"]) == [tmp_path / "a.jsonl", tmp_path / "deep" / "b.jsonl"]
    for wrong, message in (
        ("", "empty"),
        (str(tmp_path / "pipe.jsonl"), "not a regular file"),
        ("a" * 5000, "can't be read"),
        (__file__, r"\.py: expected one of"),
    ):
        with pytest.raises(DataError, match=message):
            find_files([wrong])
    assert prepare(tmp_path / "deep", "--data-path", tmp_path / "a.jsonl").code == 0
    events.clear()
    assert len(find_files([f"{tmp_path}/**/*.json*"], events.append)) == 2
    assert "rejected.jsonl (part of a token cache)" in str(events)
    output = tmp_path / "scores"
    output.mkdir()
    write_settings(output, EvaluateSettings(model_name_or_path="pocket", data_path="a.jsonl"))
    (output / "predictions.jsonl").write_text('{"source": "a", "target": "b"}')
    events.clear()
    assert output / "predictions.jsonl" not in find_files([f"{tmp_path}/**/*.jsonl"], events.append)
    assert "predictions.jsonl (t5tune wrote it)" in str(events)
    assert find_files([str(output / "predictions.jsonl")]) == [output / "predictions.jsonl"]
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match=r"\.parquet\.gz: expected"):
        find_files([str(tmp_path / "a.parquet.gz")])


def test_cleaning_keeps_code_and_mathematics_and_leaves_hostile_html_alone() -> None:
    from collections import Counter

    text = "```html\n<p>a &lt; b\\_c</p>\n    x\n```\nand \\_y\\_ \\[ a\\_b \\] $x\\_1$ &amp;\n    indented <br> </p>"
    repairs: Counter[str] = Counter()
    cleaned = clean(text, repairs)
    assert cleaned == text.replace("\\_y\\_", "_y_").replace("&amp;", "&")
    assert repairs == {"html_entities": 1, "markdown_escapes": 2}
    for hostile in (
        "<div>" * 3000, "<p>a" * 100_000, "<div>" + "<!--" * 10_000, "<p>" + "<pre></x>" * 1500,
        "<p>" + "<b><!--</b>-->" * 3000, "<p><![no [ HTML", "<p>a <!-- b", "<p>a <!b", "<p>a <?b",
    ):  # fmt: skip
        assert clean(hostile, repairs) == hostile
    for slow in ("\\[" * 200_000, "$" * 200_001, "`\n" * 200_000, "<p>x</p>" + " \n" * 100_000):
        clean(slow, repairs)  # must not take forever


# ---------------------------------------------------------------- long texts

LONG = st.text(
    st.one_of(
        st.sampled_from("ab hx.,  \n\t{<=>_-0"),
        st.sampled_from("\u00a0\u200d\u0301\u3000ﬁ½①한글ü\u1100\u1161😀\u0e33▁ش\ufc5e猫é\u00b8"),
    ),
    min_size=1,
    max_size=60,
)


@pytest.mark.slow
@pytest.mark.parametrize("base", [REPOSITORY / "t5tune" / "pocket", SHARED / "tokenizer" / "flan-t5-base"], ids=str)
@pytest.mark.parametrize("add", ["auto", "none", "fastchat", "a b"])
def test_encoding_a_long_text_in_parts_changes_no_ids(base: Path, add: str) -> None:
    if not base.exists():
        pytest.skip("the real inputs are not next to this checkout")
    encoder = make_encoder(extend_tokenizer(load_tokenizer(base), [add], 32128 if "flan" in base.name else 1536)[0])

    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(text=LONG | st.lists(st.sampled_from(["xxx", "</s>", "  ", "a b", "\n    ", "é"]), min_size=1).map("".join),
           first=st.booleans())  # fmt: skip
    def holds(text: str, first: bool) -> None:
        begun = Beginning(text) if first else text
        (whole,) = encoder.encode([begun])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("t5tune.data.tokens.encoders.PART_LENGTH", 6)
            (parts,) = encoder.encode([begun])
        assert parts.tolist() == whole.tolist()

    holds()


PEAK = """
import sys
from pathlib import Path
from t5tune.cli import run
code = run(sys.argv[1:])
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024, file=sys.stderr)
sys.exit(code)
"""
MILLION = 1_000_000
HEAVY: dict[str, tuple[str, bytes]] = {
    "commas": ("a.json", b"[" + b"," * 4 * MILLION),
    "lines": ("a.jsonl", GOOD.encode() + b"\n" + b"1\n" * 200_000),
    "words": ("a.jsonl", json.dumps({"source": "Hi", "target": "a b " * MILLION}).encode()),
    "marks": ("a.jsonl", json.dumps({"source": "cafe\u0301 x " * 350_000, "target": "b"}, ensure_ascii=False).encode()),
    "cells": ("a.csv", b"source,target\na,b\n" + (b'a,"' + b"x y" * 1_700_000 + b'"\n') * 10),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in ("lines", "words") else []) for name in HEAVY]
)
@pytest.mark.variants("cells", "commas")
def test_no_input_needs_much_memory(tmp_path: Path, name: str) -> None:
    file, data = HEAVY[name]
    (tmp_path / file).write_bytes(data)
    command = ["prepare", "--model-name-or-path", "pocket", "--data-path", tmp_path / file, "--num-workers", "1"]
    command += ["--max-rejected-fraction", "1"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, command), "--output-dir", tmp_path / "cache"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == (2 if name == "commas" else 0), done.stderr
    assert int(done.stderr.split()[-1]) < 250


# ---------------------------------------------------------------- the whole command


def prepare(tmp_path: Path, *arguments: Any, **more: Any) -> CommandResult:
    given = ("--model-name-or-path", "pocket", "--output-dir", tmp_path / "cache")
    return t5tune_in_fork("prepare", *given, *arguments, **more)


@pytest.mark.slow
def test_errors_are_one_line_whatever_the_value(tmp_path: Path) -> None:
    data = tmp_path / "a\nb.jsonl"
    data.write_text(json.dumps({"x\x7f" * 100_000: 1}))
    done = prepare(tmp_path, "--data-path", data)
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert "a\\nb.jsonl" in line
    assert len(line) < 4000


@pytest.mark.slow
def test_file_names_that_are_not_unicode_are_kept(tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    data.write_text(f"{GOOD}\n{GOOD}")
    done = prepare(tmp_path, "--data-path", data, "--dedupe", "exact")
    assert done.code == 0, done.stderr
    manifest = json.loads((find_cache(tmp_path / "cache") / "manifest.json").read_text())
    assert manifest["inputs"]["data"][0]["file"] == "\udcff.jsonl"
    assert "\udcff.jsonl:1" in json.loads((find_cache(tmp_path / "cache") / "rejected.jsonl").read_text())["message"]


@pytest.mark.slow
def test_a_cache_in_a_linked_folder_is_written_and_checked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{GOOD}\n{{"x": 1}}')
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")
    done = prepare(tmp_path, "--data-path", tmp_path / "a.jsonl", "--max-rejected-fraction", "1")
    assert done.code == 0, done.stderr
    assert (tmp_path / "cache").is_symlink()
    assert (find_cache(tmp_path / "real") / "manifest.json").is_file()
    # the cache is up to date, but now too many records are rejected
    done = prepare(tmp_path, "--data-path", tmp_path / "a.jsonl")
    assert (done.code, "more than max_rejected_fraction" in done.stderr) == (2, True)
    done = prepare(tmp_path, "--data-path", tmp_path / "cache")
    assert (done.code, "is already a token cache" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_path_without_conversations_is_refused(tmp_path: Path) -> None:
    for name, text in (("good", GOOD), ("copy", GOOD), ("facts", '{"x": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(text)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "good.jsonl").write_text(GOOD)
    (tmp_path / "mixed" / "facts.jsonl").write_text('{"x": 1}')
    paths = [tmp_path / name for name in ("good", "copy", "mixed")]
    # a file with only duplicates counts as a file with conversations
    allowed = "--max-rejected-fraction", "1"
    done = prepare(tmp_path, "--dedupe", "exact", "--json", *allowed, "--data-path", *paths)
    assert done.code == 0, done.stderr
    assert (done.json["conversations"], done.json["rejected"]) == (1, 3)
    assert f"nothing to train on in {tmp_path / 'mixed' / 'facts.jsonl'}\n" in done.stderr
    before = (find_cache(tmp_path / "cache") / "manifest.json").read_bytes()
    for facts in (tmp_path / "facts", tmp_path / "mixed" / "facts.jsonl", f"{tmp_path}/*/facts*"):
        done = prepare(tmp_path, *allowed, "--data-path", *paths, facts)
        assert (done.code, len(done.errors)) == (2, 1)
        assert f"data_path: {facts}: contains nothing to train on" in done.errors[0]
        assert "facts.jsonl:1: its keys are x" in done.errors[0]
        assert (find_cache(tmp_path / "cache") / "manifest.json").read_bytes() == before


# more than prepare looks at before it writes
SAMPLED = json.dumps({"source": "Hi", "target": "Yes", "unused": "x" * (SAMPLE_BYTES // 80)}).encode() + b"\n"
NUM_SAMPLED = 90


def start_waiting_prepare(tmp_path: Path, number: signal.Signals, handler: signal.Handlers) -> subprocess.Popen[bytes]:
    """Start a prepare process that is writing its cache and waits for more input, with this handler for the signal."""
    command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", "pocket", "--data-path", "-"]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [*command, "--output-dir", tmp_path / "cache", "--num-workers", "2", "--json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=lambda: signal.signal(number, handler),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(SAMPLED * NUM_SAMPLED)
    process.stdin.flush()
    deadline = time.monotonic() + 100
    while not any(tmp_path.glob(".cache.new-*/*/tokens.bin")):
        assert time.monotonic() < deadline, "prepare has written nothing"
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] if runs.LONG else [signal.SIGHUP])
def test_a_signal_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    process = start_waiting_prepare(tmp_path, number, signal.SIG_DFL)
    process.send_signal(number)
    result, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert json.loads(result) == {"error": {"kind": "Interrupted", "message": "interrupted", "hint": None}}
    *progress, last = errors.decode().splitlines()
    assert last == "interrupted"
    assert all(line.startswith("prepare: ") for line in progress)  # there is progress only on a slow machine
    assert not any((tmp_path / "tmp").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


@pytest.mark.long
def test_prepare_under_nohup_survives_its_terminal(tmp_path: Path) -> None:
    process = start_waiting_prepare(tmp_path, signal.SIGHUP, signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(GOOD.encode(), timeout=100)
    assert process.returncode == 0, errors
    assert (find_cache(tmp_path / "cache") / "manifest.json").is_file()


@pytest.mark.slow
def test_a_closed_standard_output_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", "pocket", "--quiet"]
    command += ["--data-path", str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "cache")]
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 1
    assert closed.stderr.startswith("error: standard output is closed")
