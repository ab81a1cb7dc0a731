"""Uploading a result to the Hugging Face Hub, with the names of transformers' settings."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalText, Settings


class HubSettings(Settings):
    panel: ClassVar[str] = "Hugging Face Hub"

    push_to_hub: Annotated[bool, Affects.NOTHING] = Field(
        default=False, description="Upload the result to the Hugging Face Hub."
    )
    hub_model_id: Annotated[OptionalText, Affects.NOTHING] = Field(
        default=None,
        description="Repository to upload to, owner/name; default: the output folder's name.",
    )
    hub_private_repo: Annotated[bool, Affects.NOTHING] = Field(
        default=False, description="Create a private repository; an existing one must be private."
    )

    @model_validator(mode="after")
    def _check_push_is_asked_for(self) -> Self:
        unused = {"hub_model_id": self.hub_model_id, "hub_private_repo": "true" if self.hub_private_repo else None}
        unused["hub_strategy"] = value if (value := getattr(self, "hub_strategy", "end")) != "end" else None
        if not self.push_to_hub and (name := next((name for name, value in unused.items() if value), None)):
            raise ValueError(f"{name}: {unused[name]}: has no effect without push_to_hub; set both or neither")
        return self


class HubStrategySettings(HubSettings):
    hub_strategy: Annotated[Literal["end", "every_save"], Affects.NOTHING] = Field(
        default="end", description="Upload the final weights only, or every checkpoint during training."
    )
