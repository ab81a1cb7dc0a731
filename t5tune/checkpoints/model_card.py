"""Model cards: what was made from what, and how to load it."""

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.io.untrusted import read_object

SETTINGS = ("learning_rate", "per_device_train_batch_size", "model_max_length", "q_lora", "seed")


def adapter_card(config: Mapping[str, Any], training: str = "") -> str:
    """The README.md of an adapter folder; `training` tells of its data and settings."""
    base = config.get("base_model_name_or_path") or "BASE"
    targets = config.get("target_modules") or []
    modules = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    rows = config.get("trainable_token_indices")
    rows_of = next(iter(rows.values())) if isinstance(rows, dict) else rows
    # the built-in model has its name in t5tune alone
    imported = "\nfrom t5tune.checkpoints.pocket import pocket_folder\n" if base == "pocket" else ""
    trained = f"Trained rows of the embedding and head: {len(rows_of)} added tokens.\n" if rows_of else ""
    return f"""---
base_model: {base}
library_name: peft
tags: [t5tune, lora]
---

# LoRA adapter for {base}

Rank {config.get("r")}, alpha {config.get("lora_alpha")}, on {modules}.
{trained}{training}
```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
{imported}
base = AutoModelForSeq2SeqLM.from_pretrained({"pocket_folder()" if base == "pocket" else f'"{base}"'})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

The tokenizer of this folder, not the base's, made the ids that the adapter was trained on. `template.yaml` is
the layout of a conversation. `t5tune merge --model-name-or-path {base} --adapter THIS_FOLDER --output-dir OUT`
folds it into the base; `t5tune chat --model-name-or-path {base} --adapter THIS_FOLDER` talks to it.
"""


def data_line(manifest: Mapping[str, Any]) -> str:
    """What a token cache's manifest counts: "Data: 48 examples of 24 conversations, …"."""
    counts = [manifest.get(name) for name in ("examples", "conversations", "source_tokens", "target_tokens")]
    if not all(isinstance(count, int) for count in counts):
        return ""
    examples, conversations, source, target = counts
    tokens = f"{source:,} source and {target:,} target tokens"
    return f"Data: {examples:,} examples of {conversations:,} conversations, {tokens}.\n"


def settings_line(settings: Mapping[str, Any]) -> str:
    """The settings of a training that say most of it."""
    length = "max_steps" if settings.get("max_steps") else "num_train_epochs"
    return f"Settings: {', '.join(f'{name} {settings[name]}' for name in (length, *SETTINGS))}.\n"


def data_of_run(folder: Path) -> str:
    """What the data in a run folder is; nothing where it lies elsewhere."""
    return data_line(_read(folder / "data", "manifest.json"))


def training_of_run(folder: Path) -> str:
    """What a run folder's own files tell of its training: data, steps, held-out figures; nothing where it is none."""
    return data_of_run(folder) + outcome_lines(_read(folder, "result.json"))


def outcome_lines(result: Mapping[str, Any]) -> str:
    """Steps and held-out figures of a run that is over, as its result.json has them."""
    lines = f"The run took {result['steps']:,} steps.\n" if isinstance(result.get("steps"), int) else ""
    held_out = result.get("eval")
    if isinstance(held_out, dict):
        figures = [f"{name} {value:.4g}" for name, value in held_out.items() if _is_figure(name, value)]
        lines += f"Held out: {', '.join(figures)}.\n" if figures else ""
    return lines


def _is_figure(name: str, value: Any) -> bool:
    is_of_a_clock = name.endswith(("runtime", "_per_second"))
    return name.isidentifier() and isinstance(value, Real) and not is_of_a_clock


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(folder, name)
    except (FileNotFoundError, CheckpointError):  # a card tells what is known; nothing hangs on it
        return {}


LOADING = {
    "checkpoint": """
It needs no PEFT:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
""",
    "ctranslate2": """
It is in the format of CTranslate2:

```python
from ctranslate2 import Translator
from transformers import AutoTokenizer

translator = Translator("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
source = tokenizer.convert_ids_to_tokens([*tokenizer.encode("Hello", add_special_tokens=False), tokenizer.eos_token_id])
(result,) = translator.translate_batch([source], beam_size=1, max_input_length=0)
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0])))
```
""",
}


def merged_card(base: str, adapter: str, kind: str, converters: Sequence[str], training: str = "") -> str:
    """The README.md of a merged checkpoint, or of what was converted from it.

    Args:
        kind: merge's --to.
        converters: what else reads a checkpoint of this family.
    """
    others = f"\nIt is read as well by {', '.join(converters)}.\n" if kind == "checkpoint" else ""
    return f"""---
base_model: {base}
library_name: {"transformers" if kind == "checkpoint" else kind}
tags: [t5tune]
---

# {base} with an adapter folded in

Made by `t5tune merge` from the adapter `{adapter}`.
{training}{LOADING[kind]}{others}"""
