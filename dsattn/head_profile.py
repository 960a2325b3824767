"""HeadProfile: what `auto` measured of every head, kept on disk so that other prompts need not measure it again.

One profile is two files of the same stem: ``name.json`` says what it was made of, ``name.safetensors`` holds the
curves. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsattn.errors import UsageError
from dsattn.grid import Call, VideoGrid

SCHEMA = "dsattn.profile/1"
# Densities that curves are measured at, a factor of about 1.35 apart; the last one is dense attention.
DENSITIES = (0.01, 0.0135, 0.018, 0.025, 0.033, 0.045, 0.06, 0.08, 0.11, 0.15, 0.2, 0.27, 0.4, 1.0)
_CURVES = ("error", "recall", "density", "cost", "weight")


@dataclass
class LayerProfile:
    """What was measured of one layer, on the CPU; C candidates, n densities.

    Args:
        step: denoising step it was measured in.
        candidates: their names.
        error: ``[C, n, B, H]`` fp32, relative L2 error of the output on the sampled rows.
        recall: ``[C, n, B, H]`` fp32, softmax mass of the keys that are read, in [0, 1].
        density: ``[C, n, B, H]`` fp32, executed density, in (0, 1].
        cost: ``[C, n, B, H]`` fp32, relative to dense attention: density, pooled keys and planning.
        weight: ``[B, H]`` fp32, each head's share of the layer's squared output.
        choice: ``[B, H]`` int64, index into the flattened C × n options; empty until chosen.

    """

    step: int
    candidates: tuple[str, ...]
    error: Tensor
    recall: Tensor
    density: Tensor
    cost: Tensor
    weight: Tensor
    choice: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Candidate ``[B, H]`` int64 and density ``[B, H]`` fp32 of every head."""
        return self.choice // len(DENSITIES), torch.tensor(DENSITIES)[self.choice % len(DENSITIES)]

    def at_choice(self, name: str) -> Tensor:
        """``[B, H]``: ``error``, ``recall``, ``density`` or ``cost`` of what every head chose."""
        values: Tensor = getattr(self, name)
        return values.flatten(0, 1).gather(0, self.choice[None])[0]

    def for_batch(self, batch: int) -> LayerProfile:
        """The same for another number of batch rows, all like the first; a copy without a choice."""
        curves = {name: getattr(self, name) for name in _CURVES}
        if self.weight.shape[0] != batch:
            curves = {name: value[..., :1, :].expand(*value.shape[:-2], batch, -1) for name, value in curves.items()}
        return LayerProfile(self.step, self.candidates, **curves)


