"""The two operators a compiled transformer calls instead of Python code.

``torch.compile`` must not see which step, branch or plan a call belongs to: each of them would become a guard
and force a recompilation per step or per layer. So a traced forward contains only these operators. They take a
0-dim CPU tensor that addresses the Python object to run: a tensor value is not a guard, hence every layer shares
one graph. Under CUDA graphs the Python body would not run on replay, so both operators are tagged as unsafe
for them and stay outside captured regions.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor

_Self = TypeVar("_Self", bound="Addressable")

# The only state of this package that is not owned by an object a user holds: addresses of live objects.
_addresses: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_address = itertools.count()


class Addressable:
    """An object that the operators below can find by a tensor; a deep copy gets an address of its own."""

    dsattn_address: Tensor

    def assign_address(self) -> None:
        """Give this object an address; it is forgotten with the object."""
        number = next(_next_address)
        _addresses[number] = self
        self.dsattn_address = torch.tensor(number, dtype=torch.int64, device="cpu")

    def release_address(self) -> None:
        """Forget the address now; a compiled graph that still uses it raises."""
        _addresses.pop(int(self.dsattn_address), None)

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name == "dsattn_address" else copy.deepcopy(value, memo)
        if int(self.dsattn_address) in _addresses:
            new.assign_address()
        return new


def live_addresses() -> int:
    """Number of objects that compiled code can reach now."""
    return len(_addresses)


def _find(address: Tensor) -> Any:
    found = _addresses.get(int(address))
    if found is None:
        raise RuntimeError(
            "a compiled graph calls dsattn attention that was removed; run torch.compiler.reset() or compile the "
            "transformer again after handle.remove()"
        )
    return found


_UNSAFE = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("dsattn::attention", mutates_args=(), tags=_UNSAFE)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, row: int, address: Tensor
) -> Tensor:
    """Attention of one layer as its processor decides now.

    Args:
        query, key, value: ``[B, S, H, D]`` after norm and RoPE.
        mask: key mask as the model passes it, or None.
        scale: softmax scale, None for ``D ** -0.5``.
        row: batch row, for models that call attention once per row; -1 when all rows come together.
        address: which processor.

    """
    out: Tensor = _find(address).dsattn_attend(query, key, value, mask, scale, row)
    return out.clone(memory_format=torch.contiguous_format) if out.data_ptr() == value.data_ptr() else out.contiguous()


@attention.register_fake
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, row: int, address: Tensor
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("dsattn::begin", mutates_args=(), tags=_UNSAFE)
def begin(timestep: Tensor, coords: Tensor | None, dims: list[int], address: Tensor) -> Tensor:
    """Start of one forward pass of a transformer; returns a copy of the timestep.

    Every attention layer depends on the timestep, so replacing it by this result orders the pass behind this call.

    Args:
        timestep: as the pipeline passed it.
        coords: token coordinates for models that give no grid, or None.
        dims: latent frames, height, width and history in tokens; empty where only coordinates tell.
        address: which transformer.

    """
    _find(address).begin(timestep, coords, tuple(dims))
    return timestep.clone()


@begin.register_fake
def _begin_fake(timestep: Tensor, coords: Tensor | None, dims: list[int], address: Tensor) -> Tensor:
    return torch.empty_like(timestep)
