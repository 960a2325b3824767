"""``plan`` and ``attend``: the two public steps every method and every kernel meets in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.config import DEFAULT_METHOD, IMPLS, QUANTIZATIONS, build, require, require_choice
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.grid import Call
from dsattn.methods import METHODS, Method
from dsattn.methods.base import Memory
from dsattn.verdict import VerdictRule, count_words

# Best first; what cannot run is passed over, and choose_impl says why. "clusters" are blocks of variable size, where
# they have a row of their own: flex pads them to tiles.
AUTO: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "torch"),
    "cpu": ("flex", "torch"),
    "cpu clusters": ("torch",),
}

# Implementations take (q, k, v, plan, scale, need_lse), and with a verdict, as keywords, rule and needed.
Implementation = Callable[..., tuple[Tensor, Tensor | None]]


def find_method(name: str) -> Method:
    """Method of that name.

    Raises:
        UsageError: no such method; lists the known ones.

    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, method: str = DEFAULT_METHOD, **options: Any) -> BlockPlan:
    """Make the block-sparse plan of one attention call.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S is ``call.grid.tokens``.
        call: layer, step and token grid.
        method: name in ``dsattn.METHODS``.
        options: that method's options.

    Raises:
        UsageError: unknown method or option, or tensors that do not fit the grid.

    """
    chosen = find_method(method)
    config: Any = build(chosen.config, options, f"method {method!r}")
    check_qkv(q, k, v)
    if q.shape[1] != call.grid.tokens or k.shape[1] != call.grid.tokens:
        raise UsageError(f"q and k must have the grid's {call.grid.tokens} tokens, got {q.shape[1]} and {k.shape[1]}")
    return chosen.plan(q, k, v, call, config, Memory())


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    impl: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    verdict: VerdictRule | None = None,
    quantization: str | None = None,
) -> Any:
    """Attention over the kept blocks of a plan, its tail, and its linear branch.

    Gradients reach q, k, v with ``impl="torch"``, and with ``"triton"`` for plans of equal blocks without token order
    and tail; they reach the projection of a linear branch with any.

    Args:
        q, k, v: ``[B, S, H, D]``, any strides; q and k may differ in length.
        plan: from ``dsattn.plan`` or a ``BlockPlan`` of your own.
        impl: ``"triton"``, ``"flex"`` (compiled FlexAttention), ``"torch"`` (gather + SDPA), ``"reference"`` (a
            plain loop, the specification) or ``"auto"`` (the first of ``dsattn.functional.AUTO`` that can run).
        return_lse: also return the natural log of the softmax denominator (a linear branch is not in it).
        scale: factor on q·k; None is ``1 / sqrt(D)``.
        verdict: judge every tile that is computed by this rule; not with ``"flex"``.
        quantization: 8-bit products, off by default. ``"int8_qk"``: queries (a scale each) and keys less their mean (a
            scale per tile of at most 64) in INT8, from compute capability 8.0 on and on MI300. ``"fp8_pv"``: softmax
            weights and values (a scale per channel) in e4m3, summed in fp32, from 8.9 on. ``"int8_qk_fp8_pv"``: both.
            The tail stays in full precision. Needs ``"triton"``, float16 or bfloat16, and no gradient; ``"torch"`` and
            ``"reference"`` emulate the arithmetic on any device, at no speed.

    Returns:
        ``out [B, S, H, D]`` in q's dtype, alone or at the head of a tuple: with ``return_lse`` comes
        ``lse [B, H, S]`` in fp32, with ``verdict`` comes ``needed [B, H, Nq, ceil(Nk / 32)]`` int32, one bit per tile
        (see ``dsattn.verdict``), set for the tiles that were computed and needed.

    Raises:
        UsageError: tensors that fit neither each other nor the plan, a verdict that does not fit them, or an unknown
            quantization.
        ImplUnavailableError: an implementation that was named cannot run here.

    """
    check_qkv(q, k, v)
    want = (plan.batch, plan.q_len, plan.heads, plan.k_len)
    came = (q.shape[0], q.shape[1], q.shape[2], k.shape[1])
    if want != came:
        raise UsageError(f"the plan is for (batch, queries, heads, keys) {want}, got tensors with {came}")
    if plan.device != q.device:
        raise UsageError(f"the plan is on {plan.device}, q is on {q.device}; make the plan from tensors on {q.device}")
    if plan.linear is not None and (len(plan.linear.bias), plan.linear.bias.device) != (v.shape[-1], q.device):
        weight = plan.linear.weight
        raise UsageError(
            f"the plan's linear.weight must be [{v.shape[-1]}, {v.shape[-1]}] on {q.device} like q, k, v, got "
            f"{list(weight.shape)} on {weight.device}"
        )
    name, _ = choose_impl(q, impl, plan, verdict is not None, quantization)
    judge: dict[str, Any] = {}
    if verdict is not None:
        _check_verdict(verdict, q)
        words = (plan.batch, plan.heads, plan.num_q_blocks, count_words(plan.num_k_blocks))
        judge = {"rule": verdict, "needed": torch.zeros(words, dtype=torch.int32, device=q.device)}
    if quantization is None:
        out, lse = _IMPLEMENTATIONS[name](q, k, v, plan, _scale(q, scale), return_lse, **judge)
    else:
        out, lse = _quantized(name, q, k, v, plan, _scale(q, scale), quantization)
    if plan.linear is not None:
        from dsattn.kernels import sparse_linear

        out = sparse_linear.add_linear(out, q, k, v, plan, plan.linear, impl=name)
    result = (out, *((lse,) if return_lse else ()), *((judge["needed"],) if judge else ()))
    return result if len(result) > 1 else out


