"""Load several models with the same base, whose weights are in memory only once.

    bases = SharedBases()
    first = load_for_inference(settings, load_base=bases.load)      # a base with an adapter
    second = load_for_inference(settings_2, load_base=bases.load)   # the same base with a different adapter

The models share the base's parameters but not its modules, so adapters don't affect each other.
"""

import copy
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from t5tune.data.labels import LabelTask
from t5tune.model.load import load_base
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.progress import Report, silent
from t5tune.settings.groups.base import QuantizationSettings


class SharedBases:
    """Loads each base once, as long as a model uses it."""

    def __init__(self) -> None:
        self._loaded: WeakValueDictionary[Any, Any] = WeakValueDictionary()

    def load(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        quantization: QuantizationSettings | None = None,
        family: str | None = None,
        report: Report = silent,
        partitioner: Zero3Partitioner | None = None,
        task: LabelTask | None = None,
        files: Hashable = None,
    ) -> Any:
        """Load a base as `load_base` does, with the weights of an earlier equal call. Don't change the weights.

        Args:
            files: the identity of the folder's files: if it differs, they are loaded again.
        """
        assert partitioner is None, "partitioned weights can't be shared"
        kind = [getattr(quantization, name, None) for name in QuantizationSettings.model_fields]
        key = (folder.resolve(), files, dtype, device, *kind, family, task)
        base = self._loaded.get(key)
        if base is None:
            base = self._loaded[key] = load_base(folder, dtype, device, quantization, family, report, task=task)
        copied = _copy_modules(base)
        copied.__dict__["shared_base"] = base  # keeps it in the dictionary; an attribute would be a submodule
        return copied


def _copy_modules(model: Any) -> Any:
    """Copy a model's modules, but not its weights."""
    shared = [*model.parameters(), *model.buffers(), model.architecture]
    for module in model.modules():
        # bitsandbytes: the scales of 4-bit weights, and int8 weights, which the first forward moves into `state`
        shared += [getattr(module, name) for name in ("quant_state", "state") if hasattr(module, name)]
    return copy.deepcopy(model, {id(item): item for item in shared})
