"""A config.json or tokenizer_config.json that someone has edited: one line that names the file and the key."""

import copy
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.errors import T5TuneError
from t5tune.model.load import load_base
from tests.support.models.bases import make_base
from tests.support.models.model_types import make_checkpoint

pytestmark = pytest.mark.slow

NO_VALUE = object()
WRONG_VALUES: tuple[Any, ...] = (NO_VALUE, None, "x", -1, 0, [3], {}, 1.5)
KEYS = {
    "t5": (
        "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "vocab_size", "feed_forward_proj",
        "decoder_start_token_id", "eos_token_id", "pad_token_id", "is_decoder", "is_encoder_decoder", "dense_act_fn",
        "relative_attention_num_buckets", "layer_norm_epsilon", "model_type", "tie_word_embeddings", "torch_dtype",
    ),
    "t5gemma2": (
        "encoder", "decoder", "decoder.head_dim", "decoder.hidden_size", "decoder.bos_token_id", "decoder.layer_types",
        "decoder.rope_parameters", "decoder.num_key_value_heads", "encoder.text_config",
        "encoder.text_config.vocab_size", "encoder.text_config.sliding_window",
        "encoder.text_config.num_hidden_layers", "eoi_token_index",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    return {"t5": make_base(folder / "t5", tied=False), "t5gemma2": make_checkpoint("t5gemma2", folder / "t5gemma2")}


def link_without_config(folder: Path, target: Path) -> Any:
    """Link the files of a checkpoint except config.json, and return its config."""
    for file in folder.iterdir():
        if file.name != "config.json":
            os.link(file, target / file.name)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_a_wrong_value_loads_or_is_refused_in_a_line(
    kind: str, key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = link_without_config(folders[kind], tmp_path)
    for value in WRONG_VALUES:
        changed = copy.deepcopy(config)
        *path, last = key.split(".")
        part = changed
        for name in path:
            part = part[name]
        if value is NO_VALUE:
            part.pop(last, None)
        else:
            part[last] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with suppress(T5TuneError):
            model = load_base(tmp_path, torch.float32, torch.device("cpu"))
            assert isinstance(model.architecture.start_token_id, int)
            continue
        with pytest.raises(T5TuneError, match=rf"config\.json: |{tmp_path}: ") as refused:
            load_base(tmp_path, torch.float32, torch.device("cpu"))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model_type", ["umt5", "mt5", "longt5", "t5gemma", ["t5"], {}, 5])
def test_the_config_of_another_architecture_is_refused(
    model_type: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = link_without_config(folders["t5gemma2"], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(T5TuneError, match=r"config\.json|no such tensor|missing from the weights"):
        load_base(tmp_path, torch.float32, torch.device("cpu"))
