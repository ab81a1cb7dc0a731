"""`t5tune evaluate`: loss, perplexity and scores of generated predictions against the targets of examples.

result = evaluate(EvaluateSettings(model_name_or_path="run", data_path="heldout.jsonl", output_dir="scores"))
result.exact_match, result.predictions
"""

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.checkpoints.training_data import TrainingData
from t5tune.custom_metrics import compute_custom_metrics, load_custom_metric, try_custom_metrics
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
from t5tune.data.templates import (
    PAIR_TEMPLATE,
    Template,
    find_template,
    load_template,
    parse_template,
    render_conversation,
)
from t5tune.data.tokenizer import Tokenizer, decode_prediction, decode_reference, load_tokenizer
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.errors import DataError, ModelError, SettingsError
from t5tune.file_names import TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.io.atomic import check_replaceable, find_unused_folder, hash_file, write_folder_atomically
from t5tune.io.yaml_file import read_yaml
from t5tune.metrics import METRICS, choose_metrics, score, score_one
from t5tune.model.attention import can_pack, use_packing
from t5tune.model.device import explain_out_of_memory, use_gpu_kernels
from t5tune.model.generation import Decoding
from t5tune.model.inference import LoadedModel, is_adapter, load_for_inference, select_base
from t5tune.progress import Note, Report, silent
from t5tune.settings import EvaluateSettings, write_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.training.batches import PackedCollator, PaddedCollator
from t5tune.training.checkpoint import replace_stopped_runs
from t5tune.training.evaluation import Losses, find_max_target_length, generate_predictions, measure_losses

PREDICTIONS_FILE = "predictions.jsonl"
TOKENIZER_BATCH_SIZE = 256  # conversations per call of the tokenizer


@dataclass(frozen=True)
class EvaluateResult:
    """The metrics: loss in nats per target token, scores from 0 to 100, time in seconds.

    Args:
        exact_match, …, field_f1: None if it isn't among the chosen metrics; those for JSON also if no target is JSON.
        custom_metrics: the metrics of one's own functions.
        base: the same metrics of the base without the adapter, by name; None without compare_base.
    """

    predictions: Path
    examples: int
    loss: float
    perplexity: float
    exact_match: float | None
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    bleu: float | None
    chrf: float | None
    valid_json: float | None
    field_f1: float | None
    custom_metrics: dict[str, float]
    base: dict[str, float] | None
    seconds: float


@dataclass(frozen=True)
class _Outcome:
    """A model's loss and prediction for each example."""

    losses: Losses
    predictions: list[str]


@dataclass(frozen=True)
class _EvaluationSet:
    """Examples, their targets as text, and how to decode predictions.

    Args:
        answer_end: the text that the conversation template adds after each target.
    """

    examples: Sequence[Example]
    targets: list[str]
    tokenizer: Tokenizer
    answer_end: str


def evaluate(settings: EvaluateSettings, report: Report = silent) -> EvaluateResult:
    """Generate a prediction for each example's source, and compare the predictions with the targets.

    Raises:
        DataError: the data can't be used, or the token cache was made with another tokenizer.
        ModelError, CheckpointError: the base or the adapter can't be used, or its loss isn't finite.
        SettingsError: a custom metric can't be computed, or there is no base to compare with.
    """
    started = time.monotonic()
    folder = settings.output_dir or find_unused_folder(Path("evaluation"))
    check_replaceable(folder, settings.overwrite)
    for function in settings.metric or []:
        load_custom_metric(function)
    batch_size = settings.per_device_eval_batch_size
    with explain_out_of_memory(
        f"evaluating with per_device_eval_batch_size {batch_size}",
        "a smaller batch size gives the same scores; --q-lora loads the base in 4 bits",
    ):
        settings = replace_stopped_runs(settings, report)
        if settings.compare_base:
            _check_is_adapter(settings)
        loaded = load_for_inference(settings, report)
        if loaded.training_data is not None and not is_cache(Path(settings.data_path[0])):
            settings = _inherit_data_settings(settings, loaded.training_data, report)
        chosen = _load_examples(settings, loaded, report)
        names, functions = choose_metrics(settings.metrics, chosen.targets), settings.metric or []
        try_custom_metrics(functions, chosen.targets)
        tuned, base = _run_model(settings, loaded.model, chosen, report), None
        if settings.compare_base:
            base_settings = select_base(settings, loaded)
            report(Note("now the same for the base without the adapter"))
            del loaded  # so that only one model is in memory
            gc.collect()
            base = _run_model(base_settings, load_for_inference(base_settings, report).model, chosen, report)
    with write_folder_atomically(folder) as staged:
        _write_predictions(staged / PREDICTIONS_FILE, chosen, names, tuned, base)
        write_settings(staged, settings)
    outcomes = [tuned] if base is None else [tuned, base]
    built_in = [_score(each, chosen.targets, names) for each in outcomes]
    custom = _compute_custom_metrics(settings, outcomes, chosen.targets, folder)
    return EvaluateResult(
        predictions=folder / PREDICTIONS_FILE,
        examples=len(chosen.examples),
        **dict.fromkeys(METRICS) | built_in[0],  # type: ignore[arg-type]
        custom_metrics=custom[0],
        base=None if base is None else built_in[1] | custom[1],
        seconds=round(time.monotonic() - started, 3),
    )


