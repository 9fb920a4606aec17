"""Several processes: the same run as in one, checkpoints for any number of them, one end for all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from several_processes import run_in_processes
from tiny_run import TINY, rows, run_tiny
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dteframe.engine.distributed import ALONE, Processes, device_of_this_process, started
from dteframe.engine.launch import _how_it_died
from dteframe.engine.run_folder import locked
from dteframe.engine.sharding import Skeleton
from dteframe.errors import DataError
from dteframe.testing.tiny import tiny_policy

LORA = "model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
STEPS = ["training.max_steps=6", "training.evaluate_every=2"]
FEWER = ["training.max_steps=5", "training.evaluate_every=0"]
VARIANTS = {
    "plain": STEPS,
    "lora": [*FEWER, LORA],
    "reference model, offloaded": [*FEWER, "objective.beta=0.05", "training.cpu_offload=true"],
    "rounds": [*FEWER, "selector={type: dynamic_sampling, oversampling: 1.5}"],
}
"""On top of replay, two minibatches, two iterations and the attention estimator."""
OF_THE_LAYOUT = frozenset({"update/num_forward_tokens", "update/model_flops", "update/trained_forward_flops"})
"""Work that was done: a group that is dealt to two processes has its prompt computed in both."""
BFLOAT16 = ["training.max_steps=4", "training.evaluate_every=0", "model.dtype=bfloat16"]
"""The shards are float32 masters, which checkpoints hold beside the bfloat16 policy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each variant in one and in two processes; and the first steps of one that goes on in other numbers."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = {folder / "two" / name: overrides for name, overrides in VARIANTS.items()}
    begun = {folder / "resumed" / name: [*item, "training.max_steps=2"] for name, item in VARIANTS.items()}
    jobs[folder / "two" / "bfloat16"] = BFLOAT16
    begun[folder / "resumed" / "bfloat16"] = [*BFLOAT16, "training.max_steps=2"]
    run_in_processes(2, jobs | begun)
    for name, overrides in VARIANTS.items():
        (folder / "one" / name).mkdir(parents=True)
        run_tiny(folder / "one" / name, *overrides)
    return folder


