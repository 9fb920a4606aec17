"""Sweep files: a base recipe, seeds and named axes of overrides, whose product is a list of runs.

A sweep is checked by loading the base recipe with the very ``key=value`` words that its commands give.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dteframe.errors import Problem, RecipeError
from dteframe.plugin_sources import shown
from dteframe.recipe.document import KeyPath
from dteframe.recipe.draft import Draft, read_draft
from dteframe.recipe.flow import override_value
from dteframe.recipe.loader import load_recipe
from dteframe.recipe.messages import UNKNOWN_KEY, nearest, read_config
from dteframe.recipe.schema import Recipe
from dteframe.recipe.sweep_config import ComparisonConfig, SweepConfig, is_sweep
from dteframe.registry import Registry

VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")
"""No hyphen: hyphens stand between the variants in a run's name."""
OWN_KEYS = ("name", "seed")
"""Keys of a recipe that every run has of its own."""

RegistryNear = Callable[[Path], Registry]
"""Gives the plugins that a recipe at a path would run with."""


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """The variants' names in the order of the axes, and the seed: ``deepscaler-grpo-s0``."""
    seed: int
    variants: Mapping[str, str]
    """Of each axis, the variant of this run."""
    overrides: tuple[str, ...]
    """``key=value`` words, name and seed first; those of a later axis come later."""
    recipe: Recipe
    """What is run, all overrides laid over the base recipe."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A valid sweep: every run loads."""

    path: Path
    """The sweep's file."""
    recipe: Path
    """The base recipe's file, as it is typed in the present folder."""
    runs: tuple[SweepRun, ...]
    """Seeds change fastest, then the variants of the last axis."""
    comparison: ComparisonConfig | None
    """How the runs are to be compared, if the file says so."""
    notes: tuple[str, ...]
    """What a user should know of the runs' recipes; each once, with the runs that it is about."""


def is_sweep_file(path: Path) -> bool:
    """Whether a file is a sweep; a file that cannot be read is not."""
    try:
        return is_sweep(read_draft(str(path), path.read_bytes()).values)
    except OSError:
        return False


