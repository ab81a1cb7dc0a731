"""Plain English: `tools/language.py` lists the words and phrases that make texts hard to read."""

from pathlib import Path

import pytest

from tools import REPOSITORY, language


def test_no_text_has_avoided_words() -> None:
    assert [line for name in language.list_files() for line in language.find_words(REPOSITORY / name)] == []


def test_no_file_has_more_pointing_phrases_than_before() -> None:
    allowed = language.read_allowed()
    too_many = [name for name, count in language.count_phrases().items() if count > allowed.get(name, 0)]
    assert [language.find_phrases(REPOSITORY / name) for name in too_many] == []


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(language, "REPOSITORY", tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read_places(found: list[str]) -> list[tuple[str, str]]:
    return [(line, word.strip()) for _, line, word, *_ in (text.split(":") for text in found)]


def test_avoided_words_are_found_in_code_and_documents(repository: Path) -> None:
    code = write(
        repository / "code.py",
        '"""Sealed."""\n\n\ndef mend_it():  # anew\n    return f"{1} stands" " behind"\n',
    )
    page = write(repository / "page.md", "It goes on\nfrom there.\nA beside-the-point colour, sealant.\n")
    assert read_places(language.find_words(code)) == [
        ("1", "'Sealed'"), ("4", "'anew'"), ("4", "'mend'"), ("5", "'behind'"), ("5", "'stands'"),
    ]  # fmt: skip
    assert read_places(language.find_words(page)) == [
        ("1", "'goes on from'"), ("3", "'beside'"), ("3", "'colour'"),
    ]  # fmt: skip


def test_pointing_phrases_are_counted_outside_of_code(repository: Path) -> None:
    code = write(repository / "code.py", 'def that_of(x):\n    return "a tokenizer and that\\nof another", "that of"\n')
    page = write(repository / "page.md", "Its size\nis none.\n```\nof its own\n```\n`that of` is one. In which?\n")
    assert read_places(language.find_phrases(code)) == [("2", "'that of'"), ("3", "'another'")]
    assert read_places(language.find_phrases(page)) == [("2", "'is none'"), ("6", "'In which'")]
