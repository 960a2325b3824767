"""``auto``: every head takes the candidate and the density that cost the least for the error of the whole step.

Candidates are judged on sampled query rows in the last dense step (or the first sparse one), all heads of all layers
share one budget of error, and the choice is kept across denoising steps while plans follow the current q and k.
Heads of one layer that chose differently still run in one attention call.
Source: online profiling by sampled rows, Sparse VideoGen (arXiv 2502.01776); budgets under one global limit, HASTE
(2026). Differs in: any number of methods and densities per head, one price of error for all layers, executed cost
(exact keys, pooled keys, planning) instead of a class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.config import require, require_one_of
from dsattn.errors import UsageError
from dsattn.grid import Call
from dsattn.head_profile import HeadProfile, LayerProfile
from dsattn.methods import radial, semantic, spatial_temporal, topk
from dsattn.methods.base import Memory, Method, RankFunction
from dsattn.methods.budget import Table, at_step, require_shares
from dsattn.methods.estimate import RowSample, sample_rows
from dsattn.methods.radial import RadialConfig
from dsattn.methods.ranked import Ranked
from dsattn.methods.semantic import SemanticConfig
from dsattn.methods.spatial_temporal import SpatialTemporalConfig
from dsattn.methods.topk import TopkConfig
from dsattn.mix import join_plans, split_heads
from dsattn.profiler import Curve, allocate, trace


@dataclass(frozen=True)
class Candidate:
    """A method as ``auto`` tries it.

    rank, config: the method's; all candidates have the same tail, so that their heads can share a call.
    planning: cost of making plans, spread over the calls that reuse one, as a share of dense attention.
    """

    rank: RankFunction
    config: Any
    planning: float


CANDIDATES: dict[str, Candidate] = {
    "semantic": Candidate(semantic.rank, SemanticConfig(tail="pooled"), 0.03),
    "topk": Candidate(topk.rank, TopkConfig(order="hilbert", scorer="subblock", tail="pooled"), 0.003),
    "spatial_temporal": Candidate(spatial_temporal.rank, SpatialTemporalConfig(tail="pooled"), 0.003),
    "radial": Candidate(radial.rank, RadialConfig(tail="pooled"), 0.0),
}
# How far one round of measured errors may move the budget, and how far all of them together.
FOLLOW = (0.5, 1.25)
FACTORS = (0.2, 1.25)
# Elements of the sampled rows' weights that are held at a time; profiling holds several times as many.
WEIGHTS = 1 << 26


@dataclass(frozen=True)
class AutoConfig:
    """Options of ``auto``; ``target_error`` and ``cost`` exclude each other.

    Args:
        target_error: relative L2 error of a layer's attention output, root mean square over layers, in (0, 1]; a
            number or a table over the run. Where the engine monitors errors, the budget of later plans follows what
            earlier ones reached: plans age, and a choice made on few rows is a little too hopeful.
        cost: instead, mean cost of the sparse calls relative to dense attention, in (0, 1]: keys read exactly, pooled
            keys and planning; a number or a table over the run.
        candidates: names out of ``CANDIDATES``.
        rows: sampled queries that judge them; at least 1.
        seed: draws the rows, and whatever the candidates draw.
        profile: JSON file of a ``HeadProfile``; its measurements and candidates are used, nothing is measured.

    """

    target_error: Table | None = None
    cost: Table | None = None
    candidates: tuple[str, ...] = ("semantic", "topk", "spatial_temporal")
    rows: int = 64
    seed: int = 0
    profile: str | Path | None = None

    def __post_init__(self) -> None:
        require_one_of(target_error=self.target_error, cost=self.cost)
        if not require_shares(target_error=self.target_error, cost=self.cost):
            object.__setattr__(self, "target_error", 0.06)
        came = self.candidates
        names = (came,) if isinstance(came, str) else tuple(came) if isinstance(came, (tuple, list)) else ()
        if not names or any(name not in [*CANDIDATES] or names.count(name) > 1 for name in names):
            raise UsageError(f"candidates must be different names out of {', '.join(CANDIDATES)}; got {came!r}")
        object.__setattr__(self, "candidates", names)
        require("rows", self.rows, int, low=1)
        require("seed", self.seed, int)
        if self.profile is not None:
            require("profile", self.profile, (str, Path))
            object.__setattr__(self, "profile", str(self.profile))

    @cached_property
    def measured(self) -> HeadProfile | None:
        """The profile file, read once per config."""
        if self.profile is None:
            return None
        found = HeadProfile.load(self.profile)
        unknown = {name for layer in found.layers.values() for name in layer.candidates} - set(CANDIDATES)
        if unknown:
            came = ", ".join(sorted(unknown))
            raise UsageError(f"profile {self.profile} has candidates that this version does not know: {came}")
        return found


def observe(q: Tensor, k: Tensor, v: Tensor, call: Call, config: AutoConfig, memory: Memory) -> None:
    """Measure every candidate on every head of this layer; reads the result back to the host.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    if config.measured is not None:
        return
    batch, length, heads, _ = q.shape
    rows = sample_rows(call.grid, config.rows, config.seed).to(q.device, non_blocking=True)
    group = max(1, WEIGHTS // (len(rows) * length))
    traced: dict[str, list[Curve]] = {name: [] for name in config.candidates}
    remembered: dict[str, list[Memory]] = {name: [] for name in config.candidates}
    norms = []
    for first in range(0, batch * heads, group):
        part = torch.arange(first, min(first + group, batch * heads), device=q.device)
        qkv = split_heads(q, part), split_heads(k, part), split_heads(v, part)
        sample = RowSample.of(*qkv, rows)
        norms.append(sample.exact.square().sum((2, 3))[0])
        for name in config.candidates:
            own = Memory()
            traced[name].append(trace(sample, _rank(name, qkv, call, config, own)))
            remembered[name].append(own)
    for name, memories in remembered.items():
        for key in memories[0]:
            memory[f"{name}/{key}"] = torch.cat([own[key] for own in memories], 1)

    def gather(get: str) -> Tensor:
        heads_of = [torch.cat([getattr(c, get)[:, 0] for c in curves], -1) for curves in traced.values()]
        return torch.stack(heads_of).view(len(traced), -1, batch, heads).cpu()

    density = gather("density")
    extra = torch.tensor([curves[0].tail + CANDIDATES[name].planning for name, curves in traced.items()])
    norm = torch.cat(norms).view(batch, heads).cpu()
    layers = _layers(memory)
    layers[call.layer] = LayerProfile(
        step=call.step,
        candidates=config.candidates,
        error=gather("error"),
        recall=gather("recall"),
        density=density,
        cost=density + extra[:, None, None, None],
        weight=norm / norm.sum(1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny),
    )
    # Every layer chooses anew, now that one more is known.
    for profile in layers.values():
        profile.choice = profile.choice[:0]


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: AutoConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k and the choice of every head.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    layers = _layers(memory)
    if call.layer not in layers and config.measured is not None:
        layers.update(config.measured.layers_of(call, q.shape[0], q.shape[2]))
    elif call.layer not in layers:
        observe(q, k, v, call, config, memory)
    profile = layers[call.layer]
    _aim(config, call, memory)
    if not len(profile.choice):
        aim: Aim = memory.shared["auto.aim"]
        allocate(list(layers.values()), target=aim.target, cost=aim.cost)
    which, density = profile.chosen()
    parts = []
    for index, name in enumerate(profile.candidates):
        chosen = (which.flatten() == index).nonzero().squeeze(1)
        if len(chosen):
            heads = chosen.to(q.device, non_blocking=True)
            own = _recall(memory, name, chosen, len(which.flatten()))
            ranked = _rank(
                name, (split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)), call, config, own
            )
            _remember(memory, name, chosen, own, len(which.flatten()))
            wanted = density.flatten()[chosen].to(q.device, non_blocking=True)
            parts.append((heads, ranked.at(wanted[None])))
    return join_plans(parts, q.shape[0], q.shape[2])


