"""prepare with labels: caches and their classes, parts, mixtures, held-out data, and notes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.checkpoints.training_data import read_training_data
from t5tune.commands.prepare import prepare
from t5tune.data.caches.examples import Examples, find_missing_labels
from t5tune.data.caches.manifest import TABLES
from t5tune.data.caches.prepared import open_examples
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import DataError, SettingsError
from t5tune.progress import Report, silent
from t5tune.settings import PrepareSettings
from t5tune.training.steps import Draw, ExampleDataset
from tests.commands.prepare.ids import write_lines
from tests.support.caches import open_only, prepare_for_run
from tests.support.models.tokenizer_kinds import make_protein_tokenizer
from tests.support.notes import Notes
from tests.support.processes.command_line import t5tune_in_fork

pytestmark = pytest.mark.slow

FOR_PROTEINS = "t5tune inspect --unknown shows an example, and for proteins, set source_words: residues"
NAMES = ["B-LOC", "B-PER", "I-PER", "O"]
TAGGED: list[dict[str, Any]] = [
    {"tokens": ["Angela", "Merkel", "lives", "in", "Berlin"], "ner_tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
    {"tokens": ["Rome", "is", "old"], "ner_tags": ["B-LOC", None, "O"]},
]


def make_settings(folder: Path, *records: Any, **values: Any) -> PrepareSettings:
    data = write_lines(folder / "data.jsonl", *records) if records else None
    given = {} if data is None else {"data_path": str(data)}
    values = {"model_name_or_path": "pocket", "output_dir": folder / "cache", "num_workers": 1, **given, **values}
    return PrepareSettings(**values)


def open_prepared(settings: PrepareSettings, report: Report = silent) -> Examples:
    prepare(settings, report)
    return open_examples(settings.output_dir)


def read_labels(examples: Examples) -> list[list[Any]]:
    """Read the learned labels of each example, with their tokens if words have labels."""
    task, tokenizer = examples.label_task, load_tokenizer(examples.tokenizer_folder)
    assert task is not None
    found = []
    for example in examples:
        places = np.flatnonzero(~np.isnan(example.values)).tolist()
        names = [
            task.names[int(example.values[place])] if task.names else float(example.values[place]) for place in places
        ]
        tokens = [tokenizer.decode([example.source_S[place]]) for place in places] if task.per_token else []
        found.append(list(zip(tokens, names, strict=True)) if task.per_token else names)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_labels_belong_to_the_first_tokens_of_their_words(tmp_path: Path) -> None:
    examples = open_prepared(make_settings(tmp_path, *TAGGED, objective="tag"))
    assert examples.label_task == LabelTask("tag", True, False, tuple(NAMES), "text")
    assert read_labels(examples) == [
        [("An", "B-PER"), ("M", "I-PER"), ("live", "O"), ("in", "O"), ("B", "B-LOC")],
        [("R", "B-LOC"), ("old", "O")],
    ]
    for example in examples:
        assert isinstance(example, LabeledExample)
        assert len(example.values) == len(example.source_S)
        assert np.isnan(example.values[-1])
    trained = read_training_data(tmp_path / "cache")
    assert trained is not None
    assert trained.labels == examples.label_task
    sources, targets = examples.read_lengths()
    assert (sources.tolist(), targets.tolist()) == ([len(each.source_S) for each in examples], [0, 0])
    assert examples.added_tokens == []
    assert "chat_template" not in (examples.tokenizer_folder / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("labels", "more", "names", "numbers"),
    [
        ([10, 9, 10], {}, ("9", "10"), [[1], [0], [1]]),
        (["b", "a", "c"], {"labels": ["c", "b"]}, ("c", "b"), [[1], [0]]),
        ([["b"], ["c", "b"], []], {}, ("b", "c"), [[0], [1, 0], []]),
        ([True, False], {}, ("false", "true"), [[1], [0]]),
    ],
)
def test_classes_are_numbered_in_their_order(
    labels: list[Any], more: dict[str, Any], names: tuple[str, ...], numbers: list[list[int]], tmp_path: Path
) -> None:
    records = [{"text": f"t {number}", "label": label} for number, label in enumerate(labels)]
    settings = make_settings(tmp_path, *records, objective="classify", max_rejected_fraction=None, **more)
    examples = open_prepared(settings)
    assert examples.label_task is not None
    assert examples.label_task.names == names
    assert [each.values.astype(int).tolist() for each in examples] == numbers
    assert prepare(settings).up_to_date


def test_numbers_are_stored_as_they_are_and_have_a_scale(tmp_path: Path) -> None:
    numbers = [0.1, -3e5, 7, 1e-30]
    records = [{"text": f"t {number}", "score": number} for number in numbers]
    examples = open_prepared(make_settings(tmp_path, *records, objective="regress"))
    assert np.concatenate([each.values for each in examples]).tolist() == numbers
    scale, mean = examples.compute_label_scale()
    assert mean == pytest.approx(np.mean(numbers))
    assert scale == 2.0**17
    assert 0.7 < scale / np.std(numbers) < 1.5
    single = open_prepared(make_settings(tmp_path, records[2], objective="regress"))
    assert single.compute_label_scale() == (1.0, 7.0)


def test_proteins_are_prepared_with_a_vocabulary_of_residues(tmp_path: Path) -> None:
    size = make_protein_tokenizer(tmp_path)
    config = {"model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    record = {"sequence": "MKUA", "label": "CCHE", "mask": "0111"}
    values = {"model_name_or_path": str(tmp_path), "objective": "tag"}
    notes = Notes()
    examples = open_prepared(make_settings(tmp_path, record, **values, source_words="residues"), notes)
    assert read_labels(examples) == [[("K", "C"), ("X", "H"), ("A", "E")]]
    assert not notes.warnings
    other = {"tokens": ["MKUA", "M"], "tags": ["C", "H"]}
    open_prepared(make_settings(tmp_path, other, **values), notes)
    assert notes.warnings == [f"1 of 1 source has unknown tokens; {FOR_PROTEINS}"]


def test_a_dummy_example_has_nothing_to_learn(tmp_path: Path) -> None:
    examples = open_prepared(make_settings(tmp_path, *TAGGED, objective="tag"))
    dummy = ExampleDataset(examples)[Draw(0, 0, is_filler=True)]
    assert isinstance(dummy, LabeledExample)
    assert (dummy.source_S.tolist(), dummy.target_T.size, np.isnan(dummy.values).tolist()) == ([1], 0, [True])


@pytest.mark.parametrize("objective", ["tag", "regress"])
@pytest.mark.variants("tag")
def test_parts_and_workers_give_the_same_bytes(objective: str, tmp_path: Path) -> None:
    records = [
        {
            "tokens": [f"w{number}", f"v{number % 7}"],
            "ner_tags": [f"L{number % 11}", f"M{number // 20}"],
            "score": number,
        }
        for number in range(100)
    ]
    records += [records[number] for number in (3, 30, 3)]
    data = str(write_lines(tmp_path / "data.jsonl", *records))
    for more in ({}, {"dedupe": "exact"}, {"num_data": 70}):
        values: dict[str, Any] = {"data_path": data, "objective": objective, **more}
        one, parts, workers = (tmp_path / f"{name}-{len(more)}-{[*more]}" for name in ("one", "parts", "workers"))
        prepare(make_settings(tmp_path, output_dir=one, **values))
        for index in (2, 0, 1):
            prepare(make_settings(tmp_path, output_dir=parts, shard=f"{index}/3", **values))
        prepare(make_settings(tmp_path, output_dir=workers, **values | {"num_workers": 2}))
        assert bytes_of(workers) == bytes_of(one)
        for name in TABLES:
            assert (parts / "data" / name).read_bytes() == (one / "data" / name).read_bytes()
        assert open_only(parts).manifest["labels"] == open_only(one).manifest["labels"]
    examples = open_examples(one)
    assert len(examples) == 70


def test_records_from_standard_input_have_labels(tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(record)}\n" for record in TAGGED)
    arguments = ["--model-name-or-path", "pocket", "--data-path", "-", "--output-dir", tmp_path / "cache"]
    done = t5tune_in_fork("prepare", *arguments, "--objective", "tag", stdin=lines.encode())
    assert done.code == 0, done.stderr
    assert "4 labels: B-LOC, B-PER, I-PER, O" in done.stderr
    assert len(open_examples(tmp_path / "cache")) == 2


def test_a_mixture_has_the_labels_of_all_datasets(tmp_path: Path) -> None:
    for name, labels in (("a", "cb"), ("b", "ab")):
        records = [{"text": f"{name} {label}", "label": label} for label in labels]
        write_lines(tmp_path / f"{name}.jsonl", *records)
    data = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": number} for number, name in ((1, "a"), (2, "b"))]
    settings = make_settings(tmp_path, data=data, objective="classify")
    examples = open_prepared(settings)
    assert examples.label_task is not None
    assert examples.label_task.names == ("a", "b", "c")
    assert read_labels(examples) == [["c"], ["b"], ["a"], ["b"]]
    assert read_labels(examples.take(1)) == [["c"], ["a"]]
    assert dict(examples.count_classes()) == {"a": 1, "b": 2, "c": 1}
    assert prepare(settings).up_to_date
    write_lines(tmp_path / "b.jsonl", {"text": "x", "label": ["a", "b"]})
    with pytest.raises(DataError, match="data_path: a has one label per text .* b has several labels per text"):
        prepare(settings)


def test_labels_are_not_mixed_with_answers(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"source": "x", "target": "y"})
    data = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "objective": "sft"}]
    with pytest.raises(SettingsError, match="objective is sft here and tag for the run; labels can't be mixed"):
        make_settings(tmp_path, data=data, objective="tag")


def test_held_out_data_has_only_the_labels_of_training(tmp_path: Path) -> None:
    trained = [{"text": f"t {label}", "label": label} for label in ("Nucleus", "Cytoplasm")]
    (tmp_path / "train").mkdir()
    training = open_prepared(make_settings(tmp_path / "train", *trained, objective="classify"))
    records = [{"text": "a", "label": "Nucleus"}, {"text": "b", "label": "Nucleus2"}]
    settings = make_settings(tmp_path, *records, objective="classify", max_rejected_fraction=0.5)
    prepare_for_run(settings, tokenizer_source=tmp_path / "train" / "cache", is_evaluation=True)
    held_out = open_examples(tmp_path / "cache").map_labels(training.label_task)
    assert held_out.label_task == training.label_task
    assert read_labels(held_out) == [["Nucleus"]]
    (rejected,) = (tmp_path / "cache" / "data" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"] == "unknown_label"
    assert json.loads(rejected)["message"] == 'label "Nucleus2" isn\'t among the 2 labels'
    (note,) = find_missing_labels(load_tokenizer(training.tokenizer_folder), training, held_out)
    assert note.text.startswith("no held-out example has the label 'Cytoplasm'")
    changed = settings.replace(max_rejected_fraction=0.4, output_dir=tmp_path / "other")
    with pytest.raises(DataError, match="1 of 2 records rejected"):
        prepare_for_run(changed, tokenizer_source=tmp_path / "train" / "cache", is_evaluation=True)


def test_a_held_out_cache_gets_the_numbers_of_training(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("train", "eval", "other")]
    labels = ("ab", "ba", "bxy")
    found = []
    for folder, of_cache in zip(folders, labels, strict=True):
        folder.mkdir()
        records = [{"text": f"t {label}", "label": label} for label in of_cache]
        found.append(open_prepared(make_settings(folder, *records, objective="classify")))
    training, held_out, other = found
    assert read_labels(held_out.map_labels(training.label_task)) == [["b"], ["a"]]
    with pytest.raises(DataError, match="2 labels that aren't among the 2 labels to predict: 'x', 'y'"):
        other.map_labels(training.label_task)
    numbers = open_prepared(make_settings(tmp_path, {"text": "t", "score": 1}, objective="regress"))
    with pytest.raises(DataError, match="has one number per text .*one label per text"):
        numbers.map_labels(training.label_task)
    assert (
        training.identify() != training.map_labels(LabelTask("classify", False, False, ("b", "a"), "text")).identify()
    )


def test_exact_copies_have_the_same_text_and_labels(tmp_path: Path) -> None:
    records = [{"text": "a", "label": label} for label in ("x", "y", "x")]
    settings = make_settings(tmp_path, *records, objective="classify", dedupe="exact", eval_fraction=0.5)
    with pytest.raises(DataError, match="leaves no texts to train on"):  # the same text is on one side
        prepare(settings)
    assert read_labels(open_prepared(settings.replace(eval_fraction=0.0))) == [["x"], ["y"]]


def test_the_first_record_decides_between_one_label_and_several(tmp_path: Path) -> None:
    records = [{"text": "a", "label": None}, {"text": "b", "label": ["x", "y"]}, {"text": "c", "label": "x"}]
    settings = make_settings(tmp_path, *records, objective="classify", max_rejected_fraction=0.5)
    examples = open_prepared(settings)
    assert examples.label_task is not None
    assert examples.label_task.several
    rejected = [json.loads(line) for line in (tmp_path / "cache/data/rejected.jsonl").read_text().splitlines()]
    assert [each["message"] for each in rejected] == [
        "label: no label to learn", "expected a list of labels, as in the first records, found one label",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("records", "settings", "warnings"),
    [
        ([{"sequence": "猫犬", "label": "HC"}, {"sequence": "MK", "label": "HC"}],
         {"objective": "tag", "source_words": "characters"},
         [f"1 of 2 sources has unknown tokens; {FOR_PROTEINS}"]),
        ([{"text": "a long text with 猫 in it, and many more words", "label": "x"}], {"objective": "classify"},
         ["1 of 1 source has unknown tokens; t5tune inspect --unknown shows an example"]),
        (TAGGED[:1], {"objective": "tag", "model_max_length": 8},
         ["1 source truncated to model_max_length 8; t5tune inspect {cache}/data --worst-cut shows the worst",
          "3 labels cut off by model_max_length 8; they aren't learned"]),
        ([{"tokens": ["a", " "], "tags": ["x", "y"]}], {"objective": "tag"},
         ["1 label of words without a token, such as spaces; they aren't learned"]),
        ([{"text": "a", "label": "Spam"}, {"text": "b", "label": "spam "}], {"objective": "classify"},
         ["labels that differ only in case or spaces are different labels: 'Spam', 'spam '; if they mean the same, "
          "spell them alike in the data"]),
        ([{"text": "a", "label": f"0.{number}"} for number in range(1001)], {"objective": "classify"},
         ["the labels are 1,001 different numbers, each a class; to predict numbers, use --objective regress"]),
        ([{"sequence": "MK" * number, "label": "HC" * number} for number in range(1, 12)], {"objective": "tag"},
         ["11 labels in 11 examples: most are rare; for a label per character, set source_words: characters or "
          "residues"]),
        ([{"text": f"t {number}", "label": "ab"[number // 19]} for number in range(20)],
         {"objective": "classify", "eval_fraction": 0.1},
         ["no held-out example has the label 'b'; use a larger eval_fraction, a different split_seed, or a file with "
          "every label as eval_data_path"]),
    ],
)  # fmt: skip
def test_doubtful_and_lost_labels_are_reported(
    records: list[Any], settings: dict[str, Any], warnings: list[str], tmp_path: Path
) -> None:
    notes = Notes()
    open_prepared(make_settings(tmp_path, *records, **settings), notes)
    assert notes.warnings == [text.format(cache=tmp_path / "cache") for text in warnings]


def test_texts_without_any_label_left_are_an_error(tmp_path: Path) -> None:
    record = {"tokens": [*"abcdefghij"], "tags": [*[None] * 9, "x"]}
    with pytest.raises(DataError, match="nothing to train on among 1 record") as refused:
        prepare(make_settings(tmp_path, record, objective="tag", model_max_length=8))
    assert refused.value.hint == "every label is of a word that model_max_length cuts off, or of a blank word"
