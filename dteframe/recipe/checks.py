"""What no section can see alone: keys of different sections that contradict one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dteframe.contracts import (
    DatasetConfig,
    EstimatorConfig,
    ModelConfig,
    ObjectiveConfig,
    PluginConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    SelectorConfig,
    TrackerConfig,
)
from dteframe.recipe.document import KeyPath
from dteframe.recipe.schema import TrainingConfig, batch_arithmetic
from dteframe.records import BatchArithmetic

REFERENCE_COST_LIMIT = 0.25
"""Reference questions per asked question above which a note is due: K / (mu B); the DOTS paper has 0.25."""

Contradiction = tuple[KeyPath, str]
"""The key that a problem is reported at, and what is wrong; names the other key too."""


@dataclass(slots=True)
class Sections:
    """The sections that are valid by themselves; None or missing where one is not."""

    training: TrainingConfig | None = None
    model: ModelConfig | None = None
    dataset: DatasetConfig | None = None
    estimator: EstimatorConfig | None = None
    selector: SelectorConfig | None = None
    replay: ReplayConfig | None = None
    rollout: RolloutConfig | None = None
    objective: ObjectiveConfig | None = None
    rewards: list[RewardConfig] = field(default_factory=list)
    trackers: list[TrackerConfig] = field(default_factory=list)
    configs: dict[KeyPath, PluginConfig] = field(default_factory=dict)
    """All plugins' sections by place."""
    estimates: bool = True
    """Whether the estimator's plugin estimates anything."""
    needs_estimate: bool = False
    """Whether the selector's plugin needs an estimate."""
    replays: bool = False
    """Whether the replay's plugin ever gives a group back."""

    def arithmetic(self) -> BatchArithmetic | None:
        """Count what a step is made of, if the sections that decide it are valid."""
        if self.training is None or self.estimator is None or self.selector is None:
            return None
        if self.rollout is None or self.replay is None:
            return None
        return batch_arithmetic(self.training, self.estimator, self.selector, self.rollout, self.replays)


def contradictions(sections: Sections) -> Iterator[Contradiction]:
    """Find everything that cannot be meant; at most one problem per key."""
    seen: set[KeyPath] = set()
    for path, what in _all(sections):
        if path not in seen:
            seen.add(path)
            yield path, what


def _all(sections: Sections) -> Iterator[Contradiction]:
    yield from _selection(sections)
    yield from _lists(sections)
    if sections.training is not None:
        yield from _schedule(sections.training)
        if sections.model is not None:
            yield from _precision(sections.model, sections.training)
    arithmetic = sections.arithmetic()
    if arithmetic is None or sections.training is None:
        return
    yield from _replay(sections, sections.training, arithmetic)
    for path, config in sections.configs.items():
        yield from _own(path, config, arithmetic)
    if sections.dataset is not None:
        yield from _pool(sections.dataset, sections.training, arithmetic)


def _own(path: KeyPath, config: PluginConfig, arithmetic: BatchArithmetic) -> Iterator[Contradiction]:
    try:
        for key, what in config.problems(arithmetic):
            yield _inside(path, key), what
    except Exception as error:  # noqa: BLE001  # a plugin's own check may raise anything
        yield path, f"{type(config).__name__}.problems() failed: {type(error).__name__}: {error}"


def _inside(path: KeyPath, key: str) -> KeyPath:
    """Lead from a section to a key of its own."""
    return (*path, *(int(part) if part.isdigit() else part for part in key.split(".")))


def _selection(sections: Sections) -> Iterator[Contradiction]:
    if sections.selector and sections.estimator and sections.needs_estimate and not sections.estimates:
        yield (
            ("selector", "type"),
            f"{sections.selector.type!r} chooses by estimated success rates, but estimator.type is "
            f"{sections.estimator.type!r}, which gives none; choose an estimator, or selector.type uniform",
        )
    if sections.selector and not sections.needs_estimate and sections.selector.least_gain > 1:
        yield (
            ("selector", "least_gain"),
            f"{sections.selector.least_gain:g} asks what the estimate expects of a choice, but "
            f"{sections.selector.type!r} ignores the estimate; leave the key out",
        )


def _lists(sections: Sections) -> Iterator[Contradiction]:
    rewards = [path for path, config in sections.configs.items() if isinstance(config, RewardConfig)]
    if rewards and all(item.weight == 0 for item in sections.rewards):
        yield (*rewards[0], "weight"), "every reward has weight 0, so nothing is rewarded; give one a weight"
    seen: dict[str, KeyPath] = {}
    for path, config in sections.configs.items():
        if isinstance(config, TrackerConfig):
            if config.type in seen:
                yield (*path, "type"), f"tracker {config.type!r} is listed twice; delete one of the two"
            seen[config.type] = path


def _schedule(training: TrainingConfig) -> Iterator[Contradiction]:
    if training.min_lr_rate is not None and training.lr_scheduler_type != "cosine_with_min_lr":
        yield (
            ("training", "min_lr_rate"),
            f"{training.min_lr_rate} is read by training.lr_scheduler_type 'cosine_with_min_lr' alone, but "
            f"that is {training.lr_scheduler_type!r}; leave the key out, or choose that schedule",
        )
    if training.evaluate_every > 0 and training.evaluation_size == 0:
        yield (
            ("training", "evaluation_size"),
            f"0 questions cannot be evaluated every {training.evaluate_every} steps "
            "(training.evaluate_every); set that to 0 for no evaluation",
        )


