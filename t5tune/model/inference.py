"""A model ready to answer: a base, quantised if asked, with an adapter or without, or a merged checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t5tune.checkpoints.adapter import TEMPLATE, base_facts, read_adapter
from t5tune.checkpoints.adapter_config import CONFIG, read_adapter_config
from t5tune.checkpoints.adapter_shapes import check_fit
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.training_data import TrainingData, read_training_data
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.errors import CheckpointError
from t5tune.families import family_of
from t5tune.model.device import check_bf16, choose_device
from t5tune.model.load import load_base
from t5tune.model.lora import load_adapter, use_token_rows
from t5tune.progress import Note, Report, silent
from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.inference import InferenceSettings


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what was saved with it.

    Args:
        base, adapter: where its weights lie.
        tokenizer_folder: the adapter's, where it brings a tokenizer, else the base's.
        training_data: how the examples were made that it was trained on; None: unknown.
        template_files: where the layout of its conversations may stand, the likeliest first.
        num_rows: rows of the embedding.
    """

    base: Path
    adapter: Path | None
    model: Any
    tokenizer: Tokenizer
    tokenizer_folder: Path
    training_data: TrainingData | None
    template_files: list[Path]
    num_rows: int


def load_for_inference(settings: InferenceSettings, report: Report = silent) -> Loaded:
    """Load what the settings name; an adapter or a run that stands for the model brings its base's name.

    Raises:
        ModelError, CheckpointError: the base or the adapter can't be used.
    """
    base, adapter = _base_and_adapter(settings, report)
    family: str | None = settings.family
    if adapter is not None:
        config, state = read_adapter(adapter)
        family = family or base_facts(adapter).get("family")
        of_base = read_config(base)
        # PEFT leaves out what it has no place for, with a warning
        check_fit(state, config, family_of(of_base, base, family).completed(of_base), adapter)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    device = choose_device(settings.use_cpu, name=settings.device)
    if settings.bf16:
        check_bf16(device)
    model = load_base(base, dtype, device, settings, family, report)
    if adapter is not None:
        model = load_adapter(model, adapter)
        use_token_rows(model)  # PEFT would copy the whole embedding, and the head, in each forward
    folders = [base] if adapter is None else [adapter, base]
    tokenizer_folder = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), base)
    return Loaded(
        base=base,
        adapter=adapter,
        model=model,
        tokenizer=load_tokenizer(tokenizer_folder),
        tokenizer_folder=tokenizer_folder,
        training_data=read_training_data(folders[0]),
        template_files=[folder / TEMPLATE for folder in folders],
        num_rows=int(model.config.vocab_size),
    )


def _base_and_adapter(settings: InferenceSettings, report: Report) -> tuple[Path, Path | None]:
    folder = Path(settings.model_name_or_path)
    if settings.adapter is not None or not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return find_base(settings), settings.adapter
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{folder / CONFIG}: names no base", hint="give the base, and this with --adapter")
    report(Note(f"{folder} is an adapter of {name}"))
    base = BaseModelSettings(model_name_or_path=name, revision=config.get("revision"), cache_dir=settings.cache_dir)
    return find_base(base), folder
