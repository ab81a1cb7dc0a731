"""Model cards (README.md): a model's base, data and training, and how to load it."""

import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.families.encoder import Task
from t5tune.file_names import MIXTURE_FILE, RESULT_FILE, RUN_CACHE_FOLDER
from t5tune.formatting import format_count
from t5tune.hub.names import is_published
from t5tune.io.reasons import join_first
from t5tune.io.untrusted import read_json_object

PLACEHOLDER, METADATA_MARK = "THIS_FOLDER", "---\n"
# base_model: google/flan-t5-base, or as a tag - base_model:adapter:google/flan-t5-base
_BASE_LINE = re.compile(r"(?:base_model: |\s*- base_model:adapter:)(?P<base>.+)")
_NAME = re.compile(r"[\w.-]+")  # of a dataset; a foreign file must not format the card
DATASET_COUNTS = {"examples", "share", "examples_per_epoch"}  # in a result, besides a dataset's metrics
LISTED_SETTINGS = ("learning_rate", "per_device_train_batch_size", "model_max_length", "q_lora", "seed")


def build_adapter_card(config: Mapping[str, Any], training: str = "", labels: Task | None = None) -> str:
    """Build an adapter's README.md; `training` has lines about data and settings."""
    base = config.get("base_model_name_or_path") or "BASE"
    targets = config.get("target_modules") or []
    modules = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    rows = config.get("trainable_token_indices")
    rows_of = next(iter(rows.values())) if isinstance(rows, dict) else rows
    # `pocket` isn't a name that transformers can load
    imported = "\nfrom t5tune.checkpoints.pocket import pocket_folder\n" if base == "pocket" else ""
    path = "pocket_folder()" if base == "pocket" else f'"{base}"'
    name, more, task = "AutoModelForSeq2SeqLM", "", "chat with it"
    if labels is not None:
        name, task = "AutoModelForTokenClassification", "predict labels with it"
        more = f", num_labels={labels.num_outputs}, is_encoder_decoder=False"
    trained = f"Also trained: the embedding and output rows of {len(rows_of)} added tokens.\n" if rows_of else ""
    return f"""---
{_format_base_line(base)}library_name: peft
tags: [t5tune, lora]
---

# LoRA adapter for {base}

LoRA rank {config.get("r")}, alpha {config.get("lora_alpha")}, target modules: {modules}.
{trained}{training}
```python
from peft import PeftModel
from transformers import {name}, AutoTokenizer
{imported}
base = {name}.from_pretrained({path}{more})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
{_build_label_lines(labels)}```

{_describe_files(labels)}To merge the adapter into the base model, run
`t5tune merge --model-name-or-path {base} --adapter THIS_FOLDER --output-dir OUT`. To {task}, run
`t5tune chat --model-name-or-path {base} --adapter THIS_FOLDER`.
"""


def _describe_files(labels: Task | None) -> str:
    text = "Use the tokenizer in this folder, not the base model's: the adapter was trained with it."
    if labels is None:
        return f"{text} `template.yaml` is the\nconversation template. "
    return f"{text} `training_data.json` has\nthe labels in the order of the logits. "


def _build_label_lines(labels: Task | None) -> str:
    """Build the lines that compute logits: of each token, or of each text, which are the mean over its tokens."""
    if labels is None:
        return ""
    lines = """batch = tokenizer(["a text"], return_tensors="pt", padding=True)
logits = model(**batch).logits  # of each token
"""
    if labels.per_token:
        return lines
    return f"""{lines}mask = batch.attention_mask.unsqueeze(-1)
logits = (logits * mask).sum(1) / mask.sum(1)  # of each text
"""


def _format_base_line(base: str) -> str:
    return f"base_model: {base}\n" if is_published(base) else ""


def format_data_line(manifest: Mapping[str, Any]) -> str:
    """Format the counts in a token cache's manifest: "Data: 48 examples from 24 conversations, …"."""
    names = ("examples", "conversations", "source_tokens", "target_tokens")
    counts = [count for name in names if isinstance(count := manifest.get(name), int)]
    if len(counts) < len(names):
        return ""
    examples, conversations, source, target = counts
    tokens = f"{source:,} source and {target:,} target tokens" if target else f"{source:,} tokens"  # of labels
    sources = manifest.get("sources")
    named = [name for name in sources if isinstance(name, str)] if isinstance(sources, list) else []
    origin = f", from {join_first(named)}" if named else ""
    records = format_count(conversations, "conversation" if target else "text")
    line = f"Data: {format_count(examples, 'example')} from {records}, {tokens}{origin}.\n"
    return line + _format_mixture_line(manifest.get("datasets"))


