"""``temporal``: a tile that did not matter at this step is left out from the next one on.

Every call judges the tiles it computes (see ``dsattn.verdict``); those that no query of the block needs are gone from
the following calls of this layer and branch, until a revisit or a new run. No profiling, no predictor.

Source: LiteAttention (arXiv 2511.11062) and its repository: the test, its units and default, no revisit of a skipped
tile, must-keep ranges.
Differs in: one bit per tile instead of lists of ranges; guidance branches never share verdicts; state starts anew with
every run; tiles are visited from a query's own frame outwards, so that early peaks are tight (the repository goes
along the sequence, in alternating directions); text and prefix are kept as rows and as columns; tiles may be
computed again every few steps; thresholds per step, layer and head, or from a target error; any other method's plan
can be the ground that verdicts shrink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import build, require, require_budget, require_choice
from dsattn.errors import UsageError
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory, Method
from dsattn.methods.tile_error import BlockSample, draw_blocks, fit_threshold
from dsattn.orders import OrderName, token_order
from dsattn.verdict import VerdictRule, count_words, pack_bits

BLOCKS = (16, 32, 64, 128)
ORDERS: tuple[OrderName, ...] = ("raster", "tile")
Traversal = Literal["own_frame", "ascending", "alternate"]
DEFAULT_THRESHOLD = -10.0

# What the memory holds beside the base's own entries.
BITS = "temporal.bits"  # [B, H, Nq, W] int32: tiles not dropped
SINCE = "temporal.since"  # on the CPU: step at which all of them were last set
BASE = "temporal.base"  # [b, h, Nq, W] int32: tiles of the base's plan, where that does not keep all
ROWS, COLUMNS = "temporal.rows", "temporal.columns"  # [b, h, Nq, 1], [b, h, 1, W] int32: must-keep tiles
THRESHOLD = "temporal.threshold"  # [B, H] fp32, with a target error


@dataclass(frozen=True)
class TemporalConfig:
    """Options of ``temporal``; ``threshold`` and ``target_error`` exclude each other.

    Args:
        threshold: log2 of the weight, relative to the row's largest so far, that makes a tile matter; lower is
            stricter, -10 if neither is given. A number; or a list over steps, whose last entry holds for all later
            steps; an entry may be a list over heads (see :func:`calibrate`). Or one of these per layer, as a mapping;
            layers that it does not name use -10.
        target_error: choose the threshold, head by head, as high as the relative L2 error of the output allows, in
            (0, 1]: estimated whenever a plan is made, on ``sample_blocks`` query blocks, for the tiles dropped so far
            and those that this call would drop. Only over blocks of one size, without a linear branch.
        sample_blocks: query blocks for ``target_error``; at least 1. Their logits are held at once.
        base: method whose plan verdicts shrink; ``"dense"`` starts with everything. Verdicts hold for tokens: where
            the base's blocks change in a head (clusters, at every new plan), its tiles are computed again.
        base_options: options of that method.
        block_q, block_k, order: tokens per block (16, 32, 64 or 128) and the token order blocks are cut from
            (``"raster"`` or ``"tile"``), for base ``"dense"``; 64 and ``"tile"``.
        tail: what dropped tiles contribute, ``"none"`` (as published) or ``"pooled"``; None is the base's own.
        traversal: order of the visit. ``"own_frame"``: a query block's own frame, then text and prefix, then outwards
            frame by frame; ``"ascending"``; ``"alternate"``: ascending and descending by turns. Clusters have no
            frame: there ``"own_frame"`` is ascending.
        revisit: compute all tiles again once that many steps have passed; 0 is never.
        pv_skip: also leave a tile out at once if it stays this far below (log2, at least 0); None never does.
        seed: draws the sampled blocks.

    """

    threshold: Any = None
    target_error: float | None = None
    sample_blocks: int = 2
    base: str = "dense"
    base_options: Mapping[str, Any] = field(default_factory=dict)
    block_q: int | None = None
    block_k: int | None = None
    order: OrderName | None = None
    tail: Tail | None = None
    traversal: Traversal = "own_frame"
    revisit: int = 0
    pv_skip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and self.target_error is not None:
            came = f"threshold={self.threshold!r} and target_error={self.target_error!r}"
            raise UsageError(f"give only one of threshold, target_error; got {came}")
        if self.target_error is None:
            given = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
            object.__setattr__(self, "threshold", _check_thresholds(given))
        else:
            require_budget(0, density=None, target_error=self.target_error)
        require("sample_blocks", self.sample_blocks, int, low=1)
        require_choice("base", self.base, _bases())
        object.__setattr__(self, "base_options", dict(self.base_options))
        _ = self.base_config  # options that the base refuses are an error now
        for name, default, choices in (("block_q", 64, BLOCKS), ("block_k", 64, BLOCKS), ("order", "tile", ORDERS)):
            value = getattr(self, name)
            if self.base == "dense":
                object.__setattr__(self, name, default if value is None else value)
                require_choice(name, getattr(self, name), choices)
            elif value is not None:
                raise UsageError(f"{name} is for base 'dense', got {name}={value!r}; give it in base_options")
        if self.tail is not None:
            require_choice("tail", self.tail, TAILS)
        require_choice("traversal", self.traversal, get_args(Traversal))
        require("revisit", self.revisit, int, low=0)
        if self.pv_skip is not None:
            require("pv_skip", self.pv_skip, (int, float), low=0)
        require("seed", self.seed, int)

    @cached_property
    def base_config(self) -> Any:
        """Options of the base as its own config; made once, because a config may hold what it read from files."""
        return build(_bases()[self.base].config, self.base_options, f"base method {self.base!r}")


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TemporalConfig, memory: Memory) -> BlockPlan:
    """The plan that verdicts shrink: the base's. What its new blocks mean for the verdicts so far is settled here.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    if config.base == "dense":
        made = _keep_all(q, call.grid, config)
    else:
        made = _bases()[config.base].plan(q, k, v, call, config.base_config, memory)
    if config.tail is not None:
        made = replace(made, tail=config.tail)
    _forget_moved_blocks(made, memory)
    if config.base != "dense":
        memory[BASE] = pack_bits(made.block_mask)
    memory[ROWS], memory[COLUMNS] = _must_keep(made, call.grid)
    if config.target_error is not None:
        memory[THRESHOLD] = _fit(q, k, v, made, call, config, memory, config.target_error)
    return made


