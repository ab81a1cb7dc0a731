"""`t5tune chat`: talk to a base, an adapter, a run or a merged checkpoint, in the conversation template of training.

    chatter = Chatter.load(ChatSettings(model_name_or_path="pocket", adapter="run"))
    chatter.reply("Hello")

A model that predicts labels doesn't reply, but labels texts:

    labeler = Labeler.load(ChatSettings(model_name_or_path="labels"))
    labeler.label("great film").prediction    # "positive"
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.training_data import read_label_task
from t5tune.compat.quiet import quiet_libraries
from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.reading import read_constraint
from t5tune.data.reading.formats import Turn
from t5tune.data.tokens.templates import load_template
from t5tune.errors import SettingsError
from t5tune.formatting import format_count
from t5tune.inference.generation import Decoding, Sampling, find_stop_ids, generate, make_random_generator
from t5tune.inference.label_predictions import compute_logits
from t5tune.inference.label_sources import SourceReader, make_reader
from t5tune.inference.loading import (
    LoadedModel,
    choose_family,
    find_base_and_adapter,
    load_for_inference,
    make_compiler,
)
from t5tune.inference.precision import Precision
from t5tune.inference.prompts import Prompts, ReplyText, make_prompts
from t5tune.inference.target_scores import set_up_scoring
from t5tune.model.batches import Collator
from t5tune.model.device import use_gpu_kernels
from t5tune.progress import Note, Report, silent, without_notes
from t5tune.runs.checkpoints import replace_stopped_runs
from t5tune.settings import ChatSettings
from t5tune.settings.calls import check_call, refuse_text_settings


@dataclass(frozen=True)
class Reply:
    """One reply. Lengths are in tokens; `source_tokens` doesn't count the end-of-sequence token.

    Args:
        dropped_turns: how many of the oldest turns the model didn't see.
        cut_tokens: how many tokens of the last message and of the system message it didn't see.
    """

    reply: str
    source_tokens: int
    reply_tokens: int
    seconds: float
    dropped_turns: int
    cut_tokens: int


@dataclass(frozen=True)
class Chatter:
    """A loaded model and its chat settings. Immutable: each `with_…` method returns a new session.

    Args:
        prompts: how the model reads and writes text.
        random: the random generator for sampling; each reply continues it.
        precision: of the loaded model.
        constraint: of all replies.
        matcher: the constraint at the beginning of a reply.
    """

    model: Any
    prompts: Prompts
    settings: ChatSettings
    random: Any
    precision: Precision
    constraint: Constraint | None
    matcher: Matcher | None

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Chatter":
        """Load the base (in the precision of training, unless the settings say otherwise) and the adapter.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
            SettingsError: replies of this model can't follow the constraint, or it predicts labels.
        """
        report = check_call("Chatter.load", settings, ChatSettings, report)
        return Chatter._load(settings, report)

    @staticmethod
    def _load(settings: ChatSettings, report: Report, precision: Precision | None = None) -> "Chatter":
        found = load_model(settings, report, precision)
        if isinstance(found, Labeler):
            setting = "model_name_or_path" if settings.adapter is None else "adapter"
            problem = f"{setting}: {getattr(settings, setting)}: predicts labels, and doesn't reply"
            raise SettingsError(problem, hint="load it with t5tune chat, or Labeler.load(…)")
        return found

    @staticmethod
    def _make(loaded: LoadedModel, settings: ChatSettings, report: Report) -> "Chatter":
        template, prefix = settings.conversation_template, settings.source_prefix
        prompts = make_prompts(loaded, template, prefix, settings.model_max_length, report)
        if not prompts.keeps_history and settings.prompt is None:
            report(Note("earlier messages are ignored: this model was trained on single exchanges"))
        # model_name_or_path may have named an adapter or a run: store base and adapter apart, so that /adapter can
        # replace or remove the adapter
        settings = settings.model_copy(update={"model_name_or_path": str(loaded.base), "adapter": loaded.adapter})
        random = make_random_generator(settings.seed, loaded.model.device)
        constraint = read_constraint(settings, loaded.json_schema)
        matcher = _start(constraint, loaded.model, prompts)
        return Chatter(loaded.model, prompts, settings, random, loaded.precision, constraint, matcher)

    def with_system(self, message: str | None) -> "Chatter":
        """Use a different system message; None selects the conversation template's default."""
        return replace(self, settings=self.settings.model_copy(update={"system": message}))

    def with_template(self, name_or_path: str) -> "Chatter":
        """Use a different conversation template.

        Raises:
            SettingsError: there is no such template.
        """
        prompts = replace(self.prompts, template=load_template(name_or_path))
        return replace(self, prompts=prompts, matcher=_start(self.constraint, self.model, prompts))

    def with_history(self, keeps_history: bool) -> "Chatter":
        """Choose whether the model sees the whole conversation or only its last message."""
        return replace(self, prompts=replace(self.prompts, keeps_history=keeps_history))

    def with_adapter(self, adapter: Path | None, report: Report = silent) -> "Chatter":
        """Load a different adapter onto the same base, with that adapter's tokenizer and conversation template.

        None loads the base alone, with the precision and the model family that the adapter was trained with.
        """
        settings = self.settings.model_copy(update={"adapter": adapter})
        if adapter is not None:
            return Chatter.load(settings, report)
        family = choose_family(self.settings, self.settings.adapter)
        return Chatter._load(settings.model_copy(update={"family": family}), report, self.precision)

    def reply(self, message: str | list[Turn], show: Callable[[str], None] | None = None) -> Reply:
        """Reply to a message, or to a conversation that ends with a message (without history, to the message alone).

        Args:
            show: called with each piece of the reply as soon as its text is final; joined, the pieces are the reply.

        Raises:
            SettingsError: the conversation's turns are in the wrong order, or a message isn't valid UTF-8 or contains a
                word that is too long.
            InvalidReplyError: the reply is complete, and violates its constraint.
        """
        started = time.monotonic()
        turns = [Turn("human", message)] if isinstance(message, str) else message
        prompt = self.prompts.encode(turns, self.settings.system)
        text = ReplyText(self.prompts, show)
        ids = self._generate(prompt.ids, text.update if show else None)
        return Reply(
            reply=text.finish(ids),
            source_tokens=prompt.num_tokens,
            reply_tokens=len(ids),
            seconds=round(time.monotonic() - started, 3),
            dropped_turns=prompt.dropped_turns,
            cut_tokens=prompt.cut_tokens,
        )

    def report_cuts(self, reply: Reply, report: Report) -> None:
        """Report the text that the model didn't see because of model_max_length."""
        problem = f"too long for model_max_length {self.prompts.max_length}: the model didn't see"
        if reply.cut_tokens:
            cut = f"{format_count(reply.cut_tokens, 'token')} of it or of the system message"
            report(Note(f"the message is {problem} {cut}; shorten it, or raise model_max_length", warning=True))
        if reply.dropped_turns and self.prompts.keeps_history:  # otherwise, `load` reported it
            report(Note(f"the conversation is {problem} the oldest {format_count(reply.dropped_turns, 'turn')}"))

    def _generate(self, source: list[int], show: Callable[[list[int]], object] | None) -> list[int]:
        """Generate a reply. `show` is called after each token with all ids so far.

        Raises:
            InvalidReplyError: the reply is complete, and violates its constraint.
        """
        tokenizer, settings = self.prompts.tokenizer, self.settings
        decoding = Decoding(tokenizer.eos_token_id, tokenizer.pad_token_id, settings.max_new_tokens, keeps_stop=True)
        sampling = Sampling(settings.temperature, settings.top_p, self.random) if settings.temperature > 0 else None
        so_far: list[int] = []

        def show_token(row: int, token: int) -> None:
            so_far.append(token)
            if show is not None:
                show(so_far)

        with quiet_libraries(), use_gpu_kernels(self.model.device):
            (ids,) = generate(
                self.model,
                [source],
                decoding,
                on_token=show_token if show else None,
                samplings=[sampling],
                constraints=[self.matcher],
            )
        if ids[-1] not in find_stop_ids(self.model, tokenizer.eos_token_id):
            return ids
        if self.matcher is not None:
            self.matcher.check_reply(ids[:-1])
        return ids[:-1]


