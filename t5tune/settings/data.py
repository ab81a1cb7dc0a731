"""Which conversations to read, and how they become examples."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from t5tune.settings.fields import Maybe, Paths, Settings, Words

AddTokens = Literal["auto", "none", "fastchat"]


class ConversationSettings(Settings):
    """How text is laid out and cut: shared by whatever turns conversations into token ids."""

    panel: ClassVar[str] = "Conversations"

    conversation_template: Annotated[str | None, Maybe] = Field(
        default=None,
        description="Layout of a conversation: a name under templates/conversations, or a YAML file; default: "
        "the one that the model brings (template.yaml), else fastchat-t5.",
    )
    model_max_length: int = Field(
        default=2048,
        ge=8,
        description="Longest source, and longest target, each with its end token (tokens).",
    )


class DataSettings(ConversationSettings):
    panel: ClassVar[str] = "Data"

    data_path: Paths = Field(
        min_length=1,
        description="Conversations (JSON or JSONL, ShareGPT form): files or folders; for train also a token "
        "cache; `pocket` is the packaged set.",
    )
    add_tokens: Words = Field(
        default=["auto"],
        description="Tokens for what the vocabulary can't write: auto (newline, tab, braces, indentation, …), "
        "none, fastchat (FastChat's own ten), or a list.",
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


class TrainingDataSettings(DataSettings):
    panel: ClassVar[str] = "Data"

    preprocessed_path: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Folder for the token cache that train makes; default: `data` in the run folder.",
    )
    eval_data_path: Annotated[Paths | None, Maybe] = Field(
        default=None, description="Conversations (or a cache) to evaluate on."
    )
    eval_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the conversations to hold out and evaluate on, where there is no eval_data_path.",
    )
