"""Wan 2.1 and 2.2 (T2V, I2V, V2V, VACE, Animate) and ChronoEdit: only video in self-attention.

VACE blocks attend over control tokens of the same length and count behind the main blocks. Reference images
are whole latent frames in front, so they are part of the grid. TI2V gives one timestep per token, zero for
the frames of a given image.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

WAN = Family(
    name="Wan",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    attention=(r"blocks\.(\d+)\.attn1", r"vace_blocks\.(\d+)\.attn1"),
)
