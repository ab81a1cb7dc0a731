"""Mutations of good torch files and shards: the good tensors come out, or a T5TuneError, and nothing else.

`make fuzz` looks at FUZZ_EXAMPLES of each kind; the tests look at a few.
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.torch_format.file import read_torch_file
from t5tune.checkpoints.zero_shards import ZeroState, read_zero
from t5tune.commands.export import export
from t5tune.errors import T5TuneError
from t5tune.settings import ExportSettings
from tests.adversarial import zero_folders
from tests.adversarial.test_export import bounded  # noqa: F401
from tests.adversarial.zips import state_pickle, torch_file

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EDGES = b"\x00\x01\x02\x7f\x80\xfe\xff().}]KMJXcqrhRbQtuaes\x81\x85\x86\x87\x88\x89\x8a"

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(list(EDGES)), st.integers(0, 255)),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[tuple[str, float, int, int]]) -> bytes:
    for kind, place, value, count in changes:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + bytes([value]) * count + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + count :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + count] * 3 + data[at + count :]
        else:
            data = data[:at]
    return data


@pytest.fixture(scope="module")
def good_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield zero_folders.make(Path(folder) / "run") / "global_step4"


def gathered(state: ZeroState) -> dict[str, bytes]:
    return {name: value.tensor().tobytes() for name, value in state.trained.items()}


def spoiled(folder: Path, name: str, data: bytes, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (target / name).write_bytes(data)
    return target


@many
@given(edits, st.sampled_from(["optim", "model"]))
def test_a_shard_with_other_bytes_gives_the_same_weights_or_an_error(
    good_folder: Path,
    tmp_path: Path,
    bounded: None,  # noqa: F811
    changes: Any,
    kind: str,
) -> None:
    expected = gathered(read_zero(good_folder))
    name = f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
    folder = spoiled(good_folder, name, edited((good_folder / name).read_bytes(), changes), tmp_path / "x")
    try:
        found = gathered(read_zero(folder))
    except T5TuneError:
        return
    assert found == expected


@many
@given(edits)
def test_any_pickle_in_a_good_zip_gives_an_object_or_an_error(tmp_path: Path, bounded: None, changes: Any) -> None:  # noqa: F811
    path = tmp_path / "x.bin"
    path.write_bytes(torch_file(edited(state_pickle(), changes)))
    try:
        value = read_torch_file(path)
    except T5TuneError:
        return
    for tensor in value.values() if type(value) is dict else ():
        if isinstance(tensor, Tensor):
            assert len(tensor.tobytes()) <= 8 << 20


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just(()),
    st.lists(st.integers(-5, 5), max_size=3),
    st.tuples(st.integers(-5, 1 << 50), st.integers(-5, 5)),
    st.builds(torch.zeros, st.integers(0, 40)),
    st.builds(torch.arange, st.integers(0, 40)),
)


def replaced(value: Any, path: list[int], leaf: Any) -> Any:
    """The value with what lies at a path of places (each taken modulo the number of children) replaced."""
    if not path or not isinstance(value, dict | list) or not value:
        return leaf
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    value[key] = replaced(value[key], path[1:], leaf)
    return value


@many
@given(st.lists(st.integers(0, 20), min_size=0, max_size=5), leaves, st.sampled_from(["optim", "model"]))
def test_a_state_with_another_value_anywhere_gives_all_weights_or_an_error(
    good_folder: Path,
    tmp_path: Path,
    bounded: None,  # noqa: F811
    path: list[int],
    leaf: Any,
    kind: str,
) -> None:
    name = f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
    if kind == "model":
        name = name.replace("rank_1", "rank_0")
    state = replaced(copy.deepcopy(torch.load(good_folder / name, weights_only=True)), path, leaf)
    folder = spoiled(good_folder.parent, f"global_step4/{name}", b"", tmp_path / "x")
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
