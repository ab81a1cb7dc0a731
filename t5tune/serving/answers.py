"""The bodies of OpenAI's answers: https://platform.openai.com/docs/api-reference/chat and …/completions.

answer = Answer(model="run", is_chat=True)
answer.make_whole([Part("Hello", "stop")], make_usage(3, 1))
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


def make_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Part(NamedTuple):
    """A reply or a part of it. `logprobs`: the field of this name."""

    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """The bodies of the answer to one request.

    Args:
        has_usage: whether the last event of a stream has the usage; it is null in the events before.
        fingerprint: identifies what computes the replies.
    """

    model: str
    is_chat: bool
    has_usage: bool = False
    fingerprint: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def make_whole(self, replies: Sequence[Part], usage: dict[str, int]) -> dict[str, Any]:
        """Make the body of a whole answer."""
        choices = [
            self._make_choice(index, "message", {"role": "assistant", "content": reply.text, "refusal": None}, reply)
            for index, reply in enumerate(replies)
        ]
        return {**self._make_head(is_part=False), "choices": choices, "usage": usage}

    def make_part(self, index: int, part: Part, is_first: bool = False) -> dict[str, Any]:
        """Make the body of an event with a part of a reply."""
        has_text = bool(part.text) or is_first
        delta = {**({"role": "assistant"} if is_first else {}), **({"content": part.text} if has_text else {})}
        body = {**self._make_head(is_part=True), "choices": [self._make_choice(index, "delta", delta, part)]}
        return {**body, "usage": None} if self.has_usage else body

    def make_last(self, usage: dict[str, int]) -> dict[str, Any]:
        """Make the body of the event after the last part, for clients that ask for the usage."""
        return {**self._make_head(is_part=True), "choices": [], "usage": usage}

    def _make_head(self, is_part: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if is_part else "chat.completion") if self.is_chat else "text_completion"
        return self.make_head("chatcmpl" if self.is_chat else "cmpl", kind)

    def make_head(self, prefix: str, kind: str) -> dict[str, Any]:
        """Make the fields at the beginning of any answer."""
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _make_choice(self, index: int, key: str, message: dict[str, Any], part: Part) -> dict[str, Any]:
        contents: dict[str, Any] = {key: message} if self.is_chat else {"text": part.text}
        return {"index": index, **contents, "logprobs": part.logprobs, "finish_reason": part.finish_reason}


def encode_event(value: Any) -> bytes:
    """Encode a server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
