"""Encoders: which one suits a tokenizer, words that are too long, and memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from t5tune.data.tokens.encoders import Beginning, ByteEncoder, WholeTextEncoder, WordEncoder, make_encoder
from t5tune.data.tokens.encoding import MAX_WORD_LENGTH
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from tests.data.reading.records import prepare_records
from tests.support.paths import REPOSITORY

POCKET = REPOSITORY / "t5tune" / "pocket"


def load_extended() -> Tokenizer:
    return extend_tokenizer(load_tokenizer(POCKET), ["auto"], 1536)[0]


def make_byte_level_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ("</s>", "<pad>", "<unk>")
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, *special, special_tokens=special, folder=Path())


def test_each_kind_of_tokenizer_has_its_encoder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert isinstance(make_encoder(load_tokenizer(tmp_path)), ByteEncoder)
    assert isinstance(make_encoder(load_tokenizer(POCKET)), WordEncoder)
    assert isinstance(make_encoder(load_extended()), WordEncoder)
    tokenizer = make_byte_level_tokenizer()
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, WholeTextEncoder)
    texts = ["two  hats\n", "é 猫 </s>", ""]
    ids = encoder.encode([Beginning(texts[0]), *texts[1:]])
    assert [tokenizer.decode(each) for each in ids] == texts
    assert tokenizer.eos_token_id not in ids[1]


def test_an_added_token_with_a_space_needs_that_space() -> None:
    tokenizer = extend_tokenizer(load_tokenizer(POCKET), [" two"], 1536)[0]
    encoder = make_encoder(tokenizer)
    for text in ("two hats", " two hats"):
        assert encoder.encode([Beginning(text)])[0].tolist() == tokenizer.encode(text)


WORDS = {
    "a word": "x" * MAX_WORD_LENGTH,
    "a word after others": "two hats " * 9000 + "x" * (MAX_WORD_LENGTH - 1),
    "between added tokens": ("{" + "x" * 60_000) * 4,
    "Chinese in lines": ("猫" * 50_000 + "\n") * 4,
}


@pytest.mark.parametrize("text", WORDS.values(), ids=WORDS)
def test_words_up_to_the_limit_are_encoded(text: str) -> None:
    tokenizer = load_extended()
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, WordEncoder)
    assert encoder.measure_longest_word(text) <= MAX_WORD_LENGTH
    assert encoder.encode([Beginning(text)])[0].tolist() == tokenizer.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("add_tokens", ["auto", "none"])
def test_a_record_with_a_longer_word_is_rejected_and_kept(tmp_path: Path, add_tokens: str) -> None:
    records: list[dict[str, Any]] = [
        {"source": "Hi", "target": "Yes"},
        {"source": "two hats " + "x" * MAX_WORD_LENGTH, "target": "Yes"},
        {"source": "two hats " * MAX_WORD_LENGTH, "target": "No"},
        {"source": "\u0301" * (MAX_WORD_LENGTH + 1), "target": "Yes"},
    ]
    cache = prepare_records(tmp_path, *records, max_rejected_fraction=None, add_tokens=add_tokens)
    assert (cache.manifest["conversations"], cache.manifest["rejected_by_reason"]) == (2, {"long_word": 2})
    lines = [json.loads(line) for line in (cache.folder / "rejected.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == [records[1], records[3]]
    assert lines[1]["message"] == "a word of 100,001 characters, more than 100,000"


MEASURED = """
import random, string
from pathlib import Path
from tokenizers import AddedToken, Tokenizer as Backend, models, normalizers, pre_tokenizers
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer

def read_megabytes():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

rng = random.Random(1)
words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(250_000)}
backend = Backend(models.Unigram([(word, -9.0) for word in ("<pad>", "</s>", "<unk>", *sorted(words))], 2, False))
backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", True)
backend.add_tokens([AddedToken("\\n", normalized=False)])
before = read_megabytes()
extended = extend_tokenizer(Tokenizer(backend, "</s>", "<pad>", "<unk>", ("</s>",), Path()), ["auto"], 300_000)
encoder = make_encoder(extended.tokenizer)
assert "{" in extended.added and backend.token_to_id("{") is None
print(before, read_megabytes() - before)
"""


@pytest.mark.slow
def test_extended_tokenizers_and_encoders_share_a_vocabularys_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, more = map(int, done.stdout.split())
    assert total > 150
    assert more < 40


@pytest.mark.parametrize("token", ["{", "\n", AddedToken("Foo", single_word=True), AddedToken("két", normalized=True)])
def test_tokens_that_transformers_added_get_its_ids(token: str | AddedToken, tmp_path: Path) -> None:
    """`add_tokens(["{"])` makes a token that is found in the normalized text, in which a newline is a space."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(POCKET)
    stock.add_tokens([token])
    stock.save_pretrained(tmp_path)
    encoder = make_encoder(load_tokenizer(tmp_path))
    for text in ("two {hats} ", "two\nred  hats", "Foo xFoo Foo, k\u00e9t ke\u0301t", "\uff5b full width"):
        expected = stock(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode([Beginning(text)])[0].tolist() == expected, text
