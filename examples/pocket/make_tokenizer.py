"""Make the built-in model's tokenizer: SentencePiece unigram, by T5's conventions.

    python examples/pocket/make_tokenizer.py --output t5tune/pocket

Pad, end and unknown are 0, 1, 2; 24 sentinel tokens stand last; newline, tab, braces, `<`, backslash, `^`,
backquote and `~` are missing, as they are from T5's vocabulary. Like the real files, tokenizer.json holds
the normaliser of SentencePiece (nmt_nfkc).
"""

import argparse
import io
import random
import string
from pathlib import Path

import sentencepiece
from generate import conversation
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer

NUM_PIECES = 1000
NUM_SENTINELS = 24
MISSING = set("\n\t<\\^`{}~")


def sentences(seed: int, num: int) -> list[str]:
    """Lines of the quickstart's conversations, in capitals too where the grammar writes small letters."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num):
        for turn in conversation(rng):
            lines += [
                line for line in turn["value"].translate({ord(c): " " for c in MISSING}).split("  ") if line.strip()
            ]
    return lines


def train_pieces(lines: list[str]) -> sentencepiece_model_pb2.ModelProto:
    """Train the vocabulary and return SentencePiece's own description of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=NUM_PIECES,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        split_digits=True,
        required_chars="".join(sorted(set(string.printable.strip()) - MISSING)),
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer's files")
    options = parser.parse_args()
    proto = train_pieces(sentences(seed=1, num=4000))
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
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
