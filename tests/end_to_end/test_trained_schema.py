"""A run's JSON schema: it is compared with the targets, travels with the weights, and constrains replies by default."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from t5tune.commands.chat import Chatter
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.serve import serve
from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.settings import ChatSettings, EvaluateSettings, MergeSettings, ServeSettings, TrainSettings
from tests.serving.test_replies import connect, reply
from tests.support.notes import Notes

pytest.importorskip("llguidance")
pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Otto"]}, "color": {"enum": ["red", "blue"]}, "lit": {"type": "boolean"}},
    "required": ["name", "color"],
    "additionalProperties": False,
}
ORDERS = [("Ada", "red"), ("Otto", "blue"), ("Ada", "blue")]


def write_pairs(path: Path, records: list[Any]) -> Path:
    pairs = [{"source": f"the lamp of {record}", "target": json.dumps(record, indent=1)} for record in records]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def train_pairs(base: Path, folder: Path, records: list[Any], notes: Notes) -> Path:
    data = write_pairs(folder / "pairs.jsonl", records)
    train(
        TrainSettings(
            model_name_or_path=base, data_path=data, output_dir=folder / "run", json_schema=SCHEMA, max_steps=2,
            use_cpu=True, report_samples=0,
        ),
        notes,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def run(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"name": name, "color": color} for name, color in ORDERS] * 4
    notes = Notes()
    folder = train_pairs(untied_base, tmp_path_factory.mktemp("schema"), records, notes)
    assert not [text for text in notes if "violate" in text]
    return folder


@pytest.fixture(scope="module")
def models(run: Path) -> list[Path]:
    merged, converted = run.with_name("merged"), run.with_name("converted")
    merge(MergeSettings(adapter=[run], output_dir=merged, verify=False))
    models = [run, merged]
    if find_spec("ctranslate2") is not None:
        merge(MergeSettings(adapter=[run], output_dir=converted, verify=False, to="ctranslate2"))
        models.append(converted)
    return models


def test_the_schema_travels_with_the_weights(models: list[Path]) -> None:
    for folder in models:
        stored = json.loads((folder / "training_data.json").read_text())["json_schema"]
        assert json.dumps(stored) == json.dumps(SCHEMA)  # the order of properties, too


def test_replies_follow_the_schema_by_default(run: Path) -> None:
    settings: dict[str, Any] = {"model_name_or_path": run, "use_cpu": True, "max_new_tokens": 60}
    constrained = Chatter.load(ChatSettings(**settings)).reply("the lamp").reply
    jsonschema.validate(json.loads(constrained), SCHEMA)
    assert Chatter.load(ChatSettings(**settings, json_schema="none")).reply("the lamp").reply != constrained


def test_choices_end_with_the_text_of_the_template_in_use(run: Path) -> None:
    settings = ChatSettings(model_name_or_path=run, use_cpu=True, choices="one", conversation_template="fastchat-t5")
    chatter = Chatter.load(settings)
    assert [each.reply("the lamp").reply for each in (chatter, chatter.with_template("plain"))] == ["one", "one"]


def test_evaluate_constrains_predictions_and_counts_incomplete_ones(run: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "held_out.jsonl", [{"name": "Ada", "color": "red"}, {"name": "Otto", "color": "red"}])
    settings = EvaluateSettings(
        model_name_or_path=run, data_path=data, output_dir=tmp_path / "whole", use_cpu=True, max_new_tokens=60
    )
    found = evaluate(settings)
    assert (found.valid_json, found.cut_off) == (100, 0)
    for line in found.predictions.read_text().splitlines():
        jsonschema.validate(json.loads(json.loads(line)["prediction"]), SCHEMA)
    short = evaluate(settings.replace(max_new_tokens=5, output_dir=tmp_path / "short"))
    assert (short.valid_json, short.cut_off) == (0, 2)
    free = evaluate(settings.replace(json_schema=None, output_dir=tmp_path / "free"))
    assert free.valid_json == 0
    assert free.loss == found.loss


def test_the_base_without_braces_is_compared_with_free_predictions(run: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "held_out.jsonl", [{"name": "Ada", "color": "red"}])
    notes = Notes()
    found = evaluate(
        EvaluateSettings(
            model_name_or_path=run, data_path=data, output_dir=tmp_path / "compared", use_cpu=True, max_new_tokens=60,
            compare_base=True,
        ),
        notes,
    )  # fmt: skip
    assert found.valid_json == 100
    assert found.base is not None
    assert found.base["valid_json"] == 0
    assert [text for text in notes.warnings if "the base's predictions are free" in text] == [
        "the base's predictions are free: json_schema of training: this tokenizer can't write '{'"
    ]


def test_serve_constrains_replies_by_default(models: list[Path], tmp_path: Path) -> None:
    names = {folder.name: str(folder) for folder in models}
    settings = ServeSettings(models=names, port=0, use_cpu=True, max_new_tokens=60, converted_dir=tmp_path)
    with serve(settings) as server, connect(server) as client:
        texts = [reply(client, name, "the lamp") for name in names]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_targets_that_violate_the_schema_are_counted(untied_base: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    right, wrong = {"name": "Ada", "color": "red"}, {"color": "red", "name": "Ada"}
    notes = Notes()
    train_pairs(untied_base, tmp_path, [right, wrong, right, {"name": "Mira"}], notes)
    (warning,) = [text for text in notes.warnings if "violate" in text]
    assert warning.startswith("json_schema: 2 of 4 targets violate it, such as example 1's: ")
    with pytest.raises(SettingsError, match="json_schema: 3 of 3 targets violate it, such as example 0's"):
        train_pairs(untied_base, tmp_path / "second", [wrong] * 3, notes)


def test_replies_may_have_the_escapes_that_targets_have(untied_base: Path, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 5}}
    targets = [r'["no\/yes"]', r'["caf\u00e9"]', '["café"]', r'["\n"]']
    pairs = [{"source": "the lamp", "target": target} for target in targets]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = {"model_name_or_path": untied_base, "data_path": tmp_path / "pairs.jsonl", "json_schema": schema}
    notes = Notes()
    train(TrainSettings(**values, output_dir=tmp_path / "run", max_steps=1, use_cpu=True, report_samples=0), notes)
    assert [text for text in notes if "escapes" in text or "violate" in text] == [
        r"json_schema: 1 target with escapes such as \/ or \u00e9; replies may have them, too",
        "json_schema: 1 of 4 targets violate it, such as example 0's: '[\"no\\\\/yes\"]'; replies will follow it "
        "nevertheless",
    ]
    stored = json.loads((tmp_path / "run/training_data.json").read_text())["json_schema"]
    assert stored == {**schema, "x-escapes": "/u"}
