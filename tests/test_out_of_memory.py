"""Running out of memory: what people read, from processes that really run out of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import TINY

from dteframe.engine.out_of_memory import (
    SMALLER_TRAINING,
    NoMemoryError,
    memory_for,
    remedies_for,
    sampling_remedies,
)
from dteframe.errors import DTEFrameError
from dteframe.rollouts.transformers import TransformersRolloutConfig

LIMIT = """
import resource
from dteframe import hookimpl

@hookimpl
def HOOK:
    taken = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**25, taken + 2**25))
"""
"""A plugin that from some moment on leaves the process 32 MiB."""


def run_with_little_memory(folder: Path, hook: str, *overrides: str) -> str:
    """Run the tiny recipe until it ends for want of memory; give what it says."""
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "plugins").mkdir()
    (folder / "plugins" / "limit.py").write_text(LIMIT.replace("HOOK", hook))
    done = subprocess.run(
        [sys.executable, "-m", "dteframe", "run", "tiny.yaml", *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.slow
def test_an_update_that_runs_out_of_memory_names_the_micro_batch_and_what_to_change(tmp_path):
    told = run_with_little_memory(
        tmp_path,
        "dteframe_groups_scored(groups)",
        "model.hidden_size=256",
        "model.warm_up.steps=0",
        "training.evaluate_every=0",
        "rollout.max_completion_length=256",
    )
    message = (
        r"update: 'cpu' is out of memory at a micro-batch of \d+ completions, \d+ tokens, which wanted "
        r"another [\d.]+ MiB; lower training\.micro_batch_tokens \(16384\), set "
        r"training\.gradient_checkpointing, set model\.lora or lower rollout\.max_completion_length "
        r"runs/tiny: the same command with --resume starts over: no checkpoint yet"
    )
    assert re.search(message, told), told


@pytest.mark.slow
def test_sampling_that_runs_out_of_memory_names_the_completions_and_what_to_change(tmp_path):
    told = run_with_little_memory(
        tmp_path,
        "dteframe_run_started(run)",
        "model.hidden_size=1024",
        "model.warm_up.steps=0",
        "training.evaluate_every=0",
        "rollout.max_completion_length=256",
    )
    message = (
        r"references: 'cpu' is out of memory at 8 prompts x 4 completions, which wanted another [\d.]+ MiB; "
        r"lower rollout\.max_batch_rows \(256\), set model\.dtype to bfloat16 or take a smaller model"
    )
    assert re.search(message, told), told


def test_torch_says_in_three_ways_that_memory_is_out():
    with pytest.raises(NoMemoryError) as on_a_gpu, memory_for("update", "a step", "cuda", ("rest", "wait")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert str(on_a_gpu.value) == (
        "update: 'cuda' is out of memory at a step, which wanted another 2.00 GiB; "
        "rest, wait, train in more --processes or set training.cpu_offload"
    )
    with pytest.raises(NoMemoryError, match="^load: 'cpu' is out of memory at a model; rest or wait$"):
        with memory_for("load", "a model", "cpu", ("rest", "wait")):
            raise MemoryError
    with pytest.raises(
        NoMemoryError, match=r"at a model, which wanted another 1,048,576\.00 GiB; rest or wait$"
    ):
        with memory_for("load", "a model", "cpu", ("rest", "wait")):
            torch.empty(2**48)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="^mat1 and mat2") as raised:
        with memory_for("load", "a model", "cpu", ("rest", "wait")):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(raised.value, DTEFrameError)


def test_a_row_of_its_own_cannot_be_split_and_a_rollout_names_the_keys_that_it_has():
    assert remedies_for((), 100) == SMALLER_TRAINING
    assert (
        sampling_remedies(TransformersRolloutConfig(max_batch_rows=3))[0]
        == "lower rollout.max_batch_rows (3)"
    )