@dataclass
class Aim:
    """What all layers of a (model, branch) choose by, until the step of the next plans.

    step: since when. wanted: the target error asked for. factor: ``[B]``, what it is multiplied by because of the
    errors that were reached. cost: the budget where no error is asked for.
    """

    step: int
    wanted: float | None
    cost: float | None
    factor: Tensor

    @property
    def target(self) -> Tensor | None:
        """``[B]`` float32."""
        return None if self.wanted is None else self.wanted * self.factor


def _aim(config: AutoConfig, call: Call, memory: Memory) -> None:
    """Set the aim of this step's plans; the first layer that plans does it for all."""
    wanted = None if config.target_error is None else at_step(config.target_error, call)
    cost = None if config.cost is None else at_step(config.cost, call)
    last: Aim | None = memory.shared.get("auto.aim")
    if last is not None and last.step == call.step:
        return
    factor = torch.ones(()) if last is None else last.factor
    reached = memory.shared.pop("errors", {})
    if last is not None and last.wanted is not None and reached:
        error = torch.stack([value.read().float() for value in reached.values()]).square().mean(0).sqrt()
        # An error that is no number says nothing; as a factor it would stay for the rest of the run.
        step = (last.wanted / error.clamp(min=1e-6)).clamp(*FOLLOW).nan_to_num(nan=1.0)
        factor = (factor * step).clamp(*FACTORS)
    aim = memory.shared["auto.aim"] = Aim(call.step, wanted, cost, factor)
    if last is not None and (aim.wanted, aim.cost) == (last.wanted, last.cost) and torch.equal(aim.factor, last.factor):
        return
    for profile in _layers(memory).values():
        profile.choice = profile.choice[:0]


