"""The parts of the small model: tokenizer, text encoder and transformer, all built from stock classes."""

from __future__ import annotations

import string

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dsattn.pipelines.tiny.data import vocabulary

MAX_TEXT = 48
"""Prompt length in tokens; training pads to the same length because WanPipeline does not mask cross-attention."""
TEXT_DIM = 128
FLOW_SHIFT = 5.0
GUIDANCE = 4.0
DEFAULTS = {"height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": GUIDANCE}
"""What a call of either model's pipeline takes unless it says otherwise."""


def build_vocabulary() -> dict[str, int]:
    """Special tokens, then the grammar's words, then single characters so that any prompt encodes to something."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokens += [c for c in characters if c not in tokens] + [f"##{c}" for c in characters]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(vocab: dict[str, int] | None = None, max_text: int = MAX_TEXT) -> PreTrainedTokenizerFast:
    """Word-level tokenizer in memory; words outside the grammar fall apart into the longest known pieces.

    Args:
        vocab: token to index (default: `build_vocabulary`).
        max_text: prompt length in tokens, of which the last one is the end of the text.

    """
    model = models.WordPiece(vocab=vocab or build_vocabulary(), unk_token="<unk>", max_input_chars_per_word=64)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_text,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 128."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def build_transformer(z_dim: int) -> WanTransformer3DModel:
    """The Wan architecture at 6 layers, 3 heads of 64, one token per latent position."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=z_dim,
        out_channels=z_dim,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    ).eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow-matching Euler with the shift that training assumes."""
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
