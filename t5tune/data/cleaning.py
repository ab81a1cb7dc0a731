"""Mend what conversation files bring along, and count it by kind.

`plain` runs over every text: line ends, characters without width. `clean` is asked for by --clean: the HTML and the
backslashes of old ShareGPT dumps.
"""

import re
from collections import Counter

from t5tune.data.records import Refused

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WIDTHLESS = re.compile("[\u200b\u2060\ufeff]")  # joiners stay: emoji and several scripts need them
_HTML = re.compile(
    r"</(?:p|div|pre|code|span|ol|ul|li|table|strong|em|h[1-6])>|<br\s*/?>|<(?:p|div)(?:\s[^<>]*)?>|&(?:lt|gt|amp|quot|nbsp);"
)
_ESCAPED = re.compile(r"\\([_*#~`>\-\[\]])")
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_COPY = re.compile(r"(?m)^(\s*```?\w*\s*)?(?:[\w+#-]+)?Copy code(?=\n|`)")


def plain(place: str, text: str, repairs: Counter[str]) -> str:
    """The text with plain line ends and without characters that have no width.

    Raises:
        Refused: a control character, or half of a surrogate pair, which is no character.
    """
    if found := _CONTROL.search(text):
        raise Refused("control_character", f"{place}: U+{ord(found[0]):04X} at character {found.start()}")
    if not text.isascii():
        if found := _SURROGATE.search(text):
            raise Refused("lone_surrogate", f"{place}: U+{ord(found[0]):04X} alone at character {found.start()}")
        text, count = _WIDTHLESS.subn("", text)
        if count:
            repairs["zero_width_characters"] += count
    if "\r" in text:
        repairs["carriage_returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def clean(text: str, repairs: Counter[str]) -> str:
    """HTML as Markdown, and Markdown's needless backslashes (`\\_`) gone but in code."""
    if _HTML.search(text):
        from markdownify import markdownify

        text = markdownify(text, heading_style="ATX", escape_asterisks=False, escape_underscores=False).strip()
        text = _COPY.sub(lambda found: found[1] or "", re.sub(r"\n{3,}", "\n\n", text))
        repairs["html_turns"] += 1
    parts = _CODE.split(text)
    count = 0
    for index in range(0, len(parts), 2):
        parts[index], changed = _ESCAPED.subn(r"\1", parts[index])
        count += changed
    if count:
        repairs["markdown_escapes"] += count
    return "".join(parts)
