"""How merge recognizes the base that an adapter was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import FINGERPRINT_BYTES, compute_fingerprint, compute_full_hash
from t5tune.commands.merge import merge
from t5tune.errors import CheckpointError
from t5tune.progress import Note
from t5tune.settings import MergeSettings
from tests.merging.cases import list_folder, run_merge
from tests.support.adapters import add_base_metadata, load_stock_base, make_stock_adapter


def test_without_a_base_the_one_that_the_adapter_names_is_used_and_reported(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    merge(MergeSettings(adapter=untied_adapter, output_dir=tmp_path / "named", verify=False), notes.append)
    assert [note.text for note in notes if isinstance(note, Note) and "its base is" in note.text] == [
        f"{untied_adapter} is an adapter; its base is {untied_base}"
    ]
    run_merge(untied_base, untied_adapter, tmp_path / "given", verify=False)
    assert list_folder(tmp_path / "named") == list_folder(tmp_path / "given")
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()


def make_similar_base(base: Path, folder: Path) -> Path:
    """Copy the base with one value changed in the middle of a tensor."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["shared.weight"][700, 16] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_merge_refuses_an_adapter_of_another_base(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
    run_merge(untied_base, adapter, tmp_path / "right", verify=False)
    other = shutil.copytree(untied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other: not the base .*adapter was trained on, which was the-base"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()
    notes: list[Any] = []
    run_merge(other, adapter, tmp_path / "merged", notes.append, verify=False, allow_other_base=True)
    assert any(isinstance(note, Note) and note.warning and "not the base" in note.text for note in notes)


def test_check_full_detects_a_change_outside_of_the_samples(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
    other = make_similar_base(untied_base, tmp_path / "other")
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
    other = shutil.copytree(untied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert tensors[LARGE].nbytes > 2 * FINGERPRINT_BYTES  # so that its middle isn't read
    change(tensors)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) != hash_of(Checkpoint(untied_base))


@pytest.mark.parametrize("copy", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_copies_of_a_shared_tensor_dont_change_the_hashes(tied_base: Path, tmp_path: Path, copy: str) -> None:
    other = shutil.copytree(tied_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    assert copy not in tensors
    save_file({**tensors, copy: tensors[LARGE].clone()}, other / "model.safetensors", {"format": "pt"})
    for hash_of in (compute_fingerprint, compute_full_hash):
        assert hash_of(Checkpoint(other)) == hash_of(Checkpoint(tied_base))


def test_a_base_is_recognized_in_another_file_format(untied_base: Path, tmp_path: Path) -> None:
    adapter = add_base_metadata(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"))
    model = load_stock_base(untied_base)
    copy = shutil.ignore_patterns("*.safetensors")
    sharded = shutil.copytree(untied_base, tmp_path / "sharded", ignore=copy)
    save_sharded = load_file(untied_base / "model.safetensors")
    names = sorted(save_sharded)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: save_sharded[name] for name in names if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    old = shutil.copytree(untied_base, tmp_path / "old", ignore=copy)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    for base in (sharded, old):
        run_merge(base, adapter, tmp_path / "merged", verify=False, check="full", overwrite=True)


def test_a_stock_adapter_without_base_facts_is_accepted_with_a_note(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    run_merge(untied_base, untied_adapter, tmp_path / "merged", notes.append, verify=False)
    assert any(isinstance(note, Note) and "no fingerprint recorded" in note.text for note in notes)
