"""The members of the family that can be trained, by the model_type of their config.json.

What differs between members of one type is in their files, and is read from there: whether the head is tied (the
weights say it), start, pad and end tokens and the vocabulary's spare rows (config.json and the tokenizer).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Facts of one model_type.

    Args:
        members: what people call the models of this type.
        attention, feed_forward: names of the linear layers of a block, which LoRA may target.
    """

    members: str
    attention: tuple[str, ...] = ("q", "k", "v", "o")
    feed_forward: tuple[str, ...] = ("wi", "wi_0", "wi_1", "wo")

    def target_modules(self, names: list[str]) -> list[str]:
        """The layers that names and groups of names mean, each once: attention -> q, k, v, o."""
        groups = {
            "attention": self.attention,
            "feed-forward": self.feed_forward,
            "all-linear": self.attention + self.feed_forward,
        }
        return list(dict.fromkeys(layer for name in names for layer in groups.get(name.replace("_", "-"), (name,))))


FAMILIES = {
    "t5": Family("T5, T5 v1.1, Flan-T5, Flan-UL2, ByT5, fastchat-t5"),
    "mt5": Family("mT5"),
    "umt5": Family("umT5"),
}

# encoder-decoders of T5's line that t5tune will take, and does not yet
LATER = {
    "longt5": "LongT5",
    "t5gemma": "T5Gemma",
    "t5gemma2": "T5Gemma 2",
    "switch_transformers": "Switch Transformers",
}


def family_of(config: dict[str, Any], folder: Path) -> Family:
    """The family of a config.json.

    Raises:
        ModelError: it is another kind of model.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        if model_type in LATER:
            raise ModelError(
                f"{folder / 'config.json'}: {LATER[str(model_type)]} comes later: it can't be trained yet",
                hint=f"what can: {', '.join(family.members for family in FAMILIES.values())}",
            )
        known = "; ".join(f"{name} ({family.members})" for name, family in FAMILIES.items())
        raise ModelError(
            f"{folder / 'config.json'}: model_type {model_type!r} can't be trained", hint=f"known: {known}"
        )
    return FAMILIES[model_type]
