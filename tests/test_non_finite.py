"""Numbers that are not finite: real ones, made by rewards and weights that overflow."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_update import BATCH, CONTEXT, SAMPLING, credited, learner, settings, weights
from tiny_run import rows, run_tiny

from dteframe.engine.distributed import ALONE
from dteframe.engine.non_finite import MAX_KEPT, BrokenBatches, NonFiniteError, broken_parameters
from dteframe.engine.state_files import read_state
from dteframe.engine.update import Learner
from dteframe.objectives.grpo import GRPO, GRPOConfig
from dteframe.testing.tiny import tiny_policy

HUGE = credited("huge", (1e39, 0.0, 0.0))
"""Finite rewards of which float32 makes an infinite advantage."""


def skipping_learner(folder, told, policy=None, **objective):
    heed = BrokenBatches(folder, skips=True, processes=ALONE, warn=told.append).heed
    made = GRPO(GRPOConfig(**objective), CONTEXT)
    return Learner(policy or tiny_policy(), made, settings(), SAMPLING, heed=heed)


def state_of(made):
    """Give everything that an optimizer step changes, copied."""
    return {
        f"{name}.{key}": value.clone()
        for name, values in made.state_dict()["adamw"].items()
        for key, value in values.items()
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_skipped_batch_leaves_weights_and_optimizer_as_they_were(tmp_path):
    policy, told = tiny_policy(), []
    made = skipping_learner(tmp_path, told, policy)
    made.update(BATCH, np.random.default_rng(0))
    before, moments = weights(policy), state_of(made)
    report = made.update([*BATCH[:2], HUGE], np.random.default_rng(0))
    assert (report.num_skipped_minibatches, report.num_optimizer_steps) == (1, 0)
    assert_same(weights(policy), before)
    assert_same(state_of(made), moments)


def test_after_a_skipped_batch_training_goes_on_as_if_it_had_not_been(tmp_path):
    policies = [tiny_policy(), tiny_policy()]
    first, second = (skipping_learner(tmp_path, [], policy) for policy in policies)
    first.update([HUGE], np.random.default_rng(1))
    reports = [made.update(BATCH, np.random.default_rng(0)) for made in (first, second)]
    assert reports[0] == reports[1]
    assert_same(*(weights(policy) for policy in policies))


def test_of_two_minibatches_the_sound_one_is_trained_on_and_the_other_tried_once(tmp_path):
    told = []
    made = skipping_learner(tmp_path, told, num_minibatches=2, num_iterations=3)
    report = made.update([credited("a"), HUGE], np.random.default_rng(0))
    assert (report.num_skipped_minibatches, report.num_optimizer_steps) == (1, 3)
    assert report.num_forward_rows == 3 * 3
    assert all(np.isfinite(value) for value in report.metrics().values())
    assert len(told) == 1


def test_the_warning_names_step_questions_and_the_folder_that_keeps_the_batch(tmp_path):
    told = []
    made = skipping_learner(tmp_path, told)
    made.update([credited("a"), HUGE], np.random.default_rng(0))
    folder = tmp_path / "non_finite/step_000001_minibatch_1"
    assert re.fullmatch(
        "step 1: minibatch 1 of 1: the loss or a log-prob is (-inf|inf|nan) on questions .*'huge'.*; this "
        rf"optimizer step is skipped \(training.on_non_finite\); what it was made of is in {folder}",
        told[0],
    )


def test_the_kept_batch_holds_questions_tokens_and_log_probs(tmp_path):
    policy = tiny_policy()
    made = skipping_learner(tmp_path, [], policy)
    made.update([HUGE], np.random.default_rng(0))
    kept = read_state(tmp_path / "non_finite/step_000001_minibatch_1", "batch")
    assert (kept["step"], kept["minibatch"], kept["broken_weights"]) == (1, 1, [])
    assert [row["question_id"] for row in kept["rollouts"]] == ["huge"] * 3
    for row, completion in zip(kept["rollouts"], HUGE.group.completions, strict=True):
        assert row["token_ids"].tolist() == completion.token_ids.tolist()
        assert row["behaviour_logprobs"].tolist() == completion.behaviour_logprobs.tolist()
        assert len(row["logprobs"]) == len(completion.token_ids)
        assert np.isfinite(row["logprobs"]).all()


def test_a_run_that_skips_for_ever_keeps_so_many_batches_and_no_more(tmp_path):
    made = skipping_learner(tmp_path, [])
    for step in range(MAX_KEPT + 2):
        made.update([HUGE], np.random.default_rng(step))
    assert len(list((tmp_path / "non_finite").iterdir())) == MAX_KEPT


def test_a_weight_that_is_nan_stops_the_run_even_where_batches_are_skipped(tmp_path):
    policy = tiny_policy()
    made = skipping_learner(tmp_path, [], policy)
    with torch.no_grad():
        policy.module.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteError) as error:
        made.update(BATCH, np.random.default_rng(0))
    assert "the weights themselves are broken ('model.layers.1.mlp.up_proj.weight')" in str(error.value)
    kept = read_state(tmp_path / "non_finite/step_000001_minibatch_1", "batch")
    assert kept["broken_weights"] == ["model.layers.1.mlp.up_proj.weight"]
    assert np.isnan(kept["rollouts"][0]["logprobs"]).all()


def test_weights_that_overflow_in_the_optimizer_step_are_neither_sampled_from_nor_kept():
    policy = tiny_policy()
    with torch.no_grad():
        policy.module.lm_head.weight = torch.nn.Parameter(policy.module.lm_head.weight.clone())
        policy.module.model.embed_tokens.weight[-1] = 3e38  # of a token that the batch does not have
    made = learner(policy, learning_rate=1.0, weight_decay=3.0)  # the decay makes it -6e38
    with pytest.raises(NonFiniteError) as error:
        made.update(BATCH, np.random.default_rng(0))
    assert str(error.value) == (
        "step 1: 1 parameters are not finite after the update, such as 'model.embed_tokens.weight'; lower "
        "training.learning_rate; checkpoints before it are sound"
    )


def test_a_log_prob_of_minus_infinity_is_seen_though_loss_and_gradient_are_finite():
    policy = tiny_policy()
    whole = credited("a", (0.0, 1.0))
    first, second = (
        replace(item, token_ids=item.token_ids[:1], behaviour_logprobs=item.behaviour_logprobs[:1])
        for item in whole.group.completions
    )
    group = replace(whole, group=replace(whole.group, completions=(first, second)))
    prompt = torch.as_tensor(group.group.prompt_token_ids)[None]
    with torch.no_grad():
        hidden = policy.module.model(input_ids=prompt).last_hidden_state[0, -1]
        policy.module.lm_head.weight[first.token_ids[0]] = hidden / hidden.norm() * -3e38
    assert broken_parameters(policy.module) == ()
    with pytest.raises(NonFiniteError, match="the loss or a log-prob is nan") as error:
        learner(policy).update([group], np.random.default_rng(0))
    assert "weights themselves" not in str(error.value)


def test_a_weight_of_any_kind_that_is_not_finite_is_found():
    policy = tiny_policy()
    assert broken_parameters(policy.module) == ()
    for name, parameter in policy.module.named_parameters():
        for value in (float("nan"), float("inf"), -float("inf")):
            with torch.no_grad():
                kept = parameter.view(-1)[0].clone()
                parameter.view(-1)[0] = value
                assert broken_parameters(policy.module) == (name,)
                parameter.view(-1)[0] = kept


OVERFLOWING_REWARD = """
from typing import Literal
import numpy as np
from dteframe import Reward, RewardConfig, hookimpl