def _format_mixture_line(datasets: Any) -> str:
    """Format the shares in a mixture's manifest: "Mixture: 75.0% chats (120 examples), …"."""
    parts = []
    for dataset in datasets if isinstance(datasets, list) else []:
        name, share, count = (dataset.get(key) for key in ("name", "share", "examples"))
        if isinstance(name, str) and _NAME.fullmatch(name) and isinstance(share, float) and isinstance(count, int):
            parts.append(f"{share:.1%} {name} ({format_count(count, 'example')})")
    return f"Mixture: {', '.join(parts)}.\n" if len(parts) > 1 else ""


def format_settings_line(settings: Mapping[str, Any]) -> str:
    names = ["max_steps" if settings.get("max_steps") else "num_train_epochs", *LISTED_SETTINGS]
    if settings["objective"] != "sft":
        names.insert(0, "objective")
    return f"Settings: {', '.join(f'{name} {settings[name]}' for name in names)}.\n"


def describe_run_data(folder: Path) -> str:
    """Describe the data in a run folder; empty if the data is elsewhere."""
    return format_data_line(_read_optional(folder / RUN_CACHE_FOLDER, MIXTURE_FILE))


def describe_run_training(folder: Path) -> str:
    """Describe a run's data, steps and evaluation metrics from its folder."""
    return describe_run_data(folder) + format_outcome_lines(_read_optional(folder, RESULT_FILE))


def format_outcome_lines(result: Mapping[str, Any]) -> str:
    """Format the steps and evaluation metrics of a finished run, given its result.json."""
    lines = f"Trained for {format_count(result['steps'], 'step')}.\n" if isinstance(result.get("steps"), int) else ""
    lines += _format_metrics_line("held-out data", result.get("eval"))
    datasets = result.get("datasets")
    for name, values in datasets.items() if isinstance(datasets, dict) else ():
        if _NAME.fullmatch(name) and isinstance(values, dict):
            metrics = {key: value for key, value in values.items() if key not in DATASET_COUNTS}
            lines += _format_metrics_line(f"held-out data of {name}", metrics)
    return lines


def _format_metrics_line(data: str, held_out: Any) -> str:
    if not isinstance(held_out, dict):
        return ""
    numbers = {name: value for name, value in held_out.items() if name.isidentifier() and isinstance(value, Real)}
    metrics = [f"{name} {value:.4g}" for name, value in numbers.items() if not is_timing(name)]
    return f"Evaluation on {data}: {', '.join(metrics)}.\n" if metrics else ""


def is_timing(name: str) -> bool:
    """Whether an evaluation metric is a timing that Trainer adds."""
    return name.removeprefix("eval_") in {"runtime", "samples_per_second", "steps_per_second"}


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json_object(folder, name)
    except (FileNotFoundError, CheckpointError):  # the card is informative only: it leaves out what can't be read
        return {}


TRANSFORMERS_JS = "4.3.2"
LIBRARIES = {"checkpoint": "transformers", "onnx": "transformers.js"}  # else, the name of the format
TRANSLATOR_LINES = """from ctranslate2 import Translator
from transformers import AutoTokenizer

translator = Translator("THIS_FOLDER")
"""
# the lines for a repository: CTranslate2 takes folders only
DOWNLOADED_TRANSLATOR_LINES = """from ctranslate2 import Translator
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

translator = Translator(snapshot_download("THIS_FOLDER"))
"""
ONNX_FOLDER_LINE = 'folder = "THIS_FOLDER"\n'
DOWNLOADED_ONNX_FOLDER_LINE = """from huggingface_hub import snapshot_download

folder = snapshot_download("THIS_FOLDER")
"""
LOADING_SECTIONS = {
    "checkpoint": """
Load it without PEFT:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
""",
    "sentence-transformers": """
Its logits of texts are what `encode` gives:

```python
from sentence_transformers import SentenceTransformer

logits = SentenceTransformer("THIS_FOLDER").encode(["a text"])
```
""",
    "onnx": f"""
The model is in ONNX format, for [transformers.js](https://huggingface.co/docs/transformers.js) and onnxruntime.
Its prompts are messages in a conversation template, so give it the whole text:

```js
// npm install --ignore-scripts @huggingface/transformers@{TRANSFORMERS_JS}
import {{ pipeline }} from "@huggingface/transformers";

const generate = await pipeline("text2text-generation", "THIS_FOLDER", {{ dtype: "__DTYPE__" }});
const options = {{ max_new_tokens: 64, num_beams: 1, do_sample: false }};
const [reply] = await generate(__PROMPT__, options);
console.log(reply.generated_text);
```

`index.html` is a page to try it. In this folder, get its scripts, and serve it at http://localhost:8000:

```sh
npm install --ignore-scripts --prefix ../build @huggingface/transformers@{TRANSFORMERS_JS}
mkdir js
cp ../build/node_modules/@huggingface/transformers/dist/transformers.min.js js
for end in mjs wasm; do cp ../build/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.$end js; done
python3 -m http.server
```

In Python:

```python
import numpy as np
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

{ONNX_FOLDER_LINE}tokenizer = AutoTokenizer.from_pretrained(folder)
encoder = InferenceSession(f"{{folder}}/onnx/encoder_model__SUFFIX__.onnx")
decoder = InferenceSession(f"{{folder}}/onnx/decoder_model_merged__SUFFIX__.onnx")
source = dict(tokenizer(__PROMPT__, return_tensors="np"))
states, mask = encoder.run(None, source)[0], source["attention_mask"]
inputs = {{"encoder_hidden_states": states, "encoder_attention_mask": mask}}
past = [each for each in decoder.get_inputs() if each.name.startswith("past")]
cache = {{each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), "f4") for each in past}}
ids = [__START__]
while len(ids) <= 64 and (len(ids) == 1 or ids[-1] != tokenizer.eos_token_id):
    logits, *present = decoder.run(None, {{"input_ids": np.array([ids[-1:]]), **inputs, **cache}})
    cache = dict(zip(cache, present))
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids[1:], skip_special_tokens=True))
```
""",
    "ctranslate2": f"""
The model is in CTranslate2 format:

```python
{TRANSLATOR_LINES}tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
source = tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello"))
(result,) = translator.translate_batch([source], beam_size=1, max_input_length=0)
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(result.hypotheses[0])))
```
""",
}


