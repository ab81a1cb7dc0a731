"""Run a command that Typer has parsed: load its settings, call it, and show its result."""

import importlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from t5tune.cli.output import Output, Unexpected, reserve_stdout, to_t5tune_error
from t5tune.cli.results import render_result
from t5tune.cli.spellings import CommandLine
from t5tune.compat.quiet import quiet_libraries
from t5tune.distributed.signals import handle_signals
from t5tune.distributed.world import World
from t5tune.errors import SettingsError, Stopped, T5TuneError
from t5tune.file_names import (
    CACHE_MANIFEST_FILE,
    CHECKPOINT_MANIFEST_FILE,
    RESULT_FILE,
    RUN_CACHE_FOLDER,
    SETTINGS_FILE,
)
from t5tune.model.device import let_gpu_memory_grow, limit_openmp_spinning
from t5tune.progress import Note
from t5tune.settings import EvaluateSettings, PrepareSettings, Settings, TrainSettings, load_settings

# Each of these has a module in this package with a function `run(settings, output)`. For the others, the function in
# t5tune/commands is called and its result shown.
COMMANDS_WITH_MODULE = {"train", "chat", "serve", "evaluate", "inspect"}
FILES_OF_A_RUN = (
    RESULT_FILE,
    f"checkpoint-*/{CHECKPOINT_MANIFEST_FILE}",
    f"{RUN_CACHE_FOLDER}/**/{CACHE_MANIFEST_FILE}",
)


def run_command(model: type[Settings], parsed: CommandLine) -> int:
    """Run a command, and show its result or its error. Return the exit code."""
    command = model.command
    _configure_libraries(command, parsed.debug)
    world = _read_world()
    with quiet_libraries(), reserve_stdout() as stream:
        # the process that started the ranks of train shows their run folder
        shows_paths = world.rank == 0 and not (world.is_run_set_up and command == "train")
        output = Output(stream, parsed.json, parsed.quiet or world.rank > 0, parsed.debug, shows_paths)
        try:
            settings, notes = load_settings(
                model, parsed.config, os.environ, parsed.values, parsed.problems, parsed.meant
            )
            if not world.is_run_set_up:  # the process that started this one has shown them
                for note in notes:
                    output.report(Note(note))
            if isinstance(settings, TrainSettings) and parsed.config is not None and "output_dir" not in parsed.values:
                _warn_of_another_run(Path(parsed.config), settings.output_dir, output)
            if isinstance(settings, PrepareSettings) and settings.shard is not None:
                output = Output(stream, parsed.json, parsed.quiet, parsed.debug)  # each rank has a part of its own
            # before the command is imported: that takes seconds, in which a signal may arrive
            with _handle_signals(settings, output, world):
                return _import_command(command)(settings, output) or 0
        except KeyboardInterrupt as interrupt:
            return output.fail(interrupt)
        except Exception as error:
            is_worker = world.is_run_set_up
            return _report_to_launcher(error, output.debug) if is_worker else _fail(error, world, output)
        finally:
            output.close_screen()


def _warn_of_another_run(config: Path, output_dir: Path, output: Output) -> None:
    """Warn if the config is in a run folder that was moved or copied: its output_dir is then another folder."""
    folder = config.parent
    if config.name != SETTINGS_FILE or os.path.realpath(folder) == os.path.realpath(output_dir):
        return
    if any(True for name in FILES_OF_A_RUN for _ in folder.glob(name)):
        problem = (
            f"{config}: is in the run folder {folder}, but its output_dir is {output_dir}, which this command uses"
        )
        output.report(Note(f"{problem}; add --output-dir {folder} to use that run instead", warning=True))


def _configure_libraries(command: str, debug: bool) -> None:
    limit_openmp_spinning()
    let_gpu_memory_grow()
    if command == "merge":
        # its matrix products are small: more BLAS threads would only wait for each other and use memory
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")  # quiet_libraries respects this


def _read_world() -> World:
    """Read the rank from the environment. `train` and `evaluate` report invalid variables; others don't need them."""
    try:
        return World.from_environment()
    except SettingsError:
        return World()


def _handle_signals(settings: Settings, output: Output, world: World) -> AbstractContextManager[object]:
    """Handle signals in a block: `train`, and every rank of `evaluate`, stop as distributed/signals.py says."""
    trains = isinstance(settings, TrainSettings) and not settings.dry_run
    if trains or (isinstance(settings, EvaluateSettings) and world.launched):
        return handle_signals(output.report, saves_checkpoints=trains)
    return _interrupt_on_signals()


def _import_command(command: str) -> Callable[[Any, Output], int | None]:
    if command in COMMANDS_WITH_MODULE:
        run: Callable[[Any, Output], None] = importlib.import_module(f"t5tune.cli.{command}").run
        return run
    function = getattr(importlib.import_module(f"t5tune.commands.{command}"), command)

    def run_and_show(settings: Any, output: Output) -> int:
        from t5tune.cli.next_steps import list_next_steps

        result = function(settings, output.report)
        if output.json or getattr(result, "joined", None) is not False:  # else a part of a cache, which a note reports
            output.show(result, render_result(command, result), list_next_steps(settings, result))
        return 0 if getattr(result, "ok", True) else 1  # only doctor's result has `ok`

    return run_and_show


@contextmanager
def _interrupt_on_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP as Ctrl-C is handled, so that temporary files are deleted."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    # under nohup SIGHUP is ignored, and stays so
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _fail(error: Exception, world: World, output: Output) -> int:
    """Show an error, unless rank 0 does: what went wrong there, and that a signal has stopped all ranks."""
    if isinstance(error, T5TuneError) and (error.is_of_rank_0 or (isinstance(error, Stopped) and world.rank > 0)):
        return error.exit_code
    return output.fail(error)


def _report_to_launcher(error: Exception, debug: bool) -> int:
    """Pass the error of a worker that `--num-processes` started to the launching process, which shows it."""
    from t5tune.distributed.launcher import write_error

    if debug:  # the launching process can't show where in this one it was
        traceback.print_exception(error)
    known = to_t5tune_error(error)
    write_error(error if isinstance(known, Unexpected) else known)
    return known.exit_code
