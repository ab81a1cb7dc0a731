"""The low-rank adapter (LoRA, Hu et al. 2021), its variants, and other trained weights."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from t5tune.families import EMBEDDINGS_AND_HEADS
from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset, OptionalPath, Settings, WordList

INITIALIZATIONS = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N", "loftq")
BASE_CHANGING_INITIALIZATIONS = ("pissa", "olora")  # they subtract each adapter's initial B·A from the base weight


class LoraSettings(Settings):
    panel: ClassVar[str] = "LoRA"

    train_mode: Annotated[Literal["lora", "full"], Affects.WEIGHTS] = Field(
        default="lora", description="Train an adapter, or all weights."
    )
    lora_r: Annotated[int, Affects.WEIGHTS | Affects.ADAPTER_SCALE] = Field(
        default=8, gt=0, description="LoRA rank: the size of the adapter."
    )
    lora_alpha: Annotated[float, Affects.WEIGHTS | Affects.ADAPTER_SCALE] = Field(
        default=16,
        gt=0,
        description="LoRA alpha: the adapter's update is multiplied by lora_alpha / lora_r.",
    )
    lora_dropout: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.05, ge=0, lt=1, description="Dropout probability on the input of the LoRA matrices."
    )
    lora_target_modules: Annotated[WordList, Affects.WEIGHTS] = Field(
        default=["q", "v"],
        min_length=1,
        description="Linear layers to adapt: their names, or a group: attention (in T5: q k v o), feed-forward (wi wo) "
        "or all-linear (both).",
    )
    lora_bias: Annotated[Literal["none", "all", "lora_only"], Affects.WEIGHTS] = Field(
        default="none", description="Bias vectors to train as well (T5 has no biases)."
    )
    use_dora: Annotated[bool, Affects.WEIGHTS | Affects.ADAPTER_SCALE] = Field(
        default=False,
        description="DoRA (Liu et al. 2024): train the norm and direction of each row of an adapted weight separately.",
    )
    use_rslora: Annotated[bool, Affects.WEIGHTS | Affects.ADAPTER_SCALE] = Field(
        default=False,
        description="rsLoRA (Kalajdzievski 2023): multiply by lora_alpha / √lora_r, which suits large ranks.",
    )
    init_lora_weights: Annotated[str, Affects.WEIGHTS] = Field(
        default="default",
        description="Adapter initialization: default (B = 0), gaussian, orthogonal, olora, pissa, pissa_niter_N "
        "(fast SVD with N iterations), or loftq (corrects the quantization error of q_lora).",
    )
    loraplus_lr_ratio: Annotated[float | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        gt=0,
        description="LoRA+ (Hayou et al. 2024): learning-rate ratio of B to A, often 16; default: 1.",
    )
    modules_to_save: Annotated[WordList | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="Modules of the base to train in full, next to the adapter, such as final_layer_norm.",
    )
    train_token_rows: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True, description="Train the added tokens' rows of the embedding and the language-model head."
    )

    @field_validator("train_mode", mode="before")
    @classmethod
    def _explain_qlora(cls, value: Any) -> Any:
        if str(value).lower() in {"qlora", "q_lora"}:
            raise ValueError("expected lora or full; for QLoRA, leave it out and set q_lora: true (--q-lora)")
        return value

    @field_validator("lora_target_modules")
    @classmethod
    def _read_all(cls, value: list[str]) -> list[str]:
        return ["all-linear" if name == "all" else name for name in value]  # as in LLaMA-Factory

    @field_validator("init_lora_weights")
    @classmethod
    def _check_initialization(cls, value: str) -> str:
        if value.lower() == "true":  # PEFT's name for its default
            return "default"
        if value in {"eva", "corda", "lora_ga"}:
            raise ValueError(f"{value} needs gradients or activations on training data, which isn't supported")
        is_fast_svd = re.fullmatch(r"pissa_niter_[1-9]\d*", value)
        if value == "pissa_niter_N" or not (value in INITIALIZATIONS or is_fast_svd):
            raise ValueError(f"expected one of {', '.join(INITIALIZATIONS)}")
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _reject_embedding_and_head(cls, value: list[str] | None) -> list[str] | None:
        if wrong := sorted(EMBEDDINGS_AND_HEADS & {name.rpartition(".")[2] for name in value or []}):
            raise ValueError(
                f"{', '.join(wrong)}: PEFT's copy of a shared embedding gets no gradient, and a copied head is "
                "merged incorrectly; add_tokens and train_token_rows train the rows of new tokens"
            )
        return value or None


class InitialAdapterSettings(LoraSettings):
    adapter: Annotated[OptionalPath, Affects.INPUT] = Field(
        default=None,
        description="Adapter to initialize from, with its added tokens and conversation template: a folder, a run, or "
        "owner/name[@revision] on the Hub. The optimizer and the learning-rate schedule start over.",
    )
