"""From a file and the command line's overrides to a recipe, or to every problem that they have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel

from dteframe.contracts import (
    KINDS,
    DatasetConfig,
    Estimator,
    EstimatorConfig,
    ModelConfig,
    ObjectiveConfig,
    PluginConfig,
    Replay,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    Selector,
    SelectorConfig,
    TrackerConfig,
)
from dteframe.errors import Problem, RecipeError
from dteframe.recipe.checks import Sections, contradictions, notes
from dteframe.recipe.document import KeyPath, dotted
from dteframe.recipe.draft import Draft, apply_overrides, read_draft
from dteframe.recipe.known import Unknown
from dteframe.recipe.messages import UNKNOWN_KEY, Finding, known_keys, read_config, shown
from dteframe.recipe.schema import (
    DEFAULT_SECTIONS,
    LIST_KINDS,
    REQUIRED,
    TOP_LEVEL,
    HeadConfig,
    Recipe,
    TrainingConfig,
)
from dteframe.recipe.sweep_config import is_sweep
from dteframe.registry import Registry, suggestion


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A valid recipe, and what its user should be told."""

    recipe: Recipe
    notes: tuple[str, ...]
    """``where: key: what``, one sentence each: keys dropped by an override, settings that cost or bias."""
    path: Path
    """The recipe's file."""


def load_recipe(path: Path, overrides: Sequence[str], registry: Registry) -> LoadedRecipe:
    """Read a recipe and lay overrides over it.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value``, the value as in YAML; an override of a section's ``type`` drops the
            file's keys that the new one does not have, each with a note.
        registry: the plugins that a recipe may name.

    Raises:
        RecipeError: with every problem of the file and of the overrides, in the order in which they stand.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}; give the path of a recipe's YAML file"
        raise RecipeError([Problem(str(path), "", what)]) from error
    draft = read_draft(str(path), data)
    recipe: Recipe | None = None
    if is_sweep(draft.values):
        what = f"is a sweep, many runs; `dteframe sweep {path}` prints a command for each"
        raise RecipeError([Problem(str(path), "", what)])
    if draft.is_readable:
        types_of_file = {where: draft.type_of(where) for where in draft.typed_paths()}
        apply_overrides(draft, overrides)
        _drop_keys_of_former_types(draft, types_of_file, registry)
        recipe = _Checker(draft, registry).recipe()
    if draft.problems:
        raise RecipeError([problem for _, problem in sorted(draft.problems, key=lambda item: item[0])])
    assert recipe is not None
    broken = [f"{problem}; left out, the recipe does not need it" for problem in registry.broken]
    return LoadedRecipe(recipe, (*draft.notes, *broken), path)


def _drop_keys_of_former_types(
    draft: Draft, types_of_file: dict[KeyPath, str | None], registry: Registry
) -> None:
    """Where an override changed ``type``, drop the file's keys that the new plugin lacks; note each."""
    for where in draft.typed_paths():
        if not draft.has(where):  # It was dropped with the section that it stood in.
            continue
        former = types_of_file.get(where, types_of_file.get(where[:1]) if where[1:] == (0,) else None)
        config = _config_at(draft, where, registry)
        if former in (None, draft.type_of(where)) or config is None:
            continue
        known = config.model_fields
        section = draft.at(where)
        for key in [key for key in section if key not in known]:
            place = draft.place_of((*where, key), about_key=True)
            if not place.is_override:
                del section[key]
                cause = draft.place_of((*where, "type")).text
                owner = dotted(tuple(part for part in where if isinstance(part, str)))
                draft.notes.append(
                    f"{place.text}: {dotted((*where, key))}: dropped; "
                    f"{owner} {draft.type_of(where)!r} has no such key ({cause})"
                )


def _config_at(draft: Draft, where: KeyPath, registry: Registry) -> type[BaseModel] | None:
    """Find the configuration class of a section by its type; None where no class has that type."""
    name, kind = draft.type_of(where), str(where[0])
    if len(where) == 1 or isinstance(where[-1], int):
        return registry.get(kind, name).config if name in registry.names(kind) else None
    outer = _config_at(draft, where[:-1], registry)
    option = outer.model_fields.get(str(where[-1])) if outer is not None else None
    classes = get_args(option.annotation) if option is not None else ()
    models = [found for found in classes if isinstance(found, type) and issubclass(found, BaseModel)]
    return next((model for model in models if _type_of(model) == name), None)


def _type_of(model: type[BaseModel]) -> object:
    return model.model_fields["type"].default if "type" in model.model_fields else None


