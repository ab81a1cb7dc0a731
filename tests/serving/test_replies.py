"""Replies over HTTP, to the openai client, equal the replies of chat with the same model, settings and prompt."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.commands.chat import Chatter
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.serve import Server
from t5tune.compat.ctranslate2_patches import load_translator
from t5tune.data.reading.formats import Turn
from t5tune.data.tokens.tokenizer import decode_prediction, load_tokenizer
from t5tune.inference.generation import Decoding, generate
from t5tune.inference.loading import load_for_inference
from t5tune.inference.prompts import ReplyText
from t5tune.settings import ChatSettings, EvaluateSettings, MergeSettings
from t5tune.settings.groups.base import InferenceSettings
from tests.serving.conftest import StartServer
from tests.serving.raw_http import read_metrics
from tests.support.notes import Notes

pytestmark = pytest.mark.slow

ENGINES = ("transformers", "ctranslate2")
MESSAGES = [
    f"{greeting}, {count} {what} for {name} please."
    for greeting in ("Hello", "Hi")
    for count, what in (("two", "tea"), ("six", "coffees"), ("one", "bread\nand {butter}"))
    for name in ("Mira", "Otto and the others at the table near the window")
]
LENGTH = 12


def connect(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


def ask(client: openai.OpenAI, model: str, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def reply(client: openai.OpenAI, model: str, text: str, **options: Any) -> str:
    return str(ask(client, model, text, **options).choices[0].message.content)


def join_pieces(events: Any) -> list[str]:
    """Join the pieces of two streamed completions."""
    texts = ["", ""]
    for event in events:
        texts[event.choices[0].index] += event.choices[0].text
    return texts


def ask_in_pieces(client: openai.OpenAI, model: str, text: str, **options: Any) -> tuple[list[str], str, Any]:
    """Return the pieces of a streamed reply, its finish reason, and its usage."""
    events = list(ask(client, model, text, stream=True, stream_options={"include_usage": True}, **options))
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    assert all("usage" in event.model_fields_set for event in events)  # null in all but the last one
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return pieces, reasons[-1], events[-1].usage


def load_chatter(model: Path, **changes: Any) -> Chatter:
    return Chatter.load(ChatSettings(model_name_or_path=str(model), max_new_tokens=LENGTH, use_cpu=True, **changes))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "ctranslate2":
        pytest.importorskip("ctranslate2")
    return str(request.param)


@pytest.fixture(scope="module")
def server(engine: str, chats: dict[str, Path], pairs: dict[str, Path], start: StartServer) -> Server:
    models = {**{name: str(folder) for name, folder in chats.items()}, "pairs": str(pairs["run"]), "pocket": "pocket"}
    return start(models, engine=engine, max_batch_delay=100)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as found:
        yield found


@pytest.mark.long
@pytest.mark.variants("ctranslate2")
def test_many_clients_at_once_get_the_replies_of_chat(
    client: openai.OpenAI, server: Server, chats: dict[str, Path]
) -> None:
    chatters = {name: load_chatter(folder) for name, folder in {**chats, "pocket": Path("pocket")}.items()}
    expected = {
        (name, text): chatter.reply(text)
        for name, chatter in chatters.items()
        for text in (MESSAGES if name in ("run", "pocket") else MESSAGES[:3])
    }
    # pocket's reply repeats its prompt, so that a mixed reply would show
    assert len({expected["pocket", text].reply for text in MESSAGES}) > 10
    assert expected["run", MESSAGES[0]].reply == expected["merged", MESSAGES[0]].reply
    with ThreadPoolExecutor(len(expected)) as pool:
        whole = dict(zip(expected, pool.map(lambda asked: ask(client, *asked), expected), strict=True))
        pieces = dict(zip(expected, pool.map(lambda asked: ask_in_pieces(client, *asked), expected), strict=True))
    for asked, reply in expected.items():
        found = whole[asked]
        assert found.choices[0].message.content == reply.reply, asked
        assert found.model == asked[0]
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (reply.source_tokens, reply.reply_tokens)
        texts, reason, usage = pieces[asked]
        assert "".join(texts) == reply.reply
        assert usage == found.usage
        assert reason == found.choices[0].finish_reason == ("length" if reply.reply_tokens == LENGTH else "stop")
    assert max(len(texts) for texts, _, _ in pieces.values()) > 3
    sizes = dict(re.findall(r'^t5tune_batch_replies_bucket\{le="(\S+)"\} (\S+)$', read_metrics(server.url), re.M))
    assert float(sizes["1.0"]) < float(sizes["+Inf"])  # some batches have several replies


def test_a_conversation_gets_the_reply_of_chat(
    client: openai.OpenAI, chats: dict[str, Path], pairs: dict[str, Path]
) -> None:
    turns = [Turn("human", "Hello"), Turn("assistant", "Hi there"), Turn("human", MESSAGES[0])]
    roles = {"human": "user", "assistant": "assistant"}
    messages: list[Any] = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    system = {"role": "system", "content": "Be brief."}
    found = client.chat.completions.with_raw_response.create(model="run", messages=[system, *messages])
    expected = load_chatter(chats["run"], system="Be brief.").reply(turns)
    assert found.parse().choices[0].message.content == expected.reply
    assert found.parse().usage.prompt_tokens == expected.source_tokens  # type: ignore[union-attr]
    assert "x-t5tune-dropped-messages" not in found.headers
    alone = client.chat.completions.with_raw_response.create(model="pairs", messages=messages)
    expected = load_chatter(pairs["run"]).reply(turns)  # with the prefix, and without earlier messages
    assert alone.parse().choices[0].message.content == expected.reply
    assert alone.headers["x-t5tune-dropped-messages"] == "2"


def test_a_reply_ends_before_a_stop_text(client: openai.OpenAI, chats: dict[str, Path]) -> None:
    whole = load_chatter(chats["run"]).reply(MESSAGES[0]).reply
    assert len(whole.split()) > 3
    for stop in (whole.split()[2], whole[5:8], whole[-1]):
        expected = whole[: whole.index(stop)]
        usages = set()
        for _ in range(3):
            found = ask(client, "run", MESSAGES[0], stop=[stop, "never in it"])
            assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected, "stop")
            usages.add(found.usage.completion_tokens)
        assert len(usages) == 1
        pieces, reason, _ = ask_in_pieces(client, "run", MESSAGES[0], stop=stop)
        assert ("".join(pieces), reason) == (expected, "stop")
    assert reply(client, "run", MESSAGES[0], stop="never in it") == whole


def test_the_text_before_a_stop_is_independent_of_timing(chats: dict[str, Path]) -> None:
    """If two stops overlap, the first complete stop counts."""
    prompts = load_chatter(chats["run"]).prompts
    ids = prompts.tokenizer.encode("one two three four five six seven")
    whole = prompts.decode(ids)
    early, late = whole[12:14], whole[4:16]
    for stops in ([late, early], [early, late], [whole[-1]]):
        found = set()
        for step in range(1, len(ids) + 1):
            shown: list[str] = []
            text = ReplyText(prompts, shown.append, stops)
            counts = (text.update(ids[:end]) for end in [*range(step, len(ids), step), len(ids)])
            count = next(count for count in counts if count is not None)
            found.add((count, "".join(shown)))
        ((count, reply),) = found
        first = next(number for number in range(len(ids) + 1) if any(s in prompts.decode(ids[:number]) for s in stops))
        assert count == first
        assert reply == whole[: min(whole.find(stop) for stop in stops if stop in prompts.decode(ids[:first]))]


def test_max_tokens_limits_each_reply_of_a_batch(client: openai.OpenAI, chats: dict[str, Path]) -> None:
    lengths = [1, 3, 5, 8, 11]
    with ThreadPoolExecutor(len(lengths)) as pool:
        found = list(pool.map(lambda length: ask(client, "base", MESSAGES[0], max_tokens=length), lengths))
    assert [answer.usage.completion_tokens for answer in found] == lengths
    texts = [answer.choices[0].message.content for answer in found]
    for length, text in zip(lengths, texts, strict=True):
        chatter = Chatter.load(ChatSettings(model_name_or_path=str(chats["base"]), max_new_tokens=length, use_cpu=True))
        assert text == chatter.reply(MESSAGES[0]).reply
    assert reply(client, "base", MESSAGES[0], max_completion_tokens=3) == texts[1]


def test_the_narrowest_nucleus_is_greedy(client: openai.OpenAI) -> None:
    greedy = reply(client, "pocket", MESSAGES[0])
    assert reply(client, "pocket", MESSAGES[0], temperature=2, top_p=1e-300) == greedy


def test_completions_take_text_or_ids(client: openai.OpenAI, chats: dict[str, Path]) -> None:
    loaded = load_for_inference(InferenceSettings(model_name_or_path=str(chats["base"]), use_cpu=True))
    sentinel = loaded.tokenizer.convert_tokens_to_ids(["<extra_id_0>"])[0]
    texts = ["Two red hats", "Two <extra_id_0> hats"]
    ids = [loaded.tokenizer.encode(text) for text in texts]
    assert sentinel in ids[1]
    expected = []
    for source in ids:
        output = loaded.model.generate(
            torch.tensor([[*source, loaded.tokenizer.eos_token_id]]), max_new_tokens=LENGTH, do_sample=False
        )[0].tolist()[1:]
        expected.append(loaded.tokenizer.decode(output, skip_special_tokens=True))
    by_text = client.completions.create(model="base", prompt=texts)
    by_ids = client.completions.create(model="base", prompt=ids)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices] == expected
    assert by_text.usage.prompt_tokens == sum(map(len, ids))  # type: ignore[union-attr]
    assert join_pieces(client.completions.create(model="base", prompt=texts, stream=True)) == expected
    twice = client.completions.create(model="base", prompt=texts, n=2)
    assert [choice.text for choice in twice.choices] == [expected[0]] * 2 + [expected[1]] * 2


def test_completions_have_sentinels_if_the_prompt_has_masked_spans(
    engine: str, untied_base: Path, start: StartServer, tmp_path: Path
) -> None:
    """They equal the predictions of evaluate for raw text."""
    folder = shutil.copytree(untied_base, tmp_path / "gaps")
    weights = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder)
    first, second = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    weights["lm_head.weight"][[first, second]] *= 2  # so that they are sometimes the likeliest
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = load_for_inference(InferenceSettings(model_name_or_path=str(folder), use_cpu=True))
    decoding = Decoding(tokenizer.eos_token_id, tokenizer.pad_token_id, LENGTH)
    with_gaps, without = "Two <extra_id_0> hats <extra_id_1> hat", "Two red hats"
    sources = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in (with_gaps, without)]
    ids = generate(loaded.model, sources, decoding)
    assert all({first, second} & set(reply) for reply in ids)
    expected = [decode_prediction(tokenizer, ids[0], "", is_raw_text=True), decode_prediction(tokenizer, ids[1], "")]
    with connect(start({"gaps": str(folder)}, engine=engine, converted_dir=tmp_path / "made")) as client:
        ask_for = partial(client.completions.create, model="gaps", max_tokens=LENGTH)
        prompt: list[Any]
        for prompt in ([with_gaps, without], [source[:-1] for source in sources]):
            whole = ask_for(prompt=prompt)
            assert [choice.text for choice in whole.choices] == expected
            assert join_pieces(ask_for(prompt=prompt, stream=True)) == expected
        sentinel = next(text for text in ("<extra_id_0>", "<extra_id_1>") if text in expected[0])
        for prompt, text in zip((with_gaps, without), expected, strict=True):
            found = ask_for(prompt=prompt, stop=sentinel).choices[0]
            assert found.text == text.partition(sentinel)[0]
            assert (found.finish_reason == "stop") == (sentinel in text)


def test_a_prompt_from_the_chat_template_gets_the_same_reply(client: openai.OpenAI, chats: dict[str, Path]) -> None:
    """It has the EOS token already, which isn't added again."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(chats["run"])
    chat = ask(client, "run", MESSAGES[0])
    messages = [{"role": "user", "content": MESSAGES[0]}]
    for tokenize in (False, True):
        prompt = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False)
        assert prompt[-1] == stock.eos_token_id if tokenize else prompt.endswith(stock.eos_token)
        found = client.completions.create(model="run", prompt=prompt)
        assert found.usage == chat.usage
        assert found.choices[0].text == chat.choices[0].message.content


