"""`t5tune chat` without --prompt: a conversation on the terminal."""

import sys
from typing import TextIO

from rich.console import Console

from t5tune.chat import Chatter
from t5tune.data.formats import Turn
from t5tune.progress import Report
from t5tune.settings import ChatSettings

HELP = "Say something; /reset forgets the conversation, /quit or Ctrl-D ends it."


def converse(settings: ChatSettings, report: Report, stream: TextIO) -> None:
    """Read lines until the user ends it, and answer each; with a pipe, one answer a line."""
    chatter = Chatter.load(settings, report)
    console = Console(stderr=True, highlight=False)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[dim]{HELP}[/]")
    turns: list[Turn] = []
    while True:
        if interactive:
            console.print("[bold green]you:[/] ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        text = line.rstrip("\n")
        if text.strip() == "/reset":
            turns = []
        elif text.strip():
            answer = chatter.reply([*turns, Turn("human", text)])
            turns += [Turn("human", text), Turn("assistant", answer.reply)]
            if interactive:
                console.print("[bold cyan]model:[/] ", end="")
            print(answer.reply, file=stream, flush=True)
