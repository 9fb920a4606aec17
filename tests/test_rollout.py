import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dteframe import Context, Policy, Prompt, Sampling
from dteframe.models.architectures import Sizes, untrained_module
from dteframe.rollouts.decode import sample_tokens, truncated
from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig, end_token_ids
from dteframe.testing.subject import in_order
from dteframe.testing.tiny import tiny_policy

RAGGED = ("7=", "12+34=", "a", "what is 1+1? ", "12345678")


def decided(policy: Policy) -> Policy:
    """Make the weights large enough that the next token depends on the ones before it, and on their order."""
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return policy


def letters_policy() -> Policy:
    """A policy that knows four letters, <pad> and <eos>: so few outcomes that all can be counted."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "a", "b", "c", "d"])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    sizes = Sizes(16, 32, 2, 2, 1, 64)
    return decided(Policy(untrained_module("llama", sizes, tokenizer, seed=1), tokenizer, "cpu"))


def rollout_of(policy, folder, max_batch_rows=256, progress=lambda what, done, total: None, warn=pytest.fail):
    context = Context(folder, folder, "cpu", 0, progress, warn)
    rollout = TransformersRollout(TransformersRolloutConfig(max_batch_rows=max_batch_rows), context)
    rollout.start(policy)
    return rollout


def prompts_of(policy, texts=RAGGED):
    return [Prompt(text, np.array(policy.tokenizer(text)["input_ids"])) for text in texts]


def rng(seed=0):
    return np.random.default_rng(seed)


def plain_scores(policy, prompts, answers):
    """Logits of every answer's tokens from one forward pass over prompts and answers, padded on the right."""
    texts = [torch.tensor(np.concatenate(pair)) for pair in zip(prompts, answers, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    with torch.no_grad():
        logits = policy.module(input_ids=padded, attention_mask=mask).logits
    rows = zip(logits, prompts, answers, strict=True)
    return [row[len(prompt) - 1 : len(prompt) + len(answer) - 1] for row, prompt, answer in rows]


def answers(rollout, prompts, num_generations, sampling, seed=0):
    seeds = [int(one) for one in rng(seed).integers(2**63, size=len(prompts))]
    return in_order(rollout.generate(prompts, num_generations, sampling, seeds))


def flat(groups):
    return [completion for group in groups for completion in group]


def outcomes(groups):
    return [(c.token_ids.tolist(), c.finish_reason, c.text) for c in flat(groups)]


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(num_outcomes):
    """What a chi-square exceeds with probability 1e-6 (Wilson and Hilferty's approximation)."""
    freedom = num_outcomes - 1
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("architecture", "num_key_value_heads"), [("qwen2", 4), ("llama", 2)])
def test_logprobs_equal_a_plain_forward_pass_for_ragged_lengths(
    tmp_path, architecture, num_key_value_heads, temperature
):
    policy = decided(
        tiny_policy(architecture=architecture, num_heads=4, num_key_value_heads=num_key_value_heads)
    )
    policy.module.generation_config.eos_token_id = list(range(1, 15))  # So that lengths differ.
    prompts = prompts_of(policy)
    sampling = Sampling(temperature=temperature, max_completion_length=20)
    groups = answers(rollout_of(policy, tmp_path), prompts, 6, sampling)
    completions = flat(groups)
    assert len({len(completion.token_ids) for completion in completions}) > 8
    repeated = [prompt.token_ids for prompt in prompts for _ in range(6)]
    scores = plain_scores(policy, repeated, [completion.token_ids for completion in completions])
    for completion, score in zip(completions, scores, strict=True):
        expected = (score / temperature).log_softmax(-1).numpy()
        chosen = expected[np.arange(len(completion.token_ids)), completion.token_ids]
        np.testing.assert_allclose(completion.behaviour_logprobs, chosen, atol=1e-5, rtol=0)


def test_first_tokens_follow_the_models_distribution(tmp_path):
    policy = letters_policy()
    prompts = prompts_of(policy, ["a", "b", "c"])
    groups = answers(rollout_of(policy, tmp_path), prompts, 3000, Sampling(max_completion_length=1))
    expected = [plain_scores(policy, [p.token_ids], [np.array([0])])[0][0].softmax(-1) for p in prompts]
    for group, probabilities in zip(groups, expected, strict=True):
        counts = np.bincount([c.token_ids[0] for c in group], minlength=6)
        assert chi_square(counts, probabilities.numpy()) < chi_square_limit(6)


def test_pairs_of_tokens_follow_the_models_distribution_whatever_the_padding(tmp_path):
    policy = letters_policy()
    texts = [np.array(ids) for ids in ([2], [3, 5, 4, 2], [2, 3])]
    prompts = [Prompt(str(index), ids) for index, ids in enumerate(texts)]
    pairs = [(first, second) for first in range(6) if first != 1 for second in range(6)]
    sampling = Sampling(max_completion_length=2)
    groups = answers(rollout_of(policy, tmp_path), prompts, 6000, sampling, seed=3)
    tables, counts = [], []
    for text, group in zip(texts, groups, strict=True):
        rows = plain_scores(policy, [text] * 30, [np.array(pair) for pair in pairs])
        chances = [row.log_softmax(-1) for row in rows]
        joint = [float((c[0, a] + c[1, b]).exp()) for c, (a, b) in zip(chances, pairs, strict=True)]
        tables.append(np.array([float(chances[0][0, 1].exp()), *joint]))
        drawn = [tuple(completion.token_ids.tolist()) for completion in group]
        counts.append(np.array([drawn.count(outcome) for outcome in [(1,), *pairs]]))
        assert counts[-1].sum() == 6000
    for index, count in enumerate(counts):
        statistics = [chi_square(count, table) for table in tables]
        assert statistics[index] < chi_square_limit(31)
        # The test has power: the tables of the other prompts do not fit.
        assert all(value > 2 * chi_square_limit(31) for at, value in enumerate(statistics) if at != index)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(min_p=0.2), Sampling(0.8, 0.9, 20, 0.05)],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_truncated_samples_stay_inside_and_their_logprobs_are_renormalised(tmp_path, sampling):
    policy = decided(tiny_policy())
    prompts = prompts_of(policy)
    shorter = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, 6)
    completions = flat(answers(rollout_of(policy, tmp_path), prompts, 20, shorter))
    repeated = [prompt.token_ids for prompt in prompts for _ in range(20)]
    scores = plain_scores(policy, repeated, [completion.token_ids for completion in completions])
    for completion, score in zip(completions, scores, strict=True):
        expected = warped(score / sampling.temperature, sampling).log_softmax(-1).numpy()
        chosen = expected[np.arange(len(completion.token_ids)), completion.token_ids]
        np.testing.assert_allclose(completion.behaviour_logprobs, chosen, atol=1e-5, rtol=0)


