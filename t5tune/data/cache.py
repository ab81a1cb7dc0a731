r"""The token cache: a folder that holds each conversation's ids once, and the spans of its answers.

    tokens.bin       the ids of all conversations, one after the other: uint16 little-endian, or int32 where
                     the vocabulary is larger than 65,536
    conversations.bin  one CONVERSATION record each
    examples.bin     one record per answer (see `example_dtype`), in the order of the data
    tokenizer/       the tokenizer that made the ids, added tokens included
    template.yaml    the layout
    rejected.jsonl   the records that were refused, whole, with file, line, index, byte offset and reason
    manifest.json    format, hashes, settings, counts, length percentiles, and the SHA-256 of each file

The same inputs give the same bytes.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from t5tune.data.encoding import Example, Span, example_of
from t5tune.errors import DataError
from t5tune.publish import sha256

FORMAT = 2
MANIFEST = "manifest.json"
CONVERSATION = np.dtype(
    [
        ("start", "<u8"),  # where it begins in tokens.bin
        ("key", "<u8"),  # the same for conversations of the same words
    ]
)
WIDE, NARROW = np.dtype("<u4"), np.dtype("<u2")  # of a place in a conversation
CONTENTS = {
    "tokens.bin", "conversations.bin", "examples.bin", "tokenizer", "template.yaml", "rejected.jsonl", MANIFEST
}  # fmt: skip
# what reading a cache takes from its manifest, and the type of each value
NEEDED: dict[str, Any] = {
    "dtype": Literal["<u2", "<i4"],
    "place_dtype": Literal["<u2", "<u4"],
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


def example_dtype(place: np.dtype[Any]) -> np.dtype[Any]:
    """An answer's record: its conversation's number, then a Span, whose places count from the conversation's start."""
    flags = {"source_is_whole", "target_is_whole"}
    return np.dtype([("conversation", "<u4"), *((name, "?" if name in flags else place) for name in Span._fields)])


class Cache(Sequence[Example]):
    """The examples of a cache, or those at `indices`, read from the disk as they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], indices: npt.NDArray[np.int64] | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.eos_token_id = int(manifest["eos_token_id"])
        self._tokens = _mapped(folder / "tokens.bin", np.dtype(manifest["dtype"]))
        self._conversations = _mapped(folder / "conversations.bin", CONVERSATION)
        self._rows = _mapped(folder / "examples.bin", example_dtype(np.dtype(manifest["place_dtype"])))
        self._indices = np.arange(len(self._rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        conversation, *span = self._rows[self._indices[index]].tolist()
        start = int(self._conversations["start"][conversation])
        return example_of(self._tokens[start:], Span(*span), self.eos_token_id)

    def whole(self, index: int) -> tuple[Example, int, npt.NDArray[Any], Span]:
        """An example, its conversation's number, the ids of the conversation up to the answer's end, and its span."""
        conversation, *values = self._rows[self._indices[index]].tolist()
        span, start = Span(*values), int(self._conversations["start"][conversation])
        return self[index], conversation, self._tokens[start : start + span.answer_end], span

    def cut(self) -> npt.NDArray[np.int64]:
        """How many tokens each example lost to the longest length, of source and target."""
        rows = self._rows[self._indices]
        signed = {
            name: rows[name].astype(np.int64) for name in ("system_end", "source_start", "target_end", "answer_end")
        }
        return signed["source_start"] - signed["system_end"] + signed["answer_end"] - signed["target_end"]

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
        return lengths_of(self._rows[self._indices])

    def number(self, index: int) -> int:
        """The number of an example in the whole cache."""
        return int(self._indices[index])

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
        keys = self._conversations["key"][self._rows["conversation"][self._indices]]
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


def lengths_of(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(source lengths, target lengths) of examples' records, end tokens included."""
    signed = {name: rows[name].astype(np.int64) for name in Span._fields[1:6]}
    source = signed["system_end"] + signed["source_end"] - signed["source_start"] + 1
    target = signed["target_end"] - signed["target_start"] + rows["target_is_whole"]
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
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
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
            reason = f"{manifest[name]!r:.80}: {error.errors()[0]['msg']}" if name in manifest else "missing"
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


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    # a slice of a memmap costs several times that of a plain array over the same pages
    return np.memmap(path, dtype, "r").view(np.ndarray)
