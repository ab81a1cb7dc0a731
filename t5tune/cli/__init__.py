"""The command line. Each command loads its settings, calls the function of the same name, and shows the result.

Typer and Rich are used only in this package. A command's module is imported when the command runs, and rendering
modules are imported lazily, so that `--help` loads neither torch nor most of Rich.
"""

import atexit
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from t5tune import __version__
from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import DependencyError, SettingsError, T5TuneError, suggest_name
from t5tune.progress import Note, Report, silent

if TYPE_CHECKING:
    from t5tune.cli.console import Screen
    from t5tune.distributed.world import World
    from t5tune.settings import ChatSettings, DoctorSettings, Settings, TrainSettings

EPILOG = (
    "Flags may use _ instead of -; a BOOL may also be written as --flag or --no-flag; a list as a b, as a,b or by "
    "repeating the flag. Precedence: default < --config file < environment variable T5TUNE_NAME < flag."
)
HELP_HINT = "run t5tune --help to list the commands"
COMPLETION_FLAGS = ("--install-completion", "--show-completion")


def build_app(command: str | None = None) -> typer.Typer:
    """Build the Typer app. Only `command` gets its options, because building those of all commands is slow."""
    app = typer.Typer(
        name="t5tune",
        help="Fine-tune T5-family encoder-decoders: prepare → train → export → merge.",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    for name, summary in SUMMARIES.items():
        if name == command:
            from t5tune.cli.options import make_command

            app.command(name, epilog=EPILOG)(make_command(_find_settings_model(name), _run_command))
        else:
            app.command(name, epilog=EPILOG)(_make_placeholder(summary))
    return app


def _find_settings_model(command: str) -> "type[Settings]":
    from t5tune.settings import COMMANDS

    return next(model for model in COMMANDS if model.command == command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _make_placeholder(summary: str) -> Callable[[], None]:
    """Make a command that only appears in the help of the app."""

    def command() -> None:
        raise AssertionError("the command was built without its options")

    command.__doc__ = summary
    return command


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 invalid input, 130 interrupted, 143 terminated."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the arrows in --help, on a terminal whose encoding lacks them
    if os.environ.get("COLUMNS") == "0":  # Rich would print nothing at all
        del os.environ["COLUMNS"]
    code = run(sys.argv[1:] if arguments is None else arguments)
    if _is_launched():
        # gloo's threads may outlive the process group and abort the process (SIGABRT) while the interpreter shuts
        # down (pytorch/pytorch#190489). Run the exit handlers here and skip the shutdown.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _find_completed_command() -> str | None:
    """Return the command on the line being completed, which the shell passes in a variable."""
    if "_T5TUNE_COMPLETE" not in os.environ:
        return None
    # bash sets the first variable, the other shells the second
    words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return next((word for word in words.split()[1:] if word in SUMMARIES), None)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    want_json = "--json" in arguments
    debug = "--debug" in arguments
    problem: T5TuneError
    try:
        command, prepared = _prepare_arguments(arguments or ["--help"])
        code = build_app(_find_completed_command() or command)(prepared, standalone_mode=False, prog_name="t5tune")
        return code if isinstance(code, int) else 0
    except T5TuneError as error:
        problem, code = error, error.exit_code
    except typer.TyperException as error:  # Typer couldn't parse the arguments
        problem, code = SettingsError(getattr(error, "message", None) or str(error), hint=HELP_HINT), 2
    except (KeyboardInterrupt, typer.Abort):
        problem, code = T5TuneError("interrupted"), 130
    except BrokenPipeError:  # the reader of the result has closed the pipe, so there is no one to report to
        return 1
    except OSError as error:
        place = error.filename or "standard output"
        want_json, problem, code = False, T5TuneError(f"{place}: can't be written: {error.strerror}"), 1
    from t5tune.cli.console import show_error

    show_error(problem, sys.stdout if want_json else None, debug)
    return code


def _prepare_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Find the command, and convert the arguments to the form that Typer parses.

    The deepspeed launcher puts --local_rank before the command. It is dropped: the environment has the rank as well.
    """
    leading = 0
    while leading < len(arguments) and arguments[leading].startswith("-"):
        leading += 1
    options = [option for option in arguments[:leading] if not option.startswith(("--local_rank", "--local-rank"))]
    if leading == len(arguments):
        return None, options
    command, rest = arguments[leading], arguments[leading + 1 :]
    if command not in SUMMARIES:
        raise _make_unknown_command_error(command, options)
    from t5tune.cli.options import normalize_arguments

    return command, [*options, command, *normalize_arguments(rest, _find_settings_model(command))]


def _make_unknown_command_error(command: str, options: list[str]) -> SettingsError:
    if options and options[-1] in COMPLETION_FLAGS:
        problem = f"{options[-1]} {command}: the option takes no value and detects the current shell"
        return SettingsError(problem, hint=f"run t5tune {options[-1]}")
    problem = f"{command}: no such command{suggest_name(command, SUMMARIES)}"
    return SettingsError(problem, hint=f"the commands are {', '.join(SUMMARIES)}")


def _run_command(
    model: "type[Settings]",
    flags: dict[str, Any],
    problems: list[str],
    config: str | None,
    json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Load the settings, run the command, show its result, and exit with its exit code."""
    from t5tune.cli import console
    from t5tune.model.device import limit_openmp_spinning
    from t5tune.settings import load_settings

    if not debug:
        _silence_libraries()
    limit_openmp_spinning()
    screen = None if quiet or _get_rank() else console.Screen()
    report: Report = screen or silent
    with console.open_result_stream() as stream:
        try:
            settings, notes = load_settings(model, config, os.environ, flags, problems)
            for note in notes:
                report(Note(note))
            result = _dispatch(settings, report, stream, json)
        except KeyboardInterrupt as interrupt:
            _close(screen)
            console.show_error(T5TuneError("interrupted"), stream if json else None, debug)
            raise typer.Exit(128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)) from None
        except (BrokenPipeError, console.UnwritableStdout, typer.Exit):
            _close(screen)
            raise
        except Exception as error:
            _close(screen)
            failure = _to_t5tune_error(error)
            if not _report_to_launcher(failure):
                console.show_error(failure, stream if json else None, debug)
            raise typer.Exit(failure.exit_code if isinstance(failure, T5TuneError) else 1) from None
        _close(screen)
        if result is not None and not _get_rank() and not _is_worker():
            _print_result(result, stream, json, quiet)


def _print_result(result: Any, stream: TextIO, as_json: bool, quiet: bool) -> None:
    from t5tune.cli import console

    if as_json:
        print(console.format_json(result), file=stream, flush=True)
    else:
        console.show_result(result, stream, quiet)


def _to_t5tune_error(error: Exception) -> Exception:
    """Convert failed imports and file errors to a T5TuneError with a plain message; return other errors unchanged."""
    match error:
        case ImportError():
            return _convert_import_error(error)
        case OSError(filename=str() | bytes() as path):
            return T5TuneError(f"{os.fsdecode(path)}: {error.strerror}")
        case _:
            return error


def _convert_import_error(error: ImportError) -> Exception:
    """Convert to a DependencyError that names the missing or broken library and says how to fix it."""
    # transformers wraps every failed import in a generic message; the cause has the library's name
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = (error.name or frame.f_globals["__name__"]).partition(".")[0]
    if name == "t5tune":
        return error
    converted = DependencyError(
        f"{name} can't be imported: {' '.join(str(error).split())}",
        hint=f"pip install --force-reinstall {name}; t5tune doctor checks what else doesn't work here",
    )
    converted.__cause__ = error
    return converted


def _silence_libraries() -> None:
    """Hide warnings and log messages that libraries address to developers; --debug shows them."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise C++ stack traces appear if a rank is lost
    for library in ("bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _close(screen: "Screen | None") -> None:
    if screen is not None:
        screen.close()


def _get_rank() -> int:
    return _read_world().rank


def _is_launched() -> bool:
    return _read_world().launched


def _read_world() -> "World":
    """Read the world that the environment describes; a single process if its variables are invalid.

    `train` reports invalid variables itself; other commands run in a single process anyway.
    """
    from t5tune.distributed.world import World

    try:
        return World.from_environment()
    except SettingsError:
        return World()


def _is_worker() -> bool:
    from t5tune.distributed.world import ERRORS_FOLDER_VARIABLE

    return ERRORS_FOLDER_VARIABLE in os.environ


def _report_to_launcher(error: Exception) -> bool:
    """In a worker started by `--num-processes`, pass the error to the launching process, which shows it.

    Returns:
        False if this process isn't such a worker.
    """
    if not _is_worker():
        return False
    from t5tune.distributed.launcher import write_error

    write_error(error)
    return True


def _dispatch(settings: "Settings", report: Report, stream: TextIO, as_json: bool) -> Any:
    """Call the function of the command. Return its result, or None if the command has printed it itself."""
    from t5tune.settings import ChatSettings, TrainSettings

    match settings:
        case TrainSettings(dry_run=True):
            from t5tune.cli.templates import show_dry_run

            return show_dry_run(settings, report, stream, as_json)
        case TrainSettings():
            return _train(settings, report)
        case ChatSettings():
            return _chat(settings, report, stream)
    if (function := _import_function(settings)) is not None:
        with _interrupt_on_signals():
            return function(settings, report)
    return _run_printing_command(settings, report, stream, as_json)


def _chat(settings: "ChatSettings", report: Report, stream: TextIO) -> Any:
    if settings.prompt is None:
        from t5tune.cli.chat import run_chat

        return run_chat(settings, report, stream)
    from t5tune.commands.chat import chat

    return chat(settings, report)


def _import_function(settings: "Settings") -> Callable[[Any, Report], Any] | None:
    """Import the function of a command that writes files and returns a result; None for other commands."""
    from t5tune.settings import EvaluateSettings, ExportSettings, MergeSettings, PrepareSettings

    match settings:
        case PrepareSettings():
            from t5tune.commands.prepare import prepare

            return prepare
        case ExportSettings():
            from t5tune.commands.export import export

            return export
        case MergeSettings():
            # merge's matrix products are small: more BLAS threads would only wait for each other and use memory
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from t5tune.commands.merge import merge

            return merge
        case EvaluateSettings():
            from t5tune.commands.evaluate import evaluate

            return evaluate
        case _:
            return None


def _run_printing_command(settings: "Settings", report: Report, stream: TextIO, as_json: bool) -> None:
    """Run a command that prints its result itself."""
    from t5tune.settings import DoctorSettings, InspectSettings, PlanSettings, SchemaSettings, TemplatesSettings

    match settings:
        case InspectSettings():
            from t5tune.cli.inspect import show_examples

            show_examples(settings, report, stream, as_json)
        case PlanSettings():
            from t5tune.cli.plan import show_plan

            show_plan(settings, report, stream, as_json)
        case TemplatesSettings():
            from t5tune.cli.templates import show_templates

            show_templates(settings, report, stream, as_json)
        case SchemaSettings():
            from t5tune.cli.templates import show_schema

            show_schema(settings, stream)
        case DoctorSettings():
            _show_diagnosis(settings, report, stream, as_json)
        case _:
            raise AssertionError(settings)


def _show_diagnosis(settings: "DoctorSettings", report: Report, stream: TextIO, as_json: bool) -> None:
    from t5tune.cli.console import format_json
    from t5tune.cli.doctor import print_diagnosis
    from t5tune.commands.doctor import doctor

    diagnosis = doctor(settings, report)
    if as_json:
        print(format_json(diagnosis), file=stream, flush=True)
    else:
        print_diagnosis(diagnosis, stream)
    if not diagnosis.ok:
        raise typer.Exit(1)


@contextmanager
def _interrupt_on_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP as Ctrl-C is handled, so that temporary files are deleted."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # under nohup SIGHUP is ignored, and stays so
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(settings: "TrainSettings", report: Report) -> Any:
    from t5tune.distributed.signals import handle_signals

    # before the imports: they take seconds, in which a signal may arrive
    with handle_signals() as stop:
        from t5tune.commands.train import set_up_run_folder, train
        from t5tune.distributed.launcher import launch, stop_with_deepspeed_launcher
        from t5tune.distributed.world import World
        from t5tune.io.processes import die_with_parent
        from t5tune.settings import dump_settings
        from t5tune.training.run_folder import read_result

        world = World.from_environment()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            report(Note(f"{name}={os.environ.pop(name)} in the environment is ignored: t5tune uses its own settings"))
        if world.launched:
            die_with_parent()
            stop_with_deepspeed_launcher()
        count = settings.num_gpus or settings.num_processes or 1
        if world.launched or count == 1:
            return train(settings, report)
        with ExitStack() as stack:
            with stop.interruptible():
                run = set_up_run_folder(settings, stack, report)
            if not run.finished:
                # set_up_run_folder has renamed an existing run already; the workers must not do it again
                worker_settings = settings.model_copy(update={"fresh": False})
                quiet = [] if report is not silent else ["--quiet"]
                with tempfile.TemporaryDirectory(prefix="t5tune-settings-") as folder:
                    path = Path(folder, "settings.yaml")
                    path.write_text(dump_settings(worker_settings), encoding="utf-8")
                    launch(path, count, quiet, settings.max_restarts, report)
            return read_result(run.folder)
