"""How well predicted success rates agree with measured ones."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def pearson(predicted: Float[np.ndarray, "n"], measured: Float[np.ndarray, "n"]) -> float | None:
    """Correlate two series; None where either does not vary."""
    if len(predicted) < 2 or np.ptp(predicted) < 1e-12 or np.ptp(measured) < 1e-12:
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def brier(predicted: Float[np.ndarray, "n"], measured: Float[np.ndarray, "n"]) -> float | None:
    """Average the squared difference; None for empty series."""
    return float(np.mean((predicted - measured) ** 2)) if len(predicted) else None
