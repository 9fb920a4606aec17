"""Disks that take no more, folders that move, forks and signals: a run can always be resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context

import pytest
from safetensors import SafetensorError
from tiny_run import TINY, rows, run_tiny
from typer.testing import CliRunner

from dteframe.cli import app
from dteframe.engine.disk import DiskError, disk_for
from dteframe.errors import DTEFrameError, ResumeError
from dteframe.experiments.verify_resume import PRELOADED, first_difference


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that went through without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    run_tiny(folder)
    return folder / "runs" / "tiny"


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of a few hundred kilobytes on ``runs``."""
    (tmp_path / "runs").mkdir()
    mounted = mount(tmp_path, "-t", "tmpfs", "-o", "size=640k", "none")
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path / "runs"], check=True)  # A failed run may have files open.


def mount(folder, *words):
    return subprocess.run(["mount", *words, folder / "runs"], capture_output=True)


def remount(folder, option):
    assert mount(folder, "-o", f"remount,{option}").returncode == 0


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(small_disk, finished):
    with pytest.raises(DiskError) as caught:
        run_tiny(small_disk)
    folder = small_disk / "runs" / "tiny"
    assert str(caught.value).endswith("cannot be written (No space left on device); make room")
    assert caught.value.__notes__[-1].startswith(f"{folder}: the same command with --resume ")
    with pytest.raises(DTEFrameError, match="No space left on device"):
        run_tiny(small_disk, resume=True)
    remount(small_disk, "size=64m")
    run_tiny(small_disk, resume=True)
    assert first_difference(finished, folder) is None


def test_a_disk_that_fills_up_at_any_point_leaves_a_folder_that_resumes(small_disk, finished):
    """The disk has ever more room: each time the run gets a little further, and never goes wrong."""
    reached = []
    for kilobytes in (200, 350, 500, 650, 800, 950):
        remount(small_disk, f"size={kilobytes}k")
        with pytest.raises(DTEFrameError, match="No space left on device"):
            run_tiny(small_disk, "training.save_total_limit=null", resume=True)
        metrics = small_disk / "runs" / "tiny" / "metrics.jsonl"
        reached.append(metrics.read_text().count("\n") if metrics.exists() else 0)
    assert len(set(reached)) >= 3, reached
    remount(small_disk, "size=64m")
    run_tiny(small_disk, "training.save_total_limit=null", resume=True)
    assert first_difference(finished, small_disk / "runs" / "tiny") is None


def test_a_disk_that_cannot_be_written_is_named(small_disk):
    remount(small_disk, "size=64m")
    run_tiny(small_disk, "training.max_steps=2")
    before = {path: path.stat().st_size for path in (small_disk / "runs").rglob("*")}
    remount(small_disk, "ro")
    with pytest.raises(DTEFrameError) as caught:
        run_tiny(small_disk, "training.max_steps=4", resume=True)
    assert "(Read-only file system)" in str(caught.value)
    assert before == {path: path.stat().st_size for path in (small_disk / "runs").rglob("*")}
    remount(small_disk, "rw")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed: No space left on device"),
    ],
)
def test_a_full_disk_is_worded_whoever_writes(tmp_path, error):
    with pytest.raises(DiskError) as caught, disk_for(tmp_path):
        raise error
    assert str(caught.value) == f"{tmp_path}: cannot be written (No space left on device); make room"


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), disk_for(tmp_path):
        raise FileNotFoundError(2, "No such file or directory", "data.jsonl")


def test_a_run_folder_that_was_moved_goes_on_where_it_is_and_under_its_new_name(tmp_path, finished):
    run_tiny(tmp_path, "training.max_steps=3")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    shutil.move(tmp_path / "elsewhere" / "tiny", tmp_path / "runs" / "renamed")
    run_tiny(tmp_path, "name=renamed", resume=True)
    assert first_difference(finished, tmp_path / "runs" / "renamed") is None


def test_lost_rows_are_noticed(tmp_path):
    run_tiny(tmp_path, "training.max_steps=2")
    os.truncate(tmp_path / "runs" / "tiny" / "rollouts.jsonl", 100)
    with pytest.raises(ResumeError, match=r"rollouts.jsonl: has 100 bytes but had \d+ at the checkpoint"):
        run_tiny(tmp_path, resume=True)


