"""prepare in parts: the same bytes, or the same error, as one process, for any number of parts in any order."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.errors import DataError, SettingsError, T5TuneError
from t5tune.io.atomic import hash_file, lock_file
from t5tune.preparing.parts.part import verify_part
from t5tune.preparing.parts.parts import _write_records
from t5tune.preparing.parts.parts_folder import LOCK_FILE, PartsFolder, _list_parts
from t5tune.preparing.worker import encode_records
from t5tune.progress import Note
from t5tune.settings import PrepareSettings
from tests.support.corpora import MAX_RECORD_BYTES, write_corpus
from tests.support.nfs import flock_on_nfs

pytestmark = pytest.mark.slow

PAIRS = [{"source": f"q {number}", "target": f"a {number % 7}"} for number in range(60)]
CONVERSATION = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
UNUSABLE = {"text": 1}
LABELED_BAD = {**PAIRS[0], "label": False}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small data have several blocks, chunks, buckets, runs of copied bytes, and open parts."""
    monkeypatch.setattr("t5tune.preparing.parts.record_range.BLOCK_RECORDS", 7)
    monkeypatch.setattr("t5tune.preparing.parts.join.CHUNK_RECORDS", 5)
    monkeypatch.setattr("t5tune.preparing.parts.join.COPY_BYTES", 100)
    monkeypatch.setattr("t5tune.preparing.parts.join.MAX_OPEN_PARTS", 2)
    monkeypatch.setattr("t5tune.preparing.parts.duplicates.BUCKET_RECORDS", 50)


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
def test_parts_are_joined_to_the_bytes_of_one_process(
    corpus: Path, tmp_path: Path, values: dict[str, Any], counts: tuple[int, ...]
) -> None:
    values = {**values, "max_record_bytes": MAX_RECORD_BYTES}
    one = prepare(make_settings(corpus, tmp_path / "one", **values))
    expected = bytes_of(tmp_path / "one")
    assert len(expected) >= 9
    for count in counts:
        folder = tmp_path / str(count)
        folder.mkdir()
        joined = prepare_all(corpus, folder / "cache", count, **values)
        assert bytes_of(folder / "cache") == expected
        assert [path.name for path in folder.iterdir()] == ["cache"]
        assert (joined.examples, joined.rejected, joined.truncated_sources) == (
            one.examples, one.rejected, one.truncated_sources,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_more_kinds_of_repairs_than_are_counted_are_counted_in_the_order_of_the_data(tmp_path: Path, name: str) -> None:
    records = [{**PAIRS[n % 60], f"field{n % 130}": 1, f"other{n % 13}": 2} for n in range(200)]
    data = write_lines(tmp_path / name, records)
    if name == "data.json":
        data.write_text(json.dumps(records))
    prepare(make_settings(data, tmp_path / "one"))
    prepare_all(data, tmp_path / "cache", 3)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


def test_more_parts_than_records_and_data_of_one_record_are_joined(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS[:3])
    prepare(make_settings(data, tmp_path / "one"))
    prepare_all(data, tmp_path / "cache", 8)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


# ---------------------------------------------------------------- the same errors


def write_array(path: Path, records: list[Any], end: str) -> Path:
    path.write_text("[" + ",\n".join(map(json.dumps, records)) + end)
    return path


@pytest.mark.parametrize(
    ("write", "values"),
    [
        (lambda path: write_lines(path, PAIRS + [CONVERSATION] * 3), {}),
        (lambda path: write_array(path, PAIRS * 2 + [UNUSABLE] + [CONVERSATION], "]"), {"dedupe": "exact"}),
        (
            lambda path: write_lines(path, [UNUSABLE, *PAIRS] + [LABELED_BAD, UNUSABLE] * 5 + PAIRS + [UNUSABLE] * 30),
            {"max_rejected_fraction": 0.05},
        ),
        (
            lambda path: write_lines(path, PAIRS[:30] + PAIRS + [UNUSABLE] * 60),
            {"max_rejected_fraction": 0.3, "dedupe": "exact"},
        ),
        (lambda path: write_array(path, PAIRS, ", {'a': 1}]"), {}),
        (lambda path: write_array(path, PAIRS, ""), {"num_data": 61}),
        (lambda path: write_lines(path, [UNUSABLE, "text"] * 5), {}),
        (lambda path: write_lines(path, [LABELED_BAD] * 9), {}),
        (lambda path: write_lines(path, PAIRS), {"min_target_tokens": 99, "drop_truncated_targets": True}),
        (lambda path: write_lines(path, PAIRS[:1]), {"eval_fraction": 0.5}),
    ],
    ids=[
        "mixed", "mixed in an array", "rejected", "duplicates rejected", "broken", "no end", "unusable", "labeled bad",
        "dropped", "nothing left",
    ],
)  # fmt: skip
def test_the_error_is_that_of_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untied_base: Path,
    write: Callable[[Path], Path],
    values: dict[str, Any],
) -> None:
    monkeypatch.setattr("t5tune.preparing.record_checks.MIN_RECORDS_TO_STOP", 20)
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)
    data = write(tmp_path / "data.json")
    values = {"model_name_or_path": str(untied_base), "add_tokens": "none", **values}
    with pytest.raises(T5TuneError) as expected:
        prepare(make_settings(data, tmp_path / "one", **values))
    settings = [make_settings(data, tmp_path / "cache", shard=f"{index}/3", **values) for index in (2, 0, 1)]
    with pytest.raises(T5TuneError) as raised:
        [prepare(part) for part in settings]
    message = str(expected.value).replace(f"{tmp_path}/one.rejected", f"{tmp_path}/cache.rejected")
    assert (type(raised.value), str(raised.value)) == (type(expected.value), message)
    assert not (tmp_path / "cache").exists()
    one, parts = (tmp_path / f"{name}.rejected.jsonl" for name in ("one", "cache"))
    assert one.exists() == parts.exists() == ("rejected.jsonl" in message)
    assert not one.exists() or one.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("end", ["", ", {'a': 1}]"], ids=["no end", "broken"])
