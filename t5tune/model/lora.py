"""Add LoRA adapters and added-token embeddings to a model, in PEFT's format."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn import functional

from t5tune.checkpoints.adapter import PEFT_PREFIX, TOKEN_ROWS_SUFFIX, build_token_indices, read_adapter, to_peft_name
from t5tune.checkpoints.adapter_config import PLAIN_INITIALIZATIONS
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.checkpoints.training_data import check_same_labels
from t5tune.data.tokens.tokenizer import find_other_token, load_tokenizer
from t5tune.errors import CheckpointError, SettingsError
from t5tune.file_names import ADAPTER_CONFIG_FILE, SETTINGS_FILE, TOKENIZER_CONFIG_FILE
from t5tune.model.labels import NOT_SCALED, LabelScale
from t5tune.model.load import read_on_rank_0, to_torch
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.groups.lora import BASE_CHANGING_INITIALIZATIONS, LoraSettings

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # they have no forward
SVD_OVERSAMPLING, SVD_ITERATIONS = 4, 8  # of LoftQ's randomized decomposition (Halko et al. 2011)
SAME_TOKENS_HINT = (
    "give the conversations instead of a token cache, and leave add_tokens at auto, to prepare them with the adapter's "
    "tokens"
)


def add_lora(
    model: Any,
    base: Path | None,
    settings: LoraSettings,
    token_ids: list[int],
    adapter_dtype: torch.dtype,
    partitioner: Zero3Partitioner | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Wrap a frozen base with adapters. Only the adapters and the added-token embeddings are trainable.

    Args:
        base: folder that the model was loaded from; None: it has no weights.
        token_ids: rows of the embedding and the head to train.
        adapter_dtype: dtype of the trained tensors.
        partitioner: partitioned the base; it partitions the adapters later.

    Returns:
        The PEFT model, and the initial LoRA matrices that were subtracted from the base weights (PiSSA, OLoRA), in fp32
        by their saved names; see `checkpoints.adapter.convert_to_plain_lora`.

    Raises:
        SettingsError: lora_target_modules or modules_to_save contain a name that the model doesn't have, or the model
            can't train added-token embeddings, or a layer would be both adapted and trained in full, or the
            initialization can't make matrices of lora_r.
    """
    method = settings.init_lora_weights
    config = _build_config(model, base, settings, token_ids)
    adapted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    }
    _check_overlap(adapted, settings)
    _check_rank(adapted, method, settings.lora_r)
    with nullcontext() if partitioner is None else partitioner.prepare_peft():
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    replace_trainable_token_layers(peft_model)
    _share_embedding_rows(peft_model)
    if method == "loftq":
        assert base is not None  # plan replaces initializations that need weights
        _initialize_from_quantization_error(peft_model, base, partitioner)
    subtracted = {}
    for name, parameter in peft_model.named_parameters():
        if method.startswith(BASE_CHANGING_INITIALIZATIONS) and (".lora_A." in name or ".lora_B." in name):
            subtracted[to_peft_name(name)] = Tensor("F32", parameter.detach().float().cpu().numpy().copy())
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return peft_model, subtracted


def _build_config(model: Any, base: Path | None, settings: LoraSettings, token_ids: list[int]) -> LoraConfig:
    trains_rows = settings.train_token_rows and token_ids
    if trains_rows and not model.architecture.token_row_modules:
        raise SettingsError(
            f"train_token_rows: the embeddings of {model.config.model_type} can't get rows for added tokens",
            hint="prepare the data with add_tokens none: this tokenizer can write every text",
        )
    tied = model.config.tie_word_embeddings
    method = settings.init_lora_weights
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_select_target_modules(model, settings.lora_target_modules),
        bias=settings.lora_bias,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        init_lora_weights=True if method in {"default", "loftq"} else method,
        modules_to_save=_select_modules_to_save(model, base, settings),
        # with TOKEN_CLS, PEFT trains the head of labels in full
        task_type=TaskType.TOKEN_CLS if model.label_task is not None else TaskType.SEQ_2_SEQ_LM,
        trainable_token_indices=build_token_indices(token_ids, model.architecture, tied) if trains_rows else None,
    )


