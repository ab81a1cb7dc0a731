r"""Mend what conversation files bring along, and count it by kind.

`plain` runs over every text: line ends, characters without width. `clean` is asked for by --clean: the HTML and the
backslashes of old ShareGPT dumps. In those a turn is either HTML from its first tag on, or Markdown; of Markdown only
entities (`&lt;`) and needless backslashes (`\_`) go, and nothing in code or mathematics.
"""

import html
import re
from collections import Counter

_WIDTHLESS = re.compile("[\u200b\u2060\ufeff]")  # joiners stay: emoji and several scripts need them
_DUMP = re.compile(r"\s*<(?:div|p|pre|ol|ul|table|h[1-6]|blockquote)(?:\s[^<>]*)?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|nbsp|#39|#x27);")
_ESCAPED = re.compile(r"(?<!\\)\\([_*#~`>-])")
# fenced and inline code, $$…$$, $…$, \[…\] and \(…\); none goes beyond its like, or what nothing closes would be
# looked for again and again
_LITERAL = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]+\$\$|\$[^$\n]+\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]|\\\((?:[^\\]|\\(?![()]))*\\\))",
    re.DOTALL,
)
# a block's label, which stood beside its button
_LABEL = re.compile(r"(?m)^([ \t]*```)\n[ \t]*([\w+#-]{0,30})Copy code\s*\n")
_COPY = re.compile(r"(?m)^([ \t]*```?\w*[ \t]*)?(?:[\w+#-]{1,30})?Copy code(?=\n|`)")
MOST_DEPTH = 100  # of tags inside each other: the converter calls itself for each
MOST_WORK = 300_000_000  # characters times angle brackets: it may look for the end of each in all that follows


def plain(text: str, repairs: Counter[str]) -> str:
    """The text with plain line ends and without characters that have no width."""
    if not text.isascii():
        text, count = _WIDTHLESS.subn("", text)
        if count:
            repairs["zero_width_characters"] += count
    if "\r" in text:
        repairs["carriage_returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def clean(text: str, repairs: Counter[str]) -> str:
    """HTML as Markdown; Markdown without entities and needless backslashes outside of code and mathematics."""
    if _DUMP.match(text):
        converted = _markdown(text)
        if converted is None:
            repairs["html_turns_left_alone"] += 1
            return text
        text = _LABEL.sub(r"\1\2\n", converted)
        text = _COPY.sub(lambda found: found[1] or "", re.sub(r"\n{3,}", "\n\n", text))
        repairs["html_turns"] += 1
    parts = _LITERAL.split(text)
    entities = escapes = 0
    for index in range(0, len(parts), 2):
        part, found = _ENTITY.subn(lambda entity: html.unescape(entity[0]).replace("\xa0", " "), parts[index])
        entities += found
        parts[index], found = _ESCAPED.subn(r"\1", part)
        escapes += found
    repairs.update({"html_entities": entities} if entities else {})
    repairs.update({"markdown_escapes": escapes} if escapes else {})
    return "".join(parts)


def _markdown(text: str) -> str | None:
    """HTML as Markdown; None: it is no HTML, or hostile to the converter, which takes a call for each level of tags."""
    from bs4 import BeautifulSoup, ParserRejectedMarkup
    from markdownify import MarkdownConverter

    if text.count("<") * len(text) > MOST_WORK:
        return None
    try:
        tree = BeautifulSoup(text, "html.parser")
    except ParserRejectedMarkup:
        return None
    level = list(tree.children)
    for _ in range(MOST_DEPTH):
        level = [child for tag in level for child in getattr(tag, "children", ())]
    if level:
        return None
    for block in tree.find_all("pre"):  # in a division of one the first line's indentation would be lost
        for division in block.find_all("div"):
            division.insert_after("\n")
            division.unwrap()
    converter = MarkdownConverter(heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    return str(converter.convert_soup(tree)).strip()
