"""Turn a checked recipe into the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from dteframe.contracts import (
    Component,
    Context,
    Dataset,
    Estimator,
    Model,
    Objective,
    PluginConfig,
    Replay,
    Reward,
    Rollout,
    Selector,
    Tracker,
)
from dteframe.errors import DataError
from dteframe.recipe import Recipe
from dteframe.registry import Registry


@dataclass(frozen=True, slots=True)
class Parts:
    """The components that a recipe names, built but not started."""

    model: Model
    dataset: Dataset
    rewards: tuple[Reward, ...]
    """At least one; the first decides what a success is."""
    estimator: Estimator
    selector: Selector
    replay: Replay
    rollout: Rollout
    objective: Objective
    trackers: tuple[Tracker, ...]


def assemble(recipe: Recipe, registry: Registry, context: Context) -> Parts:
    """Build every component with its own configuration and the shared context.

    Raises:
        DataError: packages are missing; names all of them.
    """
    every = [recipe.model, recipe.dataset, *recipe.reward, recipe.estimator, recipe.selector, recipe.replay]
    every += [recipe.rollout, recipe.objective, *recipe.tracker]
    missing = [sentence for config in every for sentence in config.missing_packages()]
    if missing:
        raise DataError("\n".join(missing))

    def build(kind: str, config: PluginConfig) -> Component:
        return registry.get(kind, config.type).component(config, context)

    return Parts(
        model=cast(Model, build("model", recipe.model)),
        dataset=cast(Dataset, build("dataset", recipe.dataset)),
        rewards=tuple(cast(Reward, build("reward", config)) for config in recipe.reward),
        estimator=cast(Estimator, build("estimator", recipe.estimator)),
        selector=cast(Selector, build("selector", recipe.selector)),
        replay=cast(Replay, build("replay", recipe.replay)),
        rollout=cast(Rollout, build("rollout", recipe.rollout)),
        objective=cast(Objective, build("objective", recipe.objective)),
        trackers=tuple(cast(Tracker, build("tracker", config)) for config in recipe.tracker),
    )