def choose_impl(
    q: Tensor,
    impl: str = "auto",
    plan: BlockPlan | None = None,
    verdict: bool = False,
    quantization: str | None = None,
) -> tuple[str, str]:
    """Implementation that will run and why, ``(name, reason)``; without a plan, for blocks of equal size.

    Args:
        q: as passed to ``attend``.
        impl: as passed to ``attend``.
        plan: as passed to ``attend``.
        verdict: tiles are to be judged.
        quantization: as passed to ``attend``; ``"auto"`` does not fall back to its emulation.

    Raises:
        UsageError: unknown name.
        ImplUnavailableError: the named implementation, or all of ``auto``'s, cannot run here.

    """
    require_choice("impl", impl, IMPLS)
    if impl != "auto":
        if reason := why_not(q, impl, plan, verdict, quantization):
            raise ImplUnavailableError(f"impl={impl!r} cannot run: {reason}")
        return impl, "asked for"
    passed_over: list[str] = []
    kind = q.device.type
    clusters = plan is not None and (plan.q_starts is not None or plan.k_starts is not None)
    if clusters and f"{kind} clusters" in AUTO:
        kind = f"{kind} clusters"
    for name in ("triton",) if quantization else AUTO.get(kind, ("torch",)):
        reason = why_not(q, name, plan, verdict, quantization)
        if reason is None:
            return name, "; ".join(passed_over) or f"best for {kind}"
        passed_over.append(f"{name}: {reason}")
    ways_out = ""
    if quantization and why_not(q, "torch", plan, verdict, quantization) is None:
        ways_out = "; leave quantization out, or name impl='torch' (--impl torch), which emulates it at no speed"
    raise ImplUnavailableError(f"no implementation runs on {q.device}: {'; '.join(passed_over)}{ways_out}")


def why_not(
    q: Tensor,
    impl: str,
    plan: BlockPlan | None = None,
    verdict: bool = False,
    quantization: str | None = None,
) -> str | None:
    """Reason why an implementation cannot run on a tensor like q (and judge tiles), or None.

    Without a plan, for the plainest one.
    """
    if quantization is not None:
        return _why_not_quantized(q, impl, verdict, quantization)
    if impl in ("torch", "reference"):
        return None
    if impl == "flex" and verdict:
        return "flex gives no verdicts on tiles; use impl='triton', 'torch' or 'reference'"
    if q.requires_grad and torch.is_grad_enabled():
        if impl != "triton":
            return f"{impl} has no backward pass; use impl='torch' or torch.no_grad()"
        if verdict:
            return "triton has no backward pass that gives verdicts on tiles; use impl='torch' or torch.no_grad()"
        if plan is not None and (reason := plan.why_not_plain):
            return f"triton has no backward pass for {reason}; use impl='torch' or torch.no_grad()"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{q.dtype} is not supported (float16, bfloat16, float32 are); use impl='torch' or 'reference'"
    if impl == "flex":
        if q.device.type == "cpu":
            from dsattn.kernels import flex

            reason = flex.why_unavailable()
            return f"{reason}; use impl='torch'" if reason else None
        return None
    try:
        from dsattn.kernels import launch
    except ImportError as error:
        return f"the triton package cannot be imported ({error}); pip install triton, or use impl='torch'"
    return launch.why_unavailable(q.device)