def build_merged_card(
    base: str,
    adapters: Sequence[tuple[str, float]],
    kind: str,
    converters: Sequence[str],
    training: str = "",
    labels: Task | None = None,
) -> str:
    """Build the README.md of a merged or converted checkpoint.

    Args:
        adapters: names and weights; empty: a whole model was converted.
        kind: as merge's --to.
        converters: other tools that read a checkpoint of this model type.
        labels: that the model predicts; None: it predicts texts.
    """
    loading = LOADING_SECTIONS[kind]
    if labels is not None and kind == "checkpoint":
        loading = loading.replace("Seq2SeqLM", "TokenClassification")
        loading = loading.removesuffix("```\n") + f"{_build_label_lines(labels)}```\n"
    tools = ", ".join(converters) if kind == "checkpoint" else ""
    readers = f"\nThese tools can also read it: {tools}.\n" if tools else ""
    is_plain = [weight for _, weight in adapters] == [1]
    names = ", ".join(f"`{name}`" if is_plain else f"`{name}` (weight {weight:g})" for name, weight in adapters)
    title = f"{base} with a merged LoRA adapter" if adapters else base
    source = f"the adapter{'s' if len(adapters) > 1 else ''} {names}" if adapters else f"`{base}`"
    return f"""---
{_format_base_line(base)}library_name: {LIBRARIES.get(kind, kind)}
tags: [t5tune]
---

# {title}

Created by `t5tune merge` from {source}.
{training}{loading}{readers}"""


def fill_in_card(content: bytes, repository: str, folders: Collection[str]) -> bytes:
    """Insert the repository's name into the card's code, and shorten local paths to their last part.

    A base that is a local folder, which PEFT also writes, is left out of the metadata, where the Hub refuses it.
    `folders` are the local paths that the card may contain.
    """
    try:
        text = content.decode().replace(TRANSLATOR_LINES, DOWNLOADED_TRANSLATOR_LINES)
        text = text.replace(ONNX_FOLDER_LINE, DOWNLOADED_ONNX_FOLDER_LINE).replace(PLACEHOLDER, repository)
        _, metadata, rest = text.split(METADATA_MARK, 2) if text.startswith(METADATA_MARK) else ("", "", text)
    except ValueError:  # not UTF-8, or metadata without an end: not our card, so the Hub judges it
        return content
    kept, hidden = "", {*folders}
    for line in metadata.splitlines(keepends=True):
        found = _BASE_LINE.match(line)
        base = found["base"].strip("'\"") if found else ""
        if found and not is_published(base):
            hidden.add(base)
        else:
            kept += line
    for folder in sorted(hidden, key=len, reverse=True):  # a subfolder before its parent
        if "/" in folder:
            rest = Path(folder).name.join(re.split(rf"(?<![\w./~-]){re.escape(folder)}(?![\w-])", rest))
    return METADATA_MARK.join(["", kept, rest]).encode() if metadata else rest.encode()
