"""Numbers that are not finite: the step is not taken, and what it would have learnt from is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dteframe.engine.distributed import Processes
from dteframe.engine.pack import Row
from dteframe.engine.state_files import write_state
from dteframe.errors import DTEFrameError
from dteframe.records import Group, State

FOLDER = "non_finite"
"""In the run folder."""
MAX_KEPT = 20
"""Batches kept of a run: the first tell what is wrong, the hundredth fills the disk."""


class NonFiniteError(DTEFrameError):
    """A loss, gradient, weight or log-prob that is not finite: its step is not taken."""


@dataclass(frozen=True, slots=True)
class BrokenBatch:
    """What an optimizer step would have learnt from, had all numbers been finite."""

    step: int
    minibatch: int
    """Counted from 1."""
    what: str
    """The sentence that people read: where, and which number."""
    rows: tuple[Row, ...]
    logprobs: tuple[torch.Tensor, ...]
    """Of the completions of ``rows`` under the policy as it is, nats."""
    broken_weights: tuple[str, ...]
    """Parameters that are not finite themselves: skipping steps mends nothing then."""


Heed = Callable[[BrokenBatch], None]
"""Raises NonFiniteError to stop, or returns to go on without the batch; called in every process."""


def stop(batch: BrokenBatch) -> None:
    """Stop the run, and keep nothing.

    Raises:
        NonFiniteError: always.
    """
    raise NonFiniteError(f"{batch.what}; {_advice(batch.broken_weights)}")


@dataclass(frozen=True, slots=True)
class BrokenBatches:
    """Keeps batches in the run folder, and stops or goes on as the recipe wants."""

    run_folder: Path
    skips: bool
    """``training.on_non_finite`` is ``skip``."""
    processes: Processes
    """The main one writes; all say the same."""
    warn: Callable[[str], None]

    def heed(self, batch: BrokenBatch) -> None:
        """Keep the batch; go on only if that can help.

        Raises:
            NonFiniteError: the recipe wants to stop, or the weights themselves are broken.
        """
        folder = self.run_folder / FOLDER / f"step_{batch.step:06d}_minibatch_{batch.minibatch}"
        kept = self.processes.broadcast(_keep(folder, _batch_state(batch)) if self.processes.is_main else "")
        if not self.skips or batch.broken_weights:
            raise NonFiniteError(f"{batch.what}; {_advice(batch.broken_weights)}{kept}")
        if self.processes.is_main:
            self.warn(f"{batch.what}; this optimizer step is skipped (training.on_non_finite){kept}")


def keep_groups(run_folder: Path, step: int, groups: Sequence[Group]) -> str:
    """Write groups whose sampler gave log-probs that are not finite, at least one; say where they are."""
    rows: list[State] = [
        {
            "question_id": group.question_id,
            "reward": float(reward),
            "prompt_token_ids": group.prompt_token_ids,
            "token_ids": completion.token_ids,
            "behaviour_logprobs": completion.behaviour_logprobs,
            "text": completion.text,
        }
        for group in groups
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]
    state: State = {"step": step, "purpose": groups[0].purpose, "rollouts": rows}
    return _keep(run_folder / FOLDER / f"step_{step:06d}_{groups[0].purpose}", state)


def _keep(folder: Path, state: State) -> str:
    """Write a batch, unless there are many already; end a sentence with where it is."""
    if not folder.exists() and len(list(folder.parent.glob("*"))) >= MAX_KEPT:
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder, "batch", state)
    except OSError as error:
        return f"; what it was made of could not be kept in {folder} ({error.strerror})"
    return f"; what it was made of is in {folder}"


def broken_parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """Name this process's parameters that are not finite; one wait for the device, not one a parameter."""
    named = {name: _local(parameter) for name, parameter in module.named_parameters() if parameter.numel()}
    named = {name: values for name, values in named.items() if values.numel()}
    if not named:
        return ()
    # NaN passes into both; isfinite on every weight, and the greatest norm, take ten times as long on a CPU.
    limits = torch.stack([limit.float() for values in named.values() for limit in values.aminmax()])
    is_finite = torch.isfinite(limits.view(-1, 2)).all(dim=1).tolist()
    return tuple(name for name, is_whole in zip(named, is_finite, strict=True) if not is_whole)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Give this process's shard."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _advice(broken_weights: Sequence[str]) -> str:
    if broken_weights:
        return (
            f"the weights themselves are broken ({broken_weights[0]!r}"
            + (f" and {len(broken_weights) - 1} more" if len(broken_weights) > 1 else "")
            + "): lower training.learning_rate, and start from sound weights"
        )
    return (
        "this optimizer step was not taken; look at the questions' rollouts, lower training.learning_rate, "
        "or leave such batches out (training.on_non_finite=skip)"
    )


def _batch_state(batch: BrokenBatch) -> State:
    rows: list[State] = [
        {
            "question_id": row.question_id,
            "is_replayed": row.is_replayed,
            "staleness": row.group.staleness,
            "policy_version": row.group.group.policy_version,
            "advantage": row.advantage,
            "prompt_token_ids": row.group.group.prompt_token_ids,
            "token_ids": row.completion.token_ids,
            "behaviour_logprobs": row.completion.behaviour_logprobs,
            "logprobs": logprobs.float().cpu().numpy(),
            "text": row.completion.text,
        }
        for row, logprobs in zip(batch.rows, batch.logprobs, strict=True)
    ]
    return {
        "step": batch.step,
        "minibatch": batch.minibatch,
        "what": batch.what,
        "broken_weights": list(batch.broken_weights),
        "rollouts": rows,
    }
