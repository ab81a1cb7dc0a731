"""The commands that a command suggests when it ends; test_help.py has those that follow the examples in the help."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t5tune.checkpoints.training_data import TrainingData, write_training_data
from t5tune.cli.next_steps import list_next_steps
from t5tune.commands.prepare import prepare
from t5tune.data.caches.prepared import list_caches
from t5tune.settings import (
    EvaluateSettings,
    ExportSettings,
    MergeSettings,
    PrepareSettings,
    TrainSettings,
    TrimSettings,
    load_settings,
)
from t5tune.settings.groups.record_format import Objective
from tests.support.processes.command_line import parse_words, t5tune_in_fork

pytestmark = pytest.mark.slow

TRAIN = "--model-name-or-path base --output-dir run --data-path"
PREPARE = ["prepare", "--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", "cache"]
SCORES = SimpleNamespace(predictions=Path("evaluation/predictions.jsonl"), perplexity=2.0)


def follow_train(settings: TrainSettings) -> list[str]:
    result = SimpleNamespace(run=Path("run"), eval={"loss": 1.0})
    return [line for _, line in list_next_steps(settings, result)]


def write_made(model: str, objective: Objective) -> None:
    """Write how a model's training examples were made."""
    columns = {"source_column": None, "target_column": None, "source_prefix": ""}
    made = TrainingData(True, "auto", **columns, objective=objective, denoisers=["t5"])
    write_training_data(Path(model), made)


def load_words(words: str, model: Any) -> Any:
    parsed = parse_words(shlex.split(words), model)
    assert parsed.problems == []
    return load_settings(model, flags=parsed.values)[0]


def find_comparison(settings: EvaluateSettings) -> str:
    """Return the words after `t5tune evaluate` of the suggested comparison with the base."""
    [line] = [line for _, line in list_next_steps(settings, SCORES) if "--compare-base" in line]
    return line.removeprefix("t5tune evaluate ")


def test_commands_repeat_the_settings_that_find_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = EvaluateSettings(
        model_name_or_path="google/flan-t5-base", revision="v1", cache_dir=Path("my cache"), adapter=Path("tuned"),
        bf16=True, data_path=["dev.csv"],
    )  # fmt: skip
    base, adapter = "google/flan-t5-base --revision v1 --cache-dir 'my cache'", "--adapter tuned"
    assert list_next_steps(settings, SCORES) == [
        ("next", f"t5tune chat {base} {adapter} --bf16"),
        ("", f"t5tune evaluate {base} --bf16 {adapter} --data-path dev.csv --compare-base"),
        ("", f"t5tune merge --model-name-or-path {base} {adapter} --output-dir merged"),
    ]


def test_the_comparison_repeats_every_setting_that_changes_the_scores(tmp_path: Path) -> None:
    words = (
        "--source-prefix 'fix: ' --conversation-template plain --metrics bleu chrf --metric my.py:good --num-beams 4 "
        "--max-new-tokens 9 --num-data 5 --source-column a --no-double-quant --adapter tuned"
    )
    settings = load_words(f"base {words} --data-path dev.csv b.csv --output-dir out --overwrite", EvaluateSettings)
    assert list_next_steps(settings, SCORES)[0][1].endswith(" --no-double-quant")  # chat
    expected = settings.model_copy(update={"output_dir": None, "overwrite": False, "compare_base": True})
    assert load_words(find_comparison(settings), EvaluateSettings) == expected


@pytest.mark.parametrize(
    "words",
    [
        "--no-q-lora", "--quant-type nf4", "--source-prefix ''", "--data-format auto", "--source-column none",
        "--add-tokens auto",
    ],
)  # fmt: skip
def test_the_comparison_repeats_a_given_default(words: str) -> None:
    settings = load_words(f"run --adapter tuned --data-path dev.csv {words}", EvaluateSettings)
    line = find_comparison(settings)
    assert f" {words} " in line
    assert load_words(line, EvaluateSettings).model_fields_set == settings.model_fields_set | {"compare_base"}


def test_no_comparison_with_an_encoder_that_predicts_labels() -> None:
    labels = SimpleNamespace(predictions=SCORES.predictions, perplexity=None)  # the base has no trained head
    settings = load_words("run --adapter tuned --data-path dev.csv", EvaluateSettings)
    assert find_comparison(settings)
    assert not [line for _, line in list_next_steps(settings, labels) if "--compare-base" in line]


