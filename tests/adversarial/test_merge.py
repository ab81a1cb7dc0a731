"""merge refuses untrusted files, naming the file and writing nothing."""

import shutil
from pathlib import Path

import pytest

from t5tune.cli import run
from t5tune.commands.merge import merge
from t5tune.settings import MergeSettings
from tests.adversarial.model_folders import FOLDERS
from tests.support.models.adapters import make_stock_adapter


@pytest.fixture(scope="module")
def adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock_adapter(untied_base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", FOLDERS)
def test_each_hostile_folder_is_refused_by_its_file(
    untied_base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    breaks, named = FOLDERS[case]
    base, ours = shutil.copytree(untied_base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    breaks(base, ours)
    out = tmp_path / "out"
    flags = ["--model-name-or-path", base, "--adapter", ours, "--output-dir", out, "--no-verify"]
    code = run(["merge", *map(str, flags)])
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2, errors
    assert len(errors) == 1
    assert named in errors[0]
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_links_within_the_hub_cache_are_followed(untied_base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(untied_base.iterdir())):
        shutil.copy(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"blob{number}")
    merge(MergeSettings(model_name_or_path=str(snapshot), adapter=adapter, output_dir=tmp_path / "out", verify=False))
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (untied_base / "tokenizer.json").read_bytes()
