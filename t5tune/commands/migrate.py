"""`t5tune migrate`: translate a run config of LLaMA-Factory, axolotl or transformers' seq2seq scripts.

result = migrate(MigrateSettings(run_config="llama3_lora_sft.yaml"))
result.not_supported    # {"neftune_noise_alpha: 5": "NEFTune isn't supported", …}

_ROWS has the keys whose values, units or defaults differ from ours. All other keys are in settings/other_names.py.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from t5tune.errors import SettingsError, make_printable
from t5tune.formatting import shorten
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.io.yaml_file import MAX_YAML_BYTES, read_yaml, to_yaml
from t5tune.progress import Note, Report, silent
from t5tune.settings import MigrateSettings, TrainSettings
from t5tune.settings.fastchat_names import LEGACY_NAMES
from t5tune.settings.other_names import NOT_NEEDED, SETTINGS_BY_NAME, detect_tool, suggest_setting

Config = Mapping[str, Any]
Found = Config | tuple[Config, str] | None
Rule = Callable[[Any, Config], Found] | Found
DEFAULTS: Mapping[str, Config] = {
    "LLaMA-Factory": {"lora_target": "all", "lora_dropout": 0.0, "learning_rate": 5e-5},
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
LAYERS = {"all": "all-linear", "all-linear": "all-linear", **{name: name for name in "qkvo"}}
LAYERS |= dict.fromkeys(["gate", "up", "down", "wi", "wi_0", "wi_1", "wo"], "feed-forward")
OPTIMIZERS = "adamw_torch adamw_torch_fused adamw_8bit adamw_bnb_8bit paged_adamw_32bit paged_adamw_8bit adafactor sgd"
TRAINER_ARGUMENTS = "adam_beta1 adam_beta2 adam_epsilon optim_args lr_scheduler_kwargs"
SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt"
DETECTED = (
    "alpaca sharegpt chat_template json csv parquet text messages conversations instruction input output role from "
    "content value system user human assistant gpt"
)
"""Words in axolotl's description of a dataset for what prepare detects."""
FIELDS = TrainSettings.model_fields
SECRET = re.compile("(hub|auth|hf|access)_token|api_key|secret|password")


class Translation(NamedTuple):
    """The settings of `train` that a key becomes; `is_lost`: they do less than the key asks for."""

    settings: Config
    comment: str = ""
    is_lost: bool = False


@dataclass(frozen=True)
class MigrateResult:
    """A translated run config as YAML, and the keys that it loses, with their values -> what to do instead."""

    text: str
    not_supported: dict[str, str]


def migrate(settings: MigrateSettings, report: Report = silent) -> MigrateResult:
    """Translate the keys of a run config.

    Raises:
        SettingsError: the file can't be read, or isn't a run config.
    """
    path = settings.run_config
    config = read_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else _read_arguments(path)
    tool = detect_tool(config)
    if tool is None:
        problem = "has no key of LLaMA-Factory, axolotl, run_summarization or run_translation"
        raise SettingsError(f"{path}: {problem}", hint="give the YAML, the JSON or the command line of a training run")
    found = _translate(config, tool)
    if not any(found[key].settings for key, value in config.items() if value is not None):
        raise SettingsError(f"{path}: no key can be translated", hint="t5tune train --help-all lists the settings")
    keys = {_write_key(key, value): found[key] for key, value in config.items()}
    lost = {key: each.comment for key, each in keys.items() if each.is_lost}
    unneeded = {key: each.comment for key, each in keys.items() if not each.settings and not each.is_lost}
    lists = {"Not supported, or less than asked for": lost, "Not needed": unneeded}
    for key, why in lost.items():
        report(Note(f"{key}: {why}", warning=True))
    return MigrateResult(_write_yaml(f"the {tool} config {path.name}", found, lists), lost)


