"""Plain English: the words that this project avoids appear in no text that a user or a reader meets.

`python tests/test_language.py [FILE …]` prints each occurrence.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# word: what to write instead
AVOIDED = {
    r"stands|stood": "is, exists, contains",
    r"seal|seals|sealed|sealing|seal's": "save; complete checkpoint, verified checkpoint",
    r"anew": "again, start over, re-…",
    r"beside": "next to, along with, in addition to, compared with",
    r"behind": "after",
    r"mend|mends|mended|mending": "fix",
    r"strangers?|strangers'|stranger's": "untrusted files, newcomer",
    r"nobody|somebody": "no one, nothing, someone; or name the person",
    r"goes on from|go on from|going on from|went on from": "resumes from, continues from",
    r"held against": "compared with",
    r"laid open": "decoded, shown",
    r"passed over": "skipped",
    r"\w*(?:quant|initial|normal|optim|token|serial|recogn|organ|summar|general)is(?:ed?|es|ers?|ing|ations?)": (
        "American spelling, -iz-"
    ),
    r"\w*(?:colour|behaviour|favour|neighbour|honour)\w*|centre|licence|grey|catalogue|artefact": "American spelling",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(AVOIDED)), re.IGNORECASE)
TEXTS = (".md", ".yaml", ".yml", ".sh", ".sbatch", ".toml", ".txt")
# word lists and generated sentences that a model learns from, and this list itself
DATA = {
    "examples/pocket/words.py", "examples/pocket/families.py", "examples/pocket/facts.py", "examples/pocket/tuning.py",
    "examples/quickstart/train.jsonl", "tests/test_language.py",
}  # fmt: skip


def text_files() -> list[Path]:
    """Every tracked file that people read."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.splitlines() if name not in DATA]
    return [
        REPOSITORY / name
        for name in names
        if name.endswith((".py", *TEXTS)) or name in {"Makefile", "tests/support/faults.c"}
    ]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a file: of Python its strings, docstrings, comments and the names it defines, else each line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str() as text):
                yield from enumerate(text.splitlines(), node.lineno)
            case ast.Constant(value=bytes() as data):
                yield node.lineno, data.decode(errors="replace")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " "))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def findings(path: Path) -> list[str]:
    """`file:line: word → what to write`, for each avoided word of a file."""
    found = []
    for line, text in texts_of(path):
        for match in PATTERN.finditer(text):
            advice = list(AVOIDED.values())[int(str(match.lastgroup)[1:])]
            found.append(f"{path.relative_to(REPOSITORY)}:{line}: {match[0]!r}: write {advice}")
    return sorted(set(found))


@pytest.mark.parametrize("path", text_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_avoided_words_are_in_no_text(path: Path) -> None:
    assert not findings(path)


def test_an_avoided_word_is_found_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_language.REPOSITORY", tmp_path)
    code = tmp_path / "code.py"
    code.write_text('"""Sealed."""\n\n\ndef mend_it():  # anew\n    return f"{1} stands" " behind"\n', encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("It goes on from there.\nA beside-the-point colour, sealant.\n", encoding="utf-8")
    assert [line.split(":")[1:3] for line in findings(code)] == [
        ["1", " 'Sealed'"], ["4", " 'anew'"], ["4", " 'mend'"], ["5", " 'behind'"], ["5", " 'stands'"],
    ]  # fmt: skip
    assert [line.split(":")[1:3] for line in findings(page)] == [
        ["1", " 'goes on from'"], ["2", " 'beside'"], ["2", " 'colour'"],
    ]  # fmt: skip


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]] or text_files()
    print(*(line for path in paths for line in findings(path)), sep="\n")
