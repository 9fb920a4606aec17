"""Every built-in plugin keeps the promises of its kind; every promise is broken by a plugin made for it."""

import datetime
import inspect
import itertools
import sys
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
from pydantic import ConfigDict

from dteframe import (
    Completion,
    Component,
    Model,
    ModelConfig,
    Policy,
    Questions,
    Review,
    RewardConfig,
    Selection,
    SuccessEstimate,
    hookimpl,
)
from dteframe.contracts import KINDS
from dteframe.plugin_sources import BUILT_IN, Origin
from dteframe.registry import Registered, load_registry
from dteframe.rollouts.transformers import TransformersRollout
from dteframe.templates.dataset import MyPlugin as LinesDataset
from dteframe.templates.estimator import MyPlugin as LastRateEstimator
from dteframe.templates.objective import MyPlugin as ReinforceObjective
from dteframe.templates.replay import MyPlugin as NewestReplay
from dteframe.templates.reward import MyPlugin as EndingReward
from dteframe.templates.selector import MyPlugin as NearestSelector
from dteframe.templates.tracker import MyPlugin as EvaluationTracker
from dteframe.testing.checks import check_component, promises
from dteframe.testing.promises import (
    dataset,
    estimator,
    every_kind,
    model,
    objective,
    replay,
    reward,
    rollout,
    selector,
    tracker,
)
from dteframe.testing.subject import BrokenPromise, Promise, Subject
from dteframe.testing.tiny import tiny_policy


def registered(component: type[Component]) -> Registered:
    config = typing.get_type_hints(component)["config"]
    name = config.model_fields["type"].default
    return Registered(component.kind, name, component, config, Origin("here", None, None), "")


def subject(component: type[Component], folder: Path) -> Subject:
    return Subject(registered(component), folder)


# Broken in one way each. What is not overridden comes from the template of the kind and keeps its promises.


class ChangesItsConfig(EndingReward):
    def __init__(self, config, context):
        super().__init__(config.model_copy(update={"ignore_case": False}), context)


class RoundingConfig(RewardConfig):
    type: Literal["rounding"] = "rounding"
    words: frozenset[str] = frozenset({"a"})


class HasASetAsOption(EndingReward):
    config: RoundingConfig


class OpenConfig(RewardConfig):
    model_config = ConfigDict(extra="ignore")
    type: Literal["open"] = "open"


class TakesAnyOption(EndingReward):
    config: OpenConfig


class SilentConfig(RewardConfig):
    type: Literal["silent"] = "silent"
    threshold: float = 0.5


class HasAnUndocumentedOption(EndingReward):
    config: SilentConfig


class HasNoDocstring(EndingReward):
    pass


class KeepsADate(EndingReward):
    def state_dict(self):
        return {"since": {"start": datetime.date(2026, 1, 1)}}


class AnnouncesTooManyReferences(LastRateEstimator):
    def references(self, rng):
        return ["sum-001"]


class DrawsBeyondTheGenerator(LastRateEstimator):
    counter: ClassVar = itertools.count()

    def references(self, rng):
        return [f"sum-{next(self.counter):03d}"]


class ForgetsTheLastQuestion(LastRateEstimator):
    def predict(self, policy_version):
        estimate = super().predict(policy_version)
        return SuccessEstimate(estimate.question_ids[:-1], estimate.mean[:-1], estimate.evidence[:-1])


class PredictsPercent(LastRateEstimator):
    def predict(self, policy_version):
        estimate = super().predict(policy_version)
        return replace(estimate, mean=100 * estimate.mean)


class LearnsFromBeingAsked(LastRateEstimator):
    def predict(self, policy_version):
        self._rate = self._rate * 0.5 + 0.25
        self._trials = self._trials + 1
        return super().predict(policy_version)


class WeighsTheFirstOfAnObservation(LastRateEstimator):
    def observe(self, observation):
        super().observe(observation)
        self._rate[self._row[observation.question_ids[0]]] = 0.5


class IgnoresUnknownQuestions(LastRateEstimator):
    def observe(self, observation):
        known = [place for place, name in enumerate(observation.question_ids) if name in self._row]
        ids = tuple(observation.question_ids[place] for place in known)
        super().observe(
            replace(
                observation,
                question_ids=ids,
                successes=observation.successes[known],
                trials=observation.trials[known],
            )
        )


class ForgetsItsRates(LastRateEstimator):
    def state_dict(self):
        return {"ids": [], "rate": np.zeros(0), "trials": np.zeros(0)}


