"""Read text files in any encoding as UTF-8, and find the encoding of files that don't say it.

    encoding = find_encoding(chunks, given=None, place="tickets.csv")   # "cp1252"
    for chunk in read_as_utf8(chunks, given=None, place="tickets.csv"):
        ...

A byte order mark decides, then what is given. Without both, a file is UTF-8 if most of its records with letters beyond
ASCII are. For others, chardet compares a sample with the letters of many languages. Its answer counts if no likely
encoding reads the sample differently; Excel's in the West, cp1252, wins among rivals.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from t5tune.errors import DataError

UTF8 = "utf-8"
DEFAULT_CODE_PAGE = "cp1252"
# what programs write by default somewhere; other answers of the detector need the user's word
COMMON_ENCODINGS = (
    DEFAULT_CODE_PAGE, "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874",
    "koi8-r", "koi8-u", "cp932", "shift_jis_2004", "euc_jp", "gb18030", "cp950", "big5", "big5hkscs", "cp949", "euc_kr",
)  # fmt: skip
MARKS = {  # byte order marks; UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: UTF8,
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK_BYTES = max(map(len, MARKS))
MAX_ASCII_BYTES = 16 << 20  # a file that begins with so many bytes of ASCII is taken for UTF-8
SAMPLE_BYTES = 1 << 20  # from the first byte beyond ASCII
DETECTED_BYTES = 1 << 16  # of the sample's lines beyond ASCII, for the detector
RIVAL_SHARE = 0.95  # of the highest confidence
EQUAL_SHARE = 0.995
MIN_CONFIDENCE = 0.03
MAX_ODD_SHARE = 0.01  # of the characters beyond ASCII
ESCAPE_ERRORS = "t5tune-escape"
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_RECORD_END = re.compile(rb"[\r\n}]")  # of a line, or of an object in an array
_LETTER = "[A-Za-z\u00c0-\u024f\u0370-\u052f]"  # of alphabets with capitals
_IN_WORD = re.compile(f"(?<={_LETTER})([^\\x00-\\x7f])(?={_LETTER})")
_JOINERS = "\u00ad\u00b7\u200c\u200d\u2011\u2013\u2014\u2019\u2026"  # symbols that may be within a word


def find_encoding(chunks: Iterator[bytes], given: str | None, place: str) -> str:
    """Find the encoding of a file, reading only as far as needed. Arguments and errors are those of `read_as_utf8`."""
    found: list[str] = []
    for _ in read_as_utf8(chunks, given, place, found.append):
        if found:
            break
    return found[0] if found else UTF8


def read_as_utf8(
    chunks: Iterator[bytes], given: str | None, place: str, note: Callable[[str], None] = lambda encoding: None
) -> Iterator[bytes]:
    """Yield a file's text as UTF-8. Bytes that aren't valid in its encoding aren't valid UTF-8 either.

    Args:
        given: the encoding of a file without a byte order mark; None: it is detected.
        place: names the file in messages.
        note: called with the encoding once it is found, unless all is ASCII.

    Raises:
        DataError: the encoding isn't clear, or there is none of this name for text.
    """
    start = b""
    while len(start) < MARK_BYTES and (chunk := next(chunks, b"")):
        start += chunk
    chunks = chain([start], chunks)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), given)
    if encoding is None:
        _check_no_zeros(start, place)
        num_ascii = 0
        for chunk in chunks:
            found = _NOT_ASCII.search(chunk)
            if found is not None or num_ascii >= MAX_ASCII_BYTES:
                break
            yield chunk
            num_ascii += len(chunk)
        else:
            return
        encoding = UTF8
        if found is not None and num_ascii < MAX_ASCII_BYTES:
            while len(chunk) - found.start() < SAMPLE_BYTES and (more := next(chunks, b"")):
                chunk += more
            encoding = _detect(chunk[found.start() : found.start() + SAMPLE_BYTES], place)
        chunks = chain([chunk], chunks)
    note(encoding)
    yield from chunks if encoding == UTF8 else _decode(chunks, encoding)


def _check_no_zeros(start: bytes, place: str) -> None:
    if b"\x00" in start[:2]:
        order = "be" if start.startswith(b"\x00") else "le"
        raise DataError(f"{place}: UTF-16 without a byte order mark", hint=f"add --encoding utf-16-{order}")


def _decode(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(ESCAPE_ERRORS)
    for chunk in chain(chunks, [b""]):
        if text := decoder.decode(chunk, final=not chunk):
            yield text.encode(errors="surrogatepass")


def _escape_bytes(error: UnicodeError) -> tuple[str, int]:
    """Replace each invalid byte with a lone surrogate, for which its record is rejected."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE_ERRORS, _escape_bytes)


