"""Which ids may come next in a reply that follows a grammar, found by llguidance over the tokenizer's spellings.

compiler = GrammarCompiler(spell(tokenizer, num_rows=32128), stop_ids=[1])
matcher = compiler.compile(Constraint("regex", "[0-9]+", "regex")).copy()
matcher.find_allowed()[8774], matcher.accept(8774)    # False, False
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Self

import numpy as np

from t5tune.constraints import Allowed, Constraint
from t5tune.constraints.json_grammar import write_json_rules
from t5tune.constraints.schemas import check_schema
from t5tune.constraints.spelling import Spellings
from t5tune.constraints.validation import ReplyCheck
from t5tune.errors import DependencyError, SettingsError
from t5tune.formatting import shorten

LIBRARIES = ("jsonschema", "llguidance", "regex")
# Otherwise llguidance asks a callback to tokenize text that the grammar forces, and allows no other tokens for it.
HEADER = '%llguidance {"no_forcing": true}\n'
NUM_HEADER_LINES = 2  # with the rule `start`
MIN_STEP_FUEL, MIN_STATES = 200_000, 250_000  # llguidance's defaults
REPLY = "t5tune_reply"  # a rule; no grammar of a user has this name
# the name of a grammar's first rule, or a comment, a text or a regular expression, where the word isn't this name
START_OR_TEXT = re.compile(r'(?://|#).*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|\bstart\b')
MAX_REASON = 300  # characters
JSON_CHARACTERS = '{}[]":,'


class GrammarCompiler:
    """Compiles constraints for one model.

    Args:
        stop_ids: the tokens that end a reply.
        suffix: text that may follow a reply.

    Raises:
        DependencyError: one of LIBRARIES isn't installed.
    """

    def __init__(self, spellings: Spellings, stop_ids: list[int], suffix: str = "") -> None:
        for library in LIBRARIES:
            try:
                import_module(library)
            except ImportError as error:
                problem = f"constraining replies needs {library}, which can't be imported: {error}"
                raise DependencyError(problem, hint="pip install 't5tune[constrain]'") from error
        later, first = spellings.later, spellings.first
        self.spellings, self.num_rows, self.stop_ids, self._suffix = spellings, len(later), stop_ids, suffix
        # the decoder drops the whole of several spaces at the beginning, but a grammar only knows about one
        self.never_first = [i for i, text in enumerate(later) if text != first[i] and text != b" " + (first[i] or b"")]
        self.silent_ids = [i for i, text in enumerate(later) if text == b""]
        self.begins_with_space = np.array([text is not None and text.startswith(b" ") for text in later])
        import llguidance

        words = llguidance.TokenizerWrapper(_Words(later, stop_ids))
        self._words = llguidance.LLTokenizer(words, n_vocab=self.num_rows, eos_token=stop_ids)

    def compile(self, constraint: Constraint) -> "GrammarMatcher":
        """Compile a constraint; copy the matcher for each reply.

        Raises:
            SettingsError: the constraint is invalid, can't be enforced, or no reply can follow it.
            UnicodeEncodeError: its text has half of a character.
        """
        constraint.text.encode()
        if "\0" in constraint.text and b"\0" not in self.spellings.later:
            problem = f"{constraint.place}: has a NUL character (U+0000), which this tokenizer can't write"
            raise SettingsError(problem, hint="remove the character")
        if constraint.kind == "json_schema":
            check_schema(json.loads(constraint.text), constraint.place)
            self._check_characters(constraint)
        elif constraint.kind == "grammar" and re.search(r"^\s*%llguidance", constraint.text, re.MULTILINE):
            raise SettingsError(f"{constraint.place}: %llguidance: its options can't be changed; remove this line")
        rules = _write_rules(constraint)
        matcher = self._start(REPLY, rules, constraint)
        allowed, drops_space = matcher.fill_mask(matcher.matcher), self.spellings.drops_space
        allowed[self.stop_ids] = False
        first = allowed & ~self.begins_with_space if drops_space else allowed
        if not first.any() and not matcher.is_complete:
            problem, hint = "this tokenizer removes a space at the beginning", "change the constraint"
            if not allowed.any():
                problem = "nothing matches it, or it needs a character that this tokenizer can't write"
                hint = "train with --add-tokens auto, or change the constraint"
            raise SettingsError(f"{constraint.place}: no reply can follow it: {problem}", hint=hint)
        whole = f"{REPLY} {json.dumps(self._suffix)}?" if self._suffix else REPLY
        if self._suffix:
            matcher = self._start(whole, rules, constraint)
        if drops_space:
            matcher.with_space = self._start(f'" " {whole}', rules, constraint).matcher
        if constraint.kind == "json_schema":
            matcher.check = ReplyCheck(json.loads(constraint.text), constraint.place)
        return matcher

    def spell_reply(self, ids: Sequence[int]) -> str:
        """Spell a complete reply, without the suffix that may follow it."""
        first, later = self.spellings.first, self.spellings.later
        parts = [later[index] if place else first[index] for place, index in enumerate(ids)]
        return b"".join(part or b"" for part in parts).decode().removesuffix(self._suffix)

    def _start(self, start: str, rules: str, constraint: Constraint) -> "GrammarMatcher":
        import llguidance

        size = 4 * len(rules)  # a list of texts needs about a state for each byte
        limits = llguidance.LLParserLimits(
            step_lexer_fuel=max(MIN_STEP_FUEL, size), max_lexer_states=max(MIN_STATES, size)
        )
        grammar = f"{HEADER}start: {start}\n{rules}"
        matcher = llguidance.LLMatcher(self._words, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise SettingsError(f"{constraint.place}: {_describe_error(matcher.get_error(), constraint.kind)}")
        return GrammarMatcher(self, constraint.place, matcher)

    def _check_characters(self, constraint: Constraint) -> None:
        spelled = set(self.spellings.later)
        missing = next((each for each in JSON_CHARACTERS if each.encode() not in spelled), None)
        if missing is not None:
            problem = f"{constraint.place}: this tokenizer can't write {missing!r}"
            raise SettingsError(problem, hint="train with --add-tokens auto, or use --choices")


@dataclass
class GrammarMatcher:
    """The state of one reply.

    SentencePiece's decoders drop the space of a reply's first token. So there are two states before this token: the
    first continues with tokens without a space, the second expects a space first.

    Args:
        place: the constraint's.
        matcher: llguidance's.
        with_space: the same grammar after a space; None: the decoder drops nothing, or the reply has begun.
        is_after_space: whether the reply has only the space that the decoder drops; a second space would be no match.
        was_silent: whether the last token had no text.
        check: of complete replies; None: the grammar has no independent check.
    """

    compiler: GrammarCompiler
    place: str
    matcher: Any
    with_space: Any = None
    is_after_space: bool = False
    was_silent: bool = False
    check: ReplyCheck | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the reply may end here."""
        return bool(self.matcher.is_accepting())

    def copy(self) -> Self:
        with_space = None if self.with_space is None else self.with_space.deep_copy()
        return replace(self, matcher=self.matcher.deep_copy(), with_space=with_space)

    def find_allowed(self) -> Allowed:
        compiler = self.compiler
        allowed = self.fill_mask(self.matcher)
        if self.with_space is not None or self.is_after_space:
            allowed &= ~compiler.begins_with_space
        if self.with_space is not None:
            allowed |= self.fill_mask(self.with_space) & compiler.begins_with_space
            allowed[compiler.never_first] = False
        if not self.is_complete:
            allowed[compiler.stop_ids] = False  # llguidance allows them where no token continues the reply
            if not allowed.any():
                problem = f"{self.place}: this tokenizer can't write a character that must come next in a reply"
                raise SettingsError(problem, hint="train with --add-tokens auto, or change the constraint")
        if not self.was_silent and allowed.any():
            allowed[compiler.silent_ids] = True
        return allowed

    def check_reply(self, ids: Sequence[int]) -> None:
        if self.check is not None:
            self.check.check(self.compiler.spell_reply(ids))

    def accept(self, index: int) -> bool:
        compiler = self.compiler
        if index in compiler.stop_ids:
            return self.is_complete
        if index in compiler.silent_ids:  # it adds no text, so a model could repeat it forever
            accepted, self.was_silent = not self.was_silent, True
            return accepted
        is_first, begins_with_space = self.with_space is not None, bool(compiler.begins_with_space[index])
        if (self.is_after_space and begins_with_space) or (is_first and index in compiler.never_first):
            return False
        matcher = self.with_space if is_first and begins_with_space else self.matcher
        if matcher.try_consume_tokens([index]) == 0:
            self._check(matcher)
            return False
        self.matcher, self.with_space, self.was_silent = matcher, None, False
        self.is_after_space = is_first and compiler.spellings.later[index] == b" "
        return True

    def fill_mask(self, matcher: Any) -> Allowed:
        """Find the ids that llguidance allows next."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        self._check(matcher)
        return np.unpackbits(bits, count=self.compiler.num_rows, bitorder="little").view(bool)

    def _check(self, matcher: Any) -> None:
        """Raise SettingsError if the reply can't be continued because llguidance has reached one of its limits."""
        # NoExtensionBias: no text follows the grammar
        if matcher.is_error() and (reason := matcher.get_error().splitlines()[0]) != "NoExtensionBias":
            problem = f"{self.place}: too complex to continue this reply: {reason}"
            raise SettingsError(problem, hint="shorten its patterns, repetitions or lists")


