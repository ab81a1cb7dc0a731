"""The command line. Each command reads its settings, calls the function of its name, and shows the result.

This is the only place that knows Typer and Rich. It imports a command's module inside the command, and what
draws inside the functions that draw, so that `--help` loads neither torch nor half of Rich.
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
from t5tune.errors import DependencyError, SettingsError, T5TuneError, suggestion
from t5tune.progress import Note, Report, silent

if TYPE_CHECKING:
    from t5tune.cli.console import Screen
    from t5tune.distributed.world import World
    from t5tune.settings import DoctorSettings, Settings, TrainSettings

EPILOG = (
    "Flags may be written with _ for -, a BOOL also as --flag and --no-flag, a list as a b, a,b or by repeating "
    "the flag. Precedence: default < --config file < environment T5TUNE_NAME < flag."
)
COMPLETION = ("--install-completion", "--show-completion")


def build_app(verb: str | None = None) -> typer.Typer:
    """The Typer app. Only the command `verb` gets its options: building those of all of them takes time."""
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
        if name == verb:
            from t5tune.cli.options import command_function

            app.command(name, epilog=EPILOG)(command_function(_settings_model(name), _run_command))
        else:
            app.command(name, epilog=EPILOG)(_without_options(summary))
    return app


def _settings_model(verb: str) -> "type[Settings]":
    from t5tune.settings import COMMANDS

    return next(model for model in COMMANDS if model.command == verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _without_options(summary: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError("built without its options")

    command.__doc__ = summary
    return command


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143 stopped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow in --help on a terminal of another code page
    if os.environ.get("COLUMNS") == "0":  # Rich would show nothing at all
        del os.environ["COLUMNS"]
    code = run(sys.argv[1:] if arguments is None else arguments)
    if _is_launched():
        # gloo's threads may outlive the process group, and end the process with SIGABRT while the interpreter
        # takes itself down (pytorch/pytorch#190489). Leave without that.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _completed_verb() -> str | None:
    """The verb of the line that a shell asks to complete: it stands in a variable, not among the arguments."""
    if "_T5TUNE_COMPLETE" not in os.environ:
        return None
    words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")  # bash, the others
    return next((word for word in words.split()[1:] if word in SUMMARIES), None)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    want_json = "--json" in arguments
    debug = "--debug" in arguments
    problem: T5TuneError
    try:
        verb, prepared = _prepare_arguments(arguments or ["--help"])
        code = build_app(_completed_verb() or verb)(prepared, standalone_mode=False, prog_name="t5tune")
        return code if isinstance(code, int) else 0
    except T5TuneError as error:
        problem, code = error, error.exit_code
    except typer.TyperException as error:  # Typer's own words on what it can't parse
        problem, code = SettingsError(getattr(error, "message", None) or str(error), hint="t5tune --help"), 2
    except (KeyboardInterrupt, typer.Abort):
        problem, code = T5TuneError("interrupted"), 130
    except BrokenPipeError:  # whoever read the result has gone, and knows it
        return 1
    except OSError as error:
        place = error.filename or "standard output"
        want_json, problem, code = False, T5TuneError(f"{place}: can't be written: {error.strerror}"), 1
    from t5tune.cli.console import show_error

    show_error(problem, sys.stdout if want_json else None, debug)
    return code


def _prepare_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Find the verb, and bring the arguments into Typer's form.

    The deepspeed launcher puts --local_rank before the verb: it is dropped, the environment says it too.
    """
    leading = 0
    while leading < len(arguments) and arguments[leading].startswith("-"):
        leading += 1
    options = [option for option in arguments[:leading] if not option.startswith(("--local_rank", "--local-rank"))]
    if leading == len(arguments):
        return None, options
    verb, rest = arguments[leading], arguments[leading + 1 :]
    if verb not in SUMMARIES:
        if options and options[-1] in COMPLETION:
            raise SettingsError(
                f"{options[-1]} {verb}: takes no value, it finds the shell that it runs in",
                hint=f"t5tune {options[-1]}",
            )
        raise SettingsError(
            f"{verb}: no such command{suggestion(verb, SUMMARIES)}",
            hint=f"the commands are {', '.join(SUMMARIES)}",
        )
    from t5tune.cli.options import normalise

    return verb, [*options, verb, *normalise(rest, _settings_model(verb))]


