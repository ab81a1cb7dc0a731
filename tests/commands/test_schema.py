"""Schemas for editors, templates to copy, a dry run, and completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune.commands.schema import FLAG_METADATA, schema
from t5tune.commands.templates import templates
from t5tune.errors import SettingsError
from t5tune.settings import (
    COMMANDS,
    DatasetSettings,
    SchemaSettings,
    Settings,
    TemplatesSettings,
    TrainSettings,
    load_settings,
    packaged_templates,
)
from t5tune.settings.field_types import NoneIfUnset
from tests.support.processes.command_line import t5tune_in_fork


@pytest.mark.parametrize("model", COMMANDS, ids=lambda model: model.command)
def test_every_command_has_a_schema_of_its_settings(model: type) -> None:
    described = schema(SchemaSettings(of=model.command))
    assert set(described["properties"]) == set(model.model_fields)
    assert "required" not in described
    assert described["additionalProperties"] is False
    assert not [name for setting in described["properties"].values() for name in FLAG_METADATA if name in setting]


def test_a_schema_contains_choices_ranges_and_lists_written_as_text() -> None:
    properties = schema(SchemaSettings(of="train"))["properties"]
    assert properties["quant_type"]["enum"] == ["nf4", "fp4", "int8"]
    assert properties["lora_r"]["exclusiveMinimum"] == 0
    assert {choice["type"] for choice in properties["lora_target_modules"]["anyOf"]} == {"array", "string"}


@pytest.mark.parametrize("model", COMMANDS, ids=lambda model: model.command)
def test_a_schema_allows_the_words_that_mean_unset(model: type[Settings]) -> None:
    properties = schema(SchemaSettings(of=model.command))["properties"]
    for name, field in model.model_fields.items():
        if NoneIfUnset in field.metadata:
            assert {"enum": ["none", "None", -1]} in properties[name]["anyOf"], name


@pytest.mark.parametrize("name", ["data", "eval_data"])
def test_a_schema_allows_what_is_read_as_datasets(name: str, tmp_path: Path) -> None:
    """A dataset or its path, a list of these, and the words that mean unset."""
    described = schema(SchemaSettings(of="train"))
    datasets, *unset = described["properties"][name]["anyOf"]
    dataset = {"$ref": "#/$defs/DatasetSettings"}
    assert datasets == {"anyOf": [{"type": "array", "items": dataset}, dataset], "minItems": 1}
    assert unset == [{"type": "null"}, {"enum": ["none", "None", -1]}]
    text, names = described["$defs"]["DatasetSettings"]["anyOf"]
    assert text == {"type": "string"}
    assert names["properties"].keys() == DatasetSettings.model_fields.keys()

    def read(value: str) -> object:
        (tmp_path / "run.yaml").write_text(f"{name}: {value}\n{paths}")
        flags = {"model_name_or_path": "pocket", "output_dir": "run"}
        return getattr(load_settings(TrainSettings, str(tmp_path / "run.yaml"), {}, flags)[0], name)

    paths = "data_path: b.jsonl\n" if name == "eval_data" else ""
    for value in ("a.jsonl", "{path: a.jsonl}", "[a.jsonl]", "[{path: a.jsonl}]"):
        assert read(value) == [DatasetSettings(path=["a.jsonl"])]
    paths = "data_path: b.jsonl\n"
    for value in ("none", "null", "-1"):
        assert read(value) is None


@pytest.mark.parametrize("name", packaged_templates.list_names("runs"))
def test_run_configs_and_copies_name_an_adjacent_schema(name: str, tmp_path: Path) -> None:
    packaged = packaged_templates.find_template_file("config", name)
    first = packaged.read_text().splitlines()[0]
    named = (packaged.parent / first.partition("$schema=")[2]).resolve()
    assert named == packaged.parents[1] / "schemas" / "train.json"
    run, copied_schema = templates(TemplatesSettings(action="copy", name=name, to=tmp_path)).copied
    named = run.read_text().splitlines()[0].partition("$schema=")[2]
    assert run.parent / named == copied_schema
    assert json.loads(copied_schema.read_text()) == schema(SchemaSettings(of="train"))
    properties = schema(SchemaSettings(of="train"))["properties"]
    from t5tune.io.yaml_file import read_yaml

    assert read_yaml(run) == read_yaml(packaged)
    assert read_yaml(run).keys() <= properties.keys()
    load_settings(TrainSettings, str(run), {}, {})


@pytest.mark.slow
def test_templates_are_listed_shown_and_copied_without_overwriting(tmp_path: Path) -> None:
    listed = t5tune_in_fork("templates")
    assert listed.code == 0
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines() if line.startswith("  ")]
    about_pocket = "The built-in model on the packaged conversations: one to three minutes on two cores."
    assert dict(lines)["pocket"] == about_pocket
    assert {"flan-t5-xxl-qlora", "plain", "zero3"} <= dict(lines).keys()
    assert all(text.endswith(".") for _, text in lines), "each is a sentence"
    shown = t5tune_in_fork("templates", "show", "zero3")
    assert json.loads(shown.stdout)["zero_optimization"]["stage"] == 3
    copied = t5tune_in_fork("templates", "copy", "conversations/plain", tmp_path / "mine.yaml")
    assert copied.stdout.strip() == str(tmp_path / "mine.yaml")
    again = t5tune_in_fork("templates", "copy", "conversations/plain", tmp_path / "mine.yaml")
    assert again.code == 2
    assert "already exists" in again.stderr
    for misspelt, meant in (("zer03", "zero3"), ("runs/poket", "runs/pocket")):
        with pytest.raises(SettingsError, match=rf"{misspelt}: no such template; did you mean {meant}\?"):
            templates(TemplatesSettings(action="show", name=misspelt))
    refused = t5tune_in_fork("train", "--config", "poket", "--dry-run")
    assert refused.code == 2
    assert "config: poket: no file or template of that name; did you mean pocket?" in refused.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_dry_run_shows_its_result_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    arguments = ["train", "--config", "pocket", "--output-dir", run, "--dry-run", "--num-processes", "2"]
    done = t5tune_in_fork(*arguments)
    assert done.code == 0, done.stderr
    assert "lora_r: 8" in done.stdout
    assert "no DeepSpeed *" in done.stdout
    command = f"torchrun --nproc-per-node 2 -m t5tune train --config '{run / 'settings.yaml'}'"
    assert done.stdout.splitlines()[-1] == f"# launch command, once the settings are written: {command}"
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "zero" in line)
    assert not run.exists()
    (tmp_path / "mine.yaml").write_text(done.stdout)
    settings, _ = load_settings(TrainSettings, file=str(tmp_path / "mine.yaml"))
    assert not settings.dry_run
    assert settings.num_processes == 2
    wrong = t5tune_in_fork(*arguments, "--report-to", "nothing-such")
    assert wrong.code == 2


@pytest.mark.slow
def test_a_dry_run_does_not_execute_a_metric_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')")
    flags = ("--metric", f"{tmp_path}/mine.py:score", "--eval-generate", 2, "--eval-fraction", 0.1)
    train = ("train", "--config", "pocket", "--output-dir", tmp_path / "run", *flags)
    shown = t5tune_in_fork(*train, "--dry-run")
    assert shown.code == 0, shown.stderr
    assert "mine.py:score" in shown.stdout
    refused = t5tune_in_fork(*train)
    assert (refused.code, "executed" in refused.stderr) == (2, True)


@pytest.mark.long
def test_a_dry_run_is_for_any_machine(tmp_path: Path) -> None:
    arguments = ["train", "--config", "pocket", "--output-dir", tmp_path / "run", "--dry-run", "--num-gpus", "4"]
    elsewhere = t5tune_in_fork(*arguments)
    assert elsewhere.code == 0, elsewhere.stderr
    assert "warning: num_gpus: 4: this machine has " in elsewhere.stderr
    assert "torchrun --nproc-per-node 4" in elsewhere.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "place", "expected"), [("t5tune pl", 1, "plan"), ("t5tune train --lora-dr", 2, "--lora-dropout")]
)
def test_the_shell_completes_commands_and_flags(line: str, place: int, expected: str) -> None:
    env = {**os.environ, "_T5TUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(place)}
    command = [sys.executable, "-c", "from t5tune.cli import main; main()"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [expected], done.stderr


def test_a_size_can_be_written_with_its_unit() -> None:
    merge = schema(SchemaSettings(of="merge"))
    assert {"type": "string"} in merge["properties"]["max_shard_size"]["anyOf"][0]["anyOf"]
