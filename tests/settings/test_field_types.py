"""The types of settings, such as sizes with units, and settings in Python: other values, names, paths as objects."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from t5tune.errors import SettingsError
from t5tune.settings import (
    ChatSettings,
    CompareSettings,
    EvaluateSettings,
    ExportSettings,
    MergeSettings,
    PlanSettings,
    PrepareSettings,
    ServeSettings,
    Settings,
    TrainSettings,
    dump_settings,
    load_settings,
)
from t5tune.settings.field_types import parse_gpu_memory

GIB = 1 << 30
NEEDED: dict[str, Any] = {"model_name_or_path": "pocket", "data_path": "pocket", "output_dir": "run"}


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
def test_gpu_memory_without_a_unit_is_in_gib(value: Any, size: int) -> None:
    text = load_gpu_memory(value)
    assert text == str(value)
    assert parse_gpu_memory(text) == size


@pytest.mark.parametrize(
    ("value", "size"),
    [("5GB", 5 * 10**9), ("1.5kb", 1500), ("500MiB", 500 << 20), ("5G", 5 * GIB), ("24B", 24), ("1000", 1000), (7, 7)],
)
def test_a_shard_size_without_a_unit_is_in_bytes(value: Any, size: int) -> None:
    assert load_shard_size(value) == size


@pytest.mark.parametrize("value", ["none", "None", "", "-1", -1, None])
def test_a_size_can_be_unset(value: Any) -> None:
    assert load_gpu_memory(value) is None
    assert load_shard_size(value) is None


@pytest.mark.parametrize("value", [0.5, 1, -1, "-1", "0.5", [0.5], "0.5,0.25", [0.5, "0.25"]])
def test_a_single_number_needs_no_list(value: Any) -> None:
    needed: dict[str, Any] = {"model_name_or_path": "base", "output_dir": "merged"}
    wanted = [float(text) for text in str(value).strip("[]").replace("'", "").split(",")]
    settings = MergeSettings(**needed, adapter=["adapter"] * len(wanted), weights=value)
    assert settings.weights == wanted


def test_a_boolean_is_no_list_of_numbers() -> None:
    with pytest.raises(SettingsError, match="weights: True: expected a list"):
        MergeSettings(adapter="adapter", output_dir="merged", weights=True)


def test_saved_gpu_memory_is_read_back(tmp_path: Path) -> None:
    settings = PlanSettings(model_name_or_path="base", gpu_memory="24")
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert load_settings(PlanSettings, str(tmp_path / "settings.yaml"))[0] == settings


# ---------------------------------------------------------------- settings in Python


def test_replace_validates_and_leaves_the_rest_as_it_was_given() -> None:
    settings = TrainSettings(**NEEDED, q_lora=True)
    other = settings.replace(learning_rate=1e-3, output_dir="other")
    assert other == TrainSettings(**NEEDED | {"output_dir": "other"}, q_lora=True, learning_rate=1e-3)
    assert other.model_fields_set == {*NEEDED, "q_lora", "learning_rate"}
    assert other.output_dir == Path("other")
    with pytest.raises(SettingsError) as caught:
        settings.replace(learning_rate="fast", lora_r=0)
    assert caught.value.problems == ("lora_r: 0: must be greater than 0", "learning_rate: 'fast': expected a number")


def test_replace_decides_again_what_another_setting_implies() -> None:
    settings = TrainSettings(**NEEDED, q_lora=True)
    assert settings.bf16
    assert not settings.replace(q_lora=False).bf16
    assert not settings.replace(bf16=False).bf16
    assert TrainSettings(**NEEDED).replace(q_lora=True).bf16
    assert TrainSettings(**NEEDED, q_lora=True, bf16=True).replace(q_lora=False).bf16


def test_no_copy_has_a_setting_that_does_not_exist() -> None:
    settings = TrainSettings(**NEEDED)
    for copy in (settings.replace, lambda **changes: settings.model_copy(update=changes)):
        with pytest.raises(SettingsError) as caught:
            copy(learning_rte=3)
        assert str(caught.value) == "learning_rte: unknown setting; did you mean learning_rate?"
    assert settings.model_copy(update={"lora_r": 3}).lora_r == 3


def test_an_unknown_name_is_reported_before_records_are_read() -> None:
    records = iter([{"source": "a", "target": "b"}])
    with pytest.raises(SettingsError, match="lora_rank: unknown setting"):
        TrainSettings(**NEEDED | {"data_path": records}, lora_rank=3)
    assert next(records)["source"] == "a"


@pytest.mark.parametrize(
    ("model", "name", "advice"),
    [
        (ChatSettings, "data", "data is a setting of evaluate, plan, prepare, train, trim"),
        (PrepareSettings, "lora_rank", "lora_r is a setting of export, plan, train"),
        (TrainSettings, "temperature", "temperature is a setting of chat, serve"),
        (TrainSettings, "overwrite_output_dir", "did you mean fresh?"),
        (MergeSettings, "overwrite_output_dir", "did you mean overwrite?"),
        # a flag of FastChat's apply_lora
        (MergeSettings, "base_model_path", "did you mean model_name_or_path?"),
    ],
)
def test_settings_of_other_commands_name_their_command(model: type[Settings], name: str, advice: str) -> None:
    needed: dict[str, Any] = dict.fromkeys(model.list_required(), "x")
    with pytest.raises(SettingsError) as caught:
        model(**needed, **{name: True})
    assert str(caught.value) == f"{name}: unknown setting; {advice}"


@pytest.mark.parametrize("seed", [1 << 63, 10**20])
def test_a_seed_that_is_too_large_is_refused(seed: int) -> None:
    largest = ChatSettings(model_name_or_path="pocket", seed=(1 << 63) - 1).seed
    assert torch.Generator().manual_seed(largest).initial_seed() == largest
    with pytest.raises(SettingsError, match=f"^seed: {seed}: must be less than {largest + 1}$"):
        ChatSettings(model_name_or_path="pocket", seed=seed)


def test_records_in_place_of_paths_are_one_problem() -> None:
    for data in ([{"source": "a"}] * 3, pd.DataFrame({"source": ["a"]})):
        with pytest.raises(SettingsError) as caught:
            CompareSettings(runs=data)
        (problem,) = caught.value.problems
        assert problem.endswith(": expected text or a path, or a list of them")
    with pytest.raises(SettingsError) as caught:
        TrainSettings(**NEEDED, lora_target_modules=[1, 2])
    assert caught.value.problems == ("lora_target_modules: 1: expected text",)


def test_a_path_object_is_as_good_as_its_text() -> None:
    run, template = Path("a") / "run", Path("template.yaml")
    needed: dict[str, Any] = {"data_path": run, "output_dir": run, "adapter": run, "checkpoint": run}
    for model in (PrepareSettings, TrainSettings, ExportSettings, MergeSettings, ChatSettings, EvaluateSettings):
        values = {name: needed[name] for name in model.list_required() if name in needed}
        assert model(**values, model_name_or_path=run).model_name_or_path == "a/run"
    assert ChatSettings(model_name_or_path=run, conversation_template=template).conversation_template == str(template)
    assert TrainSettings(**NEEDED, deepspeed=Path("zero.json")).deepspeed == "zero.json"
    assert PlanSettings(model_name_or_path=run, data_path=[run, "b"]).data_path == ["a/run", "b"]


def test_the_home_folder_of_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    settings = TrainSettings(
        model_name_or_path="~/base@v2",
        data=[{"path": "~/a.jsonl", "weight": 2}, "~/b.jsonl:3"],
        eval_data_path=["~/c.jsonl", "hf://datasets/owner/~name", "a~"],
        output_dir="~/run",
        preprocessed_path=Path("~"),
        deepspeed="~/zero.json",
    )
    assert settings.model_name_or_path == f"{home}/base@v2"
    assert settings.data_path == [f"{home}/a.jsonl", f"{home}/b.jsonl"]
    assert settings.eval_data_path == [f"{home}/c.jsonl", "hf://datasets/owner/~name", "a~"]
    assert (settings.output_dir, settings.preprocessed_path) == (tmp_path / "run", tmp_path)
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert "~/" not in (tmp_path / "settings.yaml").read_text()
    assert load_settings(TrainSettings, "~/settings.yaml")[0] == settings
    merged = MergeSettings(adapter=["~/one", "two"], weights=[1, 1], output_dir="~")
    assert merged.adapter == [tmp_path / "one", Path("two")]
    served = {"a": f"{home}/run", "b": f"{home}/other"}
    assert ServeSettings(models=["a=~/run", "b=~/other"]).named_models == served
    assert ServeSettings(models={"a": "~/run", "b": "~/other"}).named_models == served
    (tmp_path / "chats.jsonl:2").touch()  # not a weight
    assert PrepareSettings(**NEEDED | {"data_path": "~/chats.jsonl:2"}).data_path == [f"{home}/chats.jsonl:2"]


def test_a_device_of_torch_is_as_good_as_its_name() -> None:
    assert ChatSettings(model_name_or_path="run", device=torch.device("cuda", 1)).device == "cuda:1"
    assert ChatSettings(model_name_or_path="run", device=torch.device("cpu"), use_cpu=True).device == "cpu"
