"""Runs of a tiny recipe with every stage in it: what they write, that they repeat, that they resume."""

import json
import os
import re
import socket

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_run import rows, run_tiny

from dteframe.engine.meter import Meter
from dteframe.engine.outcome import likely_cause
from dteframe.engine.progress import Progress
from dteframe.engine.run_folder import locked
from dteframe.errors import DataError, PluginError, ResumeError
from dteframe.recipe import load_recipe
from dteframe.registry import load_registry
from dteframe.traces import read_trace

FILES = ("metrics", "rollouts", "selections", "trace")


def weights_of(folder):
    return load_file(folder / "runs" / "tiny" / "policy" / "model.safetensors")


def assert_same_run(one, other):
    for name in FILES:
        assert rows(one, name) == rows(other, name), name
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that went through without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    run_tiny(folder)
    return folder


def test_a_run_writes_the_files_that_others_build_on(finished):
    run = finished / "runs" / "tiny"
    for name in ("recipe.yaml", "manifest.json", "metrics.jsonl", "rollouts.jsonl", "selections.jsonl"):
        assert (run / name).is_file(), name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.json",
        "step_000002",
        "step_000004",
        "step_000006",
    ]
    assert list((run / "checkpoints" / "step_000002" / "policy").glob("*.safetensors"))
    manifest = json.loads((run / "manifest.json").read_text())
    assert [start["versions"]["torch"] for start in manifest["starts"]] == [torch.__version__]


def test_a_run_writes_the_trace_that_estimators_are_judged_on(finished):
    run = finished / "runs" / "tiny"
    trace = read_trace(run / "trace.parquet")
    measured = [row for row in rows(finished, "rollouts") if not row["is_replayed"]]
    assert len(trace) == len(measured)
    assert int(trace.successes.sum()) == sum(row["successes"] for row in measured)
    assert sorted(trace.purposes) == sorted(row["purpose"] for row in measured)
    assert trace.policy_version.tolist() == sorted(row["policy_version"] for row in measured)
    assert read_trace(run / "trace.jsonl").texts == trace.texts


def test_the_policy_loads_in_plain_transformers(finished):
    folder = finished / "runs" / "tiny" / "policy"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "12 r:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()


def test_there_is_one_row_a_step_and_one_before(finished):
    metrics = rows(finished, "metrics")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics if "evaluation/success_rate" in row] == [0, 3, 6]


def test_a_step_always_has_all_its_groups(finished):
    for row in rows(finished, "metrics")[1:]:
        assert row["answer/num_groups"] + row["replay/num_groups"] == 4
    assert any(row["replay/num_groups"] == 2 for row in rows(finished, "metrics")[1:])


