"""Translate run configs of LLaMA-Factory, axolotl and transformers' seq2seq scripts to settings of `train`.

    translate({"lora_rank": 16, "plot_loss": True}, "LLaMA-Factory")
    # {"lora_rank": Translation({"lora_r": 16, "lora_alpha": 32}), "plot_loss": Translation({}, "report.html …"), …}

RULES has the keys whose values, units or defaults differ from ours. All remaining keys are in other_names.py.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from t5tune.errors import SettingsError
from t5tune.settings.commands.train import TrainSettings
from t5tune.settings.fastchat_names import LEGACY_NAMES
from t5tune.settings.other_names import NAMES_IN_OTHER_TOOLS, NOT_NEEDED, suggest_setting

Config = Mapping[str, Any]
Found = Config | tuple[Config, str] | None
Rule = Callable[[Any, Config], Found] | Found
KEYS = {
    "LLaMA-Factory": "stage finetuning_type dataset cutoff_len template lora_rank",
    "axolotl": "base_model datasets sequence_len micro_batch_size num_epochs val_set_size",
    "transformers": "dataset_name train_file validation_file summary_column source_lang max_source_length do_train",
}
"""Tool -> some keys that only this tool has."""
DEFAULTS: Mapping[str, Config] = {
    "LLaMA-Factory": {"lora_target": "all", "lora_dropout": 0.0},
    "axolotl": {
        "adapter": "full", "lora_dropout": 0.0, "sequence_len": 512, "micro_batch_size": 1, "num_epochs": 1,
        "lr_scheduler": "cosine", "warmup_ratio": 0.03, "output_dir": "model-out",
    },
    "transformers": {"train_mode": "full", "max_source_length": 1024},
}  # fmt: skip
"""Tool -> values of keys that aren't given, where train's defaults differ."""
REQUIRED = {"model_name_or_path": "google/flan-t5-large", "data_path": "chats.jsonl", "output_dir": "run"}
"""Settings that train needs -> examples of values."""
T5_NAME = re.compile(r"^pocket$|t5|ul2|madlad|tk-instruct|\bt0|aya-101", re.IGNORECASE)
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "wi", "wi_0", "wi_1", "wo"}
OPTIMIZERS = "adamw_torch adamw_torch_fused adamw_bnb_8bit paged_adamw_32bit paged_adamw_8bit adafactor sgd"
SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup"
DETECTED = "alpaca sharegpt chat_template chatml llama3 completion pretrain json text messages conversations"
"""Values in axolotl's description of a dataset that prepare detects."""
FIELDS = TrainSettings.model_fields
_OTHERS = [(name, ours) for ours, names in NAMES_IN_OTHER_TOOLS.items() if ours in FIELDS for name in names.split()]
_RENAMED = {name: change.new for name, change in LEGACY_NAMES.items() if change.new is not None}
SAME = {**dict(reversed(_OTHERS)), **_RENAMED, **{name: name for name in FIELDS}}
"""Name in other tools, earlier or now -> our setting."""


class Translation(NamedTuple):
    """The settings of `train` that a key becomes; `is_lost`: they do less than the key asks for."""

    settings: Config
    comment: str = ""
    is_lost: bool = False


def detect_tool(config: Config) -> str | None:
    """Return the tool that has most of the keys; None if no tool has any of them."""
    tool = max(KEYS, key=lambda name: len(config.keys() & set(KEYS[name].split())))
    return tool if config.keys() & set(KEYS[tool].split()) else None


def translate(config: Config, tool: str) -> dict[str, Translation]:
    """Translate all keys, and the tool's defaults that differ from train's, to settings that train takes."""
    defaults = {name: value for name, value in DEFAULTS[tool].items() if config.get(name) in (None, "", [])}
    config = {**config, **defaults}
    found = {name: _translate_key(name, value, config) for name, value in config.items()}
    found |= {name: Translation(found[name].settings, f"the default of {tool}") for name in defaults}
    while problems := _find_problems(found):
        found |= {name: Translation({}, problem, is_lost=True) for name, problem in problems.items()}
    return found


def find_missing(settings: Config) -> dict[str, Any]:
    """Return the settings that train needs and that aren't given, with examples of values."""
    given = {*settings, *(["data_path"] if "data" in settings else [])}
    return {name: value for name, value in REQUIRED.items() if name not in given}


