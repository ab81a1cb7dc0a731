"""The low-rank adapter (LoRA, Hu et al. 2021) and the quantised base under it (QLoRA, Dettmers et al. 2023)."""

from typing import ClassVar, Literal

from pydantic import Field

from t5tune.settings.fields import Settings, Words


class LoraSettings(Settings):
    panel: ClassVar[str] = "LoRA"

    lora_r: int = Field(default=8, gt=0, description="Rank of the low-rank update.")
    lora_alpha: float = Field(default=16, gt=0, description="The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_target_modules: Words = Field(
        default=["q", "v"], min_length=1, description="Names of the linear layers that get an adapter."
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which bias vectors are trained too (T5 itself has none)."
    )
    q_lora: bool = Field(
        default=False,
        description="Keep the base in 4 bits (NF4, double quantisation) under the adapters; turns bf16 on, "
        "unless --no-bf16.",
    )
    train_token_rows: bool = Field(default=True, description="Train the embedding and head rows of the added tokens.")
