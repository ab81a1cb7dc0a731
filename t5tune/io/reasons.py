"""Why reading failed, in a few plain words, instead of the text of the library that raised.

reason_of(JSONDecodeError("Expecting ',' delimiter", text, 12))
# "not valid JSON: a comma or the closing bracket is expected at line 1, column 13"
"""

import json

JSON = {
    "Expecting value": "a value is expected",
    "Extra data": "there is text after the end of the value",
    "Expecting property name enclosed in double quotes": "a key in double quotes is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Expecting ',' delimiter": "a comma or the closing bracket is expected",
    "Unterminated string starting at": "a text without its closing quote begins",
    "Invalid control character at": "a text has a control character",
    "Invalid \\escape": "a text has an unknown escape",
    "Invalid \\uXXXX escape": "a text has an incomplete \\u escape",
    "Illegal trailing comma": "a comma before a closing bracket",
}


def json_reason(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON, without the place."""
    return next((words for begin, words in JSON.items() if error.msg.startswith(begin)), error.msg)


def reason_of(error: BaseException) -> str:
    """The short reason of an error while reading a file, on one line."""
    match error:
        case json.JSONDecodeError():
            return f"not valid JSON: {json_reason(error)} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            line = error.object.count(b"\n", 0, error.start) + 1
            return f"line {line}: the byte 0x{error.object[error.start]:02X} is not UTF-8 text"
        case OSError() if error.strerror:
            return error.strerror
        case RecursionError():
            return "nested too deeply"
        case _:
            return " ".join(str(error).split())
