"""Short forms of some of reasoning-gym's tasks, with worked solutions: what a tiny model can be warmed up on.

The tasks' own words take a hundred characters to ask for a sum of two. A short form asks in as few as do, and
its worked solution writes down what comes in between and then the answer behind a colon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Final, NamedTuple


class ShortForm(NamedTuple):
    """An entry in few characters."""

    question: str
    solution: str
    """Ends in a colon and the entry's answer."""


def _chain_sum(entry: Mapping[str, Any]) -> ShortForm:
    """Write every running total: ``6+7-9=`` as ``13 4:4``."""
    asked = entry["metadata"]["expression"].replace(" ", "")
    terms = [int(term) for term in asked.replace("-", "+-").removeprefix("+").split("+")]
    totals = " ".join(str(total) for total in list(accumulate(terms))[1:])
    return ShortForm(f"{asked}=", f"{totals}:{entry['answer']}")


def _spell_backward(entry: Mapping[str, Any]) -> ShortForm:
    """Write nothing in between: ``sun`` as ``:nus``."""
    return ShortForm(entry["metadata"]["word"], f":{entry['answer']}")


def _letter_counting(entry: Mapping[str, Any]) -> ShortForm:
    """Write the count after each word: ``e:free the`` as ``2 3:3``."""
    letter, words = entry["metadata"]["target_letter"], entry["metadata"]["span"]
    counts = accumulate(word.lower().count(letter) for word in words)
    return ShortForm(f"{letter}:{' '.join(words)}", f"{' '.join(map(str, counts))}:{entry['answer']}")


def _base_conversion(entry: Mapping[str, Any]) -> ShortForm:
    """Write the decimal number: ``11>2:201`` as ``243:11110011``."""
    facts = entry["metadata"]
    asked = f"{facts['source_base']}>{facts['target_base']}:{facts['source_repr']}"
    return ShortForm(asked, f"{facts['decimal_value']}:{entry['answer']}")


SHORT_FORMS: Final[Mapping[str, Callable[[Mapping[str, Any]], ShortForm]]] = MappingProxyType(
    {
        "base_conversion": _base_conversion,
        "chain_sum": _chain_sum,
        "letter_counting": _letter_counting,
        "spell_backward": _spell_backward,
    }
)
"""What makes the short form of an entry, by the task's name."""
