"""Rewards in worker processes: what they do to themselves hurts nobody else, and nothing of them is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_run import rows, run_tiny

from dteframe import Completion, Context, PluginError, Question
from dteframe.engine.failure_watch import FailureWatch
from dteframe.engine.reward_pool import RewardPool, RewardsHere
from dteframe.engine.reward_worker import WorkerSettings
from dteframe.engine.scoring import Reply, named_rewards
from dteframe.recipe import TrainingConfig
from dteframe.registry import load_registry

HOSTILE = Path(__file__).parent / "faults" / "hostile_reward.py"
QUESTION = Question("q-17", "6 x 7?", "6 x 7?", "42")
TIMEOUT_SECONDS = 0.5
GIB = 2**30


def completions(*texts):
    return [Completion(np.array([1]), np.array([0.0]), "stop", text) for text in texts]


def pool_of(folder, *rewards, num_workers=1, memory_bytes=GIB, timeout_seconds=TIMEOUT_SECONDS):
    """Begin a pool of rewards, each a type and its options."""
    settings = WorkerSettings(
        (HOSTILE,),
        tuple((name, json.dumps(options)) for name, options in rewards),
        memory_bytes,
        folder,
        folder,
        0,
    )
    return RewardPool(settings, [name for name, _ in rewards], num_workers, timeout_seconds)


def processes_left():
    """List the processes below this one, but for those that have ended."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


