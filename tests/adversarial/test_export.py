"""Files of strangers: each of the corpus is refused by name, runs nothing, and takes no memory to speak of."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.commands.export import export
from t5tune.errors import CheckpointError
from t5tune.settings import ExportSettings
from t5tune.training.checkpoint import seal
from tests.adversarial import zero_folders
from tests.adversarial.zips import hostile_pickles, hostile_zips, torch_file
from tests.conftest import t5tune

MEMORY = 384 << 20


@pytest.fixture
def bounded() -> Iterator[None]:
    """No more memory than this process has now and a little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(folder: Path, data: bytes, said: str) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=f"(?s){'pytorch_model'}.*({said})") as caught:
        Checkpoint(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500 + len(str(path))
    assert sorted(os.listdir(folder)) == before


def test_the_corpus_is_made_of_a_file_that_is_good(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(torch_file())
    assert Checkpoint(tmp_path).tensor("w").array.tolist() == [[0, 1, 2], [3, 4, 5]]
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert state["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


ZIPS, PICKLES = hostile_zips(), hostile_pickles()


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_lies_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    refused(tmp_path, *ZIPS[name])


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path: Path, bounded: None, name: str) -> None:
    refused(tmp_path, *PICKLES[name])


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, bounded: None, kind: str) -> None:
    from t5tune.checkpoints.torch_format.file import read_torch_file

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


@pytest.mark.parametrize("kind", [1, 2, 3, "universal"])
def test_the_folders_corpus_is_made_of_ones_that_are_good(tmp_path: Path, kind: Any) -> None:
    folder = (
        zero_folders.make(tmp_path / "run", kind) if kind != "universal" else zero_folders.universal(tmp_path / "run")
    )
    result = run_export(folder, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(state) == sorted(zero_folders.values())
    assert all(torch.equal(state[name], value) for name, value in zero_folders.values().items())
    assert (result.step, result.world_size) == (4, 2)


def test_what_lies_between_aligned_parameters_is_left_out(tmp_path: Path) -> None:
    run_export(zero_folders.make(tmp_path / "run", stage=2, padding=3), tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in zero_folders.values().items())


def export_refused(folder: Path, tmp_path: Path, said: str) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=f"(?s)({said})") as caught:
        run_export(folder, tmp_path / "adapter")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", zero_folders.FOLDERS)
def test_a_folder_of_shards_that_lies_is_refused_and_nothing_is_written(
    tmp_path: Path, bounded: None, name: str
) -> None:
    spoil, said = zero_folders.FOLDERS[name]
    folder = zero_folders.make(tmp_path / "run")
    spoil(folder)
    export_refused(folder, tmp_path, said)


@pytest.mark.parametrize("name", zero_folders.UNIVERSALS)
def test_a_universal_folder_that_lies_is_refused_and_nothing_is_written(
    tmp_path: Path, bounded: None, name: str
) -> None:
    spoil, said = zero_folders.UNIVERSALS[name]
    folder = zero_folders.universal(tmp_path / "run")
    spoil(folder)
    export_refused(folder, tmp_path, said)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What export wrote, to be exported again."""
    run_export(zero_folders.make(tmp_path / "made"), tmp_path / "good")
    return tmp_path / "good"


def test_a_pipe_that_only_tells_the_step_is_not_waited_for(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(adapter / "trainer_state.json")
    assert run_export(adapter, tmp_path / "adapter").step == 0


def test_a_pipe_for_the_tokenizer_is_refused(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(adapter / "added_tokens.json")
    (adapter / "tokenizer_config.json").write_text("{}")
    export_refused(adapter, tmp_path, "added_tokens.json: not a plain file")


def test_a_tokenizer_with_code_is_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}}')
    export_refused(adapter, tmp_path, "auto_map: asks for code")


def test_a_pipe_for_a_seal_is_not_waited_for(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    seal(Path(shutil.copytree(adapter, run / "checkpoint-1")), 1, 1, {})
    (run / "checkpoint-2").mkdir()
    os.mkfifo(run / "checkpoint-2" / "t5tune_manifest.json")
    assert run_export(run, tmp_path / "adapter").step == 1


def test_a_run_whose_tokenizer_leads_elsewhere_is_refused(adapter: Path, tmp_path: Path) -> None:
    """The tokenizer stands beside its checkpoints; a secret would go with the adapter to wherever that is shared."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("{}")
    shutil.copytree(adapter, run / "checkpoint-1")
    (run / "tokenizer_config.json").write_text("{}")
    (run / "tokenizer.json").symlink_to(tmp_path / "secret")
    export_refused(run / "checkpoint-1", tmp_path, "tokenizer.json: a link to")


def test_the_command_line_refuses_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    folder = zero_folders.make(tmp_path / "run")
    zero_folders.shard(folder, 1).write_bytes(PICKLES["asks for os system"][0])
    done = t5tune("export", folder, "--output-dir", tmp_path / "adapter")
    assert done.code == 2
    assert len(done.errors) == 1
    assert "os.system" in done.errors[0]
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_a_link_of_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    """models--x/snapshots/REVISION/file -> ../../blobs/HASH, as the hub lays an adapter out."""
    run_export(zero_folders.make(tmp_path / "run"), tmp_path / "adapter")
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "abc"
    (tmp_path / "models--me--adapter" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate((tmp_path / "adapter").iterdir()):
        path.rename(tmp_path / "models--me--adapter" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    run_export(snapshot, tmp_path / "again")
    state = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in zero_folders.values().items())
