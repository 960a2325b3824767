"""What one denoising step of a job consists of, and which dense attention is the fastest for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsattn.engine import DenseAttention, Engine
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.grid import Call
from dsattn.measure import Job, Watch, generate, prefer_cudnn
from dsattn.metrics import Clock

# Another dense attention replaces the pipeline's own as the baseline from this gain on: less is noise.
CLEARLY_FASTER = 0.95
PROBE_ROUNDS = 3
# A backend this many times slower than the best in the first round is not timed again.
HOPELESS = 2


@dataclass(frozen=True)
class Baseline:
    """A dense attention: ``dense`` as in ``Config``, ``cudnn`` to prefer cuDNN inside the pipeline's SDPA."""

    name: str
    dense: str | None = None
    cudnn: bool = False


BASELINES = {
    "pipeline": Baseline("pipeline"),
    "cudnn": Baseline("cudnn", cudnn=True),
    "flex": Baseline("flex", dense="flex"),
    "xformers": Baseline("xformers", dense="xformers"),
}


@dataclass
class Survey:
    """What one step of a job consists of, and how fast dense attention can be there.

    Args:
        call: the first attention call; ``qkv_shape`` is ``(batch, tokens, heads, head_dim)`` of its queries.
        pairs_per_step: (query, key) pairs of all self-attention calls in a step, over batch and heads.
        attention_flops: ``4 · head_dim`` per pair.
        other_flops: everything else the transformer computes in a step, counted by PyTorch.
        probe_ms: milliseconds of one dense attention call by backend; None where it cannot run.
        probe_why: reasons of those.
        baseline: the fastest.

    """

    call: Call
    qkv_shape: tuple[int, ...]
    pairs_per_step: int
    attention_flops: int
    other_flops: int
    probe_ms: dict[str, float | None]
    probe_why: dict[str, str]
    baseline: Baseline


def survey(pipe: Any, job: Job, watch: Watch | None = None) -> Survey:
    """Run one step without self-attention to count its work, then time dense backends on its first queries and keys.

    Raises:
        UsageError: as :func:`generate`; also if the pipeline has no self-attention that dsattn reaches.

    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    engine = _Surveyor()

    def cross_attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        return sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]

    # PyTorch's own table leaves out the CPU kernel.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cross_attention}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with counter:
        generate(pipe, job, engine, watch=watch, label="counting work", steps=1, decode=False)
    if engine.first is None:
        raise UsageError(f"no self-attention call of {type(pipe).__name__} reached dsattn; nothing to compare")
    counts = counter.get_flop_counts()
    names = {type(part).__name__ for key, part in pipe.components.items() if key.startswith("transformer") and part}
    other = sum(sum(ops.values()) for name, ops in counts.items() if name in names)
    shape = tuple(engine.first.q.shape)
    times, why = _probe(engine.first)
    return Survey(
        call=engine.first.call,
        qkv_shape=shape,
        pairs_per_step=engine.pairs,
        attention_flops=4 * shape[-1] * engine.pairs,
        other_flops=int(other),
        probe_ms=times,
        probe_why=why,
        baseline=fastest(times),
    )


def fastest(times: Mapping[str, float | None]) -> Baseline:
    """The fastest dense attention; the pipeline's own unless another is clearly faster.

    Args:
        times: of one call by backend, None where it cannot run; ``"pipeline"`` is always there.

    """
    known = {name: time for name, time in times.items() if time is not None}
    name = min(known, key=lambda key: known[key])
    return BASELINES[name if known[name] < CLEARLY_FASTER * known["pipeline"] else "pipeline"]


@dataclass
class _FirstCall:
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    options: dict[str, Any]

    def run(self, candidate: Baseline) -> None:
        with prefer_cudnn() if candidate.cudnn else nullcontext():
            Engine("dense", dense=candidate.dense)(self.q, self.k, self.v, self.call, **self.options)


class _Surveyor(Engine):
    """Keeps the first call, counts pairs, and skips the attention itself."""

    def __init__(self) -> None:
        super().__init__("dense")
        self.first: _FirstCall | None = None
        self.pairs = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        *,
        dense: DenseAttention | None = None,
        key_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        if self.first is None:
            options = {"dense": dense, "key_lengths": key_lengths, "scale": scale}
            self.first = _FirstCall(q.detach(), k.detach(), v.detach(), call, options)
        self.pairs += q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        return torch.zeros_like(q)


def _probe(first: _FirstCall) -> tuple[dict[str, float | None], dict[str, str]]:
    """Median milliseconds of each dense backend, rounds interleaved after one warm-up call, and reasons of failures."""
    on_gpu = first.q.device.type == "cuda"
    times: dict[str, list[float]] = {}
    why: dict[str, str] = {}
    clock = Clock(first.q.device)
    with torch.no_grad():
        for name in BASELINES if on_gpu else ("pipeline", "flex"):
            try:
                first.run(BASELINES[name])
                times[name] = []
            except (ImplUnavailableError, UsageError, RuntimeError) as error:
                if name == "pipeline" or isinstance(error, torch.OutOfMemoryError):
                    raise
                why[name] = str(error).strip().splitlines()[0]
        for _ in range(PROBE_ROUNDS):
            best = min((values[0] for values in times.values() if values), default=math.inf)
            for name, values in times.items():
                if values and values[0] > HOPELESS * best:
                    continue
                began = clock.now()
                first.run(BASELINES[name])
                values.append((clock.now() - began) * 1000)
    return {**{n: statistics.median(v) for n, v in times.items()}, **dict.fromkeys(why)}, why