class _Words:
    """A tokenizer, as llguidance reads it."""

    bos_token_id = None

    def __init__(self, spellings: list[bytes | None], stop_ids: list[int]) -> None:
        self.eos_token_id = stop_ids[0]
        # llguidance takes ids whose bytes begin with 255 for special tokens
        self.tokens = [text or b"\xff<%d>" % index for index, text in enumerate(spellings)]
        self.special_token_ids = [index for index, text in enumerate(spellings) if not text]

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("HEADER keeps llguidance from tokenizing text")


def _write_rules(constraint: Constraint) -> str:
    """Write a constraint as rules of a Lark grammar, one of them called REPLY."""
    if constraint.kind == "grammar":
        return START_OR_TEXT.sub(lambda found: REPLY if found[0] == "start" else found[0], constraint.text)
    if constraint.kind == "regex":
        return f"{REPLY}: PATTERN\nPATTERN: /{_escape_slashes(constraint.text)}/\n"
    return write_json_rules(json.loads(constraint.text), REPLY, constraint.place)


def _escape_slashes(pattern: str) -> str:
    """Escape the slashes of a regular expression, and its line ends, for a Lark rule."""
    pieces = re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL)
    return "".join({"/": r"\/", "\n": r"\n"}.get(piece, piece) for piece in pieces)


def _describe_error(message: str, kind: str) -> str:
    """Return llguidance's reason, without the grammar that it quotes."""
    text, line = re.split(r"\n +\d+ \| ", message)[0], 0
    if (found := re.match(r"(?:at )?(\d+)\(\d+\): (?:failed to compile JSON schema: )?", text)) is not None:
        text, line = text[found.end() :], int(found[1]) - NUM_HEADER_LINES
    if "limits." in text or "fuel exhausted" in text:  # a limit of llguidance, which is no setting
        return "too complex to compile; shorten its patterns, repetitions or lists"
    if "regex parse error" in text:  # the expression, a mark below it, and the error
        text = text.rpartition("error: ")[2]
    reason = shorten(" ".join(text.split()).replace(REPLY, "start"), MAX_REASON)
    if kind != "grammar":
        return reason
    return f"line {line}: {reason}" if line > 0 else "no rule is called start"
