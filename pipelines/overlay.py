"""Attention processors that run the stock diffusers code and hand its query, key and value to the engine.

A wrapped processor is an instance of a subclass of the stock class. Its ``__call__`` is the stock function over a
private copy of its globals, in which ``dispatch_attention_fn`` and ``F.scaled_dot_product_attention`` are ours.
So projections, norms, RoPE, fused QKV, LoRA and gates stay diffusers' own, nothing global changes, and putting the
original object back undoes everything. There is one subclass per stock class, not one per layer, because
``torch.compile`` makes one graph per class.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch import Tensor

from dsattn.pipelines import custom_op
from dsattn.pipelines.context import ModelContext
from dsattn.pipelines.parallel import context_parallel_of, over_all_tokens

Stock = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class _Active(threading.local):
    """The wrapped processor whose stock code runs in this thread, and how often it has called attention so far."""

    def __init__(self) -> None:  # runs once per thread; instance attributes, because compiled code guards on them
        self.processor: Any = None
        self.row = 0


_active = _Active()


@dataclass
class Site:
    """Which attention layer a processor stands for.

    Args:
        context: of the transformer.
        layer: index by module name.
        original: the stock processor, put back by ``remove()``.
        per_row: the stock code calls attention once per batch row.

    """

    context: ModelContext
    layer: int
    original: Any
    per_row: bool = False


class SparseProcessor(custom_op.Addressable):
    """Mixin of every wrapped processor."""

    dsattn_site: Site
    dsattn_dispatch: Callable[..., Tensor] | None = None

    def dsattn_stock(self, scale: float | None) -> Stock:
        """The attention the stock code would have run, on ``[B, S, H, D]``."""
        dispatch = type(self).dsattn_dispatch
        if dispatch is None:

            def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
                query, key, value = (x.transpose(1, 2) for x in (query, key, value))
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

            return sdpa
        backend = getattr(self, "_attention_backend", None)

        def dispatched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return dispatch(query, key, value, attn_mask=mask, scale=scale, backend=backend)

        return dispatched

    def dsattn_attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None, row: int
    ) -> Tensor:
        """Attention of this layer, sparse or dense as the engine decides.

        Args:
            query, key, value: ``[B, S, H, D]`` after norm and RoPE (this rank's tokens under context parallelism).
            mask: as the model passes it.
            scale: softmax scale, None for ``D ** -0.5``.
            row: batch row where the model calls attention once per row, else -1.

        """
        stock = self.dsattn_stock(scale)
        parallel = getattr(self, "_parallel_config", None)
        config = context_parallel_of(parallel)
        if config is None:
            return _attend(self.dsattn_site, query, key, value, mask, scale, row, stock)

        def local_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, first_head: int) -> Tensor:
            return _attend(self.dsattn_site, q, k, v, m, scale, row, stock, first_head, sharded=True)

        return over_all_tokens(local_heads, query, key, value, mask, scale, parallel)


def _attend(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    row: int,
    stock: Stock,
    first_head: int = 0,
    sharded: bool = False,
) -> Tensor:
    context = site.context
    engine = context.run.engine
    dense = functools.partial(stock, query, key, value, mask)
    if query.shape[1] != key.shape[1]:
        return engine.fallback(None, "cross-attention: queries and keys differ in number", dense)
    call = context.call(site.layer, query.shape[1], row, first_head)
    if isinstance(call, str):
        return engine.fallback(None, call, dense)
    if sharded and call.grid.text:
        return engine.fallback(call, "text tokens are interleaved with video tokens under context parallelism", dense)
    if _scores_are_skipped():
        return engine.fallback(call, "a guider replaces attention scores (PAG, SLG)", dense)
    lengths = None
    if mask is not None:
        batch, tokens = query.shape[:2]
        if not (
            context.family.key_padding
            and isinstance(mask, Tensor)
            and mask.dtype == torch.bool
            and tuple(mask.shape) == (batch, 1, 1, tokens)
        ):
            return engine.fallback(call, f"mask is not key padding: {_describe(mask)}", dense)
        lengths = context.key_lengths(mask)
    return engine(query, key, value, call, dense=dense, key_lengths=lengths, scale=scale)


def _describe(mask: Any) -> str:
    if isinstance(mask, Tensor):
        return f"{str(mask.dtype).removeprefix('torch.')} with {mask.ndim} dimensions"
    return type(mask).__name__


def _scores_are_skipped() -> bool:
    if torch._C._len_torch_function_stack() == 0:
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


class KeyMask:
    """Valid keys ``[B, S]`` that stay a key mask where stock code would expand them to ``[B, 1, S, S]``.

    It takes part in exactly the operations of that expansion. Masking rows as well as keys changes only the rows
    of padded text, which nothing reads, but costs gigabytes per layer at video lengths.
    """

    def __init__(self, valid: Tensor) -> None:
        self.valid = valid

    def bool(self) -> KeyMask:
        """Boolean mask."""
        return KeyMask(self.valid.bool())

    def view(self, *shape: int) -> KeyMask:
        """Row mask ``[B, 1, 1, S]``: the same keys."""
        return self

    def repeat(self, *sizes: int) -> KeyMask:
        """One row per query: the same keys."""
        return self

    def transpose(self, first: int, second: int) -> KeyMask:
        """Mask of rows: left out."""
        return self

    def __and__(self, other: KeyMask) -> KeyMask:
        return self

    def tensor(self) -> Tensor:
        """``[B, 1, 1, S]``."""
        return self.valid[:, None, None, :]


class _Functional:
    """``torch.nn.functional`` with some functions replaced."""

    def __init__(self, **replaced: Callable[..., Any]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _intercept_dispatch(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        processor = _active.processor
        mask = attn_mask.tensor() if isinstance(attn_mask, KeyMask) else attn_mask
        if dropout_p or is_causal or enable_gqa or attention_kwargs:
            settings = (mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
            dense = functools.partial(
                stock, query, key, value, *settings, backend=backend, parallel_config=parallel_config
            )
            return _beyond_us(processor, dense)
        return _route(processor, query, key, value, mask, scale, -1)

    return dispatch_attention_fn


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    processor = _active.processor
    if dropout_p or is_causal or enable_gqa:
        dense = functools.partial(
            F.scaled_dot_product_attention,
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return _beyond_us(processor, dense)
    row = -1
    if processor.dsattn_site.per_row:
        row = _active.row
        _active.row = row + 1
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _route(processor, query, key, value, attn_mask, scale, row).transpose(1, 2)


def _route(
    processor: SparseProcessor, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None, row: int
) -> Tensor:
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.dsattn.attention(query, key, value, mask, scale, row, processor.dsattn_address)
        return out
    return processor.dsattn_attend(query, key, value, mask, scale, row)


def _beyond_us(processor: SparseProcessor, dense: Callable[[], Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return dense()
    return processor.dsattn_site.context.run.engine.fallback(None, "causal, dropout or grouped-query attention", dense)


def _lazy_pad(mask: Tensor, pad: tuple[int, ...], mode: str = "constant", value: float | None = None) -> KeyMask:
    return KeyMask(F.pad(mask, pad, mode=mode, value=value))


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*nested)


@functools.cache
def wrapped_class(base: type, lazy_key_mask: bool = False) -> type:
    """Subclass of a stock processor class whose attention calls go to the engine.

    Args:
        base: stock processor class.
        lazy_key_mask: keep the processor from expanding a key mask to one row per query.

    Raises:
        TypeError: the class calls neither ``dispatch_attention_fn`` nor ``F.scaled_dot_product_attention``.

    """
    stock: Any = base.__call__
    names = _names(stock.__code__)
    space = dict(stock.__globals__)
    space.pop("__name__", None)  # or the compiler would look names up in the real module
    dispatch = space.get("dispatch_attention_fn") if "dispatch_attention_fn" in names else None
    if dispatch is not None:
        space["dispatch_attention_fn"] = _intercept_dispatch(dispatch)
        if lazy_key_mask:
            space["F"] = _Functional(pad=_lazy_pad)
    elif {"F", "scaled_dot_product_attention"} <= names:
        space["F"] = _Functional(scaled_dot_product_attention=_scaled_dot_product_attention)
    else:
        raise TypeError(
            f"{base.__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention, so dsattn cannot "
            "take its place; set the model's default attention processors before dsattn.enable()"
        )
    inner: Any = types.FunctionType(stock.__code__, space, stock.__name__, stock.__defaults__, stock.__closure__)
    inner.__kwdefaults__ = stock.__kwdefaults__

    @functools.wraps(stock)  # models pass only the arguments they find in the signature
    def call(self: SparseProcessor, *args: Any, **kwargs: Any) -> Any:
        outer = _active.processor
        _active.processor, _active.row = self, 0
        try:
            return inner(self, *args, **kwargs)
        finally:
            _active.processor = outer

    body = {"__call__": call, "__module__": __name__, "__doc__": f"{base.__name__} with attention by dsattn."}
    body["dsattn_dispatch"] = staticmethod(dispatch) if dispatch is not None else None
    new = type(f"Sparse{base.__name__}", (SparseProcessor, base), body)
    AttentionProcessorRegistry._register()
    known = AttentionProcessorRegistry._registry.get(base)
    if known is not None:  # guiders look processors up by exact class
        AttentionProcessorRegistry.register(new, known)
    return new


def wrap(original: Any, context: ModelContext, layer: int) -> SparseProcessor:
    """Processor that stands in for ``original`` in attention layer ``layer``."""
    if isinstance(original, torch.nn.Module):
        raise TypeError(f"{type(original).__name__} is a module with weights; dsattn wraps plain processors only")
    base: Any = type(original)
    cls: Any = wrapped_class(base, context.family.lazy_key_mask)
    new: SparseProcessor = object.__new__(cls)
    new.__dict__.update(original.__dict__)
    new.dsattn_site = Site(context, layer, original, context.family.per_row)
    new.assign_address()
    return new


def unwrap(processor: SparseProcessor) -> Any:
    """The original processor, with the backend or parallel settings that were made on its stand-in."""
    original = processor.dsattn_site.original
    settings = {k: v for k, v in processor.__dict__.items() if k not in ("dsattn_site", "dsattn_address")}
    for name, value in settings.items():
        if name not in original.__dict__ or original.__dict__[name] is not value:
            original.__dict__[name] = value
    processor.release_address()
    return original
