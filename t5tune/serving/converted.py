"""The folder of models converted to CTranslate2: each is converted once, and later servers use it again.

    folder = find_converted(Path("~/.cache/t5tune/converted"), "run", base, adapter, "nf4", "int8", convert, report)

The name of a conversion contains a hash of all its inputs, so a server never takes a conversion of different weights.
"""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import compute_full_hash, load_hash, read_file_stats, store_hash
from t5tune.checkpoints.model_folder import is_converted, is_trained_file
from t5tune.errors import SettingsError, WriteError
from t5tune.file_names import MODEL_SUFFIXES
from t5tune.formatting import format_size
from t5tune.io.atomic import hash_file, hash_json, lock_file
from t5tune.progress import Note, Report

CONVERSION_FORMAT = 2  # raise it when conversions by older versions of t5tune must no longer be used
HASHES_FOLDER = "hashes"
SECONDS_TO_WAIT = 3600.0  # for another process that converts the same model


def get_default_folder() -> Path:
    """Return t5tune/converted in the user's cache folder (https://specifications.freedesktop.org/basedir)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t5tune" / "converted"


def find_converted(
    folder: Path,
    name: str,
    base: Path,
    adapter: Path | None,
    onto: str,
    quantization: str | None,
    convert: Callable[[Path], None],
    report: Report,
) -> Path:
    """Find the conversion of a base, or of a base with an adapter, and make it if it doesn't exist.

    Args:
        folder: of all conversions.
        onto: the weights that the adapter is merged into: base, nf4, ….
        convert: writes the conversion to a path, as a whole or not at all.
    """
    hashes = folder / HASHES_FOLDER
    try:
        hashes.mkdir(parents=True, exist_ok=True)
        identity = _hash_inputs(hashes, base, adapter, onto, quantization)
    except (OSError, WriteError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.message
        raise SettingsError(f"converted_dir: {folder}: {reason}", hint="choose another folder") from None
    ending = f"-{quantization or 'exact'}-{identity[:16]}"
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:40].strip("-.")
    with nullcontext() if _find_any(folder, ending) else lock_file(hashes / f"{identity}.lock", SECONDS_TO_WAIT):
        # another process may have made it while this process waited for the lock
        if found := _find_any(folder, ending):
            report(Note(f"already converted to CTranslate2: {found}"))
            return found
        made = folder / f"{slug or 'model'}{ending}"
        convert(made)
        size = sum(file.stat().st_size for file in made.iterdir())
        report(Note(f"converted to CTranslate2: {made} ({format_size(size)})"))
        return made


def _find_any(folder: Path, ending: str) -> Path | None:
    """Find a complete conversion of the same inputs, whatever the model was called then."""
    return next(filter(is_converted, folder.glob(f"[!.]*{ending}")), None)


def _hash_inputs(hashes: Path, base: Path, adapter: Path | None, onto: str, quantization: str | None) -> str:
    """Hash the inputs of a conversion. The hash of a base's weights is cached while its files are unchanged."""
    import ctranslate2

    cached = hashes / f"{hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:16]}.json"
    stats = read_file_stats(base)
    weights = load_hash(cached, stats) or compute_full_hash(open_base(base))
    store_hash(cached, stats, weights)
    return hash_json(
        {
            "format": CONVERSION_FORMAT,
            "ctranslate2": ctranslate2.__version__,
            "onto": onto,
            "quantization": quantization,
            "weights": weights,
            "base": _hash_files(base, with_weights=False),
            "adapter": None if adapter is None else _hash_files(adapter, with_weights=True),
        }
    )


def _hash_files(folder: Path, with_weights: bool) -> dict[str, str]:
    files = (file for file in folder.iterdir() if file.is_file() and is_trained_file(file.name))
    return {file.name: hash_file(file) for file in files if with_weights or file.suffix not in MODEL_SUFFIXES}
