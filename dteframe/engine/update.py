"""The learner: turns credited groups into optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch

from dteframe.contracts import LossInputs, Objective, Policy
from dteframe.engine.distributed import ALONE, Processes
from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.engine.logprobs import CompletionScorer, scorer_inputs
from dteframe.engine.lora import without_adapter
from dteframe.engine.micro_batches import MicroBatch, MicroBatches, Sharing, shared_out, split_alike
from dteframe.engine.non_finite import BrokenBatch, Heed, NonFiniteError, broken_parameters, stop
from dteframe.engine.optimizer import Optimizer, OptimizerSettings, check_names
from dteframe.engine.out_of_memory import SMALLER_OPTIMIZER, memory_for, remedies_for, work_of
from dteframe.engine.pack import Minibatch, Row, pack
from dteframe.engine.sharding import Precision, Skeleton, first_scorer, gathered, release, shard
from dteframe.engine.shared_attention import takes_shared_prompts
from dteframe.engine.update_work import UpdateWork, by_row, note_pass
from dteframe.errors import DTEFrameError
from dteframe.records import CreditedGroup, Sampling
from dteframe.reports import UpdateReport


class UpdateError(DTEFrameError):
    """A model that cannot be trained."""


class Learner:
    """Makes the policy better: forward, loss, backward, clip, step.

    The module is in training mode during an update and only then, all of its passes included.
    """

    def __init__(  # noqa: PLR0913  # what trains, what is trained, and among whom
        self,
        policy: Policy,
        objective: Objective,
        settings: OptimizerSettings,
        sampling: Sampling,
        processes: Processes = ALONE,
        shares_module: bool = True,
        heed: Heed = stop,
    ) -> None:
        """Take the policy, and freeze a copy of it if the objective compares with the first policy.

        Under several processes all of them call this, and every method: the policy's module is sharded over
        them, and holds the main process's weights afterwards.

        Args:
            policy: what is trained; its module is changed in place.
            objective: what is made small.
            settings: of the optimizer.
            sampling: how completions are sampled.
            processes: who trains.
            shares_module: whether the policy's own module samples, so that the log-probs of fresh rows are
                the policy's at the start of the step up to rounding.
            heed: what to do about a batch whose loss, log-probs or gradient are not finite.
        """
        self._policy = policy
        self._heed = heed
        self._objective = objective
        self._settings = settings
        self._sampling = sampling
        self._processes = processes
        self._num_updates = 0
        is_float32 = all(parameter.dtype == torch.float32 for parameter in policy.module.parameters())
        self._fresh_are_proximal = shares_module and is_float32 and not sampling.is_truncated
        if not any(parameter.requires_grad for parameter in policy.module.parameters()):
            raise UpdateError("model: no parameter is trainable; unfreeze some")
        self._pad_token_id = _pad_token_id(policy)
        self._sizes = loaded_sizes(policy.module)
        sharing: Sharing | None = None
        if self._sizes is not None and takes_shared_prompts(policy.module):
            checkpoints = any(
                getattr(item, "gradient_checkpointing", False) for item in policy.module.modules()
            )
            sharing = Sharing(self._sizes, checkpoints)
        # The main process's: all of them have to deal and split alike.
        self._sharing = processes.broadcast(sharing)
        self._scorer = first_scorer(policy, sampling.temperature, processes)
        self._reference: Policy | None = None
        self._reference_scorer: CompletionScorer | None = None
        if objective.needs_reference_model and policy.lora_base_sha256 is not None:
            self._reference_scorer = self._scorer  # The first policy is the module without its adapter.
        elif objective.needs_reference_model:
            self._reference = _frozen_copy(policy, processes)
            self._reference_scorer = CompletionScorer(
                self._reference.module, sampling.temperature, has_plain_head=self._scorer.has_plain_head
            )
        self._shards_are_masters = False
        if processes.are_sharded:
            self._shard()
        self._optimizer = Optimizer(policy.module, settings)

    def update(self, credited: Sequence[CreditedGroup], rng: np.random.Generator) -> UpdateReport:
        """Learn from the groups of one step.

        Args:
            credited: fresh and replayed groups; those of equal rewards count in the denominators only, unless
                they carry a gradient.
            rng: the only source of chance: who meets whom in a minibatch, and what dropout drops.

        Raises:
            NonFiniteError: a loss, log-prob or gradient is not finite, and ``heed`` does not go on without
                that batch; or a weight is not after the update.
        """
        objective = self._objective
        minibatches = pack(
            credited,
            objective.config.num_minibatches,
            objective.equal_rewards_carry_gradient,
            rng,
        )
        # Dropout, where there is any, is torch's own chance; each process has rows, and draws, of its own.
        torch.manual_seed(int(rng.integers(2**63)) ^ self._processes.rank)
        learning_rate = self._optimizer.start_step(self._num_updates)
        work = UpdateWork()
        self._policy.module.train()
        try:
            self._score_start_of_step(minibatches, work)
            for _ in range(objective.config.num_iterations):
                for number, minibatch in enumerate(minibatches):
                    if minibatch.rows and number not in work.broken_minibatches:
                        self._optimizer_step(minibatch, number, work)
        finally:
            self._policy.module.train(False)
        self._refuse_broken_weights()
        self._num_updates += 1
        num_left_out = 0
        if not objective.equal_rewards_carry_gradient:
            num_left_out = sum(item.group.has_equal_rewards for item in credited)
        every = self._processes.exchange(work.figures)
        return work.report(every, learning_rate, num_left_out, self._sizes)

    def logprobs(self, rows: Sequence[Row], temperature: float | None = None) -> list[torch.Tensor]:
        """Give the completions' log-probs under the present policy: float32 nats, one tensor a row.

        Args:
            rows: what to score.
            temperature: another than that of sampling.
        """
        found: dict[int, torch.Tensor] = {}
        with self._scorer.at_temperature(temperature or self._sampling.temperature):
            scored = self._score_without_gradient(self._own_micro_batches(self._shares(rows)))
        # By way of the main memory: a tensor on a GPU would arrive on the sender's.
        for share in self._processes.exchange({index: item.cpu() for index, item in scored.items()}):
            found.update(share)
        return [found[row.index].to(self._policy.device) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Give what continues bit for bit: counts and tensors, by parameter name.

        The tensors are the live ones: write or copy them before the next update. The first policy is among
        them where the objective keeps it, so that resuming never takes a trained policy for the reference.
        """
        state = {"num_updates": self._num_updates, **self._optimizer.state_dict()}
        if self._shards_are_masters:
            state["masters"] = {
                name: parameter.detach()
                for name, parameter in self._policy.module.named_parameters()
                if parameter.requires_grad
            }
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

    def whole_module(self) -> AbstractContextManager[None]:
        """Have the whole module in every process for a while, so that each can run it on its own."""
        return gathered(self._scorer)

    def _shard(self) -> None:
        """Spread the modules over the processes; float32 shards of a coarser module are its masters."""
        module, device = self._policy.module, self._policy.device
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        compute = None
        if self._settings.float32_master_weights and any(item.dtype != torch.float32 for item in trained):
            self._shards_are_masters = True
            self._policy.computes_in = compute = module.dtype
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
        offloads = self._settings.cpu_offload
        shard(self._scorer, Precision(compute, offloads), self._processes, device)
        if self._reference is not None and self._reference_scorer is not None:
            precision = Precision(None, offloads)
            shard(self._reference_scorer, precision, self._processes, device, source=self._scorer)

    def _score(self, scorer: CompletionScorer, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the log-probs and entropies of the rows' completion tokens, laid end to end."""
        given = scorer(*scorer_inputs(micro_batch, self._pad_token_id, self._policy.device))
        return cast(tuple[torch.Tensor, torch.Tensor], given)

    def _score_start_of_step(self, minibatches: Sequence[Minibatch], work: UpdateWork) -> None:
        """Find the proximal log-probs that the first pass over a row comes too late for.

        Until the first optimizer step the policy is the proximal one: the first minibatch needs no pass of
        its own. Fresh rows need none either if their behaviour log-probs are the policy's: in float32, and
        if all tokens could be sampled. In bfloat16 reading a text and writing it round differently.
        """
        running = [minibatch for minibatch in minibatches if minibatch.rows]
        reads_replayed = self._objective.config.needs_proximal_of_replayed()
        if self._objective.config.num_iterations * len(running) <= 1:
            return
        for number, minibatch in enumerate(running):
            known = {row.index for row in minibatch.rows if self._fresh_are_proximal and not row.is_replayed}
            work.proximal.update(
                {row.index: self._behaviour(row) for row in minibatch.rows if row.index in known}
            )
            if number > 0:
                shares = self._shares(minibatch.rows)
                unread = {row.index for row in minibatch.rows if row.is_replayed and not reads_replayed}
                unknown = [[row for row in share if row.index not in known | unread] for share in shares]
                micro_batches = self._own_micro_batches(unknown)
                found = self._score_without_gradient(micro_batches)
                work.figures.num_proximal_rows += len(found)
                for micro_batch in micro_batches:
                    note_pass(work.figures.scored, micro_batch)
                work.proximal.update(found)

    def _shares(self, rows: Sequence[Row]) -> list[tuple[Row, ...]]:
        """Deal rows to the processes: all of them deal alike, so each knows what the others have."""
        return shared_out(rows, self._processes.count, self._sharing)

    def _own_micro_batches(self, shares: Sequence[Sequence[Row]]) -> MicroBatches:
        every = split_alike(shares, self._settings.micro_batch_tokens, self._sharing)
        return every[self._processes.rank]

    def _score_without_gradient(self, micro_batches: MicroBatches) -> dict[int, torch.Tensor]:
        """Score this process's rows with the present policy."""
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for micro_batch in micro_batches:
                with self._memory_for(micro_batch):
                    found.update(by_row(micro_batch.rows, self._score(self._scorer, micro_batch)[0]))
        release(self._scorer)
        return found

    def _optimizer_step(self, minibatch: Minibatch, number: int, work: UpdateWork) -> None:
        """Make one step of the optimizer, or none at all if a number is not finite."""
        figures = deepcopy(work.figures)
        micro_batches = self._own_micro_batches(self._shares(minibatch.rows))
        if number not in work.minibatches_with_reference:
            self._score_with_first_policy(micro_batches, work)
            work.minibatches_with_reference.add(number)
        losses = []
        for micro_batch in micro_batches:
            with self._memory_for(micro_batch):
                losses.append(self._backward(micro_batch, minibatch, work))
        # Offloaded gradients have their norm in main memory.
        norm = self._optimizer.clip_gradients().to(self._policy.device)
        loss = self._processes.sum(torch.stack(losses).sum())
        if not torch.isfinite(torch.stack([loss, norm])).all():
            self._optimizer.drop_gradients()
            work.figures = figures
            work.broken_minibatches.add(number)
            pairs = zip(losses, micro_batches, strict=True)
            told = [(item.item(), _questions(micro_batch.rows)) for item, micro_batch in pairs]
            self._heed(self._broken_batch(minibatch, number, told, norm.item()))
            return
        with memory_for("update", "the optimizer's step", self._policy.device, SMALLER_OPTIMIZER):
            learning_rate = self._optimizer.step(minibatch.unequal_share)
        work.learning_rates.append(learning_rate)
        work.losses.append(float(loss))
        work.gradient_norms.append(float(norm))

    def _backward(self, micro_batch: MicroBatch, minibatch: Minibatch, work: UpdateWork) -> torch.Tensor:
        """Add a micro-batch's gradient; give its loss."""
        device, rows = self._policy.device, micro_batch.rows
        logprobs, entropies = self._score(self._scorer, micro_batch)
        if not rows:  # Others have more to do, and this process meets them in every layer.
            (logprobs.sum() * 0).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._optimizer.gather_gradients()
            return torch.zeros((), device=device)
        behaviour = torch.cat([self._behaviour(row) for row in rows])
        work.first_pass(rows, logprobs.detach(), behaviour, compares_sampler=not self._sampling.is_truncated)
        reference = [work.reference[row.index] for row in rows] if self._reference_scorer else None
        lengths = torch.tensor([len(row.completion.token_ids) for row in rows], device=device)
        index = torch.arange(len(rows), device=device).repeat_interleave(lengths)
        outputs = self._objective.loss(
            LossInputs(
                logprobs=logprobs,
                proximal_logprobs=torch.cat([work.proximal_of(row, device) for row in rows]),
                behaviour_logprobs=behaviour,
                reference_logprobs=torch.cat(reference) if reference else None,
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
        work.figures.num_forward_rows += len(rows)
        note_pass(work.figures.trained, micro_batch)
        work.figures.num_tokens += len(logprobs)
        work.figures.entropy_nats += float(entropies.sum())
        for name, value in outputs.sums.items():
            work.figures.sums[name] += float(value)
        # 0 for finite log-probs; a loss may hide others, such as a ratio of 0.
        return outputs.loss.detach() + 0 * logprobs.detach().sum()

    def _behaviour(self, row: Row) -> torch.Tensor:
        values = torch.as_tensor(row.completion.behaviour_logprobs, dtype=torch.float32)
        return values.to(self._policy.device)

    def _score_with_first_policy(self, micro_batches: MicroBatches, work: UpdateWork) -> None:
        """Score rows with the first policy, once a step: before their first pass."""
        if self._reference_scorer is None:
            return
        with torch.no_grad(), self._as_first_policy():
            for micro_batch in micro_batches:
                with self._memory_for(micro_batch):
                    logprobs = self._score(self._reference_scorer, micro_batch)[0]
                work.reference.update(by_row(micro_batch.rows, logprobs))
                note_pass(work.figures.scored, micro_batch)
        release(self._reference_scorer)

    def _memory_for(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Say which micro-batch it was, should memory run out."""
        remedies = remedies_for(micro_batch.rows, self._settings.micro_batch_tokens)
        return memory_for("update", work_of(micro_batch), self._policy.device, remedies)

    def _as_first_policy(self) -> AbstractContextManager[None]:
        """Switch the adapter off where the first policy is the module without it."""
        has_adapter = self._policy.lora_base_sha256 is not None
        return without_adapter(self._policy.module) if has_adapter else nullcontext()

    def _broken_batch(
        self, minibatch: Minibatch, number: int, losses: Sequence[tuple[float, str]], norm: float
    ) -> BrokenBatch:
        """Put together what is known of a minibatch that is not finite; all processes call it."""
        num_minibatches = self._objective.config.num_minibatches
        where = f"step {self._num_updates + 1}: minibatch {number + 1} of {num_minibatches}"
        every = [item for share in self._processes.exchange(losses) for item in share]
        broken = [(loss, questions) for loss, questions in every if not np.isfinite(loss)]
        if broken:
            loss, questions = broken[0]
            what = f"{where}: the loss or a log-prob is {loss!r} on questions {questions}"
        else:
            what = f"{where}: the gradient norm is {norm!r} on questions {_questions(minibatch.rows)}"
        return BrokenBatch(
            step=self._num_updates + 1,
            minibatch=number + 1,
            what=what,
            rows=minibatch.rows,
            logprobs=tuple(self.logprobs(minibatch.rows)),
            broken_weights=self._broken_weights(),
        )

    def _broken_weights(self) -> tuple[str, ...]:
        every = self._processes.exchange(broken_parameters(self._policy.module))
        return tuple(sorted({name for share in every for name in share}))

    def _refuse_broken_weights(self) -> None:
        """Stop before weights that are not finite are sampled from or kept: they cannot be taken back."""
        broken = self._broken_weights()
        if broken:
            raise NonFiniteError(
                f"step {self._num_updates + 1}: {len(broken)} parameters are not finite after the update, "
                f"such as {broken[0]!r}; lower training.learning_rate; checkpoints before it are sound"
            )


def _frozen_copy(policy: Policy, processes: Processes) -> Policy:
    """Copy a policy; where it will be sharded, without its weights: its shards are copied afterwards."""
    if processes.are_sharded:
        copy = Skeleton.of(policy).build(policy.device)
    else:
        copy = Policy(deepcopy(policy.module), policy.tokenizer, policy.device)
    copy.module.requires_grad_(False).train(False)
    return copy


def _pad_token_id(policy: Policy) -> int:
    found = policy.tokenizer.pad_token_id
    if not isinstance(found, int):
        raise UpdateError(f"model: the tokenizer's pad_token_id is {found!r}; set a padding token")
    return found


def _questions(rows: Sequence[Row]) -> str:
    return ", ".join(repr(name) for name in sorted({row.question_id for row in rows}))
