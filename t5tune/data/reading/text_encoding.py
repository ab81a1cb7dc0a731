"""Read text files in any encoding as UTF-8, and detect the encoding of files without a byte order mark.

    encoding = find_encoding(chunks, given=None, place="tickets.csv")   # "cp1252"
    for chunk in read_as_utf8(chunks, given=None, place="tickets.csv"):
        ...

A byte order mark decides, then the given encoding. Without both, a file is UTF-8 if most of its records with letters
beyond ASCII are UTF-8. Other files are decoded in each common encoding. A decoding is likely if its words don't mix
alphabets, and the accented letters of each cell belong to one language. If all likely decodings have the same text, it
is clear. Otherwise, chardet's confidence decides, but only if the decodings differ in enough letters.
"""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import NamedTuple

from t5tune.errors import DataError

UTF8 = "utf-8"
DEFAULT_CODE_PAGE = "cp1252"
# encodings that programs write by default somewhere; the user must confirm any other detected encoding
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
SINGLE_BYTE_ENCODINGS = COMMON_ENCODINGS[:12]
ORDERED_ENCODINGS = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
ORDER_BYTES = 1 << 12
MIN_ASCII_SHARE = 0.01  # share of spaces and line ends in the bytes of UTF-16 without a byte order mark
MAX_CONTROL_SHARE = 0.05  # share of control characters, NUL among them, in the bytes of UTF-8
MAX_ASCII_BYTES = 16 << 20  # a file that begins with this many bytes of ASCII is taken for UTF-8
SAMPLE_BYTES = 1 << 20  # the sample begins at the first byte beyond ASCII,
MAX_WORD_BYTES = 100  # and with at most this many bytes of its line before it
DETECTED_BYTES = 1 << 16  # how much of the sample's lines beyond ASCII the detector gets
MIN_CONFIDENCE = 0.03
# A likely decoding may have this share of the highest confidence without being a rival: a base, and more for each
# different letter that occurs about three times. Uncommon encodings are rivals only if they are about as likely.
RIVAL_SHARE, RIVAL_SHARE_PER_LETTER, MAX_RIVAL_SHARE = 0.1, 0.17, 0.9
UNCOMMON_RIVAL_SHARE = 0.97
LETTER_COUNT = 3
MAX_ODD_SHARE = 0.01  # share of the characters beyond ASCII
MAX_MIXED_SHARE = 0.02  # share of the cells with accented letters; a single cell is allowed
NUM_SHOWN = 3
ESCAPE_ERRORS = "t5tune-escape"
# the accented letters of the languages that cp1250, cp1252, cp1254, cp1257 and cp1258 are used for
ALPHABETS = [
    frozenset(letters)
    for letters in (
        "äöüßé", "àâæçéèêëîïôœùûüÿ", "áéíïñóúü", "áàâãçéêíóôõúü", "àèéìíòóù", "àçéèíïòóúü", "áâäçéèêëíîïóôöúûü",
        "æøåéóôòäöü", "åäöéàü", "áæðéíóøúýþö", "âêîôûäëïöáéó", "âçèéêîñôùûü", "ăâîşţ", "ąćęłńóśźż", "áčďéěíňóřšťúůýž",
        "áäčďéíľňóôšťúýž", "áéíóöőúüű", "čćđšž", "čćěłńóŕřšśźž", "ąčęėįšųūž", "āčēģīķļņōŗšūž", "äöõüšž",
        "çğıöşüâîûə\u0307", "àáâãèéêìíòóôõùúýăđĩũơư\u0300\u0301\u0303\u0309\u0323",
    )
]  # fmt: skip
# a byte beyond ASCII, or the escape sequence that begins Japanese text in ISO-2022-JP, whose bytes are all ASCII
_NOT_ASCII = re.compile(rb"[\x80-\xff]|\x1b\$[@B]")
# a truncated character at the end, but not a complete one, which may be the file's only letter beyond ASCII
_CUT_OFF = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")
_CONTROLS = bytes({*range(32)} - {*b"\t\n\r"})
_AFTER_RECORD = re.compile(rb"(?<=[\r\n}])")
_AFTER_LINE = re.compile(rb"(?<=[\r\n])")
_RECORD_END = re.compile(rb"[\r\n}]")  # of a line, or of an object in an array
_CELL_END = re.compile(r'[\t\r\n"{}\[\];|]+|,(?=\S)')
_WORD_END = re.compile(r"[\x00-@\[-`{-\x7f]+")  # ASCII, but no letter
_JSON_ESCAPE = re.compile(r"\\[bfnrt]")
_ACCENTED = "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u036f\u1e00-\u1eff"  # Latin letters and marks
_OTHER = "\u0370-\u0dff"  # letters of other alphabets
_UNDIVIDED = "\u0e00-\u0eff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff66-\uff9f"  # scripts that mix with Latin
_IN_WORD = re.compile(f"(?<=[A-Za-z{_ACCENTED}{_OTHER}])([^\\x00-\\x7f])(?=[A-Za-z{_ACCENTED}{_OTHER}])")
# (in right decodings, in wrong decodings): accented letters next to ASCII letters, words of accented letters only; then
# words of a single alphabet and several ideographs, non-Latin letters in a Latin word
_LATIN_FORMS = (
    re.compile(f"(?<=[A-Za-z])[{_ACCENTED}]|[{_ACCENTED}](?=[A-Za-z])"),
    re.compile(f"(?<![A-Za-z{_ACCENTED}{_OTHER}])[{_ACCENTED}]{{2,}}(?![A-Za-z{_ACCENTED}{_OTHER}])"),
)
_OTHER_FORMS = (
    re.compile(f"(?<![A-Za-z{_ACCENTED}{_OTHER}])[{_OTHER}]{{2,}}(?![A-Za-z{_ACCENTED}{_OTHER}])|[{_UNDIVIDED}]{{2,}}"),
    re.compile(
        f"(?<=[A-Za-z{_ACCENTED}])[{_OTHER}]|[{_OTHER}](?=[A-Za-z{_ACCENTED}])"
        f"|(?<=[A-Za-z])[{_UNDIVIDED}](?![{_UNDIVIDED}])|(?<![{_UNDIVIDED}])[{_UNDIVIDED}](?=[A-Za-z])"
    ),
)
_MARKED_CONSONANT = re.compile("[b-df-hj-np-tv-xz][\u0300-\u036f]")  # Vietnamese has no such consonants
_NOT_LATIN = re.compile(f"[{_OTHER}{_UNDIVIDED}]")
_ACCENTS = re.compile(f"[{_ACCENTED}]")
_JOINERS = "\u00ad\u00b7\u200c\u200d\u2011\u2013\u2014\u2019\u2026"  # symbols that may be within a word


