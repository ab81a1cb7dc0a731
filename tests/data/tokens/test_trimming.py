"""Texts of kept tokens keep their ids, in every program that reads the files; no character becomes unknown."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer, read_sentencepiece, save_tokenizer
from t5tune.data.tokens.trimming import TrimmableVocabulary
from t5tune.errors import ModelError
from tests.support.models.tokenizer_kinds import (
    make_codet5_tokenizer,
    make_gemma_tokenizer,
    make_madlad_tokenizer,
    make_mt5_tokenizer,
    make_protein_tokenizer,
    read_corpus,
)
from tests.support.prose import english_text

SPECIAL = ["<pad>", "</s>", "<unk>"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces
SCORES = st.sampled_from([-1.0, -2.0, -3.0, -4.0, -6.0, -9.0, -15.0, -25.0])  # so that many sums are equal
WORDS = st.lists(st.text("abcd", min_size=2, max_size=4), unique=True, max_size=24)
TEXTS = st.lists(st.text("abcdxy", min_size=1, max_size=14), min_size=1, max_size=20)
RANKS = st.randoms(use_true_random=False)
MAKERS: dict[str, Callable[[Path], int]] = {
    "mt5": make_mt5_tokenizer,
    "madlad": make_madlad_tokenizer,
    "gemma": make_gemma_tokenizer,
    "codet5": make_codet5_tokenizer,
}


def make_tokenizer(model: Any) -> Tokenizer:
    backend = Backend(model)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return Tokenizer(backend, "</s>", "<pad>", "<unk>", tuple(SPECIAL), Path("base"))


def make_pieces(pieces: Sequence[tuple[str, float, int]], first_special: int = 0) -> Any:
    """Make a SentencePiece model of type Unigram, without normalization."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.bos_id = 1, len(pieces), -1
    spec.pad_id, spec.eos_id, spec.unk_id = range(first_special, first_special + 3)
    spec.pad_piece = "<pad>"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return model


def check_ids(
    texts: Sequence[str], kept: list[int], before: Callable[[str], list[int]], after: Callable[[str], list[int]]
) -> int:
    """Compare the ids of texts whose tokens are kept, and return the number of these texts."""
    new_ids = {old: new for new, old in enumerate(kept)}
    pairs = [(text, ids) for text in texts if {*(ids := before(text))} <= new_ids.keys()]
    for text, ids in pairs:
        assert after(text) == [new_ids[index] for index in ids], text
    return len(pairs)


SPECIAL_PIECES = [*zip(SPECIAL, [0.0] * 3, [CONTROL, CONTROL, UNKNOWN], strict=True)]


@pytest.mark.slow
@given(words=WORDS, scores=st.lists(SCORES, min_size=31, max_size=31), texts=TEXTS, random=RANKS, defined=st.booleans())
@settings(max_examples=150, deadline=None)
def test_texts_of_kept_unigram_pieces_keep_their_ids(
    words: list[str], scores: list[float], texts: list[str], random: Any, defined: bool
) -> None:
    tokens = ["▁", *"abcd", *words]
    kinds = [NORMAL] * 5 + [USER_DEFINED if defined and index == 0 else NORMAL for index in range(len(words))]
    pieces = [*zip(tokens, scores, kinds, strict=False)]
    first_special = random.randint(0, len(pieces))  # their ids change if pieces before them are removed
    pieces[first_special:first_special] = SPECIAL_PIECES
    ids_of_special = range(first_special, first_special + 3)
    model = make_pieces(pieces, first_special)
    tokenizer = make_tokenizer(models.Unigram([piece[:2] for piece in pieces], first_special + 2, False))
    for vocabulary in (TrimmableVocabulary(tokenizer, model), TrimmableVocabulary(tokenizer, None)):
        required = vocabulary.list_required([])
        ranked = random.sample(sorted(vocabulary.ids), len(vocabulary.ids))
        kept = vocabulary.fill(required, ranked, random.randint(len(required), len(vocabulary.ids)))
        cut = vocabulary.cut(kept)
        check_ids(texts, kept, tokenizer.encode, cut.encode)
        for text in texts:
            assert cut.decode(cut.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        if (cut_model := vocabulary.cut_sentencepiece(kept)) is not None:
            files = (each.SerializeToString() for each in (model, cut_model))
            before, after = (sentencepiece.SentencePieceProcessor(model_proto=file) for file in files)
            check_ids(texts, kept, before.encode, after.encode)
            assert {index for index, piece in enumerate(model.pieces) if piece.type != NORMAL} <= required
            spec = cut_model.trainer_spec
            assert [kept[index] for index in (spec.pad_id, spec.eos_id, spec.unk_id)] == [*ids_of_special]


def test_pieces_with_the_extreme_scores_stay() -> None:
    # an unknown character costs the lowest score less 10: with -15, `bcd` and an unknown `a` would be better
    scores = {"ab": -15.0, "cd": -15.0, "bcd": -3.0, "rare": -25.0, "frequent": -1.0}
    model = make_pieces([*SPECIAL_PIECES, *((piece, score, NORMAL) for piece, score in scores.items())])
    tokenizer = make_tokenizer(models.Unigram([(piece.piece, piece.score) for piece in model.pieces], 2))
    vocabulary = TrimmableVocabulary(tokenizer, model)
    kept = vocabulary.fill(vocabulary.list_required([]), map(vocabulary.tokens.get, ["ab", "cd", "bcd"]), 99)
    cut = vocabulary.cut(kept)
    assert {*cut.get_vocab()} == {*SPECIAL, *scores}
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.cut_sentencepiece(kept).SerializeToString())
    assert cut.backend.encode("abcd").tokens == processor.encode("abcd", out_type=str) == ["ab", "cd"]


