"""Losses of preference pairs and their gradients, compared with whole logits of stock transformers, pair by pair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from t5tune.data.tokens.encoding import PreferencePair
from t5tune.model import loss as loss_module
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import make_collator
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.settings import QuantizationSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.training.objectives import DirectPreferenceObjective, OddsRatioObjective, PreferenceObjective
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gradients import assert_same_gradients, compute_gradients
from tests.support.models.model_types import load_stock, make_checkpoint
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LENGTHS = [(5, 3, 9), (41, 12, 1), (1, 29, 30), (70, 24, 7), (17, 50, 2)]
KINDS = ("t5", "flan-t5", "umt5", "longt5", "t5gemma", "t5gemma2")
BOUND = 5e-6  # some sums of stock transformers are in fp32
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "dpo_beta": 0.3},
    "smoothed": {"objective": "dpo", "dpo_label_smoothing": 0.2},
    "ipo": {"objective": "dpo", "dpo_loss": "ipo", "dpo_beta": 0.02},
    "orpo": {"objective": "orpo", "orpo_lambda": 0.7},
}


def make_pairs(vocabulary: int = 480) -> list[PreferencePair]:
    rng = np.random.default_rng(5)
    pairs = [[rng.integers(3, vocabulary, length) for length in each] for each in LENGTHS]
    return [PreferencePair(*each, reference=(-3.0 - number, -2.0)) for number, each in enumerate(pairs)]


def make_objective(name: str) -> PreferenceObjective:
    settings = make_settings(Path("base"), Path("data"), Path("run"), **OBJECTIVES[name])
    return OddsRatioObjective(settings) if name == "orpo" else DirectPreferenceObjective(settings, None)


def compute_expected(name: str, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Compute the loss of one pair by the papers' formulas, from log-probabilities of (chosen, rejected)."""
    options = OBJECTIVES[name]
    if name == "orpo":  # Hong et al. 2024: odds(y) = P(y) / (1 - P(y)), where P(y) is the geometric mean of its tokens'
        p = torch.exp(policy / lengths)
        odds = p / (1 - p)
        return -torch.log(p[0]) - options["orpo_lambda"] * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    ratio = (policy[0] - reference[0]) - (policy[1] - reference[1])
    if name == "ipo":  # Azar et al. 2023, equation 17
        return (ratio - 1 / (2 * options["dpo_beta"])) ** 2
    beta, smoothing = options.get("dpo_beta", 0.1), options.get("dpo_label_smoothing", 0.0)
    sigmoid = torch.sigmoid(beta * ratio)  # Rafailov et al. 2023, equation 7
    return -(1 - smoothing) * torch.log(sigmoid) - smoothing * torch.log(1 - sigmoid)


