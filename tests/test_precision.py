"""Types of parameters, gradient checkpointing and attention: alone, and with LoRA and a reference model."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import TINY, rows, run_tiny

from dteframe.contracts import Context, LoraOptions, ModelConfig, Policy
from dteframe.engine.model_options import apply_model_options
from dteframe.engine.optimizer import OptimizerSettings
from dteframe.engine.pack import rows_of
from dteframe.engine.update import Learner
from dteframe.errors import DataError
from dteframe.models.attention_ways import check_attention
from dteframe.models.from_scratch import FromScratch, FromScratchConfig
from dteframe.objectives.grpo import GRPO, GRPOConfig
from dteframe.recipe import TrainingConfig, load_recipe
from dteframe.records import Completion, CreditedGroup, Group, Prompt, Sampling
from dteframe.registry import load_registry
from dteframe.rollouts.fused_decoder import refusal
from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig
from dteframe.testing.subject import in_order
from dteframe.testing.tiny import tiny_policy, tiny_questions

CONTEXT = Context(Path("x"), Path("x"), "cpu", 0, progress=lambda *_: None, warn=lambda _: None)
SAMPLING = Sampling(temperature=0.8, max_completion_length=8)
CHECKPOINTING = {"gradient_checkpointing": True}


def training(**options: object) -> TrainingConfig:
    return TrainingConfig(max_steps=10, questions_per_step=2, learning_rate=0.01, **options)


def policy_with(
    options: TrainingConfig, lora: LoraOptions | None = None, dtype: torch.dtype = torch.float32
) -> Policy:
    policy = tiny_policy()
    policy.module.to(dtype)
    apply_model_options(policy, ModelConfig(type="tiny", lora=lora), options, np.random.default_rng(0))
    return policy


def learner_of(policy: Policy, options: TrainingConfig, beta: float = 0.0) -> Learner:
    objective = GRPO(GRPOConfig(beta=beta, num_minibatches=2), CONTEXT)
    return Learner(policy, objective, OptimizerSettings.from_training(options), SAMPLING)


def batch() -> list[CreditedGroup]:
    """Make two groups of three completions, of which the first is the right one."""
    rng = np.random.default_rng(0)
    groups = []
    for name in ("a", "b"):
        completions = tuple(
            Completion(rng.integers(2, 90, size=6), np.full(6, -4.5), "stop", "") for _ in range(3)
        )
        rewards = np.array([1.0, 0.0, 0.0])
        group = Group(name, rng.integers(2, 90, size=4), completions, rewards, 1, 0, "train")
        groups.append(CreditedGroup(group, rewards - rewards.mean(), is_replayed=False, staleness=0))
    return groups


def parameters_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: item.detach().clone() for name, item in policy.module.named_parameters()}


def advantage_of_the_right_completions(learner: Learner) -> float:
    """Give how much likelier, in nats, the right completions are than the others, on average."""
    groups = batch()
    found = learner.logprobs([row for place, item in enumerate(groups) for row in rows_of(item, 3 * place)])
    sums = [float(item.sum()) for item in found]
    return sum(sums[::3]) / 2 - sum(sums[1::3] + sums[2::3]) / 4


COMBINATIONS = list(
    itertools.product([False, True], [0.0, 0.05], [False, True], [torch.float32, torch.bfloat16])
)


@pytest.mark.parametrize(("has_lora", "beta", "checkpoints_gradients", "dtype"), COMBINATIONS)
def test_every_combination_learns_and_moves_what_it_should_alone(
    has_lora: bool, beta: float, checkpoints_gradients: bool, dtype: torch.dtype
) -> None:
    options = training(gradient_checkpointing=checkpoints_gradients)
    policy = policy_with(options, LoraOptions(r=4) if has_lora else None, dtype)
    learner = learner_of(policy, options, beta)
    before, start = parameters_of(policy), advantage_of_the_right_completions(learner)
    reports = [learner.update(batch(), np.random.default_rng(step)) for step in range(4)]
    assert advantage_of_the_right_completions(learner) > start + 1
    assert all(0 < report.gradient_norm < 100 for report in reports)
    moved = {name for name, item in parameters_of(policy).items() if not torch.equal(item, before[name])}
    trainable = {name for name, item in policy.module.named_parameters() if item.requires_grad}
    assert moved == trainable
    assert all(".lora_" in name for name in moved) is has_lora
    if beta:
        assert reports[-1].figures["kl_reference_nats"] > 1e-3


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4, lora_dropout=0.2)])
def test_gradient_checkpointing_changes_no_bit_of_an_update(lora: LoraOptions | None) -> None:
    found = []
    for options in (training(), training(**CHECKPOINTING)):
        policy = policy_with(options, lora)
        learner = learner_of(policy, options)
        reports = [learner.update(batch(), np.random.default_rng(step)) for step in range(2)]
        found.append((reports, parameters_of(policy)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(item, found[1][1][name]) for name, item in found[0][1].items())


@pytest.mark.parametrize(("options", "expected"), [({}, 2), (CHECKPOINTING, 4)])
def test_a_layer_runs_once_more_for_each_backward_pass_with_gradient_checkpointing(
    options: dict[str, bool], expected: int
) -> None:
    policy = policy_with(training(**options))
    learner = learner_of(policy, training(**options))
    calls: list[torch.nn.Module] = []
    policy.module.model.layers[0].self_attn.register_forward_hook(lambda module, *_: calls.append(module))
    report = learner.update(batch(), np.random.default_rng(0))
    assert report.num_optimizer_steps == 2  # one micro-batch each
    assert len(calls) == expected


def test_sampling_keeps_its_keys_and_values_whatever_an_update_keeps() -> None:
    prompts = [Prompt("a", np.array([3, 4, 5])), Prompt("b", np.array([6, 7]))]
    found = []
    for options in (training(), training(**CHECKPOINTING)):
        policy = policy_with(options)
        widths: list[int] = []
        policy.module.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output, widths=widths: widths.append(inputs[0].shape[1])
        )
        rollout = TransformersRollout(TransformersRolloutConfig(), CONTEXT)
        rollout.start(policy)
        answers = in_order(rollout.generate(prompts, 2, SAMPLING, [1, 2]))
        assert widths[0] == 3 and set(widths[1:]) == {1}  # one token at a time after the prompts
        found.append([list(answer.token_ids) for group in answers for answer in group])
    assert found[0] == found[1]


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)])
def test_a_policy_that_checkpoints_gradients_is_still_sampled_by_the_fused_decoder(
    lora: LoraOptions | None,
) -> None:
    assert refusal(policy_with(training(**CHECKPOINTING), lora).module) is None


def test_a_model_that_cannot_checkpoint_gradients_is_named() -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    sizes = {"vocab_size": 20, "n_positions": 32, "n_embd": 8, "dff": 8, "n_layer": 1, "n_head": 2}
    policy = Policy(CTRLLMHeadModel(CTRLConfig(**sizes)), tiny_policy().tokenizer, "cpu")
    message = "training.gradient_checkpointing: 'CTRLLMHeadModel' cannot do it; leave the key out, and lower"
    with pytest.raises(DataError, match=re.escape(message)):
        apply_model_options(
            policy, ModelConfig(type="tiny"), training(**CHECKPOINTING), np.random.default_rng(0)
        )


def test_a_pure_bfloat16_learner_continues_bit_for_bit_and_holds_no_float32() -> None:
    options = training(float32_master_weights=False)
    policy, other = (policy_with(options, dtype=torch.bfloat16) for _ in range(2))
    learner, resumed = learner_of(policy, options), learner_of(other, options)
    learner.update(batch(), np.random.default_rng(0))
    other.module.load_state_dict(policy.module.state_dict())
    state = learner.state_dict()
    assert state["masters"] == {}
    resumed.load_state_dict(state)
    reports = [item.update(batch(), np.random.default_rng(1)) for item in (learner, resumed)]
    assert reports[0] == reports[1]
    ours, theirs = parameters_of(policy), parameters_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_eager_attention_gives_the_log_probs_of_sdpa() -> None:
    token_ids = torch.arange(2, 12)[None]
    found = {}
    for way in ("sdpa", "eager"):
        config = FromScratchConfig(hidden_size=32, num_layers=2, num_heads=2, attn_implementation=way)
        module = FromScratch(config, CONTEXT).load(tiny_questions(24)).module
        assert module.config._attn_implementation == way
        with torch.no_grad():
            found[way] = module(input_ids=token_ids).logits.log_softmax(-1)
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


def test_flash_attention_is_refused_without_a_gpu() -> None:
    config = FromScratchConfig(dtype="bfloat16", attn_implementation="flash_attention_2")
    message = (
        "model.attn_implementation: 'flash_attention_2' needs a GPU, but the device is 'cpu'; choose sdpa"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        FromScratch(config, CONTEXT).load(tiny_questions(24))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("flash_attn_interface", "kernels")),
    reason="what this asks for is installed here",
)
def test_flash_attention_without_its_package_names_it() -> None:
    message = (
        "model.attn_implementation: 'flash_attention_3' needs the package 'flash-attn-3', which is not "
        "installed; install it with: pip install flash-attn-3 --no-build-isolation, or choose sdpa"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        check_attention("flash_attention_3", "cuda:1")


EVERYTHING = (
    "model.dtype=bfloat16",
    "model.lora={r: 4, target_modules: [q_proj, v_proj]}",
    "model.attn_implementation=eager",
    "objective.beta=0.05",
    "training.gradient_checkpointing=true",
    "training.optim=adamw_torch_fused",
    "training.lr_scheduler_type=cosine_with_min_lr",
    "training.max_steps=4",
)


def test_a_run_with_every_option_at_once_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plugins = tmp_path / "plugins"
    for folder in (whole, stopped, plugins):
        folder.mkdir()
    (plugins / "killer.py").write_text(KILLER)
    run_tiny(whole, *EVERYTHING)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(stopped, *EVERYTHING, plugins=plugins)
    run_tiny(stopped, *EVERYTHING, resume=True)
    for name in ("metrics", "rollouts"):
        assert rows(stopped, name) == rows(whole, name), name
    rates = [row["update/learning_rate"] for row in rows(whole, "metrics")[1:]]
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 - 0.5**0.5))


def test_a_pure_bfloat16_run_goes_through_from_its_recipe(tmp_path: Path) -> None:
    options = ("model.dtype=bfloat16", "training.float32_master_weights=false", "training.max_steps=2")
    run_tiny(tmp_path, *options)
    assert all(row["update/gradient_norm"] > 0 for row in rows(tmp_path, "metrics")[1:])


def test_a_recipe_of_pure_bfloat16_is_told_which_weights_will_not_move(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ("model.dtype=bfloat16", "training.float32_master_weights=false", "training.learning_rate=1e-6")
    note, *_ = load_recipe(tmp_path / "tiny.yaml", options, load_registry()).notes
    assert note == (
        "--set training.float32_master_weights=false: training.float32_master_weights: steps of about "
        "training.learning_rate 1e-06 are lost on every weight above about 0.00026, which may be nearly all"
    )


KILLER = """
from dteframe import hookimpl

@hookimpl
def dteframe_step_finished(report):
    if report.step == 3:
        raise KeyboardInterrupt
"""