@pytest.mark.slow
@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30), texts=TEXTS, random=RANKS)
@settings(max_examples=150, deadline=None)
def test_texts_of_kept_bpe_tokens_keep_their_ids(pairs: list[tuple[int, int]], texts: list[str], random: Any) -> None:
    tokens, merges = [*"abcd"], []
    for pair in pairs:  # of any tokens before
        left, right = (tokens[index % len(tokens)] for index in pair)
        if len(left + right) < 8 and (left, right) not in merges:
            merges.append((left, right))
            tokens += [left + right] if left + right not in tokens else []
    vocab = {token: index for index, token in enumerate([*SPECIAL, *tokens])}
    tokenizer = make_tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    vocabulary = TrimmableVocabulary(tokenizer, None)
    required = vocabulary.list_required([])
    ranked = random.sample(sorted(vocabulary.ids), len(vocabulary.ids))
    kept = vocabulary.fill(required, ranked, random.randint(len(required), len(vocab)))
    cut = vocabulary.cut(kept)
    check_ids(texts, kept, tokenizer.encode, cut.encode)
    for text in texts:
        assert cut.decode(cut.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def cut_folder(folder: Path, limit: int, texts: list[str]) -> tuple[list[int], Path]:
    """Keep the most frequent tokens of texts, and save the tokenizer in `cut`."""
    tokenizer = load_tokenizer(folder)
    file = folder / "spiece.model"
    vocabulary = TrimmableVocabulary(tokenizer, read_sentencepiece(file) if file.is_file() else None)
    ids = [index for text in texts for index in tokenizer.encode(text)]
    ranked = sorted({*ids}, key=lambda index: (-ids.count(index), index))
    kept = vocabulary.fill(vocabulary.list_required([]), [*ranked, *sorted(vocabulary.ids)], limit)
    save_tokenizer(vocabulary.cut(kept), folder / "cut")
    if (pieces := vocabulary.cut_sentencepiece(kept)) is not None:
        (folder / "cut" / "spiece.model").write_bytes(pieces.SerializeToString())
    return kept, folder / "cut"


def check_folder(folder: Path, limit: int, texts: list[str]) -> int:
    kept, cut = cut_folder(folder, limit, texts[: len(texts) // 2])
    before, after, auto = load_tokenizer(folder), load_tokenizer(cut), AutoTokenizer.from_pretrained(cut)
    check_ids(texts, kept, before.encode, lambda text: auto(text, add_special_tokens=False).input_ids)
    count = check_ids(texts, kept, before.encode, after.encode)
    for text in texts:
        ids = before.encode(text), after.encode(text)
        assert before.decode(ids[0]) == after.decode(ids[1]), text
        assert ids[0].count(before.unk_token_id) == ids[1].count(after.unk_token_id), text
    if (folder / "spiece.model").is_file():
        pieces = [sentencepiece.SentencePieceProcessor(str(each / "spiece.model")).encode for each in (folder, cut)]
        assert check_ids(texts, kept, *pieces) > 10
    for name in ("eos_token", "pad_token", "unk_token"):
        assert auto.convert_tokens_to_ids(getattr(auto, name)) == getattr(after, f"{name}_id")
    assert auto("a").input_ids == [*after.special_ids.source_start, *after.encode("a"), *after.special_ids.source_end]
    return count


@pytest.mark.parametrize("kind", MAKERS)
def test_all_tokenizers_of_a_folder_agree(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    MAKERS[kind](tmp_path / "base")
    texts = [*read_corpus()[:150], "Two  red\n\n  hats\t<2de> {naïve} 😀 ", "<extra_id_0> one <extra_id_1></s>"]
    assert check_folder(tmp_path / "base", 620, texts) > 20


@pytest.mark.slow
def test_the_real_t5_tokenizer_keeps_ids(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared("tokenizer/flan-t5-base")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    texts = [line for line in english_text().splitlines() if line.strip()][:2000]
    assert check_folder(tmp_path, 2000, texts) > 200


def test_a_models_own_test_texts_are_removed(tmp_path: Path) -> None:
    make_mt5_tokenizer(tmp_path)
    sample = b"\x0a\x05hello\x12\x05wrong"  # its input, and pieces that it must be split into
    self_test_data = b"\x22" + bytes([len(sample) + 2]) + b"\x0a" + bytes([len(sample)]) + sample
    (tmp_path / "spiece.model").write_bytes((tmp_path / "spiece.model").read_bytes() + self_test_data)
    _, cut = cut_folder(tmp_path, 500, [])
    assert b"wrong" not in (cut / "spiece.model").read_bytes()


def test_special_ids_of_every_post_processor_are_renumbered() -> None:
    tokens = ["a", "b", "ab", "</s>", "<s>", "<pad>", "<unk>"]
    tokenizer = make_tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")], unk_token="<unk>")
    )
    roberta = processors.RobertaProcessing(("</s>", 3), ("<s>", 4), trim_offsets=False)
    tokenizer.backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), roberta])
    vocabulary = TrimmableVocabulary(tokenizer, None)
    cut = vocabulary.cut(vocabulary.fill(vocabulary.list_required([]), [], 0))
    assert cut.get_vocab() == {"a": 0, "b": 1, "</s>": 2, "<s>": 3, "<pad>": 4, "<unk>": 5}
    assert (cut.special_ids.source_start, cut.special_ids.source_end) == ((3,), (2,))


def test_letters_that_are_only_words_stay(tmp_path: Path) -> None:
    make_protein_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    assert TrimmableVocabulary(tokenizer, None).list_required([]) == {*tokenizer.get_vocab().values()}


def test_a_broken_or_different_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    make_mt5_tokenizer(tmp_path)
    tokenizer, model = load_tokenizer(tmp_path), read_sentencepiece(tmp_path / "spiece.model")
    model.pieces[300].piece = "other"
    with pytest.raises(ModelError, match="token 300, 'other', is only in its SentencePiece model"):
        TrimmableVocabulary(tokenizer, model)
    del model.pieces[300:]
    with pytest.raises(ModelError, match="token 300 is not in its SentencePiece model, which has 300 pieces"):
        TrimmableVocabulary(tokenizer, model)
    for content, problem in ((b"\xff\xff", "can't be read"), (b"", "contains no pieces")):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ModelError, match=f"spiece.model: {problem}"):
            read_sentencepiece(tmp_path / "spiece.model")


def test_other_kinds_of_vocabularies_are_refused() -> None:
    words = {token: index for index, token in enumerate([*SPECIAL, "a"])}
    marked = models.BPE(words, [], unk_token="<unk>", end_of_word_suffix="</w>")
    for model in (models.WordLevel(words, "<unk>"), models.WordPiece(words, unk_token="<unk>"), marked):
        with pytest.raises(ModelError, match="trim can cut only Unigram and BPE"):
            TrimmableVocabulary(make_tokenizer(model), None)


def test_tokens_that_would_be_renumbered_are_refused() -> None:
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 9}  # with a gap, in which an added token would be
    tokenizer = make_tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    state = json.loads(tokenizer.backend.to_str())
    assert [token["id"] for token in state["added_tokens"]] == [0, 1, 2]
    vocabulary = TrimmableVocabulary(tokenizer, None)
    cut = vocabulary.cut(vocabulary.fill(vocabulary.list_required([]), [], 0))
    assert cut.get_vocab() == {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
