"""What only a GPU can show; skipped, with the reason, where there is none."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_run import TINY, run_tiny
from transformers import AutoModelForCausalLM

from dteframe.contracts import Context, Policy
from dteframe.engine.fit import warn_of_shortage
from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.memory_plan import memory_plan
from dteframe.models.from_scratch import FromScratchConfig
from dteframe.recipe import load_recipe
from dteframe.records import Completion, Prompt, Sampling
from dteframe.registry import load_registry
from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig
from dteframe.testing.subject import in_order
from dteframe.testing.tiny import tiny_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ON_GPU = ("training.device=cuda", "training.max_steps=4")
BFLOAT16 = (
    "model.dtype=bfloat16",
    "training.gradient_checkpointing=true",
    "training.optim=adamw_torch_fused",
)


def metrics(summary):
    lines = (summary.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("options", [(), BFLOAT16, ("model.lora={r: 4}", "model.dtype=bfloat16")], ids=len)
def test_a_run_goes_from_end_to_end(tmp_path, options):
    summary = run_tiny(tmp_path, *ON_GPU, *options)
    rows = metrics(summary)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(row["update/loss"]) for row in rows[1:])
    assert rows[-1]["throughput/peak_memory_bytes"] > 0
    assert rows[-1]["update/num_forward_tokens"] > 0
    AutoModelForCausalLM.from_pretrained(summary.run_folder / "policy")


def test_a_run_that_stops_goes_on_as_if_it_had_not(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = metrics(run_tiny(tmp_path / "whole", *ON_GPU, *BFLOAT16))
    (tmp_path / "stopped").mkdir()
    run_tiny(tmp_path / "stopped", *ON_GPU, *BFLOAT16, "training.max_steps=2")
    resumed = metrics(run_tiny(tmp_path / "stopped", *ON_GPU, *BFLOAT16, resume=True))
    for ours, theirs in zip(resumed[-2:], whole[-2:], strict=True):
        assert ours["update/loss"] == pytest.approx(theirs["update/loss"], rel=1e-2, abs=1e-4)
        assert ours["cost/train_rollouts"] == theirs["cost/train_rollouts"]


@pytest.mark.parametrize("options", [(), BFLOAT16, ("model.lora={r: 4}",)], ids=len)
def test_a_run_keeps_its_weights_in_main_memory(tmp_path, options):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["dteframe", "run", "tiny.yaml", *ON_GPU, *options, "training.cpu_offload=true"]
    subprocess.run([sys.executable, "-m", *command, "--processes", "1"], cwd=tmp_path, check=True)
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.fixture
def sampled(tmp_path):
    def sample(device: str) -> list[Completion]:
        policy = tiny_policy()
        policy = Policy(policy.module.to(device), policy.tokenizer, device)
        context = Context(tmp_path, tmp_path, device, 0, progress=lambda *_: None, warn=lambda _: None)
        rollout = TransformersRollout(TransformersRolloutConfig(), context)
        rollout.start(policy)
        prompts = [Prompt(str(size), np.arange(3, 3 + size)) for size in (4, 7, 9)]
        sampling = Sampling(max_completion_length=12)
        answers = in_order(rollout.generate(prompts, 4, sampling, [1, 2, 3]))
        return [completion for group in answers for completion in group]

    return sample


def test_sampling_gives_what_a_cpu_gives_up_to_rounding(sampled):
    pairs = list(zip(sampled("cpu"), sampled("cuda"), strict=True))
    equal = [np.array_equal(ours.token_ids, theirs.token_ids) for ours, theirs in pairs]
    assert np.mean(equal) >= 0.75  # A number that lies on the edge of two tokens may fall to either side.
    for (ours, theirs), is_equal in zip(pairs, equal, strict=True):
        if is_equal:
            assert np.allclose(ours.behaviour_logprobs, theirs.behaviour_logprobs, atol=1e-3)


def test_the_sampler_agrees_with_the_trainer_in_float32(tmp_path):
    rows = metrics(run_tiny(tmp_path, *ON_GPU))
    differences = [row["update/sampler_logprob_difference_max_nats"] for row in rows[1:]]
    assert max(differences) < 1e-3


MEDIUM = """
name: medium
training: {max_steps: 2, questions_per_step: 16, num_generations: 8, max_prompt_length: 32,
  micro_batch_tokens: 8192, device: cuda, evaluate_every: 0, optim: adamw_torch_fused}
model: {type: from_scratch, dtype: bfloat16, hidden_size: 512, num_layers: 8, num_heads: 8}
dataset: {type: list_operations}
reward: {type: exact_match}
rollout: {type: transformers, max_completion_length: 224}
tracker: [{type: jsonl}]
"""


def test_a_run_that_cannot_fit_is_warned_of_before(tmp_path):
    path = tmp_path / "medium.yaml"
    path.write_text(MEDIUM)
    huge = ("training.num_generations=100000", "training.micro_batch_tokens=100000000000")
    told: list[str] = []
    context = Context(tmp_path, tmp_path, "cuda", 0, progress=lambda *_: None, warn=told.append)
    policy = tiny_policy()
    policy = Policy(policy.module.to("cuda"), policy.tokenizer, "cuda")
    for overrides in ((), huge):
        recipe = load_recipe(path, overrides, load_registry(plugin_paths=[])).recipe
        warn_of_shortage(recipe, policy, context, num_processes=1)
    assert len(told) == 1
    assert " and cuda has " in told[0]


def test_the_peak_of_an_update_is_near_the_plan(tmp_path):
    """Measured while a real learner takes two steps; what CUDA itself keeps is not counted on either side."""
    from measure_memory import update

    path = tmp_path / "medium.yaml"
    path.write_text(MEDIUM)
    recipe = load_recipe(path, [], load_registry(plugin_paths=[])).recipe
    assert isinstance(recipe.model, FromScratchConfig)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update(recipe, "cuda")
    measured = torch.cuda.max_memory_allocated() - before
    plan = memory_plan(recipe, recipe.model.sizes())
    planned = max(stage.total_bytes for stage in plan.stages if stage.name != "sampling")
    assert 1 / 1.3 < measured / planned < 1.3


def test_loaded_sizes_know_the_type_on_the_gpu():
    module = tiny_policy().module.to("cuda").bfloat16()
    assert loaded_sizes(module).parameter_bytes == 2
