"""Which checkpoint to start from."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from t5tune.settings.fields import Maybe, Settings

FamilyName = Literal["byt5", "fastchat-t5", "flan-ul2", "t5", "flan-t5", "mt5", "umt5"]  # the keys of families.py


class BaseModelSettings(Settings):
    panel: ClassVar[str] = "Base model"

    model_name_or_path: str = Field(
        min_length=1,
        description="Base checkpoint: a folder, a model id on the hub, or `pocket` for the built-in small model.",
    )
    revision: Annotated[str | None, Maybe] = Field(
        default=None, description="Branch, tag or commit of a hub model; default: its main branch."
    )
    cache_dir: Annotated[Path | None, Maybe] = Field(
        default=None, description="Folder that keeps what is downloaded from the hub."
    )
    family: Annotated[FamilyName | None, Maybe] = Field(
        default=None,
        description="Try a base whose model_type t5tune doesn't know as this member of the family (docs/families.md).",
    )
