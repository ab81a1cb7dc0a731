r"""Repair common defects of conversation texts, and count the repairs by kind.

`normalize_text` runs on every text: it normalizes line ends and removes zero-width characters. `clean` runs with
--clean: it removes the HTML and the backslashes of old ShareGPT dumps. Their turns are either Markdown, or HTML from
the first tag on. In Markdown, it decodes entities (`&lt;`) and removes needless backslashes (`\_`), except in code and
math.
"""

import html
import re
from collections import Counter

_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff]")  # joiners stay: emoji and several scripts need them
_HTML_START = re.compile(r"\s*<(?:div|p|pre|ol|ul|table|h[1-6]|blockquote)(?:\s[^<>]*)?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|nbsp|#39|#x27);")
_ESCAPED_MARKDOWN = re.compile(r"(?<!\\)\\([_*#~`>-])")
# fenced and inline code, $$…$$, $…$, \[…\] and \(…\); no match contains a second opening delimiter of its kind, because
# searching for a missing closing delimiter from each opening one would take quadratic time
_LITERAL = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]+\$\$|\$[^$\n]+\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]|\\\((?:[^\\]|\\(?![()]))*\\\))",
    re.DOTALL,
)
# ChatGPT's code blocks show the language next to a "Copy code" button; dumps contain both as text
_CODE_LABEL = re.compile(r"(?m)^([ \t]*```)\n[ \t]*([\w+#-]{0,30})Copy code\s*\n")
_COPY_BUTTON = re.compile(r"(?m)^([ \t]*```?\w*[ \t]*)?(?:[\w+#-]{1,30})?Copy code(?=\n|`)")
MAX_TAG_DEPTH = 100  # nesting of tags; the converter recurses into each level
MAX_WORK = 300_000_000  # characters times angle brackets; the parser may search the rest of the text for each bracket


def normalize_text(text: str, repairs: Counter[str]) -> str:
    """Convert line ends to newlines and remove zero-width characters."""
    if not text.isascii():
        text, count = _ZERO_WIDTH.subn("", text)
        repairs["zero_width_characters"] += count
    if "\r" in text:
        repairs["carriage_returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def clean(text: str, repairs: Counter[str]) -> str:
    """Convert HTML to Markdown; in Markdown, decode entities and remove needless backslashes.

    Code and math are unchanged. HTML that can't be converted safely is returned unchanged and counted.
    """
    if _HTML_START.match(text):
        converted = _convert_html(text)
        if converted is None:
            repairs["html_turns_left_alone"] += 1
            return text
        text = _CODE_LABEL.sub(r"\1\2\n", converted)
        text = _COPY_BUTTON.sub(lambda found: found[1] or "", re.sub(r"\n{3,}", "\n\n", text))
        repairs["html_turns"] += 1
    parts = _LITERAL.split(text)
    for index in range(0, len(parts), 2):
        part, entities = _ENTITY.subn(lambda entity: html.unescape(entity[0]).replace("\xa0", " "), parts[index])
        parts[index], escapes = _ESCAPED_MARKDOWN.subn(r"\1", part)
        repairs["html_entities"] += entities
        repairs["markdown_escapes"] += escapes
    return "".join(parts)


def _convert_html(text: str) -> str | None:
    """Convert HTML to Markdown; None: it can't be parsed, or is so deep or long that it may be an attack."""
    from bs4 import BeautifulSoup, ParserRejectedMarkup
    from markdownify import MarkdownConverter

    if text.count("<") * len(text) > MAX_WORK:
        return None
    # an unclosed comment or declaration: since Python 3.13.5 the parser includes all of the text after it
    if text.rfind("<!--") > text.rfind("-->") or max(text.rfind("<!"), text.rfind("<?")) > text.rfind(">"):
        return None
    try:
        tree = BeautifulSoup(text, "html.parser")
    except ParserRejectedMarkup:
        return None
    level = list(tree.children)
    for _ in range(MAX_TAG_DEPTH):
        level = [child for tag in level for child in getattr(tag, "children", ())]
    if level:
        return None
    for block in tree.find_all("pre"):  # the converter drops the first line's indentation inside a div
        for division in block.find_all("div"):
            division.insert_after("\n")
            division.unwrap()
    converter = MarkdownConverter(heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    return str(converter.convert_soup(tree)).strip()
