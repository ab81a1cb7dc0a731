"""Adapters of stock PEFT and of training, with random values in every trained tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from t5tune.checkpoints.adapter import AdapterMetadata, to_peft_name, write_adapter
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import describe_base
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.settings.groups.lora import LoraSettings
from tests.support.paths import REPOSITORY

TEMPLATES = REPOSITORY / "templates" / "conversations"
TOKEN_IDS = [203, 210, 201]  # not sorted, so that swapped rows are detected
SOURCE = torch.tensor([[5, 210, 17, 203, 99, 1], [201, 8, 8, 44, 1, 0]])
TARGET = torch.tensor([[0, 203, 31, 7], [0, 210, 201, 12]])


def load_stock_base(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_stock_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q", "v"], "lora_dropout": 0.0}
    model = get_peft_model(load_stock_base(base), LoraConfig(**options | changes, task_type=TaskType.SEQ_2_SEQ_LM))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def add_base_metadata(base: Path, adapter: Path, **changes: Any) -> Path:
    """Add the base's metadata to the adapter, as train writes it, with some changes."""
    path = adapter / "adapter_model.safetensors"
    metadata = {"format": "pt", "t5tune": json.dumps(describe_base(open_base(base), "the-base") | changes)}
    save_file(load_file(path), path, metadata)
    return adapter


def make_rows_adapter(base: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """Make an adapter with trained token rows as training writes it; also return the training model's logits."""
    model = load_base(base, torch.float32, torch.device("cpu"))
    settings = LoraSettings(lora_r=4, lora_alpha=16, lora_dropout=0.0)
    peft_model, _ = add_lora(model, base, settings, TOKEN_IDS, torch.float32)
    randomize(peft_model)
    state = {
        to_peft_name(name): Tensor("F32", parameter.detach().numpy())
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    config = peft_model.peft_config["default"].to_dict() | {"base_model_name_or_path": str(base)}
    plain = json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else value))
    template = folder.with_name("of-the-adapter") / "template.yaml"
    template.parent.mkdir()
    shutil.copy(TEMPLATES / "plain.yaml", template)
    folder.mkdir()
    write_adapter(
        folder, state, AdapterMetadata(plain, read_supporting_files(base, template)), with_non_lora_state=True
    )
    return folder, compute_logits(peft_model.eval())


def compute_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(
            input_ids=SOURCE, attention_mask=SOURCE.ne(0).long(), decoder_input_ids=TARGET, use_cache=False
        ).logits


def randomize(model: Any, seed: int = 11) -> None:
    """Set every trainable tensor to random values, as if it were trained."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
