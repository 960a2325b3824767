"""Helios: only video in self-attention, with the tokens of earlier frames in front, coarser the older they are."""

from __future__ import annotations

from dsattn.pipelines.family import Family

HELIOS = Family(
    name="Helios",
    transformers=("HeliosTransformer3DModel",),
    attention=(r"blocks\.(\d+)\.attn1",),
    extra="prefix",
)
