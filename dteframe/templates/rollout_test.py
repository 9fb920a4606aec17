"""What the rollout my_plugin does, and that it keeps the promises of its kind."""

from pathlib import Path

import numpy as np
import pytest

from dteframe import Prompt, Sampling
from dteframe.registry import load_registry
from dteframe.testing.checks import check_component
from dteframe.testing.subject import Subject
from dteframe.testing.tiny import tiny_policy

PLUGIN = Path(__file__).parents[1] / "plugins" / "my_plugin.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Subject:
    """Give the plugin, ready to be made with the example configuration."""
    return Subject(load_registry([PLUGIN]).get("rollout", "my_plugin"), tmp_path)


def test_keeps_every_promise(plugin: Subject) -> None:
    """The promises are those of ``dteframe check``."""
    assert check_component(plugin.registered, plugin.folder) == []


def test_the_likeliest_token_alone_is_certain(plugin: Subject) -> None:
    """With top_k=1 nothing is left to chance: log-probs of 0."""
    rollout = plugin.make()
    rollout.start(tiny_policy())
    prompt = Prompt("sum", np.array([5, 6, 7]))
    sampling = Sampling(top_k=1, max_completion_length=4)
    first, second = dict(rollout.generate([prompt], 2, sampling, [0]))[0]
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.behaviour_logprobs.tolist() == [0.0] * len(first.token_ids)
