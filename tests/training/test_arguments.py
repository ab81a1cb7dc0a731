"""The arguments of Hugging Face's Trainer on a GPU."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.distributed.world import World
from t5tune.training.arguments import make_training_arguments
from tests.support.train_runs import make_settings


@pytest.mark.parametrize(
    ("optim", "expected"), [("adamw_torch", "adamw_torch_fused"), ("adafactor", "adafactor"), ("sgd", "sgd")]
)
def test_a_process_uses_one_gpu_and_a_fused_optimizer(
    optim: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would multiply the batch size by the number of GPUs."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    settings = make_settings(tmp_path, tmp_path, tmp_path, use_cpu=False, optim=optim)
    arguments = make_training_arguments(make_run_plan(settings), None, (), World(), torch.device("cuda", 0))
    assert arguments.device == torch.device("cuda", 0)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == settings.per_device_train_batch_size
    assert arguments.optim == expected
