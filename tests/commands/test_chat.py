"""Chat uses the conversation template of training, whether it loads a run, an adapter or a merged checkpoint."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.cli.chat import _ChatSession, run
from t5tune.cli.output import Output
from t5tune.commands.chat import Chatter, chat, save_conversation, save_preference
from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.reading.formats import Turn
from t5tune.errors import CheckpointError, SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, ExportSettings, MergeSettings, PrepareSettings, TrainSettings
from tests.support.adapters import make_stock_adapter
from tests.support.bases import make_base
from tests.support.caches import open_only
from tests.support.command_line import CommandResult, t5tune_in_fork
from tests.support.forks import ForkedProcess, get_fork_server
from tests.support.runs import LONG

PROMPT = "Hello, two tea for Mira please."


@pytest.fixture(scope="module")
def made(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, its export, and its merged checkpoint."""
    folder = tmp_path_factory.mktemp("chat")
    train(
        TrainSettings(
            model_name_or_path=str(untied_base),
            data_path=str(conversations),
            output_dir=folder / "run",
            max_steps=8,
            learning_rate=2e-2,
            use_cpu=True,
            report_samples=0,
        )
    )
    export(ExportSettings(checkpoint=folder / "run", output_dir=folder / "adapter"))
    merge(
        MergeSettings(
            model_name_or_path=str(untied_base), adapter=folder / "adapter", output_dir=folder / "merged", verify=False
        )
    )
    return {name: folder / name for name in ("run", "adapter", "merged")}


def settings(base: Path, **changes: Any) -> ChatSettings:
    return ChatSettings(model_name_or_path=str(base), max_new_tokens=12, use_cpu=True, **changes)


def test_run_adapter_and_merged_checkpoint_give_the_same_reply(made: dict[str, Path], untied_base: Path) -> None:
    replies = {
        chat(settings(untied_base, adapter=made["run"], prompt=PROMPT)).reply,
        chat(settings(untied_base, adapter=made["adapter"], prompt=PROMPT)).reply,
        chat(settings(made["merged"], prompt=PROMPT)).reply,
    }
    assert len(replies) == 1
    assert replies != {chat(settings(untied_base, prompt=PROMPT)).reply}


