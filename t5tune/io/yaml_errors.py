"""Describe a problem in a YAML file by its line and the next step, instead of the parser's message.

describe_yaml_error(error, "learning_rate: [1\nseed: 1\n")
# InvalidYAML(1, "the [ in column 16 is not closed", "close it with ]")
"""

import re

import yaml

QUOTE_HINT = "put the value in quotes"
INDENT_HINT = "use the same indentation for all settings of one level or items of one list"
CLOSING = {"[": "]", "{": "}"}
SPECIAL_TAGS = {  # keys and values with a meaning in YAML 1.1: (problem, hint)
    "!!merge": ("merge keys (<<) aren't supported", "repeat the settings"),
    "!!value": ("a value can't be a lone =", QUOTE_HINT),
}
_NO_SPACE = re.compile(r"\s*([\w-]+):([^\s:/\\].*)")  # `lora_r:8`, but no URL or path
_SCALAR_ERROR = re.compile(r"while scanning an? (?:double-)?quoted scalar")

_Description = tuple[int, str, str]  # line (counted from 0), problem, hint


class InvalidYAML(yaml.YAMLError):
    """The problem, its line (counted from 1), and the next step."""

    def __init__(self, line: int, what: str, hint: str) -> None:
        super().__init__(what)
        self.line, self.hint = line, hint


def describe_yaml_error(error: yaml.YAMLError, text: str) -> InvalidYAML:
    """Describe the problem that an error of PyYAML reports about a text."""
    if isinstance(error, InvalidYAML):
        return error
    if isinstance(error, yaml.reader.ReaderError):
        line = len(f"{text[: error.position]}x".splitlines())
        # the type stubs say bytes, but for text it is the code point of a character
        return InvalidYAML(line, f"the character U+{int(error.character):04X}, which YAML doesn't allow", "remove it")
    assert isinstance(error, yaml.MarkedYAMLError)
    assert error.problem_mark is not None
    lines = [*text.splitlines(), ""]
    mark, start = error.problem_mark, error.context_mark or error.problem_mark
    context, problem = error.context or "", error.problem or ""
    inner = _describe_inner(context, problem, mark, start, lines)
    line, what, hint = inner or _describe_outer(problem, mark, start, lines)
    return InvalidYAML(line + 1, what, hint)


def _describe_inner(
    context: str, problem: str, mark: yaml.Mark, start: yaml.Mark, lines: list[str]
) -> _Description | None:
    """Describe a problem inside quotes or brackets, or after `*` or `&`; they begin at `start`."""
    sign, column = lines[start.line][start.column : start.column + 1], start.column + 1
    if _SCALAR_ERROR.match(context):
        if problem.startswith("found unexpected"):  # the end of the file, or `---`
            return start.line, f"the quote {sign} in column {column} is not closed", f"close it with {sign}"
        row = lines[mark.line]
        backslash = row.rfind("\\", 0, mark.column)
        escape = row[backslash : backslash + 2]
        return mark.line, f"{escape} is not a valid escape in double quotes", "use single quotes, or double the \\"
    if context == "while parsing a flow node" and "<stream end>" in problem:
        return mark.line, "the file ends inside brackets", "close them with ] or }"
    if context in ("while parsing a flow sequence", "while parsing a flow mapping"):
        if mark.line > start.line or "<stream end>" in problem:
            return start.line, f"the {sign} in column {column} is not closed", f"close it with {CLOSING[sign]}"
        return mark.line, f"a comma or {CLOSING[sign]} is missing before column {mark.column + 1}", QUOTE_HINT
    if context.startswith(("while scanning an alias", "while scanning an anchor")):
        return start.line, f"a value can't begin with {sign}", QUOTE_HINT
    return None


def _describe_outer(problem: str, mark: yaml.Mark, start: yaml.Mark, lines: list[str]) -> _Description:
    row = lines[min(mark.line, len(lines) - 1)]
    before, sign, here = row[: mark.column].rstrip(), row[mark.column : mark.column + 1], f"in column {mark.column + 1}"
    if "cannot start any token" in problem:
        if sign != "\t":
            return mark.line, f"a name or value can't begin with {sign}", "put it in quotes"
        if before:
            return mark.line, f"a tab {here}", "use a space"
        return mark.line, "a tab at the start of the line", "indent with spaces"
    if problem.startswith("could not determine a constructor for the tag"):
        tag = problem.rpartition("tag ")[2].strip("'").replace("tag:yaml.org,2002:", "!!")
        unsupported = f"the tag {tag} isn't supported", "remove it, or put the value in quotes"
        return mark.line, *SPECIAL_TAGS.get(tag, unsupported)
    if problem == "but found another document":
        return mark.line, "a second document begins here (---)", "keep one document in the file"
    if problem == "mapping values are not allowed here":
        return _describe_colon(mark, lines)
    if problem == "could not find expected ':'":
        no_colon = start.line, "no colon after the name", "write `name: value`"
        return _describe_missing_space(start.line, lines) or no_colon
    if problem == "sequence entries are not allowed here":
        return mark.line, "a list item (-) must start on its own line", "insert a line break before the -"
    if problem.startswith("expected the node content") and sign:
        return mark.line, f"{sign} {here}, where a value is expected", QUOTE_HINT
    if problem.startswith("expected <block end>"):
        if before.endswith(("'", '"')):
            return mark.line, "text after a closing quote", "put the whole value in quotes"
        if not before:
            is_item = row.lstrip().startswith("-")
            what = "a list item (-) between settings" if is_item else "the indentation matches no line above"
            return mark.line, what, INDENT_HINT
    return mark.line, f"not valid YAML {here}", "quote values with special characters"


def _describe_colon(mark: yaml.Mark, lines: list[str]) -> _Description:
    """Describe a colon where no value may follow: the second on a line, or one on a continuation line."""
    if re.search(r":\s", lines[mark.line][: mark.column]):
        return mark.line, "a second `: ` in one line", "put a value with a colon in quotes"
    before = next((n for n in range(mark.line - 1, -1, -1) if lines[n].split("#")[0].strip()), None)
    if before is not None:
        if missing_space := _describe_missing_space(before, lines):
            return missing_space
        if _count_indentation(lines[mark.line]) > _count_indentation(lines[before]):
            return mark.line, "indented more than the line before, which already has a value", INDENT_HINT
    return mark.line, f"an unexpected colon in column {mark.column + 1}", QUOTE_HINT


def _describe_missing_space(line: int, lines: list[str]) -> _Description | None:
    if found := _NO_SPACE.fullmatch(lines[line]):
        return line, "no space after the colon", f"write `{found[1]}: {found[2].strip()}`"
    return None


def _count_indentation(row: str) -> int:
    return len(row) - len(row.lstrip())
