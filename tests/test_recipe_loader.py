"""Recipes have YAML 1.2's scalars, overrides are laid over them, and no heavy package is imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dteframe import RecipeError
from dteframe.recipe import LoadedRecipe, load_recipe
from dteframe.recipe.document import Mark, read_document
from dteframe.registry import Registry, load_registry

GOOD = """\
name: good
training: {max_steps: 60, questions_per_step: 32, learning_rate: 3e-4}
model: {type: from_scratch, hidden_size: 64}
dataset: {type: list_operations, size: 4096}
reward: {type: exact_match}
estimator: {type: attention, reference_size: 16}
selector: {type: difficulty_target, target_success_rate: 0.5, temperature: 1e-3}
replay: {type: fifo, capacity: 64}
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def load(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load_good(*overrides: str, text: str = GOOD) -> LoadedRecipe:
        Path("good.yaml").write_text(text, encoding="utf-8")
        return load_recipe(Path("good.yaml"), overrides, registry)

    return load_good


def refusal(load, *overrides: str, text: str = GOOD) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*overrides, text=text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("+3", 3),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("0b1", "0b1"),
        ("=", "="),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("|\n  1\n", "1\n"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_document(f"key: {text}").value["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_value_has_its_place():
    document = read_document("a: 1\nb:\n  - x\n  - {c: 2}\n")
    assert document.value == {"a": 1, "b": ["x", {"c": 2}]}
    assert document.keys["a",] == Mark(1, 1)
    assert document.values["a",] == Mark(1, 4)
    assert document.keys["b", 1, "c"] == Mark(4, 6)
    assert document.values["b", 1, "c"] == Mark(4, 9)


def test_an_alias_stands_for_its_value():
    assert read_document("a: &x {k: 1}\nb: *x\n").value == {"a": {"k": 1}, "b": {"k": 1}}


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert read_document(b"\xef\xbb\xbfa: 1").value == {"a": 1}


def test_what_a_recipe_leaves_out_has_its_default(load):
    recipe = load().recipe
    assert (recipe.name, recipe.seed, recipe.training.num_generations) == ("good", 0, 8)
    assert recipe.rollout.type == "transformers"
    assert recipe.objective.type == "grpo"
    assert [tracker.type for tracker in recipe.tracker] == ["console", "jsonl", "tensorboard"]
    assert [reward.type for reward in recipe.reward] == ["exact_match"]


def test_json_lines_are_written_whatever_the_trackers(load):
    assert [item.type for item in load("tracker={type: console}").recipe.tracker] == ["console", "jsonl"]
    assert [item.type for item in load("tracker=[]").recipe.tracker] == ["jsonl"]


def test_an_override_is_read_as_yaml(load):
    recipe = load("training.learning_rate=1e-5", "seed=7", "name=again", "reward.0.weight=2").recipe
    assert recipe.training.learning_rate == 1e-5
    assert (recipe.seed, recipe.name, recipe.reward[0].weight) == (7, "again", 2.0)


def test_an_override_reaches_into_a_section_that_the_file_leaves_out(load):
    recipe = load("rollout.temperature=0.8", "tracker.1.rollouts_every=5", "model.warm_up.steps=3").recipe
    assert recipe.rollout.temperature == 0.8
    assert recipe.rollout.type == "transformers"
    assert recipe.tracker[1].model_dump()["rollouts_every"] == 5
    assert recipe.model.model_dump()["warm_up"]["steps"] == 3


def test_an_override_appends_to_a_list(load):
    recipe = load("reward.1={type: format, pattern: x, weight: 0.1}").recipe
    assert [(reward.type, reward.weight) for reward in recipe.reward] == [("exact_match", 1), ("format", 0.1)]


def test_the_last_override_of_a_key_counts(load):
    assert load("seed=1", "seed=2").recipe.seed == 2


def test_an_override_of_the_type_drops_keys_that_the_new_plugin_lacks_and_says_so(load):
    loaded = load("selector.type=uniform", "estimator.type=none")
    assert loaded.recipe.selector.type == "uniform"
    assert loaded.notes == (
        "good.yaml:6:30: estimator.reference_size: dropped; estimator 'none' has no such key "
        "(--set estimator.type=none)",
        "good.yaml:7:37: selector.target_success_rate: dropped; selector 'uniform' has no such key "
        "(--set selector.type=uniform)",
        "good.yaml:7:63: selector.temperature: dropped; selector 'uniform' has no such key "
        "(--set selector.type=uniform)",
    )


def test_keys_that_both_types_have_stay(load):
    text = GOOD.replace("{type: exact_match}", "{type: exact_match, weight: 3, ignore_case: true}")
    loaded = load("reward.0.type=math_verify", text=text)
    assert loaded.recipe.reward[0].weight == 3
    assert [note.split(": ")[1] for note in loaded.notes] == ["reward.0.ignore_case"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=3", "training.max_step: unknown key; did you mean 'max_steps'?"),
        ("training.max_steps=many", "training.max_steps: must be a whole number, not 'many'"),
        ("estimator=none", "estimator: must be a section with keys, not 'none'; write estimator.type=none"),
        (
            "selector=unifrom",
            "selector: must be a section with keys, not 'unifrom'; write selector.type=NAME; "
            "did you mean 'uniform'? "
            "(known: difficulty_target, dynamic_sampling, informative_probability, skip_zero_variance, "
            "thompson_target, uniform)",
        ),
        (
            "selector.capacity=1",
            "selector.capacity: unknown key; it is a key of replay 'fifo' and 'prioritised'",
        ),
        ("seed", "is no override; write key=value, such as training.max_steps=10"),
        ("seed=", "seed: has no value after '='; write '' for empty text, or null"),
        (
            "training..x=1",
            "training..x: is no key; write the keys from the top with dots between them, "
            "such as training.max_steps",
        ),
        ("seed=[1", "seed: this '[' is not closed, or a ',' is missing in it"),
        ("name.x=1", "name.x: name is 'good', which has no keys inside"),
        ("reward.2.weight=1", "reward.2.weight: reward has 1 entries, counted from 0; 2 is beyond them"),
        (
            "reward.1.weight=1",
            "reward.1.weight: reward has only 1 entries; give the whole new entry: {type: ...}",
        ),
        (
            "tracker.console.every=1",
            "tracker.console.every: tracker is a list; count its entries from 0, such as tracker.0.console",
        ),
        (
            "replay.type=none training.fresh_fraction=0.5",
            "replay.type: there is no replay 'none training.fresh_fraction=0.5'; "
            "known: fifo, none, prioritised",
        ),
        ("replay.capacity=x", "replay.capacity: must be a whole number, not 'x'"),
        ("selector.type=[uniform]", "selector.type: must be the name of a plugin, not ['uniform']; "
         "known: difficulty_target, dynamic_sampling, informative_probability, skip_zero_variance, "
         "thompson_target, uniform"),
    ],
)  # fmt: skip
def test_a_problem_of_an_override_is_located_there(load, override, message):
    assert refusal(load, override) == f"--set {override}: {message}"


def test_a_key_that_an_overridden_type_requires_is_located_at_the_override(load):
    assert refusal(load, "dataset.type=files").startswith(
        "--set dataset.type=files: dataset.path: is required: "
    )


def test_problems_of_the_file_come_first_and_then_those_of_the_overrides(load):
    text = GOOD.replace("capacity: 64", "capacity: few").replace("max_steps: 60", "max_steps: 0")
    assert refusal(load, "seed=x", "name=3", text=text).splitlines() == [
        "good.yaml:2:23: training.max_steps: must be at least 1, not 0",
        "good.yaml:8:32: replay.capacity: must be a whole number, not 'few'",
        "--set seed=x: seed: must be a whole number, not 'x'",
        "--set name=3: name: must be text, not 3; put it in quotes",
    ]


def test_a_missing_file_is_named(registry):
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("nowhere.yaml"), (), registry)
    assert str(caught.value) == (
        "nowhere.yaml: cannot be read: No such file or directory; give the path of a recipe's YAML file"
    )


def test_costly_references_are_noted(load):
    notes = load("estimator.reference_size=32").notes
    assert notes == (
        "--set estimator.reference_size=32: estimator.reference_size: 32 reference questions per plan are "
        "50% of the 64 questions that a plan asks (training.questions_per_step x "
        "training.selection_interval); more than 25% is seldom repaid",
    )
    assert load("estimator.reference_size=16").notes == ()


def test_truncated_sampling_is_allowed_and_noted(load):
    assert load("rollout.top_k=20").notes == (
        "--set rollout.top_k=20: rollout.top_k: 20 leaves tokens out; the behaviour log-probs are those of "
        "what is left, so importance ratios to the whole policy are not exact",
    )


def test_estimates_that_nobody_reads_are_noted(load):
    assert load("selector={type: uniform}").notes == (
        "good.yaml:6:19: estimator.type: 'attention' rolls out 16 reference questions a plan, "
        "but selector.type 'uniform' ignores the estimates",
    )


def test_validating_imports_no_heavy_package_and_takes_well_under_a_second(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dteframe.recipe import load_recipe\n"
        "from dteframe.registry import load_registry\n"
        "load_recipe(Path('good.yaml'), ['seed=1'], load_registry())\n"
        "heavy = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'math_verify', 'tensorboard'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
    assert done.returncode == 0
    assert time.perf_counter() - start < 5, "a bound for a busy machine; an idle one takes half a second"


def test_loading_a_recipe_is_a_matter_of_milliseconds(load):
    load()
    start = time.perf_counter()
    load()
    assert time.perf_counter() - start < 0.5


PIECES = st.sampled_from(
    ["\n", "  ", "- ", ": ", "{", "}", "[", "]", "*a", "&a ", "'", '"', "|", ">", "!!int ", "<<: ", "~", "#"]
    + ["type", "none", "null", "1e400", ".nan", "-1", "\\x", "\x00", "\ufeff", "é", "\ud800", "? ", "---\n"]
    + ["%", "\t"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), PIECES), min_size=1, max_size=4))
