"""Uniform epochs, and Gumbel top-k against exact chances of drawing without replacement."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dteframe import Context, SuccessEstimate
from dteframe.engine.choose import Uses, choose
from dteframe.records import BatchArithmetic
from dteframe.selectors.difficulty_target import DifficultyTargetConfig, DifficultyTargetSelector
from dteframe.selectors.gumbel import gumbel_top_k
from dteframe.selectors.informative_probability import (
    InformativeProbabilityConfig,
    InformativeProbabilitySelector,
)
from dteframe.selectors.thompson_target import ThompsonTargetConfig, ThompsonTargetSelector
from dteframe.selectors.uniform import UniformConfig, UniformSelector

CONTEXT = Context(Path("unused"), Path("unused"), "cpu", 0, lambda *_: None, lambda _: None)


def estimate_of(mean) -> SuccessEstimate:
    mean = np.asarray(mean, np.float64)
    return SuccessEstimate(
        tuple(f"q{index:05d}" for index in range(len(mean))), mean, np.full(len(mean), 8.0)
    )


def pool_of(*names: str) -> SuccessEstimate:
    return SuccessEstimate(names, np.full(len(names), 0.5), np.zeros(len(names)))


def uniform() -> UniformSelector:
    return UniformSelector(UniformConfig(), CONTEXT)


def targeting(success_rate: float = 0.5, temperature: float = 1e-3) -> DifficultyTargetSelector:
    config = DifficultyTargetConfig(target_success_rate=success_rate, temperature=temperature)
    return DifficultyTargetSelector(config, CONTEXT)


def exact_chance_of_sequence(weights: np.ndarray, sequence: tuple[int, ...]) -> float:
    left, chance = weights.sum(), 1.0
    for item in sequence:
        chance *= weights[item] / left
        left -= weights[item]
    return chance


def test_gumbel_top_k_draws_sequences_as_often_as_successive_sampling_does():
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    rng = np.random.default_rng(0)
    num_draws = 20_000
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for _ in range(num_draws):
        counts[tuple(gumbel_top_k(np.log(weights), 2, rng).tolist())] += 1
    assert exact_chance_of_sequence(weights, (0, 1)) == 0.25  # 4/8 * 2/4
    chi_square = sum(
        (count - num_draws * exact_chance_of_sequence(weights, sequence)) ** 2
        / (num_draws * exact_chance_of_sequence(weights, sequence))
        for sequence, count in counts.items()
    )
    assert chi_square < 31.3  # 11 degrees of freedom, chance 0.001


def test_gumbel_top_k_ignores_a_constant_added_to_the_log_weights():
    log_weights = np.random.default_rng(1).normal(size=50)
    first = gumbel_top_k(log_weights, 10, np.random.default_rng(2))
    assert first.tolist() == gumbel_top_k(log_weights - 64.0, 10, np.random.default_rng(2)).tolist()


class ConstantNoise:
    """Stands in for the generator where keys have to be equal."""

    def gumbel(self, size: int) -> np.ndarray:
        return np.zeros(size)


def test_equal_keys_are_decided_by_position():
    chosen = gumbel_top_k(np.array([0.0, 1.0, 0.0, 1.0, 0.0]), 3, ConstantNoise())
    assert chosen.tolist() == [1, 3, 0]


def test_no_question_outside_the_order_is_drawn_where_a_float32_softmax_underflows():
    mean = np.linspace(0.0, 1.0, 10_001)
    log_weights = (-np.abs(mean - 0.5) / 1e-6).astype(np.float32)
    assert (np.exp(log_weights - log_weights.max()) > 0).sum() < 10  # what the released code draws from
    selection = targeting(temperature=1e-6).select(estimate_of(mean), 5_000, np.random.default_rng(0))
    distances = np.sort(np.abs(mean[[int(name[1:]) for name in selection.question_ids]] - 0.5))
    # Gumbel noise over 10,001 draws spans less than 30, that is 3e-5 of success rate: less than a place.
    np.testing.assert_allclose(distances, np.sort(np.abs(mean - 0.5))[:5_000], atol=1.1e-4)
    assert len(set(selection.question_ids)) == 5_000


def test_target_success_rate_is_a_success_rate_and_no_failure_rate():
    estimate = estimate_of(np.repeat([0.25, 0.5, 0.75], 10))
    selection = targeting(0.25).select(estimate, 10, np.random.default_rng(0))
    assert {int(name[1:]) < 10 for name in selection.question_ids} == {True}


def test_selection_does_not_depend_on_the_order_of_the_estimate():
    rng = np.random.default_rng(3)
    estimate = estimate_of(rng.random(100))
    order = rng.permutation(100)
    shuffled = SuccessEstimate(
        tuple(estimate.question_ids[index] for index in order), estimate.mean[order], estimate.evidence[order]
    )
    first = targeting(temperature=0.1).select(estimate, 30, np.random.default_rng(4))
    assert first == targeting(temperature=0.1).select(shuffled, 30, np.random.default_rng(4))
    assert uniform().select(estimate, 30, np.random.default_rng(4)) == uniform().select(
        shuffled, 30, np.random.default_rng(4)
    )


def test_chosen_questions_are_asked_in_random_order_not_nearest_first():
    mean = np.linspace(0.4, 0.6, 400)
    selection = targeting(temperature=1e-4).select(estimate_of(mean), 200, np.random.default_rng(0))
    distances = np.abs(mean[[int(name[1:]) for name in selection.question_ids]] - 0.5)
    assert abs(np.corrcoef(distances, np.arange(200))[0, 1]) < 0.25


def test_more_questions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="^gumbel top-k: asked for 4 of 3 questions; ask for fewer$"):
        targeting().select(estimate_of([0.1, 0.2, 0.3]), 4, np.random.default_rng(0))
    with pytest.raises(
        ValueError, match="^uniform: asked for 4 of 3 questions; at most all of them can be given$"
    ):
        uniform().select(estimate_of([0.1, 0.2, 0.3]), 4, np.random.default_rng(0))


def test_an_estimate_that_is_no_number_is_an_error_that_names_the_question():
    with pytest.raises(
        ValueError, match="^difficulty_target: the estimate of question 'q00001' is not a finite number$"
    ):
        targeting().select(estimate_of([0.1, np.nan, 0.3]), 1, np.random.default_rng(0))


@given(count=st.integers(1, 12), num_questions=st.integers(12, 30), seed=st.integers(0, 1000))
def test_every_question_is_asked_once_per_epoch(count, num_questions, seed):
    selector, rng = uniform(), np.random.default_rng(seed)
    estimate = estimate_of(np.full(num_questions, 0.5))
    asked = []
    for _ in range(10):
        chosen = selector.select(estimate, count, rng).question_ids
        assert len(set(chosen)) == count
        asked += chosen
    for begin in range(0, len(asked), num_questions):
        epoch = asked[begin : begin + num_questions]
        assert len(set(epoch)) == len(epoch)


def test_uniform_starts_with_any_question_equally_often():
    rng, counts = np.random.default_rng(0), dict.fromkeys("abc", 0)
    for _ in range(3000):
        counts[uniform().select(pool_of("a", "b", "c"), 1, rng).question_ids[0]] += 1
    assert all(abs(count - 1000) < 120 for count in counts.values())


def test_a_question_left_out_for_a_while_keeps_its_turn_in_the_epoch():
    selector, rng = uniform(), np.random.default_rng(0)
    assert set(selector.select(pool_of("a", "b"), 2, rng).question_ids) == {"a", "b"}
    assert set(selector.select(pool_of("a", "c"), 1, rng).question_ids) == {"c"}
    assert set(selector.select(pool_of("a", "b", "c", "d"), 1, rng).question_ids) == {"d"}


def test_an_epoch_ends_when_only_asked_questions_may_be_asked():
    selector, rng = uniform(), np.random.default_rng(0)
    selector.select(pool_of("a", "b"), 2, rng)
    assert set(selector.select(pool_of("a", "b"), 2, rng).question_ids) == {"a", "b"}


def test_uniform_goes_on_with_its_epoch_after_a_checkpoint():
    pool = estimate_of(np.full(10, 0.5))
    selector, rng = uniform(), np.random.default_rng(0)
    first = selector.select(pool, 6, rng).question_ids
    resumed = uniform()
    resumed.load_state_dict(selector.state_dict())
    assert set(resumed.select(pool, 4, np.random.default_rng(7)).question_ids).isdisjoint(first)
    assert resumed.state_dict()["asked"] == sorted(pool.question_ids)


# informative_probability


def informative(num_generations: int = 8, temperature: float = 1e-6) -> InformativeProbabilitySelector:
    selector = InformativeProbabilitySelector(InformativeProbabilityConfig(temperature=temperature), CONTEXT)
    selector.start(BatchArithmetic(4, 2, num_generations, 1, 0, 0, 16, 16))
    return selector


def test_the_likeliest_to_be_mixed_are_chosen_whatever_their_means():
    # Chances at 8 rollouts: Beta(1, 1) 7/9 = 0.78; 1/2 for sure 0.99; Beta(1, 7) 0.5; 1/8 for sure 0.66
    mean, evidence = np.array([0.5, 0.5, 0.125, 0.125]), np.array([2.0, 1e6, 8.0, 1e6])
    estimate = SuccessEstimate(("no_idea", "surely_half", "perhaps_hard", "surely_hard"), mean, evidence)
    rng = np.random.default_rng(0)
    assert set(informative().select(estimate, 2, rng).question_ids) == {"no_idea", "surely_half"}
    assert set(informative().select(estimate, 3, rng).question_ids) == {
        "no_idea", "surely_half", "surely_hard"
    }  # fmt: skip  # one line says it


def test_a_soft_choice_is_that_of_the_chances():
    mean, evidence = np.array([0.5, 1.0]), np.array([1e9, 1e9])  # chances 0.5 and 0 at 2 rollouts
    estimate = SuccessEstimate(("half", "easy"), mean, evidence)
    selector = informative(num_generations=2, temperature=0.5)
    rng = np.random.default_rng(0)
    share = np.mean([selector.select(estimate, 1, rng).question_ids == ("half",) for _ in range(4000)])
    assert share == pytest.approx(np.e / (np.e + 1), abs=0.025)  # exp(0.5 / 0.5) to exp(0)


# thompson_target


def test_draws_near_the_target_are_chosen_and_unknown_questions_get_their_chance():
    mean, evidence = np.array([0.5] * 10 + [0.9] * 10), np.array([0.0] * 10 + [1e6] * 10)
    names = tuple(f"q{index:02d}" for index in range(20))
    selector = ThompsonTargetSelector(ThompsonTargetConfig(target_success_rate=0.9), CONTEXT)
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(names, 0)
    for _ in range(200):
        chosen = selector.select(SuccessEstimate(names, mean, evidence), 10, rng).question_ids
        assert len(set(chosen)) == 10
        for name in chosen:
            counts[name] += 1
    assert min(counts[name] for name in names[10:]) > 190  # surely 0.9: only a luckier draw takes their place
    assert 0 < sum(counts[name] for name in names[:10]) < 50


# Rest, limit of uses, coverage


def test_without_rules_the_selector_alone_decides():
    estimate = estimate_of(np.linspace(0, 1, 30))
    alone = targeting().select(estimate, 5, np.random.default_rng(3))
    choice = choose(targeting(), estimate, 5, 1, Uses(), 8, np.random.default_rng(3))
    assert choice.question_ids == alone.question_ids
    assert choice.figures == {}


def test_chosen_questions_rest_for_the_cooldown():
    selector = DifficultyTargetSelector(DifficultyTargetConfig(cooldown=2), CONTEXT)
    estimate, uses, rng = estimate_of([0.5, 0.5, 0.1, 0.1, 0.0, 0.0]), Uses(), np.random.default_rng(0)
    chosen = [set(choose(selector, estimate, 2, step, uses, 8, rng).question_ids) for step in (1, 2, 3)]
    assert chosen == [{"q00000", "q00001"}, {"q00002", "q00003"}, {"q00000", "q00001"}]


def test_questions_are_used_up_and_brought_back_only_where_too_few_are_left():
    selector = DifficultyTargetSelector(DifficultyTargetConfig(max_uses=1, cooldown=2), CONTEXT)
    estimate, uses, rng = estimate_of([0.5, 0.4, 0.1, 0.0]), Uses(), np.random.default_rng(0)
    assert set(choose(selector, estimate, 2, 1, uses, 8, rng).question_ids) == {"q00000", "q00001"}
    second = choose(selector, estimate, 3, 2, uses, 8, rng)
    assert {"q00002", "q00003"} < set(second.question_ids)
    assert second.figures == {"brought_back_questions": 1.0, "coverage_questions": 0.0}


def test_a_share_of_the_choice_is_uniform_over_the_rest():
    selector = DifficultyTargetSelector(DifficultyTargetConfig(coverage_fraction=0.25), CONTEXT)
    estimate = estimate_of([0.5] * 6 + [0.0] * 94)
    choice = choose(selector, estimate, 8, 1, Uses(), 8, np.random.default_rng(0))
    assert len(set(choice.question_ids)) == 8
    assert choice.figures == {"brought_back_questions": 0.0, "coverage_questions": 2.0}
    assert {f"q0000{index}" for index in range(6)} <= set(choice.question_ids)


def test_a_share_of_less_than_a_question_is_drawn_now_and_then():
    selector = DifficultyTargetSelector(DifficultyTargetConfig(coverage_fraction=0.02), CONTEXT)
    estimate, rng = estimate_of([0.5] * 20 + [0.0] * 80), np.random.default_rng(0)
    covered = [len(choose(selector, estimate, 16, 1, Uses(), 8, rng).covered) for _ in range(1000)]
    assert set(covered) == {0, 1}
    assert sum(covered) == pytest.approx(0.32 * 1000, rel=0.15)  # three standard errors are 0.14


def choice_with_least_gain(rates, evidence, seed=0):
    """Choose 4 questions, if at least 1.25 times as many informative groups are expected of them."""
    names = tuple(f"q{index:05d}" for index in range(len(rates)))
    estimate = SuccessEstimate(names, np.asarray(rates, float), np.full(len(rates), float(evidence)))
    selector = DifficultyTargetSelector(DifficultyTargetConfig(least_gain=1.25), CONTEXT)
    return choose(selector, estimate, 4, 1, Uses(), 8, np.random.default_rng(seed))


def test_where_little_is_expected_of_a_choice_all_questions_are_drawn_uniformly():
    few_hopeless = [0.5] * 90 + [0.0] * 10
    choice = choice_with_least_gain(few_hopeless, 1e6)
    assert choice.expected_gain == pytest.approx(100 / 90, rel=1e-3)
    assert choice.covered == frozenset(choice.question_ids)
    assert choice.figures == {"brought_back_questions": 0.0, "coverage_questions": 4.0}
    choices = [choice_with_least_gain(few_hopeless, 1e6, seed) for seed in range(50)]
    drawn = {name for choice in choices for name in choice.question_ids}
    assert len(drawn) > 80 and max(drawn) > "q00090"  # the hopeless ones are among them


def test_where_much_is_expected_the_selector_chooses():
    choice = choice_with_least_gain([0.5] * 20 + [0.0] * 80, 1e6)
    assert choice.expected_gain == pytest.approx(5.0, rel=1e-3)
    assert choice.covered == frozenset()
    assert max(choice.question_ids) < "q00020"


def test_an_estimate_without_evidence_expects_nothing_of_a_choice():
    choice = choice_with_least_gain([0.5] * 20 + [0.0] * 80, 0)
    assert choice.expected_gain == pytest.approx(1.0)
    assert len(choice.covered) == 4


def test_uses_come_back_from_a_checkpoint():
    uses = Uses()
    uses.note(("b", "a"), 3)
    uses.note(("a",), 7)
    again = Uses()
    again.load_state_dict(uses.state_dict())
    assert again.last_step == {"b": 3, "a": 7}
    assert again.times == {"b": 1, "a": 2}
