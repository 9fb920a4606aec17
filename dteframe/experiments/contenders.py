"""What a fitted adapter has to beat on the same features, and what each of them predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, Int

from dteframe.contracts import Estimator
from dteframe.estimators.adapter import Adapter, build_adapter, save_adapter, start_from_easiness
from dteframe.estimators.adapter_training import FittedAdapter, SolveCounts
from dteframe.estimators.attention import AttentionConfig, AttentionEstimator
from dteframe.estimators.policy_probe import PolicyProbeConfig, PolicyProbeEstimator
from dteframe.experiments.replay_trace import Forecasts, quiet_context
from dteframe.records import Observation, Question

CONTENDERS: Mapping[str, str] = {
    "constant": "the references' mean rate",
    "attention": "attention on the plain embeddings, no adapter",
    "probe": "ridge regression on the references alone (`policy_probe`)",
    "ridge": "ridge regression on all recorded rates, level and slope from the references",
    "adapter": "the fitted adapter",
}
"""Who predicts, in the order of the tables."""
CERTAIN = 1e6
"""Evidence of all forecasts: the likelihood is that of the predicted rates alone."""


MIN_JUDGED = 8
"""Questions of a policy below which it is not judged."""
TRAINED_ON, STOPPING, JUDGED = 0, 1, 2
"""Sides of a split."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What one policy answered: on references, which are revealed, and on the questions to judge by."""

    references: Int[np.ndarray, "references"]
    """Rows of the embeddings."""
    reference_counts: Int[np.ndarray, "2 references"]
    """Successes and trials."""
    judged: Int[np.ndarray, "judged"]
    counts: Int[np.ndarray, "2 judged"]


@dataclass(frozen=True, slots=True)
class Split:
    """Which questions are fitted to, and who is judged on which of the others."""

    number: int
    """Of the fold and seed."""
    counts: SolveCounts
    """What may be fitted to, if the sides allow it."""
    sides: Int[np.ndarray, "questions"]
    """Trained on, stopped by (and references), or judged."""
    judged_by: SolveCounts
    """What the judged policies answered, on the same questions."""
    judged_policies: Sequence[int]


def judge(
    split: Split,
    embeddings: Float[np.ndarray, "questions width"],
    fitted: FittedAdapter,
    reference_size: int,
    rng: np.random.Generator,
) -> dict[str, list[Forecasts]]:
    """Let every contender predict what each judged policy answered, if it answered enough."""
    judged, stopping = (np.flatnonzero(split.sides == side) for side in (JUDGED, STOPPING))
    forecasts: dict[str, list[Forecasts]] = {name: [] for name in CONTENDERS}
    for place in split.judged_policies:
        policy = policy_on(split.judged_by, place, stopping, judged, reference_size, rng)
        if policy is None:
            continue
        number = split.number * len(split.judged_by.policies) + place
        with TemporaryDirectory() as folder:
            found = forecasts_of(fitted, embeddings, policy, number, Path(folder))
        for name, forecast in found.items():
            forecasts[name].append(forecast)
    return forecasts


def policy_on(
    counts: SolveCounts,
    number: int,
    references: Int[np.ndarray, "pool"],
    judged: Int[np.ndarray, "judged"],
    size: int,
    rng: np.random.Generator,
) -> Policy | None:
    """Draw a policy's references, and give what it answered; None where it answered too little."""
    trials = counts.trials[number]
    pool, asked = references[trials[references] > 0], judged[trials[judged] > 0]
    if len(pool) < 2 or len(asked) < MIN_JUDGED:
        return None
    drawn = np.sort(rng.choice(pool, min(size, len(pool)), replace=False))
    block = np.stack([counts.successes[number], trials])
    return Policy(drawn, block[:, drawn], asked, block[:, asked])


def forecasts_of(
    fitted: FittedAdapter,
    embeddings: Float[np.ndarray, "questions width"],
    policy: Policy,
    number: int,
    folder: Path,
) -> dict[str, Forecasts]:
    """Predict the judged questions of one policy by every contender, as it would in a run.

    Args:
        fitted: easiness and adapter; its columns' centre and spread serve all contenders.
        embeddings: of all questions.
        policy: whose questions.
        number: of the policy and split, which keeps forecasts apart.
        folder: for files that last as long as this.
    """
    adapter = fitted.adapter
    flat = start_from_easiness(build_adapter(adapter.shape), adapter.easiness)
    size = max(len(policy.references), 2)
    contenders: dict[str, tuple[Estimator, bool]] = {}
    context = quiet_context(folder, folder, 0, lambda _: None)
    for name, used in (("ridge", flat), ("adapter", adapter)):
        path = folder / f"{name}.safetensors"
        save_adapter(Adapter(replace(used.shape, embedder_id="policy"), used.modules, used.easiness), path)
        config = AttentionConfig(reference_size=size, adapter=str(path))
        contenders[name] = AttentionEstimator(config, context), False
    contenders["attention"] = AttentionEstimator(AttentionConfig(reference_size=size), context), True
    probe = PolicyProbeConfig(half_life=1e9, max_groups=size)
    contenders["probe"] = PolicyProbeEstimator(probe, context), True
    rows = np.concatenate([policy.references, policy.judged])
    raw = np.asarray(embeddings[rows], np.float32)
    scaled = adapter.easiness.scaled(raw)
    ids = [str(place) for place in range(len(rows))]
    questions = [Question(name, name, name, "") for name in ids]
    count = len(policy.references)
    solved, tried = policy.reference_counts
    observation = Observation(tuple(ids[:count]), solved, tried, 0, "reference")
    judged = slice(count, None)
    found = {"constant": np.full(len(policy.judged), solved.sum() / tried.sum())}
    for name, (estimator, is_scaled) in contenders.items():
        values = scaled if is_scaled else raw
        estimator.start(questions, partial(_rows_of, values))
        estimator.observe(observation)
        estimate = estimator.predict(0)
        found[name] = estimate.mean[judged]
    rounds, is_seen = np.full(len(policy.judged), number), np.zeros(len(policy.judged), bool)
    successes, trials = policy.counts
    certain = np.full(len(policy.judged), CERTAIN)
    return {
        name: Forecasts(rounds, policy.judged, found[name], certain, successes, trials, is_seen)
        for name in CONTENDERS
    }


def _rows_of(
    matrix: Float[np.ndarray, "questions width"], texts: Sequence[str], **options: object
) -> Float[np.ndarray, "texts width"]:
    """Give the rows whose numbers the texts are."""
    rows: Float[np.ndarray, "texts width"] = matrix[[int(text) for text in texts]]
    return rows
