"""Tokens that prepare adds: which of them get the unused embedding rows, and which characters need none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.data.tokens.vocabulary import MISSING_CHARACTERS, RoundTripCheck, extend_tokenizer
from t5tune.progress import Event, Note, Report, silent
from t5tune.settings import PrepareSettings
from tests.support.caches import open_only

LETTERS = "ḿđũãħżǹýƙɓɗŋǎěǐǒǔǖǘǚǜḱǵẽỹĩẅẃẁ"
ANSWERS = "kept 2 lines", "a\nb", "done"


@pytest.fixture
def flan(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """The real tokenizer with its config, as a base: 28 unused embedding rows."""
    return Path(shutil.copytree(shared("tokenizer/flan-t5-base"), tmp_path / "flan"))


Prepared = Callable[..., tuple[PrepareResult, Cache]]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    def run(base: Path | str, targets: list[str], report: Report = silent, **more: Any) -> tuple[PrepareResult, Cache]:
        data = tmp_path / "data.jsonl"
        pairs = [{"source": f"say {number}", "target": target} for number, target in enumerate(targets)]
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        values = {"model_name_or_path": str(base), "data_path": str(data), "output_dir": tmp_path / "cache", **more}
        result = prepare(PrepareSettings(**values), report)
        return result, open_only(result.cache)

    return run


def list_targets(letters: str, count: int = 200) -> list[str]:
    """Make targets with these letters, of which the last ones are the rarest."""
    step = count // (len(letters) + 1)
    return [
        f"word {number} " + "".join(each for rank, each in enumerate(letters) if number >= rank * step)
        for number in range(count)
    ]


def decode_targets(cache: Cache) -> list[str]:
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    return [tokenizer.decode(example.target_T.tolist()[:-1]) for example in cache]


def test_the_data_s_letters_come_before_unused_characters(flan: Path, prepared: Prepared) -> None:
    events: list[Event] = []
    targets = list_targets(LETTERS)
    result, cache = prepared(flan, targets, events.append)
    assert len(LETTERS) == 29
    rarest = LETTERS[-1]
    assert cache.added_tokens == [*LETTERS[:-1]]
    assert result.unknown_tokens == sum(rarest in target for target in targets)
    assert cache.manifest["left_out_tokens"] == [rarest, *MISSING_CHARACTERS]
    (note,) = [event.text for event in events if isinstance(event, Note) and "unused embedding rows" in event.text]
    assert note == (
        f"only 28 unused embedding rows, so there is no token for {rarest!r}, '\\n', '\\t', '<', '\\\\' and 5 more; "
        "models with more rows: umT5 (84), T5Gemma 2 (63); mT5 and ByT5 write every character"
    )


def test_more_frequent_missing_characters_keep_their_rows(flan: Path, prepared: Prepared) -> None:
    _, cache = prepared(flan, [f'{{"a": "{target}"}}' for target in list_targets(LETTERS)])
    assert set(cache.added_tokens) == {"{", "}", *LETTERS[:26]}


@pytest.mark.slow
def test_where_all_tokens_fit_they_have_the_ids_of_before(flan: Path, prepared: Prepared) -> None:
    _, cache = prepared(flan, list_targets("ḿđũ"))
    assert cache.added_tokens[:12] == [*MISSING_CHARACTERS, "ḿ", "đ", "ũ"]
    assert cache.added_tokens[12:] == ["\n" + " " * width for width in (2, 4, 6, 8, 10, 12, 14, 16)]
    assert load_tokenizer(cache.tokenizer_folder).convert_tokens_to_ids(["\n", "ũ"]) == [32100, 32111]


@pytest.mark.parametrize("count", [27, 28])
def test_a_list_of_tokens_is_used_as_it_is_given(count: int, flan: Path, prepared: Prepared) -> None:
    given = ["\n", *LETTERS[:count]][:count]
    _, cache = prepared(flan, list_targets(LETTERS[:count]), add_tokens=given)
    assert cache.added_tokens == given


@pytest.mark.slow
def test_datasets_of_a_mixture_agree_on_one_list(flan: Path, tmp_path: Path) -> None:
    targets = list_targets(LETTERS)
    for name, of_it in (("a", targets[:100]), ("b", targets[100:])):
        lines = [json.dumps({"source": "say", "target": target}) + "\n" for target in of_it]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]
    prepare(PrepareSettings(model_name_or_path=str(flan), data_path=paths, output_dir=tmp_path / "cache"))
    added, others = (open_only(tmp_path / "cache" / name).added_tokens for name in ("a", "b"))
    assert added == others
    assert set(added) == {*LETTERS[:28]}


def test_turns_have_the_text_s_ids_without_a_newline_token(flan: Path, tmp_path: Path) -> None:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(("Hi", *ANSWERS))]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"conversations": turns[:4]}))
    values = {"model_name_or_path": str(flan), "data_path": str(tmp_path / "chats.jsonl")}
    prepare(PrepareSettings(**values, output_dir=tmp_path / "cache", add_tokens=["{"]))
    cache = open_only(tmp_path / "cache")
    theirs = AutoTokenizer.from_pretrained(str(cache.tokenizer_folder))
    first, second = cache[0], cache[1]
    assert first.target_T.tolist() == theirs("kept 2 lines")["input_ids"]
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": turn["value"]} for index, turn in enumerate(turns)
    ]
    for example, end in ((first, 1), (second, 3)):
        ids = theirs.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
        assert example.source_S.tolist() == ids
    assert second.target_T.tolist() == theirs("done")["input_ids"]


@pytest.fixture
def amino_acids(tmp_path: Path) -> Path:
    """A vocabulary as ProtT5's, whose letters are words: `▁A`, `▁L`; no ASCII letter is a token."""
    folder = tmp_path / "prot"
    folder.mkdir()
    tokens = ["<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in "ALGVSREDTI")]
    backend = Backend(models.Unigram([(token, -1.0) for token in tokens], 2, False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", True)]
    )
    backend.decoder = decoders.Metaspace("▁", "always", True)
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 13}))
    return folder


def test_a_vocabulary_without_single_letters_is_prepared(amino_acids: Path, prepared: Prepared) -> None:
    result, cache = prepared(amino_acids, ["A L G V", "S R E D X"])
    assert result.examples == 2
    assert [item["text"] for item in cache.manifest["lost_characters"]] == ["X"]
    assert decode_targets(cache)[0] == "A L G V"


def test_words_and_spaces_survive_in_a_vocabulary_without_single_letters(amino_acids: Path) -> None:
    check = RoundTripCheck(load_tokenizer(amino_acids))
    assert [check.round_trip(text) for text in "A X"] == ["A", " ", "\ufffd"]
    tokenizer = extend_tokenizer(load_tokenizer(amino_acids), ["auto"], 20)
    assert tokenizer.added == MISSING_CHARACTERS[:7]
