"""The log-probabilities of preference pairs under DPO's reference, computed once before the first step.

The reference is the model before the first step (the base, its initial adapter and its added-token embeddings), or the
base with `reference_adapter`. Training then needs only two numbers per pair: no second copy of the weights, and no
second forward pass in each step.

The run folder stores them with a hash of their inputs, every PAIRS_PER_SAVE pairs, so that a stopped run continues
there.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.encoding import Example
from t5tune.distributed.collectives import run_on_rank_0
from t5tune.distributed.world import World
from t5tune.errors import CheckpointError, naming_settings
from t5tune.inference.loading import LoadedModel, load_for_inference
from t5tune.io.atomic import hash_json, write_file
from t5tune.io.reasons import describe_error
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.lora import check_same_tokens
from t5tune.progress import Note, Report
from t5tune.settings.groups.base import InferenceSettings, QuantizationSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.settings.packaged_templates import get_zero_stage
from t5tune.training.attention_choice import LOOP, ChosenAttention
from t5tune.training.build_model import BuiltModel
from t5tune.training.objectives import EvaluationOptions, Pairs, measure_pairs
from t5tune.training.session import LoadedData, Session

REFERENCE_FORMAT = 2
PAIRS_PER_SAVE = 1 << 10
MODEL_FIELDS = ("base", "bf16", "family", *QuantizationSettings.model_fields)
INITIAL_FIELDS = (*MODEL_FIELDS, "adapter", "seed", *LoraSettings.model_fields)


PairMeter = Callable[[Sequence[Example]], Pairs]
"""Measures pairs with the reference model, without dropout. Call on every rank."""


@dataclass(frozen=True)
class ReferenceFile:
    """A file with the log-probabilities of the first pairs of a set: `logps`, fp64, (pairs, 2).

    Args:
        key: hash of their inputs; a file with a different key is replaced.
    """

    path: Path
    key: str

    def read(self, report: Report) -> list[tuple[float, float]]:
        """Read the measured pairs; an empty list if the file is missing, damaged, or has different inputs."""
        try:
            with safe_open(self.path, "numpy") as file:
                metadata, logps = file.metadata(), file.get_tensor("logps")
                if metadata == self._describe(logps):
                    return [(chosen, rejected) for chosen, rejected in logps.tolist()]
        except FileNotFoundError:
            return []
        except (OSError, SafetensorError, ValueError) as error:
            report(Note(f"{self.path}: broken ({describe_error(error)}); measuring the pairs again", warning=True))
            return []
        if metadata and (metadata.get("format"), metadata.get("key")) == (str(REFERENCE_FORMAT), self.key):
            report(Note(f"{self.path}: changed since it was written; measuring the pairs again", warning=True))
        return []

    def write(self, pairs: Pairs) -> None:
        """Replace the file."""
        logps = np.array(pairs, np.float64)
        write_file(self.path, safetensors.numpy.save({"logps": logps}, self._describe(logps)))

    def _describe(self, logps: Any) -> dict[str, str]:
        values = hashlib.sha256(logps.tobytes()).hexdigest()
        return {"format": str(REFERENCE_FORMAT), "key": self.key, "sha256": values}


def complete_references(
    folder: Path,
    run_identity: dict[str, Any],
    sets: Mapping[str, Examples],
    world: World,
    open_meter: Callable[[], AbstractContextManager[PairMeter]],
    report: Report,
) -> dict[str, Pairs]:
    """Read the log-probabilities of sets of pairs, and measure missing pairs. Call on every rank.

    Raises:
        OutOfMemory, EvaluationStopped: see `BatchRun.run`; the measured pairs are saved.
    """
    found: dict[str, Pairs] = {}
    with ExitStack() as stack:
        meter = None
        for name, examples in sets.items():
            key = _hash_inputs(run_identity, examples)
            file = ReferenceFile(folder / f"reference-{name}.safetensors", key)
            known = run_on_rank_0(world, partial(file.read, report))[: len(examples)]
            while len(known) < len(examples):
                if meter is None:
                    meter = stack.enter_context(open_meter())
                end = min(len(known) + PAIRS_PER_SAVE, len(examples))
                known += meter([examples[index] for index in range(len(known), end)])
                run_on_rank_0(world, partial(file.write, known))
            found[name] = known
    return found


def _make_meter(model: Any, options: EvaluationOptions, autocast: bool) -> PairMeter:
    def measure(examples: Sequence[Example]) -> Pairs:
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return measure_pairs(model, examples, options, "reference")

    return measure


def _hash_inputs(run_identity: dict[str, Any], examples: Examples) -> str:
    fields = INITIAL_FIELDS if run_identity["reference_adapter"] is None else (*MODEL_FIELDS, "reference_adapter")
    made_of = {field: run_identity.get(field) for field in fields}
    made_of |= {"examples": examples.identify(), "tokenizer": examples.manifest["inputs"].get("tokenizer")}
    return hash_json(made_of)


@contextmanager
def open_initial_model(built: BuiltModel, options: EvaluationOptions, autocast: bool) -> Iterator[PairMeter]:
    """Measure with the model that is about to be trained."""
    engine = None if built.partitioner is None else built.partitioner.set_up_inference(built.model)
    try:
        yield _make_meter(built.model, options, autocast)
    finally:
        if engine is not None:  # the Trainer sets up a new engine
            engine.destroy()


@contextmanager
def open_reference_adapter(
    session: Session, data: LoadedData, choose_attention: Callable[[Any], ChosenAttention]
) -> Iterator[PairMeter]:
    """Load the base with the adapter of the reference, and free it afterwards, before the model to train is loaded.

    `choose_attention` chooses how the run computes attention over packed rows, from a model of its base.
    """
    plan, report = session.plan.model, session.report
    settings = InferenceSettings(
        model_name_or_path=str(data.base),
        adapter=session.plan.reference_adapter,
        cache_dir=plan.base.cache_dir,
        family=plan.base.family,
        **plan.precision.to_settings(),
    )
    zero3 = data.deepspeed if get_zero_stage(data.deepspeed) == 3 else None
    with naming_settings(adapter="reference_adapter"):
        loaded = load_for_inference(settings, report, session.device, zero3)
    try:
        _check_tokens(loaded, data.examples)
        use_fused_layers(loaded.model, session.device)  # the same kernels as in training
        is_packed, attention = plan.layers.packing != "off" and can_pack(loaded.model), LOOP
        if is_packed:
            use_packing(loaded.model)
            attention = choose_attention(loaded.model)
        collator = attention.make_collator(loaded.model, loaded.tokenizer.pad_token_id, is_packed)
        batch_size = session.plan.evaluation.per_device_eval_batch_size
        options = EvaluationOptions(collator, batch_size, report, lambda: session.stop.is_set)
        yield _make_meter(loaded.model, options, plan.precision.bf16)  # the adapter has its dtype of training
    finally:
        if loaded.engine is not None:
            loaded.engine.destroy()
        del loaded
        gc.collect()
        torch.cuda.empty_cache()


def _check_tokens(loaded: LoadedModel, examples: Examples) -> None:
    """Check that the reference and the run have the same tokens, with the same ids."""
    check_same_tokens(loaded.tokenizer_folder, examples.tokenizer_folder, "reference_adapter")
    vocabulary = loaded.tokenizer.get_vocab()
    if unknown := [token for token in examples.added_tokens if token not in vocabulary]:
        problem = f"reference_adapter: {loaded.adapter}: its tokenizer lacks {unknown[0]!r}, which this run adds"
        raise CheckpointError(problem, hint="give an adapter that was trained on this data, or set add_tokens none")
