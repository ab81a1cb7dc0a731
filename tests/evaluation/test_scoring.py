"""Losses of targets on devices that can do less than a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.data.tokens.encoding import Example
from t5tune.evaluation.scoring import measure_losses
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.load import load_base


class TensorOnMps(torch.Tensor):
    """A tensor that has no float64, as on Apple's GPUs, until it is copied to the CPU."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*arguments, **(options or {}))
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, torch.Tensor):
            if result.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
            return result.as_subclass(cls)
        if isinstance(result, tuple | list):
            return type(result)(each.as_subclass(cls) for each in result)
        return result


@pytest.mark.parametrize("is_packed", [True, False])
def test_losses_are_measured_on_a_device_without_float64(is_packed: bool, untied_base: Path) -> None:
    model = load_base(untied_base, torch.float32, torch.device("cpu"))
    if is_packed:
        use_packing(model)
    collator = PackedCollator(0, 0) if is_packed else PaddedCollator(0, 0)
    examples = [Example([7] * size + [1], [9] * (size + 1) + [1]) for size in (1, 5, 3)]
    expected = measure_losses(model, examples, collator, None)
    model.register_forward_hook(lambda _, inputs, losses: losses.as_subclass(TensorOnMps))
    assert measure_losses(model, examples, collator, None) == expected