COUNTS = """
from typing import Literal, final
from dteframe import Selection, Selector, SelectorConfig, hookimpl

class CountsConfig(SelectorConfig):
    type: Literal["counts"] = "counts"

@final
class Counts(Selector):
    \"\"\"Keeps a count.\"\"\"

    config: CountsConfig

    def select(self, estimate, count, rng):
        return Selection(estimate.question_ids[:count])

    def state_dict(self):
        return {"old_name": 1}

    def load_state_dict(self, state):
        self.count = state["KEY"]

@hookimpl
def dteframe_components():
    return [Counts]
"""


def test_a_plugin_that_no_longer_takes_its_state_back_is_named(tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "counts.py").write_text(COUNTS.replace("KEY", "old_name"))
    run_tiny(tmp_path, "selector={type: counts}", "training.max_steps=2", plugins=plugins)
    (plugins / "counts.py").write_text(COUNTS.replace("KEY", "new_name"))
    with pytest.raises(ResumeError) as caught:
        run_tiny(tmp_path, "selector={type: counts}", resume=True, plugins=plugins)
    assert str(caught.value).endswith(
        "counts.py: selector 'counts': does not take back its state (KeyError: 'new_name'); resume with the "
        "code that wrote the checkpoint, or give another name=... to start afresh"
    )


# Branching off


def branched(folder, *words):
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    return CliRunner().invoke(app, ["run", str(recipe), "--runs", str(folder / "runs"), *words])


def test_a_fork_goes_on_from_the_newest_checkpoint_with_another_recipe(tmp_path):
    run_tiny(tmp_path, "training.max_steps=4")
    done = branched(tmp_path, "--fork", "faster", "training.learning_rate=2e-3", "selector={type: uniform}")
    assert done.exit_code == 0, done.stderr
    source, fork = tmp_path / "runs" / "tiny", tmp_path / "runs" / "faster"
    manifest = json.loads((fork / "manifest.json").read_text())
    assert manifest["forked_from"]["run"] == str(source)
    assert manifest["forked_from"]["checkpoint"] == "step_000004"
    assert "training.learning_rate: 0.001 -> 0.002" in manifest["forked_from"]["differences"]
    assert [start["step"] for start in manifest["starts"]] == [0, 4]
    ours, theirs = ((run / "metrics.jsonl").read_text().splitlines() for run in (fork, source))
    assert len(ours) == 7 and ours[:5] == theirs
    assert (
        "selector 'uniform' begins afresh: the checkpoint has the state of 'difficulty_target'"
        in (json.loads((fork / "summary.json").read_text())["warnings"])
    )
    again = branched(tmp_path, "--fork", "faster")
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.splitlines()[-1] == (
        f"{fork}: exists; go on with it by name=faster --resume, or give another --fork"
    )


def test_a_fork_of_other_sizes_plans_anew(tmp_path):
    run_tiny(tmp_path, "training.max_steps=3", "training.checkpoint_every=3")
    done = branched(tmp_path, "--fork", "wider", "training.questions_per_step=6")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/wider/metrics.jsonl").read_text().splitlines()]
    groups = [row["answer/num_groups"] + row["replay/num_groups"] for row in rows[1:]]
    assert groups == [4, 4, 4, 6, 6, 6]


def test_a_fork_keeps_model_and_questions(tmp_path):
    run_tiny(tmp_path, "training.max_steps=2")
    done = branched(tmp_path, "--fork", "other", "model.hidden_size=64", "dataset.size=80")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-2:] == ["  dataset.size: 64 -> 80", "  model.hidden_size: 32 -> 64"]
    assert not (tmp_path / "runs" / "other").exists()


def test_there_must_be_something_to_branch_off(tmp_path):
    done = branched(tmp_path, "--fork", "other")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"{tmp_path / 'runs' / 'tiny'}: holds no run to branch off"
    )
    assert not (tmp_path / "runs").exists()


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    run_tiny(tmp_path, "training.evaluate_every=2", "training.save_total_limit=1")
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    rates = {row["step"]: row.get("evaluation/success_rate", -1) for row in rows(tmp_path, "metrics")}
    best = max((2, 4, 6), key=lambda step: (rates[step], -step))
    told = json.loads((folder / "best.json").read_text())
    assert told == {"checkpoint": f"step_{best:06d}", "success_rate": rates[best]}
    assert {path.name for path in folder.glob("step_*")} == {told["checkpoint"], "step_000006"}


