"""The low-rank adapter (LoRA, Hu et al. 2021), its variants, and what else of the base trains."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from t5tune.settings.fields import Maybe, Settings, Words

INITIALISATIONS = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N", "loftq")
UNTRAINABLE = {"shared", "embed_tokens", "lm_head"}


class LoraSettings(Settings):
    panel: ClassVar[str] = "LoRA"

    train_mode: Literal["lora", "full"] = Field(
        default="lora", description="Train adapters, or every weight of the base, for comparison."
    )
    lora_r: int = Field(default=8, gt=0, description="Rank of the low-rank update.")
    lora_alpha: float = Field(
        default=16, gt=0, description="The update is scaled by lora_alpha / lora_r (use_rslora: by its root)."
    )
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_target_modules: Words = Field(
        default=["q", "v"],
        min_length=1,
        description="Linear layers that get an adapter: their names, or attention (q k v o), feed-forward (wi wo), "
        "all-linear.",
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which bias vectors are trained too (T5 itself has none)."
    )
    use_dora: bool = Field(
        default=False, description="Train each adapted weight's row norms beside its direction (DoRA, Liu et al. 2024)."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / √lora_r, for large ranks (rsLoRA, Kalajdzievski 2023)."
    )
    init_lora_weights: str = Field(
        default="default",
        description="Start of the adapters: default (B is zero), gaussian, orthogonal, olora, pissa, pissa_niter_N "
        "(N rounds of a fast SVD), loftq (with q_lora: make up for the quantisation).",
    )
    loraplus_lr_ratio: Annotated[float | None, Maybe] = Field(
        default=None,
        gt=0,
        description="The B matrices learn at this multiple of learning_rate (LoRA+, Hayou et al. 2024); 16 is usual.",
    )
    modules_to_save: Annotated[Words | None, Maybe] = Field(
        default=None,
        description="Modules of the base to train whole beside the adapters, such as final_layer_norm.",
    )
    train_token_rows: bool = Field(default=True, description="Train the embedding and head rows of the added tokens.")

    @field_validator("init_lora_weights")
    @classmethod
    def _known_start(cls, value: str) -> str:
        if value.lower() == "true":
            return "default"
        if value in {"eva", "corda", "lora_ga"}:
            raise ValueError(f"{value} starts from gradients or activations of data, which isn't supported")
        is_fast_svd = re.fullmatch(r"pissa_niter_[1-9]\d*", value)
        if value == "pissa_niter_N" or not (value in INITIALISATIONS or is_fast_svd):
            raise ValueError(f"expected one of {', '.join(INITIALISATIONS)}")
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _can_be_saved(cls, value: list[str] | None) -> list[str] | None:
        if wrong := sorted(UNTRAINABLE & {name.rpartition(".")[2] for name in value or []}):
            raise ValueError(
                f"{', '.join(wrong)}: PEFT's copy of T5's shared embedding gets no gradient, and a copied head merges "
                "wrong; the rows of new tokens are trained by add_tokens and train_token_rows"
            )
        return value or None


class StartSettings(LoraSettings):
    """What training starts from."""

    panel: ClassVar[str] = "LoRA"

    adapter: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Start from the weights of this adapter or run, which must be of the same shape, with its tokens "
        "and its layout; the optimizer and the schedule begin anew.",
    )
