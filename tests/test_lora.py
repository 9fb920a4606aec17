"""LoRA: what is trained, what is frozen, what is written, and that a run with it resumes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import rows, run_tiny

from dteframe.contracts import LoraOptions, Policy
from dteframe.engine.lora import adapter_weights as weights_of_adapter
from dteframe.engine.lora import add_lora, load_adapter, without_adapter, write_adapter
from dteframe.errors import DataError, ResumeError
from dteframe.models.architectures import Sizes, untrained_module
from dteframe.models.characters import character_tokenizer
from dteframe.testing.tiny import tiny_policy

TOKENS = torch.arange(2, 22)[None]


def with_adapter(
    policy: Policy | None = None, seed: int = 0, spread: float = 0.0, **options: object
) -> Policy:
    """Give a policy with an adapter, trained if ``spread`` is not 0: all of it is moved by about that."""
    policy = policy or tiny_policy()
    add_lora(policy, LoraOptions(**({"r": 4} | options)), np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return policy


def trainable(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: item for name, item in policy.module.named_parameters() if item.requires_grad}


def logprobs(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=TOKENS).logits.float().log_softmax(-1)


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained() -> None:
    before = tiny_policy()
    policy = with_adapter()
    assert torch.equal(logprobs(policy.module), logprobs(before.module))
    assert not policy.module.training
    layers = {re.sub(r".*layers\.\d\.|\.lora_[AB].*", "", name) for name in trainable(policy)}
    projections = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    assert layers == projections | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    # Two layers of 7 matrices: 4 of 32 x 32 and 3 of 32 x 88, each with (rows + columns) x 4.
    assert sum(item.numel() for item in trainable(policy).values()) == 2 * 4 * (4 * 64 + 3 * 120)


def test_only_the_layers_that_are_named_get_an_adapter() -> None:
    policy = with_adapter(target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert {name.partition(".lora_")[0] for name in trainable(policy)} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_unknown_target_modules_are_refused_with_those_that_exist() -> None:
    message = (
        "model.lora.target_modules: ['q_prj', 'lm_head'] are no linear layers of the model that can have an "
        "adapter; name some of: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        with_adapter(target_modules=["q_proj", "q_prj", "lm_head"])


def test_without_peft_the_command_that_installs_it_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = (
        "model.lora: needs the package peft, which is not installed; "
        "install it with: pip install 'dteframe[lora]'"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        run_tiny(tmp_path, "model.lora.r=4")
    assert not list((tmp_path / "runs").rglob("*.json*"))


def test_the_first_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trainable(with_adapter(seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same, other = trainable(with_adapter(seed=0)), trainable(with_adapter(seed=1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_have_the_models_own_names_and_give_the_same_log_probs(tied: bool) -> None:
    def made() -> Policy:
        tokenizer = character_tokenizer(())
        sizes = Sizes(32, 64, 2, 2, 1, 256, tie_word_embeddings=tied)
        return Policy(untrained_module("qwen2", sizes, tokenizer, 0), tokenizer, "cpu")

    policy, plain = with_adapter(made(), spread=0.05), made()
    before = logprobs(plain.module)
    merged = dict(policy.weights())
    assert list(merged) == [name for name, _ in plain.module.named_parameters()]
    plain.module.load_state_dict(merged, strict=False)
    assert (logprobs(policy.module) - before).abs().max() > 0.1
    assert torch.allclose(logprobs(plain.module), logprobs(policy.module), atol=1e-5)


@pytest.mark.parametrize(("use_rslora", "factor"), [(False, 8 / 4), (True, 8 / 2)])
def test_a_merged_weight_is_the_base_plus_the_scaled_product(use_rslora: bool, factor: float) -> None:
    policy = with_adapter(spread=0.05, lora_alpha=8, use_rslora=use_rslora)
    found = dict(policy.module.named_parameters())
    name = "model.layers.1.mlp.up_proj"
    down, up = found[f"{name}.lora_A.default.weight"], found[f"{name}.lora_B.default.weight"]
    expected = found[f"{name}.base_layer.weight"] + factor * (up @ down)
    assert torch.allclose(dict(policy.weights())[f"{name}.weight"], expected, atol=1e-6)


def test_an_adapter_on_bfloat16_is_float32_and_is_merged_before_rounding() -> None:
    policy = tiny_policy()
    policy.module.bfloat16()
    policy = with_adapter(policy, spread=0.05)
    assert {item.dtype for item in trainable(policy).values()} == {torch.float32}
    found = dict(policy.module.named_parameters())
    name = "model.layers.1.mlp.up_proj"
    down, up = found[f"{name}.lora_A.default.weight"], found[f"{name}.lora_B.default.weight"]
    exact = found[f"{name}.base_layer.weight"].float() + 8 * (up @ down)
    merged = dict(policy.weights())[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_without_the_adapter_the_module_is_what_it_was_and_afterwards_what_it_is() -> None:
    policy = with_adapter(spread=0.05)
    now, trained = logprobs(policy.module), set(trainable(policy))
    policy.module.train()
    with without_adapter(policy.module):
        assert not policy.module.training  # The first policy drops nothing out.
        assert torch.equal(logprobs(policy.module), logprobs(tiny_policy().module))
    assert torch.equal(logprobs(policy.module), now)
    assert set(trainable(policy)) == trained


def test_peft_reads_the_adapter_and_gives_the_same_log_probs(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = with_adapter(spread=0.05, target_modules=["q_proj", "down_proj"])
    write_adapter(policy, dict(weights_of_adapter(policy)), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_policy().module, tmp_path / "adapter").eval()
    assert torch.equal(logprobs(theirs), logprobs(policy.module))


def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    policy, other = with_adapter(spread=0.05), with_adapter(seed=7)
    write_adapter(policy, dict(weights_of_adapter(policy)), tmp_path)
    load_adapter(other, tmp_path)
    ours, theirs = trainable(policy), trainable(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    policy = with_adapter(target_modules=["q_proj"])
    write_adapter(policy, dict(weights_of_adapter(policy)), tmp_path)
    message = (
        "the adapter has 4 matrices and the model's 8; they differ in ['base_model.model.model.layers.0."
    )
    with pytest.raises(ResumeError, match=re.escape(message)):
        load_adapter(with_adapter(target_modules=["q_proj", "k_proj"]), tmp_path)


def with_base(folder: Path) -> tuple[str, ...]:
    """Write a base model to the folder, and give the settings of a tiny run with an adapter on it."""
    policy = tiny_policy(hidden_size=16, num_layers=1)
    policy.module.save_pretrained(folder / "base")
    policy.tokenizer.save_pretrained(folder / "base")
    model = f"model={{type: pretrained, path: {folder / 'base'}, lora: {{r: 4, lora_dropout: 0.1}}}}"
    return (model, "objective.beta=0.05", "training.checkpoint_every=3", "training.learning_rate=0.01")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with LoRA that went through without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    run_tiny(folder, *with_base(folder))
    return folder


def test_a_run_leaves_an_adapter_and_a_merged_policy_that_are_the_same_model(finished: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = finished / "runs" / "tiny"
    base = AutoModelForCausalLM.from_pretrained(finished / "base")
    before = logprobs(base)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert (logprobs(merged) - before).abs().max() > 1e-2
    assert torch.allclose(logprobs(merged), logprobs(adapted), rtol=0, atol=1e-5)


def test_checkpoints_hold_the_adapter_and_not_the_weights_below_it(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    last = run / "checkpoints" / "step_000006"
    assert not (last / "policy").exists()
    adapter, kept = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (run, last))
    assert adapter.keys() == kept.keys()
    assert all(torch.equal(adapter[name], kept[name]) for name in adapter)
    learner = load_file(last / "learner.safetensors")
    assert learner and all(".lora_" in name for name in learner)


def test_a_stopped_run_with_an_adapter_resumes_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    options = with_base(tmp_path)
    run_tiny(tmp_path, *options, "training.max_steps=3")
    run_tiny(tmp_path, *options, resume=True)
    for name in ("metrics", "rollouts", "selections"):
        assert rows(tmp_path, name) == rows(finished, name), name
    for file in ("adapter/adapter_model.safetensors", "policy/model.safetensors"):
        ours = load_file(finished / "runs" / "tiny" / file)
        theirs = load_file(tmp_path / "runs" / "tiny" / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_the_reference_model_of_a_run_is_the_policy_without_its_adapter(finished: Path) -> None:
    distances = [row["update/kl_reference_nats"] for row in rows(finished, "metrics")[1:]]
    assert 0 < distances[0] < distances[-1]


def test_a_changed_base_model_is_noticed(tmp_path: Path) -> None:
    options = with_base(tmp_path)
    run_tiny(tmp_path, *options, "training.max_steps=3")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    message = "step_000003/adapter: the adapter was trained on other weights than those that the model has"
    with pytest.raises(ResumeError, match=re.escape(message)):
        run_tiny(tmp_path, *options, resume=True)


def test_a_run_says_how_many_of_its_parameters_are_trained(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "counter.py").write_text(COUNTER)
    run_tiny(tmp_path, *with_base(tmp_path), "training.max_steps=1", plugins=plugins)
    # 4 matrices of 16 x 16 and 3 of 16 x 48, each with (rows + columns) x 4.
    assert (tmp_path / "runs" / "tiny" / "trained.txt").read_text() == str(4 * (4 * 32 + 3 * 64))


COUNTER = """
from dteframe import hookimpl

@hookimpl
def dteframe_run_started(run):
    (run.run_folder / "trained.txt").write_text(str(run.num_trainable_parameters))
"""