def test_mutated_text_gives_a_recipe_or_a_recipe_error(registry, tmp_path, edits):
    text = GOOD
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    file = tmp_path / "mutated.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(file, (), registry)
    except RecipeError as error:
        assert all(problem.where.startswith(f"{file}:") for problem in error.problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        ["name", "training", "reward", "reward.0", "tracker.1", "model.warm_up", "selector.type", ""]
    ),
    st.sampled_from(["", ".x", ".0", ".type", ".steps", "."]),
    st.one_of(PIECES, st.text(max_size=8)),
)
def test_any_override_gives_a_recipe_or_a_recipe_error(registry, tmp_path, key, sub, value):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD, encoding="utf-8")
    try:
        load_recipe(file, (f"{key}{sub}={value}",), registry)
    except RecipeError as error:
        assert error.problems


def test_an_override_of_a_nested_type_drops_the_keys_of_the_former_one():
    recipe = Path(__file__).parents[1] / "recipes" / "math_qwen.yaml"
    loaded = load_recipe(recipe, ["estimator.embeddings.type=policy"], load_registry([]))
    found = loaded.recipe.estimator.model_dump()["embeddings"]
    assert found == {"layer": None, "suffix": None, "type": "policy"}
    told = [note.partition(": ")[2] for note in loaded.notes if "embeddings" in note]
    assert told == [
        f"estimator.embeddings.{key}: dropped; estimator.embeddings 'policy' has no such key "
        "(--set estimator.embeddings.type=policy)"
        for key in ("path", "revision")
    ]


def test_a_key_of_another_type_of_the_same_section_is_unknown():
    recipe = Path(__file__).parents[1] / "recipes" / "math_qwen.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["estimator.embeddings={type: policy, path: there}"], load_registry([]))
    assert "estimator.embeddings.path: unknown key; it is a key of model 'pretrained'" in str(caught.value)
