"""Encodings of text files: they are detected, given or asked for, and none loses a record."""

import codecs
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from t5tune.commands.evaluate import evaluate
from t5tune.commands.prepare import prepare
from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.text_encoding import (
    MAX_ASCII_BYTES,
    SAMPLE_BYTES,
    decode_record,
    find_encoding,
    is_escaped_utf8,
    read_as_utf8,
)
from t5tune.errors import DataError
from t5tune.preparing import sample
from t5tune.progress import Event, Note
from t5tune.settings import EvaluateSettings, PrepareSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import prepare as prepare_in_fork
from tests.support.caches import find_cache, open_only

pytestmark = pytest.mark.slow

GERMAN = ["Die Lieferung an die Straße kam zu spät", "Rückerstattung für das Gerät – sofort", "20 € für die Größe"]
FRENCH = ["Le café était fermé à cause de la grève", "L’article n’est pas arrivé, ça suffit"]
SPANISH = ["El niño comió una manzana mañana", "Señor Muñoz pidió más información"]
POLISH = ["Zażółć gęślą jaźń, proszę o zwrot", "Paczka nie dotarła na czas, żądam pieniędzy"]
RUSSIAN = ["Мой заказ не пришёл, верните деньги", "Пароль не подходит, помогите восстановить доступ"]
GREEK = ["Η παραγγελία μου δεν έφτασε ποτέ", "Θέλω επιστροφή χρημάτων παρακαλώ"]
TURKISH = ["Siparişim hâlâ gelmedi, lütfen geri verin", "Şifremi unuttum, hesabıma giremiyorum"]
JAPANESE = ["注文した商品がまだ届きません", "パスワードを忘れてしまいました"]
CHINESE = ["我的订单还没有到，请退款", "我忘记了密码，请帮助我"]
KOREAN = ["주문한 상품이 아직 도착하지 않았습니다", "비밀번호를 잊어버렸어요"]
ENGLISH = ["My order has not arrived yet", "I forgot the password", "The app crashes"]
LABELS = ["billing", "login", "bug"]


def make_table(texts: list[str], count: int = 60, share: float = 0.6, seed: int = 0) -> pandas.DataFrame:
    rng = random.Random(seed)
    rows = [
        (f"{rng.choice(texts if rng.random() < share else ENGLISH)} {number}", rng.choice(LABELS))
        for number in range(count)
    ]
    return pandas.DataFrame(rows, columns=["source", "target"])


def write_table(path: Path, table: pandas.DataFrame, encoding: str) -> Path:
    """Write a table as Excel and pandas do, as JSON lines, or as a JSON array."""
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, encoding=encoding, sep="\t" if path.suffix == ".tsv" else ",")
        return path
    records = table.to_dict("records")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(
        lines if path.suffix == ".jsonl" else json.dumps(records, ensure_ascii=False), encoding=encoding, newline=""
    )
    return path


def read_pairs(path: Path, **reading: Any) -> list[tuple[str, str]]:
    settings = ReadingSettings(**reading)
    records = [parse_record(record, settings) for record in read_records(find_files([str(path)]), settings)]
    assert all(isinstance(record, Conversation) for record in records)
    return [(record.turns[0].text, record.turns[1].text) for record in records if isinstance(record, Conversation)]


