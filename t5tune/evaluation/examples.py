"""The examples that `evaluate` reads: from conversations, or from a token cache.

chosen = load_evaluation_set(EvaluationPlan(datasets=datasets, base=base, …), loaded, report)
chosen.examples, chosen.targets
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain, groupby, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.data.caches.examples import Examples, decode_targets
from t5tune.data.caches.prepared import find_caches, open_examples
from t5tune.data.reading.files import Digest, find_encodings, find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import LABELED_BAD, RecordLocation, Rejection
from t5tune.data.reading.remote_files import hide_query
from t5tune.data.reading.sources import bring_data
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.encoding import (
    EncodedConversation,
    Example,
    LabeledExample,
    encode_answers,
    encode_batch,
    extract_example,
)
from t5tune.data.tokens.templates import PAIR_TEMPLATE, Template, load_template, render_conversation
from t5tune.data.tokens.tokenizer import Tokenizer, decode_reference, find_other_token, load_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import REJECTED_FILE, TOKENIZER_FILE
from t5tune.formatting import format_count
from t5tune.hub.datasets import EVALUATION_SPLITS, DatasetChoice
from t5tune.inference.loading import LoadedModel, choose_family
from t5tune.inference.target_scores import CandidateList
from t5tune.io.atomic import hash_file
from t5tune.io.reasons import join_first
from t5tune.preparing.data_problems import make_mixed_data_error, report_default_template
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.pipeline import hash_conversation, read_conversation, read_key
from t5tune.preparing.plan import Origin, PreparePlan
from t5tune.preparing.sample import choose_default_template, drain, report_doubts, take_sample
from t5tune.progress import Event, Note, Report
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings

LOCATION = [field.name for field in fields(RecordLocation)]
TOKENIZER_BATCH_SIZE = 256  # conversations per call to the tokenizer

Prompt = str | list[dict[str, str]]
"""The input that an answer replies to: a text, or messages with `role` and `content`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to evaluate on.

    Args:
        base: the given model; only its family and the folder for downloads are used.
        add_tokens: the tokens that the user adds to the tokenizer; None: no tokens. A base that wasn't tuned doesn't
            get the tokens that training would add: their embedding rows aren't trained.
        compares_base: whether to evaluate the base alone, too.
        find_held_out: finds the examples of a token cache that training held out; None: not known, or no examples.
        trained_keys: the keys of the conversations that the model was trained on, if they are known.
    """

    datasets: Sequence[DatasetSpec]
    base: BaseModelSettings
    add_tokens: list[str] | None
    compares_base: bool
    find_held_out: Callable[[Examples], Examples | None]
    trained_keys: npt.NDArray[np.uint64]

    def report_trained(self, keys: npt.NDArray[np.uint64], report: Report) -> None:
        """Report how many of the examples with these keys the model was trained on."""
        if count := int(np.isin(keys, self.trained_keys).sum()):
            which = "all" if count == len(keys) else f"{count:,} of"
            examples = format_count(len(keys), "example")
            report(Note(f"the run was trained on {which} {examples}; scores of other data say more", warning=True))


@dataclass(frozen=True)
class EvaluationSet:
    """Examples, their targets as text, and how to decode predictions.

    Args:
        templates: the conversation template of each example.
        datasets: the name and the examples of each dataset, if there are several.
        prompts: for each example, its prompt without template and prefix; None: unknown, as in a token cache.
        raw_texts: the examples with masked spans of raw text.
        base: the same texts, encoded by the base's tokenizer; None without compare_base.
    """

    examples: Sequence[Example]
    targets: list[str]
    tokenizer: Tokenizer
    templates: Sequence[Template]
    datasets: list[tuple[str, range]] = field(default_factory=list)
    prompts: Sequence[Prompt | None] = ()
    raw_texts: frozenset[int] = frozenset()
    base: "EvaluationSet | None" = None

    def add_choices(self, choices: list[str]) -> Sequence[Example]:
        """Return the examples with the choices as further targets."""
        encoder = make_encoder(self.tokenizer)
        encoded = {template: tuple(encode_answers(choices, template, encoder)) for template in {*self.templates}}
        return CandidateList(self.examples, [encoded[template] for template in self.templates])

    def check_targets(self, answers: Collection[str], place: str, report: Report) -> None:
        """Refuse or report targets that aren't among the only possible answers."""
        missing = [target for target in self.targets if target not in answers]
        if missing:
            problem = f"{place}: lacks {len(missing):,} of {len(self.targets):,} targets, such as {missing[0]!r}"
            if len(missing) == len(self.targets):
                raise SettingsError(problem, hint="write answers and targets alike")
            report(Note(f"{problem}; their predictions can't be right", warning=True))

    def add_base(self, examples: Sequence[Example], tokenizer: Tokenizer) -> "EvaluationSet":
        """Add the base's examples."""
        return replace(self, base=replace(self, examples=examples, tokenizer=tokenizer))