def test_the_predictions_of_evaluate_are_the_replies(
    client: openai.OpenAI, pairs: dict[str, Path], tmp_path: Path
) -> None:
    data = pairs["run"].parent / "pairs.jsonl"
    result = evaluate(
        EvaluateSettings(
            model_name_or_path=str(pairs["run"]), data_path=str(data), output_dir=tmp_path / "out", num_data=3,
            max_new_tokens=LENGTH, use_cpu=True,
        )
    )  # fmt: skip
    predictions = [json.loads(line)["prediction"] for line in result.predictions.read_text().splitlines()]
    sources = [json.loads(line)["source"] for line in data.read_text().splitlines()[:3]]
    assert [ask(client, "pairs", source).choices[0].message.content for source in sources] == predictions


def test_the_models_are_listed_by_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "run", "adapter", "merged", "pairs", "pocket"]
    assert client.models.retrieve("adapter").owned_by == "t5tune"


def test_sampling_follows_the_seed_also_in_a_batch(client: openai.OpenAI, engine: str, chats: dict[str, Path]) -> None:
    sampled = {"temperature": 1.5, "top_p": 0.9}
    if engine == "ctranslate2":
        replies = {ask(client, "run", MESSAGES[0], **sampled).choices[0].message.content for _ in range(5)}
        assert len(replies) > 1
        with pytest.raises(openai.BadRequestError, match="seed: 3: ctranslate2 can't repeat a sampled reply"):
            ask(client, "run", MESSAGES[0], seed=3, **sampled)
        assert ask(client, "run", MESSAGES[0], seed=3).choices
        return
    expected = [load_chatter(chats["run"], seed=seed, **sampled).reply(MESSAGES[0]).reply for seed in (3, 4, 5)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: ask(client, "run", MESSAGES[0], seed=seed, **sampled), (3, 4, 5)))
    assert [answer.choices[0].message.content for answer in found] == expected
    several = ask(client, "run", MESSAGES[0], seed=3, n=3, **sampled)
    assert [choice.message.content for choice in several.choices] == expected
    assert len(set(expected)) == 3
    assert len({reply(client, "run", MESSAGES[0], **sampled) for _ in range(5)}) > 1


