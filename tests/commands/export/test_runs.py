"""Adapters exported from a run of one process: from its newest complete checkpoint, or from its result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from t5tune.errors import SettingsError
from t5tune.progress import Note
from tests.commands.export.runs import STEPS, check_full_state, check_refusal, flip_last_byte, train_run
from tests.support.models.exports import assert_same, list_files, read_adapter_tensors, run_export
from tests.support.processes.command_line import CommandResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory,
    conversations: Path,
    untied_base: Path,
    on_ranks: Callable[..., CommandResult],
) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    return train_run(on_ranks, 1, untied_base, conversations, run, "--save-steps", "1")


@pytest.mark.distributed
def test_a_checkpoint_of_a_single_process_exports_its_adapter(plain: Path, tmp_path: Path) -> None:
    checkpoint = plain / f"checkpoint-{STEPS}"
    result = run_export(checkpoint, tmp_path / "adapter")
    assert_same(read_adapter_tensors(tmp_path / "adapter"), read_adapter_tensors(checkpoint))
    assert (result.zero_stage, result.world_size, result.step) == (None, 1, STEPS)


@pytest.mark.distributed
def test_the_full_state_of_a_run_has_its_token_rows(plain: Path, untied_base: Path, tmp_path: Path) -> None:
    check_full_state(plain, untied_base, tmp_path)


@pytest.mark.distributed
def test_a_run_exports_its_newest_checkpoint(plain: Path, tmp_path: Path) -> None:
    notes: list[Note] = []
    assert run_export(plain, tmp_path / "adapter", notes).step == STEPS
    assert not [note for note in notes if note.warning]
    assert_same(read_adapter_tensors(tmp_path / "adapter"), read_adapter_tensors(plain / f"checkpoint-{STEPS}"))
    assert not [note for note in notes if "hasn't finished" in note.text]
    stopped = shutil.copytree(plain, tmp_path / "stopped")
    (stopped / "result.json").unlink()
    run_export(stopped, tmp_path / "other", notes)
    newest = stopped / f"checkpoint-{STEPS}"
    said = f"{stopped}: this run hasn't finished; exporting its newest complete checkpoint, {newest}"
    assert [note.text for note in notes if "hasn't finished" in note.text] == [said]


@pytest.mark.distributed
def test_export_skips_a_damaged_newest_checkpoint_with_a_warning(plain: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    (run / "result.json").unlink()  # a finished run has its adapter in its folder
    flip_last_byte(run / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    notes: list[Note] = []
    assert run_export(run, tmp_path / "adapter", notes).step == STEPS - 1
    warnings = [note.text for note in notes if note.warning]
    assert len(warnings) == 1
    assert f"checkpoint-{STEPS}/adapter_model.safetensors" in warnings[0]
    assert_same(read_adapter_tensors(tmp_path / "adapter"), read_adapter_tensors(run / f"checkpoint-{STEPS - 1}"))


@pytest.mark.distributed
def test_an_adapter_that_was_never_trained_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain / f"checkpoint-{STEPS}", tmp_path / "bare")
    (folder / "t5tune_manifest.json").unlink()
    state = read_adapter_tensors(folder)
    save_file(
        {name: value.zero_() if "lora_B" in name else value for name, value in state.items()},
        folder / "adapter_model.safetensors",
    )
    check_refusal(folder, tmp_path, "every lora_B is zero")


@pytest.mark.distributed
def test_a_run_without_complete_checkpoints_is_refused_with_reason(plain: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    (run / "result.json").unlink()
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "adapter_model.safetensors").unlink()
    check_refusal(
        run, tmp_path, rf"none of its checkpoints is complete: .*checkpoint-{STEPS}/adapter_model\.safetensors: missing"
    )


@pytest.mark.distributed
def test_an_output_folder_with_files_is_kept_without_overwrite(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="already contains files"):
        run_export(plain, output)
    assert list_files(output) == ["mine.txt"]
    run_export(plain, output, overwrite=True)
    assert "mine.txt" not in list_files(output)
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
