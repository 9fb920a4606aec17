"""What people give by mistake, or to do harm: refused in a sentence, or left out and named."""

import json
import math
import os
import textwrap

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import TINY, run_tiny
from typer.testing import CliRunner

from dteframe import DataError, PluginError, RecipeError
from dteframe.cli import app
from dteframe.contracts import Context
from dteframe.datasets.huggingface import HuggingFace, HuggingFaceConfig
from dteframe.estimators.adapter import AdapterShape, build_adapter, load_adapter, save_adapter
from dteframe.estimators.embedding_models import load_encoder
from dteframe.estimators.embedding_options import LanguageModelEmbeddings
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry

WATCHER = """
from dteframe import hookimpl

@hookimpl
def dteframe_warned(message):
    raise RuntimeError("called")

@hookimpl
def dteframe_components():
    return [int]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a recipe, and a plugins folder in which one file is broken and one is sound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "broken.py").write_text("import no_such_module\n")
    (plugins / "sound.py").write_text(
        textwrap.dedent(
            """
            from typing import Literal
            from dteframe import Reward, RewardConfig, hookimpl

            class SoundConfig(RewardConfig):
                type: Literal["sound"] = "sound"

            class Sound(Reward):
                '''Reward nothing.'''
                config: SoundConfig
                def score(self, question, completions):
                    return [0.0] * len(completions)

            @hookimpl
            def dteframe_components():
                return [Sound]
            """
        )
    )
    return tmp_path


def command(*words):
    """Run a command; give its exit code and all that it says, on one line."""
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, " ".join(result.output.split())


BROKEN = "plugins/broken.py:1: cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"


def test_a_broken_file_in_the_plugins_folder_is_named_and_stops_no_recipe_that_does_not_need_it(project):
    code, said = command("validate", "tiny.yaml", "reward={type: sound}")
    assert code == 0
    assert said.endswith(f" {BROKEN}; left out, the recipe does not need it tiny.yaml: ok")


def test_a_recipe_that_names_what_nobody_gives_learns_which_file_could_not_be_loaded(project):
    code, said = command("validate", "tiny.yaml", "reward={type: hardest}")
    assert code == 2
    assert said.startswith("--set reward={type: hardest}: reward.type: there is no reward 'hardest'; known: ")
    assert said.endswith(f"; not loaded: {BROKEN}")


def test_a_broken_file_that_was_asked_for_is_an_error(project):
    code, said = command("validate", "tiny.yaml", "--plugins", "plugins")
    assert (code, said) == (2, BROKEN)


def test_the_hooks_of_a_file_that_is_left_out_are_not_called(project):
    (project / "plugins" / "broken.py").write_text(WATCHER)
    registry = load_registry(near=project)
    assert registry.broken == (
        "plugins/broken.py: int is no plugin class; subclass one of Model, Dataset, Reward, Estimator, "
        "Selector, Replay, Rollout, Objective, Tracker",
    )
    registry.hooks.hook.dteframe_warned(message="x")
    assert [origin.label for origin in registry.origins() if origin.is_local] == ["plugins/sound.py"]


def test_a_name_that_is_taken_is_an_error_wherever_the_file_was_found(project):
    text = (project / "plugins" / "sound.py").read_text().replace('"sound"', '"exact_match"')
    (project / "plugins" / "sound.py").write_text(text)
    with pytest.raises(PluginError, match="reward 'exact_match' is already defined by built-in"):
        load_registry(near=project)


@pytest.mark.parametrize("name", ["validate", "plan", "plugins", "schema"])
def test_no_local_plugins_loads_none(project, name):
    (project / "plugins" / "broken.py").unlink()
    (project / "plugins" / "sound.py").write_text("raise SystemExit('loaded')")
    recipe = ["tiny.yaml"] if name in ("validate", "plan") else []
    assert "loaded" in command(name, *recipe)[1]
    code, said = command(name, *recipe, "--no-local-plugins")
    assert code == 0 and "sound" not in said


def test_no_local_plugins_and_a_path_of_them_contradict_each_other(project):
    code, said = command("plan", "tiny.yaml", "--no-local-plugins", "--plugins", "plugins")
    assert (code, said) == (
        2,
        "--no-local-plugins: --plugins plugins is given too; leave one of the two out",
    )


def test_the_processes_of_a_sweep_get_no_local_plugins_either(project):
    (project / "sweep.yaml").write_text("recipe: tiny.yaml\nseeds: [0]\n")
    code, said = command("sweep", "sweep.yaml", "--executor", "commands", "--no-local-plugins")
    assert code == 0 and said.endswith("--no-local-plugins")


@pytest.mark.parametrize(
    "url",
    ["foo", "", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://a b", "http://[::1"],
)
def test_what_is_no_url_of_a_server_is_refused_before_a_run(project, url):
    words = ["rollout.type=vllm", "rollout.mode=server", f"rollout.server_base_url='{url}'"]
    with pytest.raises(RecipeError) as error:
        load_recipe(project / "tiny.yaml", words, load_registry([]))
    assert f"{url!r} is no URL of a server; give one like http://host:8000" in str(error.value)


@pytest.mark.parametrize("url", ["http://host:8000", "https://10.0.0.1/v1/", "http://[::1]:80"])
def test_urls_of_servers_are_taken(project, url):
    words = ["rollout.type=vllm", "rollout.mode=server", f"rollout.server_base_url='{url}'"]
    assert load_recipe(project / "tiny.yaml", words, load_registry([])).recipe.rollout.server_base_url == url


def test_a_run_shorter_than_its_warm_up_is_noted_and_allowed(project):
    words = ("training.max_steps=2", "training.warmup_steps=7")
    loaded = load_recipe(project / "tiny.yaml", words, load_registry([]))
    assert loaded.notes[0] == (
        "--set training.warmup_steps=7: training.warmup_steps: 7 is more than training.max_steps 2, so the "
        "learning rate ends at 25% of training.learning_rate 0.001"
    )


@pytest.mark.parametrize(
    "name", ["../up", "/etc", "a/b", "..", ".", ".hidden", "", "a\0b", "a" * 101, "-rf", "a\nb", "C:\\x", "~"]
)
def test_a_run_name_that_leads_elsewhere_is_refused(project, name):
    (project / "tiny.yaml").write_text(TINY.replace("name: tiny", f"name: {ascii(name)}".replace("'", '"')))
    with pytest.raises(RecipeError) as error:
        load_recipe(project / "tiny.yaml", (), load_registry([]))
    assert str(error.value).startswith(f"{project / 'tiny.yaml'}:1:")


@pytest.mark.parametrize("part", ["", "checkpoints", "metrics.jsonl", "non_finite"])
def test_a_run_folder_that_is_or_holds_a_link_is_refused_and_what_it_leads_to_is_left(tmp_path, part):
    target = tmp_path / "valuable"
    target.mkdir()
    (target / "file").write_text("kept")
    folder = tmp_path / "runs" / "tiny"
    (folder if part else folder.parent).mkdir(parents=True)
    os.symlink(target, folder / part if part else folder)
    with pytest.raises(DataError) as error:
        run_tiny(tmp_path)
    assert str(error.value).startswith(
        f"{folder / part if part else folder}: is a symbolic link to {str(target)!r}"
    )
    assert (target / "file").read_text() == "kept"


def adapter_file(path, change):
    """Write a sound adapter whose weights or shape are changed."""
    adapter = build_adapter(AdapterShape("e", 8, hidden_width=4, num_layers=2))
    save_adapter(adapter, path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    about = json.loads(metadata["dteframe_adapter"])
    change(about["shape"], tensors)
    save_file(tensors, path, {"dteframe_adapter": json.dumps(about)})
    return path


@pytest.mark.parametrize("key", ["width", "hidden_width", "num_layers", "head_width"])
def test_sizes_that_an_adapter_only_claims_take_neither_memory_nor_time(tmp_path, key):
    path = adapter_file(tmp_path / "claims.safetensors", lambda shape, _: shape.update({key: 10**9}))
    with pytest.raises(DataError, match="weights and metadata of the adapter do not fit"):
        load_adapter(path)


@pytest.mark.parametrize("name", ["head.0.weight", "easiness.centre"])
def test_an_adapter_with_weights_that_are_not_finite_is_refused(tmp_path, name):
    path = adapter_file(
        tmp_path / "nan.safetensors", lambda _, tensors: tensors[name].view(-1)[0].fill_(math.nan)
    )
    with pytest.raises(DataError) as error:
        load_adapter(path)
    named = name if name.startswith("head") else "easiness"
    assert str(error.value) == f"{path}: {named!r} holds numbers that are not finite; fit it again"


def test_a_script_that_comes_with_a_dataset_is_not_run(tmp_path):
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "sums.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    context = Context(tmp_path, tmp_path, "cpu", 0, lambda *_: None, lambda _: None)
    with pytest.raises(DataError, match="cannot be loaded from this folder"):
        HuggingFace(HuggingFaceConfig(path=str(folder)), context).load()
    assert not (tmp_path / "was_run").exists()


def test_code_that_comes_with_an_embedder_is_neither_run_nor_asked_about(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.Config"}}
        )
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    context = Context(tmp_path, tmp_path, "cpu", 0, lambda *_: None, lambda _: None)
    with pytest.raises(DataError, match="transformers cannot load this folder"):
        load_encoder(tmp_path, LanguageModelEmbeddings(path=str(tmp_path)), ["a"], context)
    assert not (tmp_path / "was_run").exists()


def test_a_key_of_another_type_of_the_same_section_is_refused_and_not_passed_over(project):
    words = ["estimator.embeddings={type: policy, path: x}"]
    with pytest.raises(RecipeError) as error:
        load_recipe(project / "tiny.yaml", words, load_registry([]))
    assert str(error.value).startswith(f"--set {words[0]}: estimator.embeddings.path: unknown key; ")