def test_adapters_that_differ_in_a_bin_file_are_converted_separately(
    chats: dict[str, Path], start: StartServer, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    state = load_file(chats["adapter"] / "adapter_model.safetensors")
    expected = {}
    for name, factor in (("half", 0.5), ("reverse", -3.0)):
        folder = shutil.copytree(chats["adapter"], tmp_path / name)
        (folder / "adapter_model.safetensors").unlink()
        changed = {key: factor * value if "lora_B" in key else value for key, value in state.items()}
        torch.save(changed, folder / "adapter_model.bin")
        expected[name] = [load_chatter(folder).reply(text).reply for text in MESSAGES[:3]]
        with connect(start({name: str(folder)}, engine="ctranslate2", converted_dir=tmp_path / "made")) as client:
            assert [reply(client, name, text) for text in MESSAGES[:3]] == expected[name]
    assert expected["half"] != expected["reverse"]


def test_a_converted_folder_is_served_with_the_replies_of_ctranslate2(
    chats: dict[str, Path], start: StartServer, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    folder = tmp_path / "int8"
    merge(
        MergeSettings(
            adapter=[chats["adapter"]], output_dir=folder, to="ctranslate2", quantization="int8", dtype="float32",
            verify=False,
        )
    )  # fmt: skip
    notes = Notes()
    server = start({"whole": str(folder), "run": str(chats["run"])}, notes, quantization="int8")
    assert server.address.models == {"whole": "ctranslate2", "run": "ctranslate2"}
    prompts = load_chatter(chats["run"]).prompts
    tokens = json.loads((folder / "shared_vocabulary.json").read_text())
    translator = load_translator(folder, compute_type="int8")
    with connect(server) as client:
        for text in MESSAGES[:4]:
            source = [tokens[index] for index in prompts.encode([Turn("human", text)]).ids]
            (found,) = translator.translate_batch(
                [source], beam_size=1, max_decoding_length=LENGTH, min_decoding_length=0, max_input_length=0
            )
            expected = prompts.decode([tokens.index(token) for token in found.hypotheses[0]])
            for name in ("whole", "run"):
                assert reply(client, name, text) == expected
    assert any("run: CTranslate2 gives the same reply for" in text for text in notes)
