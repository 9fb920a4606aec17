"""Lines that share prompts: the same numbers as rows of their own, laid out where it is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dteframe.contracts import LoraOptions, Policy
from dteframe.engine.lines import Line, MicroBatch, Sharing, shared_out, split, split_alike
from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.engine.logprobs import CompletionScorer, block_mask, scorer_inputs, takes_block_masks
from dteframe.engine.lora import add_lora
from dteframe.engine.model_options import checkpoint_gradients
from dteframe.engine.pack import Row, rows_of
from dteframe.flops import PassSizes, pairs_per_token
from dteframe.memory import activation_bytes, shared_position_surcharge
from dteframe.records import Completion, CreditedGroup, Group, ModelSizes
from dteframe.testing.tiny import tiny_policy

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODULES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
LARGE = ModelSizes(10**9, 4, 24, 1024, 4096, 16, 4, 64, 1000, True)
"""Wide enough that attention is cheap beside all else: 6,016 pairs a token."""


def module(name: str = "qwen2") -> PreTrainedModel:
    torch.manual_seed(0)
    return MODULES[name]().eval()


def group(number: int, prompt_length: int, lengths: tuple[int, ...]) -> tuple[Row, ...]:
    rng = np.random.default_rng(number)
    completions = tuple(Completion(rng.integers(2, 97, n), np.full(n, -4.5), "stop", "") for n in lengths)
    found = Group(
        f"q{number}", rng.integers(2, 97, prompt_length), completions, np.zeros(len(lengths)), 0, 0, "train"
    )
    return rows_of(CreditedGroup(found, np.ones(len(lengths)), False, 0), 100 * number)


GROUPS = [group(1, 9, (4, 1, 7)), group(2, 2, (12,)), group(3, 5, (2, 2, 3, 1))]
ROWS = tuple(row for rows in GROUPS for row in rows)


def scores(module: PreTrainedModel, micro_batch: MicroBatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Score rows and add the gradient of a sum in which every token of every row has its own weight."""
    logprobs, entropies = CompletionScorer(module, 0.8)(*scorer_inputs(micro_batch, 0, "cpu"))
    lengths = [len(row.completion.token_ids) for row in micro_batch.rows]
    weights = [
        torch.sin(row.index + torch.arange(n)) for row, n in zip(micro_batch.rows, lengths, strict=True)
    ]
    (logprobs * torch.cat(weights)).sum().backward()
    parts = zip(logprobs.detach().split(lengths), entropies.split(lengths), strict=True)
    return dict(zip((row.index for row in micro_batch.rows), parts, strict=True))


def gradients(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


LAYOUTS = {
    "a_line_a_group": [[GROUPS[0], GROUPS[1], GROUPS[2]]],
    "all_in_one": [[ROWS]],
    "groups_cut_over_two_micro_batches": [
        [GROUPS[0][:2], GROUPS[2][3:]],
        [GROUPS[1] + GROUPS[0][2:], GROUPS[2][:3]],
    ],
}


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_give_the_log_probs_entropies_and_gradients_of_rows_of_their_own(
    layout: str, name: str, checkpoints: bool
) -> None:
    alone, together = module(name), module(name)
    assert takes_block_masks(together)
    if checkpoints:
        checkpoint_gradients(together)
        together.train()
    expected = scores(alone, MicroBatch(tuple(Line.of((row,)) for row in ROWS)))
    found = {}
    for lines in LAYOUTS[layout]:
        found.update(scores(together, MicroBatch(tuple(Line.of(tuple(rows)) for rows in lines))))
    assert found.keys() == expected.keys()
    for index, pair in found.items():
        torch.testing.assert_close(pair, expected[index], atol=1e-5, rtol=1e-5)
    wanted = gradients(alone)
    for key, value in gradients(together).items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-5, msg=key)


def test_lines_train_an_adapter_as_rows_of_their_own_do() -> None:
    found = []
    for lines in (tuple((row,) for row in ROWS), (ROWS,)):
        policy = Policy(module(), tiny_policy().tokenizer, "cpu")
        add_lora(policy, LoraOptions(r=4), np.random.default_rng(0))
        scores(policy.module, MicroBatch(tuple(Line.of(rows) for rows in lines)))
        trained = dict(policy.module.named_parameters())
        found.append({name: item.grad for name, item in trained.items() if item.requires_grad})
    alone, together = found
    assert any(float(value.abs().max()) > 1e-3 for value in alone.values())
    for key, value in together.items():
        torch.testing.assert_close(value, alone[key], atol=1e-5, rtol=1e-5, msg=key)


def test_in_bfloat16_lines_are_as_near_to_float32_as_rows_of_their_own() -> None:
    alone = MicroBatch(tuple(Line.of((row,)) for row in ROWS))
    exact = scores(module(), alone)
    errors = []
    for micro_batch in (alone, MicroBatch((Line.of(ROWS),))):
        found = scores(module().bfloat16(), micro_batch)
        errors.append(max(float((found[row][0] - exact[row][0]).abs().max()) for row in exact))
    assert 0 < errors[1] < 2 * errors[0]


