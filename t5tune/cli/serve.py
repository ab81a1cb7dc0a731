"""`t5tune serve` on the terminal: the address on stdout, a line for each request on stderr, and a stop that loses none.

With --json, the address and these lines are JSON. Notes are text.
"""

import dataclasses
import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime

from rich.text import Text

from t5tune.cli.output import Output
from t5tune.commands.serve import serve
from t5tune.errors import make_printable
from t5tune.progress import Answered, Event, Note
from t5tune.settings import ServeSettings


def run(settings: ServeSettings, output: Output) -> None:
    """Serve until a signal asks to stop. A second signal stops at once."""

    def report(event: Event) -> None:
        if not isinstance(event, Answered):
            output.report(event)
        elif not output.quiet:
            _log(_format_json(event) if output.json else _format_line(event))

    server = serve(settings, report)
    try:
        address = server.address
        key = ", with the API key" if address.needs_key else ""
        models = ", ".join(f"{name} ({engine})" for name, engine in address.models.items())
        output.show(address, Text(f"{address.url}  {models}"))
        report(Note(f"chat at {address.url}/, clients of OpenAI's API at {address.url}/v1{key}; Ctrl-C stops"))
        server.wait()
    except KeyboardInterrupt:
        try:
            report(Note("stopping: refusing new requests, finishing replies; a second signal stops at once"))
            server.stop()
        except KeyboardInterrupt as again:
            code = output.fail(again)
            sys.stderr.flush()
            os._exit(code)  # Python's own exit would abort in a thread that computes
    finally:
        server.stop()


def _format_line(answered: Answered) -> str:
    time = datetime.now().astimezone().strftime("%H:%M:%S")
    what = f"{answered.method} {make_printable(answered.path)} {answered.status} {answered.seconds:.3f} s"
    words = [time, answered.client, what]
    if answered.model is not None:
        words.append(answered.model)
    if answered.prompt_tokens:
        words.append(f"{answered.prompt_tokens} + {answered.completion_tokens} tokens")
    if answered.dropped_messages:
        words.append(f"{answered.dropped_messages} messages dropped")
    return "  ".join([*words, *([answered.error] if answered.error else [])])


def _format_json(answered: Answered) -> str:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, **dataclasses.asdict(answered)}, ensure_ascii=False)


def _log(line: str) -> None:
    """Write a line to stderr, in one piece, as other threads write too. Rich would take a millisecond for it."""
    with suppress(OSError, ValueError):  # closed, which is no reason to stop serving
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
