"""Allegro: only video in self-attention, plain SDPA.

The pipeline passes no mask; a mask over video tokens would be additive, and such calls stay with the pipeline's own
attention.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

ALLEGRO = Family(
    name="Allegro",
    transformers=("AllegroTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
)