def find_encoding(chunks: Iterator[bytes], given: str | None, place: str) -> str:
    """Find the encoding of a file, reading only as far as needed; arguments as for `read_as_utf8`."""
    found: list[str] = []
    for _ in read_as_utf8(chunks, given, place, found.append):
        if found:
            break
    return found[0] if found else UTF8


def read_as_utf8(
    chunks: Iterator[bytes], given: str | None, place: str, note: Callable[[str], None] = lambda encoding: None
) -> Iterator[bytes]:
    """Yield a file's text as UTF-8. Bytes that aren't valid in its encoding become lone surrogates.

    If the encoding is detected as a different one, the bytes of a record that is UTF-8 become lone surrogates, too.
    `note` gets the encoding once it is found, unless all is ASCII.

    Args:
        given: the encoding of a file without a byte order mark; None: it is detected.
    """
    start = b""
    while len(start) < ORDER_BYTES and (chunk := next(chunks, b"")):
        start += chunk
    chunks = chain([start], chunks)
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    encoding, decode = marked or given, _decode
    if marked is None and start and given in (None, "utf-16", "utf-32", *ORDERED_ENCODINGS):
        _check_order(start[:ORDER_BYTES], given, place)
    if encoding is None:
        num_ascii = 0
        for chunk in chunks:
            while chunk.endswith((b"\x1b", b"\x1b$")) and (more := next(chunks, b"")):
                chunk += more
            found = _NOT_ASCII.search(chunk)
            if found is not None or num_ascii >= MAX_ASCII_BYTES:
                break
            yield chunk
            num_ascii += len(chunk)
        else:
            return
        encoding = UTF8
        if found is not None and found[0].isascii():
            encoding = "iso2022_jp"
        elif found is not None and num_ascii < MAX_ASCII_BYTES:
            while len(chunk) - found.start() < SAMPLE_BYTES and (more := next(chunks, b"")):
                chunk += more
            first = max(chunk.rfind(b"\n", 0, found.start()) + 1, found.start() - MAX_WORD_BYTES)
            encoding, decode = _detect(chunk[first : found.start() + SAMPLE_BYTES], place), _decode_records
        chunks = chain([chunk], chunks)
    note(encoding)
    yield from chunks if encoding == UTF8 else decode(chunks, encoding)


