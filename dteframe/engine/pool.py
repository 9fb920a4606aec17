"""The questions of a run: duplicates removed, held-out ones set aside, prompts as tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from dteframe.contracts import Reward
from dteframe.engine.calls import label, running
from dteframe.errors import DataError
from dteframe.records import Prompt, Question, Questions, SuccessEstimate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_NAMED = 3
"""Questions named in a warning about many."""


@dataclass(frozen=True)  # without slots, for what is found once
class Pool:
    """What can be asked, by id, in the dataset's order; no text is in both parts."""

    train: Mapping[str, Question]
    evaluation: Mapping[str, Question]
    left_out: Mapping[str, int]
    """Questions that were left out, counted by reason."""

    def in_order(self, estimate: SuccessEstimate) -> SuccessEstimate:
        """Put an estimate of all training questions into ascending order of ids, found only once."""
        own, ascending, places = self._orders
        if estimate.question_ids != own:
            return estimate.in_order()
        mean, evidence = estimate.mean[places], estimate.evidence[places]
        return SuccessEstimate(ascending, mean, evidence, estimate.figures, is_ascending=True)

    @cached_property
    def _orders(self) -> tuple[tuple[str, ...], tuple[str, ...], Int[np.ndarray, "questions"]]:
        """Give the training questions' ids as they stand, and ascending, with the place where each stands."""
        own = tuple(self.train)
        places = np.array(sorted(range(len(own)), key=own.__getitem__), np.int64)
        return own, tuple(own[place] for place in places), places

    def fingerprint(self) -> str:
        """Hash ids, texts and answers: a run can only be resumed on the very same questions."""
        digest = hashlib.sha256()
        for question in [*self.train.values(), *self.evaluation.values()]:
            digest.update(f"{question.id}\0{question.text_hash}\0{question.answer}\0".encode())
        return digest.hexdigest()


def make_pool(
    questions: Questions,
    rewards: Sequence[Reward],
    evaluation_size: int,
    rng: np.random.Generator,
    warn: Callable[[str], None],
) -> Pool:
    """Leave out what cannot be used and hold ``evaluation_size`` questions out of training.

    Where the dataset has evaluation questions of its own, ``evaluation_size`` of them are drawn once, and
    training questions of equal text are left out; else they are drawn from the training questions.

    Raises:
        DataError: ids repeat, or nothing is left to train or to evaluate on.
    """
    left_out: Counter[str] = Counter(questions.left_out)
    _refuse_repeated_ids([*questions.train, *questions.evaluation])
    train = _usable(questions.train, rewards, left_out, warn)
    evaluation = _usable(questions.evaluation, rewards, left_out, warn)
    if not train:
        raise DataError(
            f"dataset: no question to train on is left of {len(questions.train)}; mend what is left out: "
            + "; ".join(f"{count} x {reason}" for reason, count in left_out.items())
        )
    source = evaluation or train
    if evaluation and evaluation_size > len(evaluation):
        warn(f"training.evaluation_size: {evaluation_size} is more than the {len(evaluation)} held out")
        evaluation_size = len(evaluation)
    if not evaluation and evaluation_size >= len(train):
        raise DataError(
            f"training.evaluation_size: {evaluation_size} questions are to be held out of {len(train)} "
            "usable ones; lower it or give more data"
        )
    chosen = sorted(rng.choice(len(source), size=evaluation_size, replace=False))
    held_out = [source[index] for index in chosen]
    held_out_hashes = {question.text_hash for question in evaluation or held_out}
    kept = [question for question in train if question.text_hash not in held_out_hashes]
    if evaluation and len(kept) < len(train):
        left_out["training question with the text of a held-out one"] += len(train) - len(kept)
    if not kept:
        raise DataError(
            f"dataset: each of the {len(train)} training questions has the text of a held-out one; give "
            "other data to train on"
        )
    return Pool(
        train={question.id: question for question in kept},
        evaluation={question.id: question for question in held_out},
        left_out=dict(left_out),
    )


