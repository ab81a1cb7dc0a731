"""`t5tune chat` on the terminal: the reply to --prompt, or an interactive chat; of a model with labels, the labels."""

import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from t5tune.cli.output import Output, print_error
from t5tune.cli.screen import StderrConsole
from t5tune.commands.chat import (
    Chatter,
    Labeler,
    Labeling,
    Reply,
    load_model,
    reply_to_prompt,
    save_conversation,
    save_preference,
)
from t5tune.data.reading.formats import Turn
from t5tune.errors import SettingsError, T5TuneError, WriteError
from t5tune.formatting import format_count, format_label
from t5tune.progress import Note
from t5tune.settings import ChatSettings, packaged_templates
from t5tune.settings.field_types import read_path
from t5tune.settings.messages import shorten_value

QUIT = ("/quit", "/exit")
MAX_CLASSES = 10  # of a text, shown with their probabilities
HELP = """\
Type a message. A line that begins with / is a command; begin with // to send a message that starts with /.
  /reset             clear the conversation
  /undo              remove the last message and its reply
  /history on|off    reply to the whole conversation, or to each message by itself
  /system TEXT       set the system message; without TEXT, use the template's
  /template NAME     change the conversation template
  /adapter FOLDER    change the adapter; `none` for the base alone
  /save FILE         append the conversation to FILE, in a format that prepare reads
  /help              show this text
  /quit, Ctrl-D      quit; Ctrl-C stops a reply, or clears the line"""


def run(settings: ChatSettings, output: Output) -> None:
    """Reply to the prompt, or else start an interactive chat."""
    if settings.prompt is None:
        _run_session(settings, output)
        return
    model = load_model(settings, output.report)
    if isinstance(model, Labeler):
        _LabelSession(output, False, model).ask(settings.prompt)
    else:
        output.show(reply_to_prompt(model, output.report))


def format_labeling(labeling: Labeling) -> str:
    """Format a prediction on one line: classes with their probabilities, best first, a number, or each word's.

    If there may be several labels, a plus sign marks the predicted ones.
    """
    found, probabilities = labeling.prediction, labeling.probabilities
    if labeling.words is not None:
        scores = [None] * len(found) if probabilities is None else probabilities
        items = [item for item in zip(labeling.words, found, scores, strict=True) if item[1] is not None]
        return "  ".join(
            f"{word} {format_label(label)}{'' if score is None else f' {score:.2f}'}" for word, label, score in items
        )
    if not isinstance(probabilities, dict):
        return format_label(found)
    chosen = found if isinstance(found, list) else []
    best = sorted(probabilities.items(), key=lambda item: -item[1])
    shown = [f"{'+' if label in chosen else ''}{label} {value:.2f}" for label, value in best[:MAX_CLASSES]]
    return "  ".join([*shown, f"and {len(best) - MAX_CLASSES:,} more"] if best[MAX_CLASSES:] else shown)


def _run_session(settings: ChatSettings, output: Output) -> None:
    if sys.stdin is None:
        raise SettingsError("standard input is closed", hint="use --prompt to pass a message")
    is_terminal = sys.stdin.isatty()
    if output.json and is_terminal:
        raise SettingsError(
            "--json: an interactive chat prints text",
            hint="use --prompt to pass a message, or pipe messages to standard input, one per line",
        )
    model = load_model(settings, output.report)
    session: _ChatSession | _LabelSession
    if isinstance(model, Chatter):
        session = _ChatSession(output, is_terminal, model)
    else:
        session = _LabelSession(output, is_terminal, model)
    if not is_terminal:
        _reply_to_lines(session)
        return
    session.greet()
    while not session.is_over:
        text = session.read_line()
        if text is None or text.strip() in QUIT:
            return
        try:
            if text.startswith("/") and not text.startswith("//"):
                session.run_command(*text[1:].split(maxsplit=1))
            elif text.strip():
                session.ask(text.removeprefix("/") if text.startswith("//") else text)
        except T5TuneError as error:
            if isinstance(error, WriteError):  # a reply that can't be printed ends the chat
                raise
            print_error(error)


