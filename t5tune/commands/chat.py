"""`t5tune chat`: replies of a base, an adapter, a run or a merged checkpoint, in the layout of training.

chatter = Chatter.load(ChatSettings(model_name_or_path="pocket", adapter="run"))
chatter.reply([Turn("human", "Hello")])
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.data.encoding import Encoder, encode_prompt
from t5tune.data.formats import Conversation, Turn
from t5tune.data.records import Place
from t5tune.data.templates import Template, find_template, lay_out, question_end
from t5tune.data.tokenizer import Tokenizer
from t5tune.errors import SettingsError
from t5tune.progress import Note, Report, silent
from t5tune.settings import ChatSettings


@dataclass(frozen=True)
class Reply:
    """One answer; lengths in tokens, without the source's end token."""

    reply: str
    source_tokens: int
    reply_tokens: int
    seconds: float


@dataclass(frozen=True)
class Chatter:
    """A model ready to answer, and how. Nothing of it changes: `with_…` gives another.

    Args:
        keeps_history: a reply is to the whole conversation, not to its last message alone.
        source_prefix: text before each message, where it doesn't begin with it.
    """

    model: Any
    tokenizer: Tokenizer
    encoder: Encoder
    template: Template
    settings: ChatSettings
    keeps_history: bool = True
    source_prefix: str = ""

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Chatter":
        """Load the base, quantised if asked, and the adapter.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
        """
        from transformers import set_seed

        from t5tune.model.inference import load_for_inference

        loaded = load_for_inference(settings, report)
        set_seed(settings.seed)
        template = find_template(settings.conversation_template, loaded.template_files, report)
        # what stood for the model may have been an adapter, which /adapter is to take off again
        settings = settings.model_copy(update={"model_name_or_path": str(loaded.base), "adapter": loaded.adapter})
        trained_on = loaded.training_data
        keeps_history = trained_on is None or trained_on.has_earlier_turns
        if not keeps_history and settings.prompt is None:
            report(Note("each message is answered by itself: this model was trained on single exchanges (/history on)"))
        prefix = settings.source_prefix
        if prefix is None:
            prefix = trained_on.source_prefix if trained_on is not None else ""
            if prefix:
                report(Note(f"as in training, each message begins with {prefix!r}"))
        encoder = Encoder(loaded.tokenizer)
        return Chatter(loaded.model, loaded.tokenizer, encoder, template, settings, keeps_history, prefix)

    def with_system(self, message: str | None) -> "Chatter":
        """Under another system message; None: the layout's own."""
        return replace(self, settings=self.settings.model_copy(update={"system": message}))

    def with_template(self, name_or_path: str) -> "Chatter":
        """In another layout. Raises SettingsError where there is no such layout."""
        return replace(self, template=find_template(name_or_path, []))

    def with_history(self, keeps_history: bool) -> "Chatter":
        """Answering whole conversations, or each message by itself."""
        return replace(self, keeps_history=keeps_history)

    def with_adapter(self, adapter: Path | None, report: Report = silent) -> "Chatter":
        """Another adapter on the same base, with the tokenizer and the layout that it brings; None: the base alone."""
        return Chatter.load(self.settings.model_copy(update={"adapter": adapter}), report)

    def reply(self, turns: list[Turn], show: Callable[[str], None] | None = None) -> Reply:
        """Answer a conversation that ends with a human turn, or that turn alone where history isn't kept.

        Args:
            show: called with each piece of the answer's text as soon as it is certain; joined, they are the reply.

        Raises:
            SettingsError: the question or the system message holds bytes that are no text.
        """
        from t5tune.model.generation import generate

        started = time.monotonic()
        growing = _GrowingText(self.tokenizer, self.template.answer_end, show) if show else None
        _must_be_text(turns[-1].text, "the question")
        _must_be_text(self.settings.system or "", "the system message")
        turns = [self._with_prefix(turn) for turn in (turns if self.keeps_history else turns[-1:])]
        conversation = Conversation(Place("chat", 1, 0, 0), self.settings.system, tuple(turns))
        pieces = lay_out(conversation, self.template) + question_end(self.template, len(turns))
        source = encode_prompt(pieces, self.encoder, self.settings.model_max_length)
        (ids,) = generate(
            self.model,
            [[*source, self.tokenizer.eos_token_id]],
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            on_token=growing.add if growing else None,
        )
        text = self.tokenizer.decode(ids, skip_special_tokens=True).removesuffix(self.template.answer_end)
        if growing:
            growing.end(text)
        return Reply(
            reply=text,
            source_tokens=len(source),
            reply_tokens=len(ids),
            seconds=round(time.monotonic() - started, 3),
        )

    def _with_prefix(self, turn: Turn) -> Turn:
        if turn.role != "human" or turn.text.startswith(self.source_prefix):
            return turn
        return Turn("human", self.source_prefix + turn.text)


def _must_be_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # Python keeps what it can't decode as surrogates
        found = ascii(text[error.start : error.end])
        raise SettingsError(
            f"{what}: holds bytes that are no text: {found}", hint="write UTF-8, in a locale of it: LC_ALL=C.UTF-8"
        ) from error


class _GrowingText:
    """An answer that is shown while it is written.

    A character may come in several tokens, and the layout's end of an answer is no part of it: what may still
    become either is held back.
    """

    def __init__(self, tokenizer: Tokenizer, answer_end: str, show: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._answer_end = answer_end
        self._show = show
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> None:
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        certain = text.rstrip("\ufffd")
        for length in range(len(self._answer_end), 0, -1):
            if certain.endswith(self._answer_end[:length]):
                certain = certain[:-length]
                break
        self._show_up_to(certain)

    def end(self, text: str) -> None:
        self._show_up_to(text)

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


def save_conversation(path: Path, turns: list[Turn], system: str | None) -> None:
    """Append the conversation to a file of ShareGPT records, one a line, as `prepare` reads them.

    Raises:
        SettingsError: the file can't be written.
    """
    names = {"human": "human", "assistant": "gpt"}
    record: dict[str, Any] = {} if system is None else {"system": system}
    record["conversations"] = [{"from": names[turn.role], "value": turn.text} for turn in turns]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", hint="name a file in a folder that exists") from None


def chat(settings: ChatSettings, report: Report = silent) -> Reply:
    """Answer `settings.prompt`, which must be set."""
    assert settings.prompt is not None
    return Chatter.load(settings, report).reply([Turn("human", settings.prompt)])
