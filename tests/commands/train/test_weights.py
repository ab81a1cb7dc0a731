"""The weights that a run loads, quantizes and trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.train import train
from t5tune.settings import QuantizationSettings
from tests.support.caches import find_cache
from tests.support.train_runs import make_settings, read_losses


def test_a_loaded_base_equals_its_file_bit_by_bit(base: Path) -> None:
    from t5tune.model.load import load_base

    file = load_file(base / "model.safetensors")
    model = load_base(base, torch.float32, torch.device("cpu"))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in file.items())
    tied = "lm_head.weight" not in file
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.shared.weight) is tied
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_quantized_base_keeps_other_weights_and_similar_logits(untied_base: Path) -> None:
    from t5tune.model.load import load_base

    file = load_file(untied_base / "model.safetensors")
    plain = load_base(untied_base, torch.float32, torch.device("cpu"))
    quantized = load_base(untied_base, torch.float32, torch.device("cpu"), QuantizationSettings(q_lora=True))
    kept = [name for name, value in quantized.named_parameters() if type(value).__name__ != "Params4bit"]
    assert {"shared.weight", "lm_head.weight"} <= set(kept)
    assert all(torch.equal(quantized.get_parameter(name), file[name]) for name in kept)
    assert sum(type(value).__name__ == "Params4bit" for value in quantized.parameters()) == 36
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    with torch.inference_mode():
        a, b = plain(**inputs).logits, quantized(**inputs).logits
    assert 0 < (a - b).abs().max() < 0.5 * a.abs().max()


@pytest.mark.slow
def test_wo_is_quantized_only_with_quantize_wo() -> None:
    """In bf16, where 4-bit storage of the wrong dtype would silently turn the input of wo into garbage."""
    from t5tune.checkpoints.pocket import pocket_folder
    from t5tune.model.load import load_base

    def load(**changes: Any) -> Any:
        quantization = QuantizationSettings(q_lora=True, **changes) if changes else None
        return load_base(pocket_folder(), torch.bfloat16, torch.device("cpu"), quantization)

    models = {"whole": load(), "wo": load(quantize_wo=True), "no wo": load(quantize_wo=False)}
    kinds = {
        name: {type(value).__name__ for key, value in model.named_parameters() if ".wo." in key}
        for name, model in models.items()
    }
    assert kinds == {"whole": {"Parameter"}, "wo": {"Params4bit"}, "no wo": {"Parameter"}}
    for model in models.values():
        for name in ("shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight"):
            assert model.get_parameter(name).dtype == torch.bfloat16
    torch.manual_seed(0)
    ids = torch.randint(50, 1500, (4, 24))
    with torch.inference_mode():
        logits = {name: model(input_ids=ids, decoder_input_ids=ids).logits.float() for name, model in models.items()}
    off = {name: float((value - logits["whole"]).norm() / logits["whole"].norm()) for name, value in logits.items()}
    assert off["wo"] != off["no wo"]
    assert 0 < off["wo"] < 2 * off["no wo"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_rows_of_added_tokens_in_embedding_and_head_are_trained(
    kind: str, conversations: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"{kind}_base")
    train(make_settings(base, conversations, tmp_path / "run", max_steps=2, save_steps=2))
    file = load_file(base / "model.safetensors")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    manifest = json.loads((find_cache(tmp_path / "run" / "data") / "manifest.json").read_text())
    newline, brace = (manifest["added_token_ids"][manifest["added_tokens"].index(token)] for token in ("\n", "{"))
    rows = {name: value for name, value in weights.items() if "trainable_tokens_delta" in name}
    if kind == "tied":
        indices = {"shared": config["trainable_token_indices"]}
        assert len(rows) == 1
    else:
        indices = config["trainable_token_indices"]
        assert set(indices) == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    for module, ids in indices.items():
        name = "lm_head.weight" if module == "lm_head" else "shared.weight"
        trained = rows[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
        for token in (newline, brace):
            assert not torch.equal(trained[ids.index(token)], file[name][token]), (module, token)


@pytest.mark.slow
def test_q_lora_reduces_the_loss(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    result = train(make_settings(untied_base, conversations, tmp_path / "run", q_lora=True, bf16=False))
    assert read_losses(tmp_path / "run")[-1] < read_losses(tmp_path / "run")[0]
    assert result.total_parameters > 40_000  # 4-bit weights are counted unpacked


@pytest.mark.slow
def test_bf16_keeps_fp32_adapters(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=2, bf16=True))
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    values = torch.cat([value.flatten() for value in weights.values()])
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
