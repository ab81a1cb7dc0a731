"""Run a command that Typer has parsed: load its settings, call it, and show its result."""

import importlib
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from t5tune.cli.output import Output
from t5tune.cli.results import render_result
from t5tune.cli.spellings import CommandLine
from t5tune.compat.lazy_imports import import_lazily
from t5tune.compat.python_patches import pause_garbage_collection
from t5tune.compat.quiet import quiet_libraries, reserve_stdout
from t5tune.distributed.signals import handle_signals, interrupt_on_signals
from t5tune.distributed.world import World
from t5tune.errors import SettingsError, Stopped, T5TuneError, Unexpected, to_t5tune_error
from t5tune.model.device import let_gpu_memory_grow, limit_openmp_spinning
from t5tune.progress import Note
from t5tune.settings import EvaluateSettings, PrepareSettings, Settings, TrainSettings, load_settings

# Each of these has a module in this package with a function `run(settings, output)`. For other commands, the function
# in t5tune/commands is called and its result shown.
COMMANDS_WITH_MODULE = {"train", "chat", "serve", "evaluate", "inspect"}


def run_command(model: type[Settings], line: CommandLine) -> int:
    """Run a command, show its result or its error, and return the exit code."""
    _configure_libraries(model.command, line.debug)
    world = World()
    with suppress(SettingsError):  # train and evaluate report invalid variables
        world = World.from_environment()
    with quiet_libraries(), reserve_stdout() as stream:
        # the process that started the ranks of train shows their run folder
        shows_paths = world.rank == 0 and not (world.is_run_set_up and model.command == "train")
        output = Output(stream, line.json, line.quiet or world.rank > 0, line.debug, shows_paths)
        try:
            read = partial(load_settings, model, line.config, os.environ, line.values, line.problems, line.meant)
            settings, notes = read()
            if not world.is_run_set_up:  # otherwise the launching process has shown them
                for note in notes:
                    output.report(Note(note))
            if isinstance(settings, PrepareSettings) and settings.shard is not None:
                output = Output(stream, line.json, line.quiet, line.debug)  # each rank shows its part
            # a signal may arrive while the command is imported, which takes seconds
            with _handle_signals(settings, output, world):
                if model.command == "serve":  # else a request to reload would end the process
                    signal.signal(signal.SIGUSR1, lambda *_: None)
                if isinstance(settings, TrainSettings) and line.config and "output_dir" not in line.values:
                    _warn_of_copied_run(Path(line.config), settings.output_dir, output)
                again = {"read_settings": lambda: read()[0]} if model.command == "serve" else {}  # at each reload
                return _import_command(model.command)(settings, output, **again) or 0
        except KeyboardInterrupt as interrupt:
            return output.fail(interrupt)
        except Exception as error:
            return _report_to_launcher(error, output.debug) if world.is_run_set_up else _fail(error, world, output)
        finally:
            output.close_screen()


def _warn_of_copied_run(config: Path, output_dir: Path, output: Output) -> None:
    from t5tune.runs.checks import describe_copied_run

    if (warning := describe_copied_run(config, output_dir)) is not None:
        output.report(Note(warning, warning=True))


def _configure_libraries(command: str, debug: bool) -> None:
    import_lazily(uses_only_t5=True)
    limit_openmp_spinning()
    let_gpu_memory_grow()
    if command == "merge":
        # its matrix products are small: more BLAS threads would only wait for each other and use memory
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")  # quiet_libraries respects this


def _handle_signals(settings: Settings, output: Output, world: World) -> AbstractContextManager[object]:
    """`train`, and every rank of `evaluate`, stop as distributed/signals.py says."""
    trains = isinstance(settings, TrainSettings) and not settings.dry_run
    if trains or (isinstance(settings, EvaluateSettings) and world.launched):
        return handle_signals(output.report, saves_checkpoints=trains)
    return interrupt_on_signals()


def _import_command(command: str) -> Callable[..., int | None]:
    has_module = command in COMMANDS_WITH_MODULE
    with pause_garbage_collection():
        module = importlib.import_module(f"t5tune.{'cli' if has_module else 'commands'}.{command}")
    if has_module:
        run: Callable[..., None] = module.run
        return run
    function = partial(getattr(module, command), **({"in_fork": True} if command == "plan" else {}))

    def run_and_show(settings: Any, output: Output) -> int:
        from t5tune.cli.next_steps import list_next_steps

        result = function(settings, output.report)
        if output.json or getattr(result, "joined", None) is not False:  # else a part of a cache, which a note reports
            next_steps = [] if output.json else list_next_steps(settings, result)
            output.show(result, render_result(command, result), next_steps)
        return 0 if getattr(result, "ok", True) else 1  # only doctor's result has `ok`

    return run_and_show


def _fail(error: Exception, world: World, output: Output) -> int:
    """Show an error, unless rank 0 shows it: its own error, or that a signal stopped all ranks."""
    if isinstance(error, T5TuneError) and (error.is_of_rank_0 or (isinstance(error, Stopped) and world.rank > 0)):
        return error.exit_code
    return output.fail(error)


def _report_to_launcher(error: Exception, debug: bool) -> int:
    """Pass a worker's error to the launching process of `--num-processes`, which shows it."""
    from t5tune.distributed.launcher import write_error

    if debug:  # the launching process has no traceback of this process
        traceback.print_exception(error)
    known = to_t5tune_error(error)
    write_error(error if isinstance(known, Unexpected) else known)
    return known.exit_code
