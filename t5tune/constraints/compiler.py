"""Compiles constraints for one model, and starts its constrained replies."""

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from weakref import proxy

from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.answers import Answers
from t5tune.constraints.grammars import GrammarCompiler
from t5tune.constraints.schemas import list_fixed_texts
from t5tune.constraints.spelling import Spellings, spell
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import SettingsError
from t5tune.settings.messages import shorten_value

MAX_COMPILED = 64  # constraints that are kept compiled


class Compiler:
    """Compiles the constraints of one model.

    Args:
        num_rows: the number of the model's logits.
        stop_ids: the tokens that end a reply.
        answer_suffix: the template's text after an answer, which replies may end with.
    """

    def __init__(self, tokenizer: Tokenizer, num_rows: int, stop_ids: Sequence[int], answer_suffix: str = "") -> None:
        self._tokenizer, self._num_rows, self._stop_ids = tokenizer, num_rows, list(stop_ids)
        self._suffix = tokenizer.remove_special_tokens(answer_suffix)
        self._encoder = make_encoder(tokenizer)
        self._grammars: GrammarCompiler | None = None
        # A bound method would make a cycle, which keeps the tokenizer in memory after a reload.
        self._compile = lru_cache(MAX_COMPILED)(partial(Compiler._compile_once, proxy(self)))

    @cached_property
    def spellings(self) -> Spellings:
        """The bytes of each token."""
        return spell(self._tokenizer, self._num_rows)

    def start(self, constraint: Constraint) -> Matcher:
        """Start a reply.

        Raises:
            SettingsError: the constraint is invalid, can't be enforced, or this model lacks a demanded character.
            DependencyError: it needs llguidance, which isn't installed.
        """
        matcher = self._compile(constraint).copy()
        try:
            matcher.find_allowed()
        except SettingsError:  # all replies share the states that llguidance keeps, and their number is limited
            self._compile.cache_clear()
            matcher = self._compile(constraint).copy()
        return matcher

    def _compile_once(self, constraint: Constraint) -> Matcher:
        try:
            constraint.text.encode()
            return self._compile_kind(constraint)
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            raise SettingsError(f"{constraint.place}: {character!r} is half of a character") from None
        except RecursionError:
            raise SettingsError(f"{constraint.place}: nested too deeply") from None

    def _compile_kind(self, constraint: Constraint) -> Matcher:
        if constraint.kind == "choices":
            return self._sort_answers(constraint)
        if constraint.kind == "json_schema":
            self._check_fixed_texts(constraint)
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.spellings, self._stop_ids, self._suffix)
        return self._grammars.compile(constraint)

    def _sort_answers(self, constraint: Constraint) -> Matcher:
        rows = self._encode(json.loads(constraint.text), constraint.place)
        suffix = self._encoder.encode([self._suffix])[0].tolist() if self._suffix else []  # separately, as in training
        return Answers.sort([ids + suffix for ids in rows], self._stop_ids, self._num_rows).start()

    def _check_fixed_texts(self, constraint: Constraint) -> None:
        """Raise SettingsError if this tokenizer can't write a text that the schema demands."""
        texts = sorted({*list_fixed_texts(json.loads(constraint.text))})
        self._encode([json.dumps(text, ensure_ascii=False) for text in texts], constraint.place)

    def _encode(self, texts: list[str], place: str) -> list[list[int]]:
        """Encode texts as targets of training. Raises SettingsError if encoding changes one."""
        rows = [ids.tolist() for ids in self._encoder.encode([*map(Beginning, texts)])]
        for text, ids in zip(texts, rows, strict=True):
            if (written := self._tokenizer.decode(ids)) != text:
                problem = f"{place}: {shorten_value(text)}: this tokenizer writes {shorten_value(written)}"
                raise SettingsError(problem, hint="change the text, or train with --add-tokens auto")
        return rows