def test_a_token_sees_its_prompt_and_its_own_completion() -> None:
    # Prompts of one token: the first with completions of two tokens and one, the second with one of one.
    inputs = scorer_inputs(
        MicroBatch((Line.of((*group(1, 1, (2, 1)), *group(2, 1, (1,)))), Line.of(group(3, 1, (6,))))),
        0,
        "cpu",
    )
    seen = block_mask(inputs.segments, inputs.contexts, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert inputs.positions[0].tolist() == [0, 1, 2, 1, 0, 1, 0]
    assert inputs.sources[:4].tolist() == [0, 1, 0, 4]


def test_other_architectures_windows_and_ways_of_attention_keep_rows_of_their_own() -> None:
    assert not takes_block_masks(MistralForCausalLM(MistralConfig(**SIZES)))
    assert not takes_block_masks(
        Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0))
    )
    eager = module()
    eager.set_attn_implementation("eager")
    assert not takes_block_masks(eager)


def test_long_prompts_are_shared_and_short_ones_of_equal_answers_are_not() -> None:
    long, short = group(1, 256, (64,) * 8), group(1, 4, (32,) * 8)
    (micro_batch,) = split(long, 10**4, Sharing(LARGE))
    assert [line.num_tokens for line in micro_batch.lines] == [256 + 8 * 64]
    assert micro_batch.shared_prompts == [256] * 7
    small = ModelSizes(10**6, 4, 4, 128, 384, 4, 2, 32, 100, True)  # 384 pairs a token
    assert not any(item.shares_lines for item in split(short, 10**4, Sharing(small)))


def test_lines_are_filled_with_the_completions_of_several_groups() -> None:
    # Prompts of 4: a row of 40 fills a line, 4 + 4 + 4 and 4 + 8 + 8 + 8 another. Padded it would be 6 x 40.
    rows = (*group(1, 4, (36, 4, 4)), *group(2, 4, (8, 8, 8)))
    (micro_batch,) = split(rows, 1000, Sharing(LARGE))
    assert [line.num_tokens for line in micro_batch.lines] == [40, 40]
    assert micro_batch.shared_prompts == [4, 4, 4]
    assert sorted(row.index for row in micro_batch.rows) == sorted(row.index for row in rows)


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    ),
    tokens=st.integers(1, 400),
    num_processes=st.integers(1, 4),
)
def test_every_row_is_run_once_within_the_budget_and_processes_meet_as_often(
    shapes: list[tuple[int, list[int]]], tokens: int, num_processes: int
) -> None:
    rows = [
        row
        for number, (prompt, lengths) in enumerate(shapes)
        for row in group(number, prompt, tuple(lengths))
    ]
    sharing = Sharing(LARGE)
    shares = shared_out(rows, num_processes, sharing)
    every = split_alike(shares, tokens, sharing)
    assert len({len(micro_batches) for micro_batches in every}) == 1
    ran = [row.index for micro_batches in every for micro_batch in micro_batches for row in micro_batch.rows]
    assert sorted(ran) == sorted(row.index for row in rows)
    for micro_batch in (item for micro_batches in every for item in micro_batches):
        charge = sharing.charge(micro_batch.length) if micro_batch.shares_lines else micro_batch.length
        assert len(micro_batch.rows) <= 1 or len(micro_batch.lines) * charge <= tokens


def test_processes_get_whole_groups_where_that_is_even_and_parts_where_it_is_not() -> None:
    even = [*group(1, 10, (1, 1)), *group(2, 10, (1, 1))]
    assert [[row.question_id for row in share] for share in shared_out(even, 2, Sharing(LARGE))] == [
        ["q1", "q1"],
        ["q2", "q2"],
    ]
    # A group of its own: 10 + 4 x 5 tokens for one process, or 10 + 2 x 5 for both.
    shares = shared_out(group(1, 10, (5, 5, 5, 5)), 2, Sharing(LARGE))
    assert [[row.index for row in share] for share in shares] == [[100, 101], [102, 103]]


def test_a_shared_prompt_counts_as_one_in_the_operations() -> None:
    # A prompt of 3 with completions of 2 and 1: 6 tokens; 25 pairs, and 16 of which 9 are done already.
    line = Line.of(group(1, 3, (2, 1)))
    counted = PassSizes()
    counted.note([(5, 2), (4, 1)], MicroBatch((line,)).shared_prompts)
    assert counted == PassSizes(6, 3, 25 + 16 - 9)
    assert line.num_tokens == 6


def test_pairs_per_token_weighs_attention_twice() -> None:
    # 2 x 1024 x (1024 + 256) + 3 x 1024 x 4096 weights a token, 2 x 1024 operations a pair.
    assert pairs_per_token(LARGE) == (2 * 1024 * 1280 + 3 * 1024 * 4096) / (2 * 2 * 1024)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_charge_of_a_line_covers_what_torch_keeps_of_it(checkpoints: bool) -> None:
    made = module().train()
    if checkpoints:
        checkpoint_gradients(made)
    sizes = loaded_sizes(made)
    inputs = scorer_inputs(MicroBatch((Line.of(group(1, 100, (40, 50, 60))),)), 0, "cpu")
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not any(storage.data_ptr() == item.untyped_storage().data_ptr() for item in made.parameters()):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = CompletionScorer(made, 1.0)(*inputs)
    assert results[0].requires_grad
    told = activation_bytes(sizes, 250, gradient_checkpointing=checkpoints)
    told *= 1 + shared_position_surcharge(sizes, 250, gradient_checkpointing=checkpoints)
    logits = 150 * 97 * 4
    assert sum(kept.values()) - logits <= 1.05 * told
