"""What a run tells those who watch it: one record per stage, whose fields are the metrics.

The metric of field ``success_rate`` of the stage ``evaluation`` is called ``evaluation/success_rate`` in
``metrics.jsonl`` and in TensorBoard; docs/metrics.md is written from the docstrings below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from dteframe.records import BatchArithmetic, Group, SuccessEstimate

MetricValue = int | float


@dataclass(frozen=True, slots=True)
class StageReport:
    """The figures of one stage of a step."""

    stage: ClassVar[str]

    def metrics(self) -> dict[str, MetricValue]:
        """Give the figures as ``stage/figure``; None is left out, a mapping gives one metric per key."""
        found: dict[str, MetricValue] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            named = value if isinstance(value, Mapping) else {item.name: value}
            present = {name: number for name, number in named.items() if number is not None}
            found.update({f"{self.stage}/{name}": number for name, number in present.items()})
        return found


@dataclass(frozen=True, slots=True)
class EstimateReport(StageReport):
    """A new plan: what the estimator said, and how well its last word held."""

    stage: ClassVar[str] = "estimate"
    num_references: int
    """Reference questions rolled out for this plan."""
    reference_success_rate: float | None
    """Mean measured success rate of the references."""
    reference_informative_fraction: float | None
    """Share of reference groups with both successes and failures."""
    reference_pearson: float | None
    """Correlation of the previous plan's prediction with the references measured now; the first plan has
    none."""
    reference_brier: float | None
    """Mean squared difference of the same."""
    mean_success_rate: float
    """Mean predicted success rate over the pool."""
    selected_mean_success_rate: float | None
    """Mean predicted success rate of the questions chosen; None where reused references fill the plan."""
    num_selected: int
    """Questions chosen for this plan."""
    num_reused_references: int
    """Informative reference groups that are trained on as fresh ones."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The estimator's own figures, under their own names. With rules of the selector also
    ``brought_back_questions``, ``coverage_questions`` (drawn uniformly) and, with ``least_gain``,
    ``expected_gain``: how many times as many informative groups are expected of the choice as of a uniform
    one."""


@dataclass(frozen=True, slots=True)
class ForecastReport(StageReport):
    """How well predictions held that were made before their groups were measured: the newest groups.

    At most 512 groups that were chosen by the estimate, and 512 that were drawn uniformly from the pool:
    references, coverage, and what was chosen while nothing was known. Figures of fewer than 32 groups are
    left out.
    """

    stage: ClassVar[str] = "forecast"
    num_groups: int
    """Groups of both kinds that were predicted with some evidence: the scores below are of these."""
    num_chosen_groups: int
    """Groups that were chosen by the estimate."""
    num_uniform_groups: int
    """Groups that were drawn uniformly."""
    chosen_informative_fraction: float | None
    """Share of groups with both successes and failures among the chosen ones."""
    uniform_informative_fraction: float | None
    """The same among the uniformly drawn ones: what selection has to beat."""
    pearson: float | None = None
    """Correlation of predicted and measured success rates; None where either does not vary."""
    pearson_ceiling: float | None = None
    """What that would be if the true rates had been predicted: few rollouts measure a rate roughly. None
    where a group is a single rollout, or all measured rates are equal."""
    spearman: float | None = None
    """Correlation of the ranks of predicted and measured success rates."""
    brier: float | None = None
    """Mean squared difference of predicted and measured success rates."""
    brier_floor: float | None = None
    """What that would be if the true rates had been predicted: the chance in the measured ones."""
    nll_nats: float | None = None
    """Negative log-likelihood of the groups under the estimates, mean per rollout."""
    constant_nll_nats: float | None = None
    """The same of one who predicts the mean rate of these groups for all of them: more than nothing, for it
    is only known afterwards."""
    slope: float | None = None
    """Calibration slope, of measured on predicted rates: 1 is calibrated, less is over-confident."""
    slope_standard_error: float | None = None
    """Of the slope."""


@dataclass(frozen=True, slots=True)
class AnswerReport(StageReport):
    """The fresh groups of a step."""

    stage: ClassVar[str] = "answer"
    num_groups: int
    """Fresh groups asked for the step, reused references and those that a review rejected among them; the
    figures below are of all of them."""
    num_shortfall_groups: int
    """Fresh groups that stand in for replayed ones that the buffer could not give, or the guard held back."""
    reward_mean: float
    """Mean reward of a completion."""
    reward_std: float
    """Standard deviation of the rewards over all completions."""
    success_rate: float
    """Successes over trials."""
    informative_fraction: float
    """Share of groups with both successes and failures."""
    equal_reward_fraction: float
    """Share of groups whose rewards are all equal: they have no policy gradient."""
    predicted_pearson: float | None
    """Correlation of the predicted with the measured success rate; None where either does not vary."""
    predicted_brier: float | None
    """Mean squared difference of the same."""
    completion_length_mean_tokens: float
    """Mean length of a completion."""
    completion_length_max_tokens: int
    """Longest completion."""
    truncated_fraction: float
    """Share of completions that reached ``max_completion_length`` without an end."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of the stand-ins and of what later rounds asked, ``further_coverage_questions`` and
    ``further_brought_back_questions``: as ``estimate/...`` has of the plan; only with such rules."""


@dataclass(frozen=True, slots=True)
class RewardReport(StageReport):
    """What became of scoring the completions of a step, those of references and evaluations too."""

    stage: ClassVar[str] = "reward"
    num_completions: int
    """Completions that were to be scored."""
    num_unparseable: int
    """Completions in which a reward found no answer; it counts as 0."""
    num_timeouts: int
    """Completions that a reward took too long for (``training.reward_timeout_seconds``)."""
    num_errors: int
    """Completions that a reward failed on, its worker's death included."""