def load_sweep(path: Path, overrides: Sequence[str], registry_near: RegistryNear) -> Sweep:
    """Read a sweep file and check every run of it.

    Args:
        path: the YAML file.
        overrides: ``key=value``, laid over all runs after the sweep's own.
        registry_near: gives the plugins for the base recipe.

    Raises:
        RecipeError: with every problem of the file and of its runs, each once.
        PluginError: a plugin cannot be loaded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}; give the path of a sweep's YAML file"
        raise RecipeError([Problem(str(path), "", what)]) from error
    draft = read_draft(str(path), data)
    if draft.is_readable and not is_sweep(draft.values):
        keys = ", ".join(SweepConfig.model_fields)
        raise RecipeError([Problem(str(path), "", f"is no sweep file; a sweep has the keys {keys}")])
    config = _config(draft) if draft.is_readable else None
    if config is None:
        raise RecipeError(_sorted_problems(draft))
    recipe = Path(shown((path.parent / config.recipe).resolve()))
    if not recipe.is_file():
        draft.report(("recipe",), f"there is no file {str(recipe)!r}; give its path from the sweep's folder")
        raise RecipeError(_sorted_problems(draft))
    told = _Told(draft)
    runs = []
    registry = registry_near(recipe)
    for combination in _product(path.stem, config):
        words = (*combination.words, *overrides)
        told.begin(combination.name, combination.settings)
        try:
            loaded = load_recipe(recipe, words, registry)
        except RecipeError as error:
            told.problems(error.problems)
        else:
            told.notes(loaded.notes)
            runs.append(
                SweepRun(combination.name, combination.seed, combination.variants, words, loaded.recipe)
            )
    problems = [*_sorted_problems(draft), *_override_problems(overrides), *told.all_problems()]
    if problems:
        raise RecipeError(problems)
    return Sweep(path, recipe, tuple(runs), config.comparison, tuple(told.all_notes()))


@dataclass(frozen=True, slots=True)
class _Setting:
    """One override of a sweep file."""

    key: str
    value: Any
    path: KeyPath
    """Where it stands in the file."""

    @property
    def word(self) -> str:
        return f"{self.key}={override_value(self.value)}"


@dataclass(frozen=True, slots=True)
class _Combination:
    """One variant of each axis, and a seed."""

    name: str
    seed: int
    variants: Mapping[str, str]
    words: tuple[str, ...]
    settings: Sequence[_Setting]


def _config(draft: Draft) -> SweepConfig | None:
    """Check everything that can be checked without the base recipe; None if no runs can be made."""
    known = list(SweepConfig.model_fields)
    found = read_config(SweepConfig, draft.values)
    if isinstance(found, list):
        for finding in found:
            what = finding.what
            if what == UNKNOWN_KEY:
                hint = nearest(str(finding.path[-1]), known) or f"known: {', '.join(known)}"
                what = f"{UNKNOWN_KEY}; {hint}"
            draft.report(finding.path, what, finding.is_about_key)
        if not all(finding.what == UNKNOWN_KEY for finding in found):
            return None
        found = read_config(SweepConfig, {key: draft.values[key] for key in known if key in draft.values})
    assert isinstance(found, SweepConfig)
    num_problems = len(draft.problems)
    for index, seed in enumerate(found.seeds):
        if seed in found.seeds[:index]:
            draft.report(("seeds", index), f"{seed} is given twice; delete one of the two")
    _check_names(draft, found)
    _check_comparison(draft, found)
    _check_keys(draft, found)
    return found if len(draft.problems) == num_problems else None


def _check_names(draft: Draft, config: SweepConfig) -> None:
    for axis, variants in config.axes.items():
        if not variants:
            draft.report(("axes", axis), "has no variants; give at least one, or delete the axis")
        named: list[KeyPath] = [("axes", axis), *(("axes", axis, variant) for variant in variants)]
        for path in named:
            if not VARIANT_NAME.fullmatch(str(path[-1])):
                what = f"{path[-1]!r} cannot be part of a run's name; use letters, digits, '.' and '_'"
                draft.report(path, what, about_key=True)


def _check_comparison(draft: Draft, config: SweepConfig) -> None:
    comparison = config.comparison
    if comparison is None:
        return
    if comparison.axis not in config.axes:
        hint = nearest(comparison.axis, list(config.axes)) or f"axes: {', '.join(config.axes) or 'none'}"
        draft.report(("comparison", "axis"), f"there is no axis {comparison.axis!r}; {hint}")
    elif comparison.baseline not in config.axes[comparison.axis]:
        variants = config.axes[comparison.axis]
        hint = nearest(comparison.baseline, list(variants)) or f"variants: {', '.join(variants)}"
        what = f"axis {comparison.axis!r} has no variant {comparison.baseline!r}; {hint}"
        draft.report(("comparison", "baseline"), what)


def _check_keys(draft: Draft, config: SweepConfig) -> None:
    """Refuse keys that are no overrides, and those that two axes set: which one counts would be a guess."""
    settings = _settings(("overrides",), config.overrides)
    of_earlier_axes: list[tuple[str, _Setting]] = []
    for axis, variants in config.axes.items():
        of_axis: list[_Setting] = []
        for variant, changes in variants.items():
            of_axis += _settings(("axes", axis, variant), changes)
        for setting in of_axis:
            rivals = [rival for rival in of_earlier_axes if _overlap(rival[1].key, setting.key)]
            for other_axis, other in rivals[:1]:
                place = draft.place_of(other.path, about_key=True).text
                what = f"axis {other_axis!r} sets it too ({other.key}, {place}); let one axis decide it"
                draft.report(setting.path, what, about_key=True)
        of_earlier_axes += [(axis, setting) for setting in of_axis]
        settings += of_axis
    for setting in settings:
        if "=" in setting.key:
            what = "is no key; write `key: value`, the key with dots, such as training.max_steps"
            draft.report(setting.path, what, about_key=True)
        elif setting.key in OWN_KEYS:
            what = "is the sweep's to set: names are made of the variants', seeds are listed under 'seeds'"
            draft.report(setting.path, what, about_key=True)


def _overlap(one: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or a section that holds it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _override_problems(overrides: Sequence[str]) -> Iterator[Problem]:
    for word in overrides:
        key = word.partition("=")[0].strip()
        if key in OWN_KEYS:
            yield Problem(f"--set {word}", key, "would be the same in all runs; the sweep's file decides it")


def _settings(path: KeyPath, changes: Mapping[str, Any]) -> list[_Setting]:
    return [_Setting(key, value, (*path, key)) for key, value in changes.items()]


def _product(stem: str, config: SweepConfig) -> Iterator[_Combination]:
    """Combine variants and seeds, each with the settings of its variants.

    All variants of a seed come before the next seed: a sweep that is stopped half-way can be compared.
    """
    common = _settings(("overrides",), config.overrides)
    for seed, *chosen in itertools.product(config.seeds, *config.axes.values()):
        variants = dict(zip(config.axes, chosen, strict=True))
        settings = list(common)
        for axis, variant in variants.items():
            settings += _settings(("axes", axis, variant), config.axes[axis][variant])
        name = "-".join([*(chosen or (stem,)), f"s{seed}"])
        words = (f"name={override_value(name)}", f"seed={seed}", *(item.word for item in settings))
        yield _Combination(name, seed, variants, words, settings)


class _Told:
    """Problems and notes of all runs: each once, placed in the sweep's file, with the runs it is about."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._settings: dict[str, _Setting] = {}
        self._names: list[str] = []
        self._problems: dict[Problem, list[str]] = {}
        self._notes: dict[str, list[str]] = {}

    def begin(self, name: str, settings: Sequence[_Setting]) -> None:
        """Go on with another run."""
        self._names.append(name)
        self._settings = {f"--set {setting.word}": setting for setting in settings}

    def problems(self, problems: Sequence[Problem]) -> None:
        """Note problems of the run."""
        for problem in problems:
            setting = self._settings.get(problem.where)
            where = problem.where if setting is None else self._place(setting, problem.key)
            if problem.key == "name" and problem.where.startswith("--set name="):
                where = f"{self._draft.file}:1:1"
            self._problems.setdefault(Problem(where, problem.key, problem.what), []).append(self._names[-1])

    def notes(self, notes: Sequence[str]) -> None:
        """Note the notes of the run."""
        for note in notes:
            for where, setting in self._settings.items():
                place = self._place(setting, setting.key).replace("\\", r"\\")
                note = re.sub(rf"{re.escape(where)}(?=: |\))", place, note)
            self._notes.setdefault(note, []).append(self._names[-1])

    def all_problems(self) -> Iterator[Problem]:
        """Give each problem once."""
        for problem, names in self._problems.items():
            yield Problem(problem.where, problem.key, f"{problem.what}{self._about(names)}")

    def all_notes(self) -> Iterator[str]:
        """Give each note once."""
        for note, names in self._notes.items():
            yield f"{note}{self._about(names)}"

    def _about(self, names: Sequence[str]) -> str:
        if len(names) == len(self._names):
            return ""
        if len(names) == 1:
            return f" (run {names[0]})"
        return f" ({len(names)} of {len(self._names)} runs, such as {names[0]})"

    def _place(self, setting: _Setting, key: str) -> str:
        """Find the key in the sweep's file, as far into the setting's value as it is written there."""
        path = setting.path
        for part in key.split(".")[len(setting.key.split(".")) :]:
            inner = (*path, int(part) if part.isdigit() else part)
            if inner not in self._draft.keys:
                break
            path = inner
        return self._draft.place_of(path, about_key=True).text


def _sorted_problems(draft: Draft) -> list[Problem]:
    return [problem for _, problem in sorted(draft.problems, key=lambda item: item[0])]
