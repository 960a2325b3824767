"""SkyReels V2: Wan's layout; diffusion forcing gives a timestep per frame and may add a block-causal mask.

That mask is dense over all tokens, so such calls stay with the pipeline's own attention.
"""

from __future__ import annotations

from dsattn.pipelines.family import Family

SKYREELS_V2 = Family(
    name="SkyReelsV2",
    transformers=("SkyReelsV2Transformer3DModel",),
    attention=(r"blocks\.(\d+)\.attn1",),
)
