"""CogVideoX 1.0 and 1.5 and ConsisID: text then video in one sequence, frames before channels, plain SDPA.

CogVideoX 1.5 also patches time; the pipeline pads the latent frames to whole patches beforehand.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family, frames_first

COGVIDEOX = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
    grid=frames_first,
    extra="text_first",
)