def _select_target_modules(model: Any, names: list[str]) -> list[str] | str:
    """Expand names and groups to the linear layers that this model has, as PEFT's target_modules."""
    architecture = model.architecture
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != architecture.head
    }
    unknown = sorted(name for name in names if not linear & set(architecture.expand_target_modules([name])))
    if unknown:
        raise SettingsError(
            f"lora_target_modules: {', '.join(unknown)}: no such linear layer in this model",
            hint=f"it has {', '.join(sorted(linear))}, and the groups are {', '.join(architecture.linear_layers)}",
        )
    layers = [name for name in architecture.expand_target_modules(names) if name in linear]
    return architecture.restrict_target_modules(layers)  # type: ignore[no-any-return]


def _check_overlap(adapted: dict[str, nn.Linear], settings: LoraSettings) -> None:
    """Check that PEFT adapts at least one layer, and that modules_to_save trains no adapted layer in full.

    PEFT doesn't adapt a layer if a part of its path is in modules_to_save. But it trains in full all modules whose path
    ends in such a name: `o` is also the end of `wo`.
    """
    if not adapted:
        targets, saved = ", ".join(settings.lora_target_modules), ", ".join(settings.modules_to_save or [])
        problem = f"{targets}: no layer is left to adapt, since modules_to_save trains {saved} in full"
        raise SettingsError(f"lora_target_modules: {problem}", hint="name other layers in one of the two settings")
    for name in settings.modules_to_save or []:
        for path in adapted:
            if f"{name}." in f"{path}.":
                problem = f"modules_to_save: {name}: PEFT also finds {path}, which lora_target_modules adapts"
                hint = f"write more of its path, or don't adapt {path.rpartition('.')[2]}"
                raise SettingsError(problem, hint=f"PEFT takes all modules whose path ends in the name; {hint}")