def _read_arguments(path: Path) -> dict[str, Any]:
    """Read JSON, or the flags of the command in a shell script; a lone flag is true."""
    try:
        if (size := path.stat().st_size) > MAX_YAML_BYTES:
            raise ValueError(f"it has {size} bytes; the limit is {MAX_YAML_BYTES} bytes")
        if path.suffix.lower() == ".json":
            return parse_json_object(path.read_bytes())
        words = shlex.split(re.sub(r"\\\r?\n", " ", path.read_text(encoding="utf-8")), comments=True)
    except (OSError, ValueError) as error:  # such as a quote without an end
        raise SettingsError(f"{path}: can't be read: {describe_error(error)}") from error
    if sum(word.endswith(".py") for word in words) > 1:
        raise SettingsError(f"{path}: has several commands", hint="keep only the training command")
    flags: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            flags[name.replace("-", "_")] = values = [_read_value(value)] if equals else []
        elif flags and re.match(r"\d?[|;&>]", word):
            break
        elif flags and not word.endswith(".py"):
            values.append(_read_value(word))
    return {name: values[0] if len(values) == 1 else values or True for name, values in flags.items()}


def _read_value(word: str) -> Any:
    """Read a number, true or false; any other word stays text."""
    with suppress(ValueError):
        return json.loads(word.lower())
    return word


