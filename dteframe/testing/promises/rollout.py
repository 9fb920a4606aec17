"""What every rollout engine promises; checked with a tiny policy of random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dteframe.contracts import Policy, Rollout
from dteframe.records import Completion, Prompt, Sampling
from dteframe.testing.subject import (
    Subject,
    copy_of_state,
    in_order,
    insist,
    insist_on_storable_state,
    same_value,
)
from dteframe.testing.tiny import tiny_policy

NUM_GENERATIONS = 3
WARM = Sampling(temperature=0.7, max_completion_length=8)
SEEDS = ((2**63 - 1, 0, 1, 2), (7, 2**40, 5, 6), (8, 9, 10, 2**50))
"""Three times one seed for each of the four prompts."""


def every_prompt_is_answered_once(subject: Subject) -> None:
    """``generate`` gives each prompt's place once, with ``num_generations`` completions; nothing for none."""
    policy = tiny_policy(num_heads=1)
    prompts = _prompts(subject, policy)
    answers = list(_started(subject, policy).generate(prompts, NUM_GENERATIONS, WARM, SEEDS[0]))
    places = sorted(place for place, _ in answers)
    insist(places == list(range(len(prompts))), f"the places {places} for {len(prompts)} prompts")
    groups = [completions for _, completions in answers]
    insist(
        [len(group) for group in groups] == [NUM_GENERATIONS] * len(prompts),
        f"{[*map(len, groups)]} completions",
    )
    rollout = _started(subject, policy)
    insist(not list(rollout.generate([], 2, WARM, [])), "completions of no prompts")


def lengths_stay_within_the_limit(subject: Subject) -> None:
    """A completion has at least one token and at most ``max_completion_length``, one log-prob per token."""
    for limit in (1, 8):
        _, _, groups = _generated(subject, Sampling(max_completion_length=limit))
        for completion in _all(groups):
            length = len(completion.token_ids)
            insist(1 <= length <= limit, f"{length} tokens, the limit is {limit}")
            insist(len(completion.behaviour_logprobs) == length, "the log-probs are not one per token")


def stopped_completions_end_in_the_end_token(subject: Subject) -> None:
    """``stop`` completions end in the end-of-sequence token, which occurs nowhere else; others are full."""
    policy, _, groups = _generated(subject, Sampling(temperature=2.0, max_completion_length=60))
    end = policy.tokenizer.eos_token_id
    insist(
        any(item.finish_reason == "stop" for item in _all(groups)), "of 12 long completions none ever stops"
    )
    for completion in _all(groups):
        places = np.flatnonzero(completion.token_ids == end).tolist()
        last = len(completion.token_ids) - 1
        wanted = [last] if completion.finish_reason == "stop" else []
        insist(places == wanted, f"{completion.finish_reason}: end tokens at {places} of {last + 1}")
        is_full = completion.finish_reason == "stop" or last + 1 == 60
        insist(is_full, f"finish reason 'length' after {last + 1} of 60 tokens")


def texts_are_the_decoded_tokens(subject: Subject) -> None:
    """``text`` is what the tokenizer decodes without special tokens: no prompt, nothing trimmed."""
    policy, _, groups = _generated(subject, WARM)
    for completion in _all(groups):
        decoded = policy.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        insist(completion.text == decoded, f"text {completion.text!r}, decoded {decoded!r}")


def logprobs_are_those_of_the_policy_that_was_asked(subject: Subject) -> None:
    """``behaviour_logprobs`` equal a forward pass over prompt and completion at the sampling temperature."""
    policy, prompts, groups = _generated(subject, WARM)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = _logprobs(policy, prompt, completion, WARM.temperature)
            error = float(np.abs(completion.behaviour_logprobs - expected).max())
            insist(error < 1e-4, f"prompt {prompt.question_id!r}: off by {error:.3g} nats")


def truncated_sampling_reports_the_truncated_distribution(subject: Subject) -> None:
    """Log-probs are renormalised over the tokens that could be sampled: with top_k=1 all are 0."""
    for sampling in (
        Sampling(top_k=1, max_completion_length=6),
        Sampling(top_p=1e-6, max_completion_length=6),
    ):
        _, _, groups = _generated(subject, sampling)
        for completion in _all(groups):
            worst = float(np.abs(completion.behaviour_logprobs).max())
            insist(worst < 1e-5, f"{sampling}: a certain token has log-prob {-worst:.3g}")


def equal_seeds_give_equal_completions(subject: Subject) -> None:
    """The seeds that ``generate`` gets are its only source of chance; other seeds, other answers."""
    first, second, other = (_generated(subject, WARM, seed)[2] for seed in (1, 1, 2))
    insist(_tokens(first) == _tokens(second), "equal seeds gave different completions")
    insist(_tokens(first) != _tokens(other), "different seeds gave the same completions")


