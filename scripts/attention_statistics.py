"""What a row of attention weights looks like: how concentrated, where in space and time, and how alike two are.

Weights are those of one head: ``[R, S]``, a softmax over S keys for each of R query rows. `attention_study.py` averages
over rows; nothing here reads a file or knows a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.grid import VideoGrid

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
LEVELS = (0.9, 0.95, 0.99)
# Window of which Sliding Tile Attention (arXiv 2502.04507) reports the mass, as a share of the video.
WINDOW = 0.1552
# Density at which Sparse VideoGen (arXiv 2502.01776) runs HunyuanVideo.
BAND = 0.25
# Rows and columns to either side that count as the same place.
NEAR = 1
# In-plane distance (rows or columns, the larger) at which bins of `by_distance` begin.
BINS = (0, 1, 2, 3, 5, 9, 17)


@dataclass(frozen=True)
class Curve:
    """Mass over density as keys come in by weight: ``[..., N + 1]`` each, both from 0 to 1."""

    density: Tensor
    mass: Tensor

    @classmethod
    def of(cls, mass: Tensor, sizes: Tensor | None = None) -> Curve:
        """Curve of the best choice.

        Args:
            mass: ``[..., N]`` of keys or blocks, of any sum.
            sizes: ``[N]`` keys of each; None means 1.

        """
        if sizes is None:
            ranked = mass.sort(-1, descending=True).values
            share = torch.arange(1, mass.shape[-1] + 1, dtype=torch.float64).expand(mass.shape) / mass.shape[-1]
        else:
            order = (mass / sizes).argsort(-1, descending=True)
            ranked, share = mass.gather(-1, order), (sizes.double() / sizes.sum())[order].cumsum(-1)
        total = ranked.cumsum(-1, dtype=torch.float64)
        total = total / total[..., -1:]
        zero = torch.zeros_like(total[..., :1])
        return cls(torch.cat([zero, share], -1), torch.cat([zero, total], -1))

    def mass_at(self, densities: tuple[float, ...]) -> Tensor:
        """``[..., n]``: mass kept; the last key or block enters in part."""
        return _between(self.density, self.mass, densities)

    def density_for(self, levels: tuple[float, ...]) -> Tensor:
        """``[..., n]``: least density that keeps so much mass."""
        return _between(self.mass, self.density, levels)


def _between(x: Tensor, y: Tensor, points: tuple[float, ...]) -> Tensor:
    """Linear interpolation of y over rising x along the last axis."""
    at = torch.tensor(points, dtype=x.dtype).expand(*x.shape[:-1], -1).contiguous()
    right = torch.searchsorted(x.contiguous(), at).clamp(1, x.shape[-1] - 1)
    (x0, y0), (x1, y1) = ((x.gather(-1, i), y.gather(-1, i)) for i in (right - 1, right))
    part = ((at - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return y0 + (y1 - y0) * part


def entropy(weights: Tensor) -> Tensor:
    """``[R]`` in nats: log S for even weights, 0 for one key."""
    return -torch.special.xlogy(weights, weights).sum(-1)


def concentration(weights: Tensor) -> dict[str, Tensor]:
    """Figures ``[R]`` of how few keys hold the weight.

    ``entropy``: divided by log S; ``effective``: its exponential over S, the share of keys that an even spread would
    need; ``above_mean``, ``tiny``: shares of keys heavier than 1 / S, and lighter than a hundredth of that; ``keys@d``,
    ``keys_for@m``: mass of the share d of heaviest keys, and the share that holds the mass m.
    """
    keys = weights.shape[-1]
    nats = entropy(weights)
    curve = Curve.of(weights)
    found = {
        "entropy": nats / math.log(keys),
        "effective": nats.exp() / keys,
        "above_mean": (weights > 1 / keys).double().mean(-1),
        "tiny": (weights < 0.01 / keys).double().mean(-1),
    }
    found |= named("keys", DENSITIES, curve.mass_at(DENSITIES))
    return found | named("keys_for", LEVELS, curve.density_for(LEVELS))


def named(name: str, points: tuple[float, ...], values: Tensor) -> dict[str, Tensor]:
    """``name@point`` for the last axis."""
    return {f"{name}@{point:g}": values[..., i] for i, point in enumerate(points)}


@dataclass(frozen=True)
class Places:
    """Frame, row and column of R query tokens (``[R]``, video tokens all), on their grid."""

    grid: VideoGrid
    frame: Tensor
    y: Tensor
    x: Tensor

    @classmethod
    def of(cls, grid: VideoGrid, rows: Tensor) -> Places:
        """Of tokens ``[R]`` of the sequence."""
        token = rows - grid.video_start
        within = token % grid.frame_tokens
        return cls(grid, token // grid.frame_tokens, within // grid.width, within % grid.width)

    def video(self, weights: Tensor) -> Tensor:
        """``[R, F, H, W]``: the weights of video keys."""
        grid = self.grid
        return weights[:, grid.video_start : grid.video_end].unflatten(1, (grid.frames, grid.height, grid.width))

    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distance in frames ``[R, F]``, rows ``[R, H]`` and columns ``[R, W]`` to every key."""
        own = (self.frame, self.y, self.x)
        sizes = (self.grid.frames, self.grid.height, self.grid.width)
        f, y, x = ((torch.arange(n) - at[:, None]).abs() for n, at in zip(sizes, own, strict=True))
        return f, y, x


