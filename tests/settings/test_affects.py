"""What a change of each setting affects: the exact settings that every guard compares, and in which order."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from t5tune.checkpoints.training_data import DatasetTraining, TrainingData
from t5tune.commands.prepare import prepare
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import SettingsError
from t5tune.runs.folder import RunFolder
from t5tune.runs.resume_guard import build_run_identity, check_finished_run
from t5tune.settings import DatasetSettings, EvaluateSettings, PrepareSettings, Settings, TrainSettings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.field_types import NoneIfUnset
from tests.support.caches import open_only

READING = [
    "objective", "source_words", "labels", "denoisers", "encoding", "data_format", "header",
    "pair_lines", "source_column", "target_column", "rejected_column", "source_prefix",
    "merge_same_role", "clean", "max_record_bytes",
]  # fmt: skip
SELECTION = ["train_on", "min_target_tokens", "dedupe", "split_long", "drop_truncated_targets"]
CACHE = ["model_max_length", *READING, "add_tokens", "num_data", *SELECTION, "eval_fraction", "split_seed", "seed"]
LORA = [
    "train_mode", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "use_dora", "use_rslora",
    "init_lora_weights", "loraplus_lr_ratio", "modules_to_save", "train_token_rows",
]  # fmt: skip
QUANTIZATION = ["q_lora", "quant_type", "quantize_wo", "double_quant"]
DISTILLATION = ["teacher_q_lora", "distillation_alpha", "distillation_temperature", "distillation_kl"]
PREFERENCES = ["dpo_loss", "dpo_beta", "dpo_label_smoothing", "orpo_lambda"]
STEPS = [
    "num_train_epochs", "max_steps", "group_by_length", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim", "on_non_finite", "max_skipped_steps",
]  # fmt: skip
LAYERS = ["bf16", "tf32", "packing", "dropout", "attention_dropout", "torch_compile", "label_smoothing_factor"]
MIXING = ["mixing", "mixing_temperature", "mixing_cap"]
RUN = [*LORA, *QUANTIZATION, *DISTILLATION, *PREFERENCES, *STEPS, "training_args", *LAYERS]
FINISHED = [
    "model_name_or_path", "revision", "family", "conversation_template", "model_max_length", *READING[:-1], "data_path",
    "data", "data_subset", "data_split", "add_tokens", "num_data", *SELECTION, "eval_fraction", "split_seed", "seed",
    *MIXING, "eval_data_path", "eval_data", "eval_data_split", "json_schema", *LORA, "adapter",
    "teacher_model_name_or_path", "teacher_adapter", *DISTILLATION, *PREFERENCES[:-1], "reference_adapter",
    "orpo_lambda", *STEPS, "training_args", *QUANTIZATION, *LAYERS, "metric_for_best_model", "early_stopping_patience",
    "early_stopping_threshold",
]  # fmt: skip
NEEDED = {"model_name_or_path": "pocket", "output_dir": "run"}


@pytest.fixture(scope="module")
def cache(conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    changes = {"output_dir": folder, "num_workers": 1, "max_rejected_fraction": 0.5, "max_record_bytes": 1 << 20}
    prepare(PrepareSettings(**NEEDED | changes, data_path=[str(conversations)], source_prefix="q: ", seed=7))
    return folder


def test_a_cache_is_made_of_these_inputs_in_this_order(cache: Path) -> None:
    assert list(open_only(cache).manifest["inputs"]) == ["data", "tokenizer", "template", *CACHE]


@pytest.mark.parametrize("batch", ["batch", "batch_tokens"])
def test_a_run_is_made_of_these_fields_in_this_order(cache: Path, batch: str) -> None:
    tokens = 64 if batch == "batch_tokens" else None
    settings = TrainSettings(**NEEDED, data_path=[str(cache)], tokens_per_batch=tokens, seed=5, num_data=9)
    identity = build_run_identity(make_run_plan(settings), open_examples(cache), "0", None, world_size=3)
    own = sorted([*RUN, *MIXING, "family"])
    batches = ["batch"] if tokens is None else ["tokens_per_batch", "batch_tokens"]
    computed = [*batches, "data", "base", "teacher", "adapter", "reference_adapter", "world_size"]
    computed += ["deepspeed_stage"]
    assert list(identity) == ["tokenizer", "template", *CACHE, *own, *computed]
    assert (identity["seed"], identity["num_data"], identity["source_prefix"]) == (5, 9, "q: ")
    assert identity[batch] == 3 * (tokens or 8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the other values are of another type
def test_a_finished_run_refuses_changes_of_these_settings(tmp_path: Path) -> None:
    settings = TrainSettings(**NEEDED, data_path="pocket")
    others = [DatasetSettings(path="other")]
    changed = settings.model_copy(
        update={**dict.fromkeys(TrainSettings.model_fields, "other"), "data": others, "eval_data": others}
    )
    with pytest.raises(SettingsError) as refused:
        check_finished_run(tmp_path, settings, changed)
    assert [problem.partition(":")[0] for problem in refused.value.problems] == FINISHED


def test_a_different_spelling_of_a_path_is_no_change(tmp_path: Path) -> None:
    given = {"model_name_or_path": "base", "data_path": ["a", "b"], "eval_data_path": "c", "adapter": "d"}
    other = {"model_name_or_path": "./base", "data_path": ["x/../a", "./b"], "eval_data_path": "./c", "adapter": "./d"}
    then, now = (TrainSettings(**NEEDED | paths) for paths in (given, other))
    check_finished_run(tmp_path, then, now)


def test_these_settings_are_taken_from_a_token_cache(cache: Path) -> None:
    inputs = open_only(cache).manifest["inputs"]
    settings = TrainSettings(**NEEDED, data_path=[str(cache)])
    taken = dict(make_run_plan(settings).given)
    names = ["model_max_length", "add_tokens", *READING, *SELECTION]
    assert {name: taken[name] for name in names} == {name: inputs[name] for name in names}
    others = TrainSettings.model_fields.keys() - {*names, "learning_rate"}  # its default is chosen, for all data
    assert {name: taken[name] for name in others} == {name: getattr(settings, name) for name in others}


# what is read by its mark alone
MARKED = {
    Affects.TRAINER: [
        "seed", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "dataloader_num_workers", "bf16",
        "eval_steps", "save_strategy", "save_steps", "logging_steps",
    ],
    Affects.EVALUATION: [
        "metrics", "metric", "eval_strategy", "eval_steps", "eval_generate", "metric_for_best_model",
        "early_stopping_patience", "early_stopping_threshold",
    ],
    Affects.ALL_RANKS: [
        "per_device_train_batch_size", "tokens_per_batch", "gradient_accumulation_steps", "packed_attention",
        "gradient_checkpointing", "per_device_eval_batch_size", "use_cpu", "save_strategy", "save_steps",
        "logging_steps", "report_samples", "fresh",
    ],
    Affects.INFERENCE: ["data_format", "source_column", "target_column", "source_prefix"],
    Affects.INPUT_FILES: [
        "model_name_or_path", "data_path", "eval_data_path", "adapter", "teacher_model_name_or_path", "teacher_adapter",
        "reference_adapter",
    ],
    Affects.ADAPTER_SCALE: ["lora_r", "lora_alpha", "use_dora", "use_rslora"],
    Affects.THIS_CALL: [
        "fresh", "allow_change", "dry_run", "sweep", "jobs", "max_runs", "median_stopping",
    ],
}  # fmt: skip


@pytest.mark.parametrize("affects", MARKED, ids=lambda affects: affects.name)
def test_these_settings_affect_it(affects: Affects) -> None:
    assert select_settings(TrainSettings, affects) == MARKED[affects]


def test_settings_that_affect_inference_are_those_in_training_data_json() -> None:
    # TrainingData also has has_earlier_turns, datasets and labels, which aren't settings, the objective, and the
    # JSON schema
    names = [field.name for field in fields(TrainingData)][1:-5]
    assert select_settings(PrepareSettings, Affects.INFERENCE) == names
    assert select_settings(EvaluateSettings, Affects.INFERENCE) == names
    assert names == [field.name for field in fields(DatasetTraining)][1:-5]


@pytest.mark.parametrize("model", [PrepareSettings, TrainSettings])
def test_every_setting_of_prepare_and_train_says_what_it_affects(model: type[Settings]) -> None:
    silent = [
        name
        for name, field in model.model_fields.items()
        if sum(isinstance(mark, Affects) for mark in field.metadata) != 1
    ]
    assert not silent, "declare it as Annotated[…, Affects.…], see t5tune/settings/affects.py"


def test_settings_are_selected_only_if_they_affect_all_of_it() -> None:
    class Example(Settings):
        silent: int = 1
        nothing: Annotated[int, Affects.NOTHING] = 1
        cache: Annotated[int | None, NoneIfUnset, Affects.CACHE] = None
        both: Annotated[int, Affects.EXAMPLES | Affects.TRAINER] = Field(default=1, gt=0)

    assert select_settings(Example, Affects.CACHE) == ["cache", "both"]
    assert select_settings(Example, Affects.EXAMPLES) == ["both"]
    assert select_settings(Example, Affects.STEPS) == []


def test_saved_settings_leave_out_options_of_a_single_call(cache: Path, tmp_path: Path) -> None:
    values = NEEDED | {"data_path": [str(cache)], "output_dir": tmp_path}
    given = TrainSettings(**values, fresh=True, allow_change=["max_steps"], dry_run=True, lora_r=4)
    RunFolder(tmp_path).save_settings(make_run_plan(given))
    saved = RunFolder(tmp_path).read_settings(TrainSettings)
    assert saved == make_run_plan(TrainSettings(**values, lora_r=4)).given
