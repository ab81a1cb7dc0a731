"""manifest.json of a token cache: its format, and the types of its values.

The cache may be from someone else, so each value that t5tune uses is checked.
"""

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, InstanceOf, NonNegativeInt, ValidationError, create_model

from t5tune.errors import DataError
from t5tune.file_names import CACHE_MANIFEST_FILE, CONVERSATIONS_FILE, EXAMPLES_FILE, TEMPLATE_FILE, TOKENS_FILE
from t5tune.io.folder_kinds import describe_folder
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.groups.data import SplitSettings
from t5tune.settings.groups.record_format import KINDS, ConversationSettings, ReadingSettings, SelectionSettings
from t5tune.settings.messages import describe_value_error, format_place, shorten_file_value

CACHE_FORMAT = 6
PREPARE_AGAIN = "run t5tune prepare again"
TABLES = (TOKENS_FILE, CONVERSATIONS_FILE, EXAMPLES_FILE)
CONTENT_COUNTS = ("conversations", "examples", "source_tokens", "target_tokens")
COUNTS = (
    *CONTENT_COUNTS, "rejected", "truncated_sources", "truncated_targets", "unknown_tokens", "with_unknown_tokens",
    "pairs", "conversations_with_prefix", "examples_with_earlier_turns",
)  # fmt: skip


def _check_text(text: str) -> str:
    text.encode()  # a UnicodeEncodeError is a ValueError, which pydantic reports
    return text


_Text = Annotated[str, AfterValidator(_check_text)]


class _File(BaseModel):
    sha256: str


class _Labels(BaseModel):
    names: list[_Text]
    per_token: bool
    several: bool
    is_ordered: bool


class _SpanCorruption(BaseModel):
    denoisers: list[str]
    sentinel_ids: list[NonNegativeInt]


class _LostCharacter(BaseModel):
    text: _Text
    becomes: _Text
    count: int
    answers: int


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a cache; DataError: it is missing, broken, or of a different format."""
    if not os.path.isdir(folder):
        what = "a file, not a token cache" if os.path.exists(folder) else "no such folder"
        raise DataError(f"{folder}: {what}", hint="name a folder that t5tune prepare wrote")
    path = folder / CACHE_MANIFEST_FILE
    try:
        manifest = parse_json_object(path.read_bytes())
        version = manifest["format"]
    except FileNotFoundError as error:
        kind = describe_folder(folder)
        why = f"{kind}, not a token cache" if kind else f"contains no {CACHE_MANIFEST_FILE}, so it isn't a token cache"
        raise DataError(f"{folder}: {why}", hint="name a folder that t5tune prepare wrote, or a run folder") from error
    except (OSError, ValueError, KeyError) as error:
        why = "it has no format" if isinstance(error, KeyError) else describe_error(error)
        problem = f"{path}: not the manifest of a token cache ({why})"
        raise DataError(problem, hint="name a folder that t5tune prepare wrote") from error
    if version != CACHE_FORMAT:
        problem = f"{path}: format {version}; this version of t5tune reads format {CACHE_FORMAT}"
        raise DataError(problem, hint=PREPARE_AGAIN)
    try:
        checked: Any = _build_model().model_validate(manifest, strict=True)
    except ValidationError as error:
        raise DataError(describe_manifest_error(path, error), hint=PREPARE_AGAIN) from None
    manifest["inputs"] |= checked.inputs.model_dump(exclude={"data"})  # some settings also accept a text for a list
    kind = KINDS[manifest["inputs"]["objective"]]
    for name, needed_by in (("labels", "labels"), ("span_corruption", "raw text")):
        if (manifest.get(name) is not None) != (kind == needed_by):
            state = "present" if manifest.get(name) is not None else "missing"
            problem = f"{path}: {name}: {state}, but the objective is {manifest['inputs']['objective']}"
            raise DataError(problem, hint=PREPARE_AGAIN)
    for name in manifest["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path}: files: {shorten_file_value(name)}: not in the token cache", hint=PREPARE_AGAIN)
    if missing := {*TABLES, TEMPLATE_FILE} - manifest["files"].keys():
        raise DataError(f"{path}: files: {min(missing)}: missing", hint=PREPARE_AGAIN)
    return manifest


@lru_cache(maxsize=1)
def _build_model() -> type[BaseModel]:
    """Build the model that checks a manifest's values."""
    groups = (ConversationSettings, ReadingSettings, SelectionSettings, SplitSettings)
    inputs: dict[str, Any] = {
        name: group.model_fields[name].rebuild_annotation()
        for group in groups
        for name in select_settings(group, Affects.CACHE)
    }
    inputs |= {"data": list[_File], "tokenizer": str, "template": str, "add_tokens": list[str], "num_data": int | None}
    values: dict[str, Any] = {
        "made_by": str,
        "dtype": Literal["<u2", "<i4"],
        "eos_token_id": NonNegativeInt,
        "source_start_ids": list[NonNegativeInt],
        "source_end_ids": list[NonNegativeInt],
        "added_tokens": list[_Text],
        "added_token_ids": list[NonNegativeInt],
        "left_out_tokens": list[_Text],
        "eval_fraction": Annotated[float, Field(ge=0, lt=1)],
        "split_seed": NonNegativeInt,
        "seed": NonNegativeInt,
        "files": dict[str, str],
        "inputs": create_model("Inputs", **_require(inputs)),
        "unused_files": list[InstanceOf[str]],  # a file's name may have lone surrogates
        "lost_characters": list[_LostCharacter],
        **dict.fromkeys(("rejected_by_reason", "repaired", "dropped"), dict[str, NonNegativeInt]),
        **dict.fromkeys(COUNTS, NonNegativeInt),
    }
    optional: dict[str, Any] = {"labels": (_Labels | None, None), "span_corruption": (_SpanCorruption | None, None)}
    optional["sources"] = (list[InstanceOf[str]], [])
    return create_model("Manifest", **_require(values), **optional)


def _require(types: dict[str, Any]) -> dict[str, Any]:
    return {name: (kind, ...) for name, kind in types.items()}


def describe_manifest_error(path: Path, error: ValidationError) -> str:
    """Describe the first wrong value of a manifest in one line."""
    detail = error.errors()[0]
    found = "" if detail["type"] == "missing" else f"{shorten_file_value(detail['input'])}: "
    return f"{path}: {format_place(detail['loc'])}: {found}{describe_value_error(detail)}"
