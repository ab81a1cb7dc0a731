"""Interactive chats in a terminal and in a pipe: lines, keys, signals and commands."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5tune.cli.chat import _ChatSession, run
from t5tune.cli.output import Output
from t5tune.commands.chat import Chatter, chat
from t5tune.data.reading.formats import Turn
from t5tune.errors import SettingsError
from t5tune.settings import ChatSettings
from tests.commands.chat.typed import PROMPT, chat_in_fork, settings
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.forks import ForkedProcess, get_fork_server
from tests.support.processes.runs import LONG

pytestmark = pytest.mark.slow


class Typed(io.StringIO):
    """What is typed on a terminal: nothing, and the end of input."""

    def isatty(self) -> bool:
        return True


def chat_on_typed_lines(
    model: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, max_new_tokens: int = 12
) -> list[str]:
    """Chat as on a terminal, and return the replies."""
    typed = iter([*lines, "/quit"])
    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    replies = io.StringIO()
    run(ChatSettings(model_name_or_path=str(model), max_new_tokens=max_new_tokens, use_cpu=True), Output(replies))
    return replies.getvalue().splitlines()


def test_a_pipe_gets_one_reply_per_line_even_for_commands(made: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    lines = [PROMPT, "", "/help", "/etc/hosts?", "//x", f"/save {saved}", " ", "/quit", "/reset", PROMPT]
    done = chat_in_fork(made["merged"], "--max-new-tokens", 3, "--use-cpu", stdin="\n".join(lines))
    assert done.code == 0, done.stderr
    chatter = Chatter.load(settings(made["merged"]).replace(max_new_tokens=3))
    turns: list[Turn] = []
    for line in filter(str.strip, lines):
        turns.append(Turn("human", line))
        turns.append(Turn("assistant", chatter.reply(turns).reply))
    assert done.stdout == "".join(f"{turn.text}\n" for turn in turns[1::2])
    assert done.stderr.endswith("skipped 2 empty lines of standard input\n")
    assert not saved.exists()


def test_a_pipe_gets_one_object_per_line_with_json(pair_run: dict[str, Path]) -> None:
    flags = ("--max-new-tokens", 3, "--use-cpu", "--json")
    done = chat_in_fork(pair_run["merged"], *flags, stdin=f"{PROMPT}\n{PROMPT}\n")
    assert done.code == 0, done.stderr
    with_prompt = chat_in_fork(pair_run["merged"], *flags, "--prompt", PROMPT, stdin="").json
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    first = {**with_prompt, "seconds": 0}
    assert [{**reply, "seconds": 0} for reply in replies] == [first, {**first, "dropped_turns": 2}]


def test_json_is_refused_on_a_terminal(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Typed())
    with pytest.raises(SettingsError, match="^--json: an interactive chat prints text; use --prompt"):
        run(settings(made["merged"]), Output(io.StringIO(), json=True, quiet=True))


def test_a_terminal_has_editing_keys_and_input_history(made: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    saved = tmp_path / "said.jsonl"
    typed = f"{PROMPT[1:]}\x01{PROMPT[0]}\n\x1b[A\n/save {saved}\n/quit\n"  # Ctrl-A, arrow up
    ours, theirs = pty.openpty()
    command = ["-m", "t5tune", "chat", "--model-name-or-path", str(made["merged"]), "--max-new-tokens", "3"]
    chatting = get_fork_server().start_on_terminal(command, theirs, {**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    for line in typed.splitlines(keepends=True):
        while b"you:" not in shown:
            shown += os.read(ours, 4096)
        shown = b""
        os.write(ours, line.encode())
    with contextlib.suppress(OSError):  # reading a closed terminal raises it
        while os.read(ours, 4096):
            pass
    assert chatting.wait(60) == 0
    os.close(ours)
    (record,) = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [entry["value"] for entry in record["conversations"][::2]] == [PROMPT, PROMPT]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_leaves_the_prompt_without_color(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": no_color}.items():
        monkeypatch.setenv(name, value)
    prompts: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or "")
    session = _ChatSession(Output(io.StringIO()), True, None)  # type: ignore[arg-type]
    session.read_line()
    assert prompts == ["you: " if no_color else "\001\033[1;32m\002you:\001\033[0m\002 "]


@contextlib.contextmanager
def chat_on_a_terminal(model: Path) -> Iterator[tuple[ForkedProcess, int, int]]:
    """A chat whose replies hardly end. Yields its process and both ends of its terminal, the user's first."""
    ours, theirs = pty.openpty()
    command = ["-m", "t5tune", "chat", "--model-name-or-path", str(model), "--use-cpu", "--max-new-tokens", "100000"]
    # only closing a controlling terminal sends SIGHUP
    process = get_fork_server().start_on_terminal(command, theirs, {**os.environ, "TERM": "xterm"})
    try:
        yield process, ours, theirs
    finally:
        process.kill()
        process.wait()


def read_until(pattern: bytes, process: ForkedProcess, terminal: int) -> None:
    """Read what the process shows on its terminal until it matches the pattern."""
    shown = b""
    while not re.search(pattern, shown, re.DOTALL):
        assert process.poll() is None, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096)