def list_pairs(table: pandas.DataFrame) -> list[tuple[str, str]]:
    return list(table.itertuples(index=False, name=None))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize(
    ("texts", "encoding"),
    [
        (GERMAN + FRENCH, "cp1252"), (SPANISH, "cp1252"), (["It’s late – “very” late"], "cp1252"),
        (GERMAN[:1] + FRENCH[:1], "latin-1"), (POLISH, "cp1250"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"),
        (GREEK, "cp1253"), (TURKISH, "cp1254"), (JAPANESE, "shift_jis"), (CHINESE, "gb18030"), (KOREAN, "cp949"),
        (JAPANESE, "iso2022_jp"), (GERMAN + RUSSIAN, "utf-8"), (GERMAN + RUSSIAN, "utf-8-sig"),
        (GERMAN + CHINESE, "utf-16"), (GERMAN + CHINESE, "utf-32"),
    ],
)  # fmt: skip
def test_every_record_is_read_in_the_encoding_of_its_file(
    tmp_path: Path, texts: list[str], encoding: str, suffix: str
) -> None:
    table = make_table(texts)
    assert read_pairs(write_table(tmp_path / f"data{suffix}", table, encoding)) == list_pairs(table)


def test_raw_text_is_read_in_the_encoding_of_its_file(tmp_path: Path) -> None:
    text = "\n\n".join(GERMAN + FRENCH * 3)
    (tmp_path / "data.txt").write_text(text, encoding="cp1252")
    settings = ReadingSettings(objective="span-corruption")
    records = list(read_records([tmp_path / "data.txt"], settings))
    assert [record.data for record in records] == [{"text": text}]


@pytest.mark.parametrize(
    ("texts", "encoding"),
    [(FRENCH, "mac_roman"), (RUSSIAN, "mac_cyrillic"), (POLISH, "iso8859-2"), (["20 € pour le cœur"], "iso8859-15")],
)
def test_an_encoding_that_is_not_clear_is_asked_for(tmp_path: Path, texts: list[str], encoding: str) -> None:
    table = make_table(texts, share=1)
    path = write_table(tmp_path / "data.csv", table, encoding)
    with pytest.raises(DataError, match=r"data\.csv: not UTF-8, and its encoding isn't clear") as caught:
        read_pairs(path)
    assert "--encoding " in str(caught.value.hint)
    assert read_pairs(path, encoding=encoding) == list_pairs(table)


ITALIAN = [
    "La città è molto bella.", "Lunedì la riunione sarà alle nove.", "L'università riapre a settembre.",
    "Così va meglio.", "Perché non funziona più?", "La qualità del servizio è buona.", "Il caffè è pronto.",
    "Potrò ritirare il pacco domani?", "Sono però lieto.", "Giù in cantina fa freddo.", "Novità in arrivo.",
]  # fmt: skip
ICELANDIC = ["Það er gott veður í dag", "Þú ert góður vinur", "Ég skil ekki þessa bók"]
ALBANIAN = ["Fjalëkalimi është i gabuar", "Çdo emër është i vlefshëm", "Nuk ka asnjë përdorues të tillë"]
CZECH = ["Zadejte platné uživatelské jméno", "Heslo musí mít alespoň osm znaků", "Vaše žádost byla přijata"]


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100])
@pytest.mark.parametrize(
    ("texts", "encoding"),
    [
        (ITALIAN, "cp1252"), (FRENCH, "cp1252"), (SPANISH, "cp1252"), (ICELANDIC, "cp1252"), (ALBANIAN, "cp1252"),
        (CZECH, "cp1250"), (CZECH, "iso8859-2"), (POLISH, "cp1250"), (TURKISH, "cp1254"), (RUSSIAN, "cp1251"),
        (["I like the café", "We saw São Paulo", "A jalapeño", "It was déjà vu", "crème brûlée"], "cp1252"),
        (["Zażółć\nŻądam", "Łódź"], "cp1250"),
    ],
)  # fmt: skip
def test_no_text_is_read_wrongly(texts: list[str], encoding: str, count: int) -> None:
    for seed in range(5):
        rows = random.Random(seed).choices(texts + ENGLISH, k=count)
        text = "".join(json.dumps({"source": row}, ensure_ascii=False) + "\n" for row in rows)
        try:
            found = find_encoding(iter([text.encode(encoding)]), None, "a")
        except DataError:
            continue
        assert text.encode(encoding).decode(found) == text