def _precision(model: ModelConfig, training: TrainingConfig) -> Iterator[Contradiction]:
    if training.float32_master_weights:
        return
    key: KeyPath = ("training", "float32_master_weights")
    if model.lora is not None:
        yield (
            key,
            "false trains bfloat16 parameters as they are, but with model.lora the adapter's alone are "
            "trained, which are float32; leave one of the two out",
        )
    elif model.dtype == "float32":
        yield (
            key,
            "false trains bfloat16 parameters as they are, but model.dtype is 'float32'; set that to "
            "bfloat16, or leave the key out",
        )


def _replay(
    sections: Sections, training: TrainingConfig, arithmetic: BatchArithmetic
) -> Iterator[Contradiction]:
    assert sections.replay is not None
    replay = f"replay.type is {sections.replay.type!r}"
    key: KeyPath = ("training", "fresh_fraction")
    fresh = training.fresh_fraction
    if not sections.replays and fresh is not None and fresh < 1:
        yield (
            key,
            f"{fresh} leaves room for replayed groups, but {replay}, which gives none back; "
            "leave the key out (null), or choose a replay buffer such as fifo",
        )
    elif sections.replays and fresh == 1:
        yield (
            key,
            f"1 means that every group is new, but {replay}; leave the key out, or set replay.type none",
        )
    elif sections.replays and arithmetic.num_replayed == 0:
        size = training.questions_per_step
        yield (
            key if fresh is not None else ("training", "questions_per_step"),
            f"with training.questions_per_step {size} and training.fresh_fraction {fresh or 0.5} no whole "
            f"group is replayed, but {replay}; raise the first, lower the second, or set replay.type none",
        )


def _pool(
    dataset: DatasetConfig, training: TrainingConfig, arithmetic: BatchArithmetic
) -> Iterator[Contradiction]:
    """Compare what a plan asks with the questions that remain after some are held out for evaluation."""
    try:
        num_questions = dataset.num_questions()
    except Exception as error:  # noqa: BLE001  # a plugin's own count may raise anything
        yield (
            ("dataset",),
            f"{type(dataset).__name__}.num_questions() failed: {type(error).__name__}: {error}",
        )
        return
    if num_questions is None:
        return
    held_out = 0 if dataset.has_evaluation_questions() else training.evaluation_size
    pool = num_questions - held_out
    pool_words = f"the dataset {dataset.type!r} has {num_questions}" + (
        f", {held_out} of them held out (training.evaluation_size)" if held_out else ""
    )
    if pool <= 0:
        yield (
            ("training", "evaluation_size"),
            f"{held_out} questions are to be held out, but the dataset {dataset.type!r} has "
            f"{num_questions}; none would be left to train on",
        )
        return
    if arithmetic.questions_per_plan > pool:
        several = arithmetic.questions_per_group
        yield (
            ("training", "questions_per_step"),
            f"a plan asks {arithmetic.questions_per_plan} different questions (training.questions_per_step "
            f"{training.questions_per_step} x training.selection_interval {training.selection_interval}"
            + (f" x {several:g} that the selector asks for each" if several > 1 else "")
            + f"), but {pool_words}",
        )
    if arithmetic.reference_size > pool:
        yield (
            ("estimator", "reference_size"),
            f"{arithmetic.reference_size} reference questions are asked per plan, but {pool_words}",
        )


def notes(sections: Sections) -> Iterator[Contradiction]:
    """Say what may well be meant but is worth knowing."""
    for path, config in sections.configs.items():
        try:
            for key, what in config.remarks():
                yield _inside(path, key), what
        except Exception as error:  # noqa: BLE001  # a plugin's own remarks may raise anything
            yield path, f"{type(config).__name__}.remarks() failed: {type(error).__name__}: {error}"
    rollout = sections.rollout
    if rollout is not None and rollout.sampling().is_truncated:
        key = next(name for name in ("top_p", "top_k", "min_p") if getattr(rollout, name) != _OFF[name])
        yield (
            ("rollout", key),
            f"{getattr(rollout, key)} leaves tokens out; the behaviour log-probs are those of what is left, "
            "so importance ratios to the whole policy are not exact",
        )
    training = sections.training
    if training is not None and training.warmup_steps > training.max_steps:
        yield (
            ("training", "warmup_steps"),
            f"{training.warmup_steps} is more than training.max_steps {training.max_steps}, so the learning "
            f"rate ends at {training.max_steps / (training.warmup_steps + 1):.0%} of "
            f"training.learning_rate {training.learning_rate:g}",
        )
    if training is not None and not training.float32_master_weights:
        yield (
            ("training", "float32_master_weights"),
            f"steps of about training.learning_rate {training.learning_rate:g} are lost on every weight "
            f"above about {256 * training.learning_rate:.2g}, which may be nearly all",
        )
    arithmetic = sections.arithmetic()
    if arithmetic is None or arithmetic.reference_size == 0:
        return
    share = arithmetic.reference_size / arithmetic.questions_per_plan
    if share > REFERENCE_COST_LIMIT:
        yield (
            ("estimator", "reference_size"),
            f"{arithmetic.reference_size} reference questions per plan are {share:.0%} of the "
            f"{arithmetic.questions_per_plan} questions that a plan asks (training.questions_per_step x "
            f"training.selection_interval); more than {REFERENCE_COST_LIMIT:.0%} is seldom repaid",
        )
    if sections.selector is not None and sections.estimator is not None and not sections.needs_estimate:
        yield (
            ("estimator", "type"),
            f"{sections.estimator.type!r} rolls out {arithmetic.reference_size} reference questions a plan, "
            f"but selector.type {sections.selector.type!r} ignores the estimates",
        )


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