def encode_prompts(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    warn: Callable[[str], None],
) -> tuple[Pool, Mapping[str, Prompt]]:
    """Turn every question into the policy's tokens, and leave out those that are too long: nothing is cut.

    Raises:
        DataError: chat messages meet a tokenizer without a template, or no training question is short enough.
    """
    prompts = {
        question.id: Prompt(question.id, _tokens(question, tokenizer))
        for question in [*pool.train.values(), *pool.evaluation.values()]
    }
    _warn_of_unknown_characters(pool, prompts, tokenizer, warn)
    too_long = [prompt for prompt in prompts.values() if len(prompt.token_ids) > max_prompt_length]
    if not too_long:
        return pool, prompts
    longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
    limit = f"training.max_prompt_length ({max_prompt_length} tokens)"
    warn(
        f"{len(too_long)} of {len(prompts)} prompts are longer than {limit} and are left out; "
        f"the longest is {longest.question_id!r} with {len(longest.token_ids)} tokens"
    )
    dropped = {prompt.question_id for prompt in too_long}
    train = {name: question for name, question in pool.train.items() if name not in dropped}
    evaluation = {name: question for name, question in pool.evaluation.items() if name not in dropped}
    if not train or (pool.evaluation and not evaluation):
        raise DataError(f"dataset: every prompt is longer than {limit}; raise it")
    left_out = {**pool.left_out, "prompt longer than max_prompt_length": len(too_long)}
    kept_prompts = {name: prompt for name, prompt in prompts.items() if name not in dropped}
    return Pool(train, evaluation, left_out), kept_prompts


def _warn_of_unknown_characters(
    pool: Pool,
    prompts: Mapping[str, Prompt],
    tokenizer: PreTrainedTokenizerBase,
    warn: Callable[[str], None],
) -> None:
    """Tell of prompts that the policy cannot read, and of held-out answers that it cannot write."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return

    def not_known(text: str) -> bool:
        return unknown in tokenizer(text, add_special_tokens=False)["input_ids"]

    questions = {**pool.train, **pool.evaluation}
    unread = {
        name: _prompt_text(questions[name], tokenizer)
        for name, prompt in prompts.items()
        if unknown in prompt.token_ids
    }
    answers = {name: question.answer for name, question in pool.evaluation.items()}
    unwritten = {name: answer for name, answer in answers.items() if not_known(answer)}
    for what, texts in (("prompts", unread), ("held-out answers", unwritten)):
        if texts:
            name, text = next(iter(texts.items()))
            characters = "".join(sorted(character for character in set(text) if not_known(character)))
            warn(
                f"{len(texts)} {what} have characters that the policy's tokenizer does not know, "
                f"first that of {name!r}: {characters!r}"
            )


def _tokens(question: Question, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    is_plain = isinstance(question.prompt, str)  # A template writes the special tokens itself.
    ids = tokenizer(_prompt_text(question, tokenizer), add_special_tokens=is_plain)["input_ids"]
    if not ids:
        raise DataError(f"question {question.id!r}: its prompt has no tokens; leave it out of the data")
    return np.asarray(ids, dtype=np.int64)


def _prompt_text(question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write what the policy reads: the prompt, or its messages in the tokenizer's template."""
    if isinstance(question.prompt, str):
        return question.prompt
    if tokenizer.chat_template is None:
        raise DataError(
            f"question {question.id!r} is chat messages, and the model's tokenizer has no chat template; "
            "set dataset.chat: false, or take a model with one"
        )
    messages = [dict(message) for message in question.prompt]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _usable(
    questions: Sequence[Question],
    rewards: Sequence[Reward],
    left_out: Counter[str],
    warn: Callable[[str], None],
) -> list[Question]:
    """Keep the first question of each text, and those that every reward can score."""
    kept: dict[str, Question] = {}
    problems: dict[str, list[str]] = {}
    for question in questions:
        if not _is_text(question):
            left_out["text that is not valid Unicode"] += 1
            continue
        if question.text_hash in kept:
            left_out["same text as another question"] += 1
            continue
        problem = _problem(question, rewards)
        if problem is None:
            kept[question.text_hash] = question
        else:
            problems.setdefault(problem[0], []).append(f"{question.id!r} ({problem[1]})")
    for reward_label, named in problems.items():
        left_out["answer that the reward cannot score"] += len(named)
        shown = ", ".join(named[:NUM_NAMED]) + (", ..." if len(named) > NUM_NAMED else "")
        warn(f"{reward_label} cannot score {len(named)} questions, which are left out: {shown}")
    return list(kept.values())


def _is_text(question: Question) -> bool:
    """Whether texts can be written: JSON allows half a character, files and tokenizers do not."""
    parts = [question.id, question.text, question.answer, question.solution or ""]
    if isinstance(question.prompt, str):
        parts.append(question.prompt)
    else:
        parts += [text for message in question.prompt for text in message.values()]
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(question: Question, rewards: Sequence[Reward]) -> tuple[str, str] | None:
    for reward in rewards:
        with running(reward):
            what = reward.problem_with(question)
        if what is not None:
            return label(reward), what
    return None


def _refuse_repeated_ids(questions: Sequence[Question]) -> None:
    counts = Counter(question.id for question in questions)
    repeated = [question_id for question_id, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"question id {repeated[0]!r} stands {counts[repeated[0]]} times; ids must be distinct"
        )