def _run_command(
    model: "type[Settings]",
    flags: dict[str, Any],
    problems: list[str],
    config: str | None,
    json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Read the settings, run the command, show what it made, and leave with its exit code."""
    from t5tune.cli import console
    from t5tune.model.device import wait_briefly
    from t5tune.settings import load_settings

    if not debug:
        _hush_libraries()
    wait_briefly()
    screen = None if quiet or _rank() else console.Screen()
    report: Report = screen or silent
    with console.result_stream() as stream:
        try:
            settings, notes = load_settings(model, config, os.environ, flags, problems)
            for note in notes:
                report(Note(note))
            result = _call(settings, report, stream, json)
        except KeyboardInterrupt as interrupt:
            _close(screen)
            console.show_error(T5TuneError("interrupted"), stream if json else None, debug)
            raise typer.Exit(128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)) from None
        except (BrokenPipeError, console.UnwritableStdout, typer.Exit):
            _close(screen)
            raise
        except Exception as error:
            _close(screen)
            told = _told(error)
            if not _leave_for_launcher(told):
                console.show_error(told, stream if json else None, debug)
            raise typer.Exit(told.exit_code if isinstance(told, T5TuneError) else 1) from None
        _close(screen)
        if result is None or _rank() or _is_worker():
            return
        if json:
            print(console.as_json(result), file=stream, flush=True)
        else:
            console.show_result(result, stream, quiet)


def _told(error: Exception) -> Exception:
    """What isn't t5tune's own in its words, where it has some."""
    match error:
        case ImportError():
            return _lack(error)
        case OSError(filename=str() | bytes() as path):
            return T5TuneError(f"{os.fsdecode(path)}: {error.strerror}")
        case _:
            return error


def _lack(error: ImportError) -> Exception:
    """A library that is missing or broken, in words that say how to mend it."""
    while isinstance(error.__cause__, ImportError):  # transformers says the same of all that it can't import
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = (error.name or frame.f_globals["__name__"]).partition(".")[0]
    if name == "t5tune":
        return error
    lack = DependencyError(
        f"{name} can't be imported: {' '.join(str(error).split())}",
        hint=f"pip install --force-reinstall {name}; t5tune doctor tells what else doesn't work here",
    )
    lack.__cause__ = error
    return lack


def _hush_libraries() -> None:
    """Keep back what libraries say to their developers; --debug shows it."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stacks of C++ where a rank is lost
    for library in ("bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _close(screen: "Screen | None") -> None:
    if screen is not None:
        screen.close()


def _rank() -> int:
    return _world().rank


def _is_launched() -> bool:
    return _world().launched


def _world() -> "World":
    """Where odd variables stand, `train` says so; other commands run alone."""
    from t5tune.distributed.world import World

    try:
        return World.from_environment()
    except SettingsError:
        return World()


def _is_worker() -> bool:
    return "_T5TUNE_ERRORS" in os.environ


def _leave_for_launcher(error: Exception) -> bool:
    """In a worker that `--num-processes` started: hand the error to the launching process, which shows it."""
    if not _is_worker():
        return False
    from t5tune.distributed.launcher import write_error

    write_error(error)
    return True


def _call(settings: "Settings", report: Report, stream: TextIO, as_json: bool) -> Any:
    from t5tune.settings import (
        ChatSettings,
        DoctorSettings,
        EvaluateSettings,
        ExportSettings,
        InspectSettings,
        MergeSettings,
        PlanSettings,
        PrepareSettings,
        SchemaSettings,
        TemplatesSettings,
        TrainSettings,
    )

    match settings:
        case PrepareSettings():
            from t5tune.commands.prepare import prepare

            with _ending_on_signals():
                return prepare(settings, report)
        case TrainSettings(dry_run=True):
            from t5tune.cli.templates import show_dry_run

            return show_dry_run(settings, report, stream, as_json)
        case TrainSettings():
            return _train(settings, report)
        case ExportSettings():
            from t5tune.commands.export import export

            with _ending_on_signals():
                return export(settings, report)
        case MergeSettings():
            # its products are small: threads of BLAS would wait for each other, and take their own memory
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from t5tune.commands.merge import merge

            with _ending_on_signals():
                return merge(settings, report)
        case ChatSettings():
            if settings.prompt is None:
                from t5tune.cli.chat import converse

                return converse(settings, report, stream)
            from t5tune.commands.chat import chat

            return chat(settings, report)
        case EvaluateSettings():
            from t5tune.commands.evaluate import evaluate

            with _ending_on_signals():
                return evaluate(settings, report)
        case InspectSettings():
            from t5tune.cli.inspect import show

            return show(settings, report, stream, as_json)
        case PlanSettings():
            from t5tune.cli.plan import show as show_plan

            return show_plan(settings, report, stream, as_json)
        case TemplatesSettings():
            from t5tune.cli.templates import show_templates

            return show_templates(settings, report, stream, as_json)
        case SchemaSettings():
            from t5tune.cli.templates import show_schema

            return show_schema(settings, stream)
        case DoctorSettings():
            return _doctor(settings, report, stream, as_json)
        case _:
            raise AssertionError(settings)


def _doctor(settings: "DoctorSettings", report: Report, stream: TextIO, as_json: bool) -> None:
    from t5tune.cli import console, doctor
    from t5tune.commands.doctor import doctor as diagnose

    diagnosis = diagnose(settings, report)
    if as_json:
        print(console.as_json(diagnosis), file=stream, flush=True)
    else:
        doctor.show(diagnosis, stream)
    if not diagnosis.ok:
        raise typer.Exit(1)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, so that nothing is left lying about."""

    def end(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(settings: "TrainSettings", report: Report) -> Any:
    from t5tune.distributed.signals import listening

    with listening() as stop:  # imports take seconds
        from t5tune.commands.train import open_run, train
        from t5tune.distributed.launcher import follow_deepspeed, launch
        from t5tune.distributed.world import World
        from t5tune.io.processes import die_with_parent
        from t5tune.settings import dump_settings
        from t5tune.training.run_folder import read_result

        world = World.from_environment()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            report(Note(f"{name}={os.environ.pop(name)} in the environment is left out: train's own settings hold"))
        if world.launched:
            die_with_parent()
            follow_deepspeed()
        count = settings.num_gpus or settings.num_processes or 1
        if world.launched or count == 1:
            return train(settings, report)
        with ExitStack() as held:
            with stop.at_once():
                run = open_run(settings, held, report)
            if not run.finished:
                again = settings.model_copy(update={"fresh": False})
                quiet = [] if report is not silent else ["--quiet"]
                with tempfile.TemporaryDirectory(prefix="t5tune-settings-") as folder:
                    path = Path(folder, "settings.yaml")
                    path.write_text(dump_settings(again), encoding="utf-8")
                    launch(path, count, quiet, settings.max_restarts, report)
            return read_result(run.folder)
