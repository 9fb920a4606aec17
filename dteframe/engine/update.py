"""The learner: turns credited groups into optimizer steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from dteframe.contracts import LossInputs, Objective, Policy
from dteframe.engine.logprobs import CompletionScorer, scorer_inputs
from dteframe.engine.lora import without_adapter
from dteframe.engine.optimizer import Optimizer, OptimizerSettings, check_names
from dteframe.engine.pack import Minibatch, Row, pack, split
from dteframe.errors import DTEFrameError
from dteframe.records import CreditedGroup, Sampling
from dteframe.reports import UpdateReport


class UpdateError(DTEFrameError):
    """A model that cannot be trained, or a loss or gradient that is not finite: its step is not taken."""


class Learner:
    """Makes the policy better: forward, loss, backward, clip, step.

    The module is in training mode during an update and only then, all of its passes included.
    """

    def __init__(
        self, policy: Policy, objective: Objective, settings: OptimizerSettings, sampling: Sampling
    ) -> None:
        """Keep the policy, and a frozen copy of it if the objective compares with the first policy."""
        self._policy = policy
        self._objective = objective
        self._settings = settings
        self._sampling = sampling
        self._num_updates = 0
        if not any(parameter.requires_grad for parameter in policy.module.parameters()):
            raise UpdateError("model: no parameter is trainable; unfreeze some")
        self._optimizer = Optimizer(policy.module, settings)
        self._pad_token_id = _pad_token_id(policy)
        self._scorer = CompletionScorer(policy.module, sampling.temperature)
        self._reference: Policy | None = None
        self._reference_scorer: CompletionScorer | None = None
        if objective.needs_reference_model and policy.lora_base_sha256 is not None:
            self._reference_scorer = self._scorer  # The first policy is the module without its adapter.
        elif objective.needs_reference_model:
            frozen = deepcopy(policy.module).requires_grad_(False).train(False)
            self._reference = Policy(frozen, policy.tokenizer, policy.device)
            self._reference_scorer = CompletionScorer(frozen, sampling.temperature)

    def update(self, credited: Sequence[CreditedGroup], rng: np.random.Generator) -> UpdateReport:
        """Learn from the groups of one step.

        Args:
            credited: fresh and replayed groups; those of equal rewards count in the denominators only, unless
                they carry a gradient.
            rng: the only source of chance: who meets whom in a minibatch.

        Raises:
            UpdateError: a loss or gradient is not finite.
        """
        objective = self._objective
        minibatches = pack(
            credited,
            objective.config.num_minibatches,
            self._settings.micro_batch_tokens,
            objective.equal_rewards_carry_gradient,
            rng,
        )
        learning_rate = self._optimizer.start_step(self._num_updates)
        work = _StepWork()
        self._policy.module.train()
        try:
            self._score_start_of_step(minibatches, work)
            for _ in range(objective.config.num_iterations):
                for number, minibatch in enumerate(minibatches):
                    if minibatch.micro_batches:
                        self._optimizer_step(minibatch, number, work)
        finally:
            self._policy.module.train(False)
        self._num_updates += 1
        num_left_out = 0
        if not objective.equal_rewards_carry_gradient:
            num_left_out = sum(item.group.has_equal_rewards for item in credited)
        return work.report(learning_rate, num_left_out)

    def logprobs(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Give the completions' log-probs under the present policy: float32 nats, one tensor a row."""
        with torch.no_grad():
            found: dict[int, torch.Tensor] = {}
            for micro_batch in split(rows, self._settings.micro_batch_tokens):
                found.update(_by_row(micro_batch, self._score(self._scorer, micro_batch)[0]))
        return [found[row.index] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Give what continues bit for bit: counts and tensors, by parameter name.

        The tensors are the live ones: write or copy them before the next update. The first policy is among
        them where the objective keeps it, so that resuming never takes a trained policy for the reference.
        """
        state = {"num_updates": self._num_updates, **self._optimizer.state_dict()}
        if self._reference is not None:
            parameters = self._reference.module.named_parameters()
            state["reference"] = {name: parameter.detach() for name, parameter in parameters}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; the policy's own weights are loaded beside it.

        Raises:
            ResumeError: the state belongs to another model, or only one of the two keeps the first policy.
        """
        reference = {} if self._reference is None else dict(self._reference.module.named_parameters())
        check_names("the reference model (objective.beta)", reference, state.get("reference", {}))
        self._optimizer.load_state_dict(state)
        self._num_updates = int(state["num_updates"])
        with torch.no_grad():
            for name, parameter in reference.items():
                parameter.copy_(state["reference"][name])

    def _score(self, scorer: CompletionScorer, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the log-probs and entropies of the rows' completion tokens, laid end to end."""
        given = scorer(*scorer_inputs(rows, self._pad_token_id, self._policy.device))
        return cast(tuple[torch.Tensor, torch.Tensor], given)

    def _score_start_of_step(self, minibatches: Sequence[Minibatch], work: _StepWork) -> None:
        """Find the proximal log-probs that the first pass over a row comes too late for.

        Until the first optimizer step the policy is the proximal one: the first minibatch needs no pass of
        its own. Fresh rows need none either if all tokens could be sampled: they have behaviour log-probs.
        """
        running = [minibatch for minibatch in minibatches if minibatch.micro_batches]
        if self._objective.config.num_iterations * len(running) <= 1:
            return
        fresh_are_known = not self._sampling.is_truncated
        for number, minibatch in enumerate(running):
            rows = _rows_in(minibatch)
            known = [row for row in rows if fresh_are_known and not row.is_replayed]
            for row in known:
                work.proximal[row.index] = self._behaviour(row)
            unknown = [row for row in rows if row.index not in work.proximal]
            if number > 0:
                work.num_proximal_rows += len(unknown)
                found = self.logprobs(unknown)
                work.proximal.update({row.index: item for row, item in zip(unknown, found, strict=True)})

    def _optimizer_step(self, minibatch: Minibatch, number: int, work: _StepWork) -> None:
        """Make one step of the optimizer, or raise and leave the weights alone."""
        losses = []
        for micro_batch in minibatch.micro_batches:
            losses.append(self._backward(micro_batch, minibatch, work))
        norm = self._optimizer.clip_gradients()
        if not torch.isfinite(torch.stack([*losses, norm])).all():
            self._optimizer.drop_gradients()
            raise UpdateError(self._what_is_not_finite(minibatch, number, losses, norm))
        self._optimizer.step()
        work.losses.append(float(torch.stack(losses).sum()))
        work.gradient_norms.append(float(norm))

    def _backward(self, rows: Sequence[Row], minibatch: Minibatch, work: _StepWork) -> torch.Tensor:
        """Add a micro-batch's gradient; give its loss."""
        device = self._policy.device
        logprobs, entropies = self._score(self._scorer, rows)
        behaviour = torch.cat([self._behaviour(row) for row in rows])
        work.first_pass(rows, logprobs.detach(), behaviour, compares_sampler=not self._sampling.is_truncated)
        lengths = torch.tensor([len(row.completion.token_ids) for row in rows], device=device)
        index = torch.arange(len(rows), device=device).repeat_interleave(lengths)
        outputs = self._objective.loss(
            LossInputs(
                logprobs=logprobs,
                proximal_logprobs=torch.cat([work.proximal[row.index] for row in rows]),
                behaviour_logprobs=behaviour,
                reference_logprobs=self._reference_logprobs(rows, work),
                advantages=torch.tensor([row.advantage for row in rows], device=device)[index],
                rollout_index=index,
                is_replayed=torch.tensor([row.is_replayed for row in rows], device=device)[index],
                num_rollouts=minibatch.num_rollouts,
                num_tokens=minibatch.num_tokens,
                max_completion_length=self._sampling.max_completion_length,
            )
        )
        outputs.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.gather_gradients()
        work.num_forward_rows += len(rows)
        work.num_tokens += len(logprobs)
        work.entropy_nats += float(entropies.sum())
        for name, value in outputs.sums.items():
            work.sums[name] += float(value)
        return outputs.loss.detach()

    def _behaviour(self, row: Row) -> torch.Tensor:
        values = torch.as_tensor(row.completion.behaviour_logprobs, dtype=torch.float32)
        return values.to(self._policy.device)

    def _reference_logprobs(self, rows: Sequence[Row], work: _StepWork) -> torch.Tensor | None:
        """Score rows with the first policy, once a step."""
        if self._reference_scorer is None:
            return None
        unknown = [row for row in rows if row.index not in work.reference]
        if unknown:
            with torch.no_grad():
                with self._as_first_policy():
                    found, _ = self._score(self._reference_scorer, unknown)
                work.reference.update(_by_row(unknown, found))
        return torch.cat([work.reference[row.index] for row in rows])

    def _as_first_policy(self) -> AbstractContextManager[None]:
        """Switch the adapter off where the first policy is the module without it."""
        has_adapter = self._policy.lora_base_sha256 is not None
        return without_adapter(self._policy.module) if has_adapter else nullcontext()

    def _what_is_not_finite(
        self, minibatch: Minibatch, number: int, losses: Sequence[torch.Tensor], norm: torch.Tensor
    ) -> str:
        """Name step, minibatch and questions: those of the first micro-batch with a broken loss, or all."""
        num_minibatches = self._objective.config.num_minibatches
        where = f"step {self._num_updates + 1}: minibatch {number + 1} of {num_minibatches}"
        for loss, rows in zip(losses, minibatch.micro_batches, strict=True):
            if not torch.isfinite(loss):
                return f"{where}: the loss is {loss.item()!r} on questions {_questions(rows)}; {_ADVICE}"
        questions = _questions(_rows_in(minibatch))
        return f"{where}: the gradient norm is {norm.item()!r} on questions {questions}; {_ADVICE}"


_ADVICE = (
    "this optimizer step was not taken; look at the questions' rollouts, or lower training.learning_rate"
)


@dataclass(slots=True)
class _StepWork:
    """What is remembered and counted during one update."""

    proximal: dict[int, torch.Tensor] = field(default_factory=dict)
    reference: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_tokens: int = 0
    entropy_nats: float = 0.0
    num_forward_rows: int = 0
    num_proximal_rows: int = 0
    sampler_difference: float | None = None
    replayed_weights: list[torch.Tensor] = field(default_factory=list)
    """Probability at the start of the step over that of the sampler, of every replayed token, uncapped."""

    def first_pass(
        self, rows: Sequence[Row], logprobs: torch.Tensor, behaviour: torch.Tensor, compares_sampler: bool
    ) -> None:
        """Note what only the first pass over a row tells; ``logprobs`` become proximal where none are."""
        present = _by_row(rows, logprobs)
        sampled = _by_row(rows, behaviour)
        for row in rows:
            if row.index in self.seen:
                continue
            self.seen.add(row.index)
            proximal = self.proximal.setdefault(row.index, present[row.index])
            if row.is_replayed:
                self.replayed_weights.append((proximal - sampled[row.index]).exp())
            elif compares_sampler and not self.losses:
                difference = float((present[row.index] - sampled[row.index]).abs().max())
                self.sampler_difference = max(difference, self.sampler_difference or 0.0)

    def report(self, learning_rate: float, num_equal_reward_groups: int) -> UpdateReport:
        """Sum the update up."""
        figures = {name: value / self.num_tokens for name, value in self.sums.items()}
        if self.replayed_weights:
            weights = torch.cat(self.replayed_weights).double()
            figures["replayed_importance_weight_mean"] = float(weights.mean())
            figures["replayed_effective_sample_fraction"] = float(weights.mean() ** 2 / (weights**2).mean())
        return UpdateReport(
            loss=_mean(self.losses),
            gradient_norm=_mean(self.gradient_norms),
            learning_rate=learning_rate,
            num_optimizer_steps=len(self.losses),
            num_equal_reward_groups=num_equal_reward_groups,
            num_forward_rows=self.num_forward_rows,
            num_proximal_rows=self.num_proximal_rows,
            entropy_nats=self.entropy_nats / self.num_tokens if self.num_tokens else None,
            sampler_logprob_difference_max_nats=self.sampler_difference,
            figures=figures,
        )


def _pad_token_id(policy: Policy) -> int:
    found = policy.tokenizer.pad_token_id
    if not isinstance(found, int):
        raise UpdateError(f"model: the tokenizer's pad_token_id is {found!r}; set a padding token")
    return found


def _by_row(rows: Sequence[Row], values: torch.Tensor) -> dict[int, torch.Tensor]:
    """Cut values laid end to end into those of each row."""
    lengths = [len(row.completion.token_ids) for row in rows]
    return {row.index: part for row, part in zip(rows, values.split_with_sizes(lengths), strict=True)}


def _rows_in(minibatch: Minibatch) -> list[Row]:
    return [row for micro_batch in minibatch.micro_batches for row in micro_batch]


def _questions(rows: Sequence[Row]) -> str:
    return ", ".join(repr(name) for name in sorted({row.question_id for row in rows}))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