def observe(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TemporalConfig, memory: Memory) -> None:
    """What the base wants to see of the last dense step."""
    if (look := _bases()[config.base].observe) is not None:
        look(q, k, v, call, config.base_config, memory)


def before(plan: BlockPlan, call: Call, config: TemporalConfig, memory: Memory) -> tuple[BlockPlan, VerdictRule]:
    """The base's plan without the dropped tiles, and the rule of this call."""
    shrunk = _visiting(plan, call, config).restrict(_allowed(plan, call, config, memory))
    threshold = memory[THRESHOLD] if config.target_error is not None else _threshold(config, call, plan)
    return shrunk, VerdictRule(threshold, config.pv_skip)


def after(needed: Tensor, call: Call, config: TemporalConfig, memory: Memory) -> None:
    """Drop the tiles that were computed and not needed; what was not computed keeps its bit."""
    keep = needed | memory[ROWS] | memory[COLUMNS]
    if BASE in memory:
        keep |= ~memory[BASE]
    memory[BITS] = memory[BITS] & keep


def calibrate(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: TemporalConfig, target_error: float
) -> tuple[float, ...]:
    """The highest threshold of every head that meets a target error on these tensors; reads values back.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; over batch rows the strictest threshold counts.
        call: where they come from.
        config: base, blocks, traversal, tail, and how many query blocks are sampled.
        target_error: relative L2 error of the output against dense attention, if the verdicts of one call that
            computes all of the base's tiles were applied to the same tensors.

    Returns:
        One number per head, in [-20, 0], -inf where even -20 drops too much. An entry of a list over steps:
        ``TemporalConfig(threshold={layer: [of_step_0, of_step_1, ...]})``.

    """
    require_budget(0, density=None, target_error=target_error)
    memory = Memory()
    made = plan(q, k, v, call, replace(config, threshold=DEFAULT_THRESHOLD, target_error=None), memory)
    return tuple(_fit(q, k, v, made, call, config, memory, target_error).amin(0).tolist())


