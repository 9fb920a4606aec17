import numpy as np
import pytest
import torch

from dteframe.engine.state_files import read_state, write_state


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = {
        "counts": {"a": 1, "b": 2.5, "c": None, "d": True, "e": "text"},
        "groups": [
            {"tokens": np.arange(3), "logprobs": np.array([0.1, -0.2], np.float32)},
            {"tokens": np.zeros(0)},
        ],
        "moments": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
    }
    write_state(tmp_path, "x", state)
    back = read_state(tmp_path, "x")
    assert back["counts"] == state["counts"]
    for mine, theirs in zip(back["groups"], state["groups"], strict=True):
        for name, values in theirs.items():
            assert mine[name].dtype == values.dtype and np.array_equal(mine[name], values)
    assert back["moments"].dtype == torch.bfloat16 and torch.equal(back["moments"], state["moments"])


def test_arrays_that_share_memory_are_written_apart(tmp_path):
    whole = np.arange(6)
    write_state(tmp_path, "x", {"left": whole[:3], "right": whole[3:], "odd": whole[::2]})
    back = read_state(tmp_path, "x")
    assert back["left"].tolist() == [0, 1, 2] and back["right"].tolist() == [3, 4, 5]
    assert back["odd"].tolist() == [0, 2, 4]


def test_keys_with_dots_do_not_take_the_arrays_of_others(tmp_path):
    write_state(tmp_path, "x", {"a": {"b": np.array([1])}, "a.b": np.array([2])})
    back = read_state(tmp_path, "x")
    assert back["a"]["b"].tolist() == [1] and back["a.b"].tolist() == [2]


def test_what_is_no_json_value_is_refused_with_its_path(tmp_path):
    with pytest.raises(
        TypeError, match=r"^components\.replay\.1: set cannot be kept; a state holds JSON values and"
    ):
        write_state(tmp_path, "components", {"replay": [1, {2}]})
