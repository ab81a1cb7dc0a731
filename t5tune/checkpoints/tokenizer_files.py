"""Copy the files that accompany weights: the tokenizer and the conversation template.

The files are untrusted: each must be inside its folder, be a regular file of a plausible size, and require no custom
code.
"""

import shutil
from pathlib import Path

from t5tune.checkpoints.training_data import read_training_data, write_training_data
from t5tune.data.templates import parse_template
from t5tune.errors import CheckpointError
from t5tune.file_names import TOKENIZER_CONFIG_FILE
from t5tune.io.untrusted import has_file, read_json_object, resolve_inside
from t5tune.io.yaml_file import read_yaml

TOKENIZER_FILE_PREFIXES = ("tokenizer", "special_tokens", "added_tokens", "spiece")
MAX_TOKENIZER_FILE_BYTES = 256 << 20  # Gemma's tokenizer.json has 33 MB


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files.

    Raises:
        CheckpointError: a file is a link out of its folder, isn't a regular file or is too large, or the tokenizer
            requires custom code.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(TOKENIZER_FILE_PREFIXES) and has_file(source, file.name):
            copy_untrusted_file(source, file.name, folder)
    if has_file(source, TOKENIZER_CONFIG_FILE) and read_json_object(source, TOKENIZER_CONFIG_FILE).get("auto_map"):
        raise CheckpointError(
            f"{source / TOKENIZER_CONFIG_FILE}: auto_map: requires custom code from the tokenizer's repository, "
            "which t5tune doesn't run"
        )


def copy_template(file: Path, folder: Path) -> None:
    """Copy the conversation template, if there is one, and the training_data.json next to it.

    Raises:
        CheckpointError: see `copy_tokenizer`; or training_data.json is broken.
        SettingsError: the file isn't a valid conversation template.
    """
    if has_file(file.parent, file.name):
        # refuse a template here that chat and evaluate couldn't parse later
        parse_template(read_yaml(file), file)
        shutil.copyfile(file, folder / file.name)
    if (data := read_training_data(file.parent)) is not None:
        write_training_data(folder, data)


def copy_untrusted_file(source: Path, name: str, folder: Path) -> None:
    """Copy one untrusted file.

    Raises:
        CheckpointError: it is a link out of its folder, isn't a regular file, or is too large.
    """
    path = resolve_inside(source, name)
    if (size := path.stat().st_size) > MAX_TOKENIZER_FILE_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; {MAX_TOKENIZER_FILE_BYTES} is the maximum for such a file")
    shutil.copyfile(path, folder / name)