def _bases() -> dict[str, Method]:
    from dsattn.methods import METHODS  # which holds this one, too

    return {name: method for name, method in METHODS.items() if method.before is None}


def _keep_all(q: Tensor, grid: VideoGrid, config: TemporalConfig) -> BlockPlan:
    batch, length, heads, _ = q.shape
    block_q, block_k = config.block_q or 64, config.block_k or 64
    made = BlockPlan.dense(batch, heads, length, length, block_q=block_q, block_k=block_k, device=q.device)
    order = token_order(grid, config.order or "tile", q.device)
    return made if order is None else replace(made, q_order=order[None, None], k_order=order[None, None])


def _forget_moved_blocks(plan: BlockPlan, memory: Memory) -> None:
    """Set all bits of heads whose blocks now hold other tokens than when they were judged."""
    if BITS in memory and memory[BITS].shape[2:] != (plan.num_q_blocks, count_words(plan.num_k_blocks)):
        del memory[BITS]
    for name in ("q_order", "k_order", "q_starts", "k_starts"):
        new, old = getattr(plan, name), memory.pop(f"temporal.{name}", None)
        if new is not None:
            memory[f"temporal.{name}"] = new
        if BITS not in memory or (new is None and old is None):
            continue
        if new is None or old is None or new.shape[-1] != old.shape[-1]:
            del memory[BITS]
        else:
            memory[BITS] = memory[BITS] | -(new != old).any(-1).int()[..., None, None]


def _must_keep(plan: BlockPlan, grid: VideoGrid) -> tuple[Tensor, Tensor]:
    """Bits of the tiles that hold text or prefix tokens as queries ``[b, h, Nq, 1]`` and as keys ``[b, h, 1, W]``."""
    marks = []
    plan = replace(plan)  # the block of every token, which this one works out, is not kept with the plan
    for owner, blocks in ((plan.q_block_of_token, plan.num_q_blocks), (plan.k_block_of_token, plan.num_k_blocks)):
        mark = torch.zeros(*owner.shape[:2], blocks, dtype=torch.bool, device=plan.device)
        for start, stop in grid.exact_segments:
            mark.scatter_(-1, owner[..., start:stop], True)
        marks.append(mark)
    rows, columns = marks
    return -rows.int()[..., None], pack_bits(columns)[:, :, None]


def _allowed(plan: BlockPlan, call: Call, config: TemporalConfig, memory: Memory) -> Tensor:
    """Bits of the tiles that this call computes; starts anew where nothing was judged yet and at a revisit."""
    if BITS not in memory or (config.revisit and call.step - int(memory[SINCE]) >= config.revisit):
        shape = (plan.batch, plan.heads, plan.num_q_blocks, count_words(plan.num_k_blocks))
        memory[BITS] = torch.full(shape, -1, dtype=torch.int32, device=plan.device)
        memory[SINCE] = torch.tensor(call.step)
    return memory[BITS] & memory[BASE] if BASE in memory else memory[BITS]


def _visiting(plan: BlockPlan, call: Call, config: TemporalConfig) -> BlockPlan:
    """Everything kept, over the plan's blocks, listed in the order of the visit."""
    rows, columns = plan.num_q_blocks, plan.num_k_blocks
    if config.traversal == "own_frame" and plan.q_starts is None and plan.k_starts is None:
        visits = own_frame_first(call.grid, plan.block_q, plan.block_k, plan.device)
    else:
        visits = torch.arange(columns, dtype=torch.int32, device=plan.device).expand(rows, -1)
        if config.traversal == "alternate" and call.step % 2:
            visits = visits.flip(-1)
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=plan.device)
    return replace(plan, counts=counts, indices=visits[None, None])


