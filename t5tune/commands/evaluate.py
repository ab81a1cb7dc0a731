"""`t5tune evaluate`: loss, perplexity and the scores of generated answers, on examples that have true ones.

result = evaluate(EvaluateSettings(model_name_or_path="run", data_path="heldout.jsonl", output_dir="scores"))
result.exact_match, result.predictions
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from t5tune.checkpoints.adapter import TEMPLATE
from t5tune.checkpoints.pocket import conversations_file
from t5tune.checkpoints.training_data import COLUMNS, READING, TrainingData
from t5tune.data.cache import Cache, is_cache, open_cache
from t5tune.data.encoding import Encoder, Example, encode_batch, example_of
from t5tune.data.files import find_files
from t5tune.data.formats import Conversation
from t5tune.data.pipeline import read_record
from t5tune.data.readers import read_records
from t5tune.data.records import LABELED_BAD, Rejected
from t5tune.data.templates import find_template, lay_out, template_from
from t5tune.data.tokenizer import Tokenizer, answer_text, load_tokenizer, true_text
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.errors import DataError, ModelError
from t5tune.io.atomic import published_folder, sha256
from t5tune.io.output_dir import check_replaceable
from t5tune.io.yaml_file import read_yaml
from t5tune.metrics import score, score_one
from t5tune.model.device import memory_is_named
from t5tune.progress import Note, Report, silent
from t5tune.settings import EvaluateSettings, dump_settings

if TYPE_CHECKING:
    from t5tune.model.inference import Loaded

PREDICTIONS = "predictions.jsonl"
SETTINGS = "settings.yaml"
BATCH = 256  # conversations per call of the tokenizer


@dataclass(frozen=True)
class Evaluated:
    """What evaluate found: loss in nats per target token, scores from 0 to 100, times in seconds."""

    predictions: Path
    examples: int
    loss: float
    perplexity: float
    exact_match: float
    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    chrf: float
    seconds: float


@dataclass(frozen=True)
class _Questions:
    """Examples, their true answers as text, and how ids become text; `answer_end` stands behind each answer."""

    examples: Sequence[Example]
    targets: list[str]
    tokenizer: Tokenizer
    answer_end: str

    def text(self, ids: Iterable[int]) -> str:
        return answer_text(self.tokenizer, ids, self.answer_end)


def evaluate(settings: EvaluateSettings, report: Report = silent) -> Evaluated:
    """Answer every example's source, and compare the answers with the targets.

    Raises:
        DataError: the data can't be used, or its token cache was made for another tokenizer.
        ModelError, CheckpointError: the base or the adapter can't be used, or gives no finite loss.
    """
    with memory_is_named(
        f"evaluating with per_device_eval_batch_size {settings.per_device_eval_batch_size}",
        "a smaller one gives the same scores; --q-lora keeps the base in four bits",
    ):
        return _evaluate(settings, report)


def _evaluate(settings: EvaluateSettings, report: Report) -> Evaluated:
    from t5tune.model.attention import can_pack, use_packing
    from t5tune.model.inference import load_for_inference
    from t5tune.model.loss import HeadLoss
    from t5tune.training.batches import PackedCollator, PaddedCollator
    from t5tune.training.evaluation import generate_replies, longest_target, measure_losses

    started = time.monotonic()
    folder = settings.output_dir or _free(Path("evaluation"))
    check_replaceable(folder, settings.overwrite)
    loaded = load_for_inference(settings, report)
    if loaded.training_data is not None and not is_cache(Path(settings.data_path[0])):
        settings = _as_trained(settings, loaded.training_data, report)
    questions = _questions(settings, loaded, report)
    examples, tokenizer = questions.examples, questions.tokenizer
    start = loaded.model.config.decoder_start_token_id
    packs = can_pack(loaded.model)
    if packs:
        use_packing(loaded.model)
    collator = PackedCollator(start) if packs else PaddedCollator(tokenizer.pad_token_id, start)
    batch_size = settings.per_device_eval_batch_size
    losses = measure_losses(loaded.model, HeadLoss(loaded.model, 0.0), examples, collator, batch_size, report)
    if not math.isfinite(losses.mean):
        raise ModelError(
            f"model_name_or_path: {settings.model_name_or_path}: its loss is {losses.mean}; is it damaged?"
        )
    replies = generate_replies(
        loaded.model,
        examples,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        batch_size,
        settings.max_new_tokens or longest_target(examples),
        settings.num_beams,
        report,
    )
    targets = questions.targets
    predictions = [questions.text(reply) for reply in replies]
    with published_folder(folder) as staged:
        with open(staged / PREDICTIONS, "w", encoding="utf-8") as file:
            for index, example in enumerate(examples):
                line = {
                    "source": true_text(tokenizer, example.source_S, ""),
                    "target": targets[index],
                    "prediction": predictions[index],
                    "loss": round(losses.sums[index] / losses.tokens[index], 6),
                    **score_one(predictions[index], targets[index]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (staged / SETTINGS).write_text(dump_settings(settings), encoding="utf-8")
    return Evaluated(
        predictions=folder / PREDICTIONS,
        examples=len(examples),
        loss=round(losses.mean, 6),
        perplexity=round(math.exp(min(losses.mean, 700.0)), 4),
        **score(predictions, targets),
        seconds=round(time.monotonic() - started, 3),
    )


def _as_trained(settings: EvaluateSettings, trained_on: TrainingData, report: Report) -> EvaluateSettings:
    """The settings with the columns and the prefix that the model was trained with, where none are given."""
    names = {"source_prefix"} - settings.model_fields_set
    if not (set(COLUMNS) & settings.model_fields_set):  # who sets one of them knows better how this data is made
        names |= set(COLUMNS)
    taken = {
        name: getattr(trained_on, name)
        for name in READING
        if name in names and getattr(trained_on, name) != getattr(settings, name)
    }
    if taken:
        shown = ", ".join(f"{name} {value!r}" for name, value in taken.items())
        report(Note(f"as in training: {shown}"))
    return settings.model_copy(update=taken)


def _questions(settings: EvaluateSettings, loaded: "Loaded", report: Report) -> _Questions:
    """The examples of a cache as they stand, or those of conversations in the model's own layout."""
    path = Path(settings.data_path[0])
    if is_cache(path):
        if len(settings.data_path) > 1:
            raise DataError(f"data_path: {path}: a token cache stands alone", hint="give one cache, or conversations")
        return _of_cache(open_cache(path), settings, loaded, report)
    tokenizer, *_ = extend_tokenizer(loaded.tokenizer, settings.add_tokens, loaded.num_rows)
    template = find_template(settings.conversation_template, loaded.template_files, report)
    encoder = Encoder(tokenizer)
    files = find_files([str(conversations_file()) if name == "pocket" else name for name in settings.data_path])
    records = (read_record(record, settings) for record in read_records(files, settings.max_record_bytes))
    examples: list[Example] = []
    targets: list[str] = []
    rejected: list[Rejected] = []
    cut = 0
    while batch := list(islice(records, BATCH)):
        rejected += [record for record in batch if isinstance(record, Rejected)]
        conversations = [record for record in batch if isinstance(record, Conversation)]
        pieces = [lay_out(conversation, template) for conversation in conversations]
        encodings = encode_batch(pieces, encoder, settings.model_max_length)
        for conversation, encoded in zip(conversations, encodings, strict=True):
            for span in encoded.spans:
                example = example_of(encoded.ids, span, tokenizer.eos_token_id)
                text = conversation.turns[span.turn].text
                if not span.target_is_whole:
                    text = true_text(tokenizer, example.target_T, template.answer_end)
                examples.append(example)
                targets.append(text)
                cut += not (span.source_is_whole and span.target_is_whole)
        if settings.num_data is not None and len(examples) >= settings.num_data:
            break
    if bad := sum(record.reason == LABELED_BAD for record in rejected):
        report(Note(f"{bad} examples labeled bad (label: false, kto_tag: false) left out", True))
    if rejected := [record for record in rejected if record.reason != LABELED_BAD]:
        first = rejected[0]
        place = f"{first.place.file}:{first.place.line}"
        report(Note(f"{len(rejected)} records refused, the first: {place}: {first.message}", True))
    if cut:
        report(Note(f"{cut} examples cut to model_max_length {settings.model_max_length}", True))
    if not examples:
        raise DataError(f"data_path: {', '.join(map(str, files))}: no example to evaluate on")
    count = settings.num_data
    return _Questions(examples[:count], targets[:count], tokenizer, template.answer_end)


