r"""The token cache: a folder that holds each conversation's ids once, and the spans of its answers.

    tokens.bin       the ids of all conversations, one after the other: uint16 little-endian, or int32 where
                     the vocabulary is larger than 65,536
    conversations.bin  a row each: CONVERSATION, in columns (see data/integer_table.py)
    examples.bin     a row per answer, in the order of the data: EXAMPLE, in columns
    tokenizer/       the tokenizer that made the ids, added tokens included
    template.yaml    the conversation template
    training_data.json  how the examples were made, for who talks to the model (see checkpoints/training_data.py)
    rejected.jsonl   the records that were refused, whole, with file, line, index, byte offset and reason
    manifest.json    format, columns, hashes, settings, counts, length percentiles, and the SHA-256 of each file

The same inputs give the same bytes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from t5tune.data.encoding import Example, Span, example_of
from t5tune.data.integer_table import Columns, columns_named, mapped
from t5tune.errors import DataError
from t5tune.io.atomic import sha256
from t5tune.io.reasons import reason_of
from t5tune.settings.messages import value_reason

FORMAT = 4
MANIFEST = "manifest.json"
CONVERSATION = ("start", "key")  # where it begins in tokens.bin; the same number for conversations of the same words
EXAMPLE = ("conversation", *Span._fields)  # its conversation's number, and places counted from that one's start
CONTENTS = {
    "tokens.bin", "conversations.bin", "examples.bin", "tokenizer", "template.yaml", "training_data.json",
    "rejected.jsonl", MANIFEST,
}  # fmt: skip
# what reading a cache takes from its manifest, and the type of each value
NEEDED: dict[str, Any] = {
    "dtype": Literal["<u2", "<i4"],
    "conversation_columns": columns_named(CONVERSATION),
    "example_columns": columns_named(EXAMPLE),
    "eos_token_id": int,
    "added_tokens": list[str],
    "added_token_ids": list[int],
    "left_out_tokens": list[str],
    "eval_fraction": Annotated[float, Field(ge=0, lt=1)],
    "seed": Annotated[int, Field(ge=0)],
    "files": dict[str, str],
    "inputs": dict[str, Any],
    "rejected_by_reason": dict[str, int],
    **dict.fromkeys(
        ("conversations", "rejected", "examples", "source_tokens", "target_tokens", "truncated_sources",
         "truncated_targets", "unknown_tokens"), int,
    ),
}  # fmt: skip
PERCENTILES = (50, 90, 99, 100)


class Cache(Sequence[Example]):
    """The examples of a cache, or those at `indices`, read from the disk as they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], indices: npt.NDArray[np.int64] | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.eos_token_id = int(manifest["eos_token_id"])
        self._tokens = mapped(folder / "tokens.bin", np.dtype(manifest["dtype"]))
        self._starts = Columns(folder / "conversations.bin", manifest["conversation_columns"]).column("start")
        self._examples = Columns(folder / "examples.bin", manifest["example_columns"])
        self._indices = np.arange(len(self._examples)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        conversation, span = self._row(index)
        return example_of(self._tokens[int(self._starts[conversation]) :], span, self.eos_token_id)

    def whole(self, index: int) -> tuple[Example, int, npt.NDArray[Any], Span]:
        """An example, its conversation's number, the ids of the conversation up to the answer's end, and its span."""
        conversation, span = self._row(index)
        start = int(self._starts[conversation])
        return self[index], conversation, self._tokens[start : start + span.answer_end], span

    def cut(self) -> npt.NDArray[np.int64]:
        """How many tokens each example lost to the longest length, of source and target."""
        source = self._places("source_start") - self._places("system_end")
        return source + self._places("answer_end") - self._places("target_end")

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that made the ids."""
        return self.folder / "tokenizer"

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that were added to the base's tokenizer, in the order of their ids."""
        return list(self.manifest["added_tokens"])

    def lengths(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(source lengths, target lengths) in tokens, end tokens included, in the cache's order."""
        return lengths_of(self._places)

    def _row(self, index: int) -> tuple[int, Span]:
        conversation, *places = self._examples.row(self._indices[index])
        places[-2:] = map(bool, places[-2:])
        return conversation, Span._make(places)

    def _places(self, name: str) -> npt.NDArray[np.int64]:
        return self._examples.column(name, self._indices).astype(np.int64)

    def number(self, index: int) -> int:
        """The number of an example in the whole cache."""
        return int(self._indices[index])

    def hash_of_numbers(self) -> str:
        """The SHA-256 of the numbers in the whole cache that these examples have."""
        return hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()

    def first(self, count: int) -> "Cache":
        """The first `count` examples."""
        return Cache(self.folder, self.manifest, self._indices[:count])

    def parts(self) -> tuple["Cache", "Cache | None"]:
        """(training, held out) as prepare was asked to part them; None: it wasn't."""
        fraction = float(self.manifest["eval_fraction"])
        return self.split(fraction, int(self.manifest["seed"])) if fraction else (self, None)

    def split(self, held_out: float, seed: int) -> tuple["Cache", "Cache"]:
        """(training, held out): the share `held_out` of the conversations, at least one, with all their answers.

        Conversations of the same words stay together.

        Raises:
            DataError: too few conversations to hold one out.
        """
        conversations = Columns(self.folder / "conversations.bin", self.manifest["conversation_columns"])
        keys = conversations.column("key", self._places("conversation"))
        different = np.unique(keys)
        count = max(1, round(held_out * len(different)))
        if count >= len(different):
            raise DataError(
                f"eval_fraction: {held_out} of {len(different)} conversations leaves none to train on; "
                "give more, or a file of others as eval_data_path"
            )
        chosen = np.random.default_rng(seed).permutation(different)[:count]
        is_held_out = np.isin(keys, chosen)
        return (
            Cache(self.folder, self.manifest, self._indices[~is_held_out]),
            Cache(self.folder, self.manifest, self._indices[is_held_out]),
        )


def lengths_of(
    column: Callable[[str], npt.NDArray[np.int64]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(source lengths, target lengths) of examples, end tokens included, from the columns of their rows."""
    source = column("system_end") + column("source_end") - column("source_start") + 1
    target = column("target_end") - column("target_start") + column("target_is_whole")
    return source, target


def is_cache(path: Path) -> bool:
    """Whether a folder looks like a token cache."""
    # pathlib raises where a folder can't be looked into
    return os.path.isfile(path / MANIFEST) and os.path.isfile(path / "tokens.bin")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        DataError: it is missing, broken, or of another format.
    """
    if not os.path.isdir(folder):
        what = "a file, not a token cache" if os.path.exists(folder) else "no such folder"
        raise DataError(f"{folder}: {what}", hint="name a folder that t5tune prepare wrote")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or "format" not in manifest:
            raise ValueError("it has no format")
        version = manifest["format"]
    except (OSError, ValueError, RecursionError) as error:
        why = reason_of(error).lower() if isinstance(error, OSError) else reason_of(error)
        raise DataError(
            f"{folder / MANIFEST}: not the manifest of a token cache ({why})",
            hint="name a folder that t5tune prepare wrote",
        ) from error
    if version != FORMAT:
        raise DataError(
            f"{folder / MANIFEST}: format {version}, this release reads {FORMAT}",
            hint="run t5tune prepare again",
        )
    for name, kind in NEEDED.items():
        try:
            TypeAdapter(kind).validate_python(manifest.get(name), strict=True)
        except ValidationError as error:
            reason = f"{manifest[name]!r:.80}: {value_reason(error.errors()[0])}" if name in manifest else "missing"
            raise DataError(f"{folder / MANIFEST}: {name}: {reason}", hint="run t5tune prepare again") from None
    return dict(manifest)


def open_cache(folder: Path) -> Cache:
    """Check a cache against the hashes of its manifest and map it.

    Raises:
        DataError: a file is missing or differs from what was written.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest["files"])
    return Cache(folder, manifest)


def verify_files(folder: Path, files: dict[str, str]) -> None:
    """Compare each file with its SHA-256.

    Raises:
        DataError: naming the first that is missing or differs.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing from the token cache", hint="run t5tune prepare again")
        if sha256(path) != expected:
            raise DataError(f"{path}: differs from what prepare wrote", hint="run t5tune prepare again")


def hash_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below the folder but the manifest, sorted by name."""
    paths: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths if path.name != MANIFEST}


def percentiles(counted: Counter[int]) -> dict[str, int]:
    """p50, p90, p99 and p100 of lengths that were counted: the least that so many percent of them don't exceed."""
    found: dict[str, int] = {}
    total, below = counted.total(), 0
    for length in sorted(counted):
        below += counted[length]
        for share in PERCENTILES:
            if 100 * below >= share * total:
                found.setdefault(f"p{share}", length)
    return found
