"""Describe what is wrong with a YAML file: the line, the problem and the next step, in place of the parser's message.

describe_yaml_error(error, "learning_rate: [1\nseed: 1\n")
# Problem(1, "the [ in column 16 is not closed", "close it with ]")
"""

import re
from dataclasses import dataclass

import yaml

QUOTE_HINT = "put the value in quotes"
INDENT_HINT = "use the same indentation for all settings of one level"
CLOSING = {"[": "]", "{": "}"}
_NO_SPACE = re.compile(r"\s*([\w-]+):([^\s:/\\].*)")  # `lora_r:8`, but no URL or path
_SCALAR_ERROR = re.compile(r"while scanning an? (?:double-)?quoted scalar")


@dataclass(frozen=True)
class Problem:
    """What is wrong, on which line (counted from 1), and what to do about it."""

    line: int
    what: str
    hint: str


class InvalidYAML(yaml.YAMLError):
    """A problem that t5tune's own loader found. `mark` is its position."""

    def __init__(self, mark: yaml.Mark, what: str, hint: str) -> None:
        super().__init__(what)
        self.problem = Problem(mark.line + 1, what, hint)


def describe_yaml_error(error: yaml.YAMLError, text: str) -> Problem:
    """Describe the problem that an error of PyYAML reports about a text."""
    if isinstance(error, InvalidYAML):
        return error.problem
    if isinstance(error, yaml.reader.ReaderError):
        line = len(f"{text[: error.position]}x".splitlines())
        # the type stubs say bytes, but for text it is the code point of a character
        return Problem(line, f"the character U+{int(error.character):04X}, which YAML doesn't allow", "remove it")
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem(1, "not valid YAML", QUOTE_HINT)
    lines = [*text.splitlines(), ""]
    mark, start = error.problem_mark, error.context_mark or error.problem_mark
    context, problem = error.context or "", error.problem or ""
    row = lines[min(mark.line, len(lines) - 1)]
    if _SCALAR_ERROR.match(context):
        return _describe_quotes(problem, mark, start, row, lines[start.line])
    if context == "while parsing a flow node" and "<stream end>" in problem:
        return Problem(mark.line + 1, "the file ends inside brackets", "close them with ] or }")
    if context in ("while parsing a flow sequence", "while parsing a flow mapping"):
        return _describe_brackets(problem, mark, start, lines[start.line][start.column])
    if context.startswith(("while scanning an alias", "while scanning an anchor")):
        return Problem(start.line + 1, f"a value can't begin with {lines[start.line][start.column]}", QUOTE_HINT)
    if "cannot start any token" in problem:
        return _describe_first_character(mark, row)
    if problem.startswith("could not determine a constructor for the tag"):
        return _describe_tag(mark, problem)
    if problem == "but found another document":
        return Problem(mark.line + 1, "a second document begins here (---)", "keep one document in the file")
    if problem == "mapping values are not allowed here":
        return _describe_colon(mark, lines)
    if problem == "could not find expected ':'":
        return _describe_missing_colon(start, lines[start.line])
    if problem == "sequence entries are not allowed here":
        return Problem(mark.line + 1, "a list item (-) must start on its own line", "insert a line break before the -")
    if problem.startswith("expected the node content") and row[mark.column :]:
        what = f"{row[mark.column]} in column {mark.column + 1}, where a value is expected"
        return Problem(mark.line + 1, what, QUOTE_HINT)
    if problem.startswith("expected <block end>"):
        return _describe_block(mark, row)
    return Problem(mark.line + 1, f"not valid YAML in column {mark.column + 1}", "quote values with special characters")


def _describe_quotes(problem: str, mark: yaml.Mark, start: yaml.Mark, row: str, first_row: str) -> Problem:
    if problem.startswith("found unexpected"):  # the end of the file, or `---`
        quote = first_row[start.column]
        what = f"the quote {quote} in column {start.column + 1} is not closed"
        return Problem(start.line + 1, what, f"close it with {quote}")
    backslash = row.rfind("\\", 0, mark.column)
    escape = row[backslash : backslash + 2]
    what = f"{escape} is not a valid escape in double quotes"
    return Problem(mark.line + 1, what, "use single quotes, or double the \\")


def _describe_brackets(problem: str, mark: yaml.Mark, start: yaml.Mark, sign: str) -> Problem:
    if mark.line > start.line or "<stream end>" in problem:
        what = f"the {sign} in column {start.column + 1} is not closed"
        return Problem(start.line + 1, what, f"close it with {CLOSING[sign]}")
    what = f"a comma or {CLOSING[sign]} is missing before column {mark.column + 1}"
    return Problem(mark.line + 1, what, QUOTE_HINT)


def _describe_first_character(mark: yaml.Mark, row: str) -> Problem:
    sign = row[mark.column]
    if sign != "\t":
        return Problem(mark.line + 1, f"a name or value can't begin with {sign}", "put it in quotes")
    if row[: mark.column].strip():
        return Problem(mark.line + 1, f"a tab in column {mark.column + 1}", "use a space")
    return Problem(mark.line + 1, "a tab at the start of the line", "indent with spaces")


def _describe_tag(mark: yaml.Mark, problem: str) -> Problem:
    tag = problem.rpartition("tag ")[2].strip("'").replace("tag:yaml.org,2002:", "!!")
    if tag == "!!merge":
        return Problem(mark.line + 1, "merge keys (<<) aren't supported", "repeat the settings")
    if tag == "!!value":
        return Problem(mark.line + 1, "a value can't be a lone =", QUOTE_HINT)
    return Problem(mark.line + 1, f"the tag {tag} isn't supported", "remove it, or put the value in quotes")


def _describe_colon(mark: yaml.Mark, lines: list[str]) -> Problem:
    """Describe a colon where no value may follow: the second on a line, or one on a continuation line."""
    if re.search(r":\s", lines[mark.line][: mark.column]):
        return Problem(mark.line + 1, "a second `: ` in one line", "put a value with a colon in quotes")
    before = next((n for n in range(mark.line - 1, -1, -1) if lines[n].split("#")[0].strip()), None)
    if before is not None:
        if found := _NO_SPACE.fullmatch(lines[before]):
            return _describe_missing_space(before, found)
        if _count_indentation(lines[mark.line]) > _count_indentation(lines[before]):
            what = "indented more than the line before, which already has a value"
            return Problem(mark.line + 1, what, INDENT_HINT)
    return Problem(mark.line + 1, f"a colon in column {mark.column + 1} where none is expected", QUOTE_HINT)


def _describe_missing_colon(start: yaml.Mark, row: str) -> Problem:
    if found := _NO_SPACE.fullmatch(row):
        return _describe_missing_space(start.line, found)
    return Problem(start.line + 1, "no colon after the name", "write `name: value`")


def _describe_missing_space(line: int, found: re.Match[str]) -> Problem:
    return Problem(line + 1, "no space after the colon", f"write `{found[1]}: {found[2].strip()}`")


def _describe_block(mark: yaml.Mark, row: str) -> Problem:
    before = row[: mark.column].rstrip()
    if before.endswith(("'", '"')):
        return Problem(mark.line + 1, "text after a closing quote", "put the whole value in quotes")
    if not before:
        what = "the indentation matches no line above"
        if row.lstrip().startswith("-"):
            what = "a list item (-) between settings"
        return Problem(
            mark.line + 1, what, "use the same indentation for all settings of one level or items of one list"
        )
    return Problem(mark.line + 1, f"not valid YAML in column {mark.column + 1}", "quote values with special characters")


def _count_indentation(row: str) -> int:
    return len(row) - len(row.lstrip())
