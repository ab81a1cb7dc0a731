"""Choose the dtype and the quantization of a model: as in training, unless the settings say otherwise.

    trained = read_trained_precision(base, adapter)
    precision = resolve_precision(select_precision(settings), trained, device, report)

evaluate, chat, serve and merge all call `resolve_precision`, so an adapter gives the same replies in each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import read_training_precision
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.untrusted import has_file
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.model.device import can_compute_bf16, check_bf16, describe_device, has_bf16
from t5tune.progress import Note, Report, silent
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.base import QuantizationSettings

PRECISION_FIELDS = ("bf16", *QuantizationSettings.model_fields)


@dataclass(frozen=True)
class Precision:
    """How a base is loaded: it computes in bf16 or fp32, and the linear layers of its blocks may be quantized."""

    bf16: bool
    quantization: QuantizationSettings | None

    def __str__(self) -> str:
        quantization = "" if self.quantization is None else f"{describe_quantization(self.quantization)}, "
        return quantization + self.dtype_name

    @property
    def dtype_name(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def to_settings(self) -> dict[str, Any]:
        """Return the settings that give this precision."""
        quantization = {"q_lora": False} if self.quantization is None else self.quantization.model_dump()
        return {"bf16": self.bf16} | quantization


def describe_quantization(quantization: QuantizationSettings, noun: str = "") -> str:
    """Describe a quantization: `nf4`, or with a noun `nf4 base`, followed by settings that aren't the defaults."""
    words = f"{quantization.quant_type} {noun}".rstrip()
    if not quantization.double_quant and quantization.quant_type != "int8":
        words += " without double quantization"
    return words if quantization.quantize_wo else f"{words}, wo unquantized"


def select_precision(settings: Settings) -> dict[str, Any]:
    """Return the values of PRECISION_FIELDS that the user has set; null means the default."""
    given = {name: getattr(settings, name) for name in PRECISION_FIELDS if name in settings.model_fields_set}
    return {name: value for name, value in given.items() if value is not None}


def read_trained_precision(base: Path, adapter: Path | None) -> dict[str, Any]:
    """Read the values of PRECISION_FIELDS used in training; empty if t5tune didn't train the model.

    They are in the adapter's file, or after full training in the run's settings.
    """
    if adapter is not None:
        return read_training_precision(adapter)
    run = base.parent if base.name.startswith("checkpoint-") else base
    saved = read_yaml(run / SETTINGS_FILE, MAX_SETTINGS_BYTES) if has_file(run, SETTINGS_FILE) else {}
    # other commands save their settings in a file of the same name, but without a learning rate
    is_run = "learning_rate" in saved and isinstance(saved.get("bf16"), bool)
    return {"bf16": saved["bf16"]} if is_run else {}


def resolve_precision(
    given: Mapping[str, Any], trained: Mapping[str, Any], device: Any, report: Report = silent
) -> Precision:
    """Choose the user's precision, else the training precision, else bf16 on a GPU that supports it, else fp32.

    If this device can't compute in the training precision, a note says so, and fp32 replaces bf16, or the unquantized
    base the quantized base. The user's choice is never replaced, but refused.

    Args:
        given, trained: values of PRECISION_FIELDS.
        device: None: no model is loaded, so any precision is possible.
    """
    chosen = {**trained, **given}
    default = device is not None and has_bf16(device)
    bf16 = bool(chosen.get("bf16", default))
    if bf16 and device is not None and "bf16" in given:
        check_bf16(device)
    elif bf16 and device is not None and not can_compute_bf16(device):
        report(Note(f"trained in bf16, which {describe_device(device)} can't compute; computing in fp32", warning=True))
        bf16 = False
    quantization = None
    if chosen.get("q_lora"):
        quantization = QuantizationSettings(**{name: chosen[name] for name in PRECISION_FIELDS[1:] if name in chosen})
        problem = None if device is None or "q_lora" in given else find_quantization_problem(device)
        if problem is not None:
            kind = describe_quantization(quantization, "base")
            report(Note(f"trained on an {kind}, but {problem}; using the unquantized base", warning=True))
            quantization = None
    inherited, changed = [], list[str]()
    if quantization is not None and "q_lora" not in given:
        inherited.append(describe_quantization(quantization))
        changed = [name for name in QuantizationSettings.model_fields if chosen.get(name) != trained.get(name)]
    if "bf16" in trained and "bf16" not in given and (inherited or bf16 != default):
        inherited.append("bf16" if bf16 else "fp32")
    if inherited:
        but = f" except for {', '.join(changed)}" if changed else ""
        report(Note(f"as in training{but}: {', '.join(inherited)}"))
    return Precision(bf16, quantization)


def find_quantization_problem(device: Any = None) -> str | None:
    """Explain why bitsandbytes can't quantize a base, on this device if given; None: it can."""
    try:
        import bitsandbytes
    except ImportError as error:
        return f"bitsandbytes can't be imported: {error}"
    if device is None or device.type in bitsandbytes.supported_torch_devices:
        return None
    return f"bitsandbytes can't compute on {describe_device(device)}"