@dataclass(frozen=True)
class Labeling:
    """A prediction for a text.

    Args:
        prediction: its label, labels or number; if each word has one, a list with an item for each word: None if the
            word was cut off, or is white space.
        probability: of the label, if there is one.
        probabilities: label -> its probability; if each word has a label, the probabilities of these labels.
        words: the words that have labels or numbers.
        source_tokens, cut_tokens: how many tokens the model saw and didn't see, without special tokens.
    """

    prediction: Any
    probability: float | None
    probabilities: dict[str, float] | list[float | None] | None
    words: list[str] | None
    source_tokens: int
    cut_tokens: int
    seconds: float


@dataclass(frozen=True)
class Labeler:
    """A loaded model that predicts labels, and its chat settings."""

    model: Any
    reader: SourceReader
    settings: ChatSettings
    collator: Collator

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Labeler":
        """Load the model as `Chatter.load` does.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
            SettingsError: it writes text, or a setting is only for models that do.
        """
        report = check_call("Labeler.load", settings, ChatSettings, report)
        found = load_model(settings, report)
        if isinstance(found, Chatter):
            problem = f"model_name_or_path: {settings.model_name_or_path}: writes text, and predicts no labels"
            raise SettingsError(problem, hint="load it with Chatter.load(…)")
        return found

    @staticmethod
    def _make(loaded: LoadedModel, settings: ChatSettings, report: Report) -> "Labeler":
        reader = make_reader(loaded, settings.source_prefix, settings.model_max_length, report)
        collator = set_up_scoring(loaded.model, loaded.tokenizer.pad_token_id)
        return Labeler(loaded.model, reader, settings, collator)

    def label(self, text: str | Sequence[str]) -> Labeling:
        """Predict the label, the labels or the number of a text or of its words, which may be given as a list.

        Raises:
            SettingsError: the text is empty or isn't valid UTF-8, or a word is too long.
        """
        started = time.monotonic()
        source = self.reader.read(text)
        with quiet_libraries(), use_gpu_kernels(self.model.device):
            (logits,) = compute_logits(self.model, [source.example], self.collator)
        found = self.reader.describe(source, logits)
        return Labeling(
            prediction=found["prediction"],
            probability=found.get("probability"),
            probabilities=found.get("probabilities"),
            words=[word.text for word in source.words] or None,
            source_tokens=source.num_tokens,
            cut_tokens=source.cut_tokens,
            seconds=round(time.monotonic() - started, 3),
        )

    def report_cuts(self, labeling: Labeling, report: Report) -> None:
        """Report the text that the model didn't see because of model_max_length."""
        if labeling.cut_tokens:
            problem = f"the text is too long for model_max_length {self.reader.max_length}: the model didn't see"
            cut = f"its last {format_count(labeling.cut_tokens, 'token')}"
            report(Note(f"{problem} {cut}; shorten it, or raise model_max_length", warning=True))