def _why_not_quantized(q: Tensor, impl: str, verdict: bool, quantization: str) -> str | None:
    require_choice("quantization", quantization, tuple(QUANTIZATIONS))
    if verdict:
        return f"quantization={quantization!r} gives no verdicts on tiles; use quantization=None with this method"
    if impl in ("torch", "reference"):
        return None
    if impl == "flex":
        return f"flex has no quantization={quantization!r}; use impl='triton'"
    try:
        from dsattn.kernels import quantized_attention
    except ImportError as error:
        return f"the triton package cannot be imported ({error}); pip install triton, or use quantization=None"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"quantization={quantization!r} takes float16 or bfloat16, got {q.dtype}"
    return quantized_attention.why_unavailable(q.device, *QUANTIZATIONS[quantization])


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of an attention call.

    Raises:
        UsageError: naming what does not fit.

    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise UsageError(f"{name} must be [batch, tokens, heads, head_dim] and not empty, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise UsageError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise UsageError(f"q, k, v must agree in batch, heads and head_dim, k and v in tokens; got {shapes}")
    if not q.is_floating_point():
        raise UsageError(f"q, k, v must be floating point, got {q.dtype}")


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _check_verdict(rule: VerdictRule, q: Tensor) -> None:
    shape, lead = tuple(rule.threshold.shape), (q.shape[0], q.shape[2])
    if len(shape) != 2 or any(n not in (1, want) for n, want in zip(shape, lead, strict=True)):
        raise UsageError(f"verdict.threshold must be [1 or {lead[0]}, 1 or {lead[1]}], got {shape}")
    if rule.threshold.device != q.device:
        raise UsageError(f"verdict.threshold must be on {q.device} like q, got {rule.threshold.device}")
    if rule.pv_skip is not None:
        require("verdict.pv_skip", rule.pv_skip, (int, float), low=0)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool, **verdict: Any
) -> tuple[Tensor, Tensor | None]:
    from dsattn.kernels import autograd, block_sparse

    if autograd.needed(q, k, v) and not verdict:
        return autograd.block_sparse_attention(q, k, v, plan, scale=scale, impl="triton")
    return block_sparse.block_sparse_attention(q, k, v, plan, scale=scale, **verdict)


def _quantized(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, quantization: str
) -> tuple[Tensor, Tensor]:
    from dsattn.kernels import autograd

    if autograd.needed(q, k, v):
        raise ImplUnavailableError(
            f"quantization={quantization!r} has no backward pass; use quantization=None or torch.no_grad()"
        )
    int8_qk, fp8_pv = QUANTIZATIONS[quantization]
    if impl == "triton":
        from dsattn.kernels import quantized_attention

        return quantized_attention.block_sparse_attention(q, k, v, plan, scale=scale, int8_qk=int8_qk, fp8_pv=fp8_pv)
    from dsattn.kernels import quantized_reference

    return quantized_reference.block_sparse_attention(q, k, v, plan, scale=scale, int8_qk=int8_qk, fp8_pv=fp8_pv)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    from dsattn.kernels import flex

    return flex.block_sparse_attention(q, k, v, plan, scale=scale, need_lse=need_lse)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool, **verdict: Any
) -> tuple[Tensor, Tensor | None]:
    from dsattn.kernels import autograd, gather

    if autograd.needed(q, k, v) and plan.tail == "none" and not verdict:
        return autograd.block_sparse_attention(q, k, v, plan, scale=scale, impl="torch")
    return gather.block_sparse_attention(q, k, v, plan, scale=scale, need_lse=need_lse, **verdict)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, need_lse: bool, **verdict: Any
) -> tuple[Tensor, Tensor | None]:
    from dsattn.kernels import reference

    return reference.block_sparse_attention(q, k, v, plan, scale=scale, **verdict)


_IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": _triton,
    "flex": _flex,
    "torch": _torch,
    "reference": _reference,
}
