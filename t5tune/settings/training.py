"""Steps, batches, the optimizer, precision, evaluation and checkpoints. Names and defaults are Hugging Face's."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from t5tune.settings.fields import Maybe, Settings, Words


def _without_prefix(value: Any) -> Any:
    """`eval_loss`, as Hugging Face's figures are called, is `loss`."""
    return value.removeprefix("eval_") if isinstance(value, str) else value


class TrainingSettings(Settings):
    panel: ClassVar[str] = "Training"

    num_train_epochs: float = Field(default=3.0, gt=0, description="Passes over the data.")
    max_steps: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Stop after this many optimizer steps; default: by num_train_epochs."
    )
    per_device_train_batch_size: int = Field(default=8, gt=0, description="Examples per process and micro-step.")
    tokens_per_batch: Annotated[int | None, Maybe] = Field(
        default=None,
        gt=0,
        description="Fill each micro-step of a process with examples up to this many tokens, source and target, "
        "padding counted, in place of per_device_train_batch_size.",
    )
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Micro-steps per optimizer step.")
    group_by_length: bool = Field(
        default=True, description="Fill each step with examples of about the same length, in shuffled windows."
    )
    packing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Lay the examples of a batch behind each other in one row, with no padding and the same result; "
        "auto: where the model can.",
    )
    learning_rate: float = Field(default=5e-5, ge=0, description="Highest learning rate.")
    lr_scheduler_type: str = Field(
        default="linear", description="Learning-rate schedule, by its transformers name (linear, cosine, …)."
    )
    warmup_steps: float = Field(default=0, ge=0, description="Steps of linear warm-up; below 1: a share of all steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    label_smoothing_factor: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target's probability that goes to all words alike."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip the gradient's norm to this; 0: don't clip.")
    optim: str = Field(default="adamw_torch", description="Optimizer, by its transformers name.")
    bf16: bool = Field(default=False, description="Compute in bfloat16; the base is kept in it too.")
    fp16: bool = Field(default=False, description="Refused: T5's feed-forward layers overflow in fp16.")
    tf32: bool | None = Field(
        default=None, description="TensorFloat-32 for fp32 products on GPUs; default: where the GPU can."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations instead of keeping them: less memory, a third slower.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Let torch.compile make few kernels of each norm and feed-forward layer: seconds to minutes at "
        "first, then often faster steps.",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do at a loss or gradient that is NaN or infinite; no update is made with it.",
    )
    max_skipped_steps: int = Field(
        default=10, ge=0, description="Stop after skipping this many steps of a run (on_non_finite: skip)."
    )
    dataloader_num_workers: int = Field(default=0, ge=0, description="Processes per rank that read the data.")
    use_cpu: bool = Field(default=False, description="Train on the CPU even where there is a GPU.")
    training_args: dict[str, Any] = Field(
        default={},
        description="Any other field of transformers' TrainingArguments; YAML only.",
        json_schema_extra={"yaml_only": True},
    )

    @field_validator("fp16")
    @classmethod
    def _no_fp16(cls, value: bool) -> bool:
        if value:
            raise ValueError("T5's feed-forward layers overflow in fp16 (loss 0 or NaN); use bf16")
        return value


class EvaluationSettings(Settings):
    panel: ClassVar[str] = "Evaluation and checkpoints"

    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        default=None,
        description="When to evaluate; default: each epoch if there is held-out data, else never.",
    )
    eval_steps: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Steps between evaluations; turns eval_strategy steps on."
    )
    eval_generate: Annotated[int | None, Maybe] = Field(
        default=None,
        gt=0,
        description="Answer this many held-out examples at each evaluation, and score the answers: exact match, "
        "ROUGE, BLEU, chrF.",
    )
    metric_for_best_model: Annotated[
        Literal["loss", "perplexity", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"] | None,
        BeforeValidator(_without_prefix),
        Maybe,
    ] = Field(
        default=None,
        description="Keep the checkpoint that is best by this held-out figure, and end with its adapter; default: "
        "end with the last.",
    )
    early_stopping_patience: Annotated[int | None, Maybe] = Field(
        default=None,
        gt=0,
        description="Stop after this many evaluations without a better metric_for_best_model (default: loss).",
    )
    per_device_eval_batch_size: int = Field(default=8, gt=0, description="Examples per process in evaluation.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        default="steps", description="When to write a checkpoint; the last step always writes one."
    )
    save_steps: int = Field(default=500, gt=0, description="Steps between checkpoints.")
    save_total_limit: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Keep only the newest N checkpoints; default: all."
    )
    logging_steps: int = Field(default=10, gt=0, description="Steps between lines of metrics.jsonl.")
    report_to: Words = Field(default=["none"], description="Trackers: tensorboard, wandb, mlflow, trackio, … or none.")
    report_samples: int = Field(
        default=3,
        ge=0,
        description="Examples that report.html shows with replies from before and after training (64 tokens at most).",
    )


class ProcessSettings(Settings):
    panel: ClassVar[str] = "Processes"

    num_gpus: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Start this many processes here, one a GPU."
    )
    num_processes: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Start this many processes here, on the CPU."
    )
    deepspeed: Annotated[str | None, Maybe] = Field(
        default=None,
        description="DeepSpeed configuration: zero0, zero1, zero2, zero3, zero2-offload, zero3-offload, or a "
        "JSON file.",
    )
    process_group_timeout: int = Field(
        default=1800, gt=0, description="Give up on a process that doesn't answer after this long (seconds)."
    )
    max_restarts: int = Field(
        default=0,
        ge=0,
        description="Start all processes of num_gpus or num_processes again, from the last checkpoint, this often when "
        "one is lost.",
    )
