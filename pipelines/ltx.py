"""LTX-Video: packed tokens, video alone in self-attention.

The plain pipelines name the latent sizes. The condition pipeline passes only coordinates and puts the tokens of
condition frames in front; those stay exact.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family, named_sizes

LTX = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
    grid=named_sizes,
    patch=lambda config: (1, 1, 1),
    coords="video_coords",
)