def test_the_source_ids_equal_those_of_training(made: dict[str, Path], untied_base: Path) -> None:
    """Both messages of the first conversation with two exchanges become the token ids that training saw."""
    cache = open_only(made["run"] / "data")
    lines = (Path(__file__).parents[2] / "examples/quickstart/train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    place = next(index for index, record in enumerate(records) if len(record["conversations"]) >= 4)
    first = sum(len(record["conversations"]) // 2 for record in records[:place])
    record = records[place]
    turns = [
        Turn("human" if entry["from"] == "human" else "assistant", entry["value"]) for entry in record["conversations"]
    ]
    chatter = Chatter.load(settings(untied_base, adapter=made["run"]))
    for example, end in ((first, 1), (first + 1, 3)):
        assert chatter.prompts.encode(turns[:end]).ids == cache[example].source_S.tolist()


@pytest.mark.parametrize("kind", ["run", "adapter", "merged"])
def test_the_chat_template_of_transformers_gives_the_source_ids_of_training(
    kind: str, made: dict[str, Path], pair_run: dict[str, Path], conversations: Path
) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(str(made[kind]))
    cache = open_only(made["run"] / "data")
    roles = {"human": "user", "gpt": "assistant"}
    sources = []
    for line in conversations.read_text().splitlines():
        record = json.loads(line)["conversations"]
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record]
        for end in range(1, len(messages), 2):
            sources.append(stock.apply_chat_template(messages[:end], add_generation_prompt=True)["input_ids"])
    assert len(sources) > 24  # some conversations have several exchanges
    assert sources == [example.source_S.tolist() for example in cache]
    with_prefix = AutoTokenizer.from_pretrained(str(pair_run[kind]))
    messages = [{"role": "user", "content": "the lamp of Ada is red"}]
    ids = with_prefix.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == open_only(pair_run["run"] / "data")[0].source_S.tolist()


def test_a_message_is_normalized_as_in_training(made: dict[str, Path]) -> None:
    chatter = Chatter.load(settings(made["merged"], system="Be\r\nbrief."))
    typed, clean = ([Turn("human", text)] for text in ("two\r\n\u200btea", "two\ntea"))
    assert chatter.reply(typed).source_tokens == chatter.with_system("Be\nbrief.").reply(clean).source_tokens


@pytest.mark.parametrize("empty", ["", "\u200b"])
def test_an_empty_system_message_is_none_as_in_training(empty: str, made: dict[str, Path]) -> None:
    prompts, turns = Chatter.load(settings(made["merged"])).prompts, [Turn("human", PROMPT)]
    assert prompts.template.system_message
    assert prompts.encode(turns, empty) == prompts.encode(turns)


def test_sampling_follows_the_seed(made: dict[str, Path]) -> None:
    ask = {"prompt": PROMPT, "temperature": 1.5}
    first, again, other = (chat(settings(made["merged"], **ask, seed=seed)).reply for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_leaves_the_random_generators_of_a_script_as_they_were(made: dict[str, Path]) -> None:
    chatter = Chatter.load(settings(made["merged"], temperature=1.5, seed=1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (chatter.reply(PROMPT).reply for _ in range(2))
    assert first != second
    assert torch.get_rng_state().equal(before)
    assert first == chat(settings(made["merged"], prompt=PROMPT, temperature=1.5, seed=1)).reply


def test_a_text_is_a_conversation_of_one_message(made: dict[str, Path]) -> None:
    chatter = Chatter.load(settings(made["merged"]))
    assert chatter.reply(PROMPT).reply == chatter.reply([Turn("human", PROMPT)]).reply


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ([], r"^message: \[\]; expected a text, or a list such as \[Turn\("),
        (None, "^message: None; expected"),
        (["Hello"], r"^message\[0\]: 'Hello'; expected"),
        ([Turn("human", "a"), Turn("gpt", "b"), Turn("human", "c")], r"^message\[1\]: Turn\(role='gpt', text='b'"),  # type: ignore[arg-type]
        ([Turn("human", 5)], r"^message\[0\]: Turn\(role='human', text=5"),  # type: ignore[arg-type]
        ([Turn("human", "a"), Turn("assistant", "b")], "^message: the last turn is the assistant's"),
    ],
)
def test_what_is_not_a_conversation_is_refused(message: Any, said: str, made: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match=said):
        Chatter.load(settings(made["merged"])).reply(message)


def test_chat_without_a_prompt_names_the_function_for_conversations() -> None:
    with pytest.raises(SettingsError, match=r"^prompt: missing; set it, or use Chatter\.load\(…\) for a conversation$"):
        chat(ChatSettings(model_name_or_path="pocket"))


def test_a_quantized_base_replies(made: dict[str, Path], untied_base: Path) -> None:
    assert chat(settings(untied_base, adapter=made["run"], prompt=PROMPT, q_lora=True)).reply_tokens > 0


class Typed(io.StringIO):
    """What is typed on a terminal: nothing, and the end of input."""

    def isatty(self) -> bool:
        return True


def chat_in_fork(model: Path, *flags: object, stdin: str) -> CommandResult:
    return t5tune_in_fork("chat", "--model-name-or-path", model, *flags, stdin=stdin.encode())


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


@pytest.mark.slow
def test_a_pipe_gets_one_reply_per_line_even_if_it_looks_like_a_command(made: dict[str, Path], tmp_path: Path) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with contextlib.suppress(OSError):  # how a closed terminal reports its end
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
    session = _ChatSession(None, Output(io.StringIO()), interactive=True)  # type: ignore[arg-type]
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


@pytest.mark.slow
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
    with contextlib.suppress(OSError):  # how a closed terminal reports its end
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert re.search(rb"\r\n(\x1b\[\?25h)?interrupted\r\n$", shown)
    assert b"Traceback" not in shown


@pytest.mark.long
@pytest.mark.slow
def test_closing_the_terminal_ends_the_chat(untied_base: Path) -> None:
    with chat_on_a_terminal(untied_base) as (process, ours, theirs):
        os.close(theirs)
        read_until(b"you:", process, ours)
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP


@pytest.mark.long
@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.slow
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


@pytest.mark.slow
def test_input_that_is_not_utf_8_is_refused(made: dict[str, Path]) -> None:
    done = t5tune_in_fork("chat", "--model-name-or-path", made["merged"], stdin=b"Gr\xfc\n")
    assert done.code == 2
    assert r"error: message: contains bytes that aren't valid UTF-8: '\udcfc'; type UTF-8" in done.stderr


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
        PROMPT,  # with the adapter: --model-name-or-path names the run
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


def test_prepare_reads_a_saved_conversation(tmp_path: Path) -> None:
    turns = [Turn("human", "Tea?"), Turn("assistant", "Yes,\n{}")]
    save_conversation(tmp_path / "said.jsonl", turns, None)
    save_conversation(tmp_path / "said.jsonl", turns, "Be kind.")
    made = prepare(
        PrepareSettings(
            model_name_or_path="pocket", data_path=str(tmp_path / "said.jsonl"), output_dir=tmp_path / "cache"
        )
    )
    assert (made.conversations, made.rejected, made.examples) == (2, 0, 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nonsense", "/nonsense: no such command"),
        ("/template nowhere", "conversation_template: nowhere"),
        ("/adapter nowhere", "nowhere"),
        ("/save nowhere/said.jsonl", "/save: the conversation is empty"),
    ],
)
def test_a_wrong_command_gets_a_one_line_error_and_the_chat_goes_on(
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"d_model": 16}, "the base's weight is"), ({"num_layers": 3}, "has no LoRA matrices"), ({"num_layers": 1}, "")],
    ids=["another width", "more layers", "fewer layers"],
)
def test_an_adapter_of_another_base_is_refused(
    changes: dict[str, int], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT alone would load the tensors that fit, and reply with half an adapter."""
    other = make_base(tmp_path / "base", tied=False, **changes)
    with pytest.raises(CheckpointError, match=said or "doesn't exist in the base") as refused:
        Chatter.load(settings(other, adapter=made["adapter"]))
    assert str(made["adapter"]) in refused.value.message


def test_without_its_adapter_a_base_is_still_of_the_family_of_training(untied_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(untied_base, tmp_path / "base")
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    metadata = {"format": "pt", "t5tune": json.dumps({"family": "flan-t5"})}  # of train --family flan-t5
    save_file(weights, adapter / "adapter_model.safetensors", metadata)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "strange_t5"}))
    session = _ChatSession(Chatter.load(settings(adapter)), Output(io.StringIO()), interactive=False)
    session.run_command("adapter", "none")
    assert session.chatter.reply(PROMPT).reply == chat(settings(untied_base, prompt=PROMPT)).reply
    session.run_command("adapter", "none")
    session.run_command("adapter", str(adapter))
    assert session.chatter.reply(PROMPT).reply == chat(settings(adapter, prompt=PROMPT)).reply


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta device"])
def test_a_device_that_does_not_exist_is_refused(made: dict[str, Path], device: str) -> None:
    with pytest.raises(SettingsError, match=f"device: {device}"):
        Chatter.load(ChatSettings(model_name_or_path=str(made["merged"]), device=device))


@pytest.fixture(scope="module")
def pair_run(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on source/target pairs with a source prefix, its export, and its merged checkpoint."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [{"source": f"the lamp of {name} is red", "target": f"{name}: red"} for name in ("Ada", "Mira", "Otto")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 4)))
    values = {"model_name_or_path": str(untied_base), "data_path": str(folder / "pairs.jsonl")}
    shaped = {"source_prefix": "shorten: ", "conversation_template": "plain", "max_steps": 8, "learning_rate": 2e-2}
    train(TrainSettings(**values, **shaped, output_dir=folder / "run", use_cpu=True, report_samples=0))
    export(ExportSettings(checkpoint=folder / "run", output_dir=folder / "adapter"))
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=folder / "adapter", output_dir=folder / "merged"))
    return {name: folder / name for name in ("run", "adapter", "merged")}


@pytest.mark.parametrize("kind", ["run", "adapter", "merged"])
def test_earlier_messages_are_ignored_after_training_on_single_pairs(kind: str, pair_run: dict[str, Path]) -> None:
    notes: list[Event] = []
    chatter = Chatter.load(settings(pair_run[kind]), notes.append)
    assert sum("earlier messages are ignored" in note.text for note in notes if isinstance(note, Note)) == 1
    turns = [Turn("human", "the lamp of Mira is red"), Turn("assistant", "Mira: red"), Turn("human", PROMPT)]
    alone, in_context = chatter.reply(turns[-1:]), chatter.reply(turns)
    assert alone.reply == in_context.reply
    assert alone.source_tokens == in_context.source_tokens
    assert chatter.with_history(True).reply(turns).source_tokens > alone.source_tokens
    # the prefix of training is added, unless the message has it already or the settings name another
    assert chatter.reply([Turn("human", f"shorten: {PROMPT}")]).source_tokens == alone.source_tokens
    bare = Chatter.load(settings(pair_run[kind], source_prefix=""))
    assert bare.reply(turns[-1:]).source_tokens < alone.source_tokens


@pytest.mark.slow
def test_without_history_three_messages_in_one_chat_get_the_replies_of_three_chats(pair_run: dict[str, Path]) -> None:
    questions = [f"the lamp of {name} is red" for name in ("Otto", "Ada", "Mira")]
    done = chat_in_fork(pair_run["merged"], "--max-new-tokens", 12, stdin="\n".join(questions) + "\n")
    assert done.code == 0, done.stderr
    alone = [chat(settings(pair_run["merged"], prompt=question)).reply for question in questions]
    assert done.stdout.splitlines() == alone
    assert "earlier messages are ignored" in done.stderr
    assert "each message is prefixed with 'shorten: ', as in training" in done.stderr


def test_what_the_model_does_not_see_of_a_conversation_is_reported(
    untied_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    plain = settings(untied_base, model_max_length=16, conversation_template="plain")
    reply = chat(plain.model_copy(update={"prompt": PROMPT * 9}), events.append)
    whole = chat(plain.model_copy(update={"prompt": PROMPT * 9, "model_max_length": 4096}), events.append)
    assert (reply.source_tokens, reply.cut_tokens) == (15, whole.source_tokens - 15)
    assert (reply.dropped_turns, whole.cut_tokens, whole.dropped_turns) == (0, 0, 0)
    problem = "too long for model_max_length 16: the model didn't see"
    advice = "shorten it, or raise model_max_length"
    too_long = f"the message is {problem} {reply.cut_tokens} tokens of it or of the system message; {advice}"
    assert [event for event in events if isinstance(event, Note) and "see" in event.text] == [Note(too_long, True)]

    shown = io.StringIO()
    output = Output(shown, json=True)
    monkeypatch.setattr(output, "report", events.append)
    session = _ChatSession(Chatter.load(plain), output, interactive=False)
    session.turns = [Turn("human", PROMPT), Turn("assistant", PROMPT)]
    session.ask("Tea?")
    assert events[-1] == Note(f"the conversation is {problem} the oldest 2 turns")
    assert (json.loads(shown.getvalue())["dropped_turns"], json.loads(shown.getvalue())["cut_tokens"]) == (2, 0)
    session.run_command("history", "off")  # without history nothing is expected of earlier turns
    seen = list(events)
    session.ask("Tea?")
    assert events == seen


def test_history_is_kept_after_training_on_conversations_and_can_be_switched(
    made: dict[str, Path], pair_run: dict[str, Path]
) -> None:
    assert Chatter.load(settings(made["merged"])).prompts.keeps_history
    session = _ChatSession(Chatter.load(settings(pair_run["run"])), Output(io.StringIO()), interactive=False)
    assert not session.chatter.prompts.keeps_history
    session.run_command("history", "on")
    assert session.chatter.prompts.keeps_history
    session.run_command("adapter", str(pair_run["adapter"]))
    assert session.chatter.prompts.keeps_history
    session.run_command("history", "off")
    assert not session.chatter.prompts.keeps_history
    with pytest.raises(SettingsError, match="/history: maybe: expected on or off"):
        session.run_command("history", "maybe")


def test_a_broken_training_data_json_is_refused_with_the_wrong_key(pair_run: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pair_run["merged"], tmp_path / "merged")
    path = folder / "training_data.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": 9}, "format 9; this version of t5tune reads format 1"),
        ({"has_earlier_turns": "yes"}, "has_earlier_turns: invalid value 'yes'"),
        ({"source_prefix": None}, "source_prefix: invalid value None"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            Chatter.load(settings(folder))


def test_a_prefix_that_no_record_got_is_reported_and_not_used(
    conversations: Path, untied_base: Path, tmp_path: Path
) -> None:
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    notes: list[Event] = []
    prepare(PrepareSettings(**values, source_prefix="shorten: "), notes.append)
    texts = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert "source_prefix: 'shorten: ' has no effect: no record is a source/target pair" in texts
    assert json.loads((tmp_path / "cache" / "training_data.json").read_text())["source_prefix"] == ""


class TestPreferences:
    """Two replies are sampled, the better one is chosen, and the pair is appended to a file that prepare reads."""

    def run(self, made: dict[str, Path], file: Path, lines: list[str], *options: str) -> CommandResult:
        typed = "".join(f"{line}\n" for line in lines).encode()
        arguments = ["chat", made["run"], "--use-cpu", "--max-new-tokens=12", f"--save-preferences={file}", *options]
        return t5tune_in_fork(*arguments, stdin=typed)

    def test_the_chosen_reply_is_saved_as_such(self, made: dict[str, Path], tmp_path: Path) -> None:
        file = tmp_path / "pairs.jsonl"
        done = self.run(made, file, [PROMPT, "1", PROMPT, "2", PROMPT, ""])
        assert done.code == 0, done.stderr
        replies = done.stdout.splitlines()
        assert len(replies) == 6
        assert len({*replies}) > 2  # sampled
        asked, chosen = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": replies[0]}
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            {"prompt": PROMPT, "chosen": replies[0], "rejected": replies[1]},
            {"messages": [asked, chosen, asked], "chosen": replies[3], "rejected": replies[2]},
        ]
        cache = tmp_path / "cache"
        settings = {"model_name_or_path": "pocket", "data_path": str(file), "output_dir": cache}
        prepare(PrepareSettings(**settings, objective="dpo"))
        assert len(open_only(cache)) == 2

    def test_a_pipe_has_a_choice_after_each_message_even_if_both_replies_are_the_same(
        self, made: dict[str, Path], tmp_path: Path
    ) -> None:
        file = tmp_path / "pairs.jsonl"
        greedy = "--top-p=0.000001"  # keeps the likeliest token only
        done = self.run(made, file, [PROMPT, "1", PROMPT, "", PROMPT, "2"], greedy)
        assert done.code == 0, done.stderr
        chatter, turns, shown = Chatter.load(settings(made["run"])), list[Turn](), list[str]()
        for _ in range(3):
            turns.append(Turn("human", PROMPT))
            turns.append(Turn("assistant", chatter.reply(turns).reply))
            shown += [turns[-1].text] * 2
        assert done.stdout.splitlines() == shown
        assert done.stderr.endswith("\n2 choices not saved: both replies were the same\n")
        assert "skipped" not in done.stderr
        assert not file.exists()

        done = self.run(made, file, [PROMPT, PROMPT], greedy)
        assert done.code == 2
        assert f"better: {PROMPT!r}: expected 1, 2 or nothing" in done.stderr

    @pytest.mark.parametrize("line", [PROMPT, "/quit"])
    def test_a_piped_line_that_is_no_choice_is_refused(self, line: str, made: dict[str, Path], tmp_path: Path) -> None:
        done = self.run(made, tmp_path / "pairs.jsonl", [PROMPT, line, "1"])
        assert done.code == 2
        hint = "after each message, write a line with 1 or 2, or an empty one"
        assert done.errors == [f"error: better: {line!r}: expected 1, 2 or nothing; {hint}"]

    def test_what_was_cut_off_is_reported_once_for_both_replies(self, made: dict[str, Path], tmp_path: Path) -> None:
        lines = [PROMPT * 9, "1", PROMPT * 9, "2"]
        done = self.run(made, tmp_path / "pairs.jsonl", lines, "--model-max-length=64")
        assert done.code == 0, done.stderr
        assert len(done.stdout.splitlines()) == 4
        assert done.stderr.count("the message is too long for model_max_length 64") == 2
        assert done.stderr.count("the conversation is too long for model_max_length 64") == 1

    def test_what_the_model_has_seen_is_saved(self, made: dict[str, Path], tmp_path: Path) -> None:
        chatter = Chatter.load(settings(made["run"], system="Be brief.", source_prefix="not saved: "))
        turns = [Turn("human", "Hi"), Turn("assistant", "Hello"), Turn("human", "And?")]
        for keeps_history in (True, False):
            save_preference(tmp_path / "x.jsonl", chatter.with_history(keeps_history), turns, "a", "b")
        system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}
        before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        found = [json.loads(line)["messages"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        assert found == [[system, *before, asked], [system, asked]]

    def test_settings_that_leave_nothing_to_choose_are_refused(self, tmp_path: Path) -> None:
        for changes, problem in (({"prompt": "Hi"}, "leave out prompt"), ({"temperature": 0}, "the same reply twice")):
            with pytest.raises(SettingsError, match=problem):
                settings(tmp_path, save_preferences=tmp_path / "x", **changes)

    def test_a_file_that_cannot_be_written_ends_the_chat_in_one_line(
        self, made: dict[str, Path], tmp_path: Path
    ) -> None:
        done = self.run(made, tmp_path / "no" / "x.jsonl", [PROMPT, "1"])
        assert done.code == 2
        assert done.errors == [
            f"error: {tmp_path}/no/x.jsonl: No such file or directory; name a file in a folder that exists"
        ]
