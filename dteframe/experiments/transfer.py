"""How well adapters predict questions, or policies, that they were not fitted to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from dteframe.contracts import Context
from dteframe.errors import DataError
from dteframe.estimators.adapter_training import SolveCounts
from dteframe.estimators.attention_math import pearson
from dteframe.estimators.embedding_options import EmbeddingsConfig
from dteframe.experiments.comparison_text import cell
from dteframe.experiments.contenders import CONTENDERS, JUDGED, STOPPING, TRAINED_ON, Split, judge
from dteframe.experiments.fit_estimator import Features, FitSettings, cells_of, features_of, fit_to
from dteframe.experiments.published_traces import read_any_trace
from dteframe.experiments.recorded_rates import RecordedRates, question_id_of, read_recorded_rates
from dteframe.experiments.replay_trace import Forecasts
from dteframe.experiments.scores import Score, Scores, mean_with_interval, scores_of

Unseen: TypeAlias = Literal["questions", "policies"]
NUM_FOLDS = 5
STOPPING_FRACTION = 0.2
"""Of the fitted questions of the judged table: they decide when training ends, and are the references."""
RELATIVES: Mapping[str, str] = {
    "chatgpt": "gpt",
    "o1": "gpt",
    "meta": "llama",
    "tora": "llama",
    "mixtral": "mistral",
    "rho": "mistral",
    "gemma": "gemini",
}
"""First words of model names that come from the same house or from the same weights."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """How one contender did over all folds and seeds."""

    contender: str
    scores: Scores
    """Over all forecasts together; levels of policies and folds count."""
    pearson_within: Score | None
    """Mean of the correlations within each policy of each fold; the interval is over those."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How a transfer is measured."""

    unseen: Unseen
    num_seeds: int
    fit: FitSettings
    tell: Callable[[str], None]


def transfer_tables(
    tables: Sequence[Path],
    also: Sequence[Path],
    named: Sequence[tuple[str, EmbeddingsConfig]],
    unseen: Unseen,
    num_seeds: int,
    context: Context,
) -> list[tuple[str, Transfer]]:
    """Measure the transfer with each recipe's embeddings; give every contender's under the recipe's name.

    Raises:
        DataError: there is not one table to judge on, or a table cannot be used.
    """
    if len(tables) != 1:
        raise DataError(f"{len(tables)} tables are given to judge on; name one, and others with --also")
    recorded, judged_by = recorded_for_transfer(tables[0], also, unseen, context.warn)
    results = []
    for name, embeddings in named:
        features = features_of(recorded.texts, embeddings, context)
        settings = TransferSettings(unseen, num_seeds, FitSettings(), context.warn)
        results += [(name, item) for item in transfer(recorded, judged_by, features, settings)]
    return results


def recorded_for_transfer(
    table: Path, also: Sequence[Path], unseen: Unseen, tell: Callable[[str], None]
) -> tuple[RecordedRates, SolveCounts]:
    """Read what may be fitted to, and what is judged: for unseen questions, the two halves of the time.

    Raises:
        DataError: a table cannot be used, or the judged one has no second half.
    """
    trace = read_any_trace(table)
    middle = None
    if unseen == "questions":
        middle = int(trace.policy_version.max() + 1) // 2
    recorded = read_recorded_rates([table, *also], tell, until=middle)
    is_judged = np.ones(len(trace), bool) if middle is None else trace.policy_version >= middle
    is_judged &= np.array([purpose != "evaluation" for purpose in trace.purposes])
    if middle == 0 or not is_judged.any():
        raise DataError(
            f"{table}: all rows are of policy_version {trace.policy_version[0]}; unseen questions are judged "
            "in the second half of the time"
        )
    ids = [question_id_of(text) for text in trace.texts]
    places = {name: place for place, name in enumerate(recorded.counts.question_ids)}
    policies = tuple(dict.fromkeys(trace.policies))
    block = np.zeros((2, len(policies), len(places)), np.int64)
    for row in np.flatnonzero(is_judged):
        place = places.get(ids[trace.question[row]])
        if place is not None:
            block[:, policies.index(trace.policies[row]), place] += trace.successes[row], trace.trials[row]
    names = tuple(name or table.stem for name in policies)
    return recorded, SolveCounts(names, recorded.counts.question_ids, block[0], block[1])


