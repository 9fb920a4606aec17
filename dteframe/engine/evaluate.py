"""Measure the policy on the held-out questions."""

from __future__ import annotations

import numpy as np

from dteframe.engine.answer import answer
from dteframe.engine.setup import Setup
from dteframe.reports import EvaluationReport


def evaluate(setup: Setup, step: int) -> EvaluationReport:
    """Answer every held-out question ``num_generations_eval`` times with the policy of ``step`` steps."""
    groups = answer(
        setup, tuple(setup.pool.evaluation), "evaluation", step, setup.streams(step, "evaluation")
    )
    rates = np.array([group.success_rate for group in groups])
    completions = [completion for group in groups for completion in group.completions]
    report = EvaluationReport(
        success_rate=float(rates.mean()),
        standard_error=float(rates.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else 0.0,
        solved_fraction=float(np.mean(rates > 0)),
        num_questions=len(groups),
        num_generations=groups[0].trials,
        completion_length_mean_tokens=float(np.mean([len(item.token_ids) for item in completions])),
        truncated_fraction=float(np.mean([item.finish_reason == "length" for item in completions])),
    )
    setup.hooks.hook.dteframe_evaluated(step=step, evaluation=report)
    return report
