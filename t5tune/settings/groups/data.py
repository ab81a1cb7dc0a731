"""The data that a command reads: one dataset, or several and how they are mixed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from t5tune.errors import SettingsError
from t5tune.settings.affects import Affects
from t5tune.settings.dataset_list import (
    PATHS_OF_DATASETS,
    DatasetList,
    DatasetSettings,
    check_weights,
    combine_datasets,
    name_datasets,
)
from t5tune.settings.dataset_spec import check_objective, complete_dataset, list_shared
from t5tune.settings.field_types import (
    DataList,
    NoneIfUnset,
    OptionalCount,
    OptionalPath,
    OptionalText,
    Settings,
    TokenList,
)
from t5tune.settings.groups.record_format import ConversationSettings, ReadingSettings, SelectionSettings


class DataSettings(ReadingSettings, ConversationSettings):
    panel: ClassVar[str] = "Data"

    data_path: Annotated[DataList, Affects.INPUT] = Field(
        min_length=1,
        description="Data: JSON, JSONL, CSV, Parquet or Excel files (also .gz, .zst), folders, patterns, `-` (stdin), "
        "Hub datasets (owner/name), URLs, `pocket`; also token caches (not in prepare); `a.csv:2 b.csv:1` mixes two.",
        json_schema_extra={"metavar": "PATH…"},
    )
    data: Annotated[DatasetList | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        min_length=1,
        description="Several datasets, each with its path, weight, name, columns, prefix and template; YAML only, "
        "instead of data_path.",
        json_schema_extra={"yaml_only": True},
    )
    data_subset: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Subset (configuration) of a dataset on the Hugging Face Hub; default: the default subset.",
    )
    data_split: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Split of a dataset on the Hugging Face Hub; default: train, or validation or test for evaluate.",
    )
    add_tokens: Annotated[TokenList, Affects.EXAMPLES] = Field(
        default=["auto"],
        description="Tokens to add for text that the vocabulary can't represent: auto (newline, tab, braces, "
        "indentation, and characters of the targets), none, fastchat (the ten tokens of FastChat), or a list of "
        "tokens.",
    )
    num_data: Annotated[OptionalCount, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=None, description="Use only the first N examples; default: all."
    )

    def list_datasets(self) -> list[DatasetSettings]:
        """List the datasets, with names if there are several settings for them (`data`)."""
        if self.data is not None:
            return _name_each(self.data, {*type(self).model_fields, "weight"})
        return [_make_dataset(self.data_path, self.data_subset, self.data_split)]

    def replace(self, **changes: Any) -> Self:
        values = {name: getattr(self, name) for name in self.model_fields_set} | changes
        for data, paths in PATHS_OF_DATASETS.items():
            if changes.get(data) is not None and paths not in changes:
                values.pop(paths, None)  # the paths of the old datasets
            elif paths in changes and data not in changes:
                values.pop(data, None)
        return type(self)(**values)

    @model_validator(mode="before")
    @classmethod
    def _read_datasets(cls, values: Any) -> Any:
        return combine_datasets(values, "data", "data_path") if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        for name in ("data", "eval_data"):
            datasets = getattr(self, name, None) or []
            try:
                name_datasets(datasets)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if any("-" in dataset.path for dataset in datasets):
                raise ValueError(f"{name}: standard input (`-`) can't be one of several datasets; write it to a file")
        for name in ("data_subset", "data_split"):
            if self.data is not None and getattr(self, name) is not None:
                raise ValueError(f"{name}: {getattr(self, name)}: set it in the dataset that it is for")
        for dataset in self.list_datasets() if self.data is not None else ():
            try:
                check_objective(complete_dataset(str(dataset.name), dataset, list_shared(self)), self.objective)
            except SettingsError as error:
                raise ValueError(f"data: {dataset.name}: {'; '.join(error.problems)}") from None
        return self

    @model_validator(mode="after")
    def _check_tokens_of_labels(self) -> Self:
        if self.kind == "labels" and self.is_complete:
            if self.add_tokens not in (["auto"], ["none"]):
                problem = f"but objective {self.objective} writes no text; leave it out"
                raise ValueError(f"add_tokens: {' '.join(map(repr, self.add_tokens))}, {problem}")
            object.__setattr__(self, "add_tokens", ["none"])
        return self

    @field_validator("add_tokens")
    @classmethod
    def _check_choice_is_alone(cls, value: list[str]) -> list[str]:
        choices = {"auto", "none", "fastchat"} & set(value)
        if choices and len(value) > 1:
            raise ValueError(f"`{sorted(choices)[0]}` can't be combined with other tokens")
        return value


def _name_each(datasets: Sequence[DatasetSettings], kept: Collection[str]) -> list[DatasetSettings]:
    """Give each dataset its name, and only the settings in `kept`, which the command uses."""
    found = []
    for name, dataset in zip(name_datasets(datasets), datasets, strict=True):
        values = {key: getattr(dataset, key) for key in dataset.model_fields_set & {*kept}}
        found.append(DatasetSettings(**{**values, "path": dataset.path, "name": name}))
    return found


def _make_dataset(path: list[str], subset: str | None, split: str | None) -> DatasetSettings:
    own: dict[str, Any] = {"data_subset": subset, "data_split": split}
    return DatasetSettings(path=path, **{name: value for name, value in own.items() if value is not None})


MixingKind = Literal["weights", "proportional", "concatenate"]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SplitSettings(Settings):
    panel: ClassVar[str] = "Data"

    eval_fraction: Annotated[float, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the data to hold out for evaluation, unless eval_data_path is set; "
        "where texts have labels, of each label.",
    )
    split_seed: Annotated[int, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Random seed that chooses the held-out conversations; seed doesn't affect them.",
    )
    seed: Annotated[int, Affects.CACHE | Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Random seed for adapter initialization, dropout, data order and the masked spans of raw text.",
    )


class MixingSettings(Settings):
    panel: ClassVar[str] = "Data"

    mixing: Annotated[MixingKind | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="How several datasets are mixed: by their weights; proportional to their sizes, as for T5, with "
        "mixing_temperature and mixing_cap; or concatenated, so that an epoch has all examples; default: weights if "
        "any is given, otherwise concatenate.",
    )
    mixing_temperature: Annotated[Temperature | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="Temperature T of proportional mixing: shares are sizes to the power of 1/T; default: 1.",
    )
    mixing_cap: Annotated[OptionalCount, Affects.WEIGHTS] = Field(
        default=None,
        description="Cap of proportional mixing: a larger dataset counts as this many examples; default: no cap.",
    )

    @model_validator(mode="after")
    def _check_mixing(self) -> Self:
        datasets: Sequence[DatasetSettings] = getattr(self, "data", None) or []
        weights = [dataset.weight for dataset in datasets if "weight" in dataset.model_fields_set]
        proportional = [name for name in ("mixing_temperature", "mixing_cap") if getattr(self, name) is not None]
        if proportional and self.mixing not in (None, "proportional"):
            given = f"{proportional[0]}: {getattr(self, proportional[0]):g}"
            raise ValueError(f"{given}: has no effect with mixing {self.mixing}; leave it out")
        other = proportional[0] if proportional else "mixing" if self.mixing not in (None, "weights") else None
        if weights and other is not None:
            raise ValueError(
                f"{other}: {getattr(self, other)}: conflicts with the weights of data; leave one of them out"
            )
        if datasets:
            try:
                check_weights([dataset.weight for dataset in datasets])
            except ValueError as error:
                raise ValueError(f"data: {error}") from None
        return self


class EvaluationDataSettings(Settings):
    panel: ClassVar[str] = "Data"

    eval_data_path: Annotated[DataList | None, NoneIfUnset, Affects.INPUT] = Field(
        default=None,
        description="Conversations or a token cache to evaluate on, encoded like data_path, with its added tokens and "
        "conversation template; num_data doesn't limit it.",
        json_schema_extra={"metavar": "PATH…"},
    )
    eval_data: Annotated[DatasetList | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        min_length=1,
        description="Several datasets to evaluate on, in the same form as `data`; a dataset with the name of a "
        "training dataset is read the same way; YAML only, instead of eval_data_path.",
        json_schema_extra={"yaml_only": True},
    )

    @model_validator(mode="before")
    @classmethod
    def _read_evaluation_datasets(cls, values: Any) -> Any:
        return combine_datasets(values, "eval_data", "eval_data_path") if isinstance(values, Mapping) else values


class TrainingDataSettings(EvaluationDataSettings, MixingSettings, SplitSettings, SelectionSettings, DataSettings):
    preprocessed_path: Annotated[OptionalPath, Affects.NOTHING] = Field(
        default=None, description="Folder for the token cache that train writes; default: `data` in the run folder."
    )
    eval_data_split: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Split of a Hugging Face Hub dataset in eval_data_path; default: validation, otherwise test.",
    )

    def list_evaluation_datasets(self) -> list[DatasetSettings]:
        """List the datasets to evaluate on, apart from held-out training data."""
        if self.eval_data is not None:
            return _name_each(self.eval_data, {*type(self).model_fields})
        if self.eval_data_path is None:
            return []
        return [_make_dataset(self.eval_data_path, self.data_subset, self.eval_data_split)]

    @model_validator(mode="after")
    def _check_evaluation_split(self) -> Self:
        if self.eval_data is not None and self.eval_data_split is not None:
            raise ValueError(f"eval_data_split: {self.eval_data_split}: set data_split in the dataset that it is for")
        return self
