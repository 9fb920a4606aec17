"""A real language model of 1 MB (stories260K), written as a folder, loaded and sampled like any other."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dteframe import Context, Prompt, Sampling
from dteframe.models.pretrained import Pretrained, PretrainedConfig
from dteframe.rollouts.transformers import TransformersRollout, TransformersRolloutConfig
from dteframe.testing.subject import in_order

DATA = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
LAYERS = "model.layers"
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}


def write_stories260k(folder):
    """Convert llama2.c's files to a folder of transformers."""
    raw = (DATA / "stories260K.bin").read_bytes()
    width, hidden, num_layers, num_heads, num_key_value_heads, vocabulary_size, longest = struct.unpack(
        "7i", raw[:28]
    )
    numbers = torch.from_numpy(np.frombuffer(raw[28:], "<f4").copy())
    place = 0

    def take(*shape):
        nonlocal place
        place += (size := int(np.prod(shape)))
        return numbers[place - size : place].view(shape)

    def halves(matrix, heads):
        """Move the pairs that llama2.c rotates next to each other to the two halves of each head."""
        return matrix.view(heads, -1, 2, width).transpose(1, 2).reshape(matrix.shape)

    key_width = width // num_heads * num_key_value_heads
    embeddings = take(vocabulary_size, width)
    state = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
    matrices = [
        ("input_layernorm", (width,), 0),
        ("self_attn.q_proj", (width, width), num_heads),
        ("self_attn.k_proj", (key_width, width), num_key_value_heads),
        ("self_attn.v_proj", (key_width, width), 0),
        ("self_attn.o_proj", (width, width), 0),
        ("post_attention_layernorm", (width,), 0),
        ("mlp.gate_proj", (hidden, width), 0),
        ("mlp.down_proj", (width, hidden), 0),
        ("mlp.up_proj", (hidden, width), 0),
    ]
    for name, shape, heads in matrices:
        for layer, matrix in enumerate(take(num_layers, *shape)):
            state[f"{LAYERS}.{layer}.{name}.weight"] = halves(matrix, heads) if heads else matrix
    state["model.norm.weight"] = take(width)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    module = LlamaForCausalLM(config)
    module.load_state_dict(state)
    module.save_pretrained(folder)
    pieces, at, raw = {}, 4, (DATA / "tok512.bin").read_bytes()
    while at < len(raw):
        length = struct.unpack("i", raw[at + 4 : at + 8])[0]
        piece = raw[at + 8 : at + 8 + length].decode()
        pieces[SPECIAL.get(len(pieces), piece)] = len(pieces)
        at += 8 + length
    core = Tokenizer(WordLevel(pieces, unk_token="<unk>"))
    core.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The loaded policy, and what was warned of."""
    if not DATA.exists():
        pytest.skip(f"needs the data folder beside the project: {DATA} does not exist")
    folder = tmp_path_factory.mktemp("stories")
    write_stories260k(folder / "model")
    warnings = []
    context = Context(folder / "cache", folder, "cpu", 0, lambda what, done, total: None, warnings.append)
    policy = Pretrained(PretrainedConfig(path=str(folder / "model")), context).load(())
    rollout = TransformersRollout(TransformersRolloutConfig(), context)
    rollout.start(policy)
    return rollout, warnings


def test_the_likeliest_story_is_the_one_that_its_author_printed(stories):
    rollout, _ = stories
    greedy = Sampling(top_k=1, max_completion_length=60)
    prompts = [Prompt("start", np.array([1]))]
    ((completion,),) = in_order(rollout.generate(prompts, 1, greedy, [0]))
    assert completion.text.lstrip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
    assert completion.finish_reason == "length"
    # Only one token can be sampled, so its renormalised log-prob is 0.
    assert not completion.behaviour_logprobs.any()


def test_sampled_stories_differ_and_begin_as_stories_do(stories):
    rollout, warnings = stories
    prompts = [Prompt("start", np.array([1]))]
    (group,) = in_order(rollout.generate(prompts, 16, Sampling(max_completion_length=40), [0]))
    assert len({completion.text for completion in group}) == 16
    assert sum(completion.text.lstrip().startswith(("Once upon", "One day")) for completion in group) > 8
    assert len(warnings) == 1
    assert warnings[0].endswith("has no padding token; '</s>' is used")
