"""`t5tune train` on the terminal: train in this process, start workers, or with --dry-run show what a run would do."""

import io
import shlex
from contextlib import ExitStack

from t5tune.cli.next_steps import list_next_steps
from t5tune.cli.output import Output
from t5tune.cli.results import ComparisonTable, render_result
from t5tune.cli.workers import follow_launcher, run_in_workers
from t5tune.commands.train import resume_after_restart, send_result, set_up_run_folder, train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.distributed.signals import handle_signals
from t5tune.distributed.world import World, has_restarted
from t5tune.errors import TrainingError
from t5tune.file_names import SETTINGS_FILE
from t5tune.formatting import format_count
from t5tune.io.reasons import join_first
from t5tune.progress import Note
from t5tune.runs.checks import check_plan, find_missing_gpus, list_notes
from t5tune.runs.folder import RunFolder, dump_run_settings
from t5tune.runs.result import TrainResult, read_result
from t5tune.settings import TrainSettings


def run(settings: TrainSettings, output: Output) -> None:
    if settings.dry_run and settings.sweep is None:
        _show_dry_run(settings, output)
        return
    if settings.sweep is not None:
        _show_sweep(settings, output)
        return
    world = World.from_environment()
    if follow_launcher(world) or settings.process_count == 1:
        result = train(settings, output.report)
    else:
        result = _train_in_workers(settings, output)
    output.show(result, next_steps=list_next_steps(settings, result))


def _show_sweep(settings: TrainSettings, output: Output) -> None:
    """Train the runs of a sweep, and show their comparison; with --dry-run, list the runs."""
    from t5tune.commands.train.sweep import make_runs, sweep

    if settings.dry_run:
        runs = {name: str(run.output_dir) for name, run in make_runs(settings).items()}
        output.show(runs, "\n".join(runs.values()))
        return
    result = sweep(settings, output.report, shows_runs=not (output.quiet or output.json))
    output.show(result, "" if result.comparison is None else ComparisonTable(result.comparison))
    if result.failed:
        names = [f"{name}: {error}" for name, error in result.failed.items()]
        problem = f"sweep: {format_count(len(names), 'run')} failed: {join_first(names)}"
        raise TrainingError(problem, hint="run the same command to continue; finished runs are skipped")


def _train_in_workers(settings: TrainSettings, output: Output) -> TrainResult:
    if has_restarted() and settings.fresh:
        settings = resume_after_restart(settings, not RunFolder(settings.output_dir).has_other_launch(), output.report)
    with handle_signals(output.report, saves_checkpoints=True) as stop, ExitStack() as stack:
        with stop.interruptible():
            folder = set_up_run_folder(settings, stack, output.report)
        if folder.is_finished:
            return send_result(settings, read_result(folder.path), output.report, stop)
        # set_up_run_folder has renamed an existing run already; the workers must not do it again
        worker_settings = settings.model_copy(update={"fresh": False})
        run_in_workers(worker_settings, output, settings.max_restarts)
        return read_result(folder.path)


def _show_dry_run(settings: TrainSettings, output: Output) -> None:
    """Show the settings with all defaults, then the plan and the launch command as comments of the YAML."""
    from t5tune.commands.plan import plan, to_plan_settings  # imports torch, which a launching process doesn't need

    run_plan = make_run_plan(settings)
    check_plan(run_plan, imports_metrics=False)  # a config that is only shown may be someone else's
    if (problem := find_missing_gpus(settings)) is not None:
        output.report(Note(problem, warning=True))
    for note in list_notes(run_plan):
        output.report(Note(note))
    if settings.teacher_model_name_or_path is not None:
        teacher = f"teacher_model_name_or_path: {settings.teacher_model_name_or_path}"
        output.report(Note(f"{teacher}: the plan doesn't include the teacher's memory", warning=True))
    planned = plan(to_plan_settings(run_plan), output.report)
    command = _make_launch_command(settings)
    text = io.StringIO()
    Output(text, quiet=True).show(planned, render_result("plan", planned))
    comments = f"{text.getvalue()}launch command, once the settings are written: {shlex.join(command)}"
    yaml = dump_run_settings(run_plan)
    output.show(
        {"settings": run_plan.given.model_dump(mode="json"), "plan": planned, "command": command},
        "\n".join([yaml, *(f"# {line}".rstrip() for line in comments.splitlines())]),
    )


def _make_launch_command(settings: TrainSettings) -> list[str]:
    """Make the torchrun command equivalent to --num-gpus or --num-processes; `t5tune train` for a single process."""
    count = settings.process_count
    train = ["t5tune", "train", "--config", str(settings.output_dir / SETTINGS_FILE)]
    return train if count == 1 else ["torchrun", "--nproc-per-node", str(count), "-m", *train]