@dataclass(frozen=True, slots=True)
class HealthReport(StageReport):
    """What was left out of a step because a number was not finite; ``update/num_skipped_minibatches`` too."""

    stage: ClassVar[str] = "health"
    num_non_finite_groups: int
    """Groups whose sampler gave a log-prob that is not finite (``training.on_non_finite``)."""


@dataclass(frozen=True, slots=True)
class ReplayReport(StageReport):
    """The replayed groups of a step."""

    stage: ClassVar[str] = "replay"
    num_groups: int
    """Replayed groups of the step."""
    num_ready: int
    """Groups that the buffer could give before the draw."""
    guard_share: float | None
    """Share of the recipe's replayed groups that the guard lets the step have: 1, or less while replayed
    tokens are out of bounds (``replay.min_effective_sample_fraction``, ``replay.max_kl_nats``); None without
    replay."""
    staleness_mean_steps: float | None
    """Mean age of the replayed groups in policy versions."""
    staleness_max_steps: int | None
    """Largest age of the replayed groups in policy versions."""


@dataclass(frozen=True, slots=True)
class ReviewReport(StageReport):
    """What the selector made of a step's fresh groups; only of selectors that review."""

    stage: ClassVar[str] = "review"
    num_rounds: int
    """Rounds of asking."""
    num_asked: int
    """Groups asked in all rounds."""
    num_accepted: int
    """Of these, trained on."""
    num_rejected: int
    """Of these, rejected: measured, observed and paid for, never trained on."""
    num_surplus: int
    """Of these, accepted when the step was full: offered to the replay buffer, else let go."""
    num_missing: int
    """Groups that the step lacks after its last round."""
    unused_tokens: int
    """Tokens generated for rejected and surplus groups; ``cost/unused_tokens`` sums them up."""


