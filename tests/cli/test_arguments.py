"""Arguments become values and problems. What pydantic makes of the values: tests/settings/test_loading.py."""

from typing import Any

import pytest

from t5tune.cli.arguments import parse_arguments
from t5tune.settings import (
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    MergeSettings,
    PlanSettings,
    PrepareSettings,
    Settings,
    TemplatesSettings,
    TrainSettings,
)


@pytest.mark.parametrize(
    ("model", "line", "values"),
    [
        (TrainSettings, "--lora_r=8 --bf16 --no-q-lora", {"lora_r": "8", "bf16": "true", "q_lora": "false"}),
        (TrainSettings, "--seed -3 --max-steps=-1", {"seed": "-3", "max_steps": "-1"}),
        (TrainSettings, "--lora-r 8 --lora-r 16", {"lora_r": "16"}),
        (TrainSettings, "--data-path a b --data_path=c", {"data_path": ["a", "b", "c"]}),
        (TrainSettings, "--no_cuda --fsdp full_shard auto_wrap", {"no_cuda": "true", "fsdp": "full_shard auto_wrap"}),
        (InspectSettings, "--stats cache --all true", {"stats": "true", "cache": "cache", "all": "true"}),
        (InspectSettings, "--all -- --stats", {"all": "true", "cache": "--stats"}),
        (ExportSettings, "--lora-target-modules q v -- run", {"lora_target_modules": ["q", "v"], "checkpoint": "run"}),
        (TemplatesSettings, "copy pocket -", {"action": "copy", "name": "pocket", "to": "-"}),
        # a word that may also be given with a flag
        (ChatSettings, "run --prompt Hi", {"model_name_or_path": "run", "prompt": "Hi"}),
        (ChatSettings, "--bf16 run --use-cpu y", {"bf16": "true", "model_name_or_path": "run", "use_cpu": "y"}),
        (EvaluateSettings, "run --data-path a b", {"model_name_or_path": "run", "data_path": ["a", "b"]}),
        (MergeSettings, "--output-dir out -- run", {"output_dir": "out", "adapter": "run"}),
        # key=value
        (
            TrainSettings,
            "model_name_or_path=a=b lora-r=16 bf16=no",
            {"model_name_or_path": "a=b", "lora_r": "16", "bf16": "no"},
        ),
        (TrainSettings, "--data-path a lora_r=16 data_path=b", {"data_path": ["a", "b"], "lora_r": "16"}),
        (TrainSettings, "--bf16 warmup_ratio=0.1", {"bf16": "true", "warmup_ratio": "0.1"}),
        (TrainSettings, "--bf16 run.yaml --dry-run off", {"bf16": "true", "dry_run": "off"}),
        (TrainSettings, "--bf16 flase", {"bf16": "flase"}),  # which pydantic refuses
        (TrainSettings, "--dropout 0.1 --config a", {"dropout": "0.1"}),  # so is this
        (InspectSettings, "all=true cache=run", {"all": "true", "cache": "run"}),
        # not key=value: the value of a flag, a path, a name that isn't a setting in a list, and what follows --
        (ChatSettings, "./seed=1 --prompt seed=2", {"model_name_or_path": "./seed=1", "prompt": "seed=2"}),
        (PrepareSettings, "--data-path seed=1.json x=2.json", {"data_path": ["seed=1.json", "x=2.json"]}),
        (InspectSettings, "-- all=true", {"cache": "all=true"}),
    ],
)
def test_values_are_the_text_that_was_typed(model: type[Settings], line: str, values: dict[str, Any]) -> None:
    parsed = parse_arguments(line.split(), model)
    assert parsed.values == values
    assert parsed.problems == []


