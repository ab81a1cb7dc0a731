"""The settings that determine the memory of a training step, besides the lengths of its examples."""

from t5tune.settings.groups.base import TrainingPrecisionSettings
from t5tune.settings.groups.distillation import TargetSettings
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.settings.groups.steps import StepSettings


class MemorySettings(TargetSettings, LayerSettings, TrainingPrecisionSettings, StepSettings, LoraSettings):
    """How the model is built, and how a step computes and updates it."""
