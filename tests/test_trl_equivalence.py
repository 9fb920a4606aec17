"""Our learner against TRL's trainer: same model, completions, rewards and settings; both run from end to end.

TRL computes advantages, losses, clipping and the optimizer step with its own code; only sampling is replaced
by fixed completions.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dteframe.contracts import Context, LoraOptions, LossInputs, Policy
from dteframe.engine.lora import add_lora
from dteframe.engine.optimizer import OptimizerSettings
from dteframe.engine.pack import rows_of
from dteframe.engine.update import Learner
from dteframe.objectives.grpo import GRPO, GRPOConfig, is_stale_negative
from dteframe.recipe import TrainingConfig
from dteframe.records import Completion, CreditedGroup, Group, Sampling
from dteframe.reports import UpdateReport
from dteframe.testing.tiny import tiny_policy

pytest.importorskip("trl", reason="TRL is the peer of this test alone: pip install trl==1.16.0")

NUM_GENERATIONS = 4
MAX_COMPLETION_LENGTH = 9
TEMPERATURE = 0.7
LEARNING_RATE = 0.02
ADAM_EPSILON = 1e-3  # large, so that rounding of a tiny gradient does not become the sign of a whole step
REWARDS = {
    "3+4=": [1.0, 0.0, 0.0, 0.0],
    "12-5=": [1.0, 1.0, 1.0, 1.0],  # equal rewards: TRL runs them, we count them
    "7*6+1=": [0.0, 0.5, 1.0, 0.25],
    "9=": [0.0, 1.0, 1.0, 1.0],
}


@dataclass
class Trace:
    """What one side did: per optimizer step, the loss and the gradient before clipping."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, module: torch.nn.Module) -> None:
        for name, parameter in trainable(module).items():
            parameter.register_post_accumulate_grad_hook(
                lambda found, name=name: self.gradients[name].append(found.grad.clone())
            )

    def last_gradient(self) -> dict[str, torch.Tensor]:
        return {name: found[-1] for name, found in self.gradients.items()}


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give what is trained, under our names: peft's own model prefixes them."""
    found = module.named_parameters()
    return {name.removeprefix("base_model.model."): item for name, item in found if item.requires_grad}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    policy = tiny_policy()
    policy.module.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def load_policy(folder: Path, lora: LoraOptions | None = None) -> Policy:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = Policy(module.eval(), AutoTokenizer.from_pretrained(folder), "cpu")
    if lora is not None:
        add_lora(policy, lora, np.random.default_rng(0))
    return policy


