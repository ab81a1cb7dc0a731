"""The replies of `generate`, with the settings of a model's files."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.inference.generation import Decoding, Sampling, generate, make_random_generator
from t5tune.model.load import load_base
from tests.support.models.bases import make_base
from tests.support.models.model_types import load_stock
from tests.support.notes import Notes


def load(folder: Path, **options: Any) -> Any:
    return load_base(folder, torch.float32, torch.device("cpu"), **options)


def test_every_token_that_generation_config_lists_ends_a_reply(tmp_path: Path) -> None:
    """Gemma's instruction-tuned models list the end of a turn next to the EOS token."""
    model = load(make_base(tmp_path, tied=False))
    decoding, sources = Decoding(1, 0, 12), [[40, 50, 60, 1], [70, 1]]
    whole = generate(model, sources, decoding)
    assert len(whole[0]) == 12
    ending = whole[0][3]
    model.generation_config.eos_token_id = [1, ending]
    shown: list[int] = []
    for source, reply in zip(sources, whole, strict=True):
        expected = reply[: reply.index(ending)] if ending in reply else reply
        assert generate(model, [source], decoding) == [expected]
    generate(model, sources[:1], decoding, on_token=lambda row, token: shown.append(token))
    assert shown == whole[0][: whole[0].index(ending) + 1]


def test_each_reply_of_a_batch_can_be_ended_separately(tmp_path: Path) -> None:
    model = load(make_base(tmp_path, tied=False))
    decoding, sources = Decoding(1, 0, 12), [[40, 50, 60, 1], [70, 1], [80, 90, 1]]
    whole = generate(model, sources, decoding)
    limits = [3, 12, 5]
    shown: list[list[int]] = [[], [], []]

    def follow(row: int, token: int) -> bool:
        shown[row].append(token)
        return len(shown[row]) == limits[row]

    replies = generate(model, sources, decoding, on_token=follow)
    assert replies == shown == [reply[:limit] for reply, limit in zip(whole, limits, strict=True)]


def test_a_sampled_reply_equals_transformers_reply_in_any_batch(tmp_path: Path) -> None:
    folder = make_base(tmp_path, tied=False)
    model, stock = load(folder), load_stock(folder)
    sources, decoding = [[40, 50, 60, 1], [70, 1]], Decoding(1, 0, 12)

    def draw(seed: int, temperature: float = 1.5, top_p: float = 0.9) -> Sampling:
        return Sampling(temperature, top_p, make_random_generator(seed, torch.device("cpu")))

    torch.manual_seed(3)
    expected = stock.generate(
        torch.tensor(sources[:1]), max_new_tokens=12, do_sample=True, temperature=1.5, top_p=0.9, top_k=0
    )
    assert expected[0].tolist()[1:] == generate(model, sources[:1], decoding, samplings=[draw(3)])[0]
    greedy = generate(model, sources, decoding)
    (first, second) = generate(model, sources, decoding, samplings=[draw(3), draw(4, 0.7, 1.0)])
    assert first == expected[0].tolist()[1:]
    assert second == generate(model, sources[1:], decoding, samplings=[draw(4, 0.7, 1.0)])[0]
    assert generate(model, sources, decoding, samplings=[draw(3), None]) == [first, greedy[1]]
    assert first != greedy[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1)])
def test_encoders_and_decoders_of_different_depth_generate_with_a_cache(
    encoder: int, decoder: int, num_beams: int, tmp_path: Path
) -> None:
    """transformers makes a cache with as many layers as the encoder has, which fails if the decoder has more."""
    folder = make_base(tmp_path, tied=False, num_layers=encoder, num_decoder_layers=decoder)
    model, stock = load(folder), load_stock(folder)
    sources = [[40, 50, 60, 1], [70, 1]]
    expected = [
        stock.generate(torch.tensor([source]), max_new_tokens=8, num_beams=num_beams, use_cache=False)[0].tolist()[1:]
        for source in sources
    ]
    found = [generate(model, [source], Decoding(1, 0, 8, num_beams=num_beams))[0] for source in sources]
    assert found == [[*takewhile(lambda token: token != 1, ids)] for ids in expected]
    assert model.config.num_layers == encoder


def test_a_different_start_token_than_in_training_is_reported(tmp_path: Path) -> None:
    folder = make_base(tmp_path, tied=False)
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 7}')
    notes = Notes()
    model = load(folder, report=notes)
    assert model.generation_config.decoder_start_token_id == 0
    (note,) = notes
    assert "decoder_start_token_id is 7 here and 0 in config.json; using 0, as in training" in note


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    "config",
    [{"return_dict_in_generate": True}, {"output_scores": True}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=repr,
)
def test_settings_of_the_output_format_change_nothing(config: dict[str, int], num_beams: int, tmp_path: Path) -> None:
    folder = make_base(tmp_path, tied=False)
    sources, decoding = [[40, 1], [50, 41, 1]], Decoding(1, 0, 4, num_beams)
    expected = generate(load(folder), sources, decoding)
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert generate(load(folder), sources, decoding) == expected
