"""Wan 2.1 and 2.2 (T2V, I2V, V2V, VACE, Animate) and ChronoEdit: only video in self-attention.

VACE blocks attend over control tokens of the same length and count behind the main blocks; its reference images are
whole latent frames in front and part of the grid. In Animate the first frame is the reference picture, which is kept
exact like other tokens that are not video. TI2V gives one timestep per token, zero for the frames of a given image.
"""

from __future__ import annotations

from dsattn.pipelines.family import Arguments, Family, Size, channels_first


def _behind_reference(args: Arguments, patch: Size) -> Size | None:
    """Grid without the reference frame in front."""
    frames, height, width = channels_first(args, patch) or (1, 1, 1)
    return frames - 1, height, width


WAN = Family(
    name="Wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel"),
    attention=(r"blocks\.(\d+)\.attn1", r"vace_blocks\.(\d+)\.attn1"),
)

WAN_ANIMATE = Family(
    name="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    attention=(r"blocks\.(\d+)\.attn1",),
    grid=_behind_reference,
    extra="prefix",
)
