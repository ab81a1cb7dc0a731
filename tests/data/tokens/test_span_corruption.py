"""Span corruption: the published counts, spans of the right lengths, and the text rebuilt from source and target."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.prepared import open_examples
from t5tune.data.reading.raw_text import read_text
from t5tune.data.tokens.span_corruption import SpanCorruption, cut_windows, find_sentinels
from t5tune.data.tokens.tokenizer import Tokenizer, decode_reference, load_tokenizer
from t5tune.errors import ModelError
from t5tune.settings import PrepareSettings
from t5tune.settings.denoisers import DENOISERS, find_denoisers
from tests.support.caches import open_only
from tests.support.models.model_types import make_checkpoint
from tests.support.models.tokenizer_kinds import train_sentencepiece, write_config
from tests.support.paths import REPOSITORY
from tests.support.prose import english_text

POCKET = REPOSITORY / "t5tune" / "pocket"
SENTINELS = tuple(range(32099, 31999, -1))  # T5's


def corrupt(corruption: SpanCorruption, ids: Any, index: int, repeat: int = 0) -> tuple[list[int], list[int]]:
    masked, spans = (int(count[0]) for count in corruption.count_masked(np.array([index]), np.array([len(ids)])))
    source, target = corruption.corrupt(ids, masked, spans, index, repeat)
    return source.tolist(), target.tolist()


def list_spans(target: list[int], sentinels: tuple[int, ...]) -> dict[int, list[int]]:
    """List the masked span of each sentinel of a target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return spans


def rebuild(source: list[int], target: list[int], sentinels: tuple[int, ...]) -> list[int]:
    """Rebuild a text: each sentinel of the source is replaced with its span."""
    spans = list_spans(target, sentinels)
    return [token for mark in source for token in (spans.pop(mark) if mark in spans else [mark])] + sum(
        spans.values(), []
    )


# --- the published definition --------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "expected"), [(512, 568), (256, 284), (1024, 1137)])
def test_windows_have_the_lengths_of_t5s_pretraining(length: int, expected: int) -> None:
    """568 tokens become a source of 512 and a target of 114 with the EOS tokens: `random_spans_helper` of T5's code."""
    corruption = SpanCorruption(DENOISERS["t5"], SENTINELS)
    assert corruption.find_largest_window(length - 1, length) == expected
    if length == 512:
        masked, spans = corruption.count_masked(np.array([0]), np.array([568]))
        assert (568 - masked + spans + 1, masked + spans + 1) == (512, 114)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 57, 300, 568])
@pytest.mark.parametrize("name", ["t5", "0.3:10", "ul2-r", "ul2-x", "ul2-s", "ul2"])
def test_a_masked_text_follows_its_denoiser_and_can_be_rebuilt(name: str, length: int) -> None:
    corruption = SpanCorruption(find_denoisers([name]), SENTINELS, seed=3)
    indices = np.arange(200)
    masked, spans = corruption.count_masked(indices, np.full(200, length))
    ids = np.random.default_rng(length).integers(3, 30_000, length)
    for index in indices[:60]:
        source, target = corrupt(corruption, ids, int(index))
        found = list_spans(target, SENTINELS)
        assert list(found) == list(SENTINELS[: spans[index]]) == [token for token in source if token in SENTINELS]
        assert sum(map(len, found.values())) == masked[index]
        assert min(map(len, found.values())) >= 1
        assert len(source) == length - masked[index] + spans[index]
        assert source[0] == ids[0]  # it begins with what isn't masked, and ends with a masked span
        assert source[-1] == list(found)[-1]
        assert rebuild(source, target, SENTINELS) == ids.tolist()
    counts = {(int(a), int(b)) for a, b in zip(masked, spans, strict=True)}
    if name in ("t5", "0.3:10"):
        (denoiser,) = find_denoisers([name])
        expected = min(max(round(length * denoiser.density), 1), length - 1)
        assert counts == {(expected, max(round(expected / (denoiser.mean_length or 1)), 1))}


def test_ul2_has_seven_denoisers_that_are_equally_likely() -> None:
    """Tay et al. 2022, table 1."""
    corruption = SpanCorruption(DENOISERS["ul2"], SENTINELS, seed=1)
    masked, spans = corruption.count_masked(np.arange(70_000), np.full(70_000, 400))
    counted = Counter(zip((masked / 400).tolist(), (masked / spans).round().tolist(), strict=True))
    expected = {(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 60.0), (0.5, 67.0)}
    assert {key for key, count in counted.items() if count > 8000} == expected
    assert all(abs(counted[key] - 10_000) < 400 for key in expected)
    suffixes = masked[spans == 1]  # a denoiser whose mean span of 64 exceeds the 60 masked tokens also gives one span
    suffixes = suffixes[suffixes != 60]
    assert (suffixes.min(), suffixes.max()) == (1, 200)  # a quarter of the text on average
    assert abs(suffixes.mean() - 100) < 2


