"""Fuzz tests: headers, indexes, configs, `latest` and templates of any content are read or refused by a T5TuneError.

`make fuzz` tries FUZZ_EXAMPLES of each kind; the normal tests try a few.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5tune.checkpoints.adapter_config import check_foldable, read_adapter_config, resolve_pattern
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile, build_header
from t5tune.checkpoints.tensor_files.tensors import NUMPY_DTYPES
from t5tune.checkpoints.zero.shards import find_deepspeed_folder
from t5tune.errors import T5TuneError
from t5tune.file_names import ADAPTER_CONFIG_FILE
from t5tune.io.yaml_file import read_yaml
from tests.adversarial.edits import apply_edits, edits, many
from tests.adversarial.model_folders import with_header

pytestmark = pytest.mark.slow

MODULE = "encoder.block.0.layer.0.SelfAttention.q"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F99", 3]),
        "shape": st.lists(st.integers(-2, 5) | json_values, max_size=3),
        "data_offsets": st.lists(st.integers(-4, 40) | json_values, max_size=3),
    }
)
FILE = "model-1.safetensors"
file_names = st.text(max_size=12) | st.sampled_from([FILE, f"../{FILE}", "/etc/passwd", FILE.upper(), f"{FILE}\0", "."])
CONFIG_KEYS = """r lora_alpha rank_pattern alpha_pattern target_modules modules_to_save use_dora auto_map
    trainable_token_indices base_model_name_or_path bias init_lora_weights lora_bias"""
near_configs = st.dictionaries(
    st.sampled_from(CONFIG_KEYS.split()),
    json_values
    | st.lists(st.sampled_from(["q", "v", "lm_head", ""]), max_size=3)
    | st.dictionaries(st.text(st.sampled_from(".*+?|()[]{}^$\\q1a"), max_size=14), st.integers(1, 9), max_size=3),
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write_good_shard(path: Path) -> bytes:
    """Write a valid shard with two tensors of 32 bytes in total."""
    data = bytes(range(32))
    path.write_bytes(build_header({"a": ("F32", (2, 3)), "b": ("BF16", (4,))}, {"format": "pt"}) + data)
    return path.read_bytes()


def read_or_refuse(read: Callable[[], Any], named: str) -> Any:
    """Return the result of `read`, or None if it was refused with an error that contains `named`."""
    try:
        return read()
    except T5TuneError as error:
        message = error.message
    assert named in message
    return None


def size_of(file: SafetensorsFile) -> int:
    return sum(file.get_tensor(name).array.nbytes for name in file.entries)


@many
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "c"]), near_entries | json_values, max_size=4),
    st.binary(max_size=40),
)
def test_any_header_is_read_or_refused(folder: Path, header: object, data: bytes) -> None:
    path = folder / "fuzzed.safetensors"
    with_header(path, json.dumps(header).encode(), data)
    file = read_or_refuse(lambda: SafetensorsFile(path), "fuzzed.safetensors")
    assert file is None or size_of(file) == len(data)


@many
@given(edits)
def test_a_changed_safetensors_file_is_read_or_refused(folder: Path, bounded: None, changes: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(apply_edits(write_good_shard(path), changes))
    checkpoint = read_or_refuse(lambda: Checkpoint(folder), folder.name)
    if checkpoint is None:
        return
    (file,) = checkpoint.files
    assert size_of(file) == path.stat().st_size - file.data_begin
    for name in checkpoint.list_names():
        dtype, shape = checkpoint.get_dtype_and_shape(name)
        assert checkpoint.get_tensor(name).array.nbytes == math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


@many
@given(
    json_values
    | st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from(["a", "b", "c"]), file_names | json_values, max_size=3)}
    )
)
def test_any_index_is_read_or_refused(folder: Path, index: Any) -> None:
    inner = folder / "base"
    inner.mkdir(exist_ok=True)
    for path in (inner, folder):
        write_good_shard(path / FILE)
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = read_or_refuse(lambda: Checkpoint(inner), "base")
    if checkpoint is not None:
        assert [path for path, _ in checkpoint.shards] == [inner / FILE]
        assert set(index["weight_map"]) <= set(checkpoint.list_names())


@many
@given(near_configs | json_values)
def test_any_adapter_config_is_read_or_refused(folder: Path, values: Any) -> None:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(good | values if isinstance(values, dict) else values))
    config = read_or_refuse(lambda: read_adapter_config(folder), ADAPTER_CONFIG_FILE)
    if config is None:
        return
    read_or_refuse(lambda: check_foldable(config, folder), ADAPTER_CONFIG_FILE)
    assert resolve_pattern(config.get("rank_pattern"), MODULE, config["r"]) >= 1
    assert isinstance(resolve_pattern(config.get("alpha_pattern"), MODULE, config["lora_alpha"]), float)


@many
@given(st.binary(max_size=40) | st.text(max_size=12).map(str.encode) | st.sampled_from([b"step1", b"step1/", b"../x"]))
def test_any_latest_file_is_read_or_refused(folder: Path, content: bytes) -> None:
    for path in (folder / "run" / "step1", folder / "x"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        (path / "mp_rank_00_model_states.pt").touch()
    (folder / "run" / "latest").write_bytes(content)
    found = read_or_refuse(lambda: find_deepspeed_folder(folder / "run"), "run")
    if found is not None:
        assert found == folder / "run" / "step1"
        assert content.strip() == b"step1"


@many
@given(
    st.text(max_size=40)
    | st.lists(
        st.sampled_from(["a", ":", " ", "\n", "[", "]", "{", "}", "&x", "*x", "!!set", "?", "-", "0", "1", "~"])
    ).map("".join)
)
def test_any_conversation_template_is_read_or_refused(folder: Path, text: str) -> None:
    path = folder / "template.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    values = read_or_refuse(lambda: read_yaml(path), "template.yaml")
    assert values is None or isinstance(values, dict)
