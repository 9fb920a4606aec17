"""Do the runs of a sweep: each once, resumed where it stands, tried once more when it fails."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dteframe.cli import app
from dteframe.errors import DTEFrameError
from dteframe.experiments.sweep_jobs import Job, do_job, do_locally, read_sweep_file, write_sweep_file
from dteframe.recipe.sweep import load_sweep
from dteframe.registry import load_registry

PROJECT = Path(__file__).parents[1]
BASE = """\
name: base
training:
  {max_steps: 2, questions_per_step: 4, num_generations: 2, evaluation_size: 4, evaluate_every: 1}
model: {type: from_scratch, hidden_size: 16, num_heads: 2, num_layers: 1}
dataset: {type: list_operations, size: 100, chain_lengths: [1]}
reward: {type: exact_match, answer_pattern: ":([0-9]+)"}
rollout: {type: transformers, max_completion_length: 4}
tracker: []
"""
SWEEP = """\
recipe: base.yaml
axes: {arm: {grpo: {}, other: {training.learning_rate: 1e-3}}}
comparison: {axis: arm, baseline: grpo, trailing_evaluations: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("sweep.yaml").write_text(SWEEP)
    return tmp_path


def job(*words, name="a-s0", max_steps=2):
    return Job(name, words, Path("runs") / name, max_steps)


def done(one):
    return do_job(one, os.environ, threading.Event())


def loaded():
    return load_sweep(Path("sweep.yaml"), (), lambda recipe: load_registry([], near=recipe))


def test_a_command_that_succeeds_is_done_once(folder):
    outcome = done(job("plugins"))
    assert (outcome.status, outcome.num_attempts) == ("finished", 1)
    assert "list_operations" in outcome.log.read_text()


def test_a_command_that_fails_is_tried_once_more(folder):
    outcome = done(job("compare", "nowhere"))
    assert (outcome.status, outcome.num_attempts) == ("failed", 2)
    assert outcome.log.read_text().count("nowhere: is no folder of a run") == 2


def test_a_wrong_recipe_is_not_tried_again(folder):
    outcome = done(job("validate", "nowhere.yaml"))
    assert (outcome.status, outcome.num_attempts) == ("failed", 1)


def test_a_run_with_all_of_its_steps_is_passed_over(folder):
    Path("runs/a-s0").mkdir(parents=True)
    Path("runs/a-s0/summary.json").write_text(json.dumps({"steps": 2}))
    assert done(job("compare", "nowhere")).status == "was finished"
    assert done(job("plugins", max_steps=3)).status == "finished"


def test_a_torn_summary_is_no_finished_run(folder):
    Path("runs/a-s0").mkdir(parents=True)
    Path("runs/a-s0/summary.json").write_text('{"steps"')
    assert not job().is_finished()


def test_jobs_run_side_by_side_and_all_are_told_of(folder):
    told = []
    outcomes = do_locally([job("plugins", name=f"a-s{seed}") for seed in range(3)], 2, told.append)
    assert sorted(outcome.name for outcome in outcomes) == ["a-s0", "a-s1", "a-s2"]
    assert told == outcomes


def test_what_the_runs_are_is_written_beside_them(folder):
    write_sweep_file(loaded(), Path("runs"))
    described = read_sweep_file(Path("runs/sweep.json"))
    assert [(run.name, run.seed, run.variants) for run in described.runs] == [
        ("grpo-s0", 0, {"arm": "grpo"}),
        ("other-s0", 0, {"arm": "other"}),
    ]
    assert described.comparison.baseline == "grpo"


def test_more_seeds_later_are_added_to_the_description(folder):
    write_sweep_file(loaded(), Path("runs"))
    Path("sweep.yaml").write_text(f"seeds: [1]\n{SWEEP}")
    write_sweep_file(loaded(), Path("runs"))
    names = [run.name for run in read_sweep_file(Path("runs/sweep.json")).runs]
    assert names == ["grpo-s0", "other-s0", "grpo-s1", "other-s1"]


def test_a_comparison_cannot_be_changed_once_runs_are_there(folder):
    write_sweep_file(loaded(), Path("runs"))
    Path("sweep.yaml").write_text(SWEEP.replace("baseline: grpo", "baseline: other"))
    with pytest.raises(DTEFrameError, match="runs/sweep.json: the comparison was fixed before the runs as"):
        write_sweep_file(loaded(), Path("runs"))


def test_only_the_runs_that_are_named_are_done(folder):
    def names(*words: str) -> list[str]:
        result = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--dry-run", *words])
        assert result.exit_code == 0, result.stderr
        return [line.partition(":")[0] for line in result.stdout.splitlines()]

    Path("sweep.yaml").write_text(f"seeds: [0, 1]\n{SWEEP}")
    assert names() == ["grpo-s0", "other-s0", "grpo-s1", "other-s1"], "all of a seed before the next"
    assert names("--only", "grpo-s*") == ["grpo-s0", "grpo-s1"]
    assert names("--only", "*-s1", "--only", "grpo-s0") == ["grpo-s0", "grpo-s1", "other-s1"]
    refused = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--only", "ours-*"])
    assert refused.exit_code == 1
    assert "--only ours-*: none of the 4 runs is called like this; the first is 'grpo-s0'" in refused.stderr


def test_a_dry_run_says_sizes_and_does_nothing(folder):
    result = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--dry-run"])
    assert result.stdout.splitlines()[0] == (
        "grpo-s0: to do; 2 steps, 16 to 16 rollouts for training, 48 for evaluation, 256 tokens at most"
    )
    assert not Path("runs").exists()


def sweeps_of(target):
    """Give the words of the sweeps that a target of the Makefile does."""
    # `make test ARGS=...` hands ARGS down to every make below it, and so to this one.
    told_by_no_make = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "ARGS")}
    lines = subprocess.run(
        ["make", "-n", target], cwd=PROJECT, env=told_by_no_make, capture_output=True, text=True, check=True
    )
    return [
        shlex.split(line)[1:] for line in lines.stdout.splitlines() if "dteframe sweep recipes/sweeps" in line
    ]


