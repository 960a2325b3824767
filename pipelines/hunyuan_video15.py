"""HunyuanVideo 1.5: video then text (valid tokens first); the stock processor expands its mask to S x S per layer.

At 75 000 tokens that mask alone takes 5.6 GB and two copies of it live at once, so it is kept a key mask.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn",),
    extra="text_last",
    key_padding=True,
    lazy_key_mask=True,
)
