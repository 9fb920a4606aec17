"""Lines that share prompts: the same numbers as rows of their own, laid out where it is cheaper."""

from __future__ import annotations

import math

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
from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.engine.logprobs import CompletionScorer, scorer_inputs
from dteframe.engine.lora import add_lora
from dteframe.engine.micro_batches import MicroBatch, Sharing, shared_out, split, split_alike
from dteframe.engine.model_options import checkpoint_gradients
from dteframe.engine.pack import Row, rows_of
from dteframe.engine.shared_attention import takes_shared_prompts
from dteframe.engine.tiles import (
    PAIRS_OF_A_CALL,
    UNLIKE_CONTEXTS_PAIRS,
    WASTE,
    Tile,
    end_to_end,
    tiles_of,
)
from dteframe.flops import PassSizes, pairs_per_token
from dteframe.memory import activation_bytes
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


def group(
    number: int, prompt_length: int, lengths: tuple[int, ...], repeated: tuple[int, ...] = ()
) -> tuple[Row, ...]:
    """Make rows of these lengths, each beginning with a token of its own, and some of them again."""
    rng = np.random.default_rng(number)
    texts = [np.array([2 + index, *rng.integers(2, 97, n - 1)]) for index, n in enumerate(lengths)]
    texts += [texts[index].copy() for index in repeated]
    completions = tuple(Completion(text, np.full(len(text), -4.5), "stop", "") for text in texts)
    found = Group(
        f"q{number}", rng.integers(2, 97, prompt_length), completions, np.zeros(len(texts)), 0, 0, "train"
    )
    return rows_of(CreditedGroup(found, np.ones(len(texts)), False, 0), 100 * number)


GROUPS = [
    group(1, 9, (4, 1, 17)),
    group(2, 2, (12,)),
    group(3, 5, (2, 2, 3, 1), repeated=(1, 3, 1)),
    group(4, 90, (3, 20, 5), repeated=(1,)),
]
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
    "one_group": [GROUPS[0], (*GROUPS[1], *GROUPS[2], *GROUPS[3])],
    "all_in_one": [ROWS],
    "groups_cut_over_two_micro_batches": [
        (*GROUPS[0][:2], *GROUPS[2][3:], *GROUPS[3][1:]),
        (*GROUPS[1], *GROUPS[0][2:], *GROUPS[3][:1], *GROUPS[2][:3]),
    ],
}


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_give_the_log_probs_entropies_and_gradients_of_rows_of_their_own(
    layout: str, name: str, checkpoints: bool
) -> None:
    alone, together = module(name), module(name)
    assert takes_shared_prompts(together)
    if checkpoints:
        checkpoint_gradients(together)
        together.train()
    expected = scores(alone, MicroBatch(ROWS))
    found = {}
    for rows in LAYOUTS[layout]:
        found.update(scores(together, MicroBatch(rows, shares_prompts=True)))
    assert found.keys() == expected.keys()
    for index, pair in found.items():
        torch.testing.assert_close(pair, expected[index], atol=1e-5, rtol=1e-5)
    wanted = gradients(alone)
    for key, value in gradients(together).items():
        torch.testing.assert_close(value, wanted[key], atol=3e-5, rtol=1e-5, msg=key)


def test_lines_train_an_adapter_as_rows_of_their_own_do() -> None:
    found = []
    for shares_prompts in (False, True):
        policy = Policy(module(), tiny_policy().tokenizer, "cpu")
        add_lora(policy, LoraOptions(r=4), np.random.default_rng(0))
        scores(policy.module, MicroBatch(ROWS, shares_prompts))
        trained = dict(policy.module.named_parameters())
        found.append({name: item.grad for name, item in trained.items() if item.requires_grad})
    alone, together = found
    assert any(float(value.abs().max()) > 1e-3 for value in alone.values())
    for key, value in together.items():
        torch.testing.assert_close(value, alone[key], atol=3e-5, rtol=1e-5, msg=key)


def test_in_bfloat16_lines_are_as_near_to_float32_as_rows_of_their_own() -> None:
    exact = scores(module(), MicroBatch(ROWS))
    errors = []
    for shares_prompts in (False, True):
        found = scores(module().bfloat16(), MicroBatch(ROWS, shares_prompts))
        errors.append(max(float((found[row][0] - exact[row][0]).abs().max()) for row in exact))
    assert 0 < errors[1] < 2 * errors[0]


def test_rows_are_laid_end_to_end_with_their_prompt_once() -> None:
    # Prompts of one token: the first with completions of two tokens and one, the second with one of one.
    rows = (*group(1, 1, (2, 1)), *group(2, 1, (1,)))
    inputs = scorer_inputs(MicroBatch(rows, shares_prompts=True), 0, "cpu")
    assert inputs.token_ids.shape == (1, 6)
    assert inputs.positions.tolist() == [[0, 1, 2, 1, 0, 1]]
    assert inputs.sources.tolist() == [0, 1, 0, 4]


def test_equal_completions_of_a_prompt_are_computed_once_and_told_of_as_often_as_they_are_there() -> None:
    rows = group(1, 2, (3, 1), repeated=(0, 1, 0))
    micro_batch = MicroBatch(rows, shares_prompts=True)
    inputs = scorer_inputs(micro_batch, 0, "cpu")
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert inputs.sources.tolist() == [1, 2, 3, 1, 1, 2, 3, 1, 1, 2, 3]
    assert micro_batch.shared_beginnings == [2, 5, 3, 5]
    (place,) = micro_batch.places
    assert (place.completions, place.end) == ({2: 3, 5: 1}, 6)
    # The same tokens after another prompt are another text.
    assert MicroBatch((*rows, *group(2, 2, (3,))), shares_prompts=True).shape == (1, 6 + 5)


def test_long_prompts_are_asked_once_and_short_ones_with_every_completion() -> None:
    rows = (*group(1, 4, (2, 2)), *group(2, 2, (3,)))
    whole, after = tiles_of(end_to_end(rows))
    # The first prompt by itself, 0 to 3; the second, at 8 and 9, with its completion.
    assert whole.places().tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 0]]
    assert whole.answers().tolist() == [[8, 9, 10, 11, 12, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert whole.seen() is None
    assert after.places().tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]]
    assert after.answers().tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert after.seen().astype(int).tolist() == [[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]]
    assert (whole.num_pairs, after.num_pairs) == (2 * 5 * 5 / 2, 2 * 2 * 6)


def test_prompts_of_several_lengths_in_a_tile_have_a_mask_for_each() -> None:
    _, after = tiles_of(end_to_end((*group(1, 3, (1,)), *group(2, 2, (1,)))))
    assert after.places().tolist() == [[0, 1, 2, 3], [6, 4, 5, 6]]
    assert after.seen().astype(int).tolist() == [[[1, 1, 1, 1]], [[0, 1, 1, 1]]]


SHAPES = st.lists(
    st.tuples(st.integers(1, 200), st.lists(st.integers(1, 60), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def rows_of_shapes(shapes: list[tuple[int, list[int]]]) -> tuple[Row, ...]:
    return tuple(
        row
        for number, (prompt, lengths) in enumerate(shapes)
        for row in group(number, prompt, tuple(lengths))
    )


@given(shapes=SHAPES)
def test_a_token_sees_its_prompt_and_its_own_completion_and_nothing_twice(
    shapes: list[tuple[int, list[int]]],
) -> None:
    expected, end = {}, 0
    for prompt_length, lengths in shapes:
        prompt = list(range(end, end := end + prompt_length))
        expected |= {token: prompt[: index + 1] for index, token in enumerate(prompt)}
        for length in lengths:
            own = list(range(end, end := end + length))
            expected |= {token: prompt + own[: index + 1] for index, token in enumerate(own)}
    found = {}
    for tile in tiles_of(end_to_end(rows_of_shapes(shapes))):
        places, seen = tile.places(), tile.seen()
        for token, answer in tile.answers().T.tolist():
            number, position = divmod(answer, tile.length)
            keys = (
                np.arange(places.shape[1]) <= position if seen is None else seen[number % len(seen), position]
            )
            assert places[number, tile.context_length + position] == token
            assert found.setdefault(token, sorted(places[number][keys].tolist())) == expected[token]
    assert found == expected


@given(shapes=SHAPES)
def test_tiles_compute_little_that_stretches_of_their_own_would_not(
    shapes: list[tuple[int, list[int]]],
) -> None:
    for tile in tiles_of(end_to_end(rows_of_shapes(shapes))):
        needed = sum(Tile.of(item).num_pairs for item in tile.stretches)
        assert tile.num_pairs <= needed + max(WASTE * needed, PAIRS_OF_A_CALL)
        if tile.shortest_context < tile.context_length:
            assert tile.num_pairs <= UNLIKE_CONTEXTS_PAIRS


def test_other_architectures_windows_and_ways_of_attention_keep_rows_of_their_own() -> None:
    assert not takes_shared_prompts(MistralForCausalLM(MistralConfig(**SIZES)))
    assert not takes_shared_prompts(
        Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0))
    )
    eager = module()
    eager.set_attn_implementation("eager")
    assert not takes_shared_prompts(eager)


def test_long_prompts_are_shared_and_rows_that_share_little_have_lines_of_their_own() -> None:
    long, short = group(1, 256, (64,) * 8), group(1, 1, (32,) * 8)
    (micro_batch,) = split(long, 10**4, Sharing(LARGE))
    assert micro_batch.shape == (1, 256 + 8 * 64)
    assert micro_batch.shared_beginnings == [256] * 7
    (micro_batch,) = split(short, 10**4, Sharing(LARGE))
    assert micro_batch.shape == (8, 33)


def test_rows_of_unlike_lengths_share_a_line_without_padding() -> None:
    # Padded it would be 6 x 40.
    rows = (*group(1, 4, (36, 4, 4)), *group(2, 4, (8, 8, 8)))
    (micro_batch,) = split(rows, 1000, Sharing(LARGE))
    assert micro_batch.shape == (1, 4 + 36 + 4 + 4 + 4 + 3 * 8)
    assert micro_batch.shared_beginnings == [4, 4, 4, 4]
    assert sorted(row.index for row in micro_batch.rows) == sorted(row.index for row in rows)


def test_the_cost_is_tokens_and_the_pairs_and_calls_of_attention() -> None:
    rows, pairs = group(1, 256, (64,) * 8), pairs_per_token(LARGE)
    shared = 256 * 256 / 2 + 8 * 64 * (256 + 64) + 2 * PAIRS_OF_A_CALL
    assert Sharing(LARGE).cost((MicroBatch(rows, shares_prompts=True),)) == 768 + shared / pairs
    in_lines = 8 * 320 * 320 / 2 + PAIRS_OF_A_CALL
    assert Sharing(LARGE).cost((MicroBatch(rows),)) == 8 * 320 + in_lines / pairs


@given(shapes=SHAPES, tokens=st.integers(1, 2000), num_processes=st.integers(1, 4))
def test_every_row_is_run_once_within_the_budget_and_processes_meet_as_often(
    shapes: list[tuple[int, list[int]]], tokens: int, num_processes: int
) -> None:
    rows, sharing = rows_of_shapes(shapes), Sharing(LARGE)
    every = split_alike(shared_out(rows, num_processes, sharing), tokens, sharing)
    assert len({len(micro_batches) for micro_batches in every}) == 1
    ran = [row.index for micro_batches in every for micro_batch in micro_batches for row in micro_batch.rows]
    assert sorted(ran) == sorted(row.index for row in rows)
    for micro_batch in (item for micro_batches in every for item in micro_batches):
        assert len(micro_batch.rows) <= 1 or math.prod(micro_batch.shape) <= tokens


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
    micro_batch = MicroBatch(group(1, 3, (2, 1)), shares_prompts=True)
    counted = PassSizes()
    counted.note([(5, 2), (4, 1)], micro_batch.shared_beginnings)
    assert counted == PassSizes(6, 3, 25 + 16 - 9)
    assert micro_batch.shape == (1, 6)


def test_pairs_per_token_weighs_attention_twice() -> None:
    # 2 x 1024 x (1024 + 256) + 3 x 1024 x 4096 weights a token, 2 x 1024 operations a pair.
    assert pairs_per_token(LARGE) == (2 * 1024 * 1280 + 3 * 1024 * 4096) / (2 * 2 * 1024)


@pytest.mark.parametrize("prompt_length", [10, 100])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_charge_of_shared_prompts_is_what_torch_keeps_of_them(
    checkpoints: bool, prompt_length: int
) -> None:
    made = module().train()
    if checkpoints:
        checkpoint_gradients(made)
    sizes = loaded_sizes(made)
    rows = group(1, prompt_length, (40, 50, 60))
    inputs = scorer_inputs(MicroBatch(rows, shares_prompts=True), 0, "cpu")
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not any(storage.data_ptr() == item.untyped_storage().data_ptr() for item in made.parameters()):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = CompletionScorer(made, 1.0)(*inputs)
    assert results[0].requires_grad
    charges = [Sharing(sizes, checkpoints).charge(prompt_length, length) for length in (40, 50, 60)]
    tokens = charges[0][0] + sum(completion for _, completion in charges)
    told = tokens * activation_bytes(sizes, 1, gradient_checkpointing=checkpoints)
    logits = 150 * 97 * 4
    # What attention is filled up with is not charged: here 60 positions for each of 40, 50 and 60.
    assert sum(kept.values()) - logits <= 1.1 * told
