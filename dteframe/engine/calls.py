"""Call a component and hold it to its contract: what it gives is checked before anything is built on it.

An exception of the component passes unchanged, with a note that names the component and its file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Component, Dataset, Estimator, Objective, Replay, Reward, Rollout, Selector
from dteframe.errors import PluginError
from dteframe.records import (
    Completion,
    Group,
    Prompt,
    Question,
    Questions,
    Review,
    Sampling,
    Selection,
    SuccessEstimate,
)


def label(component: Component) -> str:
    """Name a component as people know it: ``plugins/hardest_first.py: selector 'hardest_first'``."""
    path = Path(inspect.getfile(type(component)))
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{shown}: {component.kind} {component.config.type!r}"


@contextmanager
def running(component: Component) -> Iterator[None]:
    """Add to whatever the component raises which component it was.

    Raises:
        PluginError: the component would end the whole program.
    """
    try:
        yield
    except SystemExit as error:
        raise PluginError(
            f"{label(component)} called exit({error.code!r}); raise an error instead"
        ) from error
    except Exception as error:
        error.add_note(f"while running {label(component)}")
        raise


def load(dataset: Dataset) -> Questions:
    """Ask for all questions."""
    with running(dataset):
        questions = dataset.load()
    _insist(dataset, "load()", questions, Questions)
    for part in (questions.train, questions.evaluation):
        _insist(dataset, "load()", part, tuple | list)
        for question in part:
            _insist(dataset, "load()", question, Question)
    return questions


def references(
    estimator: Estimator, rng: np.random.Generator, known: Mapping[str, object]
) -> tuple[str, ...]:
    """Ask which questions to roll out before the next prediction."""
    with running(estimator):
        asked = estimator.references(rng)
    _insist(estimator, "references()", asked, tuple | list)
    _check_ids(estimator, "references()", asked, known, count=estimator.config.num_references())
    return tuple(asked)


def predict(estimator: Estimator, policy_version: int, known: Mapping[str, object]) -> SuccessEstimate:
    """Ask for the success rate of every question of the pool."""
    with running(estimator):
        estimate = estimator.predict(policy_version)
    _insist(estimator, "predict()", estimate, SuccessEstimate)
    if estimate.question_ids != tuple(known):  # The pool's own ids need no look at each.
        _check_ids(estimator, "predict()", estimate.question_ids, known, count=len(known))
    for name, values in (("mean", estimate.mean), ("evidence", estimate.evidence)):
        _insist(estimator, "predict()", values, np.ndarray)
        if values.shape != (len(known),):
            raise _broken(
                estimator, f"predict() gave {name} of shape {values.shape} for {len(known)} questions"
            )
        if values.dtype.kind not in "fiu":
            raise _broken(estimator, f"predict() gave {name} of type {values.dtype}; numbers are wanted")
    wrong = ~((estimate.mean >= 0) & (estimate.mean <= 1))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise _broken(
            estimator,
            f"predict() gave success rate {float(estimate.mean[first])!r} for question "
            f"{estimate.question_ids[first]!r}; success rates lie in [0, 1]",
        )
    if not (estimate.evidence >= 0).all():
        first = int(np.argmax(~(estimate.evidence >= 0)))
        raise _broken(
            estimator,
            f"predict() gave evidence {float(estimate.evidence[first])!r} for question "
            f"{estimate.question_ids[first]!r}; evidence is 0 or more",
        )
    for name, figure in estimate.figures.items():
        if not isinstance(figure, int | float | np.number) or isinstance(figure, bool):
            raise _broken(estimator, f"predict() gave the figure {name!r} as {figure!r}; figures are numbers")
    return estimate


def select(
    selector: Selector, estimate: SuccessEstimate, count: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """Ask for the next questions."""
    with running(selector):
        selection = selector.select(estimate, count, rng)
    _insist(selector, "select()", selection, Selection)
    names = [name for name in selection.question_ids if isinstance(name, str)]
    known = frozenset(estimate.question_ids[place] for place in estimate.places(names))
    _check_ids(selector, "select()", selection.question_ids, known, count=count)
    return tuple(selection.question_ids)


def review(selector: Selector, groups: Sequence[Group], num_missing: int) -> Review:
    """Ask which groups of a round may be trained on."""
    with running(selector):
        given = selector.review(groups, num_missing)
    _insist(selector, "review()", given, Review)
    _check_ids(selector, "review()", given.accepted, {group.question_id: group for group in groups})
    if type(given.num_more) is not int or given.num_more < 0:
        raise _broken(selector, f"review() asked for {given.num_more!r} more questions; must be 0 or more")
    return given


def num_ready(replay: Replay, policy_version: int) -> int:
    """Ask how many earlier groups could be drawn."""
    with running(replay):
        return replay.num_ready(policy_version)


def draw(
    replay: Replay,
    count: int,
    policy_version: int,
    excluded: frozenset[str],
    rng: np.random.Generator,
    known: Container[str],
) -> tuple[Group, ...]:
    """Ask for earlier groups."""
    with running(replay):
        drawn = replay.draw(count, policy_version, excluded, rng)
    _insist(replay, "draw()", drawn, tuple | list)
    for group in drawn:
        _insist(replay, "draw()", group, Group)
    groups = tuple(drawn)
    ids = [group.question_id for group in groups]
    if len(groups) > count:
        raise _broken(replay, f"draw() gave {len(groups)} groups where at most {count} were asked for")
    twice = _first_repeated(ids)
    if twice is not None:
        raise _broken(replay, f"draw() gave question {twice!r} twice; its groups are of distinct questions")
    if clash := sorted(excluded.intersection(ids)):
        raise _broken(replay, f"draw() gave question {clash[0]!r}, which is trained fresh in this step")
    unknown = next((name for name in ids if name not in known), None)
    if unknown is not None:
        raise _broken(replay, f"draw() gave question {unknown!r}, which is not in the pool")
    return groups


def generate(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    num_generations: int,
    sampling: Sampling,
    seeds: Sequence[int],
) -> Iterator[tuple[int, Sequence[Completion]]]:
    """Ask for completions: place of the prompt and its completions, in the order in which they end."""
    missing = set(range(len(prompts)))
    with running(rollout):
        answers = rollout.generate(prompts, num_generations, sampling, seeds)
        _insist(rollout, "generate()", answers, Iterable)
        for answer in answers:
            _insist(rollout, "generate()", answer, tuple | list)
            place, completions = answer
            if place not in missing:
                raise _broken(rollout, f"generate() gave the place {place!r}; each of the {len(prompts)} "
                              "prompts has one, from 0, and is answered once")  # fmt: skip
            missing.remove(place)
            where = f"generate() gave question {prompts[place].question_id!r}"
            _check_completions(rollout, where, completions, num_generations, sampling)
            yield place, completions
    if missing:
        raise _broken(rollout, f"generate() answered {len(prompts) - len(missing)} of {len(prompts)} prompts")


def _check_completions(
    rollout: Rollout,
    where: str,
    completions: Sequence[Completion],
    num_generations: int,
    sampling: Sampling,
) -> None:
    """Refuse completions that are not what was asked for."""
    _insist(rollout, "generate()", completions, tuple | list)
    if len(completions) != num_generations:
        raise _broken(
            rollout, f"{where} {len(completions)} completions where {num_generations} were asked for"
        )
    for completion in completions:
        _insist(rollout, "generate()", completion, Completion)
        length, num_logprobs = len(completion.token_ids), len(completion.behaviour_logprobs)
        if not 1 <= length <= sampling.max_completion_length:
            raise _broken(rollout, f"{where} a completion of {length} tokens; there may be 1 to "
                          f"{sampling.max_completion_length}")  # fmt: skip
        if num_logprobs != length:
            raise _broken(rollout, f"{where} {num_logprobs} log-probs for {length} tokens")


def score(reward: Reward, question: Question, completions: Sequence[Completion]) -> list[float | None]:
    """Ask for the scores of one question's completions; None where no answer was found."""
    with running(reward):
        given = reward.score(question, completions)
    try:
        scores = [None if score is None else float(score) for score in given]
    except (TypeError, ValueError) as error:
        raise _broken(reward, f"score() gave {given!r} for question {question.id!r}; one number per "
                      "completion is wanted, or None where no answer is found") from error  # fmt: skip
    if len(scores) != len(completions):
        raise _broken(
            reward,
            f"score() gave {len(scores)} scores for the {len(completions)} completions "
            f"of question {question.id!r}",
        )
    for number in scores:
        if number is not None and not math.isfinite(number):
            raise _broken(reward, f"score() gave {number!r} for question {question.id!r}; scores are finite")
    return scores


