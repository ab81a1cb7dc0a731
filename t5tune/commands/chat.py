"""`t5tune chat`: talk to a base, an adapter, a run or a merged checkpoint, in the conversation template of training.

chatter = Chatter.load(ChatSettings(model_name_or_path="pocket", adapter="run"))
chatter.reply("Hello")
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from t5tune.checkpoints.training_data import TrainingData
from t5tune.compat.quiet import quiet_libraries
from t5tune.data.cleaning import normalize_text
from t5tune.data.encoders import Encoder, make_encoder
from t5tune.data.encoding import encode_prompt, find_long_word
from t5tune.data.formats import Conversation, Role, Turn
from t5tune.data.records import RecordLocation
from t5tune.data.templates import (
    DEFAULT_TEMPLATE,
    Template,
    load_template,
    render_answer_prefix,
    render_conversation,
)
from t5tune.data.tokenizer import Tokenizer, decode_prediction
from t5tune.errors import SettingsError
from t5tune.model.device import use_gpu_kernels
from t5tune.model.generation import Decoding, RandomStream, generate
from t5tune.model.inference import load_for_inference
from t5tune.progress import Note, Report, silent
from t5tune.settings import ChatSettings
from t5tune.settings.calls import check_call
from t5tune.settings.messages import shorten_value
from t5tune.training.checkpoint import replace_stopped_runs


@dataclass(frozen=True)
class Reply:
    """One reply. Lengths are in tokens; `source_tokens` doesn't count the end-of-sequence token."""

    reply: str
    source_tokens: int
    reply_tokens: int
    seconds: float


@dataclass(frozen=True)
class Chatter:
    """A loaded model and its chat settings. Immutable: each `with_…` method returns a new one.

    Args:
        keeps_history: whether the model sees the whole conversation or only its last message.
        source_prefix: text added before each message that doesn't begin with it already.
        random: what sampling draws from, continued by each reply.
    """

    model: Any
    tokenizer: Tokenizer
    encoder: Encoder
    template: Template
    settings: ChatSettings
    random: RandomStream
    keeps_history: bool = True
    source_prefix: str = ""

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Chatter":
        """Load the base (quantized if the settings say so) and the adapter.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
        """
        report = check_call("Chatter.load", settings, ChatSettings, report)
        settings = replace_stopped_runs(settings, report)
        with quiet_libraries():
            loaded = load_for_inference(settings, report)
        template = loaded.find_template(settings.conversation_template)
        if template is None:
            report(Note(f"the model has no conversation template of its own; using {DEFAULT_TEMPLATE}"))
            template = load_template(DEFAULT_TEMPLATE)
        # model_name_or_path may have named an adapter or a run: store base and adapter apart, so that /adapter can
        # replace or remove the adapter
        settings = settings.model_copy(update={"model_name_or_path": str(loaded.base), "adapter": loaded.adapter})
        trained_on = loaded.training_data
        keeps_history = trained_on is None or trained_on.has_earlier_turns
        if not keeps_history and settings.prompt is None:
            report(
                Note(
                    "earlier messages are ignored: this model was trained on single exchanges "
                    "(/history on includes them)"
                )
            )
        prefix = settings.source_prefix
        if prefix is None:
            chosen = loaded.find_dataset(settings.conversation_template or "") or trained_on
            prefix = chosen.source_prefix if chosen is not None else ""
            _report_datasets(trained_on, settings, report)
            if prefix:
                report(Note(f"each message is prefixed with {prefix!r}, as in training"))
        return Chatter(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            encoder=make_encoder(loaded.tokenizer),
            template=template,
            settings=settings,
            random=RandomStream(settings.seed, loaded.model.device),
            keeps_history=keeps_history,
            source_prefix=prefix,
        )

    def with_system(self, message: str | None) -> "Chatter":
        """Use another system message; None selects the conversation template's default."""
        return replace(self, settings=self.settings.model_copy(update={"system": message}))

    def with_template(self, name_or_path: str) -> "Chatter":
        """Use another conversation template.

        Raises:
            SettingsError: there is no such template.
        """
        return replace(self, template=load_template(name_or_path))

    def with_history(self, keeps_history: bool) -> "Chatter":
        """Choose whether the model sees the whole conversation or only its last message."""
        return replace(self, keeps_history=keeps_history)

    def with_adapter(self, adapter: Path | None, report: Report = silent) -> "Chatter":
        """Load another adapter onto the same base, with that adapter's tokenizer and conversation template.

        None loads the base alone.
        """
        return Chatter.load(self.settings.model_copy(update={"adapter": adapter}), report)

    def reply(self, message: str | list[Turn], show: Callable[[str], None] | None = None) -> Reply:
        """Reply to a message, or to a conversation that ends with one (to that one alone if history isn't kept).

        Args:
            show: called with each piece of the reply as soon as its text is final; joined, the pieces are the reply.

        Raises:
            SettingsError: the conversation isn't one, or the message or the system message isn't valid UTF-8, or
                contains a word that is too long.
        """
        started = time.monotonic()
        turns = [Turn("human", message)] if isinstance(message, str) else message
        _check_turns(turns)
        answer_suffix = self.tokenizer.remove_special_tokens(self.template.answer_suffix)
        streamer = _TextStreamer(self.tokenizer, answer_suffix, show) if show else None
        _check_encodable(turns[-1].text, "message")
        _check_encodable(self.settings.system or "", "system message")
        turns = [self._prepare_turn(turn) for turn in self.select_turns(turns)]
        system = None if self.settings.system is None else normalize_text(self.settings.system, Counter())
        conversation = Conversation(RecordLocation("chat", 1, 0, 0), system, tuple(turns))
        if rejection := find_long_word(conversation, self.encoder):
            raise SettingsError(f"message: {rejection.message}")
        pieces = render_conversation(conversation, self.template) + render_answer_prefix(self.template, len(turns))
        source = encode_prompt(pieces, self.encoder, self.settings.model_max_length)
        ids = self._generate(self.encoder.special_ids.surround_source(source), streamer.add if streamer else None)
        text = decode_prediction(self.tokenizer, ids, answer_suffix)
        if streamer:
            streamer.show_up_to(text)
        return Reply(
            reply=text,
            source_tokens=len(source),
            reply_tokens=len(ids),
            seconds=round(time.monotonic() - started, 3),
        )

    def select_turns(self, turns: list[Turn]) -> list[Turn]:
        """Return the turns that the model sees: without history, only the last one."""
        return turns if self.keeps_history else turns[-1:]

    def _generate(self, source: list[int], on_token: Callable[[int], None] | None) -> list[int]:
        decoding = Decoding(
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
        )
        with quiet_libraries(), use_gpu_kernels(self.model.device), self.random.use():
            (ids,) = generate(self.model, [source], decoding, on_token=on_token)
        return ids

    def _prepare_turn(self, turn: Turn) -> Turn:
        """Add the prefix to a message that doesn't begin with it, and normalize the text as `prepare` does."""
        text = turn.text
        if turn.role == "human" and not text.startswith(self.source_prefix):
            text = self.source_prefix + text
        return Turn(turn.role, normalize_text(text, Counter()))