@pytest.mark.parametrize("texts", [ITALIAN, [*FRENCH, *ENGLISH], ICELANDIC, GERMAN[:1]])
def test_cp1252_is_recognized(texts: list[str]) -> None:
    text = "\n".join(texts * 5)
    found = find_encoding(iter([text.encode("cp1252")]), None, "a")
    assert text.encode("cp1252").decode(found) == text


@pytest.mark.parametrize("bad", [b"\x81\x8d", "\u00fc".encode(), b""], ids=["stray bytes", "some UTF-8", "few letters"])
def test_cp1252_is_the_first_choice_where_it_is_likely(bad: bytes) -> None:
    lines = [text.encode("cp1252") for text in (FRENCH * 300 if bad else ["5 £ each ½"])]
    lines[len(lines) // 2] = bad + lines[len(lines) // 2]
    try:
        found = find_encoding(iter([b"\n".join(lines)]), None, "a")
    except DataError as error:
        found = str(error.hint)
    assert found == "cp1252" or found.startswith("--encoding cp1252 reads ")


def test_the_hint_shows_whole_words() -> None:
    with pytest.raises(DataError) as caught:
        find_encoding(iter(['source,target\n"Vedo la città",sì\n'.encode("cp1252")]), None, "a")
    assert "--encoding cp1252 reads 'città', " in str(caught.value.hint)


@pytest.mark.parametrize("num_bytes", [0, 1, 2])
@pytest.mark.parametrize("separator", ["", "\n"], ids=["one line", "lines"])
def test_truncated_utf_8_is_recognized(separator: str, num_bytes: int) -> None:
    text = "b" * num_bytes + separator.join(CHINESE * 50_000)
    assert find_encoding(iter([text.encode()]), None, "a") == "utf-8"  # the sample ends after 1 MiB
    assert find_encoding(iter([b"a,b\nsch\xc3\xb6n,c\ngro\xc3"]), None, "a") == "utf-8"


@pytest.mark.parametrize("last", ["é", "€", "😀", "\ufeff"])
def test_a_last_character_shows_that_a_file_is_utf_8(last: str) -> None:
    assert find_encoding(iter([f"My name is Ren{last}".encode()]), None, "a") == "utf-8"


@pytest.mark.parametrize("num_bytes", [0, 1])
@pytest.mark.parametrize(("texts", "encoding"), [(JAPANESE, "euc_jp"), (JAPANESE, "cp932"), (CHINESE, "gb18030")])
def test_one_long_line_of_a_multi_byte_encoding_is_recognized(texts: list[str], encoding: str, num_bytes: int) -> None:
    text = "b" * num_bytes + "".join(texts * 1500)
    found = find_encoding(iter([text.encode(encoding)]), None, "a")
    assert text.encode(encoding).decode(found) == text


WIDE = [(f"utf-{bits}-{order}", f"utf-{bits}") for bits in (16, 32) for order in ("le", "be")]


@pytest.mark.parametrize("texts", [GERMAN, RUSSIAN])
@pytest.mark.parametrize(
    ("encoding", "given", "problem"),
    [
        *((each, given, f"{name.upper()} without a byte order mark; add --encoding {each}")
          for each, name in WIDE for given in (None, name)),
        ("utf-16-le", "utf-16-be", "UTF-16 without a byte order mark; add --encoding utf-16-le"),
        ("utf-16-le", "utf-32-le", "UTF-16 without a byte order mark; add --encoding utf-16-le"),
        ("utf-32-be", "utf-16-be", "UTF-32 without a byte order mark; add --encoding utf-32-be"),
        ("utf-8", "utf-16-le", "not utf-16-le: no byte order mark and no zero bytes"),
        ("utf-8", "utf-32", "not utf-32: no byte order mark and no zero bytes"),
    ],
)  # fmt: skip
def test_a_wide_encoding_without_a_mark_must_be_named(
    tmp_path: Path, texts: list[str], encoding: str, given: str | None, problem: str
) -> None:
    table = make_table(texts)
    path = write_table(tmp_path / "data.csv", table, encoding)
    with pytest.raises(DataError, match=f"data.csv: {problem}"):
        read_pairs(path, encoding=given)
    assert read_pairs(path, encoding=encoding) == list_pairs(table)


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("texts", [RUSSIAN, CHINESE, GREEK])
def test_utf_16_that_does_not_begin_with_ascii_is_named(texts: list[str], order: str) -> None:
    text = "".join(f"{text}\t{text}\n" for text in texts * 9)
    with pytest.raises(DataError, match=f"UTF-16 without a byte order mark; add --encoding utf-16-{order}"):
        find_encoding(iter([text.encode(f"utf-16-{order}")]), None, "a")


def test_utf_8_with_nul_characters_is_not_taken_for_utf_16(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    rows = ["source,target", *(f"frage {number},réponse {number}" for number in range(6)), "a\0,b", "\0c,d\0"]
    table.write_text("\n".join(rows))
    result, _ = prepare_table(table, max_rejected_fraction=1)
    assert (result.conversations, result.rejected) == (6, 2)


def test_a_byte_order_mark_wins_over_what_is_given(tmp_path: Path) -> None:
    table = make_table(GERMAN)
    for encoding in ("utf-8-sig", "utf-16"):
        path = write_table(tmp_path / "data.csv", table, encoding)
        assert read_pairs(path, encoding="cp1250") == list_pairs(table)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_bytes_that_the_encoding_does_not_have_reject_their_record(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"data{suffix}", make_table(GERMAN, count=20, share=1), "cp1252")
    path.write_bytes(path.read_bytes().replace(b" 7", b"\x81", 1))
    result, notes = prepare_table(path, encoding="cp1252")
    assert (result.conversations, result.rejected) == (19, 1)
    (line,) = (find_cache(tmp_path / "cache") / "rejected.jsonl").read_text().splitlines()
    assert "the byte 0x81 at character " in json.loads(line)["message"]
    assert r"\udc81" in line
    assert line.count(r"\udc") == 1
    assert any("name the right encoding" in note for note in notes)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_utf_8_in_a_file_of_another_encoding_is_rejected(tmp_path: Path, suffix: str) -> None:
    long = [" ".join([text] * 200) for text in GERMAN]
    path = write_table(tmp_path / f"data{suffix}", make_table(long, count=200, share=1), "cp1252")
    assert path.stat().st_size > SAMPLE_BYTES
    rows = make_table(FRENCH, count=100, share=1, seed=1)
    added = write_table(tmp_path / f"more{suffix}", rows, "utf-8").read_bytes()
    path.write_bytes(path.read_bytes() + (added.partition(b"\n")[2] if suffix == ".csv" else added))  # after the sample
    settings = ReadingSettings()
    records = [parse_record(record, settings) for record in read_records([path], settings)]
    rejected = [record for record in records if not isinstance(record, Conversation)]
    assert len(rejected) == 100
    found = {(each.reason, each.message.partition(";")[0]) for each in rejected}
    assert found == {("invalid_utf8", "UTF-8 in a file with a different encoding")}
    assert len(read_pairs(path, encoding="cp1252")) == len(records)  # a given encoding is used


@pytest.mark.parametrize(("texts", "encoding"), [(CHINESE, "gb18030"), (JAPANESE, "cp932"), (KOREAN, "cp949")])
def test_utf_8_is_invalid_in_a_multi_byte_encoding(texts: list[str], encoding: str) -> None:
    lines = [text.encode(encoding) for text in texts * 9]
    added = [text[:length].encode() for text in texts for length in range(4, len(text), 2)]
    decoded = b"".join(read_as_utf8(iter([b"\n".join([*lines, *added])]), None, "a")).split(b"\n")
    assert [decode_record(line) for line in decoded[: len(lines)]] == texts * 9
    assert all(is_escaped_utf8(decode_record(line)) for line in decoded[len(lines) :])


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-32", "utf-8-sig", "gb18030", "iso2022_jp"])
def test_the_text_does_not_depend_on_where_chunks_end(encoding: str, size: int) -> None:
    text = "\n".join({"gb18030": CHINESE, "iso2022_jp": JAPANESE}.get(encoding, GERMAN) * 40)
    data = text.encode(encoding)

    def divide() -> Iterator[bytes]:
        yield from (data[start : start + size] for start in range(0, len(data), size))

    assert b"".join(read_as_utf8(divide(), None, "a")).removeprefix(codecs.BOM_UTF8).decode() == text
    assert codecs.lookup(find_encoding(divide(), None, "a")) in map(
        codecs.lookup, {encoding, encoding.removesuffix("-sig")}
    )


def test_the_encoding_is_detected_after_megabytes_of_ascii() -> None:
    for num_ascii, expected in ((MAX_ASCII_BYTES - 1, "cp1252"), (MAX_ASCII_BYTES + 1, "utf-8")):
        chunks = iter([b"a" * num_ascii, "\n".join(GERMAN).encode("cp1252")])
        assert find_encoding(chunks, None, "a") == expected


def prepare_table(path: Path, **values: Any) -> tuple[Any, list[str]]:
    events: list[Event] = []
    given = {"model_name_or_path": "pocket", "data_path": str(path), "output_dir": path.parent / "cache"}
    result = prepare(PrepareSettings(**given | values), events.append)
    return result, [event.text for event in events if isinstance(event, Note)]


def test_the_encoding_is_reported_and_identifies_the_cache(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.csv", make_table(GERMAN), "cp1252")
    result, notes = prepare_table(path)
    assert f"read as cp1252: {path}; use --encoding if this is wrong" in notes
    (file,) = open_only(result.cache).manifest["inputs"]["data"]
    assert file["encoding"] == "cp1252"
    assert prepare_table(path)[0].up_to_date
    again, notes = prepare_table(path, encoding="windows-1250", max_rejected_fraction=None)
    assert not again.up_to_date
    assert not any("read as" in note for note in notes)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.variants(".csv")
def test_parts_are_read_in_the_same_encoding(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"data{suffix}", make_table(GERMAN, share=0.05, count=600), "cp1252")
    result, _ = prepare_table(path)
    for index in range(3):
        prepare_table(path, output_dir=tmp_path / "parts", shard=f"{index}/3")
    one, parts = ((find_cache(tmp_path / name) / "tokens.bin").read_bytes() for name in ("cache", "parts"))
    assert result.conversations == 600
    assert one == parts


@pytest.mark.parametrize("num_ascii", [0, 90], ids=["at once", "after the sample"])
def test_standard_input_is_read_in_its_encoding(tmp_path: Path, num_ascii: int) -> None:
    path = write_table(tmp_path / "data.jsonl", make_table(GERMAN), "cp1252")
    line = json.dumps({"source": "a", "target": "b", "unused": "c" * 100_000}).encode() + b"\n"
    assert num_ascii == 0 or num_ascii * len(line) > sample.SAMPLE_BYTES
    path.write_bytes(line * num_ascii + path.read_bytes())
    done = prepare_in_fork(tmp_path, "--data-path", "-", stdin=path.read_bytes())
    assert done.code == 0
    assert "read as cp1252: -" in done.stderr
    assert open_only(tmp_path / "cache").manifest["inputs"]["data"][0]["encoding"] == "cp1252"


def test_evaluate_reads_the_encoding_too(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.csv", make_table(GERMAN, count=8, share=1), "cp1252")
    events: list[Event] = []
    values = {"model_name_or_path": "pocket", "data_path": str(path), "output_dir": tmp_path / "scores"}
    result = evaluate(EvaluateSettings(**values, max_new_tokens=2), events.append)
    assert result.examples == 8
    assert any(isinstance(event, Note) and event.text.startswith("read as cp1252") for event in events)