def warped(scores, sampling):
    """What transformers makes of the scores."""
    warpers = [
        TopKLogitsWarper(sampling.top_k or 10**6),
        TopPLogitsWarper(sampling.top_p),
        MinPLogitsWarper(sampling.min_p),
    ]
    for warper in warpers:
        scores = warper(None, scores)
    return scores


@pytest.mark.parametrize("seed", range(20))
def test_truncation_keeps_the_tokens_that_transformers_keeps(seed):
    generator = rng(seed)
    scores = torch.tensor(generator.normal(0, 3, (50, 40)), dtype=torch.float32)
    sampling = Sampling(
        top_p=generator.uniform(0.05, 1),
        top_k=int(generator.integers(0, 41)),
        min_p=generator.uniform(0, 0.5),
    )
    ours = truncated(scores - scores.amax(-1, keepdim=True), sampling)
    assert torch.equal(ours.isfinite(), warped(scores, sampling).isfinite())


def test_the_smallest_top_p_leaves_the_likeliest_token():
    scores = torch.tensor([[0.0, -0.1, -0.2]])
    assert truncated(scores, Sampling(top_p=1e-9)).tolist() == [[0.0, -math.inf, -math.inf]]


def test_a_uniform_number_chooses_by_the_cumulative_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, Sampling())
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(logprobs.exp(), [0.5, 0.5, 0.25, 0.25, 0.25, 0.25], rtol=1e-6)


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(4, 1)
    uniforms = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, Sampling())[0].tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("vocabulary_size", [4097, 5000, 20_000])