def _check_order(start: bytes, given: str | None, place: str) -> None:
    # without a byte order mark, the order must be given and show ASCII characters
    if b"\x00" not in start:
        if given is not None:
            hint = "without --encoding, it is detected"
            raise DataError(f"{place}: not {given}: no byte order mark and no zero bytes", hint=hint)
        return
    if given is None and _is_utf8_with_few_nuls(start):
        return
    counts = {encoding: _count_ascii(start, encoding) for encoding in ORDERED_ENCODINGS}
    found, second = sorted(counts, key=lambda encoding: -counts[encoding])[:2]
    is_clear = counts[found] > MIN_ASCII_SHARE * len(start) and 2 * counts[second] <= counts[found]
    if counts.get(given or "", 0) <= 0 and (given is not None or is_clear or b"\x00" in start[:2]):
        problem = f"{place}: {found[:6].upper()} without a byte order mark"
        raise DataError(problem, hint=f"add --encoding {found}")


def _is_utf8_with_few_nuls(start: bytes) -> bool:
    # UTF-16 may be valid UTF-8, too, but then many of its bytes are control characters
    num_controls = len(start) - len(start.translate(None, _CONTROLS))
    return num_controls < MAX_CONTROL_SHARE * len(start) and _is_utf8(_CUT_OFF.sub(b"", start))


def _count_ascii(data: bytes, encoding: str) -> int:
    # UTF-32 that is read as UTF-16 shows zeros
    text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
    return sum(map("\x80".__gt__, text)) - 2 * text.count("\x00")


