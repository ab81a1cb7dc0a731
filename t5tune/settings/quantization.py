"""A base in few bits under its adapters (QLoRA, Dettmers et al. 2023)."""

from typing import ClassVar, Literal

from pydantic import Field

from t5tune.settings.fields import Settings


class QuantisationSettings(Settings):
    panel: ClassVar[str] = "Quantised base"

    q_lora: bool = Field(
        default=False,
        description="Keep the base in 4 bits (NF4, double quantisation) under the adapters; in training it turns "
        "bf16 on, unless --no-bf16.",
    )
    quant_type: Literal["nf4", "fp4", "int8"] = Field(
        default="nf4", description="What q_lora keeps the base in: NormalFloat, 4-bit float, or LLM.int8()."
    )
    quantize_wo: bool = Field(
        default=True,
        description="Quantise the feed-forward layers' output weights `wo` too, as large as a third of the rest.",
    )
    double_quant: bool = Field(default=True, description="Quantise the scales of the 4-bit blocks too.")
