"""A decoder of the Llama family with fused projections, made from a module's weights for one call.

It computes what the module computes, up to rounding, with fewer and larger operations: queries, keys and
values are one product, gate and up another; in float32 the norms' weights, the attention's scale and the
order of the rotated pairs go into the weights; on a CPU large weights are laid out for oneDNN, whose products
are then 1.3 to 4 times as fast at few rows. The weights are copied anew every time, so they are never stale,
and take no memory while the module is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from dteframe.full_weights import full_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
"""RMSNorm, rotary positions, grouped attention, gated SiLU: what ``FusedDecoder`` computes."""
CHANGING_ROPE_TYPES = ("dynamic", "longrope")
"""Their frequencies depend on the longest text read so far."""
HARMLESS_HOOKS = ("transformers.utils.output_capturing", "torch.distributed.")
"""Whose hooks change nothing: the first stay on a module once its hidden states have been asked for, the
others gather a module's shards, which are gathered while it samples."""
PACKED_FROM_NUMEL = 1 << 17
"""Weights of at least so many numbers are laid out for oneDNN; for smaller ones MKL is as fast."""
PACKED_FOR_ROWS = 64
"""For how many rows oneDNN chooses the layout; it works for any."""
RESIDUAL_PADDING = 16
"""Columns beside the residual stream: one holds what the norm's epsilon adds, the others align the rows."""

Attention = Callable[[int, Tensor], Tensor]
"""Mixes a layer's rotated queries, keys and values [tokens, fused] to [tokens, query], given its number."""


def refusal(module: PreTrainedModel) -> str | None:
    """Say why a ``FusedDecoder`` cannot stand for the module, or None if it can."""
    if type(module) not in FAMILY:
        names = ", ".join(kind.__name__ for kind in FAMILY)
        return f"it is a {type(module).__name__}, none of {names}"
    config = cast(Any, module.config)
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    is_sliding = getattr(config, "sliding_window", None) is not None
    layer_types = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layer_types or (is_sliding and not layer_types):
        return "its attention slides over a window"
    rope_type = module.model.rotary_emb.rope_type
    if rope_type in CHANGING_ROPE_TYPES:
        return f"its rotary positions of type {rope_type!r} change with the length of the text"
    return next(_refusals_of_parts(module), None)


def _refusals_of_parts(module: PreTrainedModel) -> Iterator[str]:
    """Look for parts that compute anything else than their class says."""
    for name, part in module.named_modules():
        where = name or "the module"
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        if not all(hook.__module__.startswith(HARMLESS_HOOKS) for hook in hooks):
            yield f"{where} has hooks"
        if "forward" in vars(part):
            yield f"{where} has a forward of its own"
        if name.endswith(("_proj", "lm_head")):
            problem = _refusal_of_projection(module, part)
            if problem is not None:
                yield f"{where} {problem}"


def _refusal_of_projection(module: PreTrainedModel, part: torch.nn.Module) -> str | None:
    if type(part) is torch.nn.Linear:
        return None
    base = getattr(part, "base_layer", None)
    if type(base) is not torch.nn.Linear:
        return f"is a {type(part).__name__}, not a plain Linear"
    if cast(Any, part).disable_adapters or cast(Any, part).merged:
        return "has its adapter switched off or merged"
    if module.dtype != torch.float32:
        return f"has an adapter, which merged into {module.dtype} weights would lose its small digits"
    return None


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """The sizes of an attention layer."""

    num_heads: int
    num_key_value_heads: int
    head_size: int

    @property
    def heads_per_key(self) -> int:
        """Count the query heads that share a key and a value."""
        return self.num_heads // self.num_key_value_heads

    @property
    def query(self) -> int:
        """Count the numbers in the queries of a token."""
        return self.num_heads * self.head_size

    @property
    def rotated(self) -> int:
        """Count the numbers in the queries and keys of a token."""
        return (self.num_heads + self.num_key_value_heads) * self.head_size


