"""Mochi: video then valid text, one attention call per batch row, plain SDPA.

Rows differ in length because each keeps only its own valid text, hence every row has its own state.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

MOCHI = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
    extra="text_last",
    per_row=True,
)
