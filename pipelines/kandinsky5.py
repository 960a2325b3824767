"""Kandinsky 5: only video in self-attention, channels last.

With its own NABLA sparsity it permutes tokens and passes a block mask; such calls stay with the pipeline's own
attention.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family, channels_last

KANDINSKY5 = Family(
    name="Kandinsky 5",
    transformers=("Kandinsky5Transformer3DModel",),
    attention=(r"visual_transformer_blocks\.(\d+)\.self_attention",),
    grid=channels_last,
)
