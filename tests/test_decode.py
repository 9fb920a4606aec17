import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dteframe import Policy, Sampling
from dteframe.contracts import LoraOptions
from dteframe.engine.lora import add_lora, without_adapter
from dteframe.rollouts.continuous import Seats, sample_continuously
from dteframe.rollouts.decode import SampledRows
from dteframe.rollouts.fused_decoder import FusedDecoder, Projection, refusal
from dteframe.rollouts.key_value_cache import read_prompts

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PROMPTS = [np.array(ids) for ids in ([7], [2, 3, 4, 5, 6], [9, 8, 7])]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def random_module(config_class=Qwen2Config, module_class=Qwen2ForCausalLM, **options):
    """Give a module all of whose parameters are random, norms and biases too."""
    torch.manual_seed(0)
    module = module_class(config_class(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    return module


MODULES = {
    "qwen2, tied": lambda: random_module(tie_word_embeddings=True),
    "qwen2, untied": lambda: random_module(tie_word_embeddings=False),
    "qwen2, one key per query": lambda: random_module(num_key_value_heads=4),
    "llama": lambda: random_module(LlamaConfig, LlamaForCausalLM),
    "llama, biased": lambda: random_module(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
    "llama, heads of their own size": lambda: random_module(LlamaConfig, LlamaForCausalLM, head_dim=12),
    "llama3 positions": lambda: random_module(LlamaConfig, LlamaForCausalLM, rope_parameters=LLAMA3),
    "yarn positions": lambda: random_module(rope_parameters=YARN),
    "mistral, no window": lambda: random_module(MistralConfig, MistralForCausalLM, sliding_window=None),
}


def sampled(module, num_generations=4, longest=20, max_rows=256, sampling=None, shared=False, tell=None):
    """Sample with the fused decoder; tokens below 4 end a completion, so that lengths differ."""
    uniforms = np.random.default_rng(0).random((len(PROMPTS), num_generations, longest))
    is_end = torch.arange(SIZES["vocab_size"]) < 4
    with torch.no_grad():
        decoder = FusedDecoder(module, 5 + longest)
        seats = Seats(decoder, sampling or Sampling(), is_end, uniforms, shares_prompts=shared)
        answers = list(sample_continuously(seats, PROMPTS, max_rows, tell or (lambda *news: None)))
    places = np.concatenate([ended for ended, _ in answers])
    assert sorted(places) == list(range(len(PROMPTS)))
    columns = [
        np.concatenate([getattr(rows, item.name) for _, rows in answers]) for item in fields(SampledRows)
    ]
    in_order = np.argsort(places)[:, None] * num_generations + np.arange(num_generations)
    return SampledRows(*(column[in_order.reshape(-1)] for column in columns))


def expected_logprobs(module, rows, times, temperature=1.0):
    """Score each row of tokens by a forward pass of the module over its prompt and itself."""
    for row, length in enumerate(rows.lengths):
        prompt, token_ids = PROMPTS[row // times], rows.token_ids[row, :length]
        with torch.no_grad():
            logits = module(input_ids=torch.tensor(np.concatenate([prompt, token_ids]))[None]).logits[0]
        of_tokens = (logits[len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
        yield of_tokens[torch.arange(length), torch.from_numpy(token_ids)].numpy()


@pytest.mark.parametrize("shared", [False, True], ids=["prompts copied", "prompts shared"])
@pytest.mark.parametrize("name", MODULES)
def test_logprobs_are_the_modules_own(name, shared):
    module = MODULES[name]()
    assert refusal(module) is None
    rows = sampled(module, shared=shared)
    assert len(set(rows.lengths)) > 4
    for row, expected in enumerate(expected_logprobs(module, rows, 4)):
        found = rows.logprobs[row, : rows.lengths[row]]
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def test_a_lora_adapter_is_merged():
    module = random_module()
    policy = Policy(module, None, "cpu")
    before = sampled(module)
    add_lora(policy, LoraOptions(r=4), np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    assert refusal(module) is None
    rows = sampled(module)
    assert not np.array_equal(rows.token_ids, before.token_ids)
    for row, expected in enumerate(expected_logprobs(module, rows, 4)):
        np.testing.assert_allclose(rows.logprobs[row, : rows.lengths[row]], expected, atol=2e-6, rtol=0)
    with without_adapter(module):
        assert refusal(module) == "model.layers.0.self_attn.q_proj has its adapter switched off or merged"


def test_bfloat16_logprobs_are_the_modules_own_up_to_its_rounding():
    module = random_module().to(torch.bfloat16)
    rows = sampled(module)
    rounded = np.concatenate(list(expected_logprobs(module, rows, 4)))
    exact = np.concatenate(list(expected_logprobs(module.float(), rows, 4)))
    found = np.concatenate([row[:length] for row, length in zip(rows.logprobs, rows.lengths, strict=True)])
    # The module's own rounding is the measure: ours may differ from it as the exact numbers do.
    limit = np.sqrt(np.mean((rounded - exact) ** 2))
    assert 1e-3 < limit < 5e-2
    assert np.sqrt(np.mean((found - exact) ** 2)) < 1.25 * limit
    assert np.sqrt(np.mean((found - rounded) ** 2)) < 1.5 * limit


def test_weights_are_those_of_the_moment_however_they_were_changed():
    module = random_module()
    before = sampled(module)
    module.model.layers[1].mlp.down_proj.weight.data.mul_(-3)  # No version counter sees this.
    after = sampled(module)
    assert not np.array_equal(before.token_ids, after.token_ids)
    for row, expected in enumerate(expected_logprobs(module, after, 4)):
        np.testing.assert_allclose(after.logprobs[row, : after.lengths[row]], expected, atol=2e-6, rtol=0)


def test_the_module_is_left_as_it_was():
    module = random_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sampled(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_large_weights_laid_out_anew_give_the_same_products():
    generator = torch.Generator().manual_seed(0)
    weight, bias, inputs = (
        torch.randn(*size, generator=generator) for size in [(400, 512), (400,), (9, 512)]
    )
    expected = inputs.double() @ weight.double().t()
    total = torch.ones(9, 400)
    Projection(weight, None).add_to(total, inputs)
    np.testing.assert_allclose(total, expected + 1, atol=1e-4, rtol=0)
    np.testing.assert_allclose(Projection(weight, bias)(inputs), expected + bias, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [False, True], ids=["prompts copied", "prompts shared"])
@pytest.mark.parametrize("max_rows", [1, 3, 4, 5, 9, 256])
def test_who_sits_beside_whom_changes_nothing(max_rows, shared):
    module = random_module()
    alone, together = sampled(module, max_rows=max_rows, shared=shared), sampled(module)
    assert alone.lengths.tolist() == together.lengths.tolist()
    for row, length in enumerate(alone.lengths):
        assert alone.token_ids[row, :length].tolist() == together.token_ids[row, :length].tolist()
        np.testing.assert_allclose(
            alone.logprobs[row, :length], together.logprobs[row, :length], atol=2e-6, rtol=0
        )


def test_waiting_completions_take_the_seats_of_those_that_end():
    told = []
    rows = sampled(random_module(), num_generations=3, max_rows=4, tell=lambda *news: told.append(news))
    assert rows.lengths.min() < rows.lengths.max()
    # Four seats hold one group of three; the next one joins as soon as two completions have ended.
    assert [all_rows for _, all_rows in told] == [9, 9]
    assert told[0][0] in (2, 3)


def test_completions_longer_than_the_columns_of_a_cache_go_on_in_a_new_one(monkeypatch):
    module = random_module()
    at_once = sampled(module, longest=60)
    monkeypatch.setattr("dteframe.rollouts.continuous.ROOM_COLUMNS", 7)
    in_pieces = sampled(module, longest=60)
    assert at_once.lengths.max() > 21
    assert at_once.lengths.tolist() == in_pieces.lengths.tolist()
    for row, length in enumerate(at_once.lengths):
        assert at_once.token_ids[row, :length].tolist() == in_pieces.token_ids[row, :length].tolist()


def test_prompts_are_read_without_their_padding():
    module = random_module()
    with torch.no_grad():
        read = read_prompts(FusedDecoder(module, 5), PROMPTS)
        for row, prompt in enumerate(PROMPTS):
            logits = module(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
            np.testing.assert_allclose(read.logits[row], logits, atol=2e-6, rtol=0)


def test_a_temperature_divides_the_logits():
    module = random_module()
    rows = sampled(module, sampling=Sampling(temperature=0.5))
    for row, expected in enumerate(expected_logprobs(module, rows, 4, temperature=0.5)):
        np.testing.assert_allclose(rows.logprobs[row, : rows.lengths[row]], expected, atol=4e-6, rtol=0)


def module_with_its_own_forward():
    module = random_module()
    module.model.layers[1].mlp.forward = lambda hidden: hidden
    return module


def module_with_another_linear():
    module = random_module()

    class Noisy(torch.nn.Linear):
        pass

    module.model.layers[0].mlp.up_proj = Noisy(32, 48)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: random_module(Qwen3Config, Qwen3ForCausalLM),
            "it is a Qwen3ForCausalLM, none of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
        ),
        (
            lambda: random_module(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "its attention slides over a window",
        ),
        (
            lambda: random_module(MistralConfig, MistralForCausalLM, sliding_window=8),
            "its attention slides over a window",
        ),
        (lambda: random_module(hidden_act="gelu"), "its activation is 'gelu', not 'silu'"),
        (
            lambda: random_module(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
            ),
            "its rotary positions of type 'dynamic' change with the length of the text",
        ),
        (module_with_its_own_forward, "model.layers.1.mlp has a forward of its own"),
        (module_with_another_linear, "model.layers.0.mlp.up_proj is a Noisy, not a plain Linear"),
    ],
    ids=["architecture", "some layers slide", "all layers slide", "activation", "rope", "forward", "linear"],
)
def test_what_it_cannot_compute_is_refused(make, reason):
    assert refusal(make()) == reason


def test_an_adapter_on_bfloat16_weights_is_refused_because_merging_would_round_it_away():
    module = random_module().to(torch.bfloat16)
    add_lora(Policy(module, None, "cpu"), LoraOptions(r=2), np.random.default_rng(0))
    assert refusal(module) == (
        "model.layers.0.self_attn.q_proj has an adapter, which merged into torch.bfloat16 weights would lose "
        "its small digits"
    )


def test_hooks_that_only_record_hidden_states_are_no_hindrance():
    module = random_module()
    module(input_ids=torch.tensor([[2, 3]]), output_hidden_states=True)
    assert any(part._forward_hooks for part in module.modules())
    assert refusal(module) is None


def test_a_broken_weight_shows_in_the_logprobs():
    module = random_module()
    module.model.embed_tokens.weight.data[9] = math.nan
    rows = sampled(module)
    assert not np.isfinite(rows.logprobs[8:, 0]).any()
