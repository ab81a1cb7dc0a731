"""Steps, batches, optimizer, precision, evaluation, checkpoints, and the run folder.

Names and defaults follow Hugging Face's.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset, OptionalCount, PathAsText, Settings, WordList
from t5tune.settings.groups.base import MetricSettings, OutputSettings
from t5tune.settings.groups.record_format import PREFERENCE_OBJECTIVES

SCHEDULES_BY_METRIC = {"reduce_lr_on_plateau", "greedy"}  # the learning rate depends on metric_for_best_model


def _strip_eval_prefix(value: Any) -> Any:
    """Accept Hugging Face's metric names: `eval_loss` is `loss`."""
    return value.removeprefix("eval_") if isinstance(value, str) else value


def _read_switch(value: Any) -> Any:
    """Read true and false, as YAML 1.1 and other tools write it, as on and off."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


def _refuse_rate(value: Any) -> Any:
    """Refuse a number other than 0 and 1: `dropout` is a rate in other tools."""
    try:
        is_rate = not isinstance(value, bool) and float(value) not in (0, 1)
    except (TypeError, ValueError):  # pydantic reads it
        return value
    if is_rate:
        raise ValueError("expected true or false; the rate is the base's, and lora_dropout sets LoRA's")
    return value


PackingMode = Literal["auto", "on", "off"]
Packing = Annotated[PackingMode, BeforeValidator(_read_switch, json_schema_input_type=PackingMode | bool)]


class TrainingSettings(Settings):
    panel: ClassVar[str] = "Training"

    num_train_epochs: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=3.0, gt=0, description="Training epochs (passes over the data)."
    )
    max_steps: Annotated[OptionalCount, Affects.WEIGHTS] = Field(
        default=None, description="Total optimizer steps, overriding num_train_epochs; default: from num_train_epochs."
    )
    per_device_train_batch_size: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=8, gt=0, description="Batch size per GPU or process (examples)."
    )
    tokens_per_batch: Annotated[OptionalCount, Affects.ALL_RANKS] = Field(
        default=None,
        description="Fill each micro-batch up to this many tokens (source + target, including padding) instead of "
        "using per_device_train_batch_size.",
    )
    gradient_accumulation_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=1, gt=0, description="Micro-batches to accumulate per optimizer step."
    )
    group_by_length: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Batch examples of similar length to reduce padding, by sorting within random windows of 64 steps; "
        "no effect with tokens_per_batch.",
    )
    packing: Annotated[Packing, Affects.WEIGHTS] = Field(
        default="auto",
        description="Pack the examples of a batch into one row without padding, without changing the results; auto "
        "packs if the model supports it.",
    )
    packed_attention: Annotated[Literal["auto", "flex", "loop"], Affects.ALL_RANKS] = Field(
        default="auto",
        description="How attention over packed rows is computed: in one compiled kernel per layer (flex), or in a loop "
        "over the examples; auto: flex on NVIDIA GPUs in bf16, once it has been compared with the loop.",
    )
    dropout: Annotated[bool | None, BeforeValidator(_refuse_rate), Affects.WEIGHTS] = Field(
        default=None,
        description="Apply dropout, with the base's own rate and lora_dropout; default: yes, but not for objective dpo "
        "and orpo.",
    )
    attention_dropout: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Apply dropout to attention's probabilities, as in T5's training; --no-attention-dropout is "
        "faster, and keeps the dropout of hidden states.",
    )
    learning_rate: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=5e-5, ge=0, description="Peak learning rate."
    )
    lr_scheduler_type: Annotated[str, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default="linear", description="Learning-rate schedule, by its transformers name (linear, cosine, …)."
    )
    warmup_steps: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=0, ge=0, description="Warmup steps; a value below 1 is a fraction of all steps."
    )
    weight_decay: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=0.0, ge=0, description="Decoupled weight decay (as in AdamW)."
    )
    label_smoothing_factor: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Label smoothing: probability mass spread uniformly over the vocabulary.",
    )
    max_grad_norm: Annotated[float, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=1.0, ge=0, description="Gradient clipping: maximum norm of the gradient; 0 turns clipping off."
    )
    optim: Annotated[str, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default="adamw_torch",
        description="Optimizer, by its transformers name. The state of a paged one isn't paged after resuming.",
    )
    bf16: Annotated[bool, Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=False, description="Compute in bfloat16, and keep the base in bfloat16."
    )
    fp16: Annotated[bool, Affects.NOTHING] = Field(
        default=False,
        description="Not supported: T5's feed-forward layers overflow in fp16; use bf16.",
        json_schema_extra={"hidden": True},
    )
    tf32: Annotated[bool | None, Affects.WEIGHTS] = Field(
        default=None,
        description="Use TensorFloat-32 for fp32 matrix products on GPUs; default: if the GPU supports it.",
    )
    gradient_checkpointing: Annotated[bool, Affects.ALL_RANKS] = Field(
        default=False,
        description="Recompute activations in the backward pass instead of storing them: less memory, about a third "
        "slower.",
    )
    torch_compile: Annotated[bool, Affects.WEIGHTS] = Field(
        default=False,
        description="Compile layer norms and feed-forward layers with torch.compile. The first steps take seconds to "
        "minutes longer; later ones are often faster. On a GPU, try without it first.",
    )
    on_non_finite: Annotated[Literal["stop", "skip"], Affects.WEIGHTS] = Field(
        default="stop",
        description="What to do if the loss or a gradient is NaN or infinite: stop training, or skip the step. No "
        "update is made in either case.",
    )
    max_skipped_steps: Annotated[int, Affects.WEIGHTS] = Field(
        default=10,
        ge=0,
        description="Maximum number of steps to skip in a run (on_non_finite: skip); the next non-finite step stops "
        "training.",
    )
    dataloader_num_workers: Annotated[int, Affects.TRAINER] = Field(
        default=0, ge=0, description="Data-loading processes per rank."
    )
    use_cpu: Annotated[bool, Affects.ALL_RANKS] = Field(
        default=False, description="Train on the CPU even if there is a GPU."
    )
    training_args: Annotated[dict[str, Any], Affects.WEIGHTS] = Field(
        default={},
        description="Additional fields of transformers' TrainingArguments; YAML only.",
        json_schema_extra={"yaml_only": True},
    )

    @model_validator(mode="after")
    def _turn_bf16_on_for_q_lora(self) -> Self:
        # unless it is set: --no-bf16 computes in fp32, which is faster on a CPU without bf16
        if getattr(self, "q_lora", False) and "bf16" not in self.model_fields_set:
            self.__dict__["bf16"] = True  # it still isn't set: `replace(q_lora=False)` turns it off
        return self

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is applied.

        Without it, the policy has the reference's probabilities in the first step of preference training.
        """
        return getattr(self, "objective", "sft") not in PREFERENCE_OBJECTIVES if self.dropout is None else self.dropout

    @property
    def has_attention_dropout(self) -> bool:
        """Whether dropout is applied to attention's probabilities."""
        return self.has_dropout and self.attention_dropout

    @field_validator("fp16")
    @classmethod
    def _reject_fp16(cls, value: bool) -> bool:
        if value:
            raise ValueError("T5's feed-forward layers overflow in fp16 (loss 0 or NaN); use bf16")
        return value