def load_evaluation_set(plan: EvaluationPlan, loaded: LoadedModel, report: Report) -> EvaluationSet:
    """Load the examples of token caches, and encode conversations with the model's conversation template."""
    if len(plan.datasets) == 1:
        return _load_dataset(plan, plan.datasets[0], loaded, report)
    parts: dict[str, EvaluationSet] = {}
    for dataset in plan.datasets:
        report(Note(f"dataset {dataset.name}: {join_first([*map(hide_query, dataset.path)])}"))
        parts[dataset.name] = _load_dataset(plan, dataset, loaded, report)
    return _join(parts)


def _join(parts: Mapping[str, EvaluationSet]) -> EvaluationSet:
    """Join the examples of several datasets, one dataset after the other."""
    ends = list(accumulate(len(part.targets) for part in parts.values()))
    ranges = {name: range(end - len(part.targets), end) for (name, part), end in zip(parts.items(), ends, strict=True)}
    of_base = {name: part.base for name, part in parts.items() if part.base is not None}
    return EvaluationSet(
        [example for part in parts.values() for example in part.examples],
        [target for part in parts.values() for target in part.targets],
        _choose_common_tokenizer(parts),
        [template for part in parts.values() for template in part.templates],
        list(ranges.items()),
        [prompt for part in parts.values() for prompt in part.prompts or repeat(None, len(part.targets))],
        frozenset(ranges[name][index] for name, part in parts.items() for index in part.raw_texts),
        _join(of_base) if of_base else None,
    )


def _choose_common_tokenizer(parts: Mapping[str, EvaluationSet]) -> Tokenizer:
    """Choose the tokenizer that has the tokens of all datasets; raise an error if there isn't one."""
    most = max(parts, key=lambda name: len(parts[name].tokenizer))
    tokenizer = parts[most].tokenizer
    for name, part in parts.items():
        if (other := find_other_token(part.tokenizer, tokenizer)) is not None:
            token, index = other
            raise DataError(
                f"data_path: {name} and {most} have different tokenizers: {token!r} has id {index} only in {name}",
                hint="give the conversation files of both in place of the token caches",
            )
    return tokenizer


class _Answer(NamedTuple):
    example: Example
    of_base: Example | None  # encoded by the base's tokenizer; None without compare_base
    target: str
    prompt: Prompt
    is_pair: bool  # the conversation is a pair of source and target
    is_truncated: bool
    key: int  # of the conversation, as in a token cache


