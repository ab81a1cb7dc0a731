"""What stands beside weights and goes with them: the tokenizer, and how a conversation is laid out.

It may come from a stranger: each must lie in its folder, be a plain file of a believable size, and ask for no code.
"""

import shutil
from pathlib import Path

from t5tune.checkpoints.training_data import read_training_data, write_training_data
from t5tune.errors import CheckpointError
from t5tune.io.untrusted import holds, inside, read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "spiece")
MAX_BYTES = 256 << 20  # Gemma's tokenizer.json has 33 MB


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files.

    Raises:
        CheckpointError: a link that leaves its folder, no plain file, one that never ends, or a tokenizer that asks for
            code of its own.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(TOKENIZER_FILES) and holds(source, file.name):
            copy_file(source, file.name, folder)
    if holds(source, TOKENIZER_CONFIG) and read_object(source, TOKENIZER_CONFIG).get("auto_map"):
        raise CheckpointError(
            f"{source / TOKENIZER_CONFIG}: auto_map: asks for code that comes with the tokenizer; t5tune runs none"
        )


def copy_template(file: Path, folder: Path) -> None:
    """Copy the conversation template where there is one, and training_data.json next to it.

    Raises:
        CheckpointError: as `copy_tokenizer`, or training_data.json is broken.
        SettingsError: it is no conversation template.
    """
    if holds(file.parent, file.name):
        # parsed by whoever talks to the model: what they can't read is refused here
        from t5tune.data.templates import template_from
        from t5tune.io.yaml_file import read_yaml

        template_from(read_yaml(file), file)
        shutil.copyfile(file, folder / file.name)
    if (data := read_training_data(file.parent)) is not None:
        write_training_data(folder, data)


def copy_file(source: Path, name: str, folder: Path) -> None:
    """Copy one file.

    Raises:
        CheckpointError: as `copy_tokenizer`.
    """
    path = inside(source, name)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; {MAX_BYTES} is the most that such a file has")
    shutil.copyfile(path, folder / name)