@dataclass(frozen=True, slots=True)
class UpdateReport(StageReport):
    """What the optimizer did."""

    stage: ClassVar[str] = "update"
    loss: float
    """Mean loss of the step's optimizer steps."""
    gradient_norm: float
    """Mean norm of the gradient before clipping."""
    learning_rate: float
    """Mean learning rate of the optimizer steps; the schedule's where none was taken."""
    num_optimizer_steps: int
    """Optimizer steps taken; a minibatch without any gradient takes none."""
    num_equal_reward_groups: int
    """Groups that were counted in the denominators but not run through the model."""
    num_forward_rows: int
    """Rollouts run forward with gradient, over all passes."""
    num_proximal_rows: int
    """Rollouts run forward without gradient for the log-probs at the start of the step."""
    entropy_nats: float | None
    """Mean entropy of the distributions that the tokens are from, over the tokens that ran, at the sampling
    temperature; None if none ran."""
    sampler_logprob_difference_max_nats: float | None
    """Largest difference of sampler and trainer log-probs on fresh tokens before the first optimizer step."""
    num_forward_tokens: int = 0
    """Tokens of prompts and completions run forward with gradient, over all passes: a prompt that completions
    share once, padding left out."""
    model_flops: float | None = None
    """Floating-point operations of the model: forward and backward, and forward alone where only scores are
    wanted; what gradient checkpointing computes again is left out. None for models that are no plain
    decoders."""
    trained_forward_flops: float | None = None
    """Those of the forward passes with gradient: gradient checkpointing does them twice."""
    num_skipped_minibatches: int = 0
    """Minibatches left out because a loss, log-prob or gradient of theirs was not finite
    (``training.on_non_finite``)."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The objective's own figures, means over the tokens that ran; and of the importance weights, probability
    at the start of the step over that of the sampler, uncapped, ``fresh_importance_weight_mean``,
    ``fresh_importance_weight_max``, ``fresh_effective_sample_fraction`` (1: all tokens count alike) and
    ``fresh_kl_behaviour_nats`` (how far the policy is from the sampler, a token), and the same of replayed
    tokens (``replayed_...``)."""


@dataclass(frozen=True, slots=True)
class CanaryReport(StageReport):
    """How far sampler and trainer are apart on a few completions of fixed prompts, after an update."""

    stage: ClassVar[str] = "canary"
    logprob_difference_mean_nats: float
    """Mean absolute difference of the sampler's and the trainer's log-probs."""
    logprob_difference_max_nats: float
    """Largest absolute difference."""
    num_tokens: int
    """Tokens compared; generated for this alone, and charged to no purpose."""


@dataclass(frozen=True, slots=True)
class EvaluationReport(StageReport):
    """The held-out questions under the present policy."""

    stage: ClassVar[str] = "evaluation"
    success_rate: float
    """Successes over trials on the held-out questions (avg@k)."""
    standard_error: float
    """Standard error of ``success_rate`` over questions."""
    solved_fraction: float
    """Share of held-out questions solved at least once (pass@k)."""
    num_questions: int
    """Held-out questions asked."""
    num_generations: int
    """Completions per question (k)."""
    completion_length_mean_tokens: float
    """Mean length of a completion."""
    truncated_fraction: float
    """Share of completions that reached ``max_completion_length`` without an end."""


@dataclass(frozen=True, slots=True)
class CostReport(StageReport):
    """Everything paid since the start of the run, over stops and resumes."""

    stage: ClassVar[str] = "cost"
    train_tokens: int
    """Tokens generated for training."""
    unused_tokens: int
    """Of these, in groups that a review rejected or that a step had no room for."""
    reference_tokens: int
    """Tokens generated for reference questions."""
    evaluation_tokens: int
    """Tokens generated for evaluation."""
    train_rollouts: int
    """Completions generated for training."""
    reference_rollouts: int
    """Completions generated for reference questions."""
    evaluation_rollouts: int
    """Completions generated for evaluation."""
    total_seconds: float
    """Wall-clock since the start, evaluation included."""
    training_seconds: float
    """Wall-clock since the start without loading, evaluation and checkpoints: what time to target is counted
    in."""
    training_cpu_seconds: float
    """CPU time of the main process in the same: what a busy machine leaves alone."""
    reference_seconds: float
    """Of ``training_seconds``: asking and scoring references."""
    predict_seconds: float
    """Of ``training_seconds``: the estimator's predictions."""
    select_seconds: float
    """Of ``training_seconds``: the selector's choices."""


@dataclass(frozen=True, slots=True)
class TimeReport(StageReport):
    """Where the step's wall-clock went."""

    stage: ClassVar[str] = "time"
    step_seconds: float
    """The whole step."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Per stage: ``load_seconds``, ``embed_seconds``, ``references_seconds``, ``predict_seconds``,
    ``select_seconds``, ``generate_seconds``, ``score_seconds``, ``replay_seconds``, ``update_seconds``,
    ``evaluate_seconds``, ``canary_seconds``, ``checkpoint_seconds`` and the rest, ``other_seconds``."""


