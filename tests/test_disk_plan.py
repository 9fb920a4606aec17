"""What `dteframe plan` says of the disk, by hand and beside a real run folder."""

import pytest
from tiny_run import TINY, run_tiny

from dteframe.disk_plan import DiskPlan, disk_plan, disk_text
from dteframe.recipe import load_recipe
from dteframe.records import ModelSizes
from dteframe.registry import load_registry


@pytest.fixture
def planned(tmp_path):
    def plan(*overrides, sizes=None):
        (tmp_path / "tiny.yaml").write_text(TINY)
        recipe = load_recipe(tmp_path / "tiny.yaml", overrides, load_registry([])).recipe
        return disk_plan(recipe, sizes or recipe.model.sizes())

    return plan


SIZES = ModelSizes(1_000_000, 2, 4, 64, 128, 4, 2, 16, 1000, True)
"""A million parameters in bfloat16, and a vocabulary of a thousand."""
NO_REPLAY = ("replay={type: none}", "training.fresh_fraction=null")


def test_a_checkpoint_holds_weights_masters_and_two_moments(planned):
    plan = planned(*NO_REPLAY, sizes=SIZES)
    weights, tokenizer, masters, moments = 2_000_000, 75_000, 4_000_000, 8_000_000
    assert plan.checkpoint_bytes == 20_000 + weights + tokenizer + masters + moments
    assert plan.parts["policy"] == weights + tokenizer
    pure = planned(*NO_REPLAY, "model.dtype=bfloat16", "training.float32_master_weights=false", sizes=SIZES)
    assert pure.checkpoint_bytes == 20_000 + weights + tokenizer + 4_000_000


def test_replayed_groups_are_on_every_checkpoint(planned):
    # 8 groups of 4 completions of 16 tokens, 12 bytes and 4 bytes of text each.
    assert planned(sizes=SIZES).checkpoint_bytes == 14_095_000 + 8 * (900 + 4 * 16 * (12 + 4))


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["training.save_total_limit=1"], 2),
        (["training.save_total_limit=1", "training.evaluate_every=0"], 1),
        (["training.save_total_limit=null"], 3),
        (["training.checkpoint_every=0"], 1),
        ([], 3),
    ],
)
def test_the_last_checkpoints_and_the_best_are_kept(planned, overrides, kept):
    assert planned(*overrides).num_checkpoints == kept


def test_rollouts_that_are_not_written_take_nothing(planned):
    written, every_third, none = (
        planned(f"tracker=[{{type: jsonl{options}}}]").parts["records"]
        for options in ("", ", rollouts_every: 3", ", rollouts: none")
    )
    assert written - none == pytest.approx(3 * (every_third - none), abs=3)


def test_what_is_foretold_is_what_a_run_writes(planned, tmp_path):
    overrides = ("training.max_prompt_length=16", "tracker=[{type: jsonl}, {type: tensorboard}]")
    run_tiny(tmp_path, *overrides)
    written = sum(path.stat().st_size for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert planned(*overrides).total_bytes == pytest.approx(written, rel=0.2)


def test_the_plan_in_words():
    plan = DiskPlan(2**30, 3, {"checkpoints": 3 * 2**30, "policy": 2**28, "records": 2**20}, 3490 * 2**20)
    assert disk_text(plan).splitlines() == [
        "disk: about 3.41 GiB at the end",
        "  checkpoints           3 of 1.00 GiB, and another while it is written",
        "  policy                256.0 MiB",
        "  records               1.0 MiB",
    ]
    assert disk_text(None) == "disk: unknown, as memory is"
