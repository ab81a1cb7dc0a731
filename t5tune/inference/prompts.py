"""Turn a conversation into the ids that the model was trained to reply to, and its reply's ids back into text.

prompts = make_prompts(loaded, conversation_template=None, source_prefix=None, max_length=2048)
prompt = prompts.encode([Turn("human", "Hello")])
prompts.decode(generate(model, [prompt.ids], …)[0])
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from t5tune.checkpoints.training_data import TrainingData
from t5tune.data.reading.cleaning import normalize_text
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.record_turns import Role
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoders import Encoder, make_encoder
from t5tune.data.tokens.encoding import encode_pieces, encode_prompt, find_long_word
from t5tune.data.tokens.templates import (
    DEFAULT_TEMPLATE,
    Piece,
    Template,
    load_template,
    render_answer_prefix,
    render_conversation,
)
from t5tune.data.tokens.tokenizer import Tokenizer, decode_prediction, decode_with_sentinels, has_sentinels
from t5tune.errors import SettingsError
from t5tune.inference.loading import ModelFiles
from t5tune.progress import Note, Report, silent
from t5tune.settings.messages import shorten_value


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Args:
        ids: with the special tokens.
        num_tokens: of these, without the special ones.
        dropped_turns: how many of the oldest turns were left out: by `max_length`, or because the model was trained
            on single exchanges.
        cut_tokens: how many tokens of the system message and of the last message were cut off, too; of a text or ids,
            how many are too many.
        has_gaps: whether it has sentinels, so that those of the reply say which gap a text is for.
    """

    ids: list[int]
    num_tokens: int
    dropped_turns: int
    cut_tokens: int
    has_gaps: bool = False


@dataclass(frozen=True)
class Prompts:
    """How a model reads and writes text. Immutable: `dataclasses.replace` makes another one.

    Args:
        keeps_history: whether the model sees the whole conversation or only its last message.
        source_prefix: text added before each message that doesn't begin with it already.
        max_length: of a source, in tokens.
    """

    tokenizer: Tokenizer
    template: Template
    max_length: int
    keeps_history: bool = True
    source_prefix: str = ""
    encoder: Encoder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", make_encoder(self.tokenizer))

    def encode(self, turns: list[Turn], system: str | None = None) -> Prompt:
        """Encode a conversation that ends with the user's message, or that message alone if history isn't kept.

        Raises:
            SettingsError: the conversation isn't one, or the message or the system message isn't valid UTF-8, or
                contains a word that is too long.
        """
        _check_turns(turns)
        _check_encodable(turns[-1].text, "message")
        _check_encodable(system or "", "system message")
        seen = [self._prepare_turn(turn) for turn in self.select_turns(turns)]
        system = normalize_text(system or "", Counter()) or None  # the template's own if empty, as in training
        conversation = Conversation(RecordLocation("chat", 1, 0, 0), system, tuple(seen))
        if rejection := find_long_word(conversation, self.encoder):
            raise SettingsError(f"message: {rejection.message}")
        pieces = render_conversation(conversation, self.template) + render_answer_prefix(self.template, len(seen))
        encoded = encode_prompt(pieces, self.encoder, self.max_length)
        return Prompt(
            ids=self.encoder.special_ids.surround_source(encoded.ids),
            num_tokens=len(encoded.ids),
            dropped_turns=len(turns) - len(seen) + encoded.dropped_turns,
            cut_tokens=encoded.cut_tokens,
        )

    def encode_text(self, text: str) -> Prompt:
        """Encode a text without template and prefix. A special token that it spells out, such as a sentinel, is one.

        Raises:
            SettingsError: the text isn't valid UTF-8, or contains a word that is too long.
        """
        _check_encodable(text, "prompt")
        text = normalize_text(text, Counter())
        whole = Conversation(RecordLocation("prompt", 1, 0, 0), None, (Turn("human", text),))
        if rejection := find_long_word(whole, self.encoder):
            raise SettingsError(f"prompt: {rejection.message}")
        ((ids,),) = encode_pieces([[Piece(text, "text", 0)]], self.encoder)
        return self.make_prompt(ids.tolist())

    def make_prompt(self, ids: list[int]) -> Prompt:
        """Make the prompt of ids, with or without the special tokens around a source. It isn't shortened."""
        ids = self.encoder.special_ids.strip_if_present(ids)
        whole = self.encoder.special_ids.surround_source(ids)
        has_gaps = has_sentinels(self.tokenizer, ids)
        excess = max(0, len(whole) - self.max_length)
        return Prompt(whole, len(ids), dropped_turns=0, cut_tokens=excess, has_gaps=has_gaps)

    def select_turns(self, turns: list[Turn]) -> list[Turn]:
        """Return the turns that the model sees: without history, only the last one."""
        return turns if self.keeps_history else turns[-1:]

    def decode(self, ids: list[int], fills_gaps: bool = False) -> str:
        """Decode the ids of a reply, without the text that the template puts after an answer.

        Args:
            fills_gaps: whether the prompt has gaps; then the reply's sentinels are kept.
        """
        return decode_prediction(self.tokenizer, ids, self.template.answer_suffix, fills_gaps)

    def _prepare_turn(self, turn: Turn) -> Turn:
        """Add the prefix to a message that doesn't begin with it, and normalize the text as `prepare` does."""
        text = turn.text
        if turn.role == "human" and not text.startswith(self.source_prefix):
            text = self.source_prefix + text
        return Turn(turn.role, normalize_text(text, Counter()))


