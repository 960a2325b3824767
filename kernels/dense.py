"""Dense attention backends an engine can be told to use instead of the pipeline's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.errors import ImplUnavailableError, UsageError


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str, scale: float, key_lengths: Tensor | None = None
) -> Tensor:
    """Full attention, ``[B, S, H, D]`` in and out.

    Args:
        backend: ``"sdpa"``, ``"flex"`` (compiled FlexAttention) or ``"xformers"`` (memory-efficient attention).
        key_lengths: ``[B]``, leading keys that may be read; only ``"sdpa"`` takes it.

    Raises:
        ImplUnavailableError: the backend cannot run here.
        UsageError: the backend does not take key lengths.

    """
    if backend == "sdpa":
        mask = None if key_lengths is None else _key_mask(k, key_lengths)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    if key_lengths is not None:
        raise UsageError(f"dense={backend!r} cannot mask padded keys; use dense='sdpa' or the pipeline's own (None)")
    if backend == "flex":
        from dsattn.kernels import flex

        if q.device.type == "cpu" and (reason := flex.why_unavailable()):
            raise ImplUnavailableError(f"dense='flex' cannot run: {reason}; use dense='sdpa'")
        return flex.dense_attention(q, k, v, scale=scale)
    return _xformers(q, k, v, scale)


def _key_mask(k: Tensor, key_lengths: Tensor) -> Tensor:
    """``[B, 1, 1, S]`` bool."""
    return (torch.arange(k.shape[1], device=k.device) < key_lengths[:, None])[:, None, None]


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImplUnavailableError(
            f"dense='xformers' needs the xformers package ({error}): pip install 'dsattn[xformers]'"
        ) from error
    try:
        out: Tensor = memory_efficient_attention(q, k, v, scale=scale)
        return out
    except (NotImplementedError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ImplUnavailableError(
            f"xformers has no kernel for {q.dtype} on {q.device.type}: {first}; use dense='sdpa'"
        ) from error