def test_the_seconds_of_the_stages_add_up_to_the_step(finished):
    for line in (finished / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        stages = [
            value for key, value in row.items() if key.startswith("time/") and key != "time/step_seconds"
        ]
        assert sum(stages) == pytest.approx(row["time/step_seconds"])


def test_every_generated_token_is_charged_to_its_purpose(finished):
    tokens = {"train": 0, "reference": 0, "evaluation": 0}
    for group in rows(finished, "rollouts"):
        if "completions" in group:
            tokens[group["purpose"]] += sum(item["num_tokens"] for item in group["completions"])
    last = rows(finished, "metrics")[-1]
    assert {purpose: last[f"cost/{purpose}_tokens"] for purpose in tokens} == tokens
    assert min(tokens.values()) > 0


def test_the_sampler_and_the_trainer_agree_on_every_fresh_token(finished):
    key = "update/sampler_logprob_difference_max_nats"
    differences = [row[key] for row in rows(finished, "metrics") if key in row]
    assert len(differences) >= 3 and max(differences) < 1e-5


def test_the_resolved_recipe_in_the_run_folder_is_the_recipe_that_ran(finished):
    registry = load_registry([])
    written = load_recipe(finished / "runs" / "tiny" / "recipe.yaml", [], registry).recipe
    assert written == load_recipe(finished / "tiny.yaml", [], registry).recipe


OBSERVER = """
import json
import numpy as np
from typing import Literal, final
from dteframe import Estimator, EstimatorConfig, SuccessEstimate, hookimpl

class ObserverConfig(EstimatorConfig):
    type: Literal["observer"] = "observer"

    def num_references(self):
        return 3

@final
class Observer(Estimator):
    \"\"\"Writes down what it is told.\"\"\"

    config: ObserverConfig

    def start(self, questions, encode_with_policy):
        self.ids = tuple(question.id for question in questions)

    def references(self, rng):
        return [self.ids[index] for index in rng.choice(len(self.ids), 3, replace=False)]

    def observe(self, seen):
        with open(self.context.run_folder / "observed.jsonl", "a") as file:
            for row in zip(seen.question_ids, seen.successes.tolist(), seen.trials.tolist()):
                file.write(json.dumps([*row, seen.policy_version, seen.purpose]) + "\\n")

    def predict(self, policy_version):
        return SuccessEstimate(self.ids, np.full(len(self.ids), 0.5), np.ones(len(self.ids)))

@hookimpl
def dteframe_components():
    return [Observer]
"""


def test_every_generated_group_is_observed_once_with_its_counts(tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "observer.py").write_text(OBSERVER)
    run_tiny(tmp_path, "estimator.type=observer", plugins=plugins)
    observed = [
        tuple(json.loads(line)) for line in (tmp_path / "runs/tiny/observed.jsonl").read_text().splitlines()
    ]
    generated = [
        (group["question_id"], group["successes"], group["trials"], group["policy_version"], group["purpose"])
        for group in rows(tmp_path, "rollouts")
        if group["purpose"] != "evaluation" and not group["is_replayed"]
    ]
    assert sorted(observed) == sorted(generated)
    assert {purpose for *_, purpose in generated} == {"train", "reference"}


def test_reused_references_are_not_generated_again(finished):
    selections = rows(finished, "selections")
    reused = {row["step"]: set(row["reused_reference_ids"]) for row in selections}
    assert any(reused.values())
    for group in rows(finished, "rollouts"):
        if group.get("purpose") == "train" and not group.get("is_replayed"):
            assert group["question_id"] not in reused.get(group["step"], set())


def test_the_same_recipe_and_seed_give_the_same_run(finished, tmp_path):
    run_tiny(tmp_path)
    assert_same_run(finished, tmp_path)


def test_another_seed_gives_another_run(finished, tmp_path):
    run_tiny(tmp_path, "seed=1", "training.max_steps=1")
    assert rows(tmp_path, "metrics")[1] != rows(finished, "metrics")[1]


KILLER = """
from dteframe import hookimpl

@hookimpl
def HOOK:
    if CONDITION:
        raise KeyboardInterrupt
"""


def plugins_with_killer(folder, hook, condition):
    plugins = folder / "plugins"
    plugins.mkdir()
    (plugins / "killer.py").write_text(KILLER.replace("HOOK", hook).replace("CONDITION", condition))
    return plugins


@pytest.mark.parametrize(
    ("hook", "condition"),
    [
        ("dteframe_plan_made(plan)", "plan.step == 5"),
        ("dteframe_groups_scored(groups)", "groups.step == 4"),
        ("dteframe_step_finished(report)", "report.step == 3"),
        ("dteframe_evaluated(step, evaluation)", "step == 6"),
    ],
)
def test_a_run_killed_between_checkpoints_and_resumed_equals_the_uninterrupted_one(
    finished, tmp_path, hook, condition
):
    with pytest.raises(KeyboardInterrupt) as caught:
        run_tiny(tmp_path, plugins=plugins_with_killer(tmp_path, hook, condition))
    assert re.search(
        r"runs/tiny: the same command with --resume goes on from step_00000[24]$", caught.value.__notes__[-1]
    )
    run_tiny(tmp_path, resume=True)
    assert_same_run(finished, tmp_path)


def test_a_run_killed_before_its_first_checkpoint_starts_over(finished, tmp_path):
    plugins = plugins_with_killer(tmp_path, "dteframe_step_finished(report)", "report.step == 1")
    with pytest.raises(KeyboardInterrupt) as caught:
        run_tiny(tmp_path, plugins=plugins)
    assert caught.value.__notes__[-1].endswith("starts over: no checkpoint yet")
    run_tiny(tmp_path, resume=True)
    assert_same_run(finished, tmp_path)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, tmp_path):
    run_tiny(tmp_path)
    newest = tmp_path / "runs" / "tiny" / "checkpoints" / "step_000006"
    target = newest / "components.safetensors"
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    summary = run_tiny(tmp_path, resume=True)
    (warning,) = [message for message in summary.warnings if "step_000006" in message]
    assert warning.endswith(
        "components.safetensors is not what was written (its sha256 differs); "
        "using the checkpoint before it, step_000004"
    )
    assert_same_run(finished, tmp_path)


