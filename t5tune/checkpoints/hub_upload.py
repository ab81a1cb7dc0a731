"""Upload a result's folder to the Hugging Face Hub: the files that users of the model need, and no other files.

    open_repository(settings, folder, report)      # before the work: refuses a wrong name or token
    url = upload_result(settings, folder, report)  # after it; None: no upload, or it failed

A run folder's data, settings, metrics and report aren't uploaded, since they may contain private texts and folder
names. Nor are files that t5tune doesn't know. The model card gets only the last part of a path. merge needs the base's
path in an adapter's config and weights, so it is uploaded with a warning.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.adapter_folder import is_adapter
from t5tune.checkpoints.model_card import fill_in_card
from t5tune.checkpoints.model_folder import PROCESSOR_FILES, TRAINED_FILES, is_trained_file
from t5tune.checkpoints.tokenizer_files import CHAT_TEMPLATES_FOLDER, TOKENIZER_FILES
from t5tune.errors import CheckpointError, SettingsError, UploadError
from t5tune.file_names import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    MODEL_CARD_FILE,
    ONNX_FOLDER,
    ONNX_PAGE_FILE,
    SETTINGS_FILE,
)
from t5tune.formatting import format_count, format_size
from t5tune.hub.names import is_published
from t5tune.hub.upload import create_repository, upload_files
from t5tune.io.untrusted import resolve_inside
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.progress import Note, Report
from t5tune.settings.groups.hub import HubSettings

WEIGHT_PATTERNS = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_model.*", "non_lora_state.safetensors",
    "model.bin",  # CTranslate2's
    f"{ONNX_FOLDER}/*.onnx*",
)  # fmt: skip
# CTranslate2's
VOCABULARY_FILES = {f"{kind}_vocabulary.{end}" for kind in ("shared", "source", "target") for end in ("json", "txt")}
# not the card, which no program reads
LOADED_FILES = (TRAINED_FILES - {MODEL_CARD_FILE}).union(TOKENIZER_FILES, PROCESSOR_FILES, VOCABULARY_FILES)


@dataclass(frozen=True)
class Uploaded:
    """An upload; `bytes` also counts files that the Hub already had."""

    url: str
    files: int
    bytes: int


def choose_repository(settings: HubSettings, folder: Path) -> str:
    return settings.hub_model_id or folder.resolve().name


def open_repository(settings: HubSettings, folder: Path, report: Report) -> None:
    """Create the repository if the settings ask for an upload. The work continues if the Hub can't be reached."""
    if settings.push_to_hub:
        try:
            create_repository(choose_repository(settings, folder), settings.hub_private_repo)
        except UploadError as error:
            report(Note(f"{error.message}; the next upload tries again", warning=True))


def upload_result(
    settings: HubSettings, folder: Path, report: Report, message: str | None = None, copy: Path | None = None
) -> str | None:
    """Upload a result if the settings ask for it, and return the repository's URL.

    The result is complete, so a failed upload isn't an error: a note says how to upload it later, also after a signal.

    Args:
        message: of the commit; None: the folder's name.
        copy: the folder to upload instead, if `folder` may be deleted meanwhile.
    """
    if not settings.push_to_hub:
        return None
    name = choose_repository(settings, folder if copy is None else folder.parent)
    later = explain_uploading_later(folder, name, settings.hub_private_repo)
    try:
        message = message or f"Upload {folder.resolve().name}"
        return upload_folder(copy or folder, name, settings.hub_private_repo, report, message).url
    except (SettingsError, UploadError, CheckpointError) as error:
        report(Note(f"{error.message}; {later}", warning=True))
        return None
    except KeyboardInterrupt:  # in export and merge, also SIGTERM and SIGHUP; train reports them in its error
        report(Note(f"the upload was stopped; {later}", warning=True))
        raise


def explain_uploading_later(folder: Path, name: str, is_private: bool) -> str:
    command = ["t5tune", "push", str(folder), name, *(["--hub-private-repo"] if is_private else [])]
    return f"it is complete in {folder}; to upload it later: {shlex.join(command)}"


def upload_folder(folder: Path, name: str, is_private: bool, report: Report, message: str) -> Uploaded:
    """Upload a folder's model or adapter."""
    files = list_uploaded_files(folder)
    if not {ADAPTER_CONFIG_FILE, CONFIG_FILE} & files.keys() or not any(map(is_weight_file, files)):
        hint = "give a run folder, or one that t5tune export or t5tune merge wrote"
        raise CheckpointError(f"folder: {folder}: contains no adapter and no model", hint=hint)
    size = sum(file.stat().st_size for file in files.values())
    # read before the Hub is asked: a copy of a checkpoint may be deleted meanwhile
    card = files[MODEL_CARD_FILE].read_bytes() if MODEL_CARD_FILE in files else None
    base, *local = _list_local_folders(folder)
    name = create_repository(name, is_private)
    report(Note(f"uploading {format_count(len(files), 'file')} ({format_size(size)}) to {name}"))
    if base and base != "pocket":
        words = f"the adapter's files name the base as {base}, a folder on this machine"
        report(Note(f"{words}: tell the adapter's users which model it is", warning=True))
    contents: dict[str, Path | bytes] = {**files}
    if card is not None:
        contents[MODEL_CARD_FILE] = fill_in_card(card, name, [base, *local])
    url = upload_files(name, contents, message, is_loaded_file, report)
    return Uploaded(url, len(files), size)


def is_weight_file(name: str) -> bool:
    """Whether a file of this name contains weights, or is their index."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)


def is_loaded_file(path: str) -> bool:
    """Whether t5tune or another program that loads a model reads the repository's file at this path.

    An upload deletes such files if it doesn't replace them. The prefixes of uploaded files don't matter here: a file
    such as tokenizer_notes.txt may be the user's.
    """
    folder, _, name = path.rpartition("/")
    if folder and folder != ONNX_FOLDER:
        return folder == CHAT_TEMPLATES_FOLDER and name.endswith(".jinja")
    return path in LOADED_FILES or is_weight_file(path)


def list_uploaded_files(folder: Path) -> Mapping[str, Path]:
    """List the files to upload: path in the repository -> file."""
    names = sorted(entry.name for entry in folder.iterdir())
    found = {name: resolve_inside(folder, name) for name in names if _is_uploaded(name) and (folder / name).is_file()}
    for subfolder, pattern in ((CHAT_TEMPLATES_FOLDER, "*.jinja"), (ONNX_FOLDER, "*.onnx*")):
        for file in sorted((folder / subfolder).glob(pattern)):
            found[f"{subfolder}/{file.name}"] = resolve_inside(folder / subfolder, file.name)
    return found


def _is_uploaded(name: str) -> bool:
    return is_trained_file(name) or is_weight_file(name) or name in {*VOCABULARY_FILES, ONNX_PAGE_FILE}


def _list_local_folders(folder: Path) -> list[str]:
    """List the local paths in a result's files: an adapter's base (or ""), and the paths in settings.yaml."""
    path = folder / SETTINGS_FILE
    saved = read_yaml(path, MAX_SETTINGS_BYTES) if path.is_file() else {}
    base = read_adapter_config(folder).get("base_model_name_or_path") if is_adapter(folder) else None
    adapters = saved.get("adapter")
    names = [base, saved.get("model_name_or_path"), *(adapters if isinstance(adapters, list) else [adapters])]
    return [name if isinstance(name, str) and not is_published(name) else "" for name in names]