class _Checker:
    """Check one draft; every problem goes to the draft, and checking goes on."""

    def __init__(self, draft: Draft, registry: Registry) -> None:
        self.draft = draft
        self.registry = registry
        self.sections = Sections()
        self.unknown = Unknown(registry)

    def recipe(self) -> Recipe | None:
        """Check everything; None if anything is wrong."""
        draft = self.draft
        unknown = [key for key in draft.values if key not in TOP_LEVEL]
        for key in unknown:
            draft.report((key,), self.unknown.top_level(key), about_key=True)
        meant = {self.unknown.meant((key,), TOP_LEVEL) for key in unknown}
        head_values = {key: draft.values[key] for key in HeadConfig.model_fields if key in draft.values}
        head = self._read((), HeadConfig, head_values) if "name" not in meant else None
        for key in REQUIRED:
            if key not in draft.values and key not in meant and key not in HeadConfig.model_fields:
                draft.report((key,), self._required(key), about_key=True)
        self.sections.training = self._training()
        for kind in KINDS:
            self._kind(kind)
        self._look_at_plugins()
        for path, what in contradictions(self.sections):
            draft.report(path, what)
        for path, what in notes(self.sections):
            draft.notes.append(f"{draft.place_of(path).text}: {dotted(path)}: {what}")
        if draft.problems:
            return None
        return self._assembled(cast("HeadConfig", head))

    def _required(self, key: str) -> str:
        if key == "training":
            return "is required: a section with at least max_steps and questions_per_step"
        return f"is required: a section with a type; {self._types(key)}"

    def _types(self, kind: str) -> str:
        return f"known: {', '.join(self.registry.names(kind))}"

    def _training(self) -> TrainingConfig | None:
        if "training" not in self.draft.values:
            return None
        section = self.draft.values["training"]
        if not isinstance(section, dict):
            self.draft.report(("training",), f"must be a section with keys, not {shown(section)}")
            return None
        return cast("TrainingConfig | None", self._read(("training",), TrainingConfig, section))

    def _kind(self, kind: str) -> None:
        if kind not in self.draft.values:
            if kind in REQUIRED:
                return
            self.draft.values[kind] = copy.deepcopy(DEFAULT_SECTIONS[kind])
        value = self.draft.values[kind]
        if kind in LIST_KINDS and isinstance(value, list):
            if not value and kind == "reward":
                self.draft.report((kind,), f"is an empty list; at least one is needed; {self._types(kind)}")
            for index, section in enumerate(value):
                self._section((kind, index), section)
        else:
            self._section((kind,), value)

    def _section(self, path: KeyPath, section: Any) -> None:
        kind = str(path[0])
        if not isinstance(section, dict):
            self.draft.report(path, self._no_section(path, section))
            return
        if "type" not in section:
            self.draft.report((*path, "type"), f"is required; {self._types(kind)}", about_key=True)
            return
        name = section["type"]
        if not isinstance(name, str):
            what = f"must be the name of a plugin, not {shown(name)}; {self._types(kind)}"
            self.draft.report((*path, "type"), what)
            return
        if name not in self.registry.names(kind):
            self.draft.report((*path, "type"), self.unknown.plugin(kind, name))
            return
        config = self._read(path, self.registry.get(kind, name).config, section)
        if config is not None:
            self.sections.configs[path] = cast(PluginConfig, config)

    def _no_section(self, path: KeyPath, value: Any) -> str:
        """Advise somebody who wrote ``estimator: none``, ``estimator=none``, or a list."""
        kind = str(path[0])
        if value is None:
            leave = "leave the key out for the default, or " if kind in DEFAULT_SECTIONS else ""
            return f"is empty; {leave}write a section with a type; {self._types(kind)}"
        if isinstance(value, list):
            return f"must be one section, not a list; {kind} cannot be several"
        name = value if isinstance(value, str) and value in self.registry.names(kind) else None
        if self.draft.place_of(path).is_override:
            write = f"{dotted(path)}.type={name or 'NAME'}"
        else:
            write = f"`{{type: {name}}}`" if name else "`{type: NAME}`"
        known = "" if name else f"; {suggestion(str(value), self.registry.names(kind))}"
        return f"must be a section with keys, not {shown(value)}; write {write}{known}"

    def _read(self, path: KeyPath, config: type[BaseModel], section: dict[str, Any]) -> BaseModel | None:
        found = read_config(config, section)
        if isinstance(found, BaseModel):
            return found
        type_place = self.draft.place_of((*path, "type"))
        meant = {
            (*at[:-1], self.unknown.meant(at, known_keys(config, finding.path[:-1], section)))
            for finding in found
            if finding.what == UNKNOWN_KEY and (at := (*path, *finding.path))
        }
        for finding in found:
            at = (*path, *finding.path)
            if at in meant:
                continue  # it is there, under the misspelt name that is reported
            place = self.draft.place_of(at, finding.is_about_key)
            if at not in self.draft.keys and type_place.is_override:
                place = type_place  # the key is missing because the override chose another plugin
            self.draft.report_at(place, at, self._words(path, config, section, finding))
        return None

    def _words(
        self, path: KeyPath, config: type[BaseModel], section: dict[str, Any], finding: Finding
    ) -> str:
        if finding.what != UNKNOWN_KEY:
            return finding.what
        known = known_keys(config, finding.path[:-1], section)
        return self.unknown.option((*path, *finding.path), known)

    def _look_at_plugins(self) -> None:
        """Sort the valid sections by kind, and ask their plugins what they can."""
        sections = self.sections
        for path, config in sections.configs.items():
            kind = str(path[0])
            component = self.registry.get(kind, config.type).component
            if isinstance(config, RewardConfig):
                sections.rewards.append(config)
            elif isinstance(config, TrackerConfig):
                sections.trackers.append(config)
            else:
                setattr(sections, kind, config)
            if issubclass(component, Estimator):
                sections.estimates = component.estimates
            elif issubclass(component, Selector):
                sections.needs_estimate = component.needs_estimate
            elif issubclass(component, Replay):
                sections.replays = component.replays

    def _assembled(self, head: HeadConfig) -> Recipe:
        sections = self.sections
        trackers = list(sections.trackers)
        if not any(item.type == "jsonl" for item in trackers):
            jsonl = self.registry.get("tracker", "jsonl").config
            trackers.append(cast(TrackerConfig, jsonl.model_validate({})))
        return Recipe(
            name=head.name,
            seed=head.seed,
            training=cast(TrainingConfig, sections.training),
            model=cast(ModelConfig, sections.model),
            dataset=cast(DatasetConfig, sections.dataset),
            reward=list(sections.rewards),
            estimator=cast(EstimatorConfig, sections.estimator),
            selector=cast(SelectorConfig, sections.selector),
            replay=cast(ReplayConfig, sections.replay),
            rollout=cast(RolloutConfig, sections.rollout),
            objective=cast(ObjectiveConfig, sections.objective),
            tracker=trackers,
            replays=sections.replays,
        )
