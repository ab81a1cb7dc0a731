"""How a dataset is read: its own values come first, then the command's values, if they suit the dataset."""

from typing import Any

import pytest

from t5tune.settings import TrainSettings
from t5tune.settings.dataset_spec import RULES, complete_dataset, list_shared, put_over

NEEDED = {"model_name_or_path": "pocket", "output_dir": "run"}
# for each rule: a dataset's own values, the command's values, and the names of the command's that don't apply
CASES: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    (
        {"objective": "span-corruption"},
        {"source_prefix": "x: ", "target_column": "b", "train_on": "last", "min_target_tokens": 3, "split_long": True,
         "drop_truncated_targets": True, "source_column": "text", "model_max_length": 64},
        {"source_prefix", "target_column", "train_on", "min_target_tokens", "split_long", "drop_truncated_targets"},
    ),
    ({"objective": "sft"}, {"objective": "span-corruption", "denoisers": ["ul2"], "clean": True}, {"denoisers"}),
    ({"pair_lines": True}, {"target_column": "b", "source_prefix": "x: ", "clean": True}, {"target_column"}),
    ({"objective": "dpo"}, {"train_on": "last", "split_long": True, "clean": True}, {"train_on", "split_long"}),
    (
        {"data_format": "openai"},
        {"source_prefix": "x: ", "source_column": "a", "target_column": "b", "merge_same_role": True},
        {"source_prefix", "source_column", "target_column"},
    ),
    ({"target_column": "t"}, {"source_column": "a", "data_format": "auto"}, {"source_column", "data_format"}),
    ({"source_prefix": "y: "}, {"data_format": "openai", "dedupe": "exact"}, {"data_format"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RULES)))
def test_each_rule_drops_settings_that_a_dataset_makes_meaningless(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, command, left_out = CASES[number]
    assert put_over(own, command) == {key: value for key, value in command.items() if key not in left_out} | own
    monkeypatch.setattr("t5tune.settings.dataset_spec.RULES", (*RULES[:number], *RULES[number + 1 :]))
    assert left_out & put_over(own, command).keys()  # no other rule leaves all of them out


def test_a_dataset_overrides_the_command_which_overrides_defaults() -> None:
    settings = TrainSettings(
        **NEEDED, source_prefix="x: ", source_column="q", objective="sft", data_format="auto",
        data=[
            {"path": "a"}, {"path": "b", "data_format": "openai"}, {"path": "c", "target_column": "t"},
            {"path": "d", "objective": "span-corruption", "denoisers": "ul2", "source_column": "body"},
        ],
    )  # fmt: skip
    found = [complete_dataset(str(each.name), each, list_shared(settings)) for each in settings.list_datasets()]
    assert [each.name for each in found] == ["a", "b", "c", "d"]
    assert [each.source_prefix for each in found] == ["x: ", "", "x: ", ""]
    assert [each.source_column for each in found] == ["q", None, None, "body"]
    assert [each.denoisers for each in found] == [["t5"], ["t5"], ["t5"], ["ul2"]]
    assert [each.path for each in found] == [["a"], ["b"], ["c"], ["d"]]
