"""What one rank of a run has: its settings, its place among the ranks, and the data that it loads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.distributed.collectives import run_on_rank_0
from t5tune.distributed.signals import StopRequest
from t5tune.distributed.watch import RankWatch
from t5tune.distributed.world import World
from t5tune.file_names import TEMPLATE_FILE
from t5tune.progress import Report
from t5tune.runs.commits import load_commits, pin_commits
from t5tune.runs.folder import Run, open_data, start_or_resume_run
from t5tune.runs.resume_guard import describe_evaluations
from t5tune.runs.same_ranks import check_same_inputs
from t5tune.runs.teacher_files import TeacherFiles, find_teacher, hash_teacher
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.training.arguments import choose_best_metric


@dataclass(frozen=True)
class Session:
    """What one rank needs to take part in a run."""

    settings: TrainSettings
    run: Run
    world: World
    device: torch.device
    stop: StopRequest
    watch: RankWatch
    report: Report
    callbacks: Sequence[Any] = ()
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class LoadedData:
    """What a run is made from, and the checkpoint `resume` that it continues from, if there is one.

    Args:
        files: the tokenizer and the template, for the checkpoints: name -> content.
        pinned: the settings with the commits of adapters and teachers that are on the Hub.
        teacher: the files of the teacher, if there is one.
        base_metadata: what identifies the base.
        run_identity: the configuration that the run depends on, for its checkpoints.
        deepspeed: the DeepSpeed config, if there is one.
    """

    examples: Examples
    held_out: Examples | None
    files: dict[str, bytes]
    tokenizer: Tokenizer
    base: Path
    pinned: TrainSettings
    teacher: TeacherFiles | None
    base_metadata: dict[str, Any]
    run_identity: dict[str, Any]
    deepspeed: dict[str, Any] | None
    resume: Path | None

    def list_evaluated_datasets(self) -> list[str]:
        """List the names of the datasets that are evaluated, if there are several."""
        return [] if self.held_out is None else [name for name, _ in self.held_out.list_datasets()]


def load_data(session: Session) -> LoadedData:
    """Load the data and find the other models, and start or resume the run. Call on every rank."""
    settings, run, world = session.settings, session.run, session.world
    examples, held_out = open_data(settings, run)
    # now, because prepare may replace a cache outside of the run folder while the run goes on
    files = read_supporting_files(examples.tokenizer_folder, examples.folder / TEMPLATE_FILE)
    tokenizer = load_tokenizer(examples.tokenizer_folder)
    pinned = pin_commits(settings, run_on_rank_0(world, lambda: load_commits(run.folder)))
    base = find_base(pinned, report=session.report)
    pinned = pinned.model_copy(update={"revision": settings.revision})  # the adapter's config names it as given
    teacher = find_teacher(pinned, session.report) if settings.teacher_model_name_or_path is not None else None

    def start_or_resume() -> tuple[dict[str, Any], dict[str, Any], Path | None]:
        teacher_hash = None if teacher is None else hash_teacher(teacher, run.folder)
        evaluations = describe_evaluations(held_out, choose_best_metric(settings))
        return start_or_resume_run(
            settings, run, examples, evaluations, base, pinned, teacher_hash, world, session.report
        )

    check_same_inputs(settings, base, examples, held_out, world)
    base_metadata, run_identity, resume = run_on_rank_0(world, start_or_resume)
    deepspeed = packaged_templates.read_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    return LoadedData(
        examples, held_out, files, tokenizer, base, pinned, teacher, base_metadata, run_identity, deepspeed, resume
    )
