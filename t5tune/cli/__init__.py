"""The command line.

`run` passes the arguments to Typer (app.py), with the command's options (options.py), in any spelling that users type
(spellings.py); command.py runs the command and shows its result. Typer and Rich are used only in this package. A
command's module is imported when the command runs, so that the help doesn't wait for it.
"""

import atexit
import gc
import io
import os
import sys
from contextlib import suppress
from typing import NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 invalid input, 130 interrupted, 143 terminated."""
    try:
        code = _run_and_flush(arguments)
    except BaseException as error:  # Ctrl-C while this package is imported, or at the end
        from t5tune.errors import unwrap_interrupt

        if not isinstance(unwrap_interrupt(error), KeyboardInterrupt):
            raise
        code = 130
    sys.exit(code)


def _run_and_flush(arguments: list[str] | None) -> int:
    # imported here, where Ctrl-C shows no traceback
    from t5tune.distributed.world import World
    from t5tune.errors import SettingsError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the arrows in --help, on a terminal whose encoding lacks them
    if os.environ.get("COLUMNS") == "0":  # Rich would print nothing at all
        del os.environ["COLUMNS"]
    code = run(sys.argv[1:] if arguments is None else arguments)
    if "triton" in sys.modules:  # Triton's bindings (nanobind) would report all frozen objects as leaks
        gc.unfreeze()
    else:
        gc.freeze()  # Python looks for garbage at its end, which takes a while with all objects of the libraries
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:  # what can't be written is reported; Python would report it again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(SettingsError):  # invalid variables of a launcher, which train has reported
        if World.from_environment().launched:
            # gloo's threads may outlive the process group and abort the process (SIGABRT) while the interpreter shuts
            # down (pytorch/pytorch#190489). Run the exit handlers here and skip the shutdown.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    import typer

    from t5tune.cli.app import app
    from t5tune.errors import SettingsError, T5TuneError, WriteError

    failure: BaseException
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="t5tune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader of the help has closed the pipe
        return 1
    except OSError as error:
        failure = error if error.filename else WriteError(f"standard output: can't be written: {error.strerror}")
    except typer.TyperException as error:  # an unknown option before the command
        problem = f"{option}: no such option" if (option := getattr(error, "option_name", None)) else str(error)
        failure = SettingsError(problem, hint="run t5tune --help to list the commands")
    except (T5TuneError, KeyboardInterrupt, typer.Abort) as error:
        failure = error
    from t5tune.cli.output import Output

    wants_json = "--json" in arguments and not isinstance(failure, WriteError)
    return Output(sys.stdout, json=wants_json, debug="--debug" in arguments).fail(failure)