def names_of(words, tmp_path):
    """Give the names of the runs that a sweep would do."""
    done = CliRunner().invoke(app, [*words, "--runs", str(tmp_path / "runs"), "--dry-run"])
    assert done.exit_code == 0, done.stderr
    return {line.partition(":")[0] for line in done.stdout.splitlines() if ": to do;" in line}


@pytest.mark.parametrize(("target", "counts"), [("speedup-small", [9]), ("speedup", [180, 168])])
def test_make_speedup_does_the_runs_that_it_says(target, counts, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    names = [names_of(words, tmp_path) for words in sweeps_of(target)]
    assert [len(of_sweep) for of_sweep in names] == counts
    help_text = re.search(rf"^{target}:.*## (.*)$", Path("Makefile").read_text(), re.MULTILINE).group(1)
    said = re.search(r"(\d+) runs of", help_text)
    assert said is None or int(said.group(1)) == len(set().union(*names))


def test_the_ablations_are_of_pairs_and_arms_of_the_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)

    def recipes(file):
        sweep = load_sweep(Path("recipes/sweeps") / file, (), lambda recipe: load_registry([], near=recipe))
        return {
            run.name.rpartition("-")[0]: yaml.safe_load(run.recipe.to_yaml()) | {"name": "", "seed": 0}
            for run in sweep.runs
        }

    of_pairs, of_ablations = recipes("speedup_cpu.yaml"), recipes("speedup_ablations.yaml")
    same = {"grpo": "grpo", "ours": "ours", "references_reused": "dots"}
    for pair in ("list_0.1m", "spell_0.1m"):
        for name, known_as in same.items():
            ours, theirs = of_ablations[f"{pair}-{name}"], of_pairs[f"{pair}-{known_as}"]
            theirs["training"]["learning_rate"] = of_pairs["list_0.1m-grpo"]["training"]["learning_rate"]
            assert ours == theirs
    assert Path(of_ablations["list_0.1m-ngrams_with_adapter"]["estimator"]["adapter"]).is_file()
    arm = {"estimator", "selector"}
    without_gain = recipes("speedup_nothing_to_gain.yaml")["ours"]
    assert {key: without_gain[key] for key in arm} == {key: of_pairs["list_0.1m-ours"][key] for key in arm}


@pytest.mark.slow
def test_make_speedup_small_runs_and_compares(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    (words,) = sweeps_of("speedup-small")
    one_seed = [word.replace("s1[3-5]", "s13") for word in words]
    one_seed[one_seed.index("--runs") + 1] = str(tmp_path / "runs")
    small = ["training.max_steps=4", "training.evaluate_every=1", "training.evaluation_size=16"]
    small += ["model.warm_up.steps=10", "dataset.size=400"]
    done = CliRunner().invoke(app, [*one_seed, *small])
    assert done.exit_code == 0, done.stderr
    compared = CliRunner().invoke(app, ["compare", str(tmp_path / "runs"), "--json"])
    found = json.loads(compared.stdout)
    assert [(arm["pair"], arm["arm"], arm["seeds"]) for arm in found["arms"]] == [
        ("spell_0.1m", "dots_rr", [13]),
        ("spell_0.1m", "ours", [13]),
    ]


@pytest.mark.slow
def test_control_c_leaves_runs_that_the_same_command_goes_on_with(folder):
    command = [sys.executable, "-m", "dteframe", "sweep", "sweep.yaml", "--jobs", "2"]
    sweep = subprocess.Popen([*command, "training.max_steps=5000"], stderr=subprocess.PIPE, text=True)
    metrics = [Path(f"runs/sweep/{arm}-s0/metrics.jsonl") for arm in ("grpo", "other")]
    while not all(path.exists() and path.read_text().count("\n") > 2 for path in metrics):
        time.sleep(0.1)
        assert sweep.poll() is None
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert said.splitlines()[-1] == "2 of 2 runs are left; the same command goes on with them"
    steps = max(len(path.read_text().splitlines()) for path in metrics)
    end = f"training.max_steps={steps + 5}"
    again = subprocess.run([*command, end], capture_output=True, text=True, check=False, timeout=120)
    assert (again.returncode, again.stdout) == (0, "runs/sweep\n"), again.stderr
    read = [json.loads(line)["step"] for line in metrics[0].read_text().splitlines()]
    assert read == list(range(steps + 6))


@pytest.mark.slow
def test_a_ray_cluster_does_the_runs_and_a_missing_one_is_said(folder, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))  # where Ray notes a cluster that was started here
    missing = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--executor", "ray"])
    assert (missing.exit_code, missing.stderr.splitlines()[-1]) == (
        1,
        "--executor ray: there is no Ray cluster here; start one with `ray start --head`, or set RAY_ADDRESS",
    )
    monkeypatch.delenv("RAY_TMPDIR")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        done = subprocess.run(
            [sys.executable, "-m", "dteframe", "sweep", "sweep.yaml", "--executor", "ray", "--json"],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert {run["name"]: run["status"] for run in json.loads(done.stdout)} == {
        "grpo-s0": "finished",
        "other-s0": "finished",
    }
    assert json.loads(Path("runs/sweep/other-s0/summary.json").read_text())["steps"] == 2
