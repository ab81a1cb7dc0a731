"""A model as clients see it: its name, and how their requests become prompts and replies, or labels.

The bodies of labels are vLLM's. `value` of numbers, `labels` of texts that may have several, and `tokens` of words with
labels are additions.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from t5tune.constraints import Constraint
from t5tune.constraints.compiler import Compiler
from t5tune.data.reading.formats import Turn
from t5tune.data.tokens.encoding import encode_answers
from t5tune.errors import DependencyError, SettingsError
from t5tune.inference.generation import MIN_TEMPERATURE, MIN_TOP_P
from t5tune.inference.label_predictions import Logits
from t5tune.inference.label_sources import Source, SourceReader
from t5tune.inference.prompts import Prompt, Prompts
from t5tune.io.atomic import hash_json
from t5tune.serving.generation import DecodingOptions, Engine
from t5tune.serving.protocol import (
    ApiError,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    GenerationRequest,
    ScoreRequest,
)
from t5tune.version import __version__

# Longer prompts are refused before they are encoded, which takes seconds for megabytes. English has 4 bytes per token.
MAX_BYTES_PER_TOKEN = 32
MAX_TARGET_TOKENS = 8192  # of a request
VERBS = {"classify": "classifies", "regress": "predicts numbers", "tag": "labels words"}
MAX_CONSTRAINT_LENGTH = 64 << 10  # of a request; longer schemas take seconds to compile


@dataclass(frozen=True)
class ServedModel:
    """A loaded model. `max_length`: of a source, in tokens."""

    name: str
    engine: Engine
    max_length: int
    created: int = field(default_factory=lambda: int(time.time()), init=False)

    @property
    def fingerprint(self) -> str:
        """Identify what computes the replies, as OpenAI's `system_fingerprint` does."""
        return f"fp_{hash_json([__version__, self.engine.name])[:12]}"

    def to_body(self) -> dict[str, Any]:
        """Describe the model as OpenAI's API does."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "t5tune"}

    def check_size(self, size: int, place: str, unit: str) -> None:
        """Raise ApiError for a prompt that is certainly too long, before it is encoded."""
        if size > self.max_bytes:
            raise self.refuse_long(place, f"{size:,} {unit}")

    def refuse_long(self, place: str, found: str) -> ApiError:
        """Make the error for a prompt that is too long."""
        problem = f"{place}: too long: {found}; model_max_length is {self.max_length:,} tokens"
        return ApiError(400, problem, place, "context_length_exceeded")

    @property
    def max_bytes(self) -> int:
        """The size of the largest prompt that is encoded."""
        return self.max_length * MAX_BYTES_PER_TOKEN


@dataclass(frozen=True)
class TextModel(ServedModel):
    """A model that writes text.

    Args:
        defaults: decoding options for fields that a request leaves out.
        longest: limit on the tokens of a reply.
        compiler: of constraints on replies.
        constraint: of replies to requests without a constraint; None: they are free.
    """

    prompts: Prompts
    defaults: DecodingOptions
    longest: int
    compiler: Compiler
    constraint: Constraint | None = None

    def read_prompts(self, request: GenerationRequest) -> Iterator[Prompt]:
        """Encode the prompts of a request, one at a time. Raises ApiError for a prompt that can't get a reply."""
        place = "messages"
        try:
            if isinstance(request, ChatRequest):
                yield self._read_messages(request)
                return
            assert isinstance(request, CompletionRequest)
            for number, prompt in enumerate(request.prompt):
                place = f"prompt[{number}]" if len(request.prompt) > 1 else "prompt"
                yield self._read_prompt(prompt, place)
        except SettingsError as error:
            raise ApiError(400, str(error), place) from error

    def read_targets(self, request: ScoreRequest) -> list[list[int]]:
        """Encode the targets of a request as in training. Raises ApiError if they are too long."""
        self.check_size(sum(map(_count_bytes, request.targets)), "targets", "bytes")
        encoded = encode_answers(request.targets, self.prompts.template, self.prompts.encoder)
        targets = [ids.tolist() for ids in encoded]
        if (number := sum(map(len, targets))) > MAX_TARGET_TOKENS:
            raise ApiError(400, f"targets: {number:,} tokens; at most {MAX_TARGET_TOKENS:,} are scored", "targets")
        return targets

    def read_constraint(self, request: GenerationRequest) -> Constraint:
        """Read the constraint of a request that has one. Raises ApiError if it is too long, or an answer is empty."""
        try:
            constraint = request.read_constraint()
            assert constraint is not None
            if len(constraint.text) > MAX_CONSTRAINT_LENGTH:
                size = f"{len(constraint.text):,} characters; at most {MAX_CONSTRAINT_LENGTH:,} are allowed"
                raise SettingsError(f"{constraint.place}: {size}")
            return constraint
        except SettingsError as error:
            raise ApiError(400, str(error), request.constraint_field, "invalid_constraint") from error

    def read_options(self, request: GenerationRequest, constraint: Constraint | None) -> DecodingOptions:
        """Fill in the decoding options of a request, and compile its constraint.

        Raises:
            ApiError: it exceeds a limit, the engine can't do it, or replies can't follow the constraint.
        """
        name, limit = request.reply_limit
        if limit is not None and limit > self.longest:
            raise ApiError(400, f"{name}: {limit}: this server allows at most {self.longest:,} tokens", name)
        temperature = self.defaults.temperature if request.temperature is None else request.temperature
        if request.seed is not None and temperature > 0 and not self.engine.has_seeds:
            problem = f"seed: {request.seed}: {self.engine.name} can't repeat a sampled reply"
            raise ApiError(400, f"{problem}; leave it out, or set temperature to 0", "seed", "unsupported")
        options = DecodingOptions(
            max_new_tokens=self.defaults.max_new_tokens if limit is None else limit,
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_p=max(MIN_TOP_P, self.defaults.top_p if request.top_p is None else request.top_p),
            seed=request.seed,
            num_top=request.num_top,
        )
        if constraint is None:
            return options
        try:
            matcher = self.compiler.start(constraint)
        except (SettingsError, DependencyError) as error:
            raise ApiError(400, str(error), request.constraint_field, "invalid_constraint") from error
        if options.temperature > 0 and options.top_p < 1 and not self.engine.can_constrain_top_p:
            advice = "leave it out, or serve with --engine transformers"
            problem = f"top_p: {options.top_p:g}: CTranslate2 can't constrain replies with it; {advice}"
            raise ApiError(400, problem, "top_p", "unsupported")
        return replace(options, constraint=matcher)

    def _read_messages(self, request: ChatRequest) -> Prompt:
        system, turns = request.split_messages()
        needed = _count_bytes(system or "") + _count_bytes(turns[-1].text)
        self.check_size(needed, "messages", "bytes in the system and the last message")
        recent = self._drop_oldest(turns)
        prompt = self._check_prompt(self.prompts.encode(recent, system), "messages")
        return replace(prompt, dropped_turns=prompt.dropped_turns + len(turns) - len(recent))

    def _drop_oldest(self, turns: list[Turn]) -> list[Turn]:
        """Drop the oldest turns that can't fit. The remaining turns begin with the user's."""
        room, count = self.max_bytes, 0
        for turn in reversed(turns):
            room -= max(_count_bytes(turn.text), MAX_BYTES_PER_TOKEN)  # each turn takes at least one token
            if room < 0:
                break
            count += 1
        return turns[len(turns) - count + (count + 1) % 2 :]

    def _read_prompt(self, prompt: str | list[int], place: str) -> Prompt:
        if isinstance(prompt, str):
            self.check_size(_count_bytes(prompt), place, "bytes")
            return self._check_prompt(self.prompts.encode_text(prompt), place)
        self.check_size(len(prompt), place, "ids")
        size = len(self.prompts.tokenizer)
        unknown = next((index for index in prompt if not 0 <= index < size), None)
        if unknown is not None:
            raise ApiError(400, f"{place}: {unknown}: the tokenizer has no such id; it has {size:,} tokens", place)
        return self._check_prompt(self.prompts.make_prompt(prompt), place)

    def _check_prompt(self, prompt: Prompt, place: str) -> Prompt:
        if not self.engine.can_read(prompt.ids):
            problem = f"{place}: nothing to reply to: {self.engine.name} needs at least one token that isn't special"
            raise ApiError(400, problem, place)
        if prompt.cut_tokens:
            what = "the system and the last message don't fit" if place == "messages" else f"it has {len(prompt.ids):,}"
            raise self.refuse_long(place, what)
        return prompt


