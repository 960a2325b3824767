"""Attention processors that run the stock diffusers code and hand its query, key and value to the engine.

A wrapped processor is an instance of a subclass of the stock class. Its ``__call__`` is the stock function over a
private copy of the globals in which ``dispatch_attention_fn`` and ``F.scaled_dot_product_attention`` are ours.
So projections, norms, RoPE, fused QKV, LoRA and gates stay diffusers' own, nothing global changes, and putting the
original object back undoes everything. There is one subclass per stock class, not per layer, or ``torch.compile``
would make one graph per layer.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.pipelines import custom_op
from dsattn.pipelines.context import ModelContext

_OWN = ("dsattn_site", "dsattn_address")


class _Active(threading.local):
    """The processor whose stock code runs in this thread, and how often it has called attention."""

    processor: SparseProcessor | None = None
    row: int = 0


_active = _Active()


@dataclass
class Site:
    """Which attention layer a processor stands for."""

    context: ModelContext
    layer: int
    original: Any


class SparseProcessor(custom_op.Addressable):
    """Mixin of every wrapped processor."""

    dsattn_site: Site

    def dsattn_attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, row: int
    ) -> Tensor:
        """Attention of this layer ``[B, S, H, D]``, sparse or dense as the engine decides."""
        backend = getattr(self, "_attention_backend", None)
        parallel = getattr(self, "_parallel_config", None)
        if row >= 0 or not self.dsattn_dispatches:
            def stock(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale).transpose(1, 2)
        else:
            def stock(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
                return self.dsattn_stock_dispatch(q, k, v, attn_mask=m, scale=scale, backend=backend)
        return _attend(self.dsattn_site, query, key, value, mask, scale, row, stock, parallel)
