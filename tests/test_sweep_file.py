"""A sweep file is the product of its axes and seeds; every run is checked, and printed as a command."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dteframe import RecipeError
from dteframe.cli import app
from dteframe.recipe import load_recipe
from dteframe.recipe.document import read_document
from dteframe.recipe.flow import override_value
from dteframe.recipe.sweep import load_sweep
from dteframe.registry import load_registry

PROJECT = Path(__file__).parents[1]
BASE = """\
name: base
training: {max_steps: 2, questions_per_step: 8, num_generations: 2}
model: {type: from_scratch, hidden_size: 32, num_heads: 2}
dataset: {type: list_operations, size: 200}
reward: {type: exact_match}
estimator: {type: attention, reference_size: 4, embeddings: {type: policy}}
selector: {type: difficulty_target}
replay: {type: fifo, capacity: 8}
"""
SWEEP = """\
recipe: ../base.yaml
seeds: [0, 7]
overrides:
  training.evaluate_every: 1
axes:
  model:
    small: {model.hidden_size: 32}
    large: {model.hidden_size: 64}
  arm:
    grpo:
      estimator: {type: none}
      selector: {type: uniform}
      replay: {type: none}
    dots_rr: {}
"""


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("sweeps").mkdir()

    def write(text=SWEEP):
        Path("sweeps/mine.yaml").write_text(text)
        return Path("sweeps/mine.yaml")

    return write


def loaded(path, *overrides):
    return load_sweep(path, overrides, lambda recipe: load_registry([], near=recipe))


def refusal(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        loaded(path, *overrides)
    return str(caught.value).splitlines()


def dteframe_does(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# What runs there are


COMPARED = SWEEP + "comparison: {axis: arm, baseline: grpo}\n"


def test_a_comparison_has_its_defaults(sweep_file):
    comparison = loaded(sweep_file(COMPARED)).comparison
    assert (comparison.target_budget_fraction, comparison.trailing_evaluations) == (0.8, 3)


def test_a_comparison_along_an_axis_that_is_not_there_is_refused(sweep_file):
    assert refusal(sweep_file(COMPARED.replace("axis: arm", "axis: arms"))) == [
        "sweeps/mine.yaml:15:20: comparison.axis: there is no axis 'arms'; did you mean 'arm'?"
    ]


def test_a_comparison_with_a_baseline_that_is_no_variant_is_refused(sweep_file):
    assert refusal(sweep_file(COMPARED.replace("baseline: grpo", "baseline: sft"))) == [
        "sweeps/mine.yaml:15:35: comparison.baseline: axis 'arm' has no variant 'sft'; "
        "variants: grpo, dots_rr"
    ]


def test_runs_are_the_product_of_the_seeds_and_the_axes(sweep_file):
    sweep = loaded(sweep_file())
    assert [run.name for run in sweep.runs] == [
        "small-grpo-s0",
        "small-dots_rr-s0",
        "large-grpo-s0",
        "large-dots_rr-s0",
        "small-grpo-s7",
        "small-dots_rr-s7",
        "large-grpo-s7",
        "large-dots_rr-s7",
    ]
    assert sweep.runs[6].variants == {"model": "large", "arm": "grpo"}
    assert sweep.runs[6].overrides == (
        "name=large-grpo-s7",
        "seed=7",
        "training.evaluate_every=1",
        "model.hidden_size=64",
        "estimator={type: none}",
        "selector={type: uniform}",
        "replay={type: none}",
    )


def test_a_run_is_the_base_recipe_with_its_overrides(sweep_file):
    sweep = loaded(sweep_file())
    recipe = load_recipe(sweep.recipe, sweep.runs[6].overrides, load_registry([])).recipe
    assert (recipe.name, recipe.seed, recipe.replays) == ("large-grpo-s7", 7, False)
    assert (recipe.model.hidden_size, recipe.training.evaluate_every) == (64, 1)


def test_without_axes_the_seeds_are_run_under_the_name_of_the_file(sweep_file):
    sweep = loaded(sweep_file("recipe: ../base.yaml\nseeds: [3, 4]\n"))
    assert [run.name for run in sweep.runs] == ["mine-s3", "mine-s4"]


def test_overrides_of_the_command_line_come_last(sweep_file):
    sweep = loaded(sweep_file(), "training.max_steps=1")
    assert {run.overrides[-1] for run in sweep.runs} == {"training.max_steps=1"}


# What is wrong with a sweep file


def test_every_problem_of_the_file_is_reported_by_line(sweep_file):
    text = """\
