"""The settings of `chat`."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from t5tune.settings.field_types import OptionalPath
from t5tune.settings.groups.base import InferenceSettings
from t5tune.settings.groups.constraints import ConstraintSettings
from t5tune.settings.groups.record_format import ConversationSettings

SAMPLING_TEMPERATURE = 1.0  # for two different replies


class ChatSettings(ConstraintSettings, ConversationSettings, InferenceSettings):
    command: ClassVar[str] = "chat"
    also_positional: ClassVar[str | None] = "model_name_or_path"
    essential: ClassVar[tuple[str, ...]] = (
        "prompt", "adapter", "system", "conversation_template", "json_schema", "max_new_tokens", "temperature",
        "q_lora", "bf16", "device",
    )  # fmt: skip
    panel: ClassVar[str] = "Chat"
    notes_on_implied: ClassVar[Mapping[str, str]] = {
        "temperature": f"save_preferences samples replies, with temperature {SAMPLING_TEMPERATURE}"
    }

    prompt: str | None = Field(
        default=None, description="Reply to this message and exit; default: start an interactive chat."
    )
    system: str | None = Field(default=None, description="System message; default: the conversation template's.")
    source_prefix: str | None = Field(
        default=None, description="Text to prepend to each message that lacks it; default: the prefix used in training."
    )
    max_new_tokens: int = Field(default=512, gt=0, description="Maximum length of a reply (tokens).")
    temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature; 0 decodes greedily, higher values vary replies more."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling (top-p): keep the smallest set of tokens with this total probability.",
    )
    seed: int = Field(default=42, ge=0, lt=1 << 63, description="Random seed for sampling.")
    save_preferences: OptionalPath = Field(
        default=None,
        description="Sample two replies to each message, ask which is better, and append the pair to this JSON Lines "
        "file, for objective dpo or orpo.",
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("no text to reply to")
        return prompt

    @model_validator(mode="after")
    def _check_preferences(self) -> "ChatSettings":
        if self.save_preferences is None:
            return self
        if self.prompt is not None:
            raise ValueError(
                "save_preferences: needs an interactive chat to ask which reply is better; leave out prompt"
            )
        self._imply(temperature=SAMPLING_TEMPERATURE)
        if self.temperature == 0:
            raise ValueError("save_preferences: temperature 0 gives the same reply twice; set it to 1, for example")
        return self
