"""Entries of the kernel benchmark that compute attention: dense baselines, and every implementation of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import bench_cases as cases
import torch
import torch.nn.functional as F
from bench_timing import Entry
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dsattn
from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.errors import ImplUnavailableError
from dsattn.kernels import dense as dense_kernels
from dsattn.verdict import VerdictRule

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
DENSE = (*SDPA, "flex", "xformers", "flashinfer")
SPARSE = ("triton", "flex", "torch", "flashinfer")
# The gather fallback reads its lists on the host: on a GPU it is timed up to this many kept (query, key) pairs.
TORCH_PAIRS = 2e10

QKV = tuple[Tensor, Tensor, Tensor]


def wanted(name: str, impls: Sequence[str]) -> bool:
    """Whether an implementation was asked for, by its full name or the first word of it; nothing asks for all."""
    return not impls or name in impls or name.split()[0] in impls


def dense_entries(shape: cases.Shape, qkv: QKV, impls: Sequence[str]) -> list[Entry]:
    """Every dense baseline."""
    q = qkv[0]
    scores = shape.heads * float(shape.grid.tokens) ** 2
    check = cases.checker(*qkv, None)
    entries = []
    for name in DENSE:
        if wanted(name, impls):
            # Scores and weights in fp32, and the weights once more in the dtype of v.
            memory = scores * (8 + q.element_size()) if name == "sdpa math" else 4.0 * q.nbytes
            info = {"group": "dense", "impl": name, "plan": "dense", "density": 1.0}
            entries.append(Entry(f"dense {name}", dense_run(name, *qkv), info, memory, check=check))
    return entries


def dense_run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention ``[B, S, H, D]`` by one backend; what cannot run raises when called."""
    scale = q.shape[-1] ** -0.5
    if name in SDPA:
        return partial(_sdpa, SDPA[name], q, k, v)
    if name == "flashinfer":
        return partial(_flashinfer_dense, q, k, v)
    return partial(dense_kernels.attention, q, k, v, backend=name, scale=scale)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ImplUnavailableError(f"{backend.name}: {error}") from error
    return out.transpose(1, 2)


def _flashinfer() -> Any:
    try:
        import flashinfer
    except ImportError as error:
        raise ImplUnavailableError(f"the flashinfer package is not installed ({error})") from error
    return flashinfer


def _flashinfer_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _flashinfer().single_prefill_with_kv_cache(q[0], k[0], v[0], causal=False)
    return out[None]