recipe: ../base.yaml
seeds: [0, 0]
sedes: [1]
axes:
  arm:
    a-b: {}
    c:
      name: mine
      training.max_steps=3: 4
  empty: {}
"""
    assert refusal(sweep_file(text)) == [
        "sweeps/mine.yaml:2:12: seeds.1: 0 is given twice; delete one of the two",
        "sweeps/mine.yaml:3:1: sedes: unknown key; did you mean 'seeds'?",
        "sweeps/mine.yaml:6:5: axes.arm.a-b: 'a-b' cannot be part of a run's name; use letters, digits, '.' "
        "and '_'",
        "sweeps/mine.yaml:8:7: axes.arm.c.name: is the sweep's to set: names are made of the variants', "
        "seeds are listed under 'seeds'",
        "sweeps/mine.yaml:9:7: axes.arm.c.training.max_steps=3: is no key; write `key: value`, the key with "
        "dots, such as training.max_steps",
        "sweeps/mine.yaml:10:10: axes.empty: has no variants; give at least one, or delete the axis",
    ]


def test_a_bad_override_is_reported_once_where_it_stands_with_the_runs_it_is_in(sweep_file):
    text = SWEEP.replace("evaluate_every", "evaluate_evry").replace(
        "dots_rr: {}", "dots_rr:\n      estimator:\n        type: attention\n        reference_sise: 2"
    )
    assert refusal(sweep_file(text)) == [
        "sweeps/mine.yaml:4:3: training.evaluate_evry: unknown key; did you mean 'evaluate_every'?",
        "sweeps/mine.yaml:17:9: estimator.reference_sise: unknown key; did you mean 'reference_size'? "
        "(4 of 8 runs, such as small-dots_rr-s0)",
    ]


def test_problems_of_the_base_recipe_are_reported_in_its_file(sweep_file):
    path = sweep_file()
    Path("base.yaml").write_text(BASE.replace("size: 200", "sise: 200"))
    assert refusal(path) == ["base.yaml:4:34: dataset.sise: unknown key; did you mean 'size'?"]


def test_unknown_keys_do_not_hide_problems_of_runs(sweep_file):
    problems = refusal(sweep_file("sedes: [1]\n" + SWEEP.replace("hidden_size: 64", "hidden_size: big")))
    assert [problem.partition(":")[2].partition(" ")[0] for problem in problems] == ["1:1:", "9:13:"]


def test_a_key_that_two_axes_set_is_refused(sweep_file):
    text = SWEEP.replace("small: {", "small: {replay.capacity: 4, ")
    assert refusal(sweep_file(text)) == [
        "sweeps/mine.yaml:13:7: axes.arm.grpo.replay: axis 'model' sets it too (replay.capacity, "
        "sweeps/mine.yaml:7:13); let one axis decide it"
    ]


def test_a_missing_base_recipe_is_named(sweep_file):
    assert refusal(sweep_file(SWEEP.replace("../base", "base"))) == [
        "sweeps/mine.yaml:1:9: recipe: there is no file 'sweeps/base.yaml'; give its path from the sweep's "
        "folder"
    ]


def test_names_that_are_too_long_for_a_folder_are_refused(sweep_file):
    problems = refusal(sweep_file(SWEEP.replace("small:", f"{'x' * 100}:")))
    assert len(problems) == 4
    assert problems[0].startswith(f"sweeps/mine.yaml:1:1: name: '{'x' * 100}-grpo-s0' cannot be a folder's")


def test_name_and_seed_cannot_be_overridden_for_all_runs(sweep_file):
    assert refusal(sweep_file(), "seed=3") == [
        "--set seed=3: seed: would be the same in all runs; the sweep's file decides it"
    ]


def test_a_recipe_is_no_sweep_and_a_sweep_is_no_recipe(sweep_file):
    path = sweep_file()
    assert refusal(Path("base.yaml")) == [
        "base.yaml: is no sweep file; a sweep has the keys recipe, seeds, overrides, axes, comparison"
    ]
    done = dteframe_does("run", path)
    assert (done.exit_code, done.stderr) == (
        2,
        "sweeps/mine.yaml: is a sweep, many runs; "
        "`dteframe sweep sweeps/mine.yaml` prints a command for each\n",
    )


def test_a_note_is_given_once_and_placed_in_the_file(sweep_file):
    text = SWEEP.replace("estimator: {type: none}", "estimator.type: none")
    assert list(loaded(sweep_file(text)).notes) == [
        "base.yaml:6:30: estimator.reference_size: dropped; estimator 'none' has no such key "
        "(sweeps/mine.yaml:11:7) (4 of 8 runs, such as small-grpo-s0)",
        "base.yaml:6:49: estimator.embeddings: dropped; estimator 'none' has no such key "
        "(sweeps/mine.yaml:11:7) (4 of 8 runs, such as small-grpo-s0)",
    ]


# The commands


def test_validate_checks_sweeps_beside_recipes(sweep_file):
    done = dteframe_does("validate", "base.yaml", sweep_file())
    assert (done.exit_code, done.stdout, done.stderr) == (
        0,
        "base.yaml: ok\nsweeps/mine.yaml: ok, 8 runs\n",
        "",
    )
    sweep_file(SWEEP.replace("hidden_size: 64", "hidden_size: 0"))
    done = dteframe_does("validate", "base.yaml", "sweeps/mine.yaml", "--json")
    assert done.exit_code == 2
    assert [(verdict["ok"], verdict["num_runs"]) for verdict in json.loads(done.stdout)] == [
        (True, None),
        (False, None),
    ]


def test_a_recipe_whose_path_has_an_equals_sign_is_no_override(sweep_file):
    sweep_file()
    Path("lr=1.yaml").write_text(BASE)
    done = dteframe_does("validate", "lr=1.yaml")
    assert (done.exit_code, done.stdout) == (0, "lr=1.yaml: ok\n")


def test_sweep_prints_one_command_per_run_and_runs_nothing(sweep_file):
    words = ("training.max_steps=1", "--executor", "commands", "--processes", 2)
    done = dteframe_does("sweep", sweep_file(), *words)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert lines[0] == (
        "dteframe run base.yaml name=small-grpo-s0 seed=0 training.evaluate_every=1 model.hidden_size=32 "
        "'estimator={type: none}' 'selector={type: uniform}' 'replay={type: none}' training.max_steps=1 "
        "--runs runs/mine --resume --processes 2"
    )
    assert [path.name for path in Path("runs/mine").iterdir()] == ["sweep.json"]


def test_sweep_as_json_has_the_words_and_the_variants(sweep_file):
    words = ("sweep", sweep_file(), "--runs", "elsewhere", "--executor", "commands")
    runs = json.loads(dteframe_does(*words, "--json").stdout)
    assert [shlex.join(run["command"]) for run in runs] == dteframe_does(*words).stdout.splitlines()
    assert (runs[5]["name"], runs[5]["seed"]) == ("small-dots_rr-s7", 7)
    assert runs[5]["variants"] == {"model": "small", "arm": "dots_rr"}


def test_sweep_prints_no_command_when_any_run_is_wrong(sweep_file):
    done = dteframe_does("sweep", sweep_file(SWEEP.replace("hidden_size: 64", "hidden_size: 0")))
    assert (done.exit_code, done.stdout) == (2, "")


def test_printed_commands_are_good_for_a_shell(sweep_file):
    """The shell's words are the sweep's: a stand-in for `dteframe` prints those that it gets."""
    text = SWEEP.replace("small: {", 'small: {dataset.prompt_template: "{question}\\nit\'s $HOME `x` é", ')
    text = text.replace("large: {", 'large: {dataset.prompt_template: "{question}", ')
    path = sweep_file(text.replace("list_operations", "list_operations"))
    Path("base.yaml").write_text(BASE.replace("list_operations, size: 200", "huggingface, path: x"))
    Path("bin").mkdir()
    Path("bin/dteframe").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PRINT_WORDS}" "$@"\n')
    Path("bin/dteframe").chmod(0o755)
    printed = dteframe_does("sweep", path, "--executor", "commands").stdout
    done = subprocess.run(
        ["sh"],
        input=printed,
        env={**os.environ, "PATH": f"bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(printed.splitlines()) == 8
    assert [tuple(line[2:-3]) for line in words] == [run.overrides for run in loaded(path).runs]


PRINT_WORDS = "import json, sys; print(json.dumps(sys.argv[1:]))"


def test_the_papers_pairs_are_checked_in_less_than_two_seconds_of_cpu():
    measured = (
        "import sys, time\nfrom dteframe.cli import app\n"
        "code = app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\nprint(time.process_time())"
    )
    path = "recipes/sweeps/paper_six_pairs.yaml"
    done = subprocess.run(
        [sys.executable, "-c", measured, "validate", path],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    verdict, seconds = done.stdout.splitlines()
    assert verdict == f"{path}: ok, 54 runs"
    assert float(seconds) < 2.0


# Values as words

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_a_written_value_reads_back_from_one_line(value):
    text = override_value(value)
    assert len(text.splitlines()) == 1
    document = read_document(text)
    assert (document.value, document.problems) == (value, [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-6, "1e-06"),
        (60, "60"),
        (True, "true"),
        (None, "null"),
        (float("inf"), ".inf"),
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("1e-3", '"1e-3"'),
        ("a: b", '"a: b"'),
        ("", '""'),
        ({"type": "none", "path": "a b", "on": [1.0, "1"]}, '{type: none, path: "a b", on: [1.0, "1"]}'),
        ("two\nlines\x85", '"two\\nlines\\u0085"'),
    ],
)
def test_values_are_written_plainly_where_they_can_be(value, text):
    assert override_value(value) == text


# The paper's pairs


@pytest.fixture(scope="module")
def papers_recipes():
    path = PROJECT / "recipes" / "sweeps" / "paper_six_pairs.yaml"
    registry = load_registry([])
    sweep = load_sweep(path, (), lambda recipe: registry)
    assert sweep.notes == ()
    return {run.name: load_recipe(sweep.recipe, run.overrides, registry).recipe for run in sweep.runs}


PAIRS = {
    "math_1.5b_math": ("Qwen/Qwen2.5-Math-1.5B", "nlile/hendrycks-MATH-benchmark", None, 3072),
    "math_1.5b_deepscaler": (
        "Qwen/Qwen2.5-Math-1.5B",
        "agentica-org/DeepScaleR-Preview-Dataset",
        10240,
        3072,
    ),
    "math_1.5b_orz": ("Qwen/Qwen2.5-Math-1.5B", "Open-Reasoner-Zero/orz_math_57k_collection", 8192, 3072),
    "3b_deepscaler": ("Qwen/Qwen2.5-3B", "agentica-org/DeepScaleR-Preview-Dataset", 10240, 4096),
    "3b_deepmath": ("Qwen/Qwen2.5-3B", "zwhe99/DeepMath-103K", 8192, 4096),
    "math_7b_deepscaler": ("Qwen/Qwen2.5-Math-7B", "agentica-org/DeepScaleR-Preview-Dataset", 10240, 3072),
}
"""Model, questions, size of the pool and longest completion: appendix D.1 and table 4 of the DOTS paper."""


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_the_papers_in_every_arm_and_seed(papers_recipes, pair):
    runs = {name: recipe for name, recipe in papers_recipes.items() if name.startswith(f"{pair}-")}
    assert sorted(runs) == sorted(f"{pair}-{arm}-s{seed}" for arm in ARMS for seed in (0, 1, 2))
    for recipe in runs.values():
        dataset, training = recipe.dataset, recipe.training
        length = recipe.rollout.max_completion_length
        assert (recipe.model.path, dataset.path, dataset.sample_size, length) == PAIRS[pair]
        assert len(recipe.model.revision) == 40
        assert (training.questions_per_step, training.num_generations, training.max_steps) == (512, 8, 60)
        assert (training.learning_rate, training.weight_decay, training.lr_scheduler_type) == (
            1e-6,
            0.0,
            "constant",
        )
        assert (training.max_prompt_length, recipe.rollout.temperature) == (1024, 0.6)
        assert (recipe.objective.num_minibatches, recipe.objective.beta) == (8, 0.0)


ARMS = {
    "grpo": ("none", "uniform", "none", 512, 0),
    "dots": ("attention", "difficulty_target", "none", 512, 256),
    "dots_rr": ("attention", "difficulty_target", "fifo", 256, 256),
}
"""Estimator, selector, replay, fresh groups of a step, reference questions of a plan."""


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_papers_in_every_pair(papers_recipes, arm):
    for pair in PAIRS:
        recipe = papers_recipes[f"{pair}-{arm}-s1"]
        arithmetic = recipe.arithmetic()
        plugins = (recipe.estimator.type, recipe.selector.type, recipe.replay.type)
        assert (*plugins, arithmetic.num_fresh, arithmetic.reference_size) == ARMS[arm]
        assert recipe.seed == 1
