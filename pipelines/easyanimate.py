"""EasyAnimate: text (of one or two encoders) then video in one sequence, plain SDPA."""

from __future__ import annotations

from dsattn.pipelines.family import Family

EASYANIMATE = Family(
    name="EasyAnimate",
    transformers=("EasyAnimateTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn1",),
    extra="text_first",
)