def _check_is_adapter(settings: EvaluateSettings) -> None:
    """Check that the settings name an adapter, whose base is known.

    Raises:
        SettingsError: they name a base or a merged checkpoint.
    """
    name = settings.model_name_or_path
    if settings.adapter is None and not is_adapter(Path(name)):
        raise SettingsError(
            f"compare_base: {name} is a whole model, not an adapter, so there is no base to compare it with",
            hint="give the run or the adapter that it was merged from, or evaluate its base with a command of its own",
        )


def _run_model(settings: EvaluateSettings, model: Any, chosen: _EvaluationSet, report: Report) -> _Outcome:
    """Measure the losses of a model, and generate its predictions."""
    tokenizer, max_new_tokens = chosen.tokenizer, settings.max_new_tokens or find_max_target_length(chosen.examples)
    decoding = Decoding(tokenizer.eos_token_id, tokenizer.pad_token_id, max_new_tokens, settings.num_beams)
    batch_size = settings.per_device_eval_batch_size
    with use_gpu_kernels(model.device):
        losses = _measure_losses(settings, model, chosen, report)
        predicted_ids = generate_predictions(model, chosen.examples, decoding, batch_size, report)
    return _Outcome(losses, [decode_prediction(tokenizer, ids, chosen.answer_end) for ids in predicted_ids])


def _score(outcome: _Outcome, targets: list[str], names: Sequence[str]) -> dict[str, float]:
    """Return the built-in metrics."""
    mean = outcome.losses.mean
    losses = {"loss": round(mean, 6), "perplexity": round(math.exp(min(mean, 700.0)), 4)}
    return losses | score(outcome.predictions, targets, names)


def _compute_custom_metrics(
    settings: EvaluateSettings, outcomes: list[_Outcome], targets: list[str], folder: Path
) -> list[dict[str, float]]:
    """Compute the custom metrics of each model.

    Raises:
        SettingsError: a function fails; says that the predictions are in the folder.
    """
    functions = settings.metric or []
    try:
        return [compute_custom_metrics(functions, each.predictions, targets) for each in outcomes]
    except SettingsError as error:
        hint = f"{error.hint}; " if error.hint else ""
        replace = " (--overwrite replaces them)" if folder == settings.output_dir else ""
        hint += f"the predictions are in {folder / PREDICTIONS_FILE}{replace}"
        raise SettingsError(*error.problems, hint=hint) from error


def _measure_losses(settings: EvaluateSettings, model: Any, chosen: _EvaluationSet, report: Report) -> Losses:
    """Measure the loss of each target.

    Raises:
        ModelError: the loss isn't finite.
    """
    collator = _make_collator(model, chosen.tokenizer.pad_token_id)
    losses = measure_losses(model, chosen.examples, collator, settings.per_device_eval_batch_size, report)
    if not math.isfinite(losses.mean):
        problem = f"model_name_or_path: {settings.model_name_or_path}: its loss is {losses.mean}"
        raise ModelError(problem, hint="the checkpoint may be damaged")
    return losses


def _make_collator(model: Any, pad_token_id: int) -> PackedCollator | PaddedCollator:
    """Make the collator of packed batches, and set the model up for them; of padded ones if it can't be packed."""
    start = model.config.decoder_start_token_id
    if not can_pack(model):
        return PaddedCollator(pad_token_id, start)
    use_packing(model)
    return PackedCollator(start)


def _write_predictions(
    path: Path, chosen: _EvaluationSet, names: Sequence[str], tuned: _Outcome, base: _Outcome | None
) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for index, (example, target) in enumerate(zip(chosen.examples, chosen.targets, strict=True)):
            line = {
                "source": decode_reference(chosen.tokenizer, example.source_S, ""),
                "target": target,
                "prediction": tuned.predictions[index],
                "loss": tuned.losses.get_mean(index),
                **score_one(tuned.predictions[index], target, names),
            }
            if base is not None:
                line |= {"base_prediction": base.predictions[index], "base_loss": base.losses.get_mean(index)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _inherit_data_settings(settings: EvaluateSettings, trained_on: TrainingData, report: Report) -> EvaluateSettings:
    """Return the settings with the data columns and the source prefix of training, unless the user set others."""
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


def _load_examples(settings: EvaluateSettings, loaded: LoadedModel, report: Report) -> _EvaluationSet:
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
    files = find_files([str(find_conversations_file()) if name == "pocket" else name for name in settings.data_path])
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
    return _EvaluationSet(examples, targets, tokenizer, template.answer_suffix)


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
                example = extract_example(encoded.ids, span, tokenizer.eos_token_id)
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
) -> _EvaluationSet:
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
    return _EvaluationSet(cache, targets, tokenizer, template.answer_suffix)


def _is_extension(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether a tokenizer has all tokens of the base's, with the same ids."""
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(token) == index for token, index in base.get_vocab().items())
