"""HunyuanVideo (T2V, I2V): video then text in one sequence, padded text masked out as keys.

The mask ``[B, 1, 1, S]`` is there even when nothing is padded; its true entries are always a prefix. The refiner of
the text embedder uses other processors and stays as it is.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn"),
    extra="text_last",
    key_padding=True,
)
