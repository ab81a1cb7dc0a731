"""Replies of a model: greedy, or sampled from a seed."""

from typing import Any

import torch


def generate_reply(
    model: Any,
    source_ids: list[int],
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[int]:
    """The reply's ids to one source (end token not included in either).

    Args:
        temperature: 0 takes the likeliest token each time.
    """
    device = next(model.parameters()).device
    input_ids = torch.tensor([[*source_ids, eos_token_id]], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            num_beams=1,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **sampling,
        )
    reply: list[int] = output[0].tolist()[1:]  # without the decoder's start token
    return reply[: reply.index(eos_token_id)] if eos_token_id in reply else reply