def test_a_run_that_already_has_all_its_steps_is_evaluated_at_its_end(tmp_path):
    run_tiny(tmp_path, "training.max_steps=6")
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints/step_000006")
    summary = run_tiny(tmp_path, "training.max_steps=4", resume=True)
    evaluated = [row for row in rows(tmp_path, "rollouts") if row["purpose"] == "evaluation"]
    last = [row for row in evaluated if row["step"] == 4]
    assert len(last) == 6
    assert summary.success_rate_after == sum(row["successes"] for row in last) / 12


# Signals


SIGNALLER = """
import os, signal, time
from dteframe import hookimpl

def at(moment, step):
    wanted, number, times = os.environ["SIGNAL_AT"].split()
    if f"{step}:{moment}" == wanted:
        for _ in range(int(times)):
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(0.01)

@hookimpl
def dteframe_run_started(run):
    at("started", run.first_step)

@hookimpl
def dteframe_plan_made(plan):
    at("planned", plan.step)

@hookimpl
def dteframe_groups_scored(groups):
    at("scored", groups.step)

@hookimpl
def dteframe_evaluated(step, evaluation):
    at("evaluated", step)

@hookimpl
def dteframe_step_finished(report):
    at("finished", report.step)

@hookimpl
def dteframe_run_finished(summary):
    at("ended", summary.steps)
"""


def _command(words, said):
    """Run the command in this process, as a terminal would start it."""
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["dteframe", *words]
    app()


def commanded(folder, *words, signal_at="nothing SIGINT 1"):
    """Run the command in a process of its own that gets signals; give its exit code and what it said."""
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "signaller.py").write_text(SIGNALLER)
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    words = ["run", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--resume", *words]
    words += ["--plugins", str(folder / "signaller.py")]
    process = processes.Process(target=_signalled, args=(words, said, signal_at))
    process.start()
    process.join(120)
    talk = said.read_text().splitlines()
    return process.exitcode, [line for line in talk if line.startswith(("stopping", "interrupted"))]


def _signalled(words, said, signal_at):
    os.environ["SIGNAL_AT"] = signal_at
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored where the tests run in the background.
    _command(words, said)


STOPPING = "stopping after this step, in 10 s at most; once more stops at once"


@pytest.mark.slow
def test_a_signal_at_any_stage_leaves_a_run_that_goes_on_and_says_so_in_a_line(tmp_path, finished):
    folder = tmp_path / "runs" / "tiny"
    goes_on = f"interrupted: {folder}: the same command with --resume goes on from "
    starts_over = f"interrupted: {folder}: the same command with --resume starts over: no checkpoint yet"
    told = [
        ("0:started SIGINT 1", ["interrupted"]),
        ("0:evaluated SIGTERM 1", ["interrupted"]),
        ("0:finished SIGTERM 1", [starts_over]),
        ("1:scored SIGINT 1", [STOPPING, goes_on + "step_000001"]),
        ("3:planned SIGTERM 1", [STOPPING, goes_on + "step_000003"]),
        ("4:scored SIGINT 2", [STOPPING, goes_on + "step_000003"]),
        ("4:finished SIGINT 1", [STOPPING, goes_on + "step_000004"]),
        ("6:evaluated SIGTERM 1", [STOPPING, goes_on + "step_000006"]),
    ]
    for signal_at, lines in told:
        assert commanded(tmp_path, signal_at=signal_at) == (130, lines), signal_at
    assert commanded(tmp_path) == (0, [])
    assert first_difference(finished, folder) is None


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_given_up(tmp_path):
    words = ("--stop-within", "0.01", "training.max_steps=2")
    code, lines = commanded(tmp_path, *words, signal_at="1:scored SIGINT 1")
    assert code == 130 and lines[0].startswith("stopping after this step, in 0.01 s at most")
    assert lines[1].endswith("starts over: no checkpoint yet")
