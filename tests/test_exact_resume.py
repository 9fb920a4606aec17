"""Exact resume, seen from outside: every part of a run is a process of its own, which may be killed."""

import json
import sys
from pathlib import Path

import pytest
from tiny_run import TINY
from typer.testing import CliRunner

from dteframe.cli import app
from dteframe.errors import DTEFrameError
from dteframe.experiments.verify_resume import StopAt, _difference

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from kill import kill_many

FORGETS = """
from typing import Literal, final
import numpy as np
from dteframe import Selection, Selector, SelectorConfig, hookimpl

class ForgetsConfig(SelectorConfig):
    type: Literal["forgets"] = "forgets"

@final
class Forgets(Selector):
    \"\"\"Goes round the pool, and does not keep where it is.\"\"\"

    config: ForgetsConfig
    place = 0

    def select(self, estimate, count, rng):
        names = np.roll(estimate.question_ids, -self.place)
        self.place += count
        return Selection(tuple(names[:count].tolist()))

@hookimpl
def dteframe_components():
    return [Forgets]
"""


def verified(folder, *words):
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "forgets.py").write_text(FORGETS)
    plugins = ["--plugins", str(folder / "forgets.py")]
    return CliRunner().invoke(app, ["verify-resume", str(folder / "tiny.yaml"), *words, *plugins])


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_and_resumed_equal_the_one_that_was_let_be(tmp_path):
    """A sample; ``make faults`` does 200."""
    trials = list(kill_many(tmp_path, range(1000, 1010)))
    assert [done.difference for done in trials] == [None] * 10
    kills = [kill for done in trials for kill in done.kills]
    assert len(kills) >= 8
    assert {kill.by for kill in kills} == {"time", "stage", "file"}
    assert len({kill.resumed_from for kill in kills}) >= 3


@pytest.mark.slow
def test_a_recipe_that_resumes_exactly_is_told_apart_from_one_whose_selector_forgets(tmp_path):
    words = ["--steps", "4", "--stop", "1:scored", "--stop", "3:planned", "training.evaluate_every=0"]
    done = verified(tmp_path, *words, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {
        "same": True,
        "first_difference": None,
        "steps": 4,
        "stops": ["1:scored", "3:planned"],
        "resumed_from": ["the start", "step_000002"],
    }
    done = verified(tmp_path, *words[:2], *words[4:], "selector={type: forgets}")
    assert done.exit_code == 1, done.stderr
    assert done.stdout.startswith("different: metrics.jsonl")


@pytest.mark.parametrize("text", ["scored", "3", "3:sampled", "x:scored"])
def test_a_stop_is_a_step_and_a_moment(text):
    with pytest.raises(DTEFrameError, match="write a step and one of planned, scored, evaluated, finished"):
        StopAt.parsed(text)


def test_the_first_difference_is_named_with_both_values():
    one, other = {"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.5}]}
    assert _difference(one, one, "state") is None
    assert _difference(one, other, "state") == "state: a[1]: b: 2.0 straight, 2.5 with stops"
    assert _difference({"a": 1}, {"b": 1}, "state") == "state: has ['a', 'b'] on one side only"
    assert _difference({"a": float("nan")}, {"a": float("nan")}, "state") is None
