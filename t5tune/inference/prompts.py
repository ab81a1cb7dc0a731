"""Turn a conversation into the model's input, encoded as in training, and the ids of its reply back into text.

prompts = make_prompts(loaded, conversation_template=None, source_prefix=None, max_length=2048)
prompt = prompts.encode([Turn("human", "Hello")])
prompts.decode(generate(model, [prompt.ids], …)[0])
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from t5tune.checkpoints.training_data import DatasetTraining
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
from t5tune.settings.groups.record_format import KINDS
from t5tune.settings.messages import shorten_value


@dataclass(frozen=True)
class Prompt:
    """The model's input.

    Args:
        ids: with special tokens; `num_tokens` counts them without.
        dropped_turns: number of oldest turns left out: by `max_length`, or because the model was trained on single
            exchanges.
        cut_tokens: number of truncated tokens of the system message and of the last message; a text or ids aren't
            truncated, and this is the number of tokens beyond `max_length`.
        has_gaps: whether it contains sentinels; then the reply's sentinels say which masked span each text fills.
    """

    ids: list[int]
    num_tokens: int
    dropped_turns: int
    cut_tokens: int
    has_gaps: bool = False


@dataclass(frozen=True)
class Prompts:
    """How a model's input and output are encoded.

    Args:
        max_length: of a source, in tokens.
        keeps_history: whether the model sees the whole conversation or only its last message.
        source_prefix: text added before each message that doesn't begin with it.
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
        """Encode a conversation that ends with the user's message, or only this message without history."""
        _check_turns(turns)
        check_encodable(turns[-1].text, "message")
        check_encodable(system or "", "system message")
        seen = [self._prepare_turn(turn) for turn in self.select_turns(turns)]
        system = normalize_text(system or "", Counter()) or None  # None: the template's default, as in training
        conversation = Conversation(RecordLocation("chat", 1, 0, 0), system, tuple(seen))
        self._check_words(conversation, "message")
        pieces = render_conversation(conversation, self.template) + render_answer_prefix(self.template, len(seen))
        encoded = encode_prompt(pieces, self.encoder, self.max_length)
        return Prompt(
            ids=self.encoder.special_ids.surround_source(encoded.ids),
            num_tokens=len(encoded.ids),
            dropped_turns=len(turns) - len(seen) + encoded.dropped_turns,
            cut_tokens=encoded.cut_tokens,
        )

    def encode_text(self, text: str) -> Prompt:
        """Encode a text without template and prefix. Special tokens in it, such as sentinels, become tokens."""
        check_encodable(text, "prompt")
        text = normalize_text(text, Counter())
        self._check_words(Conversation(RecordLocation("prompt", 1, 0, 0), None, (Turn("human", text),)), "prompt")
        ((ids,),) = encode_pieces([[Piece(text, "text", 0)]], self.encoder)
        return self.make_prompt(ids.tolist())

    def make_prompt(self, ids: list[int]) -> Prompt:
        """Make a prompt from ids, given with or without the special tokens around a source. It isn't truncated."""
        ids = self.encoder.special_ids.strip_if_present(ids)
        whole = self.encoder.special_ids.surround_source(ids)
        has_gaps = has_sentinels(self.tokenizer, ids)
        excess = max(0, len(whole) - self.max_length)
        return Prompt(whole, len(ids), dropped_turns=0, cut_tokens=excess, has_gaps=has_gaps)

    def select_turns(self, turns: list[Turn]) -> list[Turn]:
        """Return the turns that the model sees: without history, only the last turn."""
        return turns if self.keeps_history else turns[-1:]

    def decode(self, ids: list[int], fills_gaps: bool = False) -> str:
        """Decode a reply, without the template's text after an answer. `fills_gaps`: keep the sentinels."""
        return decode_prediction(self.tokenizer, ids, self.template.answer_suffix, fills_gaps)

    def _check_words(self, conversation: Conversation, what: str) -> None:
        if rejection := find_long_word(conversation, self.encoder):
            raise SettingsError(f"{what}: {rejection.message}")

    def _prepare_turn(self, turn: Turn) -> Turn:
        """Add the prefix to a user's message, and normalize the text as `prepare` does."""
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
    """Find how a model's input is encoded: as in training, unless the arguments say otherwise."""
    template = files.find_template(conversation_template)
    if template is None:
        report(Note(f"the model has no conversation template; using {DEFAULT_TEMPLATE}"))
        template = load_template(DEFAULT_TEMPLATE)
    trained_on = files.datasets.get(conversation_template or "") or files.training_data
    if source_prefix is None:
        source_prefix = trained_on.source_prefix if trained_on is not None else ""
        if conversation_template is None:
            _report_datasets(files.datasets.values(), report)
        if source_prefix:
            report(Note(f"each message is prefixed with {source_prefix!r}, as in training"))
    keeps_history = trained_on is None or trained_on.has_earlier_turns
    return Prompts(files.tokenizer, template, max_length, keeps_history, source_prefix)


