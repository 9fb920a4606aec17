"""How a policy computes attention: which ways there are, and whether one can be had here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal, TypeAlias

from dteframe import DataError

AttentionImplementation: TypeAlias = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""transformers' names: torch's own fused attention, plain operations, or the kernels of a package."""
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""What is imported, and what is installed."""


def attention_problems(implementation: AttentionImplementation, dtype: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a choice whatever the machine: (own key, what)."""
    if implementation in PACKAGES and dtype != "bfloat16":
        yield (
            "attn_implementation",
            f"{implementation!r} computes in 16 bits alone, but dtype is {dtype!r}; set dtype to bfloat16, "
            "or choose sdpa",
        )


def check_attention(implementation: AttentionImplementation, device: str) -> None:
    """Find out whether a way to compute attention can be had on this machine.

    Raises:
        DataError: it needs a GPU or a package that is not there.
    """
    if implementation not in PACKAGES:
        return
    if not device.startswith("cuda"):
        raise DataError(
            f"model.attn_implementation: {implementation!r} needs a GPU, but the device is {device!r}; "
            "choose sdpa"
        )
    imported, installed = PACKAGES[implementation]
    # transformers takes the kernels of the hub through the package of that name, where it is installed.
    if importlib.util.find_spec(imported) is None and importlib.util.find_spec("kernels") is None:
        raise DataError(
            f"model.attn_implementation: {implementation!r} needs the package {installed!r}, which is not "
            f"installed; install it with: pip install {installed} --no-build-isolation, or choose sdpa"
        )
