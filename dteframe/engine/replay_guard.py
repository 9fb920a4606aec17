"""How much of a step may be replayed: it grows over the first steps, and shrinks while replay goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dteframe.contracts import ReplayConfig
from dteframe.records import State

CALM_STEPS = 4
"""Steps in a row within bounds, or without replay, after which a shrunk share is doubled."""
LEAST_SHARE = 1 / 64
"""Far enough below a group that replay pauses, near enough that it comes back."""


@dataclass(slots=True)
class ReplayGuard:
    """What the figures of replayed tokens have come to; on the checkpoint."""

    share: float = 1.0
    """Of what the recipe lets a step replay: 1, 1/2, 1/4, ..."""
    num_calm_steps: int = 0

    def allowed(self, num_replayed: int, step: int, config: ReplayConfig) -> int:
        """Count the groups that a step may replay where the recipe says ``num_replayed``."""
        ramp = min(step / config.ramp_up_steps, 1.0) if config.ramp_up_steps else 1.0
        # Without the margin 3 x 1/3 could come out below 1 group.
        return math.floor(num_replayed * ramp * self.share + 1e-9)

    def note(self, step: int, figures: Mapping[str, float], config: ReplayConfig) -> str | None:
        """Look at the figures of a step's update; say what is wrong where replay begins to shrink."""
        what = _what_is_wrong(figures, config)
        if what is None:
            self.num_calm_steps += 1
            if self.num_calm_steps >= CALM_STEPS and self.share < 1:
                self.share, self.num_calm_steps = min(2 * self.share, 1.0), 0
            return None
        was_whole = self.share == 1
        self.share, self.num_calm_steps = max(self.share / 2, LEAST_SHARE), 0
        if not was_whole:
            return None
        return (
            f"replay: at step {step} {what}; the replayed share is halved, again with every such step, and "
            f"doubled after {CALM_STEPS} steps within bounds (metric replay/guard_share); lower "
            "replay.max_staleness, replay.capacity or training.learning_rate"
        )

    def state_dict(self) -> State:
        """Give everything."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ReplayGuard:
        """Take everything back."""
        return cls(**state)


def _what_is_wrong(figures: Mapping[str, float], config: ReplayConfig) -> str | None:
    """Compare the figures of replayed tokens, where there are any, with the recipe's bounds."""
    worth = figures.get("replayed_effective_sample_fraction")
    distance = figures.get("replayed_kl_behaviour_nats")
    # A figure that is not finite lies within no bounds.
    if worth is not None and not worth >= config.min_effective_sample_fraction:
        return (
            f"replayed tokens are worth {worth:.2g} of their number, less than "
            f"replay.min_effective_sample_fraction {config.min_effective_sample_fraction:g}"
        )
    if distance is not None and config.max_kl_nats is not None and not distance <= config.max_kl_nats:
        return (
            f"the policy is {distance:.2g} nats a token from those that sampled replayed groups, more than "
            f"replay.max_kl_nats {config.max_kl_nats:g}"
        )
    return None
