"""What is wrong with a YAML file, in a sentence with its line and the next step, instead of the parser's own text.

explain(error, "learning_rate: [1\nseed: 1\n")
# Problem(1, "the [ in column 16 is not closed", "close it with ]")
"""

import re
from dataclasses import dataclass

import yaml

QUOTE_IT = "put the value in quotes"
CLOSING = {"[": "]", "{": "}"}
_NO_SPACE = re.compile(r"\s*([\w-]+):([^\s:/\\].*)")  # `lora_r:8`, but no URL or path
_SCALAR_ERROR = re.compile(r"while scanning an? (?:double-)?quoted scalar")


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which line (from 1), and what to do about it."""

    line: int
    what: str
    hint: str


class InvalidYAML(yaml.YAMLError):
    """A problem that the loader found itself. `mark` is its place."""

    def __init__(self, mark: yaml.Mark, what: str, hint: str) -> None:
        super().__init__(what)
        self.problem = Problem(mark.line + 1, what, hint)


def explain(error: yaml.YAMLError, text: str) -> Problem:
    """The problem that an error of PyYAML reports about a text."""
    if isinstance(error, InvalidYAML):
        return error.problem
    if isinstance(error, yaml.reader.ReaderError):
        line = len(f"{text[: error.position]}x".splitlines())
        # type stubs say that it is bytes; of a text it is the code of a character
        return Problem(line, f"the character U+{int(error.character):04X}, which YAML doesn't allow", "remove it")
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem(1, "not valid YAML", QUOTE_IT)
    lines = [*text.splitlines(), ""]
    mark, start = error.problem_mark, error.context_mark or error.problem_mark
    context, problem = error.context or "", error.problem or ""
    row = lines[min(mark.line, len(lines) - 1)]
    if _SCALAR_ERROR.match(context):
        return _of_quotes(problem, mark, start, row, lines[start.line])
    if context == "while parsing a flow node" and "<stream end>" in problem:
        return Problem(mark.line + 1, "the file ends within brackets", "close them with ] or }")
    if context in ("while parsing a flow sequence", "while parsing a flow mapping"):
        return _of_brackets(problem, mark, start, lines[start.line][start.column])
    if context.startswith(("while scanning an alias", "while scanning an anchor")):
        return Problem(start.line + 1, f"a value can't begin with {lines[start.line][start.column]}", QUOTE_IT)
    if "cannot start any token" in problem:
        return _of_first_character(mark, row)
    if problem.startswith("could not determine a constructor for the tag"):
        return _of_tag(mark, problem)
    if problem == "but found another document":
        return Problem(mark.line + 1, "a second document begins here (---)", "keep one document in the file")
    if problem == "mapping values are not allowed here":
        return _of_colon(mark, lines)
    if problem == "could not find expected ':'":
        return _of_missing_colon(start, lines[start.line])
    if problem == "sequence entries are not allowed here":
        return Problem(mark.line + 1, "a list item (-) has to begin a line of its own", "begin a new line before the -")
    if problem.startswith("expected the node content") and row[mark.column :]:
        what = f"{row[mark.column]} in column {mark.column + 1}, where a value is expected"
        return Problem(mark.line + 1, what, QUOTE_IT)
    if problem.startswith("expected <block end>"):
        return _of_block(mark, row)
    return Problem(mark.line + 1, f"not valid YAML in column {mark.column + 1}", "quote values with special characters")


def _of_quotes(problem: str, mark: yaml.Mark, start: yaml.Mark, row: str, first_row: str) -> Problem:
    if problem.startswith("found unexpected"):  # the end of the file, or `---`
        quote = first_row[start.column]
        what = f"the quote {quote} in column {start.column + 1} is not closed"
        return Problem(start.line + 1, what, f"close it with {quote}")
    backslash = row.rfind("\\", 0, mark.column)
    escape = row[backslash : backslash + 2]
    return Problem(mark.line + 1, f"{escape} is no escape in double quotes", "use single quotes, or double the \\")


def _of_brackets(problem: str, mark: yaml.Mark, start: yaml.Mark, sign: str) -> Problem:
    if mark.line > start.line or "<stream end>" in problem:
        what = f"the {sign} in column {start.column + 1} is not closed"
        return Problem(start.line + 1, what, f"close it with {CLOSING[sign]}")
    what = f"a comma or {CLOSING[sign]} is missing before column {mark.column + 1}"
    return Problem(mark.line + 1, what, QUOTE_IT)


def _of_first_character(mark: yaml.Mark, row: str) -> Problem:
    sign = row[mark.column]
    if sign != "\t":
        return Problem(mark.line + 1, f"a name or value can't begin with {sign}", "put it in quotes")
    if row[: mark.column].strip():
        return Problem(mark.line + 1, f"a tab in column {mark.column + 1}", "use a space")
    return Problem(mark.line + 1, "a tab at the start of the line", "indent with spaces")


def _of_tag(mark: yaml.Mark, problem: str) -> Problem:
    tag = problem.rpartition("tag ")[2].strip("'").replace("tag:yaml.org,2002:", "!!")
    if tag == "!!merge":
        return Problem(mark.line + 1, "merge keys (<<) aren't read", "repeat the settings")
    if tag == "!!value":
        return Problem(mark.line + 1, "a value can't be a lone =", QUOTE_IT)
    return Problem(mark.line + 1, f"the tag {tag} isn't supported", "remove it, or put the value in quotes")


def _of_colon(mark: yaml.Mark, lines: list[str]) -> Problem:
    """A colon where no value may follow: the second of a line, or the first after a line that goes on."""
    if re.search(r":\s", lines[mark.line][: mark.column]):
        return Problem(mark.line + 1, "a second `: ` in one line", "put a value with a colon in quotes")
    before = next((n for n in range(mark.line - 1, -1, -1) if lines[n].split("#")[0].strip()), None)
    if before is not None:
        if found := _NO_SPACE.fullmatch(lines[before]):
            return _without_space(before, found)
        if _indentation(lines[mark.line]) > _indentation(lines[before]):
            what = "indented more than the line before, which has a value already"
            return Problem(mark.line + 1, what, "indent settings of one level alike")
    return Problem(mark.line + 1, f"a colon in column {mark.column + 1} where none is expected", QUOTE_IT)


def _of_missing_colon(start: yaml.Mark, row: str) -> Problem:
    if found := _NO_SPACE.fullmatch(row):
        return _without_space(start.line, found)
    return Problem(start.line + 1, "no colon after the name", "write `name: value`")


def _without_space(line: int, found: re.Match[str]) -> Problem:
    return Problem(line + 1, "no space after the colon", f"write `{found[1]}: {found[2].strip()}`")


def _of_block(mark: yaml.Mark, row: str) -> Problem:
    before = row[: mark.column].rstrip()
    if before.endswith(("'", '"')):
        return Problem(mark.line + 1, "text after a closing quote", "put the whole value in quotes")
    if not before:
        what = "the indentation is that of no line above"
        if row.lstrip().startswith("-"):
            what = "a list item (-) between settings"
        return Problem(mark.line + 1, what, "indent settings of one level, or items of one list, alike")
    return Problem(mark.line + 1, f"not valid YAML in column {mark.column + 1}", "quote values with special characters")


def _indentation(row: str) -> int:
    return len(row) - len(row.lstrip())
