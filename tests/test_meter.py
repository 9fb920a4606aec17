import time

import numpy as np

from dteframe.engine.meter import Meter
from dteframe.records import Completion, Group


def group_of(purpose, lengths):
    completions = tuple(Completion(np.arange(n), np.zeros(n, np.float32), "stop", "") for n in lengths)
    return Group("q", np.arange(3), completions, np.zeros(len(lengths)), 0, 0, purpose)


def test_tokens_and_rollouts_are_charged_to_their_purpose():
    meter = Meter()
    meter.charge([group_of("train", [2, 3]), group_of("reference", [4])])
    meter.charge([group_of("evaluation", [5])])
    costs = meter.costs()
    assert (costs.train_tokens, costs.reference_tokens, costs.evaluation_tokens) == (5, 4, 5)
    assert (costs.train_rollouts, costs.reference_rollouts, costs.evaluation_rollouts) == (2, 1, 1)


def test_the_stages_and_the_rest_add_up_to_the_step():
    meter = Meter()
    with meter.stage("generate"):
        time.sleep(0.01)
    time.sleep(0.01)
    report = meter.close_step()
    assert abs(sum(report.figures.values()) - report.step_seconds) < 1e-9
    assert report.figures["other_seconds"] >= 0.009


def test_evaluation_checkpoints_and_loading_are_not_training_time():
    meter = Meter()
    for stage in ("load", "evaluate", "checkpoint", "update"):
        with meter.stage(stage):
            time.sleep(0.005)
    meter.close_step()
    costs = meter.costs()
    assert costs.total_seconds >= 0.02
    assert costs.training_seconds < costs.total_seconds - 0.0149


def test_cpu_time_counts_work_but_neither_waiting_nor_evaluation():
    meter = Meter()
    for stage in ("update", "evaluate"):
        with meter.stage(stage):
            began = time.process_time()
            while time.process_time() - began < 0.05:
                pass
    with meter.stage("generate"):
        time.sleep(0.05)
    meter.close_step()
    assert 0.045 <= meter.costs().training_cpu_seconds < 0.09


def test_counts_survive_a_checkpoint():
    meter, resumed = Meter(), Meter()
    meter.charge([group_of("train", [2, 3])])
    with meter.stage("update"):
        pass
    meter.close_step()
    resumed.load_state_dict(meter.state_dict())
    assert resumed.costs() == meter.costs()