def _find_problems(found: Mapping[str, Translation]) -> dict[str, str]:
    """Return the keys whose settings differ from an earlier key's, or which train refuses, each with the reason."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, each in found.items():
        for name, value in each.settings.items():
            if values.setdefault(name, value) != value:
                return {key: f"{sources[name]} sets {name}"}
            sources.setdefault(name, key)
    try:
        TrainSettings(**find_missing(values), **values)
    except SettingsError as error:
        return {sources.get(problem.partition(":")[0], [*sources.values()][-1]): problem for problem in error.problems}
    return {}


def _translate_key(name: str, value: Any, config: Config) -> Translation:
    ours = SAME.get(name)
    if value in (None, "", [], {}) or (value is False and (ours is None or FIELDS[ours].default is False)):
        return Translation({}, "off, or not set")
    if isinstance(value, str) and re.search(r"\$\{?\w", value):
        return Translation({}, "a variable of the shell; write its value", is_lost=True)
    if name in RULES:
        rule, why = RULES[name]
        try:
            found = rule(value, config) if callable(rule) else rule
        except (AttributeError, LookupError, OSError, TypeError, ValueError):
            found = None
        if isinstance(found, tuple):
            return Translation(*found, is_lost=True)
        return Translation(found) if found else Translation({}, why, is_lost=found is None)
    if ours is not None:
        return Translation({ours: value})
    if name in LEGACY_NAMES:
        return Translation({}, LEGACY_NAMES[name].why)
    advice = suggest_setting(name, FIELDS).removeprefix("; ").removeprefix("leave it out: ")
    is_lost = name not in " ".join(NOT_NEEDED).split()
    return Translation({}, advice or "t5tune train has no such setting", is_lost)


def _read_datasets(setting: str, value: Any, config: Config) -> Found:
    """Read axolotl's list of datasets."""
    datasets, lost = [], list[str]()
    for given in value:
        kind = re.split("[.:]", str(given.get("type")))[0]
        split, bracket, _ = (given.get("split") or "").partition("[")
        objective = "span-corruption" if kind in ("completion", "pretrain") else None
        dataset = {"data_subset": given.get("name"), "data_split": split, "objective": objective}
        datasets.append({"path": given["path"], **{name: each for name, each in dataset.items() if each}})
        read = {"path", "name", "roles", "message_property_mappings", *([] if bracket else ["split"])}
        read |= {name for name, each in {**given, "type": kind}.items() if not each or str(each) in DETECTED.split()}
        lost += [f"{name}: {each}" for name, each in given.items() if name not in read]
    why = f"without {', '.join(lost)}; set source_column, target_column or num_data, or change the file"
    return ({setting: datasets}, why) if lost else {setting: datasets}


def _read_batch(size: int, config: Config) -> Found:
    if not any(config.get(name) for name in ("sample_packing", "packing", "neat_packing")):
        return {"per_device_train_batch_size": size}
    length = config.get("sequence_len") or config.get("cutoff_len") or 2048
    return {"tokens_per_batch": size * length}, f"{size} × {length} tokens of packed examples"


def _read_layers(names: Any, config: Config) -> Found:
    words = set(names if isinstance(names, list) else re.split(r"[,\s]+", names.strip()))
    layers = {name.removesuffix("_proj") for name in words - FEED_FORWARD - {"all", "all-linear"}}
    found = sorted(layers, key="qkvo".index) + (["feed-forward"] if words & FEED_FORWARD else [])
    return {"lora_target_modules": ["all-linear"] if len(found) == 5 or words & {"all", "all-linear"} else found}


def _read_per_epoch(kind: str, count: float, config: Config) -> Found:
    settings = {f"{kind}_strategy": "epoch" if count else "no"}
    why = f"once per epoch; for {kind}_steps, t5tune plan shows the steps of an epoch"
    return settings if count in (0, 1) else (settings, why)


def _read_deepspeed(name: str, config: Config) -> Found:
    if Path(name).is_file():
        return {"deepspeed": name}
    level = re.findall(r"(?:zero|z|stage)_?([0-3])", Path(name).name.lower())[0]
    return {"deepspeed": f"zero{max(level, '2')}-offload" if "offload" in name else f"zero{level}"}


