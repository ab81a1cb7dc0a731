"""Load a model for inference: a base, optionally quantized and with an adapter, or a merged checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from t5tune.checkpoints.adapter import read_adapter, read_base_metadata
from t5tune.checkpoints.adapter_folder import find_adapter, is_adapter
from t5tune.checkpoints.adapter_shapes import check_adapter_shapes
from t5tune.checkpoints.base import check_base, find_base, find_model, open_base, read_base_of_adapter, read_config
from t5tune.checkpoints.fingerprint import is_trained_base
from t5tune.checkpoints.training_data import DatasetTraining, TrainingData, read_label_task, read_training_data
from t5tune.constraints.compiler import Compiler
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.templates import Template, find_template
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.errors import ModelError, SettingsError
from t5tune.families import find_architecture
from t5tune.families.encoder import make_encoder
from t5tune.file_names import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from t5tune.formatting import shorten
from t5tune.hub.names import name_snapshot, split_revision
from t5tune.inference.generation import find_stop_ids
from t5tune.inference.precision import Precision, read_trained_precision, resolve_precision, select_precision
from t5tune.io.reasons import join_lines
from t5tune.model.device import choose_device
from t5tune.model.load import load_base
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.progress import Note, Report, silent
from t5tune.settings.groups.base import BaseModelSettings, InferenceSettings, QuantizationSettings

InferenceKind = TypeVar("InferenceKind", bound=InferenceSettings)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, except its weights.

    Args:
        tokenizer_folder: the adapter's folder if it contains a tokenizer, else the base's.
        training_data: how its training examples were made; None: unknown.
        template_files: possible paths of its conversation template, in order of preference.
        label_task: the labels that it predicts; None: it generates texts.
    """

    base: Path
    adapter: Path | None
    tokenizer: Tokenizer
    tokenizer_folder: Path
    training_data: TrainingData | None
    template_files: list[Path]
    label_task: LabelTask | None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that its targets follow."""
        return None if self.training_data is None else self.training_data.json_schema

    @property
    def datasets(self) -> dict[str, DatasetTraining]:
        """How the examples of each of several training datasets were made."""
        datasets = self.training_data.datasets if self.training_data is not None else []
        return {dataset.name: dataset for dataset in datasets}

    def find_template(self, name_or_path: str | None) -> Template | None:
        """Find a conversation template by its name, path or training dataset; None: the model's template."""
        if name_or_path is not None and (dataset := self.datasets.get(name_or_path)) is not None:
            return Template(**dataset.conversation_template)
        return find_template(name_or_path, self.template_files, self.datasets)


@dataclass(frozen=True)
class LoadedModel(ModelFiles):
    """A model in evaluation mode, with its files.

    Args:
        num_rows: rows of the embedding.
        engine: DeepSpeed's; keep it as long as a partitioned model is used, since it gathers the weights.
    """

    model: Any
    num_rows: int
    precision: Precision
    engine: Any = None


def make_compiler(model: Any, tokenizer: Tokenizer, answer_suffix: str) -> Compiler:
    """Make a compiler of constraints on a model's replies. `answer_suffix`: the conversation template's."""
    stop_ids = find_stop_ids(model, tokenizer.eos_token_id)
    return Compiler(tokenizer, model.architecture.dimensions.num_rows, stop_ids, answer_suffix)


def read_model_files(base: Path, adapter: Path | None) -> ModelFiles:
    folders = [base] if adapter is None else [adapter, base]
    tokenizer_folder = next((folder for folder in folders if (folder / TOKENIZER_CONFIG_FILE).is_file()), base)
    return ModelFiles(
        base=base,
        adapter=adapter,
        tokenizer=load_tokenizer(tokenizer_folder),
        tokenizer_folder=tokenizer_folder,
        training_data=read_training_data(folders[0]),
        template_files=[folder / TEMPLATE_FILE for folder in folders],
        label_task=read_label_task(folders[0]),
    )


def load_for_inference(
    settings: InferenceSettings,
    report: Report = silent,
    device: torch.device | None = None,
    zero3: dict[str, Any] | None = None,
    load_base: Callable[..., Any] = load_base,
    precision: Precision | None = None,
) -> LoadedModel:
    """Load the model of the settings. For an adapter or a run folder, load its base too.

    A model with labels computes their logits (see model/labels.py).

    Args:
        device: None: as in the settings.
        zero3: a DeepSpeed config with ZeRO-3, to partition the model among the ranks; None: each rank has all of it.
        load_base: `SharedBases.load` lets several models share the weights of a base.
        precision: of the base; None: as in the settings, else as in training.
    """
    base, adapter = find_base_and_adapter(settings, report)
    task = read_label_task(adapter or base)
    family: str | None = settings.family
    if adapter is not None:
        config, state = read_adapter(adapter)
        metadata = read_base_metadata(adapter)
        family = family or metadata.get("family")
        if not is_trained_base(metadata, open_base(base, family)):
            trained = f"trained on {metadata.get('base')}, but loaded onto {base}"
            report(Note(f"{adapter}: {trained}; predictions may be wrong", warning=True))
        # PEFT only warns about tensors that don't fit into the model, and ignores them
        architecture = make_encoder(find_architecture(read_config(base), base, family), task)
        check_adapter_shapes(state, config, architecture, adapter)
    device = device or choose_device(settings.use_cpu, name=settings.device)
    if precision is None:
        in_training = read_trained_precision(base, adapter)
        precision = resolve_precision(select_precision(settings), in_training, device, report)
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    partitioner = None
    if zero3 is not None:
        _check_partitioning(precision.quantization, adapter is not None and bool(config.get("use_dora")), device)
        partitioner = Zero3Partitioner(zero3, dtype)
    model = load_base(base, dtype, device, precision.quantization, family, report, partitioner, task)
    if adapter is not None:
        from t5tune.model.lora import replace_trainable_token_layers  # imports PEFT, which takes half a second

        with nullcontext() if partitioner is None else partitioner.prepare_peft():
            model = load_adapter(model, adapter)
        replace_trainable_token_layers(model)  # PEFT's would copy the whole embedding and head in each forward
    if partitioner is not None:
        partitioner.partition_model(model)
    return LoadedModel(
        **vars(read_model_files(base, adapter)),
        model=model,
        num_rows=model.architecture.dimensions.num_rows,
        precision=precision,
        engine=None if partitioner is None else partitioner.set_up_inference(model),
    )