def _load_dataset(plan: EvaluationPlan, dataset: DatasetSpec, loaded: LoadedModel, report: Report) -> EvaluationSet:
    if dataset.cache is not None:
        examples = _take(_open_cache(plan, dataset, report), dataset, plan, report)
        return _load_cache_examples(examples, plan.compares_base, loaded, report)
    if dataset.kind == "raw text":
        return _load_raw_text(plan, dataset, loaded, report)
    tokenizer = loaded.tokenizer
    if plan.add_tokens is not None:
        tokenizer = extend_tokenizer(tokenizer, plan.add_tokens, loaded.num_rows).tokenizer
    base = load_tokenizer(loaded.base) if plan.compares_base else None
    names = [str(find_conversations_file()) if name == "pocket" else name for name in dataset.path]
    choice = DatasetChoice(dataset.data_subset, dataset.data_split, EVALUATION_SPLITS)
    paths = bring_data(names, choice, "data_path", plan.base.cache_dir, report)
    files = find_files(paths, report, pair=dataset.pair_lines)
    records = read_records(files, dataset, stdin := Digest())
    sample = take_sample(records)
    find_encodings(files, dataset.encoding, stdin, report)
    report_doubts(sample, dataset, report)
    template, default_template = loaded.find_template(dataset.conversation_template), None
    if template is None:
        default_template = choose_default_template(sample, files, dataset)
        template = load_template(default_template)
    answers: list[_Answer] = []
    rejected: list[tuple[RecordLocation, Rejection]] = []
    for location, outcome in _encode(chain(drain(sample), records), dataset, template, tokenizer, base):
        if isinstance(outcome, Rejection):
            rejected.append((location, outcome))
            continue
        if default_template == PAIR_TEMPLATE and not outcome.is_pair:
            raise make_mixed_data_error(location, sum(answer.is_pair for answer in answers))
        answers.append(outcome)
        if len(answers) == dataset.num_data:
            break
    if default_template is not None:
        num_pairs = sum(answer.is_pair for answer in answers)
        if num_pairs == 0:
            report(Note(f"the model has no conversation template; using {default_template}"))
        report_default_template(default_template, num_pairs, format_count(len(answers), "example"), report)
    _report_rejected(rejected, report)
    if num_truncated := sum(answer.is_truncated for answer in answers):
        truncated = f"{format_count(num_truncated, 'example')} truncated to model_max_length"
        report(Note(f"{truncated} {dataset.model_max_length}", True))
    if not answers:
        hint = "give records with answers; if their columns differ from training's, set source_column and target_column"
        raise DataError(f"data_path: {', '.join(map(str, files))}: contains no examples to evaluate on", hint=hint)
    plan.report_trained(np.array([answer.key for answer in answers], np.uint64), report)
    chosen = EvaluationSet(
        [answer.example for answer in answers],
        [answer.target for answer in answers],
        tokenizer,
        [template] * len(answers),
        prompts=[answer.prompt for answer in answers],
    )
    of_base = [answer.of_base for answer in answers if answer.of_base is not None]
    return chosen if base is None else chosen.add_base(of_base, base)


def load_labeled_examples(
    plan: EvaluationPlan, loaded: LoadedModel, report: Report
) -> tuple[list[LabeledExample], list[tuple[str, range]]]:
    """Load the examples of token caches, and encode texts with labels.

    Returns:
        The examples, whose class numbers are the model's, and the examples of each dataset, if there are several.
    """
    task, found, ranges = loaded.model.label_task, list[LabeledExample](), list[tuple[str, range]]()
    for dataset in plan.datasets:
        with tempfile.TemporaryDirectory() as folder:
            if dataset.cache is not None:
                examples = _open_cache(plan, dataset, report)
            else:
                examples = _prepare(plan, dataset, loaded, Path(folder), report)
            examples = _take(examples, dataset, plan, report).map_labels(task)
            inside = examples.list_datasets() or [(dataset.name, range(len(examples)))]
            ranges += [(name, range(of.start + len(found), of.stop + len(found))) for name, of in inside]
            found += (each for each in examples if isinstance(each, LabeledExample))
    return found, ranges if len(ranges) > 1 else []


def _open_cache(plan: EvaluationPlan, dataset: DatasetSpec, report: Report) -> Examples:
    """Open a token cache, or only the examples that training held out."""
    examples = open_examples(Path(dataset.path[0]))
    held_out = examples.split_as_prepared()[1] or plan.find_held_out(examples)
    if held_out is None:
        return examples
    report(Note(f"{examples.folder}: evaluating on its {format_count(len(held_out), 'held-out example')}"))
    return held_out