def _write_key(name: str, value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{name}: {'…' if SECRET.search(name) else shorten(shown, 60)}"


def _write_yaml(source: str, found: Mapping[str, Translation], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Write the settings, each with the keys that it is from, and the lists of other keys as comments."""
    values: dict[str, Any] = {}
    comments: dict[str, list[str]] = {}
    for key, each in found.items():
        for name, value in each.settings.items():
            values[name] = value
            notes = [f"from {key}" if key != name else "", each.comment]
            comments.setdefault(name, []).extend(filter(None, notes))
    lines = [make_printable(f"# Translated from {source} by t5tune migrate."), ""]
    lines += [f"# {name}: {value}  # choose" for name, value in _find_missing(values).items()]
    for name, value in values.items():
        comment = [make_printable(f"# {'; '.join(dict.fromkeys(comments[name]))}")] if comments[name] else []
        written = to_yaml({name: value}).removesuffix("\n").split("\n")
        lines += ["  ".join(written + comment)] if len(written) == 1 else comment + written
    for heading, keys in lists.items():
        rows = [make_printable(f"# {key}  # {why}") for key, why in keys.items()]
        lines += ["", f"# {heading}:", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _translate(config: Config, tool: str) -> dict[str, Translation]:
    """Translate all keys, and the tool's defaults that differ from train's, to settings that train takes."""
    defaults = {name: value for name, value in DEFAULTS[tool].items() if config.get(name) in (None, "", [])}
    if "full" in (config.get("finetuning_type"), {**config, **defaults}.get("adapter")):
        defaults = {name: value for name, value in defaults.items() if not name.startswith("lora_")}
    config = {**config, **defaults}
    found = {name: _translate_key(name, value, config) for name, value in config.items()}
    found |= {name: Translation(found[name].settings, f"the default of {tool}") for name in defaults}
    while problem := _find_problem(found):
        key, reason = problem
        found[key] = Translation({}, reason, is_lost=True)
    return found


def _find_problem(found: Mapping[str, Translation]) -> tuple[str, str] | None:
    """Return a key whose settings differ from an earlier key's, or which train refuses, and the reason."""
    sources: dict[str, str] = {}
    for key, each in found.items():
        for name, value in each.settings.items():
            if (first := found[sources.setdefault(name, key)].settings[name]) != value:
                return key, f"{name} is {first} already"
    values = {name: found[key].settings[name] for name, key in sources.items()}
    try:
        checked = TrainSettings(**_find_missing(values), **values)
    except SettingsError as error:
        return sources.get(error.problems[0].partition(":")[0], [*sources.values()][-1]), error.problems[0]
    if not checked.eval_data_path and not checked.eval_fraction:
        unused = checked.list_needing_evaluation(checked.lr_scheduler_type).keys() & sources.keys()
        return next(((sources[name], f"{name} needs eval_data_path or eval_fraction") for name in unused), None)
    return None


def _find_missing(settings: Config) -> dict[str, Any]:
    given = {*settings, *(["data_path"] if "data" in settings else [])}
    return {name: value for name, value in REQUIRED.items() if name not in given}


def _translate_key(name: str, value: Any, config: Config) -> Translation:
    ours = next((setting for setting in (name, *SETTINGS_BY_NAME.get(name, [])) if setting in FIELDS), None)
    if value in (None, "", [], {}) or (value is False and (ours is None or FIELDS[ours].default is False)):
        return Translation({}, "off, or not set")
    if isinstance(value, str) and re.search(r"\$\{?[A-Za-z_]", value):
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
    if name in LEGACY_NAMES:
        change = LEGACY_NAMES[name]
        new = change.convert(value) if change.new else None
        return Translation({change.new: new}) if change.new and new else Translation({}, change.why, bool(change.new))
    if ours is not None:
        return Translation({ours: value})
    advice = suggest_setting(name, FIELDS).removeprefix("; ").removeprefix("leave it out: ")
    is_lost = name not in " ".join(NOT_NEEDED).split()
    return Translation({}, advice or "t5tune train has no such setting", is_lost)


def _read_datasets(setting: str, value: Any, config: Config) -> Found:
    """Read axolotl's list of datasets."""
    datasets, lost, words = [], list[str](), set(DETECTED.split())
    for given in value:
        split, _, _ = str(given.get("split") or "").partition("[")
        path = given["data_files"] if given["path"] in ("json", "csv", "parquet", "text") else given["path"]
        dataset = {"path": path, "data_subset": given.get("name"), "data_split": split}
        datasets.append({name: each for name, each in dataset.items() if each})
        others = {name: each for name, each in given.items() if each and each not in dataset.values()}
        lost += [f"{name}: {each}" for name, each in others.items() if set(re.findall(r"\w+", str(each))) - words]
    why = f"without {', '.join(lost)}; set source_column, target_column or num_data, or change the file"
    return ({setting: datasets}, why) if lost else {setting: datasets}


def _read_batch(size: int, config: Config) -> Found:
    if not any(config.get(name) for name in ("sample_packing", "packing", "neat_packing")):
        return {"per_device_train_batch_size": size}
    length = config.get("sequence_len") or config.get("cutoff_len") or 2048
    return {
        "tokens_per_batch": size * length
    }, f"tokens_per_batch is {size} × {length}, because a packed row has many examples"


def _read_layers(names: Any, config: Config) -> Found:
    if config.get("lora_target_linear"):  # axolotl adds all linear layers to the named ones
        return {"lora_target_modules": ["all-linear"]}
    words = names if isinstance(names, list) else re.split(r"[,\s]+", names.strip())
    return {"lora_target_modules": [*dict.fromkeys(LAYERS[word.removesuffix("_proj")] for word in words)]}


def _read_deepspeed(name: str, config: Config) -> Found:
    if Path(name).is_file():
        return {"deepspeed": name}
    level = re.findall(r"(?:zero|z|stage)_?([0-3])", Path(name).name.lower())[0]
    return {"deepspeed": f"zero{max(level, '2')}-offload" if "offload" in name else f"zero{level}"}


PER_EPOCH = {0: "no", 1: "epoch"}
SHARE = "a share of all steps; t5tune plan shows the number of steps"
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
    ("batch_size", lambda v, c: {"gradient_accumulation_steps": v // c["micro_batch_size"]}, "expected a number"),
    ("num_processes", lambda v, c: {"num_gpus": v}, ""),
    ("mask_history", {"train_on": "last"}, ""),
    ("max_target_length", None, "model_max_length limits sources and targets"),
    ("lora_rank", lambda v, c: {"lora_r": v, "lora_alpha": c.get("lora_alpha") or 2 * v}, ""),
    ("lora_target lora_target_modules", _read_layers, "a T5 has other layers; all-linear means all"),
    ("pissa_init", {"init_lora_weights": "pissa"}, ""),
    ("lora_target_linear", {"lora_target_modules": ["all-linear"]}, ""),
    ("stage rl", lambda v, c: {"objective": "orpo" if c.get("pref_loss") == "orpo" else v}, ""),
    ("pref_loss", lambda v, c: {} if v == "orpo" else {"dpo_loss": v}, "objective says it"),
    ("pref_beta rl_beta", lambda v, c: {"orpo_lambda" if c.get("pref_loss") == "orpo" else "dpo_beta": v}, ""),
    ("adapter", lambda v, c: {"q_lora": True} if v == "qlora" else {"train_mode": v}, ""),
    ("load_in_8bit load_8bit", {"q_lora": True, "quant_type": "int8"}, ""),
    ("quantization_method", lambda v, c: {} if v in ("bnb", "bitsandbytes") else None, "q_lora uses bitsandbytes"),
    ("quantization_bit", lambda v, c: {"q_lora": True, "quant_type": {4: "nf4", 8: "int8"}[v]}, "4 or 8 bits"),
    ("bf16 bfloat16 pure_bf16", {"bf16": True}, ""),
    ("fp16 float16", ({"bf16": True}, "a T5 overflows in fp16"), ""),
    ("evals_per_epoch", lambda v, c: {"eval_strategy": PER_EPOCH[v]}, "set eval_steps; t5tune plan shows the steps"),
    ("saves_per_epoch", lambda v, c: {"save_strategy": PER_EPOCH[v]}, "set save_steps; t5tune plan shows the steps"),
    ("eval_steps", lambda v, c: {"eval_steps": v} if float(v) >= 1 else None, SHARE),
    ("save_steps", lambda v, c: {"save_steps": v} if float(v) >= 1 else None, SHARE),
    ("warmup_steps", lambda v, c: {} if "constant" in c.values() else {"warmup_steps": v}, "constant has no warmup"),
    ("warmup_ratio", lambda v, c: {} if c.get("warmup_steps") or "constant" in c.values() else {"warmup_steps": v},
     "warmup_steps or a constant schedule overrides it"),
    (TRAINER_ARGUMENTS, lambda v, c: {"training_args": {k: c[k] for k in TRAINER_ARGUMENTS.split() if c.get(k)}}, ""),
    ("optim optimizer", lambda v, c: {"optim": v} if v in OPTIMIZERS.split() else None, "AdamW is used"),
    ("lr_scheduler_type lr_scheduler", lambda v, c: {"lr_scheduler_type": v}
     if v in SCHEDULES.split() or c.get("lr_scheduler_kwargs") else None, "linear is used"),
    ("deepspeed", _read_deepspeed, "no such file; set deepspeed to zero2 or zero3"),
    ("predict_with_generate", ({"eval_generate": 32}, "for 32 of the held-out examples, not all"), ""),
    ("load_best_model_at_end", lambda v, c: {"metric_for_best_model": c.get("metric_for_best_model") or "loss"}, ""),
    ("wandb_project use_wandb", ({"report_to": "wandb"}, "set the variable WANDB_PROJECT, too"), ""),
    ("packing sample_packing neat_packing eval_sample_packing", {}, "train packs where the model can"),
    ("template chat_template", {}, "the data or the model decides the conversation template"),
    ("overwrite_output_dir", {}, "a run is never overwritten; --fresh renames it and starts over"),
    ("ddp_timeout", {}, "the data is prepared before more processes start"),
    ("dataset_dir", {}, "data_path names whole paths"),
    ("dataset_prepared_path tokenized_path", {}, "the token cache is in the run folder"),
)  # fmt: skip
RULES = {name: (rule, why) for names, rule, why in _ROWS for name in names.split()}
"""Key -> (rule, why). A rule has the settings, or makes them of the value and of all keys. {}: nothing needs to be set;
(settings, comment): they do less than the value asks for; None, or any error: no settings do it.
"""
