"""What a change of a setting affects: each option of prepare and train declares it next to its type.

lora_r: Annotated[int, Affects.WEIGHTS | Affects.ADAPTER_SCALE] = Field(default=8, …)

select_settings(TrainSettings, Affects.ADAPTER_SCALE)   # ["lora_r", "lora_alpha", "use_dora", "use_rslora"]
"""

from enum import Flag, auto

from t5tune.settings.field_types import Settings


class Affects(Flag):
    """Code that compares, copies or saves settings selects them by these marks, which are combined with `|`."""

    NOTHING = 0
    """Nothing below. (runs/resume_guard.py computes and compares the batch, the ranks and the DeepSpeed config.)"""

    CACHE = auto()
    """The token cache: prepare makes it again (commands/prepare.py). train takes the value from an existing cache
    (runs/folder.py), unless the setting affects STEPS too: then train applies its value to the cache."""

    STEPS = auto()
    """The training steps: a different value is refused when a run is resumed (runs/resume_guard.py)."""

    FINAL_WEIGHTS = auto()
    """The final weights: a finished run refuses a different value (runs/resume_guard.py). An unfinished run compares
    STEPS and the hashes of data, base and adapter instead."""

    EXAMPLES = CACHE | FINAL_WEIGHTS
    """The training examples: what most options for reading data affect."""

    WEIGHTS = STEPS | FINAL_WEIGHTS
    """The trained weights: what most options for training affect."""

    INPUT_FILES = auto()
    """The files that are read: two spellings of the same path are the same value (runs/resume_guard.py)."""

    INPUT = FINAL_WEIGHTS | INPUT_FILES

    ADAPTER_SCALE = auto()
    """The adapter's scale or variant: an initial `adapter` must have the same value (model/lora.py)."""

    EVALUATION = auto()
    """The evaluation during training, which needs held-out examples (runs/checks.py)."""

    TRAINER = auto()
    """The argument of the same name of Hugging Face's Trainer (training/arguments.py)."""

    ALL_RANKS = auto()
    """The ranks' work: like those that affect STEPS or EVALUATION, it must be the same on all (runs/same_ranks.py)."""

    INFERENCE = auto()
    """How the model is used: the value is stored in training_data.json, and evaluate and chat take it from there
    (checkpoints/training_data.py)."""

    THIS_CALL = auto()
    """Only this call: settings.yaml in the run folder gets the default value (runs/folder.py)."""


def select_settings(model: type[Settings], affects: Affects) -> list[str]:
    """Select the settings of a command that affect all of `affects`, in their declared order."""
    return [
        name
        for name, field in model.model_fields.items()
        if any(affects in declared for declared in field.metadata if isinstance(declared, Affects))
    ]
