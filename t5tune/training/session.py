"""The inputs of one rank of a run: its plan, its place among the ranks, and the data that it loads."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.checkpoints.training_data import encode_training_data, read_training_data
from t5tune.constraints.targets import fit_schema
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.distributed.collectives import run_on_rank_0
from t5tune.distributed.signals import StopRequest
from t5tune.distributed.watch import RankWatch
from t5tune.distributed.world import World
from t5tune.file_names import TEMPLATE_FILE, TRAINING_DATA_FILE
from t5tune.progress import Report
from t5tune.runs.data import open_data
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import RunPlan
from t5tune.runs.resume import start_or_resume_run
from t5tune.runs.resume_guard import describe_evaluations
from t5tune.runs.same_ranks import check_same_inputs
from t5tune.runs.teacher_files import TeacherFiles, find_teacher, hash_teacher
from t5tune.settings import packaged_templates


@dataclass(frozen=True)
class Session:
    """One rank's part in a run."""

    plan: RunPlan
    folder: RunFolder
    world: World
    device: torch.device
    stop: StopRequest
    watch: RankWatch
    report: Report
    callbacks: Sequence[Any] = ()
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class LoadedData:
    """The data and models of a run, and the checkpoint `resume` that it continues from.

    Args:
        files: the tokenizer and the template, for the checkpoints: name -> content.
        base_metadata: identifies the base, for the adapter's metadata.
        run_identity: the settings and data that must match to resume, for the checkpoints.
        deepspeed: the content of the DeepSpeed config.
    """

    examples: Examples
    held_out: Examples | None
    files: dict[str, bytes]
    tokenizer: Tokenizer
    base: Path
    teacher: TeacherFiles | None
    base_metadata: dict[str, Any]
    run_identity: dict[str, Any]
    deepspeed: dict[str, Any] | None
    resume: Path | None


def load_data(session: Session) -> LoadedData:
    """Load the data, find the base and the teacher, and start or resume the run. Call on every rank."""
    plan, folder, world = session.plan, session.folder, session.world
    prepared = run_on_rank_0(world, lambda: folder.read_record().get("prepared"))
    examples, held_out = open_data(plan, prepared)
    # now, because prepare may replace a cache outside of the run folder during the run
    files = read_supporting_files(examples.tokenizer_folder, examples.folder / TEMPLATE_FILE)
    tokenizer = load_tokenizer(examples.tokenizer_folder)
    if (schema := plan.json_schema) is not None:
        assert (data := read_training_data(examples.folder)) is not None, "prepare writes it"
        schema = run_on_rank_0(world, partial(fit_schema, schema, tokenizer, examples, session.report))
        data = replace(data, json_schema=json.loads(schema.text))
        files[TRAINING_DATA_FILE] = encode_training_data(data)
    base = find_base(plan.model.base, report=session.report)
    teacher = None if plan.teacher is None else find_teacher(plan.teacher, plan.model, session.report)

    def start_or_resume() -> tuple[dict[str, Any], dict[str, Any], Path | None]:
        teacher_hash = None if teacher is None else hash_teacher(teacher, folder)
        evaluations = describe_evaluations(held_out, plan.best_metric)
        return start_or_resume_run(plan, folder, examples, evaluations, base, teacher_hash, world, session.report)

    check_same_inputs(base, plan.model.base.family, examples, held_out, world)
    base_metadata, run_identity, resume = run_on_rank_0(world, start_or_resume)
    name = plan.processes.deepspeed
    deepspeed = None if name is None else _choose_prefetching(packaged_templates.read_deepspeed_config(name), session)
    return LoadedData(
        examples, held_out, files, tokenizer, base, teacher, base_metadata, run_identity, deepspeed, resume
    )


def _choose_prefetching(deepspeed: dict[str, Any], session: Session) -> dict[str, Any]:
    """Turn "auto" prefetching of ZeRO-3 off on a CPU: the cores that would gather ahead are computing."""
    zero = deepspeed.get("zero_optimization", {})
    if session.device.type == "cpu" and zero.get("stage3_prefetch_bucket_size") == "auto":
        zero["stage3_prefetch_bucket_size"] = 0
    return deepspeed
