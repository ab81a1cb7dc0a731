"""An adapter's tensors are checked against its config and its base."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import T5ForConditionalGeneration

from t5tune.checkpoints.adapter_shapes import check_adapter_shapes
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import CheckpointError

pytestmark = pytest.mark.slow

Q = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
NORM = "base_model.model.decoder.final_layer_norm.weight"
TOKENS = "base_model.model.shared.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def all_kinds(untied_base: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter with every kind of tensor that stock PEFT can save, and its config."""
    base = T5ForConditionalGeneration.from_pretrained(untied_base)
    config = LoraConfig(
        r=4,
        target_modules=["q", "v"],
        use_dora=True,
        modules_to_save=["final_layer_norm"],
        trainable_token_indices={"shared": [3, 5]},
        rank_pattern={"encoder.block.1.layer.0.SelfAttention.v": 2},
    )
    state = get_peft_model_state_dict(get_peft_model(base, config), save_embedding_layers=False)
    return {name: Tensor("F32", value.detach().numpy()) for name, value in state.items()}, config.to_dict()


def test_an_adapter_with_all_kinds_of_tensors_fits_its_base(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]], untied_base: Path, tmp_path: Path
) -> None:
    state, config = all_kinds
    assert {NORM, TOKENS, f"{Q}.lora_magnitude_vector"} < state.keys()
    check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        (Q.replace("q", "v").replace("block.0", "block.1") + ".lora_A.weight", slice(1), "rank 1, but .* says r 2"),
        (f"{Q}.lora_A.weight", (slice(None), slice(31)), r"the base's weight is \[32, 32\], B·A is \[32, 31\]"),
        (f"{Q}.lora_magnitude_vector", slice(31), r"shape \[31\]; expected \[32\] for this base"),
        (NORM, slice(31), r"shape \[31\]; expected \[32\] for this base"),
        (TOKENS, (slice(None), slice(31)), r"shape \[2, 31\]; expected \[2, 32\] for this base"),
        (TOKENS, slice(1), r"\[1, 32\], but .* lists \[2\] trained rows"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_its_name(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]],
    untied_base: Path,
    tmp_path: Path,
    name: str,
    cut: Any,
    expected: str,
) -> None:
    state, config = all_kinds
    state = {**state, name: Tensor("F32", state[name].array[cut])}
    with pytest.raises(CheckpointError, match=expected):
        check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)


def test_a_weight_that_t5_lacks_is_refused(
    all_kinds: tuple[dict[str, Tensor], dict[str, Any]], untied_base: Path, tmp_path: Path
) -> None:
    state, config = all_kinds
    state = {**state, "base_model.model.pooler.weight": state[NORM]}
    with pytest.raises(CheckpointError, match=r"pooler.weight: shape \[32\]; the base has no such weight"):
        check_adapter_shapes(state, config, open_base(untied_base).architecture, tmp_path)
