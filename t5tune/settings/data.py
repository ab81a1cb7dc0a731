"""Which conversations to read, and how they become training examples."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.fields import DataList, NoneIfUnset, OptionalCount, PathAsText, Settings, WordList

DataFormat = Literal["auto", "sharegpt", "openai", "alpaca", "prompt-completion", "source-target"]


class ConversationSettings(Settings):
    """How a conversation becomes text and where it is cut, for all commands that turn conversations into token ids."""

    panel: ClassVar[str] = "Conversations"

    conversation_template: Annotated[str | None, NoneIfUnset, PathAsText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Conversation template: a name under conversations/ in `t5tune templates`, or a YAML file; "
        "default: the model's own (template.yaml); if it has none, plain for source/target pairs, and fastchat-t5 for "
        "conversations.",
    )
    model_max_length: Annotated[int, Affects.EXAMPLES] = Field(
        default=2048,
        ge=8,
        description="Maximum length of a source and of a target, each including its EOS token (tokens).",
    )


class ReadingSettings(Settings):
    """How data records are read."""

    panel: ClassVar[str] = "Reading"

    data_format: Annotated[DataFormat, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default="auto", description="Format of the records; auto detects it from the keys of each record."
    )
    source_column: Annotated[str | None, NoneIfUnset, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default=None, description="Column or key with the input; default: detected."
    )
    target_column: Annotated[str | None, NoneIfUnset, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default=None, description="Column or key with the output; default: detected."
    )
    source_prefix: Annotated[str, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default="",
        description="Text to prepend to each source of source-target or two-column data, such as `summarize: `.",
    )
    merge_same_role: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Join consecutive turns of the same role instead of rejecting the record."
    )
    clean: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False,
        description="Convert the HTML of old ShareGPT dumps to Markdown, decode HTML entities, and remove unnecessary "
        "backslashes.",
    )
    max_record_bytes: Annotated[int, Affects.CACHE] = Field(
        default=4 << 20, gt=0, description="Reject records longer than this (bytes)."
    )

    @model_validator(mode="after")
    def _check_columns_match_format(self) -> Self:
        for name in ("source_column", "target_column", "source_prefix"):
            if (value := getattr(self, name)) and self.data_format not in ("auto", "source-target"):
                raise ValueError(f"{name}: {value!r:.80}, but data_format {self.data_format} doesn't use it")
        return self


class SelectionSettings(Settings):
    """Which records and assistant turns become examples."""

    panel: ClassVar[str] = "Selection"

    train_on: Annotated[Literal["all", "last"], Affects.EXAMPLES] = Field(
        default="all", description="Train on all assistant turns of a conversation, or only on its last one."
    )
    min_target_tokens: Annotated[OptionalCount, Affects.EXAMPLES] = Field(
        default=None, description="Skip targets shorter than this (tokens); default: keep all."
    )
    dedupe: Annotated[Literal["none", "exact"], Affects.EXAMPLES] = Field(
        default="none", description="Deduplication: exact rejects a conversation identical to an earlier one."
    )
    split_long: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Split conversations longer than model_max_length at turn boundaries."
    )
    drop_truncated_targets: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Skip targets longer than model_max_length instead of truncating them."
    )
    max_rejected_fraction: Annotated[float | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=None,
        ge=0,
        le=1,
        description="Fail if more than this fraction of the records is rejected, not counting records labeled bad; "
        "default: never.",
    )
    num_workers: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Number of tokenization processes; default: one per CPU core, fewer for small data."
    )


class DataSettings(ReadingSettings, ConversationSettings):
    panel: ClassVar[str] = "Data"

    data_path: Annotated[DataList, Affects.FINAL_WEIGHTS | Affects.INPUT_FILES] = Field(
        min_length=1,
        description="Data: JSON, JSONL, CSV or Parquet files (also .gz, .zst), folders, patterns, `-` (standard "
        "input), datasets on the Hub (owner/name, hf://…), URLs, `pocket`; for train and evaluate also a token cache.",
        json_schema_extra={"metavar": "PATH…"},
    )
    data_subset: Annotated[str | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Subset (configuration) of a dataset on the Hugging Face Hub; default: its default one.",
    )
    data_split: Annotated[str | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Split of a dataset on the Hugging Face Hub; default: train; for evaluate validation, otherwise "
        "test.",
    )
    add_tokens: Annotated[WordList, Affects.EXAMPLES] = Field(
        default=["auto"],
        description="Tokens to add for text that the vocabulary can't represent: auto (newline, tab, braces, "
        "indentation, and characters of the targets), none, fastchat (the ten tokens of FastChat), or a list.",
    )
    num_data: Annotated[OptionalCount, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=None, description="Use only the first N examples; default: all."
    )

    @field_validator("add_tokens")
    @classmethod
    def _check_choice_is_alone(cls, value: list[str]) -> list[str]:
        choices = {"auto", "none", "fastchat"} & set(value)
        if choices and len(value) > 1:
            raise ValueError(f"`{sorted(choices)[0]}` can't be combined with other tokens")
        return value


class SplitSettings(Settings):
    """Which data is held out from training."""

    panel: ClassVar[str] = "Data"

    eval_fraction: Annotated[float, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the data to hold out for evaluation, if there is no eval_data_path.",
    )
    seed: Annotated[int, Affects.CACHE | Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Random seed for the held-out split, adapter initialization, dropout and data order.",
    )


class TrainingDataSettings(SplitSettings, SelectionSettings, DataSettings):
    preprocessed_path: Annotated[Path | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=None,
        description="Folder for the token cache that train writes; default: `data` in the run folder.",
    )
    eval_data_path: Annotated[DataList | None, NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.INPUT_FILES] = Field(
        default=None,
        description="Conversations or a token cache to evaluate on; they are encoded with the added tokens and the "
        "conversation template of data_path.",
        json_schema_extra={"metavar": "PATH…"},
    )
    eval_data_split: Annotated[str | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Split of a dataset on the Hugging Face Hub that eval_data_path names; default: validation, "
        "otherwise test.",
    )
