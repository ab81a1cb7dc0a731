"""The scores of several targets from one pass of the encoder, compared with the whole logits of stock transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from t5tune.families import FAMILIES
from t5tune.inference.target_scores import Candidates, score_targets, set_up_scoring
from t5tune.model import loss as loss_module
from t5tune.model.batches import PaddedCollator
from t5tune.model.load import load_base
from t5tune.settings import QuantizationSettings
from tests.support.models.model_types import load_stock, make_checkpoint

CPU = torch.device("cpu")
SOURCES, TARGETS = (5, 41, 1, 17), (3, 9, 1)  # lengths
NATS = 2e-5  # for a token; the largest measured differences are 7.1e-6 for LongT5, and 1.5e-6 for the other models


def make_candidates(source: list[int], targets: list[list[int]]) -> Candidates:
    first, *others = map(np.array, targets)
    return Candidates(np.array(source), first, tuple(others))


def make_sources(vocabulary: int = 380) -> list[Candidates]:
    """Make sources with three targets each, one of them the token that the other two begin with."""
    rng = np.random.default_rng(5)

    def make_ids(length: int) -> list[int]:
        return rng.integers(3, vocabulary, length).tolist()

    return [make_candidates(make_ids(length), [[7, *make_ids(each - 1)] for each in TARGETS]) for length in SOURCES]


def compute_expected(model: Any, start: int, example: Candidates) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute a source's scores with a model's forward for whole logits: each target alone, in fp64."""
    found = []
    for target in map(torch.from_numpy, example.targets):
        shifted = functional.pad(target[:-1], (1, 0), value=start)[None]
        inputs = {"input_ids": torch.from_numpy(example.source_S)[None], "decoder_input_ids": shifted}
        with torch.no_grad():
            (logits_TV,) = model(**inputs, use_cache=False).logits.double()
        logprobs_T = functional.log_softmax(logits_TV, -1).gather(1, target[:, None])[:, 0]
        found.append((logprobs_T, logits_TV.argmax(1) == target))
    return found


def assert_scores(model: Any, collator: Any, examples: list[Candidates], stock: Any, bound: float = NATS) -> None:
    passes: list[int] = []
    layers = model.get_encoder().modules()
    block = next(each for each in layers if type(each).__name__.endswith(("Block", "EncoderLayer")))
    hook = block.register_forward_hook(lambda *_: passes.append(1))
    found = score_targets(model, examples, collator)
    hook.remove()
    assert len(passes) == 1
    for example, scores in zip(examples, found, strict=True):
        expected = compute_expected(stock, model.architecture.start_token_id, example)
        for score, (logprobs_T, is_greedy_T) in zip(scores, expected, strict=True):
            assert score.token_logprobs == pytest.approx(logprobs_T.tolist(), abs=bound)
            assert score.logprob == pytest.approx(logprobs_T.sum().item(), abs=2 * bound)
            assert score.is_greedy == bool(is_greedy_T.all())


@pytest.mark.slow
@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.variants("t5", "flan-t5", "mt5", "umt5", "longt5", "t5gemma", "t5gemma2")
def test_scores_equal_stock_transformers_in_fp64(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 7 * 480)  # several chunks, which end within targets
    checkpoint, examples = make_checkpoint(key, tmp_path / "base"), make_sources()
    model, stock = load_base(checkpoint, torch.float32, CPU), load_stock(checkpoint).double()
    assert_scores(model, PaddedCollator(0, model.architecture.start_token_id), examples, stock)
    assert_scores(model, set_up_scoring(model, 0), examples, stock)


@pytest.mark.parametrize(("quant_type", "bound"), [("nf4", NATS), ("int8", 0.05)])
def test_scores_of_a_quantized_base_equal_its_whole_logits(quant_type: str, bound: float, untied_base: Path) -> None:
    """With int8, the columns that aren't quantized are those with a large activation anywhere in the batch."""
    model = load_base(untied_base, torch.float32, CPU, QuantizationSettings(q_lora=True, quant_type=quant_type))
    assert_scores(model, set_up_scoring(model, 0), make_sources(), model, bound)


def test_a_greedy_reply_and_its_beginning_are_greedy(untied_base: Path) -> None:
    model = load_base(untied_base, torch.float32, CPU)
    collator = set_up_scoring(model, 0)
    source = [7, 30, 55, 1]
    reply = model.generate(torch.tensor([source]), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
    other = [*reply[:3], (reply[3] + 1) % 1500, *reply[4:]]
    (scores,) = score_targets(model, [make_candidates(source, [reply, other, reply[:1]])], collator)
    assert [each.is_greedy for each in scores] == [True, False, True]
    assert scores[0].token_logprobs[:3] == pytest.approx(scores[1].token_logprobs[:3], abs=NATS)
