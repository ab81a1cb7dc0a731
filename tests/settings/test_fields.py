"""Sizes with units: the memory of a GPU, where a bare number is in GiB, and the size of a shard, where it is bytes."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.errors import SettingsError
from t5tune.settings import MergeSettings, PlanSettings, dump_settings, load_settings
from t5tune.settings.fields import parse_gpu_memory

GIB = 1 << 30


def load_gpu_memory(value: Any) -> str | None:
    settings, _ = load_settings(PlanSettings, None, {}, {"model_name_or_path": "base", "gpu_memory": value})
    return settings.gpu_memory


def load_shard_size(value: Any) -> int | None:
    flags = {"model_name_or_path": "base", "adapter": "adapter", "output_dir": "merged", "max_shard_size": value}
    return load_settings(MergeSettings, None, {}, flags)[0].max_shard_size


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("24G", 24 * GIB),
        ("24", 24 * GIB),
        (24, 24 * GIB),
        (1.5, 3 * GIB // 2),
        (".5GiB", GIB // 2),
        ("24GB", 24 * 10**9),
        ("800 MiB", 800 << 20),
        ("25769803776B", 24 * GIB),
    ],
)
def test_a_gpu_s_memory_is_a_size_with_a_unit_or_a_number_of_gib(value: Any, size: int) -> None:
    text = load_gpu_memory(value)
    assert text == str(value)
    assert parse_gpu_memory(text) == size


@pytest.mark.parametrize(
    ("value", "size"),
    [("5GB", 5 * 10**9), ("1.5kb", 1500), ("500MiB", 500 << 20), ("5G", 5 * GIB), ("24B", 24), ("1000", 1000), (7, 7)],
)
def test_a_shard_s_size_is_a_size_with_a_unit_or_a_number_of_bytes(value: Any, size: int) -> None:
    assert load_shard_size(value) == size


@pytest.mark.parametrize("value", ["none", "", "-1", -1, None])
def test_a_size_can_be_unset(value: Any) -> None:
    assert load_gpu_memory(value) is None
    assert load_shard_size(value) is None


@pytest.mark.parametrize("value", ["much", "24 apples", "1.2.3GiB", "-5GB", "5IB", "nan", ".", True])
def test_what_is_no_size_is_refused_with_an_example(value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        load_gpu_memory(value)
    assert caught.value.problems == (f"gpu_memory: {value!r} (--gpu-memory): expected a size such as 24GiB",)
    with pytest.raises(SettingsError) as caught:
        load_shard_size(value)
    assert caught.value.problems == (f"max_shard_size: {value!r} (--max-shard-size): expected a size such as 5GB",)


@pytest.mark.parametrize("value", ["24B", "24KB", "0GiB", 0])
def test_memory_that_no_gpu_has_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="too small for a GPU's memory; expected a size such as 24GiB"):
        load_gpu_memory(value)


def test_a_gpu_s_memory_is_read_back_from_the_written_settings(tmp_path: Path) -> None:
    settings = PlanSettings(model_name_or_path="base", gpu_memory="24")
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert load_settings(PlanSettings, str(tmp_path / "settings.yaml"))[0] == settings
