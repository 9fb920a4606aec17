"""The learner: gradients, passes, schedules and resuming, on a tiny model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dteframe.contracts import Context, LossInputs, LossOutputs, Objective, ObjectiveConfig, Policy
from dteframe.engine.non_finite import NonFiniteError
from dteframe.engine.optimizer import OptimizerSettings, learning_rate_at
from dteframe.engine.pack import Row, rows_of
from dteframe.engine.update import Learner
from dteframe.errors import ResumeError
from dteframe.objectives.grpo import GRPO, GRPOConfig
from dteframe.recipe import TrainingConfig
from dteframe.records import Completion, CreditedGroup, Group, Sampling
from dteframe.testing.tiny import tiny_policy

SAMPLING = Sampling(temperature=0.8, max_completion_length=8)
TRUNCATED = Sampling(temperature=0.8, top_p=0.9, max_completion_length=8)
CONTEXT = Context(Path("x"), Path("x"), "cpu", 0, progress=lambda *_: None, warn=lambda _: None)


def settings(**changes: object) -> OptimizerSettings:
    chosen = {"max_steps": 10, "questions_per_step": 2, "learning_rate": 0.01, "micro_batch_tokens": 40}
    return OptimizerSettings.from_training(TrainingConfig.model_validate(chosen | changes))


def grpo(**options: object) -> GRPO:
    return GRPO(GRPOConfig(**options), CONTEXT)


def learner(
    policy: Policy | None = None,
    objective: Objective | None = None,
    sampling: Sampling = SAMPLING,
    **changes: object,
) -> Learner:
    return Learner(policy or tiny_policy(), objective or grpo(), settings(**changes), sampling)


def credited(
    name: str, rewards: tuple[float, ...] = (1.0, 0.0, 0.0), *, is_replayed: bool = False
) -> CreditedGroup:
    """Make a group with tokens drawn from its name, and behaviour log-probs near those of a random model."""
    rng = np.random.default_rng(list(name.encode()))
    completions = tuple(
        Completion(rng.integers(2, 90, size=length), -4.5 + 0.2 * rng.standard_normal(length), "stop", "")
        for length in rng.integers(1, 9, size=len(rewards))
    )
    values = np.array(rewards)
    prompt = rng.integers(2, 90, size=int(rng.integers(2, 7)))
    group = Group(name, prompt, completions, values, int(values.sum()), 0, "train")
    return CreditedGroup(group, grpo().advantages(values), is_replayed, staleness=int(is_replayed))


BATCH = [
    credited("a"),
    credited("b", (0.0, 1.0, 1.0)),
    credited("equal", (1.0, 1.0, 1.0)),
    credited("c"),
    credited("replayed", is_replayed=True),
    credited("older", (1.0, 1.0, 0.0), is_replayed=True),
]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.module.named_parameters()}


def gradient(micro_batch_tokens: int, **options: object) -> dict[str, torch.Tensor]:
    """Give the unclipped gradient of one update."""
    policy = tiny_policy()
    found: dict[str, torch.Tensor] = {}
    for name, parameter in policy.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda item, name=name: found.update({name: item.grad.clone()})
        )
    learner(policy, grpo(**options), micro_batch_tokens=micro_batch_tokens).update(
        BATCH, np.random.default_rng(0)
    )
    return found


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(loss_type: str, beta: float) -> None:
    whole = gradient(10**6, loss_type=loss_type, beta=beta)
    assert max(float(item.abs().max()) for item in whole.values()) > 1e-3
    for tokens in (1, 25, 60):
        for name, found in gradient(tokens, loss_type=loss_type, beta=beta).items():
            assert torch.allclose(found, whole[name], rtol=0, atol=1e-6), name


def test_log_probs_equal_those_of_a_plain_forward_pass_over_each_row() -> None:
    policy = tiny_policy()
    rows = [row for index, item in enumerate(BATCH) for row in rows_of(item, 3 * index)]
    for row, found in zip(rows, learner(policy).logprobs(rows), strict=True):
        assert torch.allclose(found, plain_logprobs(policy, row), atol=1e-5)


def plain_logprobs(policy: Policy, row: Row) -> torch.Tensor:
    return plain_table(policy, row).gather(-1, torch.tensor(row.completion.token_ids)[:, None]).squeeze(-1)


def plain_table(policy: Policy, row: Row) -> torch.Tensor:
    """Give the log-probs of the whole vocabulary at every place of the completion."""
    prompt, completion = row.group.group.prompt_token_ids, row.completion.token_ids
    with torch.no_grad():
        logits = policy.module(input_ids=torch.tensor(np.concatenate([prompt, completion]))[None]).logits[0]
    return (logits[len(prompt) - 1 : -1] / SAMPLING.temperature).log_softmax(-1)


def test_every_row_is_run_once_and_those_of_equal_rewards_never() -> None:
    report = learner().update(BATCH, np.random.default_rng(0))
    assert report.num_optimizer_steps == 1
    assert report.num_equal_reward_groups == 1
    assert report.num_forward_rows == 15
    assert report.num_proximal_rows == 0


def test_a_second_pass_over_one_minibatch_needs_no_proximal_pass() -> None:
    report = learner(objective=grpo(num_iterations=2)).update(BATCH, np.random.default_rng(0))
    assert report.num_optimizer_steps == 2
    assert report.num_forward_rows == 2 * 15
    assert report.num_proximal_rows == 0


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_only_replayed_rows_of_later_minibatches_take_a_proximal_pass(num_iterations: int) -> None:
    # Two replayed groups of three are dealt to two minibatches, one each.
    objective = grpo(num_minibatches=2, num_iterations=num_iterations)
    report = learner(objective=objective).update(BATCH, np.random.default_rng(0))
    assert report.num_optimizer_steps == 2 * num_iterations
    assert report.num_forward_rows == 15 * num_iterations
    assert report.num_proximal_rows == 3


def test_replayed_rows_that_are_clipped_around_their_sampler_take_no_proximal_pass() -> None:
    reports, moved = {}, {}
    for clip in ("one", "proximal"):
        policy = tiny_policy()
        objective = grpo(num_minibatches=2, replay_clip=clip)
        reports[clip] = learner(policy, objective=objective).update(BATCH, np.random.default_rng(0))
        moved[clip] = weights(policy)
    one, proximal = reports["one"], reports["proximal"]
    assert (one.num_forward_rows, one.num_proximal_rows) == (15, 0)
    # A forward pass of three of the 15 rows less: its tokens' operations.
    assert one.model_flops < proximal.model_flops
    assert one.trained_forward_flops == proximal.trained_forward_flops
    assert np.isfinite(one.loss) and all(value.isfinite().all() for value in moved["one"].values())


def test_truncated_sampling_makes_fresh_rows_of_later_minibatches_take_one_too() -> None:
    report = learner(objective=grpo(num_minibatches=2, num_iterations=3), sampling=TRUNCATED).update(
        BATCH, np.random.default_rng(0)
    )
    assert report.num_proximal_rows in (6, 9)  # the second minibatch, with one or two fresh groups that run
    assert report.sampler_logprob_difference_max_nats is None


def test_proximal_log_probs_are_those_at_the_start_of_the_step() -> None:
    seen = Recorder(RecorderConfig(num_minibatches=2, num_iterations=2), CONTEXT)
    policy = tiny_policy()
    made = learner(policy, seen, sampling=TRUNCATED, learning_rate=0.1)
    rows = [row for index, item in enumerate(BATCH) for row in rows_of(item, 3 * index)]
    at_start = {
        tuple(row.completion.behaviour_logprobs.astype(np.float32)): found
        for row, found in zip(rows, made.logprobs(rows), strict=True)
    }
    made.update(BATCH, np.random.default_rng(0))
    moved = 0.0
    for inputs in seen.inputs:
        for index in range(int(inputs.rollout_index.max()) + 1):
            mask = inputs.rollout_index == index
            expected = at_start[tuple(inputs.behaviour_logprobs[mask].numpy())]
            assert torch.allclose(inputs.proximal_logprobs[mask], expected, atol=1e-5)
            moved = max(moved, float((inputs.logprobs[mask].detach() - expected).abs().max()))
    assert moved > 0.1


class RecorderConfig(ObjectiveConfig):
    type: str = "recorder"


class Recorder(Objective):
    """Maximises advantage-weighted log-probs and keeps what it was given."""

    config: RecorderConfig

    def __init__(self, config: RecorderConfig, context: Context) -> None:
        super().__init__(config, context)
        self.inputs: list[LossInputs] = []
        self.factor = 1.0

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        return rewards - rewards.mean()

    def loss(self, inputs: LossInputs) -> LossOutputs:
        self.inputs.append(inputs)
        return LossOutputs(-(inputs.logprobs * inputs.advantages).sum() * self.factor, {})


def test_a_minibatch_without_any_gradient_takes_no_optimizer_step() -> None:
    policy = tiny_policy()
    before = weights(policy)
    report = learner(policy).update([credited("equal", (1.0, 1.0))], np.random.default_rng(0))
    assert (report.num_optimizer_steps, report.num_forward_rows, report.loss) == (0, 0, 0.0)
    assert (report.entropy_nats, report.figures) == (None, {})
    assert all(torch.equal(found, before[name]) for name, found in weights(policy).items())


def test_a_minibatchs_share_of_unequal_groups_scales_its_step_where_asked() -> None:
    batch = [credited("a"), *(credited(f"equal {index}", (1.0, 1.0, 1.0)) for index in range(3))]
    rates = [
        learner(learning_rate_scaling=scaling).update(batch, np.random.default_rng(0)).learning_rate
        for scaling in ("none", "unequal_groups")
    ]
    assert rates[1] == pytest.approx(0.5 * rates[0])


def test_figures_are_means_over_the_tokens_that_ran() -> None:
    policy = tiny_policy()
    rows = [row for index, item in enumerate(BATCH) if index != 2 for row in rows_of(item, 3 * index)]
    made = learner(policy)
    found = made.logprobs(rows)
    tables = torch.cat([plain_table(policy, row) for row in rows])
    entropy = -float((tables.exp() * tables).sum(-1).mean())
    report = made.update(BATCH, np.random.default_rng(0))
    assert report.entropy_nats == pytest.approx(entropy, rel=1e-5)
    old = [(found[index], row) for index, row in enumerate(rows) if row.is_replayed]
    ratios = torch.cat([item - torch.tensor(row.completion.behaviour_logprobs) for item, row in old]).exp()
    assert report.figures["replayed_importance_weight_mean"] == pytest.approx(float(ratios.mean()), rel=1e-5)
    effective = float(ratios.mean() ** 2 / ratios.square().mean())
    assert report.figures["replayed_effective_sample_fraction"] == pytest.approx(effective, rel=1e-5)
    assert report.figures["replayed_importance_weight_max"] == pytest.approx(float(ratios.max()), rel=1e-5)
    new = [(found[index], row) for index, row in enumerate(rows) if not row.is_replayed]
    ratios = torch.cat([item - torch.tensor(row.completion.behaviour_logprobs) for item, row in new]).exp()
    assert report.figures["fresh_importance_weight_max"] == pytest.approx(float(ratios.max()), rel=1e-5)


def test_the_samplers_difference_is_the_largest_over_fresh_tokens() -> None:
    made = learner()
    fresh = [row for index, item in enumerate(BATCH[:2]) for row in rows_of(item, 3 * index)]
    differences = [
        float((found - torch.tensor(row.completion.behaviour_logprobs)).abs().max())
        for found, row in zip(made.logprobs(fresh), fresh, strict=True)
    ]
    report = made.update([*BATCH[:3], BATCH[4]], np.random.default_rng(0))
    assert report.sampler_logprob_difference_max_nats == pytest.approx(max(differences), abs=1e-5)


@pytest.mark.parametrize(
    ("shares_module", "dtype", "sampling", "scores_fresh_rows"),
    [
        (True, torch.float32, SAMPLING, False),
        (False, torch.float32, SAMPLING, True),  # Another engine rounds otherwise, or errs.
        (True, torch.bfloat16, SAMPLING, True),
        (True, torch.float32, replace(SAMPLING, top_p=0.9), True),
    ],
)
def test_fresh_rows_are_scored_at_the_start_of_the_step_unless_the_sampler_has_done_it(
    shares_module: bool, dtype: torch.dtype, sampling: Sampling, scores_fresh_rows: bool
) -> None:
    policy = tiny_policy()
    policy.module.to(dtype)
    made = Learner(policy, grpo(num_minibatches=2), settings(), sampling, shares_module=shares_module)
    fresh = [credited("a"), credited("b")]
    report = made.update(fresh, np.random.default_rng(0))
    assert report.num_proximal_rows == (3 if scores_fresh_rows else 0)
    assert (report.figures["fresh_importance_weight_mean"] != 1.0) == scores_fresh_rows


def test_the_gradient_of_the_whole_minibatch_is_clipped_and_its_norm_reported() -> None:
    report = learner(max_grad_norm=1e-3).update(BATCH, np.random.default_rng(0))
    norm = torch.cat([item.flatten() for item in gradient(40).values()]).norm()
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_the_policy_is_in_evaluation_mode_after_an_update() -> None:
    policy = tiny_policy()
    learner(policy).update(BATCH, np.random.default_rng(0))
    assert not policy.module.training


def test_a_loss_that_is_not_finite_names_step_minibatch_and_questions_and_leaves_the_weights() -> None:
    policy = tiny_policy()
    objective = Recorder(RecorderConfig(), CONTEXT)
    made = learner(policy, objective, micro_batch_tokens=10**6)
    made.update(BATCH, np.random.default_rng(0))
    before = weights(policy)
    objective.factor = float("nan")
    message = (
        "step 2: minibatch 1 of 1: the loss or a log-prob is nan on questions 'a', 'b'; "
        "this optimizer step was not taken; look at the questions' rollouts, lower training.learning_rate, "
        "or leave such batches out "
        "(training.on_non_finite=skip)"
    )
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        made.update(BATCH[:3], np.random.default_rng(0))
    assert all(torch.equal(found, before[name]) for name, found in weights(policy).items())


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_the_learning_rate_rises_then_falls(kind: str, rates: list[float]) -> None:
    made = settings(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=2, max_steps=6)
    assert [learning_rate_at(step, made) for step in range(6)] == pytest.approx(rates)


def test_steps_without_a_gradient_still_count_in_the_schedule() -> None:
    made = learner(lr_scheduler_type="linear", max_steps=4)
    groups = [BATCH, [credited("equal", (1.0, 1.0))], BATCH]
    rates = [made.update(group, np.random.default_rng(0)).learning_rate for group in groups]
    assert rates == pytest.approx([0.01, 0.0075, 0.005])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_resumed_learner_continues_bit_for_bit(dtype: torch.dtype, beta: float) -> None:
    def fresh() -> tuple[Policy, Learner]:
        policy = tiny_policy()
        policy.module.to(dtype)
        objective = grpo(beta=beta, num_minibatches=2)
        return policy, learner(policy, objective, lr_scheduler_type="cosine", weight_decay=0.1)

    policy, made = fresh()
    for step in range(2):
        made.update(BATCH, np.random.default_rng(step))
    other_policy, other = fresh()
    other_policy.module.load_state_dict(policy.module.state_dict())
    other.load_state_dict(made.state_dict())
    reports = [item.update(BATCH, np.random.default_rng(2)) for item in (made, other)]
    assert reports[0] == reports[1]
    for name, found in weights(policy).items():
        assert torch.equal(found, weights(other_policy)[name]), name


def test_the_reference_model_after_resuming_is_the_first_policy_and_not_the_resumed_one() -> None:
    policy = tiny_policy()
    made = learner(policy, grpo(beta=0.1))
    for step in range(3):
        made.update(BATCH, np.random.default_rng(step))
    resumed = learner(policy, grpo(beta=0.1))  # made from weights that have moved already
    resumed.load_state_dict(made.state_dict())
    assert resumed.update(BATCH, np.random.default_rng(3)).figures["kl_reference_nats"] > 1e-3


def test_a_state_with_another_objective_is_refused() -> None:
    state = learner(objective=grpo(beta=0.1)).state_dict()
    with pytest.raises(
        ResumeError, match=r"^learner: the reference model \(objective.beta\) has 0 parameters and"
    ):
        learner().load_state_dict(state)


def test_bfloat16_weights_move_by_steps_smaller_than_their_spacing() -> None:
    policy = tiny_policy()
    policy.module.to(torch.bfloat16)
    before = weights(policy)
    made = learner(policy, learning_rate=2e-5)
    for step in range(30):
        made.update(BATCH, np.random.default_rng(step))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (weights(policy)[name] != before[name]).float().mean()
    assert moved > 0.5


def test_learning_makes_rewarded_completions_likelier() -> None:
    made = learner()
    rows = rows_of(BATCH[0], 0)
    before = [float(item.sum()) for item in made.logprobs(rows)]
    for step in range(5):
        made.update([BATCH[0]], np.random.default_rng(step))
    after = [float(item.sum()) for item in made.logprobs(rows)]
    assert after[0] > before[0]
    assert after[1] + after[2] < before[1] + before[2]
