"""Which checkpoint to start from."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from t5tune.settings.fields import Maybe, Settings


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
