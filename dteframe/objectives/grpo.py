"""Group relative policy optimization, with importance weights for replayed rollouts.

The mathematics are pure functions over token tensors, below the plugin that calls them; they use tensor
methods alone, so that this file is read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dteframe.contracts import Component, LossInputs, LossOutputs, Objective, ObjectiveConfig
from dteframe.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

DEVIATION_FLOOR = 1e-4
"""Added to a group's standard deviation before the division; TRL's value (the paper's code has 1e-6)."""


class GRPOConfig(ObjectiveConfig):
    """Options of ``grpo``; the names and meanings are TRL's where TRL has them."""

    type: Literal["grpo"] = "grpo"
    scale_rewards: Literal["none", "group"] = "none"
    """Divide advantages by the group's standard deviation ("group", GRPO) or not ("none", Dr. GRPO and the
    DOTS paper)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """What token losses are divided by: rollouts times own length ("grpo"), rollouts times
    max_completion_length ("dr_grpo"), tokens ("dapo")."""
    epsilon: float = Field(default=0.2, ge=0, lt=1)
    """Half-width of the clip interval below its centre."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """Half-width above the centre; None is ``epsilon`` (DAPO's clip-higher is 0.28)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the first policy; 0 keeps no reference model."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the token's importance weight, so that its gradient is the reverse KL's."""
    replay_clip: Literal["one", "proximal"] = "proximal"
    """Centre of the clip interval on replayed rollouts: the policy that sampled them ("one", the DOTS paper),
    or the policy at the start of the step ("proximal", its code)."""
    importance_cap: float | None = Field(default=2.0, gt=0)
    """Upper bound of a token's weight, proximal over behaviour probability; None is no bound."""
    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    """Leave out rollouts of negative advantage whose tokens have become less likely since they were sampled,
    by more than this on average (nats a token; 0.5 is suggested). They still count in the denominators. None
    is off."""

    def needs_reference_model(self) -> bool:
        """Whether there is a KL term."""
        return self.beta > 0

    def needs_proximal_of_replayed(self) -> bool:
        """Whether replayed rollouts are clipped around the policy at the start of the step."""
        return self.replay_clip == "proximal"


@final
class GRPO(Objective):
    """Clipped policy gradient on group-relative rewards, corrected for replayed rollouts.

    Source: DeepSeekMath, arXiv:2402.03300, 4.1; the mean-only advantage and ``dr_grpo`` are of
        arXiv:2503.20783, ``dapo`` of arXiv:2503.14476; replayed rollouts of DOTS, arXiv:2506.05316, 4.3. On
        fresh rollouts this is TRL 1.16 with one difference: our denominators are those of the minibatch,
        whereas TRL's ``dapo`` takes the mean over the minibatches of a generation batch.
    """

    config: GRPOConfig

    def advantages(self, rewards: Float[np.ndarray, "group"]) -> Float[np.ndarray, "group"]:
        """Turn the rewards of one group into advantages, in the same order."""
        return group_relative(rewards, self.config.scale_rewards)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Compute a micro-batch's share of the minibatch's loss."""
        config = self.config
        weights = importance_weights(inputs.proximal_logprobs, inputs.behaviour_logprobs)
        is_capped = weights > (config.importance_cap or float("inf"))
        if config.importance_cap is not None:
            weights = weights.clamp(max=config.importance_cap)
        centre = inputs.proximal_logprobs
        if config.replay_clip == "one":
            centre = inputs.behaviour_logprobs.where(inputs.is_replayed, centre)
            weights = weights.masked_fill(inputs.is_replayed, 1.0)
            is_capped = is_capped & ~inputs.is_replayed
        ratios = (inputs.logprobs - centre).exp()
        below = config.epsilon
        above = config.epsilon if config.epsilon_high is None else config.epsilon_high
        losses = -weights * clipped_gain(ratios, inputs.advantages, below, above)
        masked: dict[str, torch.Tensor] = {}
        if config.off_policy_mask_threshold is not None:
            is_masked = is_stale_negative(inputs, config.off_policy_mask_threshold)
            losses = losses.masked_fill(is_masked, 0.0)
            masked["off_policy_mask_fraction"] = is_masked.sum()
        sums = masked | {
            "clip_fraction": is_clipped(ratios, inputs.advantages, below, above).sum(),
            "cap_fraction": is_capped.sum(),
            "importance_weight_mean": weights.sum(),
            "kl_behaviour_nats": kl_nats(inputs.logprobs - inputs.behaviour_logprobs).sum(),
        }
        if config.beta > 0:
            if inputs.reference_logprobs is None:
                raise ValueError(f"grpo: beta is {config.beta!r} but reference_logprobs is None; give them")
            divergences = kl_nats(inputs.reference_logprobs - inputs.logprobs)
            sums["kl_reference_nats"] = divergences.sum()
            if config.use_bias_correction_kl:
                divergences = divergences * ratios * weights
            losses = losses + config.beta * divergences
        return LossOutputs(
            loss=aggregate(losses, inputs, config.loss_type),
            sums={name: value.detach() for name, value in sums.items()},
        )


def group_relative(rewards: Float[np.ndarray, "group"], scale: str) -> Float[np.ndarray, "group"]:
    """Turn the rewards of one group into advantages, in the same order.

    Args:
        rewards: one per rollout of the same question; any unit, finite.
        scale: "none", or "group" to divide by the standard deviation.

    Returns:
        Advantages that sum to 0, in the unit of ``rewards``, or in standard deviations. All exactly 0 when
        the rewards are equal.

    Raises:
        ValueError: a reward is not finite; names the rollout.

    Source: DeepSeekMath, arXiv:2402.03300, 4.1.2; without the division Dr. GRPO, arXiv:2503.20783. We use the
        sample deviation (ddof=1), as TRL and the DOTS code do; the formula reads the population one.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"rewards: rollout {index} has {float(values[index])!r}; every reward must be finite"
        )
    if (values == values[0]).all():
        return np.zeros_like(values)
    unit = 1.0 if scale == "none" else float(values.std(ddof=1)) + DEVIATION_FLOOR
    return np.asarray((values - values.mean()) / unit)


def importance_weights(proximal_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor) -> torch.Tensor:
    """Divide the probabilities at the start of the step by those that sampled, token by token."""
    return (proximal_logprobs - behaviour_logprobs).exp()


def clipped_gain(ratios: torch.Tensor, advantages: torch.Tensor, below: float, above: float) -> torch.Tensor:
    """Take the smaller of the plain and the clipped gain: min(u A, clip(u, 1 - below, 1 + above) A).

    Source: PPO, arXiv:1707.06347, eq. 7.
    """
    return (ratios * advantages).minimum(ratios.clamp(1 - below, 1 + above) * advantages)


def is_clipped(ratios: torch.Tensor, advantages: torch.Tensor, below: float, above: float) -> torch.Tensor:
    """Say which tokens have no gradient because their ratio has gone far enough already."""
    return ((ratios < 1 - below) & (advantages < 0)) | ((ratios > 1 + above) & (advantages > 0))


def is_stale_negative(inputs: LossInputs, threshold: float) -> torch.Tensor:
    """Say which tokens are of rollouts to be avoided that the policy avoids already.

    Source: DeepSeek-V3.2, arXiv:2512.02556, eq. 9; the mean over a rollout's tokens of the behaviour less the
        present log-probs is compared with the threshold, as in TRL's ``off_policy_mask_threshold``.
    """
    gaps = (inputs.behaviour_logprobs - inputs.logprobs).detach()
    lengths = inputs.rollout_index.bincount()
    means = inputs.rollout_index.bincount(gaps) / lengths
    return (inputs.advantages < 0) & (means > threshold)[inputs.rollout_index]


def kl_nats(log_ratios: torch.Tensor) -> torch.Tensor:
    """Estimate KL(p || q) from tokens sampled from p, given log(q/p); never negative.

    Source: the k3 estimator of http://joschu.net/blog/kl-approx.html, as in GRPO and TRL.
    """
    return log_ratios.expm1() - log_ratios


def aggregate(losses: torch.Tensor, inputs: LossInputs, loss_type: str) -> torch.Tensor:
    """Add token losses up to the micro-batch's share of the minibatch's loss.

    Denominators count the whole minibatch, so the sum over micro-batches does not depend on the split.
    """
    if loss_type == "grpo":
        lengths = inputs.rollout_index.bincount()
        return (losses / lengths[inputs.rollout_index]).sum() / inputs.num_rollouts
    if loss_type == "dr_grpo":
        return losses.sum() / (inputs.num_rollouts * inputs.max_completion_length)
    return losses.sum() / inputs.num_tokens


@hookimpl
def dteframe_components() -> list[type[Component]]:
    """Give the objective of this module."""
    return [GRPO]
