"""Attach LoRA adapters, and train the rows of added tokens, in PEFT's own format.

The rows of an untied head are indexed in the opposite order of the embedding's. Stock PEFT believes
transformers 5 that every T5 is tied, and drops the rows of an embedding and a head that list the same
indices; lists that differ it keeps apart, so the saved adapter loads right with no line of the user's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn
from torch.nn import functional

from t5tune.checkpoints.adapter import DECODER_ROWS, PREFIX, read_adapter, saved_name
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.data.tokenizer import load_tokenizer
from t5tune.errors import CheckpointError, ModelError, SettingsError
from t5tune.families import GROUPS, target_modules
from t5tune.model.load import to_torch
from t5tune.settings.lora import LoraSettings

TAKEN_OUT = ("pissa", "olora")  # starts that move a part of each weight from the base into its adapter
EMBEDDINGS = ("encoder.embed_tokens", "decoder.embed_tokens")
HEAD = "lm_head"
AS_BEFORE = "give the conversations themselves, and leave add_tokens at auto: they get its tokens"


def add_lora(
    model: Any, base: Path, settings: LoraSettings, token_ids: list[int], adapter_dtype: torch.dtype
) -> tuple[Any, dict[str, Tensor]]:
    """Wrap a frozen base; the adapters and token rows are its only parameters that train.

    Args:
        base: the folder that the model was loaded from.
        token_ids: rows of the embedding and of the head to train.
        adapter_dtype: of the trained tensors.

    Returns: the PEFT model, and the LoRA matrices that were taken out of the base's weights (PiSSA, OLoRA), in
    fp32 by their saved names; see `weights.adapter.without_start`.

    Raises:
        SettingsError: a name among lora_target_modules or modules_to_save that the model doesn't have.
    """
    targets = _target_modules(model, settings.lora_target_modules)
    start = settings.init_lora_weights
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias=settings.lora_bias,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        init_lora_weights=True if start in {"default", "loftq"} else start,
        modules_to_save=_modules_to_save(model, settings),
        task_type=TaskType.SEQ_2_SEQ_LM,
        trainable_token_indices=_token_indices(model, token_ids) if settings.train_token_rows else None,
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    use_token_rows(peft_model)
    _share_embedding_rows(peft_model)
    if start == "loftq":
        _start_from_quantisation_error(peft_model, base)
    taken_out = {}
    if start.startswith(TAKEN_OUT):
        taken_out = {
            saved_name(name): Tensor("F32", parameter.detach().float().cpu().numpy().copy())
            for name, parameter in peft_model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return peft_model, taken_out


def _target_modules(model: Any, names: list[str]) -> list[str]:
    """The linear layers that names and groups mean, as far as this model has them."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.discard(HEAD)
    unknown = sorted(name for name in names if not linear & set(target_modules([name])))
    if unknown:
        raise SettingsError(
            f"lora_target_modules: {', '.join(unknown)}: no such linear layer in this model",
            hint=f"it has {', '.join(sorted(linear))}, and the groups are {', '.join(GROUPS)}",
        )
    return [name for name in target_modules(names) if name in linear]


def _modules_to_save(model: Any, settings: LoraSettings) -> list[str] | None:
    """PEFT's list of modules to train whole, or None.

    Raises:
        SettingsError: one that isn't there, or that holds 4-bit weights.
    """
    for name in settings.modules_to_save or []:
        found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        if not found:
            raise SettingsError(
                f"modules_to_save: {name}: no such module in this model",
                hint="layer_norm, final_layer_norm and relative_attention_bias are what T5 has beside linear layers",
            )
        if any(type(part).__name__ in {"Linear4bit", "Linear8bitLt"} for module in found for part in module.modules()):
            raise SettingsError(
                f"modules_to_save: {name}: holds quantised weights, which can't be trained",
                hint="train without q_lora, or give it an adapter with lora_target_modules",
            )
    return list(settings.modules_to_save) if settings.modules_to_save else None


def _start_from_quantisation_error(peft_model: Any, base: Path) -> None:
    """Let each B·A start as the best low-rank part of what 4 bits lost of its weight (LoftQ, Li et al. 2023, one step).

    PEFT's own way computes on a GPU alone; this one anywhere.
    """
    import bitsandbytes

    checkpoint = Checkpoint(base)
    for name, module in peft_model.base_model.model.named_modules():
        if not (hasattr(module, "lora_A") and "default" in module.lora_A):
            continue
        quantised = module.base_layer.weight
        kept_OI = bitsandbytes.functional.dequantize_4bit(quantised.data, quantised.quant_state).float()
        lost_OI = to_torch(checkpoint.tensor(f"{name}.weight"), torch.float32).to(kept_OI.device) - kept_OI
        u_OR, s_R, v_RI = torch.linalg.svd(lost_OI, full_matrices=False)
        rank = module.r["default"]
        root_R = (s_R[:rank] / module.scaling["default"]).sqrt()
        module.lora_A["default"].weight.data = (root_R[:, None] * v_RI[:rank]).contiguous()
        module.lora_B["default"].weight.data = (u_OR[:, :rank] * root_R).contiguous()


