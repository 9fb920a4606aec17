"""The canary: a few fixed prompts whose completions sampler and trainer score alike, or the run stops.

A sampler with weights of its own can go wrong silently: new weights that do not reach it, or only some, keys
and values of earlier weights in its prefix cache, log-probs at another temperature. Each of them makes a run
learn from numbers that are not what they are taken for. The canary samples on the path that training samples
on, so that it sees what training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Policy, Rollout
from dteframe.engine import calls
from dteframe.engine.member import Member, Work
from dteframe.engine.pack import Row
from dteframe.errors import DTEFrameError
from dteframe.records import Completion, CreditedGroup, Group, Prompt, Sampling
from dteframe.reports import CanaryReport

NUM_PROMPTS = 4
NUM_COMPLETIONS = 2
"""Of each prompt."""
LONGEST_COMPLETION = 16
"""Tokens."""
SEED = 2026
"""The seeds of the prompts are this and the next numbers, at every canary."""
BOUND_NATS: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean absolute difference allowed, by the type of the policy's parameters.

In float32 vLLM and transformers differ by about 1e-6. In bfloat16 differences between vLLM and trainers of
0.011 (Qwen3-4B, github.com/vllm-project/vime/issues/64), 0.03 (root mean square, Qwen2.5-0.5B,
github.com/ServiceNow/Fast-LLM/pull/525) and 0.064 (a mixture of experts,
github.com/verl-project/verl-omni/issues/637) are reported from runs that are sound.
"""
STALE_FRACTION = 0.1
"""Share of the bound by which the trainer must have moved for equal answers of the sampler to be stale."""
EXPLAINED_FRACTION = 0.1
"""An explanation holds if it leaves at most this share of the difference, or less than the bound."""
ROUNDING_NATS = 0.2
"""What rounding to bfloat16 explains at most."""
LARGEST_BIAS = 0.5
"""Rounding goes both ways: the mean difference is at most this share of the mean absolute one."""
LARGEST_JUMP = 10.0
"""Rounding does not begin from one canary to the next: the difference has been at least a tenth before."""
TEMPERATURE_FACTOR = 4.0
"""Other temperatures are looked for between a quarter and four times the recipe's."""

LogProbs = Float[np.ndarray, "tokens"]


class CanaryError(DTEFrameError):
    """Sampler and trainer do not agree about the probability of the sampler's own completions."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The same tokens as the sampler and as the trainer scored them, all completions end to end."""

    token_ids: tuple[int, ...]
    sampler: LogProbs
    trainer: LogProbs

    @property
    def mean_nats(self) -> float:
        """Average the absolute difference."""
        return mean_distance(self.sampler, self.trainer)

    @property
    def max_nats(self) -> float:
        """Find the largest absolute difference."""
        return float(np.abs(self.sampler - self.trainer).max())

    @property
    def bias_nats(self) -> float:
        """Average sampler minus trainer."""
        return float((self.sampler - self.trainer).mean())


@dataclass(frozen=True, slots=True)
class Sample(Work[list[list[tuple[Completion, ...]]]]):
    """Let the sampler of every process answer the same prompts."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling

    def do(self, member: Member) -> list[list[tuple[Completion, ...]]]:
        """Answer; the main process gets everybody's answers, by process."""
        rollout = member.parts.rollout
        seeds = [SEED + place for place in range(len(self.prompts))]
        with member.learner.whole_module() if rollout.shares_module else nullcontext():
            answers = dict(calls.generate(rollout, self.prompts, NUM_COMPLETIONS, self.sampling, seeds))
        return member.processes.collect([tuple(answers[place]) for place in range(len(self.prompts))])


@dataclass(frozen=True, slots=True)
class Score(Work[list[LogProbs]]):
    """Let the trainer score completions."""

    rows: tuple[Row, ...]
    temperature: float

    def do(self, member: Member) -> list[LogProbs]:
        """Score the rows together with the other processes."""
        found = member.learner.logprobs(self.rows, self.temperature)
        return [logprobs.double().cpu().numpy() for logprobs in found]


