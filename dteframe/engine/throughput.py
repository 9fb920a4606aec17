"""How fast a step was and what it took: tokens and operations a second, peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dteframe.engine.setup import Setup
from dteframe.flops import peak_flops
from dteframe.reports import StageReport, ThroughputReport, TimeReport, UpdateReport

STATUS = Path("/proc/self/status")
"""Where Linux tells of this process."""


def throughput_of(setup: Setup, stages: Sequence[StageReport], times: TimeReport) -> ThroughputReport:
    """Sum a closed step up; step 0 has no update."""
    update = next((stage for stage in stages if isinstance(stage, UpdateReport)), None)
    updating = times.figures.get("update_seconds")
    per_second = _rate(update.model_flops, updating) if update else None
    again = update.trained_forward_flops if update and setup.recipe.training.gradient_checkpointing else None
    repeated = _rate(again, updating)
    peak = _peak_flops(setup)
    model = per_second / peak if per_second and peak else None
    return ThroughputReport(
        generated_tokens_per_second=_rate(
            setup.meter.last_step_tokens["train"] or None, times.figures.get("generate_seconds")
        ),
        updated_tokens_per_second=_rate(update.num_forward_tokens, updating) if update else None,
        update_model_flops_per_second=per_second,
        model_flop_utilization=model,
        hardware_flop_utilization=model + repeated / peak if model and repeated and peak else None,
        peak_memory_bytes=_take_peak_memory(setup.context.device),
    )


def _rate(count: float | None, seconds: float | None) -> float | None:
    return count / seconds if count is not None and seconds else None


def _peak_flops(setup: Setup) -> float | None:
    """Give what the devices of all processes can do together in the policy's type, if that is known."""
    device = torch.device(setup.context.device)
    if device.type != "cuda" or setup.recipe.model.dtype != "bfloat16":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return peak * setup.member.processes.count if peak else None


def _take_peak_memory(device: str) -> int:
    """Give the most memory that was taken, on CUDA since this was asked last."""
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return peak_main_memory()


def peak_main_memory() -> int:
    """Give the most main memory that this process ever had, in bytes.

    Linux's ``getrusage`` would begin with the peak of the process that started this one.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