def move_away_from_the_first_policy(module: torch.nn.Module) -> None:
    """Make the policy differ from the reference model, on both sides alike."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(module).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def completions_of(policy: Policy) -> dict[str, list[list[int]]]:
    """Give fixed completions of ragged lengths, from one token to the longest allowed."""
    chance = random.Random(3)
    size = len(policy.tokenizer)
    lengths = [1, 4, 9, 6]
    return {
        prompt: [
            [chance.randrange(size) for _ in range(length)] for length in lengths[turn:] + lengths[:turn]
        ]
        for turn, prompt in enumerate(REWARDS)
    }


def run_trl(
    folder: Path,
    out: Path,
    num_steps: int,
    micro_batches: int,
    moved: bool,
    lora: LoraOptions | None = None,
    **options: Any,
) -> tuple[Trace, Policy, float]:
    """Train with TRL for ``num_steps`` optimizer steps on one generation batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    policy = load_policy(folder)
    completions = completions_of(policy)
    trace = Trace()

    def answer(prompts: list[str], _: Any) -> dict[str, Any]:
        turns: dict[str, int] = defaultdict(int)
        answers = []
        for prompt in prompts:
            answers.append(completions[prompt][turns[prompt]])
            turns[prompt] += 1
        return {
            "prompt_ids": [policy.tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": answers,
            "logprobs": None,
        }

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        places = [completions[prompt].index(ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        return [REWARDS[prompt][place] for prompt, place in zip(prompts, places, strict=True)]

    class RecordingTrainer(GRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            trace.losses.append(loss.item())
            return loss

    num_rollouts = len(REWARDS) * NUM_GENERATIONS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls rollout_func experimental
        config = TrlConfig(
            output_dir=str(out),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            max_steps=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_epsilon=ADAM_EPSILON,
            weight_decay=0.1,
            per_device_train_batch_size=num_rollouts // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=TEMPERATURE,
            **options,
        )
        trainer = RecordingTrainer(
            model=policy.module,
            processing_class=policy.tokenizer,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": list(REWARDS)}),
            rollout_func=answer,
            peft_config=LoraConfig(**lora.model_dump(), task_type="CAUSAL_LM") if lora else None,
        )
        policy = Policy(trainer.model, policy.tokenizer, "cpu")
        if lora is not None:  # TRL draws first weights of its own.
            first = trainable(load_policy(folder, lora).module)
            policy.module.load_state_dict(
                {f"base_model.model.{name}": first[name] for name in first}, strict=False
            )
        if moved:
            move_away_from_the_first_policy(policy.module)
        trace.watch(policy.module)
        trainer.train()
    trace.losses = np.reshape(trace.losses, (num_steps, micro_batches)).sum(axis=1).tolist()
    return trace, policy, trainer.state.log_history[-1]["clip_ratio/region_mean"]


def run_ours(
    folder: Path, micro_batch_tokens: int, moved: bool, lora: LoraOptions | None = None, **options: Any
) -> tuple[Trace, Policy, UpdateReport]:
    """Make one update of our learner on the same completions."""
    policy = load_policy(folder, lora)
    objective = GRPO(GRPOConfig(**options), context_without_files())
    training = TrainingConfig(
        max_steps=1,
        questions_per_step=len(REWARDS),
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        adam_epsilon=ADAM_EPSILON,
        micro_batch_tokens=micro_batch_tokens,
    )
    settings = OptimizerSettings.from_training(training)
    sampling = Sampling(temperature=TEMPERATURE, max_completion_length=MAX_COMPLETION_LENGTH)
    learner = Learner(policy, objective, settings, sampling)
    if moved:
        move_away_from_the_first_policy(policy.module)
    credited = [credit(policy, learner, objective, prompt) for prompt in REWARDS]
    trace = Trace()
    trace.watch(policy.module)
    report = learner.update(credited, np.random.default_rng(0))
    trace.losses = [report.loss]
    return trace, policy, report


def credit(policy: Policy, learner: Learner, objective: GRPO, prompt: str) -> CreditedGroup:
    """Make a group whose behaviour log-probs are the present policy's."""
    rewards = np.array(REWARDS[prompt])
    tokens = [np.array(ids) for ids in completions_of(policy)[prompt]]

    def group(logprobs: list[np.ndarray]) -> CreditedGroup:
        completions = tuple(
            Completion(ids, values, "length", "") for ids, values in zip(tokens, logprobs, strict=True)
        )
        prompt_ids = np.array(policy.tokenizer(prompt)["input_ids"])
        made = Group(prompt, prompt_ids, completions, rewards, int((rewards == 1).sum()), 0, "train")
        return CreditedGroup(made, objective.advantages(rewards), is_replayed=False, staleness=0)

    unscored = group([np.zeros(len(ids)) for ids in tokens])
    return group([values.numpy() for values in learner.logprobs(rows_of(unscored, 0))])


def context_without_files() -> Context:
    def refuse(*_: Any) -> None:
        raise AssertionError("the objective has nothing to tell")

    return Context(Path("unused"), Path("unused"), "cpu", 0, progress=refuse, warn=refuse)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, found in ours.items():
        assert torch.allclose(found, theirs[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("scale_rewards", ["none", "group"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_gradient_and_weights_equal_those_of_trl(
    model_folder: Path, tmp_path: Path, loss_type: str, scale_rewards: str, micro_batches: int
) -> None:
    options = {"loss_type": loss_type, "scale_rewards": scale_rewards}
    theirs, their_policy, _ = run_trl(model_folder, tmp_path, 1, micro_batches, False, beta=0.0, **options)
    ours, our_policy, report = run_ours(model_folder, 64, False, **options)

    assert report.num_equal_reward_groups == 1
    assert report.num_forward_rows == 3 * NUM_GENERATIONS
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert max(float(found.abs().max()) for found in theirs.last_gradient().values()) > 1e-3
    assert_same(ours.last_gradient(), theirs.last_gradient())
    assert_same(dict(our_policy.module.named_parameters()), dict(their_policy.module.named_parameters()))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_a_second_pass_with_clipped_tokens_equals_that_of_trl(
    model_folder: Path, tmp_path: Path, loss_type: str
) -> None:
    options = {"loss_type": loss_type, "scale_rewards": "group", "num_iterations": 2}
    options |= {"epsilon": 0.05, "epsilon_high": 0.1}
    theirs, their_policy, clipped = run_trl(model_folder, tmp_path, 2, 2, False, beta=0.0, **options)
    ours, our_policy, report = run_ours(model_folder, 64, False, **options)

    assert clipped > 0.1 and report.figures["clip_fraction"] > 0.1
    assert report.num_optimizer_steps == 2
    assert report.num_proximal_rows == 0
    assert ours.losses == pytest.approx([np.mean(theirs.losses)], abs=1e-5)
    assert_same(ours.last_gradient(), theirs.last_gradient())
    assert_same(dict(our_policy.module.named_parameters()), dict(their_policy.module.named_parameters()))


@pytest.mark.parametrize("use_bias_correction_kl", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_the_kl_term_equals_that_of_trl(
    model_folder: Path, tmp_path: Path, loss_type: str, use_bias_correction_kl: bool
) -> None:
    options = {"loss_type": loss_type, "beta": 0.3, "use_bias_correction_kl": use_bias_correction_kl}
    theirs, their_policy, _ = run_trl(model_folder, tmp_path, 1, 2, True, scale_rewards="none", **options)
    ours, our_policy, report = run_ours(model_folder, 64, True, **options)

    assert report.figures["kl_reference_nats"] > 0.01
    assert report.num_equal_reward_groups == 0
    assert report.num_forward_rows == 4 * NUM_GENERATIONS
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert_same(ours.last_gradient(), theirs.last_gradient())
    assert_same(dict(our_policy.module.named_parameters()), dict(their_policy.module.named_parameters()))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_an_adapter_learns_as_that_of_trl(model_folder: Path, tmp_path: Path, beta: float) -> None:
    lora = LoraOptions(r=4, lora_alpha=8)
    options = {"loss_type": "dapo", "beta": beta, "scale_rewards": "none", "num_iterations": 2}
    theirs, their_policy, _ = run_trl(model_folder, tmp_path, 2, 1, True, lora, **options)
    ours, our_policy, report = run_ours(model_folder, 64, True, lora, **options)

    assert report.num_optimizer_steps == 2
    assert (report.figures.get("kl_reference_nats", 0.0) > 0.005) is (beta > 0)
    assert ours.losses == pytest.approx([np.mean(theirs.losses)], abs=1e-5)
    assert max(float(found.abs().max()) for found in theirs.last_gradient().values()) > 1e-3
    assert_same(ours.last_gradient(), theirs.last_gradient())
    assert_same(trainable(our_policy.module), trainable(their_policy.module))


def test_the_mask_of_stale_negatives_is_that_of_trl() -> None:
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(1)
    behaviour, present = (torch.randn(6, 5, generator=generator) for _ in range(2))
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])
    mask = (torch.arange(5) < lengths[:, None]).float()
    advantages = torch.tensor([-1.0, -0.5, 0.5, -2.0, 0.0, -1.0])[:, None]
    theirs = GRPOTrainer.get_off_policy_mask(advantages, present, behaviour, mask, off_policy_threshold=0.1)
    is_token = mask.bool()
    inputs = LossInputs(
        logprobs=present[is_token],
        proximal_logprobs=present[is_token],
        behaviour_logprobs=behaviour[is_token],
        reference_logprobs=None,
        advantages=advantages.expand(6, 5)[is_token],
        rollout_index=torch.arange(6).repeat_interleave(lengths),
        is_replayed=is_token[is_token],
        num_rollouts=6,
        num_tokens=20,
        max_completion_length=5,
    )
    ours = is_stale_negative(inputs, 0.1)
    assert (~ours).float().tolist() == theirs.expand(6, 5)[is_token].tolist()
    assert 0 < ours.sum() < 20
