import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dteframe import BatchArithmetic, Context, Question
from dteframe.models.characters import character_tokenizer
from dteframe.models.from_scratch import FromScratch, FromScratchConfig
from dteframe.models.warm_up import WarmUpConfig, learning_rate_at, solution_loss, worked_examples
from dteframe.testing.tiny import tiny_policy, tiny_questions

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}


class Told:
    """What a component told people through its context."""

    def __init__(self, folder, seed=0):
        self.progress = []
        self.warnings = []
        self.context = Context(
            folder / "cache",
            folder,
            "cpu",
            seed,
            lambda *news: self.progress.append(news),
            self.warnings.append,
        )


def from_scratch(folder, questions=(), seed=0, **options):
    """Load a tiny model from scratch; give the policy and what was told."""
    told = Told(folder, seed)
    config = FromScratchConfig(**{**TINY, **options})
    return FromScratch(config, told.context).load(questions or tiny_questions(20)), told


def weights(policy):
    return {name: parameter.detach() for name, parameter in policy.module.named_parameters()}


def are_equal(first, second):
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_sizes_are_those_of_the_options(tmp_path, architecture):
    policy, _ = from_scratch(
        tmp_path,
        architecture=architecture,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    config = policy.module.config
    assert config.model_type == architecture
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (48, 136, 3)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (256, False)
    assert not policy.module.training


def test_the_seed_is_the_recipes_unless_one_is_given(tmp_path):
    recipe_seed, _ = from_scratch(tmp_path, seed=7)
    other_seed, _ = from_scratch(tmp_path, seed=0)
    given = FromScratch(FromScratchConfig(**TINY, seed=7), Told(tmp_path, 0).context).load(tiny_questions(20))
    assert are_equal(recipe_seed, given)
    assert not are_equal(recipe_seed, other_seed)


def test_the_tokenizer_knows_every_character_of_the_pool(tmp_path):
    question = Question("q", "é?", "ø = é?", "ß", "ü so ß")
    chat = Question("c", "ж", ({"role": "user", "content": "жю"},), "1")
    tokenizer = from_scratch(tmp_path, (question, chat))[0].tokenizer
    for text in ("øéßüжю", "printable ASCII: {~}\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("漢")["input_ids"] == [tokenizer.unk_token_id]


def test_the_order_of_the_questions_does_not_change_the_tokenizer():
    assert character_tokenizer(["é", "ß"]).get_vocab() == character_tokenizer(["ß", "é"]).get_vocab()


def test_chat_messages_become_one_line_each(tmp_path):
    tokenizer = from_scratch(tmp_path)[0].tokenizer
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "system: Add.\nuser: 1+1?\nassistant: "


def test_a_saved_policy_loads_with_plain_transformers(tmp_path):
    policy, _ = from_scratch(tmp_path, warm_up=WarmUpConfig(steps=2, batch_size=4))
    policy.module.save_pretrained(tmp_path / "policy")
    policy.tokenizer.save_pretrained(tmp_path / "policy")
    assert list((tmp_path / "policy").glob("*.safetensors"))
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    inputs = tokenizer(["1+2=", "10+20="], padding=True, return_tensors="pt")
    assert inputs["input_ids"][0, :2].tolist() == [0, 0]  # Padded on the left.
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs).logits, policy.module(**inputs).logits)
    messages = [{"role": "user", "content": "1+1?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: 1+1?\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 0, 2)


def test_parameters_have_the_dtype_asked_for(tmp_path):
    policy, _ = from_scratch(tmp_path, dtype="bfloat16", warm_up=WarmUpConfig(steps=2))
    assert {parameter.dtype for parameter in policy.module.parameters()} == {torch.bfloat16}


def test_the_loss_counts_the_solution_and_its_end_alone():
    policy = tiny_policy()
    questions = (Question("a", "1+1=", "1+1=", "2", "2"), Question("b", "4-", "4-", "1", "3210"))
    examples = worked_examples(questions, policy.tokenizer, pytest.fail)
    assert [example.num_prompt_tokens for example in examples] == [4, 2]
    assert [example.token_ids[-1] for example in examples] == [1, 1]
    chances = []
    for example in examples:
        with torch.no_grad():
            logits = policy.module(input_ids=torch.tensor(example.token_ids)[None]).logits[0]
        for at in range(example.num_prompt_tokens, len(example.token_ids)):
            chances.append(logits[at - 1].log_softmax(-1)[example.token_ids[at]].item())
    assert len(chances) == 2 + 5
    with torch.no_grad():
        assert solution_loss(policy.module, examples).item() == pytest.approx(-np.mean(chances), abs=1e-6)


def test_the_learning_rate_rises_linearly_then_follows_a_cosine_or_stays():
    cosine = WarmUpConfig(steps=10, warmup_steps=2, learning_rate=0.4)
    rates = [learning_rate_at(step, cosine) for step in range(10)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.4])
    assert rates[6] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.2 * (1 + math.cos(math.pi * 7 / 8)))
    constant = WarmUpConfig(steps=10, warmup_steps=0, learning_rate=0.4, lr_scheduler_type="constant")
    assert [learning_rate_at(step, constant) for step in range(10)] == [0.4] * 10


