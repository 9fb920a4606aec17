"""The optimizer alone: float32 copies, fused operations, schedules, sharded gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dteframe.engine.optimizer import Optimizer, OptimizerSettings, learning_rate_at
from dteframe.engine.state_files import read_state, write_state
from dteframe.recipe import TrainingConfig


def settings(**changes: object) -> OptimizerSettings:
    chosen = {"max_steps": 4, "questions_per_step": 1, "learning_rate": 0.01, "max_grad_norm": 1e9}
    return OptimizerSettings.from_training(TrainingConfig.model_validate(chosen | changes))


def linear(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """Make a layer of ones, whose spacing in bfloat16 is 2**-8 below and 2**-7 above."""
    layer = torch.nn.Linear(4, 4).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    return layer


def take_steps(layer: torch.nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Step down made-up gradients, which depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.start_step(step)
        optimizer.gather_gradients()
        optimizer.clip_gradients()
        optimizer.step(1.0)


def test_a_step_of_a_millionth_moves_the_float32_copy_of_a_bfloat16_weight() -> None:
    layer = linear(torch.bfloat16)
    optimizer = Optimizer(layer, settings(learning_rate=1e-6))
    take_steps(layer, optimizer, range(1))
    master = optimizer.state_dict()["masters"]["weight"]
    assert master.dtype == torch.float32
    assert (master - 1).abs().sub(1e-6).abs().max() < 1e-7  # Adam's first step is the learning rate
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))


def test_steps_too_small_for_bfloat16_add_up_in_the_copy_and_are_lost_without_it() -> None:
    moved = {}
    for has_copies in (True, False):
        layer = linear(torch.bfloat16)
        optimizer = Optimizer(layer, settings(learning_rate=1e-3, float32_master_weights=has_copies))
        for _ in range(20):  # the same gradient each time: 20 steps of 0.001 are five spacings below 1
            take_steps(layer, optimizer, range(1))
        moved[has_copies] = bool((layer.weight != 1).all())
    assert moved == {True: True, False: False}


def test_without_copies_the_whole_optimizer_is_bfloat16() -> None:
    layer = linear(torch.bfloat16)
    optimizer = Optimizer(layer, settings(float32_master_weights=False, learning_rate=0.1))
    take_steps(layer, optimizer, range(2))
    state = optimizer.state_dict()
    assert state["masters"] == {}
    assert {value.dtype for name, value in state["adamw"]["weight"].items() if name != "step"} == {
        torch.bfloat16
    }
    assert (layer.weight != 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_steps_equal_plain_ones(dtype: torch.dtype) -> None:
    found = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        layer = linear(dtype)
        optimizer = Optimizer(layer, settings(optim=optim, weight_decay=0.1))
        take_steps(layer, optimizer, range(5))
        found.append(optimizer.state_dict()["masters"].get("weight", layer.weight.detach()))
    assert (found[0] - 1).abs().max() > 1e-3
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_copies", [True, False])
def test_an_optimizer_that_was_written_and_read_continues_bit_for_bit(
    optim: str, dtype: torch.dtype, has_copies: bool, tmp_path: Path
) -> None:
    chosen = settings(optim=optim, weight_decay=0.1, float32_master_weights=has_copies)
    layer, other = linear(dtype), linear(dtype)
    optimizer = Optimizer(layer, chosen)
    take_steps(layer, optimizer, range(3))
    write_state(tmp_path, "optimizer", optimizer.state_dict())
    other.load_state_dict(layer.state_dict())
    resumed = Optimizer(other, chosen)
    resumed.load_state_dict(read_state(tmp_path, "optimizer"))
    take_steps(layer, optimizer, range(3, 6))
    take_steps(other, resumed, range(3, 6))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def test_vectors_do_not_decay() -> None:
    layer = linear()
    optimizer = Optimizer(layer, settings(weight_decay=0.5, learning_rate=0.1))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    assert layer.weight.detach() == pytest.approx(torch.full((4, 4), 0.95))
    assert torch.equal(layer.bias, torch.ones(4))


def test_a_frozen_parameter_has_no_copy_and_no_state() -> None:
    layer = linear(torch.bfloat16)
    layer.bias.requires_grad_(False)
    state = Optimizer(layer, settings()).state_dict()
    assert list(state["adamw"]) == list(state["masters"]) == ["weight"]


@pytest.mark.parametrize(("min_lr_rate", "lowest"), [(None, 0.1), (0.0, 0.0), (0.5, 0.5)])
def test_the_learning_rate_of_a_cosine_with_a_floor_ends_at_it(
    min_lr_rate: float | None, lowest: float
) -> None:
    made = settings(
        learning_rate=1.0, lr_scheduler_type="cosine_with_min_lr", min_lr_rate=min_lr_rate, warmup_steps=1
    )
    # Half the rate while it rises; then (1 + cos) / 2 of 0, 60, 120 and 180 degrees.
    shares = [0.5, 1.0, 0.75, 0.25, 0.0]
    expected = [shares[0], *(lowest + (1 - lowest) * share for share in shares[1:])]
    assert [learning_rate_at(step, made) for step in range(5)] == pytest.approx(expected)


def test_the_cosine_with_a_floor_is_that_of_transformers() -> None:
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(adamw, 0, 8, min_lr_rate=0.1)
    made = settings(learning_rate=1.0, max_steps=8, lr_scheduler_type="cosine_with_min_lr")
    for step in range(8):
        assert learning_rate_at(step, made) == pytest.approx(theirs.get_last_lr()[0])
        adamw.step()
        theirs.step()


@pytest.fixture
def one_process() -> object:
    """Give a mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_parameters_take_the_same_steps_and_give_a_whole_norm(one_process: object) -> None:
    layer, sharded = linear(), linear()
    for name, parameter in list(sharded.named_parameters()):
        part = distribute_tensor(parameter.detach(), one_process, [Shard(0)])
        sharded.register_parameter(name, torch.nn.Parameter(part))
    norms = []
    for module in (layer, sharded):
        optimizer = Optimizer(module, settings(max_grad_norm=1.0))
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) + 0.5
        norms.append(optimizer.clip_gradients())
        optimizer.step(1.0)
    assert not isinstance(norms[1], DTensor)
    assert norms[0] == norms[1] == pytest.approx(0.5 * math.sqrt(20))
    assert torch.equal(layer.weight, sharded.weight.full_tensor())


def test_the_rate_falls_with_the_root_of_the_share_of_unequal_groups_where_asked() -> None:
    rates = {}
    for scaling in ("none", "unequal_groups"):
        layer = linear()
        optimizer = Optimizer(layer, settings(learning_rate=0.01, learning_rate_scaling=scaling))
        optimizer.start_step(0)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        rates[scaling] = optimizer.step(0.25)
        moved = 1 - layer.weight.detach()
        assert moved == pytest.approx(torch.full((4, 4), rates[scaling]))  # Adam's first step is the rate
    assert rates == {"none": 0.01, "unequal_groups": 0.005}