@dataclass
class HeadProfile:
    """Curves of all layers of a run.

    Args:
        layers: by (model, branch, layer).
        grid: the token grid they hold for, with any number of text tokens.
        steps: denoising steps of the run, if known.
        pipeline: what the run was made of (models, scheduler), see ``mismatch``.

    """

    layers: dict[tuple[str, str, int], LayerProfile]
    grid: VideoGrid
    steps: int | None = None
    pipeline: dict[str, Any] = field(default_factory=dict)

    def layers_of(self, call: Call, batch: int, heads: int) -> dict[int, LayerProfile]:
        """Profiles of all layers of the model and branch that a call belongs to, for ``batch`` rows, by layer.

        Raises:
            UsageError: the call has another grid, number of steps or heads, or is of no layer that was measured.

        """
        # Text is as long as the prompt in some models, and is kept exact.
        grids = replace(self.grid, text=0), replace(call.grid, text=0)
        for what, made, now in (("grid", *grids), ("number of steps", self.steps, call.num_steps)):
            if made is not None and now is not None and made != now:
                raise UsageError(f"the profile was made for the {what} {made}, this run has {now}; make a new one")
        found = {
            layer: p
            for (model, branch, layer), p in self.layers.items()
            if (model, branch) == (call.model, call.branch)
        }
        if call.layer not in found:
            known = ", ".join("/".join(map(str, key)) for key in self.layers)
            raise UsageError(f"the profile has no {call.model}/{call.branch}/{call.layer}; it has {known}")
        if found[call.layer].weight.shape[1] != heads:
            came = found[call.layer].weight.shape[1]
            raise UsageError(f"the profile has {came} heads a layer, this model has {heads}")
        return {layer: profile.for_batch(batch) for layer, profile in found.items()}

    def mismatch(self, pipeline: Mapping[str, Any]) -> str | None:
        """Why the profile does not fit a pipeline, None if it does; what either side does not know is not compared."""
        for name, made in self.pipeline.items():
            if name in pipeline and pipeline[name] != made:
                return f"it was made with {name} {_short(made)}, this pipeline has {_short(pipeline[name])}"
        return None

    def save(self, path: str | Path) -> None:
        """Write ``path`` (.json) and the curves beside it (.safetensors); both or none are replaced.

        Raises:
            UsageError: the name does not end in .json, or the files cannot be written.

        """
        from safetensors.torch import save

        file = _json_path(path)
        names = ["/".join(map(str, key)) for key in self.layers]
        document = {
            "schema": SCHEMA,
            "grid": asdict(self.grid),
            "steps": self.steps,
            "pipeline": self.pipeline,
            "densities": list(DENSITIES),
            "layers": {
                name: {"step": layer.step, "candidates": list(layer.candidates), "heads": _heads(layer)}
                for name, layer in zip(names, self.layers.values(), strict=True)
            },
        }
        tensors = {
            f"{name}/{curve}": getattr(layer, curve).contiguous()
            for name, layer in zip(names, self.layers.values(), strict=True)
            for curve in _CURVES
        }
        parts = [file.with_name(f".{file.stem}{suffix}.part") for suffix in (".safetensors", ".json")]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            parts[0].write_bytes(save(tensors))
            parts[1].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(parts[0], file.with_suffix(".safetensors"))
            os.replace(parts[1], file)
        except OSError as error:
            raise UsageError(f"profile {file} cannot be written: {error}") from error
        finally:
            for part in parts:
                with suppress(OSError):
                    part.unlink()

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read a profile.

        Raises:
            UsageError: a file is missing or is no profile of this version.

        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = _json_path(path)
        curves = file.with_suffix(".safetensors")
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            tensors = load_file(curves)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
            raise UsageError(f"profile {file} (with {curves.name} beside it) cannot be read: {error}") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            came = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise UsageError(f"{file} is no {SCHEMA} file, its schema is {came!r}; make one with 'dsattn profile'")
        if tuple(document.get("densities", ())) != DENSITIES:
            raise UsageError(f"profile {file} was measured at other densities; make a new one with 'dsattn profile'")
        layers = {}
        try:
            for name, facts in document["layers"].items():
                model, branch, layer = name.rsplit("/", 2)
                values = {curve: tensors[f"{name}/{curve}"] for curve in _CURVES}
                layers[model, branch, int(layer)] = LayerProfile(facts["step"], tuple(facts["candidates"]), **values)
                _check_shapes(name, layers[model, branch, int(layer)])
            return cls(layers, VideoGrid(**document["grid"]), document["steps"], document["pipeline"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"profile {file} is damaged: {error!r}; make a new one with 'dsattn profile'") from error


def _check_shapes(name: str, layer: LayerProfile) -> None:
    expected = (len(layer.candidates), len(DENSITIES), *layer.weight.shape)
    for curve in _CURVES[:-1]:
        shape = tuple(getattr(layer, curve).shape)
        if len(expected) != 4 or shape != expected:
            raise ValueError(f"{name}/{curve} is {shape}, expected {expected}")


def _heads(layer: LayerProfile) -> list[list[dict[str, Any]]]:
    """What every head chose, for people who read the file."""
    if not len(layer.choice):
        return []
    which, density = layer.chosen()
    error = layer.at_choice("error")
    rows, heads = which.shape

    def describe(b: int, h: int) -> dict[str, Any]:
        name = layer.candidates[int(which[b, h])]
        return {"method": name, "density": round(float(density[b, h]), 4), "error": float(error[b, h])}

    return [[describe(b, h) for h in range(heads)] for b in range(rows)]


def _json_path(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.suffix != ".json":
        raise UsageError(f"a profile's name must end in .json, got {str(path)!r}")
    return file


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