def _rank(name: str, qkv: tuple[Tensor, Tensor, Tensor], call: Call, config: AutoConfig, memory: Memory) -> Ranked:
    """One candidate's ranked blocks."""
    candidate = CANDIDATES[name]
    own = replace(candidate.config, seed=config.seed) if hasattr(candidate.config, "seed") else candidate.config
    q, k, v = qkv
    return candidate.rank(q, k, v, call, own, memory)


def _recall(memory: Memory, name: str, heads: Tensor, count: int) -> Memory:
    """What a candidate remembers of the heads ``[n]`` (on the CPU) out of ``count``; nothing if others were its last.

    Its tensors are ``[1, count, ...]`` once every head was observed, else ``[1, n, ...]``, of the heads it last had.
    """
    own = Memory()
    last = memory.get(f"{name}.heads")
    for key, value in memory.items():
        if key.startswith(f"{name}/") and (value.shape[1] == count or (last is not None and torch.equal(last, heads))):
            everything = value.shape[1] == len(heads)
            index = heads.to(value.device, non_blocking=True)
            own[key.removeprefix(f"{name}/")] = value if everything else value[:, index]
    return own


def _remember(memory: Memory, name: str, heads: Tensor, own: Memory, count: int) -> None:
    """Write back what ``_recall`` gave, into the tensors of all heads where there are such."""
    memory[f"{name}.heads"] = heads
    for key, value in own.items():
        whole = memory.get(f"{name}/{key}", value)
        if whole.shape[1] == count != len(heads):
            value = whole.index_copy(1, heads.to(value.device, non_blocking=True), value)
        memory[f"{name}/{key}"] = value


def _layers(memory: Memory) -> dict[int, LayerProfile]:
    """What is known of all layers of this (model, branch), by layer."""
    layers: dict[int, LayerProfile] = memory.shared.setdefault("auto", {})
    return layers


METHOD = Method(
    name="auto",
    config=AutoConfig,
    plan=plan,
    observe=observe,
    summary="per head the cheapest of several methods for one error budget, profiled online",
    source="this project; profiling after Sparse VideoGen 2502.01776",
)
