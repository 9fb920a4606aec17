"""Plugins are found in order, known by kind and name, and refused with the file and the reason."""

import sys
import textwrap
from pathlib import Path

import pytest

from dteframe import PluginError
from dteframe.plugin_sources import BUILT_IN
from dteframe.registry import Registry, load_registry

SELECTOR = """
    from typing import Literal, final
    from dteframe import Selector, SelectorConfig, hookimpl

    class FirstConfig(SelectorConfig):
        type: Literal["first"] = "first"

    @final
    class First(Selector):
        '''Take the first questions.

        More words.
        '''
        config: FirstConfig

        def select(self, estimate, count, rng):
            raise NotImplementedError

    @hookimpl
    def dteframe_components():
        return [First]
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def refusal(*paths: Path) -> str:
    with pytest.raises(PluginError) as caught:
        load_registry(paths)
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_built_in_module_gives_its_plugins():
    registry = load_registry()
    found = {item.component.__module__ for kind in ("model", "tracker") for item in registry.of_kind(kind)}
    assert found <= set(BUILT_IN)
    assert len(registry.origins()) == len(BUILT_IN)
    assert registry.names("selector") == [
        "difficulty_target",
        "dynamic_sampling",
        "informative_probability",
        "skip_zero_variance",
        "thompson_target",
        "uniform",
    ]
    assert registry.names("replay") == ["fifo", "none", "prioritised"]
    assert registry.get("selector", "uniform").origin.label == "built-in"


def test_a_plugin_file_is_known_by_kind_and_name(here):
    file = write(here / "plugins" / "first.py", SELECTOR)
    found = load_registry([file]).get("selector", "first")
    assert (found.kind, found.name, found.summary) == ("selector", "first", "Take the first questions.")
    assert found.origin.label == "plugins/first.py"
    assert found.origin.path == file
    assert found.origin.sha256 is not None
    assert len(found.origin.sha256) == 64
    assert found.config.__name__ == "FirstConfig"


def test_the_nearest_plugins_folder_at_or_above_the_recipe_is_searched(here):
    write(here / "plugins" / "first.py", SELECTOR)
    write(here / "project" / "plugins" / "second.py", SELECTOR.replace('"first"', '"second"'))
    recipe = write(here / "project" / "recipes" / "deep" / "a.yaml", "")
    assert "second" in load_registry(near=recipe).names("selector")
    assert "first" not in load_registry(near=recipe).names("selector")
    assert "first" in load_registry(near=here).names("selector")
    assert "first" not in load_registry().names("selector")


def test_given_paths_replace_the_search(here):
    write(here / "plugins" / "first.py", SELECTOR)
    other = write(here / "other.py", SELECTOR.replace('"first"', '"second"'))
    registry = load_registry([other], near=here)
    assert "second" in registry.names("selector")
    assert "first" not in registry.names("selector")
    assert "first" not in load_registry([], near=here).names("selector")


def test_a_package_is_one_plugin_and_finds_its_own_modules(here):
    text = SELECTOR.replace("class FirstConfig", "from .words import NAME\n\n    class FirstConfig")
    package = write(here / "plugins" / "mine" / "__init__.py", text).parent
    write(package / "words.py", "NAME = 1")
    first = load_registry(near=here).get("selector", "first").origin
    assert first.label == "plugins/mine/__init__.py"
    write(package / "words.py", "NAME = 2")
    second = load_registry([package]).get("selector", "first").origin
    assert first.sha256 != second.sha256


def test_tests_and_private_files_in_a_plugins_folder_are_no_plugins(here):
    for name in ("test_first.py", "conftest.py", "_draft.py"):
        write(here / "plugins" / name, "raise RuntimeError")
    assert load_registry(near=here).names("selector") == [
        "difficulty_target",
        "dynamic_sampling",
        "informative_probability",
        "skip_zero_variance",
        "thompson_target",
        "uniform",
    ]


def test_a_changed_file_is_read_anew_and_registries_share_nothing(here):
    file = write(here / "first.py", SELECTOR)
    before = load_registry([file])
    write(file, SELECTOR.replace('"first"', '"third"'))
    after = load_registry([file])
    assert "first" in before.names("selector")
    assert "first" not in after.names("selector")
    assert "third" in after.names("selector")
    assert before.hooks is not after.hooks
    assert not (here / "__pycache__").exists()


def test_the_order_of_given_paths_changes_nothing(here):
    one = write(here / "b.py", SELECTOR)
    two = write(here / "a.py", SELECTOR.replace('"first"', '"second"'))

    def facts(registry: Registry) -> list[str]:
        return [origin.label for origin in registry.origins()] + registry.names("selector")

    assert facts(load_registry([one, two])) == facts(load_registry([two, one, two]))


def test_an_installed_package_adds_plugins_by_an_entry_point(here, monkeypatch):
    write(here / "site" / "dte_extra.py", SELECTOR)
    info = here / "site" / "dte_extra-1.2.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: dte-extra\nVersion: 1.2\n")
    write(info / "entry_points.txt", "[dteframe]\nextra = dte_extra\n")
    monkeypatch.syspath_prepend(str(here / "site"))
    origin = load_registry().get("selector", "first").origin
    assert origin.label == "dte-extra 1.2 (entry point extra)"
    assert origin.path == here / "site" / "dte_extra.py"
    del sys.modules["dte_extra"]


def test_an_entry_point_that_cannot_be_imported_names_its_package(here, monkeypatch):
    info = here / "site" / "dte_extra-1.2.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: dte-extra\nVersion: 1.2\n")
    write(info / "entry_points.txt", "[dteframe]\nextra = dte_missing\n")
    monkeypatch.syspath_prepend(str(here / "site"))
    assert refusal() == (
        "dte-extra 1.2 (entry point extra): cannot be loaded: "
        "ModuleNotFoundError: No module named 'dte_missing'"
    )


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(PluginError) as caught:
        load_registry().get("selector", "unifrom")
    assert str(caught.value) == (
        "selector: there is no selector 'unifrom'; did you mean 'uniform'? "
        "(known: difficulty_target, dynamic_sampling, informative_probability, skip_zero_variance, "
        "thompson_target, uniform)"
    )
    with pytest.raises(PluginError, match="'selecter' is no kind of plugin; did you mean 'selector'"):
        load_registry().names("selecter")


def test_two_plugins_of_one_name_name_both_files(here):
    write(here / "a.py", SELECTOR)
    write(here / "b.py", SELECTOR)
    assert refusal(here / "a.py", here / "b.py") == (
        "b.py: selector 'first' is already defined by a.py; rename one of them"
    )


def test_a_plugin_may_not_take_the_name_of_a_built_in_one(here):
    write(here / "a.py", SELECTOR.replace('"first"', '"uniform"'))
    message = refusal(here / "a.py")
    assert message.startswith("a.py: selector 'uniform' is already defined by built-in (")
    assert message.endswith("dteframe/selectors/uniform.py); rename one of them")


def test_a_misspelt_hook_is_answered_with_the_nearest(here):
    write(
        here / "a.py",
        """
        from dteframe import hookimpl

        @hookimpl
        def dteframe_step_finishd(report):
            pass
        """,
    )
    message = refusal(here / "a.py")
    assert message.startswith(
        "a.py:4: there is no hook 'dteframe_step_finishd'; did you mean 'dteframe_step_finished'? (known: "
    )


def test_a_hook_that_asks_for_something_else_says_what_there_is(here):
    write(
        here / "a.py",
        """
        from dteframe import hookimpl

        @hookimpl
        def dteframe_evaluated(stage, evaluation):
            pass
        """,
    )
    assert refusal(here / "a.py") == (
        "a.py:4: dteframe_evaluated() asks for stage, but the hook has step and evaluation"
    )


def test_a_misspelt_hook_in_a_tracker_is_found_before_any_run(here):
    text = SELECTOR.replace("Selector", "Tracker").replace(
        "def select(self, estimate, count, rng)", "@hookimpl\n        def dteframe_run_begun(self, run)"
    )
    write(here / "a.py", text)
    assert refusal(here / "a.py").startswith(
        "a.py: First: there is no hook 'dteframe_run_begun'; did you mean 'dteframe_run_started'? (known: "
    )


def test_a_file_that_fails_to_import_names_its_line(here):
    write(here / "a.py", "import math\n\n\ndef broken():\n    return math.nothing\n\n\nbroken()\n")
    assert refusal(here / "a.py") == (
        "a.py:5: cannot be imported: AttributeError: module 'math' has no attribute 'nothing'"
    )


def test_a_file_with_a_syntax_error_names_its_line(here):
    write(here / "a.py", "x = 1\ny = (\n")
    assert refusal(here / "a.py") == "a.py:2: cannot be imported: SyntaxError: '(' was never closed"


def test_a_file_that_exits_is_an_error_and_not_the_end(here):
    write(here / "a.py", "import sys\nsys.exit(3)\n")
    assert refusal(here / "a.py") == "a.py:2: cannot be imported: SystemExit: 3"


def test_a_module_of_a_package_that_fails_is_named_itself(here):
    write(here / "mine" / "__init__.py", "from . import words\n")
    write(here / "mine" / "words.py", "\n1 / 0\n")
    assert (
        refusal(here / "mine") == "mine/words.py:2: cannot be imported: ZeroDivisionError: division by zero"
    )


def test_all_broken_plugins_are_reported_at_once(here):
    write(here / "plugins" / "a.py", "import nothing_of_this_name\n")
    write(here / "plugins" / "b.py", "")
    assert refusal(here / "plugins").splitlines() == [
        "plugins/a.py:1: cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        "plugins/b.py: adds no plugin and watches no hook; "
        "end the file with a function dteframe_components() under @hookimpl",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "@hookimpl\n",
            "\n",
            "a.py: adds no plugin and watches no hook; put @hookimpl above dteframe_components()",
        ),
        (
            "return [First]",
            "return First",
            "a.py: dteframe_components() must give a list of plugin classes, not First",
        ),
        (
            "return [First]",
            "return [First, 3]",
            "a.py: 3 is no plugin class; subclass one of "
            "Model, Dataset, Reward, Estimator, Selector, Replay, Rollout, Objective, Tracker",
        ),
        (
            "return [First]",
            "return [FirstConfig]",
            "a.py: FirstConfig is no plugin class; subclass one of "
            "Model, Dataset, Reward, Estimator, Selector, Replay, Rollout, Objective, Tracker",
        ),
        (
            "return [First]",
            "return [Selector]",
            "a.py: Selector must be a subclass of exactly one of "
            "Model, Dataset, Reward, Estimator, Selector, Replay, Rollout, Objective, Tracker",
        ),
        (
            "return [First]",
            "return [1 / 0]",
            "a.py: dteframe_components() failed: ZeroDivisionError: division by zero",
        ),
        (
            "def select(",
            "def choose(",
            "a.py: First: does not define select, which every selector must have",
        ),
        (
            "config: FirstConfig",
            "",
            "a.py: First: has no annotation 'config'; "
            "write `config: FirstConfig` into the class, its subclass of SelectorConfig",
        ),
        (
            "config: FirstConfig",
            "config: int",
            "a.py: First: its 'config' is annotated with int; "
            "write `config: FirstConfig` into the class, its subclass of SelectorConfig",
        ),
        (
            "config: FirstConfig",
            "config: 'Nowhere'",
            "a.py: First: its 'config' is annotated with a name that its module does not define as a class; "
            "write `config: FirstConfig` into the class, its subclass of SelectorConfig",
        ),
        (
            'type: Literal["first"] = "first"',
            "size: int = 3",
            "a.py: First: FirstConfig: must name the plugin; "
            'write `type: Literal["some_name"] = "some_name"` into it',
        ),
        (
            'type: Literal["first"] = "first"',
            'type: Literal["first"]',
            "a.py: First: FirstConfig: must name the plugin; "
            'write `type: Literal["some_name"] = "some_name"` into it',
        ),
        (
            'Literal["first"] = "first"',
            'Literal["The First"] = "The First"',
            "a.py: First: FirstConfig: 'The First' cannot be a plugin's name; "
            "use small letters, digits and underscores",
        ),
        (
            'type: Literal["first"] = "first"',
            'type: Literal["first"] = "first"\n        size: "Nowhere" = 3',
            "a.py: First: FirstConfig: an annotation names a type that is not defined "
            "when the file is loaded",
        ),
    ],
)
def test_a_class_that_breaks_a_rule_is_told_which(here, old, new, message):
    assert old in SELECTOR
    write(here / "a.py", SELECTOR.replace(old, new))
    assert refusal(here / "a.py") == message


def test_types_that_only_checkers_import_do_not_hinder_loading(here):
    text = SELECTOR.replace(
        "from typing import Literal, final",
        "from __future__ import annotations\n    from typing import Literal, final, TYPE_CHECKING\n"
        "    if TYPE_CHECKING:\n        import torch",
    ).replace("config: FirstConfig", "config: FirstConfig\n        weights: torch.Tensor")
    assert "first" in load_registry([write(here / "a.py", text)]).names("selector")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py", "nowhere.py: no such file or folder of plugins; check --plugins"),
        ("notes.txt", "notes.txt: not a Python file; a plugin is a .py file or a folder of them"),
        ("empty", "empty: no plugins in this folder; it needs *.py files, or packages"),
    ],
)
def test_a_given_path_without_plugins_is_an_error(here, name, message):
    write(here / "notes.txt", "")
    (here / "empty").mkdir()
    assert refusal(Path(name)) == message