class OverflowingConfig(RewardConfig):
    type: Literal["overflowing"] = "overflowing"

class Overflowing(Reward):
    '''Gives rewards that float32 cannot hold.'''
    config: OverflowingConfig
    def score(self, question, completions):
        return np.array([1e39 * place for place in range(len(completions))])

@hookimpl
def dteframe_components():
    return [Overflowing]
"""
SKIPPING = ("training.on_non_finite=skip", "objective.num_iterations=1", "reward={type: overflowing}")


@pytest.fixture
def plugins(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "overflowing.py").write_text(OVERFLOWING_REWARD)
    return folder


def test_a_run_stops_after_so_many_steps_in_a_row_with_skips_and_resumes_its_count(tmp_path, plugins):
    limit = ("training.max_steps_with_skips=4", "training.checkpoint_every=1")
    with pytest.raises(NonFiniteError) as error:
        run_tiny(tmp_path, *SKIPPING, *limit, plugins=plugins)
    assert str(error.value).startswith(
        "step 5: something that is not finite was skipped in 5 steps in a row "
        "(training.max_steps_with_skips 4)"
    )
    metrics = rows(tmp_path, "metrics")
    assert [row["update/num_skipped_minibatches"] for row in metrics[1:]] == [2] * 5
    with pytest.raises(NonFiniteError, match="^step 5: .* in 5 steps in a row"):
        run_tiny(tmp_path, *SKIPPING, *limit, plugins=plugins, resume=True)


def test_a_run_stops_at_the_first_batch_unless_told_otherwise(tmp_path, plugins):
    with pytest.raises(NonFiniteError, match="^step 1: minibatch 1 of 2: the loss") as error:
        run_tiny(tmp_path, "reward={type: overflowing}", plugins=plugins)
    folder = tmp_path / "runs/tiny/non_finite/step_000001_minibatch_1"
    assert str(folder) in str(error.value)
    assert (folder / "batch.safetensors").is_file()


BROKEN_SAMPLER = """
from typing import Literal
import numpy as np
from dataclasses import replace
from dteframe import hookimpl
from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig

