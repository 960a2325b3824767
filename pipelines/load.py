"""Loading any diffusers pipeline, for callers that may not import diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline


def from_pretrained(model: str, dtype: torch.dtype) -> Any:
    """Pipeline from a folder made by ``save_pretrained`` or a Hub id; errors are diffusers' own."""
    return DiffusionPipeline.from_pretrained(model, dtype=dtype)
