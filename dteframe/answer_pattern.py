"""Find the answer inside a text by a regular expression with one group."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator


def _has_one_group(pattern: str) -> str:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if num_groups != 1:
        raise ValueError(
            f"{pattern!r} has {num_groups} groups; put one ( ) around the answer, others as (?: )"
        )
    return pattern


AnswerPattern: TypeAlias = Annotated[str, AfterValidator(_has_one_group)]
"""Type of a configuration's field: a regular expression with exactly one group."""


def last_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """Give the group of the last match, or None where nothing matches.

    A match of nothing does not count: ``(.*)$`` matches once more behind the last character.

    >>> last_answer(re.compile("([0-9]*)$"), "6 + 1 = 7")
    '7'
    """
    found = None
    for match in pattern.finditer(text):
        if match.group():
            found = match.group(1)
    return found
