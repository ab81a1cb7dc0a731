"""Write settings as the words of a command line, which read back as the same settings.

list_flags(settings, ["bf16", "q_lora", "lora_r"])    # [["--no-bf16"], ["--q-lora"], ["--lora-r", "16"]]
"""

from collections.abc import Iterable, Iterator

from t5tune.settings.fields import Settings


def list_flags(settings: Settings, names: Iterable[str]) -> Iterator[list[str]]:
    """List the words of each of these settings that differs from its default."""
    values, fields = settings.model_dump(mode="json"), type(settings).model_fields
    for name in names:
        value, flag = values[name], settings.format_option(name)
        if value == fields[name].get_default():
            continue
        if isinstance(value, bool):
            yield [flag if value else f"--no-{flag.removeprefix('--')}"]
            continue
        texts = [str(item) for item in (value if isinstance(value, list) else ["none" if value is None else value])]
        # a value that begins with a dash would be read as a flag, and an empty list as a flag without its value
        is_attached = not texts or any(text.startswith("-") for text in texts)
        yield [f"{flag}={text}" for text in texts or [""]] if is_attached else [flag, *texts]
