"""Training of the attention estimator's adapters and head on other models' success rates.

A pure function of its arguments: ``fit_adapter`` reads no file and writes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from dteframe.estimators.adapter import Adapter, AdapterShape, build_adapter, predicted_logits
from dteframe.estimators.attention_math import MIN_RATE, pearson

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SolveCounts:
    """How often some label models solved the questions: a complete block, every model on every question."""

    label_models: tuple[str, ...]
    question_ids: tuple[str, ...]
    successes: Int[np.ndarray, "models questions"]
    trials: Int[np.ndarray, "models questions"]
    """At least 1 each."""

    @classmethod
    def from_table(
        cls,
        label_models: Sequence[str],
        question_ids: Sequence[str],
        successes: Sequence[int],
        trials: Sequence[int],
    ) -> SolveCounts:
        """Build the block from a long table, one row per label model and question; repeated rows add up.

        Raises:
            ValueError: counts are impossible, or a model lacks a question that another has; names both.
        """
        models, model_rows = np.unique(np.asarray(label_models, str), return_inverse=True)
        ids, question_rows = np.unique(np.asarray(question_ids, str), return_inverse=True)
        solved, tried = np.asarray(successes, np.int64), np.asarray(trials, np.int64)
        is_wrong = (tried < 1) | (solved < 0) | (solved > tried)
        if is_wrong.any():
            row = int(np.argmax(is_wrong))
            raise ValueError(
                f"solve counts: row {row} ({label_models[row]!r} on {question_ids[row]!r}) has {solved[row]} "
                f"successes in {tried[row]} trials; needs 0 <= successes <= trials and 1 trial at least"
            )
        block = np.zeros((2, len(models), len(ids)), np.int64)
        np.add.at(block[0], (model_rows, question_rows), solved)
        np.add.at(block[1], (model_rows, question_rows), tried)
        if (block[1] == 0).any():
            model, question = (int(index[0]) for index in np.nonzero(block[1] == 0))
            raise ValueError(
                f"solve counts: label model {str(models[model])!r} lacks question {str(ids[question])!r} "
                f"({int((block[1] == 0).sum())} of {block[1].size} cells are empty); "
                "every label model must have every question"
            )
        return cls(tuple(models.tolist()), tuple(ids.tolist()), block[0], block[1])

    @property
    def rates(self) -> Float[np.ndarray, "models questions"]:
        """Divide successes by trials."""
        return np.asarray(self.successes / self.trials)


@dataclass(frozen=True, slots=True)
class AdapterTraining:
    """How an adapter is trained; the defaults are the released code's, the splits ours."""

    num_epochs: int = 20
    batch_size: int = 256
    """Rows of a batch: a label model's counts on a question."""
    learning_rate: float = 1e-3
    """Of Adam; rises over min(100, a tenth of the) steps, then falls to 0, both in a line."""
    reference_size: int = 256
    """Reference questions drawn for each batch, which all of its rows share."""
    held_out_fraction: float = 0.1
    """Share of the questions that are only evaluated on."""
    held_out_models: tuple[str, ...] = ()
    """Label models that are only evaluated on."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """How well held-out questions are predicted, for one label model."""

    label_model: str
    is_trained_on: bool
    """Whether the model's counts on other questions were trained on."""
    loss: float
    """Cross-entropy in nats, weighted by trials."""
    constant_loss: float
    """The same for the references' mean rate in place of the predictions: what has to be beaten."""
    pearson: float | None
    """Correlation of predicted and measured rates; None where one is constant."""


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """A trained adapter and what its training showed."""

    adapter: Adapter
    losses: tuple[float, ...]
    """Mean training loss of each epoch, in nats."""
    held_out: tuple[HeldOutResult, ...]
    """One per label model; empty if no questions were held out."""
    held_out_question_ids: tuple[str, ...]


