"""How the model's layers compute in training: packed rows, dropout, recomputation and compilation."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import Settings


def _read_switch(value: Any) -> Any:
    """Read true and false, as YAML 1.1 and other tools write it, as on and off."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


def _refuse_rate(value: Any) -> Any:
    """Refuse a number other than 0 and 1: `dropout` is a rate in other tools."""
    try:
        is_rate = not isinstance(value, bool) and float(value) not in (0, 1)
    except (TypeError, ValueError):  # pydantic reads it
        return value
    if is_rate:
        raise ValueError("expected true or false; the rate is the base's, and lora_dropout sets LoRA's")
    return value


PackingMode = Literal["auto", "on", "off"]
Packing = Annotated[PackingMode, BeforeValidator(_read_switch, json_schema_input_type=PackingMode | bool)]


class LayerSettings(Settings):
    panel: ClassVar[str] = "Training"

    packing: Annotated[Packing, Affects.WEIGHTS] = Field(
        default="auto",
        description="Pack the examples of a batch into one row without padding, with the same results; auto: if the "
        "model supports it.",
    )
    packed_attention: Annotated[Literal["auto", "flex", "loop"], Affects.ALL_RANKS] = Field(
        default="auto",
        description="Attention over packed rows: one compiled kernel per layer (flex), or a loop over the examples; "
        "auto: flex on NVIDIA GPUs in bf16, if its results match the loop's.",
    )
    dropout: Annotated[bool | None, BeforeValidator(_refuse_rate), Affects.WEIGHTS] = Field(
        default=None,
        description="Apply dropout, with the base's rate and lora_dropout; default: on, except for dpo and orpo.",
    )
    attention_dropout: Annotated[bool, Affects.WEIGHTS] = Field(
        default=True,
        description="Apply dropout to attention's probabilities, as in T5's training; it is faster without.",
    )
    gradient_checkpointing: Annotated[bool, Affects.ALL_RANKS] = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third slower.",
    )
    torch_compile: Annotated[bool, Affects.WEIGHTS] = Field(
        default=False,
        description="Compile layer norms and feed-forward layers with torch.compile. The first steps take seconds to "
        "minutes longer; later steps are often faster. On a GPU, try without it first.",
    )

    @property
    def has_dropout(self) -> bool:
        return self.dropout is not False

    @property
    def has_attention_dropout(self) -> bool:
        return self.has_dropout and self.attention_dropout
