"""LTX-Video and LTX-2: packed tokens, only video in self-attention.

The plain pipelines name the latent sizes. The condition pipeline passes only coordinates and puts the tokens of
condition frames in front; those stay exact. LTX-2 puts the tokens of keyframes and references behind the video; its
audio and its attention between audio and video are left alone.
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

LTX2 = Family(
    name="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
    grid=named_sizes,
    patch=lambda config: (1, 1, 1),
    extra="suffix",
)