def splits(recorded: RecordedRates, judged_by: SolveCounts, unseen: Unseen, seed: int) -> list[Split]:
    """Cut the judged table's questions into folds by near duplicates, and its policies by family if asked.

    Near duplicates of judged questions are fitted to in no table; all else of other tables is trained on.
    """
    rng = np.random.default_rng([seed, 4])
    is_of_table = judged_by.trials.sum(axis=0) > 0
    names, places = np.unique(recorded.groups, return_inverse=True)
    group_folds = np.full(len(names), -1)
    own_groups = np.unique(places[is_of_table])
    group_folds[rng.permutation(own_groups)] = np.arange(len(own_groups)) % NUM_FOLDS
    folds = group_folds[places]
    families = [family_of(name) for name in judged_by.policies]
    distinct = rng.permutation(sorted(set(families)))
    family_folds = {str(name): place % NUM_FOLDS for place, name in enumerate(distinct)}
    made = []
    for fold in range(NUM_FOLDS):
        is_stopping = np.zeros(len(names), bool)
        fitted = own_groups[group_folds[own_groups] != fold]
        is_stopping[rng.permutation(fitted)[: round(STOPPING_FRACTION * len(fitted))]] = True
        sides = np.where(folds == fold, JUDGED, np.where(is_stopping[places], STOPPING, TRAINED_ON))
        policies = list(range(len(judged_by.policies)))
        counts = recorded.counts
        if unseen == "policies":
            policies = [place for place in policies if family_folds[families[place]] == fold]
            unfit = {judged_by.policies[place] for place in policies}
            is_fit = np.array([name not in unfit for name in counts.policies])
            counts = replace(
                counts,
                policies=tuple(name for name in counts.policies if name not in unfit),
                successes=counts.successes[is_fit],
                trials=counts.trials[is_fit],
            )
        made.append(Split(seed * NUM_FOLDS + fold, counts, sides, judged_by, policies))
    return made


def family_of(policy: str) -> str:
    """Name what a model descends from by the first word of its name."""
    word = re.split(r"[-_@ ]", policy.lower())[0]
    stem = re.sub(r"[\d.]+$", "", word) or word
    return RELATIVES.get(word) or RELATIVES.get(stem, stem)


def transfer(
    recorded: RecordedRates, judged_by: SolveCounts, features: Features, settings: TransferSettings
) -> list[Transfer]:
    """Fit in each fold of each seed, and judge every contender on the fold's questions and policies."""
    forecasts: dict[str, list[Forecasts]] = {name: [] for name in CONTENDERS}
    for seed in range(settings.num_seeds):
        for split in splits(recorded, judged_by, settings.unseen, seed):
            training = replace(settings.fit.training, seed=seed + 1)
            fitted = fit_to(
                features,
                split.counts,
                recorded.groups,
                split.sides,
                replace(settings.fit, training=training),
                lambda *_: None,
            )
            settings.tell(
                f"seed {seed}, fold {split.number % NUM_FOLDS}: penalty {fitted.easiness.penalty:g}, gains "
                f"{fitted.easiness.gains}, best epoch {fitted.best_epoch}"
            )
            rng = np.random.default_rng([split.number, 5])
            found = judge(split, features.matrix, fitted, training.reference_size, rng)
            for name, items in found.items():
                forecasts[name] += items
    return [_transfer_of(name, items) for name, items in forecasts.items()]


def transfer_text(rows: Sequence[tuple[str, Transfer]]) -> str:
    """Lay transfers out as a table in Markdown, a line per recipe and contender."""
    lines = [
        "| features | predictor | r within | r over all | NLL | Brier | slope |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, item in rows:
        cells = (cell(item.pearson_within, 3), *cells_of(item.scores))
        lines.append(f"| {recipe} | {item.contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _transfer_of(contender: str, items: Sequence[Forecasts]) -> Transfer:
    if not items:
        raise DataError("no policy has enough questions in any fold; give a larger table")
    scores = scores_of(items, lambda item: np.ones(len(item.mean), bool), 0)
    assert scores is not None, "there are forecasts"
    within = [pearson(item.mean, item.successes / item.trials) for item in items]
    known = np.array([value for value in within if value is not None])
    return Transfer(contender, scores, mean_with_interval(known, 0) if len(known) else None)
