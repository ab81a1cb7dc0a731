"""Make the built-in model's tokenizer: a SentencePiece unigram model with T5's conventions.

    python examples/pocket/make_tokenizer.py --output t5tune/pocket

The ids of the pad, end and unknown tokens are 0, 1 and 2; the last 24 tokens are sentinels; each digit is a token of
its own; newline, tab, braces, `<`, backslash, `^`, backquote and `~` are missing, as they are from T5's vocabulary. As
in T5's files, tokenizer.json contains SentencePiece's normalizer (nmt_nfkc).

One property is specific to this small model: each piece of letters exists twice with the same score, with the mark of a
word's start (`▁Mi`) and without it (`Mi`). Therefore a word consists of the same pieces after a space, a quote or a
newline, and copying it means copying piece by piece. Digits and punctuation have no marked form: after a space the mark
is a separate token before them, as it is before the tokens that fine-tuning adds.
"""

import argparse
import io
import random
import string
from collections import Counter
from pathlib import Path

import sentencepiece
from families import FAMILIES, SHARES
from sentencepiece import sentencepiece_model_pb2
from sentences import sentence
from transformers import T5Tokenizer
from words import ENGLISH, NAMES, PLACES, invented_word

NUM_PIECES = 760
LONGEST_PIECE = 4  # letters; short pieces can also compose new words
NUM_SENTINELS = 24
CHARACTERS = sorted(set(string.printable.strip()) - set("<\\^`{}~"))
MARK = "▁"
BARE_MARK_SCORE = -30.0  # below the score of any piece, so that a marked piece is preferred wherever one fits


def words(seed: int, num: int) -> list[str]:
    """Return the training text: everyday words, invented ones, single characters, and words of the task families.

    A word that occurs n times in the task families is included n ** 0.5 times. Names are left out, so that they are
    split into syllables, as the names in a user's data are.
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
    """Train the vocabulary and return SentencePiece's model proto."""
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
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer files")
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
    print(f"saved a tokenizer of {len(tokenizer)} tokens to {options.output}")


if __name__ == "__main__":
    main()