def _decode(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(ESCAPE_ERRORS)
    for chunk in chain(chunks, [b""]):
        if text := decoder.decode(chunk, final=not chunk):
            yield text.encode(errors="surrogatepass")


def _decode_records(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    # in a multi-byte encoding, a brace may be the second byte of a character, and a short word may be UTF-8 by chance
    end, first = (_AFTER_RECORD, "\x80") if encoding in SINGLE_BYTE_ENCODINGS else (_AFTER_LINE, "\u0800")
    decoder = codecs.getincrementaldecoder(encoding)(ESCAPE_ERRORS)

    def decode(record: bytes) -> str:
        is_utf8 = not record.isascii() and _is_utf8(record) and max(record.decode()) >= first
        return record.decode("ascii", ESCAPE_ERRORS) if is_utf8 else decoder.decode(record)

    rest = b""
    for chunk in chain(chunks, [b""]):
        *records, rest = end.split(rest + chunk)
        if not chunk or len(rest) > SAMPLE_BYTES:
            records, rest = [*records, rest], b""
        text = "".join(map(decode, records)) + decoder.decode(b"", final=not chunk)
        if text:
            yield text.encode(errors="surrogatepass")


def decode_record(data: bytes) -> str:
    """Decode a part of the output of `read_as_utf8`: invalid bytes are lone surrogates in the text."""
    try:
        return data.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape")


def is_escaped_utf8(text: str) -> bool:
    """Whether the bytes of lone surrogates are UTF-8, so that only the file's encoding made them invalid."""
    try:
        data = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # other surrogates
        return False
    return _is_utf8(data) and data.decode() != text


def _escape_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE_ERRORS, _escape_bytes)


class _Decoding(NamedTuple):
    """A likely decoding of a sample, and the detector's confidence in it."""

    text: str
    encoding: str
    confidence: float


def _detect(sample: bytes, place: str) -> str:
    # the sample begins before its first byte beyond ASCII
    records = [record for record in _RECORD_END.split(_CUT_OFF.sub(b"", sample)) if not record.isascii()]
    if 2 * sum(map(_is_utf8, records)) > len(records):
        return UTF8
    lines = [line for line in sample.splitlines(keepends=True) if not _is_utf8(line)]
    sample = b"".join(lines or [sample])[:DETECTED_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    decodings = _list_decodings(sample)
    if decodings and decodings[0].encoding in COMMON_ENCODINGS and decodings[0].confidence >= MIN_CONFIDENCE:
        best, *others = decodings
        if not any(_is_rival(other, best) for other in others):
            return best.encoding
    hint = f"{_suggest(sample, decodings)}; --encoding {UTF8} rejects the records that aren't UTF-8"
    raise DataError(f"{place}: not UTF-8, and its encoding isn't clear", hint=hint)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _list_decodings(sample: bytes) -> list[_Decoding]:
    """List the likely decodings of a sample, each text once, in descending order of confidence."""
    from chardet import EncodingEra, detect_all

    eras = EncodingEra.MODERN_WEB | EncodingEra.LEGACY_ISO | EncodingEra.LEGACY_MAC | EncodingEra.DOS
    found = detect_all(sample, ignore_threshold=True, encoding_era=eras, compat_names=False, max_bytes=len(sample))
    confidences = dict.fromkeys(COMMON_ENCODINGS, 0.0)
    confidences |= {each["encoding"]: each["confidence"] for each in found if each["encoding"] is not None}
    decodings: dict[str, _Decoding] = {}
    for encoding, confidence in confidences.items():
        text = _decode_sample(sample, encoding)
        if text is not None and text in decodings:
            confidence = max(confidence, decodings[text].confidence)
            decodings[text] = decodings[text]._replace(confidence=confidence)
        elif text is not None and _is_likely(text):
            decodings[text] = _Decoding(text, encoding, confidence)
    return sorted(decodings.values(), key=lambda each: each.confidence, reverse=True)


def _decode_sample(sample: bytes, encoding: str) -> str | None:
    # the sample may end within a character
    try:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    except LookupError:
        return None
    num_others = sum(map("\x7f".__lt__, text))
    return text if text.count("\ufffd") <= MAX_ODD_SHARE * num_others else None


def _is_rival(other: _Decoding, best: _Decoding) -> bool:
    share = other.confidence / best.confidence
    letters = Counter(best.text.lower()) - Counter(other.text.lower())
    is_alike = 2 * letters.total() < sum(map("\x7f".__lt__, best.text))
    if is_alike and "\ufffd" in other.text:  # the detector has no confidence in invalid bytes; a few are possible
        return True
    if other.encoding not in COMMON_ENCODINGS:
        return share > UNCOMMON_RIVAL_SHARE and not is_alike
    evidence = min(len(letters), letters.total() / LETTER_COUNT)
    return share > min(MAX_RIVAL_SHARE, RIVAL_SHARE + RIVAL_SHARE_PER_LETTER * evidence)


def _is_likely(text: str) -> bool:
    """Whether a text seems to consist of words, each of one alphabet."""
    others = [character for character in text if character > "\x7f"]
    # the currency sign and the pilcrow aren't used; they are in the place of iso8859-15's euro and of Greek letters
    if any(unicodedata.category(each) in ("Cc", "Cn", "Co") or each in "\u00a4\u00b6" for each in set(others)):
        return False
    text = _JSON_ESCAPE.sub(" ", text)
    odd = sum(unicodedata.category(each)[0] not in "LMZ" and each not in _JOINERS for each in _IN_WORD.findall(text))
    odd += sum(not (a + b).isascii() and a.islower() and b.isupper() for a, b in pairwise(text))
    odd += len(_MARKED_CONSONANT.findall(text))
    if odd > MAX_ODD_SHARE * len(others):
        return False
    (num_latin, num_bad_latin), (num_other, num_bad_other) = (
        [len(pattern.findall(text)) for pattern in patterns] for patterns in (_LATIN_FORMS, _OTHER_FORMS)
    )
    if num_bad_latin > num_latin or num_bad_other > num_other or (num_other == 0 and _NOT_LATIN.search(text)):
        return False
    accents = [frozenset(found) for cell in _CELL_END.split(text.lower()) if (found := _ACCENTS.findall(cell))]
    num_mixed = sum(not any(found <= alphabet for alphabet in ALPHABETS) for found in accents)
    return num_mixed <= max(1, MAX_MIXED_SHARE * len(accents))


def _suggest(sample: bytes, decodings: list[_Decoding]) -> str:
    """List the flags for the likely encodings, the default one first, each with a word that it decodes differently."""
    shown = sorted(decodings, key=lambda each: each.encoding != DEFAULT_CODE_PAGE)[:NUM_SHOWN]
    default = _decode_sample(sample, DEFAULT_CODE_PAGE)
    if default is not None and default not in [each.text for each in shown]:
        shown = [*shown[: NUM_SHOWN - 1], _Decoding(default, DEFAULT_CODE_PAGE, 0)]
    words = _find_different_words([each.text for each in shown])
    read = [f"--encoding {each.encoding} reads {word[:20]!r}" for each, word in zip(shown, words, strict=True)]
    return ", ".join(read) or f"name it, such as --encoding {DEFAULT_CODE_PAGE}"


def _find_different_words(texts: list[str]) -> list[str]:
    words = [_WORD_END.split(text) for text in texts]
    places = zip(*words, strict=False)
    found = next((each for each in places if len(set(each)) == len(each) and not each[0].isascii()), None)
    return list(found) if found is not None else [next(word for word in each if not word.isascii()) for each in words]