def _report_datasets(datasets: Iterable[DatasetTraining], report: Report) -> None:
    """Report which training dataset prompts follow, if the training datasets have different prompts."""
    prompted = [dataset for dataset in datasets if KINDS[dataset.objective] != "raw text"]
    styles = [(dataset.conversation_template, dataset.source_prefix, dataset.has_earlier_turns) for dataset in prompted]
    if any(style != styles[0] for style in styles):
        choice = f"for {' or '.join(dataset.name for dataset in prompted[1:])}, use --conversation-template NAME"
        report(Note(f"prompts follow the training dataset {prompted[0].name}; {choice}"))


def _check_turns(turns: object) -> None:
    hint = 'give a text, or a list such as [Turn("human", "…"), Turn("assistant", "…"), Turn("human", "…")]'
    if not isinstance(turns, list) or not turns:
        raise SettingsError(f"message: {shorten_value(turns)}", hint=hint)
    for number, turn in enumerate(turns):
        if not (isinstance(turn, Turn) and isinstance(turn.text, str) and turn.role in get_args(Role)):
            raise SettingsError(f"message[{number}]: {shorten_value(turn)}", hint=hint)
    if turns[-1].role != "human":
        raise SettingsError("message: the last turn is the assistant's; there is nothing to reply to", hint=hint)


def check_encodable(text: str, what: str) -> None:
    """Raise SettingsError for a text that isn't valid UTF-8, or has a NUL character, as no record of training has."""
    if "\0" in text:
        raise SettingsError(f"{what}: contains a NUL character (U+0000)", hint="remove the character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # Python keeps bytes that it can't decode as surrogates
        problem = f"{what}: contains bytes that aren't valid UTF-8: {ascii(text[error.start : error.end])}"
        raise SettingsError(problem, hint="use a UTF-8 locale, such as LC_ALL=C.UTF-8") from error


@dataclass
class ReplyText:
    """The text of a reply whose ids arrive one by one, or several at a time.

    Some text is held back until more tokens decide: an incomplete character, text that may be the beginning of the
    template's text after an answer (not part of the reply) or of a stop text, and byte tokens at the end, since one
    invalid byte turns all bytes next to it into U+FFFD.
    """

    prompts: Prompts
    show: Callable[[str], None] | None = None  # gets each piece as soon as it is final; joined, they are the reply
    stops: Sequence[str] = ()  # texts before which the reply ends
    fills_gaps: bool = False  # see Prompts.decode

    def __post_init__(self) -> None:
        self._suffix = self.prompts.tokenizer.remove_special_tokens(self.prompts.template.answer_suffix)
        self._ends = [self._suffix, *self.stops, *(self._suffix + stop for stop in self.stops)]
        self._num_shown = self._num_searched = 0

    def update(self, ids: list[int]) -> int | None:
        """Show the final part of the text of all ids so far.

        Returns:
            The number of ids up to the end of the first stop text; then all text before it is shown. None: no stop.
        """
        text = self._decode(ids)
        if self.stops and ("\ufffd" in text or any(stop in text for stop in self.stops)):
            # As if the ids had come one by one, so that their number at a time makes no difference. A later byte token
            # may have turned a stop text into U+FFFD.
            for count in range(self._num_searched + 1, len(ids) + 1):
                text = self._decode(ids[:count])
                if places := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
                    self._show_up_to(text[: min(places)].removesuffix(self._suffix))
                    return count
        self._num_searched = len(ids)
        if (num_settled := self.prompts.tokenizer.count_settled(ids)) < len(ids):
            text = self._decode(ids[:num_settled])
        certain = text.rstrip("\ufffd")
        held = max((_count_common_end(certain, end) for end in self._ends), default=0)
        self._show_up_to(certain[: len(certain) - held])
        return None

    def finish(self, ids: list[int]) -> str:
        """Show the rest of a complete reply, and return the whole text."""
        text = self.prompts.decode(ids, self.fills_gaps)
        self._show_up_to(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        if self.fills_gaps:
            return decode_with_sentinels(self.prompts.tokenizer, ids, is_complete=False)
        return self.prompts.tokenizer.decode(ids, skip_special_tokens=True)

    def _show_up_to(self, text: str) -> None:
        if self.show is not None and len(text) > self._num_shown:
            self.show(text[self._num_shown :])
            self._num_shown = len(text)


def _count_common_end(text: str, beginning: str) -> int:
    """Count the characters at the end of `text` that are also a beginning of `beginning`: ("ab", "bc") -> 1."""
    longest = min(len(text), len(beginning))
    return next(length for length in range(longest, -1, -1) if text.endswith(beginning[:length]))
