"""Which conversations to read, and how they become examples."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from t5tune.settings.fields import Maybe, Paths, Settings, Words

DataFormat = Literal["auto", "sharegpt", "openai", "alpaca", "prompt-completion", "source-target"]


class ConversationSettings(Settings):
    """How text is laid out and cut: shared by whatever turns conversations into token ids."""

    panel: ClassVar[str] = "Conversations"

    conversation_template: Annotated[str | None, Maybe] = Field(
        default=None,
        description="Layout of a conversation: a name under conversations/ in t5tune templates, or a YAML file; "
        "default: the one that the model brings (template.yaml), else fastchat-t5.",
    )
    model_max_length: int = Field(
        default=2048,
        ge=8,
        description="Longest source, and longest target, each with its end token (tokens).",
    )


class ReadingSettings(Settings):
    """How records are read."""

    panel: ClassVar[str] = "Reading"

    data_format: DataFormat = Field(default="auto", description="Format of the records; auto looks at each one's keys.")
    source_column: Annotated[str | None, Maybe] = Field(
        default=None, description="Key or column that holds the question, for data that names it otherwise."
    )
    target_column: Annotated[str | None, Maybe] = Field(
        default=None, description="Key or column that holds the answer."
    )
    source_prefix: str = Field(
        default="", description="Text before each source of source/target data, such as `summarize: `."
    )
    merge_same_role: bool = Field(
        default=False, description="Join turns of one side in a row, instead of refusing the record."
    )
    clean: bool = Field(
        default=False, description="Turn the HTML of old ShareGPT dumps into Markdown, and drop needless backslashes."
    )
    max_record_bytes: int = Field(default=4 << 20, gt=0, description="Refuse longer records (bytes).")

    @model_validator(mode="after")
    def _columns_are_of_their_format(self) -> Self:
        for name in ("source_column", "target_column", "source_prefix"):
            if (value := getattr(self, name)) and self.data_format not in ("auto", "source-target"):
                raise ValueError(f"{name}: {value!r:.80} beside data_format {self.data_format}, which doesn't use it")
        return self


class SelectionSettings(Settings):
    """Which records and answers become examples."""

    panel: ClassVar[str] = "Selection"

    train_on: Literal["all", "last"] = Field(
        default="all", description="Learn every answer of a conversation, or its last one."
    )
    min_target_tokens: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Leave out answers of fewer tokens; default: none."
    )
    dedupe: Literal["none", "exact"] = Field(
        default="none", description="Refuse conversations that were read before, word for word."
    )
    split_long: bool = Field(
        default=False,
        description="Make several of a conversation that is longer than model_max_length, cut between exchanges.",
    )
    drop_truncated_targets: bool = Field(
        default=False, description="Leave out answers longer than model_max_length, instead of cutting them."
    )
    max_rejected_fraction: Annotated[float | None, Maybe] = Field(
        default=None,
        ge=0,
        le=1,
        description="Stop where a larger share of the records is refused, not counting examples labeled bad; default: "
        "never.",
    )
    num_workers: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Processes that encode; default: as many as the cores, fewer for little data."
    )


class DataSettings(ReadingSettings, ConversationSettings):
    panel: ClassVar[str] = "Data"

    data_path: Paths = Field(
        min_length=1,
        description="Conversations: JSON, JSONL, CSV or Parquet files, plain, .gz or .zst; folders, patterns, `-` for "
        "standard input; for train and evaluate also a token cache; `pocket` is the packaged set.",
    )
    add_tokens: Words = Field(
        default=["auto"],
        description="Tokens for what the vocabulary can't write: auto (newline, tab, braces, indentation, and what "
        "the data's answers hold), none, fastchat (FastChat's own ten), or a list.",
    )
    num_data: Annotated[int | None, Maybe] = Field(
        default=None, gt=0, description="Keep only the first N examples; default: all."
    )

    @field_validator("add_tokens")
    @classmethod
    def _choice_stands_alone(cls, value: list[str]) -> list[str]:
        choices = {"auto", "none", "fastchat"} & set(value)
        if choices and len(value) > 1:
            raise ValueError(f"`{sorted(choices)[0]}` can't be joined with other tokens")
        return value


class SplitSettings(Settings):
    """What is held out of training."""

    panel: ClassVar[str] = "Data"

    eval_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the conversations to hold out and evaluate on, where there is no eval_data_path.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Seed of what is held out, the adapter's start, dropout and the data's order.",
    )


class TrainingDataSettings(SplitSettings, SelectionSettings, DataSettings):
    panel: ClassVar[str] = "Data"

    preprocessed_path: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Folder for the token cache that train makes; default: `data` in the run folder.",
    )
    eval_data_path: Annotated[Paths | None, Maybe] = Field(
        default=None, description="Conversations (or a cache) to evaluate on; they get data_path's tokens and layout."
    )
