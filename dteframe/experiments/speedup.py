"""Compare the arms of a sweep: what each pays to reach what the baseline reaches, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dteframe.errors import DTEFrameError
from dteframe.experiments.run_curves import COSTS, Curve, Runs
from dteframe.experiments.time_to_target import (
    Interval,
    Passage,
    first_passage,
    log_ratios,
    paired_interval,
    paper_smoothing,
    saved,
    trailing_mean,
    value_at,
)
from dteframe.recipe.sweep_config import ComparisonConfig

Verdict: TypeAlias = Literal["faster", "no gain shown", "slower", "too few seeds"]


@dataclass(frozen=True, slots=True)
class Saving:
    """Shares saved against the baseline: 0.65 is 65 % less, below 0 is more."""

    mean: float
    """From the mean of the seeds' log ratios."""
    low: float | None
    """Of the 95 % interval; None with a single seed."""
    high: float | None

    def percent_around_mean(self) -> tuple[list[float], list[float]]:
        """Give how far the interval reaches below and above the mean, in percent, as error bars want it."""
        low = self.mean if self.low is None else self.low
        high = self.mean if self.high is None else self.high
        return [100 * (self.mean - low)], [100 * (high - self.mean)]


@dataclass(frozen=True, slots=True)
class ArmComparison:
    """One arm against the baseline, on the runs of one pair that both have."""

    pair: str
    arm: str
    seeds: tuple[int, ...]
    num_censored: int
    """Runs that never reached the target; they count at all that they paid, which is too little."""
    savings: Mapping[str, Saving]
    """By unit of cost (``COSTS``)."""
    verdict: Verdict
    """Of the interval of the seconds; "faster" only where all runs reach the target."""
    paper_saving: Saving
    """Of seconds, target and passages taken from curves smoothed as the DOTS paper smooths them."""
    seconds_to_target: float
    """Median over seeds."""
    baseline_seconds_to_target: float
    """Median over seeds."""
    gain_at_equal_time: Interval
    """Success rate minus the baseline's, where the baseline's time is up."""
    informative_fraction: float
    """Of the fresh groups, mean of all steps and seeds."""
    seconds_by_purpose: Mapping[str, float]
    """Up to the target, by stage, mean over seeds; evaluation, loading and checkpoints beside the rest."""
    reference_token_fraction: float
    """Of the tokens generated up to the target."""


@dataclass(frozen=True, slots=True)
class Testbed:
    """Whether the baseline of a pair is one that says something."""

    pair: str
    seeds: tuple[int, ...]
    first_success_rate: float
    target: float
    """Mean over seeds."""
    last_success_rate: float
    """Of the baseline at its end, mean over seeds."""
    evaluation_standard_error: float
    """Of one evaluation."""
    uninformative_first: float
    """Share of groups without gradient in the baseline's first steps, a twentieth of them."""
    uninformative: float
    """Of all of its steps."""
    num_without_gain: int
    """Seeds whose target lies less than two standard errors above their first evaluation."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs and arms."""

    rules: ComparisonConfig
    testbeds: tuple[Testbed, ...]
    arms: tuple[ArmComparison, ...]
    left_out: tuple[str, ...]