@dataclass(frozen=True)
class LabelModel(ServedModel):
    """A model that predicts labels."""

    reader: SourceReader

    def to_body(self) -> dict[str, Any]:
        task = self.reader.task
        return {**super().to_body(), "objective": task.objective, "labels": list(task.names)}

    def read_sources(self, request: ClassifyRequest) -> Iterator[Source]:
        """Encode the inputs of a request, one at a time. Raises ApiError for an input that can't get labels."""
        for number, text in enumerate(request.input):
            place = f"input[{number}]" if len(request.input) > 1 else "input"
            self.check_size(_count_bytes("".join(text)), place, "bytes")
            try:
                source = self.reader.read(text)
            except SettingsError as error:
                raise ApiError(400, f"{place}: {error}", place) from error
            if source.cut_tokens:
                raise self.refuse_long(place, f"it has {len(source.example.source_S) + source.cut_tokens:,}")
            yield source

    def describe(self, index: int, source: Source, logits: Logits) -> dict[str, Any]:
        """Describe the prediction for an input."""
        task, found = self.reader.task, self.reader.describe(source, logits)
        predicted, probabilities = found["prediction"], found.get("probabilities", {})
        item: dict[str, Any] = {"index": index, "label": None, "probs": [], "num_classes": len(task.names)}
        if task.per_token:
            name = "value" if task.objective == "regress" else "label"
            scores = [{"score": score} for score in probabilities] or [{}] * len(predicted)
            words = zip(source.words, predicted, scores, strict=True)
            item["tokens"] = [
                {"word": word.text, name: value, **score, "start": word.start, "end": word.end}
                for word, value, score in words
            ]
        elif task.objective == "regress":
            item["value"] = predicted
        else:
            item |= {"label": max(probabilities, key=probabilities.get), "probs": list(probabilities.values())}
            if task.several:
                item["labels"] = predicted
        return item


def _count_bytes(text: str) -> int:
    return len(text.encode())