def character(weights: Tensor, places: Places) -> dict[str, Tensor]:
    """Figures ``[R]`` of where the weight lies, as shares of all of it unless they say otherwise.

    ``own_frame``; ``same_place``: in other frames, within ``NEAR`` rows and columns of the query's place;
    ``first_frame``: for queries of other frames (not a number for those of the first); ``window``: in the box of
    ``window_sizes`` around the query; ``spatial``, ``temporal``: in the bands of Sparse VideoGen of density ``BAND``;
    ``distance``: mean distance in the picture, over that of even weights; ``text``: text and prefix keys.
    """
    grid, video = places.grid, places.video(weights)
    frames, ys, xs = places.offsets()
    by_frame = video.sum((2, 3))
    own = by_frame.gather(1, places.frame[:, None])[:, 0]
    elsewhere = (video * (frames > 0)[:, :, None, None]).sum(1)
    near = ((ys <= NEAR).float()[:, :, None] * (xs <= NEAR).float()[:, None]).flatten(1)
    away = (ys.float().square()[:, :, None] + xs.float().square()[:, None]).sqrt()
    in_plane = video.sum(1)
    first = torch.where(places.frame > 0, by_frame[:, 0], torch.nan)
    # Even weights' mean distance depends on the row; a grid of one token has none.
    mean = (in_plane * away).sum((1, 2)) / in_plane.sum((1, 2)).clamp(min=1e-30)
    rest = 1 - video.sum((1, 2, 3))
    return {
        "own_frame": own,
        "same_place": (elsewhere.flatten(1) * near).sum(1),
        "first_frame": first,
        "window": _in_window(video, places),
        "spatial": _in_band(video, places, False) + rest,
        "temporal": _in_band(video, places, True) + rest,
        "distance": mean / away.mean((1, 2)).clamp(min=1e-30),
        "text": rest if grid.video_tokens < grid.tokens else torch.zeros_like(rest),
    }


def window_sizes(grid: VideoGrid) -> tuple[int, int, int]:
    """Frames, rows and columns of a box that covers about ``WINDOW`` of the video: equal shares of every axis."""
    share = WINDOW ** (1 / 3)
    frames, height, width = (max(1, round(n * share)) for n in (grid.frames, grid.height, grid.width))
    return frames, height, width