def test_damaged_checkpoints_alone_are_refused_and_nothing_is_lost(tmp_path):
    run_tiny(tmp_path, "training.max_steps=1")
    metrics = rows(tmp_path, "metrics")
    with (tmp_path / "runs/tiny/checkpoints/step_000001/learner.json").open("a") as file:
        file.write("x")
    with pytest.raises(
        ResumeError, match=r"no checkpoint is whole; restore one, or give another name(.|\n)*learner"
    ):
        run_tiny(tmp_path, resume=True)
    assert rows(tmp_path, "metrics") == metrics


def test_held_out_questions_stay_held_out_when_evaluation_is_switched_off(finished, tmp_path):
    run_tiny(tmp_path, "training.evaluate_every=0")
    evaluated = {row["question_id"] for row in rows(finished, "rollouts") if row["purpose"] == "evaluation"}
    assert len(evaluated) == 6
    assert not evaluated & {row["question_id"] for row in rows(tmp_path, "rollouts")}


def test_a_run_past_its_last_step_is_not_resumed(finished):
    with pytest.raises(
        ResumeError, match="the run is at step 6, past training.max_steps 4; raise it"
    ) as caught:
        run_tiny(finished, "training.max_steps=4", resume=True)
    assert not hasattr(caught.value, "__notes__"), "the same command would fail again"


def test_a_tracker_can_be_added_to_a_run(tmp_path):
    run_tiny(tmp_path, "training.max_steps=1")
    run_tiny(tmp_path, "training.max_steps=2", "tracker=[{type: jsonl}, {type: tensorboard}]", resume=True)
    assert list((tmp_path / "runs/tiny/tensorboard").iterdir())


def test_a_run_that_failed_before_its_first_step_does_not_block_its_name(tmp_path):
    with pytest.raises(DataError):
        run_tiny(tmp_path, "dataset.size=16", "training.max_prompt_length=4")
    run_tiny(tmp_path, "training.max_steps=1")
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [0, 1]


def test_a_changed_plugin_is_told_of_on_resume(tmp_path):
    plugins = plugins_with_killer(tmp_path, "dteframe_step_finished(report)", "report.step == 3")
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, plugins=plugins)
    (plugins / "killer.py").write_text((plugins / "killer.py").read_text().replace("== 3", "== 99"))
    summary = run_tiny(tmp_path, resume=True, plugins=plugins)
    (warning,) = [message for message in summary.warnings if "killer.py" in message]
    assert warning.endswith(
        "this plugin has changed since the run began; what follows is made with the new code"
    )


def test_a_hook_that_raises_is_named_with_its_line(tmp_path):
    plugins = plugins_with_killer(tmp_path, "dteframe_step_finished(report)", "report.step == 1")
    (plugins / "killer.py").write_text(
        (plugins / "killer.py").read_text().replace("KeyboardInterrupt", "ValueError")
    )
    with pytest.raises(ValueError) as caught:
        run_tiny(tmp_path, plugins=plugins)
    assert re.search(
        r"raised in .*killer\.py:7, in dteframe_step_finished", "\n".join(caught.value.__notes__)
    )


def test_the_summary_is_written_with_everything_that_was_warned_of(finished):
    summary = json.loads((finished / "runs/tiny/summary.json").read_text())
    assert summary["steps"] == 6 and summary["warnings"] == [] and summary["left_out"] == {}