def _check_partitioning(quantization: QuantizationSettings | None, uses_dora: bool, device: torch.device) -> None:
    if quantization is None:
        return
    if quantization.quant_type == "int8":
        problem = "quant_type: int8: DeepSpeed can't handle int8 weights"
        raise SettingsError(problem, hint="use nf4 or fp4, or leave out --deepspeed")
    # PEFT 0.21 replaces quantized weights on CPUs whenever it reads them for DoRA, and DeepSpeed loses track of them
    if uses_dora and device.type == "cpu":
        problem = "q_lora: with ZeRO-3 and DoRA it works only on GPUs"
        raise SettingsError(problem, hint="use --no-q-lora, or leave out --deepspeed")


def find_base_and_adapter(settings: InferenceSettings, report: Report = silent) -> tuple[Path, Path | None]:
    """Find the folders of the base and the adapter, and download what isn't on this machine."""
    name = settings.model_name_or_path
    if settings.adapter is not None:
        return find_base(settings, report=report), find_adapter(settings.adapter, settings.cache_dir, report=report)
    folder = find_model(settings, report=report)
    if not is_adapter(folder):
        return check_base(folder, name), None
    base = read_base_of_adapter(folder, settings.cache_dir)
    report(Note(f"{name} is an adapter; its base is {base.model_name_or_path}"))
    return find_base(base, report=report), folder


def pin_to_commits(settings: InferenceKind, base: Path, adapter: Path | None) -> InferenceKind:
    """Return the settings with the commits of the folders that `find_base_and_adapter` returned: branches move."""
    named = adapter if adapter is not None and settings.adapter is None else base
    _, commit = split_revision(name_snapshot(named))
    changes: dict[str, Any] = {}
    if commit is not None and named != Path(settings.model_name_or_path):
        changes["revision"] = commit
    if settings.adapter is not None and adapter is not None and adapter != settings.adapter:
        changes["adapter"] = Path(f"{split_revision(str(settings.adapter))[0]}@{adapter.name}")
    return settings.model_copy(update=changes)


def select_base(settings: InferenceKind, loaded: LoadedModel) -> InferenceKind:
    """Return the settings that load only the base of a loaded model, in the same way."""
    family = choose_family(settings, loaded.adapter)
    base = {"model_name_or_path": str(loaded.base), "adapter": None, "revision": None, "family": family}
    return settings.model_copy(update=base)


def choose_family(settings: BaseModelSettings, adapter: Path | None) -> str | None:
    """Choose the model type of a base: as in the settings, else as in training; None: as in its config.json."""
    return settings.family or (read_base_metadata(adapter).get("family") if adapter is not None else None)


def load_adapter(model: Any, folder: Path) -> Any:
    """Add a saved adapter to a base, for inference."""
    from peft import PeftModel

    with _explain_misfit(folder):
        return PeftModel.from_pretrained(model, str(folder), **_get_peft_options(model)).eval()


def load_weighted_sum(model: Any, folders: list[Path], weights: list[float]) -> Any:
    """Add the weighted sum of several saved adapters to a base, with PEFT's combination type `cat`."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"part{number}" for number in range(len(folders))]
    options = _get_peft_options(model)
    with _explain_misfit(*folders):
        peft_model = PeftModel.from_pretrained(model, str(folders[0]), names[0], **options)
        for name, folder in zip(names[1:], folders[1:], strict=True):
            peft_model.load_adapter(str(folder), name, **options)
    peft_model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    peft_model.set_adapter("sum")
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["sum"] = 1.0  # not rsLoRA's: the concatenated matrices contain each adapter's scale
    return peft_model.eval()


@contextmanager
def _explain_misfit(*folders: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        problem = f"{', '.join(map(str, folders))}: doesn't fit this base: {shorten(join_lines(error), 300)}"
        raise ModelError(problem, hint="give the base that it was trained on", setting="adapter") from error


def _get_peft_options(model: Any) -> dict[str, Any]:
    # by default, PEFT loads adapters onto the first GPU, and converts 16-bit weights to fp32
    return {"autocast_adapter_dtype": False, "torch_device": str(next(model.parameters()).device)}
