"""How the records of a dataset are read and become training examples."""

import codecs
import encodings
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable
from encodings.aliases import aliases
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from t5tune.errors import find_close_name
from t5tune.formatting import shorten
from t5tune.settings.affects import Affects
from t5tune.settings.denoisers import find_denoisers
from t5tune.settings.field_types import NoneIfUnset, OptionalCount, OptionalText, PathAsText, Settings, WordList

Objective = Literal["sft", "dpo", "orpo", "span-corruption", "classify", "regress", "tag"]
LabelObjectiveName = Literal["classify", "regress", "tag"]
ObjectiveKind = Literal["targets", "pairs", "raw text", "labels"]
KINDS: dict[str, ObjectiveKind] = {
    "sft": "targets", "dpo": "pairs", "orpo": "pairs", "span-corruption": "raw text", "classify": "labels",
    "regress": "labels", "tag": "labels",
}  # fmt: skip
"""The kind of examples that each objective learns from."""
SourceWords = Literal["text", "characters", "residues"]
NOT_OF_PREFERENCES = {"train_on", "split_long"}
"""Settings that choose or divide answers; a preference pair has two for one source."""
NOT_OF_RAW_TEXT = {"train_on", "min_target_tokens", "split_long", "drop_truncated_targets"}
"""Settings that choose or truncate answers, which raw text doesn't have."""
NOT_OF_LABELS = {*NOT_OF_RAW_TEXT, "data_format", "pair_lines", "conversation_template"}
"""Settings that are about answers and conversations."""
ONLY_OF_LABELS = {"source_words", "labels"}
NOT_OF_PAIRED_LINES = {"objective", "data_format", "source_column", "target_column", "rejected_column"}
"""Settings that say where the texts of a record are, which pair_lines does."""
Columns = Annotated[
    Annotated[list[str], Field(min_length=2)] | str | None,
    BeforeValidator(lambda value: value[0] if isinstance(value, list | tuple) and len(value) == 1 else value),
    NoneIfUnset,
]
"""A column's name, or a list of several; names aren't split, since they may contain commas and spaces."""


def _list_names(value: Any) -> Any:
    names = value if isinstance(value, list | tuple) else [value]
    return [str(name) if type(name) is int else name for name in names]


LabelNames = Annotated[list[str], BeforeValidator(_list_names)]
"""Names of labels, or whole numbers; names aren't split at commas or spaces."""
# text encodings of Python that no file is saved in
NOT_OF_FILES = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "charmap"}
SOME_ENCODINGS = "utf-8, cp1252, utf-16, shift_jis"
TEXT_SETTINGS = {"source_column", "target_column", "rejected_column", "source_prefix"}
DataFormat = Literal["auto", "sharegpt", "openai", "alpaca", "prompt-completion", "source-target"]
PAIR_FORMATS = ("auto", "source-target")
"""Values of data_format that allow named columns and a source_prefix."""


def _suggest_encoding(name: str) -> str:
    """Suggest the closest name with the same digits, or list some names."""
    plain, digits = (re.sub(pattern, "", name.lower()) for pattern in (r"[\W_]", r"\D"))
    modules = {module.name: module.name for module in pkgutil.iter_modules(encodings.__path__)}
    names = {re.sub("_", "", alias): known for alias, known in (modules | aliases).items() if _is_of_files(known)}
    close = find_close_name(plain, [other for other in names if re.sub(r"\D", "", other) == digits])
    return f"did you mean {codecs.lookup(names[close]).name}?" if close else f"use one such as {SOME_ENCODINGS}"


def _is_of_files(name: str) -> bool:
    try:
        found = codecs.lookup(name)
    except LookupError:
        return False
    return found._is_text_encoding and found.name not in NOT_OF_FILES


class ConversationSettings(Settings):
    """How a conversation becomes text, and where it is truncated."""

    panel: ClassVar[str] = "Conversations"

    conversation_template: Annotated[OptionalText, PathAsText, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="Conversation template: a name under conversations/ in `t5tune templates`, a YAML file, or (chat, "
        "serve, evaluate) a training dataset; default: the model's, else plain for pairs, else fastchat-t5.",
    )
    model_max_length: Annotated[int, Affects.EXAMPLES] = Field(
        default=2048,
        ge=8,
        description="Maximum length of a source and of a target, each including its EOS token (tokens).",
    )


