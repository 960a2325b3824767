"""Trained projections of the linear branch: one safetensors file, one square matrix and bias per layer."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from dsattn.errors import UsageError
from dsattn.grid import Call

_KEY = re.compile(r"((?:[^.]+\.)?layers\.\d+)\.(weight|bias)")


class Projections:
    """Projections by layer, and where a call needs them the copies on its device.

    The file holds ``layers.{i}.weight`` ``[D, D]`` and ``layers.{i}.bias`` ``[D]`` for attention layer ``i``, as a
    ``torch.nn.Linear`` stores them, D being the head_dim; all heads of a layer share one. Where a pipeline has two
    transformers, ``transformer_2.layers.{i}.weight`` is the second one's own and goes before the common key.

    Args:
        source: file they came from, for messages.
        layers: weight and bias by key prefix, such as ``"layers.3"``.

    """

    def __init__(self, source: str, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.source = source
        self.layers = layers
        self._placed: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def load(cls, path: str) -> Projections:
        """Read and check a file; values become fp32.

        Raises:
            UsageError: the file cannot be read, names something else, or a layer is incomplete, not square or not
                finite.

        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise UsageError(f"weights must be a safetensors file, there is no file {path}")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"weights file {path} is not a safetensors file: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UsageError(
                    f"weights file {path} must hold layers.{{i}}.weight and layers.{{i}}.bias only, got {key!r}"
                )
            parts.setdefault(match[1], {})[match[2]] = tensor.float()
        if not parts:
            raise UsageError(f"weights file {path} holds no layers; expected layers.{{i}}.weight and layers.{{i}}.bias")
        return cls(path, {name: _checked(path, name, pair) for name, pair in parts.items()})

    def find(self, call: Call, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of a call's layer on a device; None where both are zero.

        Raises:
            UsageError: the file lacks the layer, or has it for another head_dim.

        """
        own, common = f"{call.model}.layers.{call.layer}", f"layers.{call.layer}"
        name = own if own in self.layers else common
        if name not in self.layers:
            raise UsageError(
                f"weights file {self.source} has neither {own}.weight nor {common}.weight; it has layers "
                f"{', '.join(sorted(self.layers))}. Add the layer, or keep it dense with dense_layers"
            )
        weight, bias = self.layers[name]
        if len(bias) != head_dim:
            raise UsageError(
                f"weights file {self.source}: {name}.weight must be [{head_dim}, {head_dim}] for head_dim {head_dim}, "
                f"got {list(weight.shape)}"
            )
        if not weight.any() and not bias.any():
            return None
        if (name, device) not in self._placed:
            self._placed[name, device] = (weight.to(device), bias.to(device))
        return self._placed[name, device]


def _checked(path: str, name: str, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    for part in ("weight", "bias"):
        if part not in pair:
            raise UsageError(f"weights file {path} lacks {name}.{part}; every layer needs weight [D, D] and bias [D]")
    weight, bias = pair["weight"], pair["bias"]
    if bias.ndim != 1 or weight.shape != (len(bias), len(bias)):
        came = f"{list(weight.shape)} and {list(bias.shape)}"
        raise UsageError(f"weights file {path}: {name}.weight and .bias must be [D, D] and [D], got {came}")
    if not bool(weight.isfinite().all() & bias.isfinite().all()):
        raise UsageError(f"weights file {path}: {name} holds values that are not finite")
    return weight, bias
