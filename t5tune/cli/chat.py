"""`t5tune chat` without --prompt: a conversation on the terminal."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from t5tune.cli.console import show_error
from t5tune.commands.chat import Chatter, save_conversation
from t5tune.data.formats import Turn
from t5tune.errors import SettingsError, T5TuneError
from t5tune.progress import Report
from t5tune.settings import ChatSettings, packaged_templates

HELP = """\
Say something. What begins with / is a command; // says a slash.
  /reset             forget the conversation
  /undo              take back the last question and its answer
  /history on|off    answer the whole conversation, or each message by itself
  /system TEXT       another system message; without TEXT the layout's own
  /template NAME     another layout of the conversation
  /adapter FOLDER    another adapter on the same base; `none` for the base alone
  /save FILE         append the conversation to FILE, as prepare reads it
  /help              this text
  /quit, Ctrl-D      the end; Ctrl-C stops an answer, and clears a line"""


def converse(settings: ChatSettings, report: Report, stream: TextIO) -> None:
    """Read lines until the user ends it, and answer each; with a pipe, one answer after the other."""
    if sys.stdin is None:
        raise SettingsError("standard input is closed", hint="--prompt takes a question")
    talk = _Talk(Chatter.load(settings, report), report, stream, interactive=sys.stdin.isatty())
    if talk.interactive:
        talk.say("Say something; /help shows the commands, /quit or Ctrl-D ends it.")
    while True:
        text = talk.next_line()
        if text is None or text.strip() in ("/quit", "/exit"):
            return
        try:
            if text.startswith("/") and not text.startswith("//"):
                talk.obey(*text[1:].split(maxsplit=1))
            elif text.strip():
                talk.ask(text.removeprefix("/") if text.startswith("//") else text)
        except T5TuneError as error:
            if not talk.interactive:
                raise
            show_error(error, None, debug=False)


@dataclass
class _Talk:
    """A conversation so far, and who answers."""

    chatter: Chatter
    report: Report
    stream: TextIO
    interactive: bool
    turns: list[Turn] = field(default_factory=list)
    keeps_history: bool | None = None  # as /history says; None: as the model was trained
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    def next_line(self) -> str | None:
        """What the user says next; None at the end. On a terminal with its editing keys and what was said before."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        with suppress(ImportError):  # of some Pythons; then without the keys
            import readline  # noqa: F401 (by being there it changes `input`)
        prompt = "you: "
        if self.console.color_system:
            prompt = "\001\033[1;32m\002you:\001\033[0m\002 "  # between 1 and 2 stands what takes no room
        while True:
            try:
                return input(prompt)
            except EOFError:
                self.console.print()
                return None
            except KeyboardInterrupt as interrupt:
                self.console.print()
                if interrupt.args:  # another signal, which the command line raises so
                    raise
                self.say("/quit or Ctrl-D ends it")

    def ask(self, text: str) -> None:
        """Answer, and keep both turns; an answer that Ctrl-C stopped leaves none."""
        turns = [*self.turns, Turn("human", text)]
        if not self.interactive:
            answer = self.chatter.reply(turns)
            print(answer.reply, file=self.stream, flush=True)
        else:
            self.console.print("[bold cyan]model:[/] ", end="")
            try:
                answer = self.chatter.reply(turns, self._show)
            except KeyboardInterrupt:
                print(file=self.stream, flush=True)
                self.say("stopped; the question is taken back")
                return
            print(file=self.stream, flush=True)
        self.turns = [*turns, Turn("assistant", answer.reply)]

    def obey(self, name: str = "", value: str = "") -> None:
        """Carry out a command, and say what it did."""
        match name:
            case "help":
                self.console.print(Text(HELP, "dim"))
            case "reset":
                self.turns = []
                self.say("forgotten")
            case "undo":
                self.say("taken back" if self.turns else "there is nothing to take back")
                self.turns = self.turns[:-2]
            case "history":
                if value not in ("on", "off", ""):
                    raise SettingsError(
                        f"/history: {value}: expected on or off", hint="/history alone says which it is"
                    )
                if value:
                    self.keeps_history = value == "on"
                    self.chatter = self.chatter.with_history(self.keeps_history)
                kept = self.chatter.keeps_history
                self.say(
                    "history is on: replies are to the whole conversation"
                    if kept
                    else "history is off: each message is answered by itself"
                )
            case "system":
                self.chatter = self.chatter.with_system(value or None)
                self.say("system message: " + (value or self.chatter.template.system_message or "none"))
            case "template":
                if not value:
                    raise SettingsError(
                        "/template: name a layout", hint=", ".join(packaged_templates.names("conversations"))
                    )
                self.chatter = self.chatter.with_template(value)
                self.say(f"layout: {value}")
            case "adapter":
                if not value:
                    raise SettingsError("/adapter: name a folder", hint="/adapter none takes it off")
                self.chatter = self.chatter.with_adapter(None if value == "none" else Path(value), self.report)
                if self.keeps_history is not None:
                    self.chatter = self.chatter.with_history(self.keeps_history)
                self.say(f"adapter: {value}")
            case "save":
                if not value:
                    raise SettingsError("/save: name a file", hint="/save conversations.jsonl")
                if not self.turns:
                    raise SettingsError("/save: nothing was said yet")
                save_conversation(Path(value), self.turns, self.chatter.settings.system)
                self.say(f"appended to {value}")
            case _:
                raise SettingsError(f"/{name}: no such command", hint="/help shows them; // says a slash")

    def say(self, text: str) -> None:
        """A line of ours, apart from the model's; only a terminal sees it."""
        if self.interactive:
            self.console.print(Text(text, "dim"))

    def _show(self, text: str) -> None:
        print(text, end="", file=self.stream, flush=True)
