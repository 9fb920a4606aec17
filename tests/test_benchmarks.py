"""The benchmarks run: at sizes that say nothing about speed."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_plans_over_a_pool_are_timed_beside_the_bare_product(tmp_path):
    from selection import SELECTORS, measure

    found = measure(tmp_path, 2000, None, num_plans=2)
    assert set(found.select) == set(SELECTORS)
    for seconds in (found.products, found.predict, *found.select.values()):
        assert len(seconds) == 2 and min(seconds) > 0
    assert found.memory["peak of the process"] > 1  # at least the matrix itself


def test_the_exponent_is_the_slope_of_logarithms():
    from growth import slope

    assert slope([8, 16, 32], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert slope([8, 16, 32], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert slope([8, 16, 32], [3.0, 3.0, 3.0]) == pytest.approx(0)


def test_a_file_counts_for_whoever_runs_it():
    from engine_share import ENGINE, MODEL, REWARD, owner_of

    assert owner_of("/x/dteframe/engine/step.py") == ENGINE
    assert owner_of("/x/dteframe/rollouts/decode.py") == MODEL
    assert owner_of("/x/site-packages/torch/utils/tensorboard/writer.py") == ENGINE
    assert owner_of("/x/site-packages/torch/nn/functional.py") == MODEL
    assert owner_of("/x/benchmarks/hash_reward.py") == REWARD
    assert owner_of("/usr/lib/python3.11/json/encoder.py") is None


def test_the_rise_of_an_update_is_its_peak_above_what_was_held():
    from memory import Peaks, status_bytes

    peaks = Peaks()
    held = bytearray(64 * 2**20)
    peaks.scored(1)
    taken = bytearray(128 * 2**20)
    del taken
    peaks.step_ended(1, is_last=False)
    assert peaks.rises[0] == pytest.approx(128 * 2**20, rel=0.1)
    assert status_bytes("VmHWM") > len(held)


def test_every_estimator_is_ready_to_predict_in_the_benchmark_of_predictions(tmp_path):
    from prediction import BATCHES, ESTIMATORS, ready

    from dteframe import Context

    context = Context(tmp_path, tmp_path, "cpu", 0, lambda *_: None, lambda _: None)
    for config in ESTIMATORS.values():
        estimate = ready(config, 600, 4, context).predict(BATCHES)
        assert len(estimate.question_ids) == 600 and estimate.evidence.any()