FLATTEN = "records {translation: {…}} must be flat: jq -c .translation IN.json > OUT.jsonl"
_ROWS: tuple[tuple[str, Rule, str], ...] = (
    ("model_name_or_path base_model base_model_config", lambda v, c: {"model_name_or_path": v}
     if T5_NAME.search(v) or Path(v).exists() else None, "not a T5; choose one for model_name_or_path"),
    ("datasets pretraining_dataset", partial(_read_datasets, "data"), "choose files for data_path"),
    ("test_datasets", partial(_read_datasets, "eval_data"), "choose files for eval_data_path"),
    ("dataset eval_dataset", None, "names in dataset_info.json; give their files as data_path and eval_data_path"),
    ("dataset_name", lambda v, c: {"data_path": v} if "/" in v else None, "set data_path to OWNER/NAME on the Hub"),
    ("source_lang", lambda v, c: ({"source_column": v.split("_")[0]}, FLATTEN), ""),
    ("target_lang", lambda v, c: ({"target_column": v.split("_")[0]}, FLATTEN), ""),
    ("test_file do_predict", None, "after training: t5tune evaluate RUN --data-path FILE"),
    ("do_eval", lambda v, c: {} if c.keys() & {"validation_file", "val_size"} else None, "eval_data_path turns it on"),
    ("micro_batch_size per_device_train_batch_size", _read_batch, "expected a number"),
    ("batch_size", None, "set gradient_accumulation_steps to batch_size / micro_batch_size"),
    ("num_processes", lambda v, c: {"num_gpus": v}, ""),
    ("max_target_length", None, "model_max_length limits sources and targets"),
    ("lora_rank", lambda v, c: {"lora_r": v, "lora_alpha": c.get("lora_alpha") or 2 * v}, ""),
    ("lora_target lora_target_modules", _read_layers, "a T5 has other layers; all-linear means all"),
    ("lora_target_linear", {"lora_target_modules": ["all-linear"]}, ""),
    ("stage rl", lambda v, c: {"objective": "orpo" if c.get("pref_loss") == "orpo" else v}, ""),
    ("pref_loss", lambda v, c: {} if v == "orpo" else {"dpo_loss": v}, "objective says it"),
    ("pref_beta rl_beta", lambda v, c: {"orpo_lambda" if "orpo" in c.values() else "dpo_beta": v}, ""),
    ("adapter", lambda v, c: {"q_lora": True} if v == "qlora" else {"train_mode": v}, ""),
    ("load_in_8bit load_8bit", {"q_lora": True, "quant_type": "int8"}, ""),
    ("quantization_method", lambda v, c: {} if v in ("bnb", "bitsandbytes") else None, "q_lora uses bitsandbytes"),
    ("quantization_bit", lambda v, c: {"q_lora": True, "quant_type": {4: "nf4", 8: "int8"}[v]}, "4 or 8 bits"),
    ("bf16 bfloat16 pure_bf16", {"bf16": True}, ""),
    ("fp16 float16", ({"bf16": True}, "a T5 overflows in fp16"), ""),
    *((f"{kind}s_per_epoch", partial(_read_per_epoch, kind), "") for kind in ("eval", "save")),
    ("warmup_ratio", lambda v, c: {} if c.get("warmup_steps") else {"warmup_steps": v}, "warmup_steps overrides it"),
    ("optim optimizer", lambda v, c: {"optim": v} if v in OPTIMIZERS.split() else None, "AdamW is used"),
    ("lr_scheduler_type lr_scheduler", lambda v, c: {"lr_scheduler_type": v} if v in SCHEDULES.split() else None,
     "linear is used"),
    ("fsdp", lambda v, c: {"deepspeed": LEGACY_NAMES["fsdp"].convert(v)}, ""),
    ("deepspeed", _read_deepspeed, "no such file; set deepspeed to zero2 or zero3"),
    ("predict_with_generate", ({"eval_generate": 32}, "for 32 of the held-out examples, not all"), ""),
    ("load_best_model_at_end", lambda v, c: {"metric_for_best_model": c.get("metric_for_best_model") or "loss"}, ""),
    ("hub_model_id", lambda v, c: {"hub_model_id": v, "push_to_hub": c.get("push_to_hub", "base_model" in c)}, ""),
    ("wandb_project use_wandb", ({"report_to": "wandb"}, "set the variable WANDB_PROJECT, too"), ""),
    ("sample_packing neat_packing eval_sample_packing", {}, "train packs where the model can"),
    ("template chat_template", {}, "the data or the model decides the conversation template"),
    ("overwrite_output_dir", {}, "a run is never overwritten; --fresh renames it and starts over"),
    ("ddp_timeout", {}, "the data is prepared before more processes start"),
    ("dataset_dir dataset_prepared_path tokenized_path", {}, "the token cache is in the run folder"),
)  # fmt: skip
RULES = {name: (rule, why) for names, rule, why in _ROWS for name in names.split()}
"""Key -> (rule, why). A rule has the settings, or makes them of the value and of all keys. {}: nothing needs to be set;
(settings, comment): they do less than the value asks for; None, or any error: no settings do it.
"""
