"""Sparse attention under diffusers' context parallelism (Ulysses): all tokens of this rank's heads.

Block selection needs the whole sequence, so it runs between diffusers' two all-to-all exchanges. Ring attention
never has the whole sequence on one rank and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


def context_parallel_of(parallel: Any) -> Any:
    """The context-parallel part of a processor's parallel config if it is in force, else None.

    Raises:
        RuntimeError: ring attention is asked for.

    """
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return None
    ring, ulysses = (getattr(config, name, None) or 1 for name in ("ring_degree", "ulysses_degree"))
    if ring > 1:
        raise RuntimeError(
            f"dsattn does not run under ring attention (ring_degree={ring}): choosing key blocks needs the whole "
            "sequence on a rank. Use Ulysses: ContextParallelConfig(ulysses_degree=...)"
        )
    return config if ulysses > 1 else None


def over_all_tokens(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, parallel: Any
) -> Tensor:
    """Run ``attend`` on the full sequence and this rank's heads.

    Args:
        attend: gets query, key, value ``[B, S, H / ranks, D]``, the mask, and the global index of its first head.
        query, key, value: ``[B, S / ranks, H, D]``.
        mask: key mask of this rank's tokens or of all tokens, or None.
        scale: softmax scale.
        parallel: the processor's parallel config.

    Returns:
        ``[B, S / ranks, H, D]``.

    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    config = parallel.context_parallel_config
    heads = -(-query.shape[2] // config.ulysses_degree)
    first_head = config._ulysses_local_rank * heads

    def forward_op(ctx: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return attend(q, k, v, m, first_head)

    return _templated_context_parallel_attention(
        query,
        key,
        value,
        mask,
        0.0,
        False,
        scale,
        False,
        False,
        forward_op=forward_op,
        backward_op=None,
        _parallel_config=parallel,
    )
