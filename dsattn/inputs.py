"""What a run was given besides its attention: two runs are compared only if they differ in nothing else.

The values are seen where every diffusers pipeline passes them: what ``encode_prompt`` returns, the latents and the
schedule that the scheduler steps on. None of it costs the measured run more than a copy of the first latents.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsattn.errors import DsattnError


class ArmsDifferError(DsattnError):
    """Two runs that should differ in their attention alone differ in something else too."""


class InputWatch:
    """Looks at what one run of a pipeline gets; see :meth:`facts`."""

    def __init__(self) -> None:
        self._embeddings: list[Tensor] = []
        self._latents: Tensor | None = None

    def encoding(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """``pipe.encode_prompt`` that remembers what it returned."""

        @functools.wraps(stock)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            found = result if isinstance(result, (tuple, list)) else (result,)
            self._embeddings += [value.detach() for value in found if isinstance(value, Tensor)]
            return result

        return watched

    def stepping(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """``scheduler.step`` that remembers the latents of the first step."""

        # Pipelines ask for the parameters of this function: wrapped, it still shows them.
        @functools.wraps(stock)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._latents is None:
                sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
                self._latents = sample.detach().clone() if isinstance(sample, Tensor) else None
            return stock(*args, **kwargs)

        return watched

    def facts(self, pipe: Any) -> dict[str, str | None]:
        """Scheduler, dtype, digests of schedule, prompt embeddings and first latents; None for what was not seen."""
        scheduler = getattr(pipe, "scheduler", None)
        schedule = [getattr(scheduler, name, None) for name in ("timesteps", "sigmas")]
        return {
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "schedule": digest([value for value in schedule if isinstance(value, Tensor)]),
            "dtype": str(getattr(pipe, "dtype", "unknown")).removeprefix("torch."),
            "prompt_embeddings": digest(self._embeddings),
            "initial_latents": digest([] if self._latents is None else [self._latents]),
        }


def digest(tensors: list[Tensor]) -> str | None:
    """Sixteen hexadecimal digits of SHA-256 over dtypes, shapes and values; None of nothing."""
    if not tensors:
        return None
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def check_same(first: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Make sure that two runs were given the same.

    Args:
        first, other: ``Run.inputs``.
        names: of the two runs, for the message.

    Raises:
        ArmsDifferError: naming every value that differs.

    """
    different = [
        f"{name} is {first.get(name)} in the {names[0]} run and {other.get(name)} in the {names[1]} run"
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]
    if different:
        raise ArmsDifferError(
            f"the runs differ in more than attention, so nothing is compared: {'; '.join(different)}; expected equal "
            "values (is something outside dsattn changing the pipeline between runs?)"
        )
