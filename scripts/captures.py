"""Captured attention calls on disk: one safetensors file per prompt, seed and guidance branch.

Tensors are called ``{step}/{layer}/q`` (and ``k``, ``v``): ``[1, S, H, D]`` after norm and RoPE, with the factor on
q·k at 1 / sqrt(D) and padded text cut off. The metadata of a file says what ran; all of it is text or JSON.
`capture_qkv.py` writes these files, `frontier.py` and `attention_study.py` read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsattn.errors import UsageError
from dsattn.grid import Call, VideoGrid

# Facts that every file states about its run, beside the grid.
FACTS = ("model", "prompt", "seed", "branch", "steps", "guidance", "dtype", "stored")
Key = tuple[int, int]


@dataclass(frozen=True)
class Capture:
    """One call in a file; its tensors are read when they are asked for."""

    file: Path
    facts: Mapping[str, str]
    call: Call

    @property
    def run(self) -> str:
        """Prompt, seed and branch in one word, the same for all calls of one run and branch."""
        return self.file.stem

    @property
    def heads(self) -> int:
        """Attention heads."""
        with safe_open(self.file, "pt") as opened:
            return int(opened.get_slice(self._name("q")).get_shape()[2])

    def load(self, names: str = "qkv", head: int | None = None) -> tuple[Tensor, ...]:
        """``[1, S, H, D]`` float32 in the order of ``names``, or ``[S, D]`` of one head."""
        with safe_open(self.file, "pt") as opened:
            if head is None:
                return tuple(opened.get_tensor(self._name(name)).float() for name in names)
            return tuple(opened.get_slice(self._name(name))[0, :, head].float() for name in names)

    def _name(self, name: str) -> str:
        return f"{self.call.step}/{self.call.layer}/{name}"


def write(
    path: Path, calls: Mapping[Key, tuple[Tensor, Tensor, Tensor]], grid: VideoGrid, facts: dict[str, str]
) -> int:
    """Write calls by (step, layer), in the number format that they have.

    Args:
        facts: a text for each of ``FACTS``.

    Returns:
        Bytes of the tensors.

    """
    missing = [name for name in FACTS if name not in facts]
    if missing:
        raise ValueError(f"facts of a capture must name {', '.join(FACTS)}; missing: {', '.join(missing)}")
    tensors = {
        f"{step}/{layer}/{name}": x.contiguous()
        for (step, layer), qkv in calls.items()
        for name, x in zip("qkv", qkv, strict=True)
    }
    save_file(tensors, path, metadata={**facts, "grid": json.dumps(asdict(grid))})
    return sum(x.numel() * x.element_size() for x in tensors.values())


def read(folder: Path, branches: Iterable[str] | None = ("cond",)) -> list[Capture]:
    """Captures of a folder by file, layer and step, so that warm starts meet what they meet in a run.

    Args:
        branches: guidance branches to read; None is all.

    Raises:
        UsageError: there are none.

    """
    wanted = None if branches is None else set(branches)
    found, seen = [], set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            facts, names = opened.metadata() or {}, list(opened.keys())
        if missing := [name for name in (*FACTS, "grid") if name not in facts]:
            raise UsageError(f"{file} is no capture of capture_qkv.py: its metadata lacks {', '.join(missing)}")
        seen.add(facts["branch"])
        if wanted is not None and facts["branch"] not in wanted:
            continue
        grid = VideoGrid(**json.loads(facts["grid"]))
        keys = {(int(layer), int(step)) for step, layer, _ in (name.split("/") for name in names)}
        for layer, step in sorted(keys):
            call = Call(layer, step, grid, num_steps=int(facts["steps"]), branch=facts["branch"])
            found.append(Capture(file, facts, call))
    if not found:
        has = f"captures of {', '.join(sorted(seen))} only" if seen else "no captures"
        raise UsageError(f"{folder} holds {has}; make them with 'python scripts/capture_qkv.py --out {folder}'")
    return found


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another number format.

    Raises:
        UsageError: a value is too large for it.

    """
    made = x.to(dtype, copy=True)
    if bool(x.isfinite().all()) and not bool(made.isfinite().all()):
        raise UsageError(f"a value of {float(x.abs().max()):.3g} does not fit into {dtype}; use --store float32")
    return made