def _check_rank(adapted: dict[str, nn.Linear], method: str, rank: int) -> None:
    """Check that an initialization that decomposes weights can make matrices of this rank.

    Otherwise PEFT silently makes smaller matrices, whose shapes contradict adapter_config.json.
    """
    if not method.startswith((*BASE_CHANGING_INITIALIZATIONS, "loftq")):
        return
    sizes = {name: min(layer.in_features, layer.out_features) for name, layer in adapted.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    if sizes[smallest] < rank:
        limit = f"whose rank is at most its smaller side: {sizes[smallest]} for {smallest}"
        raise SettingsError(
            f"lora_r: {rank}: init_lora_weights {method} decomposes each weight, {limit}",
            hint=f"use lora_r {sizes[smallest]} or less, or init_lora_weights default",
        )


def _select_modules_to_save(model: Any, base: Path | None, settings: LoraSettings) -> list[str] | None:
    """Check the modules to train in full, and return them as PEFT's modules_to_save."""
    if not settings.modules_to_save:
        return None
    shared = model.architecture.list_shared(tied=True)
    names = [] if base is None else Checkpoint(base, model.architecture).list_names()
    skipped = list(filter(model.architecture.is_skipped, names))
    for name in settings.modules_to_save:
        if also := next((path for path in skipped if path.rpartition(".")[0].endswith(name)), None):
            problem = f"modules_to_save: {name}: also the name of {also.rpartition('.')[0]}, which isn't trained"
            raise SettingsError(problem, hint=f"write more of its path, such as decoder.{name}")
        paths = {path: module for path, module in model.named_modules() if path.endswith(name)}  # PEFT's rule
        found = list(paths.values())
        if not found:
            raise SettingsError(
                f"modules_to_save: {name}: no such module in this model",
                hint=f"besides linear layers, it has {', '.join(model.architecture.trainable_modules)}",
            )
        if container := next((path for path, module in paths.items() if isinstance(module, CONTAINERS)), None):
            others = [path for path, module in paths.items() if not isinstance(module, CONTAINERS)]
            more = f"; write more of its path, such as {'.'.join(others[0].split('.')[-2:])}" if others else ""
            problem = f"modules_to_save: {name}: PEFT also finds {container}, a list of modules, and can't train a list"
            raise SettingsError(problem, hint=f"PEFT takes all modules whose path ends in the name{more}")
        if not any(True for module in found for _ in module.parameters()):
            raise SettingsError(f"modules_to_save: {name}: has no weights to train", hint="leave it out")
        if any(type(part).__name__ in {"Linear4bit", "Linear8bitLt"} for module in found for part in module.modules()):
            raise SettingsError(
                f"modules_to_save: {name}: contains quantized weights, which can't be trained",
                hint="train without q_lora, or adapt it with lora_target_modules",
            )
        parameters = {f"{path}.{own}" for path, module in paths.items() for own, _ in module.named_parameters()}
        if both := sorted(parameters & {*shared, *shared.values()}):
            problem = f"modules_to_save: {name}: contains {both[0]}, which the embeddings or the head share"
            raise SettingsError(problem, hint="PEFT would train a copy, which can't be merged: use train_mode full")
    return list(settings.modules_to_save)


def _initialize_from_quantization_error(peft_model: Any, base: Path, partitioner: Zero3Partitioner | None) -> None:
    """Initialize each B·A as the best low-rank approximation of its weight's 4-bit quantization error.

    This is one step of LoftQ (Li et al. 2023). PEFT's implementation needs a GPU.
    """
    import bitsandbytes

    checkpoint = Checkpoint(base, peft_model.architecture)
    for name, module in peft_model.base_model.model.named_modules():
        if not (hasattr(module, "lora_A") and "default" in module.lora_A):
            continue
        quantized = module.base_layer.weight
        if getattr(quantized, "quant_state", None) is None:  # `wo` without quantize_wo: it has no error to correct
            continue
        with nullcontext() if partitioner is None else partitioner.gather([quantized]):
            quantized_OI = bitsandbytes.functional.dequantize_4bit(quantized.data, quantized.quant_state).float()
        error_OI = read_on_rank_0(
            checkpoint.get_tensor(f"{name}.weight"), torch.float32, quantized_OI.device, partitioner
        )
        if partitioner is not None:
            partitioner.broadcast(error_OI)
        error_OI -= quantized_OI
        rank = module.r["default"]
        # a full decomposition takes minutes for all weights of a large model, and hardly corrects more
        u_OR, s_R, v_IR = (
            part[..., :rank]
            for part in torch.svd_lowrank(error_OI, min(SVD_OVERSAMPLING * rank, *error_OI.shape), SVD_ITERATIONS)
        )
        root_R = (s_R / module.scaling["default"]).sqrt()
        module.lora_A["default"].weight.data = (v_IR * root_R).T.contiguous()
        module.lora_B["default"].weight.data = (u_OR * root_R).contiguous()


def load_initial_adapter(
    peft_model: Any, folder: Path, tokenizer_folder: Path, label_scale: LabelScale = NOT_SCALED
) -> None:
    """Load a saved adapter's values into the adapters and added-token embeddings, to continue training it.

    Args:
        tokenizer_folder: folder of the tokenizer that the training data uses.
        label_scale: of the numbers that the head learns.

    Raises:
        CheckpointError: the saved adapter differs in shape, scale, kind, tokens or labels, or its initialization
            changed the base.
    """
    architecture = peft_model.architecture
    check_same_labels(folder, peft_model.label_task, "adapter")
    config, state = read_adapter(folder)
    current = peft_model.peft_config["default"].to_dict()
    _check_same_scale(config, current, folder)
    _check_plain_initialization(config, folder)
    copies = [f"{PEFT_PREFIX}{module}{TOKEN_ROWS_SUFFIX}" for module in architecture.token_row_modules[1:]]
    head = {f"{PEFT_PREFIX}{name}" for name in architecture.list_initial_shapes()}
    parameters = {to_peft_name(name): value for name, value in peft_model.named_parameters() if value.requires_grad}
    tensors = {name: tensor for name, tensor in state.items() if name in parameters or name not in copies}
    _check_same_names(parameters, tensors, folder)
    # compare as JSON, which turns tuples into lists, and keys that are numbers into text
    if config.get("trainable_token_indices") != json.loads(json.dumps(current["trainable_token_indices"])):
        problem = f"adapter: {folder}: its trained embedding rows belong to different tokens than this run's"
        raise CheckpointError(problem, hint=SAME_TOKENS_HINT)
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        check_same_tokens(folder, tokenizer_folder)
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tensors[name].shape:
            shapes = f"shape {list(tensors[name].shape)}, but {list(parameter.shape)} in this run"
            problem = f"adapter: {folder}: {name.removeprefix(PEFT_PREFIX)}: {shapes}"
            raise CheckpointError(problem, hint="was it trained on this base?")
        parameter.data.copy_(to_torch(tensors[name], parameter.dtype))
        if name in head:
            parameter.data /= label_scale.scale


def _check_same_scale(config: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    wanted = {}
    for name in select_settings(LoraSettings, Affects.ADAPTER_SCALE):
        key = "r" if name == "lora_r" else name  # PEFT's name
        if (before := config.get(key, False)) != current[key]:
            wanted[name] = [str(v).lower() if isinstance(v, bool) else f"{v:g}" for v in (before, current[key])]
    if wanted:
        saved = ", ".join(f"{name} {then}" for name, (then, _) in wanted.items())
        here = ", ".join(f"{name} {now}" for name, (_, now) in wanted.items())
        hint = "set " + ", ".join(f"{name}: {then}" for name, (then, _) in wanted.items())
        raise CheckpointError(f"adapter: {folder}: saved with {saved}, but this run has {here}", hint=hint)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError(f"adapter: {folder}: some layers have their own rank or alpha, which t5tune can't train")


def _check_plain_initialization(config: dict[str, Any], folder: Path) -> None:
    if (initialization := config.get("init_lora_weights")) not in PLAIN_INITIALIZATIONS:
        raise CheckpointError(
            f"adapter: {folder / ADAPTER_CONFIG_FILE}: init_lora_weights: {initialization}: this initialization "
            "changed the base's weights, but training would start from unchanged weights",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or set init_lora_weights: true and "
            "train it on the base that was saved along with it",
        )


def _check_same_names(parameters: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    for name in sorted(parameters.keys() ^ tensors.keys()):
        has, lacks = "the adapter contains", "this run doesn't train"
        if name not in tensors:
            has, lacks = "this run trains", "the adapter doesn't contain"
        hint = "use the lora_target_modules, modules_to_save and add_tokens that it was trained with"
        if (folder / SETTINGS_FILE).is_file():
            hint += f", which are in {folder / SETTINGS_FILE}"
        raise CheckpointError(f"adapter: {folder}: {has} {name.removeprefix(PEFT_PREFIX)}, which {lacks}", hint=hint)


def check_same_tokens(folder: Path, tokenizer_folder: Path, setting: str = "adapter") -> None:
    """Check that the run's tokenizer has all tokens of a saved adapter's tokenizer, with the same ids.

    Raises:
        CheckpointError: a token is missing, or has a different id. The message begins with `setting`.
    """
    if found := find_other_token(load_tokenizer(folder), load_tokenizer(tokenizer_folder)):
        token, row = found
        raise CheckpointError(
            f"{setting}: {folder}: embedding row {row} belongs to {token!r}, which this run's tokenizer lacks or "
            "numbers differently",
            hint=SAME_TOKENS_HINT,
        )


def _share_embedding_rows(peft_model: Any) -> None:
    """Make encoder and decoder train the same rows, since T5 has one embedding."""
    base = peft_model.base_model.model
    if base.config.tie_word_embeddings or not base.architecture.token_row_modules:
        return
    encoder, decoder = map(base.get_submodule, base.architecture.token_row_modules)
    if hasattr(encoder, "token_adapter"):
        decoder.token_adapter.trainable_tokens_delta = encoder.token_adapter.trainable_tokens_delta


def replace_trainable_token_layers(peft_model: Any) -> None:
    """Replace PEFT's layers for trained token rows with `TokenRows`."""
    for module in peft_model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows


class TokenRows(TrainableTokensLayer):  # type: ignore[misc]
    """Trained rows of an embedding or head, without PEFT's copy of the whole matrix (vocabulary × width) per forward.

    Under ZeRO-3 this copy fails, because the matrix is gathered only within the base layer's forward. Here the base
    layer runs unchanged, and only the trained rows' values in its output are replaced. K is the number of rows.
    """

    _ids: torch.Tensor | None = None

    def forward_adapters(self, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in active_adapters:
            rows_KD, ids_K = self.get_rows(name, x.device)
            if isinstance(self.base_layer, nn.Embedding):
                is_row_BTK = x.unsqueeze(-1) == ids_K
                replaced_BTD = functional.embedding(is_row_BTK.to(torch.uint8).argmax(-1), rows_KD)
                output = torch.where(is_row_BTK.any(-1, keepdim=True), replaced_BTD.to(output.dtype), output)
            else:
                logits_BTK = functional.linear(x.to(rows_KD.dtype), rows_KD).to(output.dtype)
                output = output.index_copy(-1, ids_K, logits_BTK)
        return output

    def get_rows(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the trained rows, their token ids)."""
        if self._ids is None or self._ids.device != device:  # cached, because a copy to a GPU synchronizes
            self._ids = torch.tensor(self.token_indices[name], device=device)
        return self.trainable_tokens_delta[name], self._ids
