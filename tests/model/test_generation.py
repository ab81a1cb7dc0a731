"""What ends a reply."""

from pathlib import Path

import torch

from t5tune.model.generation import Decoding, generate
from t5tune.model.load import load_base
from tests.support.bases import make_base


def test_every_token_that_generation_config_lists_ends_a_reply(tmp_path: Path) -> None:
    """Gemma's instruction-tuned models list the end of a turn next to the EOS token."""
    model = load_base(make_base(tmp_path, tied=False), torch.float32, torch.device("cpu"))
    decoding, sources = Decoding(1, 0, 12), [[40, 50, 60, 1], [70, 1]]
    whole = generate(model, sources, decoding)
    assert len(whole[0]) == 12
    ending = whole[0][3]
    model.generation_config.eos_token_id = [1, ending]
    shown: list[int] = []
    for source, reply in zip(sources, whole, strict=True):
        expected = reply[: reply.index(ending)] if ending in reply else reply
        assert generate(model, [source], decoding) == [expected]
    generate(model, sources[:1], decoding, on_token=shown.append)
    assert shown == whole[0][: whole[0].index(ending) + 1]
