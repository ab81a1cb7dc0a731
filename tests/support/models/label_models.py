"""Tiny encoders with a head of labels, and labeled examples for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForTokenClassification

from t5tune.checkpoints.adapter import AdapterMetadata, to_peft_name, write_adapter
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import describe_base
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.checkpoints.training_data import TrainingData, encode_training_data
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.settings.groups.lora import LoraSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.support.models.adapters import randomize

NAMES = ("Nucleus", "Cytoplasm", "Membrane", "Golgi", "Vacuole")
TASKS = {
    "tag": LabelTask("tag", True, False, NAMES, "text"),
    "classify": LabelTask("classify", False, False, NAMES, "text"),
    "several": LabelTask("classify", False, True, NAMES, "text"),
    "regress": LabelTask("regress", False, False, (), "text"),
    "regress each": LabelTask("regress", True, False, (), "text"),
}
LENGTHS = (7, 31, 2, 120, 64)


def make_labeled_examples(task: LabelTask, lengths: tuple[int, ...] = LENGTHS) -> list[LabeledExample]:
    """Make examples with random tokens and labels; a third of the tokens have none."""
    rng = np.random.default_rng(3)
    examples = []
    for length in lengths:
        values = rng.integers(0, task.num_outputs, length if task.per_token else 1)
        if task.several:
            values = np.flatnonzero(rng.integers(0, 2, task.num_outputs))
        values = rng.normal(size=len(values)) if task.objective == "regress" else values
        values = np.where(rng.random(len(values)) < 0.3, np.nan, values) if task.per_token else values
        source_S = rng.integers(3, 128, length)
        examples.append(LabeledExample(source_S, np.empty(0, np.int64), values.astype(np.float32)))
    return examples


def sum_losses(task: LabelTask, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the losses of the labels that are learned."""
    is_learned = ~labels.isnan()
    if task.several:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    logits, labels = logits[is_learned], labels[is_learned]
    if task.objective == "regress":
        return functional.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="sum")
    return functional.cross_entropy(logits, labels.long(), reduction="sum")


def load_stock_labels(folder: Path, task: LabelTask, **options: Any) -> Any:
    """Load a base with transformers' class and a random head, as its users do."""
    config = AutoConfig.from_pretrained(folder, num_labels=task.num_outputs, is_encoder_decoder=False)
    torch.manual_seed(5)
    return AutoModelForTokenClassification.from_pretrained(folder, config=config, **options).eval()


def compute_stock_logits(model: Any, examples: list[LabeledExample], task: LabelTask) -> torch.Tensor:
    """Compute the logits one text after the other with a stock model; of texts, averaged over their tokens."""
    rows = [model(input_ids=torch.from_numpy(each.source_S)[None]).logits[0] for each in examples]
    return torch.cat(rows)[None] if task.per_token else torch.stack([row.mean(0) for row in rows])


def make_label_adapter(base: Path, folder: Path, task: LabelTask) -> Path:
    """Make an adapter of an encoder with random values, with the files that training writes."""
    model = load_base(base, torch.float32, torch.device("cpu"), task=task)
    peft_model, _ = add_lora(model, base, LoraSettings(lora_r=4, lora_alpha=16, lora_dropout=0.0), [], torch.float32)
    randomize(peft_model)
    state = {
        to_peft_name(name): Tensor("F32", parameter.detach().numpy())
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    config = peft_model.peft_config["default"].to_dict() | {"base_model_name_or_path": str(base)}
    plain = json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else value))
    folder.mkdir()
    save_tokenizer(load_tokenizer(base), folder)
    files = read_supporting_files(folder, folder / "template.yaml") | {"training_data.json": encode_labels(task)}
    described = describe_base(open_base(base), str(base))
    write_adapter(folder, state, AdapterMetadata(plain, files, described, labels=task))
    return folder


def encode_labels(task: LabelTask, source_prefix: str = "") -> bytes:
    """Encode the training_data.json of a model with labels."""
    values = ReadingSettings(objective=task.objective, source_prefix=source_prefix).model_dump()
    names = ("data_format", "source_column", "target_column", "source_prefix", "objective", "denoisers")
    data = TrainingData(has_earlier_turns=False, **{name: values[name] for name in names}, labels=task)
    return encode_training_data(data)


def make_stock_label_adapter(base: Path, folder: Path, task: LabelTask) -> Path:
    """Make an adapter of stock PEFT for the same model, with random values."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q", "v", "q_proj", "v_proj"], task_type="TOKEN_CLS")
    model = get_peft_model(load_stock_labels(base, task, dtype=torch.float32, attn_implementation="eager"), config)
    randomize(model)
    model.save_pretrained(folder)
    return folder
