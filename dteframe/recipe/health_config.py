"""From where on a run's own figures are a warning sign."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HealthConfig(BaseModel):
    """Limits of health warnings; null turns one off."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    entropy_fraction: float | None = Field(default=0.1, gt=0, lt=1)
    """Of the first 10 steps' mean entropy: warn where that of 5 steps is below."""
    success_fraction: float | None = Field(default=0.5, gt=0, lt=1)
    """Of the best success rate of 10 steps, or of an evaluation: warn where the present one is below, by more
    than chance."""
    effective_sample_fraction: float | None = Field(default=0.3, gt=0, lt=1)
    """Warn where importance weights leave a smaller share of the fresh or of the replayed tokens, over 5
    steps."""
    length_ratio: float | None = Field(default=2.0, gt=1)
    """Warn where completions of 5 steps are longer, by this factor, than those of the 20 before."""
    truncated_fraction: float | None = Field(default=0.9, gt=0, le=1)
    """Warn where at least this share of the completions of 5 steps is cut at their greatest length."""
    gradient_norm_ratio: float | None = Field(default=10.0, gt=1)
    """Warn where a gradient norm is more than this many times the median of the 20 steps before."""
    steps_of_equal_rewards: int | None = Field(default=3, ge=1, le=25)
    """Warn after so many steps in a row in which the rewards of every group are all equal."""