class SelectsOneTooFew(NearestSelector):
    def select(self, estimate, count, rng):
        return Selection(super().select(estimate, count, rng).question_ids[: max(count - 1, 1)])


class KeepsToTheFirstPool(NearestSelector):
    first: SuccessEstimate | None = None

    def select(self, estimate, count, rng):
        self.first = self.first or estimate
        return super().select(self.first, count, rng)


class RepeatsWhenShort(NearestSelector):
    def select(self, estimate, count, rng):
        available = len(estimate.question_ids)
        if count > available:
            return Selection((estimate.question_ids * 2)[:count])
        return super().select(estimate, count, rng)


class DividesByTheSum(NearestSelector):
    def select(self, estimate, count, rng):
        with np.errstate(invalid="ignore"):
            weights = estimate.mean / estimate.mean.sum()
        chosen = rng.choice(len(weights), size=count, replace=False, p=weights)
        return Selection(tuple(estimate.question_ids[index] for index in chosen))


class SelectsByTheSystemsChance(NearestSelector):
    def select(self, estimate, count, rng):
        return super().select(
            replace(estimate, mean=np.zeros_like(estimate.mean)), count, np.random.default_rng()
        )


class SortsInPlace(NearestSelector):
    def select(self, estimate, count, rng):
        selection = super().select(estimate, count, rng)
        estimate.mean.sort()
        return selection


class ForgetsItsEpoch(NearestSelector):
    done: tuple[str, ...] = ()

    def select(self, estimate, count, rng):
        left = estimate.without(frozenset(self.done))
        if len(left.question_ids) < count:
            left, self.done = estimate, ()
        selection = super().select(left, count, rng)
        self.done += selection.question_ids
        return selection


class AvoidsWhatWasMeasuredFirst(NearestSelector):
    avoided: tuple[str, ...] = ()

    def observe(self, observation):
        self.avoided = observation.question_ids[:3]

    def select(self, estimate, count, rng):
        return super().select(estimate.without(frozenset(self.avoided)), count, rng)


class RejectsInSecret(NearestSelector):
    def review(self, groups, num_missing):
        return Review(tuple(group.question_id for group in groups if group.is_informative))


class RejectsForNothing(RejectsInSecret):
    reviews = True


class AcceptsGhosts(NearestSelector):
    reviews = True

    def review(self, groups, num_missing):
        return Review(("ghost", *(group.question_id for group in groups)))


class GivesAGhost(NewestReplay):
    def num_ready(self, policy_version):
        return len(self._groups) or 1


class GivesTwice(NewestReplay):
    def draw(self, count, policy_version, excluded, rng):
        groups = list(super().draw(count, policy_version, excluded, rng))
        return (groups + groups)[:count]


class IgnoresExclusion(NewestReplay):
    def draw(self, count, policy_version, excluded, rng):
        return super().draw(count, policy_version, frozenset(), rng)


class RoundsRewards(NewestReplay):
    def offer(self, groups):
        super().offer([replace(group, rewards=group.rewards.astype(np.float32)) for group in groups])


class CountsWrong(NewestReplay):
    def num_ready(self, policy_version):
        return len(self._groups) + 1 if self._groups else 0


class SaysItReplaysAndDoesNot(NewestReplay):
    def offer(self, groups):
        pass


class DrawsByTheSystemsChance(NewestReplay):
    def draw(self, count, policy_version, excluded, rng):
        shuffled = np.random.default_rng().permutation(list(self._groups)).tolist()
        return [self._groups[name] for name in shuffled if name not in excluded][:count]


class ForgetsItsGroups(NewestReplay):
    def load_state_dict(self, state):
        pass


class ScoresNothingForSilence(EndingReward):
    def score(self, question, completions):
        return super().score(question, [completion for completion in completions if completion.text])


class ScoresInOrderOfLength(EndingReward):
    def score(self, question, completions):
        return sorted(super().score(question, completions))


class ScoresLessEachTime(EndingReward):
    times = 0

    def score(self, question, completions):
        self.times += 1
        return [score / self.times for score in super().score(question, completions)]


class AnswersWithFalse(EndingReward):
    def problem_with(self, question):
        return False if question.answer else None


class RefusesEverything(EndingReward):
    def problem_with(self, question):
        return "not a poem"


class ChangedLines(LinesDataset):
    """What the following have in common: the questions of the example, changed."""

    def load(self):
        return self.changed(super().load())


class LoadsNothing(ChangedLines):
    def changed(self, questions):
        return Questions(())


