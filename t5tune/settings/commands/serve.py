"""The settings of `serve`."""

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
from t5tune.settings.groups.constraints import ConstraintSettings
from t5tune.settings.groups.record_format import ConversationSettings

MAX_PORT = 65535


def _read_models(value: Any) -> Any:
    """Read a mapping of names to models as a list of NAME=MODEL."""
    return [f"{name}={model}" for name, model in value.items()] if isinstance(value, Mapping) else read_paths(value)


ModelList = Annotated[list[str], BeforeValidator(_read_models, json_schema_input_type=dict[str, str] | list[str] | str)]


class ServeSettings(
    ConstraintSettings, ConversationSettings, DeviceSettings, TrainedQuantizationSettings, BaseModelSettings
):
    command: ClassVar[str] = "serve"
    essential: ClassVar[tuple[str, ...]] = ("host", "port", "api_key", "engine", "quantization", "max_new_tokens")
    panel: ClassVar[str] = "Serving"
    needs_restart: ClassVar[tuple[str, ...]] = (
        "host", "port", "reuse_port", "api_key", "allow_without_key", "max_batch_tokens", "max_batch_delay",
        "max_replies", "max_queue", "shutdown_timeout",
    )  # fmt: skip
    """Settings that a reload doesn't change."""

    models: ModelList = Field(
        min_length=1,
        description="Models to serve: runs, adapters, bases, and folders that merge wrote, also with --to ctranslate2. "
        "NAME=MODEL names one for clients; default: the folder's name, or the name on the Hub.",
        json_schema_extra={"positional": True, "argument": "[NAME=]MODEL…"},
    )
    model_name_or_path: Annotated[OptionalText, PathAsText] = Field(  # type: ignore[assignment]
        default=None,
        description="Base of the adapters: a folder, owner/name[@revision] on the Hub, or `pocket`; default: the base "
        "that each adapter names.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0 means all addresses, so other machines can connect.",
    )
    port: int = Field(default=8000, ge=0, le=MAX_PORT, description="Port to listen on; 0 takes any free port.")
    reuse_port: bool = Field(
        default=False,
        description="Share the port with other servers that have this option, to replace a server without a pause.",
    )
    api_key: OptionalText = Field(
        default=None,
        repr=False,
        description="Key that clients must send; set it in T5TUNE_API_KEY, since all users of a machine see a "
        "process's arguments; default: no key.",
    )
    allow_without_key: bool = Field(
        default=False,
        description="Let other machines use the models without api_key.",
    )
    engine: Literal["auto", "ctranslate2", "transformers"] = Field(
        default="auto",
        description="Inference engine; auto uses CTranslate2 if it is installed and can run the model.",
    )
    quantization: Annotated[Quantization | None, NoneIfUnset] = Field(
        default=None,
        description="Weight type with CTranslate2, such as int8, which changes some replies; default: not quantized, "
        "with the same replies as transformers.",
    )
    converted_dir: OptionalPath = Field(
        default=None,
        description="Folder for converted CTranslate2 models; default: t5tune/converted in the user's cache folder.",
    )
    max_new_tokens: int = Field(
        default=512,
        gt=0,
        description="Default maximum length of a reply (tokens); a request may set its own.",
    )
    temperature: float = Field(default=0.0, ge=0, description="Default sampling temperature; 0 decodes greedily.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Default for nucleus sampling (top-p).")
    source_prefix: str | None = Field(
        default=None, description="Text to prepend to each message that lacks it; default: the prefix used in training."
    )
    max_batch_tokens: int = Field(
        default=16384,
        gt=0,
        description="Maximum size of a batch: number of replies × largest sum of prompt and max_tokens (tokens).",
    )
    max_batch_delay: float = Field(
        default=5.0,
        ge=0,
        description="How long a batch waits for one more request, up to ten times in a row (milliseconds).",
    )
    parallel_batches: OptionalCount = Field(
        default=None,
        description="Batches that CTranslate2 computes in parallel; default: one per 4 CPU cores, or one on a GPU.",
    )
    max_replies: int = Field(
        default=128,
        gt=0,
        description="Maximum number of replies to a request, its prompts times n, or of its texts to label; more are "
        "refused with status 400.",
    )
    max_queue: int = Field(
        default=256, gt=0, description="Maximum number of waiting replies; more are refused with status 429."
    )
    shutdown_timeout: float = Field(
        default=30.0, ge=0, description="How long a stopping server finishes replies before it cuts them off (seconds)."
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
            raise ValueError("expected ASCII letters, digits and punctuation, without spaces")
        return value

    @model_validator(mode="after")
    def _check_conflicts(self) -> "ServeSettings":
        if self.quantization is not None and self.engine == "transformers":
            problem = "only with CTranslate2; use q_lora to quantize with transformers"
            raise ValueError(f"quantization: {self.quantization}: {problem}")
        if self.q_lora and (self.engine == "ctranslate2" or self.quantization is not None):
            raise ValueError("q_lora: only with transformers; use quantization with CTranslate2")
        if self.revision is not None and self.model_name_or_path is None:
            write = f"write owner/name@{self.revision} for a model"
            raise ValueError(f"revision: {self.revision}: has no effect without model_name_or_path; {write}")
        if not self.is_local and self.api_key is None and not self.allow_without_key:
            problem = "other machines may reach it, so api_key is needed; set T5TUNE_API_KEY, or allow_without_key"
            raise ValueError(f"host: {self.host}: {problem}")
        return self

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    @property
    def named_models(self) -> dict[str, str]:
        """Name -> run, adapter or base."""
        return dict(map(split_model_name, self.models))


def split_model_name(text: str) -> tuple[str, str]:
    """Split NAME=MODEL; a model without NAME gets its folder's name, or its whole name on the Hub."""
    name, equals, model = text.partition("=")
    if equals and not exists(text):
        return name, read_path(model)
    return (os.path.basename(os.path.abspath(text)) if exists(text) else text), text