@pytest.mark.variants("broken-1", "broken-2")
def test_an_error_that_one_process_does_not_reach_is_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, num_workers: int
) -> None:
    data = write_array(tmp_path / "data.json", PAIRS, end)
    values = {"num_data": 40, "add_tokens": "none", "num_workers": num_workers}
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)
    prepare(make_settings(data, tmp_path / "one", **values))
    prepare_all(data, tmp_path / "cache", 3, **values)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


# ---------------------------------------------------------------- one part at a time


def test_a_complete_part_is_not_encoded_again_and_a_damaged_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    settings = make_settings(data, tmp_path / "cache", shard="1/2")
    first = prepare(settings)
    assert (first.joined, first.shard) == (False, "1/2")
    part = tmp_path / "cache.parts" / "part-1-of-2"
    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.parts.parts.encode_records", None)
        assert prepare(settings).examples == first.examples > 20
    (part / "tokens.bin").write_bytes(b"\0\0")
    again = prepare(settings)
    assert (again.joined, again.examples) == (False, first.examples)
    assert (part / "tokens.bin").stat().st_size > 2


def test_join_names_a_part_that_is_missing_or_damaged(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"cache\.parts: contains no complete part; prepare each part with --shard I/N"):
        prepare(make_settings(data, tmp_path / "cache", join=True))
    for index in (0, 2):
        prepare(make_settings(data, tmp_path / "cache", shard=f"{index}/3"))
    with pytest.raises(DataError, match=r"still missing: 1/3; prepare each of them, such as with --shard 1/3"):
        prepare(make_settings(data, tmp_path / "cache", join=True))
    (tmp_path / "cache.parts" / "part-0-of-3" / "records.bin").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"records\.bin: differs from what prepare wrote; run prepare --shard 0/3 again"
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
    with pytest.raises(T5TuneError, match="part-0-of-3: was made from other inputs") as refused:
        prepare(make_settings(data, tmp_path / "cache", **{"shard": "1/3", **values}))
    assert problem in refused.value.message
    assert f"delete {tmp_path / 'cache.parts'}" in str(refused.value.hint)


def test_parts_of_other_data_or_of_another_version_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/3"))
    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.parts.parts.MADE_BY", "t5tune 99")
        with pytest.raises(T5TuneError, match=r'made_by: "t5tune [\d.]+.*" before, "t5tune 99" now'):
            prepare(make_settings(data, tmp_path / "cache", shard="1/3"))
    write_lines(data, PAIRS[1:])
    with pytest.raises(T5TuneError, match=r"data: data\.jsonl: another content now"):
        prepare(make_settings(data, tmp_path / "cache", shard="1/3"))
    part = tmp_path / "cache.parts" / "part-0-of-3" / "part.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"format": 0}))
    with pytest.raises(T5TuneError, match=r"part\.json: format 0; this version of t5tune reads format 2; delete"):
        prepare(make_settings(data, tmp_path / "cache", shard="1/3"))


