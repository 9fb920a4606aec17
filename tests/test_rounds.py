"""Steps whose selector turns groups away: what is asked, trained on, paid for, written and resumed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import rows, run_tiny

ROUNDS = (
    "selector={type: dynamic_sampling, oversampling: 1.5, max_rounds: 4}",
    "estimator={type: none}",
    "training.evaluate_every=0",
    "training.checkpoint_every=3",
)
"""On top of replay, two minibatches and plans of two steps: the checkpoint lies inside a plan."""
KILLER = """
from dteframe import hookimpl


@hookimpl
def dteframe_groups_scored(groups):
    if groups.step == 5:
        raise KeyboardInterrupt
"""
SELECTOR = '''
from typing import ClassVar, Literal

from dteframe import Review, Selection, Selector, SelectorConfig, hookimpl


class PickyConfig(SelectorConfig):
    type: Literal["picky"] = "picky"
    num_more: int = 0
    """Questions asked again, whatever happens."""

    def rounds_per_step(self):
        return 3


class Picky(Selector):
    """Accepts what the recipe's option says."""

    config: PickyConfig
    needs_estimate: ClassVar[bool] = False
    reviews: ClassVar[bool] = True

    def select(self, estimate, count, rng):
        return Selection(tuple(sorted(estimate.question_ids)[:count]))

    def review(self, groups, num_missing):
        return Review((), self.config.num_more)


@hookimpl
def dteframe_components():
    return [Picky]
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run with dynamic sampling and replay that went through without a stop."""
    folder = tmp_path_factory.mktemp("rounds")
    run_tiny(folder, *ROUNDS)
    return folder


@pytest.fixture
def picky(tmp_path):
    """A selector that accepts no group at all, in a file of its own."""
    file = tmp_path / "picky.py"
    file.write_text(SELECTOR)
    return file


def test_every_asked_group_is_accepted_rejected_or_surplus_and_none_is_forgotten(finished):
    metrics = rows(finished, "metrics")[1:]
    for row in metrics:
        kinds = [row[f"review/num_{kind}"] for kind in ("accepted", "rejected", "surplus")]
        assert sum(kinds) == row["review/num_asked"] == row["answer/num_groups"]
        assert row["review/num_accepted"] + row["review/num_missing"] + row["replay/num_groups"] == 4
        assert row["update/num_equal_reward_groups"] == 0
    assert sum(row["review/num_rejected"] for row in metrics) > 0
    assert max(row["review/num_rounds"] for row in metrics) > 1


def test_the_first_round_asks_as_many_more_as_the_recipe_says(finished):
    # Two steps of ceil(4 x 1.5) = 6 questions before replay; of ceil(2 x 1.5) = 3 with two groups replayed.
    sizes = {len(row["question_ids"]) for row in rows(finished, "selections")}
    assert sizes <= {12, 6}
    assert len(rows(finished, "selections")[0]["question_ids"]) == 12


def test_groups_that_are_not_trained_on_are_written_and_marked(finished):
    written = [
        row for row in rows(finished, "rollouts") if row["purpose"] == "train" and not row["is_replayed"]
    ]
    metrics = rows(finished, "metrics")[1:]
    for kind in ("rejected", "surplus"):
        marked = [row for row in written if row.get("unused") == kind]
        assert len(marked) == sum(row[f"review/num_{kind}"] for row in metrics)
    for row in written:
        assert (row.get("unused") == "rejected") == (
            len({item["reward"] for item in row["completions"]}) == 1
        )
    assert len(written) == sum(row["review/num_asked"] for row in metrics) == len(rows(finished, "trace"))


def test_no_question_is_asked_twice_in_a_step_or_while_it_is_replayed(finished):
    by_step = {}
    for row in rows(finished, "rollouts"):
        by_step.setdefault(row["step"], []).append(row["question_id"])
    assert all(len(set(names)) == len(names) for names in by_step.values())


def test_tokens_of_unused_groups_are_charged_to_training_and_summed_up(finished):
    train = unused = 0
    for row in rows(finished, "rollouts"):
        if not row["is_replayed"]:
            num_tokens = sum(item["num_tokens"] for item in row["completions"])
            train, unused = train + num_tokens, unused + num_tokens * ("unused" in row)
    last = rows(finished, "metrics")[-1]
    assert (last["cost/train_tokens"], last["cost/unused_tokens"]) == (train, unused)
    assert unused == sum(row["review/unused_tokens"] for row in rows(finished, "metrics")[1:])


def test_a_run_stopped_inside_a_plan_goes_on_as_if_it_had_not_been(finished, tmp_path):
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, *ROUNDS, plugins=killer)
    run_tiny(tmp_path, *ROUNDS, resume=True)
    for name in ("metrics", "rollouts", "selections", "trace"):
        assert rows(tmp_path, name) == rows(finished, name), name
    runs = [folder / "runs" / "tiny" / "policy" for folder in (finished, tmp_path)]
    ours, theirs = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_whose_rounds_are_used_up_trains_on_fewer_groups_and_says_so(picky, tmp_path):
    overrides = ("selector={type: picky, num_more: 2}", *ROUNDS[1:], "training.max_steps=2")
    summary = run_tiny(
        tmp_path, *overrides, "replay={type: none}", "training.fresh_fraction=1", plugins=picky
    )
    for row in rows(tmp_path, "metrics")[1:]:
        assert row["review/num_rounds"] == 3
        assert row["review/num_asked"] == 4 + 2 + 2
        assert row["review/num_missing"] == 4
        assert (row["update/num_optimizer_steps"], row["update/num_forward_rows"]) == (0, 0)
    assert summary.warnings[0] == (
        "selector 'picky': a step trains on fewer groups than training.questions_per_step, because too few "
        "of those that were asked were accepted; metric review/num_missing counts them in every step; ask "
        "more questions, or in more rounds"
    )


def test_a_selector_that_wants_more_than_the_pool_holds_gets_what_there_is(picky, tmp_path):
    overrides = ("selector={type: picky, num_more: 1000}", *ROUNDS[1:], "training.max_steps=1")
    run_tiny(tmp_path, *overrides, "replay={type: none}", "training.fresh_fraction=1", plugins=picky)
    pool = json.loads((tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()[1])
    # 64 questions, 6 held out; the second step's 4 stay in the plan.
    assert pool["review/num_asked"] == 64 - 6 - 4
    assert pool["review/num_rounds"] == 2
