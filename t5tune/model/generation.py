"""Text generation: greedy decoding, beam search or sampling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from t5tune.compat.transformers_patches import size_cache_by_decoder
from t5tune.errors import ModelError
from t5tune.file_names import GENERATION_CONFIG_FILE
from t5tune.io.reasons import describe_error


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedily, by beam search, or by nucleus sampling if the temperature is above 0."""

    eos_token_id: int
    pad_token_id: int
    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


class RandomStream:
    """Random numbers from a seed, for blocks that leave torch's global generators as they were.

    Each block continues where the one before has ended.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make what is sampled on the device in the block come from this stream."""
        shared = _find_global_generator(self._generator.device)
        before = shared.get_state()
        shared.set_state(self._generator.get_state())
        try:
            yield
        finally:
            self._generator.set_state(shared.get_state())
            shared.set_state(before)


def _find_global_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    found: torch.Generator = torch.get_device_module(device).default_generators[device.index]
    return found


def generate(
    model: Any,
    sources: list[list[int]],
    decoding: Decoding,
    synced_gpus: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate a reply to each source of one batch; the ids are returned without the token that ended it.

    Sampling uses torch's global random generator.

    Args:
        sources: ids of different lengths, each with its special tokens.
        synced_gpus: continue until every rank is done. ZeRO-3 needs this, because each forward gathers weights from
            all ranks.
        on_token: called with each new id, including the one that ends the reply; only for a single source and
            without beams.
    """
    device = next(model.parameters()).device
    width = max(map(len, sources))
    input_ids_BS = torch.tensor([[*source, *[decoding.pad_token_id] * (width - len(source))] for source in sources])
    lengths_B = torch.tensor([[len(source)] for source in sources])
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    stop_ids = _find_stop_ids(model, decoding)
    with torch.no_grad(), size_cache_by_decoder(model), _explain_config_errors():
        output_BT = model.generate(
            input_ids=input_ids_BS.to(device),
            attention_mask=(torch.arange(width) < lengths_B).long().to(device),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            eos_token_id=stop_ids,
            pad_token_id=decoding.pad_token_id,
            synced_gpus=synced_gpus,
            streamer=_Streamer(on_token) if on_token else None,
            return_dict_in_generate=False,
            **sampling,
        )
    replies = [row[1:] for row in output_BT.tolist()]  # the first id is the decoder's start token
    return [list(takewhile(lambda token: token not in stop_ids, ids)) for ids in replies]


@contextmanager
def _explain_config_errors() -> Iterator[None]:
    """Turn what `generate` says about settings that it can't follow into an error that names their file.

    Raises:
        ModelError: transformers refuses a setting.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        problem = f"the model's {GENERATION_CONFIG_FILE}: transformers can't generate with it: {describe_error(error)}"
        raise ModelError(problem, hint="correct it, or remove it") from error


def _find_stop_ids(model: Any, decoding: Decoding) -> list[int]:
    """Find the tokens that end a reply: the EOS token, and those that generation_config.json lists.

    Instruction-tuned models list the end of a turn there.
    """
    listed = model.generation_config.eos_token_id
    others = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return list(dict.fromkeys([decoding.eos_token_id, *others]))


class _Streamer:
    """Streamer of transformers' `generate`, which passes on each new id except the decoder's start token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._started = False

    def put(self, ids: torch.Tensor) -> None:
        if self._started:
            self._on_token(int(ids.item()))
        self._started = True

    def end(self) -> None:
        pass
