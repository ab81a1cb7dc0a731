"""How merge recognizes the base that an adapter was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import FINGERPRINT_BYTES, compute_fingerprint, compute_full_hash
from t5tune.commands.merge import merge
from t5tune.errors import CheckpointError
from t5tune.settings import MergeSettings
from tests.merging.cases import list_folder, run_merge
from tests.support.models.adapters import add_base_metadata, load_stock_base, make_stock_adapter
from tests.support.notes import Notes


def test_merge_uses_the_base_that_the_adapter_names(untied_base: Path, untied_adapter: Path, tmp_path: Path) -> None:
    notes = Notes()
    merge(MergeSettings(adapter=untied_adapter, output_dir=tmp_path / "named", verify=False), notes)
    assert f"{untied_adapter} is an adapter; its base is {untied_base}" in notes
    run_merge(untied_base, untied_adapter, tmp_path / "given", verify=False)
    assert list_folder(tmp_path / "named") == list_folder(tmp_path / "given")
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


@pytest.fixture(scope="module")
def adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose file describes its base."""
    return add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path_factory.mktemp("own") / "adapter"))


def copy_base(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_merge_refuses_an_adapter_of_a_different_base(untied_base: Path, adapter: Path, tmp_path: Path) -> None:
    run_merge(untied_base, adapter, tmp_path / "right", verify=False)
    other = copy_base(untied_base, tmp_path / "other", lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
    with pytest.raises(CheckpointError, match=r"other: not the base .*adapter was trained on, which was the-base"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()
    notes = Notes()
    run_merge(other, adapter, tmp_path / "merged", notes, verify=False, allow_other_base=True)
    assert any("not the base" in text for text in notes.warnings)


def test_check_full_detects_a_change_outside_of_the_samples(untied_base: Path, adapter: Path, tmp_path: Path) -> None:
    other = copy_base(untied_base, tmp_path / "other", lambda tensors: tensors["shared.weight"][700, 16].add_(1))
    run_merge(other, adapter, tmp_path / "sampled", verify=False)
    run_merge(untied_base, adapter, tmp_path / "right", verify=False, check="full")
    with pytest.raises(CheckpointError, match=r"sha256"):
        run_merge(other, adapter, tmp_path / "merged", verify=False, check="full")


SMALL, LARGE = "encoder.final_layer_norm.weight", "shared.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[LARGE][0, 0].add_(1),
        lambda tensors: tensors[LARGE][-1, -1].add_(1),
        lambda tensors: tensors[SMALL][len(tensors[SMALL]) // 2].add_(1),
        lambda tensors: tensors.update({SMALL: tensors[SMALL].half()}),
        lambda tensors: tensors.update({SMALL: tensors[SMALL][None]}),
        lambda tensors: tensors.update({f"{SMALL}.of_another_name": tensors.pop(SMALL)}),
        lambda tensors: tensors.pop(SMALL),
    ],
    ids=["first value", "last value", "a small tensor", "dtype", "shape", "name", "one fewer"],
)
def test_both_hashes_distinguish_bases(
    untied_base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    large = load_file(untied_base / "model.safetensors")[LARGE]
    assert large.nbytes > 2 * FINGERPRINT_BYTES  # so that its middle isn't read
    other = copy_base(untied_base, tmp_path / "other", change)
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) != hash_of(Checkpoint(untied_base))


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_copies_of_a_shared_tensor_dont_change_the_hashes(tied_base: Path, tmp_path: Path, copy: str) -> None:
    assert copy not in load_file(tied_base / "model.safetensors")
    other = copy_base(tied_base, tmp_path / "other", lambda tensors: tensors.update({copy: tensors[LARGE].clone()}))
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) == hash_of(Checkpoint(tied_base))


def test_a_base_is_recognized_in_other_file_formats(untied_base: Path, adapter: Path, tmp_path: Path) -> None:
    without_weights = shutil.ignore_patterns("*.safetensors")
    sharded = shutil.copytree(untied_base, tmp_path / "sharded", ignore=without_weights)
    tensors = load_file(untied_base / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    old = shutil.copytree(untied_base, tmp_path / "old", ignore=without_weights)
    torch.save(load_stock_base(untied_base).state_dict(), old / "pytorch_model.bin")
    for base in (sharded, old):
        run_merge(base, adapter, tmp_path / "merged", verify=False, check="full", overwrite=True)


def test_an_adapter_without_base_metadata_is_merged_with_a_note(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes = Notes()
    run_merge(untied_base, untied_adapter, tmp_path / "merged", notes, verify=False)
    assert any("no fingerprint recorded" in text for text in notes)
