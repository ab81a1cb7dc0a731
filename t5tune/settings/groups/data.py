"""Which data a command reads: one dataset, or several and how they are mixed."""

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

    data_path: Annotated[DataList, Affects.FINAL_WEIGHTS | Affects.INPUT_FILES] = Field(
        min_length=1,
        description="Data: JSON, JSONL, CSV or Parquet files (also .gz, .zst), folders, patterns, `-` (stdin), Hub "
        "datasets (owner/name), URLs, `pocket`; for train and evaluate also token caches; `a.csv:2 b.csv:1` mixes two.",
        json_schema_extra={"metavar": "PATH…"},
    )
    data: Annotated[DatasetList | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        min_length=1,
        description="Several datasets, each with its path, weight, name, columns, prefix and template; YAML only, in "
        "place of data_path.",
        json_schema_extra={"yaml_only": True},
    )
    data_subset: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Subset (configuration) of a dataset on the Hugging Face Hub; default: its default one.",
    )
    data_split: Annotated[OptionalText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Split of a dataset on the Hugging Face Hub; default: train; for evaluate validation, otherwise "
        "test.",
    )
    add_tokens: Annotated[TokenList, Affects.EXAMPLES] = Field(
        default=["auto"],
        description="Tokens to add for text that the vocabulary can't represent: auto (newline, tab, braces, "
        "indentation, and characters of the targets), none, fastchat (the ten tokens of FastChat), or exactly the "
        "ones listed.",
    )
    num_data: Annotated[OptionalCount, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=None, description="Use only the first N examples; default: all."
    )

    def list_datasets(self) -> list[DatasetSettings]:
        """List the datasets; one dataset is a list of one. Those of `data` have names."""
        if self.data is not None:
            return _name_each(self.data, {*type(self).model_fields, "weight"})
        return [_make_dataset(self.data_path, self.data_subset, self.data_split)]

    def replace(self, **changes: Any) -> Self:
        values = {name: getattr(self, name) for name in self.model_fields_set} | changes
        for data, paths in PATHS_OF_DATASETS.items():
            if changes.get(data) is not None and paths not in changes:
                values.pop(paths, None)  # they are those of the datasets before
            elif paths in changes and data not in changes:
                values.pop(data, None)
        return type(self)(**values)

    @model_validator(mode="before")
    @classmethod
    def _read_datasets(cls, values: Any) -> Any:
        """Read `data`, and `data_path` with weights, as both settings: the datasets, and all of their paths."""
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
                raise ValueError(f"{name}: {getattr(self, name)}: give it in the dataset that it is for")
        for dataset in self.list_datasets() if self.data is not None else ():
            try:
                check_objective(complete_dataset(str(dataset.name), dataset, list_shared(self)), self.objective)
            except SettingsError as error:
                raise ValueError(f"data: {dataset.name}: {'; '.join(error.problems)}") from None
        return self

    @field_validator("add_tokens")
    @classmethod
    def _check_choice_is_alone(cls, value: list[str]) -> list[str]:
        choices = {"auto", "none", "fastchat"} & set(value)
        if choices and len(value) > 1:
            raise ValueError(f"`{sorted(choices)[0]}` can't be combined with other tokens")
        return value


def _name_each(datasets: Sequence[DatasetSettings], kept: Collection[str]) -> list[DatasetSettings]:
    """Give each dataset its name, and leave out what the command doesn't use: all but `kept`."""
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
    """Which data is held out from training."""

    panel: ClassVar[str] = "Data"

    eval_fraction: Annotated[float, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the data to hold out for evaluation, if there is no eval_data_path.",
    )
    split_seed: Annotated[int, Affects.CACHE | Affects.WEIGHTS] = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Random seed for the held-out split. With the same split_seed, the same conversations are held out "
        "whatever seed is.",
    )
    seed: Annotated[int, Affects.CACHE | Affects.WEIGHTS | Affects.TRAINER] = Field(
        default=42,
        ge=0,
        lt=1 << 32,
        description="Random seed for adapter initialization, dropout, data order and the masked spans of raw text.",
    )


class MixingSettings(Settings):
    """How many examples of each dataset an epoch has."""

    panel: ClassVar[str] = "Data"

    mixing: Annotated[MixingKind | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="How several datasets are mixed: by their weights; proportional to their sizes, with "
        "mixing_temperature and mixing_cap, as for T5; or all examples of all of them in each epoch (concatenate); "
        "default: by weights if any is given, otherwise concatenate.",
    )
    mixing_temperature: Annotated[Temperature | None, NoneIfUnset, Affects.WEIGHTS] = Field(
        default=None,
        description="Temperature of proportional mixing: shares are sizes to the power of 1/temperature; the larger, "
        "the more equal; default: 1.",
    )
    mixing_cap: Annotated[OptionalCount, Affects.WEIGHTS] = Field(
        default=None,
        description="Cap of proportional mixing: a dataset with more examples counts as if it had this many; default: "
        "none.",
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
    """Which other data than the training data is evaluated on."""

    panel: ClassVar[str] = "Data"

    eval_data_path: Annotated[DataList | None, NoneIfUnset, Affects.FINAL_WEIGHTS | Affects.INPUT_FILES] = Field(
        default=None,
        description="Conversations or a token cache to evaluate on, all of it whatever num_data is; they are encoded "
        "with the added tokens and the conversation template of data_path.",
        json_schema_extra={"metavar": "PATH…"},
    )
    eval_data: Annotated[DatasetList | None, NoneIfUnset, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        min_length=1,
        description="Several datasets to evaluate on, as in data; one with the name of a dataset of data is read like "
        "it; YAML only, in place of eval_data_path.",
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
        description="Split of a dataset on the Hugging Face Hub that eval_data_path names; default: validation, "
        "otherwise test.",
    )

    def list_evaluation_datasets(self) -> list[DatasetSettings]:
        """List the datasets to evaluate on; none if there are no others than those of the training data."""
        if self.eval_data is not None:
            return _name_each(self.eval_data, {*type(self).model_fields})
        if self.eval_data_path is None:
            return []
        return [_make_dataset(self.eval_data_path, self.data_subset, self.eval_data_split)]

    @model_validator(mode="after")
    def _check_evaluation_split(self) -> Self:
        if self.eval_data is not None and self.eval_data_split is not None:
            raise ValueError(f"eval_data_split: {self.eval_data_split}: give it as data_split in the dataset it is for")
        return self
