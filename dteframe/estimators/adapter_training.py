"""Training of the attention estimator's easiness, adapters and head on recorded success rates.

A pure function of its arguments: ``fit_adapter`` reads no file and writes none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from dteframe.estimators.adapter import (
    Adapter,
    AdapterShape,
    build_adapter,
    predicted_logits,
    start_from_easiness,
)
from dteframe.estimators.easiness import FittedEasiness, fit_easiness, fit_level_and_slope, sigmoid

if TYPE_CHECKING:
    import torch

NUM_FOLDS = 5
"""Parts of the training questions; each is predicted by what was fitted to the others."""


@dataclass(frozen=True, slots=True)
class SolveCounts:
    """How often some policies solved some questions."""

    policies: tuple[str, ...]
    question_ids: tuple[str, ...]
    successes: Int[np.ndarray, "policies questions"]
    trials: Int[np.ndarray, "policies questions"]
    """0 where a policy was not asked."""

    @classmethod
    def from_table(
        cls,
        policies: Sequence[str],
        question_ids: Sequence[str],
        successes: Sequence[int],
        trials: Sequence[int],
    ) -> SolveCounts:
        """Sum up a long table, one row per policy and question; repeated rows add up.

        Raises:
            ValueError: counts are impossible; names the row.
        """
        names, policy_rows = np.unique(np.asarray(policies, str), return_inverse=True)
        ids, question_rows = np.unique(np.asarray(question_ids, str), return_inverse=True)
        solved, tried = np.asarray(successes, np.int64), np.asarray(trials, np.int64)
        is_wrong = (tried < 1) | (solved < 0) | (solved > tried)
        if is_wrong.any():
            row = int(np.argmax(is_wrong))
            raise ValueError(
                f"solve counts: row {row} ({policies[row]!r} on {question_ids[row]!r}) has {solved[row]} "
                f"successes in {tried[row]} trials; needs 0 <= successes <= trials and 1 trial at least"
            )
        block = np.zeros((2, len(names), len(ids)), np.int64)
        np.add.at(block[0], (policy_rows, question_rows), solved)
        np.add.at(block[1], (policy_rows, question_rows), tried)
        return cls(tuple(names.tolist()), tuple(ids.tolist()), block[0], block[1])

    def of_questions(self, is_kept: Bool[np.ndarray, "questions"]) -> SolveCounts:
        """Give the counts of some of the questions."""
        names = tuple(name for name, kept in zip(self.question_ids, is_kept, strict=True) if kept)
        return SolveCounts(self.policies, names, self.successes[:, is_kept], self.trials[:, is_kept])

    @property
    def rates(self) -> Float[np.ndarray, "policies questions"]:
        """Divide successes by trials; 0 where a policy was not asked."""
        return np.asarray(self.successes / np.maximum(self.trials, 1))


@dataclass(frozen=True, slots=True)
class AdapterTraining:
    """How an adapter is trained; 20 epochs, batches of 256 and Adam at 1e-3 are the released code's."""

    num_epochs: int = 20
    """At most."""
    patience: int = 4
    """Epochs without a better loss on the stopping questions after which training ends."""
    batch_size: int = 256
    """Questions of a batch, all of one policy."""
    learning_rate: float = 1e-3
    """Of Adam; rises over min(100, a tenth of the) steps, then falls to 0, both in a line."""
    weight_decay: float = 0.01
    """Of AdamW, per step and unit of learning rate; the head is not spared."""
    batches_per_epoch: int = 64
    """At most, drawn anew for each epoch, so that many policies or questions cost no more."""
    reference_size: int = 128
    """Reference questions drawn for each batch; fewer where a policy has fewer questions."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """A trained adapter and what its training showed."""

    adapter: Adapter
    easiness: FittedEasiness
    losses: tuple[float, ...]
    """Mean training loss of each epoch, in nats."""
    stopping_losses: tuple[float, ...]
    """Loss on the stopping questions before the first epoch, where attention is flat, and after each."""
    best_epoch: int
    """Whose adapter was kept; 0 is easiness alone."""


def fit_adapter(  # noqa: PLR0913  # data, how it is split, and how it is trained
    embeddings: Float[np.ndarray, "questions width"],
    widths: Sequence[int],
    counts: SolveCounts,
    groups: Int[np.ndarray, "questions"],
    is_stopping: np.ndarray,
    shape: AdapterShape,
    training: AdapterTraining,
    progress: Callable[[str, int, int], None],
    device: str = "cpu",
) -> FittedAdapter:
    """Fit easiness by ridge regression, then train adapters and head to improve on it.

    Each batch is of one policy and has its own reference questions; a question that is among them does not
    see itself. The easiness that training sees of a question is that of fits without its fold, so that what
    is left to explain is what is left at unseen questions. Training begins where attention is flat, that is
    at the ridge regression, and the epoch that predicts the stopping questions best is kept.

    Args:
        embeddings: one row per question, in the order of ``counts.question_ids``.
        widths: columns of each embedder.
        counts: of the policies.
        groups: number of each question's group of near duplicates, which stay in one fold.
        is_stopping: which questions decide about the best epoch alone (bool).
        shape: of the adapter to build; its width is the embeddings'.
        training: the settings.
        progress: told after every epoch.
        device: where the training runs; the result is on the CPU.

    Raises:
        ValueError: sizes that do not fit, or too few questions.

    Source: DOTS, arXiv:2506.05316, App. C.1, and the released ``train.py``. Easiness, the flat start, the
        masking of a row's own question and the stopping are ours.
    """
    import torch

    check_sizes(embeddings, widths, counts, shape, is_stopping)
    fitted, left_out = cross_fitted_easiness(embeddings, widths, counts, groups, is_stopping, training.seed)
    vectors = torch.from_numpy(fitted.easiness.scaled(embeddings)).to(device)
    batches = _Batches(vectors, counts, left_out, training, device)
    train, stopping = np.flatnonzero(~is_stopping), np.flatnonzero(is_stopping)
    rng = np.random.default_rng([training.seed, 1])
    fixed = [batches.draw(policy, stopping, stopping, rng) for policy in batches.asked(stopping, 4)]
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(training.seed)
        adapter = start_from_easiness(build_adapter(shape), fitted.easiness)
        adapter.modules.to(device)
        optimizer = torch.optim.AdamW(
            adapter.modules.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        plan = batches.epoch(train, np.random.default_rng(training.seed))
        num_steps = training.num_epochs * len(plan)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps)
        )
        losses: list[float] = []
        stopping_losses = [_loss_of(adapter, fixed)]
        best, kept = 0, copy.deepcopy(adapter.modules.state_dict())
        for epoch in range(1, training.num_epochs + 1):
            adapter.modules.train()
            total = 0.0
            plan = batches.epoch(train, rng)
            for policy, items in plan:
                batch = batches.draw(policy, items, train, rng)
                loss = batch.loss(adapter)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) / len(plan)
            losses.append(total)
            stopping_losses.append(_loss_of(adapter, fixed))
            progress("training the adapter", epoch, training.num_epochs)
            if stopping_losses[-1] < stopping_losses[best]:
                best, kept = epoch, copy.deepcopy(adapter.modules.state_dict())
            elif epoch - best >= training.patience:
                break
    adapter.modules.load_state_dict(kept)
    adapter.modules.cpu().eval()
    return FittedAdapter(adapter, fitted, tuple(losses), tuple(stopping_losses), best)


def check_sizes(
    embeddings: Float[np.ndarray, "questions width"],
    widths: Sequence[int],
    counts: SolveCounts,
    shape: AdapterShape,
    is_stopping: np.ndarray,
) -> None:
    """Refuse sizes that do not fit.

    Raises:
        ValueError: says which.
    """
    num_questions = len(counts.question_ids)
    if embeddings.shape != (num_questions, shape.width) or sum(widths) != shape.width:
        raise ValueError(
            f"adapter training: embeddings have shape {embeddings.shape} in parts of {tuple(widths)}, the "
            f"counts have {num_questions} questions and the adapter takes width {shape.width}; they must fit"
        )
    if min(int(is_stopping.sum()), int((~is_stopping).sum())) < 2 * NUM_FOLDS:
        raise ValueError(
            f"adapter training: {int((~is_stopping).sum())} questions to train on and "
            f"{int(is_stopping.sum())} to stop by; needs {2 * NUM_FOLDS} of each at least"
        )


def cross_fitted_easiness(
    embeddings: Float[np.ndarray, "questions width"],
    widths: Sequence[int],
    counts: SolveCounts,
    groups: Int[np.ndarray, "questions"],
    is_stopping: np.ndarray,
    seed: int,
) -> tuple[FittedEasiness, Float[np.ndarray, "questions"]]:
    """Fit easiness to all but the stopping questions; give with it the easiness of all, each left out."""
    names, places = np.unique(groups, return_inverse=True)
    folds = np.random.default_rng([seed, 2]).permutation(np.arange(len(names)) % NUM_FOLDS)[places]
    train = ~is_stopping
    fitted = fit_easiness(
        embeddings[train], widths, counts.successes[:, train], counts.trials[:, train], folds[train]
    )
    left_out = np.empty(len(groups))
    left_out[train] = fitted.left_out
    left_out[is_stopping] = fitted.easiness.of(embeddings[is_stopping])
    return fitted, left_out


@dataclass(frozen=True, slots=True)
class _Batch:
    """Questions of one policy, with what they attend to."""

    queries: torch.Tensor
    references: torch.Tensor
    reference_rates: torch.Tensor
    is_masked: torch.Tensor
    prior: tuple[torch.Tensor, torch.Tensor]
    rates: torch.Tensor
    trials: torch.Tensor

    def loss(self, adapter: Adapter) -> torch.Tensor:
        logits = predicted_logits(
            adapter, self.queries, self.references, self.reference_rates, self.is_masked, self.prior
        )
        return weighted_cross_entropy(logits, self.rates, self.trials)


class _Batches:
    """Draws batches from the counts."""

    def __init__(
        self,
        vectors: torch.Tensor,
        counts: SolveCounts,
        easiness: Float[np.ndarray, "questions"],
        training: AdapterTraining,
        device: str,
    ) -> None:
        self._vectors, self._easiness, self._training, self._device = vectors, easiness, training, device
        self._rates, self._trials = counts.rates, counts.trials

    def asked(self, items: Int[np.ndarray, "items"], at_least: int) -> list[int]:
        """Name the policies that were asked so many of the questions."""
        return np.flatnonzero((self._trials[:, items] > 0).sum(axis=1) >= at_least).tolist()

    def epoch(
        self, items: Int[np.ndarray, "items"], rng: np.random.Generator
    ) -> list[tuple[int, np.ndarray]]:
        """Cut every policy's questions into batches, in an order by chance."""
        batches = []
        for policy in self.asked(items, 4):
            own = rng.permutation(items[self._trials[policy, items] > 0])
            batches += [
                (policy, part) for part in np.array_split(own, -(-len(own) // self._training.batch_size))
            ]
        drawn = rng.permutation(len(batches))[: self._training.batches_per_epoch]
        return [batches[place] for place in drawn]

    def draw(
        self,
        policy: int,
        items: Int[np.ndarray, "items"],
        pool: Int[np.ndarray, "pool"],
        rng: np.random.Generator,
    ) -> _Batch:
        """Draw references from the pool for questions of one policy, those alone that it was asked."""
        import torch

        items, pool = (rows[self._trials[policy, rows] > 0] for rows in (items, pool))
        size = min(self._training.reference_size, max(len(pool) // 2, 2))
        references = rng.choice(pool, size, replace=False)
        rates, trials = self._rates[policy], self._trials[policy]
        level, slope = fit_level_and_slope(self._easiness[references], rates[references], trials[references])
        prior = [sigmoid(level + slope * self._easiness[rows]) for rows in (items, references)]

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(self._device)

        return _Batch(
            self._vectors[items],
            self._vectors[references],
            tensor(rates[references]),
            torch.from_numpy(items[:, None] == references).to(self._device),
            (tensor(prior[0]), tensor(prior[1])),
            tensor(rates[items]),
            tensor(trials[items]),
        )


def _loss_of(adapter: Adapter, batches: Sequence[_Batch]) -> float:
    """Average the loss of some batches, without dropout; every policy counts the same."""
    import torch

    adapter.modules.eval()
    with torch.inference_mode():
        return float(np.mean([float(batch.loss(adapter)) for batch in batches]))


def weighted_cross_entropy(logits: torch.Tensor, rates: torch.Tensor, trials: torch.Tensor) -> torch.Tensor:
    """Average -[y log p + (1 - y) log(1 - p)] in nats, each row weighing as much as it has trials.

    Source: DOTS, arXiv:2506.05316, 4.1, without the weights.
    """
    import torch

    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, rates, reduction="none")
    return (losses * trials).sum() / trials.sum()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Rise in a line over min(100, a tenth of the) steps, then fall in a line to 0 after the last."""
    num_warm_up = min(100, num_steps // 10)
    if step < num_warm_up:
        return (step + 1) / (num_warm_up + 1)
    return max(0.0, (num_steps - step) / (num_steps - num_warm_up))
