"""`t5tune train` on the terminal: train in this process, start workers, or with --dry-run show what a run would do."""

import io
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from t5tune.cli.output import Output
from t5tune.cli.plan import render_plan
from t5tune.commands.plan import plan, to_plan_settings
from t5tune.commands.train import set_up_run_folder, train
from t5tune.distributed.launcher import launch, stop_with_deepspeed_launcher
from t5tune.distributed.signals import handle_signals
from t5tune.distributed.world import World
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.processes import die_with_parent
from t5tune.progress import Note
from t5tune.settings import TrainSettings, dump_settings, write_settings
from t5tune.training.run_folder import TrainResult, apply_cache_settings, read_result
from t5tune.training.validate import check_settings, find_missing_gpus


def run(settings: TrainSettings, output: Output) -> int:
    """Train, or show what a run would do."""
    if settings.dry_run:
        _show_dry_run(settings, output)
    else:
        output.show(_train(settings, output))
    return 0


def _train(settings: TrainSettings, output: Output) -> TrainResult:
    world = World.from_environment()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        value = os.environ.pop(name)
        output.report(Note(f"{name}={value} in the environment is ignored: t5tune uses its own settings"))
    if world.launched:
        die_with_parent()
        stop_with_deepspeed_launcher()
    count = _count_processes(settings)
    if world.launched or count == 1:
        return train(settings, output.report)
    with handle_signals() as stop, ExitStack() as stack:
        with stop.interruptible():
            run = set_up_run_folder(settings, stack, output.report)
        if not run.finished:
            # set_up_run_folder has renamed an existing run already; the workers must not do it again
            worker_settings = settings.model_copy(update={"fresh": False})
            flags = ["--quiet"] if output.quiet else []
            with tempfile.TemporaryDirectory(prefix="t5tune-settings-") as folder:
                write_settings(Path(folder), worker_settings)
                launch(Path(folder, SETTINGS_FILE), count, flags, settings.max_restarts, output.report)
        return read_result(run.folder)


def _count_processes(settings: TrainSettings) -> int:
    return settings.num_gpus or settings.num_processes or 1


def _show_dry_run(settings: TrainSettings, output: Output) -> None:
    """Show the settings with all defaults, then the plan and the launch command as comments of the YAML."""
    check_settings(settings)
    if (problem := find_missing_gpus(settings)) is not None:
        output.report(Note(problem, warning=True))
    settings = apply_cache_settings(settings)
    planned = plan(to_plan_settings(settings), output.report)
    command = _make_launch_command(settings)
    text = io.StringIO()
    Output(text, quiet=True).print(render_plan(planned))
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
