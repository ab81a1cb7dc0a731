"""The trained tensors that a checkpoint contains."""

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
    state = TrainedWeights("", lambda *_: None, {}).collect(model, engine)
    assert set(state) == {"0.weight", "1.weight", "1.bias"}
    for name, tensor in state.items():
        rate = 1e-5 if name == "1.weight" else 1e-4
        found = torch.from_numpy(tensor.array).view(before[name].shape)
        torch.testing.assert_close(found, before[name] - rate, rtol=0, atol=1e-8)