class EvaluationSettings(MetricSettings):
    panel: ClassVar[str] = "Evaluation and checkpoints"

    eval_strategy: Annotated[Literal["no", "steps", "epoch"] | None, Affects.EVALUATION] = Field(
        default=None,
        description="When to evaluate; default: every epoch if there is held-out data, otherwise never.",
    )
    eval_steps: Annotated[OptionalCount, Affects.EVALUATION | Affects.TRAINER] = Field(
        default=None, description="Evaluate every N steps; sets eval_strategy to steps."
    )
    eval_generate: Annotated[OptionalCount, Affects.EVALUATION] = Field(
        default=None,
        description="Generate predictions for this many held-out examples at each evaluation, and score them (see "
        "metrics and metric).",
    )
    metric_for_best_model: Annotated[
        str | None,
        BeforeValidator(_strip_eval_prefix),
        NoneIfUnset,
        Affects.FINAL_WEIGHTS | Affects.EVALUATION,
    ] = Field(
        default=None,
        description="Keep the checkpoint that is best by this held-out metric, and use its weights as the final ones: "
        "loss, perplexity, with eval_generate one of metrics or metric, or for objective dpo and orpo one such as "
        "rewards/accuracies; default: use the last checkpoint.",
        json_schema_extra={"metavar": "NAME"},
    )
    early_stopping_patience: Annotated[OptionalCount, Affects.FINAL_WEIGHTS | Affects.EVALUATION] = Field(
        default=None,
        description="Early stopping: stop after this many evaluations without a better metric_for_best_model "
        "(default: loss).",
    )
    early_stopping_threshold: Annotated[
        float | None, Field(ge=0), NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.EVALUATION
    ] = Field(
        default=None,
        description="Early stopping: count an evaluation as better only if the metric improves by more than this; "
        "default: by any amount.",
    )
    per_device_eval_batch_size: Annotated[OptionalCount, Affects.ALL_RANKS] = Field(
        default=None,
        description="Maximum batch size of evaluations per process (examples); default: as many as fit a budget of "
        "tokens.",
    )
    save_strategy: Annotated[Literal["no", "steps", "epoch"], Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default="steps", description="When to save a checkpoint; the last step always saves one."
    )
    save_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=500, gt=0, description="Save a checkpoint every N steps."
    )
    save_total_limit: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None,
        description="Keep only the newest N checkpoints, and the best one if metric_for_best_model is set; default: "
        "all.",
    )
    logging_steps: Annotated[int, Affects.TRAINER | Affects.ALL_RANKS] = Field(
        default=10, gt=0, description="Log metrics to metrics.jsonl every N steps."
    )
    report_to: Annotated[WordList, Affects.NOTHING] = Field(
        default=["none"], description="Experiment trackers: tensorboard, wandb, mlflow, trackio, … or none."
    )
    run_name: Annotated[str | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=None, description="Name of the run in experiment trackers; default: the name of the run folder."
    )
    report_samples: Annotated[int, Affects.ALL_RANKS] = Field(
        default=10,
        ge=0,
        description="Number of examples for which report.html shows predictions from before and after training (up to "
        "64 tokens each); half of them are the worst of twice as many. 0: none.",
    )


