"""Model cards: what was made from what, and how to load it."""

from collections.abc import Mapping
from typing import Any


def adapter_card(config: Mapping[str, Any]) -> str:
    """The README.md of an adapter folder."""
    base = config.get("base_model_name_or_path") or "BASE"
    modules = config.get("target_modules") or []
    rows = config.get("trainable_token_indices")
    rows_of = next(iter(rows.values())) if isinstance(rows, dict) else rows
    trained = f"Trained rows of the embedding and head: {len(rows_of)} added tokens.\n" if rows_of else ""
    return f"""---
base_model: {base}
library_name: peft
tags: [t5tune, lora]
---

# LoRA adapter for {base}

Rank {config.get("r")}, alpha {config.get("lora_alpha")}, on {", ".join(sorted(modules))}.
{trained}
```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

base = AutoModelForSeq2SeqLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

The tokenizer of this folder, not the base's, made the ids that the adapter was trained on. `template.yaml` is
the layout of a conversation. `t5tune merge --model-name-or-path {base} --adapter THIS_FOLDER --output-dir OUT`
folds it into the base; `t5tune chat --model-name-or-path {base} --adapter THIS_FOLDER` talks to it.
"""


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


def merged_card(base: str, adapter: str, kind: str) -> str:
    """The README.md of a merged checkpoint, or of what was converted from it: `kind` is merge's --to."""
    return f"""---
base_model: {base}
library_name: {"transformers" if kind == "checkpoint" else kind}
tags: [t5tune]
---

# {base} with an adapter folded in

Made by `t5tune merge` from the adapter `{adapter}`.
{LOADING[kind]}"""