def test_a_large_vocabulary_is_sampled_as_a_small_one(vocabulary_size, monkeypatch):
    generator = rng(1)
    logits = torch.tensor(generator.normal(0, 4, (40, vocabulary_size)), dtype=torch.float32)
    logits[:, ::3] = -math.inf
    uniforms = torch.tensor(generator.random(40))
    uniforms[0], uniforms[1] = 0, 1 - 2**-53
    in_chunks = sample_tokens(logits, uniforms, Sampling(0.9))
    monkeypatch.setattr("dteframe.rollouts.decode.CHUNKED_FROM_TOKENS", 10**6)
    at_once = sample_tokens(logits, uniforms, Sampling(0.9))
    assert in_chunks[0].tolist() == at_once[0].tolist()
    assert (in_chunks[0] % 3 != 0).all()
    np.testing.assert_allclose(in_chunks[1], at_once[1], atol=1e-6, rtol=0)


def test_chunks_of_probability_zero_are_never_chosen():
    logits = torch.full((4, 8192), -math.inf)
    logits[:, 700], logits[:, 6000] = 0, 0
    uniforms = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, Sampling())[0].tolist() == [700, 700, 6000, 6000]


def test_sampling_leaves_the_logits_alone():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    sample_tokens(logits, torch.tensor([0.5], dtype=torch.float64), Sampling(0.5, top_k=2))
    assert logits.tolist() == [[1, 2, 4]]


def test_a_flat_tail_of_many_tokens_keeps_its_share():
    num_tail = 200_000  # Each has probability 5e-8, less than what float32 can add to 0.99.
    logits = torch.full((1, num_tail + 1), math.log(0.01 / num_tail))
    logits[0, 0] = math.log(0.99)
    middle = sample_tokens(logits, torch.tensor([0.995], dtype=torch.float64), Sampling())[0].item()
    assert abs(middle - num_tail / 2) < 100


def test_logprobs_of_a_bfloat16_model_are_float32(tmp_path):
    policy = decided(tiny_policy())
    policy.module.to(torch.bfloat16)
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    logprobs = sample_tokens(logits, torch.tensor([0.0], dtype=torch.float64), Sampling())[1]
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1)[:, 0], atol=1e-6, rtol=0)
    sampling = Sampling(max_completion_length=4)
    groups = answers(rollout_of(policy, tmp_path), prompts_of(policy), 2, sampling)
    assert {completion.behaviour_logprobs.dtype for completion in flat(groups)} == {np.dtype("float32")}


def test_stopped_completions_end_in_their_only_end_token_and_cut_ones_have_none(tmp_path):
    policy = tiny_policy()
    ends = {1, 50, 60, 70, 80}
    policy.module.generation_config.eos_token_id = [50, 60, 70, 80]
    sampling = Sampling(max_completion_length=12)
    completions = flat(answers(rollout_of(policy, tmp_path), prompts_of(policy), 20, sampling))
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert stopped and cut
    assert {completion.token_ids[-1] for completion in stopped} == ends
    assert not any(ends & set(completion.token_ids[:-1].tolist()) for completion in stopped)
    assert not any(ends & set(completion.token_ids.tolist()) for completion in cut)
    assert {len(completion.token_ids) for completion in cut} == {12}


def test_the_text_is_decoded_without_special_tokens(tmp_path):
    policy = tiny_policy()
    policy.module.generation_config.eos_token_id = [policy.tokenizer.convert_tokens_to_ids("e")]
    sampling = Sampling(max_completion_length=30)
    completions = flat(answers(rollout_of(policy, tmp_path), prompts_of(policy), 40, sampling))
    specials = set(policy.tokenizer.all_special_ids)
    assert any(specials & set(completion.token_ids.tolist()) for completion in completions)
    for completion in completions:
        plain = [token for token in completion.token_ids.tolist() if token not in specials]
        assert completion.text == policy.tokenizer.decode(plain)