def _in_window(video: Tensor, places: Places) -> Tensor:
    """``[R]``: weight in the box around the query, moved inside where it would stick out."""
    sizes = window_sizes(places.grid)
    masks = []
    for n, size, own in zip(video.shape[1:], sizes, (places.frame, places.y, places.x), strict=True):
        start = (own - size // 2).clamp(0, n - size)[:, None]
        index = torch.arange(n)
        masks.append(((index >= start) & (index < start + size)).to(video.dtype))
    return torch.einsum("rfyx,rf,ry,rx->r", video, *masks)


def band_width(tokens: int) -> float:
    """Half width, in tokens, of a band around the diagonal that holds the share ``BAND`` of a square."""
    return tokens * (1 - math.sqrt(1 - BAND))


def _in_band(video: Tensor, places: Places, patch_major: bool) -> Tensor:
    """``[R]``: weight within the band, with tokens frame by frame, or place by place through all frames."""
    grid = places.grid
    order = torch.arange(grid.video_tokens).view(grid.frames, grid.frame_tokens)
    if patch_major:
        order = order.view(-1).view(grid.frame_tokens, grid.frames).T
    along = order.flatten()
    own = along[places.frame * grid.frame_tokens + places.y * grid.width + places.x]
    inside = (along - own[:, None]).abs() <= band_width(grid.video_tokens)
    return (video.flatten(1) * inside).sum(1)


def by_frame_distance(weights: Tensor, places: Places) -> Tensor:
    """``[F]``: weight per key at a distance in frames, 1 where it is that of even weights; over all rows together."""
    frames, _, _ = places.offsets()
    mass = places.video(weights).sum((2, 3))
    return _density(frames, mass, torch.full_like(mass, places.grid.frame_tokens / weights.shape[1]), mass.shape[1])


def by_distance(weights: Tensor, places: Places) -> Tensor:
    """``[len(BINS)]``: weight per key by distance in the picture, over all frames; not a number in empty bins."""
    _, ys, xs = places.offsets()
    distance = torch.maximum(ys[:, :, None].expand(-1, -1, xs.shape[1]), xs[:, None].expand(-1, ys.shape[1], -1))
    bins = torch.bucketize(distance, torch.tensor(BINS), right=True) - 1
    mass = places.video(weights).sum(1)
    return _density(bins, mass, torch.full_like(mass, places.grid.frames / weights.shape[1]), len(BINS))


def _density(index: Tensor, mass: Tensor, share: Tensor, count: int) -> Tensor:
    """Mass over share, summed by index."""
    total, even = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, index.flatten(), x.flatten().double())
        for x in (mass, share)
    )
    return total / torch.where(even > 0, even, torch.nan)


def common_keys(weights: Tensor, share: float = 0.01) -> float:
    """Mass on the keys that most queries attend to: sinks, wherever they stand.

    The share of keys with the largest median weight over every other row is chosen, and the mass that the remaining
    rows give them returned: about ``share`` for even weights, more for sinks, and not for keys near single queries.
    """
    count = max(1, round(share * weights.shape[1]))
    chosen = weights[::2].median(0).values.topk(count).indices
    return float(weights[1::2][:, chosen].sum(1).mean())


def block_mass(weights: Tensor, order: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Weight ``[R, N]`` of key blocks in a token order, and their sizes ``[N]``; the last may be smaller."""
    ordered = weights if order is None else weights[:, order]
    short = -ordered.shape[1] % size
    sizes = torch.full(((ordered.shape[1] + short) // size,), size)
    sizes[-1] -= short
    return torch.nn.functional.pad(ordered, (0, short)).unflatten(1, (-1, size)).sum(2), sizes


def overlap(chosen: Tensor, weights: Tensor) -> tuple[float, float]:
    """Mass that keys (or blocks) ``[R, n]`` chosen elsewhere hold here, and the same over the best n keys' mass."""
    kept = weights.gather(1, chosen).sum(1)
    best = weights.topk(chosen.shape[1], 1).values.sum(1)
    total = weights.sum(1)
    return float((kept / total).mean()), float(kept.sum() / best.sum())


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Spearman's, ties in the order they come; None for fewer than three values or where one side is constant."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    if len(x) < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return None
    ranks = torch.stack([values.argsort(stable=True).argsort().double() for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])