def fit_adapter(
    embeddings: Float[np.ndarray, "questions width"],
    counts: SolveCounts,
    shape: AdapterShape,
    training: AdapterTraining,
    progress: Callable[[str, int, int], None],
    device: str = "cpu",
) -> FittedAdapter:
    """Train query adapter, reference adapter and head to predict success rates from other questions' rates.

    Each batch draws one list of reference questions among the training questions; a row sees its own label
    model's rates on them, so a batch mixes models while every row is consistent. A row whose question is in
    the list does not see it. Rows count by their trials.

    Args:
        embeddings: one row per question, in the order of ``counts.question_ids``.
        counts: of the label models; none of them should be the policy to be trained.
        shape: of the adapter to build; its width is the embeddings'.
        training: the settings.
        progress: told after every epoch.
        device: where the training runs; the result is on the CPU.

    Raises:
        ValueError: sizes that do not fit, unknown held-out models.

    Source: DOTS, arXiv:2506.05316, App. C.1, and the released ``train.py``. Masking a row's own question, the
    weights
        and the split by question and by model are ours.
    """
    import torch

    split = split_questions(embeddings, counts, shape, training)
    is_trained_on = np.array([name not in training.held_out_models for name in counts.label_models])
    rows = np.array([(model, item) for model in np.flatnonzero(is_trained_on) for item in split.train])
    vectors = torch.from_numpy(np.array(embeddings, np.float32)).to(device)
    rates = torch.from_numpy(counts.rates.astype(np.float32)).to(device)
    trials = torch.from_numpy(counts.trials.astype(np.float32)).to(device)
    rng = np.random.default_rng(training.seed)
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(training.seed)
        adapter = build_adapter(shape)
        adapter.modules.to(device).train()
        optimizer = torch.optim.Adam(adapter.modules.parameters(), lr=training.learning_rate)
        num_steps = training.num_epochs * -(-len(rows) // training.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps)
        )
        losses = []
        for epoch in range(training.num_epochs):
            shuffled = rng.permutation(rows)
            total = 0.0
            for begin in range(0, len(rows), training.batch_size):
                batch = torch.from_numpy(shuffled[begin : begin + training.batch_size]).to(device)
                models, items = batch.unbind(1)
                drawn = rng.choice(split.train, training.reference_size, replace=False)
                references = torch.from_numpy(drawn).to(device)
                logits = predicted_logits(
                    adapter,
                    vectors[items],
                    vectors[references],
                    rates[models][:, references],
                    items.unsqueeze(1) == references,
                )
                loss = weighted_cross_entropy(logits, rates[models, items], trials[models, items])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / len(rows))
            progress("training the adapter", epoch + 1, training.num_epochs)
    adapter.modules.cpu().eval()
    references_of_evaluation = rng.choice(split.train, training.reference_size, replace=False)
    results = tuple(
        HeldOutResult(
            name,
            bool(is_trained_on[model]),
            *evaluate_held_out(adapter, embeddings, counts, model, references_of_evaluation, split.held_out),
        )
        for model, name in enumerate(counts.label_models)
        if len(split.held_out)
    )
    held_out_ids = tuple(counts.question_ids[item] for item in split.held_out)
    return FittedAdapter(adapter, tuple(losses), results, held_out_ids)


@dataclass(frozen=True, slots=True)
class QuestionSplit:
    """Positions of the questions that are trained and evaluated on."""

    train: Int[np.ndarray, "train"]
    held_out: Int[np.ndarray, "held_out"]


def split_questions(
    embeddings: Float[np.ndarray, "questions width"],
    counts: SolveCounts,
    shape: AdapterShape,
    training: AdapterTraining,
) -> QuestionSplit:
    """Check that the sizes fit, and hold some questions out by chance."""
    num_questions = len(counts.question_ids)
    if embeddings.shape != (num_questions, shape.width):
        raise ValueError(
            f"adapter training: embeddings have shape {embeddings.shape}, the counts have "
            f"{num_questions} questions and the adapter takes width {shape.width}; the three must fit"
        )
    unknown = sorted(set(training.held_out_models) - set(counts.label_models))
    if unknown:
        raise ValueError(
            f"adapter training: held_out_models has {unknown[0]!r}, the label models are "
            f"{list(counts.label_models)}"
        )
    if set(training.held_out_models) == set(counts.label_models):
        raise ValueError("adapter training: every label model is held out; leave at least one to train on")
    order = np.random.default_rng([training.seed, 0]).permutation(num_questions)
    num_held_out = round(training.held_out_fraction * num_questions)
    train, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    if not 2 <= training.reference_size <= len(train):
        raise ValueError(
            f"adapter training: reference_size {training.reference_size} must lie between 2 and the "
            f"{len(train)} questions that are trained on"
        )
    return QuestionSplit(train, held_out)


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


def evaluate_held_out(
    adapter: Adapter,
    embeddings: Float[np.ndarray, "questions width"],
    counts: SolveCounts,
    model: int,
    references: Int[np.ndarray, "references"],
    held_out: Int[np.ndarray, "held_out"],
) -> tuple[float, float, float | None]:
    """Give loss, constant loss and correlation on the held-out questions of one label model."""
    import torch

    reference_rates = torch.from_numpy(counts.rates[model, references].astype(np.float32))
    measured = torch.from_numpy(counts.rates[model, held_out].astype(np.float32))
    trials = torch.from_numpy(counts.trials[model, held_out].astype(np.float32))
    with torch.inference_mode():
        logits = predicted_logits(
            adapter,
            torch.from_numpy(np.array(embeddings[held_out], np.float32)),
            torch.from_numpy(np.array(embeddings[references], np.float32)),
            reference_rates.expand(len(held_out), -1),
            torch.zeros(len(held_out), len(references), dtype=torch.bool),
        )
        constant = torch.logit(reference_rates.mean().clamp(MIN_RATE, 1 - MIN_RATE)).expand(len(held_out))
        losses = [float(weighted_cross_entropy(item, measured, trials)) for item in (logits, constant)]
    return losses[0], losses[1], pearson(torch.sigmoid(logits).double().numpy(), measured.double().numpy())
