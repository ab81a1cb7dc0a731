"""The files under templates/ work as documented."""

from pathlib import Path

import pytest

from t5tune.data.tokens.templates import load_template
from t5tune.distributed.deepspeed_build import compiles_for_offloading
from t5tune.settings import TrainSettings, load_settings, packaged_templates

ZERO3_KEYS = {"stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"}


@pytest.mark.parametrize("name", packaged_templates.list_names("runs"))
def test_a_packaged_run_config_has_all_required_train_settings(name: str) -> None:
    settings, notes = load_settings(TrainSettings, file=name)
    assert settings.output_dir.parts[0] == "runs"
    note = "q_lora turns bf16 on: the quantized base computes in bfloat16"
    assert notes == [note] * (settings.q_lora and not settings.bf16)


@pytest.mark.parametrize("name", packaged_templates.list_names("conversations"))
def test_a_packaged_conversation_template_loads(name: str) -> None:
    assert "{text}" in load_template(name).assistant


@pytest.mark.parametrize("name", packaged_templates.list_names("deepspeed"))
def test_a_deepspeed_config_has_the_stage_in_its_name(name: str) -> None:
    zero = packaged_templates.read_deepspeed_config(name)["zero_optimization"]
    assert zero["stage"] == int(name.removeprefix("zero")[0])
    assert ("offload_optimizer" in zero) is name.endswith("offload")
    assert (set(zero) >= ZERO3_KEYS) is (zero["stage"] == 3)


@pytest.mark.parametrize("name", packaged_templates.list_names("deepspeed"))
def test_only_other_deepspeed_configs_that_offload_need_a_compiler(name: str) -> None:
    config = packaged_templates.read_deepspeed_config(name)
    assert not compiles_for_offloading(config)
    config.pop("zero_force_ds_cpu_optimizer", None)
    assert compiles_for_offloading(config) is name.endswith("offload")


def test_null_in_a_deepspeed_file_is_the_same_as_a_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": null, "offload_param": null}}')
    config = packaged_templates.read_deepspeed_config(str(path))
    assert config["zero_optimization"] == {"stage": 2}
    assert not compiles_for_offloading(config)
