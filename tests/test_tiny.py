import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dteframe.testing.tiny import tiny_policy, tiny_questions


def test_a_tiny_policy_is_on_the_cpu_in_float32_and_in_evaluation_mode():
    policy = tiny_policy()
    assert policy.device == "cpu"
    assert not policy.module.training
    assert {parameter.dtype for parameter in policy.module.parameters()} == {torch.float32}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, second, other = (tiny_policy(seed=seed).module.lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_making_a_policy_leaves_the_generator_of_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_policy()
    assert torch.equal(torch.rand(3), expected)


def test_a_tiny_policy_has_the_sizes_asked_for():
    config = tiny_policy(
        architecture="llama", hidden_size=48, num_heads=4, num_key_value_heads=2, num_layers=3
    ).module.config
    assert config.model_type == "llama"
    sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert (*sizes, config.num_hidden_layers) == (48, 4, 2, 3)


def test_pad_end_and_unknown_have_the_first_ids():
    tokenizer = tiny_policy().tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@given(st.text(st.sampled_from([chr(code) for code in range(32, 127)] + ["\n"])))
def test_printable_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=False) == text


TOKENIZER = tiny_policy().tokenizer


def test_questions_are_sums_with_their_answers():
    question = tiny_questions(98)[97]
    assert (question.id, question.text, question.answer, question.solution) == ("sum-097", "7+9=", "16", "16")


def test_questions_are_all_different_even_beyond_one_digit():
    questions = tiny_questions(1000)
    assert len({question.text for question in questions}) == 1000
    assert len({question.id for question in questions}) == 1000
    assert all(sum(map(int, item.text[:-1].split("+"))) == int(item.answer) for item in questions)


def test_fewer_questions_are_the_first_of_more():
    assert tiny_questions(5) == tiny_questions(50)[:5]


def test_the_policy_gives_a_distribution_over_its_vocabulary():
    policy = tiny_policy()
    tokens = policy.tokenizer("1+2=", return_tensors="pt")
    with torch.no_grad():
        logits = policy.module(**tokens).logits
    assert logits.shape == (1, 4, len(policy.tokenizer))
    assert np.isclose(logits.softmax(-1).sum().item(), 4.0)
