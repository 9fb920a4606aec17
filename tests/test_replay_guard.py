"""The guard of replay: what it lets through, when it shrinks and comes back, and that a run obeys it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_run import rows, run_tiny

from dteframe.engine.replay_guard import ReplayGuard
from dteframe.engine.update_work import WeightSums
from dteframe.replay.fifo import FifoConfig

FINE = {"replayed_effective_sample_fraction": 0.9, "replayed_kl_behaviour_nats": 0.01}
SPENT = FINE | {"replayed_effective_sample_fraction": 0.2}
FAR = FINE | {"replayed_kl_behaviour_nats": 0.3}


def test_replay_is_ramped_up_over_the_first_steps():
    config = FifoConfig(ramp_up_steps=4)
    allowed = [ReplayGuard().allowed(6, step, config) for step in (1, 2, 3, 4, 5)]
    assert allowed == [1, 3, 4, 6, 6]  # 6 x 1/4 = 1.5, 3, 4.5, 6
    assert ReplayGuard().allowed(6, 1, FifoConfig()) == 6


def test_the_share_is_halved_by_every_step_out_of_bounds_and_doubled_by_four_within():
    guard, config, shares = ReplayGuard(), FifoConfig(), []
    for step, figures in enumerate([FINE, SPENT, FAR, *[FINE] * 8], 1):
        guard.note(step, figures, config)
        shares.append(guard.share)
    assert shares == [1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1]
    assert guard.allowed(6, 12, config) == 6


def test_a_step_without_replay_counts_as_calm_so_that_replay_comes_back():
    guard, config = ReplayGuard(share=1 / 8), FifoConfig()
    assert guard.allowed(6, 9, config) == 0
    for step in range(9, 13):
        guard.note(step, {}, config)
    assert guard.allowed(6, 13, config) == 1  # 6 x 1/4


def test_the_share_never_falls_so_far_that_it_would_not_come_back():
    guard = ReplayGuard()
    for step in range(100):
        guard.note(step, SPENT, FifoConfig())
    assert guard.share == 1 / 64


def test_figures_that_are_not_finite_are_out_of_bounds():
    guard = ReplayGuard()
    assert guard.note(1, FINE | {"replayed_effective_sample_fraction": float("nan")}, FifoConfig())


def test_bounds_can_be_switched_off():
    config = FifoConfig(min_effective_sample_fraction=0, max_kl_nats=None)
    assert ReplayGuard().note(1, SPENT | FAR, config) is None


def test_a_warning_says_what_is_wrong_once_until_all_is_well_again():
    guard, config = ReplayGuard(), FifoConfig()
    assert guard.note(7, SPENT, config) == (
        "replay: at step 7 replayed tokens are worth 0.2 of their number, less than "
        "replay.min_effective_sample_fraction 0.3; the replayed share is halved, again with every such step, "
        "and doubled after 4 steps within bounds (metric replay/guard_share); lower replay.max_staleness, "
        "replay.capacity or training.learning_rate"
    )
    assert guard.note(8, FAR, config) is None
    for step in range(9, 17):
        guard.note(step, FINE, config)
    told = guard.note(17, FAR, config)
    assert told is not None and told.startswith(
        "replay: at step 17 the policy is 0.3 nats a token from those that sampled replayed groups, more "
        "than replay.max_kl_nats 0.1; "
    )


def test_the_guard_comes_back_from_a_checkpoint():
    guard = ReplayGuard()
    for step, figures in enumerate([SPENT, FINE, FINE], 1):
        guard.note(step, figures, FifoConfig())
    assert ReplayGuard.from_state(guard.state_dict()) == ReplayGuard(share=0.5, num_calm_steps=2)


def test_the_figures_of_weights_are_worked_out_by_hand():
    torch = pytest.importorskip("torch")
    sums = WeightSums()
    sums.note(torch.tensor([2.0, 1.0]).log())
    sums.note(torch.tensor([0.5]).log())
    # 3.5^2 / (3 x (4 + 1 + 1/4)); and the mean of w - 1 - log w: (3.5 - log 1) / 3 - 1.
    assert sums.figures("replayed") == pytest.approx(
        {
            "replayed_importance_weight_mean": 3.5 / 3,
            "replayed_importance_weight_max": 2.0,
            "replayed_effective_sample_fraction": 12.25 / 15.75,
            "replayed_kl_behaviour_nats": 0.5 / 3,
        }
    )


def test_a_run_out_of_bounds_asks_fresh_groups_in_place_of_replayed_ones_and_resumes_so(tmp_path):
    settings = ("replay.max_kl_nats=1e-9", "training.evaluate_every=0")
    (tmp_path / "whole").mkdir()
    summary = run_tiny(tmp_path / "whole", *settings)
    metrics = rows(tmp_path / "whole", "metrics")[1:]
    # Two groups are replayed once the buffer can; then one; then none, until four calm steps.
    assert [row["replay/guard_share"] for row in metrics][2:] == [1, 0.5, 0.25, 0.25]
    assert [row["replay/num_groups"] for row in metrics] == [0, 0, 2, 1, 0, 0]
    assert [row["answer/num_groups"] + row["replay/num_groups"] for row in metrics] == [4] * 6
    assert len([message for message in summary.warnings if message.startswith("replay: at step 3 ")]) == 1
    (tmp_path / "stopped").mkdir()
    killer = tmp_path / "killer.py"
    killer.write_text(
        "from dteframe import hookimpl\n\n\n@hookimpl\ndef dteframe_groups_scored(groups):\n"
        "    if groups.step == 5:\n        raise KeyboardInterrupt\n"
    )
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "stopped", *settings, plugins=killer)
    run_tiny(tmp_path / "stopped", *settings, resume=True)
    assert rows(tmp_path / "stopped", "metrics") == rows(tmp_path / "whole", "metrics")


def test_the_ramp_holds_in_a_run(tmp_path):
    run_tiny(tmp_path, "replay.ramp_up_steps=8", "training.evaluate_every=0")
    # Plans begin at steps 1, 3 and 5 and allow 2 x 1/8, 2 x 3/8 and 2 x 5/8 groups.
    assert [row["replay/num_groups"] for row in rows(tmp_path, "metrics")[1:]] == [0, 0, 0, 0, 1, 1]
    assert np.isfinite(rows(tmp_path, "metrics")[-1]["update/loss"])


HALF_TRAINED = (
    "training.max_steps=50",
    "training.questions_per_step=16",
    "training.num_generations=8",
    "training.learning_rate=3e-4",
    "training.selection_interval=1",
    "training.fresh_fraction=0.125",
    "training.evaluate_every=50",
    "training.evaluation_size=128",
    "training.num_generations_eval=4",
    "training.checkpoint_every=0",
    "estimator={type: none}",
    "selector={type: uniform}",
    "rollout.temperature=1.2",
    "rollout.max_completion_length=32",
    'reward={type: exact_match, answer_pattern: ":([0-9]+)"}',
    "dataset={type: list_operations, size: 1000, chain_lengths: [1, 2, 3]}",
    "model={type: from_scratch, hidden_size: 64, num_layers: 2, num_heads: 4, "
    "warm_up: {steps: 250, learning_rate: 3e-3, weight_decay: 0.0}}",
    "objective={type: grpo, num_minibatches: 2, num_iterations: 4, replay_clip: one}",
)
"""A policy of 0.1M parameters, 14 of 16 groups of a step replayed; settings found on seeds 100 to 102."""


@pytest.mark.slow
def test_clipping_stale_rollouts_around_one_ruins_a_small_policy_and_the_guard_keeps_it(tmp_path):
    unguarded = "replay={type: fifo, capacity: 128, min_effective_sample_fraction: 0, max_kl_nats: null}"
    before, after = {}, {}
    for name, replay in (("unguarded", unguarded), ("guarded", "replay={type: fifo, capacity: 128}")):
        (tmp_path / name).mkdir()
        summary = run_tiny(tmp_path / name, *HALF_TRAINED, replay)
        before[name], after[name] = summary.success_rate_before, summary.success_rate_after
        assert ("replay: at step" in " ".join(summary.warnings)) == (name == "guarded")
    assert before["unguarded"] == before["guarded"]
    # Three other seeds ended at .3 to .4 of where they began, and at .9 to 1.5 (docs/experiments.md).
    assert after["unguarded"] < 0.6 * before["unguarded"]
    assert after["guarded"] > 0.8 * before["guarded"]