def compare_runs(runs: Runs, rules: ComparisonConfig) -> Comparison:
    """Compare every arm with the baseline, on the seeds that both have.

    Raises:
        DTEFrameError: there is no run of the baseline, or of any other arm.
    """
    arms = sorted({curve.arm for curve in runs.curves} - {rules.baseline})
    pairs = sorted({curve.pair for curve in runs.curves})
    by_key = {(curve.pair, curve.arm, curve.seed): curve for curve in runs.curves}
    if len(by_key) < len(runs.curves):
        raise DTEFrameError(
            "compare: two runs are of the same arm and seed; name a sweep's folder, or other runs"
        )
    if not any(curve.arm == rules.baseline for curve in runs.curves):
        known = ", ".join(sorted({curve.arm for curve in runs.curves})) or "none"
        raise DTEFrameError(
            f"compare: no complete run of the baseline {rules.baseline!r}; arms with complete runs: {known}"
        )
    testbeds, compared, left_out = [], [], list(runs.left_out)
    for pair in pairs:
        baselines = {
            curve.seed: curve for curve in runs.curves if (curve.pair, curve.arm) == (pair, rules.baseline)
        }
        if baselines:
            testbeds.append(_testbed(pair, list(baselines.values()), rules))
        for arm in arms:
            of_arm = {curve.seed: curve for curve in runs.curves if (curve.pair, curve.arm) == (pair, arm)}
            seeds = sorted(of_arm.keys() & baselines.keys())
            left_out += [
                f"{curve.name}: there is no complete run of {rules.baseline!r} with its seed"
                for seed, curve in sorted(of_arm.items())
                if seed not in baselines
            ]
            if seeds:
                ours, theirs = [of_arm[seed] for seed in seeds], [baselines[seed] for seed in seeds]
                compared.append(_compare(pair, arm, ours, theirs, rules))
    if not compared:
        raise DTEFrameError(
            f"compare: nothing to hold against {rules.baseline!r}; no other arm has a complete run"
        )
    return Comparison(rules, tuple(testbeds), tuple(compared), tuple(left_out))


def _compare(
    pair: str, arm: str, ours: Sequence[Curve], theirs: Sequence[Curve], rules: ComparisonConfig
) -> ArmComparison:
    targets = [_target(curve, rules) for curve in theirs]
    savings, passages = {}, {}
    for unit in COSTS:
        of_arm = [_passage(curve, unit, target, rules) for curve, target in zip(ours, targets, strict=True)]
        of_baseline = [
            _passage(curve, unit, target, rules) for curve, target in zip(theirs, targets, strict=True)
        ]
        savings[unit] = _saving(of_arm, of_baseline)
        passages[unit] = (of_arm, of_baseline)
    of_arm, of_baseline = passages["seconds"]
    num_censored = sum(passage.is_censored for passage in of_arm)
    return ArmComparison(
        pair=pair,
        arm=arm,
        seeds=tuple(curve.seed for curve in ours),
        num_censored=num_censored,
        savings=savings,
        verdict=_verdict(savings["seconds"], num_censored),
        paper_saving=_paper_saving(ours, theirs, rules),
        seconds_to_target=float(np.median([passage.cost for passage in of_arm])),
        baseline_seconds_to_target=float(np.median([passage.cost for passage in of_baseline])),
        gain_at_equal_time=_gain_at_equal_time(ours, theirs, rules),
        informative_fraction=float(np.mean([curve.informative_fractions.mean() for curve in ours])),
        seconds_by_purpose=_seconds_by_purpose(ours, [passage.cost for passage in of_arm]),
        reference_token_fraction=_reference_share(ours, [passage.cost for passage in of_arm]),
    )


def _target(baseline: Curve, rules: ComparisonConfig) -> float:
    """Read the baseline's trailing mean after a share of its steps."""
    means = trailing_mean(baseline.success_rates, rules.trailing_evaluations)
    if np.isnan(means).all():
        raise DTEFrameError(
            f"{baseline.name}: has {len(means)} evaluations, fewer than the {rules.trailing_evaluations} of "
            "comparison.trailing_evaluations; evaluate more often (training.evaluate_every)"
        )
    steps = baseline.costs["steps"]
    return value_at(means, steps, rules.target_budget_fraction * baseline.max_steps)


def _passage(curve: Curve, unit: str, target: float, rules: ComparisonConfig) -> Passage:
    means = trailing_mean(curve.success_rates, rules.trailing_evaluations)
    costs = curve.costs[unit]
    cost = first_passage(means, costs, target)
    return Passage(float(costs[-1]), True) if cost is None else Passage(cost, False)


def _saving(ours: Sequence[Passage], theirs: Sequence[Passage]) -> Saving:
    interval = paired_interval(log_ratios(ours, theirs))
    if interval.low is None or interval.high is None:
        return Saving(saved(interval.mean), None, None)
    return Saving(saved(interval.mean), saved(interval.high), saved(interval.low))


