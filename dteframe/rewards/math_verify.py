r"""1 for a completion whose answer equals the gold one as mathematics: ``\frac{1}{2}`` and ``0.5`` agree.

The answer is what stands in the completion's last box; without a box, what math-verify takes for the final
answer. Comparing expressions may take for ever, and math-verify's own alarms neither work in threads nor stop
every expression (its issue 65). They are off here: long answers, towers of powers, large exponents and the
like are refused, and what still takes too long ends with the worker process that works on it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field

from dteframe import Completion, Component, Context, Question, Reward, RewardConfig, hookimpl

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]  # it has no stubs

UNBOUNDED = (
    (re.compile(r"\^\s*(?:\{[^{}]*[\^!]|[\w\\]+\s*[\^!])|\^\s*\{[^{}]*\{[^{}]*\^"), "a power of a power"),
    (re.compile(r"\*\*"), "a power written **"),
    (re.compile(r"\^\s*\{?\s*-?\s*\d[\d,.]{3,}"), "an exponent of four digits or more"),
    (
        re.compile(r"[A-Za-z)\]}]\s*\^\s*\{?\s*-?\s*\d{3,}"),
        "a symbolic base with an exponent of three digits or more",
    ),
    (re.compile(r"\)\s*\^\s*\{?\s*-?\s*\d{2,}"), "a bracket with an exponent of two digits or more"),
    (re.compile(r"\d{4,}\s*!|[)}!]\s*!"), "a large or repeated factorial"),
    (
        re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])"),
        "an operator left to be worked out",
    ),
    (re.compile(r"\\[dt]?binom\s*\{\s*\d{4,}"), "a binomial of four digits or more"),
    (re.compile(r"\d{400,}"), "a number of 400 digits or more"),
)
"""What sympy may work on for minutes, or fill the memory with, however short it is."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"(?<!\\)[{}]")
EMPHASIS = re.compile(r"(?<![\w)\]}*])(\*{1,3}|__|`)(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w(*])")
"""Markdown around words: ``**72**`` is 72 and no power, ``2**3`` is one."""
EXCLAMATION = re.compile(r"(?<=[\d)\]}])!+(?=\s*$|\s+[A-Z])")
"""An exclamation mark at the end of a sentence: ``It is 72!`` speaks of 72, ``5! = 120`` of a factorial."""


class MathVerifyConfig(RewardConfig):
    """Options of ``math_verify``."""

    type: Literal["math_verify"] = "math_verify"
    max_answer_length: int = Field(default=200, ge=1)
    """Characters; a longer answer is refused, and counts as one that was not found."""
    require_box: bool = False
    r"""Whether an answer outside ``\boxed{}`` is wrong, or searched for in the completion's end."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """All defaults."""
        return cls()


@final
class MathVerify(Reward):
    """1 if the completion's last boxed answer equals the gold answer mathematically (Math-Verify), else 0."""

    config: MathVerifyConfig

    def __init__(self, config: MathVerifyConfig, context: Context) -> None:
        """Start without parsed answers; each gold answer is parsed once."""
        super().__init__(config, context)
        self._parsed_gold: dict[str, list[sympy.Basic | str]] = {}

    def start(self) -> None:
        """Import math-verify, and what it imports itself when it first parses."""
        _parse(r"\boxed{1}")

    def score(self, question: Question, completions: Sequence[Completion]) -> list[float | None]:
        """Compare each completion's answer with the gold answer; equal answers are compared once.

        None where no answer is found, or one that is refused.
        """
        gold = self._gold(question.answer)
        scores: dict[str, float | None] = {}
        answers = [self._answer_of(completion.text) for completion in completions]
        for answer in answers:
            if answer not in scores:
                scores[answer] = self._compare(gold, answer)
        return [scores[answer] for answer in answers]

    def problem_with(self, question: Question) -> str | None:
        """Refuse gold answers that do not parse, or that are refused in completions."""
        gold = last_box(question.answer) or question.answer
        reason = self._reason_to_refuse(gold)
        if reason is not None:
            return f"its answer {gold[:60]!r} has {reason}"
        if all(isinstance(part, str) for part in self._gold(question.answer)):
            return f"its answer {gold[:60]!r} does not parse as mathematics"
        return None

    def _answer_of(self, text: str) -> str:
        """Give what math-verify is to read: the last box, or the completion's end, or nothing."""
        boxed = last_box(text)
        if boxed is not None:
            return f"\\boxed{{{boxed}}}"
        if self.config.require_box:
            return ""
        return EXCLAMATION.sub(".", EMPHASIS.sub(r"\2", text[-self.config.max_answer_length :]))

    def _compare(self, gold: list[sympy.Basic | str], answer: str) -> float | None:
        if not answer.strip():
            return None
        reason = self._reason_to_refuse(last_box(answer) or answer)
        if reason is not None:
            self._say_refused(f"with {reason}")
            return None
        from math_verify import verify

        try:
            parsed = _parse(answer)
            return float(verify(gold, parsed, timeout_seconds=None)) if parsed else None
        except Exception as error:  # noqa: BLE001  # sympy raises anything on garbage, such as TypeError
            self._say_refused(f"on which math-verify fails with {type(error).__name__}")
            return None

    def _gold(self, answer: str) -> list[sympy.Basic | str]:
        if answer not in self._parsed_gold:
            boxed = last_box(answer) or answer.strip().removeprefix("$").removesuffix("$")
            is_refused = self._reason_to_refuse(boxed) is not None
            self._parsed_gold[answer] = [] if is_refused else _parse(f"\\boxed{{{boxed}}}")
        return self._parsed_gold[answer]

    def _reason_to_refuse(self, answer: str) -> str | None:
        if len(answer) > self.config.max_answer_length:
            return f"more than {self.config.max_answer_length} characters (max_answer_length)"
        return next((reason for pattern, reason in UNBOUNDED if pattern.search(answer)), None)

    def _say_refused(self, what: str) -> None:
        # The same words for all such answers: a run tells each warning once.
        self.context.warn(f"math_verify: answers {what} are refused; they count as not found")


def last_box(text: str) -> str | None:
    r"""Give the contents of the last ``\boxed{}`` or ``\fbox{}`` that is closed, or None."""
    box_starts = {found.end() for found in BOX.finditer(text)}
    open_starts: list[int] = []
    last: tuple[int, int] | None = None
    for brace in BRACE.finditer(text):
        if brace.group() == "{":
            open_starts.append(brace.end())
        elif open_starts:
            start = open_starts.pop()
            if start in box_starts and (last is None or start > last[0]):
                last = start, brace.start()
    return None if last is None else text[last[0] : last[1]]


def _parse(text: str) -> list[sympy.Basic | str]:
    from math_verify import parse

    # It warns that its alarms are off; the module's docstring says why, and what bounds it instead.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return list(parse(text, parsing_timeout=None))


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the plugin of this module."""
    return [MathVerify]
