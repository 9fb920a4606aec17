"""What a sweep file says, and how it is told from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dteframe.recipe.schema import TOP_LEVEL


class ComparisonConfig(BaseModel):
    """How the arms of a sweep are held against each other: fixed before the runs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    axis: str
    """The axis whose variants are the arms; runs that differ in another axis or in their seed are not
    compared."""
    baseline: str
    """The variant that the others are measured against, and that sets the target."""
    target_budget_fraction: float = Field(default=0.8, gt=0, le=1)
    """The target is the baseline's success rate after this share of its steps, seed by seed."""
    trailing_evaluations: int = Field(default=3, ge=1)
    """Success rates are means over so many evaluations."""


class SweepConfig(BaseModel):
    """The keys of a sweep file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    recipe: str = Field(min_length=1)
    """Path of the base recipe, seen from the sweep file's folder."""
    seeds: list[Annotated[int, Field(ge=0, le=2**32 - 1)]] = Field(default=[0], min_length=1)
    """Every combination of variants is run once with each."""
    overrides: dict[str, Any] = {}
    """What all runs change in the base recipe: dotted keys and their values."""
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    """By name, what is varied: for each axis its variants by name, and for each variant its overrides."""
    comparison: ComparisonConfig | None = None
    """How ``dteframe compare`` compares the runs."""


def is_sweep(values: Mapping[str, Any]) -> bool:
    """Whether the top-level keys of a file are those of a sweep rather than of a recipe."""
    of_a_sweep = any(key in SweepConfig.model_fields for key in values)
    return of_a_sweep and not any(key in TOP_LEVEL for key in values)
