"""The tables of a token cache: their rows, their limits, and what is measured from them."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.tables import EXAMPLE_DTYPE
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoding import EncodedConversation, Span
from t5tune.errors import DataError
from t5tune.preparing.cache_writer import MAX_TABLE_VALUE, CacheWriter
from t5tune.preparing.pipeline import EncodedRecord
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache, open_only

RECORD = RawRecord(RecordLocation("a.jsonl", 1, 0, 0), b"{}", 2)
SPAN = Span(1, 2, 3, 4, 5, 6, 7, True, False)


def add_spans(writer: CacheWriter, *spans: Span) -> None:
    ids = np.zeros(3, np.uint16)
    writer.add(RECORD, EncodedRecord(parts=[EncodedConversation(ids, list(spans))], key=b"\xff" * 16))


def test_a_row_has_a_conversation_s_number_and_a_span(tmp_path: Path) -> None:
    largest = Span(*[MAX_TABLE_VALUE] * 7, False, True)
    with CacheWriter(tmp_path, np.dtype("<u2"), rejects_duplicates=False) as writer:
        add_spans(writer, SPAN)
        add_spans(writer, SPAN, largest)
        writer.finish(None)
    rows = np.fromfile(tmp_path / "examples.bin", EXAMPLE_DTYPE)
    assert rows.tolist() == [(0, *SPAN), (1, *SPAN), (1, *largest)]
    assert EXAMPLE_DTYPE.names == ("conversation", *Span._fields)


@pytest.mark.parametrize("field", Span._fields[:-2])
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, field: str) -> None:
    with CacheWriter(tmp_path, np.dtype("<u2"), rejects_duplicates=False) as writer:
        add_spans(writer, SPAN._replace(**{field: MAX_TABLE_VALUE}))
        with pytest.raises(DataError, match="4,294,967,295 tokens in a conversation"):
            add_spans(writer, SPAN._replace(**{field: MAX_TABLE_VALUE + 1}))


def test_statistics_cover_all_examples(tmp_path: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5tune.preparing.counts.ROWS_PER_CHUNK", 5)
    values = {"model_name_or_path": "pocket", "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values, model_max_length=32))
    cache = open_only(tmp_path / "cache")
    assert len(cache) > 40
    sources, targets = ([len(getattr(example, side)) for example in cache] for side in ("source_S", "target_T"))
    spans = [cache.read_untruncated(index)[3] for index in range(len(cache))]
    for side, lengths in (("source", sources), ("target", targets)):
        assert cache.manifest[f"{side}_tokens"] == sum(lengths)
        assert cache.manifest[f"truncated_{side}s"] == sum(not getattr(span, f"{side}_is_whole") for span in spans)
        percentiles = cache.manifest[f"{side}_length"]
        assert (percentiles["p50"], percentiles["p100"]) == (sorted(lengths)[(len(lengths) - 1) // 2], max(lengths))
    assert cache.manifest["examples_with_earlier_turns"] == sum(span.turn > 1 for span in spans) > 0


def test_opening_a_large_cache_takes_no_memory_for_each_example(tmp_path: Path, conversations: Path) -> None:
    values = {"model_name_or_path": "pocket", "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values))
    small = open_only(tmp_path / "cache")
    os.truncate(small.folder / "examples.bin", 1_000_000 * EXAMPLE_DTYPE.itemsize)  # zeros, which take no disk space
    tracemalloc.start()
    try:
        large = Cache(small.folder, small.manifest)
        assert len(large) == 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert np.array_equal(large[3].source_S, small[3].source_S)


def test_a_cache_of_an_earlier_format_is_prepared_again(tmp_path: Path, conversations: Path) -> None:
    values = {"model_name_or_path": "pocket", "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values))
    path = find_cache(tmp_path / "cache") / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format"] == 6
    path.write_text(json.dumps(manifest | {"format": 5}))
    with pytest.raises(DataError, match=r"manifest\.json: format 5; this version of t5tune reads format 6") as refused:
        open_only(tmp_path / "cache")
    assert refused.value.hint == "run t5tune prepare again"
    assert not prepare(PrepareSettings(**values)).up_to_date
    assert open_only(tmp_path / "cache").manifest == manifest
