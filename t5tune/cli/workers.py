"""Ranks on the command line: starting workers, and running as a launcher's worker."""

import multiprocessing
import tempfile
from pathlib import Path

from t5tune.cli.output import Output
from t5tune.distributed.launcher import launch, stop_with_deepspeed_launcher
from t5tune.distributed.world import World
from t5tune.io.processes import ForkedProcess, die_with_parent
from t5tune.settings import EvaluateSettings, TrainSettings, write_settings


def follow_launcher(world: World) -> bool:
    """End this process when its launcher ends. Return whether it has a launcher."""
    if world.launched:
        die_with_parent()
        stop_with_deepspeed_launcher()
    return world.launched


def run_in_workers(
    settings: TrainSettings | EvaluateSettings, output: Output, max_restarts: int = 0, rank_0_shows_result: bool = False
) -> None:
    """Run the command of the settings in the processes of num_gpus or num_processes, and wait for them."""
    flags = [f"--{name}" for name in ("quiet", "debug") if getattr(output, name)]
    if rank_0_shows_result and output.json:
        flags.append("--json")
    # while a command runs, this process's sys.stdout goes to stderr
    stdout = output.stream if rank_0_shows_result else None
    with tempfile.TemporaryDirectory(prefix="t5tune-settings-") as folder:
        # the workers take unset settings from the model or the token cache
        path = write_settings(Path(folder), settings, only_given=True)
        arguments = [settings.command, "--config", str(path), *flags]
        # doctor's forks have imported the libraries
        in_fork = isinstance(multiprocessing.current_process(), ForkedProcess)
        launch(arguments, settings.process_count, max_restarts, output.report, stdout, in_fork=in_fork)
