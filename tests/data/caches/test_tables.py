"""A token cache whose author has written wrong values, with the right hashes, is refused when it is opened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches import tables
from t5tune.data.caches.cache import hash_files, open_cache
from t5tune.data.caches.tables import CONVERSATION_DTYPE, EXAMPLE_DTYPE, check_tables, map_tables
from t5tune.data.tokens.encoding import Span
from t5tune.data.tokens.tokenizer import SpecialIds
from t5tune.errors import DataError
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache, open_only

DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "targets": ([{"source": f"Two teas {i}", "target": f"Yes {i}"} for i in range(8)], {}),
    "pairs": (
        [{"prompt": f"Two teas {i}", "chosen": "Yes", "rejected": f"No {i}"} for i in range(8)],
        {"objective": "dpo"},
    ),
    "raw text": (
        [{"text": f"Two teas for {i} people, please. " * 9} for i in range(8)],
        {"objective": "span-corruption"},
    ),
    "labels": (
        [{"tokens": ["Two", "teas", str(i)], "tags": ["N", "O", "N"]} for i in range(8)],
        {"objective": "tag", "source_column": "tokens", "target_column": "tags"},
    ),
    "several labels": (
        [{"source": f"Two teas {i}", "target": ["N", "O"]} for i in range(8)],
        {"objective": "classify"},
    ),
    "numbers": ([{"source": f"Two teas {i}", "target": i / 2} for i in range(8)], {"objective": "regress"}),
}
SPAN, IDS = "examples.bin: a row's span doesn't fit", "tokens.bin: an id isn't in the tokenizer"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    for kind, (records, settings) in DATA.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": folder / kind}
        prepare(PrepareSettings(**values, **settings))
    return folder


def rewrite(cache: Path, name: str, dtype: Any, change: Callable[[Any], None]) -> None:
    """Change a table, and the hash in the manifest."""
    rows = np.fromfile(cache / name, dtype)
    change(rows)
    rows.tofile(cache / name)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"files": hash_files(cache)}))


def set_last(column: str, value: int) -> Callable[[Any], None]:
    def change(rows: Any) -> None:
        rows[column][-1] = value

    return change


def drop_label(rows: Any) -> None:
    rows["target_end"][-1] -= 2


def halve_label(rows: Any) -> None:
    rows["target_end"][-1] -= 1


def empty_target(rows: Any) -> None:
    """Leave the last example without a target, even without the EOS token."""
    rows["target_end"][-1], rows["target_is_whole"][-1] = rows["target_start"][-1], False


def set_value(value: float) -> Callable[[Any], None]:
    """Set the last value of the last text with labels."""

    def change(ids: Any) -> None:
        ids[-2:] = np.array([value], np.float64).view(np.int32)

    return change


def set_id(value: int) -> Callable[[Any], None]:
    def change(ids: Any) -> None:
        ids[0] = value

    return change


@pytest.mark.parametrize("kind", DATA)
def test_each_kind_of_examples_can_be_opened(caches: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 3)  # several chunks
    assert len(open_only(Path(shutil.copytree(caches / kind, caches / f"{kind} copied")))) >= 8


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("targets", "conversations.bin", set_last("start", 1 << 40), "a start isn't in tokens.bin"),
        ("targets", "conversations.bin", set_last("start", 0), "or before an earlier one"),
        ("targets", "examples.bin", set_last("conversation", 8), "a row's conversation isn't in conversations.bin"),
        *(
            ("targets", "examples.bin", set_last(name, 999), SPAN)
            for name in ("system_end", "source_end", "answer_end")
        ),
        ("targets", "examples.bin", set_last("rejected_start", 1), SPAN),
        ("pairs", "examples.bin", set_last("rejected_answer_end", 999), SPAN),
        ("pairs", "examples.bin", set_last("rejected_start", 0), SPAN),
        ("raw text", "examples.bin", set_last("source_end", 1), SPAN),
        ("labels", "examples.bin", drop_label, SPAN),
        ("labels", "examples.bin", halve_label, SPAN),
        ("several labels", "examples.bin", halve_label, SPAN),
        ("targets", "examples.bin", empty_target, SPAN),
        ("targets", "tokens.bin", set_id(1514), IDS),
        ("labels", "tokens.bin", set_id(1514), IDS),
        ("labels", "tokens.bin", set_id(-1), IDS),
        ("labels", "tokens.bin", set_value(2), "tokens.bin: a label isn't among the labels"),
        ("labels", "tokens.bin", set_value(0.5), "tokens.bin: a label isn't among the labels"),
        ("numbers", "tokens.bin", set_value(float("inf")), "tokens.bin: a label isn't among the labels"),
    ],
)
def test_wrong_rows_are_refused(
    caches: Path, tmp_path: Path, kind: str, name: str, change: Callable[[Any], None], message: str
) -> None:
    shutil.copytree(caches / kind, tmp_path / "cache")
    cache = find_cache(tmp_path / "cache")
    ids = np.dtype(json.loads((cache / "manifest.json").read_text())["dtype"])
    dtype = {"conversations.bin": CONVERSATION_DTYPE, "examples.bin": EXAMPLE_DTYPE, "tokens.bin": ids}[name]
    rewrite(cache, name, dtype, change)
    with pytest.raises(DataError, match=message):
        open_cache(cache)


def test_an_empty_source_is_refused_without_special_tokens_around_it(tmp_path: Path) -> None:
    span = Span(1, 0, 0, 0, 0, 1, 1, True, True)
    np.array([(0, *span)], EXAMPLE_DTYPE).tofile(tmp_path / "examples.bin")
    np.zeros(1, CONVERSATION_DTYPE).tofile(tmp_path / "conversations.bin")
    np.zeros(1, "<u2").tofile(tmp_path / "tokens.bin")
    mapped = map_tables(tmp_path, "<u2")
    check_tables(tmp_path, mapped, SpecialIds((), (1,), 1), 2, "targets", None)
    with pytest.raises(DataError, match=SPAN):
        check_tables(tmp_path, mapped, SpecialIds((), (), 1), 2, "targets", None)


@pytest.mark.parametrize("column", ["source_is_whole", "rejected_is_whole"])
def test_a_byte_that_is_neither_true_nor_false_is_refused(caches: Path, tmp_path: Path, column: str) -> None:
    shutil.copytree(caches / "targets", tmp_path / "cache")
    cache = find_cache(tmp_path / "cache")
    rewrite(cache, "examples.bin", EXAMPLE_DTYPE, lambda rows: rows[column].view(np.uint8).fill(2))
    with pytest.raises(DataError, match=SPAN):
        open_cache(cache)


def test_a_row_that_is_cut_off_is_refused(caches: Path, tmp_path: Path) -> None:
    shutil.copytree(caches / "targets", tmp_path / "cache")
    cache = find_cache(tmp_path / "cache")
    with open(cache / "examples.bin", "ab") as file:
        file.write(b"\0")
    rewrite(cache, "tokens.bin", np.uint16, lambda ids: None)  # update the hashes
    with pytest.raises(DataError, match="examples.bin: 377 bytes aren't rows of 47 bytes"):
        open_cache(cache)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("targets", "eos_token_id", 7, "eos_token_id: differs from the cache's files"),
        ("targets", "source_end_ids", [], "source_end_ids or eos_token_id: differs from the cache's files"),
        ("targets", "added_token_ids", [3], "added_token_ids: differs from the cache's files"),
        ("targets", "added_tokens", ["\ud800"], r"added_tokens\[0\]: '\\ud800': "),
        ("targets", "examples", 7, "examples: differs from the cache's files"),
        ("targets", "files", {}, "files: conversations.bin: missing"),
        ("targets", "files", {"../data.jsonl": ""}, "files: '../data.jsonl': not in the token cache"),
        ("targets", "files", {"/proc/kmsg": ""}, "files: '/proc/kmsg': not in the token cache"),
        ("targets", "unused_files", [1], r"unused_files\[0\]: 1: "),
        ("targets", "labels", {}, "labels.names: missing"),
        ("labels", "labels", None, "labels: missing, but the objective is tag"),
        ("raw text", "span_corruption", None, "span_corruption: missing, but the objective is span-corruption"),
        (
            "raw text",
            "span_corruption",
            {"denoisers": ["t5"], "sentinel_ids": []},
            "sentinel_ids: differs from the cache's files",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(
    caches: Path, tmp_path: Path, kind: str, key: str, value: Any, message: str
) -> None:
    shutil.copytree(caches / kind, tmp_path / "cache")
    path = find_cache(tmp_path / "cache") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=message):
        open_cache(path.parent)


@pytest.mark.parametrize(
    ("name", "value"), [("objective", 1.5), ("objective", "chat"), ("denoisers", [1]), ("data", [{}]), ("header", 1)]
)
def test_a_wrong_setting_in_a_manifest_is_refused(caches: Path, tmp_path: Path, name: str, value: Any) -> None:
    shutil.copytree(caches / "targets", tmp_path / "cache")
    path = find_cache(tmp_path / "cache") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"][name] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest.json: inputs.{name}"):
        open_cache(path.parent)