FAULTS = {
    "endless loop": ("timeout", "no score within 0.5 s (training.reward_timeout_seconds)"),
    "power tower": ("timeout", "no score within 0.5 s (training.reward_timeout_seconds)"),
    "10 GB": ("error", "raised MemoryError"),
    "segfault": ("error", "the process that scored it died of SIGSEGV"),
    "exit": ("error", "the process that scored it ended with status 7"),
    "polite exit": ("error", "called exit(7); raise an error instead"),
    "exception": ("error", "raised ZeroDivisionError: by zero (line "),
    "interrupt": ("error", "reward raised KeyboardInterrupt"),
    "nan": ("error", "score() gave nan for question 'q-17'; scores are finite"),
    "text": ("error", "score() gave ['no number'] for question 'q-17'; one number per completion is wanted"),
    "wrong length": ("error", "score() gave 0 scores for the 1 completions of question 'q-17'"),
    "fork that stays": ("error", "scoring left 1 processes running; they were killed"),
    "orphan": ("error", "scoring left 1 processes running; they were killed"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What comes of a right answer, one at fault and one without an answer, for each fault."""
    before = processes_left()
    pool = pool_of(tmp_path_factory.mktemp("run"), ("hostile", {}), num_workers=2)
    try:
        pending = {fault: pool.submit(QUESTION, completions("42", fault, "")) for fault in FAULTS}
        found = {fault: scores() for fault, scores in pending.items()}
    finally:
        pool.close()
    assert processes_left() == before
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_only_the_completion_at_fault_fails(outcomes, fault):
    scores, (status, error) = outcomes[fault], FAULTS[fault]
    assert scores.statuses == ("scored", status, "unparseable")
    assert scores.parts["hostile"].tolist() == [1.0, 0.0, 0.0]
    assert error in scores.errors[1]
    assert (scores.errors[0], scores.errors[2]) == ("", "")


def test_an_error_names_the_reward_and_its_line(outcomes):
    line = 1 + HOSTILE.read_text().splitlines().index('            raise ZeroDivisionError("by zero")')
    assert (
        outcomes["exception"]
        .errors[1]
        .endswith(
            f"hostile_reward.py: reward 'hostile' raised ZeroDivisionError: by zero (line {line}, in obey)"
        )
    )


def test_a_fork_that_comes_back_from_a_reward_scores_nothing_twice(tmp_path):
    pool = pool_of(tmp_path, ("hostile", {}))
    try:
        for _ in range(2):
            scores = pool.submit(QUESTION, completions("fork that comes back", ""))()
            assert scores.statuses == ("scored", "unparseable")
    finally:
        pool.close()


def test_a_worker_has_no_torch_and_its_scores_are_those_of_this_process(tmp_path):
    rewards = [("hostile", {}), ("exact_match", {"answer_pattern": r"(\d+)"}), ("hostile", {"weight": 2.0})]
    registry = load_registry([HOSTILE])
    context = Context(tmp_path, tmp_path, "cpu", 0, lambda what, done, total: None, lambda message: None)
    built = []
    for name, options in rewards:
        found = registry.get("reward", name)
        built.append(found.component(found.config(**options), context))
    names = list(named_rewards(built))
    assert names == ["hostile_0", "exact_match", "hostile_2"]
    here = RewardsHere(named_rewards(built))
    settings = WorkerSettings(
        (HOSTILE,),
        tuple((name, json.dumps(options)) for name, options in rewards),
        GIB,
        tmp_path,
        tmp_path,
        0,
    )
    pool = RewardPool(settings, names, 2, 60.0)
    asked = [completions(str(number), "so 42", "", "nan" if number == 3 else "-") for number in range(6)]
    try:
        pending = [pool.submit(QUESTION, group) for group in asked]
        for scores, group in zip(pending[::-1], asked[::-1], strict=True):
            there, expected = scores(), here.submit(QUESTION, group)()
            assert there.statuses == expected.statuses
            assert [error[-60:] for error in there.errors] == [error[-60:] for error in expected.errors]
            for name in names:
                assert there.parts[name].tolist() == expected.parts[name].tolist()
        assert pool.submit(QUESTION, completions("torch"))().parts["hostile_0"].tolist() == [0.0]
    finally:
        pool.close()


def test_rewards_that_a_worker_cannot_load_end_the_run_with_what_to_do(tmp_path):
    pool = pool_of(tmp_path, ("exact_match", {"answer_pattern": "no group"}))
    try:
        with pytest.raises(PluginError) as caught:
            pool.submit(QUESTION, completions("42"))()
    finally:
        pool.close()
    assert str(caught.value).startswith("reward: a worker process cannot start: ValidationError: ")
    assert str(caught.value).endswith("(training.reward_workers=0)")


def test_closing_ends_what_is_still_being_scored_at_once(tmp_path):
    before = processes_left()
    pool = pool_of(tmp_path, ("hostile", {}), timeout_seconds=1000.0)
    pool.submit(QUESTION, completions("42"))()
    for text in ("fork that stays", "sleep", "sleep"):
        pool.submit(QUESTION, completions(text))
    time.sleep(0.2)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert processes_left() == before


KILLED = """\
from pathlib import Path
import numpy as np
from dteframe import Completion, Question
from dteframe.engine.failure_watch import FailureWatch
from dteframe.engine.reward_pool import RewardPool
from dteframe.engine.reward_worker import WorkerSettings
folder, question = Path({folder!r}), Question("q", "?", "?", "42")
settings = WorkerSettings((Path({plugin!r}),), (("hostile", "{{}}"),), 2**30, folder, folder, 0)
pool = RewardPool(settings, ["hostile"], 1, 1000.0)
def submit(text):
    return pool.submit(question, [Completion(np.array([1]), np.array([0.0]), "stop", text)])
submit("42")()
print("begun", flush=True)
submit("fork and sleep")()
"""


def test_nothing_outlives_a_run_that_is_killed(tmp_path):
    script = KILLED.format(folder=str(tmp_path), plugin=str(HOSTILE))
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "begun\n"
    while len(below := psutil.Process(run.pid).children(recursive=True)) < 3:  # keeper, worker and its fork
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    gone, alive = psutil.wait_procs(below, timeout=5)
    assert alive == []


# In a run


FAILS_ON_SOME = '''
"""A reward that fails on completions with a certain letter."""
from typing import Literal
from dteframe import Reward, RewardConfig, hookimpl

class SomeConfig(RewardConfig):
    type: Literal["fails_on_some"] = "fails_on_some"
    letters: str = "4"

class Some(Reward):
    """1 for short answers."""
    config: SomeConfig
    def score(self, question, completions):
        if any(set(one.text) & set(self.config.letters) for one in completions):
            raise ValueError("a letter that it fails on")
        return [float(len(one.text) < 8) if one.text else None for one in completions]

@hookimpl
def dteframe_components():
    return [Some]
'''


@pytest.fixture
def some(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "some.py").write_text(FAILS_ON_SOME)
    return folder


def test_a_run_with_workers_is_the_run_without(tmp_path):
    for name, num_workers in (("none", 0), ("two", 2)):
        (tmp_path / name).mkdir()
        run_tiny(tmp_path / name, f"training.reward_workers={num_workers}", "training.max_steps=3")
    for file in ("metrics", "rollouts", "selections"):
        assert rows(tmp_path / "none", file) == rows(tmp_path / "two", file)
    assert not psutil.Process().children()


def test_failures_are_counted_kept_and_count_as_0(tmp_path, some):
    summary = run_tiny(
        tmp_path,
        "reward.type=fails_on_some",
        "training.max_steps=2",
        "training.max_reward_failure_fraction=1",
        plugins=some,
    )
    metrics, failures = rows(tmp_path, "metrics"), rows(tmp_path, "reward_failures")
    assert (
        summary.reward_statuses["error"] == len(failures) == sum(row["reward/num_errors"] for row in metrics)
    )
    assert 0 < len(failures) < sum(row["reward/num_completions"] for row in metrics)
    assert {row["reward_status"] for row in failures} == {"error"}
    assert all("4" in row["text"] and "ValueError: a letter" in row["reward_error"] for row in failures)
    for row in rows(tmp_path, "rollouts"):
        for completion in row.get("completions", ()):
            assert ("reward_error" in completion) == ("4" in completion["text"])
            assert completion["reward"] == 0 or "4" not in completion["text"]
    warning = next(message for message in summary.warnings if message.startswith("reward: "))
    assert re.match(r"reward: \d+ of \d+ completions asked at step \d for \w+ could not be scored", warning)
    assert "; they count as 0; " in warning and warning.endswith("reward_failures.jsonl")


def test_too_many_failures_stop_the_run(tmp_path, some):
    with pytest.raises(
        PluginError, match=r"\d+ of 12 completions asked at step 0 for evaluation could not be"
    ) as caught:
        run_tiny(tmp_path, "reward={type: fails_on_some, letters: '0123456789r+:s'}", plugins=some)
    assert "(8 x error, 2 x given up); the first, to question " in str(caught.value)
    assert "these are more than training.max_reward_failure_fraction 0.5: mend the reward" in str(
        caught.value
    )
    failures = rows(tmp_path, "reward_failures")
    assert [row["reward_error"] for row in failures[8:]] == ["not scored: 8 of the 10 before it failed"] * 2


@pytest.mark.parametrize(
    ("training", "fails", "num_attempts"),
    [
        ({}, lambda place: True, 8 * 9),  # 64 completions, each group together and then each alone
        ({"max_reward_failure_fraction": 1.0}, lambda place: True, 32 * 9),
        ({"max_reward_failure_fraction": 0.25}, lambda place: place > 0, 1 + 9 * 9),  # 72 are more than 64
        ({"max_reward_failure_fraction": 0.25}, lambda place: place % 4 == 0, 24 + 8 * 9),  # 64 are not
        ({"on_reward_failure": "stop"}, lambda place: place == 3, 3 + 9),
    ],
)
def test_scoring_is_given_up_once_the_reward_is_known_to_be_broken(training, fails, num_attempts):
    needed = {"max_steps": 1, "questions_per_step": 32, "num_generations": 8, "learning_rate": 1e-3}
    watch, asked = FailureWatch(TrainingConfig(**needed, **training), 32 * 8), []

    def attempt(question, group):
        asked.append(question.id)
        return Reply(None, error="slow") if fails(int(question.id)) else Reply({"mine": [1.0] * len(group)})

    for place in range(32):
        question = Question(str(place), "x", "x", "x")
        scores = watch.score(attempt, ["mine"], question, completions(*"abcdefgh"))
        assert len(scores.statuses) == 8
    assert len(asked) == num_attempts


def test_the_run_may_stop_at_the_first_failure(tmp_path, some):
    with pytest.raises(PluginError, match="training.on_reward_failure is 'stop'"):
        run_tiny(tmp_path, "reward.type=fails_on_some", "training.on_reward_failure=stop", plugins=some)


def test_groups_with_failures_may_be_left_out(tmp_path, some):
    run_tiny(
        tmp_path,
        "reward.type=fails_on_some",
        "training.max_steps=3",
        "training.on_reward_failure=leave_out",
        "training.max_reward_failure_fraction=1",
        "training.questions_per_step=8",
        "replay={type: none}",
        "training.fresh_fraction=null",
        plugins=some,
    )
    metrics = rows(tmp_path, "metrics")[1:]
    failed = {row["step"]: set() for row in metrics}
    for row in rows(tmp_path, "reward_failures"):
        if row["purpose"] == "train":
            failed[row["step"]].add(row["question_id"])
    assert any(failed.values())
    for row in metrics:
        assert row["answer/num_groups"] == 8 - len(failed[row["step"]])
