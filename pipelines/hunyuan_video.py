"""HunyuanVideo (T2V, I2V) and Framepack: video then text in one sequence, padded text masked out as keys.

The mask ``[B, 1, 1, S]`` is there even when nothing is padded; its true entries are always a prefix. The refiner of
the text embedder uses other processors and stays as it is. Framepack puts the tokens of earlier frames, coarser the
older they are, in front of the video, and drops padded text when there is one sample only.
"""

from __future__ import annotations

from dsattn.pipelines.family import Arguments, Family

_HISTORY = (  # argument, argument with its frame indices, patch (frames, height, width)
    ("latents_clean", "indices_latents_clean", (1, 2, 2)),
    ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4)),
    ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8)),
)


def _framepack_history(args: Arguments) -> int:
    """Tokens in front of the video; each kind of history is padded to whole patches of its own size."""
    tokens = 0
    for name, indices, (frames, height, width) in _HISTORY:
        latents = args.get(name)
        if latents is not None and args.get(indices) is not None:
            t, h, w = latents.shape[2:]
            tokens += -(-t // frames) * -(-h // height) * -(-w // width)
    return tokens


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=(r"transformer_blocks\.(\d+)\.attn", r"single_transformer_blocks\.(\d+)\.attn"),
    extra="text_last",
    key_padding=True,
)

FRAMEPACK = Family(
    name="Framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    attention=HUNYUAN_VIDEO.attention,
    history=_framepack_history,
    extra="text_last",
    key_padding=True,
)
