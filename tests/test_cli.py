"""The command line: data on stdout, talk on stderr, exit codes, and no heavy import where none is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import dteframe
from dteframe.cli import app
from dteframe.contracts import KINDS

PROJECT = Path(__file__).parents[1]
RECIPE = """\
name: tiny
training: {max_steps: 2, questions_per_step: 4, num_generations: 2, evaluation_size: 4, learning_rate: 1e-3}
model: {type: from_scratch, hidden_size: 32, num_heads: 2}
dataset: {type: list_operations, size: 60, chain_lengths: [1]}
reward: {type: exact_match}
rollout: {type: transformers, max_completion_length: 8}
"""
LENGTH_PENALTY = PROJECT / "plugins" / "length_penalty.py"


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTEFRAME_CACHE", str(tmp_path / "cache"))
    path = Path("tiny.yaml")
    path.write_text(RECIPE)
    return path


@pytest.fixture
def plugin_that(tmp_path):
    """Write a reward whose body is given, and say where."""

    def write(score: str, name: str = "mine", problem: str = "return None") -> Path:
        file = tmp_path / f"{name}.py"
        file.write_text(
            f'''"""A reward."""
from typing import Literal
from dteframe import Reward, RewardConfig, hookimpl

class MineConfig(RewardConfig):
    type: Literal["{name}"] = "{name}"

class Mine(Reward):
    """Mine."""
    config: MineConfig
    def score(self, question, completions):
        {score}
    def problem_with(self, question):
        {problem}

@hookimpl
def dteframe_components():
    return [Mine]
'''
        )
        return file

    return write


def dteframe_does(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


# run


def test_run_prints_the_run_folder_and_talks_on_stderr(recipe):
    done = dteframe_does("run", recipe, "training.max_steps=1", "--runs", "elsewhere")
    assert (done.exit_code, done.stdout) == (0, "elsewhere/tiny\n")
    assert "held-out at step 1" in done.stderr
    assert Path("elsewhere/tiny/metrics.jsonl").exists()


def test_run_prints_its_summary_as_one_json_object(recipe):
    done = dteframe_does("run", recipe, "--json", "training.max_steps=1", "name=other")
    summary = json.loads(done.stdout)
    assert (summary["name"], summary["steps"], summary["run_folder"]) == ("other", 1, "runs/other")
    assert set(summary) >= {
        "success_rate_before",
        "success_rate_after",
        "tokens_by_purpose",
        "seconds_by_stage",
    }


def test_run_goes_on_with_resume(recipe):
    assert dteframe_does("run", recipe, "training.max_steps=1").exit_code == 0
    done = dteframe_does("run", recipe, "training.max_steps=2", "--resume", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_run_refuses_to_write_over_a_run(recipe):
    assert dteframe_does("run", recipe, "training.max_steps=1").exit_code == 0
    done = dteframe_does("run", recipe, "training.max_steps=1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--resume" in done.stderr


def test_a_word_without_an_equals_sign_is_no_override(recipe):
    done = dteframe_does("run", recipe, "training.max_steps", "5")
    assert done.exit_code == 2
    assert done.stderr == (
        "command line: 'training.max_steps' is no key=value; "
        "one recipe is read, then keys such as training.max_steps=20\n"
    )


def test_local_plugins_are_announced_with_their_hash(recipe, plugin_that):
    file = plugin_that("return [0.5 for _ in completions]")
    done = dteframe_does("run", recipe, "reward.type=mine", "--plugins", file, "training.max_steps=1")
    assert done.exit_code == 0, done.stderr
    announced = next(line for line in done.stderr.splitlines() if line.startswith("plugin "))
    assert announced.startswith("plugin mine.py (") and len(announced) == len("plugin mine.py (0123456789ab)")


def test_what_a_plugin_raises_is_one_line_with_its_note_and_a_hint(recipe, plugin_that):
    file = plugin_that("return []", problem='raise KeyError("gold")')
    done = dteframe_does("run", recipe, "reward.type=mine", "--plugins", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "KeyError: 'gold'" in done.stderr
    assert "reward 'mine'" in done.stderr
    assert done.stderr.endswith("--debug shows where it happened\n")
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(recipe, plugin_that):
    file = plugin_that("return []", problem='raise KeyError("gold")')
    done = dteframe_does("run", recipe, "reward.type=mine", "--plugins", file, "--debug")
    assert done.exit_code == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert 'raise KeyError("gold")' in done.stderr


def test_control_c_ends_with_130(recipe, plugin_that):
    file = plugin_that("return []", problem="raise KeyboardInterrupt")
    done = dteframe_does("run", recipe, "reward.type=mine", "--plugins", file)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


def test_a_reward_that_always_fails_ends_the_run_with_its_line(recipe, plugin_that):
    file = plugin_that('raise KeyError("gold")')
    done = dteframe_does("run", recipe, "reward.type=mine", "--plugins", file)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "mine.py: reward 'mine' raised KeyError: 'gold' (line 12, in score)" in done.stderr
    assert "more than training.max_reward_failure_fraction 0.5: mend the reward, or raise that" in done.stderr
    assert "Traceback" not in done.stderr


# validate


def test_validate_says_ok_per_recipe(recipe):
    Path("second.yaml").write_text(RECIPE)
    done = dteframe_does("validate", recipe, "second.yaml", "seed=3")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "tiny.yaml: ok\nsecond.yaml: ok\n", "")


def test_validate_reports_every_problem_of_every_recipe(recipe):
    Path("bad.yaml").write_text(RECIPE.replace("size: 60", "sise: 60").replace("name: tiny", "nam: tiny"))
    done = dteframe_does("validate", "bad.yaml", recipe, "missing.yaml")
    assert (done.exit_code, done.stdout) == (2, "tiny.yaml: ok\n")
    problems = done.stderr.splitlines()
    assert any(line.startswith("bad.yaml:4:") and "did you mean 'size'" in line for line in problems)
    assert any(line.startswith("bad.yaml:1:1: nam: ") for line in problems)
    assert any(line.startswith("missing.yaml: cannot be read") for line in problems)


def test_validate_as_json_has_problems_and_notes(recipe):
    Path("bad.yaml").write_text(RECIPE.replace("size: 60", "size: none"))
    done = dteframe_does("validate", recipe, "bad.yaml", "--json")
    assert done.exit_code == 2
    good, bad = json.loads(done.stdout)
    assert (good["recipe"], good["ok"], good["problems"]) == ("tiny.yaml", True, [])
    assert bad["ok"] is False
    assert [(item["where"].partition(":")[0], item["key"]) for item in bad["problems"]] == [
        ("bad.yaml", "dataset.size")
    ]


def test_validate_tells_of_files_that_are_not_here(recipe):
    Path("sums.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    done = dteframe_does("validate", recipe, "dataset={type: files, path: [sums.jsonl, more.jsonl]}")
    assert (done.exit_code, done.stdout) == (0, "tiny.yaml: ok\n")
    assert done.stderr == (
        "--set dataset={type: files, path: [sums.jsonl, more.jsonl]}: dataset.path: more.jsonl: "
        f"there is no such file, seen from {Path.cwd()}\n"
    )
    here = dteframe_does("validate", recipe, "dataset={type: files, path: sums.jsonl}")
    assert here.stderr == ""
    folder = dteframe_does("validate", recipe, "dataset={type: huggingface, path: ./nowhere}")
    assert folder.stderr.endswith("there is no folder './nowhere' here; a hub id is written owner/name\n")
    setting = "estimator={type: attention, reference_size: 4, adapter: a.pt}"
    absent = f"estimator.adapter: a.pt: there is no such file, seen from {Path.cwd()}"
    adapter = dteframe_does("validate", recipe, setting)
    assert (adapter.exit_code, adapter.stderr.splitlines()[0]) == (0, f"--set {setting}: {absent}")
    Path("a.pt").touch()
    assert "a.pt: there is" not in dteframe_does("validate", recipe, setting).stderr


def test_validate_needs_a_recipe():
    done = dteframe_does("validate", "seed=3")
    assert (done.exit_code, done.stderr) == (
        2,
        "command line: no recipe is given; name at least one YAML file\n",
    )


def test_a_problem_in_an_override_names_the_command_line(recipe):
    done = dteframe_does("validate", recipe, "training.max_step=3")
    assert done.exit_code == 2
    assert done.stderr.startswith("--set training.max_step=3: ") or done.stderr.startswith("--set: ")


# plan, plugins, schema


def test_plan_explains_in_words_and_as_json(recipe):
    assert dteframe_does("plan", recipe).stdout.startswith("tiny: 2 steps, 1 plan\n")
    work = json.loads(dteframe_does("plan", recipe, "training.max_steps=5", "--json").stdout)
    assert (work["max_steps"], work["num_plans"], work["completions_per_step"]) == (5, 3, 8)


def test_plan_holds_the_memory_against_a_gpu(recipe):
    told = json.loads(dteframe_does("plan", recipe, "--gpu-memory", "2", "--processes", "2", "--json").stdout)
    assert told["device_bytes"] == 2**31
    assert told["memory"]["num_processes"] == 2
    assert told["memory"]["peak_bytes"] == max(stage["total_bytes"] for stage in told["memory"]["stages"])
    assert "; fits into 2.00 GiB" in dteframe_does("plan", recipe, "--gpu-memory", "2").stdout


def test_plugins_lists_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = json.loads(dteframe_does("plugins", "--json").stdout)
    assert {item["kind"] for item in listed} == set(KINDS)
    text = dteframe_does("plugins", "selector").stdout
    assert text.splitlines()[0] == "selector: Which questions next?"
    assert "  uniform                  built-in  " in text


def test_plugins_describes_the_options_of_one():
    done = dteframe_does("plugins", "reward", "length_penalty", "--plugins", LENGTH_PENALTY)
    assert done.stdout.startswith("reward: length_penalty (")
    assert "  free_tokens: integer, at least 0; default 64\n      Tokens that cost nothing.\n" in done.stdout
    described = json.loads(
        dteframe_does("plugins", "reward", "length_penalty", "--plugins", LENGTH_PENALTY, "--json").stdout
    )[0]
    assert described["options"][1] == {
        "name": "free_tokens",
        "only_with": None,
        "type": "integer, at least 0",
        "default": "64",
        "description": "Tokens that cost nothing.",
    }


def test_nested_options_say_which_choice_brings_them():
    text = dteframe_does("plugins", "estimator", "attention").stdout
    assert "  embeddings.path (with embeddings.type=lm): text; required\n" in text


@pytest.mark.parametrize(
    ("words", "advice"),
    [(("plugins", "estimtor"), "'estimator'"), (("plugins", "selector", "unifrom"), "'uniform'")],
)
def test_a_misspelt_kind_or_name_is_corrected(words, advice):
    done = dteframe_does(*words)
    assert done.exit_code == 2
    assert f"did you mean {advice}?" in done.stderr


def test_schema_goes_to_stdout_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = dteframe_does("schema").stdout
    assert json.loads(printed)["title"] == "DTEFrame recipe"
    assert dteframe_does("schema", "--out", "recipe.schema.json").stdout == ""
    assert Path("recipe.schema.json").read_text() == printed


# check, new


def test_check_lists_kept_and_broken_promises(plugin_that):
    good = dteframe_does("check", LENGTH_PENALTY)
    assert good.exit_code == 0
    assert good.stdout.splitlines()[-1] == "  12 of 12 promises kept"
    file = plugin_that("return [0.5]")
    bad = dteframe_does("check", LENGTH_PENALTY, file)
    assert bad.exit_code == 2
    assert "  kept    state_comes_back\n" in bad.stdout
    assert "  BROKEN  one_finite_score_per_completion: 1 scores for 5 completions\n" in bad.stdout
    assert "          ``score`` gives a finite number per completion" in bad.stdout


def test_check_as_json(plugin_that):
    done = dteframe_does("check", plugin_that("return [0.5]"), "--json")
    assert done.exit_code == 2
    (checked,) = json.loads(done.stdout)
    assert (checked["kind"], checked["name"]) == ("reward", "mine")
    assert "one_finite_score_per_completion" in [failure["promise"] for failure in checked["broken"]]


def test_check_names_a_file_that_cannot_be_loaded(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\n")
    done = dteframe_does("check", file)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "broken.py" in done.stderr and "no_such_module" in done.stderr


def test_new_writes_beside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dteframe_does("new", "selector", "hardest_first", "--folder", "research/ideas", "--json")
    assert json.loads(done.stdout) == [
        "research/ideas/hardest_first.py",
        "research/tests/test_hardest_first.py",
    ]
    assert "class HardestFirst(Selector):" in Path("research/ideas/hardest_first.py").read_text()
    assert '"ideas" / "hardest_first.py"' in Path("research/tests/test_hardest_first.py").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("estimatr", "mine"), "'estimatr' is no kind of plugin; did you mean 'estimator'?"),
        (("reward", "Mine"), "'Mine' cannot be the name of a plugin; use small letters, digits and _"),
        (("reward", "class"), "'class' cannot be the name of a plugin"),
        (("reward", "test_mine"), "'test_mine' cannot be the name of a plugin"),
        (("selector", "uniform"), "selector 'uniform' comes with DTEFrame or a package"),
        (("reward", "there"), "plugins/there.py: exists; remove it or choose another name"),
    ],
)
def test_new_refuses_what_could_not_work(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plugins").mkdir()
    Path("plugins/there.py").write_text("")
    done = dteframe_does("new", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert [path.name for path in tmp_path.rglob("*.py")] == ["there.py"]


@pytest.mark.slow
def test_what_new_writes_passes_its_own_tests(tmp_path, monkeypatch):
    """The tests that it writes hold it to the same promises as `dteframe check`; one process does all."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        assert dteframe_does("new", kind, f"my_{kind}").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(KINDS)} passed" in done.stdout