class RepeatsAnId(ChangedLines):
    def changed(self, questions):
        return replace(questions, train=tuple(replace(one, id="same") for one in questions.train))


class LoadsInAnyOrder(ChangedLines):
    turn: ClassVar = itertools.count()

    def changed(self, questions):
        return replace(questions, train=questions.train[:: 1 if next(self.turn) % 2 else -1])


class EvaluatesOnTrainingTexts(ChangedLines):
    def changed(self, questions):
        return replace(questions, evaluation=(replace(questions.train[0], id="held out", text="1+1=  "),))


class HasADateColumn(ChangedLines):
    def changed(self, questions):
        columns = {"day": datetime.date(2026, 1, 1)}
        return replace(questions, train=tuple(replace(one, columns=columns) for one in questions.train))


class BoastfulConfig(typing.get_type_hints(LinesDataset)["config"]):
    def num_questions(self):
        return 1000


class AnnouncesTooMany(LinesDataset):
    config: BoastfulConfig


class TinyConfig(ModelConfig):
    type: Literal["tiny"] = "tiny"


class TinyModel(Model):
    """The tiny policy; keeps every promise."""

    config: TinyConfig

    def load(self, questions):
        return self.changed(tiny_policy())

    def changed(self, policy: Policy) -> Policy:
        return policy


class CannotPad(TinyModel):
    def changed(self, policy):
        policy.tokenizer.pad_token = None
        return policy


class HasTooFewEmbeddings(TinyModel):
    def changed(self, policy):
        policy.module.resize_token_embeddings(10)
        return policy


class IsInTrainingMode(TinyModel):
    def changed(self, policy):
        policy.module.train()
        return policy


class IsHalf(TinyModel):
    def changed(self, policy):
        policy.module.half()
        return policy


class StartsAnywhere(TinyModel):
    seed: ClassVar = itertools.count()

    def load(self, questions):
        return tiny_policy(seed=next(self.seed))


class IsNotANumber(TinyModel):
    def changed(self, policy):
        policy.module.get_input_embeddings().weight.data.fill_(float("nan"))
        return policy


class ChangedRollout(TransformersRollout):
    """What the following have in common: the completions of the built-in engine, changed."""

    def generate(self, prompts, num_generations, sampling, seeds):
        for place, group in super().generate(prompts, num_generations, sampling, seeds):
            yield place, [self.changed(one, sampling) for one in group]

    def changed(self, completion: Completion, sampling) -> Completion:
        return completion


