"""One rank's part in a run: load the data and the model, train, and finish the run folder.

result = run_training(Session(settings, run, world, device, stop, watch, report))
"""

import shutil
from contextlib import nullcontext
from typing import Any

from t5tune.distributed.collectives import barrier, run_on_rank_0
from t5tune.errors import TrainingError
from t5tune.formatting import format_count, format_size
from t5tune.progress import Note
from t5tune.runs.folder import TrainResult
from t5tune.training.build_trainer import build_trainer
from t5tune.training.results import finish_run, make_result, report_choice
from t5tune.training.session import LoadedData, Session, load_data
from t5tune.training.steps import StepSampler, count_all_steps

BYTES_PER_PARAMETER = 4 + 8  # of a checkpoint: the weights in fp32, and Adam's two moments
EXTRA_BYTES_WITH_DEEPSPEED = 4 + 4  # per parameter: DeepSpeed's fp32 masters, and a second copy of the weights
OVERHEAD_BYTES = 1 << 20  # random states, the Trainer's state, the manifest


def run_training(session: Session) -> TrainResult:
    """Train from the start or the newest checkpoint, and finish the run. Every rank calls this.

    Raises:
        Stopped: a signal asked to stop; the progress so far is saved in a checkpoint.
    """
    settings, run, world, report = session.settings, session.run, session.world, session.report
    # a single process may exit at once while it loads; a rank must not leave the others waiting in a collective
    with session.stop.interruptible() if world.size == 1 else nullcontext():
        loaded = load_data(session)
        built, trainer, samples = build_trainer(session, loaded)
        saves = _count_saves(trainer.args, trainer.parts.sampler)
        run_on_rank_0(world, lambda: _check_disk_space(session, loaded, built.trainable, saves))
    trainer.train(resume_from_checkpoint=str(loaded.resume) if loaded.resume else None)
    training_seconds = trainer.totals.measure_seconds()
    if trainer.flow.is_stopped:
        step = trainer.state.global_step
        saved = f"after step {step:,} of {trainer.state.max_steps:,}; saved in {run.folder / f'checkpoint-{step}'}"
        raise session.stop.make_error(saved, hint="run the same command to continue")
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    best = report_choice(settings, trainer, report)
    result = make_result(session, loaded, built, trainer, training_seconds, best)
    last = best or result.steps
    run_on_rank_0(world, lambda: finish_run(run, settings, loaded, trainer.state, result, last))
    barrier()
    return result


def _count_saves(args: Any, sampler: StepSampler) -> int:
    """Count the checkpoints that a run saves."""
    if args.save_strategy == "no":  # the last step saves one all the same
        return 1
    steps_per_save = sampler.steps_per_epoch if args.save_strategy == "epoch" else args.save_steps
    return -(-count_all_steps(sampler, args) // steps_per_save)


def _check_disk_space(session: Session, loaded: LoadedData, trainable: int, saves: int) -> None:
    """Compare the free disk space with what the checkpoints of the run need; say how much, if all are kept.

    Raises:
        TrainingError: there is no room for two checkpoints; a new one is written before the old one is deleted.
    """
    folder, limit = session.run.folder, session.settings.save_total_limit
    count = min(saves, limit or saves)
    per_parameter = BYTES_PER_PARAMETER + (EXTRA_BYTES_WITH_DEEPSPEED if loaded.deepspeed is not None else 0)
    size = trainable * per_parameter + sum(map(len, loaded.files.values())) + OVERHEAD_BYTES
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise TrainingError(
            f"{folder}: {free:,} bytes are free, but two checkpoints need about {2 * size:,}",
            hint="free some disk space, or choose another output_dir",
        )
    if free < (needed := (count + 1) * size):
        problem = (
            f"{folder}: {free:,} bytes are free, but {format_count(count, 'checkpoint')} will need about {needed:,}"
        )
        session.report(Note(f"{problem}; set save_total_limit to keep fewer", warning=True))
    elif limit is None and count > 2:
        kept = f"all {count} checkpoints will be kept, about {format_size(count * size)}"
        session.report(Note(f"{kept}; --save-total-limit 2 keeps only the newest two, {format_size(2 * size)}"))
