"""Compare arms: what runs wrote becomes shares saved, and nothing is dropped without a word."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from dteframe.cli import app
from dteframe.errors import DTEFrameError
from dteframe.experiments.run_curves import read_runs
from dteframe.experiments.speedup import compare_runs
from dteframe.experiments.speedup_text import speedup_text
from dteframe.recipe.sweep_config import ComparisonConfig

RULES = ComparisonConfig(axis="arm", baseline="grpo", target_budget_fraction=0.8, trailing_evaluations=1)
LINE = np.linspace(0.2, 0.7, 6)
"""Success rates of a policy that learns evenly."""


def write_run(folder, success_rates=LINE, seconds_a_step=1.0, max_steps=50, seed=0):
    """Write what a run leaves: an evaluation every ten steps, a reference token for every four others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": seed, "training": {"max_steps": max_steps}}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, 10 * len(success_rates)):
            row = {
                "step": step,
                "cost/training_seconds": step * seconds_a_step,
                "cost/training_cpu_seconds": step * seconds_a_step,
                "cost/train_tokens": 80 * step,
                "cost/reference_tokens": 20 * step,
                "cost/train_rollouts": 8 * step,
                "cost/reference_rollouts": 2 * step,
                "time/step_seconds": seconds_a_step,
                "time/update_seconds": seconds_a_step if step else 0.0,
                "answer/informative_fraction": 0.5 if step else None,
            }
            if step % 10 == 0:
                row["evaluation/success_rate"] = float(success_rates[step // 10])
                row["evaluation/standard_error"] = 0.01
            file.write(json.dumps(row) + "\n")
    return folder


def write_sweep(folder, arms, comparison=RULES, pairs=("",)):
    """Write a sweep's folder; ``arms``: what ``write_run`` takes, by arm and seed, the same in all pairs."""
    runs = []
    for pair, ((arm, seed), options) in itertools.product(pairs, arms.items()):
        name = f"{pair}{arm}-s{seed}"
        runs.append({"name": name, "seed": seed, "variants": {"arm": arm} | ({"pair": pair} if pair else {})})
        if options is not None:
            write_run(folder / name, seed=seed, **options)
    described = {"comparison": comparison and comparison.model_dump(), "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def compared(tmp_path):
    def of(arms):
        return compare_runs(read_runs([write_sweep(tmp_path / "sweep", arms)]), RULES)

    return of


FAST = {"success_rates": np.array([0.2, 0.4, 0.6, 0.8, 0.9, 0.9])}
"""Twice as steep as LINE."""


def test_a_curve_twice_as_steep_saves_half_of_everything(compared):
    (arm,) = compared({("grpo", 0): {}, ("dots", 0): FAST, ("grpo", 1): {}, ("dots", 1): FAST}).arms
    for unit in ("seconds", "cpu_seconds", "tokens", "rollouts", "steps"):
        saving = arm.savings[unit]
        assert (saving.mean, saving.low, saving.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (arm.verdict, arm.num_censored, arm.seeds) == ("faster", 0, (0, 1))
    assert (arm.seconds_to_target, arm.baseline_seconds_to_target) == pytest.approx((20.0, 40.0))


def test_steps_that_take_longer_cost_time_but_no_tokens(compared):
    slow = {**FAST, "seconds_a_step": 3.0}
    (arm,) = compared({("grpo", 0): {}, ("dots", 0): slow, ("grpo", 1): {}, ("dots", 1): slow}).arms
    assert arm.savings["seconds"].mean == pytest.approx(-0.5)
    assert arm.savings["tokens"].mean == pytest.approx(0.5)
    assert arm.verdict == "slower"


def test_a_run_that_never_reaches_the_target_counts_at_its_whole_budget(compared):
    never = {"success_rates": np.full(6, 0.2)}
    comparison = compared({("grpo", 0): {}, ("dots", 0): never})
    (arm,) = comparison.arms
    assert (arm.num_censored, arm.seconds_to_target) == (1, 50.0)
    assert "  <= -25%  " in speedup_text(comparison)
    assert arm.savings["seconds"].mean == pytest.approx(1 - 50 / 40)
    assert arm.verdict == "too few seeds"


def test_an_arm_is_not_faster_for_having_paid_little_without_arriving(compared):
    never = {"success_rates": np.full(6, 0.2), "seconds_a_step": 0.5}
    (arm,) = compared({("grpo", 0): {}, ("dots", 0): never, ("grpo", 1): {}, ("dots", 1): never}).arms
    assert arm.savings["seconds"].low == pytest.approx(1 - 25 / 40)
    assert (arm.verdict, arm.num_censored) == ("no gain shown", 2)


def test_equal_arms_show_no_gain(compared):
    other = {"success_rates": LINE + np.array([0, 0.01, -0.01, 0.01, -0.01, 0.0])}
    arms = {("grpo", 0): {}, ("dots", 0): other, ("grpo", 1): other, ("dots", 1): {}}
    (arm,) = compared(arms).arms
    assert arm.verdict == "no gain shown"


def test_what_is_reached_when_the_baselines_time_is_up_is_compared(compared):
    (arm,) = compared({("grpo", 0): {}, ("dots", 0): {**FAST, "seconds_a_step": 2.0}}).arms
    assert arm.gain_at_equal_time.mean == pytest.approx(0.7 - 0.7)


def test_time_is_said_by_purpose_and_references_by_their_share(compared):
    (arm,) = compared({("grpo", 0): {}, ("dots", 0): FAST}).arms
    assert arm.seconds_by_purpose == pytest.approx({"update": 20.0})
    assert arm.reference_token_fraction == pytest.approx(0.2)


def test_a_baseline_that_gains_less_than_noise_is_named(compared):
    flat = {"success_rates": np.array([0.2, 0.205, 0.2, 0.21, 0.205, 0.2])}
    (bed,) = compared({("grpo", 0): flat, ("dots", 0): FAST, ("grpo", 1): {}, ("dots", 1): FAST}).testbeds
    assert bed.num_without_gain == 1
    assert bed.uninformative_first == 0.5


def test_incomplete_runs_and_seeds_without_a_baseline_are_left_out_by_name(compared):
    comparison = compared(
        {
            ("grpo", 0): {},
            ("dots", 0): FAST,
            ("dots", 1): {"max_steps": 90},
            ("dots", 2): FAST,
            ("dots", 3): None,
        }
    )
    assert comparison.left_out == (
        "dots-s1: is not complete, its last evaluation is at step 50",
        "dots-s3: has not begun",
        "dots-s2: there is no complete run of 'grpo' with its seed",
    )


def test_single_runs_are_arms_by_their_names(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("grpo-s0", "dots-rr-s0")]
    assert [curve.arm for curve in read_runs(folders).curves] == ["grpo", "dots-rr"]


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(DTEFrameError) as caught:
        read_runs([tmp_path])
    assert (
        str(caught.value)
        == f"{tmp_path}: is no folder of a run (recipe.yaml) or a sweep (sweep.json); name one"
    )


def test_a_baseline_that_is_not_there_is_refused(tmp_path):
    runs = read_runs([write_run(tmp_path / "dots-s0")])
    with pytest.raises(
        DTEFrameError, match="no complete run of the baseline 'grpo'; arms with complete runs: dots"
    ):
        compare_runs(runs, RULES)


def test_a_line_that_is_no_json_is_named(tmp_path):
    folder = write_run(tmp_path / "grpo-s0")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{torn\n")
    with pytest.raises(DTEFrameError, match=r"metrics.jsonl:61: is no JSON object"):
        read_runs([folder])


def compare(*words):
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_the_command_prints_a_table_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_sweep(tmp_path / "sweep", {("grpo", 0): {}, ("dots", 0): FAST})
    done = compare(folder, "--plots", tmp_path / "plots")
    assert done.exit_code == 0, done.stderr
    assert "dots" in done.stdout
    assert "50%" in done.stdout
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "comparison.png",
        "comparison.svg",
        "savings.png",
        "savings.svg",
    ]
    assert compare(folder, "--plots", tmp_path / "again").exit_code == 0
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_what_arms_saved_is_drawn_by_families_that_begin_alike(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("dots", "target_0.3", "target_0.7")
    arms = {(name, seed): FAST for name in names for seed in (0, 1)}
    folder = write_sweep(tmp_path / "sweep", {("grpo", 0): {}, ("grpo", 1): {}, **arms})
    assert compare(folder, "--plots", tmp_path / "plots").exit_code == 0
    drawn = (tmp_path / "plots" / "savings.svg").read_text(encoding="utf-8")
    texts = [line for line in drawn.splitlines() if line.strip().startswith("<!-- ")]
    assert [line.strip("<!-> ") for line in texts if any(name in line for name in names)] == [
        "dots",
        "target_0.7",
        "target_0.3",
    ]


def test_from_three_pairs_on_time_is_drawn_over_the_share_without_gradient(tmp_path):
    pytest.importorskip("matplotlib")
    arms = {("grpo", 0): {}, ("dots", 0): FAST, ("ours", 0): FAST}
    drawn = {}
    for pairs in (("few", "some"), ("few", "some", "many")):
        folder = tmp_path / str(len(pairs))
        write_sweep(folder, arms, pairs=pairs)
        assert compare(folder, "--plots", folder / "plots").exit_code == 0
        drawn[len(pairs)] = folder / "plots" / "savings_by_share.svg"
    assert not drawn[2].exists()
    texts = drawn[3].read_text(encoding="utf-8")
    assert {
        name: texts.count(f"<!-- {name} -->") for name in ("few", "some", "many", "dots", "ours", "grpo")
    } == {
        "few": 1,
        "some": 1,
        "many": 1,
        "dots": 1,
        "ours": 1,
        "grpo": 0,
    }


def test_rules_other_than_the_sweeps_are_said(tmp_path):
    folder = write_sweep(tmp_path / "sweep", {("grpo", 0): {}, ("dots", 0): FAST})
    done = compare(folder, "--target", "0.5", "--json")
    assert done.stderr == "note: not what was fixed before the runs: target_budget_fraction 0.8 -> 0.5\n"
    assert json.loads(done.stdout)["rules"]["target_budget_fraction"] == 0.5


def test_without_a_sweep_the_baseline_is_asked_for(tmp_path):
    done = compare(write_run(tmp_path / "grpo-s0"))
    assert (done.exit_code, done.stderr) == (
        1,
        "compare: no sweep says what the baseline is; give --baseline ARM\n",
    )


def test_the_path_of_the_data_is_said_when_it_cannot_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_sweep(tmp_path / "sweep", {("grpo", 0): {}, ("dots", 0): FAST})
    Path(tmp_path / "file").write_text("")
    done = compare(folder, "--plots", tmp_path / "file")
    assert done.exit_code == 1
    assert "--plots" in done.stderr


def test_an_arm_whose_runs_never_arrive_and_one_without_runs_are_drawn_as_such(tmp_path):
    pytest.importorskip("matplotlib")
    comparison = RULES.model_dump()
    never = {"success_rates": np.full(6, 0.2)}
    runs = {
        ("a", "grpo"): {},
        ("b", "grpo"): {},
        ("a", "dots"): never,
        ("a", "mopps"): FAST,
        ("b", "dots"): FAST,
    }
    described = []
    for (pair, arm), options in runs.items():
        write_run(tmp_path / "sweep" / f"{pair}-{arm}-s0", **options)
        described.append({"name": f"{pair}-{arm}-s0", "seed": 0, "variants": {"pair": pair, "arm": arm}})
    text = json.dumps({"comparison": comparison, "runs": described})
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    assert compare(tmp_path / "sweep", "--plots", tmp_path / "plots").exit_code == 0
    drawn = (tmp_path / "plots" / "savings.svg").read_text(encoding="utf-8")
    assert drawn.count("<!-- no run -->") == 1
    assert drawn.count("fill: #ffffff; stroke: #56b4e9") == 1


@pytest.mark.parametrize("name", ["savings", "savings_by_share"])
def test_a_pair_may_not_be_called_as_a_figure_of_all(tmp_path, name):
    pytest.importorskip("matplotlib")
    folder = write_sweep(tmp_path / "sweep", {("grpo", 0): {}, ("dots", 0): {}}, pairs=(name,))
    done = compare(folder, "--plots", tmp_path / "plots")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        1,
        f"--plots: a pair is called {name!r}, as a figure of all; rename the pair",
    )


@pytest.fixture
def write_speedup(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "docs" / "write_speedup.py"
    spec = importlib.util.spec_from_file_location("write_speedup", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(module, "KEPT", tmp_path / "data")
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    return module


def test_what_is_kept_of_runs_says_the_same_of_them(tmp_path, write_speedup, capsys):
    arms = {("grpo", 0): {}, ("dots", 0): FAST, ("grpo", 1): {"seconds_a_step": 2.0}, ("dots", 1): FAST}
    runs = write_sweep(tmp_path / "runs", arms | {("grpo", 2): {"max_steps": 60}})
    write_speedup.keep(runs)
    assert capsys.readouterr().out.startswith("left out: grpo-s2: is not complete")
    kept = tmp_path / "data" / "runs"
    of_kept, of_all = (compare_runs(read_runs([folder]), RULES) for folder in (kept, runs))
    assert (of_kept.arms, of_kept.testbeds) == (of_all.arms, of_all.testbeds)
    assert not (kept / "grpo-s2").exists()
    size, before = ((folder / "dots-s0" / "metrics.jsonl").stat().st_size for folder in (kept, runs))
    assert size < before / 3


def test_what_is_kept_is_replaced_or_joined_and_never_lost(tmp_path, write_speedup):
    runs = write_sweep(tmp_path / "runs", {("grpo", 0): {}})
    write_speedup.keep(runs)
    write_sweep(
        tmp_path / "runs", {("grpo", 0): {"max_steps": 50, "success_rates": LINE / 2}, ("dots", 0): FAST}
    )
    write_speedup.keep(runs)
    kept = tmp_path / "data" / "runs"
    assert [curve.name for curve in read_runs([kept]).curves] == ["grpo-s0", "dots-s0"]
    assert read_runs([kept]).curves[0].success_rates[0] == LINE[0] / 2
    shutil.rmtree(runs)
    unlike = {("grpo", 0): None, ("grpo", 1): {"max_steps": 40}, ("dots", 0): FAST}
    write_sweep(runs, unlike)
    with pytest.raises(SystemExit, match="grpo-s0 is kept and not complete there, and no complete run has"):
        write_speedup.keep(runs)
    with pytest.raises(SystemExit, match="is what is kept; name the folder of the runs themselves"):
        write_speedup.keep(kept)
    assert len(read_runs([kept]).curves) == 2
    write_sweep(runs, unlike | {("grpo", 1): {}})
    write_speedup.keep(runs)
    assert [curve.name for curve in read_runs([kept]).curves] == ["grpo-s0", "grpo-s1", "dots-s0"]
    assert read_runs([kept]).curves[0].success_rates[0] == LINE[0] / 2


def test_a_sweep_without_a_place_on_the_page_is_named_before_anything_is_written(tmp_path, write_speedup):
    begin, end = "<!-- a: written by docs/write_speedup.py -->", "<!-- end of a -->"
    (tmp_path / "page.md").write_text(f"{begin}\n{end}\n")
    write_speedup.check_page(["a"])
    with pytest.raises(
        SystemExit, match="has no place for b; add these two lines where its tables go:\n<!-- b:"
    ):
        write_speedup.check_page(["a", "b"])