@lru_cache(maxsize=16)
def own_frame_first(grid: VideoGrid, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """Key blocks of every query block in the order of the visit, ``[Nq, Nk]`` int32.

    First by the number of frames between the two blocks; where they share one, by how far apart they lie in the
    sequence, else by how far apart within their frames. Blocks without a video token come before the first frame that
    a query block has no part in.
    """
    size, start = grid.frame_tokens, grid.video_start

    def place(block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = torch.arange(0, grid.tokens, block, device=device)
        last = (first + block).clamp(max=grid.tokens) - 1
        low, high = ((x.clamp(start, grid.video_end - 1) - start) // size for x in (first, last))
        outside = (last < start) | (first >= grid.video_end)
        return low, high, first + last - 2 * start, outside

    q_low, q_high, q_centre, _ = (x[:, None] for x in place(block_q))
    k_low, k_high, k_centre, outside = place(block_k)
    frames = torch.maximum(k_low - q_high, q_low - k_high).clamp(min=0)
    # Centres are doubled: no halves. A frame's distance outweighs any distance of centres.
    apart = (q_centre - k_centre).abs().where(frames == 0, (q_centre % (2 * size) - k_centre % (2 * size)).abs())
    weight = 2 * grid.tokens + 2
    rank = torch.where(outside, weight - 1, frames * weight + apart)
    return rank.sort(dim=-1, stable=True).indices.int()


def _fit(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, call: Call, config: TemporalConfig, memory: Memory, target: float
) -> Tensor:
    """``[B, H]`` fp32: the highest thresholds whose verdicts on this call meet a target error."""
    if plan.q_starts is not None or plan.k_starts is not None:
        raise UsageError(
            f"target_error needs blocks of one size, base {config.base!r} makes clusters; give threshold instead"
        )
    if plan.linear is not None:
        raise UsageError(f"target_error does not see the linear branch of base {config.base!r}; give threshold instead")
    blocks = draw_blocks(call.grid, plan.block_q, config.sample_blocks, config.seed).to(q.device)
    order = _visiting(plan, call, config).indices[0, 0, blocks]
    allowed = _allowed(plan, call, config, memory)[:, :, blocks]
    always = (memory[ROWS].expand(-1, -1, plan.num_q_blocks, -1)[:, :, blocks]) | memory[COLUMNS]
    return fit_threshold(BlockSample.of(q, k, v, plan, blocks, order, allowed, always), target)


def _check_thresholds(value: Any) -> Any:
    """Numbers, and lists of them as tuples; a mapping's keys are layers."""
    if not isinstance(value, Mapping):
        return _check_steps(value)
    if not all(str(layer).isdecimal() for layer in value):
        raise UsageError(f"threshold as a mapping must name layers by number, got {list(value)}")
    return {int(layer): _check_steps(entry) for layer, entry in value.items()}


def _check_steps(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value:
        steps = tuple(tuple(step) if isinstance(step, (list, tuple)) else step for step in value)
        for step in steps:
            for number in step if isinstance(step, tuple) and step else (step,):
                require("threshold", number, (int, float))
        return steps
    require("threshold", value, (int, float))
    return float(value)


def _threshold(config: TemporalConfig, call: Call, plan: BlockPlan) -> Tensor:
    """``[1, 1 or H]`` fp32: the configured thresholds of a call."""
    entry = config.threshold
    if isinstance(entry, dict):
        entry = entry.get(call.layer, DEFAULT_THRESHOLD)
    if isinstance(entry, tuple):
        entry = entry[min(call.step, len(entry) - 1)]
    if isinstance(entry, tuple):
        first, heads = call.first_head, plan.heads
        if len(entry) < first + heads:
            raise UsageError(
                f"threshold lists {len(entry)} heads at layer {call.layer}, step {call.step}; expected {first + heads}"
            )
        return _on_device(entry[first : first + heads], plan.device)
    return torch.full((1, 1), float(entry), device=plan.device)


@lru_cache(maxsize=4096)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``[1, H]``; kept, because a copy to a GPU waits for it."""
    return torch.tensor([values], dtype=torch.float32, device=device)


METHOD = Method(
    name="temporal",
    config=TemporalConfig,
    plan=plan,
    summary="tiles that did not matter at one step are left out of the next ones",
    source="LiteAttention 2511.11062",
    observe=observe,
    before=before,
    after=after,
)