def _load_raw_text(plan: EvaluationPlan, dataset: DatasetSpec, loaded: LoadedModel, report: Report) -> EvaluationSet:
    """Mask spans of raw text as prepare does, with a token cache in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        examples = _take(_prepare(plan, dataset, loaded, Path(folder), report), dataset, plan, report)
        chosen = _load_cache_examples(examples, plan.compares_base, loaded, report)
        base = None if chosen.base is None else replace(chosen.base, examples=list(chosen.base.examples))
        return replace(chosen, examples=list(chosen.examples), base=base)


def _prepare(plan: EvaluationPlan, dataset: DatasetSpec, loaded: LoadedModel, folder: Path, report: Report) -> Examples:
    """Prepare a token cache in an empty folder, with the model's tokenizer."""
    family = choose_family(plan.base, loaded.adapter)
    base_changes = {"model_name_or_path": str(loaded.base), "revision": None, "family": family}
    prepare_plan = PreparePlan(
        datasets=[dataset.model_copy(update={"conversation_template": None, "max_rejected_fraction": None})],
        base=plan.base.model_copy(update=base_changes),
        output_dir=folder / "cache",
        split=SplitSettings(),
        add_tokens=plan.add_tokens or ["auto"],
        origin=Origin(tokenizer_source=loaded.tokenizer_folder, is_evaluation=True),
    )

    def report_what_stays(event: Event) -> None:
        if not (isinstance(event, Note) and str(folder) in event.text):  # the folder is temporary
            report(event)

    prepare_datasets(prepare_plan, report_what_stays)
    rejected: list[tuple[RecordLocation, Rejection]] = []
    for cache in find_caches(prepare_plan.output_dir):
        with open(cache / REJECTED_FILE, encoding="utf-8") as file:
            for values in map(json.loads, file):
                location = RecordLocation(**{name: values[name] for name in LOCATION if name in values})
                rejected.append((location, Rejection(**{name: values[name] for name in Rejection._fields})))
    _report_rejected(rejected, report)
    return open_examples(prepare_plan.output_dir)


def _encode(
    records: Iterator[RawRecord], dataset: DatasetSpec, template: Template, tokenizer: Tokenizer, base: Tokenizer | None
) -> Iterator[tuple[RecordLocation, Rejection | _Answer]]:
    """Yield each record's rejection or answers, in order, so that a caller that stops early counts only used records.

    `base` is the base's tokenizer, which encodes the same texts; None: the base isn't compared.
    """
    encoder, encoder_of_base = make_encoder(tokenizer), None if base is None else make_encoder(base)
    while batch := list(islice(records, TOKENIZER_BATCH_SIZE)):
        read = [read_conversation(record, dataset, encoder) for record in batch]
        pieces = [render_conversation(each, template) for each in read if isinstance(each, Conversation)]
        encodings = iter(encode_batch(pieces, encoder, dataset.model_max_length))
        encodings_of_base: Iterator[EncodedConversation] = iter(())
        if encoder_of_base is not None:
            encodings_of_base = iter(encode_batch(pieces, encoder_of_base, dataset.model_max_length))
        for record, conversation in zip(batch, read, strict=True):
            if isinstance(conversation, Rejection):
                yield record.location, conversation
                continue
            encoded, encoded_of_base = next(encodings), next(encodings_of_base, None)
            key = read_key(hash_conversation(conversation, dataset.source_prefix if conversation.has_prefix else ""))
            for number, span in enumerate(encoded.spans):
                example, of_base = extract_example(encoded.ids, span, encoder.special_ids), None
                # the base's encoding has the same number of spans: one per answer
                if encoder_of_base is not None and encoded_of_base is not None:
                    special_ids = encoder_of_base.special_ids
                    of_base = extract_example(encoded_of_base.ids, encoded_of_base.spans[number], special_ids)
                text = conversation.turns[span.turn].text
                if not span.target_is_whole:
                    text = decode_reference(tokenizer, example.target_T, template.answer_suffix)
                is_truncated = not (span.source_is_whole and span.target_is_whole)
                prompt = _describe_prompt(conversation, span.turn, dataset.source_prefix)
                answer = _Answer(
                    example=example,
                    of_base=of_base,
                    target=text,
                    prompt=prompt,
                    is_pair=conversation.is_pair,
                    is_truncated=is_truncated,
                    key=key,
                )
                yield record.location, answer