@pytest.mark.parametrize(
    "change", [{"inputs": 3}, {"files": []}, {"examples": None}, {"segments": [[0, True, 0, 9, 3]]}]
)
def test_a_manifest_of_a_part_that_was_edited_is_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    part = tmp_path / "cache.parts" / "part-0-of-2" / "part.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | change))
    for settings in ({"shard": "0/2"}, {"shard": "1/2"}, {"join": True}):
        with pytest.raises(DataError, match=r"part-0-of-2/part\.json: differs from what prepare wrote; delete"):
            prepare(make_settings(data, tmp_path / "cache", **settings))


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
        for values in ({"shard": "0/2"}, {"shard": "1/2"}, {"join": True}):
            with pytest.raises(SettingsError, match="the parts are written there, but it contains .*; move it away"):
                prepare(make_settings(data, cache, **values))
        notes: list[Any] = []
        prepare(make_settings(data, cache), notes.append)
        assert not any(isinstance(note, Note) and "delete" in note.text for note in notes)
        prepare(make_settings(data, cache, shard="0/2"))  # the cache is up to date
        assert bytes_of(folder) == before


def test_a_link_where_the_parts_would_be_is_refused(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache.parts").symlink_to(tmp_path / "disk")
    with pytest.raises(SettingsError, match=r"cache\.parts: the parts are written there, but it is a link"):
        prepare(make_settings(data, tmp_path / "cache", shard="0/2"))


def test_what_would_fail_at_the_join_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    with pytest.raises(SettingsError, match="too long a name for a cache that is prepared in parts; shorten"):
        prepare(make_settings(data, tmp_path / ("c" * 240), shard="0/2"))
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
    left = (
        f"{tmp_path / 'cache.parts'}: parts that prepare --shard left; delete the folder if they aren't needed any more"
    )
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


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_part_that_another_process_completes_before_its_tokenizer_is_loaded_is_left_to_it(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts are taken, and with them the tokenizer that was saved for this one."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    settings = make_settings(data, tmp_path / "cache", shard="0/2", num_workers=num_workers)

    def write(*arguments: Any) -> None:
        monkeypatch.undo()
        assert not prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined
        assert prepare(make_settings(data, tmp_path / "cache", shard="1/2")).joined
        _write_records(*arguments)

    monkeypatch.setattr("t5tune.preparing.parts.parts._write_records", write)
    assert prepare(settings).joined
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl"]


def test_a_part_that_another_process_is_joining_is_left_to_it(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    taken = tmp_path / ".cache.joining-1234"
    (tmp_path / "cache.parts").rename(taken)
    notes: list[Any] = []
    with lock_file(taken / LOCK_FILE):
        result = prepare(make_settings(data, tmp_path / "cache", shard="0/2"), notes.append)
        assert (result.joined, result.examples > 20) == (False, True)
        with pytest.raises(DataError, match="another process is joining them"):
            prepare(make_settings(data, tmp_path / "cache", join=True))
    assert any(isinstance(note, Note) and "another process is joining the parts" in note.text for note in notes)
    assert prepare(make_settings(data, tmp_path / "cache", shard="1/2")).joined  # without the lock, it was killed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl"]


def test_two_processes_that_join_at_the_same_time_leave_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks don't work, the second takes the parts from the first, which then gives up."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "one"))
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    second: list[PrepareResult] = []

    def verify(folder: Path, manifest: dict[str, Any]) -> None:
        if not second:
            second.append(PrepareResult(Path(), *[0] * 9, False, 0.0))
            second[0] = prepare(make_settings(data, tmp_path / "cache", join=True))
        verify_part(folder, manifest)

    monkeypatch.setattr("t5tune.preparing.parts.parts.verify_part", verify)
    monkeypatch.setattr("t5tune.preparing.parts.parts_folder.is_locked", lambda path: False)
    first = prepare(make_settings(data, tmp_path / "cache", shard="1/2"))
    assert (first.joined, second[0].joined) == (False, True)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "one"]


def test_parts_that_are_started_again_while_they_are_joined_are_left_to_the_first_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", flock_on_nfs)
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "one"))
    for index in range(2):
        prepare(make_settings(data, tmp_path / "cache", shard=f"{index}/3"))
    others: list[PrepareResult] = []

    def verify(folder: Path, manifest: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("t5tune.preparing.parts.parts.verify_part", verify_part)
            if not others:
                for index in range(3):
                    others.append(prepare(make_settings(data, tmp_path / "cache", shard=f"{index}/3")))
        verify_part(folder, manifest)

    monkeypatch.setattr("t5tune.preparing.parts.parts.verify_part", verify)
    assert prepare(make_settings(data, tmp_path / "cache", shard="2/3")).joined
    assert [(result.joined, result.up_to_date) for result in others] == [(False, False)] * 3
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "one"]


