"""A sample of what tests/faults does to recipes and data files thousands of times."""

import json
import math
import random
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import TINY
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from mutate_data import outcomes as data_outcomes
from mutate_recipes import Corpus, mutated, outcome_of, outcomes

from dteframe.cli import app
from dteframe.recipe.document import MAX_VALUES, read_document
from dteframe.registry import load_registry

REGISTRY = load_registry([])
SHORT = Corpus.read(most_bytes=900)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    *(
        "name",
        "seed",
        "training",
        "training.max_steps",
        "training.health",
        "training.health.entropy_fraction",
    ),
    *(
        "model",
        "model.warm_up",
        "model.lora",
        "dataset.chain_lengths",
        "reward",
        "reward.pattern",
        "estimator",
    ),
    *(
        "estimator.embeddings",
        "selector",
        "selector.type",
        "replay.capacity",
        "rollout",
        "objective",
        "tracker",
    ),
]


def test_mutated_recipes_are_plans_or_refused_with_a_place(tmp_path):
    found = list(outcomes(range(300), tmp_path, REGISTRY, SHORT))
    assert [(seed, one.message) for seed, _, one in found if one.kind == "surprise"] == []
    kinds = [one.kind for _, _, one in found]
    assert kinds.count("plan") >= 20 and kinds.count("refused") >= 150


def test_mutated_data_files_are_read_or_refused_by_name(tmp_path):
    found = list(data_outcomes(range(100), tmp_path))
    assert [(seed, what, one.message) for seed, what, one in found if one.kind == "surprise"] == []
    kinds = [one.kind for _, _, one in found]
    assert kinds.count("read") >= 10 and kinds.count("refused") >= 40


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(KEYS), value=TREES)
def test_any_value_at_any_key_is_a_plan_or_refused_with_a_place(key, value):
    written = json.dumps(value)
    for python, yaml in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        written = written.replace(python, yaml)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(TINY)
        assert outcome_of(path, [f"{key}={written}"], REGISTRY).kind != "surprise"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60) | st.text(alphabet="&*!|>%@`{}[],:-?#'\"\\ \n\tab1", max_size=40))
def test_any_text_is_read_or_has_a_problem_with_a_place(data):
    document = read_document(data)
    assert document.is_readable or document.problems
    assert all(mark.line >= 1 and mark.column >= 1 for mark, _, _ in document.problems)


def test_the_command_itself_refuses_mutated_recipes_with_code_2_and_no_traceback(tmp_path):
    runner, codes = CliRunner(), set()
    for seed in range(1000, 1006):
        path = tmp_path / "mutated.yaml"
        path.write_bytes(mutated(random.Random(seed), SHORT))
        result = runner.invoke(
            app, ["plan", str(path), "--plugins", str(Path(__file__).parents[1] / "plugins")]
        )
        codes.add(result.exit_code)
        assert result.exit_code in (0, 2), result.output
        assert "Traceback" not in result.output
        assert result.exit_code == 0 or f"{path}:" in result.output.replace("\n", "")
    assert 2 in codes


def test_values_of_a_bomb_are_not_written_out_beyond_the_limit():
    laughs = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]" for i in range(12))
    document = read_document(laughs)
    assert not document.is_readable
    assert f"more than {MAX_VALUES} values" in document.problems[0][2]
    assert document.values == document.keys == {}
    assert math.prod([9] * 11) > MAX_VALUES
