"""The trainer's seams to transformers and DeepSpeed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Trainer

from t5tune.errors import DependencyError
from t5tune.settings import packaged_templates
from t5tune.training.trainer import OVERRIDDEN_METHODS, T5Trainer, check_overridden_methods
from tests.support.command_line import CommandResult


def test_every_private_method_that_the_trainer_overrides_is_checked() -> None:
    private = {name for name in vars(T5Trainer) if name.startswith("_") and not name.startswith("__")}
    assert set(OVERRIDDEN_METHODS) == {name for name in private if hasattr(Trainer, name)}
    check_overridden_methods(Trainer)


@pytest.mark.parametrize("name", OVERRIDDEN_METHODS)
def test_a_release_of_transformers_that_renames_an_overridden_method_is_refused_by_name(name: str) -> None:
    renamed = type("Trainer", (), {other: getattr(Trainer, other) for other in OVERRIDDEN_METHODS if other != name})
    with pytest.raises(DependencyError, match=f"Trainer has no method {name}"):
        check_overridden_methods(renamed)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_gathers_the_head_for_the_loss_alone(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    config = packaged_templates.read_deepspeed_config("zero3")
    # otherwise DeepSpeed keeps so small a head gathered, or gathers it ahead of its use
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    found = tmp_path / "found.jsonl"
    done = on_ranks(
        2,
        *("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", tmp_path / "run"),
        *("--deepspeed", tmp_path / "zero3.json", "--max-steps", "2", "--use-cpu", "--add-tokens", "none"),
        *("--report-samples", "0"),
        calls=[f"tests.support.gathered_head:record_head_status({str(found)!r})"],
    )
    assert done.code == 0, done.stderr[-3000:]
    for rank in range(2):
        lines = [json.loads(line) for line in Path(f"{found}{rank}").read_text().splitlines()]
        assert {place for place, *_ in lines} == {"encoder", "decoder", "loss", "after"}
        for place, status, shape in lines:
            gathered = (status, shape) == ("AVAILABLE", [1536, 32])
            assert gathered == (place == "loss"), lines
