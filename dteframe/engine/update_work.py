"""What an update remembers of its rows, and what it counts: the counts of several processes add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dteframe.engine.micro_batches import MicroBatch
from dteframe.engine.pack import Row
from dteframe.flops import PassSizes, forward_flops, update_flops
from dteframe.records import ModelSizes
from dteframe.reports import UpdateReport


@dataclass(slots=True)
class WeightSums:
    """Importance weights of tokens, as sums."""

    num_tokens: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0
    total_of_logs: float = 0.0
    largest: float = 0.0

    def note(self, log_weights: torch.Tensor) -> None:
        """Add weights, given as logarithms, [tokens]."""
        log_weights = log_weights.double()
        weights = log_weights.exp()
        self.total_of_logs += float(log_weights.sum())
        self.num_tokens += len(weights)
        self.total += float(weights.sum())
        self.total_of_squares += float((weights**2).sum())
        self.largest = max(self.largest, float(weights.max()))

    def add(self, other: WeightSums) -> None:
        """Add another process's sums."""
        self.num_tokens += other.num_tokens
        self.total += other.total
        self.total_of_squares += other.total_of_squares
        self.total_of_logs += other.total_of_logs
        self.largest = max(self.largest, other.largest)

    def figures(self, whose: str) -> dict[str, float]:
        """Give mean, maximum, effective sample fraction and KL; nothing where there were no such tokens.

        The KL is the k3 estimate, the mean of w - 1 - log w, of how far the policy is from the sampler.
        """
        if self.num_tokens == 0:
            return {}
        return {
            f"{whose}_importance_weight_mean": self.total / self.num_tokens,
            f"{whose}_importance_weight_max": self.largest,
            f"{whose}_effective_sample_fraction": self.total**2 / self.num_tokens / self.total_of_squares,
            f"{whose}_kl_behaviour_nats": (self.total - self.total_of_logs) / self.num_tokens - 1.0,
        }


@dataclass(slots=True)
class UpdateFigures:
    """What a process counts during an update."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The objective's figures, summed over tokens."""
    num_tokens: int = 0
    entropy_nats: float = 0.0
    num_forward_rows: int = 0
    num_proximal_rows: int = 0
    sampler_difference: float | None = None
    trained: PassSizes = field(default_factory=PassSizes)
    """Rows run with gradient."""
    scored: PassSizes = field(default_factory=PassSizes)
    """Rows run without."""
    fresh_weights: WeightSums = field(default_factory=WeightSums)
    """Probability at the start of the step over that of the sampler, of every fresh token, uncapped."""
    replayed_weights: WeightSums = field(default_factory=WeightSums)
    """The same of every replayed token."""

    def note_sampler_difference(self, difference: float | None) -> None:
        """Keep the largest."""
        if difference is not None:
            self.sampler_difference = max(difference, self.sampler_difference or 0.0)

    def add(self, other: UpdateFigures) -> None:
        """Add another process's figures."""
        for name, value in other.sums.items():
            self.sums[name] += value
        self.num_tokens += other.num_tokens
        self.entropy_nats += other.entropy_nats
        self.num_forward_rows += other.num_forward_rows
        self.num_proximal_rows += other.num_proximal_rows
        self.note_sampler_difference(other.sampler_difference)
        self.trained.add(other.trained)
        self.scored.add(other.scored)
        self.fresh_weights.add(other.fresh_weights)
        self.replayed_weights.add(other.replayed_weights)


@dataclass(slots=True)
class UpdateWork:
    """What a process remembers of the rows that it runs, and counts."""

    proximal: dict[int, torch.Tensor] = field(default_factory=dict)
    reference: dict[int, torch.Tensor] = field(default_factory=dict)
    minibatches_with_reference: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    broken_minibatches: set[int] = field(default_factory=set)
    """Those with a number that is not finite: left out of the rest of the update."""
    losses: list[float] = field(default_factory=list)
    """Of the optimizer steps: the same in all processes."""
    gradient_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    figures: UpdateFigures = field(default_factory=UpdateFigures)

    def first_pass(
        self, rows: Sequence[Row], logprobs: torch.Tensor, behaviour: torch.Tensor, compares_sampler: bool
    ) -> None:
        """Note what only the first pass over a row tells; before any step ``logprobs`` are proximal."""
        present = by_row(rows, logprobs)
        sampled = by_row(rows, behaviour)
        for row in rows:
            if row.index in self.seen:
                continue
            self.seen.add(row.index)
            if not self.losses:
                self.proximal.setdefault(row.index, present[row.index])
            if row.index in self.proximal:
                weights = self.figures.replayed_weights if row.is_replayed else self.figures.fresh_weights
                weights.note(self.proximal[row.index] - sampled[row.index])
            if not row.is_replayed and compares_sampler and not self.losses:
                difference = (present[row.index] - sampled[row.index]).abs().max()
                self.figures.note_sampler_difference(float(difference))

    def proximal_of(self, row: Row, device: str) -> torch.Tensor:
        """Give a row's proximal log-probs; not a number where the objective does not read them."""
        if row.index in self.proximal:
            return self.proximal[row.index]
        return torch.full((len(row.completion.token_ids),), torch.nan, device=device)

    def report(
        self,
        every: Sequence[UpdateFigures],
        scheduled_learning_rate: float,
        num_equal_reward_groups: int,
        sizes: ModelSizes | None,
    ) -> UpdateReport:
        """Sum the update up, over the figures of all processes; without ``sizes`` no operations are told."""
        total = UpdateFigures()
        for figures in every:
            total.add(figures)
        means = {name: value / total.num_tokens for name, value in total.sums.items()}
        return UpdateReport(
            loss=_mean(self.losses),
            gradient_norm=_mean(self.gradient_norms),
            learning_rate=_mean(self.learning_rates or [scheduled_learning_rate]),
            num_optimizer_steps=len(self.losses),
            num_skipped_minibatches=len(self.broken_minibatches),
            num_equal_reward_groups=num_equal_reward_groups,
            num_forward_rows=total.num_forward_rows,
            num_proximal_rows=total.num_proximal_rows,
            entropy_nats=total.entropy_nats / total.num_tokens if total.num_tokens else None,
            sampler_logprob_difference_max_nats=total.sampler_difference,
            num_forward_tokens=total.trained.num_tokens,
            model_flops=update_flops(sizes, total.trained, total.scored) if sizes else None,
            trained_forward_flops=forward_flops(sizes, total.trained) if sizes else None,
            figures=means | total.fresh_weights.figures("fresh") | total.replayed_weights.figures("replayed"),
        )


def note_pass(passes: PassSizes, micro_batch: MicroBatch) -> None:
    """Count what a micro-batch ran."""
    passes.note(lengths_of(micro_batch.rows), micro_batch.shared_beginnings)


def lengths_of(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Count the tokens of each row and of its completion."""
    return [(row.num_tokens, len(row.completion.token_ids)) for row in rows]


def by_row(rows: Sequence[Row], values: torch.Tensor) -> dict[int, torch.Tensor]:
    """Cut values laid end to end into those of each row."""
    lengths = [len(row.completion.token_ids) for row in rows]
    return {row.index: part for row, part in zip(rows, values.split_with_sizes(lengths), strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