@dataclass(frozen=True, slots=True)
class ThroughputReport(StageReport):
    """How fast the step was, and how much memory it took."""

    stage: ClassVar[str] = "throughput"
    generated_tokens_per_second: float | None
    """Tokens sampled for training over ``time/generate_seconds``; None where the step generated none."""
    updated_tokens_per_second: float | None
    """``update/num_forward_tokens`` over ``time/update_seconds``."""
    update_model_flops_per_second: float | None
    """``update/model_flops`` over ``time/update_seconds``, all processes together."""
    model_flop_utilization: float | None
    """The same over what the devices can do in dense bfloat16; None where that is unknown (a device that is
    not in the table of ``dteframe/flops.py``, another type of parameters)."""
    hardware_flop_utilization: float | None
    """With gradient checkpointing: the same with what is computed again."""
    peak_memory_bytes: int
    """Of the main process: on CUDA the most that tensors took in this step, on a CPU the most that the
    process ever had."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One row of the metrics: step 0 is the evaluation before training."""

    step: int
    """Training steps done, this one included."""
    max_steps: int
    """Steps of the whole run."""
    stages: tuple[StageReport, ...]
    """What happened in the step, stage by stage."""

    def metrics(self) -> dict[str, MetricValue]:
        """Give the flat row: ``step`` and ``stage/figure``."""
        row: dict[str, MetricValue] = {"step": self.step}
        for stage in self.stages:
            row.update(stage.metrics())
        return row


@dataclass(frozen=True, slots=True)
class RunReport:
    """What is known when a run starts."""

    name: str
    """The recipe's."""
    run_folder: Path
    """Where everything is written."""
    device: str
    """``cpu``, ``cuda`` or ``cuda:N``."""
    num_processes: int
    """That train together."""
    num_parameters: int
    """Of the policy, those of a LoRA adapter included."""
    num_trainable_parameters: int
    """That training changes: the adapter's alone with LoRA."""
    num_train_questions: int
    """Questions that can be asked in training."""
    num_evaluation_questions: int
    """Questions held out."""
    left_out: Mapping[str, int]
    """Questions that were left out, counted by reason."""
    arithmetic: BatchArithmetic
    """Questions, completions and steps."""
    first_step: int
    """0, or the step of the checkpoint that is resumed."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A new plan."""

    step: int
    """The first step that the plan serves."""
    question_ids: tuple[str, ...]
    """The chosen questions in the order in which they are asked."""
    reused_reference_ids: tuple[str, ...]
    """References whose groups the first step trains on."""
    estimate: SuccessEstimate
    """Restricted to the chosen questions."""
    figures: EstimateReport
    """The same plan as metrics."""


@dataclass(frozen=True, slots=True)
class GroupsReport:
    """Groups that were answered and scored, or replayed."""

    step: int
    """The step that asked them; 0 for the evaluation before training."""
    groups: tuple[Group, ...]
    """One per question."""
    prompts: Mapping[str, str]
    """Prompt text by question id."""
    answers: Mapping[str, str]
    """Gold answer by question id."""
    is_replayed: bool
    """Whether they were drawn from the replay buffer, not generated."""
    texts: Mapping[str, str]
    """The question alone, without instructions or chat template, by question id."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Of fresh groups that nobody trains on: ``rejected`` by the selector's review, or ``surplus``, accepted
    when the step was full; by question id."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended; ``dteframe run --json`` prints it."""

    name: str
    """The recipe's."""
    run_folder: Path
    """Where everything was written."""
    steps: int
    """Training steps done."""
    success_rate_before: float | None
    """Held-out success rate before training."""
    success_rate_after: float | None
    """Held-out success rate at the end."""
    informative_fraction: float | None
    """Share of informative groups among all fresh groups."""
    reference_pearson: float | None
    """Mean over plans of the correlation of predictions with the references measured next."""
    seconds_by_stage: Mapping[str, float]
    """Wall-clock over stops and resumes."""
    tokens_by_purpose: Mapping[str, int]
    """Generated tokens by what they were for."""
    reward_statuses: Mapping[str, int]
    """What became of scoring the completions: ``scored``, ``unparseable``, ``timeout``, ``error``."""
    left_out: Mapping[str, int]
    """Questions that were left out, counted by reason."""
    warnings: tuple[str, ...]
    """Everything that was warned of, in order."""
