"""Names of our settings in axolotl, LLaMA-Factory, TRL, torchtune and transformers' scripts, to suggest the right name.

suggest_setting("lora_rank", TrainSettings.list_suggestions())    # "; did you mean lora_r?"

None of these names is accepted, since units and defaults differ between tools; fastchat_names.py has accepted names.
"""

import re
from collections.abc import Callable, Collection, Mapping

from t5tune.errors import find_close_name

NAMES_IN_OTHER_TOOLS: Mapping[str, str] = {
    "model_name_or_path": "base_model base_model_config model model_name model_path model_id checkpoint_path "
    "pretrained_model_name_or_path base_model_name_or_path base_model_path base",
    "revision": "model_revision revision_of_model",
    "conversation_template": "chat_template template prompt_template conv_template",
    # before model_max_length, which chat and evaluate have as well
    "max_new_tokens": "generation_max_length max_tokens max_length val_max_target_length",
    "model_max_length": "sequence_len cutoff_len max_length max_seq_len max_seq_length max_source_length "
    "max_target_length max_prompt_length max_source_len max_target_len max_input_length max_output_length "
    "source_max_length target_max_length",
    "data_path": "datasets dataset dataset_name dataset_dir dataset_path data_files train_file train_data "
    "train_dataset pretraining_dataset test_file data",  # ours in YAML: a list of datasets, each with its settings
    "mixing": "mix_strategy dataset_mixing",
    "eval_data_path": "eval_dataset eval_file test_datasets validation_file validation_data val_data val_file "
    "valid_file dev_file eval_data",
    "data_format": "formatting type",
    "source_column": "text_column input_column prompt_column dataset_text_field",
    "target_column": "summary_column output_column response_column label_column target",
    "source_prefix": "prefix task_prefix",
    "num_data": "max_samples max_train_samples num_samples limit num",
    "example": "index idx",
    "data_subset": "dataset_config dataset_config_name subset",
    "data_split": "dataset_split dataset_train_split split",
    "eval_data_split": "dataset_test_split",
    "eval_fraction": "val_set_size val_size eval_size test_size validation_split validation_split_percentage",
    "preprocessed_path": "dataset_prepared_path tokenized_path",
    "num_workers": "preprocessing_num_workers dataset_num_proc dataset_processes num_proc",
    "add_tokens": "tokens add_special_tokens new_special_tokens additional_special_tokens",
    "train_mode": "finetuning_type",
    "lora_r": "lora_rank rank r lora",
    "lora_alpha": "alpha",
    "lora_target_modules": "lora_target target_modules",
    "modules_to_save": "lora_modules_to_save additional_target",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights",
    "adapter": "lora_model_dir adapter_name_or_path adapter_path lora_path lora_weights lora peft_model peft_model_id",
    "q_lora": "qlora use_qlora load_in_4bit load_4bit",
    "quant_type": "bnb_4bit_quant_type quantization_type",
    "double_quant": "use_bnb_nested_quant bnb_4bit_use_double_quant double_quantization",
    "learning_rate": "lr optimizer.lr",
    "weight_decay": "wd",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "warmup_steps": "warmup num_warmup_steps warmup_ratio",
    "num_train_epochs": "num_epochs epochs",
    "max_steps": "max_train_steps num_training_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "per_device_eval_batch_size": "batch_size eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum",
    "gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
    "packing": "sample_packing neat_packing",
    "torch_compile": "compile",
    "optim": "optimizer",
    "max_grad_norm": "gradient_clipping gradient_clip_val clip_grad_norm",
    "label_smoothing_factor": "label_smoothing",
    "early_stopping_patience": "patience",
    "eval_steps": "eval_every eval_interval",
    "save_steps": "save_every save_interval",
    "logging_steps": "log_every log_interval",
    "save_total_limit": "keep_last_n",
    "orpo_lambda": "orpo_alpha",
    "dpo_beta": "beta pref_beta rl_beta",
    "dpo_loss": "loss_type pref_loss",
    "reference_adapter": "ref_model_adapters",
    "report_to": "log_with",
    "run_name": "wandb_name wandb_run_name experiment_name",
    "hub_model_id": "push_to_hub_model_id export_hub_model_id repo_id",
    "hub_private_repo": "private push_to_hub_private",
    "num_gpus": "nproc_per_node gpus n_gpu",
    "process_group_timeout": "ddp_timeout",
    "use_cpu": "no_cuda cpu",
    "bf16": "precision mixed_precision bfloat16 pure_bf16",
    "dtype": "torch_dtype",
    "device": "device_map",
    "num_beams": "generation_num_beams beam_size",
    "system": "system_prompt system_message default_system",
    "seed": "random_seed random_state",
    "output_dir": "o output output_path out_dir save_dir export_dir target_model_path target",
    "overwrite": "overwrite_output_dir force",
    "fresh": "overwrite_output_dir overwrite force",  # for train, which has no `overwrite`
}
"""Setting -> its names in other tools. If a name fits several settings, the command's first match wins."""

