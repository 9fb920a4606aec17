from dteframe.engine.streams import Streams


def test_the_same_seed_step_and_stage_give_the_same_draws():
    assert Streams(7)(3, "answers").integers(1 << 60) == Streams(7)(3, "answers").integers(1 << 60)


def test_seeds_steps_and_stages_give_different_draws():
    draws = {
        int(Streams(seed)(step, stage).integers(1 << 60))
        for seed in (0, 1)
        for step in (1, 2)
        for stage in ("answers", "select", "replay")
    }
    assert len(draws) == 12


def test_draws_in_one_stage_do_not_shift_another():
    streams = Streams(0)
    streams(1, "references").random(1000)
    assert streams(1, "select").random() == Streams(0)(1, "select").random()
