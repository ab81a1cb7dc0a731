"""Convert a model to CTranslate2's format, in this process or in a separate one: `python -m t5tune.commands.serve`."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import check_adapter, read_adapter
from t5tune.commands.merge import merge
from t5tune.compat.quiet import reserve_stdout
from t5tune.errors import CheckpointError, ModelError, T5TuneError, to_t5tune_error
from t5tune.io.atomic import write_folder_atomically
from t5tune.io.processes import die_with_parent, make_module_command, make_module_environment
from t5tune.progress import Event, Report
from t5tune.settings import MergeSettings

NICENESS = 10  # of a separate process, so that replies are computed first


class CTranslate2Fails(ModelError):
    """CTranslate2 can't run a model, although no obstacle was known."""


def convert(report: Report, base: Path, adapter: Path | None, onto: Any, quantization: Any, folder: Path) -> None:
    """Convert a base, or a base with an adapter merged into its weights `onto`, as a whole or not at all.

    Raises:
        CTranslate2Fails: the adapter can't be merged.
    """
    if adapter is None:
        from t5tune.converting.ctranslate2 import convert_and_check

        with write_folder_atomically(folder) as staged:
            convert_and_check(base, base, staged, quantization, report)
        return
    settings = MergeSettings(
        model_name_or_path=str(base),
        adapter=[adapter],
        output_dir=folder,
        to="ctranslate2",
        onto=onto,
        quantization=quantization,
        # rounded to the dtype of the base, the sums would give different replies from `chat`; and a conversion serves
        # all compute types
        dtype="float32",
    )
    try:
        merge(settings, report)
    except CheckpointError as error:
        config, state = read_adapter(adapter)
        check_adapter(state, config, adapter, must_be_trained=False)  # a broken adapter isn't served at all
        # without the hint, which is for users of `merge`
        raise CTranslate2Fails(f"its adapter can't be merged for CTranslate2: {error.message}") from error


def convert_in_process(report: Report, **arguments: Any) -> None:
    """Convert in a separate process with a low priority, while this process computes replies."""
    # `python -m`, because multiprocessing would import the user's main script again; and in a separate process group,
    # so that Ctrl-C reaches only this process
    done = subprocess.run(
        make_module_command("t5tune.commands.serve"),
        input=pickle.dumps(arguments),
        stdout=subprocess.PIPE,
        env=make_module_environment(),
        process_group=0,
        check=False,
    )
    if done.returncode:
        raise ModelError(f"the process that converts the model exited with code {done.returncode}")
    for event in pickle.loads(done.stdout):
        if isinstance(event, T5TuneError):
            raise event
        report(event)


def answer_parent() -> None:
    """Do the work of the separate process: convert as standard input says, and send back the events and the error."""
    die_with_parent()
    os.nice(NICENESS)
    events: list[Event | T5TuneError] = []
    with reserve_stdout() as stream:
        try:
            convert(report=events.append, **pickle.load(sys.stdin.buffer))
        except Exception as error:
            events.append(to_t5tune_error(error))
        pickle.dump(events, stream.buffer)
