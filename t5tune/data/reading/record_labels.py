"""Labels and weights in the data that decide whether an answer is learned.

    find_labels({"prompt": "Hi", "completion": "Go away", "label": False}, location, reading)
    # {"label": False}
    find_weight({"role": "assistant", "content": "Hello.", "loss_weight": 0.0})
    # ("loss_weight", 0.0)

Unpaired preference data (KTO) labels each record as a whole: `label` in TRL, `kto_tag` in LLaMA-Factory. A single turn
may have a weight: `weight` in OpenAI's format, `loss_weight` in LLaMA-Factory's.
"""

import re
from collections.abc import Mapping
from typing import Any

from t5tune.data.reading.rejections import RecordLocation
from t5tune.settings.groups.record_format import ReadingSettings

LABEL_KEYS = ("label", "kto_tag")
WEIGHT_KEYS = ("loss_weight", "weight")
UNTYPED_FILE = re.compile(r"\.[ct]sv(?:\.gz|\.zst)?$", re.IGNORECASE)  # all cells are text, also true and false
BOOLEAN_CELLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def find_labels(record: Mapping[str, Any], location: RecordLocation, reading: ReadingSettings) -> dict[str, bool]:
    """Return the labels of a record by key: True is good, False is bad.

    Only true and false are labels. A number or a word is a class of a classification dataset, and a column that the
    user names as source or target is text.
    """
    labels: dict[str, bool] = {}
    for key in LABEL_KEYS:
        value = record.get(key)
        if isinstance(value, str) and UNTYPED_FILE.search(location.file):
            value = BOOLEAN_CELLS.get(value)
        if isinstance(value, bool) and key not in (reading.source_column, reading.target_column):
            labels[key] = value
    return labels


def find_weight(turn: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the key and the value of a turn's weight, or None if it has none."""
    return next(((key, turn[key]) for key in WEIGHT_KEYS if isinstance(turn.get(key), int | float)), None)
