"""Held-out conversations: where texts have labels, both sides have each label of two or more texts."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.examples import Examples
from t5tune.data.caches.held_out import find_held_out_keys
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.span_corruption import mix_bits
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.settings import PrepareSettings
from tests.support.caches import open_only

COUNTS = {"common": 200, "some": 31, "few": 4, "two": 2, "one": 1}
WANTED = {"common": 20, "some": 3, "few": 1, "two": 1}


def prepare_records(folder: Path, records: list[dict[str, Any]], **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = {"model_name_or_path": "pocket", "data_path": str(folder / "data.jsonl"), "num_workers": 1}
    prepare(PrepareSettings(**(given | {"output_dir": folder / "cache"} | values)))
    return folder / "cache"


def make_labeled(counts: dict[str, int]) -> list[tuple[str, str]]:
    pairs = [(f"{label} {number}", label) for label, count in counts.items() for number in range(count)]
    random.Random(3).shuffle(pairs)
    return pairs


def read_labels(examples: Examples | None) -> list[str]:
    """Read the label of each text, from its answer or its number."""
    assert examples is not None
    task = examples.label_task
    if task is not None:
        return [task.names[int(example.values[0])] for example in examples]
    tokenizer = load_tokenizer(examples.tokenizer_folder)
    return [tokenizer.decode(example.target_T[:-1]) for example in examples]


@pytest.mark.parametrize("objective", ["classify", "sft"])
def test_each_label_is_divided(objective: str, tmp_path: Path) -> None:
    names = ("text", "label") if objective == "classify" else ("source", "target")
    records = [dict(zip(names, pair, strict=True)) for pair in make_labeled(COUNTS)]
    folder = prepare_records(tmp_path / "data", records, objective=objective, eval_fraction=0.1)
    training, held_out = open_examples(folder).split_as_prepared()
    assert Counter(read_labels(held_out)) == WANTED
    assert Counter(read_labels(training)) == Counter(COUNTS) - Counter(WANTED)


def test_answers_that_are_not_labels_are_held_out_by_hash_alone(tmp_path: Path) -> None:
    """Too many different answers, or too few of each, or numbers: as in a cache without labels."""
    texts = [f"text {number}" for number in range(202)]
    data: list[tuple[str, list[dict[str, Any]]]] = [
        ("sft", [{"source": text, "target": f"a{min(number, 100)}"} for number, text in enumerate(texts)]),
        ("sft", [{"source": text, "target": f"a{number // 3}"} for number, text in enumerate(texts)]),
        ("regress", [{"text": text, "score": number // 101} for number, text in enumerate(texts)]),
    ]
    for number, (objective, records) in enumerate(data):
        cache = open_only(prepare_records(tmp_path / str(number), records, objective=objective))
        keys = cache.read_keys()
        ranked = keys[np.argsort(mix_bits(keys ^ mix_bits(np.array(5, np.uint64))))]
        assert find_held_out_keys(cache, 0.1, 5).tolist() == ranked[:20].tolist()


def test_labels_of_a_single_text_each_leave_the_usual_number(tmp_path: Path) -> None:
    records = [{"text": f"text {number}", "label": f"label {number}"} for number in range(40)]
    cache = open_only(prepare_records(tmp_path / "data", records, objective="classify"))
    assert len(find_held_out_keys(cache, 0.1, 5)) == 4


@pytest.mark.parametrize("kind", ["tag", "several"])
def test_texts_with_several_labels_leave_each_label_on_both_sides(kind: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    # a class n is in about 300 / (n + 1) texts
    rows = [[f"c{n}" for n in range(60) if rng.random() < 1 / (n + 1)] for _ in range(300)]
    # held out for d and e, the last two texts would leave no z to train on
    rows += [row.split() for n in range(20) for row in (f"d{n}", f"e{n}", f"d{n} z{n}", f"e{n} z{n}")]
    records: list[dict[str, Any]]
    if kind == "tag":
        rows = [["c0", *row] for row in rows]
        records = [{"tokens": [f"w{n}", *map(str, row[1:])], "tags": row} for n, row in enumerate(rows)]
    else:
        records = [{"text": f"text {n}", "labels": row} for n, row in enumerate(rows)]
    objective = "tag" if kind == "tag" else "classify"
    cache = open_only(prepare_records(tmp_path / "data", records, objective=objective))
    held_out = np.isin(cache.read_keys(), find_held_out_keys(cache, 0.1, 42))
    sides = defaultdict(list)
    for row, is_held_out in zip(rows, held_out, strict=True):
        for label in {*row}:
            sides[label].append(is_held_out)
    assert len(sides) > 110
    assert {label for label, side in sides.items() if len({*side}) < 2} == {
        label for label, side in sides.items() if len(side) == 1
    }
    assert not any(side[0] for side in sides.values() if len(side) == 1)
    assert 60 <= np.count_nonzero(held_out) <= 110


def test_few_texts_change_sides_when_data_is_added(tmp_path: Path) -> None:
    pairs = make_labeled({"a": 400, "b": 50, "c": 5})
    caches = []
    for count in (440, 455):
        records = [{"text": text, "label": label} for text, label in pairs[:count]]
        caches.append(open_only(prepare_records(tmp_path / str(count), records, objective="classify")))
    fewer, more = ({*find_held_out_keys(cache, 0.1, 42).tolist()} for cache in caches)
    assert len(fewer) > 40
    assert len(fewer ^ more) <= 8


def test_the_order_of_a_models_labels_does_not_matter(tmp_path: Path) -> None:
    rng = random.Random(1)
    records = [{"text": f"text {n}", "labels": rng.sample("abcdefgh", 3)} for n in range(60)]
    folder = prepare_records(tmp_path / "data", records, objective="classify", eval_fraction=0.2)
    examples = open_examples(folder)
    task = examples.label_task
    assert task is not None
    backwards = examples.map_labels(type(task)(**{**vars(task), "names": task.names[::-1]}))
    first, second = (each.find_prepared_keys().tolist() for each in (examples, backwards))
    assert first == second
    cache: Cache = examples.datasets[0].cache
    assert first == np.sort(find_held_out_keys(cache, 0.2, 42)).tolist()
