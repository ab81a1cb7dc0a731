"""Fuzz tests: mutated torch files and shards give the original tensors or a T5TuneError.

`make fuzz` tries FUZZ_EXAMPLES of each kind; the normal tests try a few.
"""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.checkpoints.tensor_files.torch_file import read_torch_file
from t5tune.checkpoints.zero.shards import ZeroState, read_zero
from t5tune.commands.export import export
from t5tune.errors import T5TuneError
from t5tune.settings import ExportSettings
from tests.adversarial import zero_folders
from tests.adversarial.edits import apply_edits, edits, many
from tests.adversarial.zips import state_pickle, torch_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield zero_folders.make(Path(folder) / "run") / "global_step4"


def tensor_bytes(state: ZeroState) -> dict[str, bytes]:
    return {name: value.to_tensor().tobytes() for name, value in state.trained.items()}


def copy_with_file(folder: Path, name: str, data: bytes, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (target / name).write_bytes(data)
    return target


@many
@given(edits, st.sampled_from(["optim", "model"]))
def test_a_changed_shard_gives_the_same_weights_or_an_error(
    good_folder: Path, tmp_path: Path, bounded: None, changes: Any, kind: str
) -> None:
    expected = tensor_bytes(read_zero(good_folder))
    name = f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
    folder = copy_with_file(good_folder, name, apply_edits((good_folder / name).read_bytes(), changes), tmp_path / "x")
    try:
        found = tensor_bytes(read_zero(folder))
    except T5TuneError:
        return
    assert found == expected


@many
@given(edits)
def test_any_pickle_is_read_or_refused(tmp_path: Path, bounded: None, changes: Any) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(torch_file(apply_edits(state_pickle(), changes)))
    try:
        value = read_torch_file(path)
    except T5TuneError:
        return
    for tensor in value.values() if type(value) is dict else ():
        if isinstance(tensor, Tensor):
            assert len(tensor.tobytes()) <= 8 << 20


leaves = (
    (st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5))
    | (st.builds(list) | st.builds(dict) | st.builds(tuple) | st.lists(st.integers(-5, 5), max_size=3))
    | st.tuples(st.integers(-5, 1 << 50), st.integers(-5, 5))
    | (st.builds(torch.zeros, st.integers(0, 40)) | st.builds(torch.arange, st.integers(0, 40)))
)


def replace_at(value: Any, path: list[int], leaf: Any) -> Any:
    """Replace the value at a path in nested containers. Each index is taken modulo the number of children."""
    if not path or not isinstance(value, dict | list) or not value:
        return leaf
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    value[key] = replace_at(value[key], path[1:], leaf)
    return value


@many
@given(st.lists(st.integers(0, 20), min_size=0, max_size=5), leaves, st.sampled_from(["optim", "model"]))
def test_a_changed_state_gives_all_weights_or_an_error(
    good_folder: Path, tmp_path: Path, bounded: None, path: list[int], leaf: Any, kind: str
) -> None:
    name = f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
    if kind == "model":
        name = name.replace("rank_1", "rank_0")
    state = replace_at(copy.deepcopy(torch.load(good_folder / name, weights_only=True)), path, leaf)
    folder = copy_with_file(good_folder.parent, f"global_step4/{name}", b"", tmp_path / "x")
    torch.save(state, folder / "global_step4" / name)
    out = tmp_path / "adapter"
    shutil.rmtree(out, ignore_errors=True)
    try:
        export(ExportSettings(checkpoint=folder, output_dir=out, non_lora_state="trained"))
    except T5TuneError:
        assert not out.exists()
        return
    expected = {key: tuple(value.shape) for key, value in zero_folders.values().items()}
    assert {key: tuple(value.shape) for key, value in load_file(out / "adapter_model.safetensors").items()} == expected
