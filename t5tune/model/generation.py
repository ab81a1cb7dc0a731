"""Replies of a model: greedy, by beam search, or sampled from a seed."""

from collections.abc import Callable
from typing import Any

import torch


def generate(
    model: Any,
    sources: list[list[int]],
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    synced_gpus: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The reply to each source of one batch, without its end token.

    Args:
        sources: ids with their end token, of any lengths.
        temperature: 0 takes the likeliest token (or beam) each time.
        synced_gpus: go on until every rank is done, as ZeRO-3 needs: each forward gathers from all of them.
        on_token: called with each new id of the reply to a single source (no beams), its end token included.
    """
    device = next(model.parameters()).device
    width = max(map(len, sources))
    input_ids_BS = torch.tensor([[*source, *[pad_token_id] * (width - len(source))] for source in sources])
    lengths_B = torch.tensor([[len(source)] for source in sources])
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.no_grad():
        output_BT = model.generate(
            input_ids=input_ids_BS.to(device),
            attention_mask=(torch.arange(width) < lengths_B).long().to(device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            synced_gpus=synced_gpus,
            streamer=_Streamer(on_token) if on_token else None,
            **sampling,
        )
    # the first is the decoder's start token
    return [_until(row[1:], eos_token_id) for row in output_BT.tolist()]


class _Streamer:
    """What `generate` hands each step's ids to, the decoder's start token first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._started = False

    def put(self, ids: torch.Tensor) -> None:
        if self._started:
            self._on_token(int(ids.item()))
        self._started = True

    def end(self) -> None:
        pass


def _until(ids: list[int], eos_token_id: int) -> list[int]:
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids
