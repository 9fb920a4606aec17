"""Embeddings out of hidden states, by hand."""

from __future__ import annotations

import pytest

from dteframe.pooling import pool_states

torch = pytest.importorskip("torch")
STATES = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [8.0, 4.0]], [[2.0, 2.0], [6.0, 1.0], [99.0, 99.0]]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_padding_is_left_out_of_the_mean():
    assert pool_states(STATES, MASK, 0).tolist() == [[4.0, 2.0], [4.0, 1.5]]


def test_a_suffix_is_left_out_of_the_mean_and_its_last_state_stands_beside_it():
    assert pool_states(STATES, MASK, 1).tolist() == [[2.0, 1.0, 8.0, 4.0], [2.0, 2.0, 6.0, 1.0]]


def test_half_precision_states_are_averaged_in_single_precision():
    assert pool_states(STATES.to(torch.bfloat16), MASK, 0).dtype == torch.float32