def _detect(sample: bytes, place: str) -> str:
    """Detect the encoding of a text from its first byte beyond ASCII on.

    Raises:
        DataError: it isn't clear.
    """
    if len(sample) == SAMPLE_BYTES:  # the last line is cut off
        sample = sample[: sample.rfind(b"\n") + 1] or sample[:-MARK_BYTES]
    records = [record for record in _RECORD_END.split(sample) if not record.isascii()]
    if 2 * sum(map(_is_utf8, records)) > len(records):
        return UTF8
    lines = [line for line in sample.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines)[:DETECTED_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    candidates = _rank_candidates(sample)
    best = max((confidence for _, _, confidence in candidates), default=0)
    rivals = {name: text for text, name, confidence in candidates if confidence >= RIVAL_SHARE * best}
    common = [found for text in rivals.values() if (found := _find_common(sample, text)) is not None]
    if best >= MIN_CONFIDENCE and DEFAULT_CODE_PAGE in common:
        return DEFAULT_CODE_PAGE
    num_equal = sum(confidence >= EQUAL_SHARE * best for _, _, confidence in candidates)
    if best >= MIN_CONFIDENCE and len(common) == num_equal == 1:
        return common[0]
    shown = candidates[:3]
    names = [f"--encoding {_find_common(sample, text) or name}" for text, name, _ in shown]
    words = _find_different_words([text for text, _, _ in shown])
    read = [f"{name} reads {word[:20]!r}" for name, word in zip(names, words, strict=True)]
    found = ", ".join(read) or f"name it, such as --encoding {DEFAULT_CODE_PAGE}"
    hint = f"{found}; --encoding {UTF8} rejects the records that aren't UTF-8"
    raise DataError(f"{place}: not UTF-8, and its encoding isn't clear", hint=hint)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _rank_candidates(sample: bytes) -> list[tuple[str, str, float]]:
    """List the likely readings of a sample, each once: its text, the encoding and the detector's confidence."""
    from chardet import EncodingEra, detect_all

    eras = EncodingEra.MODERN_WEB | EncodingEra.LEGACY_ISO | EncodingEra.LEGACY_MAC | EncodingEra.DOS
    found = detect_all(sample, ignore_threshold=True, encoding_era=eras, compat_names=False, max_bytes=len(sample))
    readings: dict[str, tuple[str, float]] = {}
    for each in found:
        text = _try_decoding(sample, each["encoding"])
        if text is not None and text not in readings and _is_likely(text):
            readings[text] = str(each["encoding"]), each["confidence"]
    return [(text, *reading) for text, reading in readings.items()]


def _try_decoding(sample: bytes, encoding: str | None) -> str | None:
    try:
        return sample.decode(encoding) if encoding is not None else None
    except (UnicodeDecodeError, LookupError):
        return None


def _is_likely(text: str) -> bool:
    """Whether a text has no control characters, and hardly any symbols or capitals within words."""
    others = [character for character in text if character > "\x7f"]
    # the currency sign isn't used; it is in the place of iso8859-15's euro
    if any(unicodedata.category(each) in ("Cc", "Cn", "Co") or each == "\u00a4" for each in set(others)):
        return False
    odd = sum(unicodedata.category(each)[0] not in "LM" and each not in _JOINERS for each in _IN_WORD.findall(text))
    odd += sum(second > "\x7f" and first.islower() and second.isupper() for first, second in pairwise(text))
    return odd <= MAX_ODD_SHARE * len(others)


def _find_common(sample: bytes, text: str) -> str | None:
    return next((name for name in COMMON_ENCODINGS if _try_decoding(sample, name) == text), None)


def _find_different_words(texts: list[str]) -> list[str]:
    """Return a word of each text by which a reader sees the difference."""
    places = zip(*(text.split(" ") for text in texts), strict=False)
    found = next((words for words in places if len(set(words)) == len(words) and not words[0].isascii()), None)
    return list(found) if found is not None else [text.strip() for text in texts]
