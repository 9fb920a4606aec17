"""The GRPO objective, by numbers worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dteframe.contracts import Context, LossInputs
from dteframe.objectives.grpo import GRPO, GRPOConfig, group_relative, is_stale_negative, kl_nats
from dteframe.records import BatchArithmetic


def objective(**options: object) -> GRPO:
    def refuse(*_: object) -> None:
        raise AssertionError("the objective has nothing to tell")

    return GRPO(GRPOConfig(**options), Context(Path("x"), Path("x"), "cpu", 0, progress=refuse, warn=refuse))


def inputs(
    probabilities: list[float],
    *,
    proximal: list[float] | None = None,
    behaviour: list[float] | None = None,
    reference: list[float] | None = None,
    advantages: list[float],
    rollouts: list[int] | None = None,
    replayed: bool = False,
    num_rollouts: int = 1,
    num_tokens: int = 1,
    max_completion_length: int = 10,
) -> LossInputs:
    """Take probabilities of tokens, not their logarithms; what is left out equals the present policy."""

    def logs(values: list[float] | None) -> torch.Tensor:
        return torch.tensor(values or probabilities, dtype=torch.float64).log()

    return LossInputs(
        logprobs=logs(probabilities).requires_grad_(),
        proximal_logprobs=logs(proximal),
        behaviour_logprobs=logs(behaviour or proximal),
        reference_logprobs=None if reference is None else logs(reference),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        rollout_index=torch.tensor(rollouts or [0] * len(probabilities)),
        is_replayed=torch.tensor([replayed] * len(probabilities)),
        num_rollouts=num_rollouts,
        num_tokens=num_tokens,
        max_completion_length=max_completion_length,
    )


def test_one_right_answer_in_four_stands_out() -> None:
    assert group_relative(np.array([1, 0, 0, 0.0]), "none").tolist() == [0.75, -0.25, -0.25, -0.25]


def test_scaling_by_the_group_divides_by_the_sample_deviation_plus_trls_floor() -> None:
    # Mean 0.25, squared deviations 0.5625 + 3 * 0.0625 = 0.75, sample variance 0.25, deviation 0.5.
    expected = [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]
    assert group_relative(np.array([1, 0, 0, 0.0]), "group").tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_equal_rewards_give_advantages_of_exactly_zero(scale: str) -> None:
    assert group_relative(np.full(7, 0.1), scale).tolist() == [0.0] * 7


def test_a_reward_that_is_not_finite_is_named() -> None:
    message = "rewards: rollout 2 has nan; every reward must be finite"
    with pytest.raises(ValueError, match=re.escape(message)):
        group_relative(np.array([1.0, 0.0, math.nan]), "none")


@given(successes=st.integers(1, 11), group_size=st.integers(2, 12))
def test_squared_advantages_add_up_to_what_the_theory_says(successes: int, group_size: int) -> None:
    successes = min(successes, group_size - 1)
    rewards = np.array([1.0] * successes + [0.0] * (group_size - successes))
    rate = successes / group_size
    plain = group_relative(rewards, "none")
    assert (plain**2).sum() == pytest.approx(group_size * rate * (1 - rate))
    scaled = group_relative(rewards, "group")
    assert (scaled**2).sum() == pytest.approx(group_size - 1, rel=1e-3)
    assert scaled.sum() == pytest.approx(0, abs=1e-9)


def test_the_grpo_aggregation_is_the_mean_over_rollouts_of_the_token_mean() -> None:
    # Ratios are 1: token losses -1, -1 | 2. Half of (-1 + 2); the other rollouts of the minibatch count as 0.
    given = inputs([0.5] * 3, advantages=[1, 1, -2], rollouts=[0, 0, 1], num_rollouts=4)
    assert objective(loss_type="grpo").loss(given).loss.item() == pytest.approx((-1 + 2) / 4)


def test_the_dr_grpo_aggregation_divides_by_rollouts_times_the_longest_length_allowed() -> None:
    given = inputs(
        [0.5] * 3, advantages=[1, 1, -3], rollouts=[0, 0, 1], num_rollouts=4, max_completion_length=5
    )
    assert objective(loss_type="dr_grpo").loss(given).loss.item() == pytest.approx((-1 - 1 + 3) / 20)


def test_the_dapo_aggregation_divides_by_all_tokens_of_the_minibatch() -> None:
    given = inputs([0.5] * 3, advantages=[1, 1, -3], rollouts=[0, 0, 1], num_rollouts=4, num_tokens=8)
    assert objective(loss_type="dapo").loss(given).loss.item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "has_gradient"),
    [
        (1.5, 1.0, 1.2, False),  # far enough up
        (1.5, -1.0, -1.5, True),  # the wrong way: the whole penalty
        (0.5, 1.0, 0.5, True),
        (0.5, -1.0, -0.8, False),  # far enough down
        (1.1, 2.0, 2.2, True),
    ],
)
def test_the_clip_keeps_the_smaller_gain(
    ratio: float, advantage: float, gain: float, has_gradient: bool
) -> None:
    given = inputs([0.4 * ratio], proximal=[0.4], advantages=[advantage])
    outputs = objective().loss(given)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(-gain)
    assert (given.logprobs.grad.item() != 0) is has_gradient
    assert outputs.sums["clip_fraction"].item() == (0 if has_gradient else 1)


def test_clip_higher_moves_the_upper_bound_alone() -> None:
    up = inputs([0.6], proximal=[0.4], advantages=[1])
    assert objective(epsilon_high=0.28).loss(up).loss.item() == pytest.approx(-1.28)
    down = inputs([0.2], proximal=[0.4], advantages=[-1])
    assert objective(epsilon_high=0.28).loss(down).loss.item() == pytest.approx(0.8)


def test_proximal_clipping_weighs_the_ordinary_gain_of_replayed_tokens() -> None:
    # u = 0.5 / 0.4 = 1.25 is clipped to 1.2; rho = 0.4 / 0.25 = 1.6.
    given = inputs([0.5], proximal=[0.4], behaviour=[0.25], advantages=[1], replayed=True)
    outputs = objective(replay_clip="proximal").loss(given)
    assert outputs.loss.item() == pytest.approx(-1.6 * 1.2)
    assert outputs.sums["importance_weight_mean"].item() == pytest.approx(1.6)
    assert outputs.sums["cap_fraction"].item() == 0


def test_clipping_around_one_compares_replayed_tokens_with_the_policy_that_sampled_them() -> None:
    # w = 0.28 / 0.25 = 1.12 is inside; the proximal policy does not matter.
    given = inputs([0.28], proximal=[0.1], behaviour=[0.25], advantages=[1], replayed=True)
    assert objective(replay_clip="one").loss(given).loss.item() == pytest.approx(-1.12)
    # w = 2 is clipped to 1.2, and no cap applies.
    given = inputs([0.5], proximal=[0.9], behaviour=[0.25], advantages=[1], replayed=True)
    outputs = objective(replay_clip="one", importance_cap=1.5).loss(given)
    assert outputs.loss.item() == pytest.approx(-1.2)
    assert outputs.sums["cap_fraction"].item() == 0


def test_clipping_around_one_leaves_fresh_tokens_as_they_are() -> None:
    given = inputs([0.5], proximal=[0.4], behaviour=[0.25], advantages=[1], replayed=False)
    one, proximal = (objective(replay_clip=centre).loss(given).loss for centre in ("one", "proximal"))
    assert one.item() == proximal.item() == pytest.approx(-1.6 * 1.2)


def test_no_weight_exceeds_the_cap() -> None:
    # rho = 0.8 / 0.1 = 8.
    given = inputs([0.8], proximal=[0.8], behaviour=[0.1], advantages=[1], replayed=True)
    outputs = objective().loss(given)
    assert outputs.loss.item() == pytest.approx(-2.0)
    assert outputs.sums["cap_fraction"].item() == 1
    assert objective(importance_cap=None).loss(given).loss.item() == pytest.approx(-8.0)


def test_rollouts_to_be_avoided_that_are_avoided_already_are_left_out() -> None:
    # Mean gaps of log(0.5/0.2) = 0.92, of (log(0.5/0.2) + log(0.5/0.6)) / 2 = 0.37, and of 0.92 again.
    sampled = inputs(
        [0.2, 0.2, 0.6, 0.2],
        advantages=[-1.0, -1.0, -1.0, 1.0],
        behaviour=[0.5] * 4,
        rollouts=[0, 1, 1, 2],
        replayed=True,
        num_rollouts=3,
    )
    assert is_stale_negative(sampled, 0.5).tolist() == [True, False, False, False]
    assert is_stale_negative(sampled, 0.3).tolist() == [True, True, True, False]


def test_a_masked_rollout_has_no_gradient_and_still_counts_in_the_denominator() -> None:
    def gradient(**options: float) -> list[float]:
        sampled = inputs(
            [0.2, 0.4], advantages=[-1.0, -1.0], behaviour=[0.5, 0.5], rollouts=[0, 1], num_rollouts=2
        )
        outputs = objective(**options).loss(sampled)
        outputs.loss.backward()
        assert ("off_policy_mask_fraction" in outputs.sums) == bool(options)
        assert sampled.logprobs.grad is not None
        return [float(value) for value in sampled.logprobs.grad]

    plain, masked = gradient(), gradient(off_policy_mask_threshold=0.5)
    assert masked == [0.0, plain[1]]
    assert plain[1] != 0


def test_the_kl_term_is_the_k3_estimate_times_beta() -> None:
    # log(q/p) = log(0.2 / 0.4): 0.5 + log 2 - 1.
    divergence = 0.5 + math.log(2) - 1
    given = inputs([0.4], reference=[0.2], advantages=[0])
    outputs = objective(beta=0.5, use_bias_correction_kl=False).loss(given)
    assert outputs.loss.item() == pytest.approx(0.5 * divergence)
    assert outputs.sums["kl_reference_nats"].item() == pytest.approx(divergence)


def test_the_kl_term_is_weighted_by_the_ratio_to_the_policy_that_sampled() -> None:
    divergence = 0.5 + math.log(2) - 1
    # u = 0.4 / 0.32 = 1.25, rho = 0.32 / 0.2 = 1.6: together 2.
    given = inputs([0.4], proximal=[0.32], behaviour=[0.2], reference=[0.2], advantages=[0], replayed=True)
    assert objective(beta=1.0).loss(given).loss.item() == pytest.approx(2 * divergence)


def test_figures_are_sums_over_tokens() -> None:
    given = inputs([0.5, 0.25], proximal=[0.5, 0.25], behaviour=[0.25, 0.25], advantages=[1, 1])
    sums = {name: value.item() for name, value in objective().loss(given).sums.items()}
    assert sums == pytest.approx(
        {
            "clip_fraction": 0,
            "cap_fraction": 0,
            "importance_weight_mean": 2 + 1,
            "kl_behaviour_nats": 2 - math.log(2) - 1,
        }
    )


def test_only_a_kl_term_asks_for_the_first_policy() -> None:
    assert not objective().needs_reference_model
    assert not objective().equal_rewards_carry_gradient
    assert objective(beta=0.01).needs_reference_model
    assert objective(beta=0.01).equal_rewards_carry_gradient


def test_more_minibatches_than_groups_are_a_problem_of_the_recipe() -> None:
    arithmetic = BatchArithmetic(
        max_steps=1,
        questions_per_step=4,
        num_generations=2,
        selection_interval=1,
        num_replayed=0,
        reference_size=0,
        max_prompt_length=8,
        max_completion_length=8,
    )
    assert list(GRPOConfig(num_minibatches=4).problems(arithmetic)) == []
    assert list(GRPOConfig(num_minibatches=5).problems(arithmetic)) == [
        (
            "num_minibatches",
            "5 minibatches need at least as many groups, but training.questions_per_step is 4",
        )
    ]


@given(st.floats(-5, 5))
def test_the_kl_estimate_is_never_negative(log_ratio: float) -> None:
    assert kl_nats(torch.tensor(log_ratio, dtype=torch.float64)).item() >= 0