class BrokenSamplerConfig(TransformersRolloutConfig):
    type: Literal["broken_sampler"] = "broken_sampler"
    every: int = 5

class BrokenSampler(TransformersRollout):
    '''Samples well, but gives no log-probs of some questions.'''
    config: BrokenSamplerConfig
    def generate(self, prompts, num_generations, sampling, seeds):
        for place, completions in super().generate(prompts, num_generations, sampling, seeds):
            if seeds[place] % self.config.every == 0:
                first = completions[0]
                broken = replace(first, behaviour_logprobs=np.full(len(first.token_ids), -np.inf))
                completions = [broken, *completions[1:]]
            yield place, completions

@hookimpl
def dteframe_components():
    return [BrokenSampler]
"""


@pytest.fixture
def samplers(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "broken_sampler.py").write_text(BROKEN_SAMPLER)
    return folder


SAMPLER = ("rollout.type=broken_sampler", "training.max_steps_with_skips=100")


def test_groups_whose_sampler_gave_no_log_probs_are_left_out_counted_and_kept(tmp_path, samplers):
    summary = run_tiny(tmp_path, *SAMPLER, "training.on_non_finite=skip", plugins=samplers)
    assert summary.steps == 6
    num_groups = [row["health/num_non_finite_groups"] for row in rows(tmp_path, "metrics")]
    assert sum(num_groups) > 0
    kept = [read_state(path, "batch") for path in sorted((tmp_path / "runs/tiny/non_finite").iterdir())]
    assert sum(len(item["rollouts"]) for item in kept) == sum(
        count * (2 if item["purpose"] == "evaluation" else 4)
        for item, count in ((item, len({row["question_id"] for row in item["rollouts"]})) for item in kept)
    )
    warned = [warning for warning in summary.warnings if "the sampler gave log-probs" in warning]
    assert len(warned) == len(kept)
    assert "these are left out (training.on_non_finite); what it was made of is in" in warned[0]


def test_a_sampler_that_gives_no_log_probs_stops_the_run_unless_told_otherwise(tmp_path, samplers):
    with pytest.raises(NonFiniteError, match=r"^step \d: the sampler gave log-probs that are not") as error:
        run_tiny(tmp_path, *SAMPLER, plugins=samplers)
    (folder,) = (tmp_path / "runs/tiny/non_finite").iterdir()
    assert f"what it was made of is in {folder}" in str(error.value)


def test_a_sampler_that_gives_none_at_all_stops_the_run_even_so(tmp_path, samplers):
    with pytest.raises(NonFiniteError, match="in 6 of 6 groups asked for evaluation"):
        run_tiny(tmp_path, *SAMPLER, "rollout.every=1", "training.on_non_finite=skip", plugins=samplers)
