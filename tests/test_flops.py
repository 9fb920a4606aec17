"""Operations of a model, by hand and as torch counts them, and how fast steps say they were."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_run import run_tiny
from torch.utils.flop_counter import FlopCounterMode

from dteframe.engine.loaded_sizes import loaded_sizes
from dteframe.flops import PassSizes, forward_flops, peak_flops, update_flops
from dteframe.memory import LINEAR_LAYERS, with_adapter
from dteframe.records import ModelSizes
from dteframe.testing.tiny import tiny_policy

SMALL = ModelSizes(1000, 2, 2, 8, 16, 4, 2, 2, 10, ties_embeddings=True)


def rows(*lengths):
    counted = PassSizes()
    counted.note(lengths)
    return counted


def test_a_forward_pass_multiplies_matrices_the_head_and_attention():
    # A block: q and o 64 each, k and v 32 each, three matrices of 128: 576.
    # Rows of 5 and 3 tokens, of which 2 and 1 are asked about.
    matrices = 2 * 2 * 576 * 8
    head = 2 * 10 * 8 * 3
    attention = 4 * 2 * 8 * (25 + 9)
    assert forward_flops(SMALL, rows((5, 2), (3, 1))) == matrices + head + attention


def test_a_forward_pass_is_what_torch_counts():
    policy = tiny_policy(num_key_value_heads=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.module.set_attn_implementation(
            "eager"
        )  # torch counts the products of this one alone on a CPU.
        policy.module(input_ids=torch.arange(48).view(2, 24) + 3)
    counted = forward_flops(loaded_sizes(policy.module), rows((24, 24), (24, 24)))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_update_is_three_forward_passes_and_two_with_lora():
    trained, scored = rows((5, 2)), rows((3, 1))
    whole = 3 * forward_flops(SMALL, trained) + forward_flops(SMALL, scored)
    assert update_flops(SMALL, trained, scored) == whole
    adapted = with_adapter(SMALL, 1, LINEAR_LAYERS)
    with_lora = 2 * forward_flops(adapted, trained) + forward_flops(adapted, scored)
    assert update_flops(adapted, trained, scored) == with_lora


def test_rows_of_several_processes_add_up():
    together = rows((5, 2))
    together.add(rows((3, 1)))
    assert together == rows((5, 2), (3, 1)) == PassSizes(8, 3, 34)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some device", None),
    ],
)
def test_devices_are_known_by_their_whole_name(name, peak):
    assert peak_flops(name) == peak


def test_loaded_sizes_are_those_of_the_module():
    policy = tiny_policy(num_key_value_heads=1)
    sizes = loaded_sizes(policy.module)
    number = sum(item.numel() for item in policy.module.parameters())
    assert sizes == ModelSizes(number, 4, 2, 32, 88, 2, 1, 16, 99, ties_embeddings=True, shares_prompts=True)
    for parameter in policy.module.model.layers.parameters():
        parameter.requires_grad_(False)
    trained = 99 * 32 + 32
    expected = replace(sizes, num_parameters=number - trained, num_adapter_parameters=trained)
    assert loaded_sizes(policy.module) == expected


def test_a_step_says_how_fast_it_was_and_what_it_took(tmp_path):
    summary = run_tiny(tmp_path, "training.max_steps=2", "training.reuse_references=false")
    lines = (summary.run_folder / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines[:2])
    assert "throughput/updated_tokens_per_second" not in first  # Step 0 is an evaluation.
    assert first["throughput/peak_memory_bytes"] > 2**26
    seconds = second["time/update_seconds"]
    told = second["throughput/update_model_flops_per_second"]
    assert told == pytest.approx(second["update/model_flops"] / seconds)
    assert second["throughput/updated_tokens_per_second"] == pytest.approx(
        second["update/num_forward_tokens"] / seconds
    )
    generated = second["throughput/generated_tokens_per_second"] * second["time/generate_seconds"]
    assert generated == pytest.approx(second["cost/train_tokens"])
    assert "throughput/model_flop_utilization" not in second  # Nobody knows what this CPU can do.
