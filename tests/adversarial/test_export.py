"""Export refuses each untrusted file by its name, runs none of its code, and uses little memory."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.commands.export import export
from t5tune.errors import CheckpointError
from t5tune.runs.checkpoints import write_manifest
from t5tune.settings import ExportSettings
from tests.adversarial import zero_folders
from tests.adversarial.zips import hostile_pickles, hostile_zips, torch_file
from tests.support.processes.command_line import t5tune


def assert_refused(folder: Path, data: bytes, expected: str) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=f"(?s)pytorch_model.*({expected})") as caught:
        Checkpoint(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500 + len(str(path))
    assert sorted(os.listdir(folder)) == before


def test_the_unchanged_torch_file_is_valid(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(torch_file())
    assert Checkpoint(tmp_path).get_tensor("w").array.tolist() == [[0, 1, 2], [3, 4, 5]]
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert state["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


ZIPS, PICKLES = hostile_zips(), hostile_pickles()


@pytest.mark.parametrize("name", ZIPS)
def test_a_crafted_zip_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    assert_refused(tmp_path, *ZIPS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    assert_refused(tmp_path, *PICKLES[name])


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_other_kinds_of_files_are_refused_without_waiting(tmp_path: Path, bounded: None, kind: str) -> None:
    from t5tune.checkpoints.tensor_files.torch_file import read_torch_file

    path = tmp_path / "x.bin"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_file(path)


# folders of DeepSpeed's ranks


def run_export(folder: Path, output: Path, **changes: Any) -> Any:
    return export(ExportSettings(checkpoint=folder, output_dir=output, **changes))


def assert_exported(adapter: Path) -> None:
    """Compare an exported adapter with the tensors in the shards."""
    state = load_file(adapter / "adapter_model.safetensors")
    assert sorted(state) == sorted(zero_folders.values())
    assert all(torch.equal(state[name], value) for name, value in zero_folders.values().items())


@pytest.mark.parametrize("kind", [1, 2, 3, "universal"])
def test_the_unchanged_folders_of_shards_are_valid(tmp_path: Path, kind: Any) -> None:
    run = tmp_path / "run"
    folder = zero_folders.universal(run) if kind == "universal" else zero_folders.make(run, kind)
    result = run_export(folder, tmp_path / "adapter")
    assert_exported(tmp_path / "adapter")
    assert (result.step, result.world_size) == (4, 2)


def test_the_padding_between_aligned_parameters_is_left_out(tmp_path: Path) -> None:
    run_export(zero_folders.make(tmp_path / "run", stage=2, padding=3), tmp_path / "adapter")
    assert_exported(tmp_path / "adapter")


def assert_export_refused(folder: Path, tmp_path: Path, expected: str) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=f"(?s)({expected})") as caught:
        run_export(folder, tmp_path / "adapter")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", zero_folders.FOLDERS)
def test_a_bad_folder_of_shards_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    spoil, expected = zero_folders.FOLDERS[name]
    folder = zero_folders.make(tmp_path / "run")
    spoil(folder)
    assert_export_refused(folder, tmp_path, expected)


@pytest.mark.parametrize("name", zero_folders.UNIVERSALS)
def test_a_bad_universal_checkpoint_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    spoil, expected = zero_folders.UNIVERSALS[name]
    folder = zero_folders.universal(tmp_path / "run")
    spoil(folder)
    assert_export_refused(folder, tmp_path, expected)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An exported adapter, to be exported again."""
    run_export(zero_folders.make(tmp_path / "made"), tmp_path / "good")
    return tmp_path / "good"


def test_a_pipe_named_trainer_state_is_ignored(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(adapter / "trainer_state.json")
    assert run_export(adapter, tmp_path / "adapter").step is None


def test_a_pipe_named_like_a_tokenizer_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(adapter / "added_tokens.json")
    (adapter / "tokenizer_config.json").write_text("{}")
    assert_export_refused(adapter, tmp_path, "added_tokens.json: not a regular file")


def test_a_tokenizer_that_requires_custom_code_is_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    assert_export_refused(adapter, tmp_path, "auto_map: requires custom code")


def test_a_checkpoint_with_a_pipe_as_manifest_is_skipped(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_manifest(Path(shutil.copytree(adapter, run / "checkpoint-1")), 1, 1, {})
    (run / "checkpoint-2").mkdir()
    os.mkfifo(run / "checkpoint-2" / "t5tune_manifest.json")
    assert run_export(run, tmp_path / "adapter").step == 1


def test_a_tokenizer_that_links_outside_is_refused(adapter: Path, tmp_path: Path) -> None:
    """Export copies the run's tokenizer: a linked secret would be published along with the adapter."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("{}")
    shutil.copytree(adapter, run / "checkpoint-1")
    (run / "tokenizer_config.json").write_text("{}")
    (run / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert_export_refused(run / "checkpoint-1", tmp_path, "tokenizer.json: a link to")


@pytest.mark.slow
def test_the_command_line_shows_a_refusal_in_one_line(tmp_path: Path) -> None:
    folder = zero_folders.make(tmp_path / "run")
    zero_folders.shard(folder, 1).write_bytes(PICKLES["refers to os system"][0])
    done = t5tune("export", folder, "--output-dir", tmp_path / "adapter")
    assert done.code == 2
    (error,) = done.stderr.splitlines()
    assert "os.system" in error
    assert os.listdir(tmp_path) == ["run"]


def test_a_link_within_the_hub_cache_is_followed(tmp_path: Path) -> None:
    """models--x/snapshots/REVISION/file -> ../../blobs/HASH is how huggingface_hub caches an adapter."""
    run_export(zero_folders.make(tmp_path / "run"), tmp_path / "adapter")
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "abc"
    (tmp_path / "models--me--adapter" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate((tmp_path / "adapter").iterdir()):
        path.rename(tmp_path / "models--me--adapter" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    run_export(snapshot, tmp_path / "again")
    assert_exported(tmp_path / "again")