def canary_for(rollout: Rollout, policy: Policy, prompts: Sequence[Prompt]) -> Canary | None:
    """Make the canary that the rollout's options ask for."""
    config = rollout.config
    if config.canary_every == 0:
        return None
    bound_nats = config.canary_bound_nats or BOUND_NATS[str(policy.dtype).removeprefix("torch.")]
    return Canary(prompts, config.sampling(), bound_nats)


class Canary:
    """Asks and compares; remembers the last answers, which stale weights would repeat."""

    def __init__(self, prompts: Sequence[Prompt], sampling: Sampling, bound_nats: float) -> None:
        """Choose the prompts.

        Args:
            prompts: those of the pool. The longest are asked: prefix caches keep whole blocks of tokens, so
                that what is wrong in them shows in long prompts only.
            sampling: of the training completions; the canary's are shorter, and not truncated.
            bound_nats: mean absolute difference that stops the run.
        """
        by_length = sorted(prompts, key=lambda prompt: (-len(prompt.token_ids), prompt.question_id))
        self._prompts = tuple(by_length[:NUM_PROMPTS])
        longest = min(LONGEST_COMPLETION, sampling.max_completion_length)
        self._sampling = Sampling(sampling.temperature, max_completion_length=longest)
        self._bound_nats = bound_nats
        self._last: Scores | None = None

    def check(self, member: Member) -> CanaryReport:
        """Compare sampler and trainer.

        Raises:
            CanaryError: they differ; says whether it looks like broken or stale weights, temperature, or
                precision.
        """
        scores, rows = self._scores(member, self._prompts)
        last = self._last
        if not agree(scores, last, self._bound_nats):
            raise CanaryError(
                "canary: the log-probs of sampler and trainer differ by "
                f"{scores.mean_nats:.3g} nats a token ({scores.max_nats:.3g} at most), where "
                f"{self._bound_nats:g} is allowed (rollout.canary_bound_nats); "
                f"{self._cause(member, scores, rows)}"
            )
        if last is None or not np.array_equal(scores.sampler, last.sampler):
            self._last = scores  # A sampler that repeats itself is compared with when it began to.
        return CanaryReport(
            logprob_difference_mean_nats=scores.mean_nats,
            logprob_difference_max_nats=scores.max_nats,
            num_tokens=len(scores.token_ids),
        )

    def _scores(self, member: Member, prompts: tuple[Prompt, ...]) -> tuple[Scores, tuple[Row, ...]]:
        answers = member.together(Sample(prompts, self._sampling))
        groups = [
            _group(prompt, group) for each in answers for prompt, group in zip(prompts, each, strict=True)
        ]
        pairs = [(group, completion) for group in groups for completion in group.group.completions]
        rows = tuple(Row(index, *pair, advantage=0.0) for index, pair in enumerate(pairs))
        trainer = member.together(Score(rows, self._sampling.temperature))
        completions = [completion for _, completion in pairs]
        scores = Scores(
            token_ids=tuple(np.concatenate([completion.token_ids for completion in completions]).tolist()),
            sampler=np.concatenate([item.behaviour_logprobs for item in completions]).astype(np.float64),
            trainer=np.concatenate(trainer),
        )
        return scores, rows

    def _cause(self, member: Member, scores: Scores, rows: tuple[Row, ...]) -> str:
        """Look further into a difference: at other temperatures, and at prompts that no cache can hold."""

        def score_at(temperature: float) -> LogProbs:
            return np.concatenate(member.together(Score(rows, temperature)))

        unasked = tuple(begun_otherwise(prompt, scores.token_ids) for prompt in self._prompts)
        return likely_cause(
            scores,
            self._last,
            self._bound_nats,
            self._sampling.temperature,
            score_at,
            lambda: self._scores(member, unasked)[0].mean_nats,
        )


