"""Prepare, beyond reading: what is chosen, what is counted, the vocabulary report, many processes, kills."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t5tune.commands.prepare import Prepared, prepare
from t5tune.data.cache import Cache, open_cache
from t5tune.data.encoding import Encoder
from t5tune.data.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.errors import DataError, DependencyError, ModelError
from t5tune.progress import Event, Note, Report, silent
from t5tune.settings import PrepareSettings
from tests.conftest import REPOSITORY


def record(*texts: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **more}


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., tuple[Prepared, Cache]]:
    """Prepare records with pocket's tokenizer, and open the cache."""

    def run(*records: Any, report: Report = silent, **more: Any) -> tuple[Prepared, Cache]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
        values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": tmp_path / "cache", **more}
        result = prepare(PrepareSettings(**values), report)
        return result, open_cache(result.cache)

    return run


def targets(cache: Cache) -> list[str]:
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    return [tokenizer.decode(example.target_T.tolist()[:-1]) for example in cache]


# ---------------------------------------------------------------- choice


def test_the_last_answers_alone(prepared: Callable[..., tuple[Prepared, Cache]]) -> None:
    records = [record("Hi", "a", "And?", "b"), record("Hi", "c")]
    assert targets(prepared(*records)[1]) == ["a", "b", "c"]
    _, cache = prepared(*records, train_on="last")
    assert targets(cache) == ["b", "c"]
    assert "a" in load_tokenizer(cache.tokenizer_folder).decode(cache[0].source_S.tolist())


