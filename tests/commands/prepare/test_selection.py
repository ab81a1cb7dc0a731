"""prepare: selection of examples, counts, lost characters, several processes, kills, and tokenizers besides T5's."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.encoders import Beginning, Encoder, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import DataError, DependencyError, ModelError
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import Prepared, record
from tests.support.caches import find_cache, open_only
from tests.support.paths import REPOSITORY
from tests.support.processes.forks import ForkServer
from tests.support.prose import english_text


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


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 records, of which 30 are rejected."""
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("many") / "data.jsonl"
    words = ["lamp", "table", "é", "猫", "{", "}", "\\n", "one", "two", "three"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(1500):
            text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 60)))
            file.write(json.dumps({"text": text} if number % 50 == 7 else record(text, text[::-1], text, "Yes")) + "\n")
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(many: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        settings = PrepareSettings(
            model_name_or_path="pocket", data_path=str(many), output_dir=tmp_path / str(workers), num_workers=workers
        )
        assert prepare(settings).conversations == 1470
    one = bytes_of(tmp_path / "1")
    assert len(one) >= 6
    assert bytes_of(tmp_path / "2") == one
    assert bytes_of(tmp_path / "3") == one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "message"),
    [(", {'a': 1}]", "record 1500: not valid JSON"), ("", "the array has no end")],
    ids=["in a worker", "while reading"],
)
def test_an_error_with_several_workers_leaves_no_files(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, message: str
) -> None:
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)  # the sample ends before the error
    broken = tmp_path / "broken.json"
    broken.write_text("[" + ",".join(many.read_text().splitlines()) + end)
    with pytest.raises(DataError, match=rf"broken\.json:1: {message}"):
        prepare(
            PrepareSettings(
                model_name_or_path="pocket", data_path=str(broken), output_dir=tmp_path / "cache", num_workers=2
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


MEASURED = """
import sys
from pathlib import Path
from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
prepare(PrepareSettings(model_name_or_path="pocket", data_path=sys.argv[1], output_dir=sys.argv[2], num_workers=1))
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], *heavy)
"""


@pytest.mark.long
@pytest.mark.slow
def test_memory_is_constant_and_torch_is_not_imported(many: Path, tmp_path: Path) -> None:
    lines = many.read_bytes()
    peaks = []
    for times in (1, 30):
        data = tmp_path / f"{times}.jsonl"
        data.write_bytes(lines * times)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, data, tmp_path / f"cache-{times}"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peak, *heavy = done.stdout.split()
        assert heavy == []
        peaks.append(int(peak) / 1024)
    assert peaks[1] < peaks[0] + 40  # the second input is 13 MB times 30
    assert peaks[1] < 250


@pytest.mark.long
@pytest.mark.slow
def test_a_kill_leaves_the_old_or_new_cache_or_none(tmp_path: Path, fork_server: ForkServer) -> None:
    """Kill prepare whenever it opens, renames or removes a file next to its output."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record("Hi", name)) + "\n")

    def run(name: str, *calls: str) -> int:
        data, cache = tmp_path / f"{name}.jsonl", place / "cache"
        flags = ["--model-name-or-path=pocket", f"--data-path={data}", f"--output-dir={cache}"]
        return fork_server.run(["prepare", *flags], calls=calls).codes[0]

    def run_until(moment: int) -> int:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
        return run("new", f"tests.support.ranks.faults:kill_after({str(place)!r}, {moment})")

    assert run("old") == 0
    before = bytes_of(place / "cache")
    shutil.copytree(place, tmp_path / "before")
    assert run("new") == 0
    after = bytes_of(place / "cache")
    assert before != after
    states: list[str] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = run_until(len(states) + 1)
        found = bytes_of(place / "cache") if (place / "cache").exists() else None
        assert found in (before, after, None)
        states.append({str(before): "old", str(after): "new"}.get(str(found), "none"))
    assert code == 0
    assert len(states) > 20
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert {"old", "new"} <= set(states[:-1])
    for moment in (len(states) // 2, len(states) - 1):  # leftover files don't disturb the next run
        assert run_until(moment) == -signal.SIGKILL
        assert run("new") == 0
        assert bytes_of(place / "cache") == after


def test_only_folders_of_killed_processes_are_removed(prepared: Prepared, tmp_path: Path) -> None:
    abandoned, used = tmp_path / ".cache.new-abandoned", tmp_path / ".cache.new-used"
    for folder in (abandoned, used):
        folder.mkdir()
        (folder / "mixture.json").write_text("half")
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepared(record("Hi", "Yes"))
    os.close(lock)
    assert (abandoned.exists(), used.exists()) == (False, True)
    abandoned.mkdir()
    assert prepared(record("Hi", "Yes"))[0].up_to_date
    assert not abandoned.exists()


# ---------------------------------------------------------------- tokenizers of other model types


@pytest.fixture(scope="module")
def sentencepiece_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like T5 v1.1's and mT5's on the Hub: only a SentencePiece model, here with several scripts."""
    folder = tmp_path_factory.mktemp("mt5") / "base"
    folder.mkdir()
    text = (REPOSITORY / "README.md").read_text() + english_text()
    text += "Привет, как дела? Хорошо, спасибо. 你好，今天天气很好。 谢谢你。\n" * 30
    text += "こんにちは、元気ですか。 안녕하세요 반갑습니다\n" * 30
    (folder.parent / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=800,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return folder


TEXT = st.text(
    st.one_of(
        st.sampled_from("ab Z09.,:'\"\n\t{}<>\\_-#"),
        st.sampled_from("приветПРдела你好天气谢こんには안녕하é½ﬁ①Ⅷ\u0301\u200d\u00a0\u3000…“”😀"),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, database=None, derandomize=True)
@given(text=TEXT)
def test_a_sentencepiece_model_gives_sentencepieces_ids(sentencepiece_base: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_base)
    assert len(tokenizer) == 900
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>"]) == [
        0,
        1,
        2,
        899,
        800,
    ]
    plain = " ".join(text.split())  # SentencePiece strips only spaces at the ends of a text
    if any(token in plain for token in tokenizer.special_tokens):
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_base / "spiece.model"))
    # ties are sometimes broken differently; the total scores must agree
    ours, theirs = tokenizer.encode(plain), processor.encode(plain)
    if ours != theirs:
        scores = [sum(processor.get_score(index) for index in ids) for ids in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(text=TEXT)
def test_encoded_ids_equal_those_of_the_saved_tokenizer(sentencepiece_base: Path, add_tokens: str, text: str) -> None:
    encoder, loaded = _load_encoder_and_saved_tokenizer(sentencepiece_base, add_tokens)
    if any(token in text for token in loaded.all_special_tokens):
        return
    for _ in range(2):  # the second time, the words come from the encoder's cache
        (ids,) = encoder.encode([Beginning(text)])
        assert ids.tolist() == loaded(text, add_special_tokens=False)["input_ids"]


_CACHED: dict[tuple[Path, str], tuple[Encoder, Any]] = {}


def _load_encoder_and_saved_tokenizer(base: Path, add_tokens: str) -> tuple[Encoder, Any]:
    if (base, add_tokens) not in _CACHED:
        tokenizer, *_ = extend_tokenizer(load_tokenizer(base), [add_tokens], 928)
        save_tokenizer(tokenizer, base.parent / add_tokens)
        saved = AutoTokenizer.from_pretrained(str(base.parent / add_tokens))
        _CACHED[base, add_tokens] = make_encoder(tokenizer), saved
    return _CACHED[base, add_tokens]


def test_a_broken_sentencepiece_model_is_refused_with_its_file_name(sentencepiece_base: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((sentencepiece_base / "spiece.model").read_bytes()[:-50])
    with pytest.raises(ModelError, match=r"spiece\.model"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_protobuf_names_what_to_install(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(DependencyError, match="SentencePiece model") as caught:
        load_tokenizer(sentencepiece_base)
    assert "pip install --upgrade protobuf" in str(caught.value.hint)


def test_an_old_protobuf_error_names_the_packages_to_install(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("google.protobuf.runtime_version")
    if (
        "ValidateProtobufRuntimeVersion"
        not in Path(sentencepiece.__file__, "../sentencepiece_model_pb2.py").resolve().read_text()
    ):
        pytest.skip("this release of sentencepiece takes any protobuf")
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setattr(runtime, "MAJOR", 4)
    with pytest.raises(DependencyError, match="SentencePiece model.*runtime 4") as caught:
        load_tokenizer(sentencepiece_base)
    assert "pip install --upgrade protobuf" in str(caught.value.hint)