def test_equal_seeds_give_equal_completions_and_other_seeds_do_not(tmp_path):
    policy = decided(tiny_policy())
    rollout = rollout_of(policy, tmp_path)
    sampling = Sampling(max_completion_length=10)
    first, second, other = (
        answers(rollout, prompts_of(policy), 4, sampling, seed=seed) for seed in (5, 5, 6)
    )
    assert outcomes(first) == outcomes(second)
    for one, two in zip(flat(first), flat(second), strict=True):
        assert np.array_equal(one.behaviour_logprobs, two.behaviour_logprobs)
    assert outcomes(first) != outcomes(other)


def test_torchs_own_generator_neither_matters_nor_moves(tmp_path):
    policy = decided(tiny_policy())
    rollout = rollout_of(policy, tmp_path)
    torch.manual_seed(1)
    first = answers(rollout, prompts_of(policy), 2, Sampling(max_completion_length=5))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = answers(rollout, prompts_of(policy), 2, Sampling(max_completion_length=5))
    assert outcomes(first) == outcomes(second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("max_batch_rows", [1, 3, 8, 20])
def test_rows_that_leave_or_wait_change_nothing_for_the_others(tmp_path, max_batch_rows):
    policy = decided(tiny_policy())
    policy.module.generation_config.eos_token_id = list(range(1, 20))
    sampling = Sampling(max_completion_length=16)
    together = answers(rollout_of(policy, tmp_path), prompts_of(policy), 5, sampling)
    apart = answers(rollout_of(policy, tmp_path, max_batch_rows), prompts_of(policy), 5, sampling)
    assert outcomes(together) == outcomes(apart)
    for one, two in zip(flat(together), flat(apart), strict=True):
        np.testing.assert_allclose(one.behaviour_logprobs, two.behaviour_logprobs, atol=1e-5, rtol=0)


def watched(policy):
    """Note the shape of what the module itself reads; the hook makes it sample, and not the fused decoder."""
    shapes = []
    policy.module.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_ended_rows_are_no_longer_run(tmp_path):
    policy = decided(tiny_policy())
    policy.module.generation_config.eos_token_id = list(range(1, 60))
    shapes, warnings = watched(policy), []
    sampling = Sampling(max_completion_length=30)
    rollout = rollout_of(policy, tmp_path, warn=warnings.append)
    answers(rollout, prompts_of(policy, ["1+2="]), 64, sampling)
    assert shapes[0] == (1, 4)  # The prompt is read once for its 64 completions.
    assert shapes[1][0] < 64
    assert shapes[-1][0] < 16


def test_a_module_that_is_more_than_its_class_says_samples_itself_and_that_is_said_once(tmp_path):
    policy = decided(tiny_policy())
    sampling = Sampling(max_completion_length=8)
    fused = answers(rollout_of(policy, tmp_path), prompts_of(policy), 3, sampling)
    shapes, warnings = watched(policy), []
    rollout = rollout_of(policy, tmp_path, warn=warnings.append)
    assert outcomes(answers(rollout, prompts_of(policy), 3, sampling)) == outcomes(fused)
    answers(rollout, prompts_of(policy), 3, sampling)
    assert len(shapes) == 16
    assert warnings == [
        "rollout 'transformers': the fused decoder cannot stand for the model, because model has hooks; the "
        "module itself samples, which is right but slower"
    ]


def test_completions_come_in_the_order_of_the_prompts(tmp_path):
    policy = decided(tiny_policy())
    texts = ("long prompts come first here", "a", "then the middle", "b")
    groups = answers(
        rollout_of(policy, tmp_path, max_batch_rows=4),
        prompts_of(policy, texts),
        2,
        Sampling(max_completion_length=5),
    )
    for prompt, group in zip(prompts_of(policy, texts), groups, strict=True):
        tokens = [completion.token_ids for completion in group]
        for completion, score in zip(
            group, plain_scores(policy, [prompt.token_ids] * 2, tokens), strict=True
        ):
            expected = score.log_softmax(-1).numpy()[np.arange(len(score)), completion.token_ids]
            np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=1e-5, rtol=0)


