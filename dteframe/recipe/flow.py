"""Write plain values as one line of YAML: the counterpart of reading them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from dteframe.recipe.document import read_document

NOT_IN_A_LINE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What YAML reads as a line break or refuses, unless it is escaped."""
PLAIN_IN_FLOW = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
"""Text that needs no quotes between brackets, as long as it does not read as a number or a boolean."""


def override_value(value: Any) -> str:
    """Write a value so that an override ``key=value`` reads it back; text is quoted only where it must be."""
    if isinstance(value, str) and "\n" not in value and "\r" not in value:
        document = read_document(value)
        if document.value == value and not document.problems:
            return value
    return _flow(value)


def _flow(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if math.isinf(value):
            return ".inf" if value > 0 else "-.inf"
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(_flow(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{_text(key)}: {_flow(item)}' for key, item in value.items())}}}"
    raise TypeError(f"{type(value).__name__} is no value of a recipe")


def _text(text: str) -> str:
    """Write text as it is where it can stand so, else in double quotes: JSON's escapes are also YAML's."""
    if PLAIN_IN_FLOW.fullmatch(text) and read_document(text).value == text:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return NOT_IN_A_LINE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
