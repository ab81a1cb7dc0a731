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
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)[^<>]*>")
_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
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
        if _is_hostile(text):
            repairs["html_turns_left_alone"] += 1
            return text
        from markdownify import markdownify

        text = markdownify(text, heading_style="ATX", escape_asterisks=False, escape_underscores=False).strip()
        text = _LABEL.sub(r"\1\2\n", text)
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


def _is_hostile(text: str) -> bool:
    """Whether converting the HTML could take forever, or more calls inside each other than Python allows."""
    if text.count("<") * len(text) > MOST_WORK:
        return True
    depth = 0
    for closing, name in _TAG.findall(text):
        if name.lower() not in _VOID:
            depth = max(0, depth - 1) if closing else depth + 1
            if depth > MOST_DEPTH:
                return True
    return False