@pytest.mark.slow
def test_the_positions_of_spans_are_evenly_distributed() -> None:
    corruption = SpanCorruption(DENOISERS["t5"], SENTINELS)
    ids = np.arange(100)
    hidden = np.zeros(100)
    lengths = Counter[int]()
    for repeat in range(4000):
        _, target = corrupt(corruption, ids, 0, repeat)
        spans = list_spans(target, SENTINELS)
        hidden[[token for span in spans.values() for token in span]] += 1
        lengths.update(map(len, spans.values()))
    assert lengths.total() == 4000 * 5
    assert sum(length * count for length, count in lengths.items()) == 4000 * 15
    # the number of divisions of 15 tokens into 5 spans in which the first has n: C(13 - n + 1, 3)
    expected = {length: (14 - length) * (13 - length) * (12 - length) / 6 for length in range(1, 12)}
    total = sum(expected.values())
    for length, ways in expected.items():
        assert abs(lengths[length] / lengths.total() - ways / total) < 0.01
    # the first token is never masked, the last one always; in between all are about equally likely
    assert (hidden[0], hidden[-1]) == (0, 4000)
    middle = hidden[20:80] / 4000
    assert middle.max() - middle.min() < 0.04


def test_only_span_positions_depend_on_the_repetition() -> None:
    ids = np.arange(1000, 1300)
    corruptions = [SpanCorruption(DENOISERS["ul2"], SENTINELS, seed) for seed in (1, 1, 2)]
    found = [[corrupt(each, ids, index, repeat) for index in range(30) for repeat in (0, 1)] for each in corruptions]
    assert found[0] == found[1] != found[2]
    lengths = [[(len(source), len(target)) for source, target in each] for each in found]
    assert lengths[0] != lengths[2]
    for first, second in zip(found[0][0::2], found[0][1::2], strict=True):
        assert [len(side) for side in first] == [len(side) for side in second]
    assert sum(first != second for first, second in zip(found[0][0::2], found[0][1::2], strict=True)) > 20


@pytest.mark.parametrize("length", [2, 99, 100, 101, 250, 12_345])
def test_windows_cover_a_text_and_are_about_as_long(length: int) -> None:
    windows = cut_windows(length, 100)
    assert [start for start, _ in windows] == [0, *(end for _, end in windows[:-1])]
    assert windows[-1][1] == length
    sizes = [end - start for start, end in windows]
    assert max(sizes) <= 100
    assert max(sizes) - min(sizes) <= 1
    assert cut_windows(1, 100) == []


# --- tokenizers ----------------------------------------------------------------------------------------------


def load_mt5(folder: Path) -> Tokenizer:
    """Make a tokenizer whose sentinels are words of its SentencePiece model, as mT5's are."""
    sentinels = [f"▁<extra_id_{number}>" for number in range(99, -1, -1)]
    train_sentencepiece(folder, english_text().splitlines()[:200], 600, user_defined_symbols=sentinels)
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=0)
    return load_tokenizer(folder)


def test_the_sentinels_of_each_kind_of_tokenizer_are_found(tmp_path: Path, shared: Any) -> None:
    byt5, mt5, codet5 = (tmp_path / name for name in ("byt5", "mt5", "codet5"))
    mt5.mkdir()
    make_checkpoint("byt5", byt5)
    make_checkpoint("codet5", codet5)
    tokenizer = load_mt5(mt5)
    names = [f"▁<extra_id_{number}>" for number in range(100)]
    assert list(find_sentinels(tokenizer)) == tokenizer.convert_tokens_to_ids(names)
    assert find_sentinels(load_tokenizer(byt5)) == tuple(range(258, 158, -1))  # Xue et al. 2022
    tokenizer = load_tokenizer(codet5)
    assert find_sentinels(tokenizer)[:2] == (len(tokenizer) - 1, len(tokenizer) - 2)
    assert len(find_sentinels(load_tokenizer(POCKET))) == 24
    assert find_sentinels(load_tokenizer(shared("tokenizer/flan-t5-base"))) == SENTINELS


# --- token caches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text in records and in a .txt file."""
    folder = tmp_path_factory.mktemp("texts")
    paragraphs = [part for part in english_text().split("\n\n") if len(part) > 200][:40]
    (folder / "book.txt").write_text("\n\n".join(paragraphs[:25]))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs[25:]))
    return folder


def make_settings(base: Path | str, data: Path, folder: Path, **changes: Any) -> PrepareSettings:
    values = {
        "model_name_or_path": str(base), "data_path": [data], "output_dir": folder, "objective": "span-corruption",
        "model_max_length": 128,
    }  # fmt: skip
    return PrepareSettings(**{**values, **changes})


def read_texts(cache: Cache) -> list[list[int]]:
    """Rebuild the windows of a cache from its examples."""
    assert cache.corruption is not None
    sentinels = cache.corruption.sentinels
    rebuilt = []
    for example in cache:
        source, target = example.source_S.tolist(), example.target_T.tolist()
        assert source[-1] == target[-1] == 1  # the EOS token
        rebuilt.append(rebuild(source[:-1], target[:-1], sentinels))
    return rebuilt


