"""Make the built-in model's tokenizer: SentencePiece unigram, by T5's conventions.

    python examples/pocket/make_tokenizer.py --output t5tune/pocket

Pad, end and unknown are 0, 1, 2; 24 sentinel tokens stand last; digits stand alone; newline, tab, braces, `<`,
backslash, `^`, backquote and `~` are missing, as they are from T5's vocabulary. Like the real files,
tokenizer.json holds the normaliser of SentencePiece (nmt_nfkc).

One thing is made for a small model: each piece of letters is there twice, with the mark of a word's start (`▁Mi`)
and without (`Mi`), at the same score. So a word has the same pieces behind a space, a quote or a newline, and
copying it from one place to another means copying pieces one by one. Figures and signs have no marked form: behind
a space the mark stands before them alone, as it does before the tokens that tuning adds.
"""

import argparse
import io
import random
import string
from collections import Counter
from pathlib import Path

import sentencepiece
from families import FAMILIES, SHARES, sentence
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer
from words import ENGLISH, NAMES, PLACES, invented_word

NUM_PIECES = 760
LONGEST_PIECE = 4  # letters: short pieces make up new words too
NUM_SENTINELS = 24
CHARACTERS = sorted(set(string.printable.strip()) - set("<\\^`{}~"))
MARK = "▁"
BARE_MARK_SCORE = -30.0  # below what any piece costs: where a marked piece fits it is taken


def words(seed: int, num: int) -> list[str]:
    """Everyday words, invented ones, each character alone, and those of the pretraining families.

    A word of the families that came n times comes n ** 0.5 times. Their names are left out, so that they are
    written in syllables, as the names are that a user brings.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(num):
        family = rng.choices(list(SHARES), list(SHARES.values()))[0]
        for text in [sentence(rng), *(text for turn in FAMILIES[family](rng) for text in turn)]:
            counts.update(word for word in text.split() if not word.startswith("<extra_id_"))
    names = {*NAMES, *PLACES}
    said = [
        word
        for word, n in sorted(counts.items())
        if n >= 10 and word.strip(string.punctuation) not in names
        for _ in range(round(n**0.5))
    ]
    everyday = [form for word in ENGLISH for form in (*[word] * 8, word.capitalize())]
    return said + everyday + CHARACTERS * 20 + [invented_word(rng) for _ in range(3000)]


def train_pieces(lines: list[str]) -> sentencepiece_model_pb2.ModelProto:
    """Train the vocabulary and return SentencePiece's own description of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=NUM_PIECES,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        add_dummy_prefix=False,
        max_sentencepiece_length=LONGEST_PIECE,
        character_coverage=1.0,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    assert set(CHARACTERS) <= {piece.piece for piece in proto.pieces}
    return proto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer's files")
    options = parser.parse_args()
    proto = train_pieces(words(seed=1, num=20_000))
    special, pieces = proto.pieces[:3], [piece for piece in proto.pieces[3:] if piece.piece != MARK]
    vocab = [(piece.piece, piece.score) for piece in special]
    vocab.append((MARK, BARE_MARK_SCORE))
    vocab += [(MARK + piece.piece, piece.score) for piece in pieces if piece.piece[0].isalpha()]
    vocab += [(piece.piece, piece.score) for piece in pieces]
    vocab += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(NUM_SENTINELS))]
    tokenizer = T5Tokenizer(
        vocab=vocab,
        extra_ids=NUM_SENTINELS,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(options.output)
    print(f"{len(tokenizer)} entries in {options.output}")


if __name__ == "__main__":
    main()
