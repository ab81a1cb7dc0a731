"""The bytes that each id adds to a reply: the vocabulary over which a grammar decides which ids may come next.

    spellings = spell(tokenizer, num_rows=32128)
    spellings.later[8774], spellings.first[8774]    # b" Hello", b"Hello"

An id is spelled as the tokenizer's decoder writes it after a previous id. Only ids for bytes need more than the
decoder, because alone they decode to U+FFFD. SentencePiece's decoders drop the space of a reply's first id.
"""

from dataclasses import dataclass

from t5tune.data.tokens.tokenizer import BYTE_TOKEN, BYTES_OFFSET, Tokenizer


@dataclass(frozen=True)
class Spellings:
    """The bytes of each id after a previous id (`later`) and at the beginning of a reply (`first`).

    None: never allowed, such as special tokens, sentinels, and rows of the embedding without a token.
    """

    later: list[bytes | None]
    first: list[bytes | None]

    @property
    def drops_space(self) -> bool:
        """Whether the decoder drops a space at the beginning of a reply."""
        return self.later != self.first


def spell(tokenizer: Tokenizer, num_rows: int) -> Spellings:
    """Spell the ids of a model with this number of embedding rows."""
    later: list[bytes | None] = [None] * num_rows
    if tokenizer.backend is None:  # ByT5
        later[BYTES_OFFSET : BYTES_OFFSET + 256] = [bytes([byte]) for byte in range(256)]
        return Spellings(later, later)
    backend, vocabulary = tokenizer.backend, tokenizer.get_vocab()
    decoder = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
    has_bytes, alphabet = '"ByteFallback"' in decoder, _read_byte_alphabet() if '"ByteLevel"' in decoder else {}
    anchor = next(index for token, index in sorted(vocabulary.items()) if len(token) == 1 and token.isalpha())
    before = backend.decode([anchor])
    first = list(later)
    for token, index in vocabulary.items():
        if index >= num_rows or token in tokenizer.special_tokens:
            continue
        if has_bytes and BYTE_TOKEN.fullmatch(token):
            later[index] = first[index] = bytes([int(token[3:5], 16)])
        elif alphabet and all(character in alphabet for character in token):
            later[index] = first[index] = bytes(alphabet[character] for character in token)
        else:
            later[index] = backend.decode([anchor, index]).removeprefix(before).encode()
            first[index] = backend.decode([index]).encode()
    return Spellings(later, first)


def _read_byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE's alphabet (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}
