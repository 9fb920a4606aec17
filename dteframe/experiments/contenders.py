"""What a fitted adapter has to beat on the same features, and what each of them predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dteframe.contracts import Estimator
from dteframe.estimators.adapter import Adapter, build_adapter, save_adapter, start_from_easiness
from dteframe.estimators.adapter_training import FittedAdapter
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


@dataclass(frozen=True, slots=True)
class Policy:
    """What one policy answered: on references, which are revealed, and on the questions to judge by."""

    references: Int[np.ndarray, "references"]
    """Rows of the embeddings."""
    reference_counts: Int[np.ndarray, "2 references"]
    """Successes and trials."""
    judged: Int[np.ndarray, "judged"]
    counts: Int[np.ndarray, "2 judged"]


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
        estimator.start(questions, lambda texts, values=values: values[[int(text) for text in texts]])  # type: ignore[misc]  # a default binds the loop's value
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