def advantages(objective: Objective, group: Group) -> Float[np.ndarray, "group"]:
    """Ask what each rollout of a group is worth."""
    with running(objective):
        given = objective.advantages(group.rewards)
    _insist(objective, "advantages()", given, np.ndarray)
    values = given.astype(np.float64)
    if values.shape != (group.trials,):
        raise _broken(
            objective, f"advantages() gave shape {values.shape} for the {group.trials} rollouts of a group"
        )
    if not np.isfinite(values).all():
        raise _broken(objective, f"advantages() of question {group.question_id!r} are not finite")
    return values


def _insist(component: Component, method: str, given: object, wanted: type | UnionType) -> None:
    """Refuse what is not of the type that the contract names."""
    if not isinstance(given, wanted):
        what = "None" if given is None else f"a {type(given).__name__}"
        name = "tuple or list" if isinstance(wanted, UnionType) else wanted.__name__
        raise _broken(component, f"{method} gave {what} where a {name} is wanted")


def _check_ids(
    component: Component,
    method: str,
    question_ids: Sequence[str],
    known: Container[str],
    count: int | None = None,
) -> None:
    """Refuse unknown and repeated ids and, where ``count`` is given, another number of them."""
    rule = f"{method} must give {count} distinct ids" if count is not None else f"{method} gives distinct ids"
    for question_id in question_ids:
        if not isinstance(question_id, str):
            raise _broken(component, f"{method} gave the id {question_id!r}; ids are text")
    unknown = next((question_id for question_id in question_ids if question_id not in known), None)
    if unknown is not None:
        raise _broken(component, f"returned the unknown question {unknown!r}; {rule} of the pool")
    twice = _first_repeated(question_ids)
    if twice is not None:
        raise _broken(component, f"returned question {twice!r} twice; {rule}")
    if count is not None and len(question_ids) != count:
        raise _broken(component, f"returned {len(question_ids)} questions; {rule}")


def _first_repeated(question_ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for question_id in question_ids:
        if question_id in seen:
            return question_id
        seen.add(question_id)
    return None


def _broken(component: Component, what: str) -> PluginError:
    return PluginError(f"{label(component)} {what}")
