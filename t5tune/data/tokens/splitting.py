"""How a vocabulary splits texts: tokens per word and per character, pieces, and the characters that it lacks.

split = measure_split("google/flan-t5-base", "targets", tokenizer, ["Iporã.", "Mba'éichapa?"])
split.tokens_per_word, split.unknown, split.pieces    # 6.5, {"ã": 1}, ["▁I", "p", "or", "<unk>", "."]
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import make_printable
from t5tune.io.reasons import join_first

MAX_PIECES_CHARACTERS = 150  # of the text that is shown in pieces
TEXTS_PER_BATCH = 1000


@dataclass(frozen=True)
class VocabularySplit:
    """How the vocabulary of a model, or of a token cache, splits the sources or the targets.

    Args:
        side: "sources" or "targets", which may be in different languages; "texts" for raw text.
        unknown: characters that become the unknown token -> their number, the most frequent first. A cache has lost the
            characters of its sources (U+FFFD), and has counted them in all of its targets.
        pieces: tokens of the first text.
    """

    model: str
    side: str
    vocabulary_size: int
    texts: int
    tokens_per_word: float
    tokens_per_character: float
    unknown: dict[str, int]
    pieces: list[str]


def tabulate_splits(splits: Sequence[VocabularySplit]) -> list[tuple[str, ...]]:
    """Return the header and a row for each split."""
    titles = (
        "model",
        "texts",
        "tokens/word",
        "tokens/character",
        "unknown",
        "vocabulary",
        "unknown characters",
        "pieces",
    )
    rows: list[tuple[str, ...]] = [titles]
    for split in splits:
        ratios = (f"{split.tokens_per_word:.2f}", f"{split.tokens_per_character:.2f}")
        unknown = join_first([f"{make_printable(text)} {count:,}" for text, count in split.unknown.items()])
        pieces = make_printable("│".join(split.pieces).replace("\n", "↵"))
        counts = (f"{sum(split.unknown.values()):,}", f"{split.vocabulary_size:,} tokens")
        rows.append((split.model, f"{split.side} ({split.texts:,})", *ratios, *counts, unknown, pieces))
    return rows


def measure_split(model: str, side: str, tokenizer: Tokenizer, texts: Sequence[str]) -> VocabularySplit:
    """Encode texts; at least one must not be blank."""
    num_tokens, unknown = 0, Counter[str]()
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        batch = texts[start : start + TEXTS_PER_BATCH]
        if tokenizer.backend is None:  # ByT5
            num_tokens += sum(len(text.encode()) for text in batch)
            continue
        for text, encoding in zip(batch, tokenizer.backend.encode_batch(batch, add_special_tokens=False), strict=True):
            num_tokens += len(encoding.ids)
            if tokenizer.unk_token_id in encoding.ids:
                found = zip(encoding.ids, encoding.offsets, strict=True)
                spans = (range(*span) for index, span in found if index == tokenizer.unk_token_id)
                unknown.update(text[place] for place in {*chain.from_iterable(spans)})
    return VocabularySplit(
        model=model,
        side=side,
        vocabulary_size=len(tokenizer),
        texts=len(texts),
        tokens_per_word=round(num_tokens / sum(len(text.split()) for text in texts), 4),
        tokens_per_character=round(num_tokens / sum(map(len, texts)), 4),
        unknown=dict(unknown.most_common()),
        pieces=_split_into_pieces(tokenizer, texts[0][:MAX_PIECES_CHARACTERS]),
    )


def _split_into_pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.backend is None:
        return [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in text.encode()]
    return [tokenizer.backend.id_to_token(index) for index in tokenizer.encode(text)]
