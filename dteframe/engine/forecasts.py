"""How well the last predictions held: every one was made before its group was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dteframe.engine.agreement import (
    brier,
    brier_floor,
    constant_nll_nats,
    nll_nats,
    pearson,
    pearson_ceiling,
    ranks,
    slope_with_error,
)
from dteframe.records import Group, State, SuccessEstimate
from dteframe.reports import ForecastReport

WINDOW = 512
"""Groups of either kind that the figures are of: the newest."""
MIN_FORECASTS = 32
"""Groups below which there are no figures: they would be chance."""
COLUMNS = ("mean", "evidence", "successes", "trials")


@dataclass(slots=True)
class RecentForecasts:
    """The newest groups with what was predicted of them; on the checkpoint."""

    chosen: Float[np.ndarray, "columns groups"] = field(default_factory=lambda: np.zeros((len(COLUMNS), 0)))
    """Groups that a selector chose by the estimate; rows are ``COLUMNS``."""
    uniform: Float[np.ndarray, "columns groups"] = field(default_factory=lambda: np.zeros((len(COLUMNS), 0)))
    """References, coverage, and what was chosen while nothing was known: drawn uniformly from the pool."""

    def note(
        self,
        estimate: SuccessEstimate | None,
        groups: Sequence[Group],
        is_uniform: Bool[np.ndarray, "groups"],
    ) -> None:
        """Take in measured groups with an estimate that was made before; None is no idea."""
        if not groups:
            return
        names = tuple(group.question_id for group in groups)
        known = None if estimate is None else estimate.restricted(names)
        rows = np.array(
            [
                np.full(len(groups), 0.5) if known is None else known.mean,
                np.zeros(len(groups)) if known is None else known.evidence,
                [group.successes for group in groups],
                [group.trials for group in groups],
            ]
        )
        self.chosen = np.hstack([self.chosen, rows[:, ~is_uniform]])[:, -WINDOW:]
        self.uniform = np.hstack([self.uniform, rows[:, is_uniform]])[:, -WINDOW:]

    @property
    def num_uniform(self) -> int:
        """Count the uniformly drawn groups."""
        return len(self.uniform[0])

    @property
    def uniform_informative_fraction(self) -> float | None:
        """Share of informative groups among them; None where there are too few."""
        return _informative_fraction(self.uniform)

    def report(self) -> ForecastReport:
        """Score what was predicted with some evidence, and count informative groups."""
        both = np.hstack([self.chosen, self.uniform])
        mean, evidence, successes, trials = both[:, both[1] > 0]
        rates = successes / trials
        report = ForecastReport(
            num_groups=len(mean),
            num_chosen_groups=self.chosen.shape[1],
            num_uniform_groups=self.num_uniform,
            chosen_informative_fraction=_informative_fraction(self.chosen),
            uniform_informative_fraction=self.uniform_informative_fraction,
        )
        if len(mean) < MIN_FORECASTS:
            return report
        slope, error = slope_with_error(mean, rates)
        return replace(
            report,
            pearson=pearson(mean, rates),
            pearson_ceiling=pearson_ceiling(successes, trials),
            spearman=pearson(ranks(mean), ranks(rates)),
            brier=brier(mean, rates),
            brier_floor=brier_floor(successes, trials),
            nll_nats=nll_nats(mean, evidence, successes, trials),
            constant_nll_nats=constant_nll_nats(successes, trials),
            slope=slope,
            slope_standard_error=error,
        )

    def state_dict(self) -> State:
        """Give both kinds."""
        return {"chosen": self.chosen, "uniform": self.uniform}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RecentForecasts:
        """Rebuild what ``state_dict`` gave."""
        return cls(np.asarray(state["chosen"], np.float64), np.asarray(state["uniform"], np.float64))


def _informative_fraction(rows: Float[np.ndarray, "columns groups"]) -> float | None:
    if rows.shape[1] < MIN_FORECASTS:
        return None
    return float(np.mean((rows[2] > 0) & (rows[2] < rows[3])))
