"""What `dteframe plan` says, in numbers worked out by hand."""

import dataclasses
from pathlib import Path

import pytest

from dteframe.plan_text import plan_text, workload
from dteframe.recipe import load_recipe
from dteframe.registry import Registry, load_registry

# The published schedule in small: B = 16, G = 4, mu = 2, delta = 1/2, K = 8 = mu B / 4, 6 steps.
RECIPE = """
name: small
training:
  max_steps: 6
  questions_per_step: 16
  num_generations: 4
  selection_interval: 2
  fresh_fraction: 0.5
  evaluate_every: 4
  evaluation_size: 10
  num_generations_eval: 2
  max_prompt_length: 20
model: {type: from_scratch}
dataset: {type: list_operations, size: 200}
reward: {type: exact_match}
estimator: {type: attention, reference_size: 8}
selector: {type: difficulty_target}
replay: {type: fifo, capacity: 16}
rollout: {type: transformers, max_completion_length: 30}
objective: {type: grpo, num_minibatches: 2, num_iterations: 3}
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(plugin_paths=[])


@pytest.fixture
def counted(registry, tmp_path):
    def count(*overrides: str):
        path = tmp_path / "small.yaml"
        path.write_text(RECIPE)
        return workload(load_recipe(path, overrides, registry).recipe)

    return count


def test_a_step_learns_from_all_of_its_groups(counted):
    work = counted()
    assert work.completions_per_step == 16 * 4
    assert (work.num_fresh, work.num_replayed) == (8, 8)
    assert work.optimizer_steps_per_step == 2 * 3
    assert work.generated_tokens_per_step_at_most == 64 * 30
    assert work.forward_tokens_per_step_at_most == 64 * (20 + 30) * 3


def test_references_are_a_third_of_all_rollouts_at_the_published_ratio(counted):
    """method.md 9.5: 0.5 + K / (mu B) = 0.5 + 0.25 of plain GRPO's rollouts, and one third are references."""
    work = counted()
    assert work.rollout_work == 0.75
    assert work.reference_share_without_reuse == pytest.approx(1 / 3)
    assert work.reference_rollouts_per_plan == 8 * 4


def test_reuse_saves_at_most_the_references_that_the_first_step_holds(counted):
    assert counted().rollout_work_at_least == 0.5
    assert counted("estimator.reference_size=12").rollout_work == pytest.approx(0.5 + 12 / 32)
    assert counted("estimator.reference_size=12").rollout_work_at_least == pytest.approx(0.5 + 4 / 32)
    assert counted("training.reuse_references=false").rollout_work_at_least == 0.75


def test_three_plans_of_two_steps_in_all(counted):
    work = counted()
    assert work.num_plans == 3
    assert work.total_optimizer_steps == 36
    assert work.total_reference_rollouts == 3 * 32
    assert work.total_replayed_groups_at_most == 4 * 8
    assert work.total_fresh_rollouts_at_most == 6 * 64
    # Plan 1 asks 32 questions, plans 2 and 3 ask 16 each; each can reuse its 8 references.
    assert work.total_fresh_rollouts_at_least == (32 - 8 + 16 - 8 + 16 - 8) * 4


def test_evaluations_stand_at_the_start_every_n_steps_and_at_the_end(counted):
    assert counted().evaluations == 3  # steps 0, 4 and 6
    assert counted("training.evaluate_every=3").evaluations == 3  # 0, 3 and 6
    assert counted("training.evaluate_every=0").evaluations == 0
    assert counted().total_evaluation_rollouts_at_most == 3 * 10 * 2


def test_tokens_at_most_count_every_rollout(counted):
    work = counted()
    rollouts = 6 * 64 + 3 * 32 + 3 * 20
    assert work.generated_tokens_at_most == rollouts * 30
    assert work.tokens_at_most == rollouts * 50


def test_an_unfinished_plan_still_rolls_out_its_references(counted):
    work = counted("training.max_steps=5")
    assert (work.num_plans, work.total_reference_rollouts) == (3, 96)


def test_plain_grpo_is_the_unit_of_rollout_work(counted):
    plain = counted(
        "estimator.type=none", "selector.type=uniform", "replay.type=none", "training.fresh_fraction=1"
    )
    assert (plain.rollout_work, plain.rollout_work_at_least) == (1.0, 1.0)
    assert plain.total_fresh_rollouts_at_least == plain.total_fresh_rollouts_at_most


def test_a_selector_that_reviews_asks_more_than_a_step_learns_from(counted):
    work = counted(
        "estimator.type=none",
        "selector={type: dynamic_sampling, oversampling: 1.5, max_rounds: 4}",
        "replay.type=none",
        "training.fresh_fraction=1",
    )
    assert (work.asked_at_first, work.asked_at_most) == (24, 96)  # 16 x 1.5; 4 rounds of 24
    assert work.rollout_work == 1.5
    assert work.generated_tokens_per_step_at_most == 96 * 4 * 30
    assert (work.total_fresh_rollouts_at_least, work.total_fresh_rollouts_at_most) == (6 * 24 * 4, 6 * 96 * 4)
    told = "24 questions at first, 96 if every round does: the selector reviews what comes back"
    assert f"  asks                  {told}" in plan_text(work).splitlines()


def test_the_text_explains_every_section(counted):
    assert (
        plan_text(counted())
        == """\
small: 6 steps, 3 plans
a step
  learns from           16 questions x 4 = 64 completions
  of these              8 fresh and 8 replayed groups once the buffer holds enough; until then all fresh
  updates               2 minibatches x 3 iterations = 6 optimizer steps
  generates at most     1,920 tokens (30 a completion)
  trains on at most     9,600 tokens (prompts of 20 included)
a plan (2 steps)
  selects at most       32 questions, all different
  references            8 questions x 4 = 32 rollouts, 33% of all rollouts for training if none is reused
  fresh                 64 rollouts once replay runs
  selection can pay     while at most 69% of uniformly drawn groups are informative
an evaluation
  asks at most          10 questions x 2 = 20 rollouts
in all
  optimizer steps       36
  fresh                 160 to 384 rollouts
  references            96 rollouts
  replayed at most      32 groups
  evaluations           3 evaluations, at most 60 rollouts
  generates at most     16,200 tokens
  with prompts          at most 27,000 tokens
rollouts relative to plain GRPO
  generates             fresh share 0.50 + references 0.25 = 0.75 once replay runs
  reuse of references   saves 0.25 at most, so 0.50 at least"""
    )


def test_the_text_says_when_there_is_nothing(counted):
    text = plan_text(counted("training.evaluate_every=0", "training.reuse_references=false"))
    assert "  evaluations           none" in text
    assert "  reuse of references   off: every reference rollout is paid on top" in text
    assert "an evaluation\n" not in text


def test_the_counts_agree_with_one_another(counted):
    for overrides in (
        [],
        ["training.max_steps=1"],
        ["training.selection_interval=5"],
        ["replay.type=none", "training.fresh_fraction=1"],
    ):
        work = counted(*overrides)
        assert work.num_fresh + work.num_replayed == work.questions_per_step
        assert 0 <= work.total_fresh_rollouts_at_least <= work.total_fresh_rollouts_at_most
        assert work.rollout_work_at_least <= work.rollout_work
        assert all(value >= 0 for value in dataclasses.asdict(work).values() if not isinstance(value, str))


def test_recipes_of_the_project_can_be_explained(registry):
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")):
        work = workload(load_recipe(path, [], registry).recipe)
        assert plan_text(work).startswith(f"{work.name}: ")