@pytest.mark.parametrize(
    ("model", "line", "problems"),
    [
        (TrainSettings, "-x 1 --lora-r", ["-x: unknown flag", "--lora-r: expected a value after it"]),
        (
            PrepareSettings,
            "-5 -- --bf16",
            [f"{word}: unexpected argument, with no flag before it" for word in ("-5", "--bf16")],
        ),
        (
            InspectSettings,
            "--cache c d",
            ["--cache: unknown flag", "d: unexpected argument; c is the cache already"],
        ),
        (InspectSettings, "--cach c", ["--cach: unknown flag"]),
        (InspectSettings, "--exampel c", ["--exampel: unknown flag; did you mean --example?"]),
        (InspectSettings, "c --index 3", ["--index: unknown flag; did you mean --example?"]),
        (TrainSettings, "--bf16 lr=3e-4", ["lr: unknown setting; did you mean learning_rate?"]),
        *(
            (model, line, ["d.jsonl.gz: unexpected argument; did you mean --data-path d.jsonl.gz?"])
            for model, line in [
                (PrepareSettings, "--clean d.jsonl.gz"),
                (TrainSettings, "--bf16 d.jsonl.gz"),
                (EvaluateSettings, "d.jsonl.gz"),
                (EvaluateSettings, "run d.jsonl.gz"),
            ]
        ),
        (
            ChatSettings,
            "run hello",
            [
                "hello: unexpected argument; run is the model_name_or_path already; a message follows --prompt, in "
                "quotes"
            ],
        ),
        (ChatSettings, "run --lr 3", ["--lr: unknown flag"]),
        (
            TrainSettings,
            "run.yaml --config pocket",
            ["config: given twice, as run.yaml and as --config pocket; remove one of them"],
        ),
        (
            TrainSettings,
            "--config pocket --lora-r 8 --config=mix.yaml",
            ["config: given twice, as pocket and as mix.yaml; put the settings of both into one file"],
        ),
        (TrainSettings, "--config pocket config=pocket --lora-r 8 --lora-r 4", []),
        (
            MergeSettings,
            "run --adapter a adapter=b",
            ["adapter: given twice, as run and as --adapter a b; remove one of them"],
        ),
        (
            TrainSettings,
            "lora_rr=8 base_model=x",
            [
                "lora_rr: unknown setting; did you mean lora_r?",
                "base_model: unknown setting; did you mean model_name_or_path?",
            ],
        ),
        (InspectSettings, "cach=c", ["cach: unknown setting; did you mean cache?"]),
        (TrainSettings, "json=true", ["--json=true: --json takes no value"]),
        # a value with spaces, without its quotes
        (
            TrainSettings,
            "--target-column Ticket Text of --seed 1",
            [
                "Text: unexpected argument after --target-column Ticket; put a value with spaces in quotes: "
                "--target-column 'Ticket Text of'"
            ],
        ),
        (
            ChatSettings,
            "run --prompt Hello there",
            [
                "there: unexpected argument after --prompt Hello; put a value with spaces in quotes: "
                "--prompt 'Hello there'"
            ],
        ),
        (TrainSettings, "--lora-r 8 pocket", []),
        (TrainSettings, "--lora-r 8 mine.yaml", []),
        (ChatSettings, "--seed 1 run", []),
        # a model in place of a config
        *(
            (model, line, [f"{name}: unexpected argument; did you mean --model-name-or-path {name}?"])
            for name in ("google/byt5-small", "t5tune/pocket")
            for model, line in [(PlanSettings, name), (TrainSettings, f"--lora-r 8 {name}")]
        ),
        (PlanSettings, "runs/mine.yaml", []),
        # settings that only a file has
        (TrainSettings, "--data d.jsonl", ["--data: unknown flag; did you mean --data-path?"]),
        (TrainSettings, "eval_data=d.jsonl", ["eval_data: unknown setting; did you mean eval_data_path?"]),
        (TrainSettings, "--training-args x", ["--training-args: unknown flag; set it in a --config file"]),
    ],
)
def test_what_is_wrong_is_collected(model: type[Settings], line: str, problems: list[str]) -> None:
    assert parse_arguments(line.split(), model).problems == problems


def test_the_flags_of_all_commands_are_no_settings() -> None:
    parsed = parse_arguments(["--json", "--quiet", "--config=b", "--debug="], TrainSettings)
    assert (parsed.values, parsed.config, parsed.json, parsed.quiet, parsed.debug) == ({}, "b", True, True, True)
    assert parsed.problems == ["--debug=: --debug takes no value"]


def test_the_config_may_be_a_word_without_a_flag() -> None:
    assert parse_arguments(["run.yaml", "--lora-r", "8"], TrainSettings).config == "run.yaml"
    assert parse_arguments(["config=run.yaml"], TrainSettings).config == "run.yaml"
    assert parse_arguments(["--bf16", "run.yaml"], TrainSettings).config == "run.yaml"
    assert parse_arguments(["run.json"], TrainSettings).config == "run.json"


@pytest.mark.parametrize(
    ("model", "line", "meant"),
    [
        (PrepareSettings, "d.csv --model pocket", {"data_path", "model_name_or_path"}),
        (TrainSettings, "base_model=pocket --resume=1", {"model_name_or_path"}),
        (EvaluateSettings, "run d.csv", {"data_path"}),
    ],
)
def test_the_settings_that_problems_suggest_are_listed(model: type[Settings], line: str, meant: set[str]) -> None:
    assert parse_arguments(line.split(), model).meant == meant
