"""The examples that `evaluate` reads: from conversations, or from a token cache.

settings = inherit_data_settings(settings, loaded, report)      # the columns and the prefix of training
chosen = load_evaluation_set(settings, loaded, report)
chosen.examples, chosen.targets
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.data.cache import Cache, is_cache, open_cache
from t5tune.data.data_problems import make_mixed_data_error, report_default_template
from t5tune.data.encoders import Encoder, make_encoder
from t5tune.data.encoding import Example, encode_batch, extract_example
from t5tune.data.files import find_files
from t5tune.data.formats import Conversation
from t5tune.data.pipeline import read_conversation
from t5tune.data.raw_records import RawRecord
from t5tune.data.readers import read_records
from t5tune.data.records import LABELED_BAD, RecordLocation, Rejection
from t5tune.data.sample import choose_default_template, drain, take_sample
from t5tune.data.sources import bring_data
from t5tune.data.templates import (
    PAIR_TEMPLATE,
    Template,
    find_template,
    load_template,
    parse_template,
    render_conversation,
)
from t5tune.data.tokenizer import Tokenizer, decode_reference, load_tokenizer
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.errors import DataError
from t5tune.file_names import TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.hub.datasets import EVALUATION_SPLITS, DatasetChoice
from t5tune.io.atomic import hash_file
from t5tune.io.yaml_file import read_yaml
from t5tune.model.inference import LoadedModel
from t5tune.progress import Note, Report
from t5tune.settings import EvaluateSettings
from t5tune.settings.affects import Affects, select_settings

TOKENIZER_BATCH_SIZE = 256  # conversations per call of the tokenizer


@dataclass(frozen=True)
class EvaluationSet:
    """Examples, their targets as text, and how to decode predictions.

    Args:
        answer_end: the text that the conversation template adds after each target.
    """

    examples: Sequence[Example]
    targets: list[str]
    tokenizer: Tokenizer
    answer_end: str


def inherit_data_settings(settings: EvaluateSettings, loaded: LoadedModel, report: Report) -> EvaluateSettings:
    """Return the settings with the data columns and the source prefix of training, unless the user set others."""
    trained_on = loaded.training_data
    if trained_on is None or is_cache(Path(settings.data_path[0])):
        return settings
    names = select_settings(EvaluateSettings, Affects.INFERENCE)
    given, columns = settings.model_fields_set, set(names) - {"source_prefix"}
    if given & columns:  # a user who names one column describes the whole layout
        given = given | columns
    inherited = {
        name: getattr(trained_on, name)
        for name in names
        if name not in given and getattr(trained_on, name) != getattr(settings, name)
    }
    if inherited:
        values = ", ".join(f"{name} {value!r}" for name, value in inherited.items())
        report(Note(f"as in training: {values}"))
    return settings.model_copy(update=inherited)


def load_evaluation_set(settings: EvaluateSettings, loaded: LoadedModel, report: Report) -> EvaluationSet:
    """Load the examples of a token cache, or encode conversations with the model's conversation template."""
    path = Path(settings.data_path[0])
    if is_cache(path):
        if len(settings.data_path) > 1:
            raise DataError(
                f"data_path: {path}: a token cache can't be combined with other data",
                hint="give one token cache, or only conversations",
            )
        return _load_cache_examples(open_cache(path), settings, loaded, report)
    tokenizer, *_ = extend_tokenizer(loaded.tokenizer, settings.add_tokens, loaded.num_rows)
    encoder = make_encoder(tokenizer)
    names = [str(find_conversations_file()) if name == "pocket" else name for name in settings.data_path]
    choice = DatasetChoice(settings.data_subset, settings.data_split, EVALUATION_SPLITS)
    files = find_files(bring_data(names, choice, "data_path", settings.cache_dir, report))
    records = read_records(files, settings.max_record_bytes)
    sample = take_sample(records)
    template, default_template = find_template(settings.conversation_template, loaded.template_files), None
    if template is None:
        default_template = choose_default_template(sample, files, settings)
        template = load_template(default_template)
    records = chain(drain(sample), records)
    examples: list[Example] = []
    targets: list[str] = []
    rejected: list[tuple[RecordLocation, Rejection]] = []
    num_pairs = num_truncated = 0
    for location, outcome in _encode(records, settings, template, encoder, tokenizer):
        if isinstance(outcome, Rejection):
            rejected.append((location, outcome))
            continue
        example, target, is_pair, is_truncated = outcome
        if default_template == PAIR_TEMPLATE and not is_pair:
            raise make_mixed_data_error(location, num_pairs)
        examples.append(example)
        targets.append(target)
        num_pairs += is_pair
        num_truncated += is_truncated
        if len(examples) == settings.num_data:
            break
    if default_template is not None:
        if num_pairs == 0:
            report(Note(f"the model has no conversation template of its own; using {default_template}"))
        report_default_template(default_template, num_pairs, format_count(len(examples), "example"), report)
    _report_rejected(rejected, report)
    if num_truncated:
        truncated = f"{format_count(num_truncated, 'example')} truncated to model_max_length"
        report(Note(f"{truncated} {settings.model_max_length}", True))
    if not examples:
        raise DataError(f"data_path: {', '.join(map(str, files))}: contains no example to evaluate on")
    return EvaluationSet(examples, targets, tokenizer, template.answer_suffix)


