"""Learning from preference pairs: direct preference optimization (DPO), and odds ratios (ORPO)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalPath, Settings

DPO_SETTINGS = ("dpo_loss", "dpo_beta", "dpo_label_smoothing", "reference_adapter")
ORPO_SETTINGS = ("orpo_lambda",)


class PreferenceSettings(Settings):
    panel: ClassVar[str] = "Preferences"

    dpo_loss: Annotated[Literal["sigmoid", "ipo"], Affects.WEIGHTS] = Field(
        default="sigmoid",
        description="Loss of objective dpo: DPO's sigmoid (Rafailov et al. 2023), or IPO (Azar et al. 2023).",
    )
    dpo_beta: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.1,
        gt=0,
        description="How strongly objective dpo keeps the model near the reference: β of DPO, τ of IPO.",
    )
    dpo_label_smoothing: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Conservative DPO: probability that a pair's answers are swapped.",
    )
    reference_adapter: Annotated[OptionalPath, Affects.INPUT] = Field(
        default=None,
        description="Adapter of objective dpo's reference model: a folder, a run, or owner/name[@revision] on the Hub; "
        "default: the model before training.",
    )
    orpo_lambda: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.1,
        gt=0,
        description="Weight of the odds ratio next to the chosen answer's loss in objective orpo (Hong et al. 2024).",
    )