def _reply_to_lines(session: "_Session") -> None:
    """Reply to each line of piped input. No line is a command: data may contain any text."""
    num_empty = 0
    while (text := session.read_line()) is not None:
        if text.strip():
            session.ask(text)
        else:
            num_empty += 1
    if num_empty:
        session.output.report(Note(f"skipped {format_count(num_empty, 'empty line')} of standard input"))
    if num_unsaved := session.num_unsaved:
        session.output.report(Note(f"{format_count(num_unsaved, 'choice')} not saved: both replies were the same"))


@dataclass
class _Session(ABC):
    """A terminal or a pipe that gives lines."""

    output: Output
    interactive: bool
    is_over: bool = field(default=False, init=False)
    num_unsaved: int = field(default=0, init=False)  # choices of a pipe between two equal replies
    console: Console = field(default_factory=StderrConsole, init=False)

    @abstractmethod
    def ask(self, text: str) -> None:
        """Answer a line."""

    def read_line(self, prompt: str = "you: ") -> str | None:
        """Read the user's next line; None at the end of input. A terminal has line editing and a history."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        with suppress(ImportError):  # some Python builds lack readline; then there is no line editing
            import readline  # noqa: F401 (importing it adds line editing to `input`)
        if self.console.color_system and not self.console.no_color:  # NO_COLOR doesn't change color_system
            name = prompt.rstrip()
            prompt = f"\001\033[1;32m\002{name}\001\033[0m\002 "  # readline: \001…\002 encloses text without width
        while True:
            try:
                return input(prompt)
            except EOFError:
                self.console.print()
                return None
            except KeyboardInterrupt as interrupt:
                with suppress(OSError):  # the terminal may be closed
                    self.console.print()
                if interrupt.args:  # SIGTERM or SIGHUP, which arrive as KeyboardInterrupt with their number
                    raise
                self.say("/quit or Ctrl-D quits")

    def say(self, text: str) -> None:
        """Print a line to stderr, on a terminal only."""
        if self.interactive:
            self.console.print(Text(text, "dim"))


@dataclass
class _LabelSession(_Session):
    """A model that labels each line by itself."""

    labeler: Labeler

    def greet(self) -> None:
        self.say("Type a text to get its labels; begin with // to send a slash; /quit or Ctrl-D quits.")

    def ask(self, text: str) -> None:
        labeling = self.labeler.label(text)
        if self.output.json:
            self.output.print_json(labeling)
        else:
            self.output.print(format_labeling(labeling))
        self.labeler.report_cuts(labeling, self.output.report)

    def run_command(self, name: str = "", value: str = "") -> None:
        problem = f"/{name}: {self.labeler.settings.model_name_or_path} predicts labels"
        raise SettingsError(problem, hint="/quit is the only command; // sends a slash")


@dataclass
class _ChatSession(_Session):
    """The conversation so far, and the model that replies."""

    chatter: Chatter
    turns: list[Turn] = field(default_factory=list)
    keeps_history: bool | None = None  # set by /history; None: as the model was trained

    def greet(self) -> None:
        self.say("Type a message; /help lists the commands, /quit or Ctrl-D quits.")
        if not self.chatter.prompts.keeps_history:
            self.say("/history on includes earlier messages")

    def ask(self, text: str) -> None:
        """Reply to a message and keep both turns; neither is kept if Ctrl-C stops the reply."""
        turns = [*self.turns, Turn("human", text)]
        file = self.chatter.settings.save_preferences
        try:
            reply = self._reply(turns, "model")[0] if file is None else self._compare_replies(turns, file)
        except KeyboardInterrupt as interrupt:
            with suppress(WriteError):  # the terminal may be closed
                self.output.print("")
            if interrupt.args or not self.interactive:  # SIGTERM or SIGHUP
                raise
            self.say("stopped; the message was removed")
            return
        self.turns = [*turns, Turn("assistant", reply)]

    def _reply(self, turns: list[Turn], *names: str) -> list[str]:
        results = [self._print_reply(turns, name) for name in names]
        self.chatter.report_cuts(results[0], self.output.report)  # the same for all: the model saw one prompt
        return [result.reply for result in results]

    def _print_reply(self, turns: list[Turn], name: str) -> Reply:
        """Print a reply, with --json as the object that --prompt prints, and return it."""
        if not self.interactive:
            result = self.chatter.reply(turns)
            if self.output.json:
                self.output.print_json(result)
            else:
                self.output.print(result.reply)
        else:
            self.console.print(f"[bold cyan]{name}:[/] ", end="")
            result = self.chatter.reply(turns, self._print_chunk)
            self.output.print("")
        return result

    def _compare_replies(self, turns: list[Turn], file: Path) -> str:
        """Print two replies, ask which is better, and save the pair. Return the reply to keep in the conversation."""
        replies = self._reply(turns, "reply 1", "reply 2")
        if replies[0] == replies[1]:
            self.say("both replies are the same: nothing to save")
            if not self.interactive and self._read_choice():  # a pipe has a choice after each message
                self.num_unsaved += 1
            return replies[0]
        self.say("which reply is better? 1 or 2; Enter if you can't tell")
        choice = self._read_choice()
        self.is_over = choice in QUIT
        if choice not in ("1", "2"):
            self.say("not saved; the chat continues with reply 1")
            return replies[0]
        chosen, rejected = replies if choice == "1" else reversed(replies)
        save_preference(file, self.chatter, turns, chosen, rejected)
        self.say(f"appended to {file}")
        return chosen

    def _read_choice(self) -> str:
        """Read which reply is better: 1, 2 or nothing. On a terminal, it may also be a command that quits."""
        choices = ("1", "2", "", *QUIT) if self.interactive else ("1", "2", "")
        while (choice := (self.read_line("better: ") or "").strip()) not in choices:
            if not self.interactive:
                hint = "after each message, write a line with 1 or 2, or an empty line"
                raise SettingsError(f"better: {shorten_value(choice)}: expected 1, 2 or nothing", hint=hint)
            self.say(f"{choice}: expected 1, 2 or nothing")
        return choice

    def run_command(self, name: str = "", value: str = "") -> None:
        match name:
            case "help":
                self.console.print(Text(HELP, "dim"))
            case "reset":
                self.turns = []
                self.say("conversation cleared")
            case "undo":
                self.say("removed the last message and its reply" if self.turns else "there is nothing to undo")
                self.turns = self.turns[:-2]
            case "history":
                self._set_history(value)
            case "system":
                self.chatter = self.chatter.with_system(value or None)
                self.say("system message: " + (value or self.chatter.prompts.template.system_message or "none"))
            case "template":
                self._set_template(value)
            case "adapter":
                self._set_adapter(value)
            case "save":
                self._save(value)
            case _:
                raise SettingsError(f"/{name}: no such command", hint="/help lists the commands; // sends a slash")

    def _set_history(self, value: str) -> None:
        if value not in ("on", "off", ""):
            raise SettingsError(f"/history: {value}: expected on or off", hint="/history alone shows the current state")
        if value:
            self.keeps_history = value == "on"
            self.chatter = self.chatter.with_history(self.keeps_history)
        kept = self.chatter.prompts.keeps_history
        on, off = "on: the model sees the whole conversation", "off: the model sees each message by itself"
        self.say(f"history is {on if kept else off}")

    def _set_template(self, name: str) -> None:
        if not name:
            known = ", ".join(packaged_templates.list_names("conversations"))
            raise SettingsError("/template: expected a name", hint=known)
        self.chatter = self.chatter.with_template(name)
        self.say(f"conversation template: {name}")

    def _set_adapter(self, folder: str) -> None:
        if not folder:
            raise SettingsError("/adapter: expected a folder", hint="/adapter none removes the adapter")
        adapter = None if folder == "none" else Path(read_path(folder))
        self.chatter = self.chatter.with_adapter(adapter, self.output.report)
        if self.keeps_history is not None:
            self.chatter = self.chatter.with_history(self.keeps_history)
        self.say(f"adapter: {folder}")

    def _save(self, file: str) -> None:
        if not file:
            raise SettingsError("/save: expected a file", hint="such as /save conversations.jsonl")
        if not self.turns:
            raise SettingsError("/save: the conversation is empty")
        save_conversation(Path(read_path(file)), self.turns, self.chatter.settings.system)
        self.say(f"appended to {file}")

    def _print_chunk(self, text: str) -> None:
        self.output.print(text, end="")
