"""Which checkpoint to start from."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.fields import NoneIfUnset, Settings

FamilyName = Literal["byt5", "fastchat-t5", "flan-ul2", "t5", "flan-t5", "mt5", "umt5"]  # the keys of families.py


class BaseModelSettings(Settings):
    panel: ClassVar[str] = "Base model"

    model_name_or_path: Annotated[str, Affects.FINAL_WEIGHTS | Affects.INPUT_FILES] = Field(
        min_length=1,
        description="Base checkpoint: a folder, a model id on the Hugging Face Hub, or `pocket` for the built-in small "
        "model.",
    )
    revision: Annotated[str | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None, description="Branch, tag or commit of a model on the Hugging Face Hub; default: its main branch."
    )
    cache_dir: Annotated[Path | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=None, description="Folder for Hugging Face Hub downloads; default: the Hub's own cache."
    )
    family: Annotated[FamilyName | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="Treat a base whose model_type t5tune doesn't know as this model type (docs/families.md).",
    )