def other_prompts_change_nothing(subject: Subject) -> None:
    """A prompt's completions depend on its own seed, not on which prompts are asked with it or before it."""
    policy, prompts, together = _generated(subject, WARM)
    rollout = _started(subject, policy)
    for place in reversed(range(len(prompts))):
        alone = in_order(
            rollout.generate(prompts[place : place + 1], NUM_GENERATIONS, WARM, SEEDS[0][place:][:1])
        )
        insist(_tokens(alone) == _tokens(together[place : place + 1]), "asked alone it answers otherwise")


def completions_of_one_prompt_differ(subject: Subject) -> None:
    """Each completion is sampled on its own."""
    _, _, groups = _generated(subject, Sampling(max_completion_length=12))
    distinct = [len({tuple(item.token_ids.tolist()) for item in group}) for group in groups]
    insist(max(distinct) > 1, f"the {NUM_GENERATIONS} completions of every prompt are the same")


def policy_is_left_as_it_is(subject: Subject) -> None:
    """Sampling changes no weight and leaves the module in evaluation mode."""
    policy = tiny_policy(num_heads=1)  # Attention kernels want heads of 32 at least.
    before = {name: value.numpy().copy() for name, value in policy.module.state_dict().items()}
    rollout: Rollout = _started(subject, policy)
    list(rollout.generate(_prompts(subject, policy), 2, WARM, SEEDS[0]))
    rollout.sync(policy)
    after = {name: value.numpy() for name, value in policy.module.state_dict().items()}
    insist(same_value(before, after), "the weights changed")
    insist(not policy.module.training, "the module is in training mode")


def new_weights_are_used_after_sync(subject: Subject) -> None:
    """After ``sync`` completions come from the new weights, not from those of the start."""
    import torch

    policy = tiny_policy(num_heads=1)
    rollout = _started(subject, policy)
    prompts = _prompts(subject, policy)
    list(rollout.generate(prompts, 1, WARM, SEEDS[0]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    rollout.sync(policy)
    groups = in_order(rollout.generate(prompts, 1, WARM, SEEDS[0]))
    expected = _logprobs(policy, prompts[0], groups[0][0], WARM.temperature)
    error = float(np.abs(groups[0][0].behaviour_logprobs - expected).max())
    insist(error < 1e-4, f"after an update the log-probs are off by {error:.3g} nats")


def state_brings_back_the_completions(subject: Subject) -> None:
    """A new engine, started and given the state, samples what the first one would have sampled next."""
    policy = tiny_policy(num_heads=1)
    before, after = _started(subject, policy), _started(subject, policy)
    prompts = _prompts(subject, policy)
    list(before.generate(prompts, 1, WARM, SEEDS[0]))
    insist_on_storable_state(before)
    after.load_state_dict(copy_of_state(before))
    insist(same_value(after.state_dict(), before.state_dict()), "the state changed on its way")
    pair = [in_order(item.generate(prompts, 2, WARM, SEEDS[1])) for item in (before, after)]
    insist(_tokens(pair[0]) == _tokens(pair[1]), "the resumed engine samples something else")


def _started(subject: Subject, policy: Policy) -> Rollout:
    rollout: Rollout = subject.make()
    rollout.start(policy)
    return rollout


def _generated(
    subject: Subject, sampling: Sampling, seed: int = 0
) -> tuple[Policy, Sequence[Prompt], Sequence[Sequence[Completion]]]:
    policy = tiny_policy(num_heads=1)
    prompts = _prompts(subject, policy)
    answers = _started(subject, policy).generate(prompts, NUM_GENERATIONS, sampling, SEEDS[seed])
    return policy, prompts, in_order(answers)


def _prompts(subject: Subject, policy: Policy) -> Sequence[Prompt]:
    """Give four prompts of different lengths."""
    texts = [question.text * (1 + place) for place, question in enumerate(subject.questions[:4])]
    encoded = [np.array(policy.tokenizer.encode(text), dtype=np.int64) for text in texts]
    pairs = zip(subject.questions, encoded, strict=False)
    return [Prompt(question.id, token_ids) for question, token_ids in pairs]


def _logprobs(
    policy: Policy, prompt: Prompt, completion: Completion, temperature: float
) -> Float[np.ndarray, "completion"]:
    import torch

    row = torch.tensor([[*prompt.token_ids.tolist(), *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = policy.module(input_ids=row).logits[0, len(prompt.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    chosen: Float[np.ndarray, "completion"] = logprobs.gather(1, row[0, len(prompt.token_ids) :, None])[
        :, 0
    ].numpy()
    return chosen


def _all(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def _tokens(groups: Sequence[Sequence[Completion]]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in _all(groups)]


PROMISES = (
    every_prompt_is_answered_once,
    lengths_stay_within_the_limit,
    stopped_completions_end_in_the_end_token,
    texts_are_the_decoded_tokens,
    logprobs_are_those_of_the_policy_that_was_asked,
    truncated_sampling_reports_the_truncated_distribution,
    equal_seeds_give_equal_completions,
    other_prompts_change_nothing,
    completions_of_one_prompt_differ,
    policy_is_left_as_it_is,
    new_weights_are_used_after_sync,
    state_brings_back_the_completions,
)