@pytest.mark.parametrize("num_left", [0, 1])
def test_parts_that_are_put_back_as_soon_as_they_are_taken_are_left_to_that_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_left: int
) -> None:
    """As a process does that starts at this moment, where locks don't work."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "one"))
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    folder, rename = tmp_path / "cache.parts", Path.rename

    def take(path: Path, target: Path) -> None:
        rename(path, target)
        if path == folder:
            folder.mkdir()
            for index in range(num_left, 2):
                name = f"part-{index}-of-2"
                rename(target / name, folder / name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", take)
        assert prepare(make_settings(data, tmp_path / "cache", shard="1/2")).joined is False
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "one"]


def test_parts_are_locked_at_the_moment_when_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    folder, rename = tmp_path / "cache.parts", Path.rename

    def take(path: Path, target: Path) -> None:
        rename(path, target)
        if path == folder:
            PartsFolder(tmp_path / "cache", {}).take_back()  # of a process that starts

    monkeypatch.setattr(Path, "rename", take)
    assert prepare(make_settings(data, tmp_path / "cache", shard="1/2")).joined


@pytest.mark.parametrize("shard", ["1/2", "0/2"])
def test_a_part_is_complete_if_another_process_takes_the_parts_before_their_manifests_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    """Whether the part was encoded just now, or is complete already."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    prepare(make_settings(data, tmp_path / "cache", shard="0/2"))
    folder, taken = tmp_path / "cache.parts", tmp_path / ".cache.joining-1234"
    num_listed = 0

    def list_parts(listed: Path) -> Any:
        nonlocal num_listed
        parts = _list_parts(listed)
        if listed == folder and len(parts) == (2 if shard == "1/2" else 1):
            num_listed += 1
            if num_listed == (1 if shard == "1/2" else 2):
                folder.rename(taken)
        return parts

    monkeypatch.setattr("t5tune.preparing.parts.parts_folder._list_parts", list_parts)
    notes: list[Any] = []
    result = prepare(make_settings(data, tmp_path / "cache", shard=shard), notes.append)
    assert taken.is_dir()
    assert (result.joined, result.examples > 20) == (False, True)
    assert any(isinstance(note, Note) and "another process is joining the parts" in note.text for note in notes)


@pytest.mark.parametrize(
    ("name", "reason"), [("file/cache", "Not a directory"), ("read_only/cache", "Permission denied")]
)
def test_a_folder_of_parts_that_can_not_be_created_is_an_error_that_says_why(
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
    with pytest.raises(SettingsError, match=rf"\.parts: can't be created: {reason}; choose another folder"):
        prepare(make_settings(data, tmp_path / name, shard="0/2"))


def test_a_folder_of_parts_that_another_process_deletes_at_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process does whose part failed, if the folder is empty."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    make, folder = Path.mkdir, tmp_path / "cache.parts"
    num_deleted = 0

    def mkdir(path: Path, *arguments: Any, **values: Any) -> None:
        nonlocal num_deleted
        make(path, *arguments, **values)
        if path == folder and num_deleted == 0:
            num_deleted += 1
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined is False
    assert num_deleted == 1


def test_a_part_is_complete_if_another_process_takes_the_parts_while_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    settings = make_settings(data, tmp_path / "cache", shard="0/2")
    prepare(settings)
    taken = tmp_path / ".cache.joining-1234"

    def hash_taken(path: Path) -> str:
        if not taken.is_dir():
            (tmp_path / "cache.parts").rename(taken)
        return hash_file(path)

    monkeypatch.setattr("t5tune.preparing.parts.part.hash_file", hash_taken)
    monkeypatch.setattr("t5tune.preparing.parts.parts.encode_records", None)
    result = prepare(settings)
    assert (result.joined, result.examples > 20, taken.is_dir()) == (False, True, True)


def test_a_part_in_progress_is_kept_if_its_inputs_may_be_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