def test_the_warm_up_learns(tmp_path):
    options = WarmUpConfig(steps=150, batch_size=20, learning_rate=1e-2)
    policy, told = from_scratch(tmp_path, warm_up=options)
    examples = worked_examples(tiny_questions(20), policy.tokenizer, pytest.fail)
    with torch.no_grad():
        before = solution_loss(from_scratch(tmp_path)[0].module, examples).item()
        after = solution_loss(policy.module, examples).item()
    assert before > 4  # About the logarithm of 99 characters.
    assert after < 0.5
    assert told.progress[0] == ("warming up", 1, 150)
    assert told.progress[149] == ("warming up", 150, 150)
    what, done, total = told.progress[150]
    assert what.startswith("warmed up to a loss of 0.") and what.endswith(" nats a token")
    assert (done, total) == (150, 150)
    assert not policy.module.training
    assert all(parameter.grad is None for parameter in policy.module.parameters())


def test_the_warm_up_is_the_same_every_time(tmp_path):
    options = WarmUpConfig(steps=5, batch_size=8)
    first, _ = from_scratch(tmp_path / "one", warm_up=options)
    torch.manual_seed(123)
    second, _ = from_scratch(tmp_path / "two", warm_up=options)
    assert are_equal(first, second)


def test_cached_weights_are_bit_equal_and_need_no_steps(tmp_path):
    options = WarmUpConfig(steps=5, batch_size=8)
    made, _ = from_scratch(tmp_path, warm_up=options)
    again, told = from_scratch(tmp_path, warm_up=options)
    assert are_equal(made, again)
    assert len(told.progress) == 1
    assert told.progress[0][0].endswith("(cached)")
    assert told.warnings == []


@pytest.mark.parametrize(
    "change",
    [
        {"warm_up": WarmUpConfig(steps=3, batch_size=8)},
        {"warm_up": WarmUpConfig(steps=2, batch_size=8), "architecture": "llama"},
        {"warm_up": WarmUpConfig(steps=2, batch_size=8), "seed": 1},
        {"warm_up": WarmUpConfig(steps=2, batch_size=8), "questions": tiny_questions(19)},
    ],
    ids=["warm_up", "architecture", "seed", "questions"],
)
def test_what_the_weights_depend_on_makes_another_cache_entry(tmp_path, change):
    from_scratch(tmp_path, warm_up=WarmUpConfig(steps=2, batch_size=8))
    from_scratch(tmp_path, **change)
    assert len(list((tmp_path / "cache" / "from_scratch").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_a_damaged_cache_entry_is_told_and_made_again(tmp_path, damage):
    options = WarmUpConfig(steps=3, batch_size=8)
    made, _ = from_scratch(tmp_path, warm_up=options)
    (path,) = (tmp_path / "cache" / "from_scratch").iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "foreign": b"not a safetensors file at all",
    }[damage]
    path.write_bytes(damaged)
    again, told = from_scratch(tmp_path, warm_up=options)
    assert are_equal(made, again)
    assert len(told.warnings) == 1
    assert told.warnings[0].startswith(f"{path}: cached weights are left unused: ")
    assert told.warnings[0].endswith("; warming up again")
    hit, told = from_scratch(tmp_path, warm_up=options)
    assert are_equal(made, hit)
    assert told.warnings == []
    assert len(list(path.parent.iterdir())) == 1  # No temporary file is left behind.


def test_a_warm_up_without_worked_solutions_is_refused(tmp_path):
    questions = [Question("q-1", "1+1", "1+1", "2"), Question("q-2", "1+2", "1+2", "3")]
    with pytest.raises(ValueError) as refusal:
        from_scratch(tmp_path, questions, warm_up=WarmUpConfig(steps=1))
    assert str(refusal.value) == (
        "model 'from_scratch': none of the 2 training questions has a worked solution to warm up on; "
        "set model.warm_up.steps=0 or choose a dataset with solutions"
    )


def test_questions_that_the_warm_up_leaves_out_are_counted(tmp_path):
    questions = (
        *tiny_questions(3),
        Question("q-1", "1+1", "1+1", "2"),
        Question("q-2", "x", "x", "3", "3" * 30),
    )
    options = WarmUpConfig(steps=1)
    _, told = from_scratch(tmp_path, questions, warm_up=options, max_position_embeddings=31)
    assert told.warnings == [
        "model 'from_scratch': the warm-up uses 3 of 5 training questions; 1 have no worked solution, "
        "1 are longer than 31 tokens"
    ]


def test_a_warm_up_that_diverges_is_an_error(tmp_path):
    options = WarmUpConfig(steps=50, learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30)
    with pytest.raises(ValueError, match=r"the loss of the warm-up is .* at step \d+; lower model.warm_up"):
        from_scratch(tmp_path, warm_up=options)
    assert not (tmp_path / "cache").exists()


def test_sizes_that_do_not_fit_are_named_with_the_recipes_keys(tmp_path):
    config = FromScratchConfig(hidden_size=36, num_heads=4, num_key_value_heads=3, max_position_embeddings=64)
    arithmetic = BatchArithmetic(1, 4, 2, 1, 0, 0, 50, 20)
    assert list(config.problems(arithmetic)) == [
        ("hidden_size", "36 is not a multiple of twice num_heads 4: a head needs an even width"),
        ("num_key_value_heads", "3 does not divide num_heads 4"),
        (
            "max_position_embeddings",
            "64 is less than training.max_prompt_length 50 + rollout.max_completion_length 20; "
            "give at least 70",
        ),
    ]
    with pytest.raises(
        ValueError, match="^model 'from_scratch': hidden_size 36 is not .*; num_key_value_heads 3"
    ):
        FromScratch(config, Told(tmp_path).context).load(tiny_questions(3))
