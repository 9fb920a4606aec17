"""What every plugin promises, whatever its kind."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

from pydantic import ValidationError

from dteframe.testing.subject import Subject, copy_of_state, insist, insist_on_storable_state, same_value

HEAVY_PACKAGES = ("torch", "transformers", "datasets", "vllm", "reasoning_gym")
"""Importing any of them takes seconds; listing and validating recipes must not."""

_WATCH_IMPORTS = """
import importlib, importlib.util, json, sys
heavy, name, path = json.loads(sys.argv[1])
class Watch:
    def find_spec(self, fullname, where=None, target=None):
        if fullname in heavy:
            print(fullname)
            raise ImportError(fullname)
sys.meta_path.insert(0, Watch())
try:
    if name.partition(".")[0] == "dteframe":
        importlib.import_module(name)
    else:
        spec = importlib.util.spec_from_file_location("plugin_being_checked", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
except ImportError as error:
    if str(error) not in heavy:
        raise
"""


def example_config_builds_the_component(subject: Subject) -> None:
    """``MyConfig.example(folder)`` gives a valid configuration that the class accepts.

    Override ``example`` where an option has no default or the defaults are too large for a check.
    """
    insist(subject.make().config == subject.config(), "the component changed or dropped its configuration")


def config_survives_being_written_to_a_recipe(subject: Subject) -> None:
    """The configuration, written to a run's recipe.yaml and read again, is the same configuration.

    Use lists instead of tuples and sets, and plain JSON values.
    """
    config = subject.config()
    written = json.loads(json.dumps(config.model_dump(mode="json")))
    read = type(config).model_validate(written)
    insist(read == config, f"{config!r} came back as {read!r}")


def config_refuses_unknown_keys(subject: Subject) -> None:
    """A misspelt option is an error: leave ``extra="forbid"`` of PluginConfig alone."""
    config = subject.config()
    try:
        type(config).model_validate({**config.model_dump(mode="json"), "no_such_option": 1})
    except ValidationError:
        return
    insist(False, "the option 'no_such_option' was accepted")


def every_option_is_described(subject: Subject) -> None:
    """Each option has a docstring below it: unit, range and meaning, for ``dteframe plugins`` and editors."""
    options = subject.registered.config.model_fields.items()
    silent = [name for name, option in options if name != "type" and not option.description]
    insist(not silent, f"no docstring below {', '.join(silent)}")


def class_has_a_summary(subject: Subject) -> None:
    """The class has a docstring; its first line is what ``dteframe plugins`` shows."""
    component = subject.registered.component
    insist((component.__doc__ or "").strip(), f"{component.__name__} has no docstring")


def importing_the_file_is_cheap(subject: Subject) -> None:
    """No heavy package is imported with the file: import torch and its like inside the methods."""
    component = subject.registered.component
    question = json.dumps([HEAVY_PACKAGES, component.__module__, inspect.getfile(component)])
    run = subprocess.run(
        [sys.executable, "-c", _WATCH_IMPORTS, question], capture_output=True, text=True, check=False
    )
    insist(run.returncode == 0, f"importing it alone fails: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
    insist(not run.stdout.split(), f"importing it imports {', '.join(run.stdout.split())}")


def state_comes_back(subject: Subject) -> None:
    """``state_dict`` holds only JSON values and arrays, and a new component takes it back.

    For the kinds that do not learn while they work; the others have promises of their own.
    """
    first, second = subject.make(), subject.make()
    insist_on_storable_state(first)
    second.load_state_dict(copy_of_state(first))
    insist(same_value(first.state_dict(), second.state_dict()), "the state changed on its way")


PROMISES = (
    example_config_builds_the_component,
    config_survives_being_written_to_a_recipe,
    config_refuses_unknown_keys,
    every_option_is_described,
    class_has_a_summary,
    importing_the_file_is_cheap,
)
