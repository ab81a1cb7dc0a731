"""inspect shows labels at the tokens that predict them, or after the text."""

import json
import re
from pathlib import Path
from typing import Any

from t5tune.commands.inspect import inspect
from t5tune.commands.prepare import prepare
from t5tune.settings import InspectSettings, PrepareSettings
from tests.commands.prepare.ids import write_lines
from tests.support.processes.command_line import t5tune_in_fork

TAGGED = {"tokens": ["Angela", "lives", "in", "Rome"], "tags": ["B-PER", None, "O", "B-LOC"]}


def prepare_labels(folder: Path, *records: Any, **values: Any) -> Path:
    data = write_lines(folder / "data.jsonl", *records)
    settings = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": folder / "cache", **values}
    return prepare(PrepareSettings(**settings)).cache


def test_each_label_follows_its_token(tmp_path: Path) -> None:
    cache = prepare_labels(tmp_path, TAGGED, objective="tag")
    shown = t5tune_in_fork("inspect", cache).stdout
    assert "An[B-PER]gela lives in[O] R[B-LOC]ome</s>" in shown
    assert "target" not in shown
    assert "conversation" not in shown
    (line,) = t5tune_in_fork("inspect", cache, "--json").stdout.splitlines()
    found = json.loads(line)
    assert len(found["labels"]) == len(found["source_ids"])
    assert [label for label in found["labels"] if label] == ["B-PER", "O", "B-LOC"]
    assert found["source_text"] == "Angela lives in Rome"


def test_labels_of_words_that_were_cut_off_are_missing(tmp_path: Path) -> None:
    cache = prepare_labels(tmp_path, TAGGED, objective="tag", model_max_length=8, source_prefix="a ")
    shown = t5tune_in_fork("inspect", cache, "--worst-cut").stdout
    assert re.search(r"a An\[B-PER\]gela lives in\[O\]\[cut: +Rome\]</s>", shown)


def test_labels_and_numbers_of_texts_are_shown(tmp_path: Path) -> None:
    records = [{"text": "good", "labels": ["b", " a"]}, {"text": "so so", "labels": []}]
    shown = t5tune_in_fork("inspect", prepare_labels(tmp_path, *records, objective="classify"), "--all").stdout
    assert re.findall(r"(\w+)</s>\nlabel\n(.*)", shown) == [("good", "b, ' a'"), ("so", "none")]
    shown = t5tune_in_fork("inspect", prepare_labels(tmp_path, {"text": "good", "score": -1.5}, objective="regress"))
    assert "good</s>\nlabel\n-1.5\n" in shown.stdout


def test_the_page_explains_labels_and_leaves_out_targets(tmp_path: Path) -> None:
    cache = prepare_labels(tmp_path, TAGGED, objective="tag")
    statistics = inspect(InspectSettings(cache=cache, html=tmp_path / "page.html", stats=True)).statistics
    assert statistics is not None
    assert statistics.target is None
    text = (tmp_path / "page.html").read_text()
    assert '<span class="label">[B-PER]</span>' in text
    assert '<li><span class="label">[label]</span>: the label of the token before it, or of the text</li>' in text
    assert '<span class="target">' not in text
    assert "Target length" not in text
    assert ".label" in text.partition("</style>")[0]
    assert "target length" not in t5tune_in_fork("inspect", cache, "--stats").stdout


def test_vocabularies_are_compared_on_residues(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", {"sequence": "MUK", "label": "HHC"})
    settings = InspectSettings(
        model_name_or_path=["pocket"], data_path=[str(data)], objective="tag", source_words="residues"
    )
    (split,) = inspect(settings).splits
    assert split.tokens_per_word == 1
    assert "X" in str(split)