def _report_datasets(trained_on: TrainingData | None, settings: ChatSettings, report: Report) -> None:
    """Say which dataset's template and prefix are used, if the model was trained on several that differ in them."""
    datasets = trained_on.datasets if trained_on is not None and settings.conversation_template is None else []
    ways = [(dataset.conversation_template, dataset.source_prefix) for dataset in datasets]
    if any(way != ways[0] for way in ways):
        first, *others = [dataset.name for dataset in datasets]
        choice = "--conversation-template NAME chooses another"
        report(Note(f"messages are as in the dataset {first} of training ({', '.join(others)}: {choice})"))


def _check_turns(turns: object) -> None:
    hint = 'expected a text, or a list such as [Turn("human", "…"), Turn("assistant", "…"), Turn("human", "…")]'
    if not isinstance(turns, list) or not turns:
        raise SettingsError(f"message: {shorten_value(turns)}", hint=hint)
    for number, turn in enumerate(turns):
        if not (isinstance(turn, Turn) and isinstance(turn.text, str) and turn.role in get_args(Role)):
            raise SettingsError(f"message[{number}]: {shorten_value(turn)}", hint=hint)
    if turns[-1].role != "human":
        raise SettingsError("message: the last turn is the assistant's; there is nothing to reply to", hint=hint)


def _check_encodable(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # Python keeps bytes that it can't decode as surrogates
        problem = f"{what}: contains bytes that aren't valid UTF-8: {ascii(text[error.start : error.end])}"
        raise SettingsError(problem, hint="type UTF-8, in a UTF-8 locale such as LC_ALL=C.UTF-8") from error


class _TextStreamer:
    """Show a reply while it is generated.

    A character may consist of several tokens, and the template's `answer_end` isn't part of the reply. Text that may
    still become either is held back until more tokens decide.
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
        self.show_up_to(certain)

    def show_up_to(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


def save_conversation(path: Path, turns: list[Turn], system: str | None) -> None:
    """Append the conversation to a JSON Lines file as a ShareGPT record, the format that `prepare` reads.

    Raises:
        SettingsError: the file can't be written.
    """
    names = {"human": "human", "assistant": "gpt"}
    record: dict[str, Any] = {} if system is None else {"system": system}
    record["conversations"] = [{"from": names[turn.role], "value": turn.text} for turn in turns]
    _append_record(path, record)


def save_preference(path: Path, chatter: Chatter, turns: list[Turn], chosen: str, rejected: str) -> None:
    """Append two replies to a JSON Lines file as a preference pair, which `prepare --objective dpo` reads.

    Args:
        chatter: has made the replies.
        turns: what it has replied to; without the turns that it hasn't seen, this is the question of the record.

    Raises:
        SettingsError: the file can't be written.
    """
    seen, system = chatter.select_turns(turns), chatter.settings.system
    answers = {"chosen": chosen, "rejected": rejected}
    if len(seen) == 1 and system is None:
        _append_record(path, {"prompt": seen[0].text, **answers})
        return
    roles = {"human": "user", "assistant": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in seen]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    _append_record(path, {"messages": messages, **answers})


def _append_record(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", hint="name a file in a folder that exists") from None


def chat(settings: ChatSettings, report: Report = silent) -> Reply:
    """Reply to `settings.prompt`.

    Raises:
        SettingsError: it isn't set.
    """
    if settings.prompt is None:
        raise SettingsError("prompt: missing", hint="set it, or use Chatter.load(…) for a conversation")
    return Chatter.load(settings, report).reply(settings.prompt)