NOT_NEEDED: Mapping[str, str] = {
    "greater_is_better": "{metric_for_best_model} implies it; a custom metric is better if larger",
    "hub_token push_to_hub_token use_auth_token hf_use_auth_token": "settings are saved; run `hf auth login`, or set "
    "HF_TOKEN",
    "do_train do_predict": "the command decides it",
    "do_eval": "{eval_fraction} or {eval_data_path} turns evaluation on",
    "use_peft use_lora": "LoRA is the default, and {train_mode=full} trains all weights",
    "device device_map": "CUDA_VISIBLE_DEVICES chooses the GPU that trains, {num_gpus} uses several, and "
    "{use_cpu=true} none",
    "attn_implementation flash_attention flash_attn use_flash_attn use_flash_attention use_flash_attention_2 "
    "xformers_attention sdp_attention": "attention uses PyTorch's fused kernels (SDPA)",
    "use_unsloth use_liger_kernel enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
    "liger_fused_linear_cross_entropy": "t5tune has its own faster layers for GPUs",
    "model_type is_llama_derived_model is_mistral_derived_model config_name": "config.json contains it; {family} is "
    "for a model_type that t5tune doesn't know",
    "ds_type": "the file name's extension says whether it is JSON, CSV or Parquet",
    "pad_to_sequence_len pad_to_max_length": "{packing} fills the batches without padding",
    "ignore_pad_token_for_loss": "the loss never counts padding",
    "resize_position_embeddings": "T5's relative positions have no maximum length",
    "streaming buffer_size": "records are always streamed",
    "preprocessing_batch_size": "{num_workers} makes prepare faster",
    "shuffle shuffle_merged_datasets": "each epoch has its own order, which follows from {seed}",
    "tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer_type use_fast_tokenizer": "the model has its "
    "tokenizer, and {add_tokens} extends it",
    "special_tokens": "the tokenizer's special tokens are used",
    "safe_serialization": "weights are always written as safetensors",
    "overwrite_cache": "the token cache is written again whenever its inputs change",
    "save_only_model": "resuming needs complete checkpoints; {save_total_limit} keeps fewer",
    "trust_remote_code": "code from a model's repository is never run",
    "quantization_method": "{q_lora} always uses bitsandbytes",
    "eval_sample_packing": "batches of held-out examples have similar lengths",
    "plot_loss": "report.html in the run folder shows the curves",
    "gradient_checkpointing_kwargs": "t5tune chooses the kind of checkpointing",
    "loss_watchdog_threshold loss_watchdog_patience": "training stops if the loss isn't finite",
    "logging_first_step logging_strategy wandb_watch debug strict": "{logging_steps} logs the loss, the gradient and "
    "the tokens",
}
"""Names in other tools for what t5tune does without a setting -> the reason, with our settings in braces."""

ADVICE: Mapping[str, str] = {
    **{names: f"leave it out: {reason}" for names, reason in NOT_NEEDED.items()},
    "resume_from_checkpoint auto_resume_from_checkpoints resume": "run the same command again: it resumes from the "
    "newest checkpoint; {fresh} starts over",
    "load_best_model_at_end": "{metric_for_best_model} does it: the best checkpoint becomes the result",
    "wandb_project use_wandb": "use {report_to=wandb}, and the variable WANDB_PROJECT",
    "wandb_entity wandb_log_model": "use {report_to=wandb}, and the variable WANDB_ENTITY or WANDB_LOG_MODEL",
    "predict_with_generate": "use {eval_generate=32}, the number of held-out examples to generate predictions for",
    "evals_per_epoch": "use {eval_steps}, or {eval_strategy=epoch}",
    "saves_per_epoch": "use {save_steps}, or {save_strategy=epoch}",
    "stage": "use {objective}: sft (the default), dpo, orpo or span-corruption",
    "lora_target_linear": "use {lora_target_modules=all-linear}",
    "pissa_init": "use {init_lora_weights=pissa}",
    "quantization_bit bits": "use {q_lora=true} for 4 bits, and also {quant_type=int8} for 8 bits",
    "load_in_8bit load_8bit": "use {q_lora=true} and {quant_type=int8}",
    "torch_dtype dtype": "use {bf16=true}, or leave it out for float32",
    "num_beams generation_num_beams generation_max_length val_max_target_length": "leave it out: the predictions of "
    "{eval_generate} are greedy and at most as long as the longest target; t5tune evaluate has this option",
    "limit num": "{example} shows one example, by its index, and {all=true} all of them",
    "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss": "leave it out: the loss counts only "
    "targets",
    "source_lang target_lang": "use {source_column} and {target_column}, and {source_prefix} for an "
    "instruction such as 'translate English to German: '",
    "mask_history": "use {train_on=last}",
    "rl": "use {objective}: dpo or orpo",
    "relora_steps galore_rank use_galore": "leave it out: ReLoRA and GaLore aren't supported",
    "fsdp_config": "use {deepspeed=zero3}",
    "eval_table_size": "use {report_samples}, the number of predictions in report.html",
    "adam_beta1 adam_beta2 adam_epsilon optim_args lr_scheduler_kwargs": "set it under training_args in a YAML file",
    "training_args": "set it in a --config file",
    "max_eval_samples max_predict_samples": "leave it out: all of {eval_data_path} is evaluated; `t5tune evaluate` has "
    "{num_data}",
    "neftune_noise_alpha": "leave it out: NEFTune isn't supported",
}
"""Names in other tools without a setting of the same meaning -> the advice, with our settings in braces.

A name that is also in NAMES_IN_OTHER_TOOLS means that setting in the commands that have it.
"""

