"""An objective: REINFORCE with the group's mean as baseline, averaged over tokens."""

from typing import Literal, final

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dteframe import LossInputs, LossOutputs, Objective, ObjectiveConfig, hookimpl


class MyPluginConfig(ObjectiveConfig):
    """Options of ``my_plugin``."""

    type: Literal["my_plugin"] = "my_plugin"
    importance_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the ratio of the present policy's probability to that of the one that sampled."""


@final
class MyPlugin(Objective):
    """REINFORCE with capped importance weights."""

    config: MyPluginConfig

    def advantages(self, rewards: Float[np.ndarray, "group"]) -> Float[np.ndarray, "group"]:
        """Subtract the mean; exactly 0 for equal rewards, whatever rounding makes of their mean."""
        if (rewards == rewards[0]).all():
            return np.zeros_like(rewards)
        advantages: Float[np.ndarray, "group"] = rewards - rewards.mean()
        return advantages

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Weight each token's log-prob with its advantage; divide by the whole minibatch's tokens."""
        log_ratio = inputs.logprobs.detach() - inputs.behaviour_logprobs
        weight = log_ratio.exp().clamp(max=self.config.importance_cap)
        loss = -(weight * inputs.advantages * inputs.logprobs).sum() / inputs.num_tokens
        is_capped = weight >= self.config.importance_cap
        return LossOutputs(loss, {"weight_mean": weight.sum(), "capped_fraction": is_capped.float().sum()})


@hookimpl
def dteframe_components() -> list[type[Objective]]:
    """Add ``objective.type=my_plugin``."""
    return [MyPlugin]