def test_short_answers_are_left_out_where_that_is_asked_and_counted(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    records = [record("Hi", "Yes"), record("Hi", "Yes, the lamp is on the table")]
    assert prepared(*records)[0].examples == 2
    result, cache = prepared(*records, min_target_tokens=6)
    assert (result.conversations, result.examples) == (2, 1)
    assert targets(cache) == ["Yes, the lamp is on the table"]
    assert cache.manifest["dropped"] == {"short_targets": 1}


def test_answers_that_would_be_cut_are_left_out_where_that_is_asked(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    records = [record("Hi", "lamp " * 60), record("Hi", "Yes")]
    assert prepared(*records, model_max_length=32)[0].truncated_targets == 1
    result, cache = prepared(*records, model_max_length=32, drop_truncated_targets=True)
    assert (result.truncated_targets, targets(cache)) == (0, ["Yes"])
    assert cache.manifest["dropped"] == {"truncated_targets": 1}


def test_conversations_of_the_same_words_are_refused_where_that_is_asked(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    records = [record("Hi", "a", id=1), record("Hi", "b"), record("Hi", "a", id=2), record("Hi", "a", "And?", "b")]
    assert prepared(*records)[0].rejected == 0
    result, cache = prepared(*records, dedupe="exact")
    assert (result.conversations, result.rejected) == (3, 1)
    (line,) = [json.loads(line) for line in (cache.folder / "rejected.jsonl").read_text().splitlines()]
    assert (line["reason"], line["line"], line["record"]) == ("duplicate", 3, records[2])
    assert "data.jsonl:1" in line["message"]


def test_a_long_conversation_becomes_several_that_fit(prepared: Callable[..., tuple[Prepared, Cache]]) -> None:
    texts = [f"{'lamp ' * 10}{number}" for number in range(16)]
    long = record(*texts, system="Be brief.")
    result, cache = prepared(long, record("Hi", "Yes"), model_max_length=100, split_long=True)
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    assert (result.conversations, result.examples, result.truncated_sources) == (2, 9, 0)
    assert cache.manifest["repaired"] == {"split_conversations": 1}
    begun = 0
    for number, example in enumerate(cache.first(8)):
        source = tokenizer.decode(example.source_S.tolist()[:-1])
        assert source.startswith("Be brief. Human: " + "lamp ")
        held = [index for index in range(0, 2 * number + 1) if source.find(f"{texts[index]} ") >= 0]
        assert held == list(range(held[0], 2 * number + 1))
        assert held[0] % 2 == 0
        begun += held[0] == 2 * number
        assert len(example.source_S) + len(example.target_T) <= 101
    assert 2 < begun < 8  # several begin anew, without what stood before, and no more than must
    whole, _ = prepared(long, model_max_length=1000, split_long=True)
    assert whole.examples == 8


def test_a_conversation_of_more_than_65535_tokens_keeps_its_places(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    _, cache = prepared(record("Hi", "Yes"), record("Hi", "a", "lamp " * 70_000 + "here", "b", "And?", "c"))
    columns = cache.manifest["example_columns"]
    assert (columns["conversation"], columns["answer_end"], columns["turn"]) == ("|u1", "<u4", "|u1")
    assert targets(cache) == ["Yes", "a", "b", "c"]
    assert load_tokenizer(cache.tokenizer_folder).decode(cache[2].source_S.tolist()).endswith("here Assistant:</s>")


def test_too_many_refused_records_stop_the_run(prepared: Callable[..., tuple[Prepared, Cache]], tmp_path: Path) -> None:
    records = [record("Hi", "Yes")] * 3 + [{"text": 1}]
    assert prepared(*records, max_rejected_fraction=0.25)[0].rejected == 1
    with pytest.raises(DataError, match=r"1 of 4 records refused \(unknown_format 1\)") as caught:
        prepared(*records, max_rejected_fraction=0.2, output_dir=tmp_path / "other")
    assert "data.jsonl:4" in str(caught.value.hint)
    assert not (tmp_path / "other").exists()


def test_num_data_reads_no_further_than_it_must(prepared: Callable[..., tuple[Prepared, Cache]]) -> None:
    result, cache = prepared(*[record("Hi", f"{n}", "And?", f"{n}") for n in range(50)], {"text": 1}, num_data=5)
    assert (result.examples, result.conversations, result.rejected) == (5, 3, 0)
    assert targets(cache) == ["0", "0", "1", "1", "2"]


def test_what_prepare_holds_out_is_what_train_and_evaluate_hold_out(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    records = [record("Hi", f"{n % 10}", "And?", f"{n % 10}") for n in range(20)]  # each conversation twice
    _, cache = prepared(*records, eval_fraction=0.3, seed=3)
    training, held_out = cache.parts()
    assert held_out is not None
    assert len(training) + len(held_out) == 40
    assert len(held_out) == 12  # 3 of 10 different conversations, both copies of both answers
    assert not set(targets(training)) & set(targets(held_out))
    assert prepared(*records)[1].parts()[1] is None
    with pytest.raises(DataError, match="leaves none to train on; give more, or a file of others as eval_data_path"):
        prepared(record("Hi", "a"), eval_fraction=0.5)


# ---------------------------------------------------------------- vocabulary


def test_the_report_says_what_cant_be_written_how_often_and_in_how_many_answers(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    records = [record("猫?", "猫 猫 ½"), record("Hi", "a 猫"), record("Hi", "Yes"), record("Hi", "tab\there")]
    _, cache = prepared(*records, add_tokens="none")
    lost = {item["text"]: item for item in cache.manifest["lost_characters"]}
    assert lost["猫"] == {"text": "猫", "becomes": "\ufffd", "count": 3, "answers": 2}
    assert (lost["\t"]["becomes"], lost["\t"]["answers"]) == (" ", 1)
    assert lost["½"]["becomes"] in {"1⁄2", "\ufffd"}
    _, cache = prepared(*records)
    assert "猫" not in {item["text"] for item in cache.manifest["lost_characters"]}


def test_auto_adds_what_the_answers_hold_and_says_what_finds_no_row(
    prepared: Callable[..., tuple[Prepared, Cache]],
) -> None:
    _, cache = prepared(record("Hi", "猫 ≥ 3"), record("Hi", "猫"), *[record("Hi", "Yes")] * 100)
    assert {"猫", "≥", "\n", "{"} <= set(cache.added_tokens)
    assert targets(cache)[0] == "猫 ≥ 3"
    rare, cache = prepared(record("Hi", "猫"), *[record("Hi", "Yes")] * 300)
    assert "猫" not in cache.added_tokens
    assert rare.unknown_tokens == 1
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 60)))
    told: list[Event] = []
    _, cache = prepared(record("Hi", many), report=told.append)
    (note,) = [event.text for event in told if isinstance(event, Note) and "spare row" in event.text]
    assert note.endswith(f" and {len(cache.manifest['left_out_tokens']) - 5} more characters")
    assert len(cache.added_tokens) == 1536 - 1497
    assert set(cache.added_tokens) | set(cache.manifest["left_out_tokens"]) == {*many, *"\n\t<\\^`{}~"}


def test_a_question_costs_no_row(prepared: Callable[..., tuple[Prepared, Cache]]) -> None:
    _, cache = prepared(*[record("猫?", "Yes")] * 3)
    assert "猫" not in cache.added_tokens


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 conversations, some of which are refused."""
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


@pytest.mark.parametrize(
    ("end", "message"),
    [(", {'a': 1}]", "record 1500: not valid JSON"), ("", "the array has no end")],
    ids=["in a worker", "while reading"],
)
def test_an_error_is_raised_with_workers_too_and_nothing_is_left(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, message: str
) -> None:
    monkeypatch.setattr("t5tune.commands.prepare.SAMPLE", 1000)  # it ends before the error comes
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


def test_memory_does_not_grow_with_the_input_and_torch_is_not_loaded(many: Path, tmp_path: Path) -> None:
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
    assert peaks[1] < peaks[0] + 40  # of 13 MB times 30
    assert peaks[1] < 250


KILLED = """
import os, signal, sys
from pathlib import Path
from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
folder, data, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
touched = 0
def watch(event, arguments):
    global touched
    if event.startswith(("open", "os.", "shutil.")) and folder in str(arguments):
        touched += 1
        if touched == moment:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare(PrepareSettings(model_name_or_path="pocket", data_path=data, output_dir=Path(folder, "cache")))
print(touched)
"""


def test_a_kill_at_any_moment_leaves_the_old_cache_or_the_new_or_none(tmp_path: Path) -> None:
    """At each of the moments when prepare opens, renames or removes a file beside its output."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record("Hi", name)) + "\n")

    def run(name: str, moment: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, place, tmp_path / f"{name}.jsonl", str(moment)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("old", 0).returncode == 0
    before = bytes_of(place / "cache")
    shutil.copytree(place, tmp_path / "before")
    done = run("new", 0)
    after = bytes_of(place / "cache")
    assert before != after
    last = int(done.stdout)
    assert last > 20
    states = []
    for moment in [*range(1, last - 12, 3), *range(last - 12, last + 1)]:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
        assert run("new", moment).returncode == -signal.SIGKILL
        found = bytes_of(place / "cache") if (place / "cache").exists() else None
        assert found in (before, after, None)
        states.append({str(before): "old", str(after): "new"}.get(str(found), "none"))
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert {"old", "new"} <= set(states)
    assert run("new", 0).returncode == 0  # what was left is in nobody's way
    assert bytes_of(place / "cache") == after


def test_what_killed_processes_left_is_swept_and_what_others_write_stays(
    prepared: Callable[..., tuple[Prepared, Cache]], tmp_path: Path
) -> None:
    abandoned, used = tmp_path / ".cache.new-abandoned", tmp_path / ".cache.new-used"
    for folder in (abandoned, used):
        folder.mkdir()
        (folder / "tokens.bin").write_text("half")
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepared(record("Hi", "Yes"))
    os.close(lock)
    assert (abandoned.exists(), used.exists()) == (False, True)
    abandoned.mkdir()
    assert prepared(record("Hi", "Yes"))[0].up_to_date
    assert not abandoned.exists()


# ---------------------------------------------------------------- tokenizers of other families


@pytest.fixture(scope="module")
def sentencepiece_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them of T5 v1.1 and mT5: a SentencePiece model alone, of several scripts."""
    folder = tmp_path_factory.mktemp("mt5") / "base"
    folder.mkdir()
    text = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "docs" / "decisions.md").read_text()
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


@settings(deadline=None, max_examples=150, database=None, derandomize=True)
@given(text=TEXT)
def test_a_sentencepiece_model_gives_sentencepieces_ids(sentencepiece_base: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_base)
    assert len(tokenizer) == 900
    assert tokenizer.ids_of(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>"]) == [0, 1, 2, 899, 800]
    plain = " ".join(text.split())  # SentencePiece knows of no other white space at a text's ends
    if any(token in plain for token in tokenizer.special_tokens):
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_base / "spiece.model"))
    # ties of score are broken otherwise now and then; the pieces' scores must agree
    ours, theirs = tokenizer.encode(plain), processor.encode(plain)
    if ours != theirs:
        scores = [sum(processor.get_score(index) for index in ids) for ids in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(text=TEXT)
def test_what_is_trained_on_is_what_the_saved_tokenizer_gives(
    sentencepiece_base: Path, add_tokens: str, text: str
) -> None:
    encoder, loaded = _saved(sentencepiece_base, add_tokens)
    if any(token in text for token in loaded.all_special_tokens):
        return
    for _ in range(2):  # the second time from the words that were remembered
        (ids,) = encoder.encode([text], [True])
        assert ids.tolist() == loaded(text, add_special_tokens=False)["input_ids"]


_MADE: dict[tuple[Path, str], tuple[Encoder, Any]] = {}


def _saved(base: Path, add_tokens: str) -> tuple[Encoder, Any]:
    if (base, add_tokens) not in _MADE:
        tokenizer, *_ = extend_tokenizer(load_tokenizer(base), [add_tokens], 928)
        save_tokenizer(tokenizer, base.parent / add_tokens)
        _MADE[base, add_tokens] = Encoder(tokenizer), AutoTokenizer.from_pretrained(str(base.parent / add_tokens))
    return _MADE[base, add_tokens]


def test_a_broken_tokenizer_is_refused_by_its_file(sentencepiece_base: Path, tmp_path: Path) -> None:
    pocket = REPOSITORY / "t5tune" / "pocket" / "tokenizer.json"
    cases = {
        "tokenizer.json": pocket.read_bytes()[:1000],
        "spiece.model": (sentencepiece_base / "spiece.model").read_bytes()[:-50],
        "tokenizer_config.json": b"[1]",
    }
    for name, data in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            load_tokenizer(folder)
    with pytest.raises(ModelError, match="no tokenizer in it"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_protobuf_says_what_to_install(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(DependencyError, match="SentencePiece model") as caught:
        load_tokenizer(sentencepiece_base)
    assert "pip install --upgrade protobuf" in str(caught.value.hint)


def test_a_sentencepiece_model_with_too_old_a_protobuf_says_what_to_install(
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
