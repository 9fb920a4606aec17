"""The trained part of the attention estimator: its formula by hand, its training, its file, and its use."""

from __future__ import annotations

import json
import math
from dataclasses import astuple

import numpy as np
import pytest

from dteframe import Context, DataError, Observation, Question
from dteframe.estimators.adapter import (
    SOFTPLUS_IS_1,
    AdapterShape,
    build_adapter,
    head_outputs,
    load_adapter,
    predicted_logits,
    save_adapter,
    start_from_easiness,
)
from dteframe.estimators.adapter_training import (
    AdapterTraining,
    SolveCounts,
    fit_adapter,
    learning_rate_factor,
    weighted_cross_entropy,
)
from dteframe.estimators.attention import AttentionConfig, AttentionEstimator
from dteframe.estimators.easiness import fit_level_and_slope, sigmoid

torch = pytest.importorskip("torch")


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(tmp_path / "cache", tmp_path, "cpu", 0, lambda *_: None, lambda _: None)


def started(context: Context, embeddings: np.ndarray, **options) -> AttentionEstimator:
    questions = [
        Question(f"q{index}", f"text {index}", f"text {index}", "0") for index in range(len(embeddings))
    ]
    estimator = AttentionEstimator(AttentionConfig(**{"reference_size": 2, **options}), context)
    rows = embeddings.astype(np.float32)
    estimator.start(questions, lambda texts: rows[[int(text.split()[1]) for text in texts]])
    return estimator


def observation_of(positions, successes, trials, version=0, purpose="reference") -> Observation:
    ids = tuple(f"q{position}" for position in positions)
    return Observation(
        ids, np.array(successes), np.broadcast_to(trials, len(ids)).astype(int), version, purpose
    )


def hand_made_adapter(scale_logit: float, shift_logit: float, head_scale: str = "multiply"):
    """Identity layers of width 2, where LayerNorm leaves (1, -1) or (-1, 1), and a head of two constants."""
    shape = AdapterShape("policy", width=2, hidden_width=2, num_layers=1, head_scale=head_scale)
    adapter = build_adapter(shape)
    with torch.no_grad():
        for part in ("query", "reference"):
            adapter.modules[part][1].weight.copy_(torch.eye(2))
            adapter.modules[part][1].bias.zero_()
        adapter.modules["head"][2].weight.zero_()
        adapter.modules["head"][2].bias.copy_(torch.tensor([scale_logit, shift_logit]))
    adapter.modules.eval()
    return adapter


SOFTPLUS_IS_2 = math.log(math.e**2 - 1)
ONE_QUERY = torch.tensor([[5.0, 1.0]])
TWO_REFERENCES = torch.tensor([[9.0, 2.0], [3.0, 8.0]])


def logit_of(adapter, rates=(1.0, 0.0), masked=(False, False), prior=(0.0, (0.0, 0.0))) -> float:
    query, references = torch.tensor([prior[0]]), torch.tensor(prior[1])
    logits = predicted_logits(
        adapter, ONE_QUERY, TWO_REFERENCES, torch.tensor(rates), torch.tensor([masked]), (query, references)
    )
    return float(logits.detach())


def test_a_prediction_by_hand():
    # scores are +-2 / sqrt(2), so the base's odds are exp(2 sqrt(2)), and head (1, 0) leaves them alone
    assert logit_of(hand_made_adapter(SOFTPLUS_IS_1, 0.0)) == pytest.approx(2 * math.sqrt(2), rel=1e-3)
    shifted = logit_of(hand_made_adapter(SOFTPLUS_IS_1, 0.5))
    assert shifted == pytest.approx(2 * math.sqrt(2) + math.tanh(0.5), rel=1e-3)


def test_a_prior_that_is_the_same_for_all_leaves_a_prediction_as_it_is():
    adapter = hand_made_adapter(SOFTPLUS_IS_1, 0.0)
    assert logit_of(adapter, prior=(0.4, (0.4, 0.4))) == pytest.approx(logit_of(adapter), abs=1e-5)


