"""What every objective promises."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dteframe.contracts import LossInputs, LossOutputs, Objective
from dteframe.testing.promises.every_kind import state_comes_back
from dteframe.testing.subject import Subject, insist

if TYPE_CHECKING:
    import torch

REWARDS = np.array([1.0, 0.0, 0.25, 0.0, 1.0, 0.0])


def advantages_are_one_per_rollout_and_finite(subject: Subject) -> None:
    """``advantages`` gives one finite number per reward."""
    advantages = subject.make().advantages(REWARDS)
    insist(advantages.shape == REWARDS.shape, f"shape {advantages.shape} for {REWARDS.shape} rewards")
    insist(np.isfinite(advantages).all(), f"{advantages} for {REWARDS}")


def advantages_follow_the_order_of_the_rewards(subject: Subject) -> None:
    """The first advantage is the first rollout's: rewards backwards give advantages backwards."""
    objective: Objective = subject.make()
    forwards, backwards = objective.advantages(REWARDS), objective.advantages(REWARDS[::-1].copy())
    insist(np.allclose(forwards, backwards[::-1]), f"{forwards}, backwards {backwards}")


def equal_rewards_give_no_advantage(subject: Subject) -> None:
    """A group of equal rewards has advantages of exactly 0: the engine does not run it through the model."""
    for reward in (0.0, 0.1, 1.0):
        advantages = subject.make().advantages(np.full(6, reward))
        insist((advantages == 0).all(), f"{advantages} for six rewards of {reward}")


def loss_is_the_same_in_any_micro_batches(subject: Subject) -> None:
    """The losses and figures of micro-batches add up to those of the minibatch.

    Divide by ``num_rollouts`` and ``num_tokens`` of the whole minibatch, never by what the micro-batch holds.
    """
    objective: Objective = subject.make()
    whole = objective.loss(_inputs(objective))
    parts = [objective.loss(part) for part in _halves(_inputs(objective))]
    total = float(sum(part.loss.item() for part in parts))
    insist(
        np.isclose(whole.loss.item(), total, rtol=1e-5), f"{whole.loss.item()} whole, {total} in two parts"
    )
    for name in whole.sums:
        sums = sum(part.sums[name].item() for part in parts)
        insist(
            np.isclose(whole.sums[name].item(), sums, rtol=1e-5), f"{name}: {whole.sums[name]} whole, {sums}"
        )


def loss_and_gradient_are_finite(subject: Subject) -> None:
    """Also where the policy moved far from the one that sampled: ratios of exp(30) are met in practice."""
    import torch

    objective: Objective = subject.make()
    inputs = _inputs(objective)
    far = inputs.logprobs.detach() - 30.0 * (torch.arange(len(inputs.logprobs)) % 2)
    for logprobs, behaviour in ((far, inputs.behaviour_logprobs), (inputs.logprobs.detach(), far)):
        leaf = logprobs.clone().requires_grad_()
        loss = objective.loss(replace(inputs, logprobs=leaf, behaviour_logprobs=behaviour)).loss
        gradient = _gradient(loss, leaf)
        insist(torch.isfinite(loss), f"loss {loss.item()}")
        insist(bool(torch.isfinite(gradient).all()), "a gradient is not finite")


def gradient_raises_what_was_better(subject: Subject) -> None:
    """A step down the gradient on fresh tokens makes tokens of positive advantage likelier, others less."""
    objective: Objective = subject.make()
    inputs = _inputs(objective)
    leaf = inputs.behaviour_logprobs.clone().requires_grad_()
    fresh = replace(
        inputs,
        logprobs=leaf,
        proximal_logprobs=inputs.behaviour_logprobs,
        reference_logprobs=None if inputs.reference_logprobs is None else inputs.behaviour_logprobs,
        is_replayed=inputs.is_replayed & False,
    )
    gradient = _gradient(objective.loss(fresh).loss, leaf)
    decided = inputs.advantages != 0
    right = gradient[decided].sign() == -inputs.advantages[decided].sign()
    insist(right.all(), f"{int((~right).sum())} of {len(right)} tokens are pushed the wrong way")


def tokens_without_advantage_carry_no_gradient(subject: Subject) -> None:
    """Unless ``equal_rewards_carry_gradient``: the engine leaves groups of equal rewards out."""
    import torch

    objective: Objective = subject.make()
    if objective.equal_rewards_carry_gradient:
        return
    inputs = _inputs(objective)
    leaf = inputs.logprobs.detach().clone().requires_grad_()
    loss = objective.loss(replace(inputs, logprobs=leaf, advantages=torch.zeros_like(inputs.advantages))).loss
    worst = float(_gradient(loss, leaf).abs().max())
    insist(worst == 0.0, f"a gradient of {worst} although all advantages are 0")


def figures_are_scalars_without_gradient(subject: Subject) -> None:
    """``sums`` holds scalars, detached: they are added up over the step and logged."""
    objective: Objective = subject.make()
    outputs: LossOutputs = objective.loss(_inputs(objective))
    insist(outputs.loss.dim() == 0, f"the loss has the shape {tuple(outputs.loss.shape)}")
    wrong = [name for name, figure in outputs.sums.items() if figure.dim() != 0 or figure.requires_grad]
    insist(not wrong, f"{', '.join(wrong)}: not a scalar, or with gradient")


def _inputs(objective: Objective) -> LossInputs:
    """Give 4 rollouts of 3, 5, 2 and 4 tokens, the last two replayed, the third without advantage."""
    import torch

    lengths = torch.tensor([3, 5, 2, 4])
    rollout_index = torch.repeat_interleave(torch.arange(4), lengths)
    generator = torch.Generator().manual_seed(0)
    near, nearer, nearest = (0.1 * torch.randn(14, generator=generator) for _ in range(3))
    behaviour = -1.0 - torch.rand(14, generator=generator)
    return LossInputs(
        logprobs=(behaviour + near + nearer).requires_grad_(),
        proximal_logprobs=behaviour + near,
        behaviour_logprobs=behaviour,
        reference_logprobs=behaviour + nearest if objective.needs_reference_model else None,
        advantages=torch.tensor([0.75, -0.25, 0.0, -0.5])[rollout_index],
        rollout_index=rollout_index,
        is_replayed=rollout_index >= 2,
        num_rollouts=6,
        num_tokens=20,
        max_completion_length=5,
    )


def _halves(inputs: LossInputs) -> list[LossInputs]:
    """Split into the first two and the last two rollouts."""
    parts = []
    for first in (0, 2):
        here = (inputs.rollout_index >= first) & (inputs.rollout_index < first + 2)
        reference = inputs.reference_logprobs
        part = replace(
            inputs,
            logprobs=inputs.logprobs[here],
            proximal_logprobs=inputs.proximal_logprobs[here],
            behaviour_logprobs=inputs.behaviour_logprobs[here],
            reference_logprobs=None if reference is None else reference[here],
            advantages=inputs.advantages[here],
            rollout_index=inputs.rollout_index[here] - first,
            is_replayed=inputs.is_replayed[here],
        )
        parts.append(part)
    return parts


def _gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    import torch

    insist(loss.requires_grad, "the loss does not depend on logprobs")
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    insist(gradient is not None, "no gradient reaches logprobs")
    return gradient


PROMISES = (
    state_comes_back,
    advantages_are_one_per_rollout_and_finite,
    advantages_follow_the_order_of_the_rewards,
    equal_rewards_give_no_advantage,
    loss_is_the_same_in_any_micro_batches,
    loss_and_gradient_are_finite,
    gradient_raises_what_was_better,
    tokens_without_advantage_carry_no_gradient,
    figures_are_scalars_without_gradient,
)
