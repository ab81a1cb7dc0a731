"""prepare in parts: the bytes of one process, for any number of parts in any order."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError, SettingsError, T5TuneError
from t5tune.preparing.parts.join import join_tables
from t5tune.preparing.worker import encode_records
from t5tune.progress import Note
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache, open_only
from tests.support.corpora import MAX_RECORD_BYTES, write_corpus
from tests.support.processes.nfs import flock_on_nfs

pytestmark = pytest.mark.slow

PAIRS = [{"source": f"q {number}", "target": f"a {number % 7}"} for number in range(60)]
CONVERSATION = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
UNUSABLE = {"text": 1}
LABELED_BAD = {**PAIRS[0], "label": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


def make_settings(data: Path, cache: Path, **values: Any) -> PrepareSettings:
    values = {"model_name_or_path": "pocket", "num_workers": 1, "max_rejected_fraction": None, **values}
    return PrepareSettings(data_path=str(data), output_dir=cache, **values)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare_all(data: Path, cache: Path, count: int, **values: Any) -> PrepareResult:
    """Prepare all parts in a random order, and return the last result."""
    order = random.Random(count).sample(range(count), count)
    *others, last = [prepare(make_settings(data, cache, shard=f"{index}/{count}", **values)) for index in order]
    assert not any(result.joined for result in others)
    assert last.joined
    return last


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


# ---------------------------------------------------------------- the same bytes


EVERYTHING = {
    "dedupe": "exact", "eval_fraction": 0.2, "split_long": True, "model_max_length": 40, "max_rejected_fraction": 0.9,
    "min_target_tokens": 3,
}  # fmt: skip
TABLES = ("tokens.bin", "conversations.bin", "examples.bin")


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (EVERYTHING, (1, 3, 8)),
        ({}, (3,)),
        ({"num_data": 150}, (3,)),
        ({"num_data": 250, "dedupe": "exact"}, (8,)),
        ({"num_data": 9999, "add_tokens": "none", "min_target_tokens": 4, "train_on": "last"}, (2,)),
    ],
    ids=["everything", "defaults", "num_data", "num_data and dedupe", "selection"],
)
@pytest.mark.variants("everything", "defaults")
def test_parts_are_joined_to_the_bytes_of_one_process(
    corpus: Path, tmp_path: Path, values: dict[str, Any], counts: tuple[int, ...]
) -> None:
    """Counts and lists of duplicates, and of records that num_data leaves out, may differ."""
    values = {**values, "max_record_bytes": MAX_RECORD_BYTES}
    one = prepare(make_settings(corpus, tmp_path / "one", **values))
    expected = bytes_of(tmp_path / "one")
    assert len(expected) >= 12
    for count in counts:
        folder = tmp_path / str(count)
        folder.mkdir()
        joined = prepare_all(corpus, folder / "cache", count, **values)
        found = bytes_of(folder / "cache")
        if "dedupe" in values or values.get("num_data", 9999) < 9999:
            found, expected = keep_tables(found), keep_tables(expected)
        assert found == expected
        assert [path.name for path in folder.iterdir()] == ["cache"]
        assert (joined.examples, joined.conversations, joined.rejected, joined.truncated_sources) == (
            one.examples, one.conversations, one.rejected, one.truncated_sources,
        )  # fmt: skip


def keep_tables(files: dict[str, bytes]) -> dict[str, bytes]:
    found = {name: content for name, content in files.items() if Path(name).name in TABLES}
    assert len(found) == len(TABLES)
    return found


def test_a_duplicate_of_another_part_is_counted_and_not_listed(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [*PAIRS, UNUSABLE, *PAIRS])
    one = prepare(make_settings(data, tmp_path / "one", dedupe="exact"))
    joined = prepare_all(data, tmp_path / "cache", 2, dedupe="exact")
    assert joined.rejected == one.rejected == 61
    manifests = [open_only(tmp_path / name).manifest for name in ("one", "cache")]
    assert [manifest["rejected_by_reason"] for manifest in manifests] == [{"duplicate": 60, "unknown_format": 1}] * 2
    listed = [(find_cache(tmp_path / name) / "rejected.jsonl").read_text().splitlines() for name in ("one", "cache")]
    assert (len(listed[0]), len(listed[1])) == (61, 1)
    assert listed[1][0] in listed[0]


def test_a_split_duplicate_is_left_out_as_a_whole(tmp_path: Path) -> None:
    """And the conversations that follow keep their ids and their examples."""
    long = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": f"turn {i}"} for i in range(40)]}
    data = write_lines(tmp_path / "data.jsonl", [long, CONVERSATION, long, *PAIRS[:5]])
    values = {"dedupe": "exact", "split_long": True, "model_max_length": 40}
    prepare(make_settings(data, tmp_path / "one", **values))
    prepare_all(data, tmp_path / "cache", 2, **values)
    one, joined = (open_examples(tmp_path / name) for name in ("one", "cache"))
    assert len(one) == len(joined)
    for before, now in zip(one, joined, strict=True):
        assert np.array_equal(before.source_S, now.source_S)
        assert np.array_equal(before.target_T, now.target_T)


def test_more_parts_than_records_and_single_records_are_joined(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS[:3])
    prepare(make_settings(data, tmp_path / "one"))
    prepare_all(data, tmp_path / "cache", 8)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


# ---------------------------------------------------------------- the same errors


@pytest.mark.parametrize(
    ("records", "values"),
    [
        (PAIRS + [CONVERSATION] * 3, {}),
        (PAIRS + [UNUSABLE] * 60, {"max_rejected_fraction": 0.3}),
        ([LABELED_BAD] * 9, {}),
        (PAIRS, {"min_target_tokens": 99, "drop_truncated_targets": True}),
        (PAIRS[:1], {"eval_fraction": 0.5}),
    ],
    ids=["mixed", "rejected", "labeled bad", "dropped", "nothing left"],
)  # fmt: skip
def test_the_error_of_the_join_is_that_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untied_base: Path, records: list[Any], values: dict[str, Any]
) -> None:
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)
    data = write_lines(tmp_path / "data.jsonl", records)
    values = {"model_name_or_path": str(untied_base), "add_tokens": "none", **values}
    with pytest.raises(T5TuneError) as expected:
        prepare(make_settings(data, tmp_path / "one", **values))
    with pytest.raises(T5TuneError) as raised:
        prepare_all(data, tmp_path / "cache", 3, **values)
    message = str(expected.value).replace(f"{tmp_path}/one.rejected", f"{tmp_path}/cache.rejected")
    assert (type(raised.value), str(raised.value)) == (type(expected.value), message)
    assert not (tmp_path / "cache").exists()
    one, parts = (tmp_path / f"{name}.rejected.jsonl" for name in ("one", "cache"))
    assert one.exists() == parts.exists() == ("rejected.jsonl" in message)
    assert not one.exists() or one.read_bytes() == parts.read_bytes()


def test_unreadable_data_is_an_error_of_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)
    data = tmp_path / "data.json"
    data.write_text("[" + ",\n".join(map(json.dumps, PAIRS)) + ", {'a': 1}]")
    assert not prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined
    with pytest.raises(DataError, match=r"data\.json:60: record 60: not valid JSON"):
        prepare(make_settings(data, tmp_path / "cache", shard="1/2"))


# ---------------------------------------------------------------- one part at a time


def test_only_damaged_parts_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    settings = make_settings(data, tmp_path / "cache", shard="1/2")
    first = prepare(settings)
    assert (first.joined, first.shard) == (False, "1/2")
    part = tmp_path / "cache.parts" / "part-1-of-2"
    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.parts.parts.encode_records", None)
        assert prepare(settings).examples == first.examples > 20
    (part / "data" / "tokens.bin").write_bytes(b"\0\0")
    again = prepare(settings)
    assert (again.joined, again.examples) == (False, first.examples)
    assert (part / "data" / "tokens.bin").stat().st_size > 2


def test_join_names_a_part_that_is_missing_or_damaged(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"cache\.parts: contains no complete parts; prepare each part with --shard"):
        prepare(make_settings(data, tmp_path / "cache", join=True))
    for index in (0, 2):
        prepare(make_settings(data, tmp_path / "cache", shard=f"{index}/3"))
    with pytest.raises(DataError, match=r"still missing: 1/3; prepare each of them, for example with --shard 1/3"):
        prepare(make_settings(data, tmp_path / "cache", join=True))
    (tmp_path / "cache.parts" / "part-0-of-3" / "data.records").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"data\.records: missing from the part, or differs from .*; run prepare --shard 0/3 again"
    ):
        prepare(make_settings(data, tmp_path / "cache", shard="1/3"))
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/3")).joined
    assert prepare(make_settings(data, tmp_path / "cache", join=True)).up_to_date


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model_max_length": 99}, "model_max_length: 2048 before, 99 now"),
        ({"shard": "1/4"}, 'shard: "one of 3 parts" before, "one of 4 parts" now'),
        ({"dedupe": "exact"}, 'dedupe: "none" before, "exact" now'),
    ],
)
def test_parts_of_other_settings_are_refused_by_name(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/3"))
    with pytest.raises(T5TuneError, match="part-0-of-3: was made from different inputs") as refused:
        prepare(make_settings(data, tmp_path / "cache", **{"shard": "1/3", **values}))
    assert problem in refused.value.message
    assert f"delete {tmp_path / 'cache.parts'}" in str(refused.value.hint)


def test_parts_with_different_data_or_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/3"))
    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.parts.parts.MADE_BY", "t5tune 99")
        with pytest.raises(T5TuneError, match=r'made_by: "t5tune [\d.]+.*" before, "t5tune 99" now'):
            prepare(make_settings(data, tmp_path / "cache", shard="1/3"))
    write_lines(data, PAIRS[1:])
    with pytest.raises(T5TuneError, match=r"data: data\.jsonl: the content has changed"):
        prepare(make_settings(data, tmp_path / "cache", shard="1/3"))
    part = tmp_path / "cache.parts" / "part-0-of-3" / "part.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"format": 0}))
    with pytest.raises(T5TuneError, match=r"part\.json: format 0; this version of t5tune reads format 3; delete"):
        prepare(make_settings(data, tmp_path / "cache", shard="1/3"))


def test_a_folder_where_the_parts_would_be_is_never_touched(tmp_path: Path) -> None:
    """It may contain the data itself: chats.parts -> chats."""
    for number, names in enumerate(
        (["0.jsonl"], ["part-0-of-2/mine.txt"], ["part-0-of-2"], ["manifest.json", "x.bin"])
    ):
        cache = tmp_path / f"chats{number}"
        folder = tmp_path / f"chats{number}.parts"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_lines(folder / name, PAIRS)
        data = write_lines(tmp_path / f"data{number}.jsonl", PAIRS)
        before = bytes_of(folder)
        for values in ({"shard": "0/2"}, {"shard": "1/2"}):
            with pytest.raises(SettingsError, match="the parts are written there, but it contains .*; move it away"):
                prepare(make_settings(data, cache, **values))
        notes: list[Any] = []
        prepare(make_settings(data, cache), notes.append)
        assert not any(isinstance(note, Note) and "delete" in note.text for note in notes)
        prepare(make_settings(data, cache, shard="0/2"))  # the cache is up to date
        assert bytes_of(folder) == before


def test_a_mount_point_is_refused_before_anything_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "cache")
    with pytest.raises(SettingsError, match="a mount point can't be replaced"):
        prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_parts_that_are_left_or_complete_are_mentioned(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    notes: list[Any] = []
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"), notes.append)
    assert Note("part 0/2 was complete already, so it isn't encoded again") in notes
    prepare(make_settings(data, tmp_path / "cache"), notes.append)
    left = f"{tmp_path / 'cache.parts'}: parts that prepare --shard left; delete the folder if you no longer need them"
    assert Note(left) in notes


def test_two_processes_on_the_same_part_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process completes the part, and all others, while the first one encodes it."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "one"))
    expected = bytes_of(tmp_path / "one")
    cache = tmp_path / "cache"
    for name, others in (("part", ["0/2"]), ("all", ["0/2", "1/2"])):
        with monkeypatch.context() as patch:

            def encode(*arguments: Any, patch: pytest.MonkeyPatch = patch, others: list[str] = others) -> Any:
                patch.undo()
                for shard in others:
                    prepare(make_settings(data, cache, shard=shard))
                return encode_records(*arguments)

            patch.setattr("t5tune.preparing.parts.parts.encode_records", encode)
            first = prepare(make_settings(data, cache, shard="0/2"))
        assert first.joined == (name == "all")
        if name == "part":
            assert prepare(make_settings(data, cache, shard="1/2")).joined
        assert bytes_of(cache) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "one"]
        shutil.rmtree(cache)


@pytest.mark.parametrize("locks", ["as usual", "as on NFS"])
@pytest.mark.parametrize("second", ["join", "0/2", "1/2"])
def test_two_processes_that_join_simultaneously_leave_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, locks: str
) -> None:
    """The second one joins the parts, and deletes them, before the first one reads them."""
    if locks == "as on NFS":
        monkeypatch.setattr("fcntl.flock", flock_on_nfs)
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "one"))
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    others: list[PrepareResult] = []

    def join(*arguments: Any) -> Any:
        if not others:
            others.append(PrepareResult(Path(), *[0] * 10, False, 0.0))
            values = {"join": True} if second == "join" else {"shard": second}
            others[0] = prepare(make_settings(data, tmp_path / "cache", **values))
        return join_tables(*arguments)

    monkeypatch.setattr("t5tune.preparing.parts.parts.join_tables", join)
    first = prepare(make_settings(data, tmp_path / "cache", shard="1/2"))
    assert (first.joined, others[0].joined) == (True, True)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "one"]


@pytest.mark.parametrize(
    ("name", "reason"), [("file/cache", "Not a directory"), ("read_only/cache", "Permission denied")]
)
def test_an_uncreatable_folder_of_parts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    (tmp_path / "file").write_text("")
    (tmp_path / "read_only").mkdir()
    make = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **values: Any) -> None:
        if path.parent.name == "read_only":  # root may write to such folders
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **values)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SettingsError, match=rf"part-0-of-2: can't be created: {reason}; choose another folder"):
        prepare(make_settings(data, tmp_path / name, shard="0/2"))


def test_a_part_in_progress_with_unknown_inputs_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first part of other settings is encoded, the same cache as before is asked for again."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    before = make_settings(data, tmp_path / "cache", shard="0/1")
    assert prepare(before).joined

    def encode(*arguments: Any) -> Any:
        monkeypatch.undo()
        assert prepare(before).up_to_date
        return encode_records(*arguments)

    monkeypatch.setattr("t5tune.preparing.parts.parts.encode_records", encode)
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/2", dedupe="exact")).joined is False
    (part,) = (tmp_path / "cache.parts").iterdir()
    assert part.name == "part-0-of-2"
    assert prepare(make_settings(data, tmp_path / "cache", shard="1/2", dedupe="exact")).joined
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl"]


def test_parts_are_not_read_as_data(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    write_lines(folder / "data.jsonl", PAIRS)
    for index in range(2):
        result = prepare(make_settings(tmp_path / "place" / "**", folder / "cache", shard=f"{index}/2"))
    assert (result.joined, result.conversations) == (True, 60)