def test_the_comparison_does_not_repeat_a_precision_that_is_unset(tmp_path: Path) -> None:
    """No flag can say it, and `--bf16 none` would name a model."""
    config = tmp_path / "evaluate.yaml"
    config.write_text("model_name_or_path: base\nadapter: tuned\ndata_path: dev.csv\nbf16: null\ncache_dir: null\n")
    settings, _ = load_settings(EvaluateSettings, str(config))
    words = "t5tune evaluate base --cache-dir none --adapter tuned --data-path dev.csv --compare-base"
    assert ("", words) in list_next_steps(settings, SCORES)


def test_a_quantized_run_is_followed_by_plain_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"{TRAIN} a.csv --eval-data-path b.csv --q-lora --quant-type fp4 --no-double-quant"
    assert follow_train(load_words(words, TrainSettings)) == [
        "t5tune chat run",
        "t5tune evaluate run --data-path b.csv",
        "t5tune merge run --output-dir merged",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--eval-data-path owner/name --eval-data-split dev --data-subset en --model-max-length 99 --clean",
            "--data-path owner/name --data-split dev --data-subset en --model-max-length 99 --clean",
        ),
        ("--eval-data-path a.csv --source-column question --target-column answer", "--data-path a.csv"),
        ("--eval-data-path a.jsonl:1 b.jsonl:1", "--data-path a.jsonl:1 b.jsonl:1"),
        ("--eval-data-path a.jsonl:1 b.jsonl:1 --data-subset en", None),
        ("--eval-data-path a.jsonl --data-subset en", "--data-path a.jsonl"),
        ("--eval-data-path a.txt --objective span-corruption", "--data-path a.txt --objective span-corruption"),
        ("--eval-data-path a.jsonl --objective orpo", "--data-path a.jsonl"),
        ("--eval-fraction 0.1 --data-subset en --clean", "--data-path run/data"),
    ],
)
def test_evaluate_reads_held_out_data_like_training(words: str, expected: str | None) -> None:
    steps = follow_train(load_words(f"{TRAIN} owner/name {words}", TrainSettings))
    found = [line.removeprefix("t5tune evaluate run ") for line in steps if line.startswith("t5tune evaluate")]
    assert found == ([] if expected is None else [expected])


def test_tokenized_held_out_data_needs_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dev", "other"):
        prepare(PrepareSettings(model_name_or_path="pocket", data_path="pocket", num_data=1, output_dir=name))
    for names, flags in (("dev", ""), ("dev:1 other:1", ""), ("dev:1 a.jsonl:1", " --clean")):
        steps = follow_train(load_words(f"{TRAIN} a.csv --clean --eval-data-path {names}", TrainSettings))
        assert f"t5tune evaluate run --data-path {names}{flags}" in steps


