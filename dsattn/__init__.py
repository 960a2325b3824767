"""dsattn: sparse attention for video diffusion transformers.

Importing it needs torch only; diffusers and Triton are imported when something that uses them is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsattn import _diffusers_hook
from dsattn.block_plan import BlockPlan
from dsattn.config import Config, load_config
from dsattn.engine import Engine
from dsattn.errors import DsattnError, ImplUnavailableError, StrictFallbackError, UsageError
from dsattn.functional import attend, plan
from dsattn.grid import Call, VideoGrid
from dsattn.methods import METHODS

if TYPE_CHECKING:
    from dsattn.pipelines.adapter import (
        Handle,
        SparseAttnProcessor,
        attn_processors,
        disable,
        enable,
        enabled,
        summary,
    )

__version__ = "0.1.0.dev0"

_FROM_ADAPTER = (
    "Handle",
    "SparseAttnProcessor",
    "attn_processors",
    "disable",
    "enable",
    "enabled",
    "summary",
)

__all__ = [
    "METHODS",
    "BlockPlan",
    "Call",
    "Config",
    "DsattnError",
    "Engine",
    "Handle",
    "ImplUnavailableError",
    "SparseAttnProcessor",
    "StrictFallbackError",
    "UsageError",
    "VideoGrid",
    "attend",
    "attn_processors",
    "disable",
    "enable",
    "enabled",
    "load_config",
    "plan",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_ADAPTER:
        from dsattn.pipelines import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module 'dsattn' has no attribute {name!r}")


# Gives DiffusionPipeline its set_attn_processor once diffusers is imported, now or later.
_diffusers_hook.install()
