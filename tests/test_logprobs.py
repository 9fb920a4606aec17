"""Log-probs and entropies of completions: in chunks or at once, whatever the head, with or without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from dteframe.engine import logprobs as logprobs_module
from dteframe.engine.logprobs import CompletionScorer, linear_logprobs, scorer_inputs
from dteframe.engine.micro_batches import MicroBatch
from dteframe.engine.pack import Row, rows_of
from dteframe.records import Completion, CreditedGroup, Group
from dteframe.testing.tiny import tiny_policy

TEMPERATURE = 0.8


def rows(lengths: tuple[int, ...] = (4, 1, 7), prompt_length: int = 3) -> tuple[Row, ...]:
    rng = np.random.default_rng(0)
    completions = tuple(Completion(rng.integers(2, 90, n), np.full(n, -4.5), "stop", "") for n in lengths)
    prompt = rng.integers(2, 90, prompt_length)
    group = Group("q", prompt, completions, np.zeros(len(lengths)), 0, 0, "train")
    return rows_of(CreditedGroup(group, np.ones(len(lengths)), False, 0), 0)


def scored(module: PreTrainedModel, given: tuple[Row, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return CompletionScorer(module, TEMPERATURE)(*scorer_inputs(MicroBatch(given), 0, "cpu"))


def naive_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = (logits.float() / TEMPERATURE).log_softmax(-1)
    return table.gather(-1, targets[:, None]).squeeze(-1), -(table.exp() * table).sum(-1).detach()


def plain(module: PreTrainedModel, given: tuple[Row, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score row by row, by a plain forward pass and a table of all log-probs."""
    found = []
    for row in given:
        prompt, completion = row.group.group.prompt_token_ids, row.completion.token_ids
        logits = module(input_ids=torch.tensor(np.concatenate([prompt, completion]))[None]).logits[0]
        found.append(naive_logprobs(logits[len(prompt) - 1 : -1], torch.tensor(completion)))
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(module: PreTrainedModel, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give the gradients of a sum that no two tokens have an equal part in."""
    module.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    named = module.named_parameters()
    return {name: item.grad.clone() for name, item in named if item.grad is not None}


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three tokens of the tiny policy's vocabulary be a chunk."""
    monkeypatch.setattr(logprobs_module, "LOGITS_OF_A_CHUNK", 3 * len(tiny_policy().tokenizer))


def cohere() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return CohereForCausalLM(CohereConfig(**sizes, **tokens, logit_scale=0.25)).eval()


def untied() -> PreTrainedModel:
    module = tiny_policy().module
    torch.manual_seed(0)
    head = torch.nn.Linear(32, len(tiny_policy().tokenizer))
    module.set_output_embeddings(head)
    return module


class OddHead(torch.nn.Linear):
    """A head that is more than its weight: adapters are like it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).tanh()


def odd_head() -> PreTrainedModel:
    module = untied()
    module.set_output_embeddings(OddHead(32, len(tiny_policy().tokenizer), bias=False))
    return module


MODULES = {
    "tied": lambda: tiny_policy().module,
    "untied_with_bias": untied,
    "odd_head": odd_head,
    "scales_its_logits": cohere,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("chunks", ["at_once", "in_chunks"])
def test_scores_and_gradients_equal_those_of_a_plain_forward_pass(
    name: str, chunks: str, request: pytest.FixtureRequest
) -> None:
    if chunks == "in_chunks":
        request.getfixturevalue("in_chunks")
    module = MODULES[name]()
    expected, expected_entropies = plain(module, rows())
    expected_gradients = gradients(module, expected)
    logprobs, entropies = scored(module, rows())
    assert not entropies.requires_grad
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-6, rtol=1e-6)
    found = gradients(module, logprobs)
    assert found.keys() == expected_gradients.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected_gradients[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_no_rows_give_no_scores_and_a_gradient_of_zero_for_every_parameter(name: str) -> None:
    module = MODULES[name]()
    logprobs, entropies = scored(module, ())
    assert (logprobs.shape, entropies.shape) == ((0,), (0,))
    found = gradients(module, logprobs)
    assert found.keys() == dict(module.named_parameters()).keys()
    assert not any(value.any() for value in found.values())


def test_a_frozen_head_takes_no_gradient_and_passes_it_on(in_chunks: None) -> None:
    module = untied()
    module.get_output_embeddings().requires_grad_(False)
    expected = gradients(module, plain(module, rows())[0])
    found = gradients(module, scored(module, rows())[0])
    assert not any(name.startswith("lm_head") for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("max_logits", [1, 24, 10**6])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradient_is_that_of_finite_differences(
    max_logits: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "LOGITS_OF_A_CHUNK", max_logits)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((5, 4), (11, 4), (11,)))
    targets = torch.tensor([0, 10, 3, 3, 7])
    given = [item.requires_grad_() for item in (hidden, weight, *([bias] if has_bias else []))]

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(hidden, weight, bias[0] if bias else None, targets, TEMPERATURE)[0]

    assert torch.autograd.gradcheck(logprobs, given)


def test_bfloat16_chunks_add_their_gradients_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 chunks of one token. A sum in bfloat16 stops growing where a part is below 1/256 of it.
    monkeypatch.setattr(logprobs_module, "LOGITS_OF_A_CHUNK", 1)
    torch.manual_seed(0)
    hidden = torch.randn(1, 8, dtype=torch.bfloat16).expand(512, 8).contiguous().requires_grad_()
    weight = (0.1 * torch.randn(16, 8)).to(torch.bfloat16).requires_grad_()
    targets = torch.full((512,), 3)
    logprobs, entropies = linear_logprobs(hidden, weight, None, targets, TEMPERATURE)
    assert (logprobs.dtype, entropies.dtype) == (torch.float32, torch.float32)
    logprobs.sum().backward()
    exact = weight.detach().float().requires_grad_()
    naive_logprobs(hidden.detach().float() @ exact.t(), targets)[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert float((weight.grad.float() - exact.grad).norm() / exact.grad.norm()) < 0.01


@pytest.mark.gpu
def test_bfloat16_log_probs_on_a_gpu_are_those_of_float32_up_to_the_rounding_of_logits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    torch.manual_seed(0)
    hidden = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.1 * torch.randn(151_936, 64, device="cuda")).to(torch.bfloat16).requires_grad_()
    targets = torch.arange(1000, device="cuda")
    logprobs, entropies = linear_logprobs(hidden, weight, None, targets, TEMPERATURE)
    logprobs.sum().backward()
    exact_hidden, exact_weight = (item.detach().float().requires_grad_() for item in (hidden, weight))
    exact, exact_entropies = naive_logprobs(exact_hidden @ exact_weight.t(), targets)
    exact.sum().backward()
    # Logits of up to 4 are rounded by 2**-7 at most, and divided by the temperature.
    torch.testing.assert_close(logprobs, exact, atol=0.03, rtol=0)
    torch.testing.assert_close(entropies, exact_entropies, atol=0.03, rtol=0)
    for found, wanted in ((hidden, exact_hidden), (weight, exact_weight)):
        assert float((found.grad.float() - wanted.grad).norm() / wanted.grad.norm()) < 0.02


def test_a_head_that_is_sure_has_no_entropy_and_one_that_knows_nothing_has_that_of_the_vocabulary() -> None:
    hidden = torch.tensor([[0.0], [1000.0]])
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    logprobs, entropies = linear_logprobs(hidden, weight, None, torch.tensor([2, 0]), 1.0)
    assert logprobs.tolist() == pytest.approx([-np.log(4), 0.0])
    assert entropies.tolist() == pytest.approx([np.log(4), 0.0])


def test_a_scorer_lists_the_modules_parameters_once_and_leaves_its_mode() -> None:
    module = tiny_policy().module.train()
    scorer = CompletionScorer(module, TEMPERATURE)
    assert [name for name, _ in scorer.named_parameters()] == [
        f"module.{name}" for name, _ in module.named_parameters()
    ]
    assert scorer.state_dict().keys() == {f"module.{name}" for name in module.state_dict()}
    assert module.training