KEYS_OF_TOOLS = {
    "LLaMA-Factory": "stage finetuning_type dataset cutoff_len template lora_rank",
    "axolotl": "base_model datasets sequence_len micro_batch_size num_epochs val_set_size",
    "transformers": "dataset_name train_file validation_file summary_column source_lang max_source_length do_train",
}
"""Tool -> some keys that only this tool has."""

SETTINGS_BY_NAME = {
    name: [ours for ours, names in NAMES_IN_OTHER_TOOLS.items() if name in names.split()]
    for name in " ".join(NAMES_IN_OTHER_TOOLS.values()).split()
}
_SETTING_PATTERN = re.compile(r"\{(\w+)(?:=([\w-]+))?\}")
_ADVICE_BY_NAME = {name: advice for names, advice in ADVICE.items() for name in names.split()}


def _write_key(setting: str, value: str | None) -> str:
    return setting if value is None else f"{setting}: {value}"


def suggest_setting(
    name: str, own: Collection[str], others: Collection[str] = (), write: Callable[[str, str | None], str] = _write_key
) -> str:
    """Return `; did you mean lora_r?`, or `; ` and advice, or an empty string.

    Args:
        own: settings of the command.
        others: settings of other commands, which a name from a different tool may also mean.
        write: writes a setting, perhaps with a value, such as `--lora-r` or `--report-to wandb`.
    """
    if advice := _find_advice(name, own, others):
        return "; " + _SETTING_PATTERN.sub(lambda setting: write(*setting.groups()), advice)
    meant = find_meant_setting(name, own, others)
    return f"; did you mean {write(meant, None)}?" if meant else ""


def mention_help(command: str) -> str:
    """Return the advice for an unknown name without a suggestion."""
    return f"; t5tune {command} --help-all lists every option"


def find_meant_setting(name: str, own: Collection[str], others: Collection[str] = ()) -> str | None:
    """Find the setting that an unknown name most likely means: by its names in other tools, or by spelling."""
    if _find_advice(name, own, others):
        return None
    meant = SETTINGS_BY_NAME.get(_normalize(name), [])
    ours = next((setting for names in (own, others) for setting in meant if setting in names), None)
    return ours or find_close_name(_normalize(name), own)


def find_nested_setting(outer: str, inner: str, own: Collection[str]) -> str | None:
    """Find the setting that a nested key means: lora_r for `lora: {r: 8}`."""
    joined = f"{outer}_{inner}"
    for name in (joined, inner):
        if name in own:
            return name
    known = [name for name in (joined, f"{outer}.{inner}", inner) if is_name_elsewhere(name)]
    return next(filter(None, (find_meant_setting(name, own) for name in known)), None)


def is_name_elsewhere(name: str) -> bool:
    """Whether other tools use a name."""
    return _normalize(name) in SETTINGS_BY_NAME or _normalize(name) in _ADVICE_BY_NAME


def _find_advice(name: str, own: Collection[str], others: Collection[str]) -> str | None:
    """Find the advice for a name, unless it means a setting of the command."""
    name = _normalize(name)
    advice = _ADVICE_BY_NAME.get(name)
    if advice is None or not {*own}.isdisjoint(SETTINGS_BY_NAME.get(name, [])):
        return None
    mentioned = {setting for setting, _ in _SETTING_PATTERN.findall(advice)}
    return advice if mentioned <= {*own, *others} else None


def _normalize(name: str) -> str:
    return name.lower().replace("-", "_")


def detect_tool(names: Collection[str]) -> str | None:
    """Return the tool that has most of the names; None if no tool has any of them."""
    counts = {tool: len({*names} & {*keys.split()}) for tool, keys in KEYS_OF_TOOLS.items()}
    return max(counts, key=lambda tool: counts[tool]) if any(counts.values()) else None
