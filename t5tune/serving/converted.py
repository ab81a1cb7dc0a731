"""The folder of models that were converted to CTranslate2: each is converted once, and used by later servers.

    folder = find_converted(Path("~/.cache/t5tune/converted"), "run", base, adapter, "int8", convert, report)

A conversion's name has a hash of all that it was made of, so that one of other weights is never taken.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import compute_full_hash, load_hash, read_file_stats, store_hash
from t5tune.checkpoints.model_folder import is_converted, is_trained_file
from t5tune.errors import SettingsError
from t5tune.formatting import format_size
from t5tune.io.atomic import hash_file, lock_file
from t5tune.progress import Note, Report

CONVERSION_FORMAT = 1  # to be raised when conversions by older versions of t5tune mustn't be used any more
HASHES_FOLDER = "hashes"
SECONDS_TO_WAIT = 3600.0  # for another process that converts the same model
WEIGHT_SUFFIXES = {".safetensors", ".bin"}


def get_default_folder() -> Path:
    """Return t5tune/converted in the user's cache folder (https://specifications.freedesktop.org/basedir)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t5tune" / "converted"


def find_converted(
    folder: Path,
    name: str,
    base: Path,
    adapter: Path | None,
    quantization: str | None,
    convert: Callable[[Path], None],
    report: Report,
) -> Path:
    """Find the conversion of a base, or of a base with an adapter, and make it if it doesn't exist.

    Args:
        folder: of all conversions.
        name: of the model.
        convert: writes the conversion to a path, as a whole or not at all.

    Raises:
        SettingsError: the folder can't be written to.
    """
    try:
        (folder / HASHES_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"converted_dir: {folder}: {error.strerror}", hint="name another folder") from None
    identity = _hash_inputs(folder / HASHES_FOLDER, base, adapter, quantization)
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:40].strip("-.")
    found = folder / f"{slug or 'model'}-{quantization or 'exact'}-{identity[:16]}"
    # another model of the same weights may have another name
    others = folder.glob(f"*-{quantization or 'exact'}-{identity[:16]}")
    if existing := next(filter(is_converted, others), None):
        report(Note(f"converted to CTranslate2 before: {existing}"))
        return existing
    with lock_file(folder / HASHES_FOLDER / f"{identity}.lock", SECONDS_TO_WAIT):
        if not is_converted(found):
            convert(found)
            size = sum(file.stat().st_size for file in found.iterdir())
            report(Note(f"converted to CTranslate2: {found} ({format_size(size)})"))
    return found


def _hash_inputs(hashes: Path, base: Path, adapter: Path | None, quantization: str | None) -> str:
    """Hash all that a conversion depends on. The hash of a base's weights is kept while its files are the same."""
    import ctranslate2

    kept = hashes / f"{hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:16]}.json"
    stats = read_file_stats(base)
    weights = load_hash(kept, stats) or compute_full_hash(open_base(base))
    store_hash(kept, stats, weights)
    parts = {
        "format": CONVERSION_FORMAT,
        "ctranslate2": ctranslate2.__version__,
        "quantization": quantization,
        "weights": weights,
        "base": _hash_files(base, with_weights=False),
        "adapter": None if adapter is None else _hash_files(adapter, with_weights=True),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_files(folder: Path, with_weights: bool) -> dict[str, str]:
    files = (file for file in folder.iterdir() if file.is_file() and is_trained_file(file.name))
    return {file.name: hash_file(file) for file in files if with_weights or file.suffix not in WEIGHT_SUFFIXES}