class Projection:
    """A linear layer, its weight laid out for fast products with few rows."""

    def __init__(
        self, weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, "outputs"] | None
    ) -> None:
        """Lay the weight out; a small one, and any off the CPU, is only transposed in name."""
        self._bias = bias
        is_packed = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and weight.numel() >= PACKED_FROM_NUMEL
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
        )
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) if is_packed else None
        self._transposed = None if is_packed else weight.t()

    def __call__(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Multiply by the transposed weight and add the bias."""
        if self._transposed is None:
            found = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
            return cast(Tensor, found)
        if self._bias is None:
            return torch.mm(inputs, self._transposed)
        return torch.addmm(self._bias, inputs, self._transposed)

    def add_to(self, total: Float[Tensor, "rows outputs"], inputs: Float[Tensor, "rows inputs"]) -> None:
        """Add the product to ``total`` in place."""
        if self._transposed is None or self._bias is not None:
            total.add_(self(inputs))
        else:
            total.addmm_(inputs, self._transposed)


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer of the decoder; the norms' weights are None where they are part of the projections."""

    attention_norm: Tensor | None
    fused: Projection
    output: Projection
    feed_forward_norm: Tensor | None
    gate_and_up: Projection
    down: Projection


class FusedDecoder:
    """The forward pass of a module of ``FAMILY`` for sampling, with its weights of now; see ``refusal``.

    In float32 keys and queries have the two numbers that are rotated together side by side, where the module
    has them half a head apart: their products are the same, but the keys are no other module's.
    """

    def __init__(self, module: PreTrainedModel, num_positions: int) -> None:
        """Copy the weights, an adapter's merged into them, and tabulate the positions' rotations."""
        config = cast(Any, module.config)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.sizes = AttentionSizes(config.num_attention_heads, config.num_key_value_heads, head_size)
        self.num_layers: int = config.num_hidden_layers
        self.vocabulary_size: int = config.vocab_size
        self._hidden_size: int = config.hidden_size
        self._epsilon: float = config.rms_norm_eps
        self._root = math.sqrt(self._hidden_size)
        weights = dict(full_weights(module))
        self._embedding = weights["model.embed_tokens.weight"]
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self.is_folded = self.dtype == torch.float32
        """Whether the attention's scale, too, is part of the weights."""
        self._blocks = [self._block(weights, f"model.layers.{layer}.") for layer in range(self.num_layers)]
        self._norm = weights["model.norm.weight"] * (self._root if self.is_folded else 1)
        self._head = Projection(weights.get("lm_head.weight", self._embedding), weights.get("lm_head.bias"))
        self._rotations = self._tabulated_rotations(module, num_positions)

    @property
    def attention_scale(self) -> float | None:
        """Give what products of queries and keys are to be multiplied by; None for the usual root."""
        return 1.0 if self.is_folded else None

    def logits(
        self,
        token_ids: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        attention: Attention,
        kept: Int[Tensor, "kept"] | None = None,
    ) -> Float[Tensor, "kept vocabulary"]:
        """Run tokens through the decoder.

        Args:
            token_ids: of any texts, laid end to end.
            positions: of each in its text.
            attention: mixes tokens; everything else here is done to each alone.
            kept: which tokens' logits to give; None for all.
        """
        rotations = self._rotations.index_select(0, positions)[:, None]
        padded = self._embedding.new_zeros(len(token_ids), self._hidden_size + RESIDUAL_PADDING)
        padded[:, self._hidden_size] = math.sqrt(self._epsilon * self._hidden_size)
        residual = padded[:, : self._hidden_size]
        residual.copy_(self._embedding.index_select(0, token_ids))
        for layer, block in enumerate(self._blocks):
            fused = block.fused(self._normed(padded, residual, block.attention_norm))
            self._rotate(fused, rotations)
            block.output.add_to(residual, attention(layer, fused))
            hidden = block.gate_and_up(self._normed(padded, residual, block.feed_forward_norm))
            gate, up = hidden.split(hidden.shape[1] // 2, dim=1)  # type: ignore[no-untyped-call]  # torch's
            block.down.add_to(residual, functional.silu(gate).mul_(up))
        if kept is not None:
            padded, residual = padded[kept], residual[kept]
        return self._head(self._normed(padded, residual, self._norm))

    def _normed(self, padded: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
        """Divide the residual stream by its length, epsilon included: RMSNorm but for the weights' part."""
        length = torch.linalg.vector_norm(padded, dim=-1, keepdim=True, dtype=torch.float32)
        if not self.is_folded:
            length /= self._root
        normed = torch.div(residual, length)
        return normed if weight is None else normed.to(self.dtype).mul_(weight)

    def _rotate(self, fused: Tensor, rotations: Tensor) -> None:
        """Rotate queries and keys in place, each pair as a complex number."""
        rotated = fused[:, : self.sizes.rotated]
        shape = (len(fused), -1, self.sizes.head_size // 2, 2)
        if self.is_folded:
            torch.view_as_complex(rotated.view(shape)).mul_(rotations)
            return
        halves = rotated.view(len(fused), -1, 2, self.sizes.head_size // 2).float()
        turned = torch.view_as_real(torch.complex(halves[:, :, 0], halves[:, :, 1]) * rotations)
        rotated.copy_(turned.transpose(2, 3).reshape(rotated.shape))

    def _tabulated_rotations(self, module: PreTrainedModel, num_positions: int) -> Tensor:
        """Give the module's own cosines and sines as complex numbers [positions, half a head]."""
        positions = torch.arange(num_positions, device=self.device)[None]
        cosines, sines = module.model.rotary_emb(self._embedding, positions)
        half = self.sizes.head_size // 2
        return torch.complex(cosines[0, :, :half].float(), sines[0, :, :half].float())

    def _block(self, weights: dict[str, Tensor], name: str) -> _Block:
        attention, feed_forward = f"{name}self_attn.", f"{name}mlp."
        names = ("input_layernorm", "post_attention_layernorm")
        norms = [weights[f"{name}{norm}.weight"] for norm in names]
        queries, query_bias = _linear(weights, f"{attention}q_proj")
        keys, key_bias = _linear(weights, f"{attention}k_proj")
        values, value_bias = _linear(weights, f"{attention}v_proj")
        if self.is_folded:
            scale = self.sizes.head_size**-0.5
            queries, keys = (self._side_by_side(queries * scale), self._side_by_side(keys))
            if query_bias is not None and key_bias is not None:
                query_bias, key_bias = self._side_by_side(query_bias * scale), self._side_by_side(key_bias)
        gate, gate_bias = _linear(weights, f"{feed_forward}gate_proj")
        up, up_bias = _linear(weights, f"{feed_forward}up_proj")
        fused, gate_and_up = torch.cat([queries, keys, values]), torch.cat([gate, up])
        if self.is_folded:
            fused.mul_(norms[0] * self._root)
            gate_and_up.mul_(norms[1] * self._root)
        return _Block(
            attention_norm=None if self.is_folded else norms[0],
            fused=Projection(fused, _joined(query_bias, key_bias, value_bias)),
            output=Projection(*_linear(weights, f"{attention}o_proj")),
            feed_forward_norm=None if self.is_folded else norms[1],
            gate_and_up=Projection(gate_and_up, _joined(gate_bias, up_bias)),
            down=Projection(*_linear(weights, f"{feed_forward}down_proj")),
        )

    def _side_by_side(self, projection: Tensor) -> Tensor:
        """Put the outputs that are rotated together next to each other, in each head."""
        halves = projection.view(-1, 2, self.sizes.head_size // 2, *projection.shape[1:])
        return halves.transpose(1, 2).reshape(projection.shape)


def _linear(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def _joined(*biases: Tensor | None) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    return torch.cat(given) if given else None