def test_it_is_told_how_many_completions_have_ended_when_others_take_their_seats(tmp_path):
    told = []
    rollout = rollout_of(tiny_policy(), tmp_path, 4, lambda *news: told.append(news))
    prompts = prompts_of(tiny_policy())
    answers(rollout, prompts, 2, Sampling(max_completion_length=2))
    assert told == [("generating", 4, 10), ("generating", 8, 10)]


def test_batches_of_the_module_itself_are_told_as_progress(tmp_path):
    told, policy = [], tiny_policy()
    watched(policy)
    rollout = rollout_of(policy, tmp_path, 4, lambda *news: told.append(news), lambda message: None)
    answers(rollout, prompts_of(policy), 2, Sampling(max_completion_length=2))
    assert told == [("generating", 4, 10), ("generating", 8, 10), ("generating", 10, 10)]


@pytest.mark.parametrize("is_training", [True, False])
def test_the_module_comes_back_in_the_mode_it_was_in(tmp_path, is_training):
    policy = tiny_policy()
    policy.module.train(is_training)
    answers(rollout_of(policy, tmp_path), prompts_of(policy), 1, Sampling(max_completion_length=2))
    assert policy.module.training is is_training
    assert torch.is_grad_enabled()


def test_no_prompts_give_no_completions(tmp_path):
    assert answers(rollout_of(tiny_policy(), tmp_path), [], 4, Sampling()) == []


def test_an_empty_prompt_is_refused(tmp_path):
    prompts = [Prompt("q-9", np.array([], dtype=np.int64))]
    with pytest.raises(ValueError) as refusal:
        answers(rollout_of(tiny_policy(), tmp_path), prompts, 1, Sampling())
    assert str(refusal.value) == (
        "rollout 'transformers': the prompt of question 'q-9' has no tokens; it must have one at least"
    )


def test_more_tokens_than_the_model_reads_are_refused(tmp_path):
    policy = tiny_policy()
    with pytest.raises(ValueError) as refusal:
        answers(
            rollout_of(policy, tmp_path), prompts_of(policy, ["1+1="]), 1, Sampling(max_completion_length=509)
        )
    assert str(refusal.value) == (
        "rollout 'transformers': the prompt of question '1+1=' has 4 tokens and completions have up to 509, "
        "but the model reads 512; lower training.max_prompt_length or rollout.max_completion_length"
    )


def test_a_policy_that_has_diverged_is_named_by_the_first_question_it_fails_on(tmp_path):
    policy = tiny_policy()
    with torch.no_grad():
        policy.module.model.embed_tokens.weight[policy.tokenizer.convert_tokens_to_ids("x")] = math.nan
        policy.module.lm_head.weight = torch.nn.Parameter(policy.module.lm_head.weight.nan_to_num())
    prompts = prompts_of(policy, ["1+1=", "x="])
    with pytest.raises(ValueError) as refusal:
        answers(rollout_of(policy, tmp_path), prompts, 3, Sampling(max_completion_length=4))
    assert str(refusal.value) == (
        "rollout 'transformers': the policy's logits for question 'x=' are not finite; its weights have "
        "diverged: lower training.learning_rate, or resume from an earlier checkpoint"
    )


def test_end_tokens_are_the_tokenizers_and_all_of_the_generation_configurations():
    policy = tiny_policy()
    policy.module.generation_config.eos_token_id = [7, 5]
    assert end_token_ids(policy.module, policy.tokenizer) == [1, 5, 7]
    policy.module.generation_config.eos_token_id = 9
    assert end_token_ids(policy.module, policy.tokenizer) == [1, 9]


def test_a_policy_without_any_end_token_is_refused():
    policy = tiny_policy()
    policy.module.generation_config.eos_token_id = None
    policy.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the generation configuration has an end"):
        end_token_ids(policy.module, policy.tokenizer)