def _verdict(saving: Saving, num_censored: int) -> Verdict:
    if saving.low is None or saving.high is None:
        return "too few seeds"
    if saving.high < 0:
        return "slower"
    # With runs that never arrive the whole interval is an upper bound.
    return "faster" if saving.low > 0 and not num_censored else "no gain shown"


def _paper_saving(ours: Sequence[Curve], theirs: Sequence[Curve], rules: ComparisonConfig) -> Saving:
    """Do as the paper does: smooth both curves, and reach the baseline's smoothed value."""
    arms: list[Passage] = []
    baselines: list[Passage] = []
    for our, their in zip(ours, theirs, strict=True):
        smoothed = paper_smoothing(their.success_rates)
        moment = rules.target_budget_fraction * their.max_steps
        target = value_at(smoothed, their.costs["steps"], moment)
        for curve, passages in ((our, arms), (their, baselines)):
            # The evaluation before training is left out: nothing is paid there, and a ratio needs costs.
            cost = first_passage(paper_smoothing(curve.success_rates)[1:], curve.costs["seconds"][1:], target)
            last = float(curve.costs["seconds"][-1])
            passages.append(Passage(last, True) if cost is None else Passage(cost, False))
    return _saving(arms, baselines)


def _gain_at_equal_time(ours: Sequence[Curve], theirs: Sequence[Curve], rules: ComparisonConfig) -> Interval:
    """Compare success rates where the baseline's time is up; an arm that stopped before keeps its last."""
    gains = []
    for our, their in zip(ours, theirs, strict=True):
        time = float(their.costs["seconds"][-1])
        means = [trailing_mean(curve.success_rates, rules.trailing_evaluations) for curve in (our, their)]
        gains.append(value_at(means[0], our.costs["seconds"], time) - float(means[1][-1]))
    return paired_interval(gains)


def _seconds_by_purpose(curves: Sequence[Curve], costs: Sequence[float]) -> dict[str, float]:
    """Say on what the time up to the target went."""
    stages = sorted({stage for curve in curves for stage in curve.seconds_by_stage})
    none = np.zeros(1)
    return {
        stage: float(
            np.mean(
                [
                    np.interp(
                        cost,
                        curve.costs["seconds"],
                        np.resize(curve.seconds_by_stage.get(stage, none), len(curve.costs["seconds"])),
                    )
                    for curve, cost in zip(curves, costs, strict=True)
                ]
            )
        )
        for stage in stages
    }


def _reference_share(curves: Sequence[Curve], costs: Sequence[float]) -> float:
    shares = []
    for curve, cost in zip(curves, costs, strict=True):
        tokens = np.interp(cost, curve.costs["seconds"], curve.costs["tokens"])
        references = np.interp(cost, curve.costs["seconds"], curve.reference_tokens)
        shares.append(references / tokens if tokens else 0.0)
    return float(np.mean(shares))


def _testbed(pair: str, baselines: Sequence[Curve], rules: ComparisonConfig) -> Testbed:
    targets = [_target(curve, rules) for curve in baselines]
    firsts = [1 - curve.informative_fractions.mean(curve.max_steps / 20) for curve in baselines]
    lasts = [trailing_mean(curve.success_rates, rules.trailing_evaluations)[-1] for curve in baselines]
    num_without_gain = sum(
        bool(target < curve.success_rates[0] + 2 * curve.standard_error)
        for curve, target in zip(baselines, targets, strict=True)
    )
    return Testbed(
        pair=pair,
        seeds=tuple(curve.seed for curve in baselines),
        first_success_rate=float(np.mean([curve.success_rates[0] for curve in baselines])),
        target=float(np.mean(targets)),
        last_success_rate=float(np.mean(lasts)),
        evaluation_standard_error=float(np.mean([curve.standard_error for curve in baselines])),
        uninformative_first=float(np.mean(firsts)),
        uninformative=float(np.mean([1 - curve.informative_fractions.mean() for curve in baselines])),
        num_without_gain=num_without_gain,
    )
