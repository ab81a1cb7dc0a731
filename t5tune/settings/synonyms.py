"""What axolotl, LLaMA-Factory, TRL, torchtune and transformers' scripts call our settings, to suggest the right name.

suggest_setting("lora_rank", list_suggestions(TrainSettings))    # "; did you mean lora_r?"

None of these names is accepted: a setting of another tool may differ in unit or default. For those that are, see
legacy_names.py.
"""

import re
from collections.abc import Callable, Collection, Mapping

from t5tune.errors import find_close_name
from t5tune.settings.fields import Settings

NAMES_IN_OTHER_TOOLS: Mapping[str, str] = {
    "model_name_or_path": "base_model base_model_config model model_name model_path model_id checkpoint_path "
    "pretrained_model_name_or_path base_model_name_or_path",
    "revision": "model_revision revision_of_model",
    "conversation_template": "chat_template template prompt_template conv_template",
    "model_max_length": "sequence_len cutoff_len max_length max_seq_len max_seq_length max_source_length "
    "max_target_length max_prompt_length",
    "data_path": "datasets dataset dataset_name dataset_dir dataset_path data data_files train_file train_data "
    "train_dataset test_file",
    "eval_data_path": "eval_dataset eval_data eval_file test_datasets validation_file validation_data",
    "source_column": "text_column input_column prompt_column",
    "target_column": "summary_column output_column response_column label_column",
    "source_prefix": "prefix task_prefix",
    "num_data": "max_samples max_train_samples max_eval_samples num_samples",
    "eval_fraction": "val_set_size val_size eval_size test_size validation_split validation_split_percentage",
    "preprocessed_path": "dataset_prepared_path tokenized_path",
    "num_workers": "preprocessing_num_workers dataset_num_proc dataset_processes num_proc",
    "add_tokens": "tokens special_tokens add_special_tokens new_special_tokens additional_special_tokens",
    "train_mode": "finetuning_type",
    "lora_r": "lora_rank rank r",
    "lora_alpha": "alpha",
    "lora_target_modules": "lora_target target_modules",
    "modules_to_save": "lora_modules_to_save additional_target",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights",
    "adapter": "lora_model_dir adapter_name_or_path adapter_path lora_path lora_weights peft_model peft_model_id",
    "q_lora": "qlora use_qlora load_in_4bit load_4bit",
    "quant_type": "bnb_4bit_quant_type quantization_type",
    "double_quant": "use_bnb_nested_quant bnb_4bit_use_double_quant double_quantization",
    "learning_rate": "lr optimizer.lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "warmup_steps": "warmup num_warmup_steps",
    "num_train_epochs": "num_epochs epochs",
    "max_steps": "max_train_steps num_training_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "per_device_eval_batch_size": "batch_size eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum",
    "gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
    "packing": "sample_packing",
    "torch_compile": "compile",
    "optim": "optimizer",
    "max_grad_norm": "gradient_clipping gradient_clip_val clip_grad_norm",
    "label_smoothing_factor": "label_smoothing",
    "eval_generate": "predict_with_generate",
    "early_stopping_patience": "patience",
    "report_to": "log_with",
    "num_gpus": "nproc_per_node gpus n_gpu",
    "process_group_timeout": "ddp_timeout",
    "use_cpu": "no_cuda cpu",
    "device": "device_map",
    "max_new_tokens": "generation_max_length max_tokens",
    "num_beams": "generation_num_beams beam_size",
    "system": "system_prompt system_message default_system",
    "seed": "random_seed",
    "output_dir": "output output_path out_dir save_dir export_dir",
    "overwrite": "overwrite_output_dir force",
}
"""Setting -> its names in other tools. A name may belong to several settings: the first that the command has is it."""

ADVICE: Mapping[str, str] = {
    "resume_from_checkpoint auto_resume_from_checkpoints resume": "give the same command again: it resumes from the "
    "newest checkpoint; {fresh} starts over",
    "load_best_model_at_end": "{metric_for_best_model} does it: the best checkpoint becomes the result",
    "greater_is_better": "leave it out: {metric_for_best_model} implies it; a metric of your own is better if larger",
    "push_to_hub hub_model_id push_to_hub_model_id hub_strategy": "upload the result with `hf upload NAME FOLDER`",
    "wandb_project use_wandb": "set {report_to} to wandb, and the variable WANDB_PROJECT",
    "evals_per_epoch": "set {eval_steps}, or {eval_strategy} to epoch",
    "saves_per_epoch": "set {save_steps}, or {save_strategy} to epoch",
    "do_train do_predict": "leave it out",
    "do_eval": "leave it out: {eval_fraction} or {eval_data_path} turns evaluation on",
    "stage": "leave it out: supervised fine-tuning is all that there is",
    "use_peft use_lora": "leave it out: LoRA is the default, and {train_mode} full trains all weights",
    "lora_target_linear": "set {lora_target_modules} to all-linear",
    "pissa_init": "set {init_lora_weights} to pissa",
    "quantization_bit": "set {q_lora} to true for 4 bits, and {quant_type} to int8 for 8 bits",
    "load_in_8bit load_8bit": "set {q_lora} to true and {quant_type} to int8",
    "torch_dtype dtype": "set {bf16} to true, or leave it out for float32",
    "attn_implementation flash_attention flash_attn": "leave it out: attention uses PyTorch's fused kernels (SDPA)",
    "train_on_inputs completion_only_loss assistant_only_loss": "leave it out: the loss counts only targets",
    "tokenizer_name tokenizer_name_or_path tokenizer_config": "leave it out: the tokenizer is that of the model, and "
    "{add_tokens} extends it",
    "trust_remote_code": "leave it out: code from a model's repository is never run",
    "plot_loss": "leave it out: report.html in the run folder shows the curves",
    "adam_beta1 adam_beta2 adam_epsilon optim_args lr_scheduler_kwargs neftune_noise_alpha run_name": "set it under "
    "training_args in a YAML file",
}
"""Names in other tools -> what to do instead of a setting of the same meaning. Our settings are in braces."""

_SETTINGS_BY_NAME = {
    name: [ours for ours, names in NAMES_IN_OTHER_TOOLS.items() if name in names.split()]
    for name in " ".join(NAMES_IN_OTHER_TOOLS.values()).split()
}
_ADVICE_BY_NAME = {name: advice for names, advice in ADVICE.items() for name in names.split()}


def list_suggestions(model: type[Settings]) -> list[str]:
    """List the settings of a command without the hidden ones."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return [name for name, extra in extras.items() if not (isinstance(extra, dict) and extra.get("hidden"))]


def suggest_setting(
    name: str, own: Collection[str], others: Collection[str] = (), write: Callable[[str], str] = str
) -> str:
    """Return `; did you mean lora_r?`, or `; ` and what to do instead, or an empty string.

    Args:
        own: settings of the command, which may be suggested.
        others: settings of other commands, which another tool's name may also mean.
        write: how to write a setting, such as `--lora-r`.
    """
    name = name.lower().replace("-", "_")
    if advice := _ADVICE_BY_NAME.get(name):
        mentioned = re.findall(r"\{(\w+)\}", advice)
        if {*mentioned} <= {*own, *others}:
            return "; " + advice.format_map({setting: write(setting) for setting in mentioned})
    meant = _SETTINGS_BY_NAME.get(name, [])
    ours = next((setting for names in (own, others) for setting in meant if setting in names), None)
    ours = ours or find_close_name(name, own)
    return f"; did you mean {write(ours)}?" if ours else ""
