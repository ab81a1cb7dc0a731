"""merge on files of a stranger's making: refused by name, with nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5tune.cli import run
from t5tune.errors import CheckpointError
from t5tune.merge import merge
from t5tune.settings import MergeSettings
from t5tune.weights.streaming import Checkpoint, SafetensorsFile

from .hostile.safetensors_files import CASES, with_header
from .test_merge import stock_adapter


@pytest.fixture(scope="module")
def adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_adapter(untied_base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_each_hostile_folder_is_refused_by_the_files_name(
    untied_base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    breaks, named = CASES[case]
    base, ours = shutil.copytree(untied_base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    breaks(base, ours)
    out = tmp_path / "out"
    code = run(["merge", "--model-name-or-path", str(base), "--adapter", str(ours), "--output-dir", str(out)])
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2, errors
    assert len(errors) == 1
    assert named in errors[0]
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_hubs_own_links_are_followed(untied_base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(untied_base.iterdir())):
        shutil.copy(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"blob{number}")
    merge(MergeSettings(model_name_or_path=str(snapshot), adapter=adapter, output_dir=tmp_path / "out", verify=False))
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (untied_base / "tokenizer.json").read_bytes()


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


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "c"]), near_entries | json_values, max_size=4),
    st.binary(max_size=40),
)
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    with_header(path, json.dumps(header).encode(), data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        refused = error.message
    else:
        refused = None
    if refused is not None:
        assert "fuzzed.safetensors" in refused
        return
    assert sum(file.tensor(name).nbytes for name in file.entries) == len(data)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    json_values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=4), json_values, max_size=3)})
)
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, index: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="fuzzed-index"):
        Checkpoint(folder)