def test_attended_deviations_from_the_prior_are_added_to_the_querys_own():
    # 0.3 for the query itself; the references did 0.2 better and 0.1 worse than theirs
    odds = math.exp(2 * math.sqrt(2))
    base = 0.3 + odds / (1 + odds) * 0.2 - 1 / (1 + odds) * 0.1
    found = logit_of(hand_made_adapter(SOFTPLUS_IS_1, 0.0), (0.9, 0.4), prior=(0.3, (0.7, 0.5)))
    assert found == pytest.approx(math.log(base / (1 - base)), rel=1e-4)


def test_the_head_multiplies_as_in_the_paper_or_divides_as_in_the_released_code():
    assert logit_of(hand_made_adapter(SOFTPLUS_IS_2, 0.0)) == pytest.approx(4 * math.sqrt(2), rel=1e-3)
    divided = hand_made_adapter(SOFTPLUS_IS_2, 0.0, "divide")
    assert logit_of(divided) == pytest.approx(math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize(("first", "scale"), [(-20.0, 100.0), (50.0, 0.1)])
def test_the_released_head_clamps_the_divisor(first, scale):
    scales, _ = head_outputs(hand_made_adapter(first, 0.0, "divide"), torch.tensor([[0.5, 0.3]]))
    assert float(scales.detach()) == pytest.approx(scale)


def test_a_query_that_is_also_a_reference_does_not_see_itself():
    adapter = hand_made_adapter(SOFTPLUS_IS_1, 0.0)
    assert logit_of(adapter, (1.0, 0.25), (True, False)) == pytest.approx(math.log(1 / 3), rel=1e-5)
    assert logit_of(adapter, (0.1, 0.25), (True, False)) == logit_of(adapter, (1.0, 0.25), (True, False))


def test_the_architecture_is_the_papers():
    adapter = build_adapter(AdapterShape("policy", width=1536))
    names = [type(layer).__name__ for layer in adapter.modules["query"]]
    assert names == "LayerNorm Linear GELU Dropout Linear GELU Dropout Linear LayerNorm".split()
    sizes = [tuple(weight.shape) for weight in adapter.modules["reference"].parameters() if weight.ndim == 2]
    assert sizes == [(896, 1536), (896, 896), (896, 896)]
    assert [tuple(weight.shape) for weight in adapter.modules["head"].parameters()] == [
        (10, 2), (10,), (2, 10), (2,)
    ]  # fmt: skip  # one line says it
    assert adapter.modules["query"] is not adapter.modules["reference"]


def test_the_loss_is_a_cross_entropy_with_soft_labels_weighted_by_trials():
    logits = torch.zeros(2, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.tensor([1.0, 0.25]), torch.tensor([8.0, 24.0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    # (p - y) times the share of the trials: -1/2 * 1/4 and 1/4 * 3/4
    np.testing.assert_allclose(logits.grad, [-0.125, 0.1875])


def test_the_loss_is_smallest_at_the_measured_rate():
    logits = torch.logit(torch.tensor([0.25])).requires_grad_()
    weighted_cross_entropy(logits, torch.tensor([0.25]), torch.tensor([8.0])).backward()
    assert abs(float(logits.grad)) < 1e-7


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero():
    factors = [learning_rate_factor(step, 40) for step in range(41)]
    np.testing.assert_allclose(factors[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[22] == 0.5
    assert factors[40] == 0.0
    assert learning_rate_factor(99, 100_000) < 1.0
    assert learning_rate_factor(100, 100_000) == 1.0


def learnable_counts(num_questions=300, width=6, trials=8):
    """Rates that depend on one direction of the embedding, for three models of different strength."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(num_questions, width)).astype(np.float32)
    strengths = np.array([-1.0, 0.0, 1.0])
    rates = 1 / (1 + np.exp(-(2 * embeddings[:, 0] + strengths[:, None])))
    models, items = np.indices(rates.shape).reshape(2, -1)
    counts = SolveCounts.from_table(
        [f"m{model}" for model in models],
        [f"q{item:03d}" for item in items],
        rng.binomial(trials, rates).reshape(-1).tolist(),
        [trials] * rates.size,
    )
    return embeddings, counts


SMALL = AdapterShape("policy", width=6, hidden_width=16)
SHORT = AdapterTraining(num_epochs=4, batch_size=64, reference_size=32)


def fit(training=SHORT, **changes):
    embeddings, counts = learnable_counts()
    data = {"embeddings": embeddings, "widths": [6], "counts": counts, "groups": np.arange(300)} | changes
    is_stopping = changes.get("is_stopping", np.arange(300) % 5 == 0)
    return fit_adapter(
        **(data | {"is_stopping": is_stopping}), shape=SMALL, training=training, progress=ignore
    )


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def fitted():
    return fit()


def test_easiness_is_the_direction_that_the_rates_depend_on(fitted):
    direction = fitted.adapter.easiness.direction / fitted.adapter.easiness.spread
    cosine = direction[0] / np.linalg.norm(direction)
    assert cosine > 0.98
    assert direction[0] == pytest.approx(2.0, rel=0.2)  # learnable_counts: logits rise by 2


def test_training_begins_at_what_easiness_alone_says(fitted):
    start = start_from_easiness(build_adapter(SMALL), fitted.adapter.easiness)
    query, references = torch.tensor([0.3]), torch.tensor([0.7, 0.2])
    logits = predicted_logits(
        start,
        torch.randn(1, 6),
        torch.randn(2, 6),
        torch.tensor([0.75, 0.15]),
        torch.zeros(1, 2, dtype=torch.bool),
        (query, references),
    )
    # flat attention adds the mean deviation, 0, and the head changes nothing
    assert float(torch.sigmoid(logits).detach()) == pytest.approx(0.3, abs=1e-6)


def test_the_epoch_that_predicts_the_stopping_questions_best_is_kept(fitted):
    assert fitted.best_epoch == int(np.argmin(fitted.stopping_losses))
    assert len(fitted.stopping_losses) == len(fitted.losses) + 1


def test_training_ends_when_patience_does():
    ended = fit(
        AdapterTraining(num_epochs=50, patience=1, batch_size=64, reference_size=32, learning_rate=0.3)
    )
    assert len(ended.losses) == ended.best_epoch + 1 < 50


def test_training_again_gives_the_same_adapter_and_leaves_torchs_own_chance_alone(fitted):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = fit()
    assert torch.equal(before, torch.get_rng_state())
    assert again.losses == fitted.losses
    for name, tensor in fitted.adapter.modules.state_dict().items():
        assert torch.equal(tensor, again.adapter.modules.state_dict()[name])
    np.testing.assert_array_equal(again.adapter.easiness.direction, fitted.adapter.easiness.direction)


def test_policies_may_have_been_asked_different_questions():
    embeddings, counts = learnable_counts()
    trials = np.where(np.arange(300) % 3 == np.arange(3)[:, None], 0, counts.trials)
    halved = SolveCounts(counts.policies, counts.question_ids, np.minimum(counts.successes, trials), trials)
    direction = fit(counts=halved).adapter.easiness.direction
    assert direction[0] / np.linalg.norm(direction) > 0.9


def test_repeated_rows_of_a_table_add_up():
    counts = SolveCounts.from_table(["a", "a", "a"], ["q1", "q0", "q1"], [1, 2, 3], [4, 4, 4])
    assert counts.question_ids == ("q0", "q1")
    assert counts.successes.tolist() == [[2, 4]]
    assert counts.rates.tolist() == [[0.5, 0.5]]


def test_impossible_counts_name_their_row():
    with pytest.raises(ValueError, match=r"^solve counts: row 1 \('a' on 'q1'\) has 5 successes in 4 trials"):
        SolveCounts.from_table(["a", "a"], ["q0", "q1"], [1, 5], [4, 4])


def test_too_few_questions_are_refused():
    with pytest.raises(ValueError) as error:
        fit(is_stopping=np.arange(300) < 9)
    assert str(error.value) == (
        "adapter training: 291 questions to train on and 9 to stop by; needs 10 of each at least"
    )


def test_parts_that_do_not_add_up_to_the_width_are_refused():
    with pytest.raises(ValueError) as error:
        fit(widths=[4, 3])
    assert str(error.value) == (
        "adapter training: embeddings have shape (300, 6) in parts of (4, 3), the counts have 300 questions "
        "and the adapter takes width 6; they must fit"
    )


def test_an_adapter_file_comes_back_bit_equal(fitted, tmp_path):
    save_adapter(fitted.adapter, tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    assert loaded.shape == SMALL
    for name, tensor in fitted.adapter.modules.state_dict().items():
        assert torch.equal(tensor, loaded.modules.state_dict()[name])
    for values, read in zip(astuple(fitted.adapter.easiness), astuple(loaded.easiness), strict=True):
        np.testing.assert_array_equal(np.float32(values), read)


def test_a_file_that_is_no_adapter_is_an_error_that_names_it(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match="x.safetensors: no such adapter file"):
        load_adapter(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="x.safetensors: not a safetensors file"):
        load_adapter(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="x.safetensors: the file's metadata has no 'dteframe_adapter'"):
        load_adapter(path)
    save_file({"a": torch.zeros(1)}, path, {"dteframe_adapter": json.dumps({"embedder_id": "p", "width": 2})})
    with pytest.raises(DataError, match="x.safetensors: weights and metadata of the adapter do not fit"):
        load_adapter(path)


def test_the_plugin_and_the_training_compute_the_same_prediction(context, fitted, tmp_path):
    embeddings, _ = learnable_counts()
    save_adapter(fitted.adapter, tmp_path / "adapter.safetensors")
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    estimator = started(
        context,
        embeddings,
        adapter=str(tmp_path / "adapter.safetensors"),
        recalibrate="none",
        prior_rollouts=1e9,
    )
    positions, rng = np.arange(0, 300, 3), np.random.default_rng(0)
    successes = rng.integers(0, 9, len(positions))
    estimator.observe(observation_of(positions, successes, 8))
    estimate = estimator.predict(0)
    vectors = torch.from_numpy(adapter.easiness.scaled(embeddings))
    easiness, trials = adapter.easiness.of(embeddings), np.full(len(positions), 8)
    for question in (1, 3):  # no reference, and the reference of position 1
        is_masked = positions == question
        level, slope = fit_level_and_slope(easiness[positions], successes / 8, np.where(is_masked, 0, trials))
        prior = [
            torch.from_numpy(sigmoid(level + slope * easiness[rows])).float()
            for rows in ([question], positions)
        ]
        logits = predicted_logits(
            adapter,
            vectors[[question]],
            vectors[positions],
            torch.from_numpy(successes / 8).float(),
            torch.from_numpy(is_masked)[None],
            tuple(prior),
        )
        assert estimate.mean[question] == pytest.approx(float(torch.sigmoid(logits).detach()), abs=1e-5)
    assert estimate.figures["score_temperature"] == 1.0
    assert "recalibration_slope" not in estimate.figures


def test_an_adapter_for_other_embeddings_is_refused(context, fitted, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(fitted.adapter, path)
    with pytest.raises(ValueError) as error:
        started(context, np.eye(2), adapter=str(path))
    assert str(error.value) == (
        f"{path}: the adapter was trained on embeddings 'policy' of width 6, the recipe's are 'policy' "
        "of width 2; change estimator.embeddings or estimator.adapter"
    )
