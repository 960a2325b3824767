"""Tiny video transformers of families whose pipelines need text encoders too large for a test.

Each builder returns the transformer, the arguments of one forward pass, and the token grid of its self-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    ChronoEditTransformer3DModel,
    ConsisIDTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    WanAnimateTransformer3DModel,
)

from dsattn.grid import VideoGrid

from .tiny_pipelines import hunyuan_transformer, seed, wan_transformer

Case = tuple[Any, dict[str, Any], VideoGrid]
TIME = torch.tensor([500.0])


def hunyuan_i2v(kind: str) -> Case:
    seed()
    channels = 9 if kind == "latent_concat" else 4
    model: HunyuanVideoTransformer3DModel = hunyuan_transformer(
        in_channels=channels, image_condition_type=kind, guidance_embeds=False
    )
    args = {
        "hidden_states": torch.randn(1, channels, 3, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": (torch.arange(12) < 7).long()[None],
        "pooled_projections": torch.randn(1, 8),
    }
    return model, args, VideoGrid(3, 8, 8, text=12)


def framepack(batch: int = 1) -> Case:
    seed()
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    args = {
        "hidden_states": torch.randn(batch, 4, 3, 12, 12),
        "timestep": TIME.expand(batch),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
        "encoder_attention_mask": (torch.arange(12) < 7).long()[None].repeat(batch, 1),
        "pooled_projections": torch.randn(batch, 8),
        "image_embeds": torch.randn(batch, 3, 8),
        "indices_latents": torch.arange(3),
        "latents_clean": torch.randn(batch, 4, 2, 12, 12),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": torch.randn(batch, 4, 2, 12, 12),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": torch.randn(batch, 4, 4, 12, 12),
        "indices_latents_history_4x": torch.arange(4),
    }
    history = 2 * 6 * 6 + 3 * 3 + 2 * 2
    return model, args, VideoGrid(3, 6, 6, text=3 + (7 if batch == 1 else 12), prefix=history)


def chronoedit() -> Case:
    seed()
    model = wan_transformer(ChronoEditTransformer3DModel, rope_temporal_skip_len=2)
    args = {
        "hidden_states": torch.randn(1, 16, 2, 8, 10),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 9, 32),
    }
    return model, args, VideoGrid(2, 4, 5)


def wan_animate() -> Case:
    seed()
    model = wan_transformer(
        WanAnimateTransformer3DModel,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        image_dim=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    args = {
        "hidden_states": torch.randn(1, 12, 4, 8, 10),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 512, 32),
        "encoder_hidden_states_image": torch.randn(1, 5, 4),
        "pose_hidden_states": torch.randn(1, 4, 3, 8, 10),
        "face_pixel_values": torch.randn(1, 3, 9, 16, 16),
    }
    return model, args, VideoGrid(3, 4, 5, prefix=20)


def helios() -> Case:
    seed()
    model = HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
        is_amplify_history=True,
    )
    args = {
        "hidden_states": torch.randn(1, 16, 3, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 9, 32),
        "indices_hidden_states": torch.arange(3)[None],
        "indices_latents_history_short": torch.arange(2)[None],
        "latents_history_short": torch.randn(1, 16, 2, 8, 8),
    }
    return model, args, VideoGrid(3, 4, 4, prefix=32)


def consisid() -> Case:
    seed()
    model = ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=6,
    )
    args = {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "timestep": TIME.expand(2),
        "encoder_hidden_states": torch.randn(2, 6, 8),
    }
    return model, args, VideoGrid(3, 4, 4, text=6, text_first=True)


def allegro() -> Case:
    seed()
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=3,
        caption_channels=24,
    )
    positions = [torch.arange(3 * 4 * 4) // 16, torch.arange(48) // 4 % 4, torch.arange(48) % 4]
    frequencies = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    args = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "encoder_attention_mask": torch.ones(1, 6),
        "image_rotary_emb": (frequencies, [position[None] for position in positions]),
    }
    return model, args, VideoGrid(3, 4, 4)


def easyanimate() -> Case:
    seed()
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=8,
        time_position_encoding_type="3d_rope",
    )
    args = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 6, 8),
    }
    return model, args, VideoGrid(3, 4, 4, text=6, text_first=True)


def kandinsky5() -> Case:
    seed()
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=6,
        time_dim=8,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    args = {
        "hidden_states": torch.randn(1, 3, 8, 10, 4),
        "timestep": TIME,
        "encoder_hidden_states": torch.randn(1, 7, 8),
        "pooled_projections": torch.randn(1, 6),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(5)],
        "text_rope_pos": torch.arange(7),
    }
    return model, args, VideoGrid(3, 4, 5)


def ltx2() -> Case:
    seed()
    model = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
    )
    args = {
        "hidden_states": torch.randn(1, 3 * 4 * 5, 4),
        "audio_hidden_states": torch.randn(1, 9, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "audio_encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": TIME,
        "encoder_attention_mask": torch.ones(1, 6),
        "audio_encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 3,
        "height": 4,
        "width": 5,
        "audio_num_frames": 9,
    }
    return model, args, VideoGrid(3, 4, 5)


CASES: dict[str, Callable[[], Case]] = {
    "hunyuan_i2v_latent_concat": lambda: hunyuan_i2v("latent_concat"),
    "hunyuan_i2v_token_replace": lambda: hunyuan_i2v("token_replace"),
    "framepack": framepack,
    "framepack_batch": lambda: framepack(2),
    "chronoedit": chronoedit,
    "wan_animate": wan_animate,
    "helios": helios,
    "consisid": consisid,
    "allegro": allegro,
    "easyanimate": easyanimate,
    "kandinsky5": kandinsky5,
    "ltx2": ltx2,
}