@pytest.mark.slow
@pytest.mark.parametrize("denoisers", ["t5", "ul2"])
@pytest.mark.parametrize("base", ["pocket", "byt5"])
def test_a_cache_of_raw_text_has_all_of_it(base: str, denoisers: str, texts: Path, tmp_path: Path) -> None:
    folder = base if base == "pocket" else make_checkpoint(base, tmp_path / "base")
    result = prepare(make_settings(folder, texts, tmp_path / "cache", denoisers=[denoisers]))
    cache = open_only(tmp_path / "cache")
    assert len(cache) == result.examples
    sources, targets = cache.read_lengths()
    for number, example in enumerate(cache):
        assert (len(example.source_S), len(example.target_T)) == (sources[number], targets[number])
        again = cache.read(number, repeat=5)
        assert (len(again.source_S), len(again.target_T)) == (sources[number], targets[number])
    assert max(sources.max(), targets.max()) <= 128
    assert result.source_tokens == sources.sum()
    assert result.target_tokens == targets.sum()
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    text = tokenizer.decode(token for window in read_texts(cache) for token in window)
    whole = (texts / "book.txt").read_text() + "".join(
        json.loads(line)["text"] for line in (texts / "notes.jsonl").read_text().splitlines()
    )
    assert "".join(text.split()) == "".join(whole.split())
    for example in cache:
        for ids in (example.source_S, example.target_T):
            number = np.isin(ids, find_sentinels(tokenizer)).sum()
            names = [f"<extra_id_{each}>" for each in range(number)]
            assert re.findall("<extra_id_[0-9]+>", decode_reference(tokenizer, ids, "", is_raw_text=True)) == names
            assert "<extra_id_" not in decode_reference(tokenizer, ids, "")
    assert cache.manifest["span_corruption"]["denoisers"] == [denoisers]
    assert cache.manifest["inputs"]["objective"] == "span-corruption"


@pytest.mark.slow
def test_a_long_text_file_is_divided_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "Some words follow here. " * 20 + "End." for number in range(1000)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    parts = list(read_text(tmp_path / "book.txt"))
    assert len(parts) > 10
    assert all(str(part.data["text"]).startswith("Paragraph ") for part in parts)
    assert "\n\n".join(part.data["text"] for part in parts) == "\n\n".join(paragraphs)
    lines = (tmp_path / "book.txt").read_text().split("\n")
    assert all(lines[part.location.line - 1] == part.data["text"].split("\n")[0] for part in parts)
    (tmp_path / "line.txt").write_text("ü" * 200_000)  # nowhere to cut
    result = prepare(make_settings("pocket", tmp_path, tmp_path / "cache", add_tokens=["none"]))
    assert result.rejected == 0
    cut = [part.data["text"] for part in read_text(tmp_path / "line.txt")]
    assert "".join(cut) == "ü" * 200_000


def test_a_tokenizer_without_sentinels_is_refused_by_name(texts: Path, tmp_path: Path) -> None:
    base = make_checkpoint("t5gemma2", tmp_path / "base")
    with pytest.raises(ModelError, match=r"objective: span-corruption: the tokenizer of .*base has no sentinels"):
        prepare(make_settings(base, texts, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_another_seed_masks_other_spans_of_the_same_text(texts: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        prepare(make_settings("pocket", texts, tmp_path / f"{seed}", denoisers=["ul2"], seed=seed))
    one, other = (open_only(tmp_path / f"{seed}") for seed in (3, 4))
    assert read_texts(one) == read_texts(other)
    assert one.read_lengths()[0].tolist() != other.read_lengths()[0].tolist()
    part, rest = (half.main.cache for half in open_examples(tmp_path / "3").split(0.3, split_seed=1))
    assert sorted(map(str, read_texts(part) + read_texts(rest))) == sorted(map(str, read_texts(one)))


def test_a_text_file_needs_no_column(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Some words. " * 20)
    (tmp_path / "notes.jsonl").write_text(json.dumps({"body": "Other words. " * 20}))
    result = prepare(make_settings("pocket", tmp_path, tmp_path / "cache", source_column="body"))
    assert (result.conversations, result.rejected) == (2, 0)


@pytest.mark.parametrize("room", [15, 63, 200, 511, 2000])
@pytest.mark.parametrize("name", ["t5", "ul2", "ul2-x", "0.9:2", "0.02:1"])
def test_the_largest_window_is_the_longest_that_fits(name: str, room: int) -> None:
    corruption = SpanCorruption(find_denoisers([name]), SENTINELS)
    enough = SpanCorruption(corruption.denoisers, tuple(range(40_000, 50_000)))  # sentinels for all spans
    found = corruption.find_largest_window(room, room)

    def fits(length: int) -> bool:
        masked, spans = enough.count_masked(np.arange(500), np.full(500, length))
        longest = int((length - masked + spans).max()), int((masked + spans).max())
        return max(longest) <= room and spans.max() <= len(SENTINELS)

    assert fits(found)
    if name != "ul2":  # ul2's longest suffix is rare
        assert not any(fits(length) for length in range(found + 1, found + 40))