def _of_cache(cache: Cache, settings: EvaluateSettings, loaded: "Loaded", report: Report) -> _Questions:
    saved, made = loaded.tokenizer_folder / "tokenizer.json", cache.tokenizer_folder / "tokenizer.json"
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    same = saved.is_file() and made.is_file() and sha256(saved) == sha256(made)
    if not same and not _extends(tokenizer, loaded.tokenizer):
        raise DataError(
            f"data_path: {cache.folder}: made with another tokenizer than {loaded.tokenizer_folder} holds",
            hint="evaluate on the conversations themselves",
        )
    _, held_out = cache.parts()
    if held_out is not None:
        report(Note(f"{cache.folder}: evaluating on the {len(held_out)} examples that it holds out"))
    cache = held_out or cache
    if settings.num_data is not None:
        cache = cache.first(settings.num_data)
    template = template_from(read_yaml(cache.folder / TEMPLATE), cache.folder / TEMPLATE)
    targets = [true_text(tokenizer, example.target_T, template.answer_end) for example in cache]
    return _Questions(cache, targets, tokenizer, template.answer_end)


def _free(folder: Path) -> Path:
    """The folder, or the first of folder.1, folder.2, … that doesn't exist."""
    number, free = 0, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


def _extends(tokenizer: Tokenizer, base: Tokenizer) -> bool:
    """Whether a tokenizer has all of the base's entries at the same ids."""
    vocabulary = tokenizer.vocabulary()
    return all(vocabulary.get(token) == index for token, index in base.vocabulary().items())