class ReadingSettings(Settings):
    panel: ClassVar[str] = "Reading"
    is_complete: ClassVar[bool] = True
    """Whether conflicts are refused. A dataset's settings are incomplete: the command may set the rest."""

    objective: Annotated[Objective, Affects.EXAMPLES | Affects.WEIGHTS] = Field(
        default="sft",
        description="Training objective: predict targets (sft), prefer the better of two answers (dpo, orpo: records "
        "with `chosen` and `rejected`), fill masked spans of raw text, as in pretraining (span-corruption), or, with "
        "the encoder alone, label texts (classify), predict numbers (regress) or label each word (tag).",
    )
    source_words: Annotated[SourceWords, Affects.EXAMPLES] = Field(
        default="text",
        description="The words of a text with labels (objective classify, regress, tag): its words, its characters, or "
        "the residues of a protein (as characters, but U, Z, O and B are read as X).",
    )
    labels: Annotated[LabelNames | None, NoneIfUnset, Affects.EXAMPLES] = Field(
        default=None,
        min_length=1,
        description="The labels, in the order of the model's outputs; records with a different label are rejected; "
        "default: the data's labels, in the order of a Parquet file's ClassLabel, or sorted.",
        json_schema_extra={"metavar": "TEXT…"},
    )
    denoisers: Annotated[WordList, Affects.EXAMPLES] = Field(
        default=["t5"],
        description="Share of the text that span-corruption masks, and mean span length (tokens): t5 (0.15:3), ul2, "
        "ul2-r, ul2-s, ul2-x, or custom, such as 0.2:5; with several, each example gets one.",
    )
    encoding: Annotated[OptionalText, Affects.EXAMPLES] = Field(
        default=None,
        description="Encoding of text files without a byte order mark, such as cp1252; default: UTF-8, or detected if "
        "most of a file isn't UTF-8.",
    )
    data_format: Annotated[DataFormat, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default="auto", description="Format of the records; auto detects it from the keys of each record."
    )
    header: Annotated[bool, Affects.EXAMPLES] = Field(
        default=True,
        description="CSV, TSV and Excel files begin with column names; if not, the first column is the input and the "
        "second the output.",
    )
    pair_lines: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False,
        description="Read two text files line by line: each line of the first is a source, of the second its target.",
    )
    source_column: Annotated[Columns, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default=None, description="Column or key with the input, or several, a line each; default: detected."
    )
    target_column: Annotated[Columns, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default=None, description="Column or key with the output, or several, a line each; default: detected."
    )
    rejected_column: Annotated[OptionalText, Affects.EXAMPLES] = Field(
        default=None,
        description="Column or key with the rejected answer of a preference pair (objective dpo, orpo), whose chosen "
        "answer is in target_column; default: rejected (target_column: chosen).",
    )
    source_prefix: Annotated[str, Affects.EXAMPLES | Affects.INFERENCE] = Field(
        default="",
        description="Text to prepend to each source of two-column data, such as `summarize: `.",
    )
    merge_same_role: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Join consecutive turns of the same role instead of rejecting the record."
    )
    clean: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False,
        description="Convert HTML of old ShareGPT dumps to Markdown, decode entities, remove needless backslashes.",
    )
    max_record_bytes: Annotated[int, Affects.CACHE] = Field(
        default=4 << 20, gt=0, description="Reject records longer than this (bytes)."
    )

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            name = codecs.lookup(value).name
        except LookupError:
            raise ValueError(f"no encoding has this name; {_suggest_encoding(value)}") from None
        if not _is_of_files(name):
            raise ValueError(f"not an encoding of text files; use one such as {SOME_ENCODINGS}")
        return name

    @field_validator("labels")
    @classmethod
    def _check_labels_differ(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (twice := [name for name, count in Counter(names).items() if count > 1]):
            raise ValueError(f"{shorten(repr(twice[0]), 80)} is listed twice")
        return names

    @field_validator("denoisers")
    @classmethod
    def _check_denoisers(cls, value: list[str]) -> list[str]:
        if not find_denoisers(value):
            raise ValueError("must not be empty")
        return value

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """The names of the columns of sources and of targets; without names, the names in their format."""
        given = self.source_column or "source", self.target_column or ("chosen" if self.kind == "pairs" else "target")
        sources, targets = ([names] if isinstance(names, str) else names for names in given)
        return sources, targets

    @property
    def kind(self) -> ObjectiveKind:
        """The kind of the objective's examples."""
        return KINDS[self.objective]

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if not self.is_complete:
            return self
        if self.kind != "raw text" and self.denoisers != ["t5"]:
            raise ValueError(f"denoisers: {' '.join(self.denoisers)}: only for objective span-corruption; leave it out")
        if self.kind != "pairs" and self.rejected_column is not None:
            shown = shorten(repr(self.rejected_column), 80)
            raise ValueError(f"rejected_column: {shown}: only for objective dpo and orpo; leave it out")
        if self.kind == "pairs":
            self._refuse_given(NOT_OF_PREFERENCES, f"objective {self.objective} learns the last answers of each record")
        if self.kind == "labels":
            self._refuse_given(NOT_OF_LABELS, f"objective {self.objective} learns labels, not answers")
        else:
            self._refuse_given(ONLY_OF_LABELS, "it is only for objective classify, regress and tag")
        if self.objective == "regress":
            self._refuse_given(("labels",), "objective regress learns numbers")
        if self.kind == "raw text":
            self._refuse_given(("target_column", "source_prefix"), f"objective {self.objective} doesn't use it")
            self._refuse_given(("data_format",), f"objective {self.objective} reads raw text")
            self._refuse_given(NOT_OF_RAW_TEXT, f"objective {self.objective} has no answers to choose")
        single = {"source_column"} if self.kind == "raw text" or self.objective == "tag" else set()
        single |= {"target_column"} if self.kind in ("pairs", "labels") else set()
        for name in sorted(single):
            if isinstance(getattr(self, name), list):
                raise ValueError(f"{name}: {getattr(self, name)}: objective {self.objective} reads one; name only one")
        if self.pair_lines:
            self._refuse_given(NOT_OF_PAIRED_LINES, "pair_lines reads sources and targets from two text files")
        if self.data_format not in PAIR_FORMATS:
            self._refuse_given(TEXT_SETTINGS, f"data_format {self.data_format} doesn't use it")
        return self

    def _refuse_given(self, names: Iterable[str], reason: str) -> None:
        for name in self.model_fields_set & {*names}:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                shown = shorten(repr(value), 80) if name in TEXT_SETTINGS else str(value).lower()
                raise ValueError(f"{name}: {shown}, but {reason}; leave it out")


class SelectionSettings(Settings):
    panel: ClassVar[str] = "Selection"

    train_on: Annotated[Literal["all", "last"], Affects.EXAMPLES] = Field(
        default="all", description="Train on all assistant turns of a conversation, or on the last only."
    )
    min_target_tokens: Annotated[OptionalCount, Affects.EXAMPLES] = Field(
        default=None, description="Skip targets shorter than this (tokens); default: keep all."
    )
    dedupe: Annotated[Literal["none", "exact"], Affects.EXAMPLES] = Field(
        default="none", description="Deduplication: exact rejects exact copies of earlier conversations."
    )
    split_long: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Split conversations longer than model_max_length at turn boundaries."
    )
    drop_truncated_targets: Annotated[bool, Affects.EXAMPLES] = Field(
        default=False, description="Skip targets longer than model_max_length instead of truncating them."
    )
    max_rejected_fraction: Annotated[float | None, NoneIfUnset, Affects.NOTHING] = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Fail if a larger fraction of the records is rejected, not counting duplicates and records with a "
        "bad label or weight 0.",
    )
    num_workers: Annotated[OptionalCount, Affects.NOTHING] = Field(
        default=None, description="Number of tokenization processes; default: one per CPU core, fewer for small data."
    )