class FlashInferPlan:
    """FlashInfer's attention over blocks of variable size, prepared from a plan at its first call."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan
        self.wrapper: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.plan
        if self.wrapper is None:
            library, heads = _flashinfer(), (plan.heads, -1)
            workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
            self.wrapper = library.sparse.VariableBlockSparseAttentionWrapper(workspace)
            self.wrapper.plan(
                block_mask_map=plan.block_mask[0].expand(*heads, -1).contiguous(),
                block_row_sz=plan.q_sizes[0].expand(*heads).int().contiguous(),
                block_col_sz=plan.k_sizes[0].expand(*heads).int().contiguous(),
                num_qo_heads=plan.heads,
                num_kv_heads=plan.heads,
                head_dim=q.shape[-1],
                q_data_type=q.dtype,
            )
        # Heads first; clusters are permuted before and back after, which counts.
        q_order, k_order = (None if x is None else x[0, :, :, None] for x in (plan.q_order, plan.k_order))
        qh, kh, vh = (
            x if order is None else x.gather(1, order.expand_as(x))
            for x, order in (
                (q[0].transpose(0, 1), q_order),
                (k[0].transpose(0, 1), k_order),
                (v[0].transpose(0, 1), k_order),
            )
        )
        out: Tensor = self.wrapper.run(qh.contiguous(), kh.contiguous(), vh.contiguous())
        if q_order is not None:
            out = torch.empty_like(out).scatter_(1, q_order.expand_as(out), out)
        return out.transpose(0, 1)[None]


def sparse_entries(
    shape: cases.Shape, qkv: QKV, kind: str, goal: float, plan: BlockPlan, impls: Sequence[str]
) -> list[Entry]:
    """Every implementation of one plan, its kept blocks the same for all."""
    q = qkv[0]
    density = float(plan.density.mean())
    check = cases.checker(*qkv, plan)
    entries = []
    for name in SPARSE:
        if not wanted(name, impls):
            continue
        info = {"group": "sparse", "impl": name, "plan": kind, "goal": goal, "density": density}
        run = partial(FlashInferPlan(plan), *qkv) if name == "flashinfer" else partial(_attend, name, plan, *qkv)
        pairs = density * shape.heads * shape.grid.tokens**2
        if name == "torch" and q.is_cuda and pairs > TORCH_PAIRS:
            run = partial(_refuse, f"{pairs:.1e} pairs; the gather fallback is timed up to {TORCH_PAIRS:.0e} on a GPU")
        entries.append(Entry(f"{kind} {goal:g} {name}", run, info, 8.0 * q.nbytes, check=check))
    return entries


def _attend(impl: str, plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = dsattn.attend(q, k, v, plan, impl=impl)
    return out


def _refuse(reason: str) -> Tensor:
    raise ImplUnavailableError(reason)


def option_entries(qkv: QKV, plans: dict[str, BlockPlan], impl: str) -> list[Entry]:
    """What attention costs with verdicts, a pooled tail or a linear branch, beside the plain plans they are made of."""
    q, k, v = qkv
    dim = v.shape[-1]
    weight = torch.eye(dim, device=q.device, dtype=q.dtype) / 10
    linear = LinearTail(weight, torch.zeros(dim, device=q.device, dtype=q.dtype))
    rule = VerdictRule(torch.full((1, 1), -3.0, device=q.device))
    entries = []
    for kind, plan in plans.items():
        variants: dict[str, tuple[BlockPlan, dict[str, Any]]] = {
            "plain": (plan, {}),
            "pooled tail": (replace(plan, tail="pooled"), {}),
            "pooled_block tail": (replace(plan, tail="pooled_block"), {}),
            "verdicts": (plan, {"verdict": rule}),
        }
        if plan.q_order is None:
            variants["linear branch"] = (replace(plan, linear=linear), {})
        for name, (variant, options) in variants.items():
            run = partial(dsattn.attend, q, k, v, variant, impl=impl, **options)
            info = {
                "group": "options",
                "impl": impl,
                "plan": kind,
                "option": name,
                "density": float(plan.density.mean()),
            }
            check = cases.checker(q, k, v, variant) if name in ("plain", "pooled tail") else None
            entries.append(Entry(f"{kind} {name}", run, info, 10.0 * q.nbytes, check=check))
    return entries


def backward_entries(shape: cases.Shape, qkv: QKV, plans: dict[float, BlockPlan], impl: str) -> list[Entry]:
    """Forward and backward pass together: SDPA's backends, and block-sparse attention by plan."""
    leaves = tuple(x.detach().requires_grad_() for x in qkv)
    grad = torch.randn_like(qkv[0])
    scores = shape.heads * float(shape.grid.tokens) ** 2

    def both(forward: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(forward(), leaves, grad)

    entries = []
    for name in SDPA:
        memory = 30 * scores if name == "sdpa math" else 12.0 * grad.nbytes
        info = {"group": "backward", "impl": name, "plan": "dense", "density": 1.0}
        entries.append(Entry(f"backward {name}", partial(both, dense_run(name, *leaves)), info, memory))
    for goal, plan in plans.items():
        info = {"group": "backward", "impl": impl, "plan": "tiles", "goal": goal, "density": float(plan.density.mean())}
        check = cases.gradient_checker(*qkv, plan, grad, impl)
        run = partial(both, partial(_attend, impl, plan, *leaves))
        entries.append(Entry(f"backward tiles {goal:g} {impl}", run, info, 16.0 * grad.nbytes, check=check))
    return entries