def wait_until_it_sleeps(process: ForkedProcess) -> None:
    """Wait until the process reads its input. Python's readline misses a signal that comes shortly before."""
    deadline = time.monotonic() + 100
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP] if LONG else [signal.SIGTERM])
@pytest.mark.parametrize("during", ["input", "a reply"])
@pytest.mark.variants("a reply-15")
def test_a_signal_ends_the_chat_and_restores_the_terminal(
    untied_base: Path, number: signal.Signals, during: str
) -> None:
    with chat_on_a_terminal(untied_base) as (process, ours, theirs):
        before = termios.tcgetattr(theirs)
        read_until(b"you:", process, ours)
        wait_until_it_sleeps(process)
        assert termios.tcgetattr(theirs) != before
        if during == "a reply":
            os.write(ours, PROMPT.encode() + b"\n")
            read_until(rb"model:.* \w", process, ours)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # reading a closed terminal raises it
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert re.search(rb"\r\n(\x1b\[\?25h)?interrupted\r\n$", shown)
    assert b"Traceback" not in shown


@pytest.mark.long
def test_closing_the_terminal_ends_the_chat(untied_base: Path) -> None:
    with chat_on_a_terminal(untied_base) as (process, ours, theirs):
        os.close(theirs)
        read_until(b"you:", process, ours)
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP


@pytest.mark.long
def test_a_reply_that_cannot_be_printed_ends_an_interactive_chat(untied_base: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "t5tune", "chat", "--model-name-or-path", str(untied_base), "--use-cpu"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stdin=theirs, stdout=full, stderr=subprocess.PIPE, text=True)
    os.write(ours, PROMPT.encode() + b"\n" + PROMPT.encode() + b"\n")
    _, errors = process.communicate(timeout=100)
    os.close(theirs)
    os.close(ours)
    assert (process.returncode, errors.count("standard output: can't be written")) == (1, 1)


def test_control_c_clears_the_line_or_stops_the_reply(untied_base: Path) -> None:
    with chat_on_a_terminal(untied_base) as (process, ours, theirs):
        os.close(theirs)
        read_until(b"you:", process, ours)
        os.write(ours, b"some text")
        read_until(b"some text", process, ours)
        wait_until_it_sleeps(process)
        os.write(ours, b"\x03")
        read_until(b"/quit or Ctrl-D quits.*you:", process, ours)
        os.write(ours, PROMPT.encode() + b"\n")
        read_until(rb"model:.* \w", process, ours)
        os.write(ours, b"\x03")
        read_until(b"stopped; the message was removed.*you:", process, ours)
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
    os.close(ours)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] if LONG else [signal.SIGHUP])
def test_a_signal_ends_a_chat_with_a_prompt(untied_base: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "t5tune", "chat", "--model-name-or-path", str(untied_base), "--use-cpu"]
    process = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-new-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"no conversation template" in process.stderr.readline()  # the last line before the reply
    process.send_signal(number)
    reply, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert errors.decode().splitlines() == ["interrupted"]
    assert not reply


def test_input_that_is_not_utf_8_is_refused(made: dict[str, Path]) -> None:
    done = t5tune_in_fork("chat", "--model-name-or-path", made["merged"], stdin=b"Gr\xfc\n")
    assert done.code == 2
    assert r"error: message: contains bytes that aren't valid UTF-8: '\udcfc'; use a UTF-8 locale" in done.stderr


def test_a_word_that_is_too_long_is_refused(untied_base: Path) -> None:
    with pytest.raises(SettingsError, match="^message: a word of 100,001 characters, more than 100,000$"):
        chat(settings(untied_base, prompt="x" * 100_001))


def test_a_reply_is_shown_piece_by_piece(made: dict[str, Path]) -> None:
    chatter = Chatter.load(settings(made["merged"]))
    pieces: list[str] = []
    answer = chatter.reply([Turn("human", PROMPT)], pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces) == answer.reply


def test_chat_commands_change_the_replies(
    made: dict[str, Path], untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands give the same replies as the library function with those settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [
        PROMPT,  # the adapter is used: --model-name-or-path names the run
        "/undo",
        "//" + PROMPT,  # a message that begins with a slash
        "/save ~/said.jsonl",
        "/reset",
        "/system Be kind.",
        PROMPT,
        f"/save {tmp_path / 'said.jsonl'}",
        "/reset",
        "/system",
        "/template plain",
        PROMPT,
        "/reset",
        "/adapter none",
        "/template plain",
        PROMPT,
    ]
    # the run stores its base's path as it was given
    found = chat_on_typed_lines(made["run"], lines, monkeypatch, max_new_tokens=5)

    def reply(prompt: str, **changes: Any) -> str:
        asked = ChatSettings(model_name_or_path=str(untied_base), max_new_tokens=5, prompt=prompt, use_cpu=True)
        return chat(asked.model_copy(update={"adapter": made["run"], **changes})).reply

    replies = [
        reply(PROMPT),
        reply("/" + PROMPT),
        reply(PROMPT, system="Be kind."),
        reply(PROMPT, conversation_template="plain"),
        reply(PROMPT, conversation_template="plain", adapter=None),
    ]
    assert found == replies
    saved = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [record.get("system") for record in saved] == [None, "Be kind."]
    assert saved[0]["conversations"] == [
        {"from": "human", "value": "/" + PROMPT},
        {"from": "gpt", "value": replies[1]},
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nonsense", "/nonsense: no such command"),
        ("/template nowhere", "conversation_template: nowhere"),
        ("/adapter nowhere", "nowhere"),
        ("/save nowhere/said.jsonl", "/save: the conversation is empty"),
    ],
)
def test_a_wrong_command_gets_an_error_and_chat_continues(
    made: dict[str, Path],
    line: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (reply,) = chat_on_typed_lines(made["merged"], [line, PROMPT], monkeypatch)
    assert reply == chat(settings(made["merged"], prompt=PROMPT)).reply
    (error,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert said in error
