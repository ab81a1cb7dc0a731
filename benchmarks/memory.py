"""Writes docs/memory.md: the bytes of each member of the family, from the functions that plan uses.

python benchmarks/memory.py
"""

from pathlib import Path

from t5tune.model.known_configs import SIZES
from t5tune.model.memory import empty_model_of, parameter_counts, weight_bytes
from t5tune.settings import PlanSettings

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
GB = 1e9
TEXT = """# Memory

What the weights of each member of the family take, in GB (10⁹ bytes), and the parameters that LoRA of rank 8 on q and v
trains. The 4-bit columns hold every linear layer of the blocks in NF4 with double quantisation, `wo` too; embedding and
head stay in bf16.

`t5tune plan` counts the rest for your batch, lengths and machine: gradients, optimizer, activations, by ZeRO stage.

    t5tune plan --model-name-or-path google/flan-t5-xxl --q-lora --gradient-checkpointing --gpu-memory 24GiB

| model | parameters | LoRA trains | fp32 | bf16 | NF4 (`--q-lora`) | of it embedding and head |
|---|---|---|---|---|---|---|
"""
AFTER = """
Written by `python benchmarks/memory.py` with the functions that `plan` uses, from each config.json's shape. How close a
plan comes to a run on the CPU: `python benchmarks/plan.py`.
"""


def page() -> str:
    """docs/memory.md."""
    return TEXT + "\n".join(row(name) for name in SIZES) + "\n" + AFTER


def row(name: str) -> str:
    """One model's line."""
    settings = PlanSettings(model_name_or_path=name, bf16=True)
    model = empty_model_of(SIZES[name], settings, 0, deepspeed=False)
    trainable, total = parameter_counts(model)
    plain = sum(weight_bytes(model, None).values())
    parts = weight_bytes(model, settings.model_copy(update={"q_lora": True}))
    ends = parts["embedding"] + parts["head"]
    sizes = (2 * plain, plain, sum(parts.values()), ends)
    cells = [name, f"{total - trainable:,}", f"{trainable:,}", *(f"{size / GB:.2f}" for size in sizes)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