class GeneratesOneTooFew(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        return super().generate(prompts, num_generations - 1, sampling, seeds)


class IgnoresTheLimit(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        longer = replace(sampling, max_completion_length=sampling.max_completion_length + 20)
        return super().generate(prompts, num_generations, longer, seeds)


class CutsTheEnd(ChangedRollout):
    def changed(self, completion, sampling):
        if completion.finish_reason == "length" or len(completion.token_ids) == 1:
            return completion
        logprobs = completion.behaviour_logprobs[:-1]
        return replace(completion, token_ids=completion.token_ids[:-1], behaviour_logprobs=logprobs)


class TrimsTheText(ChangedRollout):
    def changed(self, completion, sampling):
        return replace(completion, text=completion.text[1:])


class AnswersInPlaceOfOthers(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        return super().generate(prompts[::-1], num_generations, sampling, seeds)


class ReportsTheWholeDistribution(ChangedRollout):
    def changed(self, completion, sampling):
        if not sampling.is_truncated:
            return completion
        return replace(completion, behaviour_logprobs=completion.behaviour_logprobs - 0.5)


class SamplesByTheSystemsChance(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        others = [int(one) for one in np.random.default_rng().integers(2**63, size=len(prompts))]
        return super().generate(prompts, num_generations, sampling, others)


class UsesTheFirstSeedForAll(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        derived = [int(one) for one in np.random.default_rng(seeds[:1]).integers(2**63, size=len(prompts))]
        return super().generate(prompts, num_generations, sampling, derived)


class RepeatsOneCompletion(ChangedRollout):
    def generate(self, prompts, num_generations, sampling, seeds):
        for place, group in super().generate(prompts, 1, sampling, seeds):
            yield place, group * num_generations


class LeavesTrainingModeOn(ChangedRollout):
    def sync(self, policy):
        policy.module.train()


class KeepsTheFirstWeights(ChangedRollout):
    def start(self, policy):
        super().start(tiny_policy())

    def sync(self, policy):
        pass


class CountsItsDraws(ChangedRollout):
    draws = 0

    def generate(self, prompts, num_generations, sampling, seeds):
        self.draws += 1
        later = [seed // self.draws for seed in seeds]
        return super().generate(prompts, num_generations, sampling, later)


class LosesARollout(ReinforceObjective):
    def advantages(self, rewards):
        return super().advantages(rewards)[:-1]


class SortsRewards(ReinforceObjective):
    def advantages(self, rewards):
        return super().advantages(np.sort(rewards))


class BarelyCentres(ReinforceObjective):
    def advantages(self, rewards):
        return rewards - 0.5


class AveragesOverTheMicroBatch(ReinforceObjective):
    def loss(self, inputs):
        return super().loss(replace(inputs, num_tokens=len(inputs.logprobs)))


class DividesByTheRatio(ReinforceObjective):
    def loss(self, inputs):
        outputs = super().loss(inputs)
        ratio = (4 * (inputs.behaviour_logprobs - inputs.logprobs)).exp()
        return replace(outputs, loss=outputs.loss + 1e-3 * ratio.sum())


class ClimbsTheWrongWay(ReinforceObjective):
    def loss(self, inputs):
        outputs = super().loss(inputs)
        return replace(outputs, loss=-outputs.loss)


class PullsEverywhere(ReinforceObjective):
    def loss(self, inputs):
        outputs = super().loss(inputs)
        return replace(outputs, loss=outputs.loss + 1e-3 * inputs.logprobs.sum())


class ReportsPerToken(ReinforceObjective):
    def loss(self, inputs):
        return replace(super().loss(inputs), sums={"logprobs": inputs.logprobs.detach()})


class WatchesNothing(EvaluationTracker):
    dteframe_evaluated = None


class NeedsReplay(EvaluationTracker):
    @hookimpl
    def dteframe_step_finished(self, report):
        if report.metrics()["replay/staleness_mean_steps"] < 0:
            raise AssertionError


class GivesAnswers(EvaluationTracker):
    @hookimpl
    def dteframe_warned(self, message):
        return message.upper()


class TalksOnStdout(EvaluationTracker):
    @hookimpl
    def dteframe_warned(self, message):
        sys.stdout.write(message)


class NeedsAStart(EvaluationTracker):
    @hookimpl
    def dteframe_run_started(self, run):
        with (self.context.run_folder / "only_once").open("x"):
            pass


@dataclass(frozen=True)
class Breach:
    """A plugin that breaks a promise, and what the promise says then."""

    promise: Promise
    component: type[Component]
    what: str

    def __str__(self) -> str:
        return f"{self.component.kind}-{self.promise.__name__}"


BREACHES = [
    Breach(*row)
    for row in [
        (every_kind.example_config_builds_the_component, ChangesItsConfig, "changed or dropped its config"),
        (every_kind.config_survives_being_written_to_a_recipe, HasASetAsOption, "frozenset"),
        (every_kind.config_refuses_unknown_keys, TakesAnyOption, "'no_such_option' was accepted"),
        (every_kind.every_option_is_described, HasAnUndocumentedOption, "no docstring below threshold"),
        (every_kind.class_has_a_summary, HasNoDocstring, "HasNoDocstring has no docstring"),
        (every_kind.state_comes_back, KeepsADate, "state['since']['start'] is a date"),
        (estimator.references_are_as_announced, AnnouncesTooManyReferences, "1 references, but"),
        (estimator.equal_generators_give_equal_references, DrawsBeyondTheGenerator, "from equal generators"),
        (estimator.prediction_covers_every_question_once, ForgetsTheLastQuestion, "23 ids for 24 questions"),
        (estimator.predicted_means_are_success_rates, PredictsPercent, "means from 50.0 to 50.0"),
        (estimator.asking_again_changes_nothing, LearnsFromBeingAsked, "second prediction differs"),
        (estimator.order_inside_an_observation_does_not_matter, WeighsTheFirstOfAnObservation, "reversed"),
        (estimator.unknown_questions_are_refused, IgnoresUnknownQuestions, "'no-such-question' was taken"),
        (estimator.state_brings_back_the_predictions, ForgetsItsRates, "predicts something else"),
        (selector.selection_has_exactly_as_many_distinct_questions_as_asked, SelectsOneTooFew, "4 questions"),
        (selector.questions_that_are_missing_now_are_never_chosen, KeepsToTheFirstPool, "are not in"),
        (selector.too_few_questions_are_refused, RepeatsWhenShort, "25 of 24 questions were given"),
        (selector.extreme_estimates_are_safe, DividesByTheSum, "ValueError"),
        (selector.equal_generators_give_equal_selections, SelectsByTheSystemsChance, "from equal generators"),
        (selector.estimate_is_left_as_it_is, SortsInPlace, "means were changed in place"),
        (selector.state_brings_back_the_selections, ForgetsItsEpoch, "selects something else"),
        (selector.order_inside_an_observation_does_not_matter, AvoidsWhatWasMeasuredFirst, "reversed"),
        (selector.review_rejects_if_and_only_if_it_says_so, RejectsInSecret, "reviews is False but"),
        (selector.review_rejects_if_and_only_if_it_says_so, RejectsForNothing, "a rejected group is lost"),
        (selector.review_accepts_only_groups_of_the_round, AcceptsGhosts, "accepted ['ghost']"),
        (replay.empty_buffer_is_safe, GivesAGhost, "num_ready is 1 before the first offer"),
        (replay.draw_gives_at_most_as_many_distinct_questions_as_asked, GivesTwice, "drawn twice"),
        (replay.excluded_questions_are_never_drawn, IgnoresExclusion, "drew the excluded"),
        (replay.groups_come_back_bit_equal, RoundsRewards, "was changed"),
        (replay.num_ready_is_what_can_be_drawn, CountsWrong, "groups are drawn"),
        (replay.replays_if_and_only_if_it_says_so, SaysItReplaysAndDoesNot, "replays is True but 0 groups"),
        (replay.equal_generators_give_equal_draws, DrawsByTheSystemsChance, "from equal generators"),
        (replay.state_brings_back_the_buffer, ForgetsItsGroups, "the state changed on its way"),
        (reward.one_finite_score_per_completion, ScoresNothingForSilence, "4 scores for 5 completions"),
        (reward.scores_follow_the_order_of_the_completions, ScoresInOrderOfLength, "backwards"),
        (reward.scoring_again_gives_the_same_scores, ScoresLessEachTime, "then"),
        (reward.problem_is_a_sentence_or_none, AnswersWithFalse, "problem_with gives False"),
        (reward.some_question_can_be_scored, RefusesEverything, "no question is left to score: not a poem"),
        (dataset.loads_questions_with_text_and_prompt, LoadsNothing, "no training question"),
        (dataset.ids_are_distinct, RepeatsAnId, "ids ['same'] are given to more than one question"),
        (dataset.loading_again_gives_the_same_questions, LoadsInAnyOrder, "differ from load to load"),
        (dataset.evaluation_texts_are_not_trained_on, EvaluatesOnTrainingTexts, "['held out'] are"),
        (dataset.columns_are_json_values, HasADateColumn, "not JSON serializable"),
        (dataset.announced_number_holds, AnnouncesTooMany, "1000 questions announced, 3 loaded"),
        (model.tokenizer_can_pad_and_end, CannotPad, "no pad token"),
        (model.every_token_has_an_embedding, HasTooFewEmbeddings, "there are 10 embeddings"),
        (model.module_is_ready_to_sample, IsInTrainingMode, "training mode"),
        (model.parameters_have_the_type_of_the_recipe, IsHalf, "parameters of ['float16']"),
        (model.equal_seeds_give_equal_weights, StartsAnywhere, "differ from load to load"),
        (model.questions_can_be_read, IsNotANumber, "not finite"),
        (rollout.every_prompt_is_answered_once, GeneratesOneTooFew, "[2, 2,"),
        (rollout.lengths_stay_within_the_limit, IgnoresTheLimit, "the limit is 1"),
        (rollout.stopped_completions_end_in_the_end_token, CutsTheEnd, "stop: end tokens at []"),
        (rollout.texts_are_the_decoded_tokens, TrimsTheText, "decoded"),
        (rollout.logprobs_are_those_of_the_policy_that_was_asked, AnswersInPlaceOfOthers, "nats"),
        (rollout.truncated_sampling_reports_the_truncated_distribution, ReportsTheWholeDistribution, "-0.5"),
        (rollout.equal_seeds_give_equal_completions, SamplesByTheSystemsChance, "equal seeds gave"),
        (rollout.other_prompts_change_nothing, UsesTheFirstSeedForAll, "asked alone"),
        (rollout.completions_of_one_prompt_differ, RepeatsOneCompletion, "are the same"),
        (rollout.policy_is_left_as_it_is, LeavesTrainingModeOn, "training mode"),
        (rollout.new_weights_are_used_after_sync, KeepsTheFirstWeights, "after an update"),
        (rollout.state_brings_back_the_completions, CountsItsDraws, "samples something else"),
        (objective.advantages_are_one_per_rollout_and_finite, LosesARollout, "shape (5,) for (6,) rewards"),
        (objective.advantages_follow_the_order_of_the_rewards, SortsRewards, "backwards"),
        (objective.equal_rewards_give_no_advantage, BarelyCentres, "for six rewards of 0.0"),
        (objective.loss_is_the_same_in_any_micro_batches, AveragesOverTheMicroBatch, "in two parts"),
        (objective.loss_and_gradient_are_finite, DividesByTheRatio, "loss inf"),
        (objective.gradient_raises_what_was_better, ClimbsTheWrongWay, "pushed the wrong way"),
        (objective.tokens_without_advantage_carry_no_gradient, PullsEverywhere, "a gradient of"),
        (objective.figures_are_scalars_without_gradient, ReportsPerToken, "logprobs: not a scalar"),
        (tracker.watches_at_least_one_hook, WatchesNothing, "no method is marked with @hookimpl"),
        (tracker.every_hook_is_survived, NeedsReplay, "replay/staleness_mean_steps"),
        (tracker.hooks_return_nothing, GivesAnswers, "1 COMPLETION WAS CUT"),
        (tracker.stdout_is_left_alone, TalksOnStdout, "1 completion was cut"),
        (tracker.a_resumed_run_can_be_watched, NeedsAStart, "only_once"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("breach", BREACHES, ids=str)
def test_a_broken_plugin_fails_its_promise(breach, tmp_path):
    with pytest.raises(Exception) as caught:
        breach.promise(subject(breach.component, tmp_path))
    assert breach.what in f"{caught.typename}: {caught.value}"


def test_every_promise_has_a_plugin_that_breaks_it():
    wanted = {(kind, promise) for kind in KINDS for promise in promises(kind)}
    shared = {*every_kind.PROMISES, every_kind.state_comes_back}
    broken = {(breach.component.kind, breach.promise) for breach in BREACHES}
    missing = {promise.__name__ for kind, promise in wanted - broken if promise not in shared}
    assert missing == set()
    also_broken = {breach.promise for breach in BREACHES}
    assert shared - also_broken == {every_kind.importing_the_file_is_cheap}  # the next test breaks it


def test_a_file_that_imports_torch_is_not_cheap(tmp_path):
    text = Path(inspect.getfile(EndingReward)).read_text().replace("my_plugin", "heavy")
    file = tmp_path / "heavy.py"
    file.write_text(text.replace("from typing", "import torch\nfrom typing", 1))
    heavy = load_registry([file]).get("reward", "heavy")
    with pytest.raises(BrokenPromise, match="^importing it imports torch$"):
        every_kind.importing_the_file_is_cheap(Subject(heavy, tmp_path))


def test_a_failure_names_promise_deed_and_advice(tmp_path):
    failures = check_component(registered(RefusesEverything), tmp_path)
    named = {failure.promise: failure for failure in failures}
    assert named["some_question_can_be_scored"].what == "no question is left to score: not a poem"
    assert named["some_question_can_be_scored"].advice.startswith("``problem_with`` leaves some questions")


def test_what_a_plugin_raises_is_a_broken_promise(tmp_path):
    failures = {
        failure.promise: failure.what for failure in check_component(registered(DividesByTheSum), tmp_path)
    }
    assert failures["extreme_estimates_are_safe"].startswith("raised ValueError: ")


def test_docstrings_of_promises_are_sentences():
    for kind in KINDS:
        for promise in promises(kind):
            first = (promise.__doc__ or "").splitlines()[0]
            assert first.endswith((".", ":")), promise.__name__


ALL = [item for kind in KINDS for item in load_registry(plugin_paths=[]).of_kind(kind)]


@pytest.mark.parametrize("item", ALL, ids=lambda item: f"{item.kind}-{item.name}")
def test_built_in_plugins_keep_their_promises(item, tmp_path):
    if item.name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="pip install dteframe[gym]")
    if item.name == "vllm":
        pytest.skip("tests/test_vllm.py holds it to its promises: make test-vllm")
    failures = check_component(item, tmp_path)
    assert [(failure.promise, failure.what) for failure in failures] == []


def test_every_built_in_module_adds_something():
    modules = {item.component.__module__ for item in ALL}
    assert sorted(modules) == sorted(BUILT_IN)
