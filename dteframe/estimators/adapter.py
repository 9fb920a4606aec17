"""The trained part of the attention estimator: easiness, two adapters and a calibration head, and their file.

What is predicted is what easiness says at the policy's own level and slope, plus the attended references'
deviations from the same; the head calibrates the sum. Without easiness (a direction of zeros) that is the
paper's attention over success rates, and with flat attention it is ridge regression.

torch is imported inside the functions: reading and validating a recipe stays cheap.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from dteframe import DataError
from dteframe.estimators.attention_math import MIN_RATE
from dteframe.estimators.easiness import Easiness
from dteframe.records import JsonValue

if TYPE_CHECKING:
    import torch

HeadScale: TypeAlias = Literal["multiply", "divide"]
SOFTPLUS_IS_1 = float(np.log(np.e - 1))
"""What the head puts out for a factor of 1."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an adapter file is for, and how big its parts are."""

    embedder_id: str
    """The embeddings that it was trained on; others are refused."""
    width: int
    """Numbers in an embedding."""
    hidden_width: int = 896
    """Numbers in an adapter's output and hidden layers (h of the paper)."""
    num_layers: int = 3
    """Linear layers of each adapter, at least 1."""
    dropout: float = 0.1
    """Chance that a hidden number is dropped in training."""
    head_width: int = 10
    """Hidden numbers of the calibration head."""
    head_scale: HeadScale = "multiply"
    """The logit is multiplied by softplus(o1), as in the paper, or divided by it, as in the released code."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Two adapters, ``query`` and ``reference``, and a calibration ``head``, with what they are for."""

    shape: AdapterShape
    modules: torch.nn.ModuleDict
    easiness: Easiness
    """Also scales the columns that the two adapters get."""

    def transform(
        self, part: Literal["query", "reference"], embeddings: Float[np.ndarray, "texts width"]
    ) -> Float[np.ndarray, "texts hidden"]:
        """Pass embeddings through one of the adapters, without dropout."""
        import torch

        self.modules.eval()
        with torch.inference_mode():
            parts = [
                self.modules[part](torch.from_numpy(self.easiness.scaled(chunk)))
                for chunk in np.array_split(embeddings, max(1, len(embeddings) // 4096))
            ]
            return np.asarray(torch.cat(parts).numpy())

    def scale_and_shift(
        self, statistics: Float[np.ndarray, "rows 2"]
    ) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]:
        """Give what the head makes of means and standard deviations of reference rates."""
        import torch

        self.modules.eval()
        with torch.inference_mode():
            scale, shift = head_outputs(self, torch.from_numpy(np.asarray(statistics, np.float32)))
        return scale.numpy().astype(np.float64), shift.numpy().astype(np.float64)


def build_adapter(shape: AdapterShape) -> Adapter:
    """Build an untrained adapter from torch's own random numbers.

    Source: DOTS, arXiv:2506.05316, App. C.1, and the released ``model.py``: the two adapters are not shared.
    """
    from torch import nn

    def tower() -> nn.Sequential:
        layers: list[nn.Module] = [nn.LayerNorm(shape.width)]
        for index in range(shape.num_layers):
            if index:
                layers += [nn.GELU(), nn.Dropout(shape.dropout)]
            layers.append(nn.Linear(shape.width if index == 0 else shape.hidden_width, shape.hidden_width))
        return nn.Sequential(*layers, nn.LayerNorm(shape.hidden_width))

    head = nn.Sequential(nn.Linear(2, shape.head_width), nn.ReLU(), nn.Linear(shape.head_width, 2))
    zeros, ones = np.zeros(shape.width), np.ones(shape.width)
    modules = nn.ModuleDict({"query": tower(), "reference": tower(), "head": head})
    return Adapter(shape, modules, Easiness(zeros, ones, zeros))


def start_from_easiness(adapter: Adapter, easiness: Easiness) -> Adapter:
    """Make attention flat and the head the identity, so that training begins at what easiness alone says."""
    import torch

    query, head = ([*adapter.modules[part].children()][-1] for part in ("query", "head"))
    with torch.no_grad():
        for weight in (*query.parameters(), *head.parameters()):
            weight.zero_()
        [*head.parameters()][-1].copy_(torch.tensor([SOFTPLUS_IS_1, 0.0]))
    return Adapter(adapter.shape, adapter.modules, easiness)


def head_outputs(adapter: Adapter, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the factor and the shift of the logit from [mean, standard deviation] of reference rates.

    Source: paper: the logit times softplus(o1). Released code: divided by softplus(o1) clamped to [0.01, 10].
    """
    import torch

    first, second = adapter.modules["head"](statistics).unbind(-1)
    scale = torch.nn.functional.softplus(first)
    if adapter.shape.head_scale == "divide":
        scale = 1 / scale.clamp(0.01, 10.0)
    return scale, torch.tanh(second)


def predicted_logits(
    adapter: Adapter,
    queries: torch.Tensor,
    references: torch.Tensor,
    rates: torch.Tensor,
    is_masked: torch.Tensor,
    prior: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Predict the logit of each row's success rate, with gradients.

    Args:
        adapter: in training or evaluation mode, which decides about dropout.
        queries: [rows, width], scaled embeddings of the questions asked about.
        references: [references, width], those of the batch's reference list, which all rows share.
        rates: [references], success rates of the references under the policy asked about.
        is_masked: [rows, references], true where the reference is the row's own question: it is left out of
            the attention and of the head's statistics.
        prior: [rows] and [references], the success rates that easiness alone says.

    Returns:
        [rows], scale * logit(base) + shift.
    """
    import torch

    keys = adapter.modules["reference"](references)
    scores = adapter.modules["query"](queries) @ keys.T / adapter.shape.hidden_width**0.5
    weights = scores.masked_fill(is_masked, -torch.inf).softmax(-1)
    base = (prior[0] + weights @ (rates - prior[1])).clamp(MIN_RATE, 1 - MIN_RATE)
    is_kept = (~is_masked).to(rates.dtype)
    counts = is_kept.sum(-1)
    mean = is_kept @ rates / counts
    variance = ((rates - mean.unsqueeze(-1)) ** 2 * is_kept).sum(-1) / counts
    scale, shift = head_outputs(adapter, torch.stack([mean, variance.sqrt()], -1))
    return scale * torch.logit(base) + shift


def save_adapter(adapter: Adapter, path: Path, about: JsonValue = None) -> None:
    """Write an adapter to a safetensors file whose metadata says what it is for and how it came about.

    Args:
        adapter: what is written.
        path: the file; one that is there is replaced.
        about: data, settings and scores of the fit, as JSON values.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in adapter.modules.state_dict().items()}
    tensors |= {
        f"easiness.{name}": torch.from_numpy(np.array(values, np.float32))
        for name, values in asdict(adapter.easiness).items()
    }
    # One entry: the order of several would be by chance, and equal fits would give unequal files.
    save_file(
        tensors, path, {"dteframe_adapter": json.dumps({"shape": asdict(adapter.shape), "about": about})}
    )


def load_adapter(path: Path) -> Adapter:
    """Read an adapter that ``save_adapter`` wrote, in evaluation mode on the CPU.

    Raises:
        DataError: there is no such file, or it is not an adapter; names the file.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(
            f"{path}: no such adapter file; fit one (dteframe estimator fit), or leave out estimator.adapter"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}); fit the adapter again") from error
    if "dteframe_adapter" not in metadata:
        raise DataError(
            f"{path}: the file's metadata has no 'dteframe_adapter'; give a file that "
            "dteframe estimator fit wrote"
        )
    try:
        shape = AdapterShape(**json.loads(metadata["dteframe_adapter"])["shape"])
        if not 1 <= shape.num_layers <= len(tensors):
            raise ValueError(f"{shape.num_layers!r} layers in {len(tensors)} tensors")
        easiness = Easiness(*(tensors.pop(f"easiness.{field.name}").numpy() for field in fields(Easiness)))
        for name, values in asdict(easiness).items():
            if values.shape != (shape.width,):
                raise ValueError(f"easiness.{name} has shape {values.shape}, embeddings have {shape.width}")
        with torch.device("meta"):  # Sizes that somebody wrote into the metadata take no memory.
            adapter = build_adapter(shape)
        adapter.modules.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise DataError(
            f"{path}: weights and metadata of the adapter do not fit ({error}); fit it again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken or not all(np.isfinite(values).all() for values in asdict(easiness).values()):
        raise DataError(
            f"{path}: {(broken or ['easiness'])[0]!r} holds numbers that are not finite; fit it again"
        )
    adapter.modules.eval()
    return Adapter(adapter.shape, adapter.modules, easiness)
