"""Which models are served, where, and with which limits."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from t5tune.io.hosts import is_loopback
from t5tune.settings.commands.merge import Quantization
from t5tune.settings.field_types import (
    NoneIfUnset,
    OptionalCount,
    OptionalPath,
    OptionalText,
    PathAsText,
    exists,
    read_path,
    read_paths,
)
from t5tune.settings.groups.base import BaseModelSettings, DeviceSettings, TrainedQuantizationSettings
from t5tune.settings.groups.record_format import ConversationSettings

MAX_PORT = 65535


def _read_models(value: Any) -> Any:
    """Read a mapping of names to models as a list of NAME=MODEL."""
    return [f"{name}={model}" for name, model in value.items()] if isinstance(value, Mapping) else read_paths(value)


ModelList = Annotated[list[str], BeforeValidator(_read_models, json_schema_input_type=dict[str, str] | list[str] | str)]


class ServeSettings(ConversationSettings, DeviceSettings, TrainedQuantizationSettings, BaseModelSettings):
    command: ClassVar[str] = "serve"
    essential: ClassVar[tuple[str, ...]] = ("host", "port", "api_key", "engine", "quantization", "max_new_tokens")
    panel: ClassVar[str] = "Serving"

    models: ModelList = Field(
        min_length=1,
        description="Models to serve: runs, adapters, bases, and folders that merge wrote, also with --to ctranslate2. "
        "NAME=MODEL names one for clients; default: the folder's name, or the name on the Hub.",
        json_schema_extra={"positional": True, "argument": "[NAME=]MODEL…"},
    )
    model_name_or_path: Annotated[OptionalText, PathAsText] = Field(  # type: ignore[assignment]
        default=None,
        description="Base of the adapters among the models: a folder, owner/name[@revision] on the Hub, or `pocket`; "
        "default: the one that each adapter names.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0 is all addresses of this machine, which others reach.",
    )
    port: int = Field(default=8000, ge=0, le=MAX_PORT, description="Port to listen on; 0 takes any that is free.")
    api_key: OptionalText = Field(
        default=None,
        repr=False,
        description="Key that clients must send; better in T5TUNE_API_KEY, since others see a process's arguments. "
        "Default: none is needed.",
    )
    allow_without_key: bool = Field(
        default=False,
        description="Listen on an address that other machines reach, without api_key: anyone there can use the models.",
    )
    engine: Literal["auto", "ctranslate2", "transformers"] = Field(
        default="auto",
        description="What computes the replies; auto takes CTranslate2 where it is installed and can run the model.",
    )
    quantization: Annotated[Quantization | None, NoneIfUnset] = Field(
        default=None,
        description="Weight type with CTranslate2, such as int8, with which some replies change; default: none, and "
        "the replies are those of transformers.",
    )
    converted_dir: OptionalPath = Field(
        default=None,
        description="Folder for models that were converted to CTranslate2, which is done once for each; default: "
        "t5tune/converted in the user's cache folder.",
    )
    max_new_tokens: int = Field(
        default=512,
        gt=0,
        description="Maximum length of the reply to a request that sets none (tokens); one may ask for up to "
        "model_max_length.",
    )
    temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature of requests that give none; 0 decodes greedily."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling (top-p) of requests that give none.")
    source_prefix: str | None = Field(
        default=None,
        description="Text to put before each message, unless it already starts with it; default: the source_prefix "
        "used in training.",
    )
    max_batch_tokens: int = Field(
        default=16384,
        gt=0,
        description="Maximum size of a batch of replies: their number times the longest prompt and max_tokens "
        "(tokens). A larger reply is alone.",
    )
    max_batch_delay: float = Field(
        default=5.0, ge=0, description="How long a request waits for others to join its batch (milliseconds)."
    )
    parallel_batches: OptionalCount = Field(
        default=None,
        description="Batches that CTranslate2 computes at the same time, on a CPU with a share of the cores each; "
        "default: one for each 4 cores, and one on a GPU.",
    )
    max_replies: int = Field(
        default=128,
        gt=0,
        description="Maximum number of replies to one request: its prompts times n; more are refused with status 400.",
    )
    max_queue: int = Field(
        default=256, gt=0, description="Maximum number of replies that wait; more are refused with status 429."
    )
    shutdown_timeout: float = Field(
        default=30.0,
        ge=0,
        description="How long a server that was asked to stop finishes replies (seconds); then it cuts them off.",
    )

    @field_validator("models")
    @classmethod
    def _check_names(cls, value: list[str]) -> list[str]:
        names = [split_model_name(text) for text in value]
        for text, (name, model) in zip(value, names, strict=True):
            if not name or not model:
                raise ValueError(f"{text}: expected MODEL or NAME=MODEL")
        twice = next((name for name, _ in names if [other for other, _ in names].count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two models are called {twice}; name them with NAME=MODEL")
        return value

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[!-~]+", value):  # a header's value
            raise ValueError("expected letters, digits and signs of ASCII, without spaces")
        return value

    @model_validator(mode="after")
    def _check_engine(self) -> "ServeSettings":
        if self.quantization is not None and self.engine == "transformers":
            raise ValueError(
                f"quantization: {self.quantization}: only with CTranslate2; use q_lora to quantize with transformers"
            )
        if self.q_lora and (self.engine == "ctranslate2" or self.quantization is not None):
            raise ValueError("q_lora: only with transformers; use quantization with CTranslate2")
        return self

    @model_validator(mode="after")
    def _check_base(self) -> "ServeSettings":
        if self.revision is not None and self.model_name_or_path is None:
            raise ValueError(
                f"revision: {self.revision}: has no effect without model_name_or_path; write "
                f"owner/name@{self.revision} for a model"
            )
        return self

    @model_validator(mode="after")
    def _check_address(self) -> "ServeSettings":
        if not self.is_local and self.api_key is None and not self.allow_without_key:
            raise ValueError(
                f"host: {self.host}: other machines may reach it, so api_key is needed; set T5TUNE_API_KEY, or "
                "allow_without_key"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        return is_loopback(self.host)

    @property
    def named_models(self) -> dict[str, str]:
        """Name -> run, adapter or base."""
        return dict(map(split_model_name, self.models))


def split_model_name(text: str) -> tuple[str, str]:
    """Split NAME=MODEL; a model without a name gets that of its folder, or on the Hub its whole name."""
    name, equals, model = text.partition("=")
    if equals and not exists(text):
        return name, read_path(model)
    return (os.path.basename(os.path.abspath(text)) if exists(text) else text), text
