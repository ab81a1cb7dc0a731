"""Find words and phrases that make English hard to read, in every text of the repository.

    python -m tools.language [FILE …]      # print each occurrence
    python -m tools.language --update      # write the counts that went down to tests/golden/words.txt

Avoided words are never used. Pointing phrases avoid a noun, so that a reader has to find it. Good English has a few, so
they are counted for each module of the package and each document, and a change may only lower a count.
"""

import argparse
import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tools import REPOSITORY

COUNTS = REPOSITORY / "tests" / "golden" / "words.txt"
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
# phrase: what to write instead
POINTING = {
    r"(?:that|those) (?:of|in|from|with|for)(?! course)": "the noun again, or a possessive",
    r"(?<!how\s)what (?:is|are|was|were|has|have|had|the|an?|no|it|they|this|that|these|those|each|one|follows|fits)": (
        "a noun, such as `the settings that`"
    ),
    r"another|others|the other": "different, new, or the noun",
    r"(?:of|from|in|to|by|with|for|at) (?:which|whom|whose)": "a second sentence",
    r"of (?:its|their|his|your|our|one's) own": "nothing, or `its own X`",
    r"(?:is|are|has|have|had|be|was|were) none": "no, and the noun",
    r"so many|so much|as many|such an?|such as one": "a plain quantity",
    r"(?:the|an?|this|that|each|every|any|no|whole|first|last|new|old|own|other|same|single|previous|next) ones?": (
        "the noun"
    ),
    r"(?:whether|if) (?:that|this|it) is so": "true if",
}
TEXTS = (".md", ".yaml", ".yml", ".sh", ".sbatch", ".toml", ".txt")
STRING_OR_COMMENT = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<comment>#[^\n]*)""",
    re.S,
)
# word lists and generated sentences that a model learns from, and these lists
DATA = {
    "examples/pocket/words.py", "examples/pocket/sentences.py", "examples/pocket/families.py",
    "examples/pocket/facts.py", "examples/pocket/tuning.py",
    "examples/quickstart/train.jsonl", "tools/language.py", "tests/test_language.py",
}  # fmt: skip


def compile_choices(choices: dict[str, str]) -> re.Pattern[str]:
    """Compile a pattern of whole words, with a group for each choice."""
    words = (choice.replace(" ", r"\s+") for choice in choices)
    choices_of_words = "|".join(rf"(?P<c{number}>{word})" for number, word in enumerate(words))
    return re.compile(rf"\b(?:{choices_of_words})(?!\w)", re.I)


def list_files() -> list[str]:
    """List the tracked files that people read."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    files = set(listed.splitlines()) - DATA
    return sorted(name for name in files if name.endswith((".py", *TEXTS)) or name.endswith(("Makefile", "faults.c")))


def is_counted(name: str) -> bool:
    """Return True for modules of the package and for documents."""
    return (name.startswith("t5tune/") and name.endswith(".py")) or name.endswith(".md")


@cache
def read_texts(path: Path) -> list[tuple[int, str]]:
    """Read the texts of a file with their first lines. Python has strings, comments, and the names that it defines."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [(1, source)]
    texts = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str() as text):
                texts.append((node.lineno, text))
            case ast.Constant(value=bytes() as data):
                texts.append((node.lineno, data.decode(errors="replace")))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                texts.append((node.lineno, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " "))))
    # in a tenth of the time of `tokenize`
    comments = (match for match in STRING_OR_COMMENT.finditer(source) if match["comment"])
    return [*texts, *((source.count("\n", 0, match.start()) + 1, match["comment"]) for match in comments)]


def read_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Read the texts of a file that are sentences: of Markdown without code."""
    for line, text in read_texts(path):
        if path.suffix == ".md":
            blocks = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
            yield line, re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", " ", blocks)
        elif len(text.split()) > 2:
            yield line, text


def find_words(path: Path) -> list[str]:
    """Return `file:line: word: write …` for each avoided word."""
    return _find(path, read_texts(path), AVOIDED)


def find_phrases(path: Path) -> list[str]:
    """Return `file:line: phrase: write …` for each pointing phrase."""
    return _find(path, read_prose(path), POINTING)


def _find(path: Path, texts: Iterable[tuple[int, str]], choices: dict[str, str]) -> list[str]:
    pattern, advice = compile_choices(choices), list(choices.values())
    name = path.relative_to(REPOSITORY)
    found = []
    for first, text in texts:
        for match in pattern.finditer(text):
            line, words = first + text.count("\n", 0, match.start()), " ".join(match[0].split())
            found.append((line, f"{name}:{line}: {words!r}: write {advice[int(str(match.lastgroup)[1:])]}"))
    return [text for _, text in sorted(found)]


def count_phrases() -> dict[str, int]:
    """Count the pointing phrases of each file that has some."""
    counts = {name: len(find_phrases(REPOSITORY / name)) for name in list_files() if is_counted(name)}
    return {name: count for name, count in counts.items() if count}


def read_allowed() -> dict[str, int]:
    """Read how many pointing phrases a file may have. Files that aren't listed may have none."""
    return {name: int(count) for name, count in map(str.split, COUNTS.read_text(encoding="utf-8").splitlines())}


def main() -> None:
    """Print what was found, or write lower counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true", help="lower the counts in tests/golden/words.txt")
    arguments = parser.parse_args()
    if arguments.update:
        allowed = read_allowed()
        counts = {name: min(count, allowed.get(name, 0)) for name, count in count_phrases().items()}
        COUNTS.write_text("".join(f"{name} {count}\n" for name, count in counts.items() if count), encoding="utf-8")
        return
    for path in [path.resolve() for path in arguments.files] or [REPOSITORY / name for name in list_files()]:
        is_prose = is_counted(str(path.relative_to(REPOSITORY)))
        print(*find_words(path), *(find_phrases(path) if is_prose else []), sep="\n", end="\n" * is_prose)


if __name__ == "__main__":
    main()