def start_from(peft_model: Any, folder: Path, tokenizer_folder: Path) -> None:
    """Give the adapters and token rows the values of a saved adapter.

    Args:
        tokenizer_folder: of the tokenizer whose ids this model will see.

    Raises:
        CheckpointError: it holds none, one of another shape, scale or kind, or rows of other tokens.
    """
    config, state = read_adapter(folder)
    here = peft_model.peft_config["default"].to_dict()
    for key, flag in {"r": "lora_r", **{key: key for key in ("lora_alpha", "use_rslora", "use_dora")}}.items():
        then, now = config.get(key, False), here[key]
        if then != now:
            raise CheckpointError(f"adapter: {folder}: {key} {then}, but {flag} {now} here", hint=f"give {flag} {then}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError(f"adapter: {folder}: ranks of their own for some layers, which can't be trained here")
    parameters = {saved_name(name): value for name, value in peft_model.named_parameters() if value.requires_grad}
    tensors = {name: tensor for name, tensor in state.items() if name in parameters or name != DECODER_ROWS}
    for name in sorted(parameters.keys() ^ tensors.keys()):
        has, lacks = ("it holds", "this run doesn't train") if name in tensors else ("this run trains", "it lacks")
        raise CheckpointError(
            f"adapter: {folder}: {has} {name.removeprefix(PREFIX)}, which {lacks}",
            hint="give lora_target_modules, modules_to_save and add_tokens as they were",
        )
    indices = json.loads(json.dumps(here["trainable_token_indices"]))
    if config.get("trainable_token_indices") != indices:
        raise CheckpointError(f"adapter: {folder}: its rows are of other tokens", hint=AS_BEFORE)
    if (folder / "tokenizer_config.json").is_file():
        then, now = (load_tokenizer(place).vocabulary() for place in (folder, tokenizer_folder))
        for token in sorted(then, key=lambda token: -then[token]):
            if now.get(token) != then[token]:
                raise CheckpointError(
                    f"adapter: {folder}: its row {then[token]} is of {token!r}, which the tokenizer here lacks or has "
                    "elsewhere",
                    hint=AS_BEFORE,
                )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, but {list(parameter.shape)} here"
            raise CheckpointError(
                f"adapter: {folder}: {name.removeprefix(PREFIX)}: {shapes}", hint="is it this base's?"
            )
        parameter.data.copy_(to_torch(tensors[name], parameter.dtype))


def load_adapter(model: Any, folder: Path) -> Any:
    """Put the adapter of a folder on a base, for inference.

    Raises:
        ModelError: it doesn't fit this base.
    """
    try:
        return PeftModel.from_pretrained(
            model, str(folder), autocast_adapter_dtype=False, torch_device=_device_of(model)
        ).eval()
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise _misfit(str(folder), error) from error


def load_sum(model: Any, folders: list[Path], weights: list[float]) -> Any:
    """Put the weighted sum of several adapters on a base, for inference: their matrices side by side.

    Raises:
        ModelError: one doesn't fit this base.
    """
    names = [f"part{number}" for number in range(len(folders))]
    options = {"autocast_adapter_dtype": False, "torch_device": _device_of(model)}
    try:
        peft_model = PeftModel.from_pretrained(model, str(folders[0]), names[0], **options)
        for name, folder in zip(names[1:], folders[1:], strict=True):
            peft_model.load_adapter(str(folder), name, **options)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise _misfit(", ".join(map(str, folders)), error) from error
    peft_model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    peft_model.set_adapter("sum")
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["sum"] = 1.0  # each part's scale is in its matrix; PEFT adds rsLoRA's of the sum to it
    return peft_model.eval()


def _device_of(model: Any) -> str:
    """The device of a model's weights. PEFT would read an adapter onto the first GPU, wherever the model is."""
    return str(next(model.parameters()).device)


def _misfit(what: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"adapter: {what}: doesn't fit this base: {reason}", hint="name the base that it was trained on")


def _token_indices(model: Any, token_ids: list[int]) -> Any:
    if not token_ids:
        return None
    if model.config.tie_word_embeddings:
        return list(token_ids)
    return {name: list(token_ids) for name in EMBEDDINGS} | {HEAD: list(reversed(token_ids))}


def use_token_rows(peft_model: Any) -> None:
    """Compute token rows as `TokenRows` does."""
    for module in peft_model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows


def _share_embedding_rows(peft_model: Any) -> None:
    """Let encoder and decoder train the same rows: T5 has one embedding."""
    base = peft_model.base_model.model
    encoder, decoder = base.encoder.embed_tokens, base.decoder.embed_tokens
    if not base.config.tie_word_embeddings and hasattr(encoder, "token_adapter"):
        decoder.token_adapter.trainable_tokens_delta = encoder.token_adapter.trainable_tokens_delta


class TokenRows(TrainableTokensLayer):  # type: ignore[misc]
    """Trained rows of an embedding or of the head, in place of PEFT's own way to compute them.

    PEFT copies the whole matrix in each forward, and reads it outside of the base layer. The copy costs
    vocabulary × width a forward; under ZeRO-3 the matrix isn't there to read. Here the base layer runs as it
    is, and only the trained rows' places in its output are replaced. K is the number of rows.
    """

    def forward_adapters(self, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if output.ndim < 2:  # the head gave losses (see model/loss.py), and has taken the rows into account
            return output
        for name in active_adapters:
            rows_KD, ids_K = self.rows(name, x.device)
            if isinstance(self.base_layer, nn.Embedding):
                is_row_BTK = x.unsqueeze(-1) == ids_K
                replaced_BTD = functional.embedding(is_row_BTK.to(torch.uint8).argmax(-1), rows_KD)
                output = torch.where(is_row_BTK.any(-1, keepdim=True), replaced_BTD.to(output.dtype), output)
            else:
                logits_BTK = functional.linear(x.to(rows_KD.dtype), rows_KD).to(output.dtype)
                output = output.index_copy(-1, ids_K, logits_BTK)
        return output

    def rows(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(the trained rows, their places in the vocabulary)"""
        if self._ids is None or self._ids.device != device:  # copied once: a copy to a GPU waits for it
            self._ids = torch.tensor(self.token_indices[name], device=device)
        return self.trainable_tokens_delta[name], self._ids

    _ids: torch.Tensor | None = None
