"""The canary: what a difference between sampler and trainer looks like, worked out by hand."""

import math

import numpy as np
import pytest
from tiny_run import rows, run_tiny

from dteframe import Prompt
from dteframe.engine.canary import (
    BOUND_NATS,
    Scores,
    agree,
    begun_otherwise,
    best_temperature,
    is_repeated,
    likely_cause,
    looks_like_rounding,
)

BOUND = 1e-3
TRAINER = np.log([0.5, 0.25, 0.5, 0.125])


def scores(sampler, trainer=TRAINER, token_ids=(1, 2, 3, 4)):
    return Scores(token_ids, np.asarray(sampler, dtype=np.float64), np.asarray(trainer, dtype=np.float64))


def two_tokens(temperature):
    """Log-probs of the likelier and of the less likely of two tokens whose logits are 1 and 0."""
    normaliser = math.log1p(math.exp(-1 / temperature))
    return np.array([-normaliser, -1 / temperature - normaliser])


def unexplained(temperature):
    """A trainer whose log-probs no temperature brings nearer."""
    return TRAINER


def cause(now, last=None, score_at=unexplained, uncached_nats=math.inf, bound=BOUND):
    return likely_cause(now, last, bound, 1.0, score_at, lambda: uncached_nats).split(";")[0]


def test_differences_are_averaged_over_tokens():
    now = scores(TRAINER + [0.1, -0.3, 0.0, 0.2])
    assert now.mean_nats == pytest.approx(0.15)
    assert now.max_nats == pytest.approx(0.3)
    assert now.bias_nats == pytest.approx(0.0)


def test_answers_repeated_to_the_last_bit_are_stale_once_the_trainer_has_moved():
    last = scores(TRAINER)
    assert is_repeated(scores(TRAINER, TRAINER + 0.00011), last, BOUND)
    assert not is_repeated(scores(TRAINER, TRAINER + 0.00009), last, BOUND)
    assert not is_repeated(scores(TRAINER + 1e-7, TRAINER + 0.00011), last, BOUND)
    assert not is_repeated(scores(TRAINER, TRAINER + 0.00011, (1, 2, 3, 5)), last, BOUND)


def test_sampler_and_trainer_agree_up_to_the_bound_unless_the_sampler_is_stale():
    assert agree(scores(TRAINER + 0.0009), None, BOUND)
    assert not agree(scores(TRAINER + 0.0011), None, BOUND)
    assert not agree(scores(TRAINER, TRAINER + 0.0005), scores(TRAINER), BOUND)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_trainer_whose_log_probs_are_not_finite_agrees_with_nothing_and_is_named(broken):
    now = scores(TRAINER, np.array([broken, -1.0, -1.0, -1.0]))
    assert not agree(now, scores(TRAINER), BOUND)
    assert cause(now) == "the trainer's are not finite: its weights are broken"


def test_another_temperature_is_found():
    found = best_temperature(two_tokens, two_tokens(0.7), temperature=1.0)
    assert found == pytest.approx(0.7, rel=1e-3)


def test_the_temperature_is_kept_where_no_other_is_nearer():
    assert best_temperature(two_tokens, two_tokens(1.3), temperature=1.3) == pytest.approx(1.3, rel=1e-9)


def test_repeated_answers_are_called_stale_before_anything_else_is_tried():
    now, last = scores(TRAINER, TRAINER + 0.5), scores(TRAINER)
    assert cause(now, last, score_at=lambda temperature: now.sampler) == (
        "it looks like stale weights: the sampler's answers are those of the canary before, the trainer's "
        "weights are not"
    )


def test_another_temperature_is_named_with_the_recipes():
    now = scores(two_tokens(0.7), two_tokens(1.0), (1, 0))
    assert cause(now, score_at=two_tokens) == (
        "it looks like temperature: the sampler's log-probs are those of temperature 0.7, the recipe's is 1"
    )


def test_a_difference_that_fresh_prompts_do_not_show_is_the_prefix_caches():
    now = scores(TRAINER + [0.4, -0.4, 0.0, 0.0])
    assert cause(now, uncached_nats=1e-6) == (
        "it looks like stale weights in the prefix cache: prompts that were never asked before show no "
        "difference"
    )


def test_a_small_difference_in_both_directions_is_precision():
    now = scores(TRAINER + [0.02, -0.01, -0.02, 0.01])
    assert cause(now) == "it looks like precision: the difference is small and goes both ways"
    assert looks_like_rounding(now, last=None)


def test_a_one_sided_a_large_or_a_sudden_difference_is_no_rounding():
    small = scores(TRAINER + [0.02, -0.01, -0.02, 0.01])
    assert looks_like_rounding(small, last=scores(TRAINER + [0.004, -0.004, 0.004, -0.004]))
    assert not looks_like_rounding(small, last=scores(TRAINER + [1e-6, -1e-6, 1e-6, -1e-6]))
    assert not looks_like_rounding(scores(TRAINER + [0.02, 0.01, 0.02, 0.01]), last=None)
    assert not looks_like_rounding(scores(TRAINER + [0.4, -0.4, 0.4, -0.4]), last=None)


def test_what_nothing_explains_is_called_weights_that_are_partly_stale():
    now = scores(TRAINER + [0.9, -0.4, 0.7, 0.2])
    assert cause(now) == "it looks like stale weights: no other temperature explains it"


def test_a_prompt_that_no_cache_can_hold_begins_with_another_token():
    prompt = Prompt("q", np.array([7, 8, 9]))
    assert begun_otherwise(prompt, (7, 7, 5, 6)).token_ids.tolist() == [5, 8, 9]
    assert begun_otherwise(prompt, (7,)).token_ids.tolist() == [7, 8, 9]


def test_every_type_that_a_model_can_have_has_a_bound():
    assert sorted(BOUND_NATS) == ["bfloat16", "float32"]


def test_a_rollout_that_shares_the_module_can_have_a_canary_too(tmp_path):
    rollout = "rollout={type: transformers, max_completion_length: 16, canary_every: 2}"
    run_tiny(tmp_path, "training.max_steps=4", "model.warm_up.steps=0", rollout)
    metrics = rows(tmp_path, "metrics")
    watched = [row["step"] for row in metrics if "canary/num_tokens" in row]
    assert watched == [0, 2, 4]
    assert max(row.get("canary/logprob_difference_max_nats", 0.0) for row in metrics) < 1e-5
