"""What a rejected record's message says about the place of the problem."""

from typing import Any

import pytest

from t5tune.data.reading.formats import parse_conversation
from t5tune.data.reading.rejections import RecordLocation, RejectionError
from t5tune.settings.groups.record_format import ReadingSettings

SYSTEM = {"role": "system", "content": "Be brief."}
HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
BAD = {"role": "narrator", "content": "Hi"}

MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "two in a row": ({"messages": [HI, HI, YES]}, "turn 1: two human turns in a row"),
    "two in a row after a system turn": ({"messages": [SYSTEM, HI, HI]}, "turn 2: two human turns in a row"),
    "two in a row, with a system key": (
        {"system": "Be brief.", "messages": [HI, HI, YES]}, "turn 1: two human turns in a row"),
    "a late system turn": ({"messages": [HI, SYSTEM, YES]}, "turn 1: a system turn that is not the first turn"),
    "two system turns": (
        {"messages": [SYSTEM, SYSTEM, HI, YES]}, "turn 1: a second system message, after that of turn 0"),
    "a system turn and a system key": (
        {"system": "Be brief.", "messages": [SYSTEM, HI, YES]},
        "turn 0: a second system message, after that of the key system"),
    "an unknown role, with a system key": ({"system": "Be brief.", "messages": [HI, BAD]}, "turn 1: unknown role"),
    "two in a row in a completion": (
        {"prompt": [SYSTEM, HI], "completion": [YES, YES]}, "completion: turn 1: two assistant turns in a row"),
    "a prompt that ends with an answer": (
        {"prompt": [HI, YES], "completion": "No"}, "completion: two assistant turns in a row"),
    "an unknown role in a prompt": ({"prompt": [BAD], "completion": [YES]}, "prompt: turn 0: unknown role"),
    "two in a row in a preferred answer": (
        {"instruction": "Hi", "chosen": [YES, YES]}, "chosen: turn 1: two assistant turns in a row"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "message"), MESSAGES.values(), ids=MESSAGES)
def test_a_rejected_turn_is_named_as_in_the_record(value: dict[str, Any], message: str) -> None:
    with pytest.raises(RejectionError) as rejected:
        parse_conversation(value, RecordLocation("data.jsonl", 1, 0, 0), ReadingSettings())
    assert str(rejected.value).startswith(message)
