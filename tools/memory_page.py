"""docs/memory.md: the memory of each known model's weights, computed with the functions that `plan` uses."""

from pathlib import Path

from t5tune.families import find_architecture
from t5tune.model.load import count_parameters
from t5tune.planning.known_configs import KNOWN_CONFIGS, T5GEMMA_VARIANTS
from t5tune.planning.layer_memory import build_empty_training_model, count_weight_bytes
from t5tune.settings import PlanSettings

GB = 1e9
TEXT = """# Memory

This table shows how much memory the weights of each model take, in GB (10⁹ bytes), and how many parameters LoRA of rank
8 on q and v trains, without rows of added tokens. In the NF4 column, every linear layer of the blocks, including `wo`,
is stored in NF4 with double quantization; embedding and head stay in bf16.

When a run ends, `train` shows the peak memory per process; it is also in `report.html`, and in `result.json` as
`peak_memory_bytes`.

`t5tune plan` estimates the rest for your batch size, lengths and machine: gradients, optimizer state and activations,
by ZeRO stage, and the machine's memory while the base is loaded and while a checkpoint is saved.

```sh
t5tune plan --model-name-or-path google/flan-t5-xxl --q-lora \\
    --gradient-checkpointing --gpu-memory 24GiB
```

| model | parameters | LoRA trains | fp32 | bf16 | NF4 (`--q-lora`) | embedding and head (bf16) |
|---|---|---|---|---|---|---|
"""
AFTER = """
T5Gemma's `-ul2` and `-it` checkpoints have the sizes of `-prefixlm`. T5Gemma 2 is counted without its vision tower,
which isn't loaded.

The numbers are computed from the shapes in each model's `config.json`, as `plan` computes them.
[Results](results.md#plan) says how close a plan comes to a run on the CPU.
"""


def build_page() -> str:
    """Return the text of docs/memory.md."""
    # T5Gemma's checkpoints of a size have the same shape
    names = [name for name in KNOWN_CONFIGS if "/t5gemma-" not in name or not name.endswith(T5GEMMA_VARIANTS[1:])]
    return TEXT + "\n".join(map(build_row, names)) + "\n" + AFTER


def build_row(name: str) -> str:
    """Return a model's table row."""
    settings = PlanSettings(model_name_or_path=name, bf16=True)
    architecture = find_architecture(KNOWN_CONFIGS[name], Path(name))
    model = build_empty_training_model(architecture, settings, 0, deepspeed=False)
    trainable, total = count_parameters(model)
    plain = sum(count_weight_bytes(model, settings).values())
    parts = count_weight_bytes(model, settings.model_copy(update={"q_lora": True}))
    ends = parts["embedding"] + parts["head"]
    sizes = (2 * plain, plain, sum(parts.values()), ends)
    cells = [name, f"{total - trainable:,}", f"{trainable:,}", *(f"{size / GB:.2f}" for size in sizes)]
    return f"| {' | '.join(cells)} |"
