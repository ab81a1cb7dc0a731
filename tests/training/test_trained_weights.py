"""The trained tensors that a checkpoint contains."""

import weakref

import numpy as np
import torch
from torch import nn

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.training.trained_weights import TrainedWeights


def test_a_fused_optimizer_of_deepspeeds_config_saves_its_fp32_masters() -> None:
    """Its class for stage 0 in bf16 keeps them in flat tensors. bf16 weights lose most of so small an update.

    The other optimizers' class is tried by training with the packaged config zero0.
    """
    import_deepspeed(on_cpu=True)
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[1].bias, model[0].weight]}, {"params": [model[1].weight], "lr": 1e-5}]
    engine = nn.Module()
    engine.optimizer = FP16_Optimizer(
        torch.optim.SGD(groups, lr=1e-4), low_precision_dtype=torch.bfloat16, static_loss_scale=1.0
    )
    before = {name: value.float() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.ones_like(value) if value.requires_grad else None
    engine.optimizer.step()
    state = TrainedWeights("", lambda *_: None, {}).collect(model, engine, keeps=True)
    assert set(state) == {"0.weight", "1.weight", "1.bias"}
    for name, tensor in state.items():
        rate = 1e-5 if name == "1.weight" else 1e-4
        found = torch.from_numpy(tensor.array).view(before[name].shape)
        torch.testing.assert_close(found, before[name] - rate, rtol=0, atol=1e-8)


def test_a_rank_that_does_not_save_drops_gathered_tensors() -> None:
    """All ranks take part in gathering, but the copies of all ranks may not fit into the machine's memory."""
    gathered: list[weakref.ref[np.ndarray]] = []
    numbers_in_memory = []

    def gather() -> torch.Tensor:
        values = np.ones(6, np.float32)
        numbers_in_memory.append(sum(earlier() is not None for earlier in gathered))
        gathered.append(weakref.ref(values))
        return torch.from_numpy(values)

    model = nn.Sequential(*(nn.Linear(2, 3, bias=False) for _ in range(4)))
    for parameter in model.parameters():
        parameter._hp_mapping, parameter.get_full_hp_param = None, gather
    weights = TrainedWeights("", lambda *_: None, {})
    assert weights.collect(model, model, keeps=False) == {}
    assert numbers_in_memory == [0, 1, 1, 1]
    numbers_in_memory.clear()
    assert len(weights.collect(model, model, keeps=True)) == len(numbers_in_memory) == 4
