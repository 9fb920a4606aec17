"""One abstract class per kind of plugin, and the pydantic base of its configuration.

A plugin is one final class in one file. It annotates ``config`` with its own configuration class, whose
``type`` is the plugin's name in recipes; ``dteframe check FILE`` runs the promises of its kind
(``dteframe.testing``) over it. Heavy packages (torch, transformers, datasets) are imported inside methods:
listing and validating must stay cheap.
"""

from collections.abc import Mapping

from dteframe.contracts.component import Component, Context, PluginConfig
from dteframe.contracts.dataset import Dataset, DatasetConfig
from dteframe.contracts.estimator import Estimator, EstimatorConfig, PolicyEncoder
from dteframe.contracts.model import LoraOptions, Model, ModelConfig, Policy
from dteframe.contracts.objective import LossInputs, LossOutputs, Objective, ObjectiveConfig
from dteframe.contracts.replay import Replay, ReplayConfig
from dteframe.contracts.reward import Reward, RewardConfig
from dteframe.contracts.rollout import Rollout, RolloutConfig
from dteframe.contracts.selector import Selector, SelectorConfig
from dteframe.contracts.tracker import Tracker, TrackerConfig

KINDS: Mapping[str, type[Component]] = {
    contract.kind: contract
    for contract in (Model, Dataset, Reward, Estimator, Selector, Replay, Rollout, Objective, Tracker)
}

__all__ = [
    "Component",
    "Context",
    "Dataset",
    "DatasetConfig",
    "Estimator",
    "EstimatorConfig",
    "KINDS",
    "LoraOptions",
    "LossInputs",
    "LossOutputs",
    "Model",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "PluginConfig",
    "Policy",
    "PolicyEncoder",
    "Replay",
    "ReplayConfig",
    "Reward",
    "RewardConfig",
    "Rollout",
    "RolloutConfig",
    "Selector",
    "SelectorConfig",
    "Tracker",
    "TrackerConfig",
]