def test_a_second_process_is_kept_out_of_a_run_folder(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    with locked(folder), pytest.raises(ResumeError) as caught:
        run_tiny(tmp_path)
    named = f"{folder}: another process writes to it (process {os.getpid()} on {socket.gethostname()} since 2"
    assert str(caught.value).startswith(named)
    assert str(caught.value).endswith("); wait for it, or give another name=...")
    run_tiny(tmp_path, "training.max_steps=1")


def test_a_second_process_learns_that_the_first_still_runs_rather_than_to_resume_it(finished):
    folder = finished / "runs" / "tiny"
    with locked(folder), pytest.raises(ResumeError, match="another process writes to it"):
        run_tiny(finished)


def test_a_checkpoint_that_was_never_finished_is_cleared_away(tmp_path):
    run_tiny(tmp_path, "training.max_steps=1")
    folder = tmp_path / "runs/tiny"
    (folder / "checkpoints/.step_000009.writing").mkdir()
    run_tiny(tmp_path, "training.max_steps=2", resume=True)
    assert list(folder.rglob("*.writing")) == []


@pytest.mark.parametrize(
    ("successes", "cause"),
    [
        (0, "every answer is wrong"),
        (3, "each question is solved always or never"),
        (6, "every answer is right"),
    ],
)
def test_the_likely_cause_of_learning_nothing_follows_the_successes(successes, cause):
    progress = Progress(successes=successes, fresh_groups=6, rewards_vary=True)
    assert likely_cause(progress, Meter()).startswith(cause)


def test_a_run_that_cannot_learn_says_so_after_three_steps(tmp_path):
    summary = run_tiny(tmp_path, "reward.pattern='ANSWER'")
    (warning,) = summary.warnings
    assert warning.startswith(
        "no group of the first 3 steps held both successes and failures, so nothing is learnt: all rewards "
        "are 0: the reward, or the data's answers, may be wrong; look at "
    )


def test_a_finished_run_can_go_on_for_more_steps(tmp_path):
    run_tiny(tmp_path, "training.max_steps=2")
    run_tiny(tmp_path, "training.max_steps=3", resume=True)
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [0, 1, 2, 3]


def test_a_folder_with_a_run_in_it_is_not_overwritten(finished):
    with pytest.raises(
        ResumeError, match="holds a run already; add --resume to go on with it, or give another name"
    ):
        run_tiny(finished)


def test_a_changed_recipe_is_not_resumed_and_the_difference_is_listed(finished):
    with pytest.raises(ResumeError) as caught:
        run_tiny(finished, "training.learning_rate=2e-3", "selector.temperature=0.1", resume=True)
    assert str(caught.value).splitlines()[1:] == [
        "  selector.temperature: 0.001 -> 0.1",
        "  training.learning_rate: 0.001 -> 0.002",
    ]


def test_a_run_is_not_resumed_on_other_questions(tmp_path):
    lines = [json.dumps({"question": f"{number} + 1 =", "answer": str(number + 1)}) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    dataset = ("dataset.type=files", f"dataset.path={tmp_path / 'data.jsonl'}", "model.warm_up.steps=0")
    run_tiny(tmp_path, *dataset, "training.max_steps=2")
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[1:], lines[0].replace("0 + 1", "0 + 3")]))
    with pytest.raises(
        ResumeError, match=r"step_000002: the questions of dataset 'files' have changed since then"
    ):
        run_tiny(tmp_path, *dataset, resume=True)


def test_a_pool_smaller_than_a_plan_is_refused(tmp_path):
    with pytest.raises(DataError, match="a plan asks 8 questions"):
        run_tiny(tmp_path, "dataset.size=16", "training.max_prompt_length=4")


NOT_A_RATE = """
import numpy as np
from typing import Literal, final
from dteframe import Estimator, EstimatorConfig, SuccessEstimate, hookimpl

class SuddenNanConfig(EstimatorConfig):
    type: Literal["sudden_nan"] = "sudden_nan"

@final
class SuddenNan(Estimator):
    \"\"\"Predicts nonsense from policy version 4 on.\"\"\"

    config: SuddenNanConfig

    def start(self, questions, encode_with_policy):
        self.ids = tuple(question.id for question in questions)

    def observe(self, observation):
        pass

    def predict(self, policy_version):
        value = VALUE if policy_version >= 4 else 0.5
        count = len(self.ids)
        return SuccessEstimate(self.ids, np.full(count, value), np.ones(count))

@hookimpl
def dteframe_components():
    return [SuddenNan]
"""


def test_a_plugin_that_breaks_in_mid_run_is_named_and_the_run_can_be_resumed(tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "sudden_nan.py").write_text(NOT_A_RATE.replace("VALUE", "float('nan')"))
    with pytest.raises(
        PluginError, match=r"sudden_nan\.py: estimator 'sudden_nan' predict\(\) gave success rate nan"
    ):
        run_tiny(tmp_path, "estimator.type=sudden_nan", plugins=plugins)
    (plugins / "sudden_nan.py").write_text(NOT_A_RATE.replace("VALUE", "0.5"))
    run_tiny(tmp_path, "estimator.type=sudden_nan", plugins=plugins, resume=True)
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [0, 1, 2, 3, 4, 5, 6]
