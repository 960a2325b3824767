"""Gives diffusers pipelines ``set_attn_processor`` for dsattn processors, without importing diffusers.

Two classes are touched, once each, when (or as soon as) diffusers has loaded them:

- ``DiffusionPipeline`` gets the method if it has none.
- ``AttentionMixin.set_attn_processor`` recognises a ``SparseAttnProcessor``, which asks for processors rather than
  being one; every other argument goes to the original function untouched.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def install() -> None:
    """Prepare the two classes now if they are loaded, else when they will be; calling it again changes nothing."""
    waiting = {}
    for name, prepare in _PREPARE.items():
        module = sys.modules.get(name)
        if module is None or not prepare(module):
            waiting[name] = prepare
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))


def _prepare_pipeline(module: ModuleType) -> bool:
    pipeline = getattr(module, "DiffusionPipeline", None)
    if pipeline is None:
        return False
    if not hasattr(pipeline, "set_attn_processor"):
        pipeline.set_attn_processor = _set_attn_processor
    return True


def _set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of the denoising models.

    Args:
        processor: a ``dsattn.SparseAttnProcessor``, or anything ``transformer.set_attn_processor`` takes.

    """
    from dsattn.pipelines.adapter import set_attn_processor

    set_attn_processor(self, processor)


def _prepare_mixin(module: ModuleType) -> bool:
    mixin = getattr(module, "AttentionMixin", None)
    if mixin is None:
        return False
    original = mixin.__dict__.get("set_attn_processor")
    if original is None or getattr(original, "dsattn_aware", False):
        return True

    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any) -> None:
        if getattr(processor, "dsattn_request", False):
            _set_attn_processor(self, processor)
        else:
            original(self, processor)

    set_attn_processor.dsattn_aware = True  # type: ignore[attr-defined]
    mixin.set_attn_processor = set_attn_processor
    return True


_PREPARE: dict[str, Callable[[ModuleType], bool]] = {
    "diffusers.pipelines.pipeline_utils": _prepare_pipeline,
    "diffusers.models.attention": _prepare_mixin,
}


class _AfterImport:
    """Import finder that runs a function after one of a few modules has been executed, and leaves when all have."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], bool]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The ordinary spec of a module we wait for, with our function behind its execution."""
        prepare = self.waiting.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if prepare is not None else None
        loader = spec.loader if spec is not None else None
        if prepare is None or loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            prepare(module)
            self.waiting.pop(name, None)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
