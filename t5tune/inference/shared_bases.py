"""Several models on the weights of one base, which are in memory only once.

    bases = SharedBases()
    first = load_for_inference(settings, load_base=bases.load)      # a base with one adapter
    second = load_for_inference(others, load_base=bases.load)       # the same base with another one

Each model has modules of its own, so adapters don't see each other, but the base's parameters are the same objects.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from t5tune.model.load import load_base
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.progress import Report, silent
from t5tune.settings.groups.base import QuantizationSettings


class SharedBases:
    """Loads each base once, as long as this object exists."""

    def __init__(self) -> None:
        self._loaded: dict[Any, Any] = {}

    def load(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        quantization: QuantizationSettings | None = None,
        family: str | None = None,
        report: Report = silent,
        partitioner: Zero3Partitioner | None = None,
    ) -> Any:
        """Load a base as `load_base` does, on the weights of an earlier call with the same arguments.

        The weights must not be changed.
        """
        assert partitioner is None, "partitioned weights can't be shared"
        ways = [getattr(quantization, name, None) for name in QuantizationSettings.model_fields]
        key = (folder.resolve(), dtype, device, *ways, family)
        if key not in self._loaded:
            self._loaded[key] = load_base(folder, dtype, device, quantization, family, report)
        return _copy_modules(self._loaded[key])


def _copy_modules(model: Any) -> Any:
    """Copy a model's modules, but not its weights."""
    shared = [*model.parameters(), *model.buffers(), model.architecture]
    for module in model.modules():
        # of bitsandbytes: the scales of 4-bit weights, and the int8 weights, which a first forward pass moves there
        shared += [getattr(module, name) for name in ("quant_state", "state") if hasattr(module, name)]
    return copy.deepcopy(model, {id(item): item for item in shared})
