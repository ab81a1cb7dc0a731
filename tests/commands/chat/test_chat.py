"""Chat uses the conversation template of training, whether it loads a run, an adapter or a merged checkpoint."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.cli.chat import _ChatSession
from t5tune.cli.output import Output
from t5tune.commands.chat import Chatter, chat, save_conversation, save_preference
from t5tune.commands.prepare import prepare
from t5tune.data.reading.formats import Turn
from t5tune.errors import CheckpointError, SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, PrepareSettings
from tests.commands.chat.typed import PROMPT, chat_in_fork, settings
from tests.support.caches import open_only
from tests.support.models.adapters import make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

pytestmark = pytest.mark.slow


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
    lines = (REPOSITORY / "examples/quickstart/train.jsonl").read_text().splitlines()
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
def test_the_chat_template_gives_the_source_ids_of_training(
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


def test_sampling_leaves_a_scripts_random_generators_unchanged(made: dict[str, Path]) -> None:
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
        ([], r"^message: \[\]; give a text, or a list such as \[Turn\("),
        (None, "^message: None; give a text"),
        (["Hello"], r"^message\[0\]: 'Hello'; give a text"),
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


def test_a_base_without_its_adapter_keeps_the_trained_family(untied_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(untied_base, tmp_path / "base")
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    metadata = {"format": "pt", "t5tune": json.dumps({"family": "flan-t5"})}  # of train --family flan-t5
    save_file(weights, adapter / "adapter_model.safetensors", metadata)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "strange_t5"}))
    session = _ChatSession(Output(io.StringIO()), False, Chatter.load(settings(adapter)))
    session.run_command("adapter", "none")
    assert session.chatter.reply(PROMPT).reply == chat(settings(untied_base, prompt=PROMPT)).reply
    session.run_command("adapter", "none")
    session.run_command("adapter", str(adapter))
    assert session.chatter.reply(PROMPT).reply == chat(settings(adapter, prompt=PROMPT)).reply


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
    # the prefix of training is added, unless the message has it already or the settings name a different prefix
    assert chatter.reply([Turn("human", f"shorten: {PROMPT}")]).source_tokens == alone.source_tokens
    bare = Chatter.load(settings(pair_run[kind], source_prefix=""))
    assert bare.reply(turns[-1:]).source_tokens < alone.source_tokens


def test_chat_without_history_replies_like_separate_chats(pair_run: dict[str, Path]) -> None:
    questions = [f"the lamp of {name} is red" for name in ("Otto", "Ada", "Mira")]
    done = chat_in_fork(pair_run["merged"], "--max-new-tokens", 12, stdin="\n".join(questions) + "\n")
    assert done.code == 0, done.stderr
    alone = [chat(settings(pair_run["merged"], prompt=question)).reply for question in questions]
    assert done.stdout.splitlines() == alone
    assert "earlier messages are ignored" in done.stderr
    assert "each message is prefixed with 'shorten: ', as in training" in done.stderr


def test_chat_reports_text_that_the_model_does_not_see(untied_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    session = _ChatSession(output, False, Chatter.load(plain))
    session.turns = [Turn("human", PROMPT), Turn("assistant", PROMPT)]
    session.ask("Tea?")
    assert events[-1] == Note(f"the conversation is {problem} the oldest 2 turns")
    assert (json.loads(shown.getvalue())["dropped_turns"], json.loads(shown.getvalue())["cut_tokens"]) == (2, 0)
    session.run_command("history", "off")  # without history, no note is about earlier turns
    seen = list(events)
    session.ask("Tea?")
    assert events == seen


def test_chat_keeps_history_after_training_on_conversations(made: dict[str, Path], pair_run: dict[str, Path]) -> None:
    assert Chatter.load(settings(made["merged"])).prompts.keeps_history
    session = _ChatSession(Output(io.StringIO()), False, Chatter.load(settings(pair_run["run"])))
    assert not session.chatter.prompts.keeps_history
    session.run_command("history", "on")
    assert session.chatter.prompts.keeps_history
    session.run_command("adapter", str(pair_run["adapter"]))
    assert session.chatter.prompts.keeps_history
    session.run_command("history", "off")
    assert not session.chatter.prompts.keeps_history
    with pytest.raises(SettingsError, match="/history: maybe: expected on or off"):
        session.run_command("history", "maybe")


def test_an_unused_prefix_is_reported_and_not_applied(conversations: Path, untied_base: Path, tmp_path: Path) -> None:
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

    def test_a_pipe_reads_a_choice_after_each_message(self, made: dict[str, Path], tmp_path: Path) -> None:
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
        hint = "after each message, write a line with 1 or 2, or an empty line"
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

    def test_a_file_that_cannot_be_written_ends_the_chat(self, made: dict[str, Path], tmp_path: Path) -> None:
        done = self.run(made, tmp_path / "no" / "x.jsonl", [PROMPT, "1"])
        assert done.code == 2
        assert done.errors == [
            f"error: {tmp_path}/no/x.jsonl: No such file or directory; name a file in a folder that exists"
        ]
