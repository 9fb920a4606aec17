"""The schema words every error, writes itself for editors, and resolved recipes load back."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core.core_schema import ErrorType

from dteframe.contracts import KINDS
from dteframe.recipe import Recipe, TrainingConfig, json_schema, load_recipe
from dteframe.recipe.document import read_document
from dteframe.recipe.known import FOREIGN_NAMES
from dteframe.recipe.messages import WANTED, known_keys, nearest, read_config
from dteframe.recipe.schema import DEFAULT_SECTIONS, TOP_LEVEL, _Dumper
from dteframe.registry import Registry, load_registry

GOOD = """\
name: good
training: {max_steps: 60, questions_per_step: 10, fresh_fraction: 0.9}
model: {type: from_scratch}
dataset: {type: list_operations}
reward: [{type: exact_match}, {type: format, pattern: "1e-3: on\\n\\t# 'é'", weight: 0.1}]
replay: {type: fifo}
"""


class Steps(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    steps: int
    """Optimizer steps; more is slower."""
    rate: float = 0.1


class Options(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    plain: int | str = 0
    nested: Steps | None = None
    several: list[Steps | int] = []
    counts: dict[str, int] = {}
    folder: Path = Path()
    pair: tuple[int, int] = (0, 0)
    names: list[str] | str = []
    mode: Literal["group", "none", 2] = "none"
    flag: bool = False
    limit: float | None = Field(default=None, gt=0, le=0.5)
    word: str = Field(default="a", min_length=1, pattern="[a-z]+")
    few: list[int] = Field(default=[], max_length=2)
    even: int = Field(default=0, multiple_of=2)

    @model_validator(mode="after")
    def _agrees(self) -> "Options":
        if self.flag and self.limit is None:
            raise ValueError("flag needs limit; set both.")
        return self


def findings(**section: Any) -> list[tuple[str, str]]:
    found = read_config(Options, section)
    assert not isinstance(found, BaseModel)
    return [(".".join(map(str, finding.path)), finding.what) for finding in found]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def recipe(registry, tmp_path) -> Recipe:
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    return load_recipe(tmp_path / "good.yaml", (), registry).recipe


@pytest.mark.parametrize(
    ("section", "path", "what"),
    [
        ({"plain": [1]}, "plain", "must be a whole number or text, not [1]"),
        ({"nested": 3}, "nested", "must be a section with keys, not 3"),
        ({"nested": {}}, "nested.steps", "is required: optimizer steps"),
        ({"nested": {"steps": 1, "rat": 2}}, "nested.rat", "unknown key"),
        ({"several": [1, {"steps": "x"}]}, "several.1.steps", "must be a whole number, not 'x'"),
        ({"several": ["x"]}, "several.0", "must be a section with keys or a whole number, not 'x'"),
        ({"counts": {"a": 1.5}}, "counts.a", "must be a whole number, not 1.5"),
        ({"counts": 3}, "counts", "must be a section with keys, not 3"),
        ({"pair": [1, 2, 3]}, "pair", "must be a list of at most 2 items, not [1, 2, 3]"),
        ({"names": [3]}, "names.0", "must be text, not 3; put it in quotes"),
        ({"names": 3}, "names", "must be a list or text, not 3"),
        ({"mode": "gruop"}, "mode", "must be 'group', 'none' or 2, not 'gruop'; did you mean 'group'?"),
        ({"mode": None}, "mode", "must be 'group', 'none' or 2, not null"),
        ({"flag": "no"}, "flag", "must be true or false, not 'no'; write false"),
        ({"flag": 1}, "flag", "must be true or false, not 1; write true"),
        ({"flag": True}, "", "flag needs limit; set both"),
        ({"limit": 0}, "limit", "must be above 0, not 0"),
        ({"limit": 0.75}, "limit", "must be at most 0.5, not 0.75"),
        ({"limit": True}, "limit", "must be a number, not true"),
        ({"limit": "1e-3"}, "limit", "must be a number, not '1e-3'; write 1e-3, without quotes"),
        ({"limit": "1,5"}, "limit", "must be a number, not '1,5'"),
        ({"limit": "1,500"}, "limit", "must be a number, not '1,500'; write 1500"),
        ({"word": ""}, "word", "must be text of at least 1 characters, not ''"),
        ({"word": "3"}, "word", "must be text that matches the pattern '[a-z]+', not '3'"),
        ({"few": 3}, "few", "must be a list, not 3; write [3]"),
        ({"few": [1, 2, 3]}, "few", "must be a list of at most 2 items, not [1, 2, 3]"),
        ({"even": 3}, "even", "must be a multiple of 2, not 3"),
        ({"even": 2.0}, "even", "must be a whole number, not 2.0; write 2"),
        ({"folder": 3}, "folder", "must be text, not 3; put it in quotes"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_worded_for_people(section, path, what):
    assert findings(**section) == [(path, what)]


def test_strict_options_may_be_paths_and_tuples():
    found = read_config(Options, {"folder": "a/b", "pair": [1, 2]})
    assert isinstance(found, Options)
    assert (found.folder, found.pair) == (Path("a/b"), (1, 2))


def test_every_error_that_a_value_in_a_recipe_can_have_is_worded():
    worded_elsewhere = {"missing", "extra_forbidden", "value_error", "assertion_error"}
    of_python_objects = {
        *("no_such_attribute", "json_invalid", "json_type", "needs_python_object", "recursion_loop"),
        *("recursion_depth_exceeded", "frozen_field", "frozen_instance", "get_attribute_error"),
        *("default_factory_not_called", "iteration_error", "ellipsis_error", "missing_argument"),
        *("unexpected_keyword_argument", "missing_keyword_only_argument", "unexpected_positional_argument"),
        *("missing_positional_only_argument", "multiple_argument_values"),
    }
    assert set(WANTED) | worded_elsewhere | of_python_objects >= set(get_args(ErrorType))


@pytest.mark.parametrize(
    ("word", "known", "advice"),
    [
        ("num-generations", ["num_generations"], "did you mean 'num_generations'?"),
        ("Learning_Rate", ["learning_rate"], "did you mean 'learning_rate'?"),
        ("gpu", ["auto", "cpu", "cuda"], ""),
    ],
)
def test_only_a_near_spelling_is_suggested(word, known, advice):
    assert nearest(word, known) == advice


def test_a_name_of_another_tool_leads_to_a_key_that_exists(registry):
    for key in set(FOREIGN_NAMES.values()):
        section, _, name = key.partition(".")
        configs = (
            [TrainingConfig] if section == "training" else [item.config for item in registry.of_kind(section)]
        )
        *outer, last = name.split(".")
        assert any(last in known_keys(config, tuple(outer)) for config in configs), key


def test_no_name_of_another_tool_is_a_key_of_ours():
    assert not set(FOREIGN_NAMES) & set(TrainingConfig.model_fields)


def test_a_step_of_ten_questions_nine_of_them_fresh_replays_one(recipe):
    arithmetic = recipe.arithmetic()
    assert (arithmetic.num_replayed, arithmetic.num_fresh, arithmetic.questions_per_plan) == (1, 9, 20)
    assert (arithmetic.max_steps, arithmetic.num_generations, arithmetic.reference_size) == (60, 8, 0)
    assert arithmetic.max_completion_length == recipe.rollout.max_completion_length


def test_half_of_the_groups_are_replayed_where_a_buffer_replays_and_nothing_else_is_said(registry, tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD.replace(", fresh_fraction: 0.9", ""), encoding="utf-8")
    assert load_recipe(file, (), registry).recipe.arithmetic().num_replayed == 5
    assert load_recipe(file, ["replay.type=none"], registry).recipe.arithmetic().num_replayed == 0


def test_the_resolved_recipe_loads_back_equal(recipe, registry, tmp_path):
    written = recipe.to_yaml()
    (tmp_path / "again.yaml").write_text(written, encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml", (), registry).recipe
    assert again == recipe
    assert again.to_yaml() == written
    assert list(yaml.safe_load(written)) == list(TOP_LEVEL)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(blacklist_categories=["Cs"])),
        st.sampled_from(
            ["1e-3", "on", "0o17", "1_0", "1:30", ".nan", "~", "", "=", "<<", "017", "0x1", "- a", "+.5"]
        ),
        st.floats(allow_nan=False),
        st.integers(),
        st.booleans(),
        st.none(),
    )
)
def test_every_value_is_read_back_by_our_loader_and_by_yaml_1_1(value):
    written = yaml.dump({"key": value}, Dumper=_Dumper, allow_unicode=True)
    document = read_document(written)
    assert not document.problems
    assert document.value == {"key": value}
    assert yaml.safe_load(written) == {"key": value}


def test_the_json_schema_knows_every_key_and_plugin_with_words(registry):
    schema = json_schema(registry)
    assert list(schema["properties"]) == list(TOP_LEVEL)
    assert schema["required"] == ["name", "training", "model", "dataset", "reward"]
    assert schema["additionalProperties"] is False
    selector = schema["properties"]["selector"]
    assert selector["properties"]["type"]["enum"] == [
        "difficulty_target",
        "dynamic_sampling",
        "informative_probability",
        "skip_zero_variance",
        "thompson_target",
        "uniform",
    ]
    assert selector["description"] == "Which questions next?"
    training = schema["$defs"]["TrainingConfig"]
    assert training["additionalProperties"] is False
    assert training["required"] == ["max_steps", "questions_per_step"]
    assert all(field.get("description") for field in training["properties"].values())
    json.dumps(schema)


def test_the_json_schema_has_a_plugin_of_the_user(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from dteframe import Selector, SelectorConfig, hookimpl\n"
        "class MineConfig(SelectorConfig):\n"
        "    type: Literal['mine'] = 'mine'\n"
        "    size: int = 3\n"
        "    '''How many.'''\n"
        "class Mine(Selector):\n"
        "    config: MineConfig\n"
        "    def select(self, estimate, count, rng): raise NotImplementedError\n"
        "@hookimpl\n"
        "def dteframe_components(): return [Mine]\n",
        encoding="utf-8",
    )
    schema = json_schema(load_registry([tmp_path / "mine.py"]))
    assert "mine" in schema["properties"]["selector"]["properties"]["type"]["enum"]
    assert schema["$defs"]["MineConfig"]["properties"]["size"]["description"] == "How many."
    assert schema["$defs"]["MineConfig"]["required"] == ["type"]


def test_every_kind_is_a_key_and_every_default_exists(registry):
    assert set(KINDS) < set(TOP_LEVEL)
    for kind, default in DEFAULT_SECTIONS.items():
        for section in default if isinstance(default, list) else [default]:
            assert section["type"] in registry.names(kind)


def test_every_key_of_training_has_a_description():
    assert all(field.description for field in TrainingConfig.model_fields.values())
