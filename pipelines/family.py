"""What dsattn has to know about one family of video transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Size = tuple[int, int, int]
Arguments = Mapping[str, Any]


def channels_first(args: Arguments, patch: Size) -> Size | None:
    """Token grid of ``hidden_states`` [B, C, T, H, W]."""
    _, _, frames, height, width = args["hidden_states"].shape
    return frames // patch[0], height // patch[1], width // patch[2]


def frames_first(args: Arguments, patch: Size) -> Size | None:
    """Token grid of ``hidden_states`` [B, T, C, H, W]."""
    _, frames, _, height, width = args["hidden_states"].shape
    return frames // patch[0], height // patch[1], width // patch[2]


def channels_last(args: Arguments, patch: Size) -> Size | None:
    """Token grid of ``hidden_states`` [B, T, H, W, C]."""
    _, frames, height, width, _ = args["hidden_states"].shape
    return frames // patch[0], height // patch[1], width // patch[2]


def named_sizes(args: Arguments, patch: Size) -> Size | None:
    """Token grid from the arguments ``num_frames, height, width`` of a model that takes packed tokens."""
    sizes = args.get("num_frames"), args.get("height"), args.get("width")
    if any(size is None for size in sizes):
        return None
    return sizes  # type: ignore[return-value]


def patch_of(config: Any) -> Size:
    """Patch size (frames, height, width) from the usual config names."""
    size, frames = config.patch_size, getattr(config, "patch_size_t", None)
    if isinstance(size, int):
        return (frames or 1, size, size)
    frames_, height, width = size
    return (int(frames_), int(height), int(width))


@dataclass(frozen=True)
class Family:
    """Facts about a family of transformers; everything else is found at run time.

    Args:
        name: how messages call it.
        transformers: class names of its diffusers transformers.
        attention: patterns of module names that hold self-attention over the video; group 1 is the block index.
            Layers count through the patterns in this order, so the order of the calls does not matter.
        grid: token grid from the arguments of the transformer and its patch size, None if only coordinates tell.
        patch: patch size (frames, height, width) from the transformer's config.
        extra: what the tokens beyond the grid are: ``"text_last"``, ``"text_first"``, ``"prefix"`` (history,
            condition frames) or ``"suffix"`` (reference tokens behind the video).
        history: number of history tokens in front of the video, from the arguments, where text follows the video;
            families without such text need not count.
        coords: name of the argument with token coordinates ``[B, 3, L(, 2)]``, for models that may give no grid.
        key_padding: a boolean mask ``[B, 1, 1, S]`` of this model marks a valid prefix of the keys.
        lazy_key_mask: the processor would expand a key mask to ``[B, 1, S, S]``; keep it a key mask.
        per_row: the processor calls attention once per batch row.

    """

    name: str
    transformers: tuple[str, ...]
    attention: tuple[str, ...]
    grid: Callable[[Arguments, Size], Size | None] = channels_first
    patch: Callable[[Any], Size] = patch_of
    extra: Literal["text_last", "text_first", "prefix", "suffix"] = "prefix"
    history: Callable[[Arguments], int] | None = None
    coords: str | None = None
    key_padding: bool = False
    lazy_key_mask: bool = False
    per_row: bool = False

    def attention_modules(self, transformer: nn.Module) -> list[tuple[str, nn.Module]]:
        """Attention modules to replace, in layer order."""
        names: list[tuple[int, int, str]] = []
        modules = dict(transformer.named_modules())
        for position, pattern in enumerate(self.attention):
            for name in modules:
                match = re.fullmatch(pattern, name)
                if match:
                    names.append((position, int(match.group(1)), name))
        return [(name, modules[name]) for _, _, name in sorted(names)]


def grid_from_coords(coords: Tensor) -> tuple[int, int, int]:
    """Token grid from the coordinates of a packed sequence whose condition tokens stand in front.

    Tokens run frame by frame, row by row, so walking back from the last token the width ends where the column
    stops falling, the height where the row does, and the video where the frame does.

    Args:
        coords: ``[B, 3, L]`` or ``[B, 3, L, 2]`` (start and end of each patch): frame, row, column.

    Returns:
        Frames, height and width in tokens; tokens in front of that are conditions.

    """
    points = (coords[0, ..., 0] if coords.ndim == 4 else coords[0]).float().cpu()
    time, row, column = (axis.flip(0).tolist() for axis in points)
    length = len(time)

    def run(values: list[float], stride: int) -> int:
        count = 1
        while count * stride < length and values[count * stride] < values[(count - 1) * stride]:
            count += 1
        return count

    width = run(column, 1)
    height = run(row, width)
    frames = min(run(time, width * height), length // (width * height))
    return frames, height, width