class RankSettings(Settings):
    """How many processes to start, and how long they wait for each other."""

    panel: ClassVar[str] = "Processes"

    num_gpus: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Start this many processes on this machine, one per GPU."
    )
    num_processes: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Start this many processes on this machine, on the CPU."
    )
    process_group_timeout: Annotated[int, Affects.NOTHING] = Field(
        default=1800,
        gt=0,
        description="Process-group timeout: stop if another rank doesn't respond within this time (seconds).",
    )

    @model_validator(mode="after")
    def _check_number_of_processes(self) -> Self:
        if self.num_gpus and self.num_processes:
            raise ValueError(
                f"num_gpus: {self.num_gpus} conflicts with num_processes: {self.num_processes}; "
                "leave one of them out, or give it as none"
            )
        return self

    @property
    def process_count(self) -> int:
        """The number of processes that the command line starts."""
        return self.num_gpus or self.num_processes or 1


class PartitionSettings(RankSettings):
    deepspeed: Annotated[str | None, NoneIfUnset, PathAsText] = Field(
        default=None,
        description="DeepSpeed config with ZeRO-3, if the base doesn't fit on one GPU: zero3, zero3-offload, or a JSON "
        "file.",
    )


class ProcessSettings(RankSettings):
    deepspeed: Annotated[str | None, NoneIfUnset, PathAsText, Affects.NOTHING] = Field(
        default=None,
        description="DeepSpeed config: zero0, zero1, zero2, zero3, zero2-offload, zero3-offload, or a JSON file.",
    )
    max_restarts: Annotated[int, Affects.NOTHING] = Field(
        default=0,
        ge=0,
        description="If a process is lost, restart all processes of num_gpus or num_processes from the last "
        "checkpoint, up to this many times.",
    )


class RunOutputSettings(OutputSettings):
    fresh: Annotated[bool, Affects.THIS_CALL | Affects.ALL_RANKS] = Field(
        default=False,
        description="Start over; an existing run in output_dir is renamed to output_dir.1, output_dir.2, …",
    )
    allow_change: Annotated[WordList, Affects.THIS_CALL] = Field(
        default=[],
        description="Resume even if these fields differ from those that the run was started with (learning_rate, "
        "data, batch, …). Those that decide the shape of the trained weights, such as lora_r, can't be allowed.",
    )
    dry_run: Annotated[bool, Affects.THIS_CALL] = Field(
        default=False,
        description="Show all settings including defaults, the memory plan and the launch command; write nothing.",
    )
