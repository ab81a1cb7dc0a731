"""`t5tune train` on the terminal: train in this process, start workers, or with --dry-run show what a run would do."""

import io
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from t5tune.cli.next_steps import list_next_steps
from t5tune.cli.output import Output
from t5tune.cli.results import render_result
from t5tune.commands.train import name_kept_records, set_up_run_folder, train
from t5tune.distributed.launcher import launch, stop_with_deepspeed_launcher
from t5tune.distributed.signals import handle_signals
from t5tune.distributed.world import World
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.processes import die_with_parent
from t5tune.progress import Note
from t5tune.settings import TrainSettings, dump_settings, write_settings
from t5tune.training.run_folder import TrainResult, apply_cache_settings, read_result
from t5tune.training.validate import check_settings, find_missing_gpus, suggest_learning_rate


def run(settings: TrainSettings, output: Output) -> None:
    """Train, or show what a run would do."""
    if settings.dry_run:
        _show_dry_run(settings, output)
        return
    world = World.from_environment()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        value = os.environ.pop(name)
        output.report(Note(f"{name}={value} in the environment is ignored: t5tune uses its own settings"))
    if world.launched:
        die_with_parent()
        stop_with_deepspeed_launcher()
    if world.launched or _count_processes(settings) == 1:
        result = train(settings, output.report)
    else:
        result = _train_in_workers(settings, output)
    output.show(result, next_steps=list_next_steps(settings, result))


def _train_in_workers(settings: TrainSettings, output: Output) -> TrainResult:
    with handle_signals(output.report) as stop, ExitStack() as stack:
        with stop.interruptible():
            run = set_up_run_folder(settings, stack, output.report)
        if not run.finished:
            # set_up_run_folder has renamed an existing run already; the workers must not do it again
            worker_settings = name_kept_records(settings).model_copy(update={"fresh": False})
            flags, count = ["--quiet"] if output.quiet else [], _count_processes(settings)
            with tempfile.TemporaryDirectory(prefix="t5tune-settings-") as folder:
                write_settings(Path(folder), worker_settings)
                launch(Path(folder, SETTINGS_FILE), count, flags, settings.max_restarts, output.report)
        return read_result(run.folder)


def _count_processes(settings: TrainSettings) -> int:
    return settings.num_gpus or settings.num_processes or 1


def _show_dry_run(settings: TrainSettings, output: Output) -> None:
    """Show the settings with all defaults, then the plan and the launch command as comments of the YAML."""
    from t5tune.commands.plan import plan, to_plan_settings  # imports torch, which a launching process doesn't need

    check_settings(settings)
    if (problem := find_missing_gpus(settings)) is not None:
        output.report(Note(problem, warning=True))
    if (suggestion := suggest_learning_rate(settings)) is not None:
        output.report(Note(suggestion))
    settings = apply_cache_settings(settings)
    planned = plan(to_plan_settings(settings), output.report)
    command = _make_launch_command(settings)
    text = io.StringIO()
    Output(text, quiet=True).show(planned, render_result("plan", planned))
    comments = f"{text.getvalue()}launch command, once the settings are written: {' '.join(command)}"
    yaml = dump_settings(settings.model_copy(update={"dry_run": False}))
    output.show(
        {"settings": settings.model_dump(mode="json"), "plan": planned, "command": command},
        "\n".join([yaml, *(f"# {line}".rstrip() for line in comments.splitlines())]),
    )


def _make_launch_command(settings: TrainSettings) -> list[str]:
    """Make the torchrun command equivalent to --num-gpus or --num-processes; `t5tune train` for a single process."""
    count = _count_processes(settings)
    train = ["t5tune", "train", "--config", str(settings.output_dir / SETTINGS_FILE)]
    return train if count == 1 else ["torchrun", "--nproc-per-node", str(count), "-m", *train]
