"""The members of the family that can be trained, by the model_type of their config.json."""

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


def family_of(config: dict[str, Any], folder: Path) -> Family:
    """The family of a config.json.

    Raises:
        ModelError: it is another kind of model.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = "; ".join(f"{name} ({family.members})" for name, family in FAMILIES.items())
        raise ModelError(
            f"{folder / 'config.json'}: model_type {model_type!r} can't be trained", hint=f"known: {known}"
        )
    return FAMILIES[model_type]