def _encode(
    records: Iterator[RawRecord],
    settings: EvaluateSettings,
    template: Template,
    encoder: Encoder,
    tokenizer: Tokenizer,
) -> Iterator[tuple[RecordLocation, Rejection | tuple[Example, str, bool, bool]]]:
    """Yield a record's rejection, or for each of its targets (example, target as text, is pair, was truncated).

    They come in the order of the records, so that a caller that stops early has counted only what it used.
    """
    while batch := list(islice(records, TOKENIZER_BATCH_SIZE)):
        read = [read_conversation(record, settings, encoder) for record in batch]
        pieces = [render_conversation(each, template) for each in read if isinstance(each, Conversation)]
        encodings = iter(encode_batch(pieces, encoder, settings.model_max_length))
        for record, conversation in zip(batch, read, strict=True):
            if isinstance(conversation, Rejection):
                yield record.location, conversation
                continue
            encoded = next(encodings)
            for span in encoded.spans:
                example = extract_example(encoded.ids, span, encoder.special_ids)
                text = conversation.turns[span.turn].text
                if not span.target_is_whole:
                    text = decode_reference(tokenizer, example.target_T, template.answer_suffix)
                is_truncated = not (span.source_is_whole and span.target_is_whole)
                yield record.location, (example, text, conversation.is_pair, is_truncated)


def _report_rejected(rejected: list[tuple[RecordLocation, Rejection]], report: Report) -> None:
    if bad := sum(rejection.reason == LABELED_BAD for _, rejection in rejected):
        was_left_out = "was left out" if bad == 1 else "were left out"
        report(Note(f"{format_count(bad, 'record')} labeled bad (label: false, kto_tag: false) {was_left_out}", True))
    if broken := [each for each in rejected if each[1].reason != LABELED_BAD]:
        location, first = broken[0]
        report(Note(f"{format_count(len(broken), 'record')} rejected, the first: {location}: {first.message}", True))


def _load_cache_examples(
    cache: Cache, settings: EvaluateSettings, loaded: LoadedModel, report: Report
) -> EvaluationSet:
    saved, made = loaded.tokenizer_folder / "tokenizer.json", cache.tokenizer_folder / "tokenizer.json"
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    same = saved.is_file() and made.is_file() and hash_file(saved) == hash_file(made)
    if not same and not _is_extension(tokenizer, loaded.tokenizer):
        raise DataError(
            f"data_path: {cache.folder}: made with another tokenizer than that of {loaded.tokenizer_folder}",
            hint="pass the conversation files instead of the cache",
        )
    _, held_out = cache.split_as_prepared()
    if held_out is not None:
        report(Note(f"{cache.folder}: evaluating on its {format_count(len(held_out), 'held-out example')}"))
    cache = held_out or cache
    if settings.num_data is not None:
        cache = cache.take(settings.num_data)
    template = parse_template(read_yaml(cache.folder / TEMPLATE_FILE), cache.folder / TEMPLATE_FILE)
    targets = [decode_reference(tokenizer, example.target_T, template.answer_suffix) for example in cache]
    return EvaluationSet(cache, targets, tokenizer, template.answer_suffix)


def _is_extension(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether a tokenizer has all tokens of the base's, with the same ids."""
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(token) == index for token, index in base.get_vocab().items())