# The command itself


def test_version_and_help():
    assert dteframe_does("--version").stdout == f"dteframe {dteframe.__version__}\n"
    for words in (["--help"], []):
        shown = dteframe_does(*words)
        assert shown.exit_code == 0
        assert all(
            command in shown.stdout for command in ("run", "validate", "plan", "plugins", "check", "new")
        )


def test_python_m_does_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "dteframe", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"dteframe {dteframe.__version__}\n")
    assert [item.value for item in entry_points(group="console_scripts", name="dteframe")] == [
        "dteframe.cli:main"
    ]


@pytest.mark.parametrize(
    "words", [["--help"], ["validate", "RECIPES"], ["plan", "RECIPE"], ["plugins"], ["schema"]]
)
def test_no_heavy_package_is_imported_before_a_run(words):
    recipes = sorted(str(path) for path in (PROJECT / "recipes").glob("*.yaml"))
    replaced = {"RECIPES": recipes, "RECIPE": recipes[:1]}
    arguments = [argument for word in words for argument in replaced.get(word, [word])]
    program = (
        "import sys; from dteframe.cli import app\n"
        f"code = app({arguments!r}, standalone_mode=False) or 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'reasoning_gym'} & set(sys.modules)\n"
        "sys.exit(f'{code} {sorted(heavy)}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_validate_takes_less_than_a_second_of_cpu(tmp_path):
    """CPU time, as other tests may run beside this one; the best of four, of which the first compiles."""
    measured = (
        "import sys, time\nfrom dteframe.cli import app\n"
        "code = app(sys.argv[1:], standalone_mode=False)\nprint(time.process_time())"
    )
    words = ["validate", str(PROJECT / "recipes" / "quickstart.yaml")]
    surroundings = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    seconds = []
    while len(seconds) < 4 and min(seconds, default=1.0) >= 1.0:
        done = subprocess.run(
            [sys.executable, "-c", measured, *words],
            capture_output=True,
            text=True,
            check=True,
            env=surroundings,
        )
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 1.0, seconds


@pytest.mark.parametrize(
    ("surroundings", "is_told"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, True),
    ],
    ids=["second process of a machine", "second machine", "no torchrun"],
)
def test_a_bad_recipe_is_told_once_on_every_machine(tmp_path, monkeypatch, surroundings, is_told):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    result = dteframe_does("run", tmp_path / "bad.yaml")
    assert ("training: " in result.stderr) is is_told
    assert result.exit_code == (2 if is_told else 1)