def likely_cause(
    scores: Scores,
    last: Scores | None,
    bound_nats: float,
    temperature: float,
    score_at: Callable[[float], LogProbs],
    uncached_nats: Callable[[], float],
) -> str:
    """Say what a difference looks like, and what to do about it.

    Args:
        scores: of this canary.
        last: of the one before, if there was one.
        bound_nats: the difference that is allowed.
        temperature: the recipe's.
        score_at: gives the trainer's log-probs at another temperature.
        uncached_nats: gives the difference for prompts that were never asked before.
    """
    if not np.isfinite(scores.trainer).all():
        return (
            "the trainer's are not finite: its weights are broken; lower training.learning_rate, or set "
            "model.dtype to float32"
        )
    if last is not None and is_repeated(scores, last, bound_nats):
        return (
            "it looks like stale weights: the sampler's answers are those of the canary before, the "
            "trainer's weights are not; the rollout's sync() does not reach it"
        )
    enough = max(bound_nats, EXPLAINED_FRACTION * scores.mean_nats)
    other = best_temperature(score_at, scores.sampler, temperature)
    if mean_distance(scores.sampler, score_at(other)) <= enough:
        return (
            f"it looks like temperature: the sampler's log-probs are those of temperature {other:.3g}, the "
            f"recipe's is {temperature:g}; give the sampler the recipe's, and have it give log-probs of the "
            "distribution that it samples from (vLLM's --logprobs-mode processed_logprobs)"
        )
    if uncached_nats() <= enough:
        return (
            "it looks like stale weights in the prefix cache: prompts that were never asked before show no "
            "difference; empty the cache after each update, or turn it off (rollout.enable_prefix_caching)"
        )
    if looks_like_rounding(scores, last):
        return (
            "it looks like precision: the difference is small and goes both ways; let sampler and trainer "
            "compute in the same type (rollout.dtype, model.dtype), or raise the bound"
        )
    return (
        "it looks like stale weights: no other temperature explains it; some of the weights did not reach "
        "the sampler, or it has another model"
    )


def agree(scores: Scores, last: Scores | None, bound_nats: float) -> bool:
    """Whether sampler and trainer are near enough, and the sampler is not stale; NaN is near to nothing."""
    is_stale = last is not None and is_repeated(scores, last, bound_nats)
    return not is_stale and scores.mean_nats <= bound_nats


def is_repeated(scores: Scores, last: Scores, bound_nats: float) -> bool:
    """Whether the sampler answers to the last bit what it did before, though the trainer has moved on."""
    if scores.token_ids != last.token_ids or not np.array_equal(scores.sampler, last.sampler):
        return False
    return mean_distance(scores.trainer, last.trainer) > STALE_FRACTION * bound_nats


def best_temperature(score_at: Callable[[float], LogProbs], sampler: LogProbs, temperature: float) -> float:
    """Find the temperature at which the trainer's log-probs are nearest to the sampler's.

    Tries temperatures in equal ratios, then the neighbourhood of the best one, four times.
    """
    best, ratio = temperature, TEMPERATURE_FACTOR
    for _ in range(4):
        tried = best * ratio ** np.linspace(-1.0, 1.0, 17)
        misses = [mean_distance(sampler, score_at(float(one))) for one in tried]
        best = float(tried[int(np.argmin(misses))])
        ratio = ratio ** (1 / 8)
    return best


def begun_otherwise(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """Give the prompt with the first of these tokens that differs in place of its own first.

    Whatever was kept of the prompt, a prefix cache has nothing of this one.
    """
    first = prompt.token_ids[0]
    other = next((token_id for token_id in token_ids if token_id != first), first)
    return Prompt(prompt.question_id, np.concatenate([[other], prompt.token_ids[1:]]))


def mean_distance(one: LogProbs, other: LogProbs) -> float:
    """Average the absolute difference, nats."""
    return float(np.abs(one - other).mean())


def looks_like_rounding(scores: Scores, last: Scores | None) -> bool:
    """Whether a difference is as small, as unbiased and as steady as that of another precision."""
    is_steady = last is None or scores.mean_nats <= LARGEST_JUMP * last.mean_nats
    is_unbiased = abs(scores.bias_nats) <= LARGEST_BIAS * scores.mean_nats
    return scores.mean_nats <= ROUNDING_NATS and is_unbiased and is_steady


def _group(prompt: Prompt, completions: Sequence[Completion]) -> CreditedGroup:
    """Put completions that earn nothing into the form in which the trainer reads them."""
    nothing = np.zeros(len(completions))
    group = Group(prompt.question_id, prompt.token_ids, tuple(completions), nothing, 0, 0, "evaluation")
    return CreditedGroup(group, nothing, is_replayed=False, staleness=0)