def test_evaluate_repeats_settings_of_the_training_cache(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("source,target\n" + "".join(f"Two teas {i},Yes\n" for i in range(8)))
    (tmp_path / "dev.csv").write_text("source,target\nTwo teas,Yes\n")
    base = ("--model-name-or-path", "pocket", "--data-path")
    prepared = t5tune_in_fork(
        "prepare", *base, "pairs.csv", "--model-max-length", 64, "--output-dir", "cache", cwd=tmp_path
    )
    assert prepared.code == 0, prepared.stderr
    trained = t5tune_in_fork(
        "train", *base, "cache", "--eval-data-path", "dev.csv", "--output-dir", "run", "--max-steps", 1, "--use-cpu",
        "--report-samples", 0, cwd=tmp_path,
    )  # fmt: skip
    assert trained.code == 0, trained.stderr
    assert "        t5tune evaluate run --data-path dev.csv --model-max-length 64\n" in trained.stderr


def test_no_evaluation_is_suggested_if_flags_cannot_read_its_datasets() -> None:
    settings = TrainSettings(
        model_name_or_path="base", data_path=["a.csv"], output_dir=Path("run"),
        eval_data=[{"path": "b.csv", "source_prefix": "fix: "}],
    )  # fmt: skip
    assert [line.split()[1] for line in follow_train(settings)] == ["chat", "merge"]


def test_a_trimmed_base_is_followed_by_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()
    write_made("merged", "sft")
    prepare(PrepareSettings(model_name_or_path="pocket", data_path="pocket", output_dir="cache"))
    values = {"model_name_or_path": "base", "output_dir": "trimmed"}
    lines = []
    data_of_base = (["a.csv", "b.csv"], "-", ["a.csv", "b.txt"], "cache")
    for data, folder in (*((data, "trimmed") for data in data_of_base), ("a.csv", "merged")):
        settings, result = TrimSettings(**values, data_path=data), SimpleNamespace(checkpoint=Path(folder))
        lines += [line for _, line in list_next_steps(settings, result)]
    train = "t5tune train --model-name-or-path trimmed --data-path {} --learning-rate 3e-4 --output-dir run"
    # raw text only adds tokens, and the ids in a token cache are the base's
    named = ("a.csv b.csv", "DATA.jsonl", "a.csv", "DATA.jsonl")
    assert lines == [*map(train.format, named), "t5tune chat merged"]


def test_a_model_of_raw_text_is_fine_tuned_before_it_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "domain").mkdir()
    write_made("domain", "span-corruption")
    result = SimpleNamespace(run=Path("domain"), adapter=Path("domain"), checkpoint=Path("domain"), eval=None)
    train = "--model-name-or-path base --data-path texts --output-dir domain --objective span-corruption"
    settings = [
        load_words(train, TrainSettings),
        load_words(f"{train} --train-mode full", TrainSettings),
        ExportSettings(checkpoint="run", output_dir="domain"),
        MergeSettings(model_name_or_path="base", adapter=["run"], output_dir="domain"),
        TrimSettings(model_name_or_path="merged", data_path="a.txt", output_dir="domain"),
    ]
    fine_tune = "t5tune train --model-name-or-path domain --data-path DATA.jsonl --learning-rate 3e-4 --output-dir run"
    merge = "t5tune merge domain --output-dir merged"
    evaluate = "t5tune evaluate domain --data-path HELD_OUT.jsonl"
    assert [[line for _, line in list_next_steps(each, result)] for each in settings] == [
        [evaluate, merge], [evaluate, fine_tune], [merge], [fine_tune], [fine_tune],
    ]  # fmt: skip


def test_training_reads_the_data_as_trim_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns = "--source-column question --target-column answer --source-prefix 'answer: '"
    for data in (f"a.csv {columns}", "a.txt b.txt --pair-lines", "a.txt --objective span-corruption"):
        settings = load_words(f"base --vocab-size 640 --output-dir trimmed --data-path {data}", TrimSettings)
        [(_, line)] = list_next_steps(settings, SimpleNamespace(checkpoint=Path("trimmed")))
        start, end = "t5tune train --model-name-or-path trimmed --data-path", "--learning-rate 3e-4 --output-dir run"
        assert line == f"{start} {data} {end}"


def test_an_exported_adapter_is_followed_by_plain_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exported = list_next_steps(ExportSettings(checkpoint="run", output_dir="exported"), SimpleNamespace(adapter=Path()))
    assert [line for _, line in exported] == ["t5tune chat .", "t5tune merge . --output-dir merged"]


def test_inspect_shows_the_first_dataset(tmp_path: Path) -> None:
    single = PrepareSettings(model_name_or_path="pocket", data_path=["pocket"], output_dir=tmp_path / "single")
    assert list_next_steps(single, prepare(single))[0] == ("next", f"t5tune inspect {tmp_path}/single")
    datasets = [{"path": str(tmp_path / "single"), "name": "b"}, {"path": str(tmp_path / "single"), "name": "a"}]
    several = PrepareSettings(model_name_or_path="pocket", data=datasets, output_dir=tmp_path / "several")
    (cache,) = list_caches(tmp_path / "single").values()
    (_, line), *_ = list_next_steps(several, prepare(several))
    words = shlex.split(line)
    assert (words[:2], os.path.realpath(words[2])) == (["t5tune", "inspect"], os.path.realpath(cache))


@pytest.mark.parametrize("file", ["adapter_config.json", "config.json"])
def test_a_stopped_run_is_followed_like_a_finished_one(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / file).touch()
    settings = EvaluateSettings(model_name_or_path="run", data_path=["dev.csv"])
    follow = ["t5tune evaluate run --data-path dev.csv --compare-base", "t5tune merge run --output-dir merged"]
    expected = ["t5tune chat run", *(follow if file == "adapter_config.json" else [])]
    assert [line for _, line in list_next_steps(settings, SCORES)] == expected


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_nothing_is_suggested_to_a_script(tmp_path: Path, flag: str) -> None:
    assert "next    " not in t5tune_in_fork(*PREPARE, flag, cwd=tmp_path).stderr
