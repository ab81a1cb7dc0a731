"""Quantization of the frozen base under the adapter (QLoRA, Dettmers et al. 2023)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.fields import Settings


class QuantizationSettings(Settings):
    panel: ClassVar[str] = "Quantized base"

    q_lora: Annotated[bool, Affects.WEIGHTS] = Field(
        default=False,
        description="QLoRA: quantize the base to 4 bits (NF4 with double quantization by default). Training then uses "
        "bf16, unless --no-bf16 is given.",
    )
    quant_type: Annotated[Literal["nf4", "fp4", "int8"], Affects.WEIGHTS] = Field(
        default="nf4",
        description="Quantized type of the base with q_lora: 4-bit NormalFloat, 4-bit float, or LLM.int8().",
    )
    quantize_wo: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Also quantize the feed-forward output projection `wo`, which is a third as large as the rest.",
    )
    double_quant: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True, description="Double quantization: also quantize the scales of the 4-bit blocks."
    )