def make_prompts(
    files: ModelFiles,
    conversation_template: str | None,
    source_prefix: str | None,
    max_length: int,
    report: Report = silent,
) -> Prompts:
    """Find how a model reads text, as it was trained unless the arguments say otherwise.

    Raises:
        SettingsError: there is no such template.
    """
    template = files.find_template(conversation_template)
    if template is None:
        report(Note(f"the model has no conversation template of its own; using {DEFAULT_TEMPLATE}"))
        template = load_template(DEFAULT_TEMPLATE)
    trained_on = files.find_dataset(conversation_template or "") or files.training_data
    if source_prefix is None:
        source_prefix = trained_on.source_prefix if trained_on is not None else ""
        if conversation_template is None:
            _report_datasets(files.training_data, report)
        if source_prefix:
            report(Note(f"each message is prefixed with {source_prefix!r}, as in training"))
    keeps_history = trained_on is None or trained_on.has_earlier_turns
    return Prompts(files.tokenizer, template, max_length, keeps_history, source_prefix)


def _report_datasets(trained_on: TrainingData | None, report: Report) -> None:
    """Say as in which dataset messages are sent, if the model was trained on several that differ in it."""
    datasets = trained_on.datasets if trained_on is not None else []
    ways = [(dataset.conversation_template, dataset.source_prefix, dataset.has_earlier_turns) for dataset in datasets]
    if any(way != ways[0] for way in ways):
        main = next((dataset for dataset in datasets if dataset.objective != "span-corruption"), datasets[0])
        others = ", ".join(dataset.name for dataset in datasets if dataset is not main)
        choice = "--conversation-template NAME chooses another"
        report(Note(f"messages are as in the dataset {main.name} of training ({others}: {choice})"))


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


class ReplyText:
    """The text of a reply whose ids arrive one by one, or several at a time.

    A character may consist of several tokens, and the template's text after an answer isn't part of the reply. Text
    that may still become either, or the beginning of one of `stops`, is held back until more tokens decide. So are
    byte tokens until another token follows: one that isn't valid makes U+FFFD of each byte of their row.

    Args:
        stops: texts before which the reply ends.
        show: called with each piece as soon as it is final; joined, the pieces are the reply.
        fills_gaps: see `Prompts.decode`.
    """

    def __init__(
        self,
        prompts: Prompts,
        show: Callable[[str], None] | None = None,
        stops: Sequence[str] = (),
        fills_gaps: bool = False,
    ) -> None:
        self._prompts = prompts
        self._fills_gaps = fills_gaps
        self._show = show
        self._stops = stops
        self._suffix = prompts.tokenizer.remove_special_tokens(prompts.template.answer_suffix)
        self._ends = [self._suffix, *stops, *(self._suffix + stop for stop in stops)]
        self._num_shown = 0
        self._num_searched = 0

    def update(self, ids: list[int]) -> int | None:
        """Show what is final of the text of all ids so far.

        Returns:
            After how many of the ids one of `stops` is complete; None if none is. The text before it is all shown.
        """
        text = self._decode(ids)
        if self._stops and ("\ufffd" in text or any(stop in text for stop in self._stops)):
            # as if the ids had come one by one; a later byte token may have made U+FFFD of a stop
            for count in range(self._num_searched + 1, len(ids) + 1):
                text = self._decode(ids[:count])
                if places := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
                    self._show_up_to(text[: min(places)].removesuffix(self._suffix))
                    return count
        self._num_searched = len(ids)
        if (num_settled := self._prompts.tokenizer.count_settled(ids)) < len(ids):
            text = self._decode(ids[:num_settled])
        certain = text.rstrip("\ufffd")
        held = max((_count_common_end(certain, end) for end in self._ends), default=0)
        self._show_up_to(certain[: len(certain) - held])
        return None

    def finish(self, ids: list[int]) -> str:
        """Show the rest of a reply that has ended by itself. Return the whole text."""
        text = self._prompts.decode(ids, self._fills_gaps)
        self._show_up_to(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        if self._fills_gaps:
            return decode_with_sentinels(self._prompts.tokenizer, ids, is_complete=False)
        return self._prompts.tokenizer.decode(ids, skip_special_tokens=True)

    def _show_up_to(self, text: str) -> None:
        if self._show is not None and len(text) > self._num_shown:
            self._show(text[self._num_shown :])
            self._num_shown = len(text)


def _count_common_end(text: str, beginning: str) -> int:
    """Count the characters at the end of the text that are the beginning of the other: ("ab", "bc") -> 1."""
    longest = min(len(text), len(beginning))
    return next(length for length in range(longest, -1, -1) if text.endswith(beginning[:length]))