def compute_by_pairs(model: Any, start: int, name: str) -> torch.Tensor:
    """Compute the summed loss with a model's own forward, an answer at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in make_pairs():
        sums = []
        for target in map(torch.from_numpy, pair.targets):
            shifted = functional.pad(target[:-1], (1, 0), value=start)[None]
            logits = model(
                input_ids=torch.from_numpy(pair.source_S)[None], decoder_input_ids=shifted, use_cache=False
            ).logits
            sums.append(functional.log_softmax(logits[0], -1).gather(1, target[:, None]).sum())
        reference, lengths = torch.tensor(pair.reference), torch.tensor([len(target) for target in pair.targets])
        total = total + compute_expected(name, torch.stack(sums), reference.double(), lengths)
    return total


def compute_total(model: Any, name: str, is_packed: bool) -> torch.Tensor:
    collator = make_collator(model.architecture.start_token_id, 0, is_packed)
    return make_objective(name).compute_total(model, model.architecture, collator(make_pairs()))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(kind, tmp_path_factory.mktemp("base") / kind)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.variants(
    "t5-dpo",
    "flan-t5-smoothed",
    "flan-t5-dpo",
    "umt5-ipo",
    "longt5-orpo",
    "t5gemma-dpo",
    "t5gemma2-orpo",
    "t5gemma2-smoothed",
)
def test_all_gradients_equal_those_from_stock_logits(
    name: str, kind: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, of full training, so that also the head's gradient is compared: its factors are known only afterward."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 7 * 480)  # several chunks, which end within answers
    stock, ours = load_stock(checkpoint).double(), load_base(checkpoint, torch.float64, CPU)
    ours.requires_grad_(True)
    use_packing(ours)
    total = compute_by_pairs(stock, ours.architecture.start_token_id, name)
    expected = compute_gradients(stock, total)
    skipped = {each for each in expected if ours.architecture.is_skipped(each)}
    expected = {each: value for each, value in expected.items() if each not in skipped}
    for is_packed in (True, False):
        found = compute_total(ours, name, is_packed)
        assert found.item() == pytest.approx(total.item(), rel=BOUND)
        assert_same_gradients(compute_gradients(ours, found), expected, BOUND, floor=1e-6)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.variants("untied-False-None", "untied-True-True", "untied-True-False", "tied-False-True", "tied-True-None")
def test_adapters_and_token_rows_get_whole_logits_gradients(
    reentrant: bool | None, quantizes: bool, base: Path
) -> None:
    """With gradient checkpointing, a quantized base, rows of added tokens, and a norm that is trained in full."""
    torch.manual_seed(0)
    model = load_base(base, torch.float32, CPU, QuantizationSettings(q_lora=quantizes))
    settings = LoraSettings(lora_dropout=0.0, modules_to_save=["final_layer_norm"])
    model, _ = add_lora(model, base, settings, [400, 401, 402], torch.float32)
    for parameter in (value for each, value in model.named_parameters() if "lora_B" in each):
        torch.nn.init.normal_(parameter, std=0.1)
    start = model.architecture.start_token_id
    expected = compute_gradients(model, compute_by_pairs(model, start, "dpo"))
    use_packing(model)
    use_fused_layers(model)
    if reentrant is not None:
        model.enable_input_require_grads()
        enable_checkpointing(model.base_model.model, reentrant)
        model.train()
        for module in model.modules():
            for attribute in ("p", "dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
    found = compute_gradients(model, compute_total(model, "dpo", is_packed=True))
    assert any("trainable_tokens_delta" in each for each in found)
    assert_same_gradients(found, expected, 2e-4, floor=1e-6)


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_source_is_encoded_once_for_both_answers(is_packed: bool, untied_base: Path) -> None:
    model = load_base(untied_base, torch.float32, CPU)
    use_packing(model)
    seen: dict[str, list[int]] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: seen.setdefault(name, []).append(inputs[0].shape[:2].numel())

    key = model.decoder.block[0].layer[1].EncDecAttention.k
    handles = [model.encoder.block[0].layer[1].register_forward_hook(record("encoder"))]
    handles.append(key.register_forward_hook(record("keys")))
    compute_total(model, "dpo", is_packed)
    for handle in handles:
        handle.remove()
    sources = [length for length, *_ in LENGTHS]
    tokens = sum(sources) if is_packed else len(sources) * max(sources)
    assert seen == {"encoder": [tokens], "keys": [tokens if is_packed else 2 * tokens]}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dummy_pairs_add_nothing(name: str, untied_base: Path) -> None:
    model = load_base(untied_base, torch.float64, CPU)
    model.requires_grad_(True)
    use_packing(model)
    nothing = np.array([loss_module.IGNORED_LABEL])
    filler = PreferencePair(np.array([1]), nothing, nothing, reference=(0.0, 0.0))
    for is_packed in (True, False):
        collator = make_collator(0, 0, is_packed)
        batches = [collator(make_pairs()), collator([*make_pairs(), filler]), collator([filler])]
        totals = [make_objective(name).compute_total(model, model.architecture, batch) for batch in batches]
        assert totals[1].item() == pytest.approx(totals[0].item(), rel=1e-12)
        assert totals[2].item() == 0
        assert all(gradient.abs().max() == 0 for gradient in compute_gradients(model, totals[2]).values())


def test_orpo_survives_an_answer_that_is_certain() -> None:
    policy = torch.tensor([[0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    found = make_objective("orpo").compare(policy, torch.ones(1, 2), None)
    found["loss"].sum().backward()
    assert found["loss"].isfinite().all()
    assert policy.grad.isfinite().all()