def assert_same_run_up_to_rounding(one, other):
    """Ids, counts and texts are equal; numbers and weights differ by less than 1e-4. Work is not compared."""
    for name in ("selections", "rollouts"):
        assert_same(rows(one, name), rows(other, name), name)
    metrics = [rows(run, "metrics") for run in (one, other)]
    for row in (row for run in metrics for row in run if row.keys() & OF_THE_LAYOUT):
        for key in OF_THE_LAYOUT:
            assert row.pop(key) > 0
    assert_same(*metrics, "metrics")
    ours, theirs = (load_file(run / "runs" / "tiny" / "policy" / "model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert float((weight - theirs[name]).abs().max()) < 1e-4, name


def assert_same(one, other, where):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for place, value in enumerate(one):
            assert_same(value, other[place], f"{where}[{place}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4), where
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_run_of_one(folder, name):
    assert_same_run_up_to_rounding(folder / "one" / name, folder / "two" / name)


@pytest.mark.slow
def test_every_process_writes_its_own_half_of_the_optimizer(folder):
    checkpoint = folder / "two" / "plain" / "runs" / "tiny" / "checkpoints" / "step_000006"
    first, second = (load_file(path) for path in sorted((checkpoint / "learner").glob("*.safetensors")))
    name = "adamw/model.layers.0.mlp.up_proj.weight/exp_avg"
    assert first[name].shape == second[name].shape == (44, 32)
    assert not list(checkpoint.rglob("*.metadata")), "a pickle"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sum(name.startswith("learner/") for name in manifest["files"]) == 2


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_again_in_two(folder):
    for name, overrides in VARIANTS.items():
        run_tiny(folder / "resumed" / name, *overrides, "training.max_steps=4", resume=True)
    jobs = {folder / "resumed" / name: overrides for name, overrides in VARIANTS.items()}
    run_in_processes(2, jobs, resume=True)
    for name in VARIANTS:
        assert_same_run_up_to_rounding(folder / "one" / name, folder / "resumed" / name)


@pytest.mark.slow
def test_shards_that_are_float32_masters_of_bfloat16_resume_bit_for_bit(folder):
    run_in_processes(2, {folder / "resumed" / "bfloat16": BFLOAT16}, resume=True)
    whole, resumed = (folder / place / "bfloat16" for place in ("two", "resumed"))
    for name in ("metrics", "rollouts"):
        assert rows(resumed, name) == rows(whole, name), name
    ours, theirs = (
        load_file(run / "runs" / "tiny" / "policy" / "model.safetensors") for run in (whole, resumed)
    )
    assert {weight.dtype for weight in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


FAILS = """
import os, signal, time
from typing import Literal, final
from dteframe import Reward, RewardConfig, hookimpl

class FailsConfig(RewardConfig):
    type: Literal["fails"] = "fails"
    how: Literal["raises", "dies", "waits", "warns"] = "raises"

@final
class Fails(Reward):
    \"\"\"Ends the second process.\"\"\"

    config: FailsConfig

    def start(self):
        if os.environ["RANK"] == "1" and self.config.how == "raises":
            raise ValueError("too hard for process 1")

    def score(self, question, completions):
        if self.config.how == "waits":
            (self.context.run_folder / "waits").touch()
            time.sleep(1)
        if os.environ["RANK"] == "1" and self.config.how == "warns":
            self.context.warn("odd answers in process 1")
        if os.environ["RANK"] == "1" and self.config.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return [float(len(item.text) % 2) for item in completions]

@hookimpl
def dteframe_components():
    return [Fails]
"""
SMALL = ["training.max_steps=1", "training.evaluate_every=0", "estimator={type: none}"]


def started_command(folder, how):
    """Start a tiny run in two processes whose reward fails, or warns."""
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "fails.py").write_text(FAILS)
    overrides = [f"reward={{type: fails, how: {how}}}", *SMALL, "selector={type: uniform}"]
    command = ["dteframe", "run", "tiny.yaml", *overrides, "--processes", "2", "--plugins", "fails.py"]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_error_of_one_process_is_told_once_and_ends_all(tmp_path):
    began = time.monotonic()
    out, errors = started_command(tmp_path, "raises").communicate(timeout=120)
    assert time.monotonic() - began < 90
    told = [line for line in errors.splitlines() if not line.startswith(("tiny.yaml", "plugin ", "warning"))]
    assert told[0] == "too hard for process 1"
    assert re.fullmatch(r"while running .*fails.py: reward 'fails'", told[1])
    assert len([line for line in told if "too hard" in line]) == 1 and "Traceback" not in errors
    assert out == ""


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_run_folder_is_free_again(tmp_path):
    process = started_command(tmp_path, "dies")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and out == "" and "Traceback" not in errors
    assert re.search(
        r"^--processes 2: process 1 \(pid \d+\) was ended by SIGKILL; the system kills what takes too much "
        r"memory; the same command with --resume goes on from the last checkpoint$",
        errors,
        re.MULTILINE,
    )
    with locked(tmp_path / "runs" / "tiny"):
        pass


@pytest.mark.slow
def test_what_a_process_that_follows_warns_of_is_told_once(tmp_path):
    out, errors = started_command(tmp_path, "warns").communicate(timeout=120)
    assert out.strip() == str(Path("runs") / "tiny")
    assert errors.count("odd answers in process 1") == 1
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert "odd answers in process 1" in summary["warnings"]


@pytest.mark.slow
def test_a_signal_ends_all_processes(tmp_path):
    process = started_command(tmp_path, "waits")
    deadline = time.monotonic() + 90
    while not (tmp_path / "runs" / "tiny" / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == (
        "interrupted: runs/tiny: the same command with --resume goes on from step_000001"
    )
    assert errors.count("interrupted") == 1


def test_a_process_alone_sends_nothing():
    with started("cpu") as processes:
        assert processes is ALONE
    assert processes.is_main and not processes.are_sharded
    assert processes.broadcast("plan") == "plan"
    assert processes.collect(3) == processes.exchange(3) == [3]
    assert processes.sum(torch.tensor(2.0)) == 2.0
    assert processes.may_speak(RuntimeError("gloo: Connection closed by peer"))


def test_the_first_process_that_fails_has_the_word():
    store = HashStore()
    first, second = Processes(1, 2, store), Processes(0, 2, store)
    assert first.may_speak(ValueError("too hard"))
    assert not second.may_speak(RuntimeError("gloo: Connection closed by peer"))
    assert not second.may_speak(KeyboardInterrupt())
    assert first.may_speak(ValueError("too hard")), "it was the first"


def test_a_recipe_that_cannot_run_is_told_before_processes_are_started(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    command = [sys.executable, "-X", "importtime", "-m", "dteframe", "run", "bad.yaml", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("training: ") == 1 and not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    message = (
        "--processes: 3 processes on a machine where torch sees 2 GPUs; start as many as there are GPUs, or "
        "set training.device: cpu"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        device_of_this_process("auto")
    assert device_of_this_process("cpu") == "cpu"


def test_a_killed_process_is_told_apart_from_one_that_fell():
    failure = ProcessFailure(local_rank=1, pid=os.getpid(), exitcode=-signal.SIGSEGV, error_file="")
    assert _how_it_died(3, 8, failure) == (
        f"--processes 8: process 3 (pid {os.getpid()}) was ended by SIGSEGV; "
        "the same command with --resume goes on from the last checkpoint"
    )


def test_a_skeleton_has_the_policys_shape_and_no_weights():
    policy = tiny_policy(num_layers=1)
    policy.module.model.norm.weight.requires_grad_(False)
    built = Skeleton.of(policy).build("cpu")
    ours, theirs = dict(policy.module.named_parameters()), dict(built.module.named_parameters())
    assert {name: item.shape for name, item in ours.items()} == {
        name: item.shape for name, item in theirs.items()
    }
    assert all(item.is_meta for item in theirs.values())
    assert [name for name, item in theirs.items() if not item.requires_grad] == ["model.norm.weight"]
    assert built.module.lm_head.weight is built.module.model.embed_tokens.weight, "tied as the policy's"
    assert built.tokenizer is policy.tokenizer
    assert np.array_equal(
        built.module.generation_config.eos_token_id, policy.module.generation_config.eos_token_id
    )


def test_a_process_of_torchrun_whose_work_is_done_ends_before_the_interpreter_is_taken_down(tmp_path):
    """There a thread of gloo may abort; here an object does so, of a plugin that also has its last words."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    plugin = tmp_path / "plugins" / "last_words.py"
    plugin.parent.mkdir()
    plugin.write_text(
        '"""Nothing but an end."""\n'
        "import atexit, os, threading, time\n"
        "from dteframe import hookimpl\n"
        "class Aborts:\n"
        "    def __del__(self):\n"
        "        os.abort()\n"
        "aborts = Aborts()\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('a thread'))).start()\n"
    )
    command = [sys.executable, "-m", "dteframe", "validate", "tiny.yaml"]
    ended = {}
    for run_id in ({}, {"TORCHELASTIC_RUN_ID": "run"}):
        ended[bool(run_id)] = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, **run_id}
        )
    assert ended[False].returncode == -signal.SIGABRT
    assert ended[True].returncode == 0, ended[True].stderr
    assert ended[True].stdout.splitlines()[1:] == ["a thread", "at exit"]
