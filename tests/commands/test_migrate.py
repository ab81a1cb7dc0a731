"""Run configs of other tools: what their keys become, and that train takes the result."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from t5tune.commands.migrate import MigrateResult, migrate
from t5tune.errors import SettingsError
from t5tune.io.yaml_file import MAX_YAML_BYTES, read_yaml
from t5tune.settings import MigrateSettings, TrainSettings, load_settings
from tests.support.processes.command_line import t5tune_in_fork

LLAMA_FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
### output
output_dir: saves/llama3
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
AXOLOTL = """
base_model: google/flan-t5-base
model_type: T5ForConditionalGeneration
load_in_8bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
adapter: lora
lora_model_dir:
sequence_len: 512
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
wandb_entity: team
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens: {pad_token: "</s>"}
mystery: 7
"""
SUMMARIZATION = r"""#!/bin/bash
# python run_summarization.py --model_name_or_path old --train_file old.csv
torchrun --nproc_per_node=2 examples/pytorch/summarization/run_summarization.py \
    --model_name_or_path t5-small \
    --do_train \
    --do_eval \
    --train_file dev/data/train.csv \
    --validation_file dev/data/dev.csv \
    --text_column article \
    --source_prefix "summarize: " \
    --max_source_length 512 \
    --output_dir $RUN_DIR \
    --per_device_train_batch_size=4 \
    --overwrite_output_dir \
    --num_beams 4 \
    --learning_rate 3e-4 \
    --predict_with_generate 2>&1 | tee log.txt
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MigrateResult]:
    """Translate a config, given as a text or as keys, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write_and_migrate(config: str | dict[str, Any], name: str = "run.yml") -> MigrateResult:
        Path(name).write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
        return migrate(MigrateSettings(run_config=Path(name)))

    return write_and_migrate


def read(result: MigrateResult) -> dict[str, Any]:
    Path("written.yaml").write_text(result.text)
    return read_yaml(Path("written.yaml"))


def test_a_llama_factory_config_becomes_settings_and_comments(run) -> None:
    result = run(LLAMA_FACTORY)
    assert read(result) == {
        "q_lora": True, "quant_type": "nf4", "objective": "sft", "train_mode": "lora", "lora_r": 16, "lora_alpha": 32,
        "lora_target_modules": ["all-linear"], "model_max_length": 1024, "num_data": 1000, "output_dir": "saves/llama3",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
        "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": True,
        "eval_fraction": 0.1, "eval_strategy": "steps", "eval_steps": 500, "lora_dropout": 0.0,
    }  # fmt: skip
    assert result.not_supported.keys() == {
        "model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct", "dataset: identity,alpaca_en_demo",
    }  # fmt: skip
    assert "# model_name_or_path: google/flan-t5-large  # choose\n# data_path: chats.jsonl  # choose\n" in result.text
    assert "warmup_steps: 0.1  # from warmup_ratio\n" in result.text
    assert "lora_dropout: 0.0  # from lora_dropout" not in result.text
    assert "lora_dropout: 0.0  # the default of LLaMA-Factory\n" in result.text
    without_rate = LLAMA_FACTORY.replace("learning_rate: 1.0e-4\n", "")
    assert "\nlearning_rate: 5.0e-05  # the default of LLaMA-Factory\n" in run(without_rate).text
    assert "\n# plot_loss: true  # report.html in the run folder shows the curves\n" in result.text


def test_an_axolotl_config_becomes_settings_and_comments(run) -> None:
    result = run(AXOLOTL)
    assert read(result) == {
        "model_name_or_path": "google/flan-t5-base", "q_lora": True, "quant_type": "int8",
        "data": [{"path": "mhenrichsen/alpaca_2k_test"}], "eval_fraction": 0.05, "train_mode": "lora",
        "model_max_length": 512, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
        "lora_target_modules": ["q", "k", "v", "o", "feed-forward"], "tokens_per_batch": 1024, "num_train_epochs": 4,
        "optim": "adamw_bnb_8bit", "learning_rate": 0.0002, "bf16": True, "gradient_checkpointing": True,
        "save_strategy": "epoch", "lr_scheduler_type": "cosine", "warmup_steps": 0.03,
        "output_dir": "model-out",
    }  # fmt: skip
    assert result.not_supported == {
        "wandb_entity: team": "use report_to: wandb, and the variable WANDB_ENTITY or WANDB_LOG_MODEL",
        "micro_batch_size: 2": "tokens_per_batch is 2 × 512, because a packed row has many examples",
        "evals_per_epoch: 4": "set eval_steps; t5tune plan shows the steps",
        "mystery: 7": "t5tune train has no such setting",
    }
    assert "\n# lora_model_dir: null  # off, or not set\n" in result.text


def test_a_command_line_becomes_settings_and_comments(run) -> None:
    result = run(SUMMARIZATION, "train.sh")
    assert read(result) == {
        "num_gpus": 2, "model_name_or_path": "t5-small", "data_path": "dev/data/train.csv",
        "eval_data_path": "dev/data/dev.csv", "source_column": "article", "source_prefix": "summarize: ",
        "model_max_length": 512, "per_device_train_batch_size": 4, "learning_rate": 3e-4, "eval_generate": 32,
        "train_mode": "full",
    }  # fmt: skip
    assert result.not_supported.keys() == {
        "output_dir: $RUN_DIR", "num_beams: 4", "predict_with_generate: true",
    }  # fmt: skip
    assert "train_mode: full  # the default of transformers\n" in result.text


A = {"base_model": "t5-small", "adapter": "lora"}  # axolotl
F = {"model_name_or_path": "t5-small", "stage": "sft", "lora_alpha": 16}  # LLaMA-Factory
H = {"model_name_or_path": "t5-small", "train_file": "a.csv"}  # transformers
DEV = {"val_set_size": 0.1}
DATA = {"model_name_or_path": "pocket", "data_path": ["pocket"], "output_dir": "run"}


# (keys, settings, start of the comment of a key that loses some of its meaning)
CONVERSIONS = [
    # the model
    (A | {"base_model": "mistralai/Mistral-7B-v0.1"}, {"model_name_or_path": None}, "base_model: not a T5; choose"),
    (A | {"base_model": "google/mt5-small"}, {"model_name_or_path": "google/mt5-small"}, ""),
    (H | {"model_name_or_path": "facebook/bart-large-cnn"}, {"model_name_or_path": None}, "model_name_or_path: not"),
    # what is trained
    ({"base_model": "t5-small"}, {"train_mode": "full", "lora_dropout": None}, ""),
    (A, {"train_mode": "lora", "lora_dropout": 0.0}, ""),
    (F | {"finetuning_type": "full"}, {"train_mode": "full", "lora_target_modules": None}, ""),
    (A | {"adapter": "qlora", "load_in_4bit": True}, {"q_lora": True, "quant_type": None}, ""),
    ({"base_model": "t5-small", "load_in_8bit": True}, {"q_lora": None, "quant_type": None}, "load_in_8bit: q_lora"),
    (F | {"finetuning_type": "freeze"}, {"train_mode": None}, "finetuning_type: train_mode: 'freeze': expected"),
    (A | {"load_in_8bit": True}, {"q_lora": True, "quant_type": "int8"}, ""),
    (F | {"quantization_bit": 8}, {"q_lora": True, "quant_type": "int8"}, ""),
    (F | {"quantization_bit": 3}, {"q_lora": None}, "quantization_bit: 4 or 8 bits"),
    (F | {"double_quantization": False}, {"double_quant": False}, ""),
    (A | {"lora_target_modules": ["q_proj", "v_proj"]}, {"lora_target_modules": ["q", "v"]}, ""),
    (A | {"lora_target_modules": ["gate_proj", "up_proj"]}, {"lora_target_modules": ["feed-forward"]}, ""),
    (A | {"lora_target_modules": "model.[0-9]+.(q|k)_proj"}, {"lora_target_modules": None}, "lora_target"),
    (A | {"load_in_8bit": False, "bf16": False, "lora_target_linear": False},
     {"q_lora": None, "bf16": None, "lora_target_modules": None}, ""),
    (A | {"lora_target_linear": True}, {"lora_target_modules": ["all-linear"]}, ""),
    (A | {"lora_modules_to_save": ["embed_tokens"]}, {"modules_to_save": None}, "lora_modules_to_save: "),
    # objectives
    (F | {"stage": "dpo", "pref_beta": 0.2}, {"objective": "dpo", "dpo_beta": 0.2}, ""),
    (F | {"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.2}, {"objective": "orpo", "orpo_lambda": 0.2}, ""),
    (F | {"stage": "dpo", "pref_loss": "simpo"}, {"dpo_loss": None}, "pref_loss: dpo_loss: 'simpo': expected"),
    (A | {"rl": "kto"}, {"objective": None}, "rl: objective: 'kto': expected 'sft', 'dpo'"),
    (F | {"stage": "pt"}, {"objective": None}, "stage: objective: 'pt': expected"),
    # batches and steps
    (A | {"micro_batch_size": 4}, {"per_device_train_batch_size": 4}, ""),
    (A | {"batch_size": 16, "micro_batch_size": 4}, 
     {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, ""),
    (A | {"micro_batch_size": 4, "sample_packing": True, "sequence_len": 2048}, {"tokens_per_batch": 8192}, "micro"),
    (A, {"per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "cosine"}, ""),
    (A | {"warmup_ratio": 0.1, "warmup_steps": 10}, {"warmup_steps": 10}, ""),
    (A | {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}, ""),
    (A | {"lr_scheduler": "rex"}, {"lr_scheduler_type": None}, "lr_scheduler: linear is used"),
    (A | {"optimizer": "paged_adamw_8bit"}, {"optim": "paged_adamw_8bit"}, ""),
    (A | {"optimizer": "muon"}, {"optim": None}, "optimizer: AdamW is used"),
    (H | {"adam_beta1": 0.8, "adam_beta2": 0.9}, {"training_args": {"adam_beta1": 0.8, "adam_beta2": 0.9}}, ""),
    (F | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
     {"lr_scheduler_type": "cosine_with_min_lr", "training_args": {"lr_scheduler_kwargs": {"min_lr": 1e-6}}}, ""),
    (F | {"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_type": None}, "lr_scheduler_type: linear is used"),
    (F | {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"warmup_steps": None}, ""),
    (A | {"lr_scheduler": "constant", "warmup_steps": 10}, {"lr_scheduler_type": "constant", "warmup_steps": None}, ""),
    (H | {"num_processes": 4}, {"num_gpus": 4, "num_processes": None}, ""),
    # evaluations and checkpoints
    (A | DEV | {"eval_steps": 0.05}, {"eval_steps": None}, "eval_steps: a share of all steps"),
    (A | {"save_steps": 0.5}, {"save_steps": None}, "save_steps: a share of all steps"),
    (A | DEV | {"evals_per_epoch": 1}, {"eval_strategy": "epoch"}, ""),
    (A | DEV | {"evals_per_epoch": 4}, {"eval_strategy": None}, "evals_per_epoch: set eval_steps"),
    (A | {"val_set_size": 0, "evals_per_epoch": 1, "metric_for_best_model": "loss"},
     {"eval_strategy": None, "metric_for_best_model": None}, "evals_per_epoch: eval_strategy needs eval_data_path or"),
    (A | {"saves_per_epoch": 0}, {"save_strategy": "no"}, ""),
    (F | {"val_size": 100}, {"eval_fraction": None}, "val_size: eval_fraction: 100: must be less than 1"),
    (H | {"validation_file": "b.csv", "evaluation_strategy": "steps", "eval_steps": 9},
     {"eval_data_path": "b.csv", "eval_steps": 9, "eval_strategy": "steps"}, ""),
    (H | {"validation_file": "b.csv", "load_best_model_at_end": True}, {"metric_for_best_model": "loss"}, ""),
    (H | {"validation_file": "b.csv", "metric_for_best_model": "rouge1"}, {"metric_for_best_model": None},
     "metric_for_best_model: metric_for_best_model: rouge1"),
    # lengths and texts
    (H | {"max_target_length": 64, "max_source_length": 512}, {"model_max_length": 512}, "max_target_length: model"),
    (H | {"max_eval_samples": 20}, {}, "max_eval_samples: all of eval_data_path is evaluated"),
    (F | {"mask_history": True}, {"train_on": "last"}, ""),
    (H | {"do_eval": True}, {}, "do_eval: eval_data_path turns it on"),
    (H | {"dataset_name": "xsum"}, {}, "dataset_name: set data_path to OWNER/NAME"),
    (H | {"test_file": "c.csv"}, {"data_path": "a.csv"}, "test_file: after training: t5tune evaluate RUN"),
    (H, {"model_max_length": 1024, "train_mode": "full"}, ""),
    (H | {"source_lang": "en_XX", "target_lang": "ro"}, {"source_column": "en", "target_column": "ro"}, "source"),
    (A | {"train_on_inputs": True}, {}, "train_on_inputs: the loss counts only targets"),
    # precision, sharding, the Hub, trackers
    (H | {"fp16": True}, {"bf16": True, "fp16": None}, "fp16: a T5 overflows in fp16"),
    (A | {"bf16": "auto", "fp16": False}, {"bf16": True}, ""),
    (F | {"deepspeed": "examples/ds_z3_offload_config.json"}, {"deepspeed": "zero3-offload"}, ""),
    (A | {"source_prefix": "in $5: ", "output_dir": "$HOME/x"}, {"source_prefix": "in $5: ", "output_dir": None},
     "output_dir: a variable of the shell"),
    (F | {"deepspeed": "zero1_cpuoffload.json"}, {"deepspeed": "zero2-offload"}, ""),
    (F | {"deepspeed": "ds_z2_config.json"}, {"deepspeed": "zero2"}, ""),
    (F | {"deepspeed": "mine.json"}, {"deepspeed": None}, "deepspeed: no such file"),
    (A | {"deepspeed": "zero3_offload.json", "fsdp": "full_shard"}, {}, "fsdp: deepspeed is zero3-offload already"),
    (F | {"pissa_init": True}, {"init_lora_weights": "pissa"}, ""),
    (A | {"fsdp": ["full_shard", "auto_wrap"]}, {"deepspeed": "zero3"}, ""),
    (A | {"fsdp_config": {"offload_params": True}}, {"deepspeed": None}, "fsdp_config: use deepspeed: zero3"),
    (F | {"hub_model_id": "me/x"}, {"hub_model_id": None}, "hub_model_id: "),
    (F | {"report_to": "none"}, {"report_to": "none"}, ""),
    (A | {"wandb_project": "x"}, {"report_to": "wandb"}, "wandb_project: set the variable WANDB_PROJECT"),
    (F | {"resume_from_checkpoint": "out/checkpoint-9"}, {}, "resume_from_checkpoint: run the same command again"),
    (F | {"neftune_noise_alpha": 5}, {}, "neftune_noise_alpha: NEFTune isn't supported"),
    (F | {"galore_rank": 128}, {}, "galore_rank: ReLoRA and GaLore"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "settings", "comment"), CONVERSIONS)
def test_a_key_becomes_settings_or_advice(given: dict[str, Any], settings: dict[str, Any], comment: str, run) -> None:
    result = run(given)
    written = read(result)
    assert {name: written.get(name) for name in settings} == settings
    key, _, advice = comment.partition(": ")
    found = {name.partition(":")[0]: text for name, text in result.not_supported.items()}
    assert [name for name in found if name.startswith(key) and found[name].startswith(advice)] or not comment, found
    load_settings(TrainSettings, "written.yaml", {}, DATA)


def test_axolotls_linear_layers_include_the_named_ones(run) -> None:
    result = run(A | {"lora_target_modules": ["q_proj", "v_proj"], "lora_target_linear": True})
    assert read(result)["lora_target_modules"] == ["all-linear"]
    assert not result.not_supported


# (keys of a dataset, its settings, what is lost)
DATASETS = [
    ({"type": "alpaca"}, {}, ""),
    ({"type": "chat_template", "field_messages": "messages"}, {}, ""),
    ({"type": "sharegpt", "split": "train[:10%]", "name": "en"}, {"data_split": "train", "data_subset": "en"}, "split"),
    ({"type": "completion", "field": "text"}, {}, "type: completion"),
    ({"path": "json", "data_files": "a.jsonl", "type": "alpaca"}, {"path": "a.jsonl"}, ""),
    ({"message_property_mappings": {"role": "from", "content": "value"}, "roles": {"user": ["human"]}}, {}, ""),
    ({"message_property_mappings": {"role": "who"}}, {}, "message_property_mappings: {'role': 'who'}"),
    ({"type": {"field_instruction": "q", "field_output": "a", "format": "[{instruction}]"}},
     {}, "type: {'field_instruction': 'q', "),
    ({"type": "gsm8k"}, {}, "type: gsm8k"),
    ({"field_messages": "turns"}, {}, "field_messages: turns"),
    ({"data_files": "a/b.json"}, {}, "data_files: a/b.json"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "dataset", "lost"), DATASETS)
def test_a_dataset_of_axolotl_keeps_what_prepare_needs(
    given: dict[str, Any], dataset: dict[str, Any], lost: str, run
) -> None:
    result = run(A | {"datasets": [{"path": "o/d", **given}]})
    assert read(result)["data"] == [{"path": "o/d", **dataset}]
    assert lost in str(result.not_supported)
    assert bool(lost) == bool(result.not_supported)


@pytest.mark.parametrize("config", [LLAMA_FACTORY, AXOLOTL, SUMMARIZATION])
def test_every_key_is_in_the_written_file(config: str, run) -> None:
    script = config is SUMMARIZATION
    text = run(config, "train.sh" if script else "run.yml").text
    lines = config.partition("torchrun")[2].splitlines() if script else config.splitlines()
    keys = [line.split("=")[0].split()[0].removeprefix("--") for line in lines if line.strip() and line[0] != "#"]
    assert not [key for key in keys if key.rstrip(":").removeprefix("-") not in text and not key.startswith("-")]


def test_long_texts_and_lists_keep_their_values(run) -> None:
    prefix = "Summarize the following article in one sentence, as a newspaper would, without any opinion: \n# "
    result = run(H | {"task_prefix": prefix, "lora_target": ["q_proj"], "finetuning_type": "lora"})
    assert read(result) == {**read(result), "source_prefix": prefix, "lora_target_modules": ["q"]}
    assert "\n# from lora_target\nlora_target_modules:\n- q\n" in result.text


def test_json_has_the_same_keys_and_unusual_characters(run) -> None:
    """Tabs and surrogate pairs are JSON, but not YAML."""
    result = run(
        '{\n\t"train_file": "a.csv", "source_prefix": "\\ud83d\\ude00\\u2028: ", "forced_bos_token": "x"}', "a.json"
    )
    assert read(result)["source_prefix"] == "\U0001f600\u2028: "
    assert result.not_supported == {"forced_bos_token: x": "t5tune train has no such setting"}


def test_a_large_command_line_is_refused(run) -> None:
    with pytest.raises(SettingsError, match=f"run.sh: can't be read: it has {MAX_YAML_BYTES + 1} bytes"):
        run("x" * (MAX_YAML_BYTES + 1), "run.sh")


def test_values_cannot_leave_their_comments_and_secrets_are_hidden(run) -> None:
    result = run(
        A | {"mystery": "x\nlora_r: 99", "evil\nlora_r: 98": True, "hub_token": "hf_abc", "a\u2028b": "c\u0085d"}
    )
    assert "lora_r" not in read(result)
    assert "hf_abc" not in result.text + str(result.not_supported)


@pytest.mark.slow
def test_the_result_trains_on_the_command_line(tmp_path: Path) -> None:
    """The text goes to stdout; what is lost is on stderr."""
    (tmp_path / "axolotl.yml").write_text(AXOLOTL)
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"source": "{i}", "target": "b"}}\n' for i in range(40)))
    done = t5tune_in_fork("migrate", "axolotl.yml", cwd=tmp_path)
    assert done.code == 0
    assert "warning: mystery: 7: t5tune train has no such setting" in done.stderr
    (tmp_path / "run.yaml").write_text(done.stdout)
    line = "train run.yaml --model-name-or-path pocket --data-path pairs.jsonl --dry-run"
    dry = t5tune_in_fork(*shlex.split(line), cwd=tmp_path)
    assert (dry.code, dry.errors) == (0, [])
    assert "tokens_per_batch: 1024" in dry.stdout
