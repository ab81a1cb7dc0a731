"""The denoisers of span corruption, by name: the share of a text that is masked, and the length of the spans."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from t5tune.errors import suggest_name


@dataclass(frozen=True)
class Denoiser:
    """How a text is masked.

    Args:
        density: the share of masked tokens.
        mean_length: of the masked spans, in tokens; None: the end of the text is masked, up to twice the density.
    """

    density: float
    mean_length: float | None


_R = (Denoiser(0.15, 3.0), Denoiser(0.15, 8.0))
_S = (Denoiser(0.25, None),)
_X = (Denoiser(0.5, 3.0), Denoiser(0.5, 8.0), Denoiser(0.15, 64.0), Denoiser(0.5, 64.0))
DENOISERS: dict[str, tuple[Denoiser, ...]] = {
    "t5": (Denoiser(0.15, 3.0),),
    "ul2-r": _R,
    "ul2-s": _S,
    "ul2-x": _X,
    "ul2": (*_R, *_S, *_X),
}
"""T5's (Raffel et al. 2020), and the regular, sequential and extreme ones of UL2 (Tay et al. 2022, table 1)."""
_OWN = re.compile(r"(\d*\.?\d+):(\d+\.?\d*)")


def find_denoisers(names: Iterable[str]) -> tuple[Denoiser, ...]:
    """Find denoisers by name, or by numbers: `0.2:5` masks a fifth of the text in spans of about 5 tokens.

    Raises:
        ValueError: a name is unknown, or its numbers are impossible.
    """
    found: list[Denoiser] = []
    for name in names:
        if own := _OWN.fullmatch(name):
            density, mean_length = map(float, own.groups())
            if not (0 < density < 1 and mean_length >= 1):
                raise ValueError(f"{name}: expected a share between 0 and 1, and a mean length of at least 1 token")
            found.append(Denoiser(density, mean_length))
        elif name in DENOISERS:
            found += DENOISERS[name]
        else:
            choices = f"; choose from {', '.join(DENOISERS)}, or give SHARE:LENGTH such as 0.15:3"
            raise ValueError(f"{name}: no such denoiser{suggest_name(name, DENOISERS) or choices}")
    return tuple(found)
