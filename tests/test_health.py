"""Health warnings: when each begins, when it is over, and what it says."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from tiny_run import run_tiny

from dteframe.engine.health import Health
from dteframe.recipe.health_config import HealthConfig
from dteframe.reports import StageReport, StepReport


@dataclass(frozen=True, slots=True)
class Figures(StageReport):
    stage: ClassVar[str] = ""
    figures: dict[str, float]

    def metrics(self):
        return self.figures


def told(steps, health=None, first_step=1, **limits):
    """Let health look at one mapping of figures a step; give what it says."""
    health = health or Health()
    config = HealthConfig(**limits)
    return [
        message
        for number, figures in enumerate(steps, start=first_step)
        for message in health.look_at(StepReport(number, 100, (Figures(figures),)), config)
    ]


def series(name, values, **others):
    return [{name: value, **others} for value in values]


def test_entropy_far_below_the_first_steps_is_told_with_both_numbers():
    messages = told(series("update/entropy_nats", [0.5] * 10 + [0.02] * 5))
    assert messages == [
        "step 15: entropy has collapsed: 0.02 nats over 5 steps, 0.5 over the first 10, and 0.1 of that is "
        "the limit (training.health.entropy_fraction); the policy hardly varies its answers any more: lower "
        "training.learning_rate, or raise objective.epsilon_high or rollout.temperature"
    ]


def test_a_sign_that_stays_is_told_once_and_one_that_returns_is_told_again():
    low, high = [0.02] * 5, [0.5] * 10
    messages = told(series("update/entropy_nats", high + low + low + high + low))
    assert [message.split(":")[0] for message in messages] == ["step 15", "step 35"]


@pytest.mark.parametrize(("num_steps_above", "num_told"), [(4, 1), (5, 2)])
def test_fewer_than_five_steps_without_a_sign_are_no_recovery(num_steps_above, num_told):
    high, low = series("evaluation/success_rate", [0.5, 0.0], **{"evaluation/num_questions": 64})
    assert len(told([high, low, *[high] * num_steps_above, low])) == num_told


@pytest.mark.parametrize(("fall", "is_told"), [(0.29, True), (0.31, False)])
def test_a_success_rate_below_half_of_its_best_is_told(fall, is_told):
    steps = series("answer/success_rate", [0.6] * 10 + [fall] * 10, **{"answer/num_groups": 32})
    messages = told(steps)
    assert bool(messages) == is_told
    if is_told:
        assert messages[0].startswith(
            "step 20: the success rate has collapsed: that of training over 10 steps is 0.29, its best was "
            "0.6, and 0.5 of that is the limit (training.health.success_fraction)"
        )


@pytest.mark.parametrize(("num_groups", "is_told"), [(1, False), (2, True)])
def test_a_fall_within_three_standard_errors_is_chance(num_groups, is_told):
    # From 0.5 to 0.1; 3 x sqrt((0.25 + 0.09) / 10) = 0.55 and 3 x sqrt((0.25 + 0.09) / 20) = 0.39.
    steps = series("answer/success_rate", [0.5] * 10 + [0.1] * 10, **{"answer/num_groups": num_groups})
    assert bool(told(steps)) == is_told


def test_one_evaluation_is_enough_for_its_own_collapse():
    (message,) = told(series("evaluation/success_rate", [0.4, 0.5, 0.1], **{"evaluation/num_questions": 64}))
    assert "that of the evaluation is 0.1, its best was 0.5" in message


def test_steps_without_an_evaluation_do_not_end_its_collapse_nor_repeat_it():
    first, last = series("evaluation/success_rate", [0.5, 0.1], **{"evaluation/num_questions": 64})
    assert len(told([first, last, *[{}] * 9, last])) == 1


@pytest.mark.parametrize(
    ("whose", "advice"), [("fresh", "sampler and trainer differ"), ("replayed", "are too old")]
)
def test_uneven_importance_weights_are_told_of_fresh_and_of_replayed_tokens(whose, advice):
    name = f"update/{whose}_effective_sample_fraction"
    assert told(series(name, [0.3] * 5)) == []
    (message,) = told(series(name, [0.9, 0.1, 0.1, 0.1, 0.1]))
    assert message.startswith(
        f"step 5: importance weights are uneven: of the {whose} tokens of 5 steps a share"
    )
    assert advice in message


def test_a_sudden_growth_of_completions_is_told_and_a_slow_one_is_not():
    name = "answer/completion_length_mean_tokens"
    (message,) = told(series(name, [100.0] * 20 + [201.0] * 5))
    assert message.startswith("step 25: completions explode: 201 tokens over 5 steps, 100 over the 20 before")
    assert told(series(name, [100 * 1.02**step for step in range(100)])) == []


def test_completions_that_are_nearly_all_cut_are_told():
    length = {"answer/completion_length_mean_tokens": 16.0}
    assert told(series("answer/truncated_fraction", [0.89] * 9, **length)) == []
    (message,) = told(series("answer/truncated_fraction", [0.9] * 9, **length))
    assert message.startswith("step 5: nearly all completions are cut: 0.9 of those of 5 steps")


def test_steps_without_any_signal_are_told_after_there_was_one():
    others = {"answer/completion_length_mean_tokens": 16.0}
    (message,) = told(series("answer/equal_reward_fraction", [0.9] + [1.0] * 5, **others))
    assert message.startswith("step 4: in 3 steps in a row the rewards of every group are all equal")
    assert told(series("answer/equal_reward_fraction", [0.9, 1.0, 1.0, 0.9, 1.0], **others)) == []
    assert told(series("answer/equal_reward_fraction", [1.0] * 9, **others)) == []


def test_a_jump_of_the_gradient_norm_is_held_against_the_median_before():
    step = {"update/num_optimizer_steps": 1}
    calm = series("update/gradient_norm", [1.0, 2.0, 3.0, 2.0, 2.0] * 2, **step)
    assert told([*calm, {"update/gradient_norm": 20.0, **step}]) == []
    (message,) = told([*calm, {"update/gradient_norm": 20.1, **step}])
    assert message.startswith(
        "step 11: the gradient norm jumps: 20.1, where the median of 10 steps before is 2"
    )


def test_steps_without_an_optimizer_step_are_no_gradients_of_norm_0():
    step, none = {"update/num_optimizer_steps": 1}, {"update/num_optimizer_steps": 0}
    steps = series("update/gradient_norm", [0.0] * 20, **none) + series("update/gradient_norm", [1.0], **step)
    assert told(steps) == []


def test_figures_that_are_not_finite_are_left_out_of_the_averages():
    values = [0.5] * 10 + [float("nan")] * 3 + [0.02] * 5
    (message,) = told(series("update/entropy_nats", values))
    assert message.startswith("step 18: entropy has collapsed: 0.02 nats")


def test_null_turns_a_warning_off():
    assert told(series("update/entropy_nats", [0.5] * 10 + [0.02] * 9), entropy_fraction=None) == []


@pytest.mark.parametrize("stop", range(1, 27))
def test_health_that_is_stopped_and_resumed_says_what_it_would_have_said(stop):
    steps = [
        {
            "update/entropy_nats": 0.5 if step < 12 else 0.01,
            "evaluation/success_rate": 0.5 if step < 7 else 0.1,
        }
        for step in range(27)
    ]
    first = Health()
    early = told(steps[:stop], first)
    resumed = Health.from_state(json.loads(json.dumps(first.state_dict())))
    assert early + told(steps[stop:], resumed, first_step=stop + 1) == told(steps)


def test_a_run_warns_at_the_step_and_resumed_it_warns_the_same(tmp_path):
    never_ends = ("training.max_steps=6", "training.health.truncated_fraction=0.001")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run_tiny(tmp_path / "whole", *never_ends)
    run_tiny(tmp_path / "parts", *never_ends, "training.max_steps=2")
    resumed = run_tiny(tmp_path / "parts", *never_ends, resume=True)
    assert [warning.partition(":")[0] for warning in whole.warnings] == ["step 5"]
    assert resumed.warnings == whole.warnings