def _describe_prompt(conversation: Conversation, turn: int, prefix: str) -> Prompt:
    """Return the prompt of an answer without template and prefix: a text, or messages if there are several."""
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    roles = {"human": "user", "assistant": "assistant"}
    turns = conversation.turns[:turn]
    messages = system + [{"role": roles[each.role], "content": each.text} for each in turns]
    first = turns[0].text.removeprefix(prefix if conversation.has_prefix else "")
    return first if len(messages) == 1 else messages


def _report_rejected(rejected: list[tuple[RecordLocation, Rejection]], report: Report) -> None:
    if bad := sum(rejection.reason == LABELED_BAD for _, rejection in rejected):
        was_left_out = "was left out" if bad == 1 else "were left out"
        report(Note(f"{format_count(bad, 'record')} labeled bad (label: false, kto_tag: false) {was_left_out}", True))
    if broken := [each for each in rejected if each[1].reason != LABELED_BAD]:
        location, first = broken[0]
        report(Note(f"{format_count(len(broken), 'record')} rejected, the first: {location}: {first.message}", True))


def _take(examples: Examples, dataset: DatasetSpec, plan: EvaluationPlan, report: Report) -> Examples:
    """Take the first `num_data` examples, and report how many of them the model was trained on."""
    if dataset.num_data is not None:
        examples = examples.take(dataset.num_data)
    plan.report_trained(examples.read_keys(), report)
    return examples


def _load_cache_examples(examples: Examples, compares_base: bool, loaded: LoadedModel, report: Report) -> EvaluationSet:
    saved, made = loaded.tokenizer_folder / TOKENIZER_FILE, examples.tokenizer_folder / TOKENIZER_FILE
    tokenizer = load_tokenizer(examples.tokenizer_folder)
    same = saved.is_file() and made.is_file() and hash_file(saved) == hash_file(made)
    is_tuned = loaded.adapter is not None or loaded.training_data is not None
    if not same and find_other_token(loaded.tokenizer, tokenizer) is not None:
        raise DataError(
            f"data_path: {examples.folder}: prepared with a different tokenizer; the model's is in "
            f"{loaded.tokenizer_folder}",
            hint="pass the conversation files instead of the cache",
        )
    if not same and is_tuned and (other := find_other_token(tokenizer, loaded.tokenizer)) is not None:
        number = format_count(len(tokenizer) - len(loaded.tokenizer), "token")
        problem = f"{examples.folder}: has {number} that the model wasn't trained with, such as {other[0]!r}"
        report(Note(f"{problem}; give the conversation files instead of the cache", warning=True))
    templates = [examples.get_template(index) for index in range(len(examples))]
    raw_texts = frozenset(filter(examples.is_raw_text, range(len(examples))))
    targets = [*decode_targets(tokenizer, examples, range(len(examples)))]
    chosen = EvaluationSet(examples, targets, tokenizer, templates, examples.list_datasets(), raw_texts=raw_texts)
    if compares_base:
        base = load_tokenizer(loaded.base)
        return chosen.add_base(_encode_again(examples, tokenizer, base), base)
    if is_tuned:
        return chosen
    return replace(chosen, examples=_encode_again(examples, tokenizer, loaded.tokenizer), tokenizer=loaded.tokenizer)


def _encode_again(examples: Sequence[Example], tokenizer: Tokenizer, base: Tokenizer) -> Sequence[Example]:
    """Encode examples again with the base's tokenizer, if their tokenizer has tokens that the base's lacks."""
    known = base.get_vocab()
    added = {index for token, index in tokenizer.get_vocab().items() if known.get(token) != index}
    if not added:
        return examples
    special = {*tokenizer.convert_tokens_to_ids([*tokenizer.special_tokens]), tokenizer.unk_token_id} - added
    encoder = make_encoder(base)

    def translate(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if added.isdisjoint(ids.tolist()):
            return ids
        parts: list[Any] = []
        begins = True
        for is_special, group in groupby(ids.tolist(), special.__contains__):
            if is_special:  # decoded and encoded again, a special token would become plain text
                parts.append(list(group))
                continue
            text = tokenizer.decode(group)
            parts += encoder.encode([Beginning(text) if begins else text])
            begins = False
        return np.concatenate(parts).astype(np.int64)

    return [
        replace(example, source_S=translate(example.source_S), target_T=translate(example.target_T))
        for example in examples
    ]
