"""Targets and sources of examples have the ids that the saved tokenizer gives their texts in transformers."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from t5tune.commands.evaluate import evaluate
from t5tune.commands.train import train
from t5tune.data.caches.cache import Cache
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.settings import EvaluateSettings, TrainSettings
from tests.data.reading.records import prepare_records

TEXTS = ['{"a": 1}', "{ x }", "Yes", "<b>two</b>", "\n- a", "\t{", "3 {x}", "猫 x", "~", "two  hats"]
# characters that the normalizer drops, or turns into a space or several characters
UNUSUAL = [
    "\u00a0Yes", "\u3000はい", "\u2003Yes", "\u2028    x", "▁Yes", "▁{", "\ufffdabc", "\u200cمی", "\u200d{", "\x7f{",
    "\u0301x", "ﬁ", "½ {", "é",
]  # fmt: skip
SUFFIXES = {"plain": "", "fastchat-t5": "\n", "turns": ""}


def load_both(folder: Path, records: list[Any], template: str, **values: Any) -> tuple[Cache, Any]:
    """Prepare records, and return the cache and its tokenizer as transformers loads it."""
    cache = prepare_records(folder, *records, **values, conversation_template=template)
    return cache, AutoTokenizer.from_pretrained(str(cache.tokenizer_folder))


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@pytest.mark.parametrize("template", SUFFIXES)
def test_a_target_has_the_ids_of_its_text(tmp_path: Path, template: str, add_tokens: str) -> None:
    pairs = [{"source": "say it", "target": text} for text in TEXTS + UNUSUAL]
    cache, theirs = load_both(tmp_path, pairs, template, add_tokens=add_tokens)
    for example, text in zip(cache, TEXTS + UNUSUAL, strict=True):
        assert example.target_T.tolist() == theirs(text + SUFFIXES[template])["input_ids"]
        decoded = theirs.decode(example.target_T, skip_special_tokens=True)
        assert add_tokens == "none" or text in UNUSUAL or decoded == text + SUFFIXES[template]


def test_a_source_has_its_text_s_ids(tmp_path: Path) -> None:
    texts = [*TEXTS, *UNUSUAL, "13 \t ", "two \\  ", "a "]
    cache, theirs = load_both(tmp_path, [{"source": text, "target": text} for text in texts], "plain")
    for example, text in zip(cache, texts, strict=True):
        assert example.source_S.tolist() == theirs(text)["input_ids"] == example.target_T.tolist()
        messages = [{"role": "user", "content": text}]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == example.source_S.tolist()


def test_a_target_keeps_the_spaces_at_its_beginning(tmp_path: Path) -> None:
    texts = [" x", "  x", " {x}", "\n x"]
    cache, _ = load_both(tmp_path, [{"source": "say it", "target": text} for text in texts], "plain")
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    assert [tokenizer.decode(example.target_T.tolist()[:-1]) for example in cache] == texts


@pytest.mark.parametrize("template", SUFFIXES)
def test_an_earlier_answer_has_the_chat_template_s_ids(tmp_path: Path, template: str) -> None:
    texts = ["q {", "{a}", "{", "~b", "?", "{c}"]
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    cache, theirs = load_both(tmp_path, [{"messages": messages}], template)
    for number, example in enumerate(cache):
        before, answer = messages[: 2 * number + 1], texts[2 * number + 1]
        source = theirs.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert example.source_S.tolist() == source
        assert example.target_T.tolist() == theirs(answer + SUFFIXES[template])["input_ids"]


def test_a_pair_s_answers_have_their_texts_ids(tmp_path: Path) -> None:
    pair = {"prompt": "say it", "chosen": "{a}", "rejected": "no {"}
    cache, theirs = load_both(tmp_path, [pair, {**pair, "chosen": "No", "rejected": "{"}], "plain", objective="dpo")
    for example, answers in zip(cache, (("{a}", "no {"), ("No", "{")), strict=True):
        assert [target.tolist() for target in example.targets] == [theirs(text)["input_ids"] for text in answers]


@pytest.mark.slow
def test_evaluate_scores_the_targets_of_training(tmp_path: Path) -> None:
    pairs = [{"source": f"say {text}", "target": text} for text in TEXTS]
    cache, _ = load_both(tmp_path, pairs, "plain")
    values = {"model_name_or_path": "pocket", "data_path": str(cache.folder), "output_dir": tmp_path / "run"}
    run = train(TrainSettings(**values, max_steps=1, learning_rate=1e-3, report_samples=0)).run
    losses = [
        evaluate(EvaluateSettings(model_name_or_path=str(run), data_path=str(path), output_dir=tmp_path / name)).loss
        for name, path in (("scores-1", tmp_path / "data.jsonl"), ("scores-2", cache.folder))
    ]
    assert losses[0] == losses[1]
