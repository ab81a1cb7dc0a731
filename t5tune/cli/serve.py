"""`t5tune serve` on the terminal: the address on stdout, a line per request on stderr, and a stop without losses.

With --json, the address and these lines are JSON. Notes are text.
"""

import dataclasses
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NoReturn

from rich.text import Text

from t5tune.cli.output import Output
from t5tune.commands.serve import Server, serve
from t5tune.distributed.signals import SECONDS_BETWEEN_SIGNALS
from t5tune.errors import T5TuneError, make_printable
from t5tune.progress import Answered, Event, Note
from t5tune.serving.stop_signals import ENDED, RELOAD_SIGNAL, STOP_SIGNALS, handle, read_signals
from t5tune.settings import ServeSettings


def run(_: ServeSettings, output: Output, read_settings: Callable[[], ServeSettings]) -> None:
    """Serve until a signal asks to stop. A second signal stops at once, if it arrives at least a second later.

    The settings are read again: a request to reload may have arrived while this module was imported.
    """

    def report(event: Event) -> None:
        if not isinstance(event, Answered):
            output.report(event)
        elif not output.quiet:
            _log(_format_json(event) if output.json else _format_line(event))

    with (
        read_signals() as requests,
        serve(read_settings(), report, read_settings) as server,
        handle(*STOP_SIGNALS),
    ):
        _collect_garbage_rarely()
        address = server.address
        key = ", with the API key" if address.needs_key else ""
        models = ", ".join(f"{name} ({engine})" for name, engine in address.models.items())
        output.show(address, Text(f"{address.url}  {models}"))
        report(Note(f"chat at {address.url}/, OpenAI's API at {address.url}/v1{key}; Ctrl-C stops the server"))
        requests.end_after(server.wait)
        reload_is_due = threading.Event()
        threading.Thread(target=_reload, args=(server, reload_is_due), daemon=True).start()
        while (number := requests.wait()) == RELOAD_SIGNAL:
            reload_is_due.set()
        if number == ENDED:
            return
        stopped_at = time.monotonic()
        report(Note("stopping: refusing new requests, finishing replies; a second signal stops at once"))
        requests.end_after(server.stop)
        while (number := requests.wait()) != ENDED:
            # `timeout` signals its child, and then the whole group with the child in it
            if number != RELOAD_SIGNAL and time.monotonic() - stopped_at > SECONDS_BETWEEN_SIGNALS:
                _exit_at_once(output.fail(KeyboardInterrupt(number)))
        if server.is_reloading():
            _exit_at_once(0)


def _reload(server: Server, is_due: threading.Event) -> None:
    """Reload the models after each signal, also after one that arrived during a reload."""
    while is_due.wait():
        is_due.clear()
        with suppress(T5TuneError):  # reported
            server.reload()


def _exit_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's own exit would abort in a thread that computes


def _collect_garbage_rarely() -> None:
    """Let Python's garbage collector hold up requests less.

    A collection took a second, because of the objects of the libraries and of a large body. A server makes hardly any
    garbage in cycles; a reload frees the old models, which are in no cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _format_line(answered: Answered) -> str:
    clock = datetime.now().astimezone().strftime("%H:%M:%S")
    what = f"{answered.method} {make_printable(answered.path)} {answered.status} {answered.seconds:.3f} s"
    words = [clock, answered.client, what]
    if answered.model is not None:
        words.append(answered.model)
    if answered.prompt_tokens:
        words.append(f"{answered.prompt_tokens} + {answered.completion_tokens} tokens")
    if answered.dropped_messages:
        words.append(f"{answered.dropped_messages} messages dropped")
    return "  ".join([*words, *([answered.error] if answered.error else [])])


def _format_json(answered: Answered) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, **dataclasses.asdict(answered)}, ensure_ascii=False)


def _log(line: str) -> None:
    """Write a line to stderr, in one piece, as other threads write too. Rich would take a millisecond for it."""
    with suppress(OSError, ValueError):  # closed, which is no reason to stop serving
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