def load_model(settings: ChatSettings, report: Report, precision: Precision | None = None) -> Chatter | Labeler:
    """Load a model that replies, or one that predicts labels. `precision`: None: as in the settings or in training."""
    read_constraint(settings, None)  # raises before the model is loaded
    settings = replace_stopped_runs(settings, report)
    base, adapter = find_base_and_adapter(settings, without_notes(report))  # loading reports the notes later
    if read_label_task(adapter or base) is not None:
        refuse_text_settings(settings)
    with quiet_libraries():
        loaded = load_for_inference(settings, report, precision=precision)
    make = Chatter._make if loaded.label_task is None else Labeler._make
    return make(loaded, settings, report)


def _start(constraint: Constraint | None, model: Any, prompts: Prompts) -> Matcher | None:
    if constraint is None:
        return None
    return make_compiler(model, prompts.tokenizer, prompts.template.answer_suffix).start(constraint)


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
        chatter: made the replies.
        turns: the conversation; the turns that the model saw are the record's question.

    Raises:
        SettingsError: the file can't be written.
    """
    seen, system = chatter.prompts.select_turns(turns), chatter.settings.system
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
    return reply_to_prompt(Chatter.load(settings, report), report)


def reply_to_prompt(chatter: Chatter, report: Report) -> Reply:
    """Reply to the prompt of the settings."""
    assert chatter.settings.prompt is not None, "a setting"
    reply = chatter.reply(chatter.settings.prompt)
    chatter.report_cuts(reply, report)
    return reply
