"""What data says about whether an answer is to be learned.

labels_of({"prompt": "Hi", "completion": "Go away", "label": False}, place, reading)
# {"label": False}
weight_of({"role": "assistant", "content": "Hello.", "loss_weight": 0.0})
# ("loss_weight", 0.0)

Unpaired preference data (KTO) labels each record as a whole: TRL's `label`, LLaMA-Factory's `kto_tag`. A single turn
may have a weight: OpenAI's `weight`, LLaMA-Factory's `loss_weight`.
"""

import re
from collections.abc import Mapping
from typing import Any

from t5tune.data.records import Place
from t5tune.settings.data import ReadingSettings

LABELS = ("label", "kto_tag")
WEIGHTS = ("loss_weight", "weight")
UNTYPED_FILE = re.compile(r"\.[ct]sv(?:\.gz|\.zst)?$", re.IGNORECASE)  # its cells are text, whatever they mean
WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def labels_of(record: Mapping[str, Any], place: Place, reading: ReadingSettings) -> dict[str, bool]:
    """The labels of a record by key: True is good, False is bad.

    Only true and false are labels. A number or a word is the class of a classification set, and a column that the
    user names as source or target is text.
    """
    labels: dict[str, bool] = {}
    for key in LABELS:
        value = record.get(key)
        if isinstance(value, str) and UNTYPED_FILE.search(place.file):
            value = WORDS.get(value)
        if isinstance(value, bool) and key not in (reading.source_column, reading.target_column):
            labels[key] = value
    return labels


def weight_of(turn: Mapping[str, Any]) -> tuple[str, float] | None:
    """The key and the value of a turn's weight; None: it has none."""
    return next(((key, turn[key]) for key in WEIGHTS if isinstance(turn.get(key), int | float)), None)
